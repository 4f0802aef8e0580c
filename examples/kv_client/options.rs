// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use lexopt::ValueExt;
use shmipc_glommio::{Config, ProtocolVersion, Spin, Wakeup};

use crate::protocol;

pub(crate) const USAGE: &str = "\
usage: kv_client --shm PATH | --unix PATH | --tcp ADDRESS [OPTION]…
  --requests N       requests that are measured, on all connections together (100000)
  --value BYTES      length of every value (64)
  --depth N          requests of one connection that are under way at most (1)
  --connections N    connections; over shared memory, each has a stream to every shard (1)
  --keys N           keys of each connection (1000)
  --reads PERCENT    how many of the requests are GET, the others are SET (80)
  --rate R           requests per second in all, sent when they are due (as many as answered)
  --tick MICROS      requests of a rate come together, each time that so much has passed; with 0
                     each comes at its own time, as far as timers can (1000, as with wrk2)
  --threads N        executors that the connections are dealt to (1)
  --cores LIST       processors for the executors, as 0,2 or 0-3 (any)
  --spin MICROS      how long a session polls after its last traffic (the library's default)
  --protocol 3|4     version of the protocol, over shared memory (4, or else what the server has)
  --wakeup socket|eventfd|polling:MICROS
                     how the sides wake each other; with version 3 by socket only (eventfd)
  --pool BYTES       buffer memory of a session (the library's default)
  --seed N           which operations, keys and values (1)
  --warmup N         requests before those that are measured (0)
  --timeout SECONDS  give up when nothing was answered for that long (60)";

/// As long as Redis takes them.
const LONGEST_VALUE: u64 = 512 << 20;
const MOST_CONNECTIONS: u64 = 4096;
const MOST_KEYS: u64 = 1 << 24;
const DEEPEST: u64 = 1 << 16;
const MOST_THREADS: u64 = 256;
const LONGEST_TIMEOUT: u64 = 24 * 3600;

/// Where the store listens, and what carries the requests.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    Shm(PathBuf),
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl Target {
    pub(crate) fn transport(&self) -> &'static str {
        match self {
            Self::Shm(_) => "shm",
            Self::Unix(_) => "unix",
            Self::Tcp(_) => "tcp",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shm(path) | Self::Unix(path) => path.display().fmt(formatter),
            Self::Tcp(address) => address.fmt(formatter),
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
    /// `None`: help was asked for.
    pub(crate) fn parse() -> Result<Option<Self>, lexopt::Error> {
        use lexopt::prelude::*;
        let mut target = None;
        let mut options = Self::defaults();
        let mut parser = lexopt::Parser::from_env();
        while let Some(argument) = parser.next()? {
            match argument {
                Long("shm") if target.is_none() => {
                    target = Some(Target::Shm(parser.value()?.into()));
                }
                Long("unix") if target.is_none() => {
                    target = Some(Target::Unix(parser.value()?.into()));
                }
                Long("tcp") if target.is_none() => {
                    target = Some(Target::Tcp(parser.value()?.parse()?));
                }
                Long("help") => return Ok(None),
                Long(name) => {
                    let name = name.to_owned();
                    options.take(&name, &mut parser)?;
                }
                _ => return Err(argument.unexpected()),
            }
        }
        options.target = target.ok_or("--shm, --unix or --tcp is needed")?;
        options.check()?;
        Ok(Some(options))
    }

    fn defaults() -> Self {
        Self {
            target: Target::Unix(PathBuf::new()),
            requests: 100_000,
            value: 64,
            depth: 1,
            connections: 1,
            keys: 1000,
            reads: 80,
            rate: None,
            tick: Duration::from_millis(1),
            threads: 1,
            cores: Vec::new(),
            spin: None,
            version: ProtocolVersion::V4,
            wakeup: None,
            pool: None,
            seed: 1,
            warmup: 0,
            timeout: Duration::from_secs(60),
        }
    }

    /// Takes the value of an option.
    fn take(&mut self, name: &str, parser: &mut lexopt::Parser) -> Result<(), lexopt::Error> {
        let mut number = |low, high| -> Result<u64, lexopt::Error> {
            parser.value()?.parse_with(|text| within(text, low, high))
        };
        match name {
            "requests" => self.requests = number(1, u64::MAX / 2)?,
            "value" => self.value = number(0, LONGEST_VALUE)? as usize,
            "depth" => self.depth = number(1, DEEPEST)? as usize,
            "connections" => self.connections = number(1, MOST_CONNECTIONS)? as usize,
            "keys" => self.keys = number(1, MOST_KEYS)? as u32,
            "reads" => self.reads = number(0, 100)? as u32,
            "rate" => self.rate = Some(parser.value()?.parse_with(rate)?),
            "tick" => self.tick = Duration::from_micros(number(0, 1_000_000)?),
            "threads" => self.threads = number(1, MOST_THREADS)? as usize,
            "cores" => self.cores = parser.value()?.parse_with(cores)?,
            "spin" => {
                self.spin = Some(match number(0, 1_000_000_000)? {
                    0 => Spin::Never,
                    micros => Spin::For(Duration::from_micros(micros)),
                });
            }
            "protocol" => self.version = parser.value()?.parse_with(protocol::protocol_version)?,
            "wakeup" => self.wakeup = Some(parser.value()?.parse_with(protocol::wakeup)?),
            "pool" => self.pool = Some(number(1, u64::from(u32::MAX))?),
            "seed" => self.seed = number(0, u64::MAX)?,
            "warmup" => self.warmup = number(0, u64::MAX / 2)?,
            "timeout" => self.timeout = Duration::from_secs(number(1, LONGEST_TIMEOUT)?),
            _ => return Err(lexopt::Error::UnexpectedOption(format!("--{name}"))),
        }
        Ok(())
    }

    fn check(&mut self) -> Result<(), lexopt::Error> {
        if self.threads > self.connections {
            return Err("--threads is more than --connections".into());
        }
        if !self.cores.is_empty() && self.cores.len() < self.threads {
            return Err("--cores names fewer processors than there are --threads".into());
        }
        self.config().map(drop).map_err(|error| lexopt::Error::Custom(error.into()))
    }

    /// How sessions are set up.
    pub(crate) fn config(&self) -> Result<Config, shmipc_glommio::ConfigError> {
        let by_version = match self.version {
            ProtocolVersion::V4 => Wakeup::EventFd,
            _ => Wakeup::Socket,
        };
        let wakeup = self.wakeup.unwrap_or(by_version);
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

fn within(text: &str, low: u64, high: u64) -> Result<u64, String> {
    match text.parse() {
        Ok(number) if (low..=high).contains(&number) => Ok(number),
        _ => Err(format!("expected a number from {low} to {high}")),
    }
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
