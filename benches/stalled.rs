//! What one reader that stops costs the other streams of its session.
//!
//! `cargo bench --bench stalled`. Two executors on two processors. Over one session 63 streams
//! exchange messages of 64 bytes; in every second slice there is one more stream, whose sender goes
//! on and whose reader has stopped. Slices are taken in turn; the medians of both kinds are
//! compared. After each slice the reader goes on and has to get every byte.

use std::cell::Cell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use glommio::{LocalExecutorBuilder, Placement};
use shmipc_glommio::{Config, Connector, Listener, Result, Session, Stream};

const STREAMS: usize = 63;
const ROUNDS: usize = 15;
const SLICE: Duration = Duration::from_millis(100);
/// What the stalled stream's sender would like to send: many times what may wait unread.
const STALLED_MESSAGES: usize = 4000;
const STALLED_LEN: usize = 4096;
/// The first byte of a stream says what its reader is to do.
const ECHO: u8 = 0;
const STALL: u8 = 1;

async fn send(stream: &mut Stream, bytes: &[u8]) -> Result<()> {
    let mut loan = stream.alloc(bytes.len()).await?;
    loan.write(bytes);
    stream.send(loan).await
}

async fn serve(mut stream: Stream, goes_on: Arc<AtomicBool>) -> Result<()> {
    let Some(mut kind) = stream.recv().await? else { return Ok(()) };
    if kind.read_array() == Some([STALL]) {
        while !goes_on.load(Ordering::Acquire) {
            glommio::timer::sleep(Duration::from_millis(1)).await;
        }
        let mut received = 0;
        while received < STALLED_MESSAGES * STALLED_LEN {
            let Some(message) = stream.recv().await? else { break };
            let bytes = message.into_bytes();
            let number = (received / STALLED_LEN) as u8;
            assert!(bytes.iter().all(|&byte| byte == number), "message {number} is another one");
            received += bytes.len();
        }
        return send(&mut stream, &(received as u64).to_le_bytes()).await;
    }
    while let Some(message) = stream.recv().await? {
        stream.forward(message).await?;
    }
    Ok(())
}

async fn ping(mut stream: Stream, until: Instant, count: Rc<Cell<u64>>) -> Result<()> {
    send(&mut stream, &[ECHO]).await?;
    while Instant::now() < until {
        for _ in 0..16 {
            send(&mut stream, &[7; 64]).await?;
            stream.recv().await?;
            count.set(count.get() + 1);
        }
    }
    Ok(())
}

async fn overrun(mut stream: Stream) -> Result<()> {
    send(&mut stream, &[STALL]).await?;
    for number in 0..STALLED_MESSAGES {
        send(&mut stream, &[number as u8; STALLED_LEN]).await?;
    }
    let mut answer = stream.recv().await?.expect("the reader counts");
    let received = answer.read_array().map(u64::from_le_bytes);
    assert_eq!(received, Some((STALLED_MESSAGES * STALLED_LEN) as u64), "bytes were lost");
    Ok(())
}

/// Round trips per second of the streams that are read.
async fn slice(session: &Session, goes_on: &AtomicBool, is_stalled: bool) -> Result<f64> {
    goes_on.store(false, Ordering::Release);
    let count = Rc::new(Cell::new(0));
    let (began, until) = (Instant::now(), Instant::now() + SLICE);
    let stalled = is_stalled
        .then(|| session.open_stream())
        .transpose()?
        .map(|s| glommio::spawn_local(overrun(s)));
    let mut pings = Vec::new();
    for _ in 0..STREAMS {
        let stream = session.open_stream()?;
        pings.push(glommio::spawn_local(ping(stream, until, Rc::clone(&count))));
    }
    for ping in pings {
        ping.await?;
    }
    let rate = count.get() as f64 / began.elapsed().as_secs_f64();
    goes_on.store(true, Ordering::Release);
    if let Some(stalled) = stalled {
        stalled.await?;
    }
    Ok(rate)
}

fn median(rates: &mut [f64]) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

fn main() {
    let path = PathBuf::from(format!("/tmp/stalled-{}.sock", std::process::id()));
    let goes_on = Arc::new(AtomicBool::new(false));
    let (ready, is_ready) = std::sync::mpsc::channel();
    let server = LocalExecutorBuilder::new(Placement::Fixed(1)).spawn({
        let (path, goes_on) = (path.clone(), Arc::clone(&goes_on));
        move || async move {
            let listener = Listener::bind(path, Config::default())?;
            let _ = ready.send(());
            let session = listener.accept().await?;
            while let Ok(stream) = session.accept().await {
                glommio::spawn_local(serve(stream, Arc::clone(&goes_on))).detach();
            }
            Result::Ok(())
        }
    });
    let server: glommio::ExecutorJoinHandle<Result<()>> =
        server.expect("io_uring, and a second processor");
    is_ready.recv().expect("the server starts");
    let client = LocalExecutorBuilder::new(Placement::Fixed(0)).spawn(move || async move {
        let session = Connector::new(Config::default()).connect(path).await?;
        slice(&session, &goes_on, true).await?;
        let (mut free, mut beside) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            free.push(slice(&session, &goes_on, false).await?);
            beside.push(slice(&session, &goes_on, true).await?);
        }
        let (free, beside) = (median(&mut free), median(&mut beside));
        println!("63 streams: {free:.0} round trips/s, beside a stalled one {beside:.0}");
        println!("ratio {:.3}, {:?}", beside / free, session.stats());
        Result::Ok(())
    });
    let client: glommio::ExecutorJoinHandle<Result<()>> = client.expect("io_uring");
    client.join().expect("no panic").expect("no error");
    server.join().expect("no panic").expect("no error");
}
