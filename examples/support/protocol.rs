// SPDX-License-Identifier: MIT OR Apache-2.0
//! Versions and wake-ups on the command lines of examples.

use std::time::Duration;

use shmipc_glommio::{ProtocolVersion, Wakeup};

pub(crate) fn protocol_version(text: &str) -> Result<ProtocolVersion, &'static str> {
    match text {
        "2" => Ok(ProtocolVersion::V2),
        "3" => Ok(ProtocolVersion::V3),
        "4" => Ok(ProtocolVersion::V4),
        _ => Err("expected 2, 3 or 4"),
    }
}

pub(crate) fn wakeup(text: &str) -> Result<Wakeup, &'static str> {
    match text.split_once(':') {
        None if text == "socket" => Ok(Wakeup::Socket),
        None if text == "eventfd" => Ok(Wakeup::EventFd),
        Some(("polling", micros)) => {
            let micros = micros.parse().map_err(|_| "expected a number of microseconds")?;
            Ok(Wakeup::Polling(Duration::from_micros(micros)))
        }
        _ => Err("expected socket, eventfd or polling:MICROS"),
    }
}
