//! What `echo_server` and `echo_client` share: addresses, the command line, an executor, reports.

mod wakeup;

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use glommio::{LocalExecutorBuilder, Placement};
use serde_json::{Value, json};
use shmipc_glommio::Session;

/// The exit status of a command that was called wrongly.
const BAD_ARGUMENTS: u8 = 2;

/// Where the server listens.
#[derive(Debug, Clone)]
pub(crate) enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl Address {
    /// Takes `--socket PATH` or `--tcp ADDRESS`, whose name has just been parsed.
    pub(crate) fn parse(option: &str, parser: &mut lexopt::Parser) -> Result<Self, lexopt::Error> {
        use lexopt::ValueExt;
        let value = parser.value()?;
        match option {
            "socket" => Ok(Self::Unix(value.into())),
            _ => Ok(Self::Tcp(value.parse()?)),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(formatter),
            Self::Tcp(address) => address.fmt(formatter),
        }
    }
}

/// Says what was wrong with the arguments, and how to call the command.
pub(crate) fn refuse_arguments(error: &dyn fmt::Display, usage: &str) -> ExitCode {
    eprintln!("{error}\n{usage}");
    ExitCode::from(BAD_ARGUMENTS)
}

/// Runs a future on a glommio executor of this thread.
///
/// Not pinned: which processors to use is for the caller to say, with `taskset` for instance.
pub(crate) fn run<T>(future: impl Future<Output = Result<T, String>>) -> Result<T, String> {
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
