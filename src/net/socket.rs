// SPDX-License-Identifier: MIT OR Apache-2.0
//! A connected socket of a session, Unix or TCP.
//!
//! glommio's types stand for the kind of socket in their names only: its TCP stream and listener
//! do nothing that a Unix socket could not, and unlike its Unix types they show their descriptor,
//! which passing memory needs. So both kinds of socket are held in them here, and the few calls
//! that glommio does not make are made on the descriptor, none of which waits: also not for what a
//! peer passes along ([`fd_passing`](crate::net::fd_passing)).
//!
//! Nothing is sent by glommio, which would have the kernel raise `SIGPIPE` where the peer has gone.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::exec::runtime::sleep;
use crate::exec::runtime::{TcpListener, TcpStream};
use futures_lite::AsyncRead;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType};

use crate::net::credentials::PeerCredentials;
use crate::net::descriptor::{fd_of_stream, listener_from, send_queue_len, stream_from};
use crate::net::fd_disposal::{self, PeerSocket};
use crate::net::fd_passing::{Peeked, admit_descriptors, peek, refuse_descriptors};
use crate::net::socket_file;
use shmipc_core::error::Error;

/// A connected stream socket.
pub(crate) struct Socket {
    /// `None` only while this is dropped.
    stream: Option<TcpStream>,
    is_tcp: bool,
    passing: Cell<Passing>,
}

/// Whether a peer can pass descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Passing {
    /// It cannot, and none is in the queue.
    Impossible,
    /// It cannot any more. What came while it could may be in the queue.
    Over,
    /// It can: it was asked to, or the kernel cannot refuse them.
    Possible,
}

/// What one receive without waiting gave.
pub(crate) enum Received {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// The peer will send nothing more.
    End,
    /// The next bytes bring so many descriptors along. They stay where they are.
    Descriptors(usize),
}

/// What one look for descriptors without waiting gave.
pub(crate) enum Passed {
    /// Duplicates of those that came with the next byte, which is
    /// [still there](Socket::take_byte). More came, perhaps, than there was room for.
    Descriptors(Peeked),
    /// Nothing now.
    Nothing,
    /// The peer will send nothing more.
    End,
}

impl Socket {
    /// Takes over a Unix socket that is connected.
    pub(crate) fn connected(socket: PeerSocket) -> Self {
        let (fd, refuses_descriptors) = socket.into_parts();
        Self::unix(stream_from(fd), refuses_descriptors)
    }

    /// Takes over one end of a socket pair whose other end is ours as well.
    pub(crate) fn of_our_own(fd: OwnedFd) -> Self {
        Self::unix(stream_from(fd), true)
    }

    fn unix(stream: TcpStream, refuses_descriptors: bool) -> Self {
        let passing = if refuses_descriptors { Passing::Impossible } else { Passing::Possible };
        Self { stream: Some(stream), is_tcp: false, passing: Cell::new(passing) }
    }

    /// Connects to a Unix socket.
    pub(crate) async fn connect_unix(path: &Path) -> Result<Self, Error> {
        fd_disposal::catch_up();
        let failed = |errno: Errno| socket_file::connect_error(path, errno);
        let address = socket_file::address(path, "")?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)
            .map_err(failed)?;
        // Before there is anybody to send them.
        let socket = PeerSocket::new(fd);
        let fd = socket.fd();
        // A Unix socket connects at once, or says that the listener's backlog is full.
        while let Err(errno) = nix::sys::socket::connect(fd.as_raw_fd(), &address) {
            if errno != Errno::EAGAIN {
                return Err(failed(errno));
            }
            sleep(Duration::from_millis(1)).await;
        }
        // io_uring would hand every "nothing yet" to us instead of waiting.
        fcntl(fd, FcntlArg::F_SETFL(OFlag::empty())).map_err(failed)?;
        Ok(Self::connected(socket))
    }

    /// Connects over TCP, which makes sense on loopback only.
    pub(crate) async fn connect_tcp(address: SocketAddr) -> Result<Self, Error> {
        let stream = TcpStream::connect(address).await.map_err(|error| {
            Error::os_at("connect over TCP to", address, io::Error::from(error))
        })?;
        Self::from_stream(stream, true)
    }

    fn from_stream(stream: TcpStream, is_tcp: bool) -> Result<Self, Error> {
        let socket = if is_tcp {
            Self { stream: Some(stream), is_tcp, passing: Cell::new(Passing::Impossible) }
        } else {
            let refuses_descriptors = refuse_descriptors(fd_of_stream(&stream));
            Self::unix(stream, refuses_descriptors)
        };
        let failed = |errno: Errno| Error::os("set up a socket", errno);
        fcntl(socket.fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(failed)?;
        if is_tcp {
            let option = nix::sys::socket::sockopt::TcpNoDelay;
            nix::sys::socket::setsockopt(&socket.fd(), option, &true).map_err(failed)?;
        }
        Ok(socket)
    }

    pub(crate) fn is_tcp(&self) -> bool {
        self.is_tcp
    }

    /// Who is at the other end.
    pub(crate) fn peer(&self) -> Result<PeerCredentials, Error> {
        PeerCredentials::of(self.fd(), self.is_tcp)
    }

    fn stream(&self) -> &TcpStream {
        self.stream.as_ref().expect("taken by the drop only")
    }

    fn fd(&self) -> BorrowedFd<'_> {
        fd_of_stream(self.stream())
    }

    fn raw(&self) -> RawFd {
        self.stream().as_raw_fd()
    }

    /// Waits until there is something to receive, or the end. Cancel-safe: takes nothing.
    pub(crate) async fn readable(&self) -> Result<(), Error> {
        match self.stream().peek(&mut [0]).await {
            Ok(_) => Ok(()),
            Err(error) => match io::Error::from(error) {
                // What came before can still be received, and then the end.
                error if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
                error => Err(Error::os("wait for the socket", error)),
            },
        }
    }

    /// Receives what is there.
    pub(crate) fn try_receive(&self, to: &mut [u8]) -> io::Result<Received> {
        if self.passing.get() == Passing::Impossible {
            self.receive_plainly(to)
        } else {
            self.receive_warily(to)
        }
    }

    fn receive_plainly(&self, to: &mut [u8]) -> io::Result<Received> {
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

    /// Receives where descriptors can come along. They would be closed here, so who brings some
    /// gets no further.
    fn receive_warily(&self, to: &mut [u8]) -> io::Result<Received> {
        match peek(self.fd(), to)? {
            None => {
                if self.passing.get() == Passing::Over {
                    self.passing.set(Passing::Impossible);
                }
                Ok(Received::Nothing)
            }
            Some(peeked) if peeked.has_descriptors() => {
                Ok(Received::Descriptors(peeked.descriptors.len()))
            }
            Some(Peeked { bytes: 0, .. }) => Ok(Received::End),
            Some(Peeked { bytes, .. }) => self.receive_plainly(&mut to[..bytes]),
        }
    }

    /// Lets the peer pass descriptors.
    pub(crate) fn begin_passing(&self) -> Result<(), Error> {
        if self.passing.get() != Passing::Possible {
            admit_descriptors(self.fd()).map_err(|error| Error::os("set up a socket", error))?;
            self.passing.set(Passing::Possible);
        }
        Ok(())
    }

    /// Has the kernel refuse descriptors again, if it can.
    pub(crate) fn end_passing(&self) {
        if refuse_descriptors(self.fd()) {
            self.passing.set(Passing::Over);
        }
    }

    /// Looks for the byte that brings the descriptors that are due.
    pub(crate) fn peek_descriptors(&self) -> io::Result<Passed> {
        Ok(match peek(self.fd(), &mut [0])? {
            None => Passed::Nothing,
            Some(Peeked { bytes: 0, .. }) => Passed::End,
            Some(peeked) => Passed::Descriptors(peeked),
        })
    }

    /// Takes the byte that was looked at, whose descriptors are known, and duplicates of them open.
    pub(crate) fn take_byte(&self) -> io::Result<()> {
        match self.receive_plainly(&mut [0])? {
            Received::Bytes(_) => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Sends as much as the socket takes now. Zero: it is full.
    pub(crate) fn try_send(&self, bytes: &[u8]) -> io::Result<usize> {
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
    pub(crate) fn try_send_descriptors(&self, fds: &[BorrowedFd<'_>]) -> io::Result<bool> {
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

    /// Sends to this socket and waits while it is full.
    pub(crate) fn sender(&self) -> SocketSender<'_> {
        SocketSender { socket: self, room: None }
    }

    /// Whether the peer has closed its end. What it sent before may still be there.
    pub(crate) fn is_hung_up(&self) -> bool {
        let mut polled = [PollFd::new(self.fd(), PollFlags::empty())];
        let hung_up = PollFlags::POLLHUP | PollFlags::POLLERR;
        nix::poll::poll(&mut polled, PollTimeout::ZERO).is_ok()
            && polled[0].revents().is_some_and(|revents| revents.intersects(hung_up))
    }

    /// About how many bytes the peer has not read yet; over TCP, that its host has not received.
    pub(crate) fn unread_by_peer(&self) -> usize {
        send_queue_len(self.fd()).unwrap_or_default()
    }

    /// Ends the connection in both directions, for every handle on it.
    pub(crate) fn shut_down(&self) {
        // It may have ended already.
        let _ = nix::sys::socket::shutdown(self.raw(), nix::sys::socket::Shutdown::Both);
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Some(stream) = self.stream.take()
            && self.passing.get() != Passing::Impossible
        {
            fd_disposal::close_stream(stream);
        }
    }
}

/// Sends to a socket and waits while it is full.
pub(crate) struct SocketSender<'a> {
    socket: &'a Socket,
    /// Waits for the socket to take more, since it was full.
    room: Option<Room>,
}

impl SocketSender<'_> {
    /// Sends the first bytes, as many as the socket takes.
    pub(crate) fn poll_send(
        &mut self,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            match self.socket.try_send(bytes) {
                Ok(0) if !bytes.is_empty() => {}
                sent => {
                    self.room = None;
                    return Poll::Ready(sent);
                }
            }
            let room = match &mut self.room {
                Some(room) => room,
                none => none.insert(Room::wait(self.socket.fd())?),
            };
            if room.poll(context).is_pending() {
                return Poll::Pending;
            }
            // It tells once.
            self.room = None;
        }
    }
}

/// A wait for room in a socket.
///
/// glommio waits for that only behind a send of its own, which is one without `MSG_NOSIGNAL`. But
/// it waits for anything to become readable, an epoll instance for instance.
struct Room {
    /// An epoll instance, which glommio takes for a socket.
    epoll: TcpStream,
}

impl Room {
    fn wait(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLOUT, 0))?;
        Ok(Self { epoll: stream_from(epoll.0) })
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        // Once it is readable, it turns out to be no socket.
        Pin::new(&mut self.epoll).poll_read(context, &mut [0]).map(drop)
    }
}

/// A listening socket, Unix or TCP.
pub(crate) struct ListenerSocket {
    listener: TcpListener,
    is_tcp: bool,
}

impl ListenerSocket {
    /// Takes over a socket that listens.
    pub(crate) fn new(fd: OwnedFd, is_tcp: bool) -> Self {
        Self { listener: listener_from(fd), is_tcp }
    }

    pub(crate) async fn accept(&self) -> Result<Socket, Error> {
        fd_disposal::catch_up();
        let stream = self.listener.accept().await;
        let stream =
            stream.map_err(|error| Error::os("accept a connection", io::Error::from(error)))?;
        Socket::from_stream(stream, self.is_tcp)
    }
}
