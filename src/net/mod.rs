// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sockets, their files, and who is at the other end.
//!
//! - [`socket`]: a connected socket: readiness, sending without waiting, descriptors.
//! - [`fd_passing`]: descriptors that peers pass; [`fd_disposal`]: closing what a peer makes slow.
//! - [`socket_file`]: the files of Unix sockets; [`bind_lock`]: turns at them; [`bound_socket`]: a
//!   socket that listens, with its file.
//! - [`credentials`]: who the peer is; [`admission`]: how many peers, and what they may bring.

pub(crate) mod admission;
pub(crate) mod bind_lock;
pub(crate) mod bound_socket;
pub(crate) mod credentials;
pub(crate) mod fd_disposal;
pub(crate) mod fd_passing;
pub(crate) mod socket;
pub(crate) mod socket_file;
