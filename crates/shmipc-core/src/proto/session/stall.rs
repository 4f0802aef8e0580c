// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether a peer still takes events: one that was stopped, or hangs, tells nothing.

use std::cell::Cell;
use std::time::Duration;

use crate::error::{Error, HandshakeError, MemoryError};
use crate::proto::session::RunningSession;
use crate::proto::session::driver::Driver;

/// How long the peer has not taken what there was to take.
#[derive(Debug)]
pub(super) struct StallClock {
    /// Whether a wake-up is yet to show that the peer has mapped the memory.
    is_unproven: Cell<bool>,
    /// How many events it had taken at the last look.
    taken: Cell<i64>,
    /// For how long it has taken nothing, if there is something to take.
    still: Cell<Option<Duration>>,
}

impl StallClock {
    pub(super) fn new(is_unproven: bool) -> Self {
        Self { is_unproven: Cell::new(is_unproven), taken: Cell::new(0), still: Cell::new(None) }
    }
}

impl<D: Driver> RunningSession<D> {
    /// The peer is about to be woken. Whether it has to be [seen](Self::has_taken_any) to take its
    /// first event in time, since nothing else shows that it has mapped the memory. Once.
    pub fn must_prove_itself(&self, driver: &D) -> bool {
        self.stall.is_unproven.take() && !self.has_taken_any(driver)
    }

    /// Whether the peer has taken any event.
    pub fn has_taken_any(&self, driver: &D) -> bool {
        // What is wrong with the queue is found, and named, when it is used.
        driver.in_flight().map_or(true, |(taken, _)| taken > 0)
    }

    /// The peer had this long to take its first event, and has not.
    pub fn on_unproven(&self, driver: &D, limit: Duration) {
        self.fail(driver, HandshakeError::NeverMapped(limit).into());
    }

    /// So much time has passed since the last look. Ends the session if its memory is gone, or if
    /// the peer has not taken anything for too long.
    pub fn check_liveness(&self, driver: &D, passed: Duration) {
        if driver.is_memory_lost() {
            return self.fail(driver, MemoryError::Lost.into());
        }
        let Some(limit) = self.limits.stall else { return };
        let (taken, left) = match driver.in_flight() {
            Ok(in_flight) => in_flight,
            Err(error) => return self.fail(driver, error.into()),
        };
        let has_moved = self.stall.taken.replace(taken) != taken;
        if has_moved || left == 0 {
            return self.stall.still.set(None);
        }
        // What it has not taken by the first look may have come a moment ago.
        let still = self.stall.still.get();
        let so_far = still.map_or(Duration::ZERO, |still| still.saturating_add(passed));
        self.stall.still.set(Some(so_far));
        if so_far >= limit {
            self.fail(driver, Error::PeerStalled(limit));
        }
    }
}
