// SPDX-License-Identifier: MIT OR Apache-2.0
//! A look at all sessions of a core, from time to time, for what no event tells of: a peer that was
//! stopped, or hangs, and memory that went away while its session slept.

use std::cell::Cell;
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_lite::future::or;

use crate::exec::runtime::sleep;
use crate::exec::wakers::WakerSlot;
use crate::reactor::poll_loop::Reactor;
use crate::reactor::pollable::Pollable;
use crate::reactor::sweep::SweepList;

/// How many looks a limit is divided into.
const LOOKS_PER_LIMIT: u32 = 4;
/// How often at least, and at most, sessions are looked at.
const SHORTEST: Duration = Duration::from_millis(1);
const LONGEST: Duration = Duration::from_secs(15);

/// The sessions of a core that are looked at.
pub(crate) struct Liveness<S> {
    sessions: SweepList<Weak<S>>,
    interval: Cell<Duration>,
    is_running: Cell<bool>,
    /// The task, while it sleeps.
    task: WakerSlot,
    has_changed: Cell<bool>,
}

impl<S> Default for Liveness<S> {
    fn default() -> Self {
        Self {
            sessions: SweepList::default(),
            interval: Cell::new(LONGEST),
            is_running: Cell::new(false),
            task: WakerSlot::default(),
            has_changed: Cell::new(false),
        }
    }
}

impl<S: Pollable> Liveness<S> {
    /// Has the sessions looked at anew: one of them has ended.
    pub(crate) fn note_end(&self) {
        if self.is_running.get() {
            self.has_changed.set(true);
            self.task.wake();
        }
    }

    /// Ends all sessions.
    pub(crate) fn end_sessions(&self) {
        self.for_each(|session| session.terminate());
    }

    /// Lets the peers of all sessions know that this side is gone, and removes their files. Wakes
    /// nobody: the executor is no more.
    pub(crate) fn abandon_sessions(&self) {
        self.for_each(|session| session.abandon());
    }

    fn for_each(&self, act: impl Fn(&Rc<S>)) {
        self.sessions.sweep(|session| {
            if let Some(session) = session.upgrade() {
                act(&session);
            }
            true
        });
    }

    /// Looks at those that are left, and after them if so much time has passed since that was done.
    fn look(&self, passed: Option<Duration>) {
        self.sessions.sweep(|session| {
            let Some(session) = session.upgrade().filter(|session| !session.is_over()) else {
                return false;
            };
            if let Some(passed) = passed {
                session.look_after(passed);
            }
            !session.is_over()
        });
    }
}

impl<S: Pollable> Reactor<S> {
    /// Looks after a session for as long as it lives.
    pub(crate) fn watch(self: &Rc<Self>, session: &Rc<S>) {
        let watch = self.watching();
        let limit = session.stall_timeout().unwrap_or(LONGEST);
        let interval = (limit / LOOKS_PER_LIMIT).clamp(SHORTEST, LONGEST);
        watch.interval.set(watch.interval.get().min(interval));
        watch.sessions.push(Rc::downgrade(session));
        if watch.is_running.replace(true) {
            watch.note_end();
        } else {
            self.spawn(look_after_sessions(Rc::clone(self)));
        }
    }
}

async fn look_after_sessions<S: Pollable>(poller: Rc<Reactor<S>>) {
    let watch = poller.watching();
    let mut last = Instant::now();
    while !watch.sessions.is_empty() {
        let changed = poll_fn(|context| {
            if watch.has_changed.take() {
                return Poll::Ready(());
            }
            watch.task.register(context);
            Poll::Pending
        });
        let interval = watch.interval.get();
        let due = async {
            sleep((last + interval).saturating_duration_since(Instant::now())).await;
        };
        or(changed, due).await;
        let is_due = last.elapsed() >= interval;
        watch.look(is_due.then_some(interval));
        if is_due {
            last = Instant::now();
        }
    }
    watch.is_running.set(false);
}
