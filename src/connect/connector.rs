// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a client gets a session.

use std::cell::Cell;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use nix::errno::Errno;

use crate::connect::handshake_client::{self, Answer};
use crate::connect::listener::within;
use crate::connect::old_servers::{self, Address};
use crate::exec::task_waker::relayed;
use crate::net::socket::Socket;
use crate::net::socket_file::{
    address, connect_error, is_socket, leads_to_socket, shard_path, socket_identity,
};
use crate::session::handle::Session;
use crate::session::local_reactor::LocalReactor;
use shmipc_core::config::{Config, ProtocolVersion};
use shmipc_core::error::{Error, HandshakeError, Result};
use shmipc_core::shm::map::trust::PeerTrust;

/// Connects to servers. Each session has its own shared memory.
///
/// The session lives on the executor that connects. A program that makes its own executors calls
/// [`preflight`](crate::preflight) before the first one.
///
/// ```
/// use std::time::Duration;
/// use shmipc_glommio::{Config, Connector, Listener};
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-connector-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(|| async move {
/// # let _listener = Listener::bind(&path, Config::default())?;
/// let patience = Duration::from_secs(5);
/// let config = Config::builder().buffer_size(1 << 20).handshake_timeout(patience).build()?;
/// let connector = Connector::new(config);
/// // Two sessions of their own: the streams of one do not wait for those of the other.
/// let for_reads = connector.connect(&path).await?;
/// let for_writes = connector.connect(&path).await?;
/// # assert!(for_reads.end_reason().is_none() && for_writes.end_reason().is_none());
/// # shmipc_glommio::Result::<()>::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
#[derive(Debug, Clone)]
pub struct Connector {
    config: Rc<Config>,
    trust: Option<u64>,
}

impl Connector {
    /// A connector whose sessions have this configuration.
    pub fn new(config: Config) -> Self {
        Self { config: Rc::new(config), trust: None }
    }

    /// Says that the promise behind this token speaks for the servers that are connected to from
    /// now on, so that their messages can be looked at in place.
    pub fn trust_peer(mut self, trust: &PeerTrust) -> Self {
        self.trust = Some(trust.id());
        self
    }

    /// Connects to the Unix socket at `path` and shakes hands. A path that starts with `@`, or with
    /// a NUL byte, is an abstract name.
    ///
    /// Cancel-safe: dropping the future drops the connection and the memory.
    ///
    /// # Errors
    ///
    /// Nobody listens there, the memory cannot be created, or the handshake fails or takes longer
    /// than [configured](crate::ConfigBuilder::handshake_timeout).
    pub async fn connect(&self, path: impl AsRef<Path>) -> Result<Session> {
        let path = path.as_ref();
        let address = || Address::of_path(path);
        self.session(address, async || Socket::connect_unix(path).await).await
    }

    /// Connects to shard `index` of the server at `path`: to `PATH.<index>`, where a
    /// [`Server`](crate::Server) has one door for each core. A server that has no such doors counts
    /// as one shard.
    ///
    /// Cancel-safe: dropping the future drops the connection and the memory.
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect), and [`Error::NoSuchShard`]; in version 4
    /// [`HandshakeError::OtherShard`] when a server says that it is another one.
    pub async fn connect_shard(&self, path: impl AsRef<Path>, index: usize) -> Result<Session> {
        let path = path.as_ref();
        let count = Self::shard_count(path)?;
        if index >= count {
            return Err(Error::NoSuchShard { index, count });
        }
        self.connect_door(path, index).await
    }

    /// Connects to the door of shard `index`, of which it is known that it is there.
    pub(crate) async fn connect_door(&self, path: &Path, index: usize) -> Result<Session> {
        let door = door_of(path, index);
        if door != path {
            address(&door, &format!(".{index}"))?;
        }
        let session = self.connect(&door).await?;
        match session.shard() {
            // Behind the door that all share is whoever it is dealt to.
            Some(shard) if shard.index as usize != index && door != path => {
                let (index, count, expected) = (shard.index, shard.count, index);
                Err(HandshakeError::OtherShard { index, count, expected }.into())
            }
            _ => Ok(session),
        }
    }

    /// How many shards the server at `path` has: as many as there are doors beside it, or one.
    ///
    /// # Errors
    ///
    /// [`Error::Os`] with `NotFound`: no server is there. (One that has died, and left its files,
    /// is: connecting tells.)
    pub fn shard_count(path: impl AsRef<Path>) -> Result<usize> {
        count_shards(path.as_ref())
    }

    /// Connects over TCP, to a server on this host. The memory must be
    /// [file memory](crate::MemoryKind::File), since TCP carries no descriptors.
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    pub async fn connect_tcp(&self, address: SocketAddr) -> Result<Session> {
        self.session(|| Address::Tcp(address), async || Socket::connect_tcp(address).await).await
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    async fn session(
        &self,
        address: impl Fn() -> Address,
        open: impl AsyncFn() -> Result<Socket>,
    ) -> Result<Session> {
        let config = &self.config;
        // Started before the handshake, it is ready behind it.
        LocalReactor::current();
        let may_fall_back =
            config.settings().protocol == ProtocolVersion::V4 && config.settings().falls_back;
        // Before the connection, so that it is that of the server which is connected to.
        let address = may_fall_back.then(address);
        let is_old = address.as_ref().is_some_and(old_servers::is_old);
        let version = if is_old { ProtocolVersion::V3 } else { config.settings().protocol };
        let answer = Cell::new(Answer::NotDue);
        let connect = async {
            let failed =
                match handshake_client::connect(open().await?, config, version, &answer).await {
                    Ok(established) => return Ok(established),
                    Err(failed) => failed,
                };
            if let (true, Some(address)) = (is_old, &address) {
                // Whoever is there now may know more than the one before.
                old_servers::forget(address);
            }
            let Some(address) = address.filter(|_| failed.may_fall_back) else {
                return Err(failed.error);
            };
            tracing::info!(error = %failed.error, "no answer in version 4");
            let is_silent = answer.get() == Answer::CreditUpdate;
            let version = ProtocolVersion::V3;
            let again = handshake_client::connect(open().await?, config, version, &answer).await;
            if again.is_ok() && is_silent {
                old_servers::remember(address);
            }
            again.map_err(|failed| failed.error)
        };
        let established = match relayed(within(config, connect)).await {
            // The whole time has passed in silence.
            Err(Error::Handshake(HandshakeError::Timeout(_)))
                if answer.get() == Answer::CreditUpdate =>
            {
                let how = "it said nothing";
                return Err(HandshakeError::Version4Unanswered { how }.into());
            }
            established => established?,
        };
        Ok(Session::start(established, config, self.trust))
    }
}

/// How often shards are counted until the count is one of a single moment.
const COUNTS: usize = 100;

/// How many shards the server at `path` has.
///
/// The first door is opened last and removed first. So if it is the same before and after the
/// others were counted, they were all there.
pub(crate) fn count_shards(path: &Path) -> Result<usize> {
    let first = || socket_identity(&shard_path(path, 0));
    let mut doors = 0;
    // A server that comes and goes all the time is as good as away.
    for _ in 0..COUNTS {
        let before = first();
        if before.is_none() {
            break;
        }
        let count = (0..).take_while(|&index| is_socket(&shard_path(path, index))).count();
        if first() == before {
            doors = count;
            break;
        }
    }
    if doors == 0 && !is_socket(path) && !leads_to_socket(path) {
        // Of a path that no socket can have, it would say no more than that nothing is there.
        address(path, "")?;
        // Who may not search the directory does not know what is there.
        let errno = match fs::symlink_metadata(path) {
            Err(error) => error.raw_os_error().map_or(Errno::ENOENT, Errno::from_raw),
            Ok(_) => {
                let error = io::Error::new(io::ErrorKind::NotFound, "what is there is no socket");
                return Err(Error::os_at("look for a server at", path, error));
            }
        };
        return Err(connect_error(path, errno));
    }
    Ok(doors.max(1))
}

/// Where shard `index` is reached, as far as can be seen now.
pub(crate) fn door_of(path: &Path, index: usize) -> PathBuf {
    if index == 0 && !is_socket(&shard_path(path, 0)) {
        return path.to_owned();
    }
    shard_path(path, index)
}
