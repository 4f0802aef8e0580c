// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sockets that stock clients come to.
//!
//! TCP: every shard listens at the same address, and the system deals the connections. Unix sockets
//! know no such thing, so a thread of its own accepts, and deals the connections in turn. That is
//! the one time that a connection crosses threads.

use std::fs;
use std::io::{self, Write};
use std::net;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;
use std::rc::Rc;
use std::thread;
use std::time::Duration;

use futures_lite::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use glommio::Task;
use glommio::net as glommio_net;

use super::connection::{self, Writes};
use super::origin::Origin;
use super::shard::Shard;
use super::socket::ReservedAddress;
use super::socket_file::{FoundFile, SocketFile};
use super::unix_socket;
use crate::cli::tell;

/// The most clients of one shard.
const MAX_CLIENTS: u64 = 10_000;
/// How long accepting pauses when it failed: the process may be out of descriptors.
const PAUSE: Duration = Duration::from_millis(20);

/// The listeners of the process, closed when this goes.
pub(crate) struct Listeners {
    tcp: Option<ReservedAddress>,
    unix: Option<UnixSocket>,
}

struct UnixSocket {
    /// Dropped first. `None`: it has an abstract name, which goes with the listener.
    file: Option<SocketFile>,
    listener: UnixListener,
    /// By which the shards are given their connections.
    shards: Vec<UnixStream>,
}

/// The listeners of one shard.
#[derive(Debug)]
pub(crate) struct ShardListeners {
    tcp: Option<net::SocketAddr>,
    /// Where the numbers of accepted descriptors come in. They are this shard's from then on.
    unix: Option<UnixStream>,
}

impl Listeners {
    /// Takes the addresses. Nobody is served before the shards have their listeners.
    /// Of several TCP addresses, the first that can be had.
    pub(crate) fn reserve(
        tcp: Option<&[net::SocketAddr]>,
        unix: Option<&Path>,
    ) -> io::Result<Self> {
        let tcp = tcp.map(ReservedAddress::first_of).transpose()?;
        let unix = unix.map(UnixSocket::open).transpose()?;
        Ok(Self { tcp, unix })
    }

    /// The TCP address, with the port that the system chose if it was to.
    pub(crate) fn tcp_address(&self) -> Option<net::SocketAddr> {
        self.tcp.as_ref().map(ReservedAddress::address)
    }

    /// What one more shard needs.
    pub(crate) fn for_shard(&mut self) -> io::Result<ShardListeners> {
        let unix = match &mut self.unix {
            Some(socket) => {
                let (ours, theirs) = UnixStream::pair()?;
                socket.shards.push(ours);
                Some(theirs)
            }
            None => None,
        };
        Ok(ShardListeners { tcp: self.tcp_address(), unix })
    }

    /// Starts to deal connections to the shards.
    pub(crate) fn start(&mut self) -> io::Result<()> {
        let Some(socket) = &mut self.unix else {
            return Ok(());
        };
        let is_abstract = socket.file.is_none();
        let (listener, shards) = (socket.listener.try_clone()?, std::mem::take(&mut socket.shards));
        thread::Builder::new()
            .name("accept".into())
            .spawn(move || deal(&listener, is_abstract, &shards))?;
        Ok(())
    }
}

/// Gives each shard a connection in turn, for as long as the process lives.
fn deal(listener: &UnixListener, is_abstract: bool, shards: &[UnixStream]) {
    for mut shard in shards.iter().cycle() {
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) if !is_abstract || unix_socket::is_same_user(stream.as_fd()) => {
                    break stream;
                }
                // An abstract name has no file whose mode could have kept them out.
                Ok(_) => tell(format_args!("a connection of another user is refused")),
                Err(_) => thread::sleep(PAUSE),
            }
        };
        let fd = stream.into_raw_fd();
        if shard.write_all(&fd.to_ne_bytes()).is_err() {
            // SAFETY: nobody has been told of this descriptor, which was owned here a moment ago.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}

impl UnixSocket {
    /// Listens where only this user can connect. What a dead server left there is replaced.
    fn open(path: &Path) -> io::Result<Self> {
        let failed = |error: io::Error| {
            io::Error::new(error.kind(), format!("listen on unix {}: {error}", path.display()))
        };
        match unix_socket::abstract_name(path) {
            Some(name) => {
                let address = SocketAddr::from_abstract_name(name).map_err(failed)?;
                let listener = UnixListener::bind_addr(&address).map_err(failed)?;
                unix_socket::refuse_descriptors(listener.as_fd());
                Ok(Self { file: None, listener, shards: Vec::new() })
            }
            None => Self::open_file(path).map_err(failed),
        }
    }

    fn open_file(path: &Path) -> io::Result<Self> {
        let is_socket = fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket());
        let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
        if is_socket {
            // What is found dead is what is removed.
            let left_over = FoundFile::at(path)?;
            if UnixStream::connect(path).is_err_and(refused) {
                left_over.remove();
            }
        }
        let listener = UnixListener::bind(path)?;
        unix_socket::refuse_descriptors(listener.as_fd());
        let file = Some(SocketFile::of(path)?);
        let socket = Self { file, listener, shards: Vec::new() };
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        Ok(socket)
    }
}

/// Opens a shard's listeners. They are open as long as the tasks live.
pub(crate) fn open(shard: &Rc<Shard>, listeners: ShardListeners) -> io::Result<Vec<Task<()>>> {
    let mut tasks = Vec::new();
    if let Some(address) = listeners.tcp {
        let listener = glommio_net::TcpListener::bind(address).map_err(io::Error::from)?;
        tasks.push(glommio::spawn_local(accept_tcp(Rc::clone(shard), listener)));
    }
    if let Some(dealt) = listeners.unix {
        // SAFETY: the descriptor is open and has no other owner once it is taken out of `dealt`.
        let dealt = unsafe { glommio_net::UnixStream::from_raw_fd(dealt.into_raw_fd()) };
        tasks.push(glommio::spawn_local(accept_unix(Rc::clone(shard), dealt)));
    }
    Ok(tasks)
}

async fn accept_tcp(shard: Rc<Shard>, listener: glommio_net::TcpListener) {
    loop {
        match listener.accept().await {
            Ok(stream) => {
                // Replies are written whole; if it cannot be set, they come later, but come.
                let _ = stream.set_nodelay(true);
                let origin = Origin::Tcp(stream.peer_addr().ok());
                welcome(&shard, stream, origin);
            }
            Err(_) => glommio::timer::sleep(PAUSE).await,
        }
    }
}

async fn accept_unix(shard: Rc<Shard>, mut dealt: glommio_net::UnixStream) {
    let mut fd = [0; size_of::<RawFd>()];
    while dealt.read_exact(&mut fd).await.is_ok() {
        let fd = RawFd::from_ne_bytes(fd);
        // SAFETY: `deal` gave up this open descriptor when it wrote its number, to this shard only.
        welcome(&shard, unsafe { glommio_net::UnixStream::from_raw_fd(fd) }, Origin::Unix);
    }
}

fn welcome(
    shard: &Rc<Shard>,
    mut stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    origin: Origin,
) {
    let shard = Rc::clone(shard);
    glommio::spawn_local(async move {
        if shard.counters.clients.get() >= MAX_CLIENTS {
            let refusal = b"-ERR max number of clients reached\r\n";
            return stream.write_all(refusal).await.ok();
        }
        // A connection that fails has nobody left to be told.
        connection::serve(&shard, stream, Writes::Plain, origin).await.ok()
    })
    .detach();
}
