// SPDX-License-Identifier: MIT OR Apache-2.0
//! What was sent before a session ended arrives, also at a peer that drops what it has not read
//! when the connection ends; what a server of another implementation never answers, maps or takes
//! is found out soon; and what its fallback over the socket leaves behind is not used again.

use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use futures_lite::{AsyncReadExt, AsyncWriteExt};
use shmipc_glommio::wire::Event;
use shmipc_glommio::{
    Client, Config, ConfigBuilder, Connector, Cores, Error, HandshakeError, Listener, MemoryKind,
    ProtocolVersion, Server, Session, Stream,
};

use support::executor::{SocketPath, run, within};
use support::foreign::{EXCHANGE, FALLBACK, Foreign, NEGOTIATION, accept, receive};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
    pub(crate) mod foreign;
}

const LIMIT: Duration = Duration::from_secs(120);
const PATIENT: Duration = Duration::from_secs(60);
/// Long enough for a close that does not wait to be over.
const A_WHILE: Duration = Duration::from_millis(40);
const WORDS: [u8; 216] = [7; 216];

/// Versions 2 and 3, each with the memory that other implementations use with it.
const KINDS: [(ProtocolVersion, MemoryKind); 3] = [
    (ProtocolVersion::V3, MemoryKind::Memfd),
    (ProtocolVersion::V3, MemoryKind::File),
    (ProtocolVersion::V2, MemoryKind::File),
];

fn config(version: ProtocolVersion, memory: MemoryKind) -> ConfigBuilder {
    Config::builder()
        .container()
        .protocol(version)
        .memory(memory)
        .handshake_timeout(PATIENT)
        .close_timeout(PATIENT)
}

/// A server of another implementation on a thread of its own.
fn serve<T: Send + 'static>(
    path: &SocketPath,
    server: impl FnOnce(UnixListener) -> T + Send + 'static,
) -> JoinHandle<T> {
    let listener = UnixListener::bind(path.as_str()).unwrap();
    std::thread::spawn(move || server(listener))
}

/// Waits for the end of a server's thread, without holding up the executor.
async fn joined<T>(server: JoinHandle<T>) -> T {
    assert!(within(PATIENT, || server.is_finished()).await, "the server hangs");
    server.join().unwrap()
}

/// Takes one message, each step of it late, and what else comes until the end, or no longer if it
/// `leaves` first.
fn take_late(listener: UnixListener, leaves: bool) -> Option<Vec<u8>> {
    let late = || std::thread::sleep(A_WHILE);
    let peer = Foreign::serve(accept(&listener), late);
    late();
    let event = peer.take()?;
    late();
    let words = peer.read(event)?;
    peer.free(event);
    if !leaves {
        support::foreign::wait_until("the end", || {
            peer.sleep();
            peer.take_all();
            peer.is_hung_up()
        });
    }
    Some(words)
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    CloseBoth,
    CloseSession,
    DropAll,
}

#[test]
fn last_words_reach_a_server_that_handles_a_hang_up_first() {
    run(LIMIT, || async {
        for (version, memory) in KINDS {
            for end in [End::CloseBoth, End::CloseSession, End::DropAll] {
                let path = SocketPath::new();
                let server = serve(&path, |listener| take_late(listener, false));
                let connector = Connector::new(config(version, memory).build().unwrap());
                let session = connector.connect(path.as_str()).await.unwrap();
                let mut stream = session.open_stream().unwrap();
                stream.write_all(&WORDS).await.unwrap();
                stream.flush().await.unwrap();
                match end {
                    End::CloseBoth => {
                        stream.close().await.unwrap();
                        drop(stream);
                        session.close().await.unwrap();
                    }
                    End::CloseSession => session.close().await.unwrap(),
                    End::DropAll => drop((stream, session)),
                }
                let words = joined(server).await;
                assert_eq!(words.as_deref(), Some(&WORDS[..]), "{version:?} {memory:?} {end:?}");
            }
        }
    });
}

/// Memory of 64 KiB, so that most of what is sent goes over the socket.
fn tiny(version: ProtocolVersion, memory: MemoryKind) -> ConfigBuilder {
    config(version, memory)
        .buffer_size(1 << 16)
        .slice_classes([shmipc_glommio::SliceClass::new(1004, 100)])
        .fallback_after(Duration::ZERO)
}

/// More than there is of that.
const LONG: usize = 1 << 17;

/// What a reader does when it has read everything.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Then {
    ClosesStream,
    Answers,
    IsSilent,
}

/// Takes what comes of a stream until there is so much of it, unless the other side hangs up. The
/// stream's number.
fn take_long(peer: &mut Foreign) -> Option<u32> {
    let (mut got, mut stream_id) = (0, 0);
    while got < LONG {
        if peer.waiting() > 0 {
            let event = peer.take()?;
            got += peer.read(event)?.len();
            peer.free(event);
            continue;
        }
        peer.sleep();
        // A hang-up is seen before what is there to read.
        if peer.is_hung_up() {
            return None;
        }
        if let (_, FALLBACK, payload) = receive(&mut peer.socket) {
            stream_id = u32::from_be_bytes(payload[..4].try_into().unwrap());
            got += payload.len() - 8;
        }
    }
    Some(stream_id)
}

fn closed(stream_id: u32) -> Event {
    Event { stream_id, offset: 0, status: 1 }
}

/// A session with such a server, and a stream on which that much was sent.
async fn send_long(path: &SocketPath, config: ConfigBuilder) -> (Session, Stream) {
    let connector = Connector::new(config.build().unwrap());
    let session = connector.connect(path.as_str()).await.unwrap();
    let mut stream = session.open_stream().unwrap();
    stream.write_all(&vec![7; LONG]).await.unwrap();
    stream.flush().await.unwrap();
    assert!(session.stats().fallback_sent > 0);
    (session, stream)
}

/// Takes what comes, and gives it to a reader that is late. Whether that comes before a hang-up.
fn read_long_late(listener: UnixListener, late: Duration, then: Then) -> bool {
    let mut peer = Foreign::serve(accept(&listener), || {});
    let Some(stream_id) = take_long(&mut peer) else { return false };
    // The event loop goes on meanwhile.
    let start = std::time::Instant::now();
    let mut is_read = false;
    loop {
        peer.sleep();
        if peer.is_hung_up() {
            return is_read;
        }
        if peer.hears() {
            peer.take_all();
        }
        if !is_read && start.elapsed() >= late {
            is_read = true;
            match then {
                Then::ClosesStream => peer.put(closed(stream_id)),
                Then::Answers => peer.allow_v3_fallback(stream_id, b"answer"),
                Then::IsSilent => {}
            }
        }
        std::thread::sleep(A_WHILE / 8);
    }
}

/// Nothing tells when data that went over the socket was read, but what its reader does then.
#[test]
fn last_words_that_went_over_the_socket_are_read_before_the_hang_up() {
    run(LIMIT, || async {
        for then in [Then::ClosesStream, Then::Answers, Then::IsSilent] {
            for (version, memory) in KINDS {
                let path = SocketPath::new();
                let server =
                    serve(&path, move |listener| read_long_late(listener, 8 * A_WHILE, then));
                let mut config = tiny(version, memory);
                if then == Then::IsSilent {
                    config = config.close_timeout(20 * A_WHILE);
                }
                let (session, _stream) = send_long(&path, config).await;
                let closed = session.close().await;
                assert!(joined(server).await, "{version:?} {memory:?} {then:?}");
                match closed {
                    Ok(()) => assert_ne!(then, Then::IsSilent, "{version:?}: it cannot know"),
                    Err(Error::NotTaken {
                        events: 0,
                        slices: 0,
                        socket_bytes: 0,
                        unconfirmed,
                        ..
                    }) => {
                        assert_eq!(then, Then::IsSilent, "{version:?}: it has been told");
                        assert!((1..LONG as u64).contains(&unconfirmed), "{unconfirmed}");
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        }
    });
}

/// One that went away may not have read it.
#[test]
fn a_peer_that_leaves_has_not_confirmed_what_went_over_the_socket() {
    run(LIMIT, || async {
        for closes_stream in [true, false] {
            let path = SocketPath::new();
            let (done, is_done) = mpsc::channel::<()>();
            let server = serve(&path, move |listener| {
                let mut peer = Foreign::serve(accept(&listener), || {});
                let stream_id = take_long(&mut peer).unwrap();
                if closes_stream {
                    peer.put(closed(stream_id));
                }
                is_done.recv().unwrap_err();
                while peer.hears() {}
            });
            let config = tiny(ProtocolVersion::V3, MemoryKind::Memfd);
            let (session, _stream) = send_long(&path, config).await;
            drop(done);
            joined(server).await;
            session.closed().await;
            let closed = session.close().await;
            let is_as_expected = if closes_stream {
                closed.is_ok()
            } else {
                matches!(closed, Err(Error::PeerClosed))
            };
            assert!(is_as_expected, "{closes_stream} {closed:?}");
        }
    });
}

/// Also when it went over the socket: see
/// [`the_close_of_a_stream_waits_until_a_foreign_peer_has_read_what_was_sent_before`].
#[test]
fn the_close_of_a_stream_gives_readers_of_the_socket_their_time() {
    const TRIES: usize = 50;
    run(LIMIT, || async {
        for (version, memory) in KINDS {
            let mut ends = Vec::new();
            while ends.len() < TRIES && !ends.contains(&(false, true)) {
                let path = SocketPath::new();
                let server = serve(&path, |listener| {
                    let mut peer = Foreign::serve(accept(&listener), || {});
                    let stream_id = take_long(&mut peer).unwrap();
                    // Its reader runs a little later than its event loop.
                    std::thread::sleep(A_WHILE / 8);
                    let is_told_too_soon = peer.hears() || peer.waiting() > 0;
                    peer.put(closed(stream_id));
                    support::foreign::wait_until("the end", || peer.is_hung_up());
                    is_told_too_soon
                });
                let config = tiny(version, memory).close_timeout(8 * A_WHILE);
                let (session, stream) = send_long(&path, config).await;
                drop(stream);
                // The peer closes the stream too, before it hears of its close here.
                let closed = session.close().await;
                ends.push((joined(server).await, closed.is_ok()));
            }
            assert!(ends.contains(&(false, true)), "{version:?} {memory:?}: {ends:?}");
        }
    });
}

#[test]
fn a_peer_that_never_takes_them_ends_the_close_with_an_error() {
    const SHORT: Duration = Duration::from_millis(50);
    run(LIMIT, || async {
        for (takes, left) in [(false, (1, 1)), (true, (0, 1))] {
            for (version, memory) in KINDS {
                let path = SocketPath::new();
                let (done, is_done) = mpsc::channel::<()>();
                let server = serve(&path, move |listener| {
                    let peer = Foreign::serve(accept(&listener), || {});
                    if takes {
                        peer.take().unwrap();
                    }
                    // Its slice is kept.
                    is_done.recv().unwrap_err();
                });
                let config = config(version, memory).close_timeout(SHORT).build().unwrap();
                let session = Connector::new(config).connect(path.as_str()).await.unwrap();
                let mut stream = session.open_stream().unwrap();
                stream.write_all(&WORDS).await.unwrap();
                let error = session.close().await.unwrap_err();
                let Error::NotTaken { after, events, slices, .. } = error else {
                    panic!("{error}");
                };
                // A server of version 2 may be so late that it has not come to take it.
                let is_late = takes && version == ProtocolVersion::V2;
                assert!(is_late || (events, slices) == left, "{events} {slices} {version:?}");
                assert_eq!(after, SHORT);
                assert!(matches!(session.closed().await, Error::NotTaken { .. }));
                drop(done);
                joined(server).await;
            }
        }
    });
}

/// The peer has read the message, and uses its slice for something of its own.
#[test]
fn a_close_does_not_wait_for_slices_that_the_peer_uses_again() {
    run(LIMIT, || async {
        for sends in [false, true] {
            let path = SocketPath::new();
            let server = serve(&path, move |listener| {
                let mut peer = Foreign::serve(accept(&listener), || {});
                let event = peer.take().unwrap();
                peer.free(event);
                // As it looks when it was taken from the list again.
                peer.change_slice(event.offset, |slice| slice.flags = 2);
                if sends {
                    peer.change_slice(event.offset, |slice| slice.size = WORDS.len() as u32);
                    peer.put(event);
                }
                support::foreign::wait_until("the end", || peer.is_hung_up());
            });
            let config = config(ProtocolVersion::V3, MemoryKind::Memfd).build().unwrap();
            let session = Connector::new(config).connect(path.as_str()).await.unwrap();
            let mut stream = session.open_stream().unwrap();
            stream.write_all(&WORDS).await.unwrap();
            session.close().await.unwrap();
            joined(server).await;
        }
    });
}

/// As the asynchronous streams of shmipc-go, which hand nothing to their user once they have seen
/// the close, also of what they had received before.
#[test]
fn the_close_of_a_stream_waits_until_a_foreign_peer_has_read_what_was_sent_before() {
    // The wait is bounded, and a thread may be held up for longer than that.
    const TRIES: usize = 50;
    run(LIMIT, || async {
        for (version, memory) in KINDS {
            let mut orders = Vec::new();
            while orders.len() < TRIES && !orders.contains(&(0, 1)) {
                let path = SocketPath::new();
                let server = serve(&path, |listener| {
                    let peer = Foreign::serve(accept(&listener), || {});
                    let words = peer.take().unwrap();
                    // Its reader runs a little later than its event loop.
                    std::thread::sleep(A_WHILE / 8);
                    let closed_before_it_was_read = peer.waiting();
                    peer.free(words);
                    (closed_before_it_was_read, peer.take().unwrap().status)
                });
                let connector = Connector::new(config(version, memory).build().unwrap());
                let session = connector.connect(path.as_str()).await.unwrap();
                let mut stream = session.open_stream().unwrap();
                stream.write_all(&WORDS).await.unwrap();
                stream.flush().await.unwrap();
                drop(stream);
                orders.push(joined(server).await);
            }
            assert!(orders.contains(&(0, 1)), "{version:?} {memory:?}: {orders:?}");
        }
    });
}

/// One that keeps the memory of what it has read hears of the close all the same.
#[test]
fn the_close_of_a_stream_reaches_a_foreign_peer_that_gives_nothing_back() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let server = serve(&path, |listener| {
            let peer = Foreign::serve(accept(&listener), || {});
            let _kept = peer.take().unwrap();
            peer.take().unwrap().status
        });
        let config = config(ProtocolVersion::V3, MemoryKind::Memfd).build().unwrap();
        let session = Connector::new(config).connect(path.as_str()).await.unwrap();
        let mut stream = session.open_stream().unwrap();
        stream.write_all(&WORDS).await.unwrap();
        drop(stream);
        assert_eq!(joined(server).await, 1);
    });
}

#[test]
fn a_session_that_has_sent_nothing_closes_without_the_peer() {
    run(LIMIT, || async {
        for (version, memory) in KINDS {
            let path = SocketPath::new();
            let server = serve(&path, |listener| {
                let socket = accept(&listener);
                // A client of version 2 does not need its server for anything.
                Foreign::serve(socket, || {})
            });
            let connector = Connector::new(config(version, memory).build().unwrap());
            let session = connector.connect(path.as_str()).await.unwrap();
            let stream = session.open_stream().unwrap();
            let _peer = joined(server).await;
            drop(stream);
            session.close().await.unwrap();
        }
    });
}

/// A server of this crate takes by itself what was sent before the end, but not from files that are
/// gone before it has opened them.
#[test]
fn last_words_reach_our_own_server_of_version_2_that_maps_late() {
    for end in [End::CloseSession, End::DropAll] {
        let path = SocketPath::new();
        let (tell, is_bound) = mpsc::channel();
        let (ended, is_ended) = mpsc::channel::<()>();
        let server_path = path.as_str().to_owned();
        let server = std::thread::spawn(move || {
            run(LIMIT, move || async move {
                let listener = Listener::bind(&server_path, Config::default()).unwrap();
                tell.send(()).unwrap();
                // Nothing of this core runs meanwhile: not before the client has had its close.
                let _ = is_ended.recv_timeout(4 * A_WHILE);
                let session = listener.accept().await.unwrap();
                let mut stream = session.accept().await.unwrap();
                let mut words = [0; WORDS.len()];
                stream.read_exact(&mut words).await.unwrap();
                assert_eq!(words, WORDS);
            });
        });
        is_bound.recv().unwrap();
        let client_path = path.as_str().to_owned();
        run(LIMIT, move || async move {
            let config = config(ProtocolVersion::V2, MemoryKind::File).build().unwrap();
            let session = Connector::new(config).connect(&client_path).await.unwrap();
            let mut stream = session.open_stream().unwrap();
            stream.write_all(&WORDS).await.unwrap();
            match end {
                End::DropAll => drop((stream, session)),
                _ => session.close().await.unwrap(),
            }
            let _ = ended.send(());
            shmipc_glommio::shutdown_executor().await;
        });
        server.join().unwrap();
    }
}

#[test]
fn a_server_that_stops_lets_foreign_clients_take_their_answers() {
    let path = SocketPath::new();
    let server = Server::builder(path.as_str())
        .cores(Cores::Unpinned(1))
        .config(config(ProtocolVersion::V3, MemoryKind::Memfd).build().unwrap());
    let server = server
        .serve_streams(|mut stream| async move {
            let mut words = [0; WORDS.len()];
            stream.read_exact(&mut words).await?;
            stream.write_all(&words).await
        })
        .unwrap();
    let files =
        ["queue", "buffer"].map(|name| format!("/dev/shm/lastwords{}{name}", std::process::id()));
    let mut peer = Foreign::connect(path.as_str(), [&files[0], &files[1]]);
    peer.send(2, &WORDS);
    support::foreign::wait_until("an answer", || peer.waiting() > 0);
    // The answer is there, and the client has not looked yet.
    let stopping = std::thread::spawn(move || server.stop(PATIENT));
    std::thread::sleep(4 * A_WHILE);
    let event = peer.take().expect("the answer is lost");
    std::thread::sleep(A_WHILE);
    assert_eq!(peer.read(event).expect("the answer is lost"), WORDS);
    peer.free(event);
    peer.take();
    stopping.join().unwrap().unwrap();
    for file in files {
        let _ = std::fs::remove_file(file);
    }
}

/// Says nothing to the opening of version 4, and does not close either, as shmipc-go. Serves
/// version 3. Ends after so many sessions, and tells how many openings of version 4 there were.
/// They live until that is looked at.
fn silent_to_version_4(listener: UnixListener, sessions: usize) -> (usize, Vec<impl Sized + Send>) {
    let (mut kept, mut openings) = (Vec::new(), 0);
    while kept.len() - openings < sessions {
        let socket = accept(&listener);
        let mut header = [0; 8];
        support::foreign::wait_until("an opening", || {
            let peeked = nix::sys::socket::recv(
                std::os::fd::AsRawFd::as_raw_fd(&socket),
                &mut header,
                nix::sys::socket::MsgFlags::MSG_PEEK,
            );
            peeked.unwrap() == header.len()
        });
        if header[7] == NEGOTIATION {
            openings += 1;
            kept.push((None, Some(socket)));
        } else {
            assert_eq!((header[6], header[7]), (3, EXCHANGE));
            kept.push((Some(Foreign::serve(socket, || {})), None));
        }
    }
    (openings, kept)
}

fn version_4() -> ConfigBuilder {
    config(ProtocolVersion::V4, MemoryKind::Memfd)
}

#[test]
fn silence_to_version_4_means_version_3_and_is_remembered() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let server = serve(&path, |listener| silent_to_version_4(listener, 3));
        // Its handshakes have a minute: a client that waited for an answer would hang.
        for _ in 0..3 {
            let connector = Connector::new(version_4().build().unwrap());
            let session = connector.connect(path.as_str()).await.unwrap();
            assert_eq!(session.protocol(), ProtocolVersion::V3);
        }
        assert_eq!(joined(server).await.0, 1, "openings of version 4");
        // Another server there is asked again.
        std::fs::remove_file(path.as_str()).unwrap();
        let listener = Listener::bind(path.as_str(), Config::default()).unwrap();
        let session = Connector::new(version_4().build().unwrap()).connect(path.as_str()).await;
        assert_eq!(session.unwrap().protocol(), ProtocolVersion::V4);
        drop(listener);
    });
}

#[test]
fn a_client_of_version_4_has_a_session_with_a_server_that_is_silent_to_it() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let server = serve(&path, |listener| silent_to_version_4(listener, 1));
        let client = Client::builder(path.as_str()).config(version_4().build().unwrap());
        let client = client.acquire_timeout(PATIENT).build().unwrap();
        let session = client.session(0).await.unwrap();
        assert_eq!(session.protocol(), ProtocolVersion::V3);
        drop(session);
        client.close().await.unwrap();
        joined(server).await;
    });
}

#[test]
fn silence_to_version_4_without_a_fallback_is_told_by_name() {
    run(LIMIT, || async {
        for closes in [false, true] {
            let path = SocketPath::new();
            let (done, is_done) = mpsc::channel::<()>();
            let server = serve(&path, move |listener| {
                let socket = accept(&listener);
                if !closes {
                    is_done.recv().unwrap_err();
                }
                drop(socket);
            });
            let config = version_4().allow_v3_fallback(false);
            let timeout = if closes { PATIENT } else { Duration::from_millis(50) };
            let connector = Connector::new(config.handshake_timeout(timeout).build().unwrap());
            let error = connector.connect(path.as_str()).await.unwrap_err();
            let Error::Handshake(HandshakeError::Version4Unanswered { .. }) = error else {
                panic!("{error}");
            };
            assert!(error.to_string().contains("`allow_v3_fallback`"), "{error}");
            drop(done);
            joined(server).await;
        }
    });
}

#[test]
fn a_version_2_server_that_never_maps_is_found_out() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let (done, is_done) = mpsc::channel::<()>();
        let server = serve(&path, move |listener| {
            let sockets = [accept(&listener), accept(&listener)];
            is_done.recv().unwrap_err();
            drop(sockets);
        });
        let timeout = Duration::from_millis(100);
        let config = config(ProtocolVersion::V2, MemoryKind::File).handshake_timeout(timeout);
        // The peer is not known to have stalled for a minute.
        let connector = Connector::new(config.build().unwrap());
        let quiet = connector.connect(path.as_str()).await.unwrap();
        let asking = connector.connect(path.as_str()).await.unwrap();
        let mut stream = asking.open_stream().unwrap();
        stream.write_all(&WORDS).await.unwrap();
        let error = stream.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut, "{error}");
        let error = asking.closed().await;
        let expected = HandshakeError::NeverMapped(timeout);
        assert!(matches!(&error, Error::Handshake(error) if *error == expected), "{error}");
        // Nothing is known of the server of one that has asked for nothing.
        assert!(quiet.end_reason().is_none());
        drop(done);
        joined(server).await;
    });
}

#[test]
fn a_version_2_server_that_maps_late_but_in_time_is_not_given_up() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let server = serve(&path, |listener| take_late(listener, true));
        let timeout = 4 * A_WHILE;
        let config = config(ProtocolVersion::V2, MemoryKind::File).handshake_timeout(timeout);
        let session = Connector::new(config.build().unwrap()).connect(path.as_str()).await.unwrap();
        let mut stream = session.open_stream().unwrap();
        stream.write_all(&WORDS).await.unwrap();
        assert_eq!(joined(server).await.as_deref(), Some(&WORDS[..]));
        let error = session.closed().await;
        assert!(matches!(error, Error::PeerClosed), "{error}");
    });
}

/// Answers each request of a stream, the first one over the socket, and then as it came: shmipc-go
/// stays on the socket once a stream has used it.
fn answers_by_socket(listener: UnixListener, requests: usize) -> Vec<u32> {
    let mut peer = Foreign::serve(accept(&listener), || {});
    let mut streams = Vec::new();
    while streams.len() < requests {
        peer.sleep();
        let Some(event) = peer.take() else { break };
        if event.status & 0xff != 0 {
            continue;
        }
        peer.free(event);
        streams.push(event.stream_id);
        peer.allow_v3_fallback(event.stream_id, b"answer");
    }
    peer.sleep();
    support::foreign::wait_until("the end", || {
        if peer.waiting() > 0 {
            peer.take();
        }
        peer.is_hung_up()
    });
    streams
}

#[test]
fn a_stream_whose_peer_has_fallen_back_is_not_kept_for_the_next_exchange() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let server = serve(&path, |listener| answers_by_socket(listener, 3));
        let config = config(ProtocolVersion::V3, MemoryKind::Memfd).build().unwrap();
        let client = Client::builder(path.as_str()).config(config).build().unwrap();
        for _ in 0..3 {
            let exchange = client.with_stream(0, async |stream| {
                stream.write_all(&WORDS).await?;
                let mut answer = [0; 6];
                stream.read_exact(&mut answer).await?;
                assert_eq!(&answer, b"answer");
                Ok::<_, std::io::Error>(())
            });
            exchange.await.unwrap();
        }
        assert_eq!(client.status()[0].idle_streams, 0);
        client.close().await.unwrap();
        let mut streams = joined(server).await;
        streams.dedup();
        assert_eq!(streams.len(), 3, "each exchange has a stream of its own: {streams:?}");
    });
}

/// Between two sides of this crate such a stream comes back to memory, and is kept.
#[test]
fn a_stream_that_has_fallen_back_towards_our_own_server_is_kept() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let tiny = tiny(ProtocolVersion::V3, MemoryKind::Memfd).build().unwrap();
        let listener = Listener::bind(path.as_str(), tiny.clone()).unwrap();
        let serving = glommio::spawn_local(async move {
            let session: Session = listener.accept().await.unwrap();
            let session = Rc::new(session);
            while let Ok(mut stream) = session.accept().await {
                let mut buffer = vec![0; 1 << 17];
                while let Ok(()) = stream.read_exact(&mut buffer).await {
                    stream.write_all(b"answer").await.unwrap();
                }
            }
        });
        let client = Client::builder(path.as_str()).config(tiny).build().unwrap();
        for _ in 0..3 {
            let exchange = client.with_stream(0, async |stream| {
                // More than there is memory.
                let mut loan = stream.alloc(1 << 17).await?;
                loan.write(&vec![7; 1 << 17]);
                stream.send(loan).await?;
                let mut answer = [0; 6];
                stream.read_exact(&mut answer).await
            });
            exchange.await.unwrap();
        }
        assert_eq!(client.status()[0].idle_streams, 1);
        assert!(client.session(0).await.unwrap().stats().fallback_sent > 0);
        client.close().await.unwrap();
        serving.await;
    });
}
