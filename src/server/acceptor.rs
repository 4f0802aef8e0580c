// SPDX-License-Identifier: MIT OR Apache-2.0
//! The door that all cores of a server share, and how what comes in there gets to them.
//!
//! A thread of its own accepts connections; it sleeps while none come. Each goes through a bounded
//! queue to one of the cores, and a byte through a socket pair wakes that core the way any socket
//! does. This is the only time that anything of a session crosses from one thread to another.
//!
//! A connection is always in one place: in the kernel's backlog, in this thread's hands, in one
//! queue, or with a core. When a core does not answer its bell, what waits for it is dealt to those
//! that do; when all queues are full, this thread keeps what it holds and accepts no more.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};

use crate::net::fd_disposal::{self, PeerSocket};
use shmipc_core::error::{Error, Result};

/// How long a core may take to answer its bell before others get what waits for it.
const PATIENCE: Duration = Duration::from_millis(20);
/// How many milliseconds the thread sleeps at most while something waits in a queue.
const LOOK_AGAIN: u8 = 5;
/// How long it pauses when nothing can be accepted or handed over.
const PAUSE: Duration = Duration::from_millis(5);
/// How many connections it accepts before it looks at the cores, and whether to stop.
const ACCEPTS_PER_TURN: usize = 64;
/// How often it tells that nothing can be accepted.
const TELL_INTERVAL: Duration = Duration::from_secs(1);

/// Which core gets the next connection that comes in at the shared door.
///
/// ```
/// use shmipc_glommio::{Balance, Server};
///
/// let builder = Server::builder("/run/store.sock").deal(Balance::FewestSessions);
/// # drop(builder);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Balance {
    /// One after the other.
    #[default]
    RoundRobin,
    /// The one with the fewest sessions, by whichever door they came.
    FewestSessions,
}

/// How connections get to one core.
pub(crate) struct ShardInbox {
    queue: ArrayQueue<Handoff>,
    bell: UnixStream,
    /// How often the core has answered its bell.
    answers: AtomicU64,
    load: Arc<AtomicUsize>,
}

/// A connection on its way to a core.
pub(crate) struct Handoff {
    pub(crate) socket: PeerSocket,
    pub(crate) load: Load,
}

/// Counts for one session as long as it exists.
pub(crate) struct Load {
    sessions: Arc<AtomicUsize>,
}

impl Load {
    fn new(sessions: &Arc<AtomicUsize>) -> Self {
        // A hint for dealing, here and everywhere: it orders nothing else.
        sessions.fetch_add(1, Ordering::Relaxed);
        Self { sessions: Arc::clone(sessions) }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.sessions.fetch_sub(1, Ordering::Relaxed);
    }
}

impl ShardInbox {
    /// An inlet for so many connections, and the end of its bell that the core listens to.
    pub(crate) fn new(capacity: usize) -> Result<(Self, OwnedFd)> {
        let failed = |error| Error::os("make a socket pair", error);
        let (bell, core) = UnixStream::pair().map_err(failed)?;
        bell.set_nonblocking(true).map_err(failed)?;
        let queue = ArrayQueue::new(capacity);
        let inlet = Self { queue, bell, answers: AtomicU64::new(0), load: Arc::default() };
        Ok((inlet, core.into()))
    }

    /// Has the core look at its queue, and whether it is to stop.
    pub(crate) fn ring(&self) {
        // A bell that is full of bytes rings already; one whose core is gone need not.
        let _ = (&self.bell).write(&[0]);
    }

    /// The core has heard the bell. It looks at the queue after this.
    pub(crate) fn answer(&self) {
        // Tells only that the core runs, to be read some milliseconds later. What is in the queue
        // is ordered by the queue.
        self.answers.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn take(&self) -> Option<Handoff> {
        self.queue.pop()
    }

    /// Counts a session that came in at the core's own door.
    pub(crate) fn own_session(&self) -> Load {
        Load::new(&self.load)
    }
}

/// The thread's view of a core.
struct Core {
    inlet: Arc<ShardInbox>,
    /// When the bell was rung that is not answered yet, and how many answers there were then.
    unanswered: Option<(Instant, u64)>,
}

impl Core {
    fn ring(&mut self) {
        let answers = self.inlet.answers.load(Ordering::Relaxed);
        self.unanswered.get_or_insert_with(|| (Instant::now(), answers));
        self.inlet.ring();
    }

    /// Whether the core has let its bell ring for too long.
    fn is_stuck(&mut self, now: Instant) -> bool {
        let Some((since, answers)) = self.unanswered else { return false };
        if self.inlet.answers.load(Ordering::Relaxed) != answers {
            self.unanswered = None;
            return false;
        }
        now.saturating_duration_since(since) > PATIENCE
    }

    fn is_full(&self) -> bool {
        self.inlet.queue.is_full()
    }
}

/// Accepts at the shared door and deals.
pub(crate) struct Acceptor {
    listener: UnixListener,
    control: UnixStream,
    cores: Vec<Core>,
    deal: Balance,
    /// Who is first in turn.
    next: usize,
    /// When it was last told that nothing can be accepted.
    told: Option<Instant>,
}

impl Acceptor {
    /// A dealer for the cores behind `inlets`. It stops when the other end of `control` is written
    /// to, or closed.
    pub(crate) fn new(
        listener: OwnedFd,
        control: UnixStream,
        inlets: Vec<Arc<ShardInbox>>,
        deal: Balance,
    ) -> io::Result<Self> {
        let listener = UnixListener::from(listener);
        listener.set_nonblocking(true)?;
        let cores = inlets.into_iter().map(|inlet| Core { inlet, unanswered: None }).collect();
        Ok(Self { listener, control, cores, deal, next: 0, told: None })
    }

    /// Deals until told to stop. Connections that nobody has taken by then are closed.
    pub(crate) fn run(mut self, failed: impl Fn(&Error)) {
        loop {
            let (has_come, must_stop) = match self.wait() {
                Ok(events) => events,
                Err(errno) => return failed(&Error::os("wait for connections", errno)),
            };
            if must_stop {
                return;
            }
            self.deal_again();
            if has_come && !self.accept_some(&failed) {
                return;
            }
        }
    }

    /// Waits until there are connections, or it is time to look at the queues again. Whether there
    /// are, and whether to stop.
    fn wait(&self) -> std::result::Result<(bool, bool), Errno> {
        let is_owed = self.cores.iter().any(|core| !core.inlet.queue.is_empty());
        self.look(if is_owed { PollTimeout::from(LOOK_AGAIN) } else { PollTimeout::NONE })
    }

    fn look(&self, timeout: PollTimeout) -> std::result::Result<(bool, bool), Errno> {
        let mut polled = [
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.control.as_fd(), PollFlags::POLLIN),
        ];
        match nix::poll::poll(&mut polled, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok((false, false)),
            Err(errno) => return Err(errno),
        }
        let is_set = |at: usize| polled[at].revents().is_some_and(|events| !events.is_empty());
        Ok((is_set(0), is_set(1)))
    }

    /// Accepts what is there, a turn's worth of it. `false`: the time to stop came meanwhile.
    fn accept_some(&mut self, failed: &impl Fn(&Error)) -> bool {
        if fd_disposal::are_too_many_unclosed() {
            std::thread::sleep(PAUSE);
            return true;
        }
        for _ in 0..ACCEPTS_PER_TURN {
            match self.listener.accept() {
                Ok((connection, _)) => {
                    if !self.hand_over(PeerSocket::new(connection.into())) {
                        return false;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // No descriptor left, for instance. It can be better in a moment.
                    if self.told.is_none_or(|told| told.elapsed() >= TELL_INTERVAL) {
                        self.told = Some(Instant::now());
                        failed(&Error::os("accept a connection", error));
                    }
                    std::thread::sleep(PAUSE);
                    return true;
                }
            }
        }
        true
    }

    /// Gives a connection to a core, however long that takes. `false`: the time to stop came first.
    fn hand_over(&mut self, mut connection: PeerSocket) -> bool {
        while let Err(back) = self.deal(connection) {
            connection = back;
            std::thread::sleep(PAUSE);
            self.deal_again();
            // Without waiting: queues that have emptied since ring no bell here.
            if self.look(PollTimeout::ZERO).is_ok_and(|(_, must_stop)| must_stop) {
                return false;
            }
        }
        true
    }

    /// Gives a connection to the core whose turn it is, or gives it back when all are full.
    fn deal(&mut self, connection: PeerSocket) -> std::result::Result<(), PeerSocket> {
        let now = Instant::now();
        match self.choose(now) {
            Some(at) => self.give(at, connection),
            None => Err(connection),
        }
    }

    fn give(&mut self, at: usize, socket: PeerSocket) -> std::result::Result<(), PeerSocket> {
        self.next = (at + 1) % self.cores.len();
        let core = &mut self.cores[at];
        let load = Load::new(&core.inlet.load);
        core.inlet.queue.push(Handoff { socket, load }).map_err(|dealt| dealt.socket)?;
        core.ring();
        Ok(())
    }

    /// The core that gets the next connection: of those that answer, if there is one with room.
    fn choose(&mut self, now: Instant) -> Option<usize> {
        let count = self.cores.len();
        let turns = (0..count).map(|turn| (self.next + turn) % count);
        let mut open = Vec::with_capacity(count);
        for at in turns {
            if !self.cores[at].is_full() {
                open.push((self.cores[at].is_stuck(now), at));
            }
        }
        let answers = open.iter().any(|&(is_stuck, _)| !is_stuck);
        let mut candidates = open.iter().filter(|&&(is_stuck, _)| !(answers && is_stuck));
        match self.deal {
            Balance::RoundRobin => candidates.next(),
            // The first of equals: who is next in turn.
            Balance::FewestSessions => {
                candidates.min_by_key(|&&(_, at)| self.cores[at].inlet.load.load(Ordering::Relaxed))
            }
        }
        .map(|&(_, at)| at)
    }

    /// Takes back what waits for cores that do not answer, when there are others.
    fn deal_again(&mut self) {
        let now = Instant::now();
        for at in 0..self.cores.len() {
            if !self.cores[at].is_stuck(now) {
                continue;
            }
            while let Some(other) = self.choose(now).filter(|&other| other != at) {
                if self.cores[other].is_stuck(now) {
                    break;
                }
                let Some(Handoff { socket, .. }) = self.cores[at].inlet.take() else { break };
                if let Err(socket) = self.give(other, socket) {
                    // Only this thread puts anything in, so there is room for it where it was.
                    let _ = self.give(at, socket);
                    break;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A dealer over so many cores whose queues hold `capacity`, and what the cores see of it.
    fn dealer(cores: usize, capacity: usize, deal: Balance) -> (Acceptor, Vec<Arc<ShardInbox>>) {
        let path = std::env::temp_dir().join(format!("shmipc-dealer-{:?}", now_as_name()));
        let listener = UnixListener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let inlets: Vec<_> =
            (0..cores).map(|_| Arc::new(ShardInbox::new(capacity).unwrap().0)).collect();
        let control = UnixStream::pair().unwrap().0;
        (Acceptor::new(listener.into(), control, inlets.clone(), deal).unwrap(), inlets)
    }

    fn now_as_name() -> (u32, std::thread::ThreadId) {
        (std::process::id(), std::thread::current().id())
    }

    fn connection() -> PeerSocket {
        PeerSocket::new(UnixStream::pair().unwrap().0.into())
    }

    fn waiting(inlets: &[Arc<ShardInbox>]) -> Vec<usize> {
        inlets.iter().map(|inlet| inlet.queue.len()).collect()
    }

    #[test]
    fn everybody_gets_a_turn_and_the_full_are_passed_over() {
        let (mut dealer, inlets) = dealer(3, 2, Balance::RoundRobin);
        for _ in 0..4 {
            dealer.deal(connection()).unwrap();
        }
        assert_eq!(waiting(&inlets), [2, 1, 1]);
        for _ in 0..2 {
            dealer.deal(connection()).unwrap();
        }
        assert_eq!(waiting(&inlets), [2, 2, 2]);
        assert!(dealer.deal(connection()).is_err(), "there is no room");
        drop(inlets[1].take());
        dealer.deal(connection()).unwrap();
        assert_eq!(waiting(&inlets), [2, 2, 2]);
    }

    #[test]
    fn the_one_with_the_fewest_sessions_is_next() {
        let (mut dealer, inlets) = dealer(3, 8, Balance::FewestSessions);
        let busy: Vec<Load> = (0..2).map(|_| inlets[0].own_session()).collect();
        let also = inlets[2].own_session();
        for _ in 0..3 {
            dealer.deal(connection()).unwrap();
        }
        // 2, 0 and 1 sessions; then 2, 1 and 1; then one of them has 2, and the other gets it.
        assert_eq!(waiting(&inlets), [0, 2, 1]);
        drop((busy, also));
        dealer.deal(connection()).unwrap();
        assert_eq!(waiting(&inlets), [1, 2, 1]);
    }

    #[test]
    fn what_waits_for_a_core_that_does_not_answer_goes_to_others() {
        let (mut dealer, inlets) = dealer(2, 8, Balance::RoundRobin);
        for _ in 0..6 {
            dealer.deal(connection()).unwrap();
        }
        assert_eq!(waiting(&inlets), [3, 3]);
        std::thread::sleep(PATIENCE * 2);
        // The first core has heard it, the second does not run.
        inlets[0].answer();
        dealer.deal_again();
        assert_eq!(waiting(&inlets), [6, 0]);
        dealer.deal(connection()).unwrap();
        dealer.deal(connection()).unwrap();
        assert_eq!(waiting(&inlets), [8, 0]);
        // Better late than never.
        dealer.deal(connection()).unwrap();
        assert_eq!(waiting(&inlets), [8, 1]);
        inlets[1].answer();
        drop(inlets[0].take());
        std::thread::sleep(PATIENCE * 2);
        dealer.deal(connection()).unwrap();
        assert_eq!(waiting(&inlets), [7, 2], "the second runs again");
        let loads: Vec<_> = inlets.iter().map(|inlet| inlet.load.load(Ordering::Relaxed)).collect();
        assert_eq!(loads, [7, 2], "every session counts once, where it is");
    }
}
