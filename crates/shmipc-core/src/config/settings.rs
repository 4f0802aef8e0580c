// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a configuration holds.

use std::path::PathBuf;
use std::time::Duration;

use super::{
    AllowedPeers, Limits, MemoryKind, ProtocolVersion, SliceClass, SocketFile, Spin, Wakeup,
};

/// What a [`Config`](super::Config) holds, for front ends. Checked: only a
/// [`ConfigBuilder`](super::ConfigBuilder) makes them.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The kind of memory that a client creates.
    pub memory: MemoryKind,
    /// The highest version that a client speaks.
    pub protocol: ProtocolVersion,
    /// Whether a client goes back to version 3 when version 4 gets no answer.
    pub falls_back: bool,
    /// The highest version that a server takes.
    pub max_accepted_protocol: ProtocolVersion,
    /// How a client asks to be woken, and wakes its servers.
    pub wakeup: Wakeup,
    /// Whether lists that each side has for itself may be agreed on.
    pub owned_free_lists: bool,
    /// The shortest interval of polling that a server grants.
    pub min_polling_interval: Duration,
    /// Events in each of the two queues.
    pub queue_capacity: u32,
    /// Bytes of buffer memory that a client creates for a session.
    pub buffer_size: u32,
    /// The size classes of the buffer memory, smallest first.
    pub slice_classes: Vec<SliceClass>,
    /// What the names of shared-memory files start with.
    pub path_prefix: PathBuf,
    /// How long a session polls after its last traffic.
    pub spin: Spin,
    /// How often the kernel's rings are looked at while a session polls.
    pub reactor_interval: Duration,
    /// How long a sender waits for a free slice before it uses the socket.
    pub fallback_after: Duration,
    /// Who can connect to a Unix socket.
    pub socket_file: SocketFile,
    /// Whether it is checked that the memory is there before it is mapped.
    pub checks_memory: bool,
    /// Who may be at the other end.
    pub allowed_peers: AllowedPeers,
    /// What a peer can make this side spend.
    pub limits: Limits,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            memory: MemoryKind::Memfd,
            protocol: ProtocolVersion::V3,
            falls_back: true,
            max_accepted_protocol: ProtocolVersion::HIGHEST,
            wakeup: Wakeup::Socket,
            owned_free_lists: true,
            min_polling_interval: Wakeup::SHORTEST_INTERVAL,
            queue_capacity: 8192,
            buffer_size: 32 << 20,
            slice_classes: vec![
                SliceClass::new(8192 - 20, 50),
                SliceClass::new(32768 - 20, 30),
                SliceClass::new(131072 - 20, 20),
            ],
            path_prefix: PathBuf::from("/dev/shm/shmipc"),
            spin: Spin::For(Duration::from_micros(100)),
            reactor_interval: Duration::from_micros(250),
            fallback_after: Duration::from_millis(1),
            socket_file: SocketFile { mode: 0o600, user: None, group: None },
            checks_memory: true,
            allowed_peers: AllowedPeers::SameUser,
            limits: Limits::default(),
        }
    }
}

impl Settings {
    /// Longer than a year is for ever, and clocks do not reach as far as the longest durations.
    pub(super) fn cap_durations(&mut self) {
        const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);
        if let Spin::For(budget) = &mut self.spin {
            *budget = LONGEST.min(*budget);
        }
        let Limits { stall, handshake_timeout, close_timeout, .. } = &mut self.limits;
        let stall = stall.iter_mut();
        let others = [
            handshake_timeout,
            close_timeout,
            &mut self.fallback_after,
            &mut self.reactor_interval,
        ];
        for duration in stall.chain(others) {
            *duration = LONGEST.min(*duration);
        }
    }
}
