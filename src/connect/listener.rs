// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where peers connect to.
//!
//! A task accepts connections and starts one more task for each handshake, so a peer that dawdles,
//! or breaks the protocol, delays nobody. How many handshakes run at the same time is bounded,
//! and sessions that nobody takes count as well; connections beyond that wait in a queue, in which
//! the users take turns.

mod accepting;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::rc::{Rc, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_lite::future::{or, zip};

use self::accepting::{accept_connections, begin, begin_waiting, shake_hands};
use crate::connect::handshake_queue::HandshakeQueue;
use crate::connect::handshake_server::Acceptance;
use crate::connect::refusals::{Refusals, Stop, say_farewell};
use crate::exec::callback;
use crate::exec::runtime::{Task, sleep, spawn_local};
use crate::exec::task_set::TaskSet;
use crate::exec::wakers::WakerList;
use crate::net::admission::{Admission, HandshakePermit};
use crate::net::bound_socket::BoundSocket;
use crate::net::credentials::PeerCredentials;
use crate::net::fd_disposal::{self, PeerSocket};
use crate::net::socket::{ListenerSocket, Socket};
use crate::net::socket_file::SocketPath;
use crate::reactor::poll_loop::Ends;
use crate::session::handle::Session;
use crate::session::local_reactor::LocalReactor;
use shmipc_core::config::{Config, ProtocolVersion};
use shmipc_core::error::{Error, HandshakeError, Result};
use shmipc_core::shm::map::stale_files;
use shmipc_core::shm::map::trust::PeerTrust;
use shmipc_core::wire::ShardIdentity;

/// How long handshakes that have nothing to wait for any more get to end.
const LAST_FAREWELLS: Duration = Duration::from_millis(50);
/// How long [`Listener::bind`] may hold up its core: for others of this process that bind at the
/// same time, and for the kernel to clear up behind a process that was killed.
const BIND_PATIENCE: Duration = Duration::from_millis(100);
const BIND_INTERVAL: Duration = Duration::from_millis(5);

type OnRefused = Rc<dyn Fn(&Error)>;
type Authorize = Rc<dyn Fn(&PeerCredentials) -> bool>;

/// Accepts sessions on a Unix socket, or over TCP on loopback.
///
/// Sessions live on the executor that the listener was made on. A peer that breaks the handshake,
/// or does not finish it in time, is dropped, and [told about](Self::on_rejected) if asked; the
/// listener goes on.
///
/// ```
/// use futures_lite::io::{copy, split};
/// use shmipc_glommio::{Config, Listener};
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-listener-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(|| async move {
/// # let config = Config::builder().buffer_size(1 << 20).queue_capacity(64).build()?;
/// let listener = Listener::bind(&path, Config::default())?;
/// let serving = glommio::spawn_local(async move {
///     while let Ok(session) = listener.accept().await {
///         glommio::spawn_local(async move {
///             while let Ok(stream) = session.accept().await {
///                 let (reader, writer) = split(stream);
///                 glommio::spawn_local(async move { copy(reader, writer).await.ok() }).detach();
///             }
///         })
///         .detach();
///     }
/// });
/// # let session = shmipc_glommio::Connector::new(config).connect(&path).await?;
/// # let mut stream = session.open_stream()?;
/// # let mut loan = stream.alloc(5).await?;
/// # loan.write(b"hello");
/// # stream.send(loan).await?;
/// # assert_eq!(stream.recv().await?.unwrap().into_bytes(), "hello");
/// // The listener goes with its task, and the socket's path with the listener.
/// serving.cancel().await;
/// assert!(!path.exists());
/// # shmipc_glommio::Result::<()>::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
pub struct Listener {
    shared: Rc<Shared>,
    address: Option<SocketAddr>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        drop(self.shared.open.take());
    }
}

/// While a listener listens.
#[derive(Default)]
struct Open {
    /// Dropped first to last: no connection is accepted once the socket's path is gone.
    accepting: Option<Task<()>>,
    path: Option<SocketPath>,
}

struct Shared {
    open: RefCell<Open>,
    config: Rc<Config>,
    admission: Rc<Admission>,
    /// Connections that wait for a place.
    queue: RefCell<HandshakeQueue<Arrival>>,
    handshakes: TaskSet,
    ready: RefCell<VecDeque<Ready>>,
    failed: RefCell<Option<Error>>,
    waiting: WakerList,
    on_rejected: RefCell<Option<OnRefused>>,
    authorize: RefCell<Option<Authorize>>,
    trust: Cell<Option<u64>>,
    /// Which shard of a server this is.
    shard: Cell<Option<ShardIdentity>>,
    refusals: Rc<Refusals>,
    /// Where it listens, for the log.
    place: String,
    stop: Rc<Stop>,
}

/// A connection that may begin its handshake.
struct Arrival {
    connection: Socket,
    peer: PeerCredentials,
    ticket: Option<Ticket>,
}

/// A session whose handshake is done, and what was handed over with its connection.
pub(crate) struct Ready {
    pub(crate) session: Session,
    pub(crate) ticket: Option<Ticket>,
    _place: HandshakePermit,
}

/// What goes with a connection that was accepted elsewhere, until its session is taken.
pub(crate) type Ticket = Box<dyn Any>;

/// Takes connections that were accepted elsewhere into a listener.
#[derive(Clone)]
pub(crate) struct Adopter {
    shared: Weak<Shared>,
}

impl Adopter {
    /// Starts the handshake, or has it wait for a place. Drops the connection when the listener is
    /// gone.
    pub(crate) fn adopt(&self, socket: PeerSocket, ticket: Ticket) {
        begin(Socket::connected(socket), Some(ticket), &self.shared);
    }
}

impl Listener {
    /// Listens on a Unix socket that only this user can connect to, unless
    /// [configured](crate::ConfigBuilder::socket_mode) otherwise.
    ///
    /// A socket file that a dead listener left is replaced. The file is removed when the listener
    /// is dropped.
    ///
    /// A path that starts with `@`, or with a NUL byte, is an abstract name, as in Go: there is no
    /// file, and so no mode; [`allowed_peers`](crate::ConfigBuilder::allowed_peers) decides alone.
    ///
    /// # Errors
    ///
    /// [`Error::Os`], with `AddrInUse` when somebody listens there. While it looks for that, it has
    /// a lock on a file beside the socket, `PATH.lock`. Another process of this user that has it is
    /// waited for, and so is the end of one that was killed: together for up to 100 ms, on this
    /// thread; [`bind_within`](Self::bind_within) waits longer without holding up its core. With
    /// `PermissionDenied`, when the lock is a file of another user.
    pub fn bind(path: impl AsRef<Path>, config: Config) -> Result<Self> {
        Ok(Self::at(BoundSocket::open(path.as_ref(), &config, BIND_PATIENCE)?, config))
    }

    /// As [`bind`](Self::bind), and tries again while the path is in use, for as long as this. What
    /// a supervisor starts again at once wants this: the socket of a process that was killed may
    /// outlive it while the kernel clears up.
    ///
    /// Cancel-safe: nothing is left when the future is dropped.
    ///
    /// # Errors
    ///
    /// As [`bind`](Self::bind).
    ///
    /// ```
    /// use std::time::Duration;
    /// use shmipc_glommio::{Config, Listener};
    ///
    /// # let path = std::env::temp_dir().join(format!("shmipc-doc-within-{}", std::process::id()));
    /// # glommio::LocalExecutorBuilder::default().spawn(|| async move {
    /// let patience = Duration::from_secs(2);
    /// let listener = Listener::bind_within(&path, Config::default(), patience).await?;
    /// # drop(listener);
    /// # shmipc_glommio::Result::<()>::Ok(()) }).unwrap().join().unwrap().unwrap();
    /// ```
    pub async fn bind_within(
        path: impl AsRef<Path>,
        config: Config,
        patience: Duration,
    ) -> Result<Self> {
        let began = Instant::now();
        loop {
            match BoundSocket::open(path.as_ref(), &config, Duration::ZERO) {
                Ok(door) => return Ok(Self::at(door, config)),
                Err(error)
                    if error.kind() == io::ErrorKind::AddrInUse && began.elapsed() < patience => {}
                Err(error) => return Err(error),
            }
            sleep(BIND_INTERVAL).await;
        }
    }

    /// Listens at a door that was opened on another thread, possibly.
    pub(crate) fn at(door: BoundSocket, config: Config) -> Self {
        let socket = ListenerSocket::new(door.fd, false);
        Self::start(socket, None, Some(door.path), config)
    }

    /// Listens over TCP. Only loopback makes sense, since the memory is shared on one host, and
    /// only file memory can be handed over.
    ///
    /// # Errors
    ///
    /// [`Error::Os`], with `InvalidInput` when the address is not one of loopback.
    pub fn bind_tcp(address: SocketAddr, config: Config) -> Result<Self> {
        let failed = |error| Error::os_at("listen over TCP at", address, error);
        if !address.ip().is_loopback() {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "not a loopback address");
            return Err(failed(error));
        }
        let listener = TcpListener::bind(address).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let socket = ListenerSocket::new(listener.into(), true);
        Ok(Self::start(socket, Some(address), None, config))
    }

    fn start(
        socket: ListenerSocket,
        address: Option<SocketAddr>,
        path: Option<SocketPath>,
        config: Config,
    ) -> Self {
        stale_files::remove_once(&config.settings().path_prefix);
        let admission = Admission::new(&config.settings().limits);
        let place = match (&path, address) {
            (Some(path), _) => path.path().display().to_string(),
            (None, Some(address)) => address.to_string(),
            (None, None) => String::new(),
        };
        let queue = HandshakeQueue::new(config.settings().limits.queued_handshakes);
        let shared = Rc::new(Shared {
            open: RefCell::default(),
            config: Rc::new(config),
            admission,
            queue: RefCell::new(queue),
            handshakes: TaskSet::default(),
            ready: RefCell::default(),
            failed: RefCell::default(),
            waiting: WakerList::default(),
            on_rejected: RefCell::default(),
            authorize: RefCell::default(),
            trust: Cell::new(None),
            shard: Cell::new(None),
            refusals: Rc::default(),
            place,
            stop: Rc::default(),
        });
        // Started before the first handshake, it is ready behind it.
        let poller = LocalReactor::current();
        let accepting = accept_connections(socket, Rc::downgrade(&shared));
        let beginning = begin_waiting(Rc::downgrade(&shared));
        let accepting = spawn_local(async {
            zip(accepting, beginning).await;
        });
        shared.open.replace(Open { accepting: Some(accepting), path });
        let ends: Rc<dyn Ends> = shared.clone();
        poller.ends_with_executor(Rc::downgrade(&ends));
        Self { shared, address }
    }

    /// The address that a TCP listener got.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Calls `tell` for every peer that was dropped before it became a session, with the reason. A
    /// panic in it is logged, and changes nothing.
    ///
    /// The log has it too, as a warning with the peer's user and process: each kind of reason at
    /// once, and from then on at most once a second, with the number of those between. A peer of
    /// version 4 [is told](shmipc_core::wire::negotiation), where its user, the number of sessions,
    /// the size of its memory, or the end of this server is the reason.
    pub fn on_rejected(&self, tell: impl Fn(&Error) + 'static) {
        let before = self.shared.on_rejected.replace(Some(Rc::new(tell)));
        // Not while it is borrowed: what is dropped here is the program's.
        drop(before);
    }

    /// Asks `authorize` about every peer that is [allowed](crate::ConfigBuilder::allowed_peers),
    /// before its handshake. It is refused when the answer is `false`, and when there is none
    /// because of a panic, which is logged.
    pub fn authorize(&self, authorize: impl Fn(&PeerCredentials) -> bool + 'static) {
        let before = self.shared.authorize.replace(Some(Rc::new(authorize)));
        drop(before);
    }

    /// A handle that takes connections accepted elsewhere into this listener.
    pub(crate) fn adopter(&self) -> Adopter {
        Adopter { shared: Rc::downgrade(&self.shared) }
    }

    /// Says that the promise behind this token speaks for the peers of sessions from now on, so
    /// that their messages can be looked at in place.
    pub fn trust_peer(self, trust: &PeerTrust) -> Self {
        self.trust_as(Some(trust.id()))
    }

    pub(crate) fn trust_as(self, promise: Option<u64>) -> Self {
        self.shared.trust.set(promise);
        self
    }

    /// Says to clients of version 4 which shard this is.
    pub(crate) fn for_shard(self, shard: ShardIdentity) -> Self {
        self.shared.shard.set(Some(shard));
        self
    }

    /// Waits for the next session. Its handshake is done.
    ///
    /// Cancel-safe: no session is lost when the future is dropped.
    ///
    /// # Errors
    ///
    /// The listening socket itself failed; no more sessions will come.
    pub async fn accept(&self) -> Result<Session> {
        Ok(self.accept_ready().await?.session)
    }

    /// Accepts no more, and ends the handshakes that are under way. Sessions that have come to be
    /// can still be taken.
    pub(crate) async fn stop_accepting(&mut self) {
        let accepting = self.shared.open.borrow_mut().accepting.take();
        if let Some(accepting) = accepting {
            accepting.cancel().await;
        }
        // Peers that can be told are told.
        self.shared.stop.begin();
        let waiting = self.shared.queue.borrow_mut().clear();
        for arrival in waiting {
            self.shared.refuse_arrival(arrival, HandshakeError::Stopping.into());
        }
        or(self.shared.handshakes.all_ended(), async {
            sleep(LAST_FAREWELLS).await;
        })
        .await;
        self.shared.handshakes.cancel().await;
    }

    /// A session that has come to be, without waiting.
    pub(crate) fn take_ready(&self) -> Option<Ready> {
        self.shared.ready.borrow_mut().pop_front()
    }

    pub(crate) async fn accept_ready(&self) -> Result<Ready> {
        let shared = &self.shared;
        let ready = || {
            if let Some(ready) = self.take_ready() {
                return Poll::Ready(Ok(ready));
            }
            let failed = shared.failed.borrow();
            failed.as_ref().map_or(Poll::Pending, |error| Poll::Ready(Err(error.clone())))
        };
        shared.waiting.until(ready).await
    }
}

impl Ends for Shared {
    fn end(&self) {
        drop(self.open.take());
        self.handshakes.cancel_soon();
        let ready = self.ready.take();
        drop(ready);
        self.failed.borrow_mut().get_or_insert(Error::SessionClosed);
        self.waiting.wake_all();
    }

    fn abandon(&self) {
        let path = self.open.borrow_mut().path.take();
        drop(path);
    }
}

impl Shared {
    /// Whether a peer may begin a handshake.
    fn check(&self, peer: &PeerCredentials) -> Result<()> {
        if let Some(connections) = fd_disposal::has_too_many_unclosed(peer.uid) {
            return Err(HandshakeError::TooManyUnclosed { uid: peer.uid, connections }.into());
        }
        peer.check(&self.config.settings().allowed_peers, "client")?;
        let authorize = self.authorize.borrow().clone();
        let Some(authorize) = authorize else { return Ok(()) };
        match callback::call("authorize", || authorize(peer)) {
            Some(true) => Ok(()),
            // A panic is no yes.
            Some(false) | None => Err(HandshakeError::NotAuthorized { uid: peer.uid }.into()),
        }
    }

    /// Starts the handshakes of those who wait and for whom there is a place.
    fn begin_queued(self: &Rc<Self>) {
        loop {
            let next = self.queue.borrow_mut().pop(|uid| self.admission.has_place(uid));
            let Some((uid, arrival)) = next else { return };
            // There is one: it was just asked for.
            let Some(place) = self.admission.try_place(uid) else { return };
            self.begin_handshake(arrival, place);
        }
    }

    fn begin_handshake(self: &Rc<Self>, arrival: Arrival, place: HandshakePermit) {
        self.handshakes.spawn(shake_hands(arrival, Rc::downgrade(self), place));
    }

    fn refuse_queued(&self, refused: Option<Arrival>) {
        if let Some(refused) = refused {
            let most = self.queue.borrow().most();
            self.refuse_arrival(refused, HandshakeError::TooManyQueued(most).into());
        }
    }

    /// Refuses a peer that was not heard, and tells it so if it is quick.
    fn refuse_arrival(&self, arrival: Arrival, error: Error) {
        let Arrival { connection, peer, .. } = arrival;
        self.refuse(Some(&peer), &error);
        if self.config.settings().max_accepted_protocol >= ProtocolVersion::V4 {
            let acceptance = Acceptance::new(connection, &self.config, None);
            let (refusals, stop) = (Rc::clone(&self.refusals), Rc::clone(&self.stop));
            self.handshakes.spawn(say_farewell(acceptance, error, refusals, stop));
        }
    }

    fn refuse(&self, peer: Option<&PeerCredentials>, error: &Error) {
        self.refusals.log(&self.place, peer, error);
        let tell = self.on_rejected.borrow().clone();
        if let Some(tell) = tell {
            callback::call("on_rejected", || tell(error));
        }
    }
}

/// Gives a handshake its time.
pub(crate) async fn within<T>(
    config: &Config,
    handshake: impl Future<Output = Result<T>>,
) -> Result<T> {
    let timeout = config.settings().limits.handshake_timeout;
    let too_late = async {
        sleep(timeout).await;
        Err(HandshakeError::Timeout(timeout).into())
    };
    or(handshake, too_late).await
}
