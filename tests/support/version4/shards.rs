// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which shard of a server a session is with, and what becomes of a client that meets another.

use std::fs;
use std::time::Duration;

use shmipc_glommio::{
    Client, Config, ConfigBuilder, Connector, Cores, Error, HandshakeError, ProtocolVersion,
    Server, Session, Shard, ShardIdentity, Stream,
};

use super::pair::{KINDS, config};
use crate::support::executor::{SocketPath, run};
use crate::{LIMIT, turn};

const SHARDS: usize = 2;

/// Answers everything with the shard's number.
fn start(path: &SocketPath, accepted: ProtocolVersion) -> Server {
    Server::builder(path.as_str())
        .cores(Cores::Unpinned(SHARDS))
        .config(Config::builder().container().max_accepted_protocol(accepted).build().unwrap())
        .start(|shard: Shard| async move {
            Ok::<_, Error>(move |session: Session| {
                let index = shard.index() as u8;
                async move {
                    session.serve_streams(move |stream| answer(stream, index)).await;
                    Ok::<_, Error>(())
                }
            })
        })
        .unwrap()
}

async fn answer(mut stream: Stream, index: u8) -> Result<(), Error> {
    while stream.recv().await?.is_some() {
        send(&mut stream, &[index]).await?;
    }
    Ok(())
}

async fn send(stream: &mut Stream, bytes: &[u8]) -> Result<(), Error> {
    let mut loan = stream.alloc(bytes.len()).await?;
    loan.write(bytes);
    stream.send(loan).await
}

/// Which shard answers on a session.
async fn who(session: &Session) -> u32 {
    let mut stream = session.open_stream().unwrap();
    send(&mut stream, b"who").await.unwrap();
    let answer = stream.recv().await.unwrap().expect("an answer").into_bytes();
    answer[0].into()
}

fn old() -> ConfigBuilder {
    Config::builder().container().protocol(ProtocolVersion::V3)
}

fn identity(index: u32) -> Option<ShardIdentity> {
    Some(ShardIdentity { index, count: SHARDS as u32 })
}

#[test]
fn a_session_of_version_4_knows_its_shard() {
    let _turn = turn();
    let path = SocketPath::new();
    let server = start(&path, ProtocolVersion::V4);
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        for kind in KINDS {
            let connector = Connector::new(config(kind).build().unwrap());
            for index in 0..SHARDS {
                let session = connector.connect_shard(&at, index).await.unwrap();
                assert_eq!(session.shard(), identity(index as u32));
                assert_eq!(who(&session).await, index as u32);
            }
            // Over the door that all share, whoever it is dealt to.
            let mut seen = [0; SHARDS];
            for _ in 0..2 * SHARDS {
                let session = connector.connect(&at).await.unwrap();
                let Some(shard) = session.shard() else { panic!("it does not say who it is") };
                assert_eq!(Some(shard), identity(shard.index));
                assert_eq!(who(&session).await, shard.index);
                seen[shard.index as usize] += 1;
            }
            assert_eq!(seen, [2; SHARDS], "one after the other");
        }
        let connector = Connector::new(old().build().unwrap());
        for index in 0..SHARDS {
            let session = connector.connect_shard(&at, index).await.unwrap();
            assert_eq!((session.shard(), who(&session).await), (None, index as u32));
        }
        let session = connector.connect(&at).await.unwrap();
        assert_eq!(session.shard(), None);
    });
    server.stop(LIMIT).unwrap();
}

#[test]
fn shards_of_a_server_that_takes_no_more_than_version_3_are_reached_all_the_same() {
    let _turn = turn();
    let path = SocketPath::new();
    let server = start(&path, ProtocolVersion::V3);
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let config = config(KINDS[1]).allow_v3_fallback(true).build().unwrap();
        let connector = Connector::new(config.clone());
        let client = Client::builder(&at).config(config).build().unwrap();
        for index in 0..SHARDS {
            let session = connector.connect_shard(&at, index).await.unwrap();
            assert_eq!((session.protocol(), session.shard()), (ProtocolVersion::V3, None));
            assert_eq!(who(&session).await, index as u32);
            let kept = client.session(index).await.unwrap();
            assert_eq!((kept.protocol(), who(&kept).await), (ProtocolVersion::V3, index as u32));
        }
    });
    server.stop(LIMIT).unwrap();
}

/// Doors that have changed places are what a client sees for a moment of a server that came anew
/// with other shards.
#[test]
fn a_client_notices_that_another_shard_answers() {
    let _turn = turn();
    let path = SocketPath::new();
    let server = start(&path, ProtocolVersion::V4);
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let door = |index: usize| format!("{at}.{index}");
        let swap = || {
            let aside = format!("{at}.aside");
            fs::rename(door(0), &aside).unwrap();
            fs::rename(door(1), door(0)).unwrap();
            fs::rename(aside, door(1)).unwrap();
        };
        let connector = Connector::new(config(KINDS[1]).build().unwrap());
        swap();
        for index in 0..SHARDS {
            let error = connector.connect_shard(&at, index).await.unwrap_err();
            let Error::Handshake(error) = error else { panic!("{error}") };
            let (other, count) = (1 - index as u32, SHARDS as u32);
            let due = HandshakeError::OtherShard { index: other, count, expected: index };
            assert_eq!(error, due);
            // Who asks for a path, and not for a shard, gets what is there.
            let session = connector.connect(door(index)).await.unwrap();
            assert_eq!(session.shard(), identity(other));
            // And version 3 cannot tell.
            let old = Connector::new(old().build().unwrap());
            let session = old.connect_shard(&at, index).await.unwrap();
            assert_eq!(who(&session).await, other);
        }
        // A client that keeps sessions goes on trying, and reports what it met meanwhile.
        let client = |patience| {
            let builder = Client::builder(&at).config(config(KINDS[1]).build().unwrap());
            let backoff = (Duration::from_millis(1), Duration::from_millis(5));
            builder.backoff(backoff.0, backoff.1).acquire_timeout(patience).build().unwrap()
        };
        let error = client(Duration::from_millis(500)).session(1).await.unwrap_err();
        let Error::Unavailable { shard: 1, source, .. } = &error else { panic!("{error}") };
        let Error::Handshake(error) = &**source else { panic!("{source}") };
        assert!(matches!(error, HandshakeError::OtherShard { index: 0, .. }), "{error}");
        let patient = client(LIMIT);
        let waiting = async { patient.session(1).await.unwrap() };
        let changing = async {
            glommio::timer::sleep(Duration::from_millis(30)).await;
            swap();
        };
        let (session, ()) = futures_lite::future::zip(waiting, changing).await;
        assert_eq!((session.shard(), who(&session).await), (identity(1), 1));
    });
    server.stop(LIMIT).unwrap();
}
