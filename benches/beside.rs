//! What a busy session does to everything else on its core.
//!
//! `cargo bench --bench beside`. One executor runs a session that is never idle, and at the same
//! time timers of a millisecond, a TCP connection that a message comes over every millisecond, 4
//! KiB reads of a file past the page cache, and a task that computes and yields when it should. How
//! late each of them is is measured without the session, and with it.

#[path = "../apps/examples/ping_pong/measure/mod.rs"]
mod measure;

use std::cell::Cell;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use futures_lite::AsyncReadExt;
use glommio::io::DmaFile;
use glommio::{LocalExecutorBuilder, Placement};
use hdrhistogram::Histogram;

use measure::harness::{self, Harness};
use measure::ours;
use measure::point::{Ours, Point, Transport};

/// How long each of the two halves is measured, and how long it runs before.
const DURATION: Duration = Duration::from_secs(4);
const SPINNING: Ours = Ours::Spin;
const WARM_UP: Duration = Duration::from_millis(500);
const TICK: Duration = Duration::from_millis(1);

/// How late something was, in nanoseconds.
struct Lateness {
    name: &'static str,
    histogram: Histogram<u64>,
    began: Instant,
}

impl Lateness {
    fn new(name: &'static str) -> Self {
        let histogram = Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("bounds that fit");
        Self { name, histogram, began: Instant::now() }
    }

    fn note(&mut self, late: Duration) {
        if self.began.elapsed() < WARM_UP {
            return;
        }
        self.histogram.saturating_record(late.as_nanos().max(1) as u64);
    }
}

async fn timers(stop: Rc<Cell<bool>>) -> Lateness {
    let mut lateness = Lateness::new("timer of 1 ms");
    while !stop.get() {
        let due = Instant::now() + TICK;
        glommio::timer::sleep(TICK).await;
        lateness.note(due.elapsed());
    }
    lateness
}

/// Reads the times at which messages were sent.
async fn socket(stop: Rc<Cell<bool>>, origin: Instant) -> Lateness {
    let mut lateness = Lateness::new("TCP message");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound listener");
    std::thread::spawn(move || {
        // On any processor: it sleeps nearly all the time.
        let mut stream = TcpStream::connect(address).expect("the listener is there");
        stream.set_nodelay(true).expect("a TCP option");
        loop {
            std::thread::sleep(TICK);
            let now = origin.elapsed().as_nanos() as u64;
            if stream.write_all(&now.to_le_bytes()).is_err() {
                return;
            }
        }
    });
    let (stream, _) = listener.accept().expect("the thread connects");
    // SAFETY: `into_raw_fd` gave up the ownership that the stream takes over.
    let mut stream = unsafe {
        use std::os::fd::{FromRawFd, IntoRawFd};
        glommio::net::TcpStream::from_raw_fd(stream.into_raw_fd())
    };
    while !stop.get() {
        let mut sent = [0; 8];
        stream.read_exact(&mut sent).await.expect("the thread sends");
        let sent = Duration::from_nanos(u64::from_le_bytes(sent));
        lateness.note(origin.elapsed().saturating_sub(sent));
    }
    lateness
}

async fn disk(stop: Rc<Cell<bool>>, path: &Path) -> Lateness {
    let mut lateness = Lateness::new("4 KiB read (DMA)");
    let file = DmaFile::open(path).await.expect("a file of 1 MiB");
    let mut at = 0;
    while !stop.get() {
        let began = Instant::now();
        file.read_at_aligned(at, 4096).await.expect("a file of 1 MiB");
        lateness.note(began.elapsed());
        at = (at + 4096) % (1 << 20);
        glommio::timer::sleep(TICK).await;
    }
    file.close().await.expect("an open file");
    lateness
}

/// Computes in steps of 20 microseconds and notes how long it was kept from the next one.
async fn computing(stop: Rc<Cell<bool>>) -> (Lateness, u64) {
    let mut lateness = Lateness::new("computing task, gap");
    let mut steps = 0;
    while !stop.get() {
        let began = Instant::now();
        while began.elapsed() < Duration::from_micros(20) {
            std::hint::spin_loop();
        }
        steps += 1;
        let yielded = Instant::now();
        glommio::executor().yield_task_queue_now().await;
        lateness.note(yielded.elapsed());
    }
    (lateness, steps)
}

/// Everything beside, for as long as configured; with the session when there is a path to it.
fn measure(file: &Path, session: Option<(&Path, Point)>) -> (Vec<Lateness>, u64, u64) {
    let file = file.to_owned();
    let session = session.map(|(path, point)| (path.to_owned(), point));
    let executor = LocalExecutorBuilder::new(Placement::Unbound).make();
    executor.expect("io_uring, and 512 KiB of locked memory").run(async move {
        let stop = Rc::new(Cell::new(false));
        let origin = Instant::now();
        let busy = session.map(|(path, point)| {
            glommio::spawn_local(async move { ours::ping_until_over(&path, SPINNING, point).await })
        });
        let timer = glommio::spawn_local(timers(Rc::clone(&stop)));
        let tcp = glommio::spawn_local(socket(Rc::clone(&stop), origin));
        let read = glommio::spawn_local({
            let stop = Rc::clone(&stop);
            async move { disk(stop, &file).await }
        });
        let compute = glommio::spawn_local(computing(Rc::clone(&stop)));
        glommio::timer::sleep(WARM_UP + DURATION).await;
        stop.set(true);
        let operations = match busy {
            Some(task) => task.await,
            None => 0,
        };
        let (gaps, steps) = compute.await;
        (vec![timer.await, tcp.await, read.await, gaps], steps, operations)
    })
}

fn main() {
    if std::env::args().nth(1).as_deref() == Some(harness::SERVE) {
        return harness::serve();
    }
    let file = std::env::temp_dir().join(format!("shmipc-beside-{}", std::process::id()));
    std::fs::write(&file, vec![7; 1 << 20]).expect("room for a file of 1 MiB");
    let mut harness = Harness::start();
    let (alone, steps_alone, _) = measure(&file, None);
    let point = Point {
        transport: Transport::Ours(SPINNING),
        size: 64,
        streams: 1,
        touch: true,
        shared_cpu: false,
        slice: WARM_UP + DURATION,
    };
    let path = harness.begin(point);
    let (beside, steps_beside, operations) = measure(&file, Some((&path, point)));
    harness.finish(&path);
    std::fs::remove_file(&file).expect("the file was there");
    println!(
        "microseconds late             without: p50      p99      max     with: p50      p99      max"
    );
    for (alone, beside) in alone.iter().zip(&beside) {
        let figure = |histogram: &Histogram<u64>, quantile| {
            histogram.value_at_quantile(quantile) as f64 / 1000.0
        };
        let (a, b) = (&alone.histogram, &beside.histogram);
        println!(
            "{:<30} {:>11.1} {:>8.1} {:>8.1} {:>13.1} {:>8.1} {:>8.1}",
            alone.name,
            figure(a, 0.5),
            figure(a, 0.99),
            figure(a, 1.0),
            figure(b, 0.5),
            figure(b, 0.99),
            figure(b, 1.0)
        );
    }
    println!("computing steps of 20 us: {steps_alone} without, {steps_beside} with the session");
    println!("round trips of the session: {operations}");
}
