// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sessions and streams of this crate with each other: data, order, ends, limits, and what is left.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_lite::future::{or, poll_fn, poll_once, yield_now, zip};
use futures_lite::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use glommio::{LocalExecutorBuilder, Placement};
use shmipc_glommio::{
    Config, ConfigBuilder, Connector, Error, Listener, MemoryKind, PeerTrust, ProtocolVersion,
    Session, Spin, Stream,
};

/// Runs a test on an executor of its own, and stops it when it hangs.
fn run<F: Future<Output = ()> + 'static>(test: impl FnOnce() -> F + Send + 'static) {
    LocalExecutorBuilder::new(Placement::Unbound)
        .spawn(|| async move {
            let hangs = async {
                glommio::timer::sleep(Duration::from_secs(60)).await;
                panic!("the test hangs");
            };
            or(test(), hangs).await;
        })
        .unwrap()
        .join()
        .unwrap();
}

fn socket_path() -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("shmipc-sessions-{}-{number}.sock", std::process::id()))
}

fn small() -> ConfigBuilder {
    Config::builder().buffer_size(1 << 20).queue_capacity(64)
}

/// For what happens when a sender goes on although nobody reads.
fn without_window() -> ConfigBuilder {
    small().stream_window(u64::MAX)
}

/// Two ends of a session on this executor, over the listener that [`listen`] made last.
async fn pair_over(listener: &Listener, client: Config) -> (Session, Session) {
    let connector = Connector::new(client);
    let path = PATH.with_borrow(Clone::clone).expect("set by listen");
    let (client, server) = zip(connector.connect(path), listener.accept()).await;
    (client.unwrap(), server.unwrap())
}

thread_local! {
    static PATH: RefCell<Option<PathBuf>> = const { RefCell::new(None) };
}

/// A listener whose path `pair_over` connects to.
fn listen(config: Config) -> Listener {
    let path = socket_path();
    let listener = Listener::bind(&path, config).unwrap();
    PATH.set(Some(path));
    listener
}

async fn default_pair() -> (Listener, Session, Session) {
    let listener = listen(small().build().unwrap());
    let (client, server) = pair_over(&listener, small().build().unwrap()).await;
    (listener, client, server)
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|index| (seed * 131 + index * 17 + (index >> 8) * 3) as u8).collect()
}

/// Waits until something is so; the test's own time limit ends it otherwise.
async fn until(mut is_so: impl FnMut() -> bool) {
    while !is_so() {
        glommio::timer::sleep(Duration::from_millis(1)).await;
    }
}

/// Echoes whatever comes until the peer closes.
async fn echo(mut stream: Stream) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..count]).await?;
    }
}

async fn echo_all(session: Session) {
    while let Ok(stream) = session.accept().await {
        glommio::spawn_local(echo(stream)).detach();
    }
}

async fn round_trip(stream: &mut Stream, message: &[u8]) {
    let mut answer = vec![0; message.len()];
    // Reading and writing at the same time, since a large message does not fit into the pool.
    let mut sent = 0;
    let mut received = 0;
    poll_fn(|context| {
        loop {
            let before = (sent, received);
            if sent < message.len()
                && let Poll::Ready(count) = futures_lite::AsyncWrite::poll_write(
                    pin!(&mut *stream),
                    context,
                    &message[sent..],
                )
            {
                sent += count.unwrap();
            }
            if received < message.len()
                && let Poll::Ready(count) = futures_lite::AsyncRead::poll_read(
                    pin!(&mut *stream),
                    context,
                    &mut answer[received..],
                )
            {
                let count = count.unwrap();
                assert!(count > 0, "the peer closed");
                received += count;
            }
            if received == message.len() {
                return Poll::Ready(());
            }
            if before == (sent, received) {
                return Poll::Pending;
            }
        }
    })
    .await;
    assert!(answer == message, "{} bytes came back changed", message.len());
}

/// Whether every slice is in its list or in the magazine of either side.
fn all_free(client: &Session, server: &Session) -> bool {
    let (ours, theirs) = (client.pool_usage(), server.pool_usage());
    let mut lists = ours.lists.iter().zip(&theirs.lists);
    ours.held + theirs.held == 0
        && lists.all(|(ours, theirs)| {
            let free = i64::from(ours.free) + i64::from(ours.magazine + theirs.magazine);
            free == i64::from(ours.total)
        })
}

#[test]
fn messages_of_all_sizes_come_back_by_every_kind_of_memory_and_every_way_to_wait() {
    run(|| async {
        let kinds = [
            (MemoryKind::Memfd, ProtocolVersion::V3),
            (MemoryKind::File, ProtocolVersion::V3),
            (MemoryKind::File, ProtocolVersion::V2),
        ];
        let spins = [Spin::Never, Spin::For(Duration::from_micros(50)), Spin::Forever];
        for (memory, protocol) in kinds {
            for spin in spins {
                let config = Config::builder().memory(memory).protocol(protocol).spin(spin);
                let config = config.build().unwrap();
                let listener = listen(config.clone());
                let (client, server) = pair_over(&listener, config).await;
                assert_eq!(client.protocol(), protocol);
                assert_eq!(server.protocol(), protocol);
                let serving = glommio::spawn_local(echo_all(server.clone()));
                let mut stream = client.open_stream().unwrap();
                for len in [1, 64, 8172, 8173, 100_000, 3 << 20] {
                    round_trip(&mut stream, &pattern(len, len)).await;
                }
                drop(stream);
                until(|| all_free(&client, &server)).await;
                drop(client);
                serving.await;
            }
        }
    });
}

#[test]
fn two_executors_talk_over_tcp_with_file_memory() {
    let (tell, told) = std::sync::mpsc::channel();
    let server = LocalExecutorBuilder::default()
        .spawn(move || async move {
            let listener =
                Listener::bind_tcp("127.0.0.1:0".parse().unwrap(), Config::default()).unwrap();
            tell.send(listener.tcp_address().unwrap()).unwrap();
            echo_all(listener.accept().await.unwrap()).await;
        })
        .unwrap();
    let address = told.recv().unwrap();
    run(move || async move {
        let refused = Connector::new(Config::default()).connect_tcp(address).await.unwrap_err();
        assert!(matches!(refused, Error::Handshake(_)), "{refused}");
        let config = Config::builder().memory(MemoryKind::File).build().unwrap();
        let session = Connector::new(config).connect_tcp(address).await.unwrap();
        let mut stream = session.open_stream().unwrap();
        for len in [1, 10_000, 1 << 20] {
            round_trip(&mut stream, &pattern(len, len)).await;
        }
    });
    server.join().unwrap();
}

#[test]
fn a_close_comes_behind_the_data() {
    run(|| async {
        let (_listener, client, server) = default_pair().await;
        let mut stream = client.open_stream().unwrap();
        stream.write_all(&pattern(1, 50_000)).await.unwrap();
        drop(stream);
        let mut accepted = server.accept().await.unwrap();
        let mut all = Vec::new();
        accepted.read_to_end(&mut all).await.unwrap();
        assert!(all == pattern(1, 50_000));
        assert!(accepted.is_closed_by_peer());
        let error = accepted.write_all(b"x").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        drop(accepted);
        until(|| client.pool_usage().is_full() && server.pool_usage().is_full()).await;
        assert_eq!((client.stream_count(), server.stream_count()), (0, 0));
    });
}

#[test]
fn after_a_close_nothing_more_is_read_or_written() {
    run(|| async {
        let (_listener, client, _server) = default_pair().await;
        let mut stream = client.open_stream().unwrap();
        stream.write_all(b"x").await.unwrap();
        stream.close().await.unwrap();
        let error = stream.write_all(b"x").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotConnected);
        let error = stream.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotConnected);
        stream.close().await.unwrap();
    });
}

#[test]
fn streams_that_sent_nothing_are_not_heard_of() {
    run(|| async {
        let (_listener, client, server) = default_pair().await;
        for _ in 0..100 {
            drop(client.open_stream().unwrap());
        }
        let mut stream = client.open_stream().unwrap();
        assert_eq!(stream.id(), 102);
        stream.write_all(b"x").await.unwrap();
        assert_eq!(server.accept().await.unwrap().id(), 102);
        assert_eq!(server.stats().events_received, 1);
    });
}

#[test]
fn a_peer_that_goes_leaves_what_it_sent_and_then_an_error() {
    run(|| async {
        let (_listener, client, server) = default_pair().await;
        let mut kept = client.open_stream().unwrap();
        let mut stream = client.open_stream().unwrap();
        stream.write_all(&pattern(2, 9000)).await.unwrap();
        kept.write_all(b"k").await.unwrap();
        let mut accepted = server.accept().await.unwrap();
        // Both streams are open: no close comes, the connection ends.
        client.close().await.unwrap();
        let error = kept.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        let mut bytes = vec![0; 9000];
        accepted.read_exact(&mut bytes).await.unwrap();
        assert!(bytes == pattern(2, 9000));
        let error = accepted.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!(matches!(server.closed().await, Error::PeerClosed));
        // A stream that arrived before the end is still handed out.
        let mut late = server.accept().await.unwrap();
        late.read_exact(&mut [0]).await.unwrap();
        assert!(matches!(server.accept().await, Err(Error::PeerClosed)));
        assert!(matches!(client.open_stream(), Err(Error::SessionClosed)));
        assert!(matches!(server.open_stream(), Err(Error::PeerClosed)));
    });
}

#[test]
fn the_last_handle_ends_the_session() {
    run(|| async {
        let (_listener, client, server) = default_pair().await;
        let stream = client.open_stream().unwrap();
        drop(client);
        glommio::timer::sleep(Duration::from_millis(5)).await;
        assert!(server.end_reason().is_none(), "a stream keeps its session");
        drop(stream);
        assert!(matches!(server.closed().await, Error::PeerClosed));
    });
}

#[test]
fn a_pool_that_runs_empty_sends_over_the_socket_in_order() {
    run(|| async {
        let config = without_window().fallback_after(Duration::from_micros(200)).build().unwrap();
        let listener = listen(config.clone());
        let (client, server) = pair_over(&listener, config).await;
        let mut stream = client.open_stream().unwrap();
        let message = pattern(3, 4 << 20);
        let writing = async {
            stream.write_all(&message).await.unwrap();
            stream.flush().await.unwrap();
            drop(stream);
        };
        let reading = async {
            let mut accepted = server.accept().await.unwrap();
            // Not before the pool is empty and the socket is used.
            until(|| server.stats().fallback_received > 3).await;
            let mut all = Vec::new();
            accepted.read_to_end(&mut all).await.unwrap();
            assert!(all == message);
        };
        zip(writing, reading).await;
        assert!(client.stats().fallback_sent > 3);
        until(|| client.pool_usage().is_full()).await;
        // A new stream goes through shared memory again, at once.
        let before = client.stats().fallback_sent;
        let mut next = client.open_stream().unwrap();
        next.write_all(b"again").await.unwrap();
        let mut accepted = server.accept().await.unwrap();
        accepted.read_exact(&mut [0; 5]).await.unwrap();
        assert_eq!(client.stats().fallback_sent, before);
    });
}

#[test]
fn data_that_nobody_reads_stops_at_its_limit_and_arrives_when_somebody_does() {
    run(|| async {
        let sender = small().fallback_after(Duration::ZERO).build().unwrap();
        let receiver = without_window().max_unread_fallback_bytes(1 << 20).build().unwrap();
        let listener = listen(receiver);
        let (client, server) = pair_over(&listener, sender).await;
        let message = pattern(4, 8 << 20);
        let (sent, total) = (Rc::new(Cell::new(0)), message.len());
        let mut stream = client.open_stream().unwrap();
        let writing = glommio::spawn_local({
            let (sent, message) = (Rc::clone(&sent), message.clone());
            async move {
                while sent.get() < message.len() {
                    let count = stream.write(&message[sent.get()..]).await.unwrap();
                    sent.set(sent.get() + count);
                }
                stream.flush().await.unwrap();
            }
        });
        let mut accepted = server.accept().await.unwrap();
        until(|| server.stats().fallback_received > 8).await;
        let mut last = (0, Instant::now());
        until(|| {
            if last.0 != sent.get() {
                last = (sent.get(), Instant::now());
            }
            last.1.elapsed() > Duration::from_millis(50)
        })
        .await;
        assert!(sent.get() < total, "nothing held the sender back");
        let mut all = vec![0; total];
        accepted.read_exact(&mut all).await.unwrap();
        assert!(all == message);
        writing.await;
    });
}

#[test]
fn a_full_queue_makes_the_sender_wait_and_loses_nothing() {
    let (tell, told) = std::sync::mpsc::channel();
    let path = socket_path();
    let config = without_window().queue_capacity(16).build().unwrap();
    let server = LocalExecutorBuilder::default()
        .spawn({
            let (path, config) = (path.clone(), config.clone());
            move || async move {
                let listener = Listener::bind(path, config).unwrap();
                tell.send(()).unwrap();
                let session = listener.accept().await.unwrap();
                let mut stream = session.accept().await.unwrap();
                // The whole core stops, so that nobody drains the queue.
                std::thread::sleep(Duration::from_millis(100));
                let mut all = Vec::new();
                stream.read_to_end(&mut all).await.unwrap();
                all
            }
        })
        .unwrap();
    told.recv().unwrap();
    run(move || async move {
        let session = Connector::new(config).connect(path).await.unwrap();
        let mut stream = session.open_stream().unwrap();
        for number in 0..60 {
            stream.write_all(&[number]).await.unwrap();
        }
        assert!(session.stats().queue_full > 0, "the queue was never full");
        stream.close().await.unwrap();
        drop(stream);
        assert!(matches!(session.closed().await, Error::PeerClosed));
    });
    assert_eq!(server.join().unwrap(), (0..60).collect::<Vec<u8>>());
}

#[test]
fn streams_beyond_the_limit_are_refused_and_cost_nothing() {
    run(|| async {
        let server_config = small().max_streams(3).build().unwrap();
        let listener = listen(server_config);
        let (client, server) = pair_over(&listener, small().build().unwrap()).await;
        let mut streams: Vec<Stream> = (0..5).map(|_| client.open_stream().unwrap()).collect();
        for stream in &mut streams {
            stream.write_all(b"x").await.unwrap();
        }
        // Those that were refused end; the others stay open.
        until(|| streams[3].is_closed_by_peer() && streams[4].is_closed_by_peer()).await;
        assert!(streams[..3].iter().all(|stream| !stream.is_closed_by_peer()));
        // Not like an answer without bytes.
        let error = streams[4].read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        assert_eq!(server.stream_count(), 3);
        drop(streams);
        for _ in 0..3 {
            drop(server.accept().await.unwrap());
        }
        until(|| client.pool_usage().is_full() && server.stream_count() == 0).await;

        let client_config = small().max_streams(2).build().unwrap();
        let (client, _server) = pair_over(&listener, client_config).await;
        let held = [client.open_stream().unwrap(), client.open_stream().unwrap()];
        assert!(matches!(client.open_stream(), Err(Error::TooManyStreams(2))));
        drop(held);
        client.open_stream().unwrap();
    });
}

#[test]
fn only_clients_open_streams() {
    run(|| async {
        let (_listener, _client, server) = default_pair().await;
        assert!(matches!(server.open_stream(), Err(Error::NotClient)));
    });
}

#[test]
fn lines_are_read_through_the_private_buffer() {
    run(|| async {
        let (_listener, client, server) = default_pair().await;
        let mut stream = client.open_stream().unwrap();
        let long = "x".repeat(40_000);
        let text = format!("first\nsecond\n{long}\nlast");
        stream.write_all(text.as_bytes()).await.unwrap();
        drop(stream);
        let mut accepted = server.accept().await.unwrap();
        let mut first = String::new();
        accepted.read_line(&mut first).await.unwrap();
        assert_eq!(first, "first\n");
        // What the buffer holds comes before what the stream holds, however it is read.
        let mut bytes = [0; 3];
        accepted.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"sec");
        let mut rest = String::new();
        accepted.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, format!("ond\n{long}\nlast"));
    });
}

#[test]
fn futures_dropped_half_way_lose_nothing() {
    run(|| async {
        let (_listener, client, server) = default_pair().await;
        assert!(poll_once(server.accept()).await.is_none());
        let mut stream = client.open_stream().unwrap();
        assert!(poll_once(stream.read(&mut [0])).await.is_none());
        stream.write_all(b"ab").await.unwrap();
        let mut accepted = server.accept().await.unwrap();
        let mut byte = [0];
        accepted.read_exact(&mut byte).await.unwrap();
        accepted.read_exact(&mut byte).await.unwrap();
        assert_eq!(&byte, b"b");
        assert!(poll_once(accepted.read(&mut byte)).await.is_none());
        assert!(poll_once(server.closed()).await.is_none());
        stream.write_all(b"c").await.unwrap();
        accepted.read_exact(&mut byte).await.unwrap();
        assert_eq!(&byte, b"c");
    });
}

#[test]
fn many_streams_come_and_go() {
    run(|| async {
        let config = Config::builder().build().unwrap();
        let listener = listen(config.clone());
        let (client, server) = pair_over(&listener, config).await;
        let serving = glommio::spawn_local(echo_all(server.clone()));
        for round in 0..50 {
            let mut tasks = Vec::new();
            for number in 0..64 {
                let mut stream = client.open_stream().unwrap();
                tasks.push(glommio::spawn_local(async move {
                    for step in 0..4 {
                        let len = 1 + (round * 64 + number) * (step + 1) % 20_000;
                        round_trip(&mut stream, &pattern(number + step, len)).await;
                    }
                }));
            }
            for task in tasks {
                task.await;
            }
        }
        until(|| client.pool_usage().is_full() && server.stream_count() == 0).await;
        assert_eq!(client.stream_count(), 0);
        assert_eq!(client.stats().fallback_sent, 0);
        drop(client);
        serving.await;
    });
}

#[test]
fn nothing_is_left_when_sessions_end() {
    // Mappings and descriptors of this process that are shared memory of this test's sessions.
    fn traces(name: &str) -> usize {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let mapped = maps.lines().filter(|line| line.contains(name)).count();
        let open = std::fs::read_dir("/proc/self/fd").unwrap().filter(|entry| {
            let link = entry.as_ref().map(|entry| std::fs::read_link(entry.path()));
            link.is_ok_and(|link| link.is_ok_and(|link| link.to_string_lossy().contains(name)))
        });
        let files = std::fs::read_dir("/dev/shm").unwrap().filter(|entry| {
            entry.as_ref().is_ok_and(|entry| entry.file_name().to_string_lossy().contains(name))
        });
        mapped + open.count() + files.count()
    }
    run(|| async {
        let name = format!("traces{}", std::process::id());
        let kinds = [
            (MemoryKind::Memfd, ProtocolVersion::V3),
            (MemoryKind::File, ProtocolVersion::V3),
            (MemoryKind::File, ProtocolVersion::V2),
        ];
        for (memory, protocol) in kinds {
            let config = small()
                .memory(memory)
                .protocol(protocol)
                .path_prefix(format!("/dev/shm/{name}"))
                .build()
                .unwrap();
            let listener = listen(config.clone());
            let (client, server) = pair_over(&listener, config).await;
            let mut stream = client.open_stream().unwrap();
            stream.write_all(b"unread").await.unwrap();
            let mut accepted = server.accept().await.unwrap();
            assert!(traces(&name) >= 4, "the search finds nothing");
            // Either side first, with streams still held.
            if memory == MemoryKind::Memfd {
                server.close().await.unwrap();
            }
            // It may have heard already that the other side is gone.
            let _ = client.close().await;
            drop((client, server));
            accepted.read_exact(&mut [0; 6]).await.unwrap();
            let ended = accepted.read(&mut [0]).await;
            drop((stream, accepted));
            assert!(ended.is_err());
            until(|| traces(&name) == 0).await;
        }
    });
}

#[test]
fn a_listener_is_private_replaces_dead_sockets_and_leaves_live_ones() {
    run(|| async {
        let path = socket_path();
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a dead listener left its socket");
        let listener = Listener::bind(&path, Config::default()).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let error = Listener::bind(&path, Config::default()).map(drop).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        assert!(!path.exists());

        std::fs::write(&path, "no socket").unwrap();
        let error = Listener::bind(&path, Config::default()).map(drop).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert_eq!(std::fs::read(&path).unwrap(), b"no socket");
        std::fs::remove_file(&path).unwrap();
        let error = Listener::bind_tcp("0.0.0.0:0".parse().unwrap(), Config::default());
        assert_eq!(error.map(drop).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    });
}

#[test]
fn sleeping_sessions_do_not_keep_the_core_busy() {
    run(|| async {
        let (_listener, client, server) = default_pair().await;
        let mut stream = client.open_stream().unwrap();
        stream.write_all(b"x").await.unwrap();
        let _accepted = server.accept().await.unwrap();
        let mut last = (client.stats(), server.stats(), Instant::now());
        until(|| {
            let (ours, theirs) = (client.stats(), server.stats());
            if (ours, theirs) != (last.0, last.1) {
                last = (ours, theirs, Instant::now());
            }
            theirs.events_received == 1 && last.2.elapsed() > Duration::from_millis(20)
        })
        .await;
        assert!(client.stats().sleeps > 0 && server.stats().sleeps > 0);
        let before = (client.stats(), server.stats());
        for _ in 0..100 {
            yield_now().await;
            glommio::timer::sleep(Duration::from_micros(200)).await;
        }
        assert_eq!((client.stats(), server.stats()), before, "nobody looked at the queues");
    });
}

#[test]
fn a_busy_pair_sends_no_wake_ups() {
    run(|| async {
        let config = small().spin(Spin::Forever).build().unwrap();
        let listener = listen(config.clone());
        let (client, server) = pair_over(&listener, config).await;
        glommio::spawn_local(echo_all(server.clone())).detach();
        let mut stream = client.open_stream().unwrap();
        for number in 0..1000 {
            round_trip(&mut stream, &pattern(number, 64)).await;
        }
        let (client, server) = (client.stats(), server.stats());
        assert!(client.sync_events_sent <= 1 && server.sync_events_sent <= 1);
        assert_eq!(client.events_sent, 1000);
    });
}

/// Two ends of a session whose peers are trusted to keep off what they have sent.
async fn trusting_pair(trust: &PeerTrust, config: Config) -> (Session, Session) {
    let path = socket_path();
    let listener = Listener::bind(&path, config.clone()).unwrap().trust_peer(trust);
    let connector = Connector::new(config).trust_peer(trust);
    let (client, server) = zip(connector.connect(path), listener.accept()).await;
    (client.unwrap(), server.unwrap())
}

fn trust() -> PeerTrust {
    // SAFETY: both ends are this test.
    unsafe { PeerTrust::new_unchecked() }
}

#[test]
fn a_loan_becomes_the_peers_message_without_a_copy() {
    run(|| async {
        let trust = trust();
        let (client, server) = trusting_pair(&trust, Config::default()).await;
        let mut stream = client.open_stream().unwrap();
        for len in [1, 8172, 8173, 131_052, 131_053, 1 << 20] {
            let bytes = pattern(len, len);
            let mut loan = stream.alloc(len).await.unwrap();
            assert_eq!((loan.capacity(), loan.remaining(), loan.is_empty()), (len, len, true));
            let mut at = 0;
            for view in loan.views(&trust).unwrap() {
                view.copy_from_slice(&bytes[at..at + view.len()]);
                at += view.len();
            }
            assert_eq!(at, len, "the views are the whole loan");
            loan.advance(len);
            assert_eq!((loan.len(), loan.remaining()), (len, 0));
            stream.send(loan).await.unwrap();
        }
        let mut accepted = server.accept().await.unwrap();
        for len in [1, 8172, 8173, 131_052, 131_053, 1 << 20] {
            let message = accepted.recv().await.unwrap().unwrap();
            assert_eq!(message.len(), len, "a flush arrives as it was sent");
            let seen: Vec<u8> = message.views(&trust).unwrap().flatten().copied().collect();
            assert!(seen == pattern(len, len), "{len}");
            assert!(message.is_shared());
        }
        drop(stream);
        assert!(accepted.recv().await.unwrap().is_none());
        drop(accepted);
        until(|| all_free(&client, &server)).await;
    });
}

#[test]
fn loans_are_filled_in_parts_and_messages_are_read_in_parts() {
    run(|| async {
        let (_listener, client, server) = default_pair().await;
        let mut stream = client.open_stream().unwrap();
        let bytes = pattern(9, 50_000);
        let mut loan = stream.alloc(60_000).await.unwrap();
        assert_eq!(loan.write(&bytes[..20_000]), 20_000);
        io::Write::write_all(&mut loan, &bytes[20_000..]).unwrap();
        assert_eq!(loan.remaining(), 10_000);
        assert_eq!(loan.write(&[1; 20_000]), 10_000, "no more than was asked for");
        stream.send(loan).await.unwrap();
        // An empty one sends nothing, and one that is dropped neither.
        let empty = stream.alloc(100).await.unwrap();
        stream.send(empty).await.unwrap();
        drop(stream.alloc(100_000).await.unwrap());
        stream.write_all(b"next").await.unwrap();

        let mut accepted = server.accept().await.unwrap();
        let mut message = accepted.recv().await.unwrap().unwrap();
        assert_eq!(message.len(), 60_000);
        let mut part = vec![0; 12_345];
        assert_eq!(message.peek(&mut part), 12_345);
        assert!(part == bytes[..12_345]);
        message.skip(345);
        io::Read::read_exact(&mut message, &mut part).unwrap();
        assert!(part == bytes[345..12_690]);
        let rest = message.into_bytes();
        assert!(rest[..37_310] == bytes[12_690..] && rest[37_310..] == [1; 10_000]);
        let next = accepted.recv().await.unwrap().unwrap();
        assert_eq!(&next.into_bytes()[..], b"next");
        until(|| all_free(&client, &server)).await;
        let sent = client.stats();
        assert_eq!((sent.events_sent, sent.bytes_sent), (2, 60_004));
    });
}

#[test]
fn a_promise_counts_for_its_own_sessions_only() {
    run(|| async {
        let (trust, other) = (trust(), trust());
        let config = small().build().unwrap();
        let (client, server) = trusting_pair(&trust, config.clone()).await;
        let mut stream = client.open_stream().unwrap();
        let mut loan = stream.alloc(10).await.unwrap();
        assert!(matches!(loan.views(&other).map(drop), Err(Error::NotTrusted)));
        loan.write(b"x");
        stream.send(loan).await.unwrap();
        let mut accepted = server.accept().await.unwrap();
        let message = accepted.recv().await.unwrap().unwrap();
        assert!(matches!(message.views(&other).map(drop), Err(Error::NotTrusted)));
        assert!(message.views(&trust).is_ok());

        let (_listener, stranger, _server) = default_pair().await;
        let mut elsewhere = stranger.open_stream().unwrap();
        assert!(elsewhere.alloc(1).await.unwrap().views(&trust).is_err());
        // A loan is of its session's memory.
        let mut loan = stream.alloc(10).await.unwrap();
        loan.write(b"x");
        let refused = elsewhere.send(loan).await;
        assert!(matches!(refused, Err(Error::ForeignLoan)), "{refused:?}");
        drop(message);
        until(|| all_free(&client, &server)).await;
    });
}

#[test]
fn a_loan_from_an_empty_pool_goes_over_the_socket() {
    run(|| async {
        let trust = trust();
        let config = small().fallback_after(Duration::from_micros(200)).build().unwrap();
        let (client, server) = trusting_pair(&trust, config).await;
        let mut first = client.open_stream().unwrap();
        let hoard = first.alloc(700_000).await.unwrap();
        assert!(hoard.is_shared());
        let mut stream = client.open_stream().unwrap();
        let mut loan = stream.alloc(700_000).await.unwrap();
        assert!(!loan.is_shared() && stream.is_on_socket());
        let bytes = pattern(5, 700_000);
        for view in loan.views(&trust).unwrap() {
            view.copy_from_slice(&bytes);
        }
        loan.advance(700_000);
        let receiving = async {
            let mut accepted = server.accept().await.unwrap();
            let mut all: Vec<u8> = Vec::new();
            while all.len() < bytes.len() {
                let message = accepted.recv().await.unwrap().unwrap();
                assert!(!message.is_shared());
                all.extend(message.views(&trust).unwrap().flatten());
            }
            assert!(all == bytes);
            accepted
        };
        let (sent, _accepted) = zip(stream.send(loan), receiving).await;
        sent.unwrap();
        drop(hoard);
        until(|| all_free(&client, &server)).await;
        assert_eq!(server.stats().bytes_received, 0);
    });
}
