//! The limits of the machine: two processes on shared memory, with nothing between them.
//!
//! Both sides spin on a word that stands before the payload. What is measured is the round trip of
//! the lines, and of the payload when it is written and read.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use memmap2::{MmapOptions, MmapRaw};

use super::payload;
use super::point::{Point, Slice, Stopwatch, Transport, batch_for};

/// How far the rotating variant goes before it starts over.
const ROTATION: usize = 4 << 20;
/// A line for each word, then the payload.
const PAYLOAD: usize = 4096;
const STOP: u32 = u32::MAX;

struct Memory {
    mapping: MmapRaw,
    half: usize,
}

impl Memory {
    fn open(path: &Path, point: Point) -> Self {
        let half = ROTATION.max(point.size) + (1 << 20);
        let len = PAYLOAD + 2 * half;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .expect("a file in /dev/shm");
        file.set_len(len as u64).expect("room in /dev/shm");
        let mapping = MmapOptions::new().len(len).map_raw(&file).expect("a mapping");
        Self { mapping, half }
    }

    fn word(&self, line: usize) -> &AtomicU32 {
        // SAFETY: line 0 and 1 are inside the mapping and aligned, and only accessed atomically.
        unsafe { AtomicU32::from_ptr(self.mapping.as_mut_ptr().add(line * 256).cast()) }
    }

    /// The payload at `at` of the first or the second half.
    #[allow(clippy::mut_from_ref, reason = "the two sides take turns by the words")]
    fn bytes(&self, half: usize, at: usize, len: usize) -> &mut [u8] {
        assert!(half < 2 && at + len <= self.half);
        // SAFETY: inside the mapping; the other process does not touch these bytes until the word
        // says that it is its turn.
        unsafe {
            let start = self.mapping.as_mut_ptr().add(PAYLOAD + half * self.half + at);
            std::slice::from_raw_parts_mut(start, len)
        }
    }
}

fn wait_for(word: &AtomicU32, before: u32) -> u32 {
    loop {
        let value = word.load(Ordering::Acquire);
        if value != before {
            return value;
        }
        std::hint::spin_loop();
    }
}

/// Where round trip `number` writes.
fn place(point: Point, number: usize) -> usize {
    if point.transport != Transport::RawRotating {
        return 0;
    }
    let steps = (ROTATION / point.size.max(1)).max(1);
    number % steps * point.size
}

pub(crate) fn serve(path: &Path, point: Point) {
    let memory = Memory::open(path, point);
    let same = point.transport != Transport::RawRotating;
    let mut last = 0;
    for number in 0.. {
        last = wait_for(memory.word(0), last);
        if last == STOP {
            return;
        }
        let at = place(point, number);
        if point.transport != Transport::Floor && point.touch {
            payload::read(memory.bytes(0, at, point.size));
            payload::write(memory.bytes(usize::from(!same), at, point.size), number as u8);
        }
        memory.word(1).store(last, Ordering::Release);
    }
}

pub(crate) fn measure(path: &Path, point: Point) -> Slice {
    let memory = Memory::open(path, point);
    let same = point.transport != Transport::RawRotating;
    let mut watch = Stopwatch::start(point.slice, batch_for(point.transport, point.size));
    let (mut turn, mut number) = (0u32, 0);
    let mut next = Some(Instant::now());
    while let Some(began) = next {
        for _ in 0..watch.batch() {
            let at = place(point, number);
            let touches = point.transport != Transport::Floor && point.touch;
            if touches {
                payload::write(memory.bytes(0, at, point.size), number as u8);
            }
            let last = turn;
            turn = (turn + 1) % (STOP - 1);
            memory.word(0).store(turn, Ordering::Release);
            wait_for(memory.word(1), last);
            if touches {
                payload::read(memory.bytes(usize::from(!same), at, point.size));
            }
            number += 1;
        }
        next = watch.lap(began);
    }
    memory.word(0).store(STOP, Ordering::Release);
    watch.stop()
}
