// SPDX-License-Identifier: MIT OR Apache-2.0
//! Configurations in which everything runs out.

use std::time::Duration;

use shmipc_glommio::{Config, MemoryKind, ProtocolVersion, SliceClass, Spin, Wakeup};

use super::random::Random;
use super::world::Side;

/// A small configuration, with the numbers for one side of a session.
pub(crate) fn random_config(side: Side, random: &mut Random) -> Config {
    let polling = Wakeup::Polling(random.pick(&[50, 200, 1000]).micros());
    let (memory, protocol, wakeup) = random.pick(&[
        (MemoryKind::Memfd, ProtocolVersion::V3, Wakeup::Socket),
        (MemoryKind::Memfd, ProtocolVersion::V3, Wakeup::Socket),
        (MemoryKind::File, ProtocolVersion::V3, Wakeup::Socket),
        (MemoryKind::File, ProtocolVersion::V2, Wakeup::Socket),
        (MemoryKind::Memfd, ProtocolVersion::V4, Wakeup::Socket),
        (MemoryKind::Memfd, ProtocolVersion::V4, Wakeup::EventFd),
        (MemoryKind::Memfd, ProtocolVersion::V4, polling),
        (MemoryKind::File, ProtocolVersion::V4, Wakeup::Socket),
        (MemoryKind::File, ProtocolVersion::V4, polling),
    ]);
    let spins = [Spin::Never, Spin::For(Duration::from_micros(50)), Spin::Forever];
    let config = Config::builder()
        .memory(memory)
        .protocol(protocol)
        .wakeup(wakeup)
        // Both sides have to want them.
        .owned_free_lists(!random.one_in(5))
        .spin(random.pick(&spins))
        .buffer_size(random.pick(&[64 << 10, 128 << 10, 256 << 10, 1 << 20]))
        .slice_classes(random_classes(random))
        .queue_capacity(random.pick(&[16, 32, 64]))
        .fallback_after(random.pick(&[0, 50, 1000]).micros())
        .stream_window(random.pick(&[4096, 16 << 10, 64 << 10]))
        .reactor_interval(random.pick(&[50, 250]).micros());
    let config = match random.below(3) {
        0 => config.max_unread_fallback_bytes(random.pick(&[4096, 100_000])),
        _ => config,
    };
    let config = match side {
        // A server that takes fewer than its client opens refuses streams, and what was sent on
        // them is lost.
        Side::Client if random.one_in(3) => config.max_streams(random.between(1, 4)),
        _ => config,
    };
    config.build().unwrap()
}

fn random_classes(random: &mut Random) -> Vec<SliceClass> {
    let choices: [&[(u32, u32)]; 5] = [
        &[(64, 40), (512, 30), (4076, 30)],
        &[(256, 100)],
        &[(1004, 50), (8172, 50)],
        &[(16, 20), (128, 40), (2028, 40)],
        &[(4076, 100)],
    ];
    let classes = random.pick(&choices);
    classes.iter().map(|&(capacity, percent)| SliceClass::new(capacity, percent)).collect()
}

trait Micros {
    fn micros(self) -> Duration;
}

impl Micros for u64 {
    fn micros(self) -> Duration {
        Duration::from_micros(self)
    }
}
