// SPDX-License-Identifier: MIT OR Apache-2.0
//! The executors, each on its thread: how they begin together, and what they have measured.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use glommio::{LocalExecutorBuilder, Placement};
use hdrhistogram::Histogram;
use shmipc_glommio::{Cores, preflight};

use super::counters::latencies;
use super::cpu::Cpu;
use super::executor::{self, Measured};
use super::failure::Failure;
use super::options::Options;
use super::session_totals::SessionTotals;

/// How often those who wait for the others look. To be woken from another thread is no faster.
const LOOK: Duration = Duration::from_millis(1);
/// How much longer than a connection an executor may show no sign of life.
const GRACE: Duration = Duration::from_secs(5);

/// What all executors have measured together.
pub(crate) struct Outcome {
    pub(crate) latencies: Histogram<u64>,
    pub(crate) seconds: f64,
    /// Over shared memory.
    pub(crate) totals: Option<SessionTotals>,
    pub(crate) cpu: Option<Cpu>,
}

/// What the executors share.
pub(crate) struct Shared {
    /// How often somebody came to a meeting.
    arrivals: AtomicUsize,
    /// For each executor, how often its watchdog has looked.
    alive: Vec<AtomicU64>,
}

impl Shared {
    fn new(executors: usize) -> Self {
        let alive = (0..executors).map(|_| AtomicU64::new(0)).collect();
        Self { arrivals: AtomicUsize::new(0), alive }
    }

    /// Waits until all executors have come here as often.
    pub(crate) async fn meet(&self) {
        let executors = self.alive.len();
        // What others did before they came is seen behind this, and behind the loads below.
        let earlier = self.arrivals.fetch_add(1, Ordering::AcqRel);
        let all = (earlier / executors + 1) * executors;
        while self.arrivals.load(Ordering::Acquire) < all {
            glommio::timer::sleep(LOOK).await;
        }
    }

    pub(crate) fn record_alive(&self, executor: usize) {
        self.alive[executor].fetch_add(1, Ordering::Relaxed);
    }
}

/// Runs the executors. The first failure is the outcome; what the others do then is lost.
pub(crate) fn run(options: &Options) -> Result<Outcome, Failure> {
    let mut pinned: Vec<_> = options.cores.iter().copied().take(options.threads).collect();
    pinned.sort_unstable();
    pinned.dedup();
    if !pinned.is_empty() {
        preflight(&Cores::List(pinned)).map_err(|error| failed(0, error.to_string()))?;
    }
    preflight(&Cores::Unpinned(options.threads)).map_err(|error| failed(0, error.to_string()))?;
    let shared = Arc::new(Shared::new(options.threads));
    let (sender, results) = mpsc::channel();
    let mut threads = Vec::new();
    for number in 0..options.threads {
        let (options, shared, sender) = (options.clone(), Arc::clone(&shared), sender.clone());
        let placement = match options.cores.get(number) {
            Some(&core) => Placement::Fixed(core),
            None => Placement::Unbound,
        };
        let work = move || async move {
            let result = executor::run(options, number, &shared).await;
            // Nobody listens any more when another executor has failed.
            let _ = sender.send((number, result));
        };
        let thread = LocalExecutorBuilder::new(placement).spawn(work);
        threads.push(thread.map_err(|error| failed(number, error.to_string()))?);
    }
    drop(sender);
    let outcome = collect(options, &shared, &results)?;
    for (number, thread) in threads.into_iter().enumerate() {
        thread.join().map_err(|error| failed(number, error.to_string()))?;
    }
    Ok(outcome)
}

/// Waits for all executors, and looks after them: one that hangs cannot say so itself.
fn collect(
    options: &Options,
    shared: &Shared,
    results: &mpsc::Receiver<(usize, Result<Measured, Failure>)>,
) -> Result<Outcome, Failure> {
    let patience = options.timeout + GRACE;
    let mut measured: Vec<Option<Measured>> = (0..options.threads).map(|_| None).collect();
    let mut seen = vec![(0, Instant::now()); options.threads];
    while measured.iter().any(Option::is_none) {
        match results.recv_timeout(Duration::from_secs(1)) {
            Ok((number, result)) => measured[number] = Some(result?),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                let number = measured.iter().position(Option::is_none).unwrap_or_default();
                return Err(failed(number, "it ended without a word".to_owned()));
            }
        }
        for (number, (last, since)) in seen.iter_mut().enumerate() {
            let looks = shared.alive[number].load(Ordering::Relaxed);
            if looks != *last || measured[number].is_some() {
                (*last, *since) = (looks, Instant::now());
            } else if since.elapsed() > patience {
                return Err(failed(number, "it hangs".to_owned()));
            }
        }
    }
    Ok(merge(measured.into_iter().flatten()))
}

fn merge(all: impl Iterator<Item = Measured>) -> Outcome {
    let mut merged = latencies();
    let (mut totals, mut cpu): (Option<SessionTotals>, _) = (None, None);
    let mut span: Option<(Instant, Instant)> = None;
    for measured in all {
        // All have the same bounds, so what is in one fits into the other.
        merged.add(&measured.latencies).expect("histograms of the same bounds");
        totals = match (totals, measured.totals) {
            (Some(sum), Some(more)) => Some(sum.with(&more)),
            (sum, more) => sum.or(more),
        };
        cpu = cpu.or(measured.cpu);
        span = Some(match span {
            None => (measured.started, measured.ended),
            Some((start, end)) => (start.min(measured.started), end.max(measured.ended)),
        });
    }
    let seconds = span.map_or(0.0, |(start, end)| end.duration_since(start).as_secs_f64());
    Outcome { latencies: merged, seconds, totals, cpu }
}

fn failed(executor: usize, problem: String) -> Failure {
    Failure::Executor { executor, problem }
}
