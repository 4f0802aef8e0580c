// SPDX-License-Identifier: MIT OR Apache-2.0
//! Calls of what the program has passed in.
//!
//! A panic in a task ends its executor, with all sessions of that core. That would be too much for
//! a mistake in a callback, which a peer may be able to provoke. So it ends here and is logged.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::exec::contain::panic_text;

/// Calls it. `None`: it panicked.
pub(crate) fn call<T>(name: &'static str, callback: impl FnOnce() -> T) -> Option<T> {
    // Nothing of this crate is in the middle of a change while a callback runs.
    match catch_unwind(AssertUnwindSafe(callback)) {
        Ok(result) => Some(result),
        Err(panic) => {
            tracing::error!(callback = name, text = panic_text(&*panic), "a callback panicked");
            None
        }
    }
}
