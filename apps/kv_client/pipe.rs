// SPDX-License-Identifier: MIT OR Apache-2.0
//! What carries bytes to the server and back: a stream of a session, or a socket.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_lite::{AsyncRead, AsyncWrite};
use glommio::net::{TcpStream, UnixStream};
use shmipc_glommio::{Message, Stream};

pub(crate) enum Pipe {
    Shm {
        stream: Stream,
        /// What was received and not yet read.
        message: Option<Message>,
    },
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// What one read gave.
pub(crate) struct Piece {
    /// How many bytes; none is the end.
    pub(crate) len: usize,
    /// Whether more bytes are known to be there.
    pub(crate) has_more: bool,
}

/// Over shared memory a write takes all parts, so to copy them together first costs more than it
/// saves, unless they are few. Over a socket it takes one.
const COPIED_FOR_SHM: usize = 511;
const COPIED_FOR_SOCKET: usize = 16 << 10;

impl Pipe {
    /// How long a value may be to be copied behind its command, so that both are one part.
    pub(crate) fn max_copied(&self) -> usize {
        match self {
            Self::Shm { .. } => COPIED_FOR_SHM,
            Self::Unix(_) | Self::Tcp(_) => COPIED_FOR_SOCKET,
        }
    }

    pub(crate) fn poll_write(
        &mut self,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Shm { stream, .. } => Pin::new(stream).poll_write_vectored(context, parts),
            Self::Unix(socket) => Pin::new(socket).poll_write_vectored(context, parts),
            Self::Tcp(socket) => Pin::new(socket).poll_write_vectored(context, parts),
        }
    }

    pub(crate) fn poll_read(
        &mut self,
        context: &mut Context<'_>,
        to: &mut [u8],
    ) -> Poll<io::Result<Piece>> {
        let len = match self {
            Self::Shm { stream, message } => return poll_receive(stream, message, context, to),
            Self::Unix(socket) => ready!(Pin::new(socket).poll_read(context, to))?,
            Self::Tcp(socket) => ready!(Pin::new(socket).poll_read(context, to))?,
        };
        Poll::Ready(Ok(Piece { len, has_more: len == to.len() }))
    }
}

fn poll_receive(
    stream: &mut Stream,
    message: &mut Option<Message>,
    context: &mut Context<'_>,
    to: &mut [u8],
) -> Poll<io::Result<Piece>> {
    let mut current = match message.take() {
        Some(message) => message,
        None => match ready!(Pin::new(&mut stream.recv()).poll(context))? {
            Some(message) => message,
            None => return Poll::Ready(Ok(Piece { len: 0, has_more: false })),
        },
    };
    let len = current.read(to);
    if !current.is_empty() {
        *message = Some(current);
        return Poll::Ready(Ok(Piece { len, has_more: true }));
    }
    Poll::Ready(Ok(Piece { len, has_more: stream.unread() > 0 }))
}
