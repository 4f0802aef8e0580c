// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a poller and its peer share one processor.

use std::time::{Duration, Instant};

/// Gives the processor away when the peer needs it to answer.
///
/// Two processes that poll on the same processor wait for each other until the kernel takes it
/// from one of them, which is after milliseconds. Nobody tells a process that it shares its
/// processor with its peer; but when it gives way, somebody else runs for a while, and then there
/// is an answer, that is what it looks like.
#[derive(Default)]
pub(crate) struct CpuSharing {
    idle_passes: u32,
    /// How sure it is that the peer is on this processor.
    evidence: u32,
}

impl CpuSharing {
    /// How many passes find nothing before giving way is tried: longer than a peer on a processor
    /// of its own takes to answer.
    const PATIENCE: u32 = 64;
    /// How many do when the peer is on this processor.
    const PATIENCE_WHEN_SHARED: u32 = 2;
    /// A system call that takes longer than this has let somebody else run.
    const SOMEBODY_RAN: Duration = Duration::from_nanos(1200);
    const MOST_EVIDENCE: u32 = 16;

    pub(crate) fn after_traffic(&mut self) {
        self.idle_passes = 0;
    }

    /// `has_events`: whether something has come by now.
    pub(crate) fn after_idle_pass(&mut self, has_events: impl FnOnce() -> bool) {
        self.idle_passes += 1;
        let shared = self.evidence > 0;
        let patience = if shared { Self::PATIENCE_WHEN_SHARED } else { Self::PATIENCE };
        if self.idle_passes < patience {
            return;
        }
        self.idle_passes = 0;
        let began = Instant::now();
        std::thread::yield_now();
        let somebody_ran = began.elapsed() > Self::SOMEBODY_RAN;
        if somebody_ran && has_events() {
            self.evidence = (self.evidence + 4).min(Self::MOST_EVIDENCE);
        } else {
            self.evidence = self.evidence.saturating_sub(1);
        }
    }
}
