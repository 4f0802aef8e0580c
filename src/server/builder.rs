// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a [`Server`] is to be, and how it starts.

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::exec::options::ExecutorOptions;
use crate::net::bound_socket::{BoundSocket, listen_error};
use crate::net::credentials::PeerCredentials;
use crate::net::socket_file::{self, shard_path};
use crate::server::Server;
use crate::server::acceptor::{Balance, ShardInbox};
use crate::server::placement::{Cores, look_ahead};
use crate::server::shard::{Failure, Place, Shard, ShardLink};
use crate::server::shard_thread::{Authorize, Common, Core, OnRefused};
use crate::session::handle::Session;
use crate::session::stream::Stream;
use crate::session::supervised::StreamOutcome;
use shmipc_core::config::Config;
use shmipc_core::error::{ConfigError, Error, Result};
use shmipc_core::shm::map::trust::PeerTrust;

/// How long the files of sockets are waited for, on the thread that starts a server: longer than
/// the kernel takes to clear up behind a process that was killed.
const TURN_PATIENCE: Duration = Duration::from_secs(5);

/// Says how a [`Server`] is to be, and starts it.
///
/// ```
/// use std::time::Duration;
/// use shmipc_glommio::{Config, Cores, Balance, Error, Server};
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-builder-{}", std::process::id()));
/// let server = Server::builder(&path)
///     .cores(Cores::Unpinned(2))
///     .config(Config::builder().small_messages().socket_mode(0o660).build()?)
///     .deal(Balance::FewestSessions)
///     .shutdown_grace(Duration::from_secs(10))
///     .on_rejected(|shard, error| eprintln!("shard {shard} refused a peer: {error}"))
///     .serve_streams(|mut stream| async move {
///         while let Some(message) = stream.recv().await? {
///             stream.forward(message).await?;
///         }
///         Ok::<_, Error>(())
///     })?;
/// # drop(server);
/// # shmipc_glommio::Result::<()>::Ok(())
/// ```
#[must_use]
pub struct ServerBuilder {
    path: PathBuf,
    config: Config,
    cores: Cores,
    deal: Balance,
    queue: usize,
    patience: Duration,
    trust: Option<u64>,
    executor: ExecutorOptions,
    on_rejected: Option<OnRefused>,
    authorize: Option<Authorize>,
}

impl ServerBuilder {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self {
            path,
            config: Config::default(),
            cores: Cores::All,
            deal: Balance::default(),
            queue: 64,
            patience: Duration::from_secs(5),
            trust: None,
            executor: ExecutorOptions::default(),
            on_rejected: None,
            authorize: None,
        }
    }

    /// The configuration of sessions and doors. Default: [`Config::default`].
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// Where the shards run. Default: [`Cores::All`].
    pub fn cores(mut self, cores: Cores) -> Self {
        self.cores = cores;
        self
    }

    /// Which core gets the next connection of the shared door. Default: one after the other.
    pub fn deal(mut self, deal: Balance) -> Self {
        self.deal = deal;
        self
    }

    /// How many connections may wait for one core to take them from the shared door. When all cores
    /// have that many, more wait in the socket's backlog. Default: 64.
    pub fn handoff_capacity(mut self, connections: usize) -> Self {
        self.queue = connections;
        self
    }

    /// How long sessions get to come to their end when the server stops because it is dropped, or
    /// because one of its shards did. Default: five seconds.
    pub fn shutdown_grace(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Says that the promise behind this token speaks for the peers of all sessions.
    pub fn trust_peer(mut self, trust: &PeerTrust) -> Self {
        self.trust = Some(trust.id());
        self
    }

    /// How the executor of each shard is set up. Default: [`ExecutorOptions::new`].
    pub fn executor(mut self, options: ExecutorOptions) -> Self {
        self.executor = options;
        self
    }

    /// Calls `tell` with the shard's index for every peer that was dropped before it became a
    /// session, on that shard's thread. What goes wrong with the shared door itself is told with
    /// the number of shards for an index.
    pub fn on_rejected(mut self, tell: impl Fn(usize, &Error) + Send + Sync + 'static) -> Self {
        self.on_rejected = Some(Arc::new(tell));
        self
    }

    /// Asks `authorize` about every peer that is [allowed](crate::ConfigBuilder::allowed_peers),
    /// before its handshake, on the thread of the shard that would get it. It is refused when the
    /// answer is `false`, and when there is none because of a panic.
    pub fn authorize(
        mut self,
        authorize: impl Fn(&PeerCredentials) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.authorize = Some(Arc::new(authorize));
        self
    }

    /// Starts a server that runs `serve` for every stream of every session, each in a task of its
    /// own. A task that fails has its stream reset: see
    /// [`Session::serve_streams`](crate::Session::serve_streams).
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub fn serve_streams<F, S>(self, serve: F) -> Result<Server>
    where
        F: Fn(Stream) -> S + Clone + Send + 'static,
        S: Future<Output: StreamOutcome> + 'static,
    {
        self.start(move |_| {
            let serve = serve.clone();
            async {
                Ok::<_, Error>(move |session: Session| {
                    let serve = serve.clone();
                    async move {
                        session.serve_streams(serve).await;
                        Ok::<_, Error>(())
                    }
                })
            }
        })
    }

    /// Starts the server: runs `factory` on each of its cores, which makes what the core needs and
    /// gives the handler of its sessions. Returns when all cores are ready and all doors are open;
    /// blocks the calling thread until then.
    ///
    /// A session lives until its handler ends. An error or panic of the handler ends that session
    /// and nothing else. (A panic of another task ends its executor, and that stops the server.)
    ///
    /// # Errors
    ///
    /// [`Error::Resource`], when executors cannot run here (see [`preflight`](crate::preflight));
    /// a live server listens at one of the paths, a core is not there, an executor cannot be made,
    /// or a factory fails. Nothing is left running then.
    pub fn start<F, M, H, S, E, D>(self, factory: F) -> Result<Server>
    where
        F: Fn(Shard) -> M + Clone + Send + 'static,
        M: Future<Output = std::result::Result<H, E>> + 'static,
        E: Into<Failure> + 'static,
        H: Fn(Session) -> S + 'static,
        S: Future<Output = std::result::Result<(), D>> + 'static,
        D: Into<Failure> + 'static,
    {
        if self.queue == 0 {
            let problem = "nothing would get through";
            return Err(ConfigError::Limit { what: "handoff_capacity", value: 0, problem }.into());
        }
        self.executor.check()?;
        let cores = self.cores.choose()?;
        // And the thread of the door that they share.
        look_ahead(&cores, 1)?;
        let doors = open_doors(&self.path, cores.len(), &self.config)?;
        let inlets = (0..cores.len()).map(|_| ShardInbox::new(self.queue));
        let (inlets, bells): (Vec<_>, Vec<_>) =
            inlets.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let (control, dealer_control) =
            UnixStream::pair().map_err(|error| Error::os("make a socket pair", error))?;
        let links = inlets.into_iter().map(|inlet| Arc::new(ShardLink::new(inlet))).collect();
        let common = Common {
            links,
            doors: Mutex::new(doors.iter().map(|door| door.path.clone()).collect()),
            control,
            stop_at: Mutex::default(),
            patience: self.patience,
        };
        let common = Arc::new(common);
        let mut server = Server::new(self.path.clone(), Arc::clone(&common));
        let (tell, ready) = mpsc::channel();
        for (index, (door, bell)) in doors.into_iter().zip(bells).enumerate() {
            let place = Place {
                index,
                count: cores.len(),
                core: cores[index],
                path: door.path.path().into(),
            };
            let core = Core {
                place,
                door,
                bell,
                common: Arc::clone(&common),
                config: self.config.clone(),
                trust: self.trust,
                on_rejected: self.on_rejected.clone(),
                authorize: self.authorize.clone(),
            };
            let (factory, tell) = (factory.clone(), tell.clone());
            server.add_thread(core.start(self.executor.clone(), factory, tell)?);
        }
        drop(tell);
        // Each core says one word, or drops its end of the channel without.
        if ready.iter().count() < cores.len() {
            common.stop(Duration::ZERO);
            server.join_all()?;
            let stopped = io::Error::other("it was stopped before it was ready");
            return Err(Error::os("start a server", stopped));
        }
        // Now that all cores take what comes there.
        let door = BoundSocket::open(&self.path, &self.config, TURN_PATIENCE)?;
        server.open_shared_door(door, dealer_control, self.deal, self.on_rejected)?;
        Ok(server)
    }
}

impl fmt::Debug for ServerBuilder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("ServerBuilder")
            .field("path", &self.path)
            .field("cores", &self.cores)
            .field("deal", &self.deal)
            .finish_non_exhaustive()
    }
}

/// Opens the doors of all shards, and removes those that a server with more of them left.
///
/// Clients see from the doors how many shards there are, counting from the first. So what was left
/// is removed from the first on, and the first is opened last: they see none, or all.
fn open_doors(path: &Path, count: usize, config: &Config) -> Result<Vec<BoundSocket>> {
    let last = shard_path(path, count.saturating_sub(1));
    socket_file::address(&last, &format!(".{}", count.saturating_sub(1)))?;
    let turn = BoundSocket::turn(path, TURN_PATIENCE)?;
    let shards = (0..).map(|index| shard_path(path, index)).enumerate();
    let left_over = shards
        .take_while(|(index, path)| *index < count || socket_file::is_socket(path))
        .map(|(_, path)| path);
    for path in std::iter::once(path.to_owned()).chain(left_over) {
        if socket_file::is_socket(&path) {
            socket_file::remove_left_over(&path, &turn)
                .map_err(|error| listen_error(&path, error))?;
        }
    }
    let open = |index| BoundSocket::open_in_turn(&shard_path(path, index), config, &turn);
    let mut doors = (0..count).rev().map(open).collect::<Result<Vec<_>>>()?;
    doors.reverse();
    Ok(doors)
}
