// SPDX-License-Identifier: MIT OR Apache-2.0
//! The crate `shmipc` in a process of its own.
//!
//! The test binary starts itself once more, and tells the second process by an environment variable
//! that it is the peer. The peer prints a line when it is ready, and one when it has done its work;
//! it ends when its standard input does.

use std::future::Future;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::SocketAddr;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};
use shmipc::config::Config;
use shmipc::consts::MemMapType;
use shmipc::session::{SessionManager, SessionManagerConfig};
use shmipc::stream::Stream;
use shmipc::transport::{
    DefaultUnixConnect, DefaultUnixListen, TransportListen, TransportListener,
};
use shmipc::{Error, Listener};
use shmipc_glommio::Wakeup;

use super::payload::{Way, check, payload};

const ORDER: &str = "SHMIPC_TEST_PEER";
const READY: &str = "peer: ready";
const DONE: &str = "peer: done";
const UNANSWERED: &str = "peer: did not answer a negotiation";
/// A peer that is forgotten must not stay.
const LONGEST_LIFE: Duration = Duration::from_secs(150);

/// What both sides send each other. On every stream the client sends messages of these lengths, one
/// after the other, and the server answers each with one of the same length, or none of them.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) lengths: Vec<usize>,
    pub(crate) streams: usize,
    /// How many of the streams are open at the same time.
    pub(crate) at_once: usize,
    /// The client sends everything and closes, and the server only reads.
    pub(crate) one_way: bool,
}

/// What the peer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Server,
    Client,
}

/// What a server does when it is opened in version 4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnNegotiation {
    /// It knows the version.
    Answer,
    /// It does not, and closes the connection.
    Close,
    /// It does not, and neither answers nor closes, as shmipc-go does.
    StaySilent,
}

/// Everything that the peer has to know.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    pub(crate) role: Role,
    pub(crate) address: String,
    /// Whether the memory is files, if the peer makes it.
    pub(crate) is_file: bool,
    /// How it asks to be woken in version 4, if it opens with that: otherwise with version 2 for
    /// files, and with version 3 for memfds.
    pub(crate) version_4: Option<Wakeup>,
    /// What the server does when it is opened in version 4.
    pub(crate) on_negotiation: OnNegotiation,
    pub(crate) prefix: String,
    pub(crate) pool: u32,
    pub(crate) plan: Plan,
}

impl Order {
    fn encode(&self) -> String {
        let plan = &self.plan;
        let lengths: Vec<String> = plan.lengths.iter().map(ToString::to_string).collect();
        let fields = [
            format!("{:?}", self.role),
            self.address.clone(),
            self.is_file.to_string(),
            match self.version_4 {
                None => "old".into(),
                Some(Wakeup::EventFd) => "eventfd".into(),
                Some(Wakeup::Polling(interval)) => interval.as_micros().to_string(),
                Some(_) => "socket".into(),
            },
            format!("{:?}", self.on_negotiation),
            self.prefix.clone(),
            self.pool.to_string(),
            plan.streams.to_string(),
            plan.at_once.to_string(),
            plan.one_way.to_string(),
            lengths.join(","),
        ];
        fields.join(";")
    }

    fn decode(text: &str) -> Self {
        let mut fields = text.split(';');
        let mut field = || fields.next().expect("a field of the order").to_owned();
        Self {
            role: match field().as_str() {
                "Server" => Role::Server,
                _ => Role::Client,
            },
            address: field(),
            is_file: field() == "true",
            version_4: match field().as_str() {
                "old" => None,
                "eventfd" => Some(Wakeup::EventFd),
                "socket" => Some(Wakeup::Socket),
                micros => Some(Wakeup::Polling(Duration::from_micros(micros.parse().unwrap()))),
            },
            on_negotiation: match field().as_str() {
                "Answer" => OnNegotiation::Answer,
                "Close" => OnNegotiation::Close,
                _ => OnNegotiation::StaySilent,
            },
            prefix: field(),
            pool: field().parse().unwrap(),
            plan: Plan {
                streams: field().parse().unwrap(),
                at_once: field().parse().unwrap(),
                one_way: field() == "true",
                lengths: field().split(',').map(|len| len.parse().unwrap()).collect(),
            },
        }
    }
}

/// A peer process, seen from the test.
pub(crate) struct Peer {
    process: std::process::Child,
    said: Arc<Mutex<String>>,
}

impl Peer {
    /// Starts this binary again, to run its test `entry` only.
    pub(crate) fn start(entry: &str, order: &Order) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", entry, "--nocapture"])
            .env(ORDER, order.encode())
            // Otherwise the crate opens no stream for 30 seconds once data went over the socket.
            .env("SHMIPC_DEBUG_MODE", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let output = BufReader::new(process.stdout.take().unwrap());
        let collected = Arc::clone(&said);
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                *collected.lock().unwrap() += &(line + "\n");
            }
        });
        Self { process, said }
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.said.lock().unwrap().contains(READY)
    }

    pub(crate) fn is_done(&self) -> bool {
        self.said.lock().unwrap().contains(DONE)
    }

    /// How many negotiations it has not answered.
    pub(crate) fn negotiations_unanswered(&self) -> usize {
        self.said.lock().unwrap().matches(UNANSWERED).count()
    }

    /// How the process ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.process.try_wait().unwrap()
    }

    /// Tells the peer that it can go.
    pub(crate) fn dismiss(&mut self) {
        drop(self.process.stdin.take());
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Only one that is still running after a failed test is hit.
        if self.ended().is_none() {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

/// What the process does that was started as a peer. Returns at once in any other.
pub(crate) fn be_peer() {
    let Ok(order) = std::env::var(ORDER) else {
        return;
    };
    // A panic in a task of tokio would go unnoticed.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("the peer fails: {panic}");
        std::process::exit(101);
    }));
    std::thread::spawn(|| {
        std::thread::sleep(LONGEST_LIFE);
        eprintln!("the peer was forgotten");
        std::process::exit(102);
    });
    let order = Order::decode(&order);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        match order.role {
            Role::Server => serve(order).await,
            Role::Client => call(order).await,
        }
    });
    // Tasks that unmap may sleep for seconds.
    runtime.shutdown_background();
}

fn config(order: &Order) -> Config {
    let mut config = Config::new();
    config.share_memory_buffer_cap = order.pool;
    config.share_memory_path_prefix.clone_from(&order.prefix);
    config.initialize_timeout = Duration::from_secs(10);
    config.mem_map_type =
        if order.is_file { MemMapType::MemMapTypeDevShmFile } else { MemMapType::MemMapTypeMemFd };
    match order.version_4 {
        None => config,
        Some(Wakeup::EventFd) => config.with_v4_eventfd(),
        Some(Wakeup::Polling(interval)) => config.with_v4_event_queue_polling(interval),
        Some(_) => config.with_v4(),
    }
}

fn address(order: &Order) -> SocketAddr {
    SocketAddr::from_pathname(Path::new(&order.address)).unwrap()
}

async fn dismissed() {
    let read = || std::io::stdin().read_to_end(&mut Vec::new());
    tokio::task::spawn_blocking(read).await.unwrap().unwrap();
}

async fn serve(order: Order) {
    let (address, config) = (address(&order), config(&order));
    let listener = match order.on_negotiation {
        OnNegotiation::Answer => Listener::new(DefaultUnixListen, address, config).await,
        OnNegotiation::Close | OnNegotiation::StaySilent => {
            let closes = order.on_negotiation == OnNegotiation::Close;
            Listener::new(OldListen { closes }, address, config).await
        }
    };
    let mut listener = listener.unwrap();
    println!("{READY}");
    let mut answers = Vec::new();
    for _ in 0..order.plan.streams {
        let stream = listener.accept().await.unwrap();
        answers.push(tokio::spawn(answer(stream, order.plan.clone())));
    }
    for answer in answers {
        answer.await.unwrap();
    }
    println!("{DONE}");
    dismissed().await;
    close_soon(listener.close()).await;
}

/// Listens like a server that does not know version 4.
struct OldListen {
    /// Whether it closes a connection that is opened in it.
    closes: bool,
}

struct OldListener {
    listener: tokio::net::UnixListener,
    closes: bool,
    /// Connections that it neither answers nor closes.
    silent: Mutex<Vec<tokio::net::UnixStream>>,
}

impl TransportListen for OldListen {
    type Listener = OldListener;
    type Address = SocketAddr;

    async fn listen(&self, address: SocketAddr) -> std::io::Result<OldListener> {
        let listener = DefaultUnixListen.listen(address).await?;
        Ok(OldListener { listener, closes: self.closes, silent: Mutex::default() })
    }
}

impl TransportListener for OldListener {
    type Stream = tokio::net::UnixStream;
    type Address = tokio::net::unix::SocketAddr;

    async fn accept(&self) -> std::io::Result<(Self::Stream, Self::Address)> {
        const NEGOTIATION: u8 = 10;
        loop {
            let (stream, address) = self.listener.accept().await?;
            if first_type(&stream).await? != NEGOTIATION {
                return Ok((stream, address));
            }
            if !self.closes {
                self.silent.lock().unwrap().push(stream);
            }
            println!("{UNANSWERED}");
        }
    }
}

/// The type of the first message, which stays in the socket.
async fn first_type(stream: &tokio::net::UnixStream) -> std::io::Result<u8> {
    let mut header = [0; 8];
    loop {
        stream.readable().await?;
        let peek = || Ok(recv(stream.as_raw_fd(), &mut header, MsgFlags::MSG_PEEK)?);
        match stream.try_io(tokio::io::Interest::READABLE, peek) {
            Ok(8) => return Ok(header[7]),
            Ok(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// The server's side of one stream.
async fn answer(mut stream: Stream, plan: Plan) {
    let id = stream.stream_id();
    for (number, &len) in (0..).zip(&plan.lengths) {
        let request = stream.read_exact_bytes(len).await.unwrap();
        check(&request, Way::Request, id, number);
        drop(request);
        if !plan.one_way {
            send(&mut stream, &payload(Way::Reply, id, number, len)).await;
        }
    }
    let end = stream.read_exact_bytes(1).await.map(drop);
    assert!(matches!(end, Err(Error::EndOfStream)), "stream {id}: {end:?}");
    stream.close().await.unwrap();
}

async fn call(order: Order) {
    let sessions = SessionManagerConfig::new().with_config(config(&order)).with_session_num(1);
    let manager = SessionManager::new(sessions, DefaultUnixConnect, address(&order)).await;
    let manager = manager.unwrap();
    println!("{READY}");
    let plan = &order.plan;
    let mut workers = Vec::new();
    for _ in 0..plan.at_once {
        let (manager, plan) = (manager.clone(), plan.clone());
        workers.push(tokio::spawn(async move {
            for _ in 0..plan.streams / plan.at_once {
                ask(manager.get_stream().unwrap(), &plan).await;
            }
        }));
    }
    for worker in workers {
        worker.await.unwrap();
    }
    println!("{DONE}");
    dismissed().await;
    close_soon(manager.close()).await;
}

/// The crate closes its socket at once, and then waits up to five seconds for slices that, by a
/// count of its own that only it keeps, are still out. A process that goes meanwhile leaves its
/// files to the other side.
async fn close_soon(close: impl Future<Output = ()>) {
    let _ = tokio::time::timeout(Duration::from_millis(100), close).await;
}

/// The client's side of one stream.
async fn ask(mut stream: Stream, plan: &Plan) {
    let id = stream.stream_id();
    for (number, &len) in (0..).zip(&plan.lengths) {
        send(&mut stream, &payload(Way::Request, id, number, len)).await;
        if plan.one_way {
            continue;
        }
        let reply = stream.read_exact_bytes(len).await.unwrap();
        check(&reply, Way::Reply, id, number);
        drop(reply);
        // The slice of the reply becomes that of the next request, as the crate advises.
        stream.release_read_and_reuse();
    }
    stream.close().await.unwrap();
}

async fn send(stream: &mut Stream, bytes: &[u8]) {
    assert_eq!(stream.write_bytes(bytes).unwrap(), bytes.len());
    stream.flush(true).await.unwrap();
}
