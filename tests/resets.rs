// SPDX-License-Identifier: MIT OR Apache-2.0
//! Streams that end as a failure, and how the peer can tell that from an ordinary end.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_lite::future::{FutureExt, poll_once, zip};
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use shmipc_glommio::{ConfigBuilder, Error, MemoryKind, ProtocolVersion, Session, Stream, Wakeup};

use support::executor::run;
use support::session_pair::{self, open, small};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod session_pair;
}

const LIMIT: Duration = Duration::from_secs(60);

/// Two ends of a session on this executor, both with this configuration.
async fn pair(config: ConfigBuilder) -> (Session, Session) {
    session_pair::pair(config.clone(), config).await
}

/// Reads to the end, which must be a reset. Gives how much came before.
async fn read_to_reset(stream: &mut Stream) -> usize {
    let mut len = 0;
    loop {
        match stream.recv().await {
            Ok(Some(message)) => len += message.len(),
            Ok(None) => panic!("a clean end after {len} bytes"),
            Err(Error::StreamReset) => return len,
            Err(error) => panic!("{error}"),
        }
    }
}

/// The kinds of sessions that say things on different paths.
fn kinds() -> [ConfigBuilder; 4] {
    let version_4 = || small().protocol(ProtocolVersion::V4);
    [
        small(),
        small().protocol(ProtocolVersion::V2).memory(MemoryKind::File),
        version_4().wakeup(Wakeup::EventFd),
        version_4().wakeup(Wakeup::Polling(Duration::from_micros(100))),
    ]
}

#[test]
fn a_reset_is_heard_behind_what_was_sent_by_those_who_read_and_write() {
    run(LIMIT, || async {
        for config in kinds() {
            let (client, server) = pair(config).await;
            for by_client in [true, false] {
                let (near, far) = open(&client, &server).await;
                let (mut resetting, mut other) = if by_client { (near, far) } else { (far, near) };
                resetting.write_all(&[1; 3027]).await.unwrap();
                resetting.reset();
                assert_eq!(read_to_reset(&mut other).await, 3027);
                let error = other.read(&mut [0]).await.unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
                let error = other.write(&[1]).await.unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
                assert!(matches!(other.closed().await, Error::StreamReset));
                assert!(other.is_closed_by_peer());
                // Here it is as after a close.
                assert!(matches!(resetting.recv().await, Err(Error::StreamClosed)));
                assert!(matches!(resetting.closed().await, Error::StreamClosed));
                resetting.reset();
                drop((resetting, other));
            }
            assert_eq!((client.stream_count(), server.stream_count()), (0, 0));
            // The session goes on.
            let (mut near, mut far) = open(&client, &server).await;
            near.finish().await.unwrap();
            assert!(far.recv().await.unwrap().is_none());
        }
    });
}

#[test]
fn a_reset_of_what_goes_over_the_socket_is_no_clean_end() {
    run(LIMIT, || async {
        for config in kinds() {
            let config = config.fallback_after(Duration::ZERO).stream_window(1 << 30);
            let (client, server) = pair(config).await;
            let (mut near, mut far) = open(&client, &server).await;
            // More than the pool has.
            near.write_all(&[1; 3 << 20]).await.unwrap();
            assert!(near.is_on_socket());
            near.reset();
            assert!(read_to_reset(&mut far).await <= 3 << 20);
        }
    });
}

#[test]
fn a_reset_into_a_full_queue_is_no_clean_end() {
    run(LIMIT, || async {
        let (client, server) = pair(small().stream_window(1 << 30)).await;
        let (mut near, mut far) = open(&client, &server).await;
        // Nobody has a turn here: the queue runs full.
        while poll_once(near.write(&[1])).await.is_some() {}
        assert!(client.stats().queue_full > 0);
        near.reset();
        read_to_reset(&mut far).await;
    });
}

#[test]
fn a_reset_behind_the_end_of_one_direction_is_heard() {
    run(LIMIT, || async {
        let (client, server) = pair(small()).await;
        // Who has ended its own direction, and waits for the answer.
        let (mut near, mut far) = open(&client, &server).await;
        near.finish().await.unwrap();
        assert!(far.recv().await.unwrap().is_none());
        far.write_all(&[1; 100]).await.unwrap();
        far.reset();
        assert_eq!(read_to_reset(&mut near).await, 100);
        // Who has read the end, and works on the answer.
        let (mut near, mut far) = open(&client, &server).await;
        near.finish().await.unwrap();
        assert!(far.recv().await.unwrap().is_none());
        assert!(poll_once(far.closed()).await.is_none(), "it still reads");
        let resetting = async {
            glommio::timer::sleep(Duration::from_millis(1)).await;
            near.reset();
        };
        let (error, ()) = zip(far.closed(), resetting).await;
        assert!(matches!(error, Error::StreamReset), "{error}");
    });
}

#[test]
fn who_waits_for_the_peer_to_go_hears_of_every_way_to() {
    run(LIMIT, || async {
        let (client, server) = pair(small()).await;
        let (near, mut far) = open(&client, &server).await;
        let (error, ()) = zip(far.closed(), async { drop(near) }).await;
        assert!(matches!(error, Error::StreamClosedByPeer), "{error}");
        let (near, mut far) = open(&client, &server).await;
        far.finish().await.unwrap();
        let (error, ()) = zip(far.closed(), async { drop(near) }).await;
        assert!(matches!(error, Error::StreamClosedByPeer), "{error}");
        let (near, mut far) = open(&client, &server).await;
        let (error, closed) = zip(far.closed(), client.close()).await;
        closed.unwrap();
        assert!(matches!(error, Error::PeerClosed), "{error}");
        drop(near);
    });
}

#[test]
fn a_stream_that_a_panic_drops_is_reset() {
    run(LIMIT, || async {
        let (client, server) = pair(small()).await;
        let (mut near, mut far) = open(&client, &server).await;
        let answering = async move {
            far.write_all(&[1; 10]).await.unwrap();
            panic!("on purpose: not all of it is there");
        };
        let panicked: Result<(), _> = AssertUnwindSafe(answering).catch_unwind().await;
        assert!(panicked.is_err());
        assert_eq!(read_to_reset(&mut near).await, 10);
        // Halves too, whichever goes last.
        let (mut near, far) = open(&client, &server).await;
        let (reader, writer) = far.split();
        drop(writer);
        let reading = async move {
            let _reader = reader;
            panic!("on purpose");
        };
        let panicked: Result<(), _> = AssertUnwindSafe(reading).catch_unwind().await;
        assert!(panicked.is_err());
        assert!(matches!(near.closed().await, Error::StreamReset));
        // The writer too, though another task has the reader.
        let (mut near, far) = open(&client, &server).await;
        let (mut reader, mut writer) = far.split();
        let answering = async move {
            writer.write_all(&[1; 10]).await.unwrap();
            panic!("on purpose");
        };
        let panicked: Result<(), _> = AssertUnwindSafe(answering).catch_unwind().await;
        assert!(panicked.is_err());
        assert_eq!(read_to_reset(&mut near).await, 10);
        assert!(matches!(reader.recv().await, Err(Error::StreamClosed)));
    });
}

#[test]
fn a_stream_that_nobody_takes_does_not_look_as_if_it_had_been_answered() {
    run(LIMIT, || async {
        for config in kinds() {
            let (client, server) = pair(config.max_streams(2)).await;
            let (near, far) = open(&client, &server).await;
            // The table of the server keeps the stream until its user lets go of it.
            drop(near);
            let _others = open(&client, &server).await;
            let mut refused = client.open_stream().unwrap();
            refused.write_all(b"?").await.unwrap();
            assert_eq!(read_to_reset(&mut refused).await, 0);
            drop(far);
        }
    });
}

#[test]
fn a_client_of_version_2_learns_what_its_server_knows() {
    run(LIMIT, || async {
        for config in kinds() {
            let (client, server) = pair(config).await;
            assert!(server.peer_knows_half_close());
            while !client.peer_knows_half_close() {
                glommio::timer::sleep(Duration::from_millis(1)).await;
            }
            let stream = client.open_stream().unwrap();
            assert!(stream.peer_knows_half_close());
        }
    });
}
