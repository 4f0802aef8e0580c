//! This crate: a session between two executors, one per process.

use std::cell::RefCell;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use futures_lite::AsyncWriteExt;
use glommio::{LocalExecutorBuilder, Placement};
use shmipc_glommio::{
    Config, Connector, Cores, Error, Listener, PeerTrust, ProtocolVersion, Result, Spin, Stream,
    Wakeup,
};

use super::payload;
use super::point::{Ours, Point, Slice, Stopwatch, batch_for};

/// Looks at what both processes take together, at most: an executor each at a time, and the largest
/// memory that is measured.
pub(crate) fn preflight() -> io::Result<()> {
    shmipc_glommio::preflight(&Cores::Unpinned(2))?;
    Ok(shmipc_glommio::preflight(&config(Ours::V4TwiceTheMemory).footprint(1, 1, 1))?)
}

fn config(ours: Ours) -> Config {
    let builder = Config::builder();
    let builder = match ours {
        Ours::Spin | Ours::V4Spin => builder.spin(Spin::Forever),
        Ours::Sleep | Ours::V4Sleep | Ours::V4SleepEventFd => builder.spin(Spin::Never),
        Ours::Adaptive | Ours::V4Adaptive | Ours::V4TwiceTheMemory | Ours::V4SharedLists => builder,
    };
    let builder = match ours {
        Ours::Spin | Ours::Adaptive | Ours::Sleep => builder,
        _ => builder.protocol(ProtocolVersion::V4).allow_v3_fallback(false),
    };
    let builder = match ours {
        Ours::V4SleepEventFd => builder.wakeup(Wakeup::EventFd),
        Ours::V4TwiceTheMemory => builder.buffer_size(64 << 20),
        Ours::V4SharedLists => builder.owned_free_lists(false),
        _ => builder,
    };
    builder.build().expect("a valid configuration")
}

/// Serves one session. `ready` is called when the client can connect.
pub(crate) fn serve(path: &Path, ours: Ours, point: Point, ready: impl FnOnce() + 'static) {
    let path = path.to_owned();
    run(async move {
        let trust = Rc::new(trust());
        let listener = Listener::bind(&path, config(ours)).expect("a free path");
        let listener = listener.trust_peer(&trust);
        ready();
        let session = listener.accept().await.expect("a client");
        while let Ok(stream) = session.accept().await {
            glommio::spawn_local(echo(stream, point, Rc::clone(&trust))).detach();
        }
    });
}

async fn echo(mut stream: Stream, point: Point, trust: Rc<PeerTrust>) {
    let mut seed = 0;
    // Ends when the client goes.
    while receive(&mut stream, &point, &trust).await.is_ok() {
        if send(&mut stream, &point, &trust, seed).await.is_err() {
            return;
        }
        seed = seed.wrapping_add(1);
    }
}

/// Sends one message, written in place.
async fn send(stream: &mut Stream, point: &Point, trust: &PeerTrust, seed: u8) -> Result<()> {
    let mut loan = stream.alloc(point.size).await?;
    if point.touch {
        loan.views(trust)?.for_each(|view| payload::write(view, seed));
    }
    loan.advance(point.size);
    stream.send(loan).await
}

/// Receives one message, read in place, in as many pieces as it comes.
async fn receive(stream: &mut Stream, point: &Point, trust: &PeerTrust) -> Result<()> {
    let mut received = 0;
    while received < point.size {
        let message = stream.recv().await?.ok_or(Error::StreamClosedByPeer)?;
        if point.touch {
            message.views(trust)?.for_each(|view| _ = payload::read(view));
        }
        received += message.len();
    }
    Ok(())
}

fn trust() -> PeerTrust {
    // SAFETY: both processes are this program.
    unsafe { PeerTrust::new_unchecked() }
}

pub(crate) fn measure(path: &Path, ours: Ours, point: Point) -> Slice {
    let path = path.to_owned();
    run(async move {
        let trust = Rc::new(trust());
        let connector = Connector::new(config(ours)).trust_peer(&trust);
        let session = connector.connect(&path).await.expect("the server listens");
        // Warm: pages are touched, tasks are placed.
        let warm = Stopwatch::start(point.slice / 8, 1);
        let stream = session.open_stream().expect("an open session");
        ping(stream, point, Rc::clone(&trust), Rc::new(RefCell::new(warm))).await;
        let batch = batch_for(point.transport, point.size);
        let watch = Rc::new(RefCell::new(Stopwatch::start(point.slice, batch)));
        let tasks: Vec<_> = (0..point.streams)
            .map(|_| {
                let stream = session.open_stream().expect("an open session");
                glommio::spawn_local(ping(stream, point, Rc::clone(&trust), Rc::clone(&watch)))
            })
            .collect();
        for task in tasks {
            task.await;
        }
        let watch = Rc::into_inner(watch).expect("all tasks are done");
        watch.into_inner().stop()
    })
}

async fn ping(
    mut stream: Stream,
    point: Point,
    trust: Rc<PeerTrust>,
    watch: Rc<RefCell<Stopwatch>>,
) {
    let batch = watch.borrow().batch();
    let mut seed = 0u8;
    let mut next = Some(Instant::now());
    while let Some(began) = next {
        for _ in 0..batch {
            send(&mut stream, &point, &trust, seed).await.expect("the server reads");
            receive(&mut stream, &point, &trust).await.expect("the server answers");
            seed = seed.wrapping_add(1);
        }
        next = watch.borrow_mut().lap(began);
    }
}

/// Round trips for the time of a slice, on the executor of the caller. Gives how many.
pub(crate) async fn ping_until_over(path: &Path, ours: Ours, point: Point) -> u64 {
    let trust = Rc::new(trust());
    let connector = Connector::new(config(ours)).trust_peer(&trust);
    let session = connector.connect(path).await.expect("the server listens");
    let stream = session.open_stream().expect("an open session");
    let watch = Rc::new(RefCell::new(Stopwatch::start(point.slice, 1)));
    ping(stream, point, trust, Rc::clone(&watch)).await;
    let watch = Rc::into_inner(watch).expect("the task is done");
    watch.into_inner().stop().operations
}

/// Processor time of a core with so many idle sessions, as a share of the wall's.
pub(crate) fn idle_share(path: &Path, sessions: usize, during: Duration) -> f64 {
    let path = path.to_owned();
    run(async move {
        let config = Config::builder()
            .buffer_size(1 << 20)
            .queue_capacity(64)
            .build()
            .expect("a valid configuration");
        let listener = Listener::bind(&path, config.clone()).expect("a free path");
        let connector = Connector::new(config);
        let mut held = Vec::new();
        for _ in 0..sessions / 2 {
            let (client, server) =
                futures_lite::future::zip(connector.connect(&path), listener.accept()).await;
            let (client, server) = (client.expect("a session"), server.expect("a session"));
            let mut stream = client.open_stream().expect("an open session");
            stream.write_all(b"once").await.expect("an open session");
            held.push((client, server, stream));
        }
        glommio::timer::sleep(Duration::from_secs(1)).await;
        let (cpu, wall) = (cpu_time(), Instant::now());
        glommio::timer::sleep(during).await;
        (cpu_time() - cpu).as_secs_f64() / wall.elapsed().as_secs_f64()
    })
}

fn cpu_time() -> Duration {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_THREAD)
        .expect("getrusage knows the thread");
    let time = |value: nix::sys::time::TimeVal| {
        Duration::new(value.tv_sec() as u64, value.tv_usec() as u32 * 1000)
    };
    time(usage.user_time()) + time(usage.system_time())
}

fn run<T>(task: impl Future<Output = T>) -> T {
    let executor = LocalExecutorBuilder::new(Placement::Unbound).make();
    executor.expect("io_uring, and 512 KiB of locked memory").run(task)
}
