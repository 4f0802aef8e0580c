// SPDX-License-Identifier: MIT OR Apache-2.0
//! Handlers that are watched: how they end decides how the streams end that they leave behind.
//!
//! A handler that fails drops its stream before anybody sees that it has failed, in the same poll.
//! Dropped streams are closed, and a peer takes that for a clean end. So while a handler is polled,
//! the ends of its session's streams are put off; behind the poll they are closed, or
//! [reset](crate::Stream::reset) if the handler has failed. So they are when a handler is dropped
//! before it has ended. What a handler closes by name, it has closed.

use std::cell::{Cell, OnceCell, RefCell};
use std::convert::Infallible;
use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;

use crate::exec::contain::Contained;
use crate::session::state::SessionInner;
use crate::session::stream::{Half, Halves, StreamInner};

/// What the handler of a stream gives: nothing, or whether it went well.
///
/// A handler that fails has its stream [reset](crate::Stream::reset), so that the peer does not
/// take what it got for all there was.
pub trait StreamOutcome {
    /// Why the handler failed, if it did.
    fn failure(&self) -> Option<&dyn fmt::Display>;
}

impl StreamOutcome for () {
    fn failure(&self) -> Option<&dyn fmt::Display> {
        None
    }
}

impl StreamOutcome for Infallible {
    fn failure(&self) -> Option<&dyn fmt::Display> {
        None
    }
}

impl<T, E: fmt::Display> StreamOutcome for Result<T, E> {
    fn failure(&self) -> Option<&dyn fmt::Display> {
        self.as_ref().err().map(|error| error as &dyn fmt::Display)
    }
}

/// Which of a server's shards has a session, and by which number.
pub(crate) struct ServedBy {
    shard: usize,
    session: u64,
    count_failed_stream: Box<dyn Fn()>,
}

impl ServedBy {
    /// `count_failed_stream` counts a stream whose handler failed.
    pub(crate) fn new(
        shard: usize,
        session: u64,
        count_failed_stream: impl Fn() + 'static,
    ) -> Self {
        Self { shard, session, count_failed_stream: Box::new(count_failed_stream) }
    }

    pub(crate) fn shard(&self) -> usize {
        self.shard
    }

    pub(crate) fn session(&self) -> u64 {
        self.session
    }

    pub(crate) fn note_failed_stream(&self) {
        (self.count_failed_stream)();
    }
}

/// What a session knows of its handlers.
#[derive(Default)]
pub(crate) struct Supervision {
    pub(crate) ends: DeferredEnds,
    /// Which server's shard has the session, if one has.
    pub(crate) served_by: OnceCell<ServedBy>,
}

/// The ends of a session's streams that are put off.
#[derive(Default)]
pub(crate) struct DeferredEnds {
    is_on: Cell<bool>,
    count: Cell<usize>,
    streams: RefCell<Vec<Rc<StreamInner>>>,
}

impl DeferredEnds {
    /// Whether ends are put off now.
    #[inline]
    pub(crate) fn is_on(&self) -> bool {
        self.is_on.get()
    }

    /// Puts them off until [`SessionInner::settle`].
    #[inline]
    fn begin(&self) -> Mark {
        Mark { was_on: self.is_on.replace(true), count: self.count.get() }
    }

    pub(crate) fn push(&self, stream: Rc<StreamInner>) {
        let mut streams = self.streams.borrow_mut();
        streams.push(stream);
        self.count.set(streams.len());
    }

    fn take_from(&self, first: usize) -> Vec<Rc<StreamInner>> {
        let mut streams = self.streams.borrow_mut();
        let first = first.min(streams.len());
        let taken = streams.split_off(first);
        self.count.set(streams.len());
        taken
    }
}

/// How it was before the innermost handler was polled: the first poll of a task that a handler
/// starts is inside of the handler's own.
#[derive(Clone, Copy)]
struct Mark {
    was_on: bool,
    count: usize,
}

/// Which streams a handler that fails has failed.
#[derive(Clone, Copy)]
pub(crate) enum Of<'a> {
    /// The one that it was started for.
    Stream(&'a Rc<StreamInner>),
    /// All of its session's that it had to do with.
    Session,
}

impl SessionInner {
    /// Ends what was put off since the mark.
    #[inline]
    fn settle(self: &Rc<Self>, mark: Mark, of: Of<'_>, has_failed: bool) {
        self.supervision.ends.is_on.set(mark.was_on);
        if has_failed || self.supervision.ends.count.get() != mark.count {
            self.settle_some(mark, of, has_failed);
        }
    }

    #[inline(never)]
    fn settle_some(self: &Rc<Self>, mark: Mark, of: Of<'_>, has_failed: bool) {
        // Also where a part of it is held elsewhere: nobody would end it.
        if let (Of::Stream(stream), true) = (of, has_failed) {
            self.reset_stream(stream);
        }
        for stream in self.supervision.ends.take_from(mark.count) {
            match (of, stream.halves()) {
                (Of::Session, _) if has_failed => self.reset_stream(&stream),
                (_, Halves::None) => self.close_stream(&stream),
                (_, Halves::Only(Half::Read)) => self.half_close_stream(&stream),
                (_, Halves::Only(Half::Write) | Halves::Both) => {}
            }
        }
    }
}

/// Runs a handler. `Err`: it panicked.
pub(crate) async fn supervised<T>(
    session: &Rc<SessionInner>,
    of: Of<'_>,
    has_failed: impl Fn(&T) -> bool,
    handler: impl Future<Output = T>,
) -> std::thread::Result<T> {
    // Both do something only if this is dropped before the handler has ended: what is dropped
    // between them is the handler.
    let cut = Cut { session, of, mark: Cell::new(None) };
    let mut handler = Contained::new(handler);
    let is_dropped = CutBegins { cut: &cut, is_armed: Cell::new(true) };
    let result = poll_fn(|context| {
        let mark = session.supervision.ends.begin();
        let polled = Pin::new(&mut handler).poll(context);
        let failed = match &polled {
            Poll::Pending => false,
            Poll::Ready(Ok(result)) => has_failed(result),
            Poll::Ready(Err(_)) => true,
        };
        session.settle(mark, of, failed);
        polled
    })
    .await;
    is_dropped.is_armed.set(false);
    result
}

/// Dropped behind the handler.
struct Cut<'a> {
    session: &'a Rc<SessionInner>,
    of: Of<'a>,
    mark: Cell<Option<Mark>>,
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        if let Some(mark) = self.mark.get() {
            self.session.settle(mark, self.of, true);
        }
    }
}

/// Dropped before the handler.
struct CutBegins<'a> {
    cut: &'a Cut<'a>,
    is_armed: Cell<bool>,
}

impl Drop for CutBegins<'_> {
    fn drop(&mut self) {
        if self.is_armed.get() {
            self.cut.mark.set(Some(self.cut.session.supervision.ends.begin()));
        }
    }
}
