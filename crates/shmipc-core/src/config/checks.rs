// SPDX-License-Identifier: MIT OR Apache-2.0
//! What has to hold of a configuration.

use std::path::Path;

use super::{
    LIST_OVERHEAD, LONGEST_SUFFIX, MANAGER_OVERHEAD, MemoryKind, PATH_ROOM, ProtocolVersion,
    SLICE_OVERHEAD, Settings, SliceClass, Wakeup,
};
use crate::error::ConfigError;

pub(super) fn check_wakeup(config: &Settings) -> Result<(), ConfigError> {
    if config.wakeup != Wakeup::Socket && config.protocol < ProtocolVersion::V4 {
        return Err(ConfigError::WakeupNeedsVersion4);
    }
    if config.wakeup == Wakeup::EventFd && config.memory != MemoryKind::Memfd {
        return Err(ConfigError::EventFdNeedsMemfd);
    }
    let range = Wakeup::SHORTEST_INTERVAL..=Wakeup::LONGEST_INTERVAL;
    let asked = match config.wakeup {
        Wakeup::Polling(interval) => Some(("the interval of polling in microseconds", interval)),
        _ => None,
    };
    let granted = ("min_polling_interval in microseconds", config.min_polling_interval);
    match asked.into_iter().chain([granted]).find(|(_, interval)| !range.contains(interval)) {
        None => Ok(()),
        Some((what, interval)) => Err(ConfigError::Limit {
            what,
            value: u64::try_from(interval.as_micros()).unwrap_or(u64::MAX),
            problem: "expected 50 to 1 000 000",
        }),
    }
}

pub(super) fn at_least(what: &'static str, value: u64, least: u64) -> Result<(), ConfigError> {
    if value >= least {
        return Ok(());
    }
    Err(ConfigError::Limit { what, value, problem: "nothing would get through" })
}

pub(super) fn check_prefix(prefix: &Path) -> Result<(), ConfigError> {
    let fits = prefix.as_os_str().len() + LONGEST_SUFFIX <= PATH_ROOM;
    if prefix.is_absolute() && prefix.file_name().is_some() && fits {
        return Ok(());
    }
    Err(ConfigError::PathPrefix(prefix.to_owned()))
}

/// Checks that every class gets a slice. One is too few to be of use, since the last slice of a
/// list is never handed out (`docs/protocol.md#taking-slices`), but the defaults give no more to
/// 1 MiB of memory.
pub(super) fn check_buffers(size: u64, classes: &[SliceClass]) -> Result<u32, ConfigError> {
    let wrong = |text: String| ConfigError::SliceClasses(text);
    if classes.is_empty() || classes.len() > 32 {
        return Err(wrong(format!("{} classes, expected 1 to 32", classes.len())));
    }
    if classes.iter().map(|class| u64::from(class.percent)).sum::<u64>() > 100 {
        return Err(wrong("the shares add up to more than 100 per cent".into()));
    }
    if classes.windows(2).any(|pair| pair[0].capacity == pair[1].capacity) {
        return Err(wrong("two classes have the same capacity".into()));
    }
    let too_small = |problem: String| ConfigError::BufferSize { size, problem };
    let fits = u32::try_from(size).map_err(|_| too_small("offsets have 32 bits".into()))?;
    let overhead = MANAGER_OVERHEAD + LIST_OVERHEAD * classes.len() as u64;
    let room = size.saturating_sub(overhead);
    for class in classes {
        let capacity = class.capacity;
        if capacity < 16 || capacity % 4 != 0 || capacity > 1 << 30 {
            return Err(wrong(format!("capacity {capacity} is not a multiple of 4 from 16")));
        }
        let stride = u64::from(capacity) + SLICE_OVERHEAD;
        if room * u64::from(class.percent) / 100 < stride {
            let percent = class.percent;
            return Err(too_small(format!("{percent} per cent hold no slice of {capacity} bytes")));
        }
    }
    Ok(fits)
}
