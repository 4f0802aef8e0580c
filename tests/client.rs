// SPDX-License-Identifier: MIT OR Apache-2.0
//! Clients that keep sessions to the shards of a server: how they share the work, what becomes of
//! streams, and what they do when the server goes, changes, or comes.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use futures_lite::future::{or, poll_once, zip};
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use shmipc_glommio::{
    Client, ClientBuilder, Config, Cores, Error, Listener, MemoryKind, ResourceError, Server,
    SessionState, SessionStatus, Spin, Stream,
};

use support::executor::{SocketPath, run, within};

mod support {
    pub(crate) mod executor;
}

const LIMIT: Duration = Duration::from_secs(60);
/// A client that waits this long waits for as long as the test.
const PATIENT: Duration = Duration::from_secs(50);

fn small() -> Config {
    Config::builder().container().build().unwrap()
}

fn client(path: &SocketPath) -> ClientBuilder {
    Client::builder(path.as_str())
        .config(small())
        .acquire_timeout(PATIENT)
        .backoff(Duration::from_millis(1), Duration::from_millis(20))
}

async fn send(stream: &mut Stream, bytes: &[u8]) -> Result<(), Error> {
    let mut loan = stream.alloc(bytes.len()).await?;
    loan.write(bytes);
    stream.send(loan).await
}

async fn ask(stream: &mut Stream, request: &[u8]) -> Result<Vec<u8>, Error> {
    send(stream, request).await?;
    let answer = stream.recv().await?.ok_or(Error::StreamClosedByPeer)?;
    Ok(answer.into_bytes().to_vec())
}

/// What a server is asked for its name.
const WHO: &[u8] = b"who";

/// Answers [`WHO`] with a name and the shard's number, "twice" with two messages, "late" after a
/// moment, and everything else with itself.
fn start(path: &SocketPath, shards: usize, name: &'static str) -> Server {
    Server::builder(path.as_str())
        .cores(Cores::Unpinned(shards))
        .config(small())
        .start(move |shard| async move {
            let who = format!("{name}{}", shard.index());
            Ok::<_, Error>(move |session: shmipc_glommio::Session| {
                let who = who.clone();
                async move {
                    let serve = |stream| answer(stream, who.clone());
                    session.serve_streams(serve).await;
                    Ok::<_, Error>(())
                }
            })
        })
        .unwrap()
}

async fn answer(mut stream: Stream, who: String) -> Result<(), Error> {
    while let Some(request) = stream.recv().await? {
        let request = request.into_bytes();
        match &request[..] {
            WHO => send(&mut stream, who.as_bytes()).await?,
            b"twice" => {
                send(&mut stream, b"one").await?;
                send(&mut stream, b"two").await?;
            }
            b"late" => {
                glommio::timer::sleep(Duration::from_millis(20)).await;
                send(&mut stream, b"late").await?;
            }
            b"never" => {}
            other => send(&mut stream, other).await?,
        }
    }
    Ok(())
}

async fn who(client: &Client, shard: usize) -> Result<String, Error> {
    let answer = client.with_stream(shard, async |stream| ask(stream, WHO).await).await?;
    Ok(String::from_utf8(answer).unwrap())
}

fn only_status(client: &Client) -> SessionStatus {
    let [status] = <[_; 1]>::try_from(client.status()).unwrap();
    status
}

#[test]
fn each_shard_is_reached_and_has_its_own_sessions() {
    let path = SocketPath::new();
    let server = start(&path, 3, "s");
    let builder = (path.as_str().to_owned(), small());
    run(LIMIT, move || async move {
        let client = Client::builder(&builder.0).config(builder.1).sessions_per_shard(2);
        let client = client.build().unwrap();
        assert!(client.status().is_empty(), "nothing was asked for");
        assert_eq!(client.shard_count().unwrap(), 3);
        for shard in [0, 2] {
            assert_eq!(who(&client, shard).await.unwrap(), format!("s{shard}"));
        }
        let shards: Vec<_> = client.status().iter().map(|one| (one.shard, one.slot)).collect();
        assert_eq!(shards, [(0, 0), (0, 1), (2, 0), (2, 1)]);
        client.ready().await.unwrap();
        let is_up = |one: &SessionStatus| matches!(one.state, SessionState::Up);
        assert!(
            within(LIMIT, || client.status().iter().filter(|one| is_up(one)).count() == 6).await
        );
        let error = client.session(3).await.unwrap_err();
        assert!(matches!(error, Error::NoSuchShard { index: 3, count: 3 }), "{error}");
    });
    let accepted: Vec<_> = server.stats().iter().map(|shard| shard.accepted).collect();
    assert_eq!(accepted, [2, 2, 2]);
    server.stop(LIMIT).unwrap();
}

#[test]
fn streams_are_shared_out_evenly() {
    let path = SocketPath::new();
    let server = start(&path, 1, "s");
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let client = Client::builder(&at).config(small()).sessions_per_shard(3).build().unwrap();
        let all_up = || client.status().iter().all(|one| matches!(one.state, SessionState::Up));
        client.session(0).await.unwrap();
        assert!(within(LIMIT, all_up).await);
        let open = || client.status().iter().map(|one| one.open_streams).collect::<Vec<_>>();
        let mut streams = Vec::new();
        for _ in 0..30 {
            streams.push(client.open_stream(0).await.unwrap());
        }
        assert_eq!(open(), [10, 10, 10]);
        // Those of one session go; it gets the next ones.
        let session = client.session(0).await.unwrap();
        drop(session);
        streams.drain(..15);
        for _ in 0..15 {
            streams.push(client.open_stream(0).await.unwrap());
        }
        assert_eq!(open(), [10, 10, 10]);
        // Exchanges on kept streams come in turn as well.
        drop(streams);
        for _ in 0..9 {
            who(&client, 0).await.unwrap();
        }
        let idle: Vec<_> = client.status().iter().map(|one| one.idle_streams).collect();
        assert_eq!(idle, [1, 1, 1]);
    });
    server.stop(LIMIT).unwrap();
}

#[test]
fn a_stream_is_used_again_only_when_nothing_is_left_on_it() {
    let path = SocketPath::new();
    let server = start(&path, 1, "s");
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let client = Client::builder(&at).config(small()).build().unwrap();
        let id = async |client: &Client| {
            let exchange = async |stream: &mut Stream| {
                let id = stream.id();
                ask(stream, WHO).await.map(|answer| (id, answer))
            };
            let (id, answer) = client.with_stream(0, exchange).await.unwrap();
            assert_eq!(answer, b"s0", "somebody else's answer");
            id
        };
        let mut last = id(&client).await;
        assert_eq!(id(&client).await, last, "kept");

        // An error.
        let failing = async |stream: &mut Stream| {
            send(stream, b"late").await?;
            Err::<(), _>(Error::DeadlinePassed)
        };
        client.with_stream(0, failing).await.unwrap_err();
        let next = id(&client).await;
        assert_ne!(next, last);
        last = next;

        // A future that is dropped in the middle, before the answer comes.
        let cancelled = client.with_stream(0, async |stream| ask(stream, b"late").await);
        let enough = async {
            glommio::timer::sleep(Duration::from_millis(5)).await;
            Err(Error::DeadlinePassed)
        };
        or(cancelled, enough).await.unwrap_err();
        let next = id(&client).await;
        assert_ne!(next, last);
        last = next;

        // Something unread: of two answers one was taken.
        let half = client.with_stream(0, async |stream| {
            let first = ask(stream, b"twice").await?;
            while stream.unread() == 0 {
                glommio::timer::sleep(Duration::from_millis(1)).await;
            }
            Ok::<_, Error>(first)
        });
        assert_eq!(half.await.unwrap(), b"one");
        let next = id(&client).await;
        assert_ne!(next, last);
        last = next;

        // A direction that has ended.
        let finished = client.with_stream(0, async |stream| {
            let answer = ask(stream, b"bye").await?;
            stream.finish().await?;
            Ok::<_, Error>(answer)
        });
        assert_eq!(finished.await.unwrap(), b"bye");
        let next = id(&client).await;
        assert_ne!(next, last);
        // Nothing of all that is left.
        assert!(within(LIMIT, || only_status(&client).open_streams == 1).await);
        assert_eq!(only_status(&client).connections, 1);
    });
    server.stop(LIMIT).unwrap();
}

#[test]
fn deadlines_of_one_exchange_are_not_those_of_the_next() {
    let path = SocketPath::new();
    let server = start(&path, 1, "s");
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let client = Client::builder(&at).config(small()).build().unwrap();
        let first = client.with_stream(0, async |stream| {
            let answer = ask(stream, WHO).await?;
            stream.set_read_deadline(Some(Instant::now()));
            stream.set_write_deadline(Some(Instant::now()));
            Ok::<_, Error>((stream.id(), answer))
        });
        let (id, _) = first.await.unwrap();
        let second = client.with_stream(0, async |stream| {
            Ok::<_, Error>((stream.id(), ask(stream, b"late").await?))
        });
        assert_eq!(second.await.unwrap(), (id, b"late".to_vec()));
    });
    server.stop(LIMIT).unwrap();
}

/// So many exchanges at the same time, each in the middle.
async fn at_the_same_time(client: &Client, count: usize) {
    let exchanges: Vec<_> = (0..count)
        .map(|_| {
            let client = client.clone();
            glommio::spawn_local(async move {
                client.with_stream(0, async |stream| ask(stream, b"late").await).await
            })
        })
        .collect();
    for exchange in exchanges {
        assert_eq!(exchange.await.unwrap(), b"late");
    }
}

#[test]
fn idle_streams_are_bounded_and_make_room() {
    let path = SocketPath::new();
    let server = start(&path, 1, "s");
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let config = Config::builder().container().max_streams(6).build().unwrap();
        let builder = || Client::builder(&at).config(config.clone());
        let client = builder().max_idle_streams(2).build().unwrap();
        at_the_same_time(&client, 6).await;
        assert_eq!(only_status(&client).idle_streams, 2);
        assert!(within(LIMIT, || only_status(&client).open_streams == 2).await);
        client.close().await.unwrap();

        let client = builder().build().unwrap();
        at_the_same_time(&client, 6).await;
        assert_eq!(only_status(&client).idle_streams, 6);
        // Every place is taken by one that nobody uses.
        let mut streams = Vec::new();
        for left in (0..6).rev() {
            streams.push(client.open_stream(0).await.unwrap());
            assert_eq!(only_status(&client).idle_streams, left);
        }
        let error = client.open_stream(0).await.unwrap_err();
        assert!(matches!(error, Error::TooManyStreams(6)), "{error}");
        assert!(matches!(who(&client, 0).await, Err(Error::TooManyStreams(6))));
        streams.pop();
        who(&client, 0).await.unwrap();
    });
    server.stop(LIMIT).unwrap();
}

#[test]
fn sessions_that_are_full_are_passed_over() {
    let path = SocketPath::new();
    let server = start(&path, 1, "s");
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let config = Config::builder().container().max_streams(2).build().unwrap();
        let client = Client::builder(&at).config(config).sessions_per_shard(2).build().unwrap();
        client.session(0).await.unwrap();
        let all_up = || client.status().iter().all(|one| matches!(one.state, SessionState::Up));
        assert!(within(LIMIT, all_up).await);
        let mut streams = Vec::new();
        for _ in 0..4 {
            streams.push(client.open_stream(0).await.unwrap());
        }
        assert!(matches!(client.open_stream(0).await, Err(Error::TooManyStreams(2))));
    });
    server.stop(LIMIT).unwrap();
}

#[test]
fn a_server_that_comes_again_is_found_and_nothing_old_is_used() {
    let path = SocketPath::new();
    run(LIMIT, move || async move {
        let first = start(&path, 2, "first");
        let client = client(&path).build().unwrap();
        for shard in [0, 1] {
            assert_eq!(who(&client, shard).await.unwrap(), format!("first{shard}"));
        }
        let held = client.open_stream(0).await.unwrap();
        // Blocks this executor too, so the client hears of it only afterwards.
        first.stop(Duration::ZERO).unwrap();
        assert!(within(LIMIT, || !matches!(client.status()[0].state, SessionState::Up)).await);
        assert_eq!(client.status()[0].idle_streams, 0);
        let second = start(&path, 2, "second");
        for shard in [0, 1] {
            assert_eq!(who(&client, shard).await.unwrap(), format!("second{shard}"));
        }
        assert!(client.status().iter().all(|one| one.connections == 2));
        // What somebody had of the old one stays what it was.
        let mut held = held;
        assert!(ask(&mut held, WHO).await.is_err());
        drop(client);
        second.stop(LIMIT).unwrap();
    });
}

#[test]
fn a_server_may_come_back_with_fewer_or_more_shards() {
    let path = SocketPath::new();
    run(LIMIT, move || async move {
        let first = start(&path, 3, "first");
        let client = client(&path).build().unwrap();
        client.ready().await.unwrap();
        first.stop(Duration::ZERO).unwrap();
        let is_up = |one: &SessionStatus| matches!(one.state, SessionState::Up);
        assert!(within(LIMIT, || !client.status().iter().any(is_up)).await);

        let second = start(&path, 1, "second");
        // One that waits for a shard that does not come back gets to know.
        let waits = async { client.session(2).await.unwrap_err() };
        let (error, name) = zip(waits, async { who(&client, 0).await.unwrap() }).await;
        assert!(matches!(error, Error::NoSuchShard { index: 2, count: 1 }), "{error}");
        assert_eq!(name, "second0");
        assert_eq!(client.shard_count().unwrap(), 1);
        assert!(client.status().iter().all(|one| one.shard == 0), "nobody tries the others");
        second.stop(Duration::ZERO).unwrap();
        assert!(within(LIMIT, || !client.status().iter().any(is_up)).await);

        let third = start(&path, 4, "third");
        for shard in 0..4 {
            assert_eq!(who(&client, shard).await.unwrap(), format!("third{shard}"));
        }
        assert_eq!(client.shard_count().unwrap(), 4);
        drop(client);
        third.stop(LIMIT).unwrap();
    });
}

#[test]
fn a_server_that_is_not_there_yet_is_waited_for() {
    let path = SocketPath::new();
    run(LIMIT, move || async move {
        let client = client(&path).build().unwrap();
        let error = client.shard_count().unwrap_err();
        assert!(matches!(&error, Error::Os { source, .. } if source.kind() == ErrorKind::NotFound));
        let asks = glommio::spawn_local({
            let client = client.clone();
            async move { who(&client, 1).await }
        });
        let fails = || matches!(only_status(&client).state, SessionState::Backoff { failures, .. } if failures > 2);
        assert!(within(LIMIT, || client.status().len() == 1 && fails()).await);
        let server = start(&path, 2, "s");
        assert_eq!(asks.await.unwrap(), "s1");
        drop(client);
        server.stop(LIMIT).unwrap();
    });
}

#[test]
fn who_has_waited_long_enough_is_told_why() {
    let path = SocketPath::new();
    run(LIMIT, move || async move {
        let client = client(&path).acquire_timeout(Duration::from_millis(50)).build().unwrap();
        let error = client.session(7).await.unwrap_err();
        let Error::Unavailable { shard: 7, source, .. } = &error else { panic!("{error}") };
        let Error::Os { source, .. } = &**source else { panic!("{source}") };
        assert_eq!(source.kind(), ErrorKind::NotFound, "{source}");
        assert_eq!(std::io::Error::from(error).kind(), ErrorKind::NotFound);
        assert!(matches!(client.ready().await, Err(Error::Unavailable { shard: 0, .. })));
        // No server has as many as that.
        let error = client.session(4_000_000_000).await.unwrap_err();
        assert!(matches!(error, Error::NoSuchShard { count: 4096, .. }), "{error}");
        assert_eq!(client.status().len(), 2, "nothing was begun for it");
        // The longest patience is not more than a clock can bear.
        let patient = self::client(&path).acquire_timeout(Duration::MAX).build().unwrap();
        assert!(poll_once(patient.session(0)).await.is_none());
    });
}

#[test]
fn a_server_without_shards_is_one() {
    let path = SocketPath::new();
    run(LIMIT, move || async move {
        let listener = Listener::bind(path.as_str(), small()).unwrap();
        let serving = glommio::spawn_local(async move {
            while let Ok(session) = listener.accept().await {
                let serve = |stream| answer(stream, "plain".to_owned());
                glommio::spawn_local(async move { session.serve_streams(serve).await }).detach();
            }
        });
        let client = client(&path).sessions_per_shard(2).build().unwrap();
        client.ready().await.unwrap();
        assert_eq!(client.shard_count().unwrap(), 1);
        assert_eq!(who(&client, 0).await.unwrap(), "plain");
        let error = client.session(1).await.unwrap_err();
        assert!(matches!(error, Error::NoSuchShard { index: 1, count: 1 }), "{error}");
        serving.cancel().await;
    });
}

/// The entry of the other process; nothing in this one.
#[test]
fn sessions_end_with_the_last_handle_unless_somebody_holds_them() {
    let path = SocketPath::new();
    let server = start(&path, 3, "s");
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let client = Client::builder(&at).config(small()).build().unwrap();
        client.ready().await.unwrap();
        let session = client.session(1).await.unwrap();
        let mut stream = client.open_stream(2).await.unwrap();
        let other = client.clone();
        drop(client);
        assert_eq!(who(&other, 0).await.unwrap(), "s0");
        drop(other);
        glommio::timer::sleep(Duration::from_millis(10)).await;
        assert_eq!(ask(&mut stream, WHO).await.unwrap(), b"s2");
        let mut stream = session.open_stream().unwrap();
        assert_eq!(ask(&mut stream, WHO).await.unwrap(), b"s1");
    });
    let start = Instant::now();
    while server.stats().iter().any(|shard| shard.open > 0) && start.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(2));
    }
    let open: Vec<_> = server.stats().iter().map(|shard| (shard.accepted, shard.open)).collect();
    assert_eq!(open, [(1, 0), (1, 0), (1, 0)]);
    server.stop(LIMIT).unwrap();
}

#[test]
fn a_closed_client_is_closed_for_everybody() {
    let path = SocketPath::new();
    let server = start(&path, 1, "s");
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let path = SocketPath::new();
        let builder = Client::builder(&at).config(small());
        let client = builder.build().unwrap();
        let mut stream = client.open_stream(0).await.unwrap();
        assert_eq!(ask(&mut stream, WHO).await.unwrap(), b"s0");
        let session = client.session(0).await.unwrap();
        let other = client.clone();
        client.close().await.unwrap();
        assert!(matches!(session.closed().await, Error::SessionClosed));
        assert!(matches!(ask(&mut stream, WHO).await, Err(Error::SessionClosed)));
        assert!(matches!(other.open_stream(0).await, Err(Error::SessionClosed)));
        assert!(matches!(other.ready().await, Err(Error::SessionClosed)));
        assert!(other.status().is_empty());
        other.close().await.unwrap();

        // One that waits for a server that does not come.
        let client = self::client(&path).build().unwrap();
        let waits = client.session(0);
        let closes = async {
            glommio::timer::sleep(Duration::from_millis(5)).await;
            client.close().await.unwrap();
        };
        let (error, ()) = zip(waits, closes).await;
        assert!(matches!(error.unwrap_err(), Error::SessionClosed));
    });
    server.stop(LIMIT).unwrap();
}

#[test]
fn closing_sends_what_waits_for_the_socket_but_not_for_ever() {
    const MIB: usize = 1 << 20;
    for reads in [true, false] {
        run(LIMIT, move || async move {
            let path = SocketPath::new();
            let listener = Listener::bind(path.as_str(), small()).unwrap();
            let patience = if reads { PATIENT } else { Duration::from_millis(100) };
            // So little memory that nearly all of it goes over the socket.
            let tiny = Config::builder()
                .buffer_size(1 << 16)
                .slice_classes([shmipc_glommio::SliceClass::new(1004, 100)]);
            let tiny = tiny.stream_window(64 << 20).close_timeout(PATIENT).build().unwrap();
            let client = client(&path).config(tiny).acquire_timeout(patience).build().unwrap();
            let (stream, session) = zip(client.open_stream(0), listener.accept()).await;
            let (mut stream, session) = (stream.unwrap(), session.unwrap());
            let writing = async {
                stream.write_all(&vec![7; 8 * MIB]).await.unwrap();
            };
            if reads {
                let reading = async {
                    let mut far = session.accept().await.unwrap();
                    let mut received = vec![0; 8 * MIB];
                    far.read_exact(&mut received).await.unwrap();
                    assert!(received.iter().all(|&byte| byte == 7));
                };
                let closing = async {
                    writing.await;
                    client.close().await.unwrap();
                };
                zip(reading, closing).await;
                assert!(matches!(session.closed().await, Error::PeerClosed));
            } else {
                // The peer takes nothing, so the writer stops somewhere, and so does the close.
                let enough = async {
                    glommio::timer::sleep(Duration::from_millis(50)).await;
                };
                or(writing, enough).await;
                // The rest is not on its way, or not all of it was taken.
                let _ = client.close().await;
            }
            assert!(client.status().is_empty());
        });
    }
}

#[test]
fn too_little_memory_is_told_at_once() {
    let path = SocketPath::new();
    let server = start(&path, 4, "s");
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let large =
            Config::builder().memory(MemoryKind::File).buffer_size(3 << 30).build().unwrap();
        let shm = nix::sys::statvfs::statvfs("/dev/shm").unwrap();
        let free = shm.blocks_available() * shm.fragment_size();
        let per_shard = free / (3 << 30) + 1;
        // More sessions to one shard than fit, were there as many.
        if per_shard <= 64 {
            let builder = Client::builder(&at).config(large.clone());
            let client = builder.sessions_per_shard(per_shard as usize).build().unwrap();
            let error = client.session(0).await.unwrap_err();
            let is_it = matches!(error, Error::Resource(ResourceError::SharedMemory { .. }));
            assert!(is_it, "{error}");
            assert!(client.status().is_empty(), "none of them was begun");
        }
    });
    assert!(server.stats().iter().all(|shard| shard.accepted == 0));
    server.stop(LIMIT).unwrap();
}

#[test]
fn attempts_become_rarer() {
    let path = SocketPath::new();
    let at = path.as_str().to_owned();
    let (accepted, is_over) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
    let (counter, stop) = (Arc::clone(&accepted), Arc::clone(&is_over));
    let listener = UnixListener::bind(&at).unwrap();
    listener.set_nonblocking(true).unwrap();
    // Accepts, and goes at once.
    let accepting = std::thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            if listener.accept().is_ok() {
                counter.fetch_add(1, Ordering::Relaxed);
            } else {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    run(LIMIT, move || async move {
        let first = Duration::from_millis(2);
        let most = Duration::from_millis(64);
        let waits = Rc::new(RefCell::new(BTreeMap::<u32, Vec<Duration>>::new()));
        let told = Rc::clone(&waits);
        let client = client(&path).backoff(first, most).on_change(move |status| {
            if let SessionState::Backoff { until, failures, .. } = &status.state {
                let wait = until.saturating_duration_since(status.since);
                told.borrow_mut().entry(*failures).or_default().push(wait);
            }
        });
        let client = client.build().unwrap();
        let waiting = glommio::spawn_local({
            let client = client.clone();
            async move { client.session(0).await.map(drop) }
        });
        let enough = || waits.borrow().len() >= 12;
        assert!(within(LIMIT, enough).await);
        waiting.cancel().await;
        let waits = waits.borrow();
        for (failures, waits) in &*waits {
            let bound = first * (1 << (failures - 1).min(16));
            let bound = bound.min(most) + Duration::from_millis(1);
            // Until then, from a moment that is a little later.
            assert!(waits.iter().all(|wait| *wait <= bound), "{failures}: {waits:?}");
            assert_eq!(waits.len(), 1, "failures are counted one by one");
        }
        // One connection each; those behind the last are still in the backlog, perhaps.
        let attempts = waits.len() as u32;
        assert!(accepted.load(Ordering::Relaxed) <= attempts + 1);
        let error = client.status()[0].state.clone();
        assert!(!matches!(error, SessionState::Up));
    });
    is_over.store(true, Ordering::Relaxed);
    accepting.join().unwrap();
}

#[test]
fn changes_are_told_in_their_order_and_may_use_the_client() {
    let path = SocketPath::new();
    run(LIMIT, move || async move {
        let told = Rc::new(RefCell::new(Vec::new()));
        let slot = Rc::new(RefCell::new(None::<Client>));
        let (log, itself) = (Rc::clone(&told), Rc::clone(&slot));
        let client = client(&path).on_change(move |status| {
            let word = match &status.state {
                SessionState::Connecting => "connecting",
                SessionState::Up => "up",
                SessionState::Backoff { error: Error::PeerClosed, .. } => "lost",
                SessionState::Backoff { .. } => "waiting",
                _ => "something new",
            };
            log.borrow_mut().push(word);
            if let Some(client) = &*itself.borrow() {
                let seen = &client.status()[0];
                assert_eq!((seen.shard, seen.slot), (status.shard, status.slot));
                assert_eq!(format!("{:?}", seen.state), format!("{:?}", status.state));
                let _ = client.shard_count();
                let opening = client.clone();
                glommio::spawn_local(async move { poll_once(opening.open_stream(0)).await })
                    .detach();
            }
        });
        *slot.borrow_mut() = Some(client.build().unwrap());
        let client = slot.borrow().clone().unwrap();
        let server = start(&path, 1, "s");
        client.session(0).await.unwrap();
        assert_eq!(*told.borrow(), ["connecting", "up"]);
        server.stop(Duration::ZERO).unwrap();
        assert!(within(LIMIT, || told.borrow().len() >= 6).await);
        assert_eq!(told.borrow()[2..6], ["lost", "connecting", "waiting", "connecting"]);
        slot.borrow_mut().take();
        client.close().await.unwrap();
        let len = told.borrow().len();
        glommio::timer::sleep(Duration::from_millis(50)).await;
        assert_eq!(told.borrow().len(), len, "a closed client does nothing more");
    });
}

#[test]
fn the_last_handle_may_go_while_a_change_is_told() {
    let path = SocketPath::new();
    let server = start(&path, 1, "s");
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let slot = Rc::new(RefCell::new(None::<Client>));
        let calls = Rc::new(Cell::new(0));
        let (itself, counter) = (Rc::clone(&slot), Rc::clone(&calls));
        let client = Client::builder(&at).config(small()).on_change(move |status| {
            counter.set(counter.get() + 1);
            if matches!(status.state, SessionState::Up) {
                let last = itself.borrow_mut().take();
                drop(last);
            }
        });
        *slot.borrow_mut() = Some(client.build().unwrap());
        let waiting = {
            let client = slot.borrow().clone().unwrap();
            glommio::spawn_local(async move { client.open_stream(0).await })
        };
        // The waiting task's handle is the last but one.
        drop(waiting.await.unwrap());
        assert!(within(LIMIT, || slot.borrow().is_none()).await);
        assert_eq!(calls.get(), 2, "connecting, up");
    });
    let start = Instant::now();
    while server.stats()[0].open > 0 && start.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(server.stats()[0].open, 0);
    server.stop(LIMIT).unwrap();
}

#[test]
fn builders_refuse_what_cannot_work() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let text = |builder: ClientBuilder| builder.build().map(drop).unwrap_err().to_string();
        for sessions in [0, 65] {
            let text = text(client(&path).sessions_per_shard(sessions));
            assert!(text.contains("sessions_per_shard") && text.contains("1 to 64"), "{text}");
        }
        let millis = Duration::from_millis;
        for (first, most) in [(millis(0), millis(5)), (millis(6), millis(5))] {
            let text = text(client(&path).backoff(first, most));
            assert!(text.contains("back-off"), "{text}");
        }
        client(&path).backoff(Duration::MAX, Duration::MAX).build().unwrap();
    });
}

#[test]
fn two_cores_have_their_own_sessions_and_wake_nobody_elses_tasks() {
    let path = SocketPath::new();
    let server = start(&path, 2, "s");
    // Asleep between exchanges, so that everybody has to be woken.
    let config = Config::builder().container().spin(Spin::Never).build().unwrap();
    let cores: Vec<_> = (0..2)
        .map(|_| {
            let (at, config) = (path.as_str().to_owned(), config.clone());
            std::thread::spawn(move || {
                run(LIMIT, move || async move {
                    let client = Client::builder(&at).config(config).build().unwrap();
                    for round in 0..200 {
                        let shard = round % 2;
                        assert_eq!(who(&client, shard).await.unwrap(), format!("s{shard}"));
                    }
                    for shard in [0, 1] {
                        let stats = client.session(shard).await.unwrap().stats();
                        assert!(stats.sync_events_received > 10, "{stats:?}");
                        assert_eq!(stats.cross_core_wakes, 0);
                    }
                });
            })
        })
        .collect();
    for core in cores {
        core.join().unwrap();
    }
    let start = Instant::now();
    while server.stats().iter().any(|shard| shard.open > 0) && start.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(2));
    }
    for shard in server.stats() {
        assert_eq!((shard.accepted, shard.dealt, shard.cross_core_wakes), (2, 0, 0));
    }
    server.stop(LIMIT).unwrap();
}
