// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the key-value server says and does on the wire: both versions of the protocol of Redis,
//! HTTP that is sent to it, and pipelines that are written before anything is read.
//!
//! `cargo test` builds the examples before; `cargo test --test kv_protocol` alone does not.

#[path = "support/executor.rs"]
#[allow(dead_code, reason = "not all of it is needed here")]
mod executor;
#[path = "support/kv/mod.rs"]
#[allow(dead_code, reason = "not all of it is needed here")]
mod kv;

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use futures_lite::{AsyncReadExt, AsyncWriteExt};

use kv::client::{Client, Reply, connect, encode};
use kv::process::{LONG, Server};

/// Keys of the first and of the second of two shards.
const KEYS: [&str; 2] = ["hello", "foo"];

trait Duplex: Read + Write + Send {}

impl<T: Read + Write + Send> Duplex for T {}

/// A connection by each of the two doors for sockets.
fn sockets(server: &Server) -> [(&'static str, Box<dyn Duplex>); 2] {
    let tcp = TcpStream::connect(&server.tcp).unwrap();
    tcp.set_read_timeout(Some(LONG)).unwrap();
    tcp.set_write_timeout(Some(LONG)).unwrap();
    let unix = UnixStream::connect(server.unix()).unwrap();
    unix.set_read_timeout(Some(LONG)).unwrap();
    unix.set_write_timeout(Some(LONG)).unwrap();
    [("tcp", Box::new(tcp)), ("unix", Box::new(unix))]
}

/// Sends bytes, and reads as many as are expected.
fn exchange(stream: &mut dyn Duplex, sent: &[u8], expected: &[u8]) {
    stream.write_all(sent).unwrap();
    let mut got = vec![0; expected.len()];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(got.escape_ascii().to_string(), expected.escape_ascii().to_string());
}

fn read_to_end(stream: &mut dyn Duplex) -> Vec<u8> {
    let mut all = Vec::new();
    match stream.read_to_end(&mut all) {
        // What was not read before the end was a reset; both are an end.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => all,
        result => {
            result.unwrap();
            all
        }
    }
}

#[test]
fn every_command_is_answered_in_the_types_of_the_version() {
    // What a Redis 7.0 says to each, in version 2 and in version 3.
    let table: &[(&str, &str, &str)] = &[
        ("GET nokey", "$-1\r\n", "_\r\n"),
        (
            "MGET hello nokey foo",
            "*3\r\n$1\r\n1\r\n$-1\r\n$1\r\n2\r\n",
            "*3\r\n$1\r\n1\r\n_\r\n$1\r\n2\r\n",
        ),
        ("MGET nokey", "*1\r\n$-1\r\n", "*1\r\n_\r\n"),
        ("SET hello 1 NX", "$-1\r\n", "_\r\n"),
        ("SET foo 2 NX", "$-1\r\n", "_\r\n"),
        ("SET nokey 2 XX GET", "$-1\r\n", "_\r\n"),
        ("SET hello 1 GET", "$1\r\n1\r\n", "$1\r\n1\r\n"),
        ("GET hello", "$1\r\n1\r\n", "$1\r\n1\r\n"),
        ("EXISTS hello foo nokey", ":2\r\n", ":2\r\n"),
        ("PERSIST hello", ":0\r\n", ":0\r\n"),
        ("TTL foo", ":-1\r\n", ":-1\r\n"),
        ("DBSIZE", ":2\r\n", ":2\r\n"),
        ("PING", "+PONG\r\n", "+PONG\r\n"),
        ("ECHO a", "$1\r\na\r\n", "$1\r\na\r\n"),
        ("CLIENT GETNAME", "$-1\r\n", "_\r\n"),
        ("CLIENT SETINFO LIB-NAME a", "+OK\r\n", "+OK\r\n"),
        ("CLIENT SETINFO LIB-VER 1", "+OK\r\n", "+OK\r\n"),
        ("CLIENT NO-EVICT on", "+OK\r\n", "+OK\r\n"),
        ("CONFIG GET nothing", "*0\r\n", "%0\r\n"),
        ("COMMAND DOCS nothing", "*0\r\n", "%0\r\n"),
        ("SCAN 0 MATCH nothing COUNT 1000", "*2\r\n$1\r\n1\r\n*0\r\n", "*2\r\n$1\r\n1\r\n*0\r\n"),
        ("AUTH default any", "+OK\r\n", "+OK\r\n"),
        ("INFO nothing", "$0\r\n\r\n", "=4\r\ntxt:\r\n"),
        ("SELECT 0", "+OK\r\n", "+OK\r\n"),
        (
            "INCR",
            "-ERR wrong number of arguments for 'incr' command\r\n",
            "-ERR wrong number of arguments for 'incr' command\r\n",
        ),
    ];
    let server = Server::start(2);
    Client::tcp(&server.tcp).ask("MSET hello 1 foo 2");
    for (door, mut stream) in sockets(&server) {
        for (command, version_2, _) in table {
            eprintln!("{door}: {command}");
            exchange(&mut stream, format!("{command}\r\n").as_bytes(), version_2.as_bytes());
        }
        hello(&mut stream, 3);
        for (command, _, version_3) in table {
            eprintln!("{door}, version 3: {command}");
            exchange(&mut stream, format!("{command}\r\n").as_bytes(), version_3.as_bytes());
        }
        // Another connection is not concerned, nor is this one when it goes back.
        let [(_, mut other), _] = sockets(&server);
        exchange(&mut other, b"GET nokey\r\n", b"$-1\r\n");
        hello(&mut stream, 2);
        exchange(&mut stream, b"GET nokey\r\n", b"$-1\r\n");
    }
    server.stop();
}

/// Changes the version, and checks the answer, which is in that version.
fn hello(stream: &mut dyn Duplex, version: u32) {
    let start = if version == 3 { "%7" } else { "*14" };
    let head = format!(
        "{start}\r\n$6\r\nserver\r\n$9\r\nkv_server\r\n$7\r\nversion\r\n$5\r\n{}\r\n\
        $4\r\nmode\r\n$10\r\nstandalone\r\n$5\r\nproto\r\n:{version}\r\n$2\r\nid\r\n:",
        env!("CARGO_PKG_VERSION")
    );
    exchange(stream, format!("HELLO {version}\r\n").as_bytes(), head.as_bytes());
    let mut byte = [0];
    while byte != *b"\n" {
        stream.read_exact(&mut byte).unwrap();
    }
    exchange(stream, b"", b"$4\r\nrole\r\n$6\r\nmaster\r\n$7\r\nmodules\r\n*0\r\n");
}

#[test]
fn a_version_holds_from_its_reply_on_within_a_pipeline() {
    let server = Server::start(2);
    for (_, mut stream) in sockets(&server) {
        // Keys of both shards, so that replies of another one are on their way when it changes.
        let gets = "GET hello\r\nGET foo\r\nMGET foo hello\r\n";
        stream
            .write_all(format!("{gets}HELLO 3\r\n{gets}HELLO 2\r\n{gets}PING\r\n").as_bytes())
            .unwrap();
        let mut all = Vec::new();
        while !all.ends_with(b"+PONG\r\n") {
            let mut chunk = [0; 4096];
            let count = stream.read(&mut chunk).unwrap();
            assert!(count > 0);
            all.extend_from_slice(&chunk[..count]);
        }
        let text = String::from_utf8(all).unwrap();
        let (two, three) = ("$-1\r\n$-1\r\n*2\r\n$-1\r\n$-1\r\n", "_\r\n_\r\n*2\r\n_\r\n_\r\n");
        let rest = text.strip_prefix(&format!("{two}%7\r\n")).unwrap_or_else(|| panic!("{text:?}"));
        let (_, rest) = rest.split_once("modules\r\n*0\r\n").unwrap();
        let rest =
            rest.strip_prefix(&format!("{three}*14\r\n")).unwrap_or_else(|| panic!("{text:?}"));
        let (_, rest) = rest.split_once("modules\r\n*0\r\n").unwrap();
        assert_eq!(rest, format!("{two}+PONG\r\n"));
    }
    server.stop();
}

#[test]
fn hello_takes_a_user_and_a_name_and_refuses_by_name() {
    let server = Server::start(1);
    let mut client = Client::tcp(&server.tcp);
    let error = |client: &mut Client<TcpStream>, command: &str| match client.ask(command) {
        Reply::Error(text) => text,
        other => panic!("{command}: {other:?}"),
    };
    for (command, expected) in [
        ("HELLO 4", "NOPROTO unsupported protocol version"),
        ("HELLO 1", "NOPROTO unsupported protocol version"),
        ("HELLO x", "ERR Protocol version is not an integer or out of range"),
        ("HELLO 3 NONSENSE", "ERR Syntax error in HELLO option 'NONSENSE'"),
        ("HELLO 3 AUTH default", "ERR Syntax error in HELLO option 'AUTH'"),
        (
            "HELLO 3 AUTH other secret",
            "WRONGPASS invalid username-password pair or user is disabled.",
        ),
        ("HELLO 3 SETNAME", "ERR Syntax error in HELLO option 'SETNAME'"),
        ("AUTH other secret", "WRONGPASS invalid username-password pair or user is disabled."),
    ] {
        assert_eq!(error(&mut client, command), expected, "{command}");
    }
    assert!(error(&mut client, "AUTH secret").contains("without any password configured"));
    assert_eq!(client.ask("CLIENT GETNAME"), Reply::Bulk(None), "nothing of that was done");
    client.ask("HELLO 2 AUTH default secret SETNAME me");
    assert_eq!(client.ask("CLIENT GETNAME").text(), "me");
    client.ask("HELLO 2 SETNAME you AUTH default secret");
    assert_eq!(client.ask("CLIENT GETNAME").text(), "you");
    server.stop();
}

#[test]
fn http_is_hung_up_on_at_post_or_host_and_nothing_behind_it_is_executed() {
    let mut server = Server::start(2);
    let bad = "-ERR wrong number of arguments for 'get' command\r\n";
    let set = "SET hello 1\r\nSET foo 1\r\n";
    let inputs: &[(String, &str)] = &[
        (format!("POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{set}"), ""),
        (format!("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n{set}"), bad),
        (format!("post\r\n{set}"), ""),
        (format!("PING\r\nhOsT:\r\n{set}"), "+PONG\r\n"),
        (format!("PING\r\nHost: a b c\r\n{set}"), "+PONG\r\n"),
        // Also as a command in a pipeline, behind one that another shard answers.
        (format!("GET foo\r\n*2\r\n$5\r\nHost:\r\n$1\r\nx\r\n{set}"), "$-1\r\n"),
        (format!("GET hello\r\n*1\r\n$4\r\npOsT\r\n{set}"), "$-1\r\n"),
    ];
    for (input, expected) in inputs {
        for (door, mut stream) in sockets(&server) {
            // It may be closed before all is written.
            let _ = stream.write_all(input.as_bytes());
            let got = read_to_end(&mut stream);
            assert_eq!(String::from_utf8(got).unwrap(), *expected, "{door}: {input:?}");
            let told = server.process.line_with("client from ");
            assert!(told.starts_with(door) || told.starts_with("the Unix socket"), "{told}");
            assert!(told.contains("HTTP"), "{told}");
            assert_eq!(Client::tcp(&server.tcp).ask("DBSIZE"), Reply::Integer(0), "{input:?}");
            if is_tried_once(input) {
                break;
            }
        }
    }
    // What only looks like it is served.
    let mut client = Client::tcp(&server.tcp);
    assert!(matches!(client.ask("Host x"), Reply::Error(_)));
    assert!(matches!(client.ask("POSTS"), Reply::Error(_)));
    assert_eq!(client.ask("ECHO Host:").text(), "Host:");
    server.stop();
}

/// Lines about such clients are bounded in time, so not every input goes through both doors.
fn is_tried_once(input: &str) -> bool {
    input.contains("Host: a b c") || input.contains("pOsT") || input.starts_with("post")
}

/// Writes everything before it reads anything. Gives what comes then, to the last expected byte.
fn write_all_then_read(stream: &mut dyn Duplex, commands: &[u8], expected_len: usize) -> Vec<u8> {
    stream.write_all(commands).unwrap();
    let mut got = vec![0; expected_len];
    stream.read_exact(&mut got).unwrap();
    got
}

/// Commands whose answers are longer than everything between the two holds, and the answers.
fn pipelines() -> Vec<(Vec<u8>, Vec<u8>)> {
    let values: Vec<Vec<u8>> = [1024, 5000].iter().map(|&len| vec![b'v'; len]).collect();
    let mut sets = Vec::new();
    let (mut gets, mut answers) = (Vec::new(), Vec::new());
    for (key, value) in KEYS.iter().zip(&values) {
        sets.extend(encode(&[b"SET".as_slice(), key.as_bytes(), value]));
        gets.extend(encode(&["GET", key]));
        answers.extend(format!("${}\r\n", value.len()).into_bytes());
        answers.extend(value);
        answers.extend(b"\r\n");
    }
    vec![
        (sets, b"+OK\r\n+OK\r\n".to_vec()),
        (encode(&["PING"]).repeat(37_000), b"+PONG\r\n".repeat(37_000)),
        (b"PING\r\n".repeat(200_000), b"+PONG\r\n".repeat(200_000)),
        (gets.repeat(5000), answers.repeat(5000)),
        (encode(&["INCR", "n"]).repeat(3), b":1\r\n:2\r\n:3\r\n".to_vec()),
    ]
}

#[test]
fn a_pipeline_may_be_written_before_anything_is_read() {
    let server = Server::start(2);
    for (door, mut stream) in sockets(&server) {
        for (number, (commands, expected)) in pipelines().into_iter().enumerate() {
            let got = write_all_then_read(&mut stream, &commands, expected.len());
            assert!(got == expected, "{door}: pipeline {number}");
        }
        Client::tcp(&server.tcp).ask("FLUSHALL");
    }
    // Over shared memory, at the shard that has one of the keys, as one that knows no shards.
    let path = server.any_shm();
    executor::run(LONG, move || async move {
        let session = connect(path).await;
        let mut stream = session.open_stream().unwrap();
        for (number, (commands, expected)) in pipelines().into_iter().enumerate() {
            stream.write_all(&commands).await.unwrap();
            let mut got = vec![0; expected.len()];
            stream.read_exact(&mut got).await.unwrap();
            assert!(got == expected, "shared memory: pipeline {number}");
        }
    });
    assert_eq!(held(&server), 0, "nothing is kept any longer");
    server.stop();
}

/// The replies that are put aside, in all shards.
fn held(server: &Server) -> u64 {
    let text = Client::unix(&server.unix()).ask("INFO shards").text().to_owned();
    let held = text.split("output_held=").skip(1);
    held.map(|rest| rest.lines().next().unwrap().parse::<u64>().unwrap()).sum()
}

#[test]
fn who_half_closes_behind_a_pipeline_gets_every_answer() {
    let server = Server::start(2);
    let mut client = Client::tcp(&server.tcp);
    client.call(&[b"SET".as_slice(), KEYS[1].as_bytes(), &[b'v'; 10_000]]);
    client.send(&encode(&["GET", KEYS[1]]).repeat(5000));
    client.finish_writing();
    let answer = Reply::Bulk(Some(vec![b'v'; 10_000]));
    for number in 0..5000 {
        assert!(client.reply() == answer, "reply {number}");
    }
    assert_eq!(client.reply_or_end(), None);
    server.stop();
}

const MIB: usize = 1 << 20;

#[test]
fn at_the_limit_a_client_that_does_not_read_is_ended_with_an_error_behind_whole_replies() {
    let limits = ["--max-output", "2097152", "--max-output-all", "8388608"];
    let mut server = Server::start_with(2, &limits);
    let value = vec![b'v'; 64 << 10];
    Client::tcp(&server.tcp).call(&[b"SET".as_slice(), KEYS[0].as_bytes(), &value]);
    for (door, mut stream) in sockets(&server) {
        // More than the buffers of the sockets and what is read ahead can hold.
        let commands = encode(&["GET", KEYS[0]]);
        stream.write_all(&commands.repeat(32 * MIB / commands.len())).unwrap();
        let got = read_to_end(&mut stream);
        let (mut at, mut whole) = (0, 0);
        let error = loop {
            match Reply::parse(&got[at..]) {
                Some((Reply::Bulk(Some(bytes)), len)) => {
                    assert!(bytes == value);
                    (at, whole) = (at + len, whole + 1);
                }
                Some((Reply::Error(text), len)) => {
                    assert_eq!(at + len, got.len(), "{door}: nothing comes behind it");
                    break text;
                }
                other => panic!("{door}: {other:?} behind {whole} replies"),
            }
        };
        assert!(error.contains("--max-output"), "{door}: {error}");
        // Those kept, and what the sockets hold.
        assert!((16..2000).contains(&whole), "{door}: {whole}");
        let told = server.process.line_with("client from ");
        assert!(told.contains("limit"), "{told}");
    }
    assert_eq!(held(&server), 0);
    server.stop();
}

#[test]
fn a_client_that_reads_slowly_is_held_up_and_not_ended() {
    let server = Server::start_with(2, &["--max-output", "1048576"]);
    let value = vec![b'v'; MIB / 4];
    // Long, so that much is read ahead of the replies.
    let key = "k".repeat(4096);
    let mut client = Client::unix(&server.unix());
    client.call(&[b"SET".as_slice(), key.as_bytes(), &value]);
    let pieces = vec![encode(&["GET", &key]).repeat(400)];
    let answer = Reply::Bulk(Some(value));
    assert!(client.pipeline(pieces, 400).iter().all(|reply| *reply == answer));
    server.stop();
}

#[test]
fn what_is_kept_for_all_clients_is_bounded_and_others_are_served() {
    let limits = ["--max-output", "4194304", "--max-output-all", "8388608"];
    let server = Server::start_with(2, &limits);
    let value = vec![b'v'; 16 << 10];
    Client::tcp(&server.tcp).call(&[b"SET".as_slice(), KEYS[0].as_bytes(), &value]);
    let (is_over, path) = (&AtomicBool::new(false), &server.unix());
    thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(move || {
                let stream = UnixStream::connect(path).unwrap();
                stream.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
                // Ended or held up, as long as it does not read.
                let commands = encode(&["GET", KEYS[0]]).repeat(20_000);
                let _ = (&stream).write_all(&commands);
                while !is_over.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(5));
                }
            });
        }
        let mut decent = Client::tcp(&server.tcp);
        let mut most = 0;
        for _ in 0..300 {
            assert!(decent.call(&["GET", KEYS[0]]) == Reply::Bulk(Some(value.clone())));
            most = held(&server).max(most);
        }
        is_over.store(true, Ordering::Relaxed);
        assert!(most > 0 && most <= 8 << 20, "{most}");
    });
    server.stop();
}
