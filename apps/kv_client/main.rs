// SPDX-License-Identifier: MIT OR Apache-2.0
//! A load generator for a key-value store that speaks RESP2, the protocol of Redis.
//!
//! `cargo run --release --bin kv_client -- --shm /tmp/kv.sock --requests 1000000`
//!
//! It knows three ways to the store: shared memory, a Unix socket and TCP. Over shared memory it
//! opens a session to every shard and sends each request straight to the shard that owns the key;
//! over a socket the server does that. Operations, keys and values are the same whichever way they
//! go. Every byte of every answer is verified, and the first wrong one ends it.
//!
//! First it writes all its keys (so the store holds connections × keys × value bytes), then it
//! measures. It ends with one line of JSON on stdout, and with status 0 only if every answer was
//! right.

#[allow(dead_code, reason = "the other examples use the rest")]
#[path = "../support/address.rs"]
mod address;
#[allow(dead_code, reason = "the other examples use the rest")]
#[path = "../support/cli.rs"]
mod cli;
mod connection;
mod counters;
mod cpu;
mod executor;
mod failure;
mod format;
mod options;
mod outgoing;
mod pipe;
mod pipeline;
#[path = "../support/protocol.rs"]
mod protocol;
mod rate;
mod report;
mod session_totals;
#[allow(unreachable_pub, reason = "the server has it, too")]
#[path = "../kv_server/kv/slots.rs"]
mod slots;
mod ticks;
#[allow(dead_code, reason = "the other examples use the rest")]
#[path = "../support/unix_socket.rs"]
mod unix_socket;
mod values;
#[path = "../support/wakeup.rs"]
mod wakeup;
mod work;
mod workers;

use std::process::ExitCode;

use failure::Failure;
use options::Options;

fn main() -> ExitCode {
    let mut options = match Options::parse() {
        Ok(options) => options,
        Err(status) => return status,
    };
    // Names are looked up here, before there is an executor that would have to wait for that.
    let found = options.target.resolve().map_err(|source| Failure::Resolve { source });
    match found.and_then(|()| workers::run(&options)) {
        Ok(outcome) => {
            let report = report::success(&options, &outcome);
            cli::end(cli::print(format_args!("{report}")))
        }
        Err(failure) => {
            let report = report::failure(&options, &failure);
            // It has failed, whether that can be told or not.
            let _ = cli::end(cli::print(format_args!("{report}")));
            ExitCode::FAILURE
        }
    }
}
