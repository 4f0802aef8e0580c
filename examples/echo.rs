// SPDX-License-Identifier: MIT OR Apache-2.0
//! Round trips through shared memory and through a plain Unix socket, side by side.
//!
//! `cargo run --release --example echo`
//!
//! Starts a server process and a client process, each on a processor of its own where there are
//! two. Both transports run between the same two processes, in turns of a few milliseconds, since
//! what a round trip costs changes with where the machine places the threads. A request is written
//! and read in full before the reply, of the same size, is written and read in full.
//!
//! `--quick` takes turns so short that the figures mean little; the tests use it.

#[allow(dead_code, reason = "the other examples use the rest")]
#[path = "support/cli.rs"]
mod cli;

use std::env;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::ops::AsyncFnMut;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use futures_lite::{AsyncReadExt, AsyncWriteExt};
use glommio::{LocalExecutorBuilder, Placement};
use nix::sched::CpuSet;
use nix::unistd::Pid;
use shmipc_glommio::{Config, Connector, Cores, Listener, Session, Stream, preflight};

const SIZES: [usize; 8] = [64, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20];
/// How many streams, or connections, the last line has in use at the same time.
const CROWD: usize = 64;
const ROUNDS: usize = 5;
/// The whole run, after which a client that hangs is given up.
const LIMIT: Duration = Duration::from_secs(60);

/// How the three processes know their part. The user's is the one without.
const SERVER: &str = "--be-the-server";
const CLIENT: &str = "--be-the-client";

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    cli::end(match words[..] {
        [SERVER, directory] => serve(Path::new(directory)),
        [CLIENT, directory, mode] => measure(Path::new(directory), mode == "quick"),
        _ => match parse() {
            Ok(is_quick) => direct(is_quick),
            Err(status) => return status,
        },
    })
}

fn parse() -> Result<bool, ExitCode> {
    let quick = cli::flag("quick", "Take turns so short that the figures mean little");
    let command = cli::command(
        "echo",
        "Round trips through shared memory and through a plain Unix socket, side by side",
    );
    cli::read(command.arg(quick), |matches| Ok(matches.get_flag("quick")))
}

// The process that the user started: it has two children and waits.

fn direct(is_quick: bool) -> Outcome<()> {
    let directory = Directory::create()?;
    let path = directory.0.to_str().ok_or("the temporary directory has no UTF-8 name")?;
    let mut server = Part::start(&[SERVER, path])?;
    server.wait_until_ready()?;
    let mode = if is_quick { "quick" } else { "full" };
    let mut client = Part::start(&[CLIENT, path, mode])?;
    let mut report = client.output();
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(status) = client.0.try_wait()? {
            let mut text = String::new();
            report.read_to_string(&mut text)?;
            cli::print(format_args!("{}", text.trim_end()))?;
            return if status.success() { Ok(()) } else { Err(format!("client: {status}").into()) };
        }
        if let Some(status) = server.0.try_wait()? {
            return Err(format!("server: {status}").into());
        }
        if Instant::now() > deadline {
            return Err(format!("not done after {LIMIT:?}").into());
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// A directory for the sockets, removed with everything in it.
struct Directory(PathBuf);

impl Directory {
    fn create() -> io::Result<Self> {
        let path = env::temp_dir().join(format!("shmipc-echo-{}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // The server removes it too, should this process be killed; either may come second.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A child process, ended with this one.
struct Part(Child);

impl Part {
    fn start(arguments: &[&str]) -> io::Result<Self> {
        let child = Command::new(env::current_exe()?)
            .args(arguments)
            // Its end tells the child that this process is gone, however it went.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C ends this process only, so that the children live long enough to clean up.
            .process_group(0)
            .spawn()?;
        Ok(Self(child))
    }

    fn output(&mut self) -> impl Read + use<> {
        self.0.stdout.take().expect("piped, and taken once")
    }

    fn wait_until_ready(&mut self) -> Outcome<()> {
        let mut line = String::new();
        BufReader::new(self.output()).read_line(&mut line)?;
        if line.is_empty() { Err("the server did not start".into()) } else { Ok(()) }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Ends this child, and what is left on the disk, when its parent is gone.
fn end_with_parent(directory: &Path) {
    let directory = directory.to_owned();
    thread::spawn(move || {
        // The parent never writes: this waits for the end.
        let _ = io::stdin().read(&mut [0]);
        let _ = fs::remove_dir_all(directory);
        std::process::exit(1);
    });
}

/// Keeps this process, with all threads it starts later, on the processor of that number.
fn pin(number: usize) -> Outcome<Option<usize>> {
    let this = Pid::from_raw(0);
    let allowed = nix::sched::sched_getaffinity(this)?;
    let cpus: Vec<_> =
        (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu) == Ok(true)).collect();
    if cpus.len() < 2 {
        return Ok(None);
    }
    let mut only = CpuSet::new();
    only.set(cpus[number])?;
    nix::sched::sched_setaffinity(this, &only)?;
    Ok(Some(cpus[number]))
}

fn on_executor<T>(future: impl Future<Output = T>) -> Outcome<T> {
    preflight(&Cores::Unpinned(1)).map_err(|error| error.to_string())?;
    let executor = LocalExecutorBuilder::new(Placement::Unbound).make();
    Ok(executor.map_err(|error| format!("no executor: {error}"))?.run(future))
}

fn shared_memory_path(directory: &Path) -> PathBuf {
    directory.join("shmipc.sock")
}

fn plain_path(directory: &Path) -> PathBuf {
    directory.join("plain.sock")
}

// The server. A peer says in eight bytes how long its messages are; then each is read in full and
// written back.

fn serve(directory: &Path) -> Outcome<()> {
    end_with_parent(directory);
    pin(0)?;
    let plain = UnixListener::bind(plain_path(directory))?;
    thread::spawn(move || {
        for socket in plain.incoming().map_while(Result::ok) {
            thread::spawn(move || serve_socket(socket));
        }
    });
    let path = shared_memory_path(directory);
    on_executor(async move {
        let listener = Listener::bind(path, Config::default())?;
        cli::print(format_args!("ready"))?;
        loop {
            let session = listener.accept().await?;
            glommio::spawn_local(async move {
                while let Ok(stream) = session.accept().await {
                    glommio::spawn_local(async move { serve_stream(stream).await.ok() }).detach();
                }
            })
            .detach();
        }
    })?
}

async fn serve_stream(mut stream: Stream) -> io::Result<()> {
    let mut size = [0; 8];
    stream.read_exact(&mut size).await?;
    let mut message = vec![0; message_size(size)?];
    loop {
        stream.read_exact(&mut message).await?;
        stream.write_all(&message).await?;
    }
}

fn serve_socket(mut socket: UnixStream) -> io::Result<()> {
    let mut size = [0; 8];
    socket.read_exact(&mut size)?;
    let mut message = vec![0; message_size(size)?];
    loop {
        socket.read_exact(&mut message)?;
        socket.write_all(&message)?;
    }
}

fn message_size(bytes: [u8; 8]) -> io::Result<usize> {
    let size = u64::from_le_bytes(bytes);
    let known = SIZES.into_iter().find(|&known| known as u64 == size);
    known.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

// The client.

/// Where the sockets are, and how long one transport runs before the other has its turn.
struct Lab {
    session: Session,
    plain: PathBuf,
    turn: Duration,
}

fn measure(directory: &Path, is_quick: bool) -> Outcome<()> {
    end_with_parent(directory);
    let cpu = pin(1)?;
    let directory = directory.to_owned();
    let (rounds, turn) = if is_quick { (1, 5) } else { (ROUNDS, 60) };
    on_executor(async move {
        let connector = Connector::new(Config::default());
        let lab = Rc::new(Lab {
            session: connector.connect(shared_memory_path(&directory)).await?,
            plain: plain_path(&directory),
            turn: Duration::from_millis(turn),
        });
        let mut rows: Vec<Row> = SIZES.map(Row::new).into();
        let mut crowd = Row::new(SIZES[0]);
        for _ in 0..rounds {
            for row in &mut rows {
                row.shared_memory.push(lab.shared_memory(row.size).await?);
                row.socket.push(lab.socket(row.size)?);
            }
            crowd.shared_memory.push(lab.shared_memory_crowd().await?);
            crowd.socket.push(lab.socket_crowd()?);
        }
        let table = table(&mut rows, &mut crowd, cpu.is_some(), rounds);
        Ok(cli::print(format_args!("{table}"))?)
    })?
}

impl Lab {
    async fn shared_memory(&self, size: usize) -> io::Result<Duration> {
        let mut stream = self.session.open_stream()?;
        stream.write_all(&(size as u64).to_le_bytes()).await?;
        let times = round_trips(size, self.turn, async |message, answer| {
            stream.write_all(message).await?;
            stream.read_exact(answer).await
        });
        Ok(median(&mut times.await?))
    }

    fn socket(&self, size: usize) -> io::Result<Duration> {
        let mut socket = self.connect(size)?;
        let times = round_trips(size, self.turn, async |message, answer| {
            socket.write_all(message)?;
            socket.read_exact(answer)
        });
        // Never waits for anything but the socket, and that not by a waker.
        Ok(median(&mut futures_lite::future::block_on(times)?))
    }

    fn connect(&self, size: usize) -> io::Result<UnixStream> {
        let mut socket = UnixStream::connect(&self.plain)?;
        socket.write_all(&(size as u64).to_le_bytes())?;
        Ok(socket)
    }

    /// Many streams of one session at the same time. Gives the time per round trip.
    async fn shared_memory_crowd(self: &Rc<Self>) -> io::Result<Duration> {
        let size = SIZES[0];
        let started = Instant::now();
        let tasks: Vec<_> = (0..CROWD)
            .map(|_| {
                let lab = Rc::clone(self);
                glommio::spawn_local(async move {
                    let mut stream = lab.session.open_stream()?;
                    stream.write_all(&(size as u64).to_le_bytes()).await?;
                    let times = round_trips(size, lab.turn, async |message, answer| {
                        stream.write_all(message).await?;
                        stream.read_exact(answer).await
                    });
                    Ok::<_, io::Error>(times.await?.len())
                })
            })
            .collect();
        let mut count = 0;
        for task in tasks {
            count += task.await?;
        }
        Ok(started.elapsed() / count as u32)
    }

    /// As many connections at the same time, each with a thread on both sides.
    fn socket_crowd(&self) -> io::Result<Duration> {
        let size = SIZES[0];
        let started = Instant::now();
        let count: io::Result<usize> = thread::scope(|scope| {
            let threads: Vec<_> = (0..CROWD)
                .map(|_| {
                    let (socket, turn) = (self.connect(size), self.turn);
                    scope.spawn(move || {
                        let mut socket = socket?;
                        let times = round_trips(size, turn, async |message, answer| {
                            socket.write_all(message)?;
                            socket.read_exact(answer)
                        });
                        Ok::<_, io::Error>(futures_lite::future::block_on(times)?.len())
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
        });
        count.map(|count| started.elapsed() / count as u32)
    }
}

/// Exchanges messages for as long as a turn lasts, and checks every byte outside of the clock.
/// Gives the time of each.
async fn round_trips(
    size: usize,
    turn: Duration,
    mut exchange: impl AsyncFnMut(&[u8], &mut [u8]) -> io::Result<()>,
) -> io::Result<Vec<Duration>> {
    let mut message = vec![0; size];
    let mut answer = vec![0; size];
    let mut times = Vec::new();
    let end = Instant::now() + turn;
    for number in 1u64.. {
        message.fill(number as u8);
        let started = Instant::now();
        exchange(&message, &mut answer).await?;
        let done = Instant::now();
        times.push(done - started);
        if answer != message {
            return Err(io::Error::other("the answer is not the request"));
        }
        if done >= end {
            break;
        }
    }
    Ok(times)
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// What was measured for one size: a median for each round.
struct Row {
    size: usize,
    shared_memory: Vec<Duration>,
    socket: Vec<Duration>,
}

impl Row {
    fn new(size: usize) -> Self {
        Self { size, shared_memory: Vec::new(), socket: Vec::new() }
    }

    fn line(&mut self, label: &str) -> String {
        let (shared_memory, socket) = (median(&mut self.shared_memory), median(&mut self.socket));
        let micros = |time: Duration| format!("{:.2} µs", time.as_nanos() as f64 / 1000.0);
        let ratio = socket.as_secs_f64() / shared_memory.as_secs_f64();
        format!(
            "| {label:>20} | {:>13} | {:>13} | {ratio:>5.1} |",
            micros(shared_memory),
            micros(socket)
        )
    }
}

fn table(rows: &mut [Row], crowd: &mut Row, is_pinned: bool, rounds: usize) -> String {
    let place = if is_pinned { "on two processors" } else { "on one processor" };
    let mut lines = vec![
        format!(
            "Round trips between two processes {place}, medians of {rounds} interleaved rounds:\n"
        ),
        format!(
            "| {:>20} | {:>13} | {:>13} | {:>5} |",
            "there and back", "shared memory", "Unix socket", "ratio"
        ),
        format!("|{:->22}|{:->15}|{:->15}|{:->7}|", ":", ":", ":", ":"),
    ];
    for row in rows {
        let label = match row.size {
            size if size < 1 << 10 => format!("{size} B"),
            size if size < 1 << 20 => format!("{} KiB", size >> 10),
            size => format!("{} MiB", size >> 20),
        };
        lines.push(row.line(&label));
    }
    lines.push(crowd.line(&format!("64 B, one of {CROWD}")));
    lines.push(format!(
        "\nLast line: {CROWD} streams, or connections with a thread each, at the same time; \
        time per round trip."
    ));
    lines.join("\n")
}
