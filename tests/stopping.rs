// SPDX-License-Identifier: MIT OR Apache-2.0
//! How servers stop: what was seen is answered, nothing is cut off in the middle, nobody holds the
//! server up, and what a stream's task does wrong stays with its stream.

use std::cell::Cell;
use std::future::pending;
use std::io::ErrorKind::ConnectionReset;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use futures_lite::future::{or, yield_now};
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use shmipc_glommio::{Config, Connector, Cores, Error, Server, ServerBuilder, Session, Stream};

use support::executor::{SocketPath, run, within};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
}

const LIMIT: Duration = Duration::from_secs(60);
/// More than anything here takes that ends by itself.
const PATIENCE: Duration = Duration::from_secs(40);

fn small() -> Config {
    Config::builder().container().build().unwrap()
}

fn server(path: &SocketPath, shards: usize) -> ServerBuilder {
    Server::builder(path.as_str()).cores(Cores::Unpinned(shards)).config(small())
}

async fn send(stream: &mut Stream, bytes: &[u8]) -> Result<(), Error> {
    let mut loan = stream.alloc(bytes.len()).await?;
    loan.write(bytes);
    stream.send(loan).await
}

async fn recv(stream: &mut Stream) -> Option<Vec<u8>> {
    stream.recv().await.unwrap().map(|message| message.into_bytes().to_vec())
}

/// Runs a client of shard 0, which stops the server when it wants to, and waits for both.
fn with_client<F: Future<Output = ()> + 'static>(
    server: Server,
    client: impl FnOnce(Session, Box<dyn Fn()>) -> F + Send + 'static,
) {
    let (path, stopper) = (server.path().to_owned(), server.stopper());
    run(LIMIT, move || async move {
        let session = Connector::new(small()).connect_shard(&path, 0).await.unwrap();
        client(session, Box::new(move || stopper.stop(PATIENCE))).await;
    });
    let began = Instant::now();
    server.join().unwrap();
    assert!(began.elapsed() < PATIENCE / 2, "it came to its end by itself");
}

/// Longer than a server takes to find that nothing moves.
async fn a_while() {
    glommio::timer::sleep(Duration::from_millis(100)).await;
}

#[test]
fn what_tasks_of_their_own_answer_is_waited_for() {
    let path = SocketPath::new();
    let server = server(&path, 1).serve_streams(|stream| async move {
        let (mut reader, writer) = stream.split();
        let writer = Rc::new(glommio::sync::RwLock::new(writer));
        // Reads ahead; each answer is made elsewhere and takes its time.
        while let Some(request) = reader.recv().await? {
            let writer = Rc::clone(&writer);
            glommio::spawn_local(async move {
                a_while().await;
                let mut writer = writer.write().await.unwrap();
                writer.forward(request).await
            })
            .detach();
        }
        Ok::<_, Error>(())
    });
    with_client(server.unwrap(), |session, stop| async move {
        let mut stream = session.open_stream().unwrap();
        for question in [b"one", b"two"] {
            send(&mut stream, question).await.unwrap();
        }
        // Seen by now.
        glommio::timer::sleep(Duration::from_millis(20)).await;
        stop();
        assert_eq!(recv(&mut stream).await.unwrap(), b"one");
        assert_eq!(recv(&mut stream).await.unwrap(), b"two");
        assert_eq!(recv(&mut stream).await, None);
        assert!(matches!(session.closed().await, Error::PeerClosed));
    });
}

#[test]
fn a_handler_whose_loop_of_streams_ends_leaves_them_to_their_tasks() {
    let path = SocketPath::new();
    let server = server(&path, 1).start(|_| async {
        Ok::<_, Error>(|session: Session| async move {
            while let Ok(mut stream) = session.accept().await {
                glommio::spawn_local(async move {
                    let request = stream.recv().await.unwrap().unwrap();
                    a_while().await;
                    stream.forward(request).await
                })
                .detach();
            }
            Ok::<_, Error>(())
        })
    });
    with_client(server.unwrap(), |session, stop| async move {
        let mut streams = Vec::new();
        for _ in 0..3 {
            let mut stream = session.open_stream().unwrap();
            send(&mut stream, b"question").await.unwrap();
            // Shown to the server, which else happens when this task waits.
            stream.flush().await.unwrap();
            streams.push(stream);
        }
        stop();
        for mut stream in streams {
            assert_eq!(recv(&mut stream).await.unwrap(), b"question");
        }
        assert!(matches!(session.closed().await, Error::PeerClosed));
    });
}

#[test]
fn a_handler_that_has_given_up_to_read_and_works_is_waited_for() {
    let path = SocketPath::new();
    let server = server(&path, 1).serve_streams(|mut stream| async move {
        let request = stream.recv().await.unwrap().unwrap();
        // Anything more, for a batch?
        let more = async { stream.recv().await.unwrap() };
        let no_more = async {
            glommio::timer::sleep(Duration::from_millis(5)).await;
            None
        };
        assert!(or(more, no_more).await.is_none());
        a_while().await;
        stream.forward(request).await.unwrap();
    });
    with_client(server.unwrap(), |session, stop| async move {
        let mut stream = session.open_stream().unwrap();
        send(&mut stream, b"question").await.unwrap();
        glommio::timer::sleep(Duration::from_millis(30)).await;
        stop();
        assert_eq!(recv(&mut stream).await.unwrap(), b"question");
    });
}

/// Sends a request in many parts, with the server told to stop behind the first few, and gives the
/// answer, and the longest pause between two parts.
fn send_in_parts(parts: u8) -> (Option<Vec<u8>>, Duration) {
    let path = SocketPath::new();
    let server = server(&path, 1).serve_streams(move |mut stream| async move {
        let mut request = vec![0; parts.into()];
        stream.read_exact(&mut request).await?;
        stream.write_all(&request).await
    });
    let (tell, told) = mpsc::channel();
    with_client(server.unwrap(), move |session, stop| async move {
        let mut stream = session.open_stream().unwrap();
        let (mut pause, mut last) = (Duration::ZERO, Instant::now());
        for part in 0..parts {
            if stream.write_all(&[part]).await.is_err() {
                break;
            }
            pause = pause.max(last.elapsed());
            last = Instant::now();
            if part == 10 {
                stop();
            }
            glommio::timer::sleep(Duration::from_millis(1)).await;
        }
        let answer = stream.recv().await.ok().flatten();
        let answer = answer.map(|answer| answer.into_bytes().to_vec());
        tell.send((answer, pause.max(last.elapsed()))).unwrap();
    });
    told.recv().unwrap()
}

#[test]
fn a_request_that_is_under_way_comes_to_its_end() {
    const PARTS: u8 = 100;
    // A sender that makes no progress for too long is taken for one that has said all. A machine
    // that is busy can bring that about; then it is tried again.
    for _ in 0..50 {
        let (answer, pause) = send_in_parts(PARTS);
        if answer.is_some_and(|answer| answer.into_iter().eq(0..PARTS)) {
            return;
        }
        assert!(pause > Duration::from_millis(5), "cut off, with pauses of {pause:?} at most");
    }
    panic!("the machine is too busy for this test");
}

#[test]
fn who_asks_without_end_is_not_served_without_end() {
    let path = SocketPath::new();
    let server = server(&path, 1).serve_streams(|mut stream| async move {
        while let Some(request) = stream.recv().await? {
            stream.forward(request).await?;
        }
        Ok::<_, Error>(())
    });
    with_client(server.unwrap(), |session, stop| async move {
        let mut stream = session.open_stream().unwrap();
        for number in 0.. {
            if number == 1000 {
                stop();
            }
            // What is sent behind the end is not answered; everything before it is.
            if send(&mut stream, b"again").await.is_err() || recv(&mut stream).await.is_none() {
                assert!(number >= 1000);
                break;
            }
        }
        // No more streams are taken.
        if let Ok(mut late) = session.open_stream() {
            let sent = send(&mut late, b"too late").await;
            assert!(sent.is_err() || !matches!(late.recv().await, Ok(Some(_))));
        }
    });
}

#[test]
fn what_was_not_read_when_the_stop_came_is_answered() {
    let path = SocketPath::new();
    let server = server(&path, 1).serve_streams(|mut stream| async move {
        while let Some(request) = stream.recv().await? {
            glommio::timer::sleep(Duration::from_millis(2)).await;
            stream.forward(request).await?;
        }
        Ok::<_, Error>(())
    });
    with_client(server.unwrap(), |session, stop| async move {
        let mut stream = session.open_stream().unwrap();
        for number in 0..100u8 {
            send(&mut stream, &[number]).await.unwrap();
        }
        assert_eq!(recv(&mut stream).await.unwrap(), [0]);
        stop();
        for number in 1..100 {
            assert_eq!(recv(&mut stream).await.unwrap(), [number]);
        }
        assert_eq!(recv(&mut stream).await, None);
    });
}

#[test]
fn handlers_that_wait_for_their_sessions_end_do_not_hold_the_server_up() {
    let path = SocketPath::new();
    let server = server(&path, 1).start(|_| async {
        Ok::<_, Error>(|session: Session| async move {
            let accepting = session.clone();
            glommio::spawn_local(async move {
                while let Ok(mut stream) = accepting.accept().await {
                    while let Some(request) = stream.recv().await.unwrap() {
                        stream.forward(request).await.unwrap();
                    }
                }
            })
            .detach();
            assert!(matches!(session.closed().await, Error::SessionClosed));
            Ok::<_, Error>(())
        })
    });
    with_client(server.unwrap(), |session, stop| async move {
        let mut stream = session.open_stream().unwrap();
        send(&mut stream, b"hello").await.unwrap();
        assert_eq!(recv(&mut stream).await.unwrap(), b"hello");
        stop();
        assert!(matches!(session.closed().await, Error::PeerClosed));
    });
}

#[test]
fn a_panic_in_the_task_of_a_stream_resets_that_stream_only() {
    for is_first_poll in [true, false] {
        let path = SocketPath::new();
        let server = server(&path, 2)
            .serve_streams(move |mut stream| async move {
                while let Some(request) = stream.recv().await? {
                    let request = request.into_bytes();
                    if &request[..] == b"panic" {
                        if !is_first_poll {
                            yield_now().await;
                        }
                        panic!("as told");
                    }
                    send(&mut stream, &request).await?;
                }
                Ok::<_, Error>(())
            })
            .unwrap();
        let at = path.as_str().to_owned();
        run(LIMIT, move || async move {
            let connector = Connector::new(small());
            let other_shard = connector.connect_shard(&at, 0).await.unwrap();
            let session = connector.connect_shard(&at, 1).await.unwrap();
            let mut beside = session.open_stream().unwrap();
            send(&mut beside, b"before").await.unwrap();
            assert_eq!(recv(&mut beside).await.unwrap(), b"before");
            let mut stream = session.open_stream().unwrap();
            send(&mut stream, b"panic").await.unwrap();
            // Not a clean end of an answer.
            assert!(matches!(stream.recv().await, Err(Error::StreamReset)));
            send(&mut beside, b"after").await.unwrap();
            assert_eq!(recv(&mut beside).await.unwrap(), b"after");
            assert!(other_shard.end_reason().is_none());
        });
        let start = Instant::now();
        while server.stats()[1].open > 0 && start.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_millis(2));
        }
        let shard = server.stats()[1];
        assert_eq!((shard.panicked_streams, shard.panicked, shard.failed), (1, 0, 0));
        server.stop(PATIENCE).unwrap();
    }
}

#[test]
fn tasks_of_streams_are_dropped_at_the_deadline() {
    struct Counted(Arc<AtomicUsize>);
    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let path = SocketPath::new();
    let dropped = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&dropped);
    let server = server(&path, 1)
        .serve_streams(move |stream| {
            let counted = Counted(Arc::clone(&counter));
            async move {
                let _held = (stream, counted);
                pending::<()>().await;
            }
        })
        .unwrap();
    let at = path.as_str().to_owned();
    let (tell, stop) = mpsc::channel();
    let client = std::thread::spawn(move || {
        run(LIMIT, move || async move {
            let session = Connector::new(small()).connect_shard(&at, 0).await.unwrap();
            for _ in 0..5 {
                let mut stream = session.open_stream().unwrap();
                send(&mut stream, b"never answered").await.unwrap();
                std::mem::forget(stream);
            }
            tell.send(()).unwrap();
            assert!(matches!(session.closed().await, Error::PeerClosed));
        });
    });
    stop.recv().unwrap();
    // What the client has sent is there; that the tasks have begun is seen by their drops.
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(dropped.load(Ordering::SeqCst), 0);
    server.stop(Duration::from_millis(50)).unwrap();
    assert_eq!(dropped.load(Ordering::SeqCst), 5);
    client.join().unwrap();
}

#[test]
fn handshakes_that_are_under_way_are_let_go() {
    let path = SocketPath::new();
    let patient = Config::builder().handshake_timeout(LIMIT * 60).build().unwrap();
    let server = server(&path, 1).config(patient).serve_streams(|_| async {}).unwrap();
    let mut silent: Vec<_> = [path.as_str().to_owned(), format!("{}.0", path.as_str())]
        .iter()
        .map(|door| UnixStream::connect(door).unwrap())
        .collect();
    std::thread::sleep(Duration::from_millis(50));
    server.stop(PATIENCE).unwrap();
    for peer in &mut silent {
        peer.set_read_timeout(Some(LIMIT)).unwrap();
        // One that was still in the backlog is reset.
        let end = peer.read(&mut [0; 8]);
        assert!(matches!(&end, Ok(0)) || end.is_err_and(|e| e.kind() == ConnectionReset));
    }
}

/// Wakes a task from another thread.
struct FromElsewhere(Waker);

impl Wake for FromElsewhere {
    fn wake(self: Arc<Self>) {
        std::thread::spawn(move || self.0.wake_by_ref());
    }
}

#[test]
fn tasks_of_streams_that_wait_for_another_thread_are_found_out() {
    const TIMES: u32 = 5;
    let path = SocketPath::new();
    let server = server(&path, 1)
        .serve_streams(|mut stream| async move {
            for _ in 0..TIMES {
                stream.recv().await?;
                let is_woken = Cell::new(false);
                std::future::poll_fn(|context: &mut Context<'_>| {
                    if is_woken.replace(true) {
                        return Poll::Ready(());
                    }
                    Waker::from(Arc::new(FromElsewhere(context.waker().clone()))).wake();
                    Poll::Pending
                })
                .await;
                send(&mut stream, b"done").await?;
            }
            Ok::<_, Error>(())
        })
        .unwrap();
    let at = path.as_str().to_owned();
    let (tell, stats) = mpsc::channel();
    run(LIMIT, move || async move {
        let session = Connector::new(small()).connect(&at).await.unwrap();
        let mut stream = session.open_stream().unwrap();
        for _ in 0..TIMES {
            send(&mut stream, b"wait").await.unwrap();
            assert_eq!(recv(&mut stream).await.unwrap(), b"done");
        }
        tell.send(session.stats()).unwrap();
    });
    assert_eq!(stats.recv().unwrap().cross_core_wakes, 0, "the client has no part in it");
    let start = Instant::now();
    while server.stats()[0].open > 0 && start.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(server.stats()[0].cross_core_wakes, u64::from(TIMES));
    server.stop(PATIENCE).unwrap();
}

#[test]
fn sessions_that_nobody_takes_are_bounded() {
    run(LIMIT, || async {
        const MOST: usize = 3;
        let path = SocketPath::new();
        let config = Config::builder().container().max_handshakes(MOST).build().unwrap();
        let listener = shmipc_glommio::Listener::bind(path.as_str(), config.clone()).unwrap();
        let connected = Rc::new(Cell::new(0));
        let mut connecting = Vec::new();
        for _ in 0..MOST * 3 {
            let (at, config) = (path.as_str().to_owned(), config.clone());
            let connected = Rc::clone(&connected);
            connecting.push(glommio::spawn_local(async move {
                let session = Connector::new(config).connect(&at).await.unwrap();
                connected.set(connected.get() + 1);
                session
            }));
        }
        assert!(within(LIMIT, || connected.get() == MOST).await);
        a_while().await;
        assert_eq!(connected.get(), MOST, "the others wait");
        let mut accepted = Vec::new();
        for _ in 0..MOST * 3 {
            accepted.push(listener.accept().await.unwrap());
        }
        for session in connecting {
            assert!(session.await.end_reason().is_none());
        }
    });
}
