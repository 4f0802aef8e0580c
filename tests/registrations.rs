// SPDX-License-Identifier: MIT OR Apache-2.0
//! A wait that ends without what it waited for leaves nothing behind: no waker in a list, and so no
//! memory of a task that is no more. Counted in bytes that are allocated.

use std::time::Duration;

use futures_lite::future::{or, poll_once, yield_now, zip};
use shmipc_glommio::{Config, Connector, Cores, Error, Listener, Server, Session};

use support::executor::{SocketPath, run};
use support::live_bytes::{LiveBytes, alone, live_bytes};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
    pub(crate) mod live_bytes;
}

#[global_allocator]
static ALLOCATOR: LiveBytes = LiveBytes;

const SHORT_WAITS: i64 = 20_000;
/// What may stay of so many waits: a thousandth of what a task takes.
const MAY_STAY: i64 = SHORT_WAITS * 2;

/// How many bytes more are allocated after [`SHORT_WAITS`] tasks that each ran `wait` for a moment.
async fn left_by<F: Future<Output = ()> + 'static>(wait: impl Fn() -> F) -> i64 {
    let mut before = 0;
    // The first rounds fill what grows once.
    for round in 0..SHORT_WAITS + 100 {
        if round == 100 {
            before = live_bytes();
        }
        glommio::spawn_local(or(wait(), yield_now())).await;
    }
    yield_now().await;
    live_bytes() - before
}

async fn pair(path: &SocketPath, config: Config) -> [Session; 2] {
    let listener = Listener::bind(path.as_str(), config.clone()).unwrap();
    let connector = Connector::new(config);
    let (client, server) = zip(connector.connect(path.as_str()), listener.accept()).await;
    [client.unwrap(), server.unwrap()]
}

fn small() -> Config {
    Config::builder().buffer_size(1 << 20).queue_capacity(16).build().unwrap()
}

#[test]
fn short_waits_for_a_sessions_end_leave_nothing() {
    let _alone = alone();
    run(Duration::from_secs(120), || async {
        let path = SocketPath::new();
        let [client, server] = pair(&path, small()).await;
        for session in [&client, &server] {
            let left = left_by(|| {
                let session = session.clone();
                async move { drop(session.closed().await) }
            })
            .await;
            assert!(left < MAY_STAY, "{left} bytes of {SHORT_WAITS} waits for the end");
        }
    });
}

#[test]
fn short_waits_for_sessions_and_streams_leave_nothing() {
    let _alone = alone();
    run(Duration::from_secs(120), || async {
        let path = SocketPath::new();
        let [client, server] = pair(&path, small()).await;
        let left = left_by(|| {
            let server = server.clone();
            async move { drop(server.accept().await) }
        })
        .await;
        assert!(left < MAY_STAY, "{left} bytes of {SHORT_WAITS} waits for a stream");
        drop(client);

        let path = SocketPath::new();
        let listener = std::rc::Rc::new(Listener::bind(path.as_str(), small()).unwrap());
        let left = left_by(|| {
            let listener = listener.clone();
            async move { drop(listener.accept().await) }
        })
        .await;
        assert!(left < MAY_STAY, "{left} bytes of {SHORT_WAITS} waits for a session");
    });
}

/// The queue and the pool are full, and the peer takes nothing: it does not run meanwhile.
#[test]
fn short_waits_for_room_and_for_memory_leave_nothing() {
    let _alone = alone();
    run(Duration::from_secs(120), || async {
        let path = SocketPath::new();
        let builder = Config::builder().buffer_size(1 << 20).queue_capacity(16);
        let config = builder.fallback_after(Duration::from_secs(1000)).build().unwrap();
        let listener = Listener::bind(path.as_str(), config.clone()).unwrap();
        let connector = Connector::new(config);
        let (client, server) = zip(connector.connect(path.as_str()), listener.accept()).await;
        let (client, server) = (client.unwrap(), server.unwrap());
        // Takes the slices out of the pool.
        let mut held = Vec::new();
        let mut holder = client.open_stream().unwrap();
        while let Some(loan) = poll_once(holder.alloc(100_000)).await {
            held.push(loan.unwrap());
        }
        while let Some(loan) = poll_once(holder.alloc(1)).await {
            held.push(loan.unwrap());
        }
        let left = left_by(|| {
            let mut stream = client.open_stream().unwrap();
            async move { drop(stream.alloc(100_000).await) }
        })
        .await;
        // The session remembers up to 65 536 numbers of streams that were dropped unused.
        let numbers = 4 << 15;
        let may_stay = MAY_STAY + numbers;
        assert!(left < may_stay, "{left} bytes of {SHORT_WAITS} waits for memory");
        drop((held, server));
    });
}

#[test]
fn short_waits_for_a_server_to_stop_leave_nothing() {
    let _alone = alone();
    let path = SocketPath::new();
    let (say, said) = std::sync::mpsc::channel();
    let server = Server::builder(path.as_str()).cores(Cores::Unpinned(1));
    let server = server.start(move |shard| {
        let say = say.clone();
        async move {
            let left = left_by(|| {
                let shard = shard.clone();
                async move { shard.stopping().await }
            })
            .await;
            say.send(left).unwrap();
            Ok::<_, Error>(|session: Session| async move { Err::<(), _>(session.closed().await) })
        }
    });
    let left = said.recv().unwrap();
    server.unwrap().stop(Duration::from_secs(5)).unwrap();
    assert!(left < MAY_STAY, "{left} bytes of {SHORT_WAITS} waits for the stop");
}

#[test]
fn sessions_that_have_ended_leave_nothing_in_their_shard() {
    const SESSIONS: i64 = 300;
    let _alone = alone();
    let path = SocketPath::new();
    let server = Server::builder(path.as_str()).config(small()).cores(Cores::Unpinned(1));
    let server = server.serve_streams(|_| async {}).unwrap();
    let at = path.as_str().to_owned();
    let ended = || {
        let stats = server.stats()[0];
        stats.accepted - stats.open
    };
    let connect = move |count: i64| {
        let at = at.clone();
        run(Duration::from_secs(120), move || async move {
            let connector = Connector::new(small());
            for _ in 0..count {
                connector.connect(&at).await.unwrap().close().await.unwrap();
            }
        });
    };
    let settle = |count: i64| {
        while ended() < count as u64 {
            std::thread::sleep(Duration::from_millis(1));
        }
        // Its task ends, and what it owned goes.
        std::thread::sleep(Duration::from_millis(300));
        live_bytes()
    };
    // What each of the client's executors leaves is the same, however many sessions it had.
    let mut served = 0;
    let mut left = [100, 100, 100 + SESSIONS].map(|count| {
        connect(count);
        served += count;
        settle(served)
    });
    for round in [2, 1] {
        left[round] -= left[round - 1];
    }
    let left = left[2] - left[1];
    assert!(left < SESSIONS * 100, "{left} bytes of {SESSIONS} sessions");
    server.stop(Duration::from_secs(5)).unwrap();
}
