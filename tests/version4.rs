// SPDX-License-Identifier: MIT OR Apache-2.0
//! Version 4 between two sides of this crate: what they agree on, every kind of wake-up, lists that
//! each side has for itself, and what is left behind. One test at a time: descriptors are those of
//! the whole process.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
    pub(crate) mod lists;
    pub(crate) mod payload;
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod process_memory;
    pub(crate) mod version4 {
        mod agreeing;
        mod falling_back;
        pub(crate) mod pair;
        mod shards;
        mod talking;
    }
}

const LIMIT: Duration = Duration::from_secs(60);
/// Until when a side must have heard of what the other has done.
const SOON: Duration = Duration::from_secs(10);

/// Held by a test while it runs.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    // What another test did wrong is its own.
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}
