// SPDX-License-Identifier: MIT OR Apache-2.0
//! A key-value store in memory, one shard a core, that speaks the protocol of Redis.
//!
//! ```text
//! cargo run --release --bin kv_server -- --tcp 127.0.0.1:6380 --shm /tmp/kv
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

#[allow(dead_code, reason = "the other examples use the rest")]
#[path = "../support/address.rs"]
mod address;
#[allow(dead_code, reason = "the other examples use the rest")]
#[path = "../support/cli.rs"]
mod cli;
mod kv;
#[allow(dead_code, reason = "the other examples use the rest")]
#[path = "../support/protocol.rs"]
mod protocol;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use clap::{ArgGroup, ArgMatches, value_parser};
use nix::sys::signal::{SigSet, Signal};
use shmipc_glommio::{Config, Cores, Server, Session, Shard as Core, SliceClass, Spin};

use address::HostPort;
use cli::tell;
use kv::listeners::Listeners;
use kv::resp::Limits;
use kv::shard::{self, Settings};

const MAX_SHARDS: usize = 256;
/// How long sessions get to come to rest when the server is to stop.
const GRACE: Duration = Duration::from_secs(2);
const DEFAULT_BULK: usize = 64 << 20;
const MAX_BULK: usize = 512 << 20;
const DEFAULT_OUTPUT: usize = 64 << 20;
const DEFAULT_OUTPUT_ALL: usize = 512 << 20;
const MAX_OUTPUT: u64 = 1 << 40;

/// What the command line says.
struct Options {
    tcp: Option<HostPort>,
    unix: Option<PathBuf>,
    shm: Option<PathBuf>,
    shards: usize,
    is_pinned: bool,
    spin: Spin,
    bulk: usize,
    output: [usize; 2],
    is_debug_allowed: bool,
}

fn main() -> ExitCode {
    match parse() {
        Ok(options) => cli::end(serve(&options)),
        Err(status) => status,
    }
}

fn parse() -> Result<Options, ExitCode> {
    let path = || value_parser!(PathBuf);
    let command = cli::command(
        "kv_server",
        "A key-value store in memory, one shard a core, that speaks the protocol of Redis",
    )
    .arg(
        cli::option("tcp", "HOST:PORT", "Listen for clients over TCP")
            .value_parser(value_parser!(HostPort)),
    )
    .arg(
        cli::option(
            "unix",
            "PATH",
            "Listen for clients on a Unix socket; @NAME is an abstract one",
        )
        .value_parser(path()),
    )
    .arg(
        cli::option("shm", "PATH", "Listen for sessions over shared memory, on this Unix socket")
            .value_parser(path()),
    )
    .group(ArgGroup::new("listeners").args(["tcp", "unix", "shm"]).multiple(true).required(true))
    .arg(
        cli::option("shards", "N", "How many shards, one thread each [default: one a processor]")
            .value_parser(value_parser!(u64).range(1..=MAX_SHARDS as u64)),
    )
    .arg(cli::flag("pin", "Keep each shard on one processor"))
    .arg(
        cli::option_with_default(
            "spin",
            "MICROS",
            "How long a shard polls shared memory before it sleeps",
            protocol::spin_micros(Config::default().spin()),
        )
        .value_parser(value_parser!(u64)),
    )
    .arg(
        cli::option_with_default(
            "max-bulk",
            "BYTES",
            "The longest key or value",
            mebibytes(DEFAULT_BULK),
        )
        .value_parser(value_parser!(u64).range(1024..=MAX_BULK as u64)),
    )
    .arg(
        cli::option_with_default(
            "max-output",
            "BYTES",
            "The most replies that are kept for a client that writes and does not read",
            mebibytes(DEFAULT_OUTPUT),
        )
        .value_parser(value_parser!(u64).range(..=MAX_OUTPUT)),
    )
    .arg(
        cli::option_with_default(
            "max-output-all",
            "BYTES",
            "The same for all clients together",
            mebibytes(DEFAULT_OUTPUT_ALL),
        )
        .value_parser(value_parser!(u64).range(..=MAX_OUTPUT)),
    )
    .arg(cli::flag("debug", "Allow DEBUG SLEEP seconds [key], which blocks a shard"))
    .after_help("More than one shard needs --shm, by which the shards reach each other.");
    cli::read(command, options)
}

fn mebibytes(bytes: usize) -> String {
    format!("{} MiB", bytes >> 20)
}

/// What the arguments say together.
fn options(matches: &ArgMatches) -> Result<Options, String> {
    let path = |name| matches.get_one::<PathBuf>(name).cloned();
    let number = |name| matches.get_one::<u64>(name).copied();
    let processors = || thread::available_parallelism().map_or(1, |count| count.get());
    let shards = number("shards").map_or_else(processors, |shards| shards as usize);
    let options = Options {
        tcp: matches.get_one("tcp").cloned(),
        unix: path("unix"),
        shm: path("shm"),
        shards: shards.min(MAX_SHARDS),
        is_pinned: matches.get_flag("pin"),
        spin: number("spin").map_or_else(|| Config::default().spin(), protocol::spin),
        bulk: number("max-bulk").map_or(DEFAULT_BULK, |bulk| bulk as usize),
        output: [
            number("max-output").map_or(DEFAULT_OUTPUT, |bytes| bytes as usize),
            number("max-output-all").map_or(DEFAULT_OUTPUT_ALL, |bytes| bytes as usize),
        ],
        is_debug_allowed: matches.get_flag("debug"),
    };
    if options.shards > 1 && options.shm.is_none() {
        return Err("more than one shard needs --shm, by which the shards reach each other".into());
    }
    Ok(options)
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
    // Without a socket for others, the shard still has one, which nobody is told of.
    let private = || std::env::temp_dir().join(format!("kv-server-{}.sock", std::process::id()));
    let settings = Settings {
        limits,
        shm: options.shm.clone().unwrap_or_else(private),
        config: session_config(options.spin)?,
        is_debug_allowed: options.is_debug_allowed,
        output: [options.output[0], options.output[1] / options.shards],
        started: Instant::now(),
    };
    // Names are looked up here, before there is an executor that would have to wait for that.
    let tcp = options.tcp.as_ref().map(HostPort::resolve_to_listen).transpose()?;
    let mut listeners = Listeners::reserve(tcp.as_deref(), options.unix.as_deref())?;
    let server = start(&settings, &mut listeners, options)?;
    listeners.start()?;

    let stopper = server.stopper();
    let stopping = thread::Builder::new().spawn(move || {
        if let Err(errno) = signals.wait() {
            tell(format_args!("cannot wait for signals: {errno}"));
        }
        stopper.stop(GRACE);
    });
    stopping.map_err(|error| {
        let what = "start the thread that waits for signals";
        let remedy = "raise the limit of processes with `ulimit -u`, or what limits threads here";
        io::Error::new(error.kind(), format!("{what}: {error}; {remedy}"))
    })?;

    if let Some(address) = listeners.tcp_address() {
        tell(format_args!("listening on tcp {address}"));
    }
    if let Some(path) = &options.unix {
        tell(format_args!("listening on unix {}", path.display()));
    }
    if let Some(path) = &options.shm {
        tell(format_args!("listening on shm {} ({} shards)", path.display(), options.shards));
    }
    tell(format_args!("ready"));
    Ok(server.join()?)
}

/// Starts a shard on each core, and the listeners of each.
fn start(settings: &Settings, listeners: &mut Listeners, options: &Options) -> io::Result<Server> {
    let cores = if options.is_pinned { Cores::Count } else { Cores::Unpinned };
    let each: io::Result<Vec<_>> =
        (0..options.shards).map(|_| listeners.for_shard().map(Some)).collect();
    // Each shard takes its own, once.
    let each = Arc::new(Mutex::new(each?));
    let settings = settings.clone();
    let server = Server::builder(&settings.shm)
        .cores(cores(options.shards))
        .config(settings.config.clone())
        .start(move |core: Core| {
            let (settings, each) = (settings.clone(), Arc::clone(&each));
            async move {
                let listeners = each.lock().ok().and_then(|mut each| each[core.index()].take());
                let listeners =
                    listeners.ok_or_else(|| io::Error::other("its listeners are gone"))?;
                let (shard, tasks) = shard::start_shard(core.clone(), settings, listeners)?;
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
