// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a bad peer is let loose on: an executor with a listener, an honest session that must not
//! notice anything, and a client of ours that connects where it is told.
//!
//! The test's own thread plays the bad peer, with sockets that block. The executor tells it what
//! became of the peer.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures_lite::{AsyncReadExt, AsyncWriteExt};
use glommio::{LocalExecutorBuilder, Placement};
use shmipc_glommio::{Config, Connector, Error, Listener, Session, Stream};

use super::hostile::due::IsDue;
use super::raw::{Raw, Rig};

/// Until when a verdict, or an honest echo, must have come. Far above what any of them takes.
pub(crate) const DEADLINE: Duration = Duration::from_secs(5);

/// What became of a peer.
#[derive(Debug)]
pub(crate) enum Fate {
    /// The handshake failed.
    Refused(Error),
    /// There was a session, and this was its end.
    Ended(Error),
}

enum Order {
    /// Prove that honest peers are served, and report.
    Echo(Sender<()>),
    /// Be the client of whoever listens there.
    Connect(PathBuf, Box<Config>),
    /// Say so, and stand still until the other end is gone.
    StandStill(Sender<()>, Receiver<()>),
    Stop,
}

/// The executor, seen from the test.
pub(crate) struct Bed {
    name: String,
    socket: SocketFile,
    tcp_address: SocketAddr,
    orders: Sender<Order>,
    fates: Receiver<Fate>,
    executor: JoinHandle<()>,
    /// What was not as it must be. All of it is told at the end, since one case of a table tells
    /// little of the others.
    problems: RefCell<Vec<String>>,
}

/// Removes the listener's socket: a glommio executor that ends does not drop its tasks, so the
/// listener, which would do it, stays.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Keeps every panic with its thread's name, also one that somebody catches.
fn watch_for_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let thread = std::thread::current();
            let name = thread.name().unwrap_or_default();
            PANICS.lock().unwrap().push(format!("{name}: {panic}"));
            before(panic);
        }));
    });
}

impl Bed {
    /// Starts an executor whose listeners have this configuration.
    pub(crate) fn start(config: Config) -> Self {
        Self::start_with(config, Api::Bytes)
    }

    /// The same, with streams that are used in this way.
    pub(crate) fn start_with(config: Config, api: Api) -> Self {
        watch_for_panics();
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("bed{}x{number}x", std::process::id());
        let path = std::env::temp_dir().join(format!("shmipc-{name}.sock"));
        let (orders, orders_there) = mpsc::channel();
        let (fates_there, fates) = mpsc::channel();
        let (ready_there, ready) = mpsc::channel();
        let there = path.clone();
        let start = move || async move {
            let host = Host { path: there, fates: fates_there, api, is_honest: Rc::default() };
            let listeners = host.listen(&config);
            // Nothing is told of this session's end.
            host.is_honest.set(true);
            let companion = host.new_client().await;
            host.is_honest.set(false);
            ready_there.send(listeners[1].tcp_address().unwrap()).unwrap();
            host.obey(companion, orders_there).await;
        };
        let builder = LocalExecutorBuilder::new(Placement::Unbound).name(&name);
        let executor = builder.spawn(start).unwrap();
        // A thread for the join, which cannot be given a limit otherwise.
        let executor = std::thread::spawn(|| executor.join().unwrap());
        let tcp_address = ready.recv_timeout(DEADLINE).expect("the executor starts");
        let problems = RefCell::default();
        let socket = SocketFile(path);
        Self { name, socket, tcp_address, orders, fates, executor, problems }
    }

    /// Where the TCP listener listens.
    pub(crate) fn tcp_address(&self) -> SocketAddr {
        self.tcp_address
    }

    /// Where the listener listens.
    pub(crate) fn path(&self) -> &Path {
        &self.socket.0
    }

    /// A name that nothing outside of this bed has.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What became of the peer.
    pub(crate) fn fate(&self) -> Result<Fate, String> {
        let fate = self.fates.recv_timeout(DEADLINE);
        fate.map_err(|error| format!("{error}: nobody says what became of the peer"))
    }

    /// The handshake with `raw` has to fail by the error that is due, and the next to succeed.
    pub(crate) fn must_refuse(&self, name: &str, is_due: IsDue, mut raw: Raw) {
        let fate = self.fate();
        let is_right = matches!(&fate, Ok(Fate::Refused(error)) if is_due(error));
        let is_right = is_right && raw.is_closed_by_peer();
        drop(raw);
        self.judge(name, is_right, &fate);
    }

    /// The session with `rig` has to end by the error that is due, and others to go on.
    pub(crate) fn must_end(&self, name: &str, is_due: IsDue, mut rig: Rig) {
        let fate = self.fate();
        let is_right = matches!(&fate, Ok(Fate::Ended(error)) if is_due(error));
        let is_right = is_right && rig.raw.is_closed_by_peer();
        drop(rig);
        self.judge(name, is_right, &fate);
    }

    /// The session has to be over because the peer, which was none too bad, is gone by now.
    pub(crate) fn must_see_it_gone(&self, name: &str) {
        let fate = self.fate();
        let is_right = matches!(fate, Ok(Fate::Ended(Error::PeerClosed)));
        self.judge(name, is_right, &fate);
    }

    fn judge(&self, name: &str, is_right: bool, fate: &Result<Fate, String>) {
        if !is_right {
            self.note(format!("{name}: {fate:?}"));
            // What this peer's later fate is says nothing of the next one.
            while self.fates.recv_timeout(Duration::from_millis(50)).is_ok() {}
        }
        self.must_go_on(name);
    }

    /// Keeps a problem for the end of the test.
    pub(crate) fn note(&self, problem: String) {
        self.problems.borrow_mut().push(problem);
    }

    /// A new honest client gets through, and the old one does not notice anything.
    pub(crate) fn must_go_on(&self, name: &str) {
        let (done_there, done) = mpsc::channel();
        self.orders.send(Order::Echo(done_there)).expect("the executor is there");
        if let Err(error) = done.recv_timeout(DEADLINE) {
            panic!("after {name}: {error}: no echo for honest peers");
        }
    }

    /// Tells our client to connect to whoever listens there.
    pub(crate) fn connect(&self, path: &Path, config: Config) {
        self.orders.send(Order::Connect(path.to_owned(), Box::new(config))).unwrap();
    }

    /// Does something while the executor stands still.
    pub(crate) fn while_it_stands_still<T>(&self, act: impl FnOnce() -> T) -> T {
        let (stands_there, stands) = mpsc::channel();
        let (_goes_on, goes_on_there) = mpsc::channel();
        self.orders.send(Order::StandStill(stands_there, goes_on_there)).unwrap();
        stands.recv_timeout(DEADLINE).expect("the executor is there");
        act()
    }

    /// Stops the executor and looks for what bad peers may have left in it.
    pub(crate) fn finish(self) {
        let start = Instant::now();
        let is_mapped = || {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            maps.contains(&self.name)
        };
        while is_mapped() {
            assert!(start.elapsed() < DEADLINE, "memory of a bad peer is still mapped");
            std::thread::sleep(Duration::from_millis(2));
        }
        self.orders.send(Order::Stop).unwrap();
        while !self.executor.is_finished() {
            assert!(start.elapsed() < DEADLINE, "the executor does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
        self.executor.join().unwrap();
        let problems = self.problems.into_inner();
        assert!(problems.is_empty(), "{problems:#?}");
        let panics = PANICS.lock().unwrap();
        let ours: Vec<_> = panics.iter().filter(|text| text.starts_with(&self.name)).collect();
        assert!(ours.is_empty(), "{ours:#?}");
    }
}

/// How our side of a stream is used.
#[derive(Clone, Copy)]
pub(crate) enum Api {
    /// Read and written like a socket.
    Bytes,
    /// By whole messages, and loans of memory for the answers.
    Messages,
}

/// The executor's side.
struct Host {
    path: PathBuf,
    fates: Sender<Fate>,
    api: Api,
    /// Whether the next peer is one of ours, whose end is no news.
    is_honest: Rc<Cell<bool>>,
}

impl Host {
    /// Listens on a Unix socket and over TCP.
    fn listen(&self, config: &Config) -> [Rc<Listener>; 2] {
        let any_port = "127.0.0.1:0".parse().unwrap();
        let listeners = [
            Rc::new(Listener::bind(&self.path, config.clone()).unwrap()),
            Rc::new(Listener::bind_tcp(any_port, config.clone()).unwrap()),
        ];
        for listener in &listeners {
            let fates = self.fates.clone();
            listener.on_rejected(move |error| {
                // The test may be over.
                let _ = fates.send(Fate::Refused(error.clone()));
            });
            self.accept_all(Rc::clone(listener));
        }
        listeners
    }

    fn accept_all(&self, listener: Rc<Listener>) {
        let is_honest = Rc::clone(&self.is_honest);
        let (fates, api) = (self.fates.clone(), self.api);
        glommio::spawn_local(async move {
            while let Ok(session) = listener.accept().await {
                if !is_honest.get() {
                    tell_the_end(session.clone(), fates.clone());
                }
                glommio::spawn_local(echo_all(session, api)).detach();
            }
        })
        .detach();
    }

    async fn obey(self, companion: (Session, Stream), orders: Receiver<Order>) {
        let (_session, mut stream) = companion;
        loop {
            match orders.try_recv() {
                Ok(Order::Echo(done)) => {
                    round_trip(&mut stream).await.unwrap();
                    self.is_honest.set(true);
                    drop(self.new_client().await);
                    self.is_honest.set(false);
                    done.send(()).unwrap();
                }
                Ok(Order::Connect(path, config)) => {
                    let call = call(path, *config, self.api, self.fates.clone());
                    glommio::spawn_local(call).detach();
                }
                Ok(Order::StandStill(stands, goes_on)) => {
                    stands.send(()).unwrap();
                    let _ = goes_on.recv();
                }
                Ok(Order::Stop) | Err(TryRecvError::Disconnected) => return,
                Err(TryRecvError::Empty) => {
                    glommio::timer::sleep(Duration::from_micros(500)).await;
                }
            }
        }
    }

    /// A new session with our own listener that has shown that it works.
    async fn new_client(&self) -> (Session, Stream) {
        let config = Config::builder()
            .buffer_size(1 << 20)
            .queue_capacity(64)
            .handshake_timeout(DEADLINE)
            .build()
            .unwrap();
        let session = Connector::new(config).connect(&self.path).await.unwrap();
        let mut stream = session.open_stream().unwrap();
        round_trip(&mut stream).await.unwrap();
        (session, stream)
    }
}

/// Our client with a bad server: says hello on one stream, and echoes what comes.
async fn call(path: PathBuf, config: Config, api: Api, fates: Sender<Fate>) {
    let fate = match Connector::new(config).connect(&path).await {
        Ok(session) => {
            let mut stream = session.open_stream().unwrap();
            // The session may be over by now; then `closed` says so.
            let _ = stream.write_all(b"hello").await;
            glommio::spawn_local(echo(stream, api)).detach();
            Fate::Ended(session.closed().await)
        }
        Err(error) => Fate::Refused(error),
    };
    let _ = fates.send(fate);
}

fn tell_the_end(session: Session, fates: Sender<Fate>) {
    glommio::spawn_local(async move {
        let _ = fates.send(Fate::Ended(session.closed().await));
    })
    .detach();
}

async fn echo_all(session: Session, api: Api) {
    while let Ok(stream) = session.accept().await {
        glommio::spawn_local(echo(stream, api)).detach();
    }
}

async fn echo(stream: Stream, api: Api) {
    // Why it ended is for the session to say.
    let _ = match api {
        Api::Bytes => echo_bytes(stream).await,
        Api::Messages => echo_messages(stream).await.map_err(io::Error::from),
    };
}

async fn echo_bytes(mut stream: Stream) -> io::Result<()> {
    let mut bytes = vec![0; 4096];
    loop {
        let count = stream.read(&mut bytes).await?;
        if count == 0 {
            return Ok(());
        }
        stream.write_all(&bytes[..count]).await?;
    }
}

async fn echo_messages(mut stream: Stream) -> Result<(), Error> {
    while let Some(mut message) = stream.recv().await? {
        let mut answer = stream.alloc(message.len()).await?;
        io::copy(&mut message, &mut answer).expect("a loan of that length");
        stream.send(answer).await?;
    }
    Ok(())
}

async fn round_trip(stream: &mut Stream) -> io::Result<()> {
    let message: Vec<u8> = (0..20_000_u32).map(|index| (index * 7) as u8).collect();
    let mut answer = vec![0; message.len()];
    stream.write_all(&message).await?;
    stream.read_exact(&mut answer).await?;
    assert!(answer == message);
    Ok(())
}
