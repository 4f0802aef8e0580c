// SPDX-License-Identifier: MIT OR Apache-2.0
//! A session's socket, with what waits to be sent and what came and is not handled yet.

use std::cell::{Cell, RefCell};
use std::io;

use crate::exec::wakers::WakerList;
use crate::net::outbox::Outbox;
use crate::net::socket::{Received, Socket};
use shmipc_core::error::Error;
use shmipc_core::wire::Deframer;

/// The socket of a session.
pub(crate) struct SocketIo {
    pub(crate) socket: Socket,
    pub(crate) outbox: Outbox,
    pub(crate) deframer: RefCell<Deframer>,
    /// Whether a send found that the peer is gone.
    pub(crate) is_hung_up: Cell<bool>,
    /// The task that reads, while it waits for streams to be read.
    pub(crate) paused: WakerList,
}

impl SocketIo {
    pub(crate) fn new(socket: Socket, max_message_len: u32) -> Self {
        Self {
            socket,
            outbox: Outbox::default(),
            deframer: RefCell::new(Deframer::new(max_message_len)),
            is_hung_up: Cell::new(false),
            paused: WakerList::default(),
        }
    }

    /// Receives once. `Bytes` tells how much room was left.
    pub(crate) fn receive(&self) -> Result<Received, Error> {
        let mut deframer = self.deframer.borrow_mut();
        let hint = deframer.receive_hint();
        let space = deframer.space(hint);
        let room = space.len();
        match self.socket.try_receive(space) {
            Ok(Received::Bytes(count)) => {
                deframer.commit(count);
                Ok(Received::Bytes(room - count))
            }
            Ok(other) => Ok(other),
            // A peer that died with our bytes unread is gone like any other.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Received::End),
            Err(error) => Err(Error::os("receive from the peer", error)),
        }
    }

    /// Whether nothing of a message is there yet.
    pub(crate) fn is_between_messages(&self) -> bool {
        self.deframer.borrow().is_empty()
    }

    pub(crate) fn shut_down(&self) {
        self.socket.shut_down();
    }
}

/// Whether an error of the socket says that the peer is gone.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}
