// SPDX-License-Identifier: MIT OR Apache-2.0
//! What INFO says.

use std::fmt::Write;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;

use super::resp::Request;
use super::shard::Shard;

/// Which sections a client asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sections {
    pub(crate) server: bool,
    pub(crate) cpu: bool,
    pub(crate) shards: bool,
}

impl Sections {
    pub(crate) fn of(request: Request<'_>) -> Self {
        let wants = |section: &[u8]| {
            let all = [section, b"all", b"default", b"everything"];
            request.len() == 1
                || request
                    .from(1)
                    .any(|name| all.iter().any(|section| name.eq_ignore_ascii_case(section)))
        };
        Self { server: wants(b"server"), cpu: wants(b"cpu"), shards: wants(b"shards") }
    }
}

/// What is known without asking other shards.
pub(crate) fn head(shard: &Shard, sections: Sections) -> String {
    let mut text = String::new();
    // Writing to memory does not fail.
    if sections.server {
        let _ = write!(
            text,
            "# Server\r\nserver_name:kv_server\r\nprocess_id:{}\r\nshards:{}\r\nshard:{}\r\n\
            uptime_in_seconds:{}\r\n\r\n",
            std::process::id(),
            shard.place.count,
            shard.place.index,
            shard.settings.started.elapsed().as_secs(),
        );
    }
    if sections.cpu {
        text.push_str("# CPU\r\n");
        // It can only fail for arguments that are wrong.
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let _ = write!(
                text,
                "used_cpu_sys:{}\r\nused_cpu_user:{}\r\n",
                seconds(usage.system_time()),
                seconds(usage.user_time()),
            );
        }
        text.push_str("\r\n");
    }
    if sections.shards {
        text.push_str("# Shards\r\n");
    }
    text
}

/// The line of one shard.
pub(crate) fn line(shard: &Shard) -> String {
    let sessions = shard.core.sessions();
    let open: u64 = sessions.iter().map(|session| session.stats().cross_core_wakes).sum();
    let cross_core_wakes = open + shard.core.stats().cross_core_wakes;
    let store = shard.store.borrow();
    let (touches, counters) = (store.touches(), &shard.counters);
    format!(
        "shard{}:keys={},touches_owner={},touches_other={},sessions={},clients={},forwarded={},\
        commands={},cross_core_wakes={cross_core_wakes},output_held={}\r\n",
        shard.place.index,
        store.len(),
        touches.by_owner,
        touches.by_others,
        counters.sessions.get(),
        counters.clients.get(),
        counters.forwarded.get(),
        counters.commands.get(),
        shard.output.held(),
    )
}

fn seconds(time: TimeVal) -> String {
    format!("{}.{:06}", time.tv_sec(), time.tv_usec())
}
