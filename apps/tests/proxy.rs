// SPDX-License-Identifier: MIT OR Apache-2.0
//! The proxy between real programs: a client's socket, two processes with shared memory between
//! them, and a server's socket.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, mpsc};
use std::thread;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;

use kv::client::{Client, Reply};
use support::executor::SocketPath;
use support::payload::{Way, check, payload};
use support::process::{LONG, Process, until};
use support::proxy::{Pair, Proxy, Server, echo, echo_all, has_ended};

#[path = "support/kv/mod.rs"]
#[allow(dead_code, reason = "not all of it is needed here")]
mod kv;
mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
    pub(crate) mod http;
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod payload;
    pub(crate) mod process;
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod proxy;
}

const MIB: usize = 1 << 20;

#[test]
fn every_byte_comes_back_on_64_connections_at_the_same_time() {
    let path = SocketPath::new();
    let server = Server::unix(path.as_str(), echo);
    let pair = Pair::to(&server);
    let small = [1, 7, 100, 4096, 20_000];
    let large = [65_515, 65_516, 65_517, 200_000, 1, MIB, 4 * MIB];
    let connections: Vec<TcpStream> = (0..64).map(|_| pair.near.connect()).collect();
    thread::scope(|scope| {
        for (number, stream) in connections.iter().enumerate() {
            let sizes = if number % 8 == 0 { &large[..] } else { &small[..] };
            scope.spawn(move || {
                for _ in 0..3 {
                    echo_all(stream, number as u32, sizes);
                }
            });
        }
    });
    drop(connections);
    let bytes = 3 * (8 * large.iter().sum::<usize>() + 56 * small.iter().sum::<usize>());
    let totals = pair.stop();
    assert_eq!(totals["connections"], 64, "{totals}");
    assert_eq!(totals["bytes_up"], bytes, "{totals}");
    assert_eq!(totals["bytes_down"], bytes, "{totals}");
}

#[test]
fn every_kind_of_place_leads_to_every_other() {
    let server = Server::tcp(echo);
    let paths: Vec<SocketPath> = (0..4).map(|_| SocketPath::new()).collect();
    let kinds = ["shm", "shm", "unix", "unix"];
    let places: Vec<String> =
        kinds.iter().zip(&paths).map(|(kind, path)| format!("{kind}:{}", path.as_str())).collect();
    // tcp to unix, unix to unix, unix to shm, shm to shm, shm to tcp.
    let mut proxies = Vec::new();
    let mut next = &server.address;
    for place in &places {
        proxies.push(Proxy::start(place, next, &[]));
        next = place;
    }
    let first = Proxy::start("tcp:127.0.0.1:0", next, &[]);
    let stream = first.connect();
    echo_all(&stream, 1, &[1, 65_536, MIB]);
    stream.shutdown(Shutdown::Write).unwrap();
    assert!(has_ended(&stream));
    proxies.push(first);
    for proxy in proxies {
        let totals = proxy.stop();
        assert_eq!(totals["bytes_down"], 1 + 65_536 + MIB, "{totals}");
        assert_eq!(totals["failed"], 0, "{totals}");
    }
}

#[test]
fn thousands_of_connections_are_open_at_the_same_time() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    // Both ends of the line are in this process, and other tests have descriptors too.
    let count = 2500.min(hard as usize / 2 - 500);
    let path = SocketPath::new();
    let server = Server::unix(path.as_str(), echo);
    let pair = Pair::to(&server);
    let mut connections: Vec<TcpStream> = (0..count).map(|_| pair.near.connect()).collect();
    for round in 0..3 {
        for (number, stream) in connections.iter_mut().enumerate() {
            let len = 1 + number * 7 % 3000;
            stream.write_all(&payload(Way::Request, number as u32, round, len)).unwrap();
        }
        for (number, stream) in connections.iter_mut().enumerate() {
            let mut echoed = vec![0; 1 + number * 7 % 3000];
            stream.read_exact(&mut echoed).unwrap();
            check(&echoed, Way::Request, number as u32, round);
        }
    }
    for stream in &connections {
        stream.shutdown(Shutdown::Write).unwrap();
    }
    assert!(connections.iter().all(has_ended));
    assert_eq!(pair.stop()["connections"], count);
}

#[test]
fn who_finds_no_descriptor_is_served_when_there_is_one() {
    let server = Server::tcp(echo);
    let Pair { near, far, _path } = Pair::to(&server);
    near.stop();
    let mut near = Proxy::start_limited("-n 64", "tcp:127.0.0.1:0", &far.address, &[]);
    let mut clients: Vec<TcpStream> = (0..100).map(|_| near.connect()).collect();
    for client in &mut clients {
        client.write_all(b"!").unwrap();
    }
    near.process.line_with("cannot accept now");
    // In the order in which they came. Each that has gone makes room for another.
    for mut client in clients {
        client.read_exact(&mut [0]).unwrap();
    }
    assert_eq!(near.stop()["connections"], 100);
    far.stop();
}

#[test]
fn an_answer_that_waits_for_the_end_of_the_request_comes() {
    for len in [0, 1, MIB] {
        let answer = move |mut stream: UnixStream| {
            let mut request = Vec::new();
            stream.read_to_end(&mut request)?;
            check(&request, Way::Request, 1, 1);
            stream.write_all(&payload(Way::Reply, 1, request.len() as u32, MIB + 1))
        };
        let server = Server::tcp(answer);
        let pair = Pair::to(&server);
        let mut client = pair.near.connect();
        client.write_all(&payload(Way::Request, 1, 1, len)).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        assert_eq!(answer.len(), MIB + 1);
        check(&answer, Way::Reply, 1, len as u32);
        pair.stop();
    }
}

#[test]
fn a_server_that_speaks_and_ends_first_still_hears_the_client() {
    let (tell, told) = mpsc::channel();
    let tell = Mutex::new(tell);
    let path = SocketPath::new();
    let server = Server::unix(path.as_str(), move |mut stream: UnixStream| {
        stream.write_all(b"welcome, and goodbye")?;
        stream.shutdown(Shutdown::Write)?;
        let mut all = Vec::new();
        stream.read_to_end(&mut all)?;
        tell.lock().unwrap().send(all).unwrap();
        Ok(())
    });
    let pair = Pair::to(&server);
    let mut client = pair.near.connect();
    let mut greeting = String::new();
    client.read_to_string(&mut greeting).unwrap();
    assert_eq!(greeting, "welcome, and goodbye");
    // Not a byte has gone this way until now.
    for _ in 0..4 {
        client.write_all(&payload(Way::Request, 1, 1, MIB)).unwrap();
    }
    drop(client);
    let heard = told.recv_timeout(LONG).unwrap();
    assert_eq!(heard.len(), 4 * MIB);
    heard.chunks(MIB).for_each(|part| check(part, Way::Request, 1, 1));
    pair.stop();
}

#[test]
fn an_answer_in_mid_request_comes_though_nobody_takes_the_rest() {
    let path = SocketPath::new();
    let server = Server::unix(path.as_str(), |mut stream: UnixStream| {
        stream.read_exact(&mut [0; 1000])?;
        // Closes with most of the request unread.
        stream.write_all(b"too much")
    });
    let pair = Pair::to(&server);
    for _ in 0..20 {
        let client = pair.near.connect();
        thread::scope(|scope| {
            // Fails when the buffers on the way do not hold all of it, since nobody takes it.
            scope.spawn(|| (&client).write_all(&[1; 4 * MIB]).ok());
            let mut answer = [0; 8];
            (&client).read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"too much");
        });
    }
    pair.near.stop();
    pair.far.stop();
}

/// A server of HTTP behind a pair, and a client before it that keeps its connections.
fn web() -> (Pair, Server, ureq::Agent, String) {
    let file = payload(Way::Reply, 80, 1, MIB);
    let server = Server::tcp(move |stream| support::http::serve(stream, &file));
    let pair = Pair::to(&server);
    let config = ureq::Agent::config_builder().timeout_global(Some(LONG)).proxy(None).build();
    let at = pair.near.address.replace("tcp:", "http://");
    (pair, server, config.into(), at)
}

fn body(mut response: ureq::http::Response<ureq::Body>) -> Vec<u8> {
    assert_eq!(response.status(), 200);
    response.body_mut().with_config().limit(u64::MAX).read_to_vec().unwrap()
}

#[test]
fn a_client_of_http_gets_a_file_again_and_again_on_one_connection() {
    let (pair, _server, client, at) = web();
    for _ in 0..5 {
        let got = body(client.get(format!("{at}/file")).call().unwrap());
        assert_eq!(got.len(), MIB);
        check(&got, Way::Reply, 80, 1);
    }
    drop(client);
    assert_eq!(pair.stop()["connections"], 1, "one connection for all");
}

#[test]
fn a_client_of_http_posts_a_file() {
    let (pair, _server, client, at) = web();
    for (len, must_ask) in [(MIB, false), (MIB + 1, true)] {
        let posted = payload(Way::Request, 80, 1, len);
        let mut request = client.post(format!("{at}/echo"));
        if must_ask {
            // The client waits until the server has said that it wants the body.
            request = request.header("expect", "100-continue");
        }
        assert!(body(request.send(&posted[..]).unwrap()) == posted, "{len}");
    }
    drop(client);
    pair.stop();
}

/// What a client of Redis says about the store at a port.
fn try_store(port: &str) {
    let url = format!("redis://127.0.0.1:{port}");
    assert_eq!(kv::crate_redis::ask(&url, &["ping"]), "PONG\n");
    assert_eq!(kv::crate_redis::ask(&url, &["set", "greeting", "hello"]), "OK\n");
    assert_eq!(kv::crate_redis::ask(&url, &["get", "greeting"]), "hello\n");
    let mut client = Client::tcp(&format!("127.0.0.1:{port}"));
    for (number, key) in ["one", "two", "three", "four"].into_iter().enumerate() {
        let value = payload(Way::Request, number as u32, 0, MIB);
        let set = client.call(&[b"SET".as_slice(), key.as_bytes(), &value]);
        assert_eq!(set, Reply::Status("OK".into()));
        let got = client.call(&[b"GET".as_slice(), key.as_bytes()]);
        assert!(got == Reply::Bulk(Some(value)), "{key} is not what it was set to");
    }
    kv::crate_redis::load(&url);
}

#[test]
fn a_client_of_redis_reaches_the_store_through_a_pair() {
    let store = kv::process::Server::start(2);
    let path = SocketPath::new();
    let between = format!("shm:{}", path.as_str());
    let far = Proxy::start(&between, &format!("unix:{}", store.unix()), &[]);
    let near = Proxy::start("tcp:127.0.0.1:0", &between, &[]);
    let pair = Pair { near, far, _path: path };
    try_store(pair.near.address.rsplit(':').next().unwrap());
    // Three of single commands, one of large values, ten of the load.
    assert_eq!(pair.stop()["connections"], 3 + 1 + 10);
    store.stop();
}

#[test]
fn one_proxy_is_enough_before_a_store_that_speaks_shmipc() {
    let store = kv::process::Server::start(2);
    let near = Proxy::start("tcp:127.0.0.1:0", &format!("shm:{}", store.any_shm()), &[]);
    try_store(near.address.rsplit(':').next().unwrap());
    // Connections are dealt over the shards; each shard has a session with the other one, too.
    let text = Client::unix(&store.unix()).ask("INFO shards").text().to_owned();
    let with_sessions = text.lines().filter(|line| line.contains(",sessions=2,")).count();
    assert_eq!(with_sessions, 2, "{text}");
    assert_eq!(near.stop()["failed"], 0);
    store.stop();
}

#[test]
fn a_server_may_come_late_and_come_again() {
    let path = SocketPath::new();
    drop(Server::unix(path.as_str(), echo));
    // The path is there, and nobody listens.
    let nobody = Server::unix(path.as_str(), echo);
    let pair = Pair::to(&nobody);
    drop(nobody);
    for _ in 0..3 {
        assert!(has_ended(&pair.near.connect()));
        let server = Server::unix(path.as_str(), echo);
        let stream = pair.near.connect();
        echo_all(&stream, 1, &[1, 100_000]);
        drop(server);
        // Who is connected stays so.
        echo_all(&stream, 2, &[1, 100_000]);
    }
    for totals in [pair.near.stop(), pair.far.stop()] {
        assert_eq!(totals["failed"], 3, "{totals}");
    }
}

#[test]
fn a_far_proxy_that_is_killed_is_found_again() {
    let server = Server::tcp(echo);
    let mut pair = Pair::to(&server);
    for round in 0..3 {
        let stream = pair.near.connect();
        echo_all(&stream, round, &[1, 100_000]);
        let address = pair.far.address.clone();
        pair.far.process.signal(Signal::SIGKILL);
        pair.far.process.end();
        // It failed, which must not look like an end.
        let error = (&stream).read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        if round == 1 {
            // Nobody comes in time.
            assert!(has_ended(&pair.near.connect()));
        }
        let mut waiting = pair.near.connect();
        pair.far = Proxy::start(&address, &server.address, &[]);
        // Served, or closed because its time was over: that depends on the machine.
        let _ = waiting.write_all(b"?");
        let is_served = matches!(waiting.read(&mut [0]), Ok(1));
        assert!(is_served || has_ended(&waiting));
        until("the near proxy has a session again", || {
            let mut stream = pair.near.connect();
            stream.write_all(b"?").is_ok() && matches!(stream.read(&mut [0]), Ok(1))
        });
    }
    pair.near.stop();
    pair.far.stop();
}

#[test]
fn open_connections_may_end_before_the_proxy_does() {
    let server = Server::tcp(echo);
    let Pair { mut near, mut far, _path } = Pair::with_options(&server, &["--grace", "90"]);
    let stream = near.connect();
    echo_all(&stream, 1, &[10_000]);
    near.process.signal(Signal::SIGTERM);
    let address = near.address.strip_prefix("tcp:").unwrap();
    until("nothing more is accepted", || TcpStream::connect(address).is_err());
    // Not before: it resets what it does not take any more.
    far.process.signal(Signal::SIGINT);
    echo_all(&stream, 2, &[10_000]);
    stream.shutdown(Shutdown::Write).unwrap();
    assert!(has_ended(&stream));
    for totals in [near.totals(), far.totals()] {
        assert_eq!(totals["failed"], 0, "{totals}");
        assert_eq!(totals["bytes_up"], 20_000, "{totals}");
    }
}

#[test]
fn connections_that_do_not_end_are_cut_with_a_reset() {
    let server = Server::tcp(echo);
    let pair = Pair::with_options(&server, &["--grace", "0"]);
    let stream = pair.near.connect();
    echo_all(&stream, 1, &[10_000]);
    assert_eq!(pair.near.stop()["failed"], 1);
    let error = (&stream).read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    pair.far.stop();
}

#[test]
fn a_unix_socket_is_private_and_taken_over_from_the_dead_only() {
    let (between, place) = (SocketPath::new(), SocketPath::new());
    let between = format!("shm:{}", between.as_str());
    let listen = format!("unix:{}", place.as_str());
    let server = Server::tcp(echo);
    let far = Proxy::start(&between, &server.address, &[]);
    let mut near = Proxy::start(&listen, &between, &[]);
    assert_eq!(near.address, listen);
    let mode = fs::metadata(place.as_str()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    for taken in [&listen, &between] {
        let mut second = Process::start("proxy", &["--listen", taken, "--connect", &between]);
        assert_eq!(second.end().0.code(), Some(1));
        second.line_with("in use");
    }
    near.process.signal(Signal::SIGKILL);
    near.process.end();
    let near = Proxy::start(&listen, &between, &[]);
    let mut stream = UnixStream::connect(place.as_str()).unwrap();
    stream.write_all(b"still here").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut echoed = String::new();
    stream.read_to_string(&mut echoed).unwrap();
    assert_eq!(echoed, "still here");
    near.stop();
    far.stop();
}

#[test]
fn wrong_arguments_end_with_2() {
    let [listen, connect] = [["--listen", "tcp:127.0.0.1:0"], ["--connect", "unix:/tmp/nobody"]];
    let right = [listen, connect].concat();
    let wrong: &[&[&str]] = &[
        &[],
        &listen,
        &connect,
        &[&right[..], &listen].concat(),
        &[&listen[..], &["--connect"]].concat(),
        &[&listen[..], &["--connect", "tcp"]].concat(),
        &[&listen[..], &["--connect", "tcp:localhost"]].concat(),
        &[&listen[..], &["--connect", "unix:"]].concat(),
        &[&listen[..], &["--connect", "udp:127.0.0.1:53"]].concat(),
        &[&right[..], &["--grace", "-1"]].concat(),
        &[&right[..], &["--grace", "18446744073709551615"]].concat(),
        &[&right[..], &["--half-close-timeout", "soon"]].concat(),
        &[&right[..], &["--half-close-timeout=-1"]].concat(),
        &[&right[..], &["--half-close-timeout", "NaN"]].concat(),
        &[&right[..], &["--half-close-timeout", "1e300"]].concat(),
        &[&right[..], &["stray"]].concat(),
    ];
    for arguments in wrong {
        let mut process = Process::start("proxy", arguments);
        let (status, output) = process.end();
        assert_eq!(status.code(), Some(2), "{arguments:?}");
        assert_eq!(output, "", "{arguments:?}");
        process.line_with("--help");
    }
    let (status, output) = Process::start("proxy", &["--help"]).end();
    assert!(status.success() && output.contains("\nUsage: proxy"), "{status}: {output}");
}
