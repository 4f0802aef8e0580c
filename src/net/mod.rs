// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sockets, their files, and who is at the other end.
//!
//! - [`socket`]: a connected socket: readiness, sends that do not wait, descriptors.
//! - [`eventfd`]: wakes a peer, and waits to be woken; [`descriptor`]: the raw descriptors that the
//!   other files need, behind safe functions.
//! - [`fd_passing`]: receives descriptors from a peer; [`fd_disposal`]: closes sockets and
//!   descriptors whose close a peer can make slow.
//! - [`socket_file`]: the files of Unix sockets; [`bind_lock`]: the lock that is held while one is
//!   replaced; [`bound_socket`]: a listening socket together with its file.
//! - [`credentials`]: the user and process of the peer; [`admission`]: limits on handshakes,
//!   sessions and their memory.
//!
//! Nothing here waits on the executor's thread for something that a peer decides.

pub(crate) mod admission;
pub(crate) mod bind_lock;
pub(crate) mod bound_socket;
pub(crate) mod credentials;
pub(crate) mod descriptor;
pub(crate) mod eventfd;
pub(crate) mod fd_disposal;
pub(crate) mod fd_passing;
pub(crate) mod outbox;
pub(crate) mod socket;
pub(crate) mod socket_file;
