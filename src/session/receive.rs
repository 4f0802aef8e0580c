// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads the socket of a session. What comes over it is handled by the state machine.

use std::rc::Rc;
use std::task::Poll;

use futures_lite::future::yield_now;

use crate::net::socket::Received;
use crate::session::state::SessionInner;
use shmipc_core::error::{Error, HandshakeError};

/// The most receives in a row from one socket.
const RECEIVES_PER_TURN: usize = 16;
/// The most receives from a socket whose peer is gone.
const RECEIVES_WHEN_HUNG_UP: usize = 1 << 12;

impl SessionInner {
    /// Closes the streams whose close came by the queue, once the socket has nothing more for them.
    #[inline]
    pub(crate) fn finish_closing(&self) {
        // Those that come while the socket is read may have data behind what is read.
        let closes = self.proto.waiting_closes();
        if closes > 0 {
            self.finish_waiting_closes(closes);
        }
    }

    #[inline(never)]
    fn finish_waiting_closes(&self, closes: usize) {
        if self.receive_messages() || self.is_over() {
            self.proto.on_socket_read(self, closes);
        }
    }

    /// Reads messages from the socket and handles them. Whether nothing more is there, and no
    /// message is half there.
    fn receive_messages(&self) -> bool {
        for _ in 0..RECEIVES_PER_TURN {
            if self.is_over() || self.proto.has_too_much_unread() {
                return false;
            }
            match self.receive_once() {
                // Less than there was room for is all that there was.
                Ok(Received::Bytes(room)) if room > 0 => return self.socket.is_between_messages(),
                Ok(Received::Bytes(_)) => {}
                Ok(Received::Nothing) => return self.socket.is_between_messages(),
                Ok(Received::Descriptors(got)) => {
                    self.fail(HandshakeError::Descriptors { got, expected: 0 }.into());
                    return false;
                }
                Ok(Received::End) => {
                    self.proto.on_peer_gone(self);
                    return true;
                }
                Err(error) => {
                    self.fail(error);
                    return false;
                }
            }
        }
        false
    }

    /// Receives once, and handles the messages that are whole. `Bytes` tells how much room was
    /// left.
    fn receive_once(&self) -> Result<Received, Error> {
        let received = self.socket.receive()?;
        loop {
            let message = self.socket.deframer.borrow_mut().next_message()?;
            let Some((header, message)) = message else {
                return Ok(received);
            };
            self.proto.on_message(self, &header, message)?;
        }
    }

    /// The peer is gone, which was found out in another way than by reading. Takes what it sent
    /// before, also beyond what may wait unread: there is no more of it than the socket holds.
    pub(crate) fn hang_up(&self) {
        for _ in 0..RECEIVES_WHEN_HUNG_UP {
            match self.receive_once() {
                Ok(Received::Bytes(_)) => {}
                // Nor is there anything behind descriptors that was worth being delivered.
                Ok(Received::Nothing | Received::End | Received::Descriptors(_)) => break,
                Err(error) => return self.fail(error),
            }
        }
        self.proto.on_peer_gone(self);
    }
}

/// Handles what comes over the socket for as long as the session lives.
pub(crate) async fn read_socket(session: Rc<SessionInner>) {
    while !session.is_over() {
        let may_read = || match session.is_over() || !session.proto.has_too_much_unread() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        };
        session.socket.paused.until(may_read).await;
        // Also after a pause: what came with the last of it is not announced again.
        if session.receive_messages() {
            session.finish_closing();
        }
        // A peer that never stops sending must not keep the core.
        yield_now().await;
        if session.is_over() || session.proto.has_too_much_unread() {
            continue;
        }
        if let Err(error) = session.socket.socket.readable().await {
            session.fail(error);
        }
    }
}
