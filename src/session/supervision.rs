// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a session keeps of the handlers that serve it and its streams.

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;

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

    pub(crate) fn record_failed_stream(&self) {
        (self.count_failed_stream)();
    }
}

/// What a session knows of its handlers.
pub(crate) struct Supervision<S> {
    pub(crate) ends: DeferredEnds<S>,
    /// Which server's shard has the session, if one has.
    pub(crate) served_by: OnceCell<ServedBy>,
}

/// The ends of a session's streams that are put off.
pub(crate) struct DeferredEnds<S> {
    is_on: Cell<bool>,
    count: Cell<usize>,
    streams: RefCell<Vec<Rc<S>>>,
}

impl<S> DeferredEnds<S> {
    /// Whether ends are put off now.
    #[inline]
    pub(crate) fn is_on(&self) -> bool {
        self.is_on.get()
    }

    /// Puts them off until [`restore`](Self::restore).
    #[inline]
    pub(crate) fn begin(&self) -> Mark {
        Mark { was_on: self.is_on.replace(true), count: self.count.get() }
    }

    /// What it was before the mark. Whether ends were put off since.
    #[inline]
    pub(crate) fn restore(&self, mark: Mark) -> bool {
        self.is_on.set(mark.was_on);
        self.count.get() != mark.count
    }

    pub(crate) fn push(&self, stream: Rc<S>) {
        let mut streams = self.streams.borrow_mut();
        streams.push(stream);
        self.count.set(streams.len());
    }

    /// Takes those that were put off since the mark.
    pub(crate) fn take_since(&self, mark: Mark) -> Vec<Rc<S>> {
        let mut streams = self.streams.borrow_mut();
        let first = mark.count.min(streams.len());
        let taken = streams.split_off(first);
        self.count.set(streams.len());
        taken
    }
}

/// How it was before the innermost handler was polled: the first poll of a task that a handler
/// starts is inside of the handler's own.
#[derive(Clone, Copy)]
pub(crate) struct Mark {
    was_on: bool,
    count: usize,
}

impl<S> Default for DeferredEnds<S> {
    fn default() -> Self {
        Self { is_on: Cell::new(false), count: Cell::new(0), streams: RefCell::default() }
    }
}

impl<S> Default for Supervision<S> {
    fn default() -> Self {
        Self { ends: DeferredEnds::default(), served_by: OnceCell::new() }
    }
}
