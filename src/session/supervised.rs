// SPDX-License-Identifier: MIT OR Apache-2.0
//! Handlers that are watched: how they end decides how the streams end that they leave behind.
//!
//! A handler that fails drops its stream before its failure is seen, in the same poll.
//! Dropped streams are closed, and a peer takes that for a clean end. So while a handler is polled,
//! the ends of its session's streams are put off; behind the poll they are closed, or
//! [reset](crate::Stream::reset) if the handler has failed. So they are when a handler is dropped
//! before it has ended. A stream that a handler closes itself stays closed.

use std::cell::Cell;
use std::convert::Infallible;
use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;

use crate::exec::contain::Contained;
use crate::session::state::{SessionInner, StreamInner};
use crate::session::supervision::Mark;
use shmipc_core::proto::session::stream::{Half, Halves};

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

/// Which streams a handler that fails has failed.
#[derive(Clone, Copy)]
pub(crate) enum Of<'a> {
    /// The one that it was started for.
    Stream(&'a Rc<StreamInner>),
    /// All of its session's that it had to do with.
    Session,
}

impl SessionInner {
    /// One half of a stream's handle is gone.
    pub(crate) fn drop_half(&self, stream: &StreamInner, half: Half) {
        match (stream.drop_half(half), half) {
            // A task that panics was not done.
            (Halves::None, _) if std::thread::panicking() => self.proto.reset_stream(self, stream),
            // How the handler ends that is running decides.
            (Halves::None, _) | (_, Half::Write) if self.supervision.ends.is_on() => {
                if let Some(stream) = self.proto.stream(stream.id()) {
                    self.supervision.ends.push(stream);
                }
            }
            (Halves::None, _) => self.proto.close_stream(self, stream),
            (_, Half::Write) if std::thread::panicking() => self.proto.reset_stream(self, stream),
            (_, Half::Write) => self.proto.half_close_stream(self, stream),
            // What comes from now on is dropped on arrival.
            (_, Half::Read) => self.proto.on_reader_dropped(self, stream),
        }
    }

    /// Ends what was put off since the mark.
    #[inline]
    fn settle(&self, mark: Mark, of: Of<'_>, has_failed: bool) {
        let has_deferred = self.supervision.ends.restore(mark);
        if has_failed || has_deferred {
            self.settle_some(mark, of, has_failed);
        }
    }

    #[inline(never)]
    fn settle_some(&self, mark: Mark, of: Of<'_>, has_failed: bool) {
        // Also where a part of it is held elsewhere: nothing else would end it.
        if let (Of::Stream(stream), true) = (of, has_failed) {
            self.proto.reset_stream(self, stream);
        }
        for stream in self.supervision.ends.take_since(mark) {
            match (of, stream.halves()) {
                (Of::Session, _) if has_failed => self.proto.reset_stream(self, &stream),
                (_, Halves::None) => self.proto.close_stream(self, &stream),
                (_, Halves::Only(Half::Read)) => self.proto.half_close_stream(self, &stream),
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
