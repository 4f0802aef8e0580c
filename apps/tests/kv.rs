// SPDX-License-Identifier: MIT OR Apache-2.0
//! The key-value server as the program it is, with a client that people have for Redis, with one
//! that sends what no decent client sends, and over shared memory.
//!
//! `cargo test` builds the examples before; `cargo test --test kv` alone does not. The programs
//! that come with Redis have their tests in `stock_clients.rs`.

#[path = "support/executor.rs"]
#[allow(dead_code, reason = "not all of it is needed here")]
mod executor;
#[path = "support/kv/mod.rs"]
mod kv;

use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;

use kv::client::{Client, Reply, connect, encode, pipeline};
use kv::model::{self, Model, compare};
use kv::process::{Directory, LONG, Running, Server, example_path, until};
use kv::{crate_redis, steps};
use nix::sys::signal::Signal;
use shmipc_glommio::Session;

/// Keys of the first and of the second of two shards.
const FIRST: &str = "hello";
const SECOND: &str = "foo";

/// A field of each shard's line in INFO.
fn fields(server: &Server, name: &str) -> Vec<u64> {
    let text = Client::tcp(&server.tcp).ask("INFO shards").text().to_owned();
    let lines = text.lines().filter(|line| line.starts_with("shard"));
    let field = |line: &str| {
        let fields = line.split_once(':').unwrap().1.to_owned();
        let found = fields.split(',').find_map(|field| field.strip_prefix(&format!("{name}=")));
        found.unwrap_or_else(|| panic!("no {name} in {line}")).parse().unwrap()
    };
    lines.map(field).collect()
}

/// Every shard has touched its keys, and nobody else has.
fn only_owners_touched(server: &Server, shards: usize) {
    let by_owner = fields(server, "touches_owner");
    assert_eq!(by_owner.len(), shards);
    assert!(by_owner.iter().all(|&touches| touches > 0), "{by_owner:?}");
    assert_eq!(fields(server, "touches_other"), vec![0; shards]);
}

#[test]
fn the_crate_redis_gets_the_answers_of_redis() {
    let server = Server::start(2);
    for version in ["2", "3"] {
        for url in server.urls(version) {
            steps::check(|words| crate_redis::ask(&url, words));
            crate_redis::ask(&url, &["mset", "x1", "", "x2", "", "y1", "", "y2", ""]);
            let mut connection = crate_redis::connect(&url);
            let keys = redis::Commands::scan_match::<_, String>(&mut connection, "x*").unwrap();
            let mut keys: Vec<String> = keys.map(Result::unwrap).collect();
            keys.sort_unstable();
            assert_eq!(keys, ["x1", "x2"]);
            let info = crate_redis::ask(&url, &["info"]);
            for field in ["process_id:", "shards:2", "used_cpu_sys:", "shard1:keys="] {
                assert!(info.contains(field), "no {field} in {info}");
            }
            assert!(!crate_redis::ask(&url, &["info", "cpu"]).contains("shard"));
        }
    }
    only_owners_touched(&server, 2);
    server.stop();
}

#[test]
fn pipelines_of_the_crate_redis_run_without_an_error() {
    let server = Server::start(2);
    for url in server.urls("2") {
        crate_redis::load(&url);
    }
    only_owners_touched(&server, 2);
    server.stop();
}

#[test]
fn pipelines_over_all_shards_are_answered_as_by_one_store() {
    let mut random = model::random();
    let server = Server::start(3);
    let mut client = Client::unix(&server.unix());
    let mut model = Model::default();
    for (count, largest, longest) in
        [(2000, 100, 50), (3000, 5000, 100_000), (300, 1 << 20, 1 << 22)]
    {
        let (bytes, expected) = model::pipeline(&mut random, &mut model, "k", count, largest);
        let pieces = model::cut(&mut random, &bytes, longest);
        compare(&client.pipeline(pieces, count), &expected);
    }
    assert!(fields(&server, "forwarded").iter().sum::<u64>() > 0);
    only_owners_touched(&server, 3);
    server.stop();
}

#[test]
fn streams_over_shared_memory_are_served_whatever_shard_they_lead_to() {
    let mut random = model::random();
    let server = Server::start(2);
    // Each has keys of all shards, so half of them are in the wrong place.
    let paths = [server.shm(0), server.shm(1), server.any_shm(), server.shm(0)];
    let mut plans = Vec::new();
    for (number, path) in paths.into_iter().enumerate() {
        // What counts all keys, or removes them, would meet those of the others.
        let prefix = format!("stream{number}:");
        let mut steps = Vec::new();
        let mut model = Model::default();
        for (count, largest, longest) in [(1000, 5000, 20_000), (200, 1 << 20, 1 << 21)] {
            let (bytes, expected) =
                model::undisturbed_pipeline(&mut random, &mut model, &prefix, count, largest);
            steps.push((model::cut(&mut random, &bytes, longest), expected));
        }
        plans.push((path, steps));
    }
    executor::run(LONG, move || async move {
        let clients: Vec<_> = plans
            .into_iter()
            .map(|(path, steps)| {
                glommio::spawn_local(async move {
                    let session = connect(path).await;
                    for (pieces, expected) in steps {
                        compare(&pipeline(&session, pieces, expected.len()).await, &expected);
                    }
                })
            })
            .collect();
        for client in clients {
            client.await;
        }
    });
    only_owners_touched(&server, 2);
    server.stop();
}

/// Both directions of both sessions between the two have more under way than their memory holds.
#[test]
fn a_client_that_knows_the_shards_crosses_no_core() {
    let server = Server::start(2);
    for (depth, threads) in [("1", "1"), ("16", "2")] {
        let path = server.any_shm();
        let load = ["--shm", &path, "--value", "64", "--keys", "200", "--requests", "20000"];
        let shape = ["--depth", depth, "--threads", threads, "--connections", "4"];
        let output = Command::new(example_path("kv_client")).args(load).args(shape).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{output:?}");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&report["ok"], &report["shards"]), (&true.into(), &2.into()), "{report}");
    }
    only_owners_touched(&server, 2);
    assert!(fields(&server, "commands").iter().all(|&commands| commands > 10_000));
    assert_eq!(fields(&server, "cross_core_wakes"), [0, 0]);
    // These questions themselves, five with this one, are all that one shard has asked another.
    assert_eq!(fields(&server, "forwarded").iter().sum::<u64>(), 5);
    server.stop();
}

#[test]
fn shards_that_send_each_other_much_do_not_block_each_other() {
    const ROUNDS: usize = 3;
    const GETS: usize = 6;
    let server = Server::start(2);
    let paths = [(server.shm(0), SECOND), (server.shm(1), FIRST)];
    executor::run(LONG, move || async move {
        let clients = paths.map(|(path, key)| {
            glommio::spawn_local(async move {
                let session = connect(path).await;
                let value = vec![b'v'; 4 << 20];
                let set = encode(&[b"SET".as_slice(), key.as_bytes(), &value]);
                let gets = encode(&["GET", key]).repeat(GETS);
                let mut pieces = vec![set.clone()];
                pieces.extend(vec![[gets, set].concat(); ROUNDS]);
                let replies = pipeline(&session, pieces, 1 + ROUNDS * (GETS + 1)).await;
                let (ok, got) = (Reply::Status("OK".into()), Reply::Bulk(Some(value)));
                for (index, reply) in replies.iter().enumerate() {
                    let is_set = index % (GETS + 1) == 0;
                    assert!(*reply == if is_set { ok.clone() } else { got.clone() }, "{index}");
                }
            })
        });
        for client in clients {
            client.await;
        }
    });
    assert_eq!(fields(&server, "forwarded").iter().filter(|&&count| count > 0).count(), 2);
    only_owners_touched(&server, 2);
    server.stop();
}

#[test]
fn a_shard_alone_answers_for_itself_alone() {
    let server = Server::start(2);
    executor::run(LONG, {
        let path = server.shm(1);
        move || async move {
            let session = connect(path).await;
            let commands = ["SHARD ONLY", "SET foo 1", "GET hello", "DBSIZE", "FLUSHALL", "DBSIZE"];
            let pieces = commands.iter().map(|line| format!("{line}\r\n").into_bytes()).collect();
            let replies = pipeline(&session, pieces, commands.len()).await;
            let ok = Reply::Status("OK".into());
            let refusal = Reply::Error("ERR not a key of this shard".into());
            let [one, none] = [Reply::Integer(1), Reply::Integer(0)];
            assert_eq!(replies, [ok.clone(), ok.clone(), refusal, one, ok, none]);
        }
    });
    server.stop();
}

#[test]
fn a_scan_gives_what_is_there_all_the_while() {
    const STAY: usize = 500;
    let server = Server::start(3);
    let mut client = Client::tcp(&server.tcp);
    for number in 0..STAY {
        client.call(&["SET", &format!("stay:{number}"), "x"]);
    }
    let mut other = Client::unix(&server.unix());
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let _ends_the_other = RaisedAtEnd(&is_over);
        scope.spawn(|| {
            let mut number = 0;
            while !is_over.load(Ordering::Relaxed) {
                other.call(&["SET", &format!("come:{number}"), "x"]);
                if number >= 50 {
                    other.call(&["DEL", &format!("come:{}", number - 50)]);
                }
                number += 1;
            }
        });
        for count in ["1", "7", "100"] {
            let (mut cursor, mut seen) = ("0".to_owned(), HashSet::new());
            loop {
                let reply = client.call(&["SCAN", &cursor, "MATCH", "stay:*", "COUNT", count]);
                let [next, keys] = reply.array() else { panic!("{reply:?}") };
                for key in keys.array() {
                    assert!(seen.insert(key.text().to_owned()), "{key:?} came twice");
                }
                cursor = next.text().to_owned();
                if cursor == "0" {
                    break;
                }
            }
            assert_eq!(seen.len(), STAY);
        }
    });
    only_owners_touched(&server, 3);
    server.stop();
}

/// However the test ends, the thread beside it does, too.
struct RaisedAtEnd<'a>(&'a AtomicBool);

impl Drop for RaisedAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn keys_expire_whether_somebody_looks_or_not() {
    let server = Server::start(2);
    let mut client = Client::tcp(&server.tcp);
    for number in 0..200 {
        client.call(&["SET", &format!("short:{number}"), "x", "PX", "1"]);
        client.call(&["SET", &format!("long:{number}"), "x", "EX", "1000"]);
    }
    until("a key is gone when it is looked for", || client.ask("GET short:0") == Reply::Bulk(None));
    // Nobody looks for the others.
    until("all are swept", || client.ask("DBSIZE") == Reply::Integer(200));
    assert_eq!(client.ask("GET long:0").text(), "x");
    let left = client.ask("PTTL long:0").integer();
    assert!((1..=1_000_000).contains(&left), "{left}");
    server.stop();
}

#[test]
fn garbage_ends_its_own_connection_only() {
    let server = Server::start(2);
    let mut decent = Client::tcp(&server.tcp);
    decent.ask("SET a 1");
    let huge = "*1\r\n$99999999999\r\n";
    for garbage in ["*x\r\n", "*1\r\n:1\r\n", huge, "*9999999\r\n", "get \"a\r\n"] {
        let mut client = Client::tcp(&server.tcp);
        // What came before is answered; what comes behind is not.
        client.send(format!("PING\r\nGET a\r\n{garbage}PING\r\n").as_bytes());
        assert_eq!(client.reply(), Reply::Status("PONG".into()));
        assert_eq!(client.reply().text(), "1");
        match client.reply() {
            Reply::Error(text) => assert!(text.starts_with("ERR Protocol error: "), "{text}"),
            other => panic!("{garbage:?} is answered {other:?}"),
        }
        assert_eq!(client.reply_or_end(), None, "{garbage:?}");
    }
    let mut random = model::random();
    for _ in 0..50 {
        let mut client = Client::tcp(&server.tcp);
        let noise: Vec<u8> = (0..random.between(1, 300)).map(|_| random.next() as u8).collect();
        client.send(&noise);
        client.finish_writing();
        // It ends, one way or the other.
        let mut rest = Vec::new();
        let _ = client.socket.read_to_end(&mut rest);
    }
    assert_eq!(decent.ask("GET a").text(), "1");
    server.stop();
}

#[test]
fn a_reply_has_a_length_at_most() {
    let server = Server::start(2);
    let mut client = Client::unix(&server.unix());
    let value = vec![b'v'; 16 << 20];
    let mut names = vec![b"MGET".to_vec()];
    for key in [FIRST, SECOND] {
        client.call(&[b"SET".as_slice(), key.as_bytes(), &value]);
        names.extend(vec![key.as_bytes().to_vec(); 9]);
    }
    // Each shard's part is short enough; together, or twice the part, are not.
    let refusal = Reply::Error("ERR reply is longer than 256 MiB".into());
    assert_eq!(client.call(&names), refusal);
    assert_eq!(client.call(&[&names[..10], &names[1..10]].concat()), refusal);
    assert_eq!(client.ask("EXISTS hello foo"), Reply::Integer(2));
    server.stop();
}

#[test]
fn a_shard_that_is_blocked_blocks_no_other() {
    let server = Server::start(2);
    let mut seconds = 1;
    loop {
        let before = fields(&server, "forwarded")[0];
        let (ended, is_asleep) = mpsc::channel::<()>();
        let path = server.shm(0);
        let sleeper = thread::spawn(move || {
            executor::run(LONG, move || async move {
                // The first shard waits for the second one, as far as this client goes.
                let session = connect(path).await;
                let sleep = format!("DEBUG SLEEP {seconds} {SECOND}\r\n").into_bytes();
                let replies = pipeline(&session, vec![sleep], 1).await;
                assert_eq!(replies, [Reply::Status("OK".into())]);
                drop(ended);
            });
        });
        let path = server.shm(0);
        executor::run(LONG, move || async move {
            let session = connect(path).await;
            until_forwarded(&session, before + 1).await;
            for _ in 0..200 {
                let incr = encode(&["INCR", FIRST]);
                assert!(pipeline(&session, vec![incr], 1).await[0].integer() > 0);
            }
        });
        let is_asleep = is_asleep.try_recv() == Err(mpsc::TryRecvError::Empty);
        sleeper.join().unwrap();
        if is_asleep {
            break;
        }
        assert!(seconds < 30, "the other shard does not answer while one sleeps");
        seconds *= 3;
    }
    server.stop();
}

/// Waits until the shard that a session leads to has passed on so many commands.
async fn until_forwarded(session: &Session, count: u64) {
    loop {
        let commands = vec![b"SHARD ONLY\r\nINFO shards\r\n".to_vec()];
        let replies = pipeline(session, commands, 2).await;
        let field = replies[1].text().split(',').find_map(|field| field.strip_prefix("forwarded="));
        if field.unwrap().parse::<u64>().unwrap() >= count {
            break;
        }
    }
}

#[test]
fn a_killed_server_leaves_nothing_that_stops_the_next() {
    let server = Server::start(2);
    Client::unix(&server.unix()).ask("SET a 1");
    let directory = server.kill();
    assert!(!directory.files().is_empty(), "there is nothing to replace");
    let server = Server::start_in(directory, 2);
    let mut client = Client::unix(&server.unix());
    assert_eq!(client.ask("GET a"), Reply::Bulk(None));
    assert_eq!(client.ask("SET a 1"), Reply::Status("OK".into()));
    server.stop();
}

#[test]
fn one_shard_needs_no_shared_memory() {
    let directory = Directory::new();
    let mut process = Running::start(&[
        "--shards",
        "1",
        "--unix",
        &directory.file("unix"),
        "--spin",
        "0",
        "--pin",
    ]);
    let path = process.line_with("listening on unix ");
    process.line_with("ready");
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let mut client = Client::unix(&path);
    assert_eq!(client.ask("MSET a 1 b 2 c 3"), Reply::Status("OK".into()));
    assert_eq!(client.ask("MGET a b c").array().len(), 3);
    let refusal = client.ask("DEBUG SLEEP 1");
    assert!(matches!(&refusal, Reply::Error(text) if text.contains("not allowed")), "{refusal:?}");
    process.signal(Signal::SIGINT);
    assert!(process.end().0.success());
    assert_eq!(directory.files(), [""; 0]);
}

#[test]
fn wrong_arguments_end_with_2() {
    let tcp = ["--tcp", "127.0.0.1:0"];
    let wrong: &[&[&str]] = &[
        &[],
        &["--shards", "2"],
        &["--shards", "2", "--tcp", "127.0.0.1:0"],
        &["--shm", "/tmp/never-made", "--shards", "0"],
        &["--shm", "/tmp/never-made", "--shards", "257"],
        &["--shm", "/tmp/never-made", "--max-bulk", "7"],
        &["--tcp", "localhost", "--shards", "1"],
        &["--tcp", "localhost:80:80", "--shards", "1"],
        &[tcp[0], tcp[1], "--shards", "1", "--spin", "long"],
        &[tcp[0], tcp[1], "--shards", "1", "--nonsense"],
        &[tcp[0], tcp[1], "--shards", "1", "stray"],
    ];
    for arguments in wrong {
        let mut process = Running::start(arguments);
        let (status, output) = process.end();
        assert_eq!(status.code(), Some(2), "{arguments:?}");
        assert_eq!(output, "", "{arguments:?}");
        process.line_with("error: ");
    }
    // Nothing is wrong with these but that the directory is not there.
    for door in ["--unix", "--shm"] {
        let mut process = Running::start(&["--shards", "1", door, "/nowhere/kv"]);
        assert_eq!(process.end().0.code(), Some(1), "{door}");
    }
    let (status, usage) = Running::start(&["--help"]).end();
    assert!(status.success() && usage.contains("\nUsage: kv_server"), "{usage}");
}
