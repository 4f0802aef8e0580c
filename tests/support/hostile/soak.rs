// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random faults, one after the other, on both sides, with two honest sessions beside them.
//!
//! A few seconds by default; `SHMIPC_SOAK_SECONDS=600` for longer, and `SHMIPC_SOAK_SEED` to do the
//! same again.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use futures_lite::{AsyncReadExt, AsyncWriteExt};
use glommio::{LocalExecutorBuilder, Placement};
use nix::sys::signal::Signal;
use shmipc_glommio::{Config, Connector, Error};

use super::attacks::{
    Attack, bad_chains, bad_indices, bad_lists, bad_messages, bad_offsets, bad_slices, bad_states,
};
use super::connecting::{RawServer, client_config};
use super::dying::{Actor, CLIENT_POINTS};
use super::files::bad_descriptors;
use super::running::Dice;
use crate::config;
use crate::support::bed::{Api, Bed, Fate};
use crate::support::raw::{Raw, Rig, STAGES, Stage, at_stage, message};

/// What this process has.
#[derive(Debug, Clone, Copy)]
struct Possessions {
    resident_kib: u64,
    descriptors: usize,
    mappings: usize,
}

impl Possessions {
    fn now(name: &str) -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        Self {
            resident_kib: line.split_whitespace().nth(1).unwrap().parse().unwrap(),
            descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
            mappings: maps.lines().filter(|line| line.contains(name)).count(),
        }
    }
}

/// A session that sends, and looks at every byte that comes back, until it is told to stop.
struct Honest {
    is_over: Arc<AtomicBool>,
    bytes: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Honest {
    fn start(path: &Path, seed: u64) -> Self {
        let (is_over, bytes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (over, count, path) = (Arc::clone(&is_over), Arc::clone(&bytes), path.to_owned());
        let run = move || async move {
            let config = Config::builder().container().build().unwrap();
            let session = Connector::new(config).connect(&path).await.unwrap();
            let mut dice = Dice(seed);
            let mut stream = session.open_stream().unwrap();
            while !over.load(Ordering::Relaxed) {
                let len = 1 + dice.next(60_000) as usize;
                let first = dice.next(256);
                let request: Vec<u8> =
                    (0..len as u64).map(|at| (first + at * 13 + at / 251) as u8).collect();
                stream.write_all(&request).await.expect("an honest session is cut off");
                let mut answer = vec![0; len];
                stream.read_exact(&mut answer).await.expect("an honest session is cut off");
                assert!(answer == request, "a wrong byte");
                count.fetch_add(len as u64, Ordering::Relaxed);
                if dice.next(50) == 0 {
                    stream = session.open_stream().unwrap();
                }
                // So that the others get somewhere, too.
                glommio::timer::sleep(Duration::from_micros(dice.next(2000))).await;
            }
        };
        let builder = LocalExecutorBuilder::new(Placement::Unbound);
        let executor = builder.spawn(run).unwrap();
        let thread = std::thread::spawn(|| executor.join().unwrap());
        Self { is_over, bytes, thread }
    }

    /// Stops it. How many bytes came back as they went.
    fn finish(self) -> u64 {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().expect("an honest session came to harm");
        self.bytes.load(Ordering::Relaxed)
    }
}

const NO_MEMORY: &str = "descriptors of no memory";

struct Soak<'a> {
    bed: &'a Bed,
    server: RawServer,
    attacks: Vec<Attack>,
    dice: Dice,
    counts: BTreeMap<&'static str, u64>,
}

impl Soak<'_> {
    fn rig(&mut self) -> Rig {
        match self.dice.next(2) {
            0 => Rig::client(self.bed.path(), self.bed.name()),
            _ => self.server.session(self.bed),
        }
    }

    /// Does something, and gives what it was.
    fn fault(&mut self) -> &'static str {
        match self.dice.next(8) {
            0 | 1 => {
                let mut rig = self.rig();
                rig.echo(b"honest as yet");
                rig.wait_for_rest();
                let index = self.dice.next(self.attacks.len() as u64) as usize;
                (self.attacks[index].run)(&mut rig);
                // Seen to its end, whoever closes.
                drop(rig);
                "a known attack"
            }
            2 | 3 => {
                let mut rig = self.rig();
                let slices = rig.all_slices();
                for _ in 0..self.dice.next(80) {
                    match self.dice.next(4) {
                        0 => rig.allow_v3_fallback(2, 0, b"answer me"),
                        1 => rig.ring(),
                        _ => self.dice.scribble(&rig, &slices),
                    }
                }
                rig.ring();
                "random writes to the memory"
            }
            4 => {
                let mut rig = self.rig();
                rig.echo(b"honest as yet");
                let file = if self.dice.next(2) == 0 { &rig.queue } else { &rig.buffer };
                // Memory that our client has made is sealed.
                let _ = file.set_len(self.dice.next(2) * 4096);
                for _ in 0..20 {
                    rig.allow_v3_fallback(2, 0, &[7; 200]);
                }
                "memory that is truncated"
            }
            5 => {
                let stage = STAGES[self.dice.next(3) as usize];
                let mut raw = at_stage(self.bed.path(), stage);
                let mut bytes = match self.dice.next(3) {
                    0 => Vec::new(),
                    1 => message(self.dice.next(12) as u8, 3, &[]),
                    _ => vec![0, 0, 0, 8, 0x77, 0x58],
                };
                let random = (0..self.dice.next(40)).map(|_| self.dice.next(256) as u8);
                bytes.extend(random);
                raw.send(&bytes);
                "random bytes in a handshake"
            }
            6 => {
                let all = bad_descriptors();
                let (_, make, _) = &all[self.dice.next(all.len() as u64) as usize];
                let files = make(self.bed.name());
                let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
                let mut raw: Raw = at_stage(self.bed.path(), Stage::Descriptors);
                raw.send_with(&[0], &fds);
                NO_MEMORY
            }
            _ => {
                // These take a hundred times as long as the others.
                if self.dice.next(10) > 0 {
                    let mut rig = self.rig();
                    rig.echo(&[7; 60]);
                    return "an honest session that goes";
                }
                let point = self.dice.next(u64::from(CLIENT_POINTS)) as u32;
                let mut actor = Actor::start("client", point, Signal::SIGKILL, self.bed.path());
                actor.wait();
                "a process that is killed"
            }
        }
    }

    fn round(&mut self) {
        let what = self.fault();
        // What cannot be mapped at all, the system says.
        let is_system = |error: &Error| matches!(error, Error::Os { .. });
        match self.bed.fate() {
            Ok(Fate::Ended(error) | Fate::Refused(error))
                if error.is_peer_fault()
                    || matches!(error, Error::PeerClosed)
                    || (what == NO_MEMORY && is_system(&error)) => {}
            other => self.bed.note(format!("{what}: {other:?}")),
        }
        *self.counts.entry(what).or_default() += 1;
    }
}

#[test]
fn random_faults_beside_honest_sessions() {
    let variable = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let time = Duration::from_secs(variable("SHMIPC_SOAK_SECONDS").unwrap_or(4));
    let clock = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos();
    let seed = variable("SHMIPC_SOAK_SEED").unwrap_or_else(|| clock() as u64);
    println!("SHMIPC_SOAK_SEED={seed}");
    let bed = Bed::start_with(config().build().unwrap(), Api::Bytes);
    let honest = [1, 2].map(|number| Honest::start(bed.path(), seed ^ number));
    let attacks =
        [bad_offsets, bad_chains, bad_slices, bad_states, bad_indices, bad_lists, bad_messages];
    let mut soak = Soak {
        bed: &bed,
        server: RawServer::new(&bed, client_config()),
        attacks: attacks.into_iter().flat_map(|make| make()).collect(),
        dice: Dice(seed),
        counts: BTreeMap::new(),
    };
    let began = Instant::now();
    let mut before = None;
    while began.elapsed() < time {
        soak.round();
        // What is made once has been made by then.
        if before.is_none() && began.elapsed() > time / 4 {
            bed.must_go_on("a part of the faults");
            before = Some(Possessions::now(bed.name()));
        }
    }
    let counts = std::mem::take(&mut soak.counts);
    drop(soak);
    bed.must_go_on("all faults");
    let (before, after) = (before.unwrap(), Possessions::now(bed.name()));
    let bytes = honest.map(Honest::finish);
    let total: u64 = counts.values().sum();
    println!("{total} faults in {time:?}: {counts:#?}");
    println!("{bytes:?} bytes of honest sessions; from {before:?} to {after:?}");
    assert!(bytes.iter().all(|&bytes| bytes > 0));
    // Other tests of this program may run beside this one: so only when it was asked for.
    if variable("SHMIPC_SOAK_SECONDS").is_some() {
        assert!(after.resident_kib < before.resident_kib + (16 << 10), "{before:?} {after:?}");
        assert!(after.descriptors <= before.descriptors + 4, "{before:?} {after:?}");
    }
    // Of the last fault, which may not be over.
    assert!(after.mappings <= before.mappings + 4, "{before:?} {after:?}");
    bed.finish();
}
