// SPDX-License-Identifier: MIT OR Apache-2.0
//! A key-value store in memory, one shard a core, that speaks the protocol of Redis.
//!
//! ```text
//! cargo run --release --example kv_server -- --tcp 127.0.0.1:6380 --shm /tmp/kv
//! redis-cli -p 6380 set greeting hello
//! redis-benchmark -p 6380 -t set,get -P 16
//! ```
//!
//! Every shard belongs to one thread, and only that thread touches its keys. A command comes in at
//! any shard, by TCP, by a Unix socket or over shared memory; what other shards own is asked of
//! them, over a session in shared memory between the two cores. There is no lock and no map that
//! two threads share. Clients that know the shards (`kv/slots.rs`) connect to `PATH.<shard>` and
//! need no detour.
//!
//! A command with keys of several shards, MSET for instance, is carried out by each of them for
//! its own keys: others can see it half done.

#[path = "kv/mod.rs"]
mod kv;

use std::fmt;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use shmipc_glommio::{Config, Cores, Server, Session, Shard as Core, SliceClass, Spin};

use kv::doors::AllDoors;
use kv::resp::Limits;
use kv::shard::{self, Settings};

const USAGE: &str = "usage: kv_server [--tcp ADDRESS:PORT] [--unix PATH] [--shm PATH]
  at least one of these; --shm is needed for more than one shard
  --shards N        how many shards, one thread each (default: one a processor)
  --pin             keep each shard on one processor
  --spin MICROS     how long a shard polls shared memory before it sleeps (default: 50)
  --max-bulk BYTES  the longest key or value (default: 64 MiB)
  --debug           allow DEBUG SLEEP seconds [key], which blocks a shard";
/// The exit status of a command that was called wrongly.
const BAD_ARGUMENTS: u8 = 2;
const MOST_SHARDS: usize = 256;
/// How long sessions get to come to rest when the server is to stop.
const GRACE: Duration = Duration::from_secs(2);
const DEFAULT_BULK: usize = 64 << 20;
const MOST_BULK: usize = 512 << 20;

/// What the command line says.
struct Options {
    tcp: Option<SocketAddr>,
    unix: Option<PathBuf>,
    shm: Option<PathBuf>,
    shards: usize,
    is_pinned: bool,
    spin: Spin,
    bulk: usize,
    is_debug_allowed: bool,
}

fn main() -> ExitCode {
    let options = match parse() {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("{error}\n{USAGE}");
            return ExitCode::from(BAD_ARGUMENTS);
        }
    };
    match serve(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(format_args!("{error}"));
            ExitCode::FAILURE
        }
    }
}

fn parse() -> Result<Option<Options>, lexopt::Error> {
    use lexopt::Arg::Long;
    use lexopt::ValueExt;
    let mut options = Options {
        tcp: None,
        unix: None,
        shm: None,
        shards: 0,
        is_pinned: false,
        spin: Config::default().spin(),
        bulk: DEFAULT_BULK,
        is_debug_allowed: false,
    };
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("tcp") => options.tcp = Some(parser.value()?.parse()?),
            Long("unix") => options.unix = Some(parser.value()?.into()),
            Long("shm") => options.shm = Some(parser.value()?.into()),
            Long("shards") => {
                let is_fine = |shards: &usize| (1..=MOST_SHARDS).contains(shards);
                let shards = parser.value()?.parse().ok().filter(is_fine);
                options.shards = shards.ok_or("--shards is a number from 1 to 256")?;
            }
            Long("pin") => options.is_pinned = true,
            Long("spin") => {
                let spin = Duration::from_micros(parser.value()?.parse()?);
                options.spin = if spin.is_zero() { Spin::Never } else { Spin::For(spin) };
            }
            Long("max-bulk") => {
                let is_fine = |bulk: &usize| (1024..=MOST_BULK).contains(bulk);
                let bulk = parser.value()?.parse().ok().filter(is_fine);
                options.bulk = bulk.ok_or("--max-bulk is a number from 1024 to 536870912")?;
            }
            Long("debug") => options.is_debug_allowed = true,
            Long("help") => return Ok(None),
            _ => return Err(argument.unexpected()),
        }
    }
    if options.tcp.is_none() && options.unix.is_none() && options.shm.is_none() {
        return Err("--tcp, --unix or --shm is needed".into());
    }
    if options.shards == 0 {
        let processors = thread::available_parallelism().map_or(1, |count| count.get());
        options.shards = processors.min(MOST_SHARDS);
    }
    if options.shards > 1 && options.shm.is_none() {
        return Err("more than one shard needs --shm, by which the shards reach each other".into());
    }
    Ok(Some(options))
}

/// Writes a line to stderr. That nobody reads there is no reason to stop.
fn tell(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Small sessions: there is one for each pair of shards, and one for each client and shard.
fn session_config(spin: Spin) -> Result<Config, shmipc_glommio::ConfigError> {
    Config::builder()
        .buffer_size(16 << 20)
        .slice_classes([
            SliceClass::new(512 - 20, 10),
            SliceClass::new(4096 - 20, 20),
            SliceClass::new(65536 - 20, 70),
        ])
        .spin(spin)
        // A shard that is busy with something long must not be taken for dead.
        .handshake_timeout(Duration::from_secs(20))
        .build()
}

fn serve(options: &Options) -> io::Result<()> {
    // Blocked before any other thread starts: threads inherit it, and only the one that waits for
    // signals takes them.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block()?;
    let limits = Limits::for_bulk(options.bulk);
    // Without a door for others, the shard still has one, which nobody is told of.
    let private = || std::env::temp_dir().join(format!("kv-server-{}.sock", std::process::id()));
    let settings = Settings {
        limits,
        shm: options.shm.clone().unwrap_or_else(private),
        config: session_config(options.spin)?,
        is_debug_allowed: options.is_debug_allowed,
        started: Instant::now(),
    };
    let mut doors = AllDoors::reserve(options.tcp, options.unix.as_deref())?;
    let server = start(&settings, &mut doors, options)?;
    doors.start()?;

    if let Some(address) = doors.tcp_address() {
        tell(format_args!("listening on tcp {address}"));
    }
    if let Some(path) = &options.unix {
        tell(format_args!("listening on unix {}", path.display()));
    }
    if let Some(path) = &options.shm {
        tell(format_args!("listening on shm {} ({} shards)", path.display(), options.shards));
    }
    tell(format_args!("ready"));
    let stopper = server.stopper();
    thread::spawn(move || {
        if let Err(errno) = signals.wait() {
            tell(format_args!("cannot wait for signals: {errno}"));
        }
        stopper.stop(GRACE);
    });
    Ok(server.join()?)
}

/// Starts a shard on each core, and the doors of each.
fn start(settings: &Settings, doors: &mut AllDoors, options: &Options) -> io::Result<Server> {
    let cores = if options.is_pinned { Cores::Count } else { Cores::Unpinned };
    let each: io::Result<Vec<_>> =
        (0..options.shards).map(|_| doors.for_shard().map(Some)).collect();
    // Each shard takes its own, once.
    let each = Arc::new(Mutex::new(each?));
    let settings = settings.clone();
    let server = Server::builder(&settings.shm)
        .cores(cores(options.shards))
        .config(settings.config.clone())
        .start(move |core: Core| {
            let (settings, each) = (settings.clone(), Arc::clone(&each));
            async move {
                let doors = each.lock().ok().and_then(|mut each| each[core.index()].take());
                let doors = doors.ok_or_else(|| io::Error::other("its doors are gone"))?;
                let (shard, tasks) = shard::start_shard(core.clone(), settings, doors)?;
                glommio::spawn_local(async move {
                    core.stopping().await;
                    drop(tasks);
                })
                .detach();
                Ok::<_, io::Error>(move |session: Session| {
                    let shard = Rc::clone(&shard);
                    async move {
                        shard::serve_session(shard, session).await;
                        Ok::<_, io::Error>(())
                    }
                })
            }
        })?;
    Ok(server)
}
