// SPDX-License-Identifier: MIT OR Apache-2.0
//! What sessions count while it is measured, all of them together.

use shmipc_glommio::{ProtocolVersion, Session, SessionStats, Wakeup};

/// One that is reported, and its name.
type Reported = (&'static str, fn(&SessionStats) -> u64);

const REPORTED: [Reported; 6] = [
    ("sync_events_sent", |stats| stats.sync_events_sent),
    ("sync_events_received", |stats| stats.sync_events_received),
    ("fallback_sent", |stats| stats.fallback_sent),
    ("fallback_received", |stats| stats.fallback_received),
    ("pool_empty", |stats| stats.pool_empty),
    ("queue_full", |stats| stats.queue_full),
];

#[derive(Debug, Clone, Copy)]
pub(crate) struct SessionTotals {
    /// How many shards each connection reaches.
    pub(crate) shards: usize,
    /// What was agreed on with them.
    pub(crate) agreement: Option<(ProtocolVersion, Wakeup)>,
    sums: [u64; REPORTED.len()],
}

impl SessionTotals {
    /// What the sessions of an executor, one to each shard, have counted so far.
    pub(crate) fn of(sessions: &[Session]) -> Self {
        let stats: Vec<_> = sessions.iter().map(Session::stats).collect();
        let sums = REPORTED.map(|(_, count)| stats.iter().map(count).sum());
        let agreement = sessions.first().map(|session| (session.protocol(), session.wakeup()));
        Self { shards: sessions.len(), agreement, sums }
    }

    pub(crate) fn since(mut self, before: &Self) -> Self {
        for (sum, before) in self.sums.iter_mut().zip(before.sums) {
            *sum -= before;
        }
        self
    }

    /// Together with what the sessions of another executor, to the same shards, have counted.
    pub(crate) fn with(mut self, other: &Self) -> Self {
        for (sum, more) in self.sums.iter_mut().zip(other.sums) {
            *sum += more;
        }
        self
    }

    pub(crate) fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
        REPORTED.map(|(name, _)| name).into_iter().zip(self.sums)
    }
}
