// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the other files of `net` need of raw descriptors, as safe functions.
//!
//! The runtime's types take over a [`RawFd`](std::os::fd::RawFd) and show one, so ownership and
//! lifetimes are restored here: an [`OwnedFd`] goes in, a [`BorrowedFd`] comes out.
//!
//! `unsafe` here: descriptors that change owners or are borrowed from the runtime's types, a
//! question about a socket's buffer for which `nix` has no function, and the submission of an
//! operation that refers to no memory.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use io_uring::{IoUring, opcode};
use nix::libc;

use crate::exec::runtime::{BufferedFile, TcpListener, TcpStream};

/// A stream for a connected socket. Also for an epoll instance, whose readiness is waited for as
/// that of a socket.
pub(crate) fn stream_from(fd: OwnedFd) -> TcpStream {
    // SAFETY: `into_raw_fd` gave up the ownership that the stream takes over.
    unsafe { TcpStream::from_raw_fd(fd.into_raw_fd()) }
}

/// A listener for a listening socket.
pub(crate) fn listener_from(fd: OwnedFd) -> TcpListener {
    // SAFETY: `into_raw_fd` gave up the ownership that the listener takes over.
    unsafe { TcpListener::from_raw_fd(fd.into_raw_fd()) }
}

/// A file for whatever is read through io_uring.
pub(crate) fn file_from(fd: OwnedFd) -> BufferedFile {
    // SAFETY: `into_raw_fd` gave up the ownership that the file takes over.
    unsafe { BufferedFile::from_raw_fd(fd.into_raw_fd()) }
}

/// The descriptor of a stream.
pub(crate) fn fd_of_stream(stream: &TcpStream) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is the stream's, which is open for as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(stream.as_raw_fd()) }
}

/// The descriptor of a file.
pub(crate) fn fd_of_file(file: &BufferedFile) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is the file's, which is open for as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) }
}

/// How many bytes are in a socket's send queue (`TIOCOUTQ`). `None`: the kernel does not say, since
/// there is no connection any more.
pub(crate) fn send_queue_len(socket: BorrowedFd<'_>) -> Option<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes one integer to the address, which is that of a live one.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result == 0 { usize::try_from(bytes).ok() } else { None }
}

/// Queues an operation that does nothing. Does nothing either if the queue is full.
pub(crate) fn push_nop(ring: &mut IoUring) {
    let nop = opcode::Nop::new().build();
    // SAFETY: the operation refers to no memory and to no descriptor.
    let pushed = unsafe { ring.submission().push(&nop) };
    drop(pushed);
}
