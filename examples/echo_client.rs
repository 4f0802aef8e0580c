// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sends messages to an echo server, and checks every byte that comes back.
//!
//! `cargo run --release --example echo_client -- --socket /tmp/echo.sock --size 4096`
//!
//! It ends with one line of JSON on stdout, and with status 0 only if every byte came back.

#[allow(dead_code, reason = "the other examples use the rest")]
#[path = "support/protocol.rs"]
mod protocol;
#[allow(dead_code, reason = "the other examples use the rest")]
#[path = "support/mod.rs"]
mod support;

use std::cell::Cell;
use std::io;
use std::process::ExitCode;
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use clap::{ArgMatches, value_parser};
use futures_lite::future::{or, try_zip};
use futures_lite::io::{ReadHalf, WriteHalf, split};
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use serde_json::{Value, json};
use shmipc_glommio::{Config, Connector, Cores, MemoryKind, Session, Stream, preflight};
use support::address;
use support::cli;
use support::{Address, Place};

const LEAST_POOL: u64 = 1 << 20;
/// How long the peer gets to give back the slices it holds, once all streams are closed.
const POOL_GRACE: Duration = Duration::from_secs(1);
/// How much later than `--timeout` the process ends if even its executor hangs.
const WATCHDOG_GRACE: Duration = Duration::from_secs(3);

#[derive(Clone)]
struct Options {
    address: Address,
    config: Config,
    size: usize,
    count: u64,
    streams: u64,
    reopen: bool,
    verify: bool,
    timeout: Duration,
}

fn main() -> ExitCode {
    let options = match parse() {
        Ok(options) => options,
        Err(status) => return status,
    };
    let done = Rc::new(Cell::new(0));
    let place = options.address.resolve().and_then(|place| {
        // Before the thread that this needs besides: it says best what there is too little of.
        preflight(&Cores::Unpinned(1))?;
        watch(options.timeout + WATCHDOG_GRACE)?;
        Ok(place)
    });
    let place = place.map_err(|error| error.to_string());
    match place.and_then(|place| support::run(echo(&options, &place, &done))) {
        Ok(report) => cli::end(cli::print(format_args!("{report}"))),
        Err(error) => {
            let report = json!({"ok": false, "error": error, "done": done.get()});
            // It has failed, whether that can be told or not.
            let _ = cli::end(cli::print(format_args!("{report}")));
            ExitCode::FAILURE
        }
    }
}

/// Ends the process from outside of the executor, should a task keep that from looking at a clock.
fn watch(limit: Duration) -> io::Result<()> {
    let watching = thread::Builder::new().spawn(move || {
        thread::sleep(limit);
        let report = json!({"ok": false, "error": "the executor hangs"});
        let _ = cli::print(format_args!("{report}"));
        std::process::exit(1);
    });
    watching.map(drop)
}

fn parse() -> Result<Options, ExitCode> {
    let positive = || value_parser!(u64).range(1..);
    let command = cli::command(
        "echo_client",
        "Sends messages to an echo server, and checks every byte that comes back",
    );
    let command = Address::add_to(command)
        .arg(
            cli::option(
                "memory",
                "memfd|file",
                "How the memory is handed over [default: memfd, file over TCP]",
            )
            .value_parser(memory_kind),
        )
        .arg(
            cli::option("protocol", "2|3|4", "Highest protocol version; 2 knows file memory only")
                .default_value("3")
                .value_parser(protocol::protocol_version),
        )
        .arg(
            cli::option(
                "wakeup",
                "socket|eventfd|polling:MICROS",
                "How the sides wake each other; others than socket with version 4",
            )
            .default_value("socket")
            .value_parser(protocol::wakeup),
        )
        .arg(
            cli::option("size", "BYTES", "Payload of a message")
                .default_value("64")
                .value_parser(positive()),
        )
        .arg(
            cli::option("count", "N", "Messages on all streams together")
                .default_value("10000")
                .value_parser(positive()),
        )
        .arg(
            cli::option("streams", "N", "Streams at the same time")
                .default_value("1")
                .value_parser(positive()),
        )
        .arg(
            cli::option("pool", "BYTES", "Buffer memory, at least 1 MiB")
                .default_value("33554432")
                .value_parser(value_parser!(u64).range(LEAST_POOL..)),
        )
        .arg(
            cli::option_with_default(
                "queue",
                "EVENTS",
                "Room in each IO queue",
                Config::default().queue_capacity(),
            )
            .value_parser(value_parser!(u32)),
        )
        .arg(cli::flag("reopen", "A fresh stream for every message"))
        .arg(cli::flag("verify", "Check every byte, as by default").overrides_with("no-verify"))
        .arg(cli::flag("no-verify", "Do not check").overrides_with("verify"))
        .arg(
            cli::option("timeout", "SECONDS", "Give up after that long")
                .default_value("60")
                .value_parser(positive()),
        );
    cli::read(command, options)
}

/// What the arguments say together.
fn options(matches: &ArgMatches) -> Result<Options, String> {
    let number = |name| matches.get_one::<u64>(name).copied().unwrap_or_default();
    let address = Address::take(matches);
    let is_tcp = matches!(address, Address::Tcp(_));
    let by_address = if is_tcp { MemoryKind::File } else { MemoryKind::Memfd };
    let kind = matches.get_one("memory").copied().unwrap_or(by_address);
    if is_tcp && kind == MemoryKind::Memfd {
        return Err("TCP carries no descriptors: --memory file".into());
    }
    let mut config = Config::builder().memory(kind).buffer_size(number("pool"));
    if let Some(&version) = matches.get_one("protocol") {
        config = config.protocol(version);
    }
    if let Some(&wakeup) = matches.get_one("wakeup") {
        config = config.wakeup(wakeup);
    }
    if let Some(&queue) = matches.get_one("queue") {
        config = config.queue_capacity(queue);
    }
    Ok(Options {
        address,
        config: config.build().map_err(|error| error.to_string())?,
        size: usize::try_from(number("size")).map_err(|_| "--size is too large")?,
        count: number("count"),
        streams: number("streams"),
        reopen: matches.get_flag("reopen"),
        verify: !matches.get_flag("no-verify"),
        timeout: Duration::from_secs(number("timeout")),
    })
}

fn memory_kind(text: &str) -> Result<MemoryKind, &'static str> {
    match text {
        "memfd" => Ok(MemoryKind::Memfd),
        "file" => Ok(MemoryKind::File),
        _ => Err("expected memfd or file"),
    }
}

/// Connects, echoes, and reports. `done` counts the messages that came back, also when it fails.
async fn echo(options: &Options, place: &Place, done: &Rc<Cell<u64>>) -> Result<Value, String> {
    let too_late = async {
        glommio::timer::sleep(options.timeout).await;
        Err(format!("not done after {:?}", options.timeout))
    };
    let connector = Connector::new(options.config.clone());
    let work = async {
        let session = match place {
            Place::Unix(path) => connector.connect(path).await.map_err(io::Error::from),
            Place::Tcp(addresses) => {
                let connect = async |at| Ok(connector.connect_tcp(at).await?);
                address::first_of(addresses, connect).await
            }
        };
        let session = session.map_err(|error| error.to_string())?;
        let report = talk(options, &session, done).await;
        // Also after a failure: streams that are still open hold the session, and its files. What
        // was sent has been answered, or that it was not is what the report says.
        let _ = session.close().await;
        report
    };
    or(work, too_late).await
}

/// Sends all messages on all streams.
async fn talk(options: &Options, session: &Session, done: &Rc<Cell<u64>>) -> Result<Value, String> {
    let started = Instant::now();
    let tasks: Vec<_> = (0..options.streams)
        .map(|number| {
            let lane = Lane {
                number,
                options: options.clone(),
                session: session.clone(),
                done: Rc::clone(done),
            };
            glommio::spawn_local(lane.run())
        })
        .collect();
    let mut latencies = Vec::new();
    for task in tasks {
        latencies.append(&mut task.await?);
    }
    let elapsed = started.elapsed();
    settle(session).await;
    Ok(summary(options, session, latencies, elapsed))
}

/// Waits until every slice is free again, but not for ever: a peer may never give back.
async fn settle(session: &Session) {
    let closed = Instant::now();
    while !session.pool_usage().is_full() && closed.elapsed() < POOL_GRACE {
        glommio::timer::sleep(Duration::from_millis(1)).await;
    }
}

fn summary(
    options: &Options,
    session: &Session,
    mut latencies: Vec<u64>,
    elapsed: Duration,
) -> Value {
    latencies.sort_unstable();
    let percentile = |of_hundred: usize| latencies[(latencies.len() - 1) * of_hundred / 100];
    let count = latencies.len() as u64;
    let stats = session.stats();
    let line = json!({
        "ok": true,
        "count": count,
        "bytes": count * options.size as u64,
        "streams": options.streams,
        "p50_ns": percentile(50),
        "p99_ns": percentile(99),
        "per_op_ns": elapsed.as_nanos() as u64 / count,
        "fallback": stats.fallback_sent + stats.fallback_received,
    });
    support::with_report(line, session)
}

/// One of the streams that run at the same time, or a row of streams with `--reopen`.
struct Lane {
    number: u64,
    options: Options,
    session: Session,
    done: Rc<Cell<u64>>,
}

impl Lane {
    /// Sends this lane's share of the messages. Gives the time that each took, in nanoseconds.
    async fn run(self) -> Result<Vec<u64>, String> {
        let Options { count, streams, size, .. } = self.options;
        let share = count / streams + u64::from(self.number < count % streams);
        let mut latencies = Vec::with_capacity(share as usize);
        let mut message = pattern(self.number, 0, size);
        let mut answer = vec![0; size];
        let mut pipe = None;
        for index in 0..share {
            if self.options.verify {
                fill(&mut message, self.number, index);
            }
            let started = Instant::now();
            let mut open = match pipe.take() {
                Some(open) => open,
                None => Pipe::open(&self.session)?,
            };
            let result = open.exchange(&message, &mut answer).await;
            result.map_err(|error| self.explain(index, &error))?;
            if !self.options.reopen {
                pipe = Some(open);
            }
            latencies.push(started.elapsed().as_nanos() as u64);
            if self.options.verify {
                self.check(index, &message, &answer)?;
            }
            self.done.set(self.done.get() + 1);
        }
        Ok(latencies)
    }

    fn explain(&self, index: u64, error: &io::Error) -> String {
        format!("stream {}, message {index}: {error}", self.number)
    }

    fn check(&self, index: u64, message: &[u8], answer: &[u8]) -> Result<(), String> {
        if message == answer {
            return Ok(());
        }
        let wrong = message.iter().zip(answer).position(|(sent, came)| sent != came);
        let at = wrong.unwrap_or_default();
        let (sent, came) = (message[at], answer[at]);
        Err(format!(
            "stream {}, message {index}: byte {at} is {came:#04x}, should be {sent:#04x}",
            self.number
        ))
    }
}

/// A stream whose two directions are used at the same time.
struct Pipe {
    reader: ReadHalf<Stream>,
    writer: WriteHalf<Stream>,
}

impl Pipe {
    fn open(session: &Session) -> Result<Self, String> {
        let stream = session.open_stream().map_err(|error| error.to_string())?;
        let (reader, writer) = split(stream);
        Ok(Self { reader, writer })
    }

    /// Sends a message and takes as many bytes back. Both at the same time: a message can be
    /// larger than everything that the pool, the queue and the socket hold.
    async fn exchange(&mut self, message: &[u8], answer: &mut [u8]) -> io::Result<()> {
        let write = self.writer.write_all(message);
        let read = self.reader.read_exact(answer);
        try_zip(write, read).await.map(|_| ())
    }
}

/// The payload of one message: it depends on the stream, the message and the position, so that
/// bytes of another message, or from another place, are noticed.
fn pattern(stream: u64, message: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    fill(&mut bytes, stream, message);
    bytes
}

fn fill(bytes: &mut [u8], stream: u64, message: u64) {
    const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
    let seed = (stream + 1).wrapping_mul(MIX).rotate_left(32) ^ message.wrapping_mul(MIX);
    for (position, piece) in (0u64..).zip(bytes.chunks_mut(8)) {
        let word = (seed ^ position).wrapping_mul(MIX);
        let word = word ^ (word >> 29);
        piece.copy_from_slice(&word.to_le_bytes()[..piece.len()]);
    }
}
