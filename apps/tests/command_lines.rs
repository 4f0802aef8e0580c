// SPDX-License-Identifier: MIT OR Apache-2.0
//! What every example does with its command line, its standard output, names and abstract sockets.
//!
//! `cargo test` builds the examples before; `cargo test --test command_lines` alone does not.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::ToSocketAddrs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::Signal;
use shmipc_glommio::{Config, Spin};

use support::process::{LONG, Process, example_path, until};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod process;
}

const ALL: [&str; 9] = [
    "hello",
    "request_response",
    "echo",
    "echo_server",
    "echo_client",
    "ping_pong",
    "kv_server",
    "kv_client",
    "proxy",
];

fn run(example: &str, arguments: &[&str], stdout: Stdio) -> Output {
    let mut command = Command::new(example_path(example));
    command.args(arguments).stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped());
    command.spawn().unwrap().wait_with_output().unwrap()
}

#[test]
fn limits_that_are_too_low_are_a_line_and_no_panic() {
    // The limit of processes counts those of a user, and the superuser has none.
    let user = 70_000 + std::process::id();
    let can_be_user = |example: &str| {
        let mut help = Command::new(example_path(example));
        nix::unistd::geteuid().is_root()
            && help.arg("-h").uid(user).output().is_ok_and(|output| output.status.success())
    };
    let cases = [
        ("ping_pong", "ulimit -f 1024", "ulimit -f"),
        ("ping_pong", "ulimit -n 20", "ulimit -n"),
        ("ping_pong", "ulimit -u 3", "ulimit -u"),
        ("echo_client", "ulimit -u 1", "ulimit -u"),
        ("echo_client", "ulimit -u 2", "ulimit -u"),
        ("echo_client", "ulimit -u 3", "ulimit -u"),
    ];
    for (example, limit, remedy) in cases {
        let of_user = limit.contains("-u");
        if of_user && !can_be_user(example) {
            eprintln!("skipped, for want of a user of its own: {example} at {limit}");
            continue;
        }
        // Some shells have another letter for processes.
        let other = limit.replace("-u", "-p");
        let script = format!("{limit} 2>&- || {other} && exec \"$0\" \"$@\"");
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", &script]).arg(example_path(example));
        if example == "echo_client" {
            shell.args(["--socket", "/nowhere/echo"]);
        }
        if of_user {
            shell.uid(user);
        }
        let output = shell.stdin(Stdio::null()).output().unwrap();
        let said = text(&output.stdout) + &text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{example} at {limit}: {said}");
        assert_eq!(said.lines().count(), 1, "{example} at {limit}: {said}");
        assert!(said.contains(remedy), "{example} at {limit}: {said}");
    }
}

/// A standard output whose reader has gone.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn every_example_is_in_the_table() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let directories = [here, &here.join("examples"), &here.join("../examples")];
    let entries = directories.map(|directory| fs::read_dir(directory).unwrap());
    for entry in entries.into_iter().flatten() {
        let path = entry.unwrap().path();
        let is_program =
            path.extension().is_some_and(|end| end == "rs") || path.join("main.rs").exists();
        let name = path.file_stem().unwrap().to_str().unwrap();
        assert!(!is_program || ALL.contains(&name), "{name}");
    }
}

/// The help of an option, on one line.
fn help_of(example: &str, option: &str) -> String {
    let help = text(&run(example, &["--help"], Stdio::piped()).stdout);
    let lines = help.lines().skip_while(|line| !line.trim_start().starts_with(option));
    let is_next = |line: &&str| line.trim_start().starts_with('-');
    let (first, rest) = (lines.clone().next(), lines.skip(1).take_while(|line| !is_next(line)));
    first.into_iter().chain(rest).map(str::trim).collect::<Vec<_>>().join(" ")
}

#[test]
fn help_names_the_defaults_of_the_library() {
    let library = Config::default();
    let Spin::For(spin) = library.spin() else { panic!("{:?}", library.spin()) };
    let spin = format!("[default: {}]", spin.as_micros());
    for (example, option, default) in [
        ("kv_server", "--spin ", spin.clone()),
        ("kv_client", "--spin ", spin),
        ("kv_client", "--pool ", format!("[default: {}]", library.buffer_size())),
        ("echo_client", "--queue ", format!("[default: {}]", library.queue_capacity())),
    ] {
        let help = help_of(example, option);
        assert!(help.ends_with(&default), "{example}: {help}");
    }
}

#[test]
fn help_is_an_answer_on_standard_output() {
    for example in ALL {
        for option in ["-h", "--help"] {
            let output = run(example, &[option], Stdio::piped());
            assert!(output.status.success(), "{example} {option}: {output:?}");
            let help = text(&output.stdout);
            assert!(help.contains(&format!("Usage: {example}")), "{example} {option}: {help}");
            assert!(help.contains("-h, --help"), "{example} {option}: {help}");
            assert_eq!(text(&output.stderr), "", "{example} {option}");
        }
    }
}

#[test]
fn a_mistake_is_told_on_standard_error_with_status_2() {
    for example in ALL {
        for arguments in [&["--no-such-option"][..], &["stray"], &["-x"], &["--help=x"]] {
            let output = run(example, arguments, Stdio::piped());
            assert_eq!(output.status.code(), Some(2), "{example} {arguments:?}: {output:?}");
            assert_eq!(text(&output.stdout), "", "{example} {arguments:?}");
            let told = text(&output.stderr);
            assert!(told.starts_with("error: "), "{example} {arguments:?}: {told}");
            assert!(told.contains("--help"), "{example} {arguments:?}: {told}");
        }
    }
    // What was nearly meant is named.
    let told = text(&run("kv_client", &["--depht", "1"], Stdio::piped()).stderr);
    assert!(told.contains("'--depth'"), "{told}");
}

#[test]
fn the_last_of_several_values_counts_and_a_flag_may_stand_twice() {
    let nobody = ["--unix", "/nowhere/kv", "--depth", "0x", "--seed=7", "--requests=1"];
    let output = run("kv_client", &nobody, Stdio::piped());
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let nobody = ["--unix=/nowhere/kv", "--depth", "1", "--depth=2", "--value", "1", "--value=0"];
    let output = run("kv_client", &nobody, Stdio::piped());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let twice = ["--socket", "/nowhere/echo", "--reopen", "--reopen", "--verify", "--no-verify"];
    let output = run("echo_client", &twice, Stdio::piped());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let both = ["--unix", "/nowhere/kv", "--shm", "/nowhere/kv"];
    assert_eq!(run("kv_client", &both, Stdio::piped()).status.code(), Some(2));
}

/// Nothing on standard error, above all no panic, and the status that it would have had.
fn ends_quietly(example: &str, arguments: &[&str], status: i32) {
    let output = run(example, arguments, closed());
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{example} {arguments:?}: {told}");
    assert_eq!(told, "", "{example} {arguments:?}");
}

#[test]
fn a_closed_standard_output_ends_a_program_quietly() {
    for example in ALL {
        ends_quietly(example, &["--help"], 0);
        // A mistake is told elsewhere.
        let output = run(example, &["--no-such-option"], closed());
        assert_eq!(output.status.code(), Some(2), "{example}");
        assert!(text(&output.stderr).starts_with("error: "), "{example}: {output:?}");
    }
    ends_quietly("hello", &[], 0);
    ends_quietly("request_response", &[], 0);
    ends_quietly("echo", &["--quick"], 0);
    let quick = ["--rounds=1", "--slice=1", "--sizes=64", "--streams=1", "--only=uds"];
    ends_quietly("ping_pong", &quick, 0);
    ends_quietly("ping_pong", &[&quick[..], &["--json"]].concat(), 0);
    // Their words about a failure go to standard output, too.
    ends_quietly("kv_client", &["--unix", "/nowhere/kv"], 1);
    ends_quietly("echo_client", &["--socket", "/nowhere/echo"], 1);

    let path = std::env::temp_dir().join(format!("command-lines-{}", std::process::id()));
    let path = path.to_str().unwrap();
    let (echo, store) = (format!("{path}-echo"), format!("{path}-store"));
    let mut server = Process::start("echo_server", &["--socket", &echo]);
    server.line_with("listening on ");
    ends_quietly("echo_client", &["--socket", &echo, "--count", "10"], 0);
    let mut server = Process::start("kv_server", &["--unix", &store, "--shards", "1"]);
    server.line_with("ready");
    ends_quietly("kv_client", &["--unix", &store, "--requests", "10"], 0);
    let _ = (fs::remove_file(&echo), fs::remove_file(&store));
}

#[test]
fn a_closed_standard_error_stops_nobody() {
    for (example, arguments, status) in
        [("kv_server", &["--no-such-option"][..], 2), ("hello", &["-x"], 2), ("proxy", &[], 2)]
    {
        let mut command = Command::new(example_path(example));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(closed());
        let status_is = command.status().unwrap().code();
        assert_eq!(status_is, Some(status), "{example}");
    }
}

#[test]
fn a_standard_output_that_is_full_is_a_failure_in_one_line() {
    for (example, arguments) in [("hello", &[][..]), ("hello", &["-h"]), ("kv_client", &["--help"])]
    {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = run(example, arguments, full.into());
        assert_eq!(output.status.code(), Some(1), "{example}: {output:?}");
        let told = text(&output.stderr);
        assert!(told.contains("No space left on device"), "{example}: {told}");
        assert_eq!(told.lines().count(), 1, "{example}: {told}");
    }
}

#[test]
fn failures_are_one_readable_line() {
    let nowhere = "tcp:127.0.0.1:1";
    let runs: [(&str, &[&str]); 6] = [
        ("echo_server", &["--socket", "/nowhere/echo"]),
        ("echo_server", &["--tcp", "nowhere.invalid:80"]),
        ("kv_server", &["--shards", "1", "--unix", "/nowhere/kv"]),
        ("kv_server", &["--shards", "1", "--tcp", "nowhere.invalid:80"]),
        ("proxy", &["--listen", "unix:/nowhere/proxy", "--connect", nowhere]),
        ("proxy", &["--listen", "tcp:nowhere.invalid:80", "--connect", nowhere]),
    ];
    for (example, arguments) in runs {
        let output = run(example, arguments, Stdio::piped());
        assert_eq!(output.status.code(), Some(1), "{example} {arguments:?}: {output:?}");
        let told = text(&output.stderr);
        assert_eq!(told.lines().count(), 1, "{example} {arguments:?}: {told}");
        let place = arguments.iter().find_map(|argument| {
            ["/nowhere", "nowhere.invalid"].into_iter().find(|part| argument.contains(part))
        });
        assert!(told.contains(place.unwrap()), "{example} {arguments:?}: {told}");
        for debug in ["Os {", "Custom {", "Error("] {
            assert!(!told.contains(debug), "{example} {arguments:?}: {told}");
        }
    }
    // The clients say it in their report.
    for (example, arguments) in [
        ("echo_client", ["--tcp", "nowhere.invalid:80"]),
        ("kv_client", ["--tcp", "nowhere.invalid:80"]),
    ] {
        let output = run(example, &arguments, Stdio::piped());
        assert_eq!(output.status.code(), Some(1), "{example}: {output:?}");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["ok"], false, "{report}");
        assert!(report["error"].as_str().unwrap().contains("nowhere.invalid"), "{report}");
    }
}

/// `localhost` with the port that a server was given.
fn localhost(address: &str) -> String {
    format!("localhost:{}", address.rsplit_once(':').unwrap().1)
}

#[test]
fn names_are_found_whichever_of_their_addresses_is_listened_at() {
    // A server that is given a name, and others that have one of two addresses.
    let known: Vec<_> = ("localhost", 0).to_socket_addrs().unwrap().collect();
    for at in ["localhost:0", "127.0.0.1:0", "[::1]:0"] {
        if at.parse().is_ok_and(|address| !known.contains(&address)) {
            eprintln!("skipped: {at} is no address of localhost here");
            continue;
        }
        let mut echo = Process::start("echo_server", &["--tcp", at]);
        let name = localhost(&echo.line_with("listening on "));
        let output = run("echo_client", &["--tcp", &name, "--count", "10"], Stdio::piped());
        assert!(output.status.success(), "{at}: {output:?}");

        let mut store = Process::start("kv_server", &["--tcp", at, "--shards", "1"]);
        let address = store.line_with("listening on tcp ");
        let store_name = localhost(&address);
        let load = ["--tcp", &store_name, "--requests", "10"];
        let output = run("kv_client", &load, Stdio::piped());
        assert!(output.status.success(), "{at}: {output:?}");

        let connect = format!("tcp:{store_name}");
        let mut proxy =
            Process::start("proxy", &["--listen", "tcp:localhost:0", "--connect", &connect]);
        let address = proxy.line_with("listening on tcp:");
        let load = ["--tcp", &localhost(&address), "--requests", "10"];
        let output = run("kv_client", &load, Stdio::piped());
        assert!(output.status.success(), "{at}: {output:?}");
    }
}

fn abstract_address(name: &str) -> SocketAddr {
    SocketAddr::from_abstract_name(name.strip_prefix('@').unwrap()).unwrap()
}

#[test]
fn abstract_sockets_carry_every_program_and_leave_no_file() {
    let name = |what: &str| format!("@command-lines-{}-{what}", std::process::id());
    let echo = name("echo");
    let mut server = Process::start("echo_server", &["--socket", &echo]);
    server.line_with(&format!("listening on {echo}"));
    let output = run("echo_client", &["--socket", &echo, "--count", "100"], Stdio::piped());
    assert!(output.status.success(), "{output:?}");
    let mut second = Process::start("echo_server", &["--socket", &echo]);
    let (status, _) = second.end();
    assert_eq!(status.code(), Some(1));
    second.line_with("in use");

    let (unix, shm) = (name("unix"), name("shm"));
    let doors = ["--unix", &unix, "--shm", &shm, "--shards", "2"];
    let mut store = Process::start("kv_server", &doors);
    store.line_with(&format!("listening on unix {unix}"));
    store.line_with(&format!("listening on shm {shm} (2 shards)"));
    store.line_with("ready");
    for target in [["--unix", &unix], ["--shm", &shm]] {
        let load = [&target[..], &["--requests", "200", "--depth", "4"]].concat();
        let output = run("kv_client", &load, Stdio::piped());
        assert!(output.status.success(), "{target:?}: {output:?}");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let shards = if target[0] == "--shm" { 2.into() } else { serde_json::Value::Null };
        assert_eq!(report["shards"], shards, "{report}");
    }

    // From an abstract socket to another one, through shared memory over a third.
    let (front, between) = (name("front"), format!("shm:{}", name("between")));
    let mut far =
        Process::start("proxy", &["--listen", &between, "--connect", &format!("unix:{unix}")]);
    far.line_with(&format!("listening on {between}"));
    let mut near =
        Process::start("proxy", &["--listen", &format!("unix:{front}"), "--connect", &between]);
    near.line_with(&format!("listening on unix:{front}"));
    let output = run("kv_client", &["--unix", &front, "--requests", "100"], Stdio::piped());
    assert!(output.status.success(), "{output:?}");
    // Programs that are not ours find them, too.
    let mut stream = UnixStream::connect_addr(&abstract_address(&front)).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.write_all(b"PING\r\n").unwrap();
    let mut answer = [0; 7];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"+PONG\r\n");
    drop(stream);

    for mut process in [near, far, store, server] {
        process.signal(Signal::SIGTERM);
        let (status, _) = process.end();
        assert!(status.success(), "{status}; stderr: {:#?}", process.seen);
    }
    // The names are free again, and never were files.
    for name in [&echo, &unix, &shm, &front] {
        // The kernel clears up behind an io_uring when its process has ended already.
        until("the name is free", || UnixListener::bind_addr(&abstract_address(name)).is_ok());
        assert!(!std::path::Path::new(name).exists());
        assert!(!std::path::Path::new(&format!("{name}.lock")).exists());
    }
}

/// A name has no file whose mode could keep others out.
#[test]
fn abstract_sockets_are_for_this_user_only() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can become another user");
        return;
    }
    let name = |what: &str| format!("@command-lines-user-{}-{what}", std::process::id());
    let (unix, shm, front) = (name("unix"), name("shm"), name("front"));
    let doors = ["--unix", &unix, "--shm", &shm, "--shards", "1"];
    let mut store = Process::start("kv_server", &doors);
    store.line_with("ready");
    let (listen, connect) = (format!("unix:{front}"), format!("unix:{unix}"));
    let mut proxy = Process::start("proxy", &["--listen", &listen, "--connect", &connect]);
    proxy.line_with("listening on ");
    // A copy that the other user can reach.
    let client = std::env::temp_dir().join(format!("command-lines-client-{}", std::process::id()));
    fs::copy(example_path("kv_client"), &client).unwrap();
    for target in [["--unix", &unix], ["--shm", &shm], ["--unix", &front]] {
        use std::os::unix::process::CommandExt;
        let load = [&target[..], &["--requests", "10", "--timeout", "60"]].concat();
        let output = Command::new(&client)
            .args(&load)
            .current_dir("/")
            .uid(65533)
            .gid(65533)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{target:?}: {output:?}");
        let output = run("kv_client", &load, Stdio::piped());
        assert!(output.status.success(), "{target:?}: {output:?}");
    }
    fs::remove_file(client).unwrap();
    store.line_with("another user");
    proxy.line_with("another user");
}
