// SPDX-License-Identifier: MIT OR Apache-2.0
//! A look at all sessions of a core, from time to time, for what no event tells of: a peer that was
//! stopped, or hangs, and memory that went away while its session slept.

use std::cell::Cell;
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_lite::future::or;

use super::poller::Poller;
use super::session::SessionInner;
use super::sweep::SweepList;
use super::wakers::WakerSlot;
use crate::error::{Error, HandshakeError, MemoryError};

/// How many looks a limit is divided into.
const LOOKS_PER_LIMIT: u32 = 4;
/// How often at least, and at most, sessions are looked at.
const SHORTEST: Duration = Duration::from_millis(1);
const LONGEST: Duration = Duration::from_secs(15);

/// The sessions of a core that are looked at.
pub(super) struct Watch {
    sessions: SweepList<Weak<SessionInner>>,
    interval: Cell<Duration>,
    is_running: Cell<bool>,
    /// The task, while it sleeps.
    task: WakerSlot,
    has_changed: Cell<bool>,
}

impl Default for Watch {
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

impl Watch {
    /// Has the sessions looked at anew: one of them has ended.
    pub(super) fn note_end(&self) {
        if self.is_running.get() {
            self.has_changed.set(true);
            self.task.wake();
        }
    }

    /// Ends all sessions.
    pub(super) fn end_sessions(&self) {
        self.for_each(|session| session.fail(Error::SessionClosed));
    }

    /// Lets the peers of all sessions know that this side is gone, and removes their files. Wakes
    /// nobody: the executor is no more.
    pub(super) fn abandon_sessions(&self) {
        self.for_each(|session| session.abandon());
    }

    fn for_each(&self, act: impl Fn(&Rc<SessionInner>)) {
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

/// How many parts the time is waited in that a server of version 2 has for the first event. When
/// both sides were stopped meanwhile, that counts as one of them.
const PARTS_OF_FIRST: u32 = 8;

/// What is known of how a session's peer moves.
#[derive(Default)]
pub(super) struct Movement {
    /// Whether it has to show that it is there at all, by taking the first event.
    is_unproven: Cell<bool>,
    head: Cell<i64>,
    /// For how long the peer has not moved, since there was something for it.
    still: Cell<Option<Duration>>,
}

impl Poller {
    /// Looks after a session for as long as it lives.
    pub(super) fn watch(self: &Rc<Self>, session: &Rc<SessionInner>) {
        let watch = self.watching();
        let limit = session.config.limits.stall.unwrap_or(LONGEST);
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

async fn look_after_sessions(poller: Rc<Poller>) {
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
            glommio::timer::sleep((last + interval).saturating_duration_since(Instant::now()))
                .await;
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

async fn await_first_event_taken(session: Weak<SessionInner>) {
    for part in 1..=PARTS_OF_FIRST {
        let Some(limit) = session.upgrade().map(|session| session.config.limits.handshake_timeout)
        else {
            return;
        };
        glommio::timer::sleep(limit / PARTS_OF_FIRST).await;
        let Some(session) = session.upgrade().filter(|session| !session.is_over()) else {
            return;
        };
        if session.has_taken_any() {
            return;
        }
        if part == PARTS_OF_FIRST {
            session.fail(HandshakeError::NeverMapped(limit).into());
        }
    }
}

impl Movement {
    /// `is_unproven`: nothing has shown yet that the peer is there.
    pub(super) fn of_peer(is_unproven: bool) -> Self {
        Self { is_unproven: Cell::new(is_unproven), ..Self::default() }
    }
}

impl SessionInner {
    /// The peer is woken. A client of version 2 gets no acknowledgement from its server: what shows
    /// that it has mapped the memory is that it takes the first event. One that does not, in the
    /// time of a handshake, is not there.
    pub(super) fn expect_first_event_taken(self: &Rc<Self>) {
        if self.movement.is_unproven.take() && !self.has_taken_any() {
            self.poller.spawn(await_first_event_taken(Rc::downgrade(self)));
        }
    }

    fn has_taken_any(&self) -> bool {
        // What is wrong with the queue is found, and named, elsewhere.
        self.lanes.producer.borrow_mut().in_flight().map_or(true, |(head, _)| head > 0)
    }

    /// Whether the peer has taken something of what there was to take since the last look, which
    /// was so long ago by this side's timers.
    ///
    /// These are added up, and not the clock asked: when both sides were stopped and go on, it has
    /// gone on without them.
    fn look_after(&self, passed: Duration) {
        if self.lanes.are_lost() {
            return self.fail(MemoryError::Lost.into());
        }
        let Some(limit) = self.config.limits.stall else { return };
        let in_flight = self.lanes.producer.borrow_mut().in_flight();
        let (head, count) = match in_flight {
            Ok(in_flight) => in_flight,
            Err(error) => return self.fail(error.into()),
        };
        let Movement { head: last, still, .. } = &self.movement;
        let has_moved = last.replace(head) != head;
        if has_moved || count == 0 {
            return still.set(None);
        }
        // What it has not moved by the first look may have come a moment ago.
        let so_far = still.get().map_or(Duration::ZERO, |still| still.saturating_add(passed));
        still.set(Some(so_far));
        if so_far >= limit {
            self.fail(Error::PeerStalled(limit));
        }
    }
}
