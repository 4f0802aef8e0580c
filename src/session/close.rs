// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a session ends without losing what it has sent last.
//!
//! A peer of this crate that sees the connection end takes what was sent before. Others do not:
//! shmipc-go looks at the hang-up first and drops its queue, and what its streams had received and
//! nobody had read (`docs/protocol.md#ending-a-session`). So towards a peer that is not known to be
//! of this crate the connection stays up, for
//! [`close_timeout`](crate::ConfigBuilder::close_timeout) at the most, until the peer
//!
//! - has read the socket,
//! - has taken every event that was in the queue when the close began, and
//! - has given back every slice that it had then: its head stands behind an event as soon as the
//!   event is popped, long before a reader has seen the data. How many slices a list counts says
//!   nothing, since several sessions can share one memory.
//!
//! Data that went over the socket leaves no such mark, and no message of the protocol says that it
//! was read. What shows it is what the peer's user does next: it answers on the stream, or closes
//! it. (Not after this side has closed it: then the peer's own close is not told.) So as long as
//! neither comes, the connection stays up for the whole time, which is what a slow reader needs,
//! and the close does not say that all was taken. Data of which the time has passed already gets a
//! short while behind a [barrier](crate::session::path_order), which tells when the event loop of
//! the peer has handled it.
//!
//! A version 2 client does not know whether the server is there at all. That it has taken the first
//! event shows it; a server of this crate, which takes the rest by itself, says so when it maps.
//!
//! Nothing of this is counted while messages flow: all of it is found when the session ends.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use futures_lite::future::{or, poll_fn, yield_now};

use crate::exec::runtime::sleep;
use crate::exec::task_waker::relayed;
use crate::exec::wakers::WakerSlot;
use crate::session::local_reactor::LocalReactor;
use crate::session::path_order::closed;
use crate::session::state::SessionInner;
use crate::session::wakeup::Doorbell;
use shmipc_core::error::{Error, MemoryError, Result};
use shmipc_core::proto::stream_table::NO_STREAM;
use shmipc_core::shm::pool::SliceId;

/// How long the first pause between two looks is, and the longest: each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_micros(100);
const LONGEST_PAUSE: Duration = Duration::from_millis(5);

/// How long a reader gets at least for what its event loop has handed to it, of which nothing tells
/// when it was read: data that came over the socket.
const TIME_TO_READ: Duration = Duration::from_millis(100);

/// For how long a peer may be awake before the barrier is left out. It cannot be put in order with
/// the socket while the peer looks at the queue by itself.
const TIME_TO_SLEEP: Duration = Duration::from_millis(200);

/// What a close waits for.
struct Outstanding {
    /// How many events there were.
    events: i64,
    /// The slices that the peer had, less those that it has given back since.
    slices: Vec<SliceId>,
    barrier: Barrier,
}

/// Whether data that went over the socket has been handled.
enum Barrier {
    /// To be put into the queue, since this time.
    CreditUpdate(Instant),
    /// The event of this number.
    At(i64),
    /// The peer's readers have until then, if nothing shows before that they have read it.
    Passed(Instant),
    /// Nothing went over the socket of which it is not known that it was read.
    Nothing,
}

impl SessionInner {
    /// Waits until the peer has taken all that was sent to it before now. What is sent meanwhile is
    /// not waited for. Cancel-safe.
    ///
    /// # Errors
    ///
    /// [`Error::NotTaken`], if it has not by the end of its time; why the session ended, if it did
    /// so before.
    pub(crate) async fn let_peer_take(self: &Rc<Self>, limit: Duration) -> Result<()> {
        let left = RefCell::new(None);
        let too_late = async {
            relayed(sleep(limit)).await;
            Err(self.not_taken(limit, left.borrow().as_ref()))
        };
        or(self.wait_until_taken(limit, &left), too_late).await
    }

    async fn wait_until_taken(
        self: &Rc<Self>,
        limit: Duration,
        left: &RefCell<Option<Outstanding>>,
    ) -> Result<()> {
        self.flush_queue();
        self.flushed().await?;
        if !self.is_waited_for() {
            return Ok(());
        }
        let began = Instant::now();
        let mut pause = FIRST_PAUSE;
        // A stream whose close is lost ends as if it were cut off.
        while self.has_kept_closes() {
            self.check_end()?;
            self.pause(&mut pause).await;
        }
        *left.borrow_mut() = Some(self.outstanding(began).await);
        pause = FIRST_PAUSE;
        loop {
            self.check_end()?;
            // It may be one of this crate that has mapped only now.
            self.look_for_extension();
            if !self.is_waited_for() || self.look_at_outstanding(limit, left)? {
                return Ok(());
            }
            self.pause(&mut pause).await;
        }
    }

    /// Whether the peer could lose what was sent to it if the connection ended now.
    fn is_waited_for(&self) -> bool {
        let counters = &self.counters;
        let has_sent = counters.events_sent.get() > 0 || counters.fallback_sent.get() > 0;
        has_sent && !self.credit.is_known()
    }

    fn check_end(&self) -> Result<()> {
        self.ended().map_or(Ok(()), Err)
    }

    async fn pause(&self, pause: &mut Duration) {
        relayed(sleep(*pause)).await;
        *pause = (*pause * 2).min(LONGEST_PAUSE);
    }

    /// What the peer has not taken yet.
    async fn outstanding(&self, began: Instant) -> Outstanding {
        let events = self.channels.producer.borrow().pushed();
        let slices = self.slices_with_peer().await;
        let is_confirmed = self.unconfirmed() == 0;
        let barrier = if is_confirmed { Barrier::Nothing } else { Barrier::CreditUpdate(began) };
        Outstanding { events, slices, barrier }
    }

    /// How many bytes went over the socket of which nothing shows that they were read.
    fn unconfirmed(&self) -> u64 {
        let streams = self.streams.borrow().all();
        let of_open = streams.iter().map(|stream| stream.unconfirmed());
        of_open.fold(self.credit.unconfirmed.get(), u64::saturating_add)
    }

    async fn slices_with_peer(&self) -> Vec<SliceId> {
        let (mut slices, mut from) = (Vec::new(), Some(0));
        while let Some(start) = from {
            from = self.channels.manager.find_sent(start, &mut slices);
            if from.is_some() {
                yield_now().await;
            }
        }
        slices
    }

    /// Whether the peer has taken all of it by now.
    fn look_at_outstanding(
        self: &Rc<Self>,
        limit: Duration,
        left: &RefCell<Option<Outstanding>>,
    ) -> Result<bool> {
        let mut left = left.borrow_mut();
        let Some(left) = left.as_mut() else { return Ok(true) };
        left.slices.retain(|&id| self.channels.manager.is_with_peer(id));
        let is_quiet = self.taken()? >= left.events && left.slices.is_empty();
        if !is_quiet || !self.look_at_barrier(limit, &mut left.barrier)? {
            return Ok(false);
        }
        // What is sent meanwhile is not waited for.
        if !matches!(left.barrier, Barrier::Nothing) && self.unconfirmed() > 0 {
            return Err(self.not_taken(limit, Some(left)));
        }
        Ok(true)
    }

    /// The peer has ended the session. Whether it had taken everything by then, as far as can be
    /// told.
    pub(crate) async fn has_peer_taken_all(&self) -> bool {
        let in_flight = self.channels.producer.borrow_mut().in_flight();
        if self.outbox().is_cut() || self.has_kept_closes() || !matches!(in_flight, Ok((_, 0))) {
            return false;
        }
        self.credit.is_known()
            || self.unconfirmed() == 0 && self.slices_with_peer().await.is_empty()
    }

    /// How many events the peer has taken, of all that there were.
    fn taken(&self) -> Result<i64> {
        let in_flight = self.channels.producer.borrow_mut().in_flight();
        let (head, _) = in_flight.map_err(|error| self.broken(error))?;
        if self.channels.are_lost() {
            return Err(self.broken(MemoryError::Lost));
        }
        Ok(head)
    }

    /// Whether data that went over the socket has been read, or handled and its readers had their
    /// time.
    fn look_at_barrier(self: &Rc<Self>, limit: Duration, barrier: &mut Barrier) -> Result<bool> {
        if self.unconfirmed() == 0 {
            return Ok(true);
        }
        let is_needed = !matches!(barrier, Barrier::Nothing | Barrier::Passed(_));
        if is_needed && (!self.outbox().is_empty() || self.socket().unread_by_peer() > 0) {
            return Ok(false);
        }
        let in_time = |since: Instant| Instant::now().saturating_duration_since(since);
        match *barrier {
            Barrier::Nothing => return Ok(true),
            Barrier::Passed(until) => return Ok(Instant::now() >= until),
            Barrier::At(number) if self.taken()? < number => return Ok(false),
            Barrier::At(_) => {}
            Barrier::CreditUpdate(since) => {
                let is_asleep = self.channels.producer.borrow().is_peer_asleep();
                let is_rung_at_the_socket = matches!(self.doorbell(), Doorbell::Socket);
                if is_rung_at_the_socket && is_asleep {
                    // The SyncEvent for it goes behind the data, and nothing else wakes the peer.
                    if self.put_event(closed(NO_STREAM))? {
                        *barrier = Barrier::At(self.channels.producer.borrow().pushed());
                        self.flush_queue();
                    }
                    return Ok(false);
                }
                if is_rung_at_the_socket && in_time(since) < TIME_TO_SLEEP {
                    return Ok(false);
                }
            }
        }
        let now = Instant::now();
        // They had as much time as they get, if it went that long ago.
        let sent = self.credit.last_over_socket.get().unwrap_or(now);
        *barrier = Barrier::Passed((now + TIME_TO_READ).max(sent + limit));
        Ok(false)
    }

    #[cold]
    fn not_taken(&self, after: Duration, left: Option<&Outstanding>) -> Error {
        let in_flight = self.channels.producer.borrow_mut().in_flight();
        let events = in_flight.map_or(0, |(head, _)| {
            let until =
                left.map_or_else(|| self.channels.producer.borrow().pushed(), |left| left.events);
            u32::try_from(until - head).unwrap_or_default()
        });
        let slices = left.map_or(0, |left| left.slices.len());
        let socket_bytes = self.outbox().len() + self.socket().unread_by_peer();
        let unconfirmed = self.unconfirmed();
        Error::NotTaken { after, events, slices, socket_bytes, unconfirmed }
    }

    /// The last handle of a user is gone. Ends the session, at once or when the peer has taken what
    /// was sent to it.
    pub(crate) fn end_at_last(self: &Rc<Self>) {
        self.flush_queue();
        if self.is_over() || (self.outbox().is_empty() && !self.is_waited_for()) {
            return self.fail(Error::SessionClosed);
        }
        // Nobody is here any more to take them.
        self.accepts.is_over.set(true);
        let waiting = std::mem::take(&mut *self.accepts.ready.borrow_mut());
        for stream in waiting {
            self.close_stream(&stream);
        }
        self.poller.shared().push(self);
    }
}

thread_local! {
    static SOCKETS: ShutDownAtEnd = const { ShutDownAtEnd(RefCell::new(Vec::new())) };
}

/// Sessions that wait for their peer when their thread ends. Their tasks never run again, and
/// glommio drops nothing of them, so their peers have to be told here.
struct ShutDownAtEnd(RefCell<Vec<Weak<SessionInner>>>);

impl Drop for ShutDownAtEnd {
    fn drop(&mut self) {
        for session in self.0.borrow().iter().filter_map(Weak::upgrade) {
            session.socket().shut_down();
            // To end it would wake tasks of an executor that is no more.
            std::mem::forget(session);
        }
    }
}

/// Sessions whose handles are gone, while their peer takes what was sent to it.
///
/// A handle can be dropped where no task can be started: outside of the executor. So one that is
/// there already takes over.
#[derive(Default)]
pub(crate) struct Lingering {
    new: RefCell<Vec<Rc<SessionInner>>>,
    count: Cell<usize>,
    task: WakerSlot,
}

impl Lingering {
    fn push(&self, session: &Rc<SessionInner>) {
        // It does not matter when the thread is at its end already.
        let _ = SOCKETS.try_with(|sockets| {
            let mut sockets = sockets.0.borrow_mut();
            sockets.retain(|session| session.upgrade().is_some_and(|session| !session.is_over()));
            sockets.push(Rc::downgrade(session));
        });
        self.count.set(self.count.get() + 1);
        self.new.borrow_mut().push(Rc::clone(session));
        self.task.wake();
    }

    /// Whether no session waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.count.get() == 0
    }
}

/// Ends sessions whose handles are gone, each in a task of its own.
pub(crate) async fn end_lingering(poller: Rc<LocalReactor>) {
    loop {
        let sessions = poll_fn(|context| {
            let sessions = std::mem::take(&mut *poller.shared().new.borrow_mut());
            if !sessions.is_empty() {
                return std::task::Poll::Ready(sessions);
            }
            poller.shared().task.register(context);
            std::task::Poll::Pending
        })
        .await;
        for session in sessions {
            let of = Rc::clone(&poller);
            poller.spawn(async move {
                let limit = session.config.settings().limits.close_timeout;
                let taken = session.let_peer_take(limit).await;
                session.fail(taken.err().unwrap_or(Error::SessionClosed));
                let count = &of.shared().count;
                count.set(count.get() - 1);
            });
        }
    }
}
