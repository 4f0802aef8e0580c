// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can go wrong, in the words of the report.

use std::io;
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("{source}")]
    Resolve { source: io::Error },
    #[error("connection {connection} to {to}: {source}")]
    Connect { connection: usize, to: String, source: io::Error },
    #[error("connection {connection}, {outstanding} without an answer: {source}")]
    Lost { connection: usize, outstanding: usize, source: io::Error },
    #[error("{request}: the server said {text:?}")]
    Refused { request: String, text: String },
    #[error("{request}: expected {expected}, got {got}")]
    Wrong { request: String, expected: String, got: String },
    #[error("connection {connection}: nothing was asked, got {got}")]
    Unasked { connection: usize, got: String },
    #[error("connection {connection}: no answer for {patience:?}, {outstanding} under way")]
    Stalled { connection: usize, outstanding: usize, patience: Duration },
    #[error("executor {executor}: {problem}")]
    Executor { executor: usize, problem: String },
}
