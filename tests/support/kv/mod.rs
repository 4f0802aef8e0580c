// SPDX-License-Identifier: MIT OR Apache-2.0
//! The key-value server as a process, clients for it, and what it should answer.

pub(crate) mod client;
#[allow(dead_code, reason = "not all of it is needed everywhere")]
pub(crate) mod crate_redis;
pub(crate) mod model;
pub(crate) mod process;
#[allow(dead_code, reason = "not all of it is needed everywhere")]
pub(crate) mod steps;

#[path = "../model/random.rs"]
#[allow(dead_code, reason = "not all of it is needed here")]
mod random;
