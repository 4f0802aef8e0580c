// SPDX-License-Identifier: MIT OR Apache-2.0
//! Steady traffic allocates nothing and wakes nobody: what a message costs beyond its bytes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_lite::{AsyncReadExt, AsyncWriteExt};
use shmipc_glommio::{Config, Connector, Listener, Session, Spin, Stream};

use support::executor::{SocketPath, run};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
}

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

// SAFETY: everything is handed on to the system's allocator; counting changes nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Round trips that are counted; as many go before them.
const ROUNDS: u64 = 20_000;

async fn serve(session: Session) {
    while let Ok(mut stream) = session.accept().await {
        glommio::spawn_local(async move {
            while let Ok(Some(message)) = stream.recv().await {
                stream.forward(message).await.unwrap();
            }
        })
        .detach();
    }
}

/// How many allocations and SyncEvents `ROUNDS` round trips cost, after as many others.
async fn cost_of(round: impl AsyncFn(&mut Stream)) -> (u64, u64) {
    let path = SocketPath::new();
    // No look at io_uring but glommio's own every 100 ms: each allocates inside glommio.
    let config = || {
        let builder = Config::builder().spin(Spin::Forever);
        builder.reactor_interval(Duration::from_secs(10)).build().unwrap()
    };
    let listener = Listener::bind(path.as_str(), config()).unwrap();
    let connector = Connector::new(config());
    let (client, server) =
        futures_lite::future::zip(connector.connect(path.as_str()), listener.accept()).await;
    let (client, server) = (client.unwrap(), server.unwrap());
    let serving = glommio::spawn_local(serve(server.clone()));
    let mut stream = client.open_stream().unwrap();
    for _ in 0..ROUNDS {
        round(&mut stream).await;
    }
    let rings = || client.stats().sync_events_sent + server.stats().sync_events_sent;
    let before = (ALLOCATIONS.load(Ordering::Relaxed), rings());
    for _ in 0..ROUNDS {
        round(&mut stream).await;
    }
    let after = (ALLOCATIONS.load(Ordering::Relaxed), rings());
    drop(stream);
    client.close().await.unwrap();
    serving.await;
    (after.0 - before.0, after.1 - before.1)
}

#[test]
fn a_message_allocates_nothing_and_rings_for_nobody() {
    run(Duration::from_secs(60), || async {
        let copied = cost_of(async |stream| {
            let mut answer = [0; 64];
            stream.write_all(&[7; 64]).await.unwrap();
            stream.read_exact(&mut answer).await.unwrap();
        });
        let lent = cost_of(async |stream| {
            let mut loan = stream.alloc(300_000).await.unwrap();
            loan.write(&[7; 300_000]);
            stream.send(loan).await.unwrap();
            assert_eq!(stream.recv().await.unwrap().unwrap().len(), 300_000);
        });
        for (name, cost) in [("copied", copied.await), ("lent", lent.await)] {
            let (allocations, rings) = cost;
            // glommio looks at its rings now and then and allocates a few times when it does.
            assert!(allocations < ROUNDS / 20, "{name}: {allocations} in {ROUNDS} rounds");
            assert!(rings < ROUNDS / 100, "{name}: {rings} SyncEvents in {ROUNDS} rounds");
        }
    });
}
