//! Round trips between two processes: this crate beside the machine's limit and beside sockets.
//!
//! `cargo run --release --example ping_pong -- [--json] [--quick] [--rounds N] [--slice MILLIS]
//! [--only TRANSPORT,…] [--sizes BYTES,…] [--streams N,…] [--touch | --no-touch] [--one-cpu]
//! [--v4]`
//!
//! Slices of all points are taken in turn and the turns repeated, because on a virtual machine the
//! processors move between near and far cores; the median of the rounds is reported, with its
//! spread. With `--json`, a line per point:
//! `{"transport":…,"size":…,"streams":…,"touch":…,"p50_ns":…,"p99_ns":…,"per_op_ns":…,
//! "syscalls_per_op":…,"allocs_per_op":…,…}`.

#[allow(dead_code, reason = "the other examples use the rest")]
#[path = "../../support/cli.rs"]
mod cli;
mod measure;

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use clap::ArgMatches;

use measure::harness::{self, Harness, Outcome};
use measure::point::{Point, Transport};
use measure::{count, ours};

#[global_allocator]
static ALLOCATOR: count::CountingAllocator = count::CountingAllocator;

/// How much a run measures if nothing else is asked for.
#[derive(Clone, Copy)]
struct Extent {
    rounds: usize,
    /// In milliseconds.
    slice: usize,
    sizes: &'static [usize],
}

const FULL: Extent = Extent {
    rounds: 7,
    slice: 60,
    sizes: &[64, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20],
};
/// With `--quick`.
const QUICK: Extent = Extent { rounds: 3, slice: 25, sizes: &[64, 4 << 10, 64 << 10, 1 << 20] };
const DEFAULT_STREAMS: [usize; 2] = [1, 64];

struct Options {
    json: bool,
    rounds: usize,
    slice: Duration,
    transports: Vec<Transport>,
    sizes: Vec<usize>,
    streams: Vec<usize>,
    touch: Vec<bool>,
    shared_cpu: bool,
    idle: Option<usize>,
}

impl Options {
    fn parse() -> Result<Self, ExitCode> {
        let touches = ["touch", "no-touch", "both"];
        let streams = DEFAULT_STREAMS.map(|count| count.to_string()).join(",");
        let command = cli::command(
            "ping_pong",
            "Round trips between two processes: this crate beside the machine's limit and sockets",
        )
        .arg(cli::flag("json", "A line of JSON per point"))
        .arg(cli::flag(
            "quick",
            "Fewer and shorter rounds, and four sizes, unless others are given",
        ))
        .arg(cli::option_with_default("rounds", "N", "Rounds", FULL.rounds).value_parser(number))
        .arg(
            cli::option_with_default("slice", "MILLIS", "Length of a slice", FULL.slice)
                .value_parser(number),
        )
        .arg(
            cli::option("only", "TRANSPORT,…", "Transports, by parts of their names")
                .value_parser(transports),
        )
        .arg(cli::option("sizes", "BYTES,…", "Sizes of messages").value_parser(numbers))
        .arg(
            cli::option_with_default("streams", "N,…", "Streams at the same time", streams)
                .value_parser(numbers),
        )
        .arg(
            cli::flag("touch", "Write and read the payload, as by default")
                .overrides_with_all(touches),
        )
        .arg(cli::flag("no-touch", "Leave the payload alone").overrides_with_all(touches))
        .arg(cli::flag("both", "One and the other").overrides_with_all(touches))
        .arg(cli::flag("v4", "Version 4 as well"))
        .arg(cli::flag("one-cpu", "Both processes on one processor"))
        .arg(
            cli::option("idle", "SESSIONS", "Measure so many idle sessions, and nothing else")
                .value_parser(number),
        );
        cli::read(command, Self::take)
    }

    fn take(matches: &ArgMatches) -> Result<Self, String> {
        let number = |name| matches.get_one::<usize>(name).copied();
        let numbers = |name| matches.get_one::<Vec<usize>>(name).cloned();
        let extent = if matches.get_flag("quick") { QUICK } else { FULL };
        let only = matches.get_one::<Vec<Transport>>("only").cloned();
        let mut transports = only.unwrap_or_else(|| Transport::USUAL.to_vec());
        if matches.get_flag("v4") {
            transports.extend(Transport::V4);
        }
        Ok(Self {
            json: matches.get_flag("json"),
            rounds: number("rounds").unwrap_or(extent.rounds).max(1),
            slice: Duration::from_millis(number("slice").unwrap_or(extent.slice) as u64),
            transports,
            sizes: numbers("sizes").unwrap_or_else(|| extent.sizes.to_vec()),
            streams: numbers("streams").unwrap_or_else(|| DEFAULT_STREAMS.to_vec()),
            touch: match (matches.get_flag("no-touch"), matches.get_flag("both")) {
                (_, true) => vec![true, false],
                (is_off, false) => vec![!is_off],
            },
            shared_cpu: matches.get_flag("one-cpu"),
            idle: number("idle"),
        })
    }

    fn points(&self) -> Vec<Point> {
        let mut points = Vec::new();
        for &size in &self.sizes {
            for &streams in &self.streams {
                for &touch in &self.touch {
                    for &transport in &self.transports {
                        let point = Point {
                            transport,
                            size,
                            streams,
                            touch,
                            shared_cpu: self.shared_cpu,
                            slice: self.slice,
                        };
                        if makes_sense(point) {
                            points.push(point);
                        }
                    }
                }
            }
        }
        points
    }
}

/// Leaves out what says nothing: the floor has one line, large messages many streams do not change,
/// and two processes that spin without a protocol on one processor never give way.
fn makes_sense(point: Point) -> bool {
    let is_floor =
        matches!(point.transport, Transport::Floor | Transport::RawSame | Transport::RawRotating);
    match point.transport {
        Transport::Floor if point.size > 64 => false,
        Transport::RawSame | Transport::RawRotating if point.size <= 64 || !point.touch => false,
        _ if is_floor => point.streams == 1 && !point.shared_cpu,
        _ => point.streams == 1 || point.size <= 4096,
    }
}

fn number(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| format!("{text} is not a number"))
}

fn numbers(text: &str) -> Result<Vec<usize>, String> {
    text.split(',').map(number).collect()
}

fn transports(text: &str) -> Result<Vec<Transport>, String> {
    let mut found = Vec::new();
    for name in text.split(',') {
        let matching: Vec<_> = Transport::all().filter(|one| one.name().contains(name)).collect();
        if matching.is_empty() {
            return Err(format!("{name} is no transport"));
        }
        found.extend(matching);
    }
    Ok(found)
}

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(harness::SERVE) {
        harness::serve();
        return ExitCode::SUCCESS;
    }
    let options = match Options::parse() {
        Ok(options) => options,
        Err(status) => return status,
    };
    if let Err(error) = ours::preflight() {
        return cli::end(Err(error));
    }
    if let Some(sessions) = options.idle {
        return cli::end(report_idle(sessions));
    }
    let points = options.points();
    let mut outcomes: Vec<Vec<Outcome>> = vec![Vec::new(); points.len()];
    let mut harness = Harness::start();
    for _ in 0..options.rounds {
        for (point, outcomes) in points.iter().zip(&mut outcomes) {
            outcomes.push(harness.run(*point));
        }
    }
    let reports = || {
        if !options.json {
            cli::print(format_args!(
                "{:<24} {:>8} {:>7} {:>5} {:>10} {:>21} {:>10} {:>10} {:>9} {:>8}",
                "transport",
                "size",
                "streams",
                "touch",
                "p50 ns",
                "(spread)",
                "p99 ns",
                "ns/op",
                "syscalls",
                "allocs"
            ))?;
        }
        points
            .iter()
            .zip(&outcomes)
            .try_for_each(|(point, outcomes)| report(*point, outcomes, options.json))
    };
    cli::end(reports())
}

fn report_idle(sessions: usize) -> io::Result<()> {
    let path = std::env::temp_dir().join(format!("ping-pong-idle-{}.sock", std::process::id()));
    let share = ours::idle_share(&path, sessions, Duration::from_secs(5));
    cli::print(format_args!("{{\"idle_sessions\":{sessions},\"cpu_share\":{share:.6}}}"))
}

/// The median, the least and the most.
fn spread(values: impl Iterator<Item = f64>) -> (f64, f64, f64) {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match (values.get(values.len() / 2), values.first(), values.last()) {
        (Some(&median), Some(&least), Some(&most)) => (median, least, most),
        _ => (f64::NAN, f64::NAN, f64::NAN),
    }
}

fn report(point: Point, outcomes: &[Outcome], json: bool) -> io::Result<()> {
    let (p50, least, most) = spread(outcomes.iter().map(|outcome| outcome.slice.p50_ns));
    let (p99, ..) = spread(outcomes.iter().map(|outcome| outcome.slice.p99_ns));
    let (per_op, ..) = spread(outcomes.iter().map(|outcome| outcome.slice.per_op_ns));
    let (allocations, ..) = spread(outcomes.iter().map(|outcome| outcome.allocations_per_op));
    let (syscalls, ..) = spread(outcomes.iter().filter_map(|outcome| outcome.syscalls_per_op));
    let Point { transport, size, streams, touch, shared_cpu, .. } = point;
    let name = transport.name();
    if json {
        let syscalls = if syscalls.is_nan() { "null".into() } else { format!("{syscalls:.5}") };
        cli::print(format_args!(
            "{{\"transport\":\"{name}\",\"size\":{size},\"streams\":{streams},\"touch\":{touch},\
             \"p50_ns\":{p50:.1},\"p99_ns\":{p99:.1},\"per_op_ns\":{per_op:.1},\
             \"syscalls_per_op\":{syscalls},\"allocs_per_op\":{allocations:.5},\
             \"p50_min_ns\":{least:.1},\"p50_max_ns\":{most:.1},\"one_cpu\":{shared_cpu}}}"
        ))
    } else {
        let spread = format!("({least:.0}-{most:.0})");
        cli::print(format_args!(
            "{name:<24} {size:>8} {streams:>7} {touch:>5} {p50:>10.0} {spread:>21} {p99:>10.0} \
             {per_op:>10.1} {syscalls:>9.4} {allocations:>8.4}"
        ))
    }
}
