// SPDX-License-Identifier: MIT OR Apache-2.0
//! How connections through the proxy end: a clean end stays one, a cut stays a cut, and nothing is
//! kept of those that are gone.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::Duration;

use futures_lite::{AsyncReadExt, AsyncWriteExt};
use nix::sys::signal::Signal;
use serde_json::Value;
use shmipc_glommio::{Config, Connector};

use support::executor::SocketPath;
use support::process::{LONG, until};
use support::proxy::{Pair, Proxy, Server, descriptors, echo, reset};

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

/// How much of an answer comes before it is cut, and how much was promised.
const PART: usize = 3027;
const WHOLE: usize = 1_000_000;

/// A server whose connections are told to the test.
fn server_that_tells<T: Send + 'static>(
    handle: impl Fn(UnixStream) -> io::Result<T> + Send + Sync + 'static,
) -> (Server, mpsc::Receiver<T>) {
    let (tell, told) = mpsc::channel();
    let tell = Mutex::new(tell);
    let server = Server::tcp(move |stream| {
        stream.set_read_timeout(Some(LONG))?;
        stream.set_write_timeout(Some(LONG))?;
        // When the test is over nobody listens.
        let _ = tell.lock().unwrap().send(handle(stream)?);
        Ok(())
    });
    (server, told)
}

/// Reads to the end. Gives how much came, and whether the end was a reset.
fn read_to_any_end(mut stream: impl Read) -> (usize, bool) {
    let (mut buffer, mut len) = (vec![0; 64 << 10], 0);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (len, false),
            Ok(count) => len += count,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return (len, true),
            Err(error) => panic!("neither an end nor a reset after {len} bytes: {error}"),
        }
    }
}

/// Writes until that fails, which it must.
fn write_to_the_end(mut stream: impl Write) {
    let chunk = vec![0; 64 << 10];
    while stream.write_all(&chunk).is_ok() {}
}

/// Ends both, and checks how many connections they say have failed.
fn stop_with_failed(pair: Pair, failed: u64) {
    for totals in [pair.near.stop(), pair.far.stop()] {
        assert_eq!(totals["failed"], failed, "{totals}");
    }
}

#[test]
fn a_server_that_resets_in_mid_answer_does_not_look_as_if_that_were_all() {
    let (server, _told) = server_that_tells(|mut stream: UnixStream| {
        let mut request = [0; 2];
        stream.read_exact(&mut request)?;
        stream.write_all(&[1; PART])?;
        if request[0] == b'w' {
            // Until what there is has arrived.
            stream.read_exact(&mut [0])?;
        }
        if request[1] == b'u' {
            // With something unread, the kernel resets by itself.
            thread::sleep(Duration::from_millis(5));
        } else {
            reset(&stream);
        }
        Ok(())
    });
    let alone = Proxy::start("tcp:127.0.0.1:0", &server.address, &[]);
    let pair = Pair::to(&server);
    // From one session into another.
    let path = SocketPath::new();
    let between = format!("shm:{}", path.as_str());
    let middle = Proxy::start(&between, &pair.far.address, &[]);
    let front = Proxy::start("tcp:127.0.0.1:0", &between, &[]);
    for proxy in [&alone, &pair.near, &front] {
        for order in ["w-", "--", "-u", "--", "-u", "--"] {
            let mut client = proxy.connect();
            client.write_all(order.as_bytes()).unwrap();
            let mut arrived = 0;
            if order == "w-" {
                client.read_exact(&mut [0; PART]).unwrap();
                arrived = PART;
                client.write_all(b"!").unwrap();
            } else if order == "-u" {
                client.write_all(b"unread").unwrap();
            }
            let (len, was_reset) = read_to_any_end(&client);
            assert!(was_reset, "{order}: a clean end after {len} bytes of {WHOLE}");
            assert!(arrived + len <= PART);
        }
    }
    for proxy in [alone, front, middle, pair.near] {
        assert_eq!(proxy.stop()["failed"], 6);
    }
    assert_eq!(pair.far.stop()["failed"], 12);
}

#[test]
fn a_reset_among_writes_in_both_directions_is_never_a_clean_end() {
    // The kernel tells a reset once: here to the reader, there to the writer.
    let (server, _told) = server_that_tells(|mut stream: UnixStream| {
        stream.read_exact(&mut [0; 100_000])?;
        stream.write_all(&[1; PART])?;
        reset(&stream);
        Ok(())
    });
    let pair = Pair::to(&server);
    for _ in 0..30 {
        let client = pair.near.connect();
        thread::scope(|scope| {
            scope.spawn(|| write_to_the_end(&client));
            // The kernel tells this process once, too: either of the two hears of it.
            let mut buffer = vec![0; 64 << 10];
            let mut len = 0;
            let error = loop {
                match (&client).read(&mut buffer) {
                    Ok(0) => break None,
                    Ok(count) => len += count,
                    Err(error) => break Some(error),
                }
            };
            let was_told = error.is_some_and(|it| it.kind() == io::ErrorKind::ConnectionReset);
            // When it was not told, the writer was: it has not ended by a clean end.
            assert!(was_told || (&client).write(&[1]).is_err(), "a clean end after {len} bytes");
        });
    }
    stop_with_failed(pair, 30);
}

#[test]
fn a_client_that_resets_is_reset_for_the_server() {
    let (server, told) = server_that_tells(|mut stream: UnixStream| {
        let mut order = [0];
        stream.read_exact(&mut order)?;
        stream.write_all(&order)?;
        if order == *b"s" {
            // Sends for as long as somebody takes it.
            write_to_the_end(&stream);
            return Ok((0, true));
        }
        Ok(read_to_any_end(stream))
    });
    let alone = Proxy::start("tcp:127.0.0.1:0", &server.address, &[]);
    let pair = Pair::to(&server);
    for proxy in [&alone, &pair.near] {
        for order in ["i", "p", "s"] {
            let mut client = proxy.connect();
            client.write_all(order.as_bytes()).unwrap();
            client.read_exact(&mut [0]).unwrap();
            if order == "p" {
                client.write_all(&[1; PART]).unwrap();
            }
            reset(&client);
            drop(client);
            let (len, was_reset) = told.recv_timeout(LONG).unwrap();
            assert!(was_reset, "{order}: a clean end after {len} bytes");
        }
    }
    assert_eq!(alone.stop()["failed"], 3);
    stop_with_failed(pair, 3);
}

#[test]
fn a_cut_behind_the_end_of_the_other_direction_is_still_a_cut() {
    let (server, told) = server_that_tells(|mut stream: UnixStream| {
        let mut order = [0];
        stream.read_exact(&mut order)?;
        if order == *b"c" {
            // The client has finished. Its answer is cut.
            assert_eq!(stream.read(&mut order)?, 0);
            stream.write_all(&[1; PART])?;
            reset(&stream);
            return Ok((0, true));
        }
        // This side finishes. What comes is cut.
        stream.shutdown(Shutdown::Write)?;
        Ok(read_to_any_end(stream))
    });
    let pair = Pair::to(&server);
    for _ in 0..5 {
        let mut client = pair.near.connect();
        client.write_all(b"c").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let (len, was_reset) = read_to_any_end(&client);
        assert!(was_reset, "a clean end after {len} bytes of {WHOLE}");
        told.recv_timeout(LONG).unwrap();

        let mut client = pair.near.connect();
        client.write_all(b"s").unwrap();
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        client.write_all(&[1; PART]).unwrap();
        reset(&client);
        drop(client);
        let (len, was_reset) = told.recv_timeout(LONG).unwrap();
        assert!(was_reset, "a clean end after {len} bytes");
    }
    stop_with_failed(pair, 10);
}

#[test]
fn a_proxy_that_dies_cuts_its_connections_on_both_sides() {
    let (server, told) = server_that_tells(|mut stream: UnixStream| {
        stream.read_exact(&mut [0])?;
        stream.write_all(&[1; PART])?;
        Ok(read_to_any_end(stream))
    });
    for kills_near in [false, true] {
        let mut pair = Pair::to(&server);
        let mut client = pair.near.connect();
        client.write_all(b"?").unwrap();
        client.read_exact(&mut [0; PART]).unwrap();
        let killed = if kills_near { &mut pair.near } else { &mut pair.far };
        killed.process.signal(Signal::SIGKILL);
        killed.process.end();
        if kills_near {
            let (len, was_reset) = told.recv_timeout(LONG).unwrap();
            assert!(was_reset, "the server: a clean end after {len} bytes");
            assert_eq!(pair.far.stop()["failed"], 1);
        } else {
            let (len, was_reset) = read_to_any_end(&client);
            assert!(was_reset, "the client: a clean end after {len} bytes");
            told.recv_timeout(LONG).unwrap();
            assert_eq!(pair.near.stop()["failed"], 1);
        }
    }
}

#[test]
fn what_is_cut_when_a_proxy_stops_is_reset_on_both_sides() {
    for stops_near in [false, true] {
        let (server, told) = server_that_tells(|mut stream: UnixStream| {
            stream.read_exact(&mut [0])?;
            stream.write_all(&[1; PART])?;
            Ok(read_to_any_end(stream))
        });
        let pair = Pair::with_options(&server, &["--grace", "0"]);
        let mut client = pair.near.connect();
        client.write_all(b"?").unwrap();
        client.read_exact(&mut [0; PART]).unwrap();
        let (first, second) =
            if stops_near { (pair.near, pair.far) } else { (pair.far, pair.near) };
        let totals = first.stop();
        assert_eq!(
            [&totals["failed"], &totals["cut_at_stop"]],
            [&Value::from(1), &Value::from(1)],
            "{totals}"
        );
        assert!(read_to_any_end(&client).1, "the client: a clean end");
        assert!(told.recv_timeout(LONG).unwrap().1, "the server: a clean end");
        let totals = second.stop();
        assert_eq!(totals["failed"], 1, "{totals}");
        assert_eq!(totals["cut_at_stop"], 0, "{totals}");
    }
}

#[test]
fn a_server_that_cannot_be_reached_is_no_clean_end() {
    let path = SocketPath::new();
    let nobody = Server::unix(path.as_str(), echo);
    let pair = Pair::to(&nobody);
    drop(nobody);
    for _ in 0..3 {
        let (len, was_reset) = read_to_any_end(pair.near.connect());
        assert!(was_reset && len == 0, "a clean end after {len} bytes");
    }
    let near = pair.near.stop();
    assert_eq!(near["failed"], 3, "{near}");
    let far = pair.far.stop();
    assert_eq!([&far["failed"], &far["unreachable"]], [&Value::from(3), &Value::from(3)], "{far}");
}

#[test]
fn a_connection_that_ends_at_once_does_not_hold_up_the_stop() {
    let [door, nobody] = [SocketPath::new(), SocketPath::new()];
    let places = [format!("unix:{}", door.as_str()), format!("unix:{}", nobody.as_str())];
    let proxy = Proxy::start(&places[0], &places[1], &["--grace", "100"]);
    for _ in 0..3 {
        read_to_any_end(UnixStream::connect(door.as_str()).unwrap());
    }
    let totals = proxy.stop();
    let found = ["connections", "failed", "unreachable", "cut_at_stop"].map(|name| &totals[name]);
    assert_eq!(found, [3, 3, 3, 0], "{totals}");
}

#[test]
fn unix_sockets_are_reset_as_far_as_they_can_say_so() {
    // A server on a Unix socket resets when something is unread.
    let path = SocketPath::new();
    let server = Server::unix(path.as_str(), |mut stream: UnixStream| {
        stream.read_exact(&mut [0])?;
        stream.write_all(&[1; PART])?;
        until("the rest has come", || unread(&stream) > 0);
        Ok(())
    });
    let pair = Pair::to(&server);
    for _ in 0..5 {
        let mut client = pair.near.connect();
        client.write_all(b"?and more").unwrap();
        let (len, was_reset) = read_to_any_end(&client);
        assert!(was_reset, "a clean end after {len} bytes of {WHOLE}");
    }
    stop_with_failed(pair, 5);

    // A client on a Unix socket does so too, and is told, when something is unread.
    let place = SocketPath::new();
    let (server, told) = server_that_tells(|mut stream: UnixStream| {
        let mut order = [0];
        stream.read_exact(&mut order)?;
        stream.write_all(&[1; PART])?;
        if order == *b"r" {
            // The proxy cannot take all of what the client sends.
            thread::sleep(Duration::from_millis(50));
            reset(&stream);
            return Ok((0, true));
        }
        Ok(read_to_any_end(stream))
    });
    let listen = format!("unix:{}", place.as_str());
    let proxy = Proxy::start(&listen, &server.address, &[]);
    let connect = || {
        let stream = UnixStream::connect(place.as_str()).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.set_write_timeout(Some(LONG)).unwrap();
        stream
    };
    let mut client = connect();
    client.write_all(b"?").unwrap();
    until("the answer has come", || unread(&client) > 0);
    drop(client);
    assert!(told.recv_timeout(LONG).unwrap().1, "the server: a clean end");
    let mut client = connect();
    client.write_all(b"r").unwrap();
    // The kernel tells it once: the writer, or else the reader.
    let chunk = [0; 1024];
    let error = loop {
        if let Err(error) = client.write_all(&chunk) {
            break error;
        }
    };
    let was_reset = error.kind() == io::ErrorKind::ConnectionReset || read_to_any_end(&client).1;
    assert!(was_reset, "the client: a clean end, and {error}");
    assert_eq!(proxy.stop()["failed"], 2);
}

/// How many bytes wait to be read.
fn unread(stream: &UnixStream) -> usize {
    use nix::sys::socket::{MsgFlags, recv};
    use std::os::fd::AsRawFd;
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(stream.as_raw_fd(), &mut [0; 16], flags).unwrap_or(0)
}

/// Runs this with each kind of place for clients before a pair, and with the client's socket.
fn on_each_kind_of_socket(
    server: &Server,
    options: &[&str],
    mut run: impl FnMut(&Proxy, &Proxy, &dyn Fn() -> UnixStream),
) {
    let (between, place) = (SocketPath::new(), SocketPath::new());
    let between = format!("shm:{}", between.as_str());
    let far = Proxy::start(&between, &server.address, options);
    let unix = Proxy::start(&format!("unix:{}", place.as_str()), &between, options);
    let tcp = Proxy::start("tcp:127.0.0.1:0", &between, options);
    let over_tcp = || UnixStream::from(OwnedFd::from(tcp.connect()));
    let over_unix = || {
        let stream = UnixStream::connect(place.as_str()).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    };
    run(&tcp, &far, &over_tcp);
    run(&unix, &far, &over_unix);
    for totals in [tcp.stop(), unix.stop(), far.stop()] {
        assert_eq!(totals["failed"], 0, "{totals}");
    }
}

/// The descriptors of two processes when nothing changes any more.
fn at_rest(near: &Proxy, far: &Proxy) -> (usize, usize) {
    let count = || (descriptors(&near.process), descriptors(&far.process));
    let mut before = count();
    loop {
        thread::sleep(Duration::from_millis(200));
        let now = count();
        if now == before {
            return now;
        }
        before = now;
    }
}

/// Waits until two processes have no more descriptors than at rest.
fn until_at_rest(near: &Proxy, far: &Proxy, rest: (usize, usize)) {
    until("nothing is kept of those that are gone", || {
        (descriptors(&near.process), descriptors(&far.process)) == rest
    });
}

#[test]
fn a_client_that_has_finished_and_goes_is_noticed_though_nobody_writes_to_it() {
    // The server hears the end, answers nothing, and stays.
    let (server, told) = server_that_tells(|mut stream: UnixStream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all)?;
        Ok(stream)
    });
    on_each_kind_of_socket(&server, &[], |near, far, connect| {
        let finish = || {
            let mut client = connect();
            client.write_all(b"!").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let there = told.recv_timeout(LONG).unwrap();
            // Over TCP a close behind an end says nothing, a reset does.
            let _ = nix::sys::socket::setsockopt(
                &client,
                nix::sys::socket::sockopt::Linger,
                &nix::libc::linger { l_onoff: 1, l_linger: 0 },
            );
            there
        };
        // What is made once is made now.
        drop(finish());
        let rest = at_rest(near, far);
        let kept: Vec<_> = (0..20).map(|_| finish()).collect();
        until_at_rest(near, far, rest);
        drop(kept);
    });
}

#[test]
fn a_server_that_has_finished_and_goes_is_noticed_though_nobody_writes_to_it() {
    let (server, told) = server_that_tells(|mut stream: UnixStream| {
        stream.read_exact(&mut [0])?;
        stream.shutdown(Shutdown::Write)?;
        Ok(stream)
    });
    on_each_kind_of_socket(&server, &[], |near, far, connect| {
        let be_left = || {
            let mut client = connect();
            client.write_all(b"!").unwrap();
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
            reset(told.recv_timeout(LONG).unwrap());
            client
        };
        drop(be_left());
        let rest = at_rest(near, far);
        let kept: Vec<_> = (0..20).map(|_| be_left()).collect();
        until_at_rest(near, far, rest);
        // Whoever writes hears of it.
        kept.into_iter().for_each(write_to_the_end);
    });
}

#[test]
fn a_client_that_resets_is_noticed_though_the_server_takes_nothing() {
    let (server, told) = server_that_tells(|mut stream: UnixStream| {
        stream.read_exact(&mut [0])?;
        Ok(stream)
    });
    let pair = Pair::to(&server);
    let stall = || {
        let client = pair.near.connect();
        // Until nothing more is taken.
        client.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        write_to_the_end(&client);
        reset(&client);
        told.recv_timeout(LONG).unwrap()
    };
    stall();
    let rest = at_rest(&pair.near, &pair.far);
    let kept: Vec<_> = (0..3).map(|_| stall()).collect();
    until_at_rest(&pair.near, &pair.far, rest);
    for stream in kept {
        let (len, was_reset) = read_to_any_end(stream);
        assert!(was_reset, "a clean end after {len} bytes");
    }
    stop_with_failed(pair, 4);
}

#[test]
fn ordinary_ends_are_not_called_failed() {
    let (server, _told) = server_that_tells(|mut stream: UnixStream| {
        let mut order = [0];
        while stream.read(&mut order)? > 0 {
            stream.write_all(&order)?;
            match order[0] {
                // Ends first.
                b'e' => return Ok(()),
                // Has parting words when it hears the end.
                b'p' => {
                    assert_eq!(stream.read(&mut order)?, 0);
                    let _ = stream.write_all(b"goodbye");
                }
                _ => {}
            }
        }
        Ok(())
    });
    on_each_kind_of_socket(&server, &[], |_, _, connect| {
        for round in 0..60 {
            let mut client = connect();
            let order = [b"aep"[round % 3]];
            client.write_all(&order).unwrap();
            client.read_exact(&mut [0]).unwrap();
            match round % 4 {
                // Closes after its answer.
                0 | 1 => {}
                2 => client.shutdown(Shutdown::Write).unwrap(),
                _ => {
                    client.shutdown(Shutdown::Write).unwrap();
                    client.read_to_end(&mut Vec::new()).unwrap();
                }
            }
        }
    });
}

#[test]
fn streams_of_a_program_that_uses_this_crate_end_as_sockets_do() {
    let (server, told) = server_that_tells(|mut stream: UnixStream| {
        let mut order = [0];
        stream.read_exact(&mut order)?;
        stream.write_all(&order)?;
        Ok(read_to_any_end(stream))
    });
    let path = SocketPath::new();
    let proxy = Proxy::start(&format!("shm:{}", path.as_str()), &server.address, &[]);
    let address = path.as_str().to_owned();
    let executor = glommio::LocalExecutorBuilder::default();
    let client = executor.spawn(move || async move {
        let session = Connector::new(Config::default()).connect(&address).await.unwrap();
        for round in 0..9 {
            let mut stream = session.open_stream().unwrap();
            stream.write_all(b"?").await.unwrap();
            stream.read_exact(&mut [0]).await.unwrap();
            match round % 3 {
                // It has its answer.
                0 => drop(stream),
                1 => {
                    stream.finish().await.unwrap();
                    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
                }
                _ => stream.reset(),
            }
        }
        session.close().await.unwrap();
    });
    let client = client.unwrap();
    let mut resets = 0;
    for _ in 0..9 {
        let (len, was_reset) = told.recv_timeout(LONG).unwrap();
        assert_eq!(len, 0);
        resets += u32::from(was_reset);
    }
    client.join().unwrap();
    assert_eq!(resets, 3);
    assert_eq!(proxy.stop()["failed"], 3);
}
