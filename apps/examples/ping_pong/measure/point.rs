//! One thing that is measured, and how it is told to the server process.

use std::time::Duration;

use super::{count, harness};

/// What carries the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Transport {
    /// Two threads, without a protocol, on shared lines: the machine's limit for small messages.
    Floor,
    /// The same for large messages: bytes written and read in shared memory without a protocol. The
    /// reply is written where the request came in.
    RawSame,
    /// Without a protocol, rotating through 4 MiB each way.
    RawRotating,
    /// This crate.
    Ours(Ours),
    /// A Unix socket and blocking calls.
    UdsBlocking,
    /// A Unix socket on glommio.
    UdsGlommio,
    /// The crate `shmipc`.
    #[cfg(feature = "dev-shmipc")]
    ShmipcRs,
}

/// How this crate is configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Ours {
    /// Polling always.
    Spin,
    /// By default.
    Adaptive,
    /// Without polling: every message wakes the peer.
    Sleep,
    /// Version 4, polling always.
    V4Spin,
    /// Version 4: each side has buffer lists for itself.
    V4Adaptive,
    /// The same with twice the memory, so that each side has as much as both have in version 3.
    V4TwiceTheMemory,
    /// Version 4, with lists that both sides take from, as in version 3.
    V4SharedLists,
    /// Version 4, without polling, woken by the socket.
    V4Sleep,
    /// The same, woken by eventfds.
    V4SleepEventFd,
}

impl Transport {
    /// What is measured if nothing else is asked for.
    pub(crate) const USUAL: &[Self] = &[
        Self::Floor,
        Self::RawSame,
        Self::RawRotating,
        Self::Ours(Ours::Spin),
        Self::Ours(Ours::Adaptive),
        Self::Ours(Ours::Sleep),
        Self::UdsBlocking,
        Self::UdsGlommio,
        #[cfg(feature = "dev-shmipc")]
        Self::ShmipcRs,
    ];

    /// This crate in version 4.
    pub(crate) const V4: &[Self] = &[
        Self::Ours(Ours::V4Spin),
        Self::Ours(Ours::V4Adaptive),
        Self::Ours(Ours::V4TwiceTheMemory),
        Self::Ours(Ours::V4SharedLists),
        Self::Ours(Ours::V4Sleep),
        Self::Ours(Ours::V4SleepEventFd),
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::RawSame => "raw-same",
            Self::RawRotating => "raw-rotating",
            Self::Ours(Ours::Spin) => "shmipc-glommio-spin",
            Self::Ours(Ours::Adaptive) => "shmipc-glommio-adaptive",
            Self::Ours(Ours::Sleep) => "shmipc-glommio-sleep",
            Self::Ours(Ours::V4Spin) => "v4-spin",
            Self::Ours(Ours::V4Adaptive) => "v4-adaptive",
            Self::Ours(Ours::V4TwiceTheMemory) => "v4-adaptive-64-mib",
            Self::Ours(Ours::V4SharedLists) => "v4-adaptive-shared-lists",
            Self::Ours(Ours::V4Sleep) => "v4-sleep",
            Self::Ours(Ours::V4SleepEventFd) => "v4-sleep-eventfd",
            Self::UdsBlocking => "uds-blocking",
            Self::UdsGlommio => "uds-glommio",
            #[cfg(feature = "dev-shmipc")]
            Self::ShmipcRs => "shmipc-rs",
        }
    }

    pub(crate) fn by_name(name: &str) -> Option<Self> {
        Self::all().find(|transport| transport.name() == name)
    }

    pub(crate) fn all() -> impl Iterator<Item = Self> {
        Self::USUAL.iter().chain(Self::V4).copied()
    }
}

/// A transport, a size, how many streams at the same time, and whether every byte is written and
/// read on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Point {
    pub(crate) transport: Transport,
    pub(crate) size: usize,
    pub(crate) streams: usize,
    pub(crate) touch: bool,
    /// Whether both processes are on the same processor.
    pub(crate) shared_cpu: bool,
    /// How long one slice of it is measured.
    pub(crate) slice: Duration,
}

impl Point {
    /// The point as a line for the server process.
    pub(crate) fn to_line(self) -> String {
        format!(
            "{} {} {} {} {} {}",
            self.transport.name(),
            self.size,
            self.streams,
            u8::from(self.touch),
            u8::from(self.shared_cpu),
            self.slice.as_micros()
        )
    }

    pub(crate) fn from_line(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let transport = Transport::by_name(words.next()?)?;
        let mut number = || words.next()?.parse::<u64>().ok();
        Some(Self {
            transport,
            size: number()? as usize,
            streams: number()? as usize,
            touch: number()? != 0,
            shared_cpu: number()? != 0,
            slice: Duration::from_micros(number()?),
        })
    }
}

/// What one slice gave.
#[derive(Debug, Clone, Default)]
pub(crate) struct Slice {
    pub(crate) p50_ns: f64,
    pub(crate) p99_ns: f64,
    pub(crate) per_op_ns: f64,
    pub(crate) operations: u64,
}

/// Collects the time of every round trip, or of every batch of them where one is too short for the
/// clock.
pub(crate) struct Stopwatch {
    histogram: hdrhistogram::Histogram<u64>,
    started: std::time::Instant,
    until: std::time::Instant,
    batch: u64,
    operations: u64,
}

impl Stopwatch {
    /// `batch` round trips are timed together.
    pub(crate) fn start(slice: Duration, batch: u64) -> Self {
        let histogram = hdrhistogram::Histogram::new_with_bounds(1, 60_000_000_000, 3)
            .expect("bounds that fit");
        // The last one to start, after the warming, is the one that counts.
        harness::tell_server(harness::BEGIN);
        count::begin();
        let started = std::time::Instant::now();
        Self { histogram, started, until: started + slice, batch, operations: 0 }
    }

    pub(crate) fn batch(&self) -> u64 {
        self.batch
    }

    /// Notes a batch that began at `began`, and when the next one begins: now. `None`: the time is
    /// over. One look at the clock for each batch, since a look costs as much as a message.
    pub(crate) fn lap(&mut self, began: std::time::Instant) -> Option<std::time::Instant> {
        let now = std::time::Instant::now();
        // Ten times finer than a nanosecond, so that a short batch is not rounded away.
        let tenths = now.duration_since(began).as_nanos() as u64 * 10 / self.batch;
        self.histogram.saturating_record(tenths.max(1));
        self.operations += self.batch;
        (now < self.until).then_some(now)
    }

    pub(crate) fn stop(self) -> Slice {
        let elapsed = self.started.elapsed().as_nanos() as f64;
        count::end();
        harness::tell_server(harness::END);
        let quantile = |q| self.histogram.value_at_quantile(q) as f64 / 10.0;
        Slice {
            p50_ns: quantile(0.5),
            p99_ns: quantile(0.99),
            per_op_ns: elapsed / self.operations.max(1) as f64,
            operations: self.operations,
        }
    }
}

/// How many round trips of this size to time together.
pub(crate) fn batch_for(transport: Transport, size: usize) -> u64 {
    let is_fast = matches!(
        transport,
        Transport::Floor
            | Transport::RawSame
            | Transport::RawRotating
            | Transport::Ours(
                Ours::Spin
                    | Ours::Adaptive
                    | Ours::V4Spin
                    | Ours::V4Adaptive
                    | Ours::V4TwiceTheMemory
                    | Ours::V4SharedLists
            )
    );
    if is_fast && size <= 4096 { 16 } else { 1 }
}
