// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sessions without traffic on a core that is awake for another one.

use std::time::Duration;

use futures_lite::AsyncWriteExt;
use futures_lite::future::zip;
use shmipc_glommio::{
    Config, ConfigBuilder, Connector, Listener, ProtocolVersion, Session, Spin, Stream, Wakeup,
};

use support::executor::{SocketPath, run};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
}

const LIMIT: Duration = Duration::from_secs(60);
/// A pause for which no session of these tests goes on polling.
const PAUSE: Duration = Duration::from_millis(2);
/// How many sessions are looked at beside those that spin.
const MOST: usize = 16;

/// Stops polling a moment after its traffic.
fn brief() -> ConfigBuilder {
    Config::builder()
        .buffer_size(1 << 20)
        .queue_capacity(64)
        .spin(Spin::For(Duration::from_micros(1)))
}

/// Both ends of a session, on this executor.
async fn pair(config: ConfigBuilder) -> [Session; 2] {
    let path = SocketPath::new();
    let config = config.build().unwrap();
    let listener = Listener::bind(path.as_str(), config.clone()).unwrap();
    let connector = Connector::new(config);
    let (client, server) = zip(connector.connect(path.as_str()), listener.accept()).await;
    [client.unwrap(), server.unwrap()]
}

/// A session for which this core never sleeps.
async fn restless() -> [Session; 2] {
    pair(brief().spin(Spin::Forever)).await
}

async fn streams([client, server]: &[Session; 2]) -> [Stream; 2] {
    let mut near = client.open_stream().unwrap();
    near.write_all(b"first").await.unwrap();
    let mut far = server.accept().await.unwrap();
    assert_eq!(far.recv().await.unwrap().unwrap().into_bytes(), b"first"[..]);
    [near, far]
}

async fn exchange([near, far]: &mut [Stream; 2], text: &[u8]) {
    near.write_all(text).await.unwrap();
    let question = far.recv().await.unwrap().unwrap();
    far.forward(question).await.unwrap();
    assert_eq!(near.recv().await.unwrap().unwrap().into_bytes(), *text);
}

async fn until(mut is_so: impl FnMut() -> bool) {
    while !is_so() {
        glommio::timer::sleep(Duration::from_millis(1)).await;
    }
}

fn wake_ups(ends: &[Session; 2]) -> u64 {
    ends.iter().map(|end| end.stats().sync_events_sent).sum()
}

fn sleeps(ends: &[Session; 2]) -> u64 {
    ends.iter().map(|end| end.stats().sleeps).sum()
}

fn each_way() -> [ConfigBuilder; 2] {
    [brief(), brief().protocol(ProtocolVersion::V4).wakeup(Wakeup::EventFd)]
}

#[test]
fn nobody_has_to_wake_a_session_beside_one_that_spins() {
    for config in each_way() {
        run(LIMIT, || async {
            let restless = restless().await;
            let ends = pair(config).await;
            let mut streams = streams(&ends).await;
            for number in 0..50_u32 {
                glommio::timer::sleep(PAUSE).await;
                exchange(&mut streams, &number.to_le_bytes()).await;
            }
            assert_eq!((sleeps(&ends), wake_ups(&ends)), (0, 0));
            // Alone it sleeps, and is woken.
            drop(restless);
            until(|| ends.iter().all(|end| end.stats().sleeps > 0)).await;
            exchange(&mut streams, b"alone").await;
            assert!(wake_ups(&ends) > 0);
        });
    }
}

#[test]
fn too_many_of_them_sleep() {
    run(LIMIT, || async {
        let _restless = restless().await;
        let (mut all, mut speaking) = (Vec::new(), Vec::new());
        for _ in 0..MOST {
            let ends = pair(brief()).await;
            speaking.push(streams(&ends).await);
            all.push(ends);
        }
        let asleep = || all.iter().flatten().filter(|end| end.stats().sleeps > 0).count();
        // Two ends of each session.
        until(|| asleep() >= MOST).await;
        for round in 0..3_u32 {
            for streams in &mut speaking {
                exchange(streams, &round.to_le_bytes()).await;
            }
            glommio::timer::sleep(PAUSE).await;
        }
        let woken: u64 = all.iter().map(wake_ups).sum();
        assert!(woken > 0, "nobody had to be woken");
        // Those that have something to do from time to time have the room.
        for (ends, streams) in all.iter().zip(&mut speaking) {
            exchange(streams, b"first").await;
            glommio::timer::sleep(PAUSE).await;
            let before = (sleeps(ends), wake_ups(ends));
            for _ in 0..5 {
                exchange(streams, b"again").await;
                glommio::timer::sleep(PAUSE).await;
            }
            assert_eq!((sleeps(ends), wake_ups(ends)), before);
        }
    });
}

#[test]
fn one_that_never_polls_sleeps_all_the_same() {
    run(LIMIT, || async {
        let _restless = restless().await;
        let ends = pair(brief().spin(Spin::Never)).await;
        let mut streams = streams(&ends).await;
        for _ in 0..5 {
            let before = sleeps(&ends);
            exchange(&mut streams, b"question").await;
            until(|| sleeps(&ends) > before).await;
        }
        assert!(wake_ups(&ends) > 0);
    });
}

#[test]
fn one_that_has_nothing_to_do_keeps_no_slices_to_itself() {
    run(LIMIT, || async {
        let _restless = restless().await;
        let ends = pair(brief()).await;
        let mut streams = streams(&ends).await;
        let kept = || -> u32 {
            ends.iter().flat_map(|end| end.pool_usage().lists).map(|list| list.magazine).sum()
        };
        exchange(&mut streams, b"question").await;
        assert!(kept() > 0);
        until(|| kept() == 0).await;
        assert_eq!((sleeps(&ends), wake_ups(&ends)), (0, 0));
        exchange(&mut streams, b"once more").await;
    });
}

#[test]
fn one_that_ends_is_dropped() {
    run(LIMIT, || async {
        let _restless = restless().await;
        for _ in 0..2 * MOST {
            let [client, server] = pair(brief()).await;
            glommio::timer::sleep(PAUSE).await;
            drop(client);
            until(|| server.end_reason().is_some()).await;
        }
        // Had they stayed, there would be no room.
        let ends = pair(brief()).await;
        let mut streams = streams(&ends).await;
        for _ in 0..10 {
            glommio::timer::sleep(PAUSE).await;
            exchange(&mut streams, b"question").await;
        }
        assert_eq!((sleeps(&ends), wake_ups(&ends)), (0, 0));
    });
}
