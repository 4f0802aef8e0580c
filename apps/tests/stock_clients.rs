// SPDX-License-Identifier: MIT OR Apache-2.0
//! The key-value server and the proxy under the programs that everybody has: `redis-cli`,
//! `redis-benchmark` (Debian package `redis-tools`) and `curl`. One that is missing is a failure.
//!
//! Not part of `cargo test`, which needs nothing but Rust, a C compiler and git:
//!
//! ```text
//! cargo build --bins --examples
//! cargo test --features dev-stock-clients --test stock_clients
//! ```

#[path = "support/kv/mod.rs"]
#[allow(dead_code, reason = "not all of it is needed here")]
mod kv;
mod support {
    pub(crate) mod http;
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod payload;
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod process;
}

use std::fs;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::process::{Command, Output, Stdio};
use std::thread;

use kv::process::{Directory, Server};
use kv::steps;
use support::payload::{Way, payload};
use support::process::Process;

const MIB: usize = 1 << 20;

/// Runs a client to its end. Gives what it wrote to stdout.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let Output { status, stdout, stderr } = output.unwrap_or_else(|error| {
        panic!("{program}: {error}; install it: apt-get install redis-tools curl")
    });
    let stderr = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{program} {arguments:?}: {status}: {stderr}");
    String::from_utf8(stdout).unwrap()
}

/// How `redis-cli` and `redis-benchmark` find the two doors.
fn doors(server: &Server) -> [Vec<String>; 2] {
    let (host, port) = server.tcp.rsplit_once(':').unwrap();
    [vec!["-h".into(), host.into(), "-p".into(), port.into()], vec!["-s".into(), server.unix()]]
}

fn words<'a>(door: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
    door.iter().map(String::as_str).chain(more.iter().copied()).collect()
}

fn benchmark(door: &[String], arguments: &str, tests: usize) {
    let arguments: Vec<&str> = arguments.split(' ').collect();
    let said =
        run("redis-benchmark", &words(door, &[&["-q", "-P", "16"], &arguments[..]].concat()));
    assert!(!said.to_lowercase().contains("err"), "{arguments:?}: {said}");
    assert_eq!(said.matches("requests per second").count(), tests, "{said}");
}

#[test]
fn redis_cli_gets_the_answers_of_redis() {
    let server = Server::start(2);
    for door in doors(&server) {
        let cli = |command: &[&str]| run("redis-cli", &words(&door, command));
        steps::check(cli);
        cli(&["mset", "x1", "", "x2", "", "y1", "", "y2", ""]);
        let keys = cli(&["--scan", "--pattern", "x*"]);
        let mut keys: Vec<&str> = keys.lines().collect();
        keys.sort_unstable();
        assert_eq!(keys, ["x1", "x2"]);
        for (version, proto) in [("-2", "proto\n2\n"), ("-3", "proto 3\n")] {
            let hello = cli(&[version, "hello"]);
            assert!(hello.contains(proto), "{hello}");
            assert_eq!(cli(&[version, "mget", "nokey", "x1"]), "\n\n");
        }
        assert!(cli(&["info"]).contains("shard1:keys="));
    }
    server.stop();
}

#[test]
fn redis_benchmark_runs_without_an_error() {
    let server = Server::start(2);
    for door in doors(&server) {
        benchmark(&door, "-t ping,set,get,incr,mset -n 8000 -d 64", 6);
        benchmark(&door, "-t set,get,mset -n 8000 -r 1000 -d 64", 3);
        benchmark(&door, "-t set,get -n 96 -c 4 -d 1048576 -r 10", 2);
    }
    server.stop();
}

/// What the clients of Redis say about the store at a port.
fn try_store(port: &str) {
    let door = ["-p".to_owned(), port.to_owned()];
    let cli = |command: &[&str]| run("redis-cli", &words(&door, command));
    assert_eq!(cli(&["ping"]), "PONG\n");
    assert_eq!(cli(&["set", "greeting", "hello"]), "OK\n");
    assert_eq!(cli(&["get", "greeting"]), "hello\n");
    benchmark(&door, "-t ping,set,get,incr,mset -n 16000 -d 64 -r 1000", 6);
    benchmark(&door, "-t set,get -n 64 -c 4 -d 1048576 -r 10", 2);
}

/// Two proxies with a session between them. Gives them, and the port of TCP that leads in.
fn pair(directory: &Directory, to: &str) -> ([Process; 2], String) {
    let between = format!("shm:{}", directory.file("between"));
    let mut far = Process::start("proxy", &["--listen", &between, "--connect", to]);
    far.line_with("listening on ");
    let mut near = Process::start("proxy", &["--listen", "tcp:127.0.0.1:0", "--connect", &between]);
    let port = near.line_with("listening on ").rsplit(':').next().unwrap().to_owned();
    ([near, far], port)
}

#[test]
fn the_clients_of_redis_reach_the_store_through_one_proxy_and_through_two() {
    let (store, directory) = (Server::start(2), Directory::new());
    let (_proxies, port) = pair(&directory, &format!("unix:{}", store.unix()));
    try_store(&port);
    let to = format!("shm:{}", store.any_shm());
    let mut one = Process::start("proxy", &["--listen", "tcp:127.0.0.1:0", "--connect", &to]);
    try_store(one.line_with("listening on ").rsplit(':').next().unwrap());
    one.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(one.end().0.success());
    store.stop();
}

#[test]
fn curl_gets_and_posts_files_through_a_pair() {
    let (directory, file) = (Directory::new(), payload(Way::Reply, 80, 1, MIB));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = format!("tcp:{}", listener.local_addr().unwrap());
    let served = file.clone();
    // Ends with the process.
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let served = served.clone();
            let serve = move || support::http::serve(OwnedFd::from(stream).into(), &served);
            thread::spawn(serve);
        }
    });
    let (_proxies, port) = pair(&directory, &to);
    let curl = |more: &[&str]| {
        let mut arguments = vec!["--silent", "--show-error", "--fail", "--noproxy", "*"];
        arguments.extend(["--max-time", "90", "--write-out", "%{http_code} %{num_connects}\n"]);
        run("curl", &[&arguments, more].concat())
    };
    let url = |path: &str| format!("http://127.0.0.1:{port}/{path}");
    let targets: Vec<String> =
        (0..5).map(|number| directory.file(&format!("got-{number}"))).collect();
    let get = url("file");
    let requests: Vec<&str> =
        targets.iter().flat_map(|target| ["--output", target, &get]).collect();
    let said = curl(&requests);
    assert_eq!(said, "200 1\n200 0\n200 0\n200 0\n200 0\n", "one connection for all");
    for target in &targets {
        assert!(fs::read(target).unwrap() == file, "{target} is not the file");
    }
    let (posted, answered) = (directory.file("posted"), directory.file("answered"));
    // A byte more, beyond which curl asks whether the server wants it.
    for len in [MIB, MIB + 1] {
        fs::write(&posted, payload(Way::Request, 80, 1, len)).unwrap();
        let data = format!("@{posted}");
        let said = curl(&["--data-binary", &data, "--output", &answered, &url("echo")]);
        assert_eq!(said, "200 1\n");
        assert!(fs::read(&answered).unwrap() == fs::read(&posted).unwrap());
    }
}
