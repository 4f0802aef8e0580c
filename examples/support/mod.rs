//! What `echo_server`, `echo_client` and `proxy` share: addresses, the command line, an executor,
//! reports.

pub(crate) mod address;
pub(crate) mod cli;
pub(crate) mod socket_file;
pub(crate) mod unix_socket;
mod wakeup;

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Arg, ArgGroup, ArgMatches, Command, value_parser};
use glommio::{LocalExecutorBuilder, Placement};
use serde_json::{Value, json};
use shmipc_glommio::{Cores, Session, preflight};

use address::HostPort;

/// Where the echo server listens.
#[derive(Debug, Clone)]
pub(crate) enum Address {
    Unix(PathBuf),
    Tcp(HostPort),
}

/// An [`Address`] whose host has been found.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    Unix(PathBuf),
    /// Tried in this order.
    Tcp(Vec<SocketAddr>),
}

impl Address {
    /// Adds `--socket PATH` and `--tcp HOST:PORT`, one of which is needed.
    pub(crate) fn add_to(command: Command) -> Command {
        let (socket, tcp): (Arg, Arg) = (
            cli::option_once("socket", "PATH", "A Unix socket; @NAME is an abstract one")
                .value_parser(value_parser!(PathBuf)),
            cli::option_once("tcp", "HOST:PORT", "TCP on loopback")
                .value_parser(value_parser!(HostPort)),
        );
        let group = ArgGroup::new("address").args(["socket", "tcp"]).required(true);
        command.arg(socket).arg(tcp).group(group)
    }

    pub(crate) fn take(matches: &ArgMatches) -> Self {
        match (matches.get_one::<PathBuf>("socket"), matches.get_one::<HostPort>("tcp")) {
            (Some(path), _) => Self::Unix(path.clone()),
            (None, Some(host)) => Self::Tcp(host.clone()),
            (None, None) => unreachable!("one of them is required"),
        }
    }

    /// Finds the host, to connect to it. Not for an executor's thread: it may wait.
    pub(crate) fn resolve(&self) -> io::Result<Place> {
        match self {
            Self::Unix(path) => Ok(Place::Unix(path.clone())),
            Self::Tcp(host) => host.resolve().map(Place::Tcp),
        }
    }

    /// The same, to listen there.
    pub(crate) fn resolve_to_listen(&self) -> io::Result<Place> {
        match self {
            Self::Unix(path) => Ok(Place::Unix(path.clone())),
            Self::Tcp(host) => host.resolve_to_listen().map(Place::Tcp),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(formatter),
            Self::Tcp(host) => host.fmt(formatter),
        }
    }
}

/// Runs a future on a glommio executor of this thread.
///
/// Not pinned: which processors to use is for the caller to say, with `taskset` for instance.
pub(crate) fn run<T>(future: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    preflight(&Cores::Unpinned(1)).map_err(|error| error.to_string())?;
    let executor = LocalExecutorBuilder::new(Placement::Unbound)
        .make()
        .map_err(|error| format!("no executor: {error}"))?;
    executor.run(future)
}

/// Puts a session's counters, and the free slices of its pool, behind what an object has already.
pub(crate) fn with_report(mut object: Value, session: &Session) -> Value {
    let stats = session.stats();
    let usage = session.pool_usage();
    // A slice in this side's magazine is as free as one in the list.
    let free: Vec<_> = usage
        .lists
        .iter()
        .map(|list| json!([i64::from(list.free) + i64::from(list.magazine), list.total]))
        .collect();
    let mut report = json!({
        "protocol": session.protocol().as_u8(),
        "wakeup": wakeup::name(session.wakeup()),
        "single_popper_lists": session.has_single_popper_lists(),
        "pool_full": usage.is_full(),
        "free": free,
        "held": usage.held,
        "events_sent": stats.events_sent,
        "events_received": stats.events_received,
        "bytes_sent": stats.bytes_sent,
        "bytes_received": stats.bytes_received,
        "sync_sent": stats.sync_events_sent,
        "sync_received": stats.sync_events_received,
        "fallback_sent": stats.fallback_sent,
        "fallback_received": stats.fallback_received,
        "queue_full": stats.queue_full,
        "pool_empty": stats.pool_empty,
        "sleeps": stats.sleeps,
    });
    if let (Some(object), Some(report)) = (object.as_object_mut(), report.as_object_mut()) {
        object.append(report);
    }
    object
}
