// SPDX-License-Identifier: MIT OR Apache-2.0
//! One end of a connection: a socket, TCP or Unix, or a stream of a session.
//!
//! `unsafe` here: lending descriptors to calls that glommio does not make, and handing a socket
//! that is connected over to it.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};
use std::path::Path;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};

use futures_lite::{AsyncRead, AsyncWrite};
use glommio::net::TcpStream;
use nix::sys::socket::{setsockopt, sockopt};
use shmipc_glommio::{Error, Stream};

use crate::hangups::{Hangup, Hangups, Watched};
use crate::support::unix_socket;

/// One end of a connection. Unless it is said that it [has ended](Self::has_ended) well, dropping
/// it is a reset: what came through must not be taken for all there was.
pub(crate) struct End {
    kind: Kind,
    pub(crate) has_ended: bool,
    /// Whether a write has said that it was reset. The kernel says so once.
    pub(crate) was_reset: bool,
}

enum Kind {
    Socket(Socket),
    Stream(Stream),
}

/// A Unix socket is held in glommio's TCP type as well, which does nothing that it could not, and
/// shows its descriptor.
struct Socket {
    /// Before the socket, which must not be closed while it is watched.
    watched: Option<Watched>,
    stream: TcpStream,
}

pub(crate) trait ReadWrite: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> ReadWrite for T {}

impl End {
    /// A socket that is connected.
    pub(crate) fn socket(stream: TcpStream) -> Self {
        Self::new(Kind::Socket(Socket { watched: None, stream }))
    }

    pub(crate) fn stream(stream: Stream) -> Self {
        Self::new(Kind::Stream(stream))
    }

    fn new(kind: Kind) -> Self {
        Self { kind, has_ended: false, was_reset: false }
    }

    pub(crate) async fn connect_tcp(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self::socket(stream))
    }

    pub(crate) async fn connect_unix(path: &Path) -> io::Result<Self> {
        let fd = unix_socket::connect_descriptor(path).await?;
        // SAFETY: `into_raw_fd` gives up the ownership that the stream takes over.
        Ok(Self::socket(unsafe { TcpStream::from_raw_fd(fd.into_raw_fd()) }))
    }

    #[inline]
    pub(crate) fn io(&mut self) -> Pin<&mut dyn ReadWrite> {
        match &mut self.kind {
            Kind::Socket(socket) => Pin::new(&mut socket.stream),
            Kind::Stream(stream) => Pin::new(stream),
        }
    }

    pub(crate) fn is_stream(&self) -> bool {
        matches!(self.kind, Kind::Stream(_))
    }

    /// Whether the other side understands that one direction has ended. Sockets do, and whoever is
    /// of this crate; that is known by the time that something has ended, nearly always.
    pub(crate) fn knows_half_close(&self) -> bool {
        match &self.kind {
            Kind::Socket(_) => true,
            Kind::Stream(stream) => stream.peer_knows_half_close(),
        }
    }

    /// Waits until nothing that is written from now on would reach anybody, for those who have
    /// nothing to write and do not read. A TCP socket does not tell the end of one direction from
    /// that of both until it is written to.
    pub(crate) fn poll_gone(
        &mut self,
        context: &mut Context<'_>,
        hangups: &Rc<Hangups>,
    ) -> Poll<Hangup> {
        match &mut self.kind {
            Kind::Socket(socket) => socket.poll_gone(context, hangups),
            Kind::Stream(stream) => pin!(stream.closed()).poll(context).map(|why| match why {
                Error::StreamClosedByPeer | Error::StreamClosed => Hangup::Closed,
                error => Hangup::Reset(error.into()),
            }),
        }
    }

    /// Whether an error of reading says that a peer of another implementation has ended its
    /// session. It does that when its process ends, and says nothing of its streams.
    pub(crate) fn has_left_without_a_word(&self, error: &io::Error) -> bool {
        let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<Error>());
        !self.knows_half_close() && matches!(cause, Some(Error::PeerClosed))
    }

    /// Sees to it that closing is a reset.
    ///
    /// A Unix socket knows no such thing, unless something that came is still unread: then its
    /// peer reads a reset too. A peer of another implementation sees its stream closed.
    fn abort(&mut self) {
        match &mut self.kind {
            Kind::Socket(socket) => {
                let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
                // It may be gone already.
                let _ = setsockopt(&socket.fd(), sockopt::Linger, &at_once);
            }
            Kind::Stream(stream) => stream.reset(),
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if !self.has_ended {
            self.abort();
        }
    }
}

impl Socket {
    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the stream's, which lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.stream.as_raw_fd()) }
    }

    fn poll_gone(&mut self, context: &Context<'_>, hangups: &Rc<Hangups>) -> Poll<Hangup> {
        if self.watched.is_none() {
            match Watched::new(hangups, self.fd()) {
                Ok(watched) => self.watched = Some(watched),
                // For want of memory. It is tried again at the next turn, and whoever writes hears
                // of it anyway.
                Err(_) => return Poll::Pending,
            }
        }
        match &self.watched {
            Some(watched) => watched.poll(context, self.fd()),
            None => Poll::Pending,
        }
    }
}
