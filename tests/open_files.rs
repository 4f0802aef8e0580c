// SPDX-License-Identifier: MIT OR Apache-2.0
//! A server at its limit of open files, and one with signals as programs have them that were not
//! written in Rust. Each is a process of its own: this program again, with an order.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use futures_lite::{AsyncReadExt, AsyncWriteExt};
use glommio::{LocalExecutorBuilder, Placement};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use shmipc_glommio::{Config, Connector, Listener, Session};

/// What a child is to do, and where it listens.
const ORDER: &str = "SHMIPC_TEST_OPEN_FILES";
/// Far above what anything here takes.
const LONG: Duration = Duration::from_secs(60);

/// A child, and what it says.
struct Server {
    child: Child,
    orders: ChildStdin,
    lines: Receiver<String>,
    path: PathBuf,
}

impl Server {
    fn start(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("shmipc-{test}-{}.sock", std::process::id()));
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env(ORDER, &path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let orders = child.stdin.take().unwrap();
        Self { child, orders, lines, path }
    }

    /// The rest of the next line with this in it.
    fn told(&self, what: &str) -> String {
        let start = Instant::now();
        loop {
            let line = self.lines.recv_timeout(LONG.saturating_sub(start.elapsed()));
            let line = line.unwrap_or_else(|error| panic!("{what}: {error}"));
            if let Some((_, rest)) = line.split_once(what) {
                return rest.trim().to_owned();
            }
        }
    }

    fn order(&mut self, what: &str) {
        writeln!(self.orders, "{what}").unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The numbers of the descriptors that are open. Fails when there is none left to look with.
fn open_files() -> std::io::Result<BTreeSet<u64>> {
    let names: Vec<OsString> =
        std::fs::read_dir("/proc/self/fd")?.map(|entry| entry.unwrap().file_name()).collect();
    // Behind the look at it, which took a number as well.
    let is_open = |number: &u64| std::fs::read_link(format!("/proc/self/fd/{number}")).is_ok();
    let numbers = names.iter().filter_map(|name| name.to_str().and_then(|name| name.parse().ok()));
    Ok(numbers.filter(is_open).collect())
}

/// The limit that leaves room for so many more: it is one of their numbers.
fn limit_with_room_for(spare: usize) -> u64 {
    let open = open_files().unwrap();
    let mut free = (0..).filter(|number| !open.contains(number));
    free.nth(spare).unwrap()
}

fn config() -> Config {
    Config::builder().buffer_size(1 << 20).queue_capacity(64).build().unwrap()
}

async fn echo_all(session: Session) {
    while let Ok(mut stream) = session.accept().await {
        let mut bytes = [0; 5];
        while stream.read_exact(&mut bytes).await.is_ok() {
            let _ = stream.write_all(&bytes).await;
        }
    }
}

/// The child: tells what it refuses, and how many files it has open when it is asked to.
fn serve(path: &Path) {
    let path = path.to_owned();
    let executor = LocalExecutorBuilder::new(Placement::Unbound).spawn(move || async move {
        let listener = Listener::bind(&path, config()).unwrap();
        listener.on_rejected(|error| println!("refused: {error}"));
        let (orders_there, orders) = mpsc::channel();
        std::thread::spawn(move || {
            let lines = std::io::stdin().lines().map_while(Result::ok);
            lines.into_iter().for_each(|line| orders_there.send(line).unwrap());
            std::process::exit(0);
        });
        glommio::spawn_local(async move {
            while let Ok(session) = listener.accept().await {
                glommio::spawn_local(echo_all(session)).detach();
            }
        })
        .detach();
        loop {
            glommio::timer::sleep(Duration::from_millis(2)).await;
            let Ok(order) = orders.try_recv() else { continue };
            match order.as_str() {
                // Below the count of open files one more descriptor cannot be had to count them.
                // So it waits until what is passed to it is closed.
                "count" => loop {
                    if let Ok(open) = open_files() {
                        println!("open: {}", open.len());
                        break;
                    }
                    glommio::timer::sleep(Duration::from_millis(2)).await;
                },
                spare => {
                    let spare: usize = spare.parse().unwrap();
                    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
                    let limit = if spare == 0 { hard } else { limit_with_room_for(spare) };
                    setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
                    println!("limit: {limit}");
                }
            }
        }
    });
    executor.unwrap().join().unwrap();
}

fn honest_echo(path: &Path) -> Result<(), shmipc_glommio::Error> {
    let path = path.to_owned();
    let executor = LocalExecutorBuilder::new(Placement::Unbound).spawn(move || async move {
        let session = Connector::new(config()).connect(&path).await?;
        let mut stream = session.open_stream()?;
        stream.write_all(b"hello").await.unwrap();
        let mut answer = [0; 5];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"hello");
        session.close().await
    });
    executor.unwrap().join().unwrap()
}

fn message(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (8 + payload.len() as u32).to_be_bytes().to_vec();
    bytes.extend([0x77, 0x58, 3, kind]);
    bytes.extend(payload);
    bytes
}

/// A client that is honest until descriptors are due, and passes so many of them.
fn pass(path: &Path, count: usize) -> UnixStream {
    let mut socket = UnixStream::connect(path).unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    let mut answer = [0; 8];
    socket.write_all(&message(4, &[])).unwrap();
    socket.read_exact(&mut answer).unwrap();
    socket.write_all(&message(5, b"\0\x02/q\0\x02/b")).unwrap();
    socket.read_exact(&mut answer).unwrap();
    let memory = memfd_create(c"x", MFdFlags::MFD_CLOEXEC).unwrap();
    let raw: Vec<RawFd> = vec![memory.as_fd(); count].iter().map(BorrowedFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&raw)];
    let parts = [IoSlice::new(&[0])];
    sendmsg::<()>(socket.as_raw_fd(), &parts, &control, MsgFlags::empty(), None).unwrap();
    socket
}

#[test]
fn what_is_received_at_the_limit_of_open_files_is_owned_and_named() {
    if let Ok(path) = std::env::var(ORDER) {
        return serve(Path::new(&path));
    }
    let mut server =
        Server::start("what_is_received_at_the_limit_of_open_files_is_owned_and_named");
    server.order("count");
    let _ = server.told("open:");
    honest_echo(&server.path).unwrap();
    let at_rest = |server: &mut Server, most: Option<u64>| {
        let start = Instant::now();
        loop {
            server.order("count");
            let count: u64 = server.told("open:").parse().unwrap();
            if most.is_none_or(|most| count <= most) {
                return count;
            }
            assert!(start.elapsed() < LONG, "{count} files are open, there were {most:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    std::thread::sleep(Duration::from_millis(200));
    let before = at_rest(&mut server, None);
    // The connection, and one of the two memories.
    server.order("2");
    let limit = server.told("limit:");
    honest_echo(&server.path).unwrap_err();
    let refusal = server.told("refused:");
    assert!(refusal.contains("ulimit -n") && refusal.contains(&limit), "{refusal}");
    for _ in 0..5 {
        let mut socket = pass(&server.path, 253);
        let refusal = server.told("refused:");
        assert!(refusal.contains("ulimit -n"), "{refusal}");
        // A close with something unread is a reset.
        let _ = socket.read(&mut [0]);
    }
    // One more can be had to count them.
    assert_eq!(at_rest(&mut server, Some(before)), before);
    // No more is served while somebody has the last one, and everybody when there is room.
    let idle: Vec<_> = (0..4).map(|_| UnixStream::connect(&server.path).unwrap()).collect();
    server.told("refused: ");
    drop(idle);
    server.order("0");
    server.told("limit:");
    honest_echo(&server.path).unwrap();
    assert!(at_rest(&mut server, Some(before)) <= before);
}

/// The child sends to a peer that reads nothing until its socket is full, and then goes away.
#[test]
fn a_peer_that_goes_behind_a_full_socket_raises_no_sigpipe() {
    const MESSAGES: usize = 64;
    let name = "a_peer_that_goes_behind_a_full_socket_raises_no_sigpipe";
    if let Ok(path) = std::env::var(ORDER) {
        // SAFETY: the default, which needs no handler; Rust programs ignore the signal.
        unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl).unwrap() };
        let executor = LocalExecutorBuilder::new(Placement::Unbound).spawn(move || async move {
            let session = Connector::new(config()).connect(&path).await.unwrap();
            let mut stream = session.open_stream().unwrap();
            let sending = glommio::spawn_local(async move {
                for _ in 0..MESSAGES {
                    if stream.write_all(&[7; 256 << 10]).await.is_err() {
                        return;
                    }
                }
                // All went into the socket, which cannot be.
                println!("never full");
            });
            // What the memory does not take goes over the socket, which nobody reads.
            while session.stats().fallback_sent < 2 {
                glommio::timer::sleep(Duration::from_millis(2)).await;
            }
            glommio::timer::sleep(Duration::from_millis(100)).await;
            println!("full");
            session.closed().await;
            sending.await;
            println!("survived");
            std::process::exit(46);
        });
        executor.unwrap().join().unwrap();
        return;
    }
    let path = std::env::temp_dir().join(format!("shmipc-{name}-{}.sock", std::process::id()));
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let mut server = Server::start(name);
    let (mut socket, _) = listener.accept().unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    // Version 3, by memfd: what the client says, and the answers to it.
    let mut bytes = [0; 8];
    socket.read_exact(&mut bytes).unwrap();
    socket.write_all(&message(4, &[])).unwrap();
    socket.read_exact(&mut bytes).unwrap();
    let len = u32::from_be_bytes(bytes[..4].try_into().unwrap()) as usize;
    socket.read_exact(&mut vec![0; len - 8]).unwrap();
    socket.write_all(&message(7, &[])).unwrap();
    // The byte with the descriptors.
    socket.read_exact(&mut [0]).unwrap();
    socket.write_all(&message(6, &[])).unwrap();
    server.told("full");
    // It takes nothing more, and only then makes room: the next send finds that out, and nothing
    // that is received has told before.
    socket.shutdown(Shutdown::Read).unwrap();
    let mut rest = vec![0; 1 << 20];
    while matches!(socket.read(&mut rest), Ok(1..)) {}
    let status = server.child.wait().unwrap();
    assert_eq!((status.signal(), status.code()), (None, Some(46)), "13 is SIGPIPE");
}
