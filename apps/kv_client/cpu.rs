// SPDX-License-Identifier: MIT OR Apache-2.0
//! Processor time: of this process, and of the server as far as it says.

use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;

/// Processor times, user and system together, at one moment or between two.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cpu {
    pub(crate) client: Duration,
    /// `None`: the server does not say.
    pub(crate) server: Option<Duration>,
}

impl Cpu {
    pub(crate) fn since(&self, before: &Self) -> Self {
        let server = self.server.zip(before.server);
        Self {
            client: self.client.saturating_sub(before.client),
            server: server.map(|(now, before)| now.saturating_sub(before)),
        }
    }
}

/// What this process has used so far.
pub(crate) fn of_client() -> Duration {
    let time = |value: TimeVal| {
        Duration::new(value.tv_sec() as u64, 0) + Duration::from_micros(value.tv_usec() as u64)
    };
    // It can only fail for arguments that are wrong.
    getrusage(UsageWho::RUSAGE_SELF)
        .map(|usage| time(usage.user_time()) + time(usage.system_time()))
        .unwrap_or_default()
}

/// What the server has used so far, by its answer to `INFO cpu`.
pub(crate) fn of_server(info: &str) -> Option<Duration> {
    let seconds = |name: &str| {
        let mut lines = info.lines().filter_map(|line| line.split_once(':'));
        let (_, value) = lines.find(|(field, _)| *field == name)?;
        Duration::try_from_secs_f64(value.trim().parse().ok()?).ok()
    };
    Some(seconds("used_cpu_user")? + seconds("used_cpu_sys")?)
}
