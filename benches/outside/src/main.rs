// SPDX-License-Identifier: MIT OR Apache-2.0
//! Round trips as a user's program makes them: outside of the workspace, with cargo's default profile.
//!
//! ```text
//! cargo build --release --manifest-path benches/outside/Cargo.toml
//! outside bytes|messages SIZE STREAMS COUNT [4]
//! ```
//!
//! Both ends of the session run on one executor, so that a run does the same each time but for what
//! a clock drives. Prints nanoseconds a round trip. Under `valgrind --tool=callgrind`, the difference
//! of two runs with different counts, divided by the difference of their round trips, is the number
//! of instructions of one.

use std::env;
use std::io::Read;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use futures_lite::future::zip;
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use shmipc_glommio::{
    Config, Connector, Listener, Message, ProtocolVersion, Result, Session, Spin, Stream,
};

#[derive(Clone, Copy)]
struct Load {
    is_bytes: bool,
    size: usize,
    streams: usize,
    count: usize,
    version: ProtocolVersion,
}

fn main() -> ExitCode {
    let Some(load) = parse() else {
        eprintln!("usage: outside bytes|messages SIZE STREAMS COUNT [4]");
        return ExitCode::from(2);
    };
    let executor = glommio::LocalExecutorBuilder::default().make().expect("an executor");
    match executor.run(run(load)) {
        Ok(took) => {
            let trips = (load.streams * load.count) as u128;
            println!("{} ns a round trip", took.as_nanos() / trips);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn parse() -> Option<Load> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let number = |at: usize| arguments.get(at)?.parse().ok().filter(|&number: &usize| number > 0);
    let is_bytes = match arguments.first()?.as_str() {
        "bytes" => true,
        "messages" => false,
        _ => return None,
    };
    let version = match arguments.get(4).map(String::as_str) {
        None => ProtocolVersion::V3,
        Some("4") => ProtocolVersion::V4,
        Some(_) => return None,
    };
    Some(Load { is_bytes, size: number(1)?, streams: number(2)?, count: number(3)?, version })
}

async fn run(load: Load) -> Result<Duration> {
    let path = env::temp_dir().join(format!("outside-{}.sock", std::process::id()));
    // The clock drives as little as can be.
    let config = Config::builder()
        .protocol(load.version)
        .spin(Spin::Forever)
        .reactor_interval(Duration::from_millis(500))
        .build()?;
    let listener = Listener::bind(&path, config.clone())?;
    let connector = Connector::new(config);
    let (client, server) = zip(connector.connect(&path), listener.accept()).await;
    let (client, server) = (client?, server?);
    let accepting = glommio::spawn_local(accept(server, load));
    let began = Instant::now();
    let tasks: Vec<_> = (0..load.streams)
        .map(|_| {
            let client = client.clone();
            glommio::spawn_local(async move { ask(client.open_stream()?, load).await })
        })
        .collect();
    for task in tasks {
        task.await?;
    }
    let took = began.elapsed();
    accepting.cancel().await;
    Ok(took)
}

async fn accept(session: Session, load: Load) {
    while let Ok(stream) = session.accept().await {
        glommio::spawn_local(async move { answer(stream, load).await.ok() }).detach();
    }
}

async fn ask(mut stream: Stream, load: Load) -> Result<()> {
    let request = vec![7; load.size];
    let mut reply = vec![0; load.size];
    for _ in 0..load.count {
        if load.is_bytes {
            exchange_bytes(&mut stream, &request, &mut reply).await.expect("an open stream");
        } else {
            send(&mut stream, &request).await?;
            read(stream.recv().await?.expect("an answer"), &mut reply);
        }
    }
    assert_eq!(request, reply);
    Ok(())
}

async fn exchange_bytes(
    stream: &mut Stream,
    request: &[u8],
    reply: &mut [u8],
) -> std::io::Result<()> {
    stream.write_all(request).await?;
    stream.flush().await?;
    stream.read_exact(reply).await
}

async fn answer(mut stream: Stream, load: Load) -> std::io::Result<()> {
    let mut buffer = vec![0; load.size];
    loop {
        if load.is_bytes {
            stream.read_exact(&mut buffer).await?;
            stream.write_all(&buffer).await?;
            stream.flush().await?;
        } else {
            let Some(message) = stream.recv().await? else { return Ok(()) };
            read(message, &mut buffer);
            send(&mut stream, &buffer).await?;
        }
    }
}

async fn send(stream: &mut Stream, bytes: &[u8]) -> Result<()> {
    let mut loan = stream.alloc(bytes.len()).await?;
    loan.write(bytes);
    stream.send(loan).await
}

fn read(mut message: Message, to: &mut [u8]) {
    Read::read_exact(&mut message, to).expect("a whole message");
}
