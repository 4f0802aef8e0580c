// SPDX-License-Identifier: MIT OR Apache-2.0
//! The key-value client against servers that are right, and against some that are not.
//!
//! `cargo test` builds the examples before; `cargo test --test kv_client` alone does not.

#[path = "support/responder/mod.rs"]
mod responder;
#[allow(unreachable_pub, reason = "client and server have it, too")]
#[path = "../kv_server/kv/slots.rs"]
mod slots;

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use shmipc_glommio::{Config, ProtocolVersion, Spin};

use responder::store::{Fault, SharedStore};
use responder::{IsMine, Shards, Wrong};
use slots::shard_of;

/// The longest that anything here may take on a machine that is busy with other things. Nothing
/// passes or fails by how fast it is within that.
const LONG: Duration = Duration::from_secs(100);
/// What clients give a server that should answer.
const PATIENCE: &str = "--timeout 60";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Shm,
    Unix,
    Tcp,
}

const ALL: [Transport; 3] = [Transport::Shm, Transport::Unix, Transport::Tcp];

/// A server in this process, and how a client reaches it.
struct Server {
    address: String,
    store: SharedStore,
    /// The directory of its sockets.
    directory: PathBuf,
    _shards: Option<Shards>,
}

impl Server {
    fn right(transport: Transport) -> Self {
        Self::start(transport, None)
    }

    fn start(transport: Transport, wrong: Wrong) -> Self {
        let (store, directory) = (SharedStore::default(), directory());
        let path = directory.join("kv.sock");
        let mut shards = None;
        let address = match transport {
            Transport::Shm => {
                let both: [IsMine; 2] = [|key| shard_of(key, 2) == 0, |key| shard_of(key, 2) == 1];
                let numbered = |number| directory.join(format!("kv.sock.{number}"));
                let at = (0..2).map(|number| (numbered(number), both[number]));
                let config = Config::default();
                shards = Some(Shards::start(&config, at.collect(), &store, wrong));
                format!("--shm {}", path.display())
            }
            Transport::Unix => {
                responder::unix(&path, &store, wrong);
                format!("--unix {}", path.display())
            }
            Transport::Tcp => format!("--tcp {}", responder::tcp(&store, wrong)),
        };
        Self { address, store, directory, _shards: shards }
    }

    /// A server that has one shard at the path itself, and version 3, as foreign ones do. It never
    /// polls.
    fn foreign() -> Self {
        let (store, directory) = (SharedStore::default(), directory());
        let path = directory.join("kv.sock");
        let address = format!("--shm {}", path.display());
        let config = Config::builder().max_accepted_protocol(ProtocolVersion::V3).spin(Spin::Never);
        let config = config.build().unwrap();
        let shards = Shards::start(&config, vec![(path, |_| true)], &store, None);
        Self { address, store, directory, _shards: Some(shards) }
    }

    /// Runs a client that should be content, and checks what holds for every report.
    fn measure(&self, requests: u64, arguments: &str) -> Value {
        let arguments = format!("{} --requests {requests} {PATIENCE} {arguments}", self.address);
        let (status, report) = client(&arguments);
        assert_eq!((status, &report["ok"]), (Some(0), &true.into()), "{arguments}: {report}");
        assert_eq!(report["requests"], requests, "{arguments}: {report}");
        assert_eq!(report["errors"], 0, "{arguments}: {report}");
        let figures = ["p50_ns", "p90_ns", "p99_ns", "p999_ns", "max_ns"];
        let figures = figures.map(|name| report[name].as_u64().unwrap());
        assert!(figures[0] > 0 && figures.is_sorted(), "{arguments}: {report}");
        assert!(report["seconds"].as_f64().unwrap() > 0.0, "{arguments}: {report}");
        let cpu = ["client_cpu_ns_per_request", "server_cpu_ns_per_request", "cpu_ns_per_request"];
        let [client, server, both] = cpu.map(|name| report[name].as_f64().unwrap());
        assert!((client + server - both).abs() < 1.0, "{arguments}: {report}");
        report
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn directory() -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("shmipc-kv-client-{}-{number}", std::process::id());
    let directory = std::env::temp_dir().join(name);
    fs::create_dir(&directory).unwrap();
    directory
}

/// A child process that does not outlive its test.
struct Process(Child);

impl Process {
    /// Starts the client. It has a word to say on stderr only if it was called wrongly.
    fn client(arguments: &str) -> Self {
        let child = Command::new(example_path("kv_client"))
            .args(arguments.split_whitespace())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// Waits for the end. Gives the status, and what was written to stdout and stderr.
    fn end(mut self) -> (Option<i32>, String, String) {
        let deadline = Instant::now() + LONG;
        let status = loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            thread::sleep(Duration::from_millis(5));
        };
        let (mut output, mut errors) = (String::new(), String::new());
        self.0.stdout.take().unwrap().read_to_string(&mut output).unwrap();
        self.0.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
        (status.code(), output, errors)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn client(arguments: &str) -> (Option<i32>, Value) {
    let (status, output, errors) = Process::client(arguments).end();
    let report = serde_json::from_str(&output);
    (status, report.unwrap_or_else(|error| panic!("{arguments}: {error}: {output:?} {errors:?}")))
}

fn example_path(name: &str) -> PathBuf {
    // target/<profile>/deps/kv_client-<hash>
    let this = std::env::current_exe().unwrap();
    let profile = this.parent().unwrap().parent().unwrap();
    let places = [profile.join(name), profile.join("examples").join(name)];
    let path = places.into_iter().find(|path| path.exists());
    path.unwrap_or_else(|| panic!("{name} is missing: cargo build --bins --examples"))
}

/// What a run leaves in the store, and how often it has read and written.
type Traces = (HashMap<Vec<u8>, Vec<u8>>, u64, u64);

/// All transports ask for the same.
fn same_everywhere(value: usize, depth: usize, requests: u64, keys: usize) {
    let mut first: Option<Traces> = None;
    for transport in ALL {
        let server = Server::right(transport);
        let arguments = format!("--value {value} --depth {depth} --keys {keys} --reads 60");
        let report = server.measure(requests, &arguments);
        let shards = if transport == Transport::Shm { 2.into() } else { Value::Null };
        assert_eq!(report["shards"], shards, "{report}");
        assert_eq!((&report["value"], &report["depth"]), (&value.into(), &depth.into()));
        let store = server.store.lock().unwrap();
        assert_eq!(store.map.len(), keys);
        assert!(store.map.values().all(|stored| stored.len() == value));
        assert_eq!(store.gets + store.sets, requests + keys as u64);
        let traces = (store.map.clone(), store.gets, store.sets);
        match &first {
            None => first = Some(traces),
            Some(first) => assert!(*first == traces, "{transport:?} differs from {:?}", ALL[0]),
        }
    }
}

#[test]
fn one_request_at_a_time() {
    for (value, requests) in [(0, 300), (1, 300), (64, 3000), (4096, 1000)] {
        same_everywhere(value, 1, requests, 50);
    }
}

#[test]
fn many_requests_at_a_time() {
    for (value, requests) in [(0, 300), (1, 300), (64, 30_000), (4096, 3000), (30_000, 1000)] {
        same_everywhere(value, 16, requests, 50);
    }
}

/// The server writes while it does not read, so nobody would move if the client did the same.
#[test]
fn large_values_both_ways() {
    same_everywhere(1 << 20, 1, 20, 6);
    same_everywhere(1 << 20, 16, 100, 20);
}

#[test]
fn a_foreign_server_has_one_shard() {
    let server = Server::foreign();
    let report = server.measure(3000, "--depth 4 --connections 3 --spin 0");
    assert_eq!(report["shards"], 1, "{report}");
    assert_eq!((&report["protocol"], &report["wakeup"]), (&3.into(), &"socket".into()), "{report}");
    for name in ["sync_events_sent", "fallback_sent", "fallback_received", "queue_full"] {
        assert!(report[name].is_u64(), "{name}: {report}");
    }
    // Nobody polls here, so somebody has to wake the server.
    assert!(report["sync_events_sent"].as_u64().unwrap() > 0, "{report}");
}

#[test]
fn what_is_agreed_on_is_reported() {
    let server = Server::right(Transport::Shm);
    let cases = [
        ("", 4, "eventfd"),
        ("--protocol 3", 3, "socket"),
        ("--wakeup socket", 4, "socket"),
        ("--protocol 4 --wakeup polling:200", 4, "polling:200"),
    ];
    for (arguments, protocol, wakeup) in cases {
        let report = server.measure(200, arguments);
        assert_eq!(report["protocol"], protocol, "{arguments}: {report}");
        assert_eq!(report["wakeup"], wakeup, "{arguments}: {report}");
    }
    let report = Server::right(Transport::Unix).measure(200, "");
    assert!(report["protocol"].is_null() && report["wakeup"].is_null(), "{report}");
}

#[test]
fn connections_share_the_work() {
    for transport in ALL {
        let server = Server::right(transport);
        let arguments = "--connections 5 --threads 2 --depth 3 --keys 20 --warmup 104 --reads 100";
        server.measure(1003, arguments);
        let store = server.store.lock().unwrap();
        assert_eq!((store.map.len(), store.sets, store.gets), (100, 100, 1003 + 104));
        let of_last = store.map.keys().filter(|key| key.starts_with(b"0004:")).count();
        assert_eq!(of_last, 20);
    }
}

#[test]
fn the_seed_decides() {
    let run = |arguments: &str| {
        let server = Server::right(Transport::Unix);
        server.measure(500, arguments);
        let store = server.store.lock().unwrap();
        (store.map.clone(), store.gets)
    };
    assert!(run("--seed 7") == run("--seed 7"));
    assert!(run("--seed 7") != run("--seed 8"));
    let (_, gets) = run("--reads 0");
    assert_eq!(gets, 0);
}

#[test]
fn requests_come_at_their_rate() {
    for transport in ALL {
        let server = Server::right(transport);
        for (tick, micros) in [("", 1000), ("--tick 0", 0), ("--tick 7000", 7000)] {
            let arguments = format!("--rate 2000 --connections 2 --depth 8 --keys 10 {tick}");
            let report = server.measure(400, &arguments);
            // The last one is due that late; how much later it is sent is for nobody to say.
            assert!(report["seconds"].as_f64().unwrap() > 399.0 / 2000.0 - 1e-6, "{report}");
            assert_eq!(report["rate"], 2000.0, "{report}");
            assert_eq!(report["tick_us"], micros, "{report}");
        }
    }
}

#[test]
fn a_server_that_does_not_tell_its_processor_time() {
    for transport in ALL {
        let server = Server::start(transport, Some((Fault::NoInfo, 1)));
        let arguments = format!("{} --requests 100 --keys 10 {PATIENCE}", server.address);
        let (status, report) = client(&arguments);
        assert_eq!(status, Some(0), "{report}");
        assert!(report["client_cpu_ns_per_request"].is_f64(), "{report}");
        for name in ["server_cpu_ns_per_request", "cpu_ns_per_request"] {
            assert!(report[name].is_null(), "{report}");
        }
    }
}

/// A server that does something wrong at the 30th request of a connection, behind 10 SETs over a
/// socket and fewer over one of two streams. Gives what the client says.
fn complaint(transport: Transport, fault: Fault, arguments: &str) -> String {
    let server = Server::start(transport, Some((fault, 30)));
    let arguments = format!("{} --requests 1000 --keys 10 {arguments}", server.address);
    let (status, report) = client(&arguments);
    assert_eq!(status, Some(1), "{transport:?} {fault:?}: {report}");
    assert_eq!(report["ok"], false, "{transport:?} {fault:?}: {report}");
    report["error"].as_str().unwrap().to_owned()
}

#[test]
fn wrong_answers_are_named() {
    let cases = [
        (Fault::Flip, "", "GET 0000:0000000"),
        (Fault::Flip, "--value 20000", "byte 19999 of 20000 bytes of version 1 to be 0x"),
        (Fault::Flip, "--value 1", "byte 0 of 1 bytes of version 1 to be 0x"),
        (Fault::Forget, "", "expected 64 bytes of version 1, got \"$-1\\r\\n"),
        (Fault::Refuse, "", "the server said \"ERR out of order\""),
    ];
    for transport in ALL {
        for (fault, arguments, words) in cases {
            for depth in ["--depth 1", "--depth 16"] {
                let arguments = format!("--reads 100 {PATIENCE} {depth} {arguments}");
                let error = complaint(transport, fault, &arguments);
                assert!(error.contains(words), "{transport:?} {fault:?} {depth}: {error}");
                assert!(error.starts_with("GET 0000:"), "{error}");
            }
        }
        let arguments = format!("--reads 0 {PATIENCE}");
        let error = complaint(transport, Fault::Forget, &arguments);
        assert!(error.starts_with("SET 0000:"), "{error}");
        assert!(error.contains("expected +OK, got \"$-1\\r\\n"), "{error}");
    }
}

#[test]
fn answers_out_of_step_are_noticed() {
    for transport in ALL {
        // Nobody has asked for the second one; or it is taken for that to another request.
        for arguments in ["--depth 1 --reads 100", "--depth 16 --reads 50"] {
            let arguments = format!("{arguments} {PATIENCE}");
            let error = complaint(transport, Fault::Repeat, &arguments);
            let is_fitting =
                error.contains("nothing was asked, got \"$64") || error.contains(", got ");
            assert!(is_fitting, "{transport:?}: {error}");
        }
        // The ones behind it come in its place.
        let error = complaint(transport, Fault::Drop, &format!("--depth 16 {PATIENCE}"));
        assert!(error.contains("0000:0000000"), "{transport:?}: {error}");
    }
}

#[test]
fn a_server_that_does_not_answer_is_left() {
    for transport in ALL {
        let error = complaint(transport, Fault::Drop, "--depth 1 --timeout 1");
        assert_eq!(error, "connection 0: no answer for 1s, 1 under way", "{transport:?}");
    }
}

#[test]
fn a_server_that_goes_away_is_missed() {
    for transport in ALL {
        for depth in [1, 16] {
            let arguments = format!("--depth {depth} --connections 2 {PATIENCE}");
            let error = complaint(transport, Fault::Close, &arguments);
            let is_fitting = error.contains("the server closed the connection")
                || error.contains("Connection reset")
                || error.contains("Broken pipe")
                || error.contains("the peer closed the stream");
            assert!(is_fitting && error.contains("without an answer"), "{transport:?}: {error}");
        }
    }
}

#[test]
fn nobody_listens() {
    let directory = directory();
    let path = directory.join("nobody.sock");
    for address in [format!("--shm {}", path.display()), format!("--unix {}", path.display())] {
        let (status, report) = client(&address);
        assert_eq!(status, Some(1), "{report}");
        let error = report["error"].as_str().unwrap();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        let is_fitting = error.contains("No such file") || error.contains("no socket is there");
        assert!(is_fitting, "{error}");
    }
    let (status, report) = client("--tcp 127.0.0.1:9");
    assert_eq!(status, Some(1), "{report}");
    assert!(report["error"].as_str().unwrap().contains("127.0.0.1:9"), "{report}");
    fs::remove_dir(directory).unwrap();
}

#[test]
fn wrong_arguments_end_with_2() {
    let unix = "--unix /tmp/nobody-listens-here.sock";
    let wrong = [
        "--requests 5".to_owned(),
        format!("{unix} --tcp 127.0.0.1:9"),
        "--tcp nowhere".to_owned(),
    ];
    let options = [
        "--requests 0",
        "--requests",
        "--depth 0",
        "--value -1",
        "--value 536870913",
        "--connections 0",
        "--keys 0",
        "--reads 101",
        "--rate 0",
        "--rate nan",
        "--threads 2",
        "--cores one",
        "--threads 2 --connections 2 --cores 0",
        "--pool 16",
        "--timeout 0",
        "--nonsense 1",
        "stray",
    ];
    let wrong = wrong.into_iter().chain(options.map(|option| format!("{unix} {option}")));
    for arguments in wrong {
        let (status, output, errors) = Process::client(&arguments).end();
        assert_eq!((status, output.as_str()), (Some(2), ""), "{arguments}");
        assert!(errors.starts_with("error: "), "{arguments}: {errors}");
    }
    let (status, output, _) = Process::client("--help").end();
    assert_eq!(status, Some(0));
    assert!(output.contains("\nUsage: kv_client "), "{output}");
    assert!(!Path::new("/tmp/nobody-listens-here.sock").exists());
}
