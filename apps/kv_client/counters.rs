// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is counted while requests are under way.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Instant;

use hdrhistogram::Histogram;

use super::work::Request;

/// The longest latency that is told apart: ten minutes.
const MAX_NANOS: u64 = 600_000_000_000;

/// The latencies of an executor, in nanoseconds.
pub(crate) type Latencies = Rc<RefCell<Histogram<u64>>>;

pub(crate) fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, MAX_NANOS, 3).expect("bounds in order, 3 digits")
}

/// What a connection shows to the watchdog of its executor.
pub(crate) struct Watch {
    pub(crate) connection: usize,
    /// Changes whenever something was written or read.
    pub(crate) moves: Cell<u64>,
    /// How many requests wait for their answers.
    pub(crate) outstanding: Cell<usize>,
}

impl Watch {
    pub(crate) fn new(connection: usize) -> Self {
        Self { connection, moves: Cell::new(0), outstanding: Cell::new(0) }
    }
}

/// The books of one connection.
pub(crate) struct Counters {
    latencies: Latencies,
    /// When the clock was last looked at. A look costs a tenth of a round trip over shared memory,
    /// so the end of one request is the beginning of the next.
    pub(crate) now: Instant,
    pub(crate) outstanding: usize,
}

impl Counters {
    pub(crate) fn new(latencies: Latencies) -> Self {
        Self { latencies, now: Instant::now(), outstanding: 0 }
    }

    /// Notes which requests what was read just now has answered, if any.
    #[inline]
    pub(crate) fn record_answered(&mut self, requests: impl ExactSizeIterator<Item = Request>) {
        self.now = Instant::now();
        self.outstanding -= requests.len();
        let mut latencies = self.latencies.borrow_mut();
        for request in requests {
            let latency = self.now.saturating_duration_since(request.since);
            latencies.saturating_record(latency.as_nanos() as u64);
        }
    }
}
