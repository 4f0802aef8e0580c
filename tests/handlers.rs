// SPDX-License-Identifier: MIT OR Apache-2.0
//! Handlers that fail: what the peer sees, what is counted, and what is logged.

use std::io;
use std::time::Duration;

use futures_lite::AsyncWriteExt;
use shmipc_glommio::{
    Config, ConfigBuilder, Connector, Cores, Error, Listener, MemoryKind, ProtocolVersion, Server,
    ServerBuilder, Session, Stream, Wakeup,
};

use support::executor::{SocketPath, run, within};
use support::log::{logged, watch_the_log};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
    pub(crate) mod log;
}

const LIMIT: Duration = Duration::from_secs(60);

fn small() -> ConfigBuilder {
    Config::builder().container()
}

fn server(path: &SocketPath) -> ServerBuilder {
    let builder = Server::builder(path.as_str()).cores(Cores::Unpinned(1));
    builder.config(small().build().unwrap())
}

async fn send(stream: &mut Stream, bytes: &[u8]) -> Result<(), Error> {
    let mut loan = stream.alloc(bytes.len()).await?;
    loan.write(bytes);
    stream.send(loan).await
}

/// Answers a half, and does what it is told.
async fn serve(mut stream: Stream) -> Result<(), io::Error> {
    let Some(order) = stream.recv().await? else { return Ok(()) };
    let order = order.into_bytes();
    send(&mut stream, b"half").await?;
    let failure = || Err(io::Error::other("as told"));
    match &order[..] {
        b"succeed" => Ok(()),
        b"fail" => failure(),
        b"fail late" => {
            glommio::timer::sleep(Duration::from_millis(5)).await;
            failure()
        }
        b"fail in halves" => {
            let (reader, writer) = stream.split();
            drop(writer);
            drop(reader);
            failure()
        }
        b"fail with a half elsewhere" => {
            let (mut reader, _writer) = stream.split();
            glommio::spawn_local(async move {
                let _ = reader.recv().await;
            })
            .detach();
            failure()
        }
        b"panic" => panic!("as told"),
        b"close and fail" => {
            stream.close().await?;
            failure()
        }
        b"drop and fail later" => {
            drop(stream);
            glommio::timer::sleep(Duration::from_millis(5)).await;
            failure()
        }
        b"hang" => std::future::pending().await,
        other => panic!("{other:?}"),
    }
}

/// What a client reads behind the half that it gets.
async fn end_of(session: &Session, order: &str) -> Result<bool, Error> {
    let mut stream = session.open_stream()?;
    send(&mut stream, order.as_bytes()).await?;
    let half = stream.recv().await?.expect("half an answer");
    assert_eq!(half.into_bytes(), "half", "{order}");
    let end = stream.recv().await.map(|end| end.is_none());
    if matches!(end, Err(Error::StreamReset)) {
        let error = stream.write_all(b"x").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
    end
}

const RESETS: [&str; 5] =
    ["fail", "fail late", "fail in halves", "fail with a half elsewhere", "panic"];
const CLOSES: [&str; 3] = ["succeed", "close and fail", "drop and fail later"];

#[test]
fn a_peer_sees_that_a_handler_failed_in_every_version() {
    let path = SocketPath::new();
    let server = server(&path).serve_streams(serve).unwrap();
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let prefix = format!("/dev/shm/shmipc-handlers-{}", std::process::id());
        let files = small().memory(MemoryKind::File).path_prefix(prefix);
        for (name, config) in [
            ("2", files.clone().protocol(ProtocolVersion::V2)),
            ("3, files", files),
            ("3", small()),
            ("4", small().protocol(ProtocolVersion::V4)),
            ("4, eventfd", small().protocol(ProtocolVersion::V4).wakeup(Wakeup::EventFd)),
        ] {
            let session = Connector::new(config.build().unwrap()).connect(&at).await.unwrap();
            for order in RESETS {
                let end = end_of(&session, order).await;
                assert!(matches!(end, Err(Error::StreamReset)), "{name}: {order}: {end:?}");
            }
            for order in CLOSES {
                let end = end_of(&session, order).await;
                assert!(matches!(end, Ok(true)), "{name}: {order}: {end:?}");
            }
            assert!(session.end_reason().is_none(), "{name}");
        }
    });
    server.stop(LIMIT).unwrap();
}

#[test]
fn what_fails_is_counted_at_once_and_logged_with_all_that_names_it() {
    watch_the_log();
    let path = SocketPath::new();
    let server = server(&path).serve_streams(serve).unwrap();
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let session = Connector::new(small().build().unwrap()).connect(&at).await.unwrap();
        for _ in 0..20 {
            end_of(&session, "fail").await.unwrap_err();
        }
        end_of(&session, "succeed").await.unwrap();
        end_of(&session, "panic").await.unwrap_err();
        let stats = server.stats()[0];
        assert_eq!((stats.failed, stats.failed_streams), (20, 20));
        drop(session);
        assert!(within(LIMIT, || server.stats()[0].open == 0).await);
        assert_eq!(server.stats()[0].panicked_streams, 1);
        server.stop(LIMIT).unwrap();
    });
    let lines = logged("a handler failed");
    let ours: Vec<_> = lines.iter().filter(|line| line.contains("error=as told")).collect();
    // Others of these tests run on cores of their own.
    let (uid, pid) = (nix::unistd::geteuid(), std::process::id());
    assert!(!ours.is_empty());
    for line in ours {
        for part in ["shard=0", "session=", &format!("uid={uid}"), &format!("pid={pid}"), "stream="]
        {
            assert!(line.contains(part), "{part:?} is not in {line}");
        }
    }
}

#[test]
fn a_session_without_a_server_counts_its_own() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let listener = Listener::bind(path.as_str(), small().build().unwrap()).unwrap();
        let connector = Connector::new(small().build().unwrap());
        let client = connector.connect(path.as_str()).await.unwrap();
        let session = listener.accept().await.unwrap();
        let counted = session.clone();
        let serving = glommio::spawn_local(async move { session.serve_streams(serve).await });
        end_of(&client, "fail").await.unwrap_err();
        assert_eq!(counted.stats().failed_streams, 1);
        // Whoever drops the future drops handlers that have not ended.
        let mut stream = client.open_stream().unwrap();
        send(&mut stream, b"hang").await.unwrap();
        drop(stream.recv().await.unwrap());
        serving.cancel().await;
        let end = stream.recv().await;
        assert!(matches!(end, Err(Error::StreamReset)), "{end:?}");
        assert!(counted.end_reason().is_none());
    });
}

/// Never a clean end of what has no end.
fn is_failure(end: &Result<bool, Error>) -> bool {
    matches!(end, Err(Error::StreamReset | Error::PeerClosed))
}

#[test]
fn a_handler_of_a_session_that_fails_ends_its_streams_as_failures() {
    let path = SocketPath::new();
    let server = server(&path);
    let server = server
        .start(|_| async {
            Ok::<_, Error>(|session: Session| async move {
                while let Ok(stream) = session.accept().await {
                    serve(stream).await?;
                }
                Ok::<_, io::Error>(())
            })
        })
        .unwrap();
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        for order in ["fail", "fail late", "fail in halves", "panic"] {
            let connector = Connector::new(small().build().unwrap());
            let session = connector.connect(&at).await.unwrap();
            let end = end_of(&session, "succeed").await;
            assert!(matches!(end, Ok(true)), "{end:?}");
            let end = end_of(&session, order).await;
            assert!(is_failure(&end), "{order}: {end:?}");
        }
        assert!(within(LIMIT, || server.stats()[0].open == 0).await);
        let stats = server.stats()[0];
        assert_eq!((stats.failed, stats.failed_streams, stats.panicked), (3, 0, 1));
        server.stop(LIMIT).unwrap();
    });
}

#[test]
fn handlers_that_a_stop_cuts_short_do_not_look_done() {
    for by_stream in [true, false] {
        let path = SocketPath::new();
        let server = if by_stream {
            server(&path).serve_streams(serve).unwrap()
        } else {
            let handler = |session: Session| async move {
                while let Ok(stream) = session.accept().await {
                    serve(stream).await?;
                }
                Ok::<_, io::Error>(())
            };
            server(&path).start(move |_| async move { Ok::<_, Error>(handler) }).unwrap()
        };
        let at = path.as_str().to_owned();
        let stopper = server.stopper();
        run(LIMIT, move || async move {
            let connector = Connector::new(small().build().unwrap());
            let session = connector.connect(&at).await.unwrap();
            let mut stream = session.open_stream().unwrap();
            send(&mut stream, b"hang").await.unwrap();
            drop(stream.recv().await.unwrap());
            stopper.stop(Duration::from_millis(100));
            let end = stream.recv().await.map(|end| end.is_none());
            assert!(is_failure(&end), "{by_stream}: {end:?}");
        });
        server.join().unwrap();
    }
}
