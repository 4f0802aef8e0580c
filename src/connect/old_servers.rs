// SPDX-License-Identifier: MIT OR Apache-2.0
//! Servers that have met the opening of version 4 with silence.
//!
//! shmipc-go neither answers that opening nor closes the connection
//! (`docs/protocol.md#falling-back-to-version-3`), so each attempt costs a wait. An address where
//! version 3 succeeded behind such a silence is remembered by its core for a minute, and version 3
//! is used there at once. No longer, and not beyond the socket file that was there, since the
//! server may have been slow that once, or may be replaced by one that knows version 4. A refusal
//! and a closed connection cost nothing and are not remembered.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::net::socket_file::socket_identity;

/// For how long a server is remembered.
const MEMORY: Duration = Duration::from_secs(60);
/// How many of them a core remembers; the oldest makes room.
const MAX_REMEMBERED: usize = 256;

/// Where a server is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    /// A socket file, and which file it was: device, inode and time of change.
    Unix(PathBuf, Option<(u64, u64, i64, i64)>),
    Tcp(SocketAddr),
}

impl Address {
    pub(crate) fn of_path(path: &Path) -> Self {
        Self::Unix(path.to_owned(), socket_identity(path))
    }
}

/// What one core remembers, oldest first.
struct OldServers(VecDeque<(Address, Instant)>);

thread_local! {
    static OLD_SERVERS: RefCell<OldServers> = const { RefCell::new(OldServers(VecDeque::new())) };
}

/// Whether the server at this address has not known version 4 within the last minute.
pub(crate) fn is_old(address: &Address) -> bool {
    OLD_SERVERS.with_borrow_mut(|servers| servers.has(address, Instant::now()))
}

/// Remembers that the server at this address does not know version 4.
pub(crate) fn remember(address: Address) {
    OLD_SERVERS.with_borrow_mut(|servers| servers.add(address, Instant::now()));
}

/// Forgets what is known of this address.
pub(crate) fn forget(address: &Address) {
    OLD_SERVERS.with_borrow_mut(|servers| servers.remove(address));
}

impl OldServers {
    fn has(&mut self, address: &Address, now: Instant) -> bool {
        self.0.retain(|(_, since)| now.saturating_duration_since(*since) < MEMORY);
        self.0.iter().any(|(server, _)| server == address)
    }

    fn add(&mut self, address: Address, now: Instant) {
        self.remove(&address);
        if self.0.len() >= MAX_REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back((address, now));
    }

    fn remove(&mut self, address: &Address) {
        self.0.retain(|(server, _)| server != address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> Address {
        Address::Tcp(SocketAddr::from(([127, 0, 0, 1], port)))
    }

    #[test]
    fn a_server_is_remembered_for_a_minute_and_being_used_does_not_prolong_it() {
        let (mut servers, began) = (OldServers(VecDeque::new()), Instant::now());
        servers.add(address(1), began);
        for second in [0, 10, 30, 59] {
            assert!(servers.has(&address(1), began + Duration::from_secs(second)), "{second}");
            assert!(!servers.has(&address(2), began + Duration::from_secs(second)), "{second}");
        }
        assert!(!servers.has(&address(1), began + Duration::from_secs(60)));
        assert!(servers.0.is_empty());
    }

    #[test]
    fn another_socket_file_at_the_path_is_another_server() {
        let mut servers = OldServers(VecDeque::new());
        let file = |inode| Address::Unix("/run/store.sock".into(), Some((1, inode, 0, 0)));
        let now = Instant::now();
        servers.add(file(7), now);
        assert!(servers.has(&file(7), now) && !servers.has(&file(8), now));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut servers = OldServers(VecDeque::new());
        let now = Instant::now();
        for port in 0..1000 {
            servers.add(address(port), now);
            servers.add(address(port), now);
        }
        assert_eq!(servers.0.len(), MAX_REMEMBERED);
        assert!(servers.has(&address(999), now) && !servers.has(&address(0), now));
    }
}
