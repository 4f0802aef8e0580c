// SPDX-License-Identifier: MIT OR Apache-2.0
//! Peers that are refused: what they are told, what the log has, and who tries again.

use std::cell::Cell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use shmipc_glommio::wire::negotiation::{
    FULL, NOT_ALLOWED, STOPPING, TOO_LARGE, VERSION_NOT_SUPPORTED,
};
use shmipc_glommio::wire::{
    Features, HEADER_LEN, Header, Message, MessageType, NegotiationRequest, NegotiationResponse,
};
use shmipc_glommio::{
    AllowedPeers, Client, Config, ConfigBuilder, Connector, Cores, Error, HandshakeError, Listener,
    MemoryKind, ProtocolVersion, Server, SessionState,
};

use support::executor::{SocketPath, run, within};
use support::log::{logged, watch_the_log};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
    pub(crate) mod log;
}

const LIMIT: Duration = Duration::from_secs(60);
const V4: u8 = 0;

fn small() -> ConfigBuilder {
    Config::builder().container()
}

fn version_4() -> ConfigBuilder {
    small().protocol(ProtocolVersion::V4)
}

fn nobody() -> AllowedPeers {
    AllowedPeers::Users(vec![4242])
}

async fn connect(path: &SocketPath, config: ConfigBuilder) -> Error {
    let connector = Connector::new(config.build().unwrap());
    connector.connect(path.as_str()).await.map(drop).unwrap_err()
}

#[track_caller]
fn is_refused(error: &Error, expected: &str, word: &str) {
    let Error::Handshake(HandshakeError::Refused { code, message }) = error else {
        panic!("{error}");
    };
    assert_eq!(code, expected);
    assert!(message.starts_with(word), "{message}");
    assert!(error.to_string().contains(expected), "{error}");
}

#[test]
fn a_client_of_version_4_learns_why_it_is_refused() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let listen =
            |config: ConfigBuilder| Listener::bind(path.as_str(), config.build().unwrap()).unwrap();
        for _ in 0..3 {
            let _listener = listen(small().allowed_peers(nobody()));
            let error = connect(&path, version_4()).await;
            is_refused(&error, NOT_ALLOWED, "not allowed");
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
            assert!(!error.is_retryable());
            assert!(!error.to_string().contains("4242"), "it says nothing about others: {error}");
        }

        let listener = listen(small());
        listener.authorize(|_| false);
        is_refused(&connect(&path, version_4()).await, NOT_ALLOWED, "not allowed");
        drop(listener);

        let listener = listen(small().max_sessions(1));
        let config = version_4().build().unwrap();
        let _first = Connector::new(config).connect(path.as_str()).await.unwrap();
        let error = connect(&path, version_4()).await;
        is_refused(&error, FULL, "full");
        assert!(error.is_retryable());
        drop((_first, listener));

        let listener = listen(small().max_mapped_bytes(1 << 20));
        let error = connect(&path, version_4()).await;
        is_refused(&error, TOO_LARGE, "too large");
        assert!(error.to_string().contains("1048576 (`max_mapped_bytes`)"), "{error}");
        assert!(!error.is_retryable());
        let prefix = format!("/dev/shm/shmipc-refusals-{}", std::process::id());
        let files = version_4().memory(MemoryKind::File).path_prefix(prefix);
        is_refused(&connect(&path, files).await, TOO_LARGE, "too large");
        drop(listener);

        let listener = listen(small().max_mapped_bytes(3 << 20).max_total_mapped_bytes(3 << 20));
        let config = version_4().build().unwrap();
        let _first = Connector::new(config).connect(path.as_str()).await.unwrap();
        let error = connect(&path, version_4()).await;
        is_refused(&error, FULL, "full: all sessions together");
        drop(listener);

        // Files elsewhere than where the server looks for them.
        let _listener = listen(small().path_prefix("/dev/shm/somewhere/else/x"));
        let prefix = format!("/dev/shm/shmipc-refusals-{}", std::process::id());
        let files = version_4().memory(MemoryKind::File).path_prefix(prefix);
        is_refused(&connect(&path, files).await, NOT_ALLOWED, "not allowed: the memory");
    });
}

#[test]
fn a_client_of_an_older_version_sees_its_connection_closed() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let config = small().allowed_peers(nobody());
        let _listener = Listener::bind(path.as_str(), config.clone().build().unwrap()).unwrap();
        let is_closed =
            |error: &Error| matches!(error, Error::Handshake(HandshakeError::Closed { .. }));
        let error = connect(&path, small()).await;
        assert!(is_closed(&error) && error.is_retryable(), "{error}");
        // Nor does a server that is not to know version 4.
        let other = SocketPath::new();
        let config = config.max_accepted_protocol(ProtocolVersion::V3).build().unwrap();
        let _other = Listener::bind(other.as_str(), config).unwrap();
        assert!(is_closed(&connect(&other, version_4()).await));
    });
}

/// A client that speaks by hand.
struct Raw(UnixStream);

impl Raw {
    fn connect(path: &str) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self(stream)
    }

    fn send(&mut self, message: &Message) {
        let mut bytes = Vec::new();
        message.encode(V4, &mut bytes).unwrap();
        self.0.write_all(&bytes).unwrap();
    }

    fn offer(&mut self) {
        let json = NegotiationRequest::offering(Features::default()).encode();
        self.send(&Message::Negotiation(json.into()));
    }

    /// What the server answers; `None` when it closes.
    fn answer(&mut self) -> Option<NegotiationResponse> {
        let mut header = [0; HEADER_LEN];
        self.0.read_exact(&mut header).ok()?;
        let header = Header::decode(&header).unwrap();
        assert_eq!((header.version, header.message), (V4, MessageType::Negotiation));
        let mut json = vec![0; header.length as usize - HEADER_LEN];
        self.0.read_exact(&mut json).unwrap();
        Some(NegotiationResponse::decode(&json, Features::default()).unwrap())
    }

    fn must_be_refused(&mut self, expected: &str) {
        let Some(NegotiationResponse::Refused { code, .. }) = self.answer() else {
            panic!("not refused");
        };
        assert_eq!(code, expected);
        assert_eq!(self.0.read(&mut [0; 1]).unwrap_or(0), 0, "and closed");
    }
}

#[test]
fn a_server_that_stops_says_so_to_those_in_the_middle_of_a_handshake() {
    let path = SocketPath::new();
    let builder = Server::builder(path.as_str()).cores(Cores::Unpinned(1));
    let server = builder.config(small().build().unwrap()).serve_streams(|_| async {}).unwrap();
    let mut raws: Vec<_> = (0..3).map(|_| Raw::connect(&format!("{}.0", path.as_str()))).collect();
    for raw in &mut raws {
        raw.offer();
        assert!(matches!(raw.answer(), Some(NegotiationResponse::Selected { .. })));
    }
    server.stop(Duration::from_secs(5)).unwrap();
    for raw in &mut raws {
        raw.must_be_refused(STOPPING);
    }
}

#[test]
fn a_version_that_is_not_spoken_is_told_as_that() {
    let path = SocketPath::new();
    let builder = Server::builder(path.as_str()).cores(Cores::Unpinned(1));
    let server = builder.config(small().build().unwrap()).serve_streams(|_| async {}).unwrap();
    let mut raw = Raw::connect(path.as_str());
    let json = br#"{"supports_protocols":[9],"sdk_name":"x","sdk_version":"1"}"#;
    raw.send(&Message::Negotiation(json.as_slice().into()));
    raw.must_be_refused(VERSION_NOT_SUPPORTED);
    server.stop(Duration::from_secs(5)).unwrap();
}

#[test]
fn those_who_are_refused_and_say_nothing_hold_up_nobody() {
    let path = SocketPath::new();
    let me = nix::unistd::geteuid().as_raw();
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let config = small().allowed_peers(AllowedPeers::Users(vec![me])).max_handshakes(2);
        let listener = Listener::bind(&at, config.build().unwrap()).unwrap();
        let is_open = Rc::new(Cell::new(false));
        let opened = Rc::clone(&is_open);
        listener.authorize(move |_| opened.get());
        let silent: Vec<_> = (0..100).map(|_| UnixStream::connect(&at).unwrap()).collect();
        let config = version_4().build().unwrap();
        // Too many have been refused by now for all of them to be told.
        let error = Connector::new(config.clone()).connect(&at).await.map(drop).unwrap_err();
        assert!(matches!(error, Error::Handshake(_)), "{error}");
        is_open.set(true);
        Connector::new(config).connect(&at).await.unwrap();
        // The silent are closed, those that were let speak soon after.
        let is_closed = |mut stream: &UnixStream| {
            stream.set_nonblocking(true).unwrap();
            matches!(stream.read(&mut [0]), Ok(0))
        };
        assert!(within(LIMIT, || silent.iter().all(is_closed)).await);
    });
}

#[test]
fn refusals_are_logged_with_the_peer_and_a_flood_of_them_is_no_flood_of_lines() {
    watch_the_log();
    run(LIMIT, || async {
        let path = SocketPath::new();
        let config = small().allowed_peers(nobody()).build().unwrap();
        let listener = Listener::bind(path.as_str(), config).unwrap();
        let refused = Rc::new(Cell::new(0));
        let counted = Rc::clone(&refused);
        listener.on_rejected(move |_| counted.set(counted.get() + 1));
        let began = Instant::now();
        for _ in 0..300 {
            drop(UnixStream::connect(path.as_str()).unwrap());
            glommio::executor().yield_task_queue_now().await;
        }
        assert!(within(LIMIT, || refused.get() == 300).await);
        let lines = logged(path.as_str());
        // The first at once, then one a second.
        let most = began.elapsed().as_secs() as usize + 1;
        assert!((1..=most).contains(&lines.len()), "{lines:#?}");
        let pid = std::process::id();
        let uid = nix::unistd::geteuid();
        for part in [
            "peer refused",
            "reason=\"NOT_ALLOWED\"",
            &format!("uid={uid}"),
            &format!("pid={pid}"),
            "`allowed_peers` of this listener allows users 4242 only",
        ] {
            assert!(lines[0].contains(part), "{part:?} is not in {}", lines[0]);
        }
        glommio::timer::sleep(Duration::from_millis(1100)).await;
        drop(UnixStream::connect(path.as_str()).unwrap());
        let untold = format!("untold={}", 300 - lines.len());
        let has_count = || logged(path.as_str()).iter().any(|line| line.contains("untold="));
        assert!(within(LIMIT, || refused.get() == 301 && has_count()).await);
        let counted: Vec<_> = logged(path.as_str());
        assert!(
            lines.len() > 1 || counted.iter().any(|line| line.contains(&untold)),
            "{counted:#?}"
        );
    });
}

#[test]
fn a_kept_client_does_not_try_again_what_will_not_pass() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let listener = Listener::bind(path.as_str(), small().build().unwrap()).unwrap();
        let (is_open, asked) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(0)));
        let (opened, counted) = (Rc::clone(&is_open), Rc::clone(&asked));
        listener.authorize(move |_| {
            counted.set(counted.get() + 1);
            opened.get()
        });
        let most = Duration::from_millis(300);
        let client = Client::builder(path.as_str())
            .config(version_4().build().unwrap())
            .acquire_timeout(LIMIT)
            .sessions_per_shard(2)
            .backoff(Duration::from_millis(1), most)
            .build()
            .unwrap();
        // Far below its patience.
        let error = client.session(0).await.map(drop).unwrap_err();
        let Error::Unavailable { shard: 0, source, server, .. } = &error else {
            panic!("{error}");
        };
        is_refused(source, NOT_ALLOWED, "not allowed");
        assert_eq!(&**server, Path::new(path.as_str()));
        assert!(!error.is_retryable());
        let failed_until = || {
            client.status().into_iter().map(|status| match status.state {
                SessionState::Failed { retry_after, error, .. } => {
                    is_refused(&error, NOT_ALLOWED, "not allowed");
                    retry_after
                }
                state => panic!("{state:?}"),
            })
        };
        let until = failed_until().max().unwrap();
        assert!(within(LIMIT, || asked.get() == 2).await);
        // Who asks before that is told, and nothing is tried; nor is it when nobody asks.
        if Instant::now() + most / 2 < until {
            client.open_stream(0).await.map(drop).unwrap_err();
            assert_eq!(asked.get(), 2);
        }
        glommio::timer::sleep(3 * most).await;
        assert_eq!((asked.get(), failed_until().max()), (2, Some(until)));
        is_open.set(true);
        client.session(0).await.unwrap();
        assert!(
            within(LIMIT, || client
                .status()
                .iter()
                .all(|status| { matches!(status.state, SessionState::Up) }))
            .await
        );
    });
}

#[test]
fn a_kept_client_waits_for_what_may_pass() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let client = Client::builder(path.as_str()).config(version_4().build().unwrap());
        let client = client.acquire_timeout(LIMIT).build().unwrap();
        let at = path.as_str().to_owned();
        let coming = glommio::spawn_local(async move {
            glommio::timer::sleep(Duration::from_millis(50)).await;
            let listener = Listener::bind(&at, small().max_sessions(1).build().unwrap()).unwrap();
            let connector = Connector::new(version_4().build().unwrap());
            let first = connector.connect(&at).await;
            let taken = listener.accept().await.unwrap();
            // Full, meanwhile.
            glommio::timer::sleep(Duration::from_millis(50)).await;
            drop((first, taken));
            listener
        });
        client.session(0).await.unwrap();
        drop(coming.await);
    });
}
