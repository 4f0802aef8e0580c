// SPDX-License-Identifier: MIT OR Apache-2.0
//! A sidecar proxy: programs that speak over sockets, connected through shared memory.
//!
//! ```text
//! proxy --listen tcp:127.0.0.1:8080 --connect shm:/run/store.shm      # beside the client
//! proxy --listen shm:/run/store.shm --connect tcp:127.0.0.1:80        # beside the server
//! ```
//!
//! Each connection has one of its own to the other side, as a stream of the session that the two
//! proxies share. Bytes go both ways, the end of one direction is passed on, and a reset is passed
//! on as a reset; the loss of a session is one, too. A Unix socket can be reset only while
//! something that it was sent is unread.
//!
//! One proxy alone also connects sockets with programs that speak shmipc themselves. Those of other
//! implementations know neither the end of one direction nor a reset, only the end of a stream. So
//! a server's end closes the stream of such a client at once, and a client's end that of such a
//! server when nothing has come from it for some time (`--half-close-timeout`).
//!
//! Everything is told on stderr: where it listens, what failed and why, and at the end one line of
//! JSON. There, `failed` counts the connections that could not be made on the other side (these
//! are `unreachable`, too), that were reset, that lost their session, or that were cut at the end
//! because they went on for too long (`cut_at_stop`). All other ends are ordinary.

mod end;
mod ends;
mod hangups;
mod relay;
#[allow(dead_code, reason = "the other examples use the rest")]
#[path = "../support/mod.rs"]
mod support;
mod upstream;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use clap::value_parser;
use futures_lite::future::or;
use glommio::task::JoinHandle;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use serde_json::json;
use shmipc_glommio::{Config, ConfigError, Error, Listener, Session, SliceClass};

use end::End;
use ends::{Address, Place, SocketListener};
use relay::Carrier;
use support::address;
use support::cli::{self, tell};
use upstream::Upstream;

/// How long a connection may wait for the other side to take it.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long accepting pauses when there is no descriptor left for another connection.
const OUT_OF_DESCRIPTORS_PAUSE: Duration = Duration::from_millis(20);
/// How long the last tasks get to end once they are told to.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long a place to listen at may still be taken by a process that was killed.
const LAST_OF_THE_DEAD: Duration = Duration::from_secs(2);
const MOST_GRACE: u64 = 24 * 3600;

/// Bytes of a slice of the largest class: what one read of a socket fills at most.
const LARGEST_SLICE: u32 = (64 << 10) - 20;

/// The shared memory of a session that carries thousands of connections.
fn config() -> Result<Config, ConfigError> {
    Config::builder()
        // Most connections exchange less than a kilobyte at a time, and a message keeps a whole
        // slice while it is unread: thousands of these are there for thousands of streams. What a
        // busy connection reads at once fits one slice of the largest class.
        .slice_classes([
            SliceClass::new(1024 - 20, 20),
            SliceClass::new(8192 - 20, 30),
            SliceClass::new(LARGEST_SLICE, 50),
        ])
        // Only what was ever used at the same time becomes resident.
        .buffer_size(64 << 20)
        // A connection whose reader stalls may keep this much. It is enough to stream on while
        // credit is on its way, and it takes hundreds that stall to use up the memory, after which
        // the others get by over the socket. That is also why they wait for memory no longer than
        // the default: when so many stall, it does not come back soon.
        .stream_window(256 << 10)
        // All that a proxy does begins or ends at a socket, so sockets are looked at often.
        .reactor_interval(Duration::from_micros(50))
        .build()
}

struct Options {
    listen: Address,
    connect: Address,
    grace: Duration,
    half_close_timeout: Duration,
}

fn main() -> ExitCode {
    let options = match parse() {
        Ok(options) => options,
        Err(status) => return status,
    };
    // Names are looked up here, once: an executor must not wait for that.
    let places = options
        .listen
        .resolve_to_listen()
        .and_then(|listen| options.connect.resolve().map(|connect| (listen, connect)));
    let places = match places {
        Ok(places) => places,
        Err(error) => return cli::end(Err(error)),
    };
    // Blocked before any other thread starts: threads inherit it, and only the one that waits for
    // signals takes them.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    if let Err(errno) = signals.thread_block() {
        tell(format_args!("cannot block signals: {errno}"));
        return ExitCode::FAILURE;
    }
    raise_descriptor_limit();
    cli::end(support::run(serve(options, places, signals)))
}

fn parse() -> Result<Options, ExitCode> {
    let listen = cli::option_once("listen", "PLACE", "Where connections come from");
    let connect = cli::option_once("connect", "PLACE", "Where each connection gets one to");
    let grace = cli::option(
        "grace",
        "SECONDS",
        "How long open connections may go on after SIGTERM or SIGINT",
    );
    let half_close_timeout = cli::option(
        "half-close-timeout",
        "SECONDS",
        "How long nothing must come from a server that does not know half-close, after its client \
        has finished, before its stream is closed",
    );
    let command = cli::command(
        "proxy",
        "Connects programs that speak over sockets through shared memory",
    )
    .arg(listen.required(true).value_parser(value_parser!(Address)))
    .arg(connect.required(true).value_parser(value_parser!(Address)))
    .arg(grace.default_value("5").value_parser(value_parser!(u64).range(..=MOST_GRACE)))
    .arg(half_close_timeout.default_value("5").value_parser(seconds))
    .after_help(
        "PLACE is tcp:HOST:PORT, unix:PATH, or shm:PATH for shared memory over a Unix socket.\n\
        A PATH of @NAME is an abstract socket. A host's name is looked up once, at the start.",
    );
    cli::read(command, |matches| {
        let place = |name| matches.get_one::<Address>(name).cloned().ok_or("a place is missing");
        let grace = matches.get_one::<u64>("grace").copied().unwrap_or_default();
        Ok(Options {
            listen: place("listen")?,
            connect: place("connect")?,
            grace: Duration::from_secs(grace),
            half_close_timeout: matches
                .get_one("half-close-timeout")
                .copied()
                .ok_or("a time is missing")?,
        })
    })
}

/// Seconds, which may be broken.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds")?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

/// Each connection of a socket takes a descriptor, and the usual soft limit is 1024.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        tell(format_args!("the limit of descriptors stays as it is: {errno}"));
    }
}

async fn serve(options: Options, places: (Place, Place), signals: SigSet) -> Result<(), String> {
    let config = config().map_err(|error| error.to_string())?;
    let (listen, connect) = places;
    let front = Front::bind(&listen, &config)
        .await
        .map_err(|error| format!("cannot listen on {}: {error}", options.listen))?;
    let back = Back::new(connect, config).map_err(|error| error.to_string())?;
    let proxy = Proxy::new(back, options.half_close_timeout);
    let proxy = Rc::new(proxy.map_err(|error| format!("cannot watch sockets: {error}"))?);
    tell(format_args!("listening on {}", front.address().unwrap_or(&options.listen)));

    let stopped = glommio::executor().spawn_blocking(move || signals.wait());
    let stopped = async {
        if let Err(errno) = stopped.await {
            tell(format_args!("cannot wait for signals: {errno}"));
        }
        Ok(())
    };
    let accepting = async {
        // A session takes descriptors, which there may be none of when connections have come.
        proxy.back.ready().await;
        front.accept_all(&proxy).await
    };
    or(stopped, accepting).await.map_err(|error| format!("accepting: {error}"))?;
    drop(front);
    proxy.stop(options.grace).await;
    tell(format_args!("{}", proxy.totals()));
    Ok(())
}

/// Where connections come from.
enum Front {
    Socket(SocketListener),
    Shm(Listener),
}

impl Front {
    /// Starts to listen, unless somebody else does.
    ///
    /// The sockets of a process that was killed while it waited with io_uring outlive it for a
    /// moment. One that is started again at once must not take them for those of a live one.
    async fn bind(place: &Place, config: &Config) -> io::Result<Self> {
        let since = Instant::now();
        loop {
            match Self::bind_now(place, config) {
                Err(error)
                    if error.kind() == io::ErrorKind::AddrInUse
                        && since.elapsed() < LAST_OF_THE_DEAD =>
                {
                    glommio::timer::sleep(Duration::from_millis(20)).await;
                }
                bound => return bound,
            }
        }
    }

    fn bind_now(place: &Place, config: &Config) -> io::Result<Self> {
        Ok(match place {
            Place::Tcp(addresses) => Self::Socket(SocketListener::bind_tcp(addresses)?),
            Place::Unix(path) => Self::Socket(SocketListener::bind_unix(path)?),
            Place::Shm(path) => {
                let listener = Listener::bind(path, config.clone())?;
                listener.on_rejected(|error| tell(format_args!("refused: {error}")));
                Self::Shm(listener)
            }
        })
    }

    /// The address that it got, if it is not the one that was asked for.
    fn address(&self) -> Option<&Address> {
        match self {
            Self::Socket(listener) => Some(listener.address()),
            Self::Shm(_) => None,
        }
    }

    async fn accept_all(&self, proxy: &Rc<Proxy>) -> io::Result<()> {
        match self {
            Self::Socket(listener) => accept_sockets(listener, proxy).await,
            Self::Shm(listener) => loop {
                let session = listener.accept().await?;
                glommio::spawn_local(serve_session(session, Rc::clone(proxy))).detach();
            },
        }
    }
}

async fn accept_sockets(listener: &SocketListener, proxy: &Rc<Proxy>) -> io::Result<()> {
    let mut is_told = false;
    loop {
        match listener.accept().await {
            Ok(end) => {
                proxy.start(end);
                is_told = false;
                // Accepting does not wait while there is somebody to accept.
                glommio::executor().yield_if_needed().await;
            }
            Err(error) if ends::is_passing(&error) => {
                if !is_told {
                    tell(format_args!("cannot accept now: {error}"));
                }
                is_told = true;
                glommio::timer::sleep(OUT_OF_DESCRIPTORS_PAUSE).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Takes every stream of a session as a connection.
async fn serve_session(session: Session, proxy: Rc<Proxy>) {
    let reason = loop {
        match session.accept().await {
            // The peer does not know that nothing is accepted any more.
            Ok(stream) if proxy.is_stopping.get() => drop(End::stream(stream)),
            Ok(stream) => proxy.start(End::stream(stream)),
            Err(error) => break error,
        }
        glommio::executor().yield_if_needed().await;
    };
    tell(format_args!("a session has ended: {reason}"));
}

/// Where connections go to.
enum Back {
    /// Tried one after the other.
    Tcp(Vec<SocketAddr>),
    Unix(PathBuf),
    Shm(Upstream),
}

impl Back {
    fn new(place: Place, config: Config) -> Result<Self, Error> {
        Ok(match place {
            Place::Tcp(addresses) => Self::Tcp(addresses),
            Place::Unix(path) => Self::Unix(path),
            Place::Shm(path) => Self::Shm(Upstream::new(path, config, PATIENCE)?),
        })
    }

    /// Waits for a server that connections share something with.
    async fn ready(&self) {
        if let Self::Shm(upstream) = self {
            upstream.ready().await;
        }
    }

    async fn connect(&self) -> io::Result<End> {
        let too_late = async |patience| {
            glommio::timer::sleep(patience).await;
            Err(io::Error::new(io::ErrorKind::TimedOut, "nobody takes the connection"))
        };
        match self {
            Self::Tcp(addresses) => {
                // Each has its share of the time: one that says nothing must not take it all.
                let share = PATIENCE / addresses.len().max(1) as u32;
                let attempt = async |at| or(End::connect_tcp(at), too_late(share)).await;
                address::first_of(addresses, attempt).await
            }
            Self::Unix(path) => or(End::connect_unix(path), too_late(PATIENCE)).await,
            Self::Shm(upstream) => {
                let mut stream = upstream.open_stream().await?;
                // The server may be one that speaks first.
                stream.set_write_deadline(Some(Instant::now() + PATIENCE));
                stream.announce().await?;
                stream.set_write_deadline(None);
                Ok(End::stream(stream))
            }
        }
    }
}

/// The connections, and what came of them.
struct Proxy {
    back: Back,
    carrier: Carrier,
    is_stopping: Cell<bool>,
    /// With the task of each, as soon as it has gone as far as it can at first.
    open: RefCell<HashMap<u64, Option<JoinHandle<()>>>>,
    connections: Cell<u64>,
    /// Of these: all that did not end in an ordinary way.
    failed: Cell<u64>,
    /// Of those that failed: no connection to the other side could be made.
    unreachable: Cell<u64>,
    /// Of those that failed: they were still open when the time to stop was over.
    cut_at_stop: Cell<u64>,
}

impl Proxy {
    fn new(back: Back, half_close_timeout: Duration) -> io::Result<Self> {
        Ok(Self {
            back,
            carrier: Carrier::new(LARGEST_SLICE as usize, half_close_timeout)?,
            is_stopping: Cell::new(false),
            open: RefCell::default(),
            connections: Cell::new(0),
            failed: Cell::new(0),
            unreachable: Cell::new(0),
            cut_at_stop: Cell::new(0),
        })
    }

    /// Serves a connection that was accepted, until it ends.
    fn start(self: &Rc<Self>, near: End) {
        let number = self.connections.get() + 1;
        self.connections.set(number);
        let connection = Connection { proxy: Rc::clone(self), number, has_ended_well: false };
        self.open.borrow_mut().insert(number, None);
        // It goes as far as it can before it is handed back, and that may be to its end.
        let serving = glommio::spawn_local(connection.serve(near)).detach();
        if let Some(open) = self.open.borrow_mut().get_mut(&number) {
            *open = Some(serving);
        }
    }

    /// Gives the open connections time to end, and then ends those that have not.
    async fn stop(&self, grace: Duration) {
        self.is_stopping.set(true);
        self.settle(grace).await;
        self.cut_at_stop.set(self.open.borrow().len() as u64);
        for serving in self.open.borrow().values().flatten() {
            serving.cancel();
        }
        self.settle(LAST_WORDS).await;
        if let Back::Shm(upstream) = &self.back {
            // A server that does not take its last bytes must not keep this side.
            let too_late = async {
                glommio::timer::sleep(LAST_WORDS).await;
            };
            or(upstream.close(), too_late).await;
        }
    }

    /// Waits until no connection is open, but not for ever.
    async fn settle(&self, limit: Duration) {
        let pause = Duration::from_millis(2);
        let mut left = limit;
        while !self.open.borrow().is_empty() && !left.is_zero() {
            glommio::timer::sleep(pause).await;
            left = left.saturating_sub(pause);
        }
    }

    fn totals(&self) -> serde_json::Value {
        json!({
            "event": "end",
            "connections": self.connections.get(),
            "failed": self.failed.get(),
            "unreachable": self.unreachable.get(),
            "cut_at_stop": self.cut_at_stop.get(),
            "bytes_up": self.carrier.up.get(),
            "bytes_down": self.carrier.down.get(),
        })
    }
}

/// A connection that is open, until this is dropped.
struct Connection {
    proxy: Rc<Proxy>,
    number: u64,
    has_ended_well: bool,
}

impl Connection {
    async fn serve(mut self, near: End) {
        match self.carry(near).await {
            Ok(()) => self.has_ended_well = true,
            Err(error) => tell(format_args!("connection {}: {error}", self.number)),
        }
    }

    async fn carry(&self, near: End) -> io::Result<()> {
        let proxy = &self.proxy;
        let far = proxy.back.connect().await.inspect_err(|_| {
            proxy.unreachable.set(proxy.unreachable.get() + 1);
        })?;
        proxy.carrier.carry(near, far).await
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.proxy.open.borrow_mut().remove(&self.number);
        if !self.has_ended_well {
            self.proxy.failed.set(self.proxy.failed.get() + 1);
        }
    }
}
