// SPDX-License-Identifier: MIT OR Apache-2.0
//! A connected socket of a session, Unix or TCP.
//!
//! glommio's types stand for the kind of socket in their names only: its TCP stream and listener
//! do nothing that a Unix socket could not, and unlike its Unix types they show their descriptor,
//! which passing memory needs. So both kinds of socket are held in them here, and the few calls
//! that glommio does not make are made on the descriptor, none of which waits.
//!
//! `unsafe` here: taking over descriptors that were made, or received, a line before; and a question
//! about a socket's buffer for which `nix` has no function.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_lite::AsyncWrite;
use glommio::net::{TcpListener, TcpStream};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
};

use super::peer::PeerCredentials;
use super::socket_path;
use crate::error::Error;

/// The most descriptors that one message can carry (`SCM_MAX_FD`). With room for all of them none
/// is ever cut off, and every one that a peer sends is closed here or used.
const MAX_DESCRIPTORS: usize = 253;

/// A connected stream socket.
pub(super) struct Socket {
    stream: TcpStream,
    is_tcp: bool,
}

/// What one receive without waiting gave.
pub(super) enum Received {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// The peer will send nothing more.
    End,
}

impl Socket {
    /// Takes over a socket that is connected.
    pub(super) fn connected(fd: OwnedFd) -> Self {
        Self { stream: stream_from(fd), is_tcp: false }
    }

    /// Connects to a Unix socket.
    pub(super) async fn connect_unix(path: &Path) -> Result<Self, Error> {
        let failed = |errno: Errno| socket_path::connect_error(path, errno);
        let address = socket_path::address(path, "")?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)
            .map_err(failed)?;
        // A Unix socket connects at once, or says that the listener's backlog is full.
        while let Err(errno) = nix::sys::socket::connect(fd.as_raw_fd(), &address) {
            if errno != Errno::EAGAIN {
                return Err(failed(errno));
            }
            glommio::timer::sleep(Duration::from_millis(1)).await;
        }
        // io_uring would hand every "nothing yet" to us instead of waiting.
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::empty())).map_err(failed)?;
        Ok(Self::connected(fd))
    }

    /// Connects over TCP, which makes sense on loopback only.
    pub(super) async fn connect_tcp(address: SocketAddr) -> Result<Self, Error> {
        let stream = TcpStream::connect(address).await.map_err(|error| {
            Error::os_at("connect over TCP to", address, io::Error::from(error))
        })?;
        Self::from_stream(stream, true)
    }

    fn from_stream(stream: TcpStream, is_tcp: bool) -> Result<Self, Error> {
        let socket = Self { stream, is_tcp };
        let failed = |errno: Errno| Error::os("set up a socket", errno);
        fcntl(socket.fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(failed)?;
        if is_tcp {
            let option = nix::sys::socket::sockopt::TcpNoDelay;
            nix::sys::socket::setsockopt(&socket.fd(), option, &true).map_err(failed)?;
        }
        Ok(socket)
    }

    pub(super) fn is_tcp(&self) -> bool {
        self.is_tcp
    }

    /// Who is at the other end.
    pub(super) fn peer(&self) -> Result<PeerCredentials, Error> {
        PeerCredentials::of(self.fd(), self.is_tcp)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the stream's, which lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.stream.as_raw_fd()) }
    }

    fn raw(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Waits until there is something to receive, or the end. Cancel-safe: takes nothing.
    pub(super) async fn readable(&self) -> Result<(), Error> {
        match self.stream.peek(&mut [0]).await {
            Ok(_) => Ok(()),
            Err(error) => match io::Error::from(error) {
                // What came before can still be received, and then the end.
                error if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
                error => Err(Error::os("wait for the socket", error)),
            },
        }
    }

    /// Receives what is there.
    pub(super) fn try_receive(&self, to: &mut [u8]) -> io::Result<Received> {
        let flags = MsgFlags::MSG_DONTWAIT;
        loop {
            return match nix::sys::socket::recv(self.raw(), to, flags) {
                Ok(0) => Ok(Received::End),
                Ok(count) => Ok(Received::Bytes(count)),
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => Ok(Received::Nothing),
                Err(errno) => Err(errno.into()),
            };
        }
    }

    /// Receives what is there, and the descriptors that came along.
    pub(super) fn try_receive_with_descriptors(
        &self,
        to: &mut [u8],
    ) -> io::Result<(Received, Vec<OwnedFd>)> {
        let mut control = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let mut parts = [IoSliceMut::new(to)];
        let message = loop {
            // The address type plays no part on a connected socket.
            let result =
                nix::sys::socket::recvmsg::<()>(self.raw(), &mut parts, Some(&mut control), flags);
            match result {
                Ok(message) => break message,
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => return Ok((Received::Nothing, Vec::new())),
                Err(errno) => return Err(errno.into()),
            }
        };
        let mut descriptors = Vec::new();
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = part {
                // SAFETY: the kernel made these descriptors for this process in the call above, and
                // nobody else knows of them.
                descriptors.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        let received = match message.bytes {
            0 => Received::End,
            count => Received::Bytes(count),
        };
        Ok((received, descriptors))
    }

    /// Sends as much as the socket takes now. Zero: it is full.
    pub(super) fn try_send(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        loop {
            return match nix::sys::socket::send(self.raw(), bytes, flags) {
                Ok(count) => Ok(count),
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => Ok(0),
                Err(errno) => Err(errno.into()),
            };
        }
    }

    /// Sends one byte that carries descriptors. `false`: the socket is full.
    pub(super) fn try_send_descriptors(&self, fds: &[BorrowedFd<'_>]) -> io::Result<bool> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let control = [ControlMessage::ScmRights(&raw)];
        let parts = [IoSlice::new(&[0])];
        loop {
            return match nix::sys::socket::sendmsg::<()>(self.raw(), &parts, &control, flags, None)
            {
                Ok(_) => Ok(true),
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => Ok(false),
                Err(errno) => Err(errno.into()),
            };
        }
    }

    /// A second handle on the same socket, for a task that waits until it takes more bytes.
    pub(super) fn sender(&self) -> Result<SocketSender, Error> {
        let fd = self.fd().try_clone_to_owned();
        let fd = fd.map_err(|error| Error::os("duplicate a socket", error))?;
        Ok(SocketSender { stream: stream_from(fd) })
    }

    /// Whether the peer has closed its end. What it sent before may still be there.
    pub(super) fn is_hung_up(&self) -> bool {
        let mut polled = [PollFd::new(self.fd(), PollFlags::empty())];
        let hung_up = PollFlags::POLLHUP | PollFlags::POLLERR;
        nix::poll::poll(&mut polled, PollTimeout::ZERO).is_ok()
            && polled[0].revents().is_some_and(|revents| revents.intersects(hung_up))
    }

    /// About how many bytes the peer has not read yet; over TCP, that its host has not received.
    pub(super) fn unread_by_peer(&self) -> usize {
        let mut bytes: nix::libc::c_int = 0;
        // SAFETY: the kernel writes one integer to the address, which is that of a live one.
        let result = unsafe { nix::libc::ioctl(self.raw(), nix::libc::TIOCOUTQ, &raw mut bytes) };
        // An error means that there is no connection any more.
        if result == 0 { usize::try_from(bytes).unwrap_or_default() } else { 0 }
    }

    /// Ends the connection in both directions, for every handle on it.
    pub(super) fn shut_down(&self) {
        // It may have ended already.
        let _ = nix::sys::socket::shutdown(self.raw(), nix::sys::socket::Shutdown::Both);
    }
}

/// Sends to a socket and waits while it is full.
pub(super) struct SocketSender {
    stream: TcpStream,
}

impl SocketSender {
    /// Sends the first bytes, as many as the socket takes.
    pub(super) fn poll_send(
        &mut self,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }
}

fn stream_from(fd: OwnedFd) -> TcpStream {
    // SAFETY: `into_raw_fd` gave up the ownership that the stream takes over.
    unsafe { TcpStream::from_raw_fd(fd.into_raw_fd()) }
}

/// A listening socket, Unix or TCP.
pub(super) struct ListenerSocket {
    listener: TcpListener,
    is_tcp: bool,
}

impl ListenerSocket {
    /// Takes over a socket that listens.
    pub(super) fn new(fd: OwnedFd, is_tcp: bool) -> Self {
        // SAFETY: `into_raw_fd` gave up the ownership that the listener takes over.
        let listener = unsafe { TcpListener::from_raw_fd(fd.into_raw_fd()) };
        Self { listener, is_tcp }
    }

    pub(super) async fn accept(&self) -> Result<Socket, Error> {
        let stream = self.listener.accept().await;
        let stream =
            stream.map_err(|error| Error::os("accept a connection", io::Error::from(error)))?;
        Socket::from_stream(stream, self.is_tcp)
    }
}
