// SPDX-License-Identifier: MIT OR Apache-2.0
//! Eventfds between two processes that do not trust each other.
//!
//! Both sides have the same open file, so the peer can make it blocking and count it up to its
//! limit at any time. A `write` would then wait, and the whole core with it. No flag of `write` and
//! no check before it prevents that. But when an operation of an io_uring completes, the kernel
//! counts up the eventfd that is registered with it, and never waits for that. So an
//! [`EventFdNotifier`] has a small io_uring of its own with the peer's eventfd registered, and has
//! it complete an empty operation: one system call, which costs as much as the `write`.
//!
//! An [`EventFdListener`] reads through the executor's io_uring, which waits without holding up the
//! core. If the file is non-blocking, such a read fails at once instead of waiting, so the listener
//! clears that flag. The peer only writes to this file, and an honest peer never comes near the
//! limit at which a write would wait.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use io_uring::IoUring;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::exec::runtime::{BufferedFile, sleep};
use crate::net::descriptor::{fd_of_file, file_from, push_nop};
use shmipc_core::error::Error;

/// How long the listener waits after the peer has made the file non-blocking again, so that a peer
/// that goes on doing so does not keep the core busy.
const PAUSE: Duration = Duration::from_millis(1);

/// Creates the two eventfds of a session, as its client does: the one that the client writes, and
/// the one that the server writes.
///
/// They are non-blocking for the sake of other implementations, which read until nothing is left.
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
    /// Whether the last notification could not be sent, for want of memory.
    is_owed: Cell<bool>,
}

impl EventFdNotifier {
    /// Notifies at this eventfd. Does not keep the descriptor: the kernel has the file.
    pub(crate) fn new(fd: &OwnedFd) -> Result<Self, Error> {
        let registered = IoUring::new(1).and_then(|ring| {
            ring.submitter().register_eventfd(fd.as_raw_fd())?;
            Ok(ring)
        });
        let ring = registered.map_err(|error| Error::os("set up an eventfd", error))?;
        Ok(Self { ring: RefCell::new(ring), is_owed: Cell::new(false) })
    }

    /// Counts up the eventfd. If the kernel lacks memory for that now, the notification is
    /// [owed](Self::is_owed), which is not an error.
    pub(crate) fn notify(&self) -> Result<(), Error> {
        let mut ring = self.ring.borrow_mut();
        // The queue is full only if the last submission failed. Then its operation is still there,
        // and is submitted now.
        push_nop(&mut ring);
        // A submission that a signal interrupts leaves the operation in the queue for the next try.
        while let Err(error) = ring.submit() {
            match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EINTR) => {}
                // These pass.
                Some(Errno::EAGAIN | Errno::EBUSY | Errno::ENOMEM) => {
                    self.is_owed.set(true);
                    return Ok(());
                }
                _ => return Err(Error::os("ring at an eventfd", error)),
            }
        }
        // The operation completes within the call. Its completion is taken, so that there is room
        // for the next.
        ring.completion().for_each(drop);
        Ok(())
    }

    /// Whether the last notification could not be sent.
    pub(crate) fn is_owed(&self) -> bool {
        self.is_owed.get()
    }

    /// The same, for a caller that tries again now.
    pub(crate) fn take_owed(&self) -> bool {
        self.is_owed.take()
    }
}

/// Waits for an eventfd that the peer writes to.
pub(crate) struct EventFdListener {
    file: BufferedFile,
}

impl EventFdListener {
    pub(crate) fn new(fd: OwnedFd) -> Result<Self, Error> {
        let listener = Self { file: file_from(fd) };
        listener.make_blocking()?;
        Ok(listener)
    }

    /// Waits until the peer has counted up the eventfd. Cancel-safe for a caller that looks at its
    /// queue before it waits again: a notification may go with the future.
    pub(crate) async fn notified(&self) -> Result<(), Error> {
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
        fcntl(fd_of_file(&self.file), FcntlArg::F_SETFL(OFlag::empty()))
            .map(drop)
            .map_err(|errno| Error::os("set up an eventfd", errno))
    }

    /// Closes the descriptor now. Dropping the listener does so only when io_uring is next
    /// submitted to, and tests and limits count open descriptors.
    pub(crate) async fn close(self) {
        let _ = self.file.close().await;
    }
}
