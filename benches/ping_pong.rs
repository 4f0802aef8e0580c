//! Per-core ping-pong: a round trip between two processes, each pinned to a processor of its own.
//!
//! `cargo bench --workspace --bench ping_pong`. The measuring is that of `apps/examples/ping_pong`,
//! which also prints system calls, allocations and spreads; here criterion keeps the history.

#[path = "../apps/examples/ping_pong/measure/mod.rs"]
mod measure;

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};

use measure::harness::{self, Harness};
use measure::point::{Ours, Point, Transport};

const SIZES: [usize; 8] = [64, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20];

fn per_core_ping_pong(criterion: &mut Criterion, harness: &mut Harness) {
    for touch in [true, false] {
        let name =
            if touch { "per-core ping-pong, touched" } else { "per-core ping-pong, untouched" };
        let mut group = criterion.benchmark_group(name);
        group.sample_size(10).warm_up_time(Duration::from_millis(100));
        group.measurement_time(Duration::from_millis(500));
        for size in SIZES {
            group.throughput(Throughput::Bytes(2 * size as u64));
            for transport in [Transport::Ours(Ours::Adaptive), Transport::UdsBlocking] {
                let slice = Duration::from_millis(20);
                let point = Point { transport, size, streams: 1, touch, shared_cpu: false, slice };
                group.bench_function(BenchmarkId::new(transport.name(), size), |bencher| {
                    // A session lives for a whole slice; criterion gets its median round trip, as
                    // many times as it asks for.
                    bencher.iter_custom(|iterations| {
                        let outcome = harness.run(point);
                        Duration::from_nanos((outcome.slice.p50_ns * iterations as f64) as u64)
                    });
                });
            }
        }
        group.finish();
    }
}

fn main() {
    if std::env::args().nth(1).as_deref() == Some(harness::SERVE) {
        return harness::serve();
    }
    let mut criterion = Criterion::default().configure_from_args();
    let mut harness = Harness::start();
    per_core_ping_pong(&mut criterion, &mut harness);
    drop(harness);
    criterion.final_summary();
}
