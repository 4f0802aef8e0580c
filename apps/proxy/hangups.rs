// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hears of resets and hang-ups of sockets that are not being read: because they have sent their
//! end, or because the other side does not take what they sent.
//!
//! glommio waits for a socket by reading it, and a read behind the end returns at once. An epoll
//! instance waits for the two events that are always reported, errors and hang-ups, of any number
//! of sockets; it forgets them by itself when they are closed. A small io_uring of its own says
//! when the instance has something, by counting up an eventfd, which glommio can read.
//!
//! `unsafe` here: the submission of an operation that refers to no memory, and a descriptor that
//! changes owners.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use glommio::io::BufferedFile;
use io_uring::{IoUring, opcode, types};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{getsockopt, sockopt};

use crate::tell;

/// How many events are taken from the instance at a time.
const EVENTS_AT_ONCE: usize = 64;

/// How a socket has ended.
#[derive(Debug)]
pub(crate) enum Hangup {
    /// With an error, which is that of a reset nearly always.
    Reset(io::Error),
    /// Its peer has closed it in both directions. What came before can still be read.
    Closed,
}

/// The sockets of a core that are watched.
pub(crate) struct Hangups {
    epoll: Epoll,
    slots: RefCell<HashMap<u64, Rc<Slot>>>,
    next: Cell<u64>,
}

#[derive(Default)]
struct Slot {
    has_news: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Hangups {
    /// Starts a task of this executor that hears of what happens.
    pub(crate) fn start() -> io::Result<Rc<Self>> {
        let this = Rc::new(Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            slots: RefCell::default(),
            next: Cell::new(0),
        });
        let bell = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?;
        let ring = IoUring::new(2)?;
        ring.submitter().register_eventfd(bell.as_fd().as_raw_fd())?;
        let hearing = Rc::clone(&this);
        glommio::spawn_local(async move {
            if let Err(error) = hearing.hear(ring, bell.into()).await {
                tell(format_args!("resets are noticed late from now on: {error}"));
            }
        })
        .detach();
        Ok(this)
    }

    async fn hear(&self, mut ring: IoUring, bell: OwnedFd) -> io::Result<()> {
        // SAFETY: `into_raw_fd` gives up the ownership that the file takes over.
        let bell = unsafe { BufferedFile::from_raw_fd(bell.into_raw_fd()) };
        let epoll = types::Fd(self.epoll.0.as_raw_fd());
        loop {
            let readable = PollFlags::POLLIN.bits() as u32;
            let waiting = opcode::PollAdd::new(epoll, readable).build();
            // SAFETY: the operation refers to no memory, and to a descriptor that lives longer.
            let pushed = unsafe { ring.submission().push(&waiting) };
            pushed.map_err(io::Error::other)?;
            while let Err(error) = ring.submit() {
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            while let Err(error) = bell.read_at(0, size_of::<u64>()).await {
                let error = io::Error::from(error);
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            ring.completion().for_each(drop);
            self.take_events()?;
        }
    }

    fn take_events(&self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS_AT_ONCE];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::ZERO) {
                Err(Errno::EINTR) => continue,
                result => result?,
            };
            for event in &events[..count] {
                let slot = self.slots.borrow().get(&event.data()).cloned();
                let Some(slot) = slot else { continue };
                slot.has_news.set(true);
                if let Some(waker) = slot.waker.take() {
                    waker.wake();
                }
            }
            if count < EVENTS_AT_ONCE {
                return Ok(());
            }
        }
    }
}

/// A socket that is watched, until this is dropped.
pub(crate) struct Watched {
    hangups: Rc<Hangups>,
    number: u64,
    slot: Rc<Slot>,
}

impl Watched {
    pub(crate) fn new(hangups: &Rc<Hangups>, socket: BorrowedFd<'_>) -> io::Result<Self> {
        let number = hangups.next.get();
        hangups.next.set(number + 1);
        // Errors and hang-ups come unasked. Told once each, what was told is looked at here.
        let event = EpollEvent::new(EpollFlags::EPOLLET, number);
        hangups.epoll.add(socket, event)?;
        let slot = Rc::new(Slot { has_news: Cell::new(true), waker: RefCell::default() });
        hangups.slots.borrow_mut().insert(number, Rc::clone(&slot));
        Ok(Self { hangups: Rc::clone(hangups), number, slot })
    }

    /// Waits until the socket is reset or hung up. An error is given once.
    pub(crate) fn poll(&self, context: &Context<'_>, socket: BorrowedFd<'_>) -> Poll<Hangup> {
        let mut waker = self.slot.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
            *waker = Some(context.waker().clone());
        }
        drop(waker);
        if !self.slot.has_news.replace(false) {
            return Poll::Pending;
        }
        match look(socket) {
            Some(hangup) => {
                self.slot.has_news.set(true);
                Poll::Ready(hangup)
            }
            None => Poll::Pending,
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.hangups.slots.borrow_mut().remove(&self.number);
    }
}

/// How a socket stands now.
fn look(socket: BorrowedFd<'_>) -> Option<Hangup> {
    let mut polled = [PollFd::new(socket, PollFlags::empty())];
    nix::poll::poll(&mut polled, PollTimeout::ZERO).ok()?;
    let found = polled[0].revents()?;
    if found.contains(PollFlags::POLLERR) {
        match getsockopt(&socket, sockopt::SocketError) {
            Ok(0) | Err(_) => {}
            Ok(errno) => return Some(Hangup::Reset(io::Error::from_raw_os_error(errno))),
        }
    }
    found.contains(PollFlags::POLLHUP).then_some(Hangup::Closed)
}
