// SPDX-License-Identifier: MIT OR Apache-2.0
//! Servers of several cores: who gets which session, what one core's trouble does to the others,
//! and how they stop.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::Poll;
use std::time::{Duration, Instant};

use shmipc_glommio::{
    Balance, Config, Connector, Cores, Error, Server, ServerBuilder, Session, Shard, Stream,
};

use support::executor::{SocketPath, run, within};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
}

const LIMIT: Duration = Duration::from_secs(60);
/// More than any session here takes to come to rest, and less than a test may take.
const PATIENCE: Duration = Duration::from_secs(20);

fn small() -> Config {
    Config::builder().container().build().unwrap()
}

fn server(path: &SocketPath, shards: usize) -> ServerBuilder {
    Server::builder(path.as_str()).cores(Cores::Unpinned(shards)).config(small())
}

fn door(path: &SocketPath, index: usize) -> PathBuf {
    PathBuf::from(format!("{}.{index}", path.as_str()))
}

/// What a client may ask the shards of [`start`].
const WHO: &[u8] = b"who";
const SLEEP: &[u8] = b"sleep a second";
const FAIL: &[u8] = b"fail";
const PANIC: &[u8] = b"panic";
const PANIC_ELSEWHERE: &[u8] = b"panic elsewhere";

/// A server that answers [`WHO`] with the shard's number, everything else with itself, and does
/// what it is told.
fn start(builder: ServerBuilder) -> Server {
    builder
        .start(|shard: Shard| async move {
            Ok::<_, Error>(move |session: Session| {
                let shard = shard.clone();
                async move {
                    while let Ok(stream) = session.accept().await {
                        answer(stream, &shard).await?;
                    }
                    Ok::<_, io::Error>(())
                }
            })
        })
        .unwrap()
}

/// The doors of shards that have begun to sleep.
static ASLEEP: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

async fn until_asleep(door: &Path) {
    let is_asleep = || ASLEEP.lock().unwrap().iter().any(|asleep| asleep == door);
    assert!(within(LIMIT, is_asleep).await);
}

async fn answer(mut stream: Stream, shard: &Shard) -> io::Result<()> {
    while let Some(request) = stream.recv().await? {
        let request = request.into_bytes();
        match &request[..] {
            WHO => send(&mut stream, &[shard.index() as u8]).await?,
            SLEEP => {
                ASLEEP.lock().unwrap().push(shard.path().to_owned());
                std::thread::sleep(Duration::from_secs(1));
                send(&mut stream, SLEEP).await?;
            }
            FAIL => return Err(io::Error::other("as told")),
            PANIC => panic!("as told"),
            PANIC_ELSEWHERE => {
                // glommio runs a new task at once, up to where it waits: inside of this one.
                let panicking = async {
                    futures_lite::future::yield_now().await;
                    panic!("elsewhere, as told")
                };
                glommio::spawn_local(panicking).detach();
            }
            other => send(&mut stream, other).await?,
        }
    }
    Ok(())
}

async fn send(stream: &mut Stream, bytes: &[u8]) -> Result<(), Error> {
    let mut loan = stream.alloc(bytes.len()).await?;
    loan.write(bytes);
    stream.send(loan).await
}

async fn ask(stream: &mut Stream, request: &[u8]) -> Result<Vec<u8>, Error> {
    send(stream, request).await?;
    let answer = stream.recv().await?.ok_or(Error::PeerClosed)?;
    Ok(answer.into_bytes().to_vec())
}

async fn who(session: &Session) -> usize {
    usize::from(ask(&mut session.open_stream().unwrap(), WHO).await.unwrap()[0])
}

fn connector() -> Connector {
    Connector::new(small())
}

#[test]
fn a_client_gets_the_core_that_it_asks_for_or_one_in_turn() {
    let path = SocketPath::new();
    let server = start(server(&path, 3));
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        for shard in [2, 0, 1, 1] {
            assert_eq!(who(&connector().connect_shard(&at, shard).await.unwrap()).await, shard);
        }
        let mut dealt = Vec::new();
        for _ in 0..6 {
            dealt.push(who(&connector().connect(&at).await.unwrap()).await);
        }
        assert_eq!(dealt[..3], dealt[3..], "in turn");
        dealt[..3].sort_unstable();
        assert_eq!(dealt[..3], [0, 1, 2]);
        let beyond = connector().connect_shard(&at, 3).await.unwrap_err();
        assert_eq!(beyond.kind(), io::ErrorKind::NotFound);
    });
    let counted = server.stats();
    assert_eq!(counted.iter().map(|shard| shard.accepted).collect::<Vec<_>>(), [3, 4, 3]);
    assert!(counted.iter().all(|shard| shard.dealt == 2 && shard.refused == 0));
    server.stop(PATIENCE).unwrap();
    assert!(!Path::new(path.as_str()).exists() && (0..3).all(|index| !door(&path, index).exists()));
}

#[test]
fn the_core_with_the_fewest_sessions_is_next() {
    let path = SocketPath::new();
    let server = start(server(&path, 2).deal(Balance::FewestSessions));
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let mut sessions = Vec::new();
        for _ in 0..3 {
            sessions.push(connector().connect_shard(&at, 0).await.unwrap());
            // Until it is served it does not count.
            assert_eq!(who(sessions.last().unwrap()).await, 0);
        }
        for _ in 0..3 {
            sessions.push(connector().connect(&at).await.unwrap());
            assert_eq!(who(sessions.last().unwrap()).await, 1);
        }
    });
    server.stop(PATIENCE).unwrap();
}

#[test]
fn a_core_that_is_stopped_for_a_second_holds_up_nobody_else_and_loses_nothing() {
    let path = SocketPath::new();
    // Room for one connection only on its way to each core.
    let server = start(server(&path, 2).handoff_capacity(1));
    let (at, asleep) = (path.as_str().to_owned(), door(&path, 0));
    run(LIMIT, move || async move {
        let slow = connector().connect_shard(&at, 0).await.unwrap();
        let other = connector().connect_shard(&at, 1).await.unwrap();
        let mut sleeping = slow.open_stream().unwrap();
        send(&mut sleeping, SLEEP).await.unwrap();
        // What it took in before would sleep with it.
        until_asleep(&asleep).await;
        let has_slept = Rc::new(Cell::new(false));
        let slept = Rc::clone(&has_slept);
        let waking = glommio::spawn_local(async move {
            let answer = sleeping.recv().await.unwrap().unwrap();
            slept.set(true);
            answer.into_bytes()
        });
        let mut stream = other.open_stream().unwrap();
        let (mut meanwhile, mut sessions, mut while_asleep) = (0, Vec::new(), 0);
        while !has_slept.get() {
            ask(&mut stream, b"something").await.unwrap();
            meanwhile += 1;
            if sessions.len() < 8 {
                let session = connector().connect(&at).await.unwrap();
                assert!(who(&session).await == 1 || has_slept.get(), "nobody else is awake");
                while_asleep += usize::from(!has_slept.get());
                sessions.push(session);
            }
        }
        // How many, is for the benches. That there are any shows that the other was not stopped.
        assert!(meanwhile > 20, "{meanwhile} answers of the other core");
        assert!(while_asleep > 1, "{while_asleep} sessions of the shared door");
        assert_eq!(waking.await, SLEEP);
        assert_eq!(who(&slow).await, 0, "the session is as it was");
        for session in &sessions {
            who(session).await;
        }
    });
    let counted = server.stats();
    assert_eq!(counted.iter().map(|shard| shard.refused).sum::<u64>(), 0);
    server.stop(PATIENCE).unwrap();
}

#[test]
fn more_connections_than_there_is_room_for_wait_and_none_is_lost() {
    const CLIENTS: usize = 40;
    let path = SocketPath::new();
    let config = Config::builder().container().max_handshakes(1).build().unwrap();
    let server = start(server(&path, 2).handoff_capacity(1).config(config));
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        // Both cores sleep while all of these come.
        let mut sleeping = Vec::new();
        for shard in 0..2 {
            let session = connector().connect_shard(&at, shard).await.unwrap();
            send(&mut session.open_stream().unwrap(), SLEEP).await.unwrap();
            sleeping.push(session);
        }
        let config = Config::builder().container().handshake_timeout(LIMIT).build().unwrap();
        let connecting: Vec<_> = (0..CLIENTS)
            .map(|_| {
                let (connector, at) = (Connector::new(config.clone()), at.clone());
                glommio::spawn_local(async move { connector.connect(&at).await })
            })
            .collect();
        for session in connecting {
            who(&session.await.unwrap()).await;
        }
    });
    assert_eq!(server.stats().iter().map(|shard| shard.dealt).sum::<u64>(), CLIENTS as u64);
    server.stop(PATIENCE).unwrap();
}

#[test]
fn what_a_handler_does_wrong_ends_its_own_session_only() {
    let path = SocketPath::new();
    let server = start(server(&path, 1));
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let honest = connector().connect(&at).await.unwrap();
        let mut stream = honest.open_stream().unwrap();
        for mischief in [FAIL, PANIC, FAIL] {
            let session = connector().connect(&at).await.unwrap();
            ask(&mut session.open_stream().unwrap(), mischief).await.unwrap_err();
            assert!(matches!(session.closed().await, Error::PeerClosed));
            assert_eq!(ask(&mut stream, b"still there?").await.unwrap(), b"still there?");
        }
    });
    let shard = server.stats()[0];
    assert_eq!((shard.failed, shard.panicked, shard.accepted), (2, 1, 4));
    server.stop(PATIENCE).unwrap();
}

#[test]
fn a_panic_that_is_nobodys_stops_the_server_and_is_named() {
    let path = SocketPath::new();
    let server = start(server(&path, 2).shutdown_grace(PATIENCE));
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let session = connector().connect_shard(&at, 1).await.unwrap();
        let mut stream = session.open_stream().unwrap();
        send(&mut stream, PANIC_ELSEWHERE).await.unwrap();
        session.closed().await;
    });
    let error = server.join().unwrap_err();
    assert!(matches!(error, Error::Shard { index: 1, .. }), "{error}");
    assert!(error.to_string().contains("elsewhere, as told"), "{error}");
    assert!(!Path::new(path.as_str()).exists() && !door(&path, 0).exists());
}

#[test]
fn stopping_answers_what_was_asked() {
    const STREAMS: usize = 16;
    let path = SocketPath::new();
    let server = start(server(&path, 2));
    let stopper = server.stopper();
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let session = Rc::new(connector().connect_shard(&at, 0).await.unwrap());
        let idle = connector().connect_shard(&at, 1).await.unwrap();
        who(&idle).await;
        // The handler serves one stream after the other; so these wait for the first to end.
        let mut streams = Vec::new();
        for _ in 0..STREAMS {
            let mut stream = session.open_stream().unwrap();
            for _ in 0..8 {
                send(&mut stream, b"a question").await.unwrap();
            }
            stream.finish().await.unwrap();
            streams.push(stream);
        }
        stopper.stop(PATIENCE);
        for mut stream in streams {
            let mut answers = 0;
            while let Some(answer) = stream.recv().await.unwrap() {
                assert_eq!(answer.into_bytes(), "a question");
                answers += 1;
            }
            assert_eq!(answers, 8);
        }
        for session in [&*session, &idle] {
            assert!(matches!(session.closed().await, Error::PeerClosed));
        }
        connector().connect(&at).await.unwrap_err();
        connector().connect_shard(&at, 0).await.unwrap_err();
    });
    server.join().unwrap();
}

#[test]
fn a_handler_that_does_not_end_is_dropped_at_the_deadline() {
    struct Flag(Arc<AtomicBool>);
    impl Drop for Flag {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let path = SocketPath::new();
    let dropped = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&dropped);
    let server = server(&path, 1)
        .start(move |_| {
            let flag = Arc::clone(&flag);
            async move {
                Ok::<_, Error>(move |_: Session| {
                    let flag = Flag(Arc::clone(&flag));
                    async move {
                        let _flag = flag;
                        std::future::pending::<Result<(), Error>>().await
                    }
                })
            }
        })
        .unwrap();
    let at = path.as_str().to_owned();
    let (tell, stop) = mpsc::channel();
    let client = std::thread::spawn(move || {
        run(LIMIT, move || async move {
            let session = connector().connect(&at).await.unwrap();
            // Never answered, so this session does not come to rest.
            let mut stream = session.open_stream().unwrap();
            send(&mut stream, b"hello?").await.unwrap();
            tell.send(()).unwrap();
            assert!(matches!(session.closed().await, Error::PeerClosed));
        });
    });
    stop.recv().unwrap();
    assert!(!dropped.load(Ordering::SeqCst));
    // The second is the earlier.
    server.stopper().stop(LIMIT * 10);
    server.stop(Duration::from_millis(50)).unwrap();
    assert!(dropped.load(Ordering::SeqCst));
    client.join().unwrap();
}

#[test]
fn dropping_the_handle_stops_the_server() {
    let path = SocketPath::new();
    let server = start(server(&path, 2));
    assert!(door(&path, 1).exists());
    drop(server);
    assert!(!door(&path, 1).exists() && !Path::new(path.as_str()).exists());
}

#[test]
fn a_factory_that_fails_leaves_nothing_running() {
    let path = SocketPath::new();
    let made = Arc::new(AtomicUsize::new(0));
    let making = Arc::clone(&made);
    let error = server(&path, 3)
        .start(move |shard: Shard| {
            let making = Arc::clone(&making);
            async move {
                making.fetch_add(1, Ordering::SeqCst);
                if shard.index() == 1 {
                    return Err(io::Error::new(io::ErrorKind::NotFound, "no such table"));
                }
                Ok(|_: Session| async { Ok::<_, Error>(()) })
            }
        })
        .unwrap_err();
    assert!(matches!(error, Error::Shard { index: 1, .. }), "{error}");
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    assert!(error.to_string().contains("no such table"));
    assert!((0..3).all(|index| !door(&path, index).exists()));
    assert!((1..=3).contains(&made.load(Ordering::SeqCst)));

    let error =
        Server::builder(path.as_str()).cores(Cores::Count(1 << 20)).serve_streams(|_| async {});
    assert_eq!(error.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    let error = server(&path, 1).handoff_capacity(0).serve_streams(|_| async {}).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn files_of_a_dead_server_are_replaced_and_those_of_a_live_one_respected() {
    let path = SocketPath::new();
    // A server with five shards that was killed.
    for name in [PathBuf::from(path.as_str())].into_iter().chain((0..5).map(|at| door(&path, at))) {
        drop(UnixListener::bind(name).unwrap());
    }
    let config = Config::builder().container().socket_mode(0o620).build().unwrap();
    let first = start(server(&path, 2).config(config));
    assert!(door(&path, 0).exists() && door(&path, 1).exists());
    assert!((2..5).all(|index| !door(&path, index).exists()), "nobody listens there any more");
    for name in [PathBuf::from(path.as_str()), door(&path, 0), door(&path, 1)] {
        let mode = std::fs::metadata(name).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o620);
    }
    let error = server(&path, 2).serve_streams(|_| async {}).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    assert!(error.to_string().contains("live server"), "{error}");
    // Trying did no harm.
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        who(&connector().connect(&at).await.unwrap()).await;
        who(&connector().connect_shard(&at, 1).await.unwrap()).await;
    });
    first.stop(PATIENCE).unwrap();
}

#[test]
fn sessions_of_the_shared_door_are_woken_by_their_own_core_only() {
    let path = SocketPath::new();
    let server = start(server(&path, 2));
    let stats = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&stats);
    // Asleep between requests, each side has to be woken each time.
    let config = Config::builder().container().spin(shmipc_glommio::Spin::Never).build().unwrap();
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        for _ in 0..4 {
            let session = Connector::new(config.clone()).connect(&at).await.unwrap();
            let mut stream = session.open_stream().unwrap();
            for _ in 0..300 {
                ask(&mut stream, b"something").await.unwrap();
            }
            told.lock().unwrap().push(session.stats());
        }
    });
    let stats = stats.lock().unwrap();
    assert_eq!(stats.len(), 4);
    let woken = stats.iter().map(|session| session.sync_events_received).sum::<u64>();
    assert!(woken > 100, "{woken} wake-ups by the peer");
    assert!(stats.iter().all(|session| session.cross_core_wakes == 0));
    // What a session counted is in its shard's figures when it has ended.
    let start = Instant::now();
    while server.stats().iter().any(|shard| shard.open > 0) && start.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(2));
    }
    let shards = server.stats();
    server.stop(PATIENCE).unwrap();
    assert!(shards.iter().all(|shard| shard.dealt == 2 && shard.cross_core_wakes == 0));
}

#[test]
fn a_handler_that_waits_for_another_thread_is_found_out() {
    const TIMES: u64 = 5;
    let path = SocketPath::new();
    let server = server(&path, 1)
        .start(|_| async {
            Ok::<_, Error>(|session: Session| async move {
                let mut stream = session.accept().await?;
                for _ in 0..TIMES {
                    stream.recv().await?;
                    let mut is_helped = false;
                    poll_fn(|context| {
                        if std::mem::replace(&mut is_helped, true) {
                            return Poll::Ready(());
                        }
                        let waker = context.waker().clone();
                        std::thread::spawn(move || waker.wake());
                        Poll::Pending
                    })
                    .await;
                    send(&mut stream, b"done").await?;
                }
                Ok::<_, Error>(())
            })
        })
        .unwrap();
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let session = connector().connect(&at).await.unwrap();
        let mut stream = session.open_stream().unwrap();
        for _ in 0..TIMES {
            assert_eq!(ask(&mut stream, b"wait").await.unwrap(), b"done");
        }
    });
    let start = Instant::now();
    while server.stats()[0].open > 0 && start.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(2));
    }
    let shard = server.stats()[0];
    assert_eq!(shard.cross_core_wakes, TIMES, "{shard:?}");
    server.stop(PATIENCE).unwrap();
}

#[test]
fn a_peer_that_says_nothing_is_refused_on_its_shard() {
    let path = SocketPath::new();
    let config = Config::builder().handshake_timeout(Duration::from_millis(20)).build().unwrap();
    let refused = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&refused);
    let server =
        start(server(&path, 2).config(config).on_rejected(move |shard, error| {
            told.lock().unwrap().push((shard, error.to_string()))
        }));
    let _silent = UnixStream::connect(door(&path, 1)).unwrap();
    let start = Instant::now();
    while server.stats()[1].refused == 0 && start.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(2));
    }
    server.stop(PATIENCE).unwrap();
    let refused = refused.lock().unwrap();
    assert!(matches!(&refused[..], [(1, error)] if error.contains("handshake")), "{refused:?}");
}
