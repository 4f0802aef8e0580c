// SPDX-License-Identifier: MIT OR Apache-2.0
//! The only room that knows glommio: sockets, the poller, sessions and streams.
//!
//! Everything here lives on one executor. There is no lock and no atomic; state that several tasks
//! of the core share is in cells, and no cell is borrowed across an `await`.
//!
//! - [`socket`]: a connected socket: readiness, sending without waiting, descriptors.
//! - [`handshake`]: drives the state machines of `proto` over a socket.
//! - [`session`]: a session's state; [`driver`]: what arrives; [`sending`]: what is sent;
//!   [`outbox`]: what waits for the socket.
//! - [`poller`]: the one task per core that polls the queues of active sessions.
//! - [`stream`], [`inbound`]: a stream's handle, and what it has received; [`loan`]: messages as
//!   values.
//! - [`listener`], [`connector`]: how sessions come to be.

mod connector;
mod driver;
mod handshake;
mod listener;
mod loan;
mod outbox;
mod poller;
mod sending;
mod session;
mod socket;
mod stream;
mod wakers;

pub use connector::Connector;
pub use listener::Listener;
pub use loan::{Loan, Message, Views, ViewsMut};
pub use session::Session;
pub use stream::Stream;
