// SPDX-License-Identifier: MIT OR Apache-2.0
//! The one task per core that polls the IO queues of its active sessions.
//!
//! A pass gives every active session a turn and then yields the whole task queue, so that the tasks
//! it woke run. Sessions whose spin budget is over leave the list; the socket's reader, or the next
//! send, brings them back. While there are others to spin for, they [keep
//! company](crate::reactor::standby) to those. When the list is empty the task sleeps, and costs
//! nothing.
//!
//! A task that is always runnable starves io_uring: glommio looks at its rings only when a timer of
//! 100 ms fires. So while the poller spins it makes that happen itself, at a fixed small interval,
//! by a byte through a socket pair of its own: what completes on glommio's latency ring preempts.
//!
//! Its task queue has no latency requirement, although that would ask glommio for the same: glommio
//! 0.9 sets its timer for the queues that are active when it looks, which are often those of other
//! tasks, and when the timer fires between its look at the rings and its look for tasks, it goes to
//! sleep with tasks that could run. At an interval of microseconds on a busy machine that happened
//! within minutes.

use std::cell::Cell;
use std::future::Future;
use std::rc::{Rc, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_lite::future::{or, poll_fn};

use crate::exec::runtime::{
    TaskQueueHandle, create_task_queue, executor_id, sleep, yield_task_queue,
};
use crate::exec::task_set::TaskSet;
use crate::exec::wakers::WakerSlot;
use crate::reactor::cpu_sharing::CpuSharing;
use crate::reactor::idle_trim::IdleTrim;
use crate::reactor::interval_poll::IntervalPoll;
use crate::reactor::liveness::Liveness;
use crate::reactor::poll_state::Residency;
use crate::reactor::pollable::{PollOutcome, Pollable};
use crate::reactor::ring_kick::RingKick;
use crate::reactor::standby::Standby;
use crate::reactor::sweep::SweepList;

/// How often queues are looked at when tasks wait for a peer that has not moved for a while.
const WAITING_INTERVAL: Duration = Duration::from_micros(100);

/// How often the queues are looked at between a pass and the other tasks' turn.
const LOOKS_PER_PASS: usize = 4;

/// How many sessions a task that waits for one looks at beside it.
const LOOKED_AT_BESIDE: usize = 8;

/// What ends with an executor, besides sessions: listeners and clients.
pub(crate) trait Ends {
    /// Ends, and lets go of what it has.
    fn end(&self);

    /// The executor has ended without that. Does what can be done without it, and wakes nobody.
    fn abandon(&self);
}

/// The poller of one executor. Monomorphised: a turn is a direct call.
pub(crate) struct Reactor<S: Pollable> {
    executor: usize,
    queue: TaskQueueHandle,
    active: SweepList<Rc<S>>,
    company: Standby<S>,
    /// Those that have become idle in this pass.
    idle: SweepList<Rc<S>>,
    task: WakerSlot,
    /// Its own, and those beside it.
    tasks: TaskSet,
    watch: Liveness<S>,
    ticks: IntervalPoll<S>,
    rests: IdleTrim<S>,
    /// What sessions share.
    shared: S::Shared,
    others: SweepList<Weak<dyn Ends>>,
    last_reactor_pass: Cell<Option<Instant>>,
    /// Whether tasks did more since the last pass than run once: then the time has to be looked up.
    is_clock_stale: Cell<bool>,
    /// How long io_uring goes unlooked at while a session is busy: what the most demanding session
    /// of this core was configured with.
    reactor_interval: Cell<Duration>,
}

impl<S: Pollable> Reactor<S> {
    /// A poller for the executor that runs this task. [`run`] is to be started on it.
    pub(crate) fn new() -> Self {
        Self {
            executor: executor_id(),
            queue: create_task_queue("shmipc"),
            active: SweepList::default(),
            company: Standby::default(),
            idle: SweepList::default(),
            task: WakerSlot::default(),
            tasks: TaskSet::default(),
            watch: Liveness::default(),
            ticks: IntervalPoll::default(),
            rests: IdleTrim::default(),
            others: SweepList::default(),
            shared: S::Shared::default(),
            last_reactor_pass: Cell::new(None),
            is_clock_stale: Cell::new(false),
            reactor_interval: Cell::new(Duration::MAX),
        }
    }

    /// The executor that it belongs to.
    pub(crate) fn executor(&self) -> usize {
        self.executor
    }

    pub(crate) fn watching(&self) -> &Liveness<S> {
        &self.watch
    }

    pub(crate) fn ticks(&self) -> &IntervalPoll<S> {
        &self.ticks
    }

    pub(crate) fn rests(&self) -> &IdleTrim<S> {
        &self.rests
    }

    pub(crate) fn shared(&self) -> &S::Shared {
        &self.shared
    }

    /// Looks at io_uring at least this often while a session is busy.
    pub(crate) fn demand(&self, interval: Duration) {
        self.reactor_interval.set(self.reactor_interval.get().min(interval));
    }

    /// Notes that a task has waited in place.
    #[inline]
    pub(crate) fn note_wait_in_place(&self) {
        self.is_clock_stale.set(true);
    }

    /// Starts a task beside the poller's, in its task queue.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.tasks.spawn_into(self.queue, task);
    }

    /// Ends listeners and clients, so that nothing new comes.
    pub(crate) fn end_others(&self) {
        self.others.drain(|other| {
            if let Some(other) = other.upgrade() {
                other.end();
            }
        });
    }

    /// Ends and drops the tasks beside the poller's, and its own.
    pub(crate) async fn cancel_tasks(&self) {
        self.tasks.cancel().await;
    }

    /// Has something ended with the executor, if it is still there.
    pub(crate) fn ends_with_executor(&self, other: Weak<dyn Ends>) {
        // Now and then: those that have gone by themselves leave their place.
        if self.others.len().is_power_of_two() {
            self.others.sweep(|other| other.strong_count() > 0);
        }
        self.others.push(other);
    }

    /// The executor has ended, and tasks that waited, which glommio does not drop, own what they
    /// owned. At least nobody elsewhere waits for them.
    pub(crate) fn abandon(&self) {
        self.watch.abandon_sessions();
        self.others.drain(|other| {
            if let Some(other) = other.upgrade() {
                other.abandon();
            }
        });
    }

    /// Puts a session among the active ones.
    pub(crate) fn activate(&self, session: &Rc<S>) {
        let before = session.activity().residency.replace(Residency::Active);
        if before != Residency::Active {
            // Those that keep company have never said that they sleep.
            if before == Residency::Parked {
                session.set_working();
            }
            session.set_resting(false);
            session.activity().idle_turns.set(0);
            self.active.push(Rc::clone(session));
            self.task.wake();
        }
    }

    /// Gives every active session a turn. What the most wakeful of them wants.
    fn pass(self: &Rc<Self>, now: Instant) -> PollOutcome {
        self.company.look();
        let mut pace = PollOutcome::Closed;
        let has_added = self.active.sweep(|session| {
            let stay = session.turn(now);
            pace = pace.max(stay);
            if stay > PollOutcome::Idle {
                return true;
            }
            session.activity().residency.set(Residency::Parked);
            if stay == PollOutcome::Idle {
                self.idle.push(Rc::clone(session));
            }
            false
        });
        // Those that became active during the pass have their turn in the next.
        if has_added {
            pace = PollOutcome::Progress;
        }
        if self.idle.is_empty() && (pace >= PollOutcome::Spinning || self.company.is_empty()) {
            return pace;
        }
        self.retire(pace)
    }

    /// What becomes of sessions that have nothing to do, and of the pace by it: while there is
    /// somebody to spin for, they keep it company, and else they go to sleep.
    fn retire(self: &Rc<Self>, mut pace: PollOutcome) -> PollOutcome {
        self.idle.sweep(|session| {
            // One that has been activated meanwhile has turns again.
            let is_idle = session.activity().residency.get() != Residency::Active;
            if is_idle {
                self.rest_soon(session);
            }
            is_idle
        });
        let is_awake = pace >= PollOutcome::Spinning;
        if !is_awake {
            self.company.leave(&self.idle);
        }
        self.idle.drain(|session| {
            let tired = if is_awake { self.keep_company(session) } else { Some(session) };
            if let Some(session) = tired
                && !session.fall_asleep()
            {
                session.activity().note_looked_on();
                session.activate();
                pace = pace.max(PollOutcome::Spinning);
            }
        });
        pace
    }

    /// Gives a session that is to sleep, this one or another.
    fn keep_company(&self, session: Rc<S>) -> Option<Rc<S>> {
        if session.may_be_looked_at() { self.company.take_in(session) } else { Some(session) }
    }

    /// Looks at the queues a few more times before other tasks get their turn: when there are none,
    /// what comes meanwhile is seen sooner than after a way through the scheduler. Whether it came.
    fn look_out(&self) -> bool {
        for _ in 0..LOOKS_PER_PASS {
            if self.has_events() {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    pub(crate) fn has_events(&self) -> bool {
        self.active.any_of_first(usize::MAX, |session| session.has_events())
    }

    /// Whether something came for one of the sessions beside this one, of the first few.
    #[inline]
    pub(crate) fn has_events_beside(&self, session: &Rc<S>) -> bool {
        let is_busy = |other: &Rc<S>| !Rc::ptr_eq(other, session) && other.has_events();
        self.active.len() > 1 && self.active.any_of_first(LOOKED_AT_BESIDE, is_busy)
    }

    /// Has io_uring looked at, if that is due.
    fn kick_after_pass(&self, kick: &RingKick, now: Instant) {
        let Some(last) = self.last_reactor_pass.get() else {
            self.last_reactor_pass.set(Some(now));
            return;
        };
        // A little early, so that what takes two looks is done within two intervals.
        if now.saturating_duration_since(last) < self.reactor_interval.get() / 8 * 7 {
            return;
        }
        self.last_reactor_pass.set(Some(now));
        kick.send();
    }

    /// Waits until a session becomes active.
    async fn activated(&self) {
        let before = self.active.len();
        poll_fn(|context| {
            if self.active.len() > before {
                return Poll::Ready(());
            }
            self.task.register(context);
            Poll::Pending
        })
        .await;
    }
}

/// The poller's task.
pub(crate) async fn run<S: Pollable>(poller: Rc<Reactor<S>>) {
    // When the executor goes, its sessions go too, although they know the poller and it them.
    let _cleanup = Cleanup(Rc::clone(&poller));
    let kick = RingKick::new(|task| poller.spawn(task));
    kick.first().await;
    let mut clock = Clock::new();
    let mut give_way = CpuSharing::default();
    loop {
        let now = clock.now(poller.is_clock_stale.take());
        match poller.pass(now) {
            PollOutcome::Progress => {
                give_way.after_traffic();
                poller.kick_after_pass(&kick, now);
                yield_task_queue().await;
            }
            PollOutcome::Spinning => {
                poller.kick_after_pass(&kick, now);
                if poller.look_out() {
                    // The other tasks have had their turn; the next pass is followed by one.
                    continue;
                }
                give_way.after_idle_pass(|| poller.has_events());
                yield_task_queue().await;
            }
            PollOutcome::Blocked => {
                let pause = async {
                    sleep(WAITING_INTERVAL).await;
                };
                or(poller.activated(), pause).await;
                poller.last_reactor_pass.set(None);
                clock = Clock::new();
            }
            PollOutcome::Idle | PollOutcome::Closed => {
                poller.activated().await;
                poller.last_reactor_pass.set(None);
                clock = Clock::new();
            }
        }
    }
}

/// The time, looked up every few passes: a look costs as much as a pass of one session.
struct Clock {
    now: Instant,
    passes: u32,
}

impl Clock {
    const PASSES: u32 = 4;

    fn new() -> Self {
        Self { now: Instant::now(), passes: 0 }
    }

    fn now(&mut self, is_stale: bool) -> Instant {
        self.passes += 1;
        if is_stale || self.passes >= Self::PASSES {
            *self = Self::new();
        }
        self.now
    }
}

struct Cleanup<S: Pollable>(Rc<Reactor<S>>);

impl<S: Pollable> Drop for Cleanup<S> {
    fn drop(&mut self) {
        // Without a shut-down before, the executor has ended by a panic.
        self.0.abandon();
        self.0.active.drain(drop);
        self.0.company.leave(&self.0.idle);
        self.0.idle.drain(drop);
    }
}
