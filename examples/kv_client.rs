// SPDX-License-Identifier: MIT OR Apache-2.0
//! A load generator for a key-value store that speaks RESP2, the protocol of Redis.
//!
//! `cargo run --release --example kv_client -- --shm /tmp/kv.sock --requests 1000000`
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
#[path = "support/address.rs"]
mod address;
#[allow(dead_code, reason = "the other examples use the rest")]
#[path = "support/cli.rs"]
mod cli;
#[path = "kv_client/connection.rs"]
mod connection;
#[path = "kv_client/counts.rs"]
mod counts;
#[path = "kv_client/cpu.rs"]
mod cpu;
#[path = "kv_client/crew.rs"]
mod crew;
#[path = "kv_client/executor.rs"]
mod executor;
#[path = "kv_client/failure.rs"]
mod failure;
#[path = "kv_client/format.rs"]
mod format;
#[path = "kv_client/lane.rs"]
mod lane;
#[path = "kv_client/options.rs"]
mod options;
#[path = "kv_client/outgoing.rs"]
mod outgoing;
#[path = "kv_client/pace.rs"]
mod pace;
#[path = "kv_client/pipe.rs"]
mod pipe;
#[path = "support/protocol.rs"]
mod protocol;
#[path = "kv_client/report.rs"]
mod report;
#[allow(unreachable_pub, reason = "the server has it, too")]
#[path = "kv/slots.rs"]
mod slots;
#[path = "kv_client/tally.rs"]
mod tally;
#[path = "kv_client/ticks.rs"]
mod ticks;
#[allow(dead_code, reason = "the other examples use the rest")]
#[path = "support/unix_socket.rs"]
mod unix_socket;
#[path = "kv_client/values.rs"]
mod values;
#[path = "support/wakeup.rs"]
mod wakeup;
#[path = "kv_client/work.rs"]
mod work;

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
    match found.and_then(|()| crew::run(&options)) {
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
