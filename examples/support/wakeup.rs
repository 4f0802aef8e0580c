// SPDX-License-Identifier: MIT OR Apache-2.0
//! Wake-ups in reports, as they are on command lines.

use shmipc_glommio::Wakeup;

pub(crate) fn name(wakeup: Wakeup) -> String {
    match wakeup {
        Wakeup::EventFd => "eventfd".into(),
        Wakeup::Polling(interval) => format!("polling:{}", interval.as_micros()),
        _ => "socket".into(),
    }
}
