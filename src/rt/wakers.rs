// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tasks of this core that wait for something to change.

use std::cell::{Cell, RefCell};
use std::task::{Context, Waker};
use std::time::Instant;

/// One task that waits. A second one that waits for the same thing takes its place.
#[derive(Default)]
pub(super) struct WakerSlot {
    waker: RefCell<Option<Waker>>,
    /// Whether the task waits now. The waker stays when it does not: most often the same task comes
    /// back, and cloning and dropping a waker each time costs as much as waking.
    is_waiting: Cell<bool>,
}

impl WakerSlot {
    /// Notes that the task waits. Whether nobody did before.
    #[inline]
    pub(super) fn register(&self, context: &Context<'_>) -> bool {
        let mut slot = self.waker.borrow_mut();
        if !slot.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
            *slot = Some(context.waker().clone());
        }
        !self.is_waiting.replace(true)
    }

    /// Wakes the task, if one waits. Whether one did.
    #[inline]
    pub(super) fn wake(&self) -> bool {
        if !self.is_waiting.replace(false) {
            return false;
        }
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
        true
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
        match waiting.iter_mut().find(|(waker, _)| waker.will_wake(context.waker())) {
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
