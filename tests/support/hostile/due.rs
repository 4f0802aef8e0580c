// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which error is due.

use shmipc_glommio::Error;

/// Whether an error is the one that is due.
pub(crate) type IsDue = fn(&Error) -> bool;

/// An [`IsDue`] for the errors that a pattern matches.
macro_rules! due {
    ($($pattern:tt)+) => {
        |error: &Error| matches!(error, $($pattern)+)
    };
}

pub(crate) use due;
