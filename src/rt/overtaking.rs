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

use std::rc::Rc;
use std::task::{Context, Poll};

use super::doorbell::Doorbell;
use super::send_wait::{SendWait, WaitsFor};
use super::session::SessionInner;
use crate::error::{Error, Result};
use crate::proto::session::NO_STREAM;
use crate::wire::{Event, EventState};

/// How many closes may wait for room, beyond one for each stream that can be open.
const SPARE_CLOSES: usize = 1 << 16;

/// How far a stream is on its way to the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Overtaking {
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
    pub(super) fn orders_paths(&self) -> bool {
        matches!(self.doorbell(), Doorbell::Socket) || self.credit.is_known()
    }

    /// Waits until a stream that uses the socket from now on overtakes nothing of its own.
    pub(super) fn poll_overtaking(
        self: &Rc<Self>,
        state: &mut Overtaking,
        wait: &mut SendWait,
        context: &Context<'_>,
    ) -> Poll<Result<()>> {
        if *state == Overtaking::Nothing || self.orders_paths() {
            return Poll::Ready(Ok(()));
        }
        if *state == Overtaking::Never && self.put_event(closed(NO_STREAM))? {
            *state = Overtaking::Barrier(self.lanes.producer.borrow().pushed());
        }
        self.flush_queue();
        if let Overtaking::Barrier(number) = *state {
            let in_flight = self.lanes.producer.borrow_mut().in_flight();
            let (taken, _) = in_flight.map_err(|error| self.broken(error))?;
            if taken >= number {
                *state = Overtaking::Nothing;
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
    pub(super) fn tell_closed_by_queue(self: &Rc<Self>, stream_id: u32) {
        let waiting = self.lanes.kept_closes.borrow().len();
        // A peer can open and close streams without taking anything.
        if waiting > self.config.limits.streams.saturating_add(SPARE_CLOSES) {
            return self.fail(Error::PeerNotReading);
        }
        // Not before those that wait already.
        if waiting > 0 || matches!(self.send_event(closed(stream_id)), Ok(false)) {
            self.lanes.kept_closes.borrow_mut().push_back(stream_id);
            self.activate();
        }
    }

    /// Sends the closes that found the queue full, as far as there is room now.
    pub(super) fn send_kept_closes(self: &Rc<Self>) {
        loop {
            let Some(&stream_id) = self.lanes.kept_closes.borrow().front() else { return };
            // An error has ended the session.
            if !matches!(self.send_event(closed(stream_id)), Ok(true)) {
                return;
            }
            self.lanes.kept_closes.borrow_mut().pop_front();
        }
    }

    pub(super) fn has_kept_closes(&self) -> bool {
        !self.lanes.kept_closes.borrow().is_empty()
    }
}

pub(super) fn closed(stream_id: u32) -> Event {
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
