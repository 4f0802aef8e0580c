// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where connections come from and go to, and listening there.
//!
//! `unsafe` here: lending a descriptor to a call that glommio does not make, and handing listening
//! sockets over to it. Its own ways to listen would share a TCP port with any other process of the
//! user, and leave a moment in which everybody can connect to a Unix socket.

use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use glommio::net::{TcpListener, TcpStream};
use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};

use crate::end::End;
use crate::support::address::HostPort;
use crate::support::socket_file::{FoundFile, SocketFile};
use crate::support::unix_socket;
use crate::tell;

/// Connections that wait to be accepted. More than this many at once are tried again by TCP.
const BACKLOG: i32 = 1024;

/// What `--listen` and `--connect` name.
#[derive(Debug, Clone)]
pub(crate) enum Address {
    Tcp(HostPort),
    Unix(PathBuf),
    /// A Unix socket over which sessions are made.
    Shm(PathBuf),
}

/// An [`Address`] whose host has been found.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    /// Tried in this order.
    Tcp(Vec<SocketAddr>),
    Unix(PathBuf),
    Shm(PathBuf),
}

impl Address {
    /// Finds the host, to connect to it. Not for an executor's thread: it may wait.
    pub(crate) fn resolve(&self) -> io::Result<Place> {
        self.place(HostPort::resolve)
    }

    /// The same, to listen there.
    pub(crate) fn resolve_to_listen(&self) -> io::Result<Place> {
        self.place(HostPort::resolve_to_listen)
    }

    fn place(
        &self,
        resolve: impl Fn(&HostPort) -> io::Result<Vec<SocketAddr>>,
    ) -> io::Result<Place> {
        Ok(match self {
            Self::Tcp(host) => Place::Tcp(resolve(host)?),
            Self::Unix(path) => Place::Unix(path.clone()),
            Self::Shm(path) => Place::Shm(path.clone()),
        })
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, place) = text.split_once(':').unwrap_or((text, ""));
        match kind {
            _ if place.is_empty() => Err(format!("{text:?} is not KIND:PLACE")),
            "tcp" => {
                let host = place.parse().map(Self::Tcp);
                host.map_err(|error: String| format!("{place:?}: {error}"))
            }
            "unix" => Ok(Self::Unix(place.into())),
            "shm" => Ok(Self::Shm(place.into())),
            _ => Err(format!("{kind:?} is neither tcp nor unix nor shm")),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(formatter, "tcp:{address}"),
            Self::Unix(path) => write!(formatter, "unix:{}", path.display()),
            Self::Shm(path) => write!(formatter, "shm:{}", path.display()),
        }
    }
}

/// A listening socket, TCP or Unix.
pub(crate) struct SocketListener {
    /// Dropped first.
    _file: Option<SocketFile>,
    listener: TcpListener,
    address: Address,
}

impl SocketListener {
    /// Listens at the first of these addresses that can be had.
    pub(crate) fn bind_tcp(addresses: &[SocketAddr]) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind(addresses)?;
        let address = Address::Tcp(HostPort::Number(listener.local_addr()?));
        Ok(Self { _file: None, listener: listen(listener.into())?, address })
    }

    /// Only this user can connect. The socket of a dead listener is replaced. An abstract name
    /// has no file, so those who connect are looked at one by one.
    pub(crate) fn bind_unix(path: &Path) -> io::Result<Self> {
        let (kind, flags) = (SockType::Stream, SockFlag::SOCK_CLOEXEC);
        let fd = socket::socket(AddressFamily::Unix, kind, flags, None)?;
        unix_socket::refuse_descriptors(fd.as_fd());
        let address = unix_socket::address(path)?;
        if unix_socket::abstract_name(path).is_some() {
            socket::bind(fd.as_raw_fd(), &address)?;
            let address = Address::Unix(path.to_owned());
            return Ok(Self { _file: None, listener: listen(fd)?, address });
        }
        if let Err(errno) = socket::bind(fd.as_raw_fd(), &address) {
            if errno != Errno::EADDRINUSE {
                return Err(errno.into());
            }
            // What is found dead is what is removed.
            let left_over = FoundFile::at(path)?;
            if !is_left_over(path, &address)? {
                return Err(errno.into());
            }
            left_over.remove();
            socket::bind(fd.as_raw_fd(), &address)?;
        }
        let file = SocketFile::of(path)?;
        // Before it listens nobody can connect, whatever the mode was for a moment.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        let address = Address::Unix(path.to_owned());
        Ok(Self { _file: Some(file), listener: listen(fd)?, address })
    }

    /// Where it listens, with the port that it got.
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    pub(crate) async fn accept(&self) -> io::Result<End> {
        let stream = loop {
            let stream = self.listener.accept().await?;
            if self.admits(&stream) {
                break stream;
            }
        };
        if matches!(self.address, Address::Tcp(_)) {
            // Fails only when the connection has gone, which whoever reads will see.
            let _ = stream.set_nodelay(true);
        }
        Ok(End::socket(stream))
    }
}

impl SocketListener {
    /// Whether the user of a connection may have it: where there is no file whose mode says so.
    fn admits(&self, stream: &TcpStream) -> bool {
        match &self.address {
            Address::Unix(path) if unix_socket::abstract_name(path).is_some() => {
                // SAFETY: the descriptor is the stream's, which outlives this call.
                let fd = unsafe { BorrowedFd::borrow_raw(stream.as_raw_fd()) };
                let admitted = unix_socket::is_same_user(fd);
                if !admitted {
                    tell(format_args!("a connection of another user is refused"));
                }
                admitted
            }
            _ => true,
        }
    }
}

/// Starts to listen on a socket that is bound.
fn listen(fd: OwnedFd) -> io::Result<TcpListener> {
    socket::listen(&fd, Backlog::new(BACKLOG)?)?;
    // SAFETY: `into_raw_fd` gives up the ownership that the listener takes over.
    Ok(unsafe { TcpListener::from_raw_fd(fd.into_raw_fd()) })
}

/// Whether `path` is a socket that nobody listens on.
fn is_left_over(path: &Path, address: &UnixAddr) -> io::Result<bool> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Ok(false);
    }
    // Without waiting: a listener that is alive may have no room for this in its backlog.
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    Ok(socket::connect(fd.as_raw_fd(), address) == Err(Errno::ECONNREFUSED))
}

/// Whether accepting can work again later.
pub(crate) fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(
            Errno::EMFILE
                | Errno::ENFILE
                | Errno::ENOMEM
                | Errno::ENOBUFS
                | Errno::ECONNABORTED
                | Errno::EINTR
                | Errno::EAGAIN
                | Errno::EPROTO
        )
    )
}
