// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a simulated session is like, by its seed.

use std::time::Duration;

use crate::config::{ProtocolVersion, Wakeup};
use crate::proto::Negotiated;
use crate::proto::session::SessionLimits;

/// Numbers that depend on nothing but a seed.
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        // No state is 0, and seeds next to each other begin differently.
        Self((seed ^ 0x5851_f42d_4c95_7f2d).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// A number below `end`.
    pub(super) fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    pub(super) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// Which sides know of the extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Knows {
    /// Both, before the first event.
    Both,
    /// Both, and the server maps the memory later than the client begins.
    Late,
    /// Neither.
    Neither,
}

/// A session and its program.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    pub(super) negotiated: Negotiated,
    pub(super) knows: Knows,
    /// The side that behaves as other implementations do.
    pub(super) foreign: Option<usize>,
    pub(super) queue_capacity: i64,
    pub(super) classes: [(usize, usize); 2],
    pub(super) lists: usize,
    pub(super) pipe_capacity: usize,
    pub(super) limits: SessionLimits,
    pub(super) fallback_after: Duration,
    pub(super) close_timeout: Duration,
    pub(super) longest: usize,
    /// How many steps there are before the finale, and how many streams are opened at most.
    pub(super) steps: usize,
    pub(super) streams: usize,
    /// At which step a side closes the session, the connection is cut, the server is drained.
    pub(super) close_at: Option<(usize, usize)>,
    pub(super) cut_at: Option<usize>,
    pub(super) drain_at: Option<usize>,
    /// How often something is in the way, of a hundred.
    pub(super) trouble: usize,
}

impl Setup {
    pub(super) fn new(rng: &mut Rng) -> Self {
        let knows = rng.pick(&[Knows::Both, Knows::Both, Knows::Late, Knows::Neither]);
        let version = match knows {
            Knows::Late => ProtocolVersion::V2,
            _ => rng.pick(&[ProtocolVersion::V3, ProtocolVersion::V4, ProtocolVersion::V4]),
        };
        let polling = Wakeup::Polling(Duration::from_micros(100));
        let wakeup = match version {
            ProtocolVersion::V4 => rng.pick(&[Wakeup::Socket, Wakeup::EventFd, polling]),
            _ => Wakeup::Socket,
        };
        let is_foreign = knows == Knows::Neither && rng.chance(70);
        let foreign = if is_foreign { Some(rng.below(2)) } else { None };
        let steps = rng.pick(&[60, 300, 300, 1000, 3000]);
        let at = |rng: &mut Rng, percent| rng.chance(percent).then(|| rng.below(steps));
        let limits = SessionLimits {
            streams: rng.pick(&[3, 1000, 1000, 1000]),
            unread_fallback_bytes: rng.pick(&[4 << 10, 16 << 10, 64 << 10]),
            stream_window: rng.pick(&[4 << 10, 16 << 10]),
            stall: None,
        };
        Self {
            negotiated: Negotiated { wakeup, ..Negotiated::plain(version) },
            knows,
            foreign,
            queue_capacity: rng.pick(&[1, 2, 4, 16, 64]),
            classes: [(64, rng.pick(&[1, 4, 16, 64])), (512, rng.pick(&[1, 3, 12, 64]))],
            lists: rng.pick(&[1, 2]),
            pipe_capacity: rng.pick(&[64, 600, 4096, 20_000]),
            limits,
            fallback_after: Duration::from_micros(rng.pick(&[0, 100, 1000, 3000])),
            close_timeout: Duration::from_millis(rng.pick(&[20, 200])),
            longest: rng.pick(&[60, 500, 2000, 6000]),
            steps,
            streams: rng.pick(&[1, 3, 10, 40]),
            close_at: at(rng, 30).map(|step| (step, rng.below(2))),
            cut_at: at(rng, 10),
            drain_at: at(rng, 10),
            trouble: rng.pick(&[0, 2, 5, 15]),
        }
    }

    /// Whether a server may answer a new stream with its end.
    pub(super) fn may_refuse(&self) -> bool {
        self.limits.streams < 1000 || self.drain_at.is_some()
    }
}
