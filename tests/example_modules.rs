// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tests that stand in the modules of the examples. Cargo would run them with `test = true`, but
//! then `cargo test` no longer builds the examples as programs, which other tests start.

#[path = "../examples/support/address.rs"]
#[allow(dead_code, reason = "the programs are not here")]
mod address;
#[path = "../examples/support/cli.rs"]
#[allow(dead_code, reason = "the programs are not here")]
mod cli;
#[path = "../examples/kv/mod.rs"]
#[allow(dead_code, reason = "the program is not here")]
mod kv;
#[path = "../examples/kv_client/outgoing.rs"]
#[allow(dead_code, reason = "the program is not here")]
mod outgoing;
#[path = "../examples/kv_client/pace.rs"]
#[allow(dead_code, reason = "the program is not here")]
mod pace;
#[path = "../examples/kv_client/ticks.rs"]
mod ticks;
#[path = "../examples/kv_client/values.rs"]
#[allow(dead_code, reason = "the program is not here")]
mod values;
