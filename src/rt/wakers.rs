// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tasks of this core that wait for something to change.

use std::cell::{Cell, RefCell};
use std::task::{Context, Waker};
use std::time::Instant;

/// One task that waits. A second one that waits for the same thing takes its place.
#[derive(Default)]
pub(super) struct WakerSlot {
    waker: RefCell<Option<Waker>>,
}

impl WakerSlot {
    #[inline]
    pub(super) fn register(&self, context: &Context<'_>) {
        let mut slot = self.waker.borrow_mut();
        // Most often the same task comes back; cloning its waker would touch a counter for nothing.
        if !slot
            .as_ref()
            .is_some_and(|waker| waker.will_wake(context.waker()))
        {
            *slot = Some(context.waker().clone());
        }
    }

    #[inline]
    pub(super) fn wake(&self) {
        let waker = self.waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Any number of tasks that wait, each possibly with a time at which it wants to know anyway.
#[derive(Default)]
pub(super) struct WakerList {
    waiting: RefCell<Vec<(Waker, Option<Instant>)>>,
    count: Cell<usize>,
}

impl WakerList {
    pub(super) fn register(&self, context: &Context<'_>, deadline: Option<Instant>) {
        let mut waiting = self.waiting.borrow_mut();
        match waiting
            .iter_mut()
            .find(|(waker, _)| waker.will_wake(context.waker()))
        {
            Some((_, at)) => *at = deadline,
            None => waiting.push((context.waker().clone(), deadline)),
        }
        self.count.set(waiting.len());
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.count.get() == 0
    }

    /// Wakes everybody, in the order in which they came.
    pub(super) fn wake_all(&self) {
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        self.count.set(0);
        for (waker, _) in waiting {
            waker.wake();
        }
    }

    /// Wakes those whose time has come.
    pub(super) fn wake_expired(&self, now: Instant) {
        let is_late = |at: &Option<Instant>| at.is_some_and(|at| at <= now);
        let mut index = 0;
        loop {
            let waker = {
                let mut waiting = self.waiting.borrow_mut();
                let late = waiting[index..].iter().position(|(_, at)| is_late(at));
                let Some(offset) = late else { break };
                index += offset;
                let (waker, _) = waiting.remove(index);
                self.count.set(waiting.len());
                waker
            };
            waker.wake();
        }
    }
}
