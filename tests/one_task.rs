// SPDX-License-Identifier: MIT OR Apache-2.0
//! One task that waits for more than glommio 0.9 can count clones of its waker: 32 767.

use std::future::{Future, poll_fn};
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_lite::AsyncWriteExt;
use futures_lite::future::zip;
use shmipc_glommio::{Config, Connector, Error, Listener, Session};

use support::executor::{SocketPath, run};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
}

const STREAMS: usize = 40_000;

async fn pair(path: &SocketPath) -> [Session; 2] {
    let listener = Listener::bind(path.as_str(), Config::default()).unwrap();
    let connector = Connector::new(Config::default());
    let (client, server) = zip(connector.connect(path.as_str()), listener.accept()).await;
    [client.unwrap(), server.unwrap()]
}

#[test]
fn one_task_waits_on_40_000_streams() {
    run(Duration::from_secs(120), || async {
        let path = SocketPath::new();
        let [client, server] = pair(&path).await;
        let mut streams: Vec<_> = (0..STREAMS).map(|_| client.open_stream().unwrap()).collect();
        // The server answers on the last one only.
        streams[STREAMS - 1].write_all(b"question").await.unwrap();
        let answering = glommio::spawn_local(async move {
            let mut stream = server.accept().await.unwrap();
            let question = stream.recv().await.unwrap().unwrap();
            stream.forward(question).await.unwrap();
            (server, stream)
        });
        let mut reads: Vec<_> = streams
            .iter_mut()
            .map(|stream| Box::pin(async { stream.recv().await.map(|read| read.unwrap().len()) }))
            .collect();
        let answered = poll_fn(|context| {
            let mut answered = Poll::Pending;
            for (number, read) in reads.iter_mut().enumerate() {
                if let Poll::Ready(read) = read.as_mut().poll(context) {
                    answered = Poll::Ready((number, read.unwrap()));
                }
            }
            answered
        })
        .await;
        assert_eq!(answered, (STREAMS - 1, 8));
        drop(answering.await);
    });
}

/// Each with a timer of glommio's, which keeps a clone of the waker that it is polled with.
#[test]
fn one_task_waits_until_40_000_deadlines() {
    run(Duration::from_secs(120), || async {
        let path = SocketPath::new();
        let [client, _server] = pair(&path).await;
        let mut streams: Vec<_> = (0..STREAMS).map(|_| client.open_stream().unwrap()).collect();
        let deadline = Instant::now() + Duration::from_secs(3);
        for stream in &mut streams {
            stream.set_read_deadline(Some(deadline));
        }
        let mut reads: Vec<_> = streams
            .iter_mut()
            .map(|stream| Some(Box::pin(async { stream.recv().await.map(drop) })))
            .collect();
        let mut passed = 0;
        poll_fn(|context| {
            for read in &mut reads {
                let Some(waiting) = read else { continue };
                if let Poll::Ready(result) = waiting.as_mut().poll(context) {
                    assert!(matches!(result, Err(Error::DeadlinePassed)), "{result:?}");
                    *read = None;
                    passed += 1;
                }
            }
            if passed == STREAMS { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    });
}

/// The first timer of a core is a few milliseconds late with glommio 0.9. It comes, though.
#[test]
fn the_first_timer_of_a_core_comes() {
    run(Duration::from_secs(60), || async {
        let sleep = async || {
            let began = Instant::now();
            glommio::timer::sleep(Duration::from_millis(1)).await;
            began.elapsed()
        };
        let (first, second) = (sleep().await, sleep().await);
        println!("a timer of 1 ms: the first took {first:?}, the second {second:?}");
    });
}
