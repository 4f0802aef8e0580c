// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgGroup, ArgMatches, Command, value_parser};
use shmipc_glommio::{Config, ProtocolVersion, Spin, Wakeup};

use crate::address::HostPort;
use crate::{cli, protocol, wakeup};

/// As long as Redis takes them.
const MAX_VALUE: u64 = 512 << 20;
const MAX_CONNECTIONS: u64 = 4096;
const MAX_KEYS: u64 = 1 << 24;
const MAX_DEPTH: u64 = 1 << 16;
const MAX_THREADS: u64 = 256;
const MAX_TIMEOUT: u64 = 24 * 3600;
/// In microseconds.
const MAX_SPIN: u64 = 1_000_000_000;
const DEFAULT_VERSION: ProtocolVersion = ProtocolVersion::V4;

/// Where the store listens, and what carries the requests.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    Shm(PathBuf),
    Unix(PathBuf),
    /// The host, and its addresses once it has been [found](Self::resolve).
    Tcp(HostPort, Vec<SocketAddr>),
}

impl Target {
    /// Finds the host. Not for an executor's thread: it may wait.
    pub(crate) fn resolve(&mut self) -> io::Result<()> {
        if let Self::Tcp(host, addresses) = self {
            *addresses = host.resolve()?;
        }
        Ok(())
    }

    pub(crate) fn transport(&self) -> &'static str {
        match self {
            Self::Shm(_) => "shm",
            Self::Unix(_) => "unix",
            Self::Tcp(..) => "tcp",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shm(path) | Self::Unix(path) => path.display().fmt(formatter),
            Self::Tcp(host, _) => host.fmt(formatter),
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) target: Target,
    pub(crate) requests: u64,
    pub(crate) value: usize,
    pub(crate) depth: usize,
    pub(crate) connections: usize,
    pub(crate) keys: u32,
    pub(crate) reads: u32,
    pub(crate) rate: Option<f64>,
    pub(crate) tick: Duration,
    pub(crate) threads: usize,
    /// One for each executor, or empty: then they are not pinned.
    pub(crate) cores: Vec<usize>,
    pub(crate) spin: Option<Spin>,
    pub(crate) version: ProtocolVersion,
    /// If it was asked for.
    pub(crate) wakeup: Option<Wakeup>,
    pub(crate) pool: Option<u64>,
    pub(crate) seed: u64,
    pub(crate) warmup: u64,
    pub(crate) timeout: Duration,
}

impl Options {
    /// Reads the command line.
    ///
    /// # Errors
    ///
    /// The status to end with. The user has been told.
    pub(crate) fn parse() -> Result<Self, ExitCode> {
        cli::read(command(), Self::take)
    }

    /// What the arguments say together.
    fn take(matches: &ArgMatches) -> Result<Self, String> {
        let number = |name| matches.get_one::<u64>(name).copied();
        let count = |name| number(name).unwrap_or_default();
        let path = |name| matches.get_one::<PathBuf>(name).cloned();
        let target = match (path("shm"), path("unix"), matches.get_one::<HostPort>("tcp")) {
            (Some(path), _, _) => Target::Shm(path),
            (_, Some(path), _) => Target::Unix(path),
            (_, _, Some(host)) => Target::Tcp(host.clone(), Vec::new()),
            _ => return Err("--shm, --unix or --tcp is needed".into()),
        };
        let options = Self {
            target,
            requests: count("requests"),
            value: count("value") as usize,
            depth: count("depth") as usize,
            connections: count("connections") as usize,
            keys: count("keys") as u32,
            reads: count("reads") as u32,
            rate: matches.get_one("rate").copied(),
            tick: Duration::from_micros(count("tick")),
            threads: count("threads") as usize,
            cores: matches.get_one("cores").cloned().unwrap_or_default(),
            spin: number("spin").map(protocol::spin),
            version: matches.get_one("protocol").copied().unwrap_or(DEFAULT_VERSION),
            wakeup: matches.get_one("wakeup").copied(),
            pool: number("pool"),
            seed: count("seed"),
            warmup: count("warmup"),
            timeout: Duration::from_secs(count("timeout")),
        };
        if options.threads > options.connections {
            return Err("--threads is more than --connections".into());
        }
        if !options.cores.is_empty() && options.cores.len() < options.threads {
            return Err("--cores names fewer processors than there are --threads".into());
        }
        options.config().map_err(|error| error.to_string())?;
        Ok(options)
    }

    /// How sessions are set up.
    pub(crate) fn config(&self) -> Result<Config, shmipc_glommio::ConfigError> {
        let wakeup = self.wakeup.unwrap_or_else(|| default_wakeup(self.version));
        let mut builder = Config::builder().protocol(self.version).wakeup(wakeup);
        if let Some(spin) = self.spin {
            builder = builder.spin(spin);
        }
        if let Some(pool) = self.pool {
            builder = builder.buffer_size(pool);
        }
        builder.build()
    }

    /// Of so many requests on all connections, those of one connection.
    pub(crate) fn share(&self, requests: u64, connection: usize) -> u64 {
        let connections = self.connections as u64;
        requests / connections + u64::from((connection as u64) < requests % connections)
    }
}

fn default_wakeup(version: ProtocolVersion) -> Wakeup {
    match version {
        ProtocolVersion::V4 => Wakeup::EventFd,
        _ => Wakeup::Socket,
    }
}

fn command() -> Command {
    let target = |name, help| cli::option_once(name, "PATH", help);
    let path = || value_parser!(PathBuf);
    let command = cli::command(
        "kv_client",
        "A load generator for a key-value store that speaks RESP2, the protocol of Redis",
    )
    .arg(
        target("shm", "The store's socket for shared memory; @NAME is abstract")
            .value_parser(path()),
    )
    .arg(target("unix", "The store's Unix socket; @NAME is abstract").value_parser(path()))
    .arg(
        cli::option_once("tcp", "HOST:PORT", "The store's address")
            .value_parser(value_parser!(HostPort)),
    )
    .group(ArgGroup::new("target").args(["shm", "unix", "tcp"]).required(true));
    command.args(numbers()).args(others())
}

/// The options that are numbers with a default.
fn numbers() -> Vec<Arg> {
    let number = |name, value, default, range: RangeInclusive<u64>, help| {
        let option = cli::option(name, value, help).default_value(default);
        option.value_parser(value_parser!(u64).range(range))
    };
    let most = u64::MAX / 2;
    vec![
        number(
            "requests",
            "N",
            "100000",
            1..=most,
            "Requests that are measured, on all connections together",
        ),
        number("value", "BYTES", "64", 0..=MAX_VALUE, "Length of every value"),
        number(
            "depth",
            "N",
            "1",
            1..=MAX_DEPTH,
            "Requests of one connection that are under way at most",
        ),
        number(
            "connections",
            "N",
            "1",
            1..=MAX_CONNECTIONS,
            "Connections; over shared memory, each has a stream to every shard",
        ),
        number("keys", "N", "1000", 1..=MAX_KEYS, "Keys of each connection"),
        number(
            "reads",
            "PERCENT",
            "80",
            0..=100,
            "How many of the requests are GET, the others are SET",
        ),
        number(
            "tick",
            "MICROS",
            "1000",
            0..=1_000_000,
            "Requests of a rate come together, each time that so much has passed; \
                with 0 each comes at its own time, as far as timers can",
        ),
        number("threads", "N", "1", 1..=MAX_THREADS, "Executors that the connections are dealt to"),
        number("seed", "N", "1", 0..=u64::MAX, "Which operations, keys and values"),
        number("warmup", "N", "0", 0..=most, "Requests before those that are measured"),
        number(
            "timeout",
            "SECONDS",
            "60",
            1..=MAX_TIMEOUT,
            "Give up when nothing was answered for that long",
        ),
    ]
}

fn others() -> [Arg; 6] {
    let library = Config::default();
    [
        cli::option(
            "rate",
            "R",
            "Requests per second in all, sent when they are due [default: as many as answered]",
        )
        .value_parser(rate),
        cli::option("cores", "LIST", "Processors for the executors, as 0,2 or 0-3 [default: any]")
            .value_parser(cores),
        cli::option_with_default(
            "spin",
            "MICROS",
            "How long a session polls after its last traffic",
            protocol::spin_micros(library.spin()),
        )
        .value_parser(value_parser!(u64).range(..=MAX_SPIN)),
        cli::option_with_default(
            "protocol",
            "3|4",
            "Version of the protocol of sessions",
            format_args!("{}, or else what the server has", DEFAULT_VERSION.as_u8()),
        )
        .value_parser(protocol::protocol_version),
        cli::option_with_default(
            "wakeup",
            "socket|eventfd|polling:MICROS",
            "How the sides wake each other; version 3 by socket only",
            wakeup::name(default_wakeup(DEFAULT_VERSION)),
        )
        .value_parser(protocol::wakeup),
        cli::option_with_default(
            "pool",
            "BYTES",
            "Buffer memory of a session",
            library.buffer_size(),
        )
        .value_parser(value_parser!(u64).range(1..=u64::from(u32::MAX))),
    ]
}

fn rate(text: &str) -> Result<f64, &'static str> {
    match text.parse() {
        Ok(rate) if (0.01..=1e9).contains(&rate) => Ok(rate),
        _ => Err("expected requests per second, from 0.01 to 1000000000"),
    }
}

fn cores(text: &str) -> Result<Vec<usize>, &'static str> {
    const PROBLEM: &str = "expected numbers of processors, as 0,2 or 0-3";
    let number = |text: &str| text.parse().ok().filter(|&core: &usize| core < 4096).ok_or(PROBLEM);
    let mut cores = Vec::new();
    for part in text.split(',') {
        match part.split_once('-') {
            Some((first, last)) => cores.extend(number(first)?..=number(last)?),
            None => cores.push(number(part)?),
        }
    }
    Ok(cores)
}
