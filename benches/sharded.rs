// SPDX-License-Identifier: MIT OR Apache-2.0
//! What one core that is blocked costs the other one, and whether anything is lost.
//!
//! `cargo bench --bench sharded`. A server with two shards, pinned to two processors, and for each
//! shard a client on a thread of its own, wherever the kernel puts it, with 16 streams that
//! exchange messages of 64 bytes. In each round the rates of a second are taken three times:
//! before, while the first shard's executor sleeps without giving way, and after. While it sleeps,
//! connections come in at the door that both share, half of which the dealer would have given to
//! it. In the end every message has its answer, with the bytes that belong to it, and every
//! connection is served.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use glommio::{ExecutorJoinHandle, LocalExecutorBuilder, Placement};
use shmipc_glommio::{Client, Config, Connector, Cores, Result, Server, Stream};

const SHARDS: usize = 2;
const STREAMS: u64 = 16;
const ROUNDS: usize = 7;
const SECOND: Duration = Duration::from_secs(1);
/// Connections at the shared door while a shard is blocked.
const COMERS: usize = 32;
/// What a message begins with that is to block its shard.
const BLOCK: u64 = u64::MAX;

async fn serve(mut stream: Stream) -> Result<()> {
    while let Some(mut message) = stream.recv().await? {
        let number = message.read_array().map(u64::from_le_bytes);
        if number == Some(BLOCK) {
            thread::sleep(SECOND);
        }
        let mut answer = stream.alloc(64).await?;
        answer.write(&number.unwrap_or_default().to_le_bytes());
        answer.write(&message.into_bytes());
        stream.send(answer).await?;
    }
    Ok(())
}

/// Sends a message whose bytes follow from a number, and looks whether they come back.
async fn exchange(stream: &mut Stream, number: u64) -> Result<()> {
    let mut bytes = [number as u8; 64];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    let mut loan = stream.alloc(bytes.len()).await?;
    loan.write(&bytes);
    stream.send(loan).await?;
    let answer = stream.recv().await?.expect("the server answers before it ends a stream");
    assert_eq!(answer.into_bytes(), &bytes[..], "the answer is another one's");
    Ok(())
}

/// Sends messages, each when the last one was answered. Gives how many.
async fn ask(
    mut stream: Stream,
    first: u64,
    answers: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
) -> Result<u64> {
    let mut sent = 0;
    while !is_over.load(Ordering::Relaxed) {
        exchange(&mut stream, first + sent).await?;
        sent += 1;
        answers.fetch_add(1, Ordering::Relaxed);
    }
    Ok(sent)
}

/// The clients of one shard, and how many answers they got.
struct Load {
    answers: Arc<AtomicU64>,
    executor: ExecutorJoinHandle<Result<u64>>,
}

impl Load {
    fn start(path: &Path, shard: usize, is_over: &Arc<AtomicBool>) -> Self {
        let answers = Arc::new(AtomicU64::new(0));
        let (path, counted, is_over) = (path.to_owned(), answers.clone(), is_over.clone());
        let executor = LocalExecutorBuilder::new(Placement::Unbound).spawn(move || async move {
            let client = Client::builder(path).build()?;
            let mut tasks = Vec::new();
            for stream in 0..STREAMS {
                let at = client.open_stream(shard).await?;
                let asking = ask(at, stream << 48, counted.clone(), is_over.clone());
                tasks.push(glommio::spawn_local(asking));
            }
            let mut sent = 0;
            for task in tasks {
                sent += task.await?;
            }
            Ok(sent)
        });
        Self { answers, executor: executor.expect("io_uring") }
    }
}

/// Answers per second of each shard's clients for a second.
fn rates(loads: &[Load]) -> Vec<f64> {
    let answers = || loads.iter().map(|load| load.answers.load(Ordering::Relaxed));
    let (began, before) = (Instant::now(), answers().collect::<Vec<_>>());
    thread::sleep(SECOND - Duration::from_millis(50));
    let seconds = began.elapsed().as_secs_f64();
    answers().zip(before).map(|(after, before)| (after - before) as f64 / seconds).collect()
}

/// Runs something of a client on a thread of its own.
fn aside<F: Future<Output = Result<()>> + 'static>(
    run: impl FnOnce() -> F + Send + 'static,
) -> ExecutorJoinHandle<Result<()>> {
    LocalExecutorBuilder::new(Placement::Unbound).spawn(run).expect("io_uring")
}

/// Has the first shard sleep. Returns when it does.
fn block(path: &Path, load: &Load) -> ExecutorJoinHandle<Result<()>> {
    let path = path.to_owned();
    let blocked = aside(move || async move {
        let client = Client::builder(path).build()?;
        exchange(&mut client.open_stream(0).await?, BLOCK).await
    });
    loop {
        let before = load.answers.load(Ordering::Relaxed);
        thread::sleep(Duration::from_millis(20));
        if load.answers.load(Ordering::Relaxed) == before {
            return blocked;
        }
    }
}

async fn come(connector: Connector, path: PathBuf, number: u64) -> Result<()> {
    let session = connector.connect(path).await?;
    exchange(&mut session.open_stream()?, number).await
}

/// Connections at the shared door. All of them have to be served.
fn comers(path: &Path) -> ExecutorJoinHandle<Result<()>> {
    let path = path.to_owned();
    aside(move || async move {
        let config = Config::builder().small_messages().build()?;
        let connector = Connector::new(config);
        let comers: Vec<_> = (0..COMERS as u64)
            .map(|number| glommio::spawn_local(come(connector.clone(), path.clone(), number)))
            .collect();
        for comer in comers {
            comer.await?;
        }
        Ok(())
    })
}

fn ended<T: Send + 'static>(executor: ExecutorJoinHandle<Result<T>>) -> T {
    executor.join().expect("no panic").expect("nothing is lost")
}

/// The median, the lowest and the highest of what was measured.
fn median(measured: impl Iterator<Item = f64>) -> (f64, Range<f64>) {
    let mut measured: Vec<f64> = measured.collect();
    measured.sort_by(f64::total_cmp);
    (measured[measured.len() / 2], measured[0]..measured[measured.len() - 1])
}

fn main() {
    let path = PathBuf::from(format!("/tmp/sharded-{}", std::process::id()));
    let server = Server::builder(&path).cores(Cores::List(vec![0, 1])).serve_streams(serve);
    let server = server.expect("io_uring, and two processors");
    let is_over = Arc::new(AtomicBool::new(false));
    let loads: Vec<_> = (0..SHARDS).map(|shard| Load::start(&path, shard, &is_over)).collect();
    thread::sleep(SECOND);

    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let before = rates(&loads);
        let blocked = block(&path, &loads[0]);
        let came = comers(&path);
        let during = rates(&loads);
        ended(blocked);
        ended(came);
        rounds.push([before, during, rates(&loads)]);
    }

    is_over.store(true, Ordering::Relaxed);
    let counts: Vec<u64> = loads.iter().map(|l| l.answers.load(Ordering::Relaxed)).collect();
    let sent: Vec<u64> = loads.into_iter().map(|load| ended(load.executor)).collect();
    println!("            {:>24} {:>24} {:>24}", "before", "while 0 is blocked", "after");
    for shard in 0..SHARDS {
        print!("shard {shard}:   ");
        for phase in 0..3 {
            let (rate, spread) = median(rounds.iter().map(|round| round[phase][shard]));
            let thousands = |rate: f64| rate / 1e3;
            let (low, high) = (thousands(spread.start), thousands(spread.end));
            print!(" {:>7.0} k/s ({low:.0} to {high:.0})", thousands(rate));
        }
        println!();
    }
    let (ratio, spread) = median(rounds.iter().map(|[before, during, _]| during[1] / before[1]));
    println!("shard 1, blocked to before: {ratio:.2} ({:.2} to {:.2})", spread.start, spread.end);
    let stats = server.stats();
    let wakes: u64 = stats.iter().map(|shard| shard.cross_core_wakes).sum();
    println!("answers: {counts:?} counted before the end, {sent:?} in all; none missing");
    println!("cross-core wake-ups: {wakes}; {stats:?}");
    server.stop(SECOND).expect("a server that stops in order");
    assert_eq!(wakes, 0);
}
