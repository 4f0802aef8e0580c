// SPDX-License-Identifier: MIT OR Apache-2.0
//! The only room that knows glommio: sockets, the poller, sessions and streams.
//!
//! Everything here lives on one executor. There is no lock and no atomic; state that several tasks
//! of the core share is in cells, and no cell is borrowed across an `await`.
//!
//! - [`socket`]: a connected socket: readiness, sending without waiting, descriptors.
//! - [`handshake`]: drives the state machines of `proto` over a socket.
//! - [`session`]: a session's state; [`driver`]: its turns; [`receiving`]: what arrives;
//!   [`sending`]: what is sent; [`outbox`]: what waits for the socket.
//! - [`poller`]: the one task per core that polls the queues of active sessions.
//! - [`stream`]: a stream's handle, of a [`read_half`] and a [`write_half`], each with a
//!   [`deadline`]; [`loan`]: messages as values; [`credit`]: how far a sender may go.
//! - [`listener`], [`connector`]: how sessions come to be.

mod connector;
mod credit;
mod deadline;
mod driver;
mod handshake;
mod listener;
mod loan;
mod outbox;
mod poller;
mod read_half;
mod receiving;
mod sending;
mod session;
mod socket;
mod stream;
mod wakers;
mod write_half;

pub use connector::Connector;
pub use listener::Listener;
pub use loan::{Loan, Message, MessageBuf, Views, ViewsMut};
pub use read_half::{Messages, ReadHalf, Recv};
pub use session::Session;
pub use stream::Stream;
pub use write_half::{Alloc, Send, WriteHalf};
