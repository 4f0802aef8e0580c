// SPDX-License-Identifier: MIT OR Apache-2.0
//! What goes over the socket must not overtake what is in the queue.
//!
//! A side that is woken by SyncEvents gets both in order: the SyncEvent goes over the same socket,
//! before whatever follows. With an eventfd, or with nobody being woken at all, nothing orders the
//! two, and it is for the receiver to drain its queue before it handles a message of the socket.
//! This crate does. The crate `shmipc` 0.2.1 does not: what a stream sent over the socket, after
//! its pool ran empty, could come before what it had sent by the queue, and a close before its
//! data.
//!
//! So towards such a peer a stream waits before it first uses the socket, until the peer has
//! handled what the stream put into the queue; and a close that finds the queue full waits for
//! room, instead of going over the socket.
//!
//! When has it? A peer handles its events one after the other, so when it has taken the next one.
//! To be sure that there is a next one, the stream puts a barrier behind its last: a close of [a
//! stream that there never is](NO_STREAM), which means nothing to anybody.

use std::cell::LazyCell;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crate::session::send_wait::{SendWait, WaitsFor};
use crate::session::state::SessionInner;
use crate::session::stream::StreamInner;
use crate::session::wakeup::Doorbell;
use shmipc_core::error::{Error, Result};
use shmipc_core::proto::stream_state::DataPath;
use shmipc_core::proto::stream_table::NO_STREAM;
use shmipc_core::shm::pool::SliceId;
use shmipc_core::wire::{Event, EventState};

/// How many closes may wait for room, beyond one for each stream that can be open.
const SPARE_CLOSES: usize = 1 << 16;

/// How long a peer that is not of this crate has to read the last of a stream, once it has taken
/// its event, or read its socket, before it is told of its close. One that keeps what it has read
/// until it hears of the close hears of it that late; so does one to which the last went over the
/// socket, since nothing tells when that was read.
const TIME_TO_READ: Duration = Duration::from_millis(50);
/// How many closes may wait for that. Beyond, they are told at once.
const MAX_UNREAD_CLOSES: usize = 1024;

/// A close of which the peer is told later.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeferredClose {
    stream_id: u32,
    /// What the peer is to have read before.
    unread: Option<Unread>,
}

#[derive(Debug, Clone, Copy)]
struct Unread {
    last: Last,
    /// Until when that is waited for, once it has come to the peer.
    until: Option<Instant>,
}

/// The last of a stream.
#[derive(Debug, Clone, Copy)]
enum Last {
    /// A slice of it, and how many events there were with it. Before the peer has taken them it
    /// cannot read.
    Slice(SliceId, i64),
    /// It went over the socket: so many bytes of which nothing shows that they were read, and how
    /// many had gone that way in all.
    Socket { unconfirmed: u64, until: u64 },
}

/// How far a stream is on its way to the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum PathBarrier {
    /// It has not used the socket.
    #[default]
    Never,
    /// It waits until the peer has taken its barrier, which is the event of this number.
    Barrier(i64),
    /// There is nothing of it left to overtake.
    Nothing,
}

impl SessionInner {
    /// Whether the peer handles what comes over the socket behind what was in the queue before.
    pub(crate) fn orders_paths(&self) -> bool {
        matches!(self.doorbell(), Doorbell::Socket) || self.credit.is_known()
    }

    /// Waits until a stream that uses the socket from now on overtakes nothing of its own.
    pub(crate) fn poll_overtaking(
        self: &Rc<Self>,
        state: &mut PathBarrier,
        wait: &mut SendWait,
        context: &Context<'_>,
    ) -> Poll<Result<()>> {
        if *state == PathBarrier::Nothing || self.orders_paths() {
            return Poll::Ready(Ok(()));
        }
        if *state == PathBarrier::Never && self.put_event(closed(NO_STREAM))? {
            *state = PathBarrier::Barrier(self.channels.producer.borrow().pushed());
        }
        self.flush_queue();
        if let PathBarrier::Barrier(number) = *state {
            let in_flight = self.channels.producer.borrow_mut().in_flight();
            let (taken, _) = in_flight.map_err(|error| self.broken(error))?;
            if taken >= number {
                *state = PathBarrier::Nothing;
                return Poll::Ready(Ok(()));
            }
        }
        // While somebody waits there, the session has its turns with the poller.
        self.activate();
        wait.begin(self, WaitsFor::Room, context);
        Poll::Pending
    }

    /// Tells a peer that does not order its paths of a close, by the queue: now, or when there is
    /// room.
    pub(crate) fn tell_closed_by_queue(self: &Rc<Self>, stream_id: u32) {
        let waiting = self.channels.kept_closes.borrow().len();
        // A peer can open and close streams without taking anything.
        if waiting > self.config.settings().limits.streams.saturating_add(SPARE_CLOSES) {
            return self.fail(Error::PeerNotReading);
        }
        // Not before those that wait already.
        if waiting > 0 || matches!(self.send_event(closed(stream_id)), Ok(false)) {
            self.keep_close(DeferredClose { stream_id, unread: None });
        }
    }

    fn keep_close(self: &Rc<Self>, close: DeferredClose) {
        self.channels.kept_closes.borrow_mut().push_back(close);
        self.activate();
    }

    /// Tells a peer of a close, behind what was sent on this path. One that is not of this crate is
    /// told when it has read the last of it, or has had its time for that: an asynchronous stream
    /// of shmipc-go hands nothing to its user any more once it has seen the close, also of what it
    /// had received before.
    pub(crate) fn tell_closed_when_read(self: &Rc<Self>, stream: &StreamInner, path: DataPath) {
        let stream_id = stream.id();
        if !self.credit.is_known() {
            let unconfirmed = stream.unconfirmed();
            let in_all = &self.credit.unconfirmed;
            in_all.set(in_all.get().saturating_add(unconfirmed));
            let last = match path {
                DataPath::Socket if unconfirmed == 0 => None,
                DataPath::Socket => {
                    Some(Last::Socket { unconfirmed, until: self.outbox().taken_in() })
                }
                DataPath::SharedMemory => {
                    let slice = self.channels.manager.sent_at(stream.last_sent.get());
                    slice.map(|slice| Last::Slice(slice, self.channels.producer.borrow().pushed()))
                }
            };
            let is_room = self.channels.kept_closes.borrow().len() < MAX_UNREAD_CLOSES;
            if let Some(last) = last.filter(|_| is_room) {
                let unread = Some(Unread { last, until: None });
                return self.keep_close(DeferredClose { stream_id, unread });
            }
        }
        self.tell_closed(stream_id, path);
    }

    /// The peer has closed a stream that this side has closed too. It needs not be told any more,
    /// and has read what it wanted to.
    pub(crate) fn note_closed_by_both(&self, id: u32) {
        self.channels.kept_closes.borrow_mut().retain(|close| match close.unread {
            Some(Unread { last: Last::Socket { unconfirmed, .. }, .. })
                if close.stream_id == id =>
            {
                let in_all = &self.credit.unconfirmed;
                in_all.set(in_all.get().saturating_sub(unconfirmed));
                false
            }
            _ => true,
        });
    }

    /// How many bytes of what went over the socket the peer has read from it, at least.
    fn read_from_socket(&self) -> u64 {
        let left = self.outbox().len() + self.socket().unread_by_peer();
        self.outbox().taken_in().saturating_sub(left as u64)
    }

    /// Sends the closes that were kept, as far as there is room now and they have been waited for.
    pub(crate) fn send_kept_closes(self: &Rc<Self>) {
        if self.has_kept_closes() {
            self.send_due_closes();
        }
    }

    #[inline(never)]
    fn send_due_closes(self: &Rc<Self>) {
        let now = Instant::now();
        let in_flight = self.channels.producer.borrow_mut().in_flight();
        // What is wrong with the queue is found, and named, when it is used.
        let taken = in_flight.map_or(i64::MAX, |(head, _)| head);
        let read = LazyCell::new(|| self.read_from_socket());
        let has_come = |last| match last {
            Last::Slice(_, events) => taken >= events,
            Last::Socket { until, .. } => *read >= until,
        };
        // Those that are told again find the list empty, and their place behind the others.
        let mut kept = std::mem::take(&mut *self.channels.kept_closes.borrow_mut());
        let mut is_full = false;
        kept.retain_mut(|DeferredClose { stream_id, unread }| match unread {
            Some(unread) if !has_come(unread.last) => true,
            Some(unread) => {
                let until = *unread.until.get_or_insert(now + TIME_TO_READ);
                let (is_unread, path) = match unread.last {
                    Last::Slice(slice, _) => {
                        (self.channels.manager.is_with_peer(slice), DataPath::SharedMemory)
                    }
                    Last::Socket { .. } => (true, DataPath::Socket),
                };
                let is_waited_for = now < until && is_unread;
                if !is_waited_for {
                    self.tell_closed(*stream_id, path);
                }
                is_waited_for
            }
            None => {
                // An error has ended the session.
                is_full = is_full || !matches!(self.send_event(closed(*stream_id)), Ok(true));
                is_full
            }
        });
        let mut again = self.channels.kept_closes.borrow_mut();
        kept.append(&mut again);
        *again = kept;
    }

    pub(crate) fn has_kept_closes(&self) -> bool {
        !self.channels.kept_closes.borrow().is_empty()
    }
}

pub(crate) fn closed(stream_id: u32) -> Event {
    Event { stream_id, offset: 0, status: EventState::Closed.to_status() }
}

#[cfg(test)]
mod tests {
    use futures_lite::future::zip;
    use glommio::LocalExecutorBuilder;

    use crate::{Config, Connector, Listener};

    /// What is sent for no stream would be taken for data of that one.
    #[test]
    fn a_session_that_has_had_all_stream_numbers_goes_on_and_has_no_stream_0() {
        let test = async {
            let name = format!("shmipc-wrapping-{}", std::process::id());
            let path = std::env::temp_dir().join(name);
            let config = Config::builder().container().build().unwrap();
            let listener = Listener::bind(&path, config.clone()).unwrap();
            let connector = Connector::new(config);
            let (client, server) = zip(connector.connect(&path), listener.accept()).await;
            let (client, server) = (client.unwrap(), server.unwrap());
            let mut open = Vec::new();
            for start in [None, Some(u32::MAX / 2), Some(u32::MAX - 1)] {
                if let Some(start) = start {
                    client.inner().streams.borrow_mut().skip_to(start);
                }
                for _ in 0..6 {
                    let mut near = client.open_stream().unwrap();
                    let text = near.id().to_string();
                    for _ in 0..2 {
                        let mut loan = near.alloc(text.len()).await.unwrap();
                        loan.write(text.as_bytes());
                        near.send(loan).await.unwrap();
                    }
                    let mut far = server.accept().await.unwrap();
                    assert_eq!(far.id(), near.id());
                    for _ in 0..2 {
                        let message = far.recv().await.unwrap().unwrap();
                        assert_eq!(message.into_bytes(), text);
                    }
                    open.push((near, far));
                }
            }
            let ids: Vec<_> = open.iter().map(|(near, _)| near.id()).collect();
            assert_eq!(ids[..6], [2, 3, 4, 5, 6, 7]);
            assert_eq!(ids[12..], [u32::MAX - 1, u32::MAX, 1, 8, 9, 10], "not 0, nor one in use");
            assert!(client.end_reason().is_none() && server.end_reason().is_none());
        };
        LocalExecutorBuilder::default().make().unwrap().run(test);
    }
}
