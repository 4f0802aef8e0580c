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

mod measure;

use std::time::Duration;

use measure::lab::{self, Lab, Outcome};
use measure::point::{Point, Transport};
use measure::{count, ours};

#[global_allocator]
static ALLOCATOR: count::CountingAllocator = count::CountingAllocator;

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
    fn parse() -> Result<Self, String> {
        let mut options = Self {
            json: false,
            rounds: 7,
            slice: Duration::from_millis(60),
            transports: Transport::USUAL.to_vec(),
            sizes: vec![64, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20],
            streams: vec![1, 64],
            touch: vec![true],
            shared_cpu: false,
            idle: None,
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
            match argument.as_str() {
                "--json" => options.json = true,
                "--quick" => {
                    options.rounds = 3;
                    options.slice = Duration::from_millis(25);
                    options.sizes = vec![64, 4 << 10, 64 << 10, 1 << 20];
                }
                "--rounds" => options.rounds = number(&value()?)?.max(1),
                "--slice" => options.slice = Duration::from_millis(number(&value()?)? as u64),
                "--sizes" => options.sizes = numbers(&value()?)?,
                "--streams" => options.streams = numbers(&value()?)?,
                "--only" => options.transports = transports(&value()?)?,
                "--touch" => options.touch = vec![true],
                "--no-touch" => options.touch = vec![false],
                "--both" => options.touch = vec![true, false],
                "--v4" => options.transports.extend(Transport::V4),
                "--one-cpu" => options.shared_cpu = true,
                "--idle" => options.idle = Some(number(&value()?)?),
                _ => return Err(format!("what is {argument}?")),
            }
        }
        Ok(options)
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
    let is_bare =
        matches!(point.transport, Transport::Floor | Transport::RawSame | Transport::RawRotating);
    match point.transport {
        Transport::Floor if point.size > 64 => false,
        Transport::RawSame | Transport::RawRotating if point.size <= 64 || !point.touch => false,
        _ if is_bare => point.streams == 1 && !point.shared_cpu,
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

fn main() {
    if std::env::args().nth(1).as_deref() == Some(lab::SERVE) {
        return lab::serve();
    }
    let options = match Options::parse() {
        Ok(options) => options,
        Err(problem) => {
            eprintln!("{problem}");
            std::process::exit(2);
        }
    };
    if let Some(sessions) = options.idle {
        return report_idle(sessions);
    }
    let points = options.points();
    let mut outcomes: Vec<Vec<Outcome>> = vec![Vec::new(); points.len()];
    let mut lab = Lab::start();
    for _ in 0..options.rounds {
        for (point, outcomes) in points.iter().zip(&mut outcomes) {
            outcomes.push(lab.run(*point));
        }
    }
    if !options.json {
        println!(
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
        );
    }
    for (point, outcomes) in points.iter().zip(&outcomes) {
        report(*point, outcomes, options.json);
    }
}

fn report_idle(sessions: usize) {
    let path = std::env::temp_dir().join(format!("ping-pong-idle-{}.sock", std::process::id()));
    let share = ours::idle_share(&path, sessions, Duration::from_secs(5));
    println!("{{\"idle_sessions\":{sessions},\"cpu_share\":{share:.6}}}");
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

fn report(point: Point, outcomes: &[Outcome], json: bool) {
    let (p50, least, most) = spread(outcomes.iter().map(|outcome| outcome.slice.p50_ns));
    let (p99, ..) = spread(outcomes.iter().map(|outcome| outcome.slice.p99_ns));
    let (per_op, ..) = spread(outcomes.iter().map(|outcome| outcome.slice.per_op_ns));
    let (allocations, ..) = spread(outcomes.iter().map(|outcome| outcome.allocations_per_op));
    let (syscalls, ..) = spread(outcomes.iter().filter_map(|outcome| outcome.syscalls_per_op));
    let Point { transport, size, streams, touch, shared_cpu, .. } = point;
    let name = transport.name();
    if json {
        let syscalls = if syscalls.is_nan() { "null".into() } else { format!("{syscalls:.5}") };
        println!(
            "{{\"transport\":\"{name}\",\"size\":{size},\"streams\":{streams},\"touch\":{touch},\
             \"p50_ns\":{p50:.1},\"p99_ns\":{p99:.1},\"per_op_ns\":{per_op:.1},\
             \"syscalls_per_op\":{syscalls},\"allocs_per_op\":{allocations:.5},\
             \"p50_min_ns\":{least:.1},\"p50_max_ns\":{most:.1},\"one_cpu\":{shared_cpu}}}"
        );
    } else {
        let spread = format!("({least:.0}-{most:.0})");
        println!(
            "{name:<24} {size:>8} {streams:>7} {touch:>5} {p50:>10.0} {spread:>21} {p99:>10.0} \
             {per_op:>10.1} {syscalls:>9.4} {allocations:>8.4}"
        );
    }
}
