// SPDX-License-Identifier: MIT OR Apache-2.0
//! The examples as the programs they are: processes that echo, get killed, and clean up.
//!
//! `cargo test` builds the examples before; `cargo test --test examples` alone does not.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;

use support::process::{LONG, Process, shared_memory_files, until};

mod support {
    pub(crate) mod process;
}

/// What the clients give themselves: less, so that their own words arrive.
const CLIENT_TIMEOUT: &str = "80";

fn remove_shared_memory_files(pid: Pid) {
    for name in shared_memory_files(pid) {
        fs::remove_file(Path::new("/dev/shm").join(name)).unwrap();
    }
}

/// An echo server, and how clients reach it.
struct Server {
    process: Process,
    address: [String; 2],
}

impl Server {
    fn unix() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("shmipc-examples-{}-{number}.sock", std::process::id());
        let path = std::env::temp_dir().join(name);
        Self::start("--socket", path.to_str().unwrap())
    }

    fn tcp() -> Self {
        Self::start("--tcp", "127.0.0.1:0")
    }

    fn start(option: &str, address: &str) -> Self {
        let mut process = Process::start("echo_server", &[option, address]);
        let line = process.line_with("listening on ");
        let address = line.strip_prefix("listening on ").unwrap();
        Self { process, address: [option.into(), address.into()] }
    }

    fn path(&self) -> &Path {
        Path::new(&self.address[1])
    }

    fn client(&self, arguments: &str) -> Process {
        let mut all: Vec<&str> = self.address.iter().map(String::as_str).collect();
        all.extend(["--timeout", CLIENT_TIMEOUT]);
        all.extend(arguments.split_whitespace());
        Process::start("echo_client", &all)
    }

    /// Runs a client to its end. Gives what it reports, after the checks that hold for every run.
    fn echo(&self, size: u64, count: u64, streams: u64, arguments: &str) -> Value {
        let arguments = format!("--size {size} --count {count} --streams {streams} {arguments}");
        let mut client = self.client(&arguments);
        let (status, output) = client.end();
        let report = json(&output);
        assert!(status.success(), "{arguments}: {status}: {report}");
        assert_eq!(report["ok"], true, "{arguments}: {report}");
        assert_eq!(report["count"], count, "{arguments}: {report}");
        assert_eq!(report["bytes"], size * count, "{arguments}: {report}");
        assert_eq!(report["streams"], streams, "{arguments}: {report}");
        assert_eq!(report["pool_full"], true, "{arguments}: {report}");
        assert_eq!(shared_memory_files(client.pid()), [""; 0], "{arguments}");
        report
    }

    /// What the server says about the next session that ends.
    fn session_end(&mut self) -> Value {
        json(&self.process.line_with("session_end"))
    }

    /// Ends the server with a signal, as an administrator would.
    fn stop(mut self, signal: Signal) {
        self.process.signal(signal);
        let (status, _) = self.process.end();
        assert!(status.success(), "{status}; stderr: {:#?}", self.process.seen);
        assert!(!self.path().exists(), "the socket is left");
        assert_eq!(shared_memory_files(self.process.pid()), [""; 0]);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that is killed, in a test or by the failure of one, leaves its socket.
        if self.path().is_absolute() {
            let _ = fs::remove_file(self.path());
        }
    }
}

fn json(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
}

/// All sizes over one way of connecting, and the same again on both ends' books.
fn echo_all_sizes(mut server: Server, arguments: &str, protocol: u64) {
    for (size, count) in [(1, 2000), (64, 2000), (4096, 1000), (100_000, 200), (1 << 20, 30)] {
        let report = server.echo(size, count, 1, arguments);
        assert_eq!(report["protocol"], protocol, "{report}");
        let end = server.session_end();
        assert_eq!(end["pool_full"], true, "{end}");
        // With a whole pool for one stream at a time, nothing needs the socket.
        assert_eq!(report["fallback"], 0, "{report}");
        assert_eq!(end["bytes_received"], size * count, "{end}");
        assert_eq!(end["bytes_sent"], size * count, "{end}");
    }
    server.stop(Signal::SIGTERM);
}

#[test]
fn version_3_by_descriptor() {
    echo_all_sizes(Server::unix(), "--memory memfd --protocol 3", 3);
}

#[test]
fn version_3_by_file() {
    echo_all_sizes(Server::unix(), "--memory file --protocol 3", 3);
}

#[test]
fn version_2_by_file() {
    echo_all_sizes(Server::unix(), "--memory file --protocol 2", 2);
}

#[test]
fn tcp_by_file() {
    echo_all_sizes(Server::tcp(), "", 3);
    echo_all_sizes(Server::tcp(), "--protocol 2", 2);
}

/// What a client asks for, by memory and wake-up, and what both sides then say it is.
const VERSION_4: [(&str, &str, &str); 5] = [
    ("memfd", "socket", "socket"),
    ("memfd", "eventfd", "eventfd"),
    ("memfd", "polling:200", "polling:200"),
    ("file", "socket", "socket"),
    ("file", "polling:200", "polling:200"),
];

#[test]
fn version_4_with_every_wake_up() {
    for (memory, wakeup, due) in VERSION_4 {
        let mut server = Server::unix();
        let arguments = format!("--memory {memory} --protocol 4 --wakeup {wakeup}");
        for (size, count, streams) in [(1, 500, 1), (4096, 1000, 16), (100_000, 100, 4)] {
            let report = server.echo(size, count, streams, &arguments);
            let end = server.session_end();
            for side in [&report, &end] {
                assert_eq!(side["protocol"], 4, "{side}");
                assert_eq!(side["wakeup"], due, "{side}");
                assert_eq!(side["single_popper_lists"], true, "{side}");
                assert_eq!(side["pool_full"], true, "{side}");
                if due.starts_with("polling") {
                    assert_eq!(side["sync_sent"], 0, "{side}");
                    assert_eq!(side["sync_received"], 0, "{side}");
                }
            }
            assert_eq!(report["fallback"], 0, "{report}");
            assert_eq!(end["bytes_received"], size * count, "{end}");
        }
        // The default wake-up, and a memory too small for lists of their own.
        let report = server.echo(1 << 20, 8, 2, &format!("{arguments} --pool 1048576"));
        assert_eq!(report["single_popper_lists"], false, "{report}");
        assert_eq!(report["wakeup"], due, "{report}");
        server.stop(Signal::SIGTERM);
    }
    let mut server = Server::unix();
    for (protocol, wakeup) in [("", "socket"), ("--protocol 4", "socket")] {
        let report = server.echo(64, 100, 1, protocol);
        assert_eq!(report["wakeup"], wakeup, "{report}");
        assert_eq!(report["single_popper_lists"], !protocol.is_empty(), "{report}");
        server.session_end();
    }
    server.stop(Signal::SIGTERM);
}

#[test]
fn version_4_over_tcp() {
    let mut server = Server::tcp();
    for wakeup in ["socket", "polling:200"] {
        let report = server.echo(4096, 300, 4, &format!("--protocol 4 --wakeup {wakeup}"));
        assert_eq!((&report["protocol"], &report["wakeup"]), (&4.into(), &wakeup.into()));
        assert_eq!(server.session_end()["wakeup"], wakeup);
    }
    server.stop(Signal::SIGTERM);
}

#[test]
fn many_streams_at_the_same_time() {
    let server = Server::unix();
    server.echo(64, 64_000, 64, "");
    // More streams than the queue has room for events, and a share that does not come out even.
    let report = server.echo(5000, 10_007, 64, "--queue 16");
    assert_eq!(report["bytes_sent"], report["bytes_received"], "{report}");
    server.stop(Signal::SIGINT);
}

#[test]
fn a_fresh_stream_for_every_message() {
    let mut server = Server::unix();
    let report = server.echo(64, 10_000, 1, "--reopen");
    // Each stream costs its data and its close.
    assert_eq!(report["events_sent"], 20_000, "{report}");
    assert_eq!(server.session_end()["held"], 0);
    server.stop(Signal::SIGTERM);
}

#[test]
fn a_message_larger_than_pool_and_socket_together() {
    let server = Server::unix();
    server.echo(16 << 20, 3, 1, "--pool 1048576");
    server.stop(Signal::SIGTERM);
}

#[test]
fn a_pool_that_is_much_too_small() {
    let mut server = Server::unix();
    let report = server.echo(1 << 20, 80, 8, "--pool 1048576");
    assert!(report["fallback"].as_u64().unwrap() > 0, "{report}");
    assert_eq!(server.session_end()["pool_full"], true);
    // Again with a pool that is large enough, to see that the server has kept nothing of it.
    let report = server.echo(4096, 1000, 8, "");
    assert_eq!(report["fallback"], 0, "{report}");
    server.stop(Signal::SIGTERM);
}

#[test]
fn several_clients_at_the_same_time() {
    let server = Server::unix();
    let kinds = ["--memory memfd", "--memory file", "--memory file --protocol 2"];
    let mut clients = kinds.map(|kind| server.client(&format!("--size 3000 --count 3000 {kind}")));
    for client in &mut clients {
        let (status, output) = client.end();
        assert!(status.success(), "{output}");
    }
    for client in &clients {
        assert_eq!(shared_memory_files(client.pid()), [""; 0]);
    }
    server.stop(Signal::SIGTERM);
}

/// Kills clients until one of them had traffic. How soon that is, nobody knows: a kill that came
/// too early is repeated, later.
#[test]
fn a_client_killed_in_mid_traffic_disturbs_nobody() {
    let server = Server::unix();
    for memory in ["memfd", "file"] {
        let mut pause = Duration::from_millis(100);
        loop {
            let arguments = format!("--size 5000 --streams 8 --count 1000000000 --memory {memory}");
            let mut client = server.client(&arguments);
            thread::sleep(pause);
            assert!(client.child.try_wait().unwrap().is_none(), "the client ended by itself");
            client.signal(Signal::SIGKILL);
            client.end();
            // One that died before it was connected has no session, and its files, if it had made
            // them already, nobody to remove them.
            let line = server.process.lines.recv_timeout(pause.max(Duration::from_secs(1)));
            let line = line.ok().filter(|line| line.contains("session_end"));
            let events = line.map_or(0, |line| json(&line)["events_received"].as_u64().unwrap());
            if events > 0 {
                assert_eq!(shared_memory_files(client.pid()), [""; 0]);
                break;
            }
            remove_shared_memory_files(client.pid());
            assert!(pause < LONG / 4, "no client ever gets to sending");
            pause *= 2;
        }
    }
    server.echo(4096, 1000, 4, "");
    server.stop(Signal::SIGTERM);
}

#[test]
fn a_server_killed_in_mid_traffic_ends_its_clients() {
    for (signal, memory) in [(Signal::SIGKILL, "memfd"), (Signal::SIGTERM, "file")] {
        let mut pause = Duration::from_millis(100);
        loop {
            let mut server = Server::unix();
            let arguments = format!("--count 1000000000 --streams 8 --memory {memory}");
            let mut client = server.client(&arguments);
            thread::sleep(pause);
            server.process.signal(signal);
            let (status, output) = client.end();
            let report = json(&output);
            assert_eq!(status.code(), Some(1), "{report}");
            assert_eq!(report["ok"], false, "{report}");
            let error = report["error"].as_str().unwrap();
            assert!(!error.contains("not done after"), "{report}");
            assert!(!error.contains("hangs"), "{report}");
            server.process.end();
            assert_eq!(shared_memory_files(client.pid()), [""; 0]);
            if report["done"].as_u64().unwrap() > 0 {
                break;
            }
            assert!(pause < LONG / 4, "no client ever gets to sending");
            pause *= 2;
        }
    }
}

#[test]
fn peers_that_speak_something_else_are_refused_by_name() {
    let mut server = Server::unix();
    let mut peer = UnixStream::connect(server.path()).unwrap();
    peer.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let line = server.process.line_with("refused: ");
    assert!(line.contains("magic"), "{line}");
    server.echo(64, 100, 1, "");
    server.stop(Signal::SIGTERM);
}

#[test]
fn a_wrong_byte_is_noticed() {
    let name = format!("shmipc-examples-{}-liar.sock", std::process::id());
    let path = std::env::temp_dir().join(name);
    let liar = Liar::start(&path, 123_456);
    let address = ["--socket", path.to_str().unwrap(), "--timeout", CLIENT_TIMEOUT];
    let run = |more: &[&str]| {
        let arguments = [&address[..], &["--size", "1000", "--count", "200"], more].concat();
        let (status, output) = Process::start("echo_client", &arguments).end();
        (status.code(), json(&output))
    };
    let (status, report) = run(&[]);
    assert_eq!(status, Some(1), "{report}");
    let error = report["error"].as_str().unwrap();
    assert!(error.contains("message 123: byte 456 is"), "{report}");
    // Asked not to look, it does not; otherwise something else was noticed above.
    let (status, report) = run(&["--no-verify"]);
    assert_eq!(status, Some(0), "{report}");
    liar.stop();
}

/// A server that changes one byte of every stream.
struct Liar {
    stop: mpsc::Sender<()>,
    thread: thread::JoinHandle<()>,
}

impl Liar {
    fn start(path: &Path, at: usize) -> Self {
        let (stop, stopped) = mpsc::channel();
        let (ready, is_ready) = mpsc::channel();
        let path = path.to_owned();
        let thread = thread::spawn(move || {
            let executor = glommio::LocalExecutorBuilder::default().make().unwrap();
            executor.run(async move {
                let config = shmipc_glommio::Config::default();
                let listener = shmipc_glommio::Listener::bind(path, config).unwrap();
                ready.send(()).unwrap();
                let lying = glommio::spawn_local(lie(listener, at));
                while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                    glommio::timer::sleep(Duration::from_millis(5)).await;
                }
                // Takes the listener along, and with it the socket.
                lying.cancel().await;
            });
        });
        is_ready.recv_timeout(LONG).unwrap();
        Self { stop, thread }
    }

    fn stop(self) {
        drop(self.stop);
        self.thread.join().unwrap();
    }
}

async fn lie(listener: shmipc_glommio::Listener, at: usize) -> shmipc_glommio::Result<()> {
    use futures_lite::{AsyncReadExt, AsyncWriteExt};
    loop {
        let session = listener.accept().await?;
        let mut stream = session.accept().await?;
        let mut buffer = [0; 4096];
        let mut position = 0;
        while let Ok(count @ 1..) = stream.read(&mut buffer).await {
            if (position..position + count).contains(&at) {
                buffer[at - position] ^= 4;
            }
            position += count;
            if stream.write_all(&buffer[..count]).await.is_err() {
                break;
            }
        }
    }
}

#[test]
fn wrong_arguments_end_with_2() {
    let socket = ["--socket", "/tmp/nobody-listens-here.sock"];
    let tcp = ["--tcp", "127.0.0.1:9"];
    let wrong: &[(&str, &[&str], &[&str])] = &[
        ("echo_server", &[], &[]),
        ("echo_server", &socket, &["--tcp", "127.0.0.1:0"]),
        ("echo_server", &["--tcp"], &["localhost"]),
        ("echo_server", &socket, &["--nonsense"]),
        ("echo_client", &[], &[]),
        ("echo_client", &socket, &["--size", "0"]),
        ("echo_client", &socket, &["--size", "-1"]),
        ("echo_client", &socket, &["--count", "many"]),
        ("echo_client", &socket, &["--count"]),
        ("echo_client", &socket, &["--streams", "0"]),
        ("echo_client", &socket, &["--memory", "paper"]),
        ("echo_client", &socket, &["--protocol", "1"]),
        ("echo_client", &socket, &["--protocol", "5"]),
        ("echo_client", &socket, &["--wakeup", "eventfd"]),
        ("echo_client", &socket, &["--wakeup", "polling:200"]),
        ("echo_client", &socket, &["--protocol", "3", "--wakeup", "eventfd"]),
        ("echo_client", &socket, &["--protocol", "4", "--wakeup", "bell"]),
        ("echo_client", &socket, &["--protocol", "4", "--wakeup", "polling"]),
        ("echo_client", &socket, &["--protocol", "4", "--wakeup", "polling:"]),
        ("echo_client", &socket, &["--protocol", "4", "--wakeup", "polling:soon"]),
        ("echo_client", &socket, &["--protocol", "4", "--wakeup", "polling:-5"]),
        ("echo_client", &socket, &["--protocol", "4", "--wakeup", "polling:0"]),
        ("echo_client", &socket, &["--protocol", "4", "--wakeup", "polling:49"]),
        ("echo_client", &socket, &["--protocol", "4", "--wakeup", "polling:1000001"]),
        ("echo_client", &socket, &["--protocol", "4", "--wakeup", "socket:1"]),
        ("echo_client", &socket, &["--protocol", "4", "--wakeup", "eventfd", "--memory", "file"]),
        ("echo_client", &tcp, &["--protocol", "4", "--wakeup", "eventfd"]),
        ("echo_client", &socket, &["--protocol", "2", "--memory", "memfd"]),
        ("echo_client", &socket, &["--pool", "1048575"]),
        ("echo_client", &socket, &["--pool", "4294967296"]),
        ("echo_client", &socket, &["--queue", "24"]),
        ("echo_client", &socket, &["stray"]),
        ("echo_client", &tcp, &["--memory", "memfd"]),
        ("echo", &["--slow"], &[]),
    ];
    for (example, address, arguments) in wrong {
        let arguments = [*address, *arguments].concat();
        let mut process = Process::start(example, &arguments);
        let (status, output) = process.end();
        assert_eq!(status.code(), Some(2), "{example} {arguments:?}");
        assert_eq!(output, "", "{example} {arguments:?}");
        process.line_with("error: ");
    }
    // Nothing wrong with these but that nobody listens.
    for address in [socket, tcp] {
        let (status, output) = Process::start("echo_client", &address).end();
        assert_eq!(status.code(), Some(1), "{output}");
        assert_eq!(json(&output)["ok"], false, "{output}");
    }
}

#[test]
fn requests_get_their_answers() {
    let mut process = Process::start("request_response", &[]);
    let (status, output) = process.end();
    assert!(status.success(), "{status}: {output}");
    let lines: Vec<&str> = output.lines().collect();
    // It compares every answer with what it must be, and ends with 1 at the first that is not.
    assert!(lines[0].starts_with("4800 calls on 8 streams answered in "), "{output}");
    assert_eq!(lines[1..], ["operation 42 refused"], "{output}");
    let socket = format!("request-response-{}.sock", process.pid());
    assert!(!std::env::temp_dir().join(socket).exists(), "the socket is left");
    assert_eq!(shared_memory_files(process.pid()), [""; 0]);
}

#[test]
fn the_comparison_runs_and_leaves_nothing() {
    let mut echo = Process::start("echo", &["--quick"]);
    let (status, output) = echo.end();
    assert!(status.success(), "{output}");
    for row in ["64 B |", "1 KiB |", "256 KiB |", "4 MiB |", "64 B, one of 64 |"] {
        assert!(output.contains(row), "no row with {row:?}: {output}");
    }
    assert!(!comparison_directory(echo.pid()).exists());
}

#[test]
fn the_comparison_killed_takes_its_children_along() {
    let mut echo = Process::start("echo", &[]);
    let directory = comparison_directory(echo.pid());
    until("the server listens", || directory.join("shmipc.sock").exists());
    let children = children(echo.pid());
    assert!(!children.is_empty());
    echo.signal(Signal::SIGKILL);
    echo.end();
    until("the files are gone", || !directory.exists());
    until("the children are gone", || children.iter().all(|&child| is_gone(child)));
}

fn comparison_directory(pid: Pid) -> PathBuf {
    std::env::temp_dir().join(format!("shmipc-echo-{pid}"))
}

fn children(of: Pid) -> Vec<Pid> {
    let text = fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap();
    let numbers = text.split_whitespace().map(|word| word.parse().unwrap());
    numbers.map(Pid::from_raw).collect()
}

/// Whether a process has ended; one that nobody has waited for yet counts.
fn is_gone(pid: Pid) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.rsplit(')').next().unwrap().trim_start().starts_with('Z'),
        Err(_) => true,
    }
}

#[test]
fn the_readme_shows_the_example_that_is_compiled() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let code = readme.split("```rust\n").nth(1).expect("the README has an example");
    let code = code.split("```").next().unwrap();
    let example = fs::read_to_string(root.join("examples/hello.rs")).unwrap();
    // The example's own head says what it is, which the README says around it.
    let example = example.split_once("\n\n").unwrap().1;
    // What prints, the program has from the other examples: it answers `-h`, too.
    let shown = |text: &str| text.split_once("fn main").unwrap().0.to_owned();
    assert_eq!(shown(code), shown(example));
    let (status, output) = Process::start("hello", &[]).end();
    assert!(status.success());
    assert_eq!(output, "hello\n");
}
