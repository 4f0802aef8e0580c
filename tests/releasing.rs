// SPDX-License-Identifier: MIT OR Apache-2.0
//! A server, or a client, that ends in a process that lives on leaves nothing there: no descriptor,
//! no mapping, no thread, and no peer that waits for it. glommio 0.9 never drops tasks that wait
//! when their executor ends, nor what they own.

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use futures_lite::future::{pending, zip};
use glommio::{LocalExecutorBuilder, Placement};
use shmipc_glommio::{Config, Connector, Cores, Error, Listener, Server, Session, Shard};

use support::executor::SocketPath;

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
}

/// What this process has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Has {
    descriptors: usize,
    /// Of shared memory.
    mappings: usize,
    threads: usize,
}

impl Has {
    fn now() -> Self {
        let count = |directory| fs::read_dir(directory).unwrap().count();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        Self {
            descriptors: count("/proc/self/fd"),
            mappings: maps.lines().filter(|line| line.contains("shmipc")).count(),
            threads: count("/proc/self/task"),
        }
    }

    /// Waits until it is no more than this, since threads take a moment to go.
    fn settles_at(self) -> Result<(), Self> {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let now = Self::now();
            let is_back = now.descriptors <= self.descriptors
                && now.mappings <= self.mappings
                && now.threads <= self.threads;
            if is_back {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(now);
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// What is counted is the whole process, so one test runs at a time.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What glommio itself leaves of an executor that does nothing but end.
fn left_by_an_executor() -> usize {
    const EXECUTORS: usize = 10;
    let run = || {
        thread::spawn(|| {
            LocalExecutorBuilder::new(Placement::Unbound).make().unwrap().run(async {
                glommio::timer::sleep(Duration::from_millis(1)).await;
            });
        })
        .join()
        .unwrap();
    };
    run();
    let before = Has::now();
    (0..EXECUTORS).for_each(|_| run());
    (Has::now().descriptors - before.descriptors).div_ceil(EXECUTORS)
}

/// Runs `round` again and again, with so many executors each time, and looks whether this process
/// has more than after the third.
fn nothing_stays(rounds: usize, executors: usize, mut round: impl FnMut()) {
    let _alone = alone();
    let left = left_by_an_executor();
    (0..3).for_each(|_| round());
    thread::sleep(Duration::from_millis(100));
    let before = Has::now();
    (0..rounds).for_each(|_| round());
    let descriptors = before.descriptors + left * executors * rounds;
    if let Err(now) = (Has { descriptors, ..before }).settles_at() {
        for entry in fs::read_dir("/proc/self/fd").unwrap().flatten() {
            println!("{:?}", fs::read_link(entry.path()));
        }
        panic!("after {rounds} rounds {now:?}, before {before:?}; glommio leaves {left}");
    }
}

fn small() -> Config {
    Config::builder().buffer_size(1 << 20).queue_capacity(64).build().unwrap()
}

/// A client on a thread of its own with sessions that are open until `meanwhile` is over.
fn with_sessions(path: &str, meanwhile: impl FnOnce()) {
    let at = path.to_owned();
    let (connected, are_connected) = std::sync::mpsc::channel();
    let (end, must_end) = std::sync::mpsc::channel::<()>();
    let client = thread::spawn(move || {
        let builder = LocalExecutorBuilder::new(Placement::Unbound);
        builder.make().unwrap().run(async move {
            let connector = Connector::new(small());
            let mut sessions = Vec::new();
            for shard in [0, 1, 0, 1] {
                let session = connector.connect_shard(&at, shard).await.unwrap();
                let mut stream = session.open_stream().unwrap();
                stream.announce().await.unwrap();
                sessions.push((session, stream));
            }
            connected.send(()).unwrap();
            while must_end.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                glommio::timer::sleep(Duration::from_millis(2)).await;
            }
            drop(sessions);
            shmipc_glommio::shutdown_executor().await;
        });
    });
    are_connected.recv().unwrap();
    meanwhile();
    drop(end);
    client.join().unwrap();
}

#[test]
fn a_server_with_open_sessions_leaves_nothing() {
    nothing_stays(50, 3, || {
        let path = SocketPath::new();
        let server = Server::builder(path.as_str()).cores(Cores::Unpinned(2)).config(small());
        let server = server.serve_streams(|mut stream| async move {
            while let Some(message) = stream.recv().await? {
                stream.forward(message).await?;
            }
            Ok::<_, Error>(())
        });
        let server = server.unwrap();
        with_sessions(path.as_str(), || server.stop(Duration::from_millis(20)).unwrap());
    });
}

/// Handlers that never end, and tasks of theirs that own a session and wait for what comes of it.
#[test]
fn a_server_whose_tasks_never_end_leaves_nothing() {
    nothing_stays(10, 3, || {
        let path = SocketPath::new();
        let server = Server::builder(path.as_str()).cores(Cores::Unpinned(2)).config(small());
        let server = server.start(|_: Shard| async {
            Ok::<_, Error>(|session: Session| async move {
                let own = session.clone();
                glommio::spawn_local(async move {
                    let mut stream = own.accept().await.unwrap();
                    while stream.recv().await.is_ok_and(|message| message.is_some()) {}
                    drop((own.closed().await, stream));
                })
                .detach();
                pending::<()>().await;
                drop(session);
                Ok::<_, Error>(())
            })
        });
        let server = server.unwrap();
        with_sessions(path.as_str(), || server.stop(Duration::from_millis(20)).unwrap());
    });
}

/// A client that ends with a session and a listener that a task waits for. Its peer is told.
#[test]
fn a_client_that_is_shut_down_leaves_nothing() {
    nothing_stays(10, 2, || client_ends(async || shmipc_glommio::shutdown_executor().await));
}

/// Its descriptors stay, but nobody waits for it.
#[test]
fn a_client_that_just_ends_tells_its_peer() {
    let _alone = alone();
    client_ends(async || {});
}

#[test]
fn a_client_that_is_ended_by_a_panic_tells_its_peer() {
    let _alone = alone();
    client_ends(async || panic!("a task of the program, which nothing contains"));
}

fn client_ends(end: impl AsyncFn() + Send + 'static) {
    let path = SocketPath::new();
    let at = path.as_str().to_owned();
    let (listens, is_listening) = std::sync::mpsc::channel();
    let (say, said) = std::sync::mpsc::channel();
    let server = thread::spawn(move || {
        LocalExecutorBuilder::new(Placement::Unbound).make().unwrap().run(async move {
            let listener = Listener::bind(&at, small()).unwrap();
            listens.send(()).unwrap();
            let session = listener.accept().await.unwrap();
            say.send(session.closed().await).unwrap();
            drop((session, listener));
            shmipc_glommio::shutdown_executor().await;
        });
    });
    is_listening.recv().unwrap();
    let at = path.as_str().to_owned();
    let client = thread::spawn(move || {
        LocalExecutorBuilder::new(Placement::Unbound).make().unwrap().run(async move {
            let session = Connector::new(small()).connect(&at).await.unwrap();
            let mut stream = session.open_stream().unwrap();
            stream.announce().await.unwrap();
            let other = Listener::bind(format!("{at}.other"), small()).unwrap();
            glommio::spawn_local(async move {
                drop(zip(session.closed(), zip(stream.recv(), other.accept())).await);
            })
            .detach();
            end().await;
        });
    });
    drop(client.join());
    assert!(!fs::exists(format!("{}.other", path.as_str())).unwrap(), "its file is gone");
    let reason = said.recv_timeout(Duration::from_secs(20)).expect("the peer is told");
    assert!(matches!(reason, Error::PeerClosed), "{reason}");
    server.join().unwrap();
}
