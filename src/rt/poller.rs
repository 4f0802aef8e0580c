// SPDX-License-Identifier: MIT OR Apache-2.0
//! The one task per core that polls the IO queues of its active sessions.
//!
//! A pass gives every active session a turn and then yields the whole task queue, so that the tasks
//! it woke run. Sessions whose spin budget is over leave the list; the socket's reader, or the next
//! send, brings them back. While there are others to spin for, they [keep company](super::company)
//! to those. When the list is empty the task sleeps, and costs nothing.
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

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::{Rc, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_lite::future::{or, poll_fn, yield_now};
use glommio::{Latency, Shares, TaskQueueHandle};

use super::activity::Place;
use super::close::{Lingering, end_lingering};
use super::company::Company;
use super::driver::Stay;
use super::give_way::GiveWay;
use super::rests::Rests;
use super::session::SessionInner;
use super::socket::{Received, Socket};
use super::sweep::SweepList;
use super::tasks::TaskSet;
use super::ticks::Ticks;
use super::wakers::WakerSlot;
use super::watch::Watch;

/// How often queues are looked at when tasks wait for a peer that has not moved for a while.
const WAITING_INTERVAL: Duration = Duration::from_micros(100);

/// How often the queues are looked at between a pass and the other tasks' turn.
const LOOKS_PER_PASS: usize = 4;

/// How long the executor is given to close what is left, when it is shut down.
const LAST_LOOK: Duration = Duration::from_millis(1);

/// How many sessions a task that waits for one looks at beside it.
const LOOKED_AT_BESIDE: usize = 8;

/// Ends what this crate runs on this executor, and waits until all of it is dropped: sessions end,
/// their memory is unmapped and their descriptors are closed, as far as no handle is left.
///
/// To be called at the end of an executor's life, in a program that goes on without it: glommio
/// does not drop tasks that still wait when their executor ends, and so nothing that they own. The
/// shards of a [`Server`](crate::Server) do this by themselves.
///
/// Sessions, listeners and clients of this executor end: what waits for them gets
/// [`Error::SessionClosed`](crate::Error::SessionClosed), and the files of sockets are removed. The
/// descriptor and the memory of a session go when the last handle on it is dropped; so a task that
/// owns one and waits for something else should be cancelled first. Without this call, or after a
/// panic, peers are still told at the end of the thread, and files removed, but descriptors and
/// memory stay for as long as the process.
///
/// ```
/// use shmipc_glommio::{Config, Connector, Listener};
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-shut-down-{}", std::process::id()));
/// glommio::LocalExecutorBuilder::default()
///     .spawn(move || async move {
///         let _listener = Listener::bind(&path, Config::default())?;
///         let session = Connector::new(Config::default()).connect(&path).await?;
///         drop(session);
///         shmipc_glommio::shut_down().await;
///         shmipc_glommio::Result::<()>::Ok(())
///     })
///     .unwrap()
///     .join()
///     .unwrap()?;
/// # shmipc_glommio::Result::<()>::Ok(())
/// ```
pub async fn shut_down() {
    Poller::shut_down().await;
}

thread_local! {
    static CURRENT: Current = const { Current(RefCell::new(None)) };
}

/// The poller of this thread's executor.
struct Current(RefCell<Option<Rc<Poller>>>);

impl Current {
    fn get() -> Option<Rc<Poller>> {
        CURRENT.with(|current| current.0.borrow().clone())
    }

    fn set(poller: Option<Rc<Poller>>) {
        let before = CURRENT.with(|current| current.0.replace(poller));
        // An executor that has ended, and left what it had.
        if let Some(before) = before {
            before.abandon();
        }
    }
}

impl Drop for Current {
    /// The thread ends, and its executor was not shut down, or ended by a panic.
    fn drop(&mut self) {
        if let Some(poller) = self.0.take() {
            poller.abandon();
        }
    }
}

/// What ends with an executor, besides sessions: listeners and clients.
pub(super) trait Ends {
    /// Ends, and lets go of what it has.
    fn end(&self);

    /// The executor has ended without that. Does what can be done without it, and wakes nobody.
    fn abandon(&self);
}

/// The poller of one executor.
pub(super) struct Poller {
    executor: usize,
    queue: TaskQueueHandle,
    active: SweepList<Rc<SessionInner>>,
    company: Company,
    /// Those that have become idle in this pass.
    idle: SweepList<Rc<SessionInner>>,
    task: WakerSlot,
    /// Its own, and those beside it.
    tasks: TaskSet,
    watch: Watch,
    ticks: Ticks,
    rests: Rests,
    lingering: Lingering,
    others: SweepList<Weak<dyn Ends>>,
    last_reactor_pass: Cell<Option<Instant>>,
    /// Whether tasks did more since the last pass than run once: then the time has to be looked up.
    is_clock_stale: Cell<bool>,
    /// How long io_uring goes unlooked at while a session is busy: what the most demanding session
    /// of this core was configured with.
    reactor_interval: Cell<Duration>,
}

impl Poller {
    /// The poller of the executor that runs this task; started if need be.
    pub(super) fn current() -> Rc<Self> {
        let executor = glommio::executor().id();
        if let Some(poller) = Current::get().filter(|poller| poller.executor == executor) {
            return poller;
        }
        let queue = glommio::executor().create_task_queue(
            Shares::default(),
            Latency::NotImportant,
            "shmipc",
        );
        let poller = Rc::new(Self {
            executor,
            queue,
            active: SweepList::default(),
            company: Company::default(),
            idle: SweepList::default(),
            task: WakerSlot::default(),
            tasks: TaskSet::default(),
            watch: Watch::default(),
            ticks: Ticks::default(),
            rests: Rests::default(),
            others: SweepList::default(),
            lingering: Lingering::default(),
            last_reactor_pass: Cell::new(None),
            is_clock_stale: Cell::new(false),
            reactor_interval: Cell::new(Duration::MAX),
        });
        Current::set(Some(Rc::clone(&poller)));
        poller.spawn(run(Rc::clone(&poller)));
        poller.spawn(end_lingering(Rc::clone(&poller)));
        poller
    }

    pub(super) fn watching(&self) -> &Watch {
        &self.watch
    }

    pub(super) fn ticks(&self) -> &Ticks {
        &self.ticks
    }

    pub(super) fn rests(&self) -> &Rests {
        &self.rests
    }

    pub(super) fn lingering(&self) -> &Lingering {
        &self.lingering
    }

    /// Looks at io_uring at least this often while a session is busy.
    pub(super) fn demand(&self, interval: Duration) {
        self.reactor_interval.set(self.reactor_interval.get().min(interval));
    }

    /// Notes that a task has waited in place.
    #[inline]
    pub(super) fn note_wait_in_place(&self) {
        self.is_clock_stale.set(true);
    }

    /// Starts a task beside the poller's, in its task queue.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.tasks.spawn_into(self.queue, task);
    }

    /// Ends all that this crate runs on this executor, of which nothing else will be asked.
    ///
    /// glommio does not drop tasks that wait when it ends, nor what they own.
    pub(super) async fn shut_down() {
        // Not a new one, if there is none.
        let executor = glommio::executor().id();
        if let Some(poller) = Current::get().filter(|poller| poller.executor == executor) {
            poller.others.drain(|other| {
                if let Some(other) = other.upgrade() {
                    other.end();
                }
            });
            // Each of them ends in time by itself.
            while !poller.lingering.is_empty() {
                glommio::timer::sleep(LAST_LOOK).await;
            }
            poller.watch.end_sessions();
            // Tasks of the program that wait for something of these sessions end by that.
            glommio::timer::sleep(LAST_LOOK).await;
            poller.tasks.cancel().await;
            // What was dropped with them is closed by io_uring, when it is looked at the next time.
            glommio::timer::sleep(LAST_LOOK).await;
        }
    }

    /// Has something ended with the executor, if it is still there.
    pub(super) fn ends_with_executor(&self, other: Weak<dyn Ends>) {
        // Now and then: those that have gone by themselves leave their place.
        if self.others.len().is_power_of_two() {
            self.others.sweep(|other| other.strong_count() > 0);
        }
        self.others.push(other);
    }

    /// The executor has ended, and tasks that waited, which glommio does not drop, own what they
    /// owned. At least nobody elsewhere waits for them.
    fn abandon(&self) {
        self.watch.abandon_sessions();
        self.others.drain(|other| {
            if let Some(other) = other.upgrade() {
                other.abandon();
            }
        });
    }

    /// Puts a session among the active ones.
    pub(super) fn activate(&self, session: &Rc<SessionInner>) {
        let before = session.activity.place.replace(Place::Active);
        if before != Place::Active {
            // Those that keep company have never said that they sleep.
            if before == Place::Away {
                session.lanes.consumer.borrow().set_working();
            }
            session.lanes.manager.set_resting(false);
            session.activity.idle_turns.set(0);
            self.active.push(Rc::clone(session));
            self.task.wake();
        }
    }

    /// Gives every active session a turn. What the most wakeful of them wants.
    fn pass(self: &Rc<Self>, now: Instant) -> Stay {
        self.company.look();
        let mut pace = Stay::Over;
        let has_added = self.active.sweep(|session| {
            let stay = session.turn(now);
            pace = pace.max(stay);
            if stay > Stay::Idle {
                return true;
            }
            session.activity.place.set(Place::Away);
            if stay == Stay::Idle {
                self.idle.push(Rc::clone(session));
            }
            false
        });
        // Those that became active during the pass have their turn in the next.
        if has_added {
            pace = Stay::Moving;
        }
        if self.idle.is_empty() && (pace >= Stay::Busy || self.company.is_empty()) {
            return pace;
        }
        self.retire(pace)
    }

    /// What becomes of sessions that have nothing to do, and of the pace by it: while there is
    /// somebody to spin for, they keep it company, and else they go to sleep.
    fn retire(self: &Rc<Self>, mut pace: Stay) -> Stay {
        self.idle.sweep(|session| {
            // One that has been activated meanwhile has turns again.
            let is_idle = session.activity.place.get() != Place::Active;
            if is_idle {
                self.rest_soon(session);
            }
            is_idle
        });
        let is_awake = pace >= Stay::Busy;
        if !is_awake {
            self.company.leave(&self.idle);
        }
        self.idle.drain(|session| {
            let tired = if is_awake { self.keep_company(session) } else { Some(session) };
            if let Some(session) = tired
                && !session.fall_asleep()
            {
                session.activity.note_looked_on();
                session.activate();
                pace = pace.max(Stay::Busy);
            }
        });
        pace
    }

    /// Gives a session that is to sleep, this one or another.
    fn keep_company(&self, session: Rc<SessionInner>) -> Option<Rc<SessionInner>> {
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

    pub(super) fn has_events(&self) -> bool {
        self.active.any_of_first(usize::MAX, |session| session.has_events())
    }

    /// Whether something came for one of the sessions beside this one, of the first few.
    #[inline]
    pub(super) fn has_events_beside(&self, session: &Rc<SessionInner>) -> bool {
        let is_busy = |other: &Rc<SessionInner>| !Rc::ptr_eq(other, session) && other.has_events();
        self.active.len() > 1 && self.active.any_of_first(LOOKED_AT_BESIDE, is_busy)
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
async fn run(poller: Rc<Poller>) {
    // When the executor goes, its sessions go too, although they know the poller and it them.
    let _cleanup = Cleanup(Rc::clone(&poller));
    let kick = Kick::new(&poller);
    kick.first().await;
    let mut clock = Clock::new();
    let mut give_way = GiveWay::default();
    loop {
        let now = clock.now(poller.is_clock_stale.take());
        match poller.pass(now) {
            Stay::Moving => {
                give_way.after_traffic();
                kick.after_pass(&poller, now);
                glommio::executor().yield_task_queue_now().await;
            }
            Stay::Busy => {
                kick.after_pass(&poller, now);
                if poller.look_out() {
                    // The other tasks have had their turn; the next pass is followed by one.
                    continue;
                }
                give_way.after_idle_pass(&poller);
                glommio::executor().yield_task_queue_now().await;
            }
            Stay::Waiting => {
                let pause = async {
                    glommio::timer::sleep(WAITING_INTERVAL).await;
                };
                or(poller.activated(), pause).await;
                poller.last_reactor_pass.set(None);
                clock = Clock::new();
            }
            Stay::Idle | Stay::Over => {
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

struct Cleanup(Rc<Poller>);

impl Drop for Cleanup {
    fn drop(&mut self) {
        // Without a shut-down before, the executor has ended by a panic.
        self.0.abandon();
        self.0.active.drain(drop);
        self.0.company.leave(&self.0.idle);
        self.0.idle.drain(drop);
        // At the end of the thread there is none any more.
        let _ = CURRENT.try_with(|current| {
            current.0.borrow_mut().take_if(|poller| Rc::ptr_eq(poller, &self.0))
        });
    }
}

/// Makes glommio look at its rings: a byte through a socket pair completes a receive on the latency
/// ring, and that preempts.
///
/// Two pairs take strict turns. A look at the rings submits the receives that wait to be submitted,
/// and finds those that have completed; the task of the pair that was used runs after it, and its
/// next receive waits for the next look. So of the two, the one that was not used is the one whose
/// receive the kernel has.
struct Kick {
    pairs: Vec<Socket>,
    state: Rc<KickState>,
}

#[derive(Default)]
struct KickState {
    /// Which pair is next.
    turn: Cell<usize>,
    /// Whether a byte is on its way, so that none is sent to a receive that is not submitted.
    is_under_way: Cell<bool>,
    /// The poller, while it waits for the first byte to arrive.
    arrived: WakerSlot,
}

impl Kick {
    fn new(poller: &Poller) -> Self {
        let state = Rc::new(KickState::default());
        let pairs: io::Result<Vec<_>> = (0..2).map(|_| UnixStream::pair()).collect();
        let Ok(pairs) = pairs else {
            // Out of descriptors. Sessions work without; sockets and timers beside them are later.
            tracing::warn!("no socket pair: io_uring is looked at less often while sessions spin");
            return Self { pairs: Vec::new(), state };
        };
        let start = |(index, (near, far)): (usize, (UnixStream, UnixStream))| {
            let far = Socket::of_our_own(OwnedFd::from(far));
            poller.spawn(swallow(far, index, Rc::clone(&state)));
            Socket::of_our_own(OwnedFd::from(near))
        };
        Self { pairs: pairs.into_iter().enumerate().map(start).collect(), state }
    }

    /// Sends the first byte and waits until it has arrived: from then on the kernel has a receive.
    ///
    /// While nobody spins, glommio looks at its rings as soon as there is nothing else to do. A
    /// byte sent while somebody does would wait for the timer of 100 ms.
    async fn first(&self) {
        // Once the receives have begun, so that the byte is not found there without a look.
        for _ in 0..self.pairs.len() {
            yield_now().await;
        }
        self.send();
        poll_fn(|context| {
            if !self.state.is_under_way.get() {
                return Poll::Ready(());
            }
            self.state.arrived.register(context);
            Poll::Pending
        })
        .await;
    }

    fn send(&self) {
        if let Some(socket) = self.pairs.get(self.state.turn.get())
            && !self.state.is_under_way.replace(true)
        {
            // One byte at a time always fits.
            let _ = socket.try_send(&[0]);
        }
    }

    fn after_pass(&self, poller: &Poller, now: Instant) {
        let Some(last) = poller.last_reactor_pass.get() else {
            poller.last_reactor_pass.set(Some(now));
            return;
        };
        // A little early, so that what takes two looks is done within two intervals.
        if now.saturating_duration_since(last) < poller.reactor_interval.get() / 8 * 7 {
            return;
        }
        poller.last_reactor_pass.set(Some(now));
        self.send();
    }
}

/// Receives until the other end goes, and passes the turn on.
async fn swallow(socket: Socket, index: usize, state: Rc<KickState>) {
    while socket.readable().await.is_ok() {
        match socket.try_receive(&mut [0; 8]) {
            Ok(Received::Bytes(_)) => {
                state.turn.set(1 - index);
                state.is_under_way.set(false);
                state.arrived.wake();
            }
            Ok(Received::Nothing) => {}
            Ok(Received::End | Received::Descriptors(_)) | Err(_) => break,
        }
    }
    // Nobody will: sessions work without.
    state.is_under_way.set(false);
    state.arrived.wake();
}
