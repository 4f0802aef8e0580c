// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the fuzzers of `fuzz/` call, and the tests that run their seeds. Each takes bytes and
//! panics when something is wrong that no bytes may bring about.
//!
//! Not a part of the crate's interface: it is there with `--cfg fuzzing` only.

pub use shmipc_core::fuzzing::{deframe, handshake, memories, running_session};

mod session;

pub use session::session;
