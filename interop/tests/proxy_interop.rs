// SPDX-License-Identifier: MIT OR Apache-2.0
//! The proxy between sockets and programs that use the crate `shmipc` 0.2.1, which knows neither
//! the end of one direction nor a reset: what becomes of their connections when one side ends.

use std::future::Future;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use shmipc::config::Config;
use shmipc::consts::MemMapType;
use shmipc::session::{SessionManager, SessionManagerConfig};
use shmipc::stream::Stream;
use shmipc::transport::{DefaultUnixConnect, DefaultUnixListen};
use shmipc::{Error, Listener};

use support::executor::SocketPath;
use support::process::{LONG, Process, until};
use support::proxy::{Proxy, Server, descriptors, reset};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod payload;
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod process;
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod proxy;
}

/// A time that does not come in these tests.
const NEVER: &str = "3600";

/// The kinds of sessions that the crate makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    Memfd,
    Version4,
}

const KINDS: [Kind; 3] = [Kind::File, Kind::Memfd, Kind::Version4];

fn config(kind: Kind, path: &SocketPath) -> Config {
    let mut config = Config::new();
    config.share_memory_buffer_cap = 8 << 20;
    // A name for the memory that no other test has.
    let name = path.as_str().rsplit('/').next().unwrap();
    config.share_memory_path_prefix = format!("/dev/shm/{name}");
    config.mem_map_type = match kind {
        Kind::File => MemMapType::MemMapTypeDevShmFile,
        Kind::Memfd | Kind::Version4 => MemMapType::MemMapTypeMemFd,
    };
    if kind == Kind::Version4 { config.with_v4() } else { config }
}

fn unix_address(path: &SocketPath) -> std::os::unix::net::SocketAddr {
    std::os::unix::net::SocketAddr::from_pathname(path.as_str()).unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

async fn send(stream: &mut Stream, bytes: &[u8]) -> Result<(), Error> {
    stream.write_bytes(bytes)?;
    stream.flush(false).await
}

/// Whatever takes this long does not come at all.
async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, future).await.unwrap_or_else(|_| panic!("never: {what}"))
}

/// A server of the crate. It answers each message with as many bytes, after a time.
struct TheirServer {
    runtime: Option<tokio::runtime::Runtime>,
    open: Arc<AtomicUsize>,
    seen: Arc<AtomicUsize>,
    path: SocketPath,
}

impl TheirServer {
    fn start(kind: Kind, delay: Duration) -> Self {
        let path = SocketPath::new();
        let runtime = runtime();
        let (open, seen) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (config, address) = (config(kind, &path), unix_address(&path));
        let listener = runtime.block_on(Listener::new(DefaultUnixListen, address, config));
        let mut listener = listener.unwrap();
        let counts = (Arc::clone(&open), Arc::clone(&seen));
        runtime.spawn(async move {
            while let Ok(stream) = listener.accept().await {
                counts.0.fetch_add(1, Ordering::Relaxed);
                counts.1.fetch_add(1, Ordering::Relaxed);
                let open = Arc::clone(&counts.0);
                tokio::spawn(async move {
                    answer(stream, delay).await;
                    open.fetch_sub(1, Ordering::Relaxed);
                });
            }
        });
        Self { runtime: Some(runtime), open, seen, path }
    }

    /// How many streams are open.
    fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    fn kill(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

/// Answers until the stream ends. An answer comes in two parts, with the time before each.
async fn answer(mut stream: Stream, delay: Duration) {
    while let Ok(request) = stream.read_chunk().await {
        let len = request.len();
        drop(request);
        stream.release_read_and_reuse();
        for part in [&vec![1; len - 1][..], &[2]] {
            tokio::time::sleep(delay).await;
            if !part.is_empty() && send(&mut stream, part).await.is_err() {
                return;
            }
        }
        // As a server that has nothing more to say after this.
        if len == 7 {
            break;
        }
    }
    stream.close().await.unwrap();
}

fn front(server: &TheirServer, listen: &str, options: &[&str]) -> Proxy {
    Proxy::start(listen, &format!("shm:{}", server.path.as_str()), options)
}

/// The descriptors of a process when nothing changes any more.
fn at_rest(proxy: &Process) -> usize {
    let mut before = descriptors(proxy);
    loop {
        thread::sleep(Duration::from_millis(200));
        let now = descriptors(proxy);
        if now == before {
            return now;
        }
        before = now;
    }
}

fn until_at_rest(proxy: &Process, rest: usize) {
    until("nothing is kept of those that are gone", || descriptors(proxy) == rest);
}

fn call(mut stream: impl Read + Write, len: usize) {
    stream.write_all(&vec![0; len]).unwrap();
    stream.read_exact(&mut vec![0; len]).unwrap();
}

#[test]
fn clients_that_call_once_and_go_leave_nothing_behind_at_a_server_of_the_crate() {
    for kind in KINDS {
        let server = TheirServer::start(kind, Duration::ZERO);
        let proxy = front(&server, "tcp:127.0.0.1:0", &["--half-close-timeout", "0.2"]);
        call(proxy.connect(), 5);
        until("the first is gone", || server.open() == 0);
        let rest = at_rest(&proxy.process);
        for round in 0..50 {
            let client = proxy.connect();
            call(&client, 100 + round);
            if round % 5 == 0 {
                // Some leave no doubt.
                reset(client);
            }
        }
        until("the server's streams have ended", || server.open() == 0);
        assert_eq!(server.seen.load(Ordering::Relaxed), 51, "{kind:?}");
        until_at_rest(&proxy.process, rest);
        let totals = proxy.stop();
        assert_eq!(totals["connections"], 51, "{kind:?}: {totals}");
        assert_eq!(totals["failed"], 10, "{kind:?}: {totals}");
    }
}

#[test]
fn a_client_that_has_finished_still_gets_an_answer_that_takes_its_time() {
    for kind in KINDS {
        let delay = Duration::from_millis(700);
        let server = TheirServer::start(kind, delay);
        // Longer than each part takes, and shorter than both.
        let proxy = front(&server, "tcp:127.0.0.1:0", &["--half-close-timeout", "1.1"]);
        let mut client = proxy.connect();
        client.write_all(&[0; 100]).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        assert_eq!((answer.len(), answer.last()), (100, Some(&2)), "{kind:?}");
        until("the stream has ended", || server.open() == 0);
        assert_eq!(proxy.stop()["failed"], 0);
    }
}

#[test]
fn a_client_that_hangs_up_ends_its_stream_at_once() {
    let server = TheirServer::start(Kind::Memfd, Duration::ZERO);
    let place = SocketPath::new();
    let listen = format!("unix:{}", place.as_str());
    let proxy = front(&server, &listen, &["--half-close-timeout", NEVER]);
    for _ in 0..10 {
        // In both directions, which a Unix socket tells from an end of one.
        call(UnixStream::connect(place.as_str()).unwrap(), 5);
        until("the stream has ended", || server.open() == 0);
    }
    // By a reset, behind the end of its own direction.
    let tcp = front(&server, "tcp:127.0.0.1:0", &["--half-close-timeout", NEVER]);
    let client = tcp.connect();
    call(&client, 5);
    client.shutdown(Shutdown::Write).unwrap();
    thread::sleep(Duration::from_millis(50));
    reset(client);
    until("the stream has ended", || server.open() == 0);
    assert_eq!(proxy.stop()["failed"], 0);
    assert_eq!(tcp.stop()["failed"], 0);
}

#[test]
fn a_server_of_the_crate_that_closes_ends_its_client_at_once() {
    let server = TheirServer::start(Kind::Memfd, Duration::ZERO);
    let proxy = front(&server, "tcp:127.0.0.1:0", &["--half-close-timeout", NEVER]);
    for _ in 0..10 {
        let client = proxy.connect();
        call(&client, 7);
        assert_eq!((&client).read(&mut [0]).unwrap(), 0, "more than the answer");
    }
    until("all have ended", || server.open() == 0);
    assert_eq!(proxy.stop()["failed"], 0);
}

#[test]
fn a_server_of_the_crate_that_dies_in_mid_answer_does_not_look_as_if_that_were_all() {
    let mut server = TheirServer::start(Kind::Memfd, Duration::from_millis(200));
    let proxy = front(&server, "tcp:127.0.0.1:0", &[]);
    let mut client = proxy.connect();
    client.write_all(&[0; 100]).unwrap();
    client.read_exact(&mut [0; 99]).unwrap();
    client.write_all(&[0; 100]).unwrap();
    server.kill();
    let error = client.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(proxy.stop()["failed"], 1);
}

/// A client of the crate, with one session.
struct TheirClient {
    manager: SessionManager<DefaultUnixConnect>,
}

impl TheirClient {
    async fn connect(kind: Kind, path: &SocketPath) -> Self {
        let config = SessionManagerConfig::new().with_config(config(kind, path));
        let config = config.with_session_num(1);
        let manager = SessionManager::new(config, DefaultUnixConnect, unix_address(path)).await;
        Self { manager: manager.unwrap() }
    }

    fn open(&self) -> Stream {
        self.manager.get_stream().unwrap()
    }
}

async fn ask(stream: &mut Stream, len: usize) -> Result<(), Error> {
    send(stream, &vec![0; len]).await?;
    let answer = in_time("an answer", stream.read_exact_bytes(len)).await?;
    drop(answer);
    stream.release_read_and_reuse();
    Ok(())
}

/// A proxy before a server of sockets, for clients of the crate.
fn back(server: &str, options: &[&str]) -> (Proxy, SocketPath) {
    let path = SocketPath::new();
    let proxy = Proxy::start(&format!("shm:{}", path.as_str()), server, options);
    (proxy, path)
}

/// An echo that counts its connections and notes how they end.
struct Echo {
    server: Server,
    open: Arc<AtomicUsize>,
    ends: std::sync::mpsc::Receiver<io::Result<()>>,
}

impl Echo {
    fn start() -> Self {
        let open = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&open);
        let (tell, ends) = std::sync::mpsc::channel();
        let tell = std::sync::Mutex::new(tell);
        let server = Server::tcp(move |stream| {
            counted.fetch_add(1, Ordering::Relaxed);
            let ended = support::proxy::echo(stream);
            counted.fetch_sub(1, Ordering::Relaxed);
            let _ = tell.lock().unwrap().send(ended);
            Ok(())
        });
        Self { server, open, ends }
    }

    fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }
}

#[test]
fn clients_of_the_crate_that_call_and_go_leave_nothing_behind() {
    for kind in KINDS {
        let echo = Echo::start();
        let (proxy, path) = back(&echo.server.address, &["--half-close-timeout", NEVER]);
        let runtime = runtime();
        let rest = runtime.block_on(async {
            let client = TheirClient::connect(kind, &path).await;
            let mut stream = client.open();
            ask(&mut stream, 100).await.unwrap();
            stream.close().await.unwrap();
            until("the first is gone", || echo.open() == 0);
            let rest = at_rest(&proxy.process);
            for round in 0..50 {
                let mut stream = client.open();
                ask(&mut stream, 100 + round).await.unwrap();
                stream.close().await.unwrap();
            }
            until("the server's connections have ended", || echo.open() == 0);
            until_at_rest(&proxy.process, rest);
            // As a pool of connections does when its program ends: nothing is said of the streams.
            for _ in 0..5 {
                let mut stream = client.open();
                ask(&mut stream, 100).await.unwrap();
                std::mem::forget(stream);
            }
            let _ = tokio::time::timeout(Duration::from_millis(100), client.manager.close()).await;
            rest
        });
        runtime.shutdown_background();
        until("the server's connections have ended", || echo.open() == 0);
        for _ in 0..56 {
            let end = echo.ends.recv_timeout(LONG).unwrap();
            assert!(end.is_ok(), "{kind:?}: a reset for an ordinary end");
        }
        // Without the session, too.
        until("nothing is left", || descriptors(&proxy.process) < rest);
        let totals = proxy.stop();
        assert_eq!(totals["connections"], 56, "{kind:?}: {totals}");
        assert_eq!(totals["failed"], 0, "{kind:?}: {totals}");
    }
}

#[test]
fn an_answer_behind_which_the_server_ends_comes_whole() {
    const LEN: usize = 3 << 20;
    let server = Server::tcp(|mut stream| {
        stream.read_exact(&mut [0; 100])?;
        // Its end is right behind it.
        stream.write_all(&vec![7; LEN])
    });
    for kind in KINDS {
        let (proxy, path) = back(&server.address, &["--half-close-timeout", NEVER]);
        runtime().block_on(async {
            for round in 0..5 {
                // The memory is the client's, and much smaller than the answer. Some of it goes
                // over the socket, after which the crate opens no stream for 30 seconds.
                let mut config = config(kind, &path);
                config.share_memory_buffer_cap = 1 << 20;
                config.share_memory_path_prefix += &format!("r{round}");
                let config = SessionManagerConfig::new().with_config(config).with_session_num(1);
                let address = unix_address(&path);
                let manager = SessionManager::new(config, DefaultUnixConnect, address).await;
                let manager = manager.unwrap();
                let mut stream = manager.get_stream().unwrap();
                send(&mut stream, &[0; 100]).await.unwrap();
                let mut len = 0;
                let end = loop {
                    match in_time("an answer", stream.read_chunk()).await {
                        Ok(part) => len += part.len(),
                        Err(end) => break end,
                    }
                    stream.release_read_and_reuse();
                };
                assert!(matches!(end, Error::EndOfStream), "{kind:?}: {end}");
                assert_eq!(len, LEN, "{kind:?}");
                stream.close().await.unwrap();
            }
        });
        let totals = proxy.stop();
        assert_eq!(totals["failed"], 0, "{kind:?}: {totals}");
        assert_eq!(totals["bytes_down"], 5 * LEN, "{kind:?}: {totals}");
    }
}

#[test]
fn a_client_of_the_crate_that_goes_in_mid_request_is_no_clean_end() {
    let (tell, ends) = std::sync::mpsc::channel();
    let tell = std::sync::Mutex::new(tell);
    let server = Server::tcp(move |mut stream| {
        stream.read_exact(&mut [0; 3027])?;
        let tell = tell.lock().unwrap();
        let _ = tell.send(None);
        let _ = tell.send(Some(stream.read(&mut [0])));
        Ok(())
    });
    let (proxy, path) = back(&server.address, &[]);
    let runtime = runtime();
    runtime.block_on(async {
        let client = TheirClient::connect(Kind::Memfd, &path).await;
        let mut stream = client.open();
        send(&mut stream, &[0; 3027]).await.unwrap();
        assert!(ends.recv_timeout(LONG).unwrap().is_none());
        std::mem::forget((stream, client));
    });
    runtime.shutdown_background();
    let end = ends.recv_timeout(LONG).unwrap().unwrap();
    assert!(end.is_err(), "a clean end after a part of the request");
    assert_eq!(proxy.stop()["failed"], 1);
}

#[test]
fn a_server_that_is_killed_in_mid_call_is_heard_of_at_once_and_the_next_call_is_served() {
    for (kind, resets) in KINDS.into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let options = ["--half-close-timeout", NEVER];
        let (proxy, path) = back(&format!("tcp:{address}"), &options);
        runtime().block_on(async {
            let client = TheirClient::connect(kind, &path).await;
            let mut stream = client.open();
            let calling = async {
                ask(&mut stream, 100).await.unwrap();
                let error = ask(&mut stream, 200).await.unwrap_err();
                assert!(matches!(error, Error::EndOfStream), "{error}");
            };
            let dying = serve_one_call_and_die(listener, resets);
            tokio::join!(calling, dying);
            // Nobody is there: heard of at once as well.
            stream.reuse().await;
            let mut stream = client.open();
            assert!(ask(&mut stream, 100).await.is_err());
            stream.reuse().await;
            // It has come back.
            let listener = rebind(address);
            tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (mut reader, mut writer) = stream.split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
            });
            let mut stream = client.open();
            ask(&mut stream, 100).await.unwrap();
            ask(&mut stream, 100).await.unwrap();
            stream.close().await.unwrap();
        });
        let totals = proxy.stop();
        assert_eq!(totals["unreachable"], 1, "{totals}");
        assert_eq!(totals["failed"], 1 + u64::from(resets), "{totals}");
    }
}

fn rebind(address: SocketAddr) -> tokio::net::TcpListener {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(address).unwrap();
    socket.listen(16).unwrap()
}

/// Answers one call, takes half of the next, and is gone.
async fn serve_one_call_and_die(listener: TcpListener, resets: bool) {
    let serving = move || {
        let (mut stream, _): (TcpStream, _) = listener.accept().unwrap();
        let mut request = [0; 100];
        stream.read_exact(&mut request).unwrap();
        stream.write_all(&request).unwrap();
        if resets {
            // With something unread.
            stream.read_exact(&mut [0; 1]).unwrap();
        } else {
            stream.read_exact(&mut [0; 200]).unwrap();
        }
    };
    tokio::task::spawn_blocking(serving).await.unwrap();
}
