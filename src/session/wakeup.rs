// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a session's peer is woken, and how this side hears that it is to wake up, apart from the
//! socket: eventfds, and looking at the queue from time to time (version 4;
//! `docs/protocol.md#wake-ups`).
//!
//! # An eventfd whose other owner is not to be trusted
//!
//! Both sides have the same open file, so the peer can make it blocking and count it up to its
//! limit at any time. A write would then wait, and the whole core with it; no flag of `write`, and
//! no look before it, prevents that for good. The kernel itself counts up eventfds without ever
//! waiting when something completes that they are registered for. So each session has a small
//! io_uring of its own with the peer's eventfd registered, and to ring is to have nothing done by
//! it: one system call, which costs as much as the write.
//!
//! Reading is done by glommio's io_uring. It waits without holding anybody up, unless the file is
//! non-blocking: then the read fails at once, and the flag is taken off. The peer only writes to
//! it, and an honest one never comes near the limit at which a write would wait.
//!
//! `unsafe` here: descriptors that change owners, and the submission of an operation that refers to
//! no memory.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use crate::exec::runtime::BufferedFile;
use crate::exec::runtime::sleep;
use futures_lite::future::{or, yield_now};
use io_uring::{IoUring, opcode};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::session::state::SessionInner;
use shmipc_core::error::Error;

/// How often in a row a peer may ring for nothing before that is heard less often. An honest one
/// does when what it rings for has been seen already.
const MOST_IN_VAIN: u32 = 16;

/// How long a peer is left alone that rings for nothing, or makes the file non-blocking again.
const PAUSE: Duration = Duration::from_millis(1);

/// What a side reads, besides the socket, to be woken; and what it does to wake the peer.
pub(crate) enum Doorbell {
    /// The socket alone, by SyncEvents.
    Socket,
    /// An eventfd each way.
    EventFds {
        /// Rings at the peer's. The ring's bookkeeping is large, and few sessions have one.
        theirs: Box<EventFdNotifier>,
        /// What the peer rings at, until somebody listens.
        ours: Cell<Option<OwnedFd>>,
    },
    /// Nobody wakes anybody. Each side looks at its queue at this interval.
    Polling(Duration),
}

impl Doorbell {
    /// Takes over the eventfd that the peer reads, and the one that this side reads. They are known
    /// to be that.
    pub(crate) fn event_fds(theirs: OwnedFd, ours: OwnedFd) -> Result<Self, Error> {
        let theirs =
            EventFdNotifier::at(&theirs).map_err(|error| Error::os("set up an eventfd", error))?;
        Ok(Self::EventFds { theirs: Box::new(theirs), ours: Cell::new(Some(ours)) })
    }
}

/// The eventfds of a session, as its client makes them: the one that it writes, and the one that
/// the server writes.
///
/// Not blocking for who reads in other implementations: they read until nothing is left.
pub(crate) fn create_event_fds() -> Result<[OwnedFd; 2], Error> {
    let create = || {
        EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map(OwnedFd::from)
            .map_err(|errno| Error::os("create an eventfd", errno))
    };
    Ok([create()?, create()?])
}

/// Counts up an eventfd without ever waiting.
pub(crate) struct EventFdNotifier {
    /// Has the eventfd registered.
    ring: RefCell<IoUring>,
    /// Whether it could not be rung at, for want of memory.
    is_owed: Cell<bool>,
}

impl EventFdNotifier {
    /// Does not keep the descriptor: the kernel has the file.
    fn at(fd: &OwnedFd) -> io::Result<Self> {
        let ring = IoUring::new(1)?;
        ring.submitter().register_eventfd(fd.as_raw_fd())?;
        Ok(Self { ring: RefCell::new(ring), is_owed: Cell::new(false) })
    }

    fn ring(&self) -> io::Result<()> {
        let mut ring = self.ring.borrow_mut();
        let nothing = opcode::Nop::new().build();
        // SAFETY: the operation refers to no memory and to no descriptor.
        let pushed = unsafe { ring.submission().push(&nothing) };
        // It is full only while the call below fails: then that is what there is to say.
        let _ = pushed;
        // Signals come: the operation is still there for the next try.
        while let Err(error) = ring.submit() {
            match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EINTR) => {}
                // It passes.
                Some(Errno::EAGAIN | Errno::EBUSY | Errno::ENOMEM) => {
                    self.is_owed.set(true);
                    return Ok(());
                }
                _ => return Err(error),
            }
        }
        // It is done at once. What completed needs to be taken, so that there is room.
        ring.completion().for_each(drop);
        Ok(())
    }
}

impl Doorbell {
    /// Whether the peer should have been woken, and could not be.
    pub(crate) fn take_owed(&self) -> bool {
        matches!(self, Self::EventFds { theirs, .. } if theirs.is_owed.take())
    }
}

impl SessionInner {
    /// Wakes the peer, which sleeps.
    pub(crate) fn ring_event_fd(&self, bell: &EventFdNotifier) {
        if let Err(error) = bell.ring() {
            return self.fail(Error::os("ring at an eventfd", error));
        }
        if bell.is_owed.get() {
            // The next turn tries again.
            self.queues.must_look.set(true);
        }
    }

    /// Starts what the session needs besides its socket to hear of the peer.
    pub(crate) fn listen_at_doorbell(self: &Rc<Self>) {
        match &self.doorbell {
            Doorbell::Socket => {}
            Doorbell::EventFds { ours, .. } => {
                if let Some(ours) = ours.take() {
                    self.reactor.spawn(read_event_fd(Rc::clone(self), ours));
                }
            }
            Doorbell::Polling(interval) => {
                self.reactor.look_at_intervals(self, *interval);
            }
        }
    }
}

/// The end of an eventfd that this side reads.
struct EventFdListener {
    file: BufferedFile,
}

impl EventFdListener {
    fn new(fd: OwnedFd) -> Self {
        // SAFETY: `into_raw_fd` gave up the ownership that the file takes over.
        Self { file: unsafe { BufferedFile::from_raw_fd(fd.into_raw_fd()) } }
    }

    /// Waits until the peer rings. Cancel-safe: who comes back looks at the queue first.
    async fn wait(&self) -> Result<(), Error> {
        loop {
            let error = match self.file.read_at(0, size_of::<u64>()).await {
                Ok(_) => return Ok(()),
                Err(error) => io::Error::from(error),
            };
            match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EINTR) => {}
                Some(Errno::EAGAIN) => {
                    self.make_blocking()?;
                    sleep(PAUSE).await;
                }
                _ => return Err(Error::os("wait for an eventfd", error)),
            }
        }
    }

    fn make_blocking(&self) -> Result<(), Error> {
        // SAFETY: the descriptor is the file's, which lives as long as the borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(self.file.as_raw_fd()) };
        fcntl(fd, FcntlArg::F_SETFL(OFlag::empty()))
            .map(drop)
            .map_err(|errno| Error::os("set up an eventfd", errno))
    }
}

/// Reads the eventfd for as long as the session lives.
async fn read_event_fd(session: Rc<SessionInner>, fd: OwnedFd) {
    let heard = EventFdListener::new(fd);
    if let Err(error) = heard.make_blocking() {
        return session.fail(error);
    }
    let reading = async {
        let mut in_vain = 0;
        loop {
            if let Err(error) = heard.wait().await {
                return session.fail(error);
            }
            in_vain = if session.has_events() { 0 } else { in_vain + 1 };
            session.proto.on_wakeup(&*session);
            if in_vain < MOST_IN_VAIN {
                // A peer that never stops ringing must not keep the core.
                yield_now().await;
            } else {
                // One that rings for nothing, or whose eventfd never runs empty, not even awake.
                sleep(PAUSE).await;
            }
        }
    };
    or(async { drop(session.over().await) }, reading).await;
    let EventFdListener { file } = heard;
    // Not at the next look at io_uring, when that may be: descriptors are counted by others.
    let _ = file.close().await;
}
