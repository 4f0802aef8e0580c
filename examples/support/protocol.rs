// SPDX-License-Identifier: MIT OR Apache-2.0
//! Protocol versions, wake-ups and spinning as command-line values.

use std::time::Duration;

use shmipc_glommio::{ProtocolVersion, Spin, Wakeup};

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

/// What `--spin MICROS` means: with 0, never spin.
pub(crate) fn spin(micros: u64) -> Spin {
    match micros {
        0 => Spin::Never,
        micros => Spin::For(Duration::from_micros(micros)),
    }
}

/// The `MICROS` that [`spin`] turns into this.
pub(crate) fn spin_micros(spin: Spin) -> String {
    match spin {
        Spin::Never => "0".into(),
        Spin::For(time) => time.as_micros().to_string(),
        _ => "for ever".into(),
    }
}
