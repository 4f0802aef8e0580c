// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where a client comes from, for what is told about it.

use std::cell::Cell;
use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use shmipc_glommio::PeerCredentials;

use crate::cli::tell;

/// Where a client comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Origin {
    Tcp(Option<SocketAddr>),
    Unix,
    /// A session over shared memory.
    Session(PeerCredentials),
}

impl Origin {
    /// Whether it is another shard of this process.
    pub(crate) fn is_own_shard(&self) -> bool {
        matches!(self, Self::Session(peer) if peer.pid == Some(std::process::id()))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(Some(address)) => write!(formatter, "tcp {address}"),
            Self::Tcp(None) => formatter.write_str("tcp"),
            Self::Unix => formatter.write_str("the Unix socket"),
            Self::Session(peer) => match peer.pid {
                Some(pid) => write!(formatter, "shared memory, process {pid}"),
                None => formatter.write_str("shared memory"),
            },
        }
    }
}

/// So many lines are told of clients within this time; then it is said how many were not.
const LINES: u64 = 10;
const INTERVAL: Duration = Duration::from_secs(60);

/// Tells about clients that misbehave, but not so often that they fill a disk.
#[derive(Debug)]
pub(crate) struct Complaints {
    since: Cell<Instant>,
    count: Cell<u64>,
}

impl Default for Complaints {
    fn default() -> Self {
        Self { since: Cell::new(Instant::now()), count: Cell::new(0) }
    }
}

impl Complaints {
    pub(crate) fn tell(&self, origin: &Origin, what: fmt::Arguments<'_>) {
        if self.may_tell(Instant::now()) {
            tell(format_args!("client from {origin}: {what}"));
        }
    }

    fn may_tell(&self, now: Instant) -> bool {
        if now.saturating_duration_since(self.since.get()) >= INTERVAL {
            let silent = self.count.get().saturating_sub(LINES);
            if silent > 0 {
                tell(format_args!("{silent} more lines like those before were not told"));
            }
            self.since.set(now);
            self.count.set(0);
        }
        self.count.set(self.count.get() + 1);
        self.count.get() <= LINES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_bounded_in_time() {
        let complaints = Complaints::default();
        let start = Instant::now();
        let told = (0..100).filter(|_| complaints.may_tell(start)).count();
        assert_eq!(told as u64, LINES);
        assert!(complaints.may_tell(start + 2 * INTERVAL));
    }
}
