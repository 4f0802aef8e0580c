// SPDX-License-Identifier: MIT OR Apache-2.0
//! One of the two processes of the stress: it takes, sends, receives and frees, and books for each
//! slice who has it.

use std::collections::VecDeque;
use std::fs::File;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::config::SliceClass;
use crate::error::MemoryError;
use crate::shm::event_queue::{self, Consumer, Producer};
use crate::shm::map::memory::Memory;
use crate::shm::map::region::Region;
use crate::shm::pool::format::{ListSets, Side, create_lists, map_lists};
use crate::shm::pool::size_class::Classes;
use crate::shm::pool::slice_table::{Entry, SliceId};
use crate::wire::Event;
use crate::wire::layout::{
    FLAG_HAS_NEXT, FLAG_IN_USE, LIST_HEADER_LEN, MANAGER_HEADER_LEN, QueueLayout,
    SLICE_FLAGS_OFFSET, SLICE_HEADER_LEN, SLICE_NEXT_OFFSET,
};

/// Says to a process that it is a side, and which one.
pub(super) const TASK: &str = "SHMIPC_LIST_STRESS_TASK";
/// The longest that nothing may happen, on a machine that is busy with other things.
pub(super) const LONG: Duration = Duration::from_secs(100);

const SLICE: u32 = 64;
pub(super) const EVENTS: u32 = 16;
const LAYOUT: QueueLayout = QueueLayout::Aligned;

/// The books: a memory beside the lists, for the test alone.
pub(super) mod books {
    /// Not 0: both sides end at once.
    pub(crate) const STOP: usize = 0;
    /// Not 0: lists and queues are laid out.
    pub(crate) const READY: usize = 4;
    /// What a side says of itself, each on lines of its own.
    pub(crate) const SIDES: [usize; 2] = [512, 1024];
    /// Not 0: it takes and sends nothing more.
    pub(crate) const IS_DONE: usize = 0;
    /// How it ended, a [`Finding`](super::Finding).
    pub(crate) const FINDING: usize = 4;
    /// Slices that it has taken, sent, and freed.
    pub(crate) const TAKEN: usize = 8;
    pub(crate) const SENT: usize = 16;
    pub(crate) const FREED: usize = 24;
    /// How often it asked for slices and got some.
    pub(crate) const BATCHES: usize = 32;
    /// How often it got none.
    pub(crate) const EMPTY: usize = 40;
    /// What it found, in words.
    pub(crate) const TEXT: usize = 64;
    pub(crate) const TEXT_LEN: usize = 256;
    /// Who has each slice: 0 for nobody, or the number of a side and one.
    pub(crate) const OWNERS: usize = 2048;
    pub(crate) const LEN: usize = OWNERS + 4 * 1024;
}

/// How a side ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Finding {
    /// It has not.
    Unknown,
    Nothing,
    /// The list has reported itself broken.
    Broken,
    /// A slice came that this side held: what the manager's ledger finds.
    Ledger,
    /// A slice came that somebody has, by the words beside the lists.
    Twice,
}

impl Finding {
    pub(super) const ALL: [Self; 5] =
        [Self::Unknown, Self::Nothing, Self::Broken, Self::Ledger, Self::Twice];

    pub(super) fn is_reported(self) -> bool {
        matches!(self, Self::Broken | Self::Ledger)
    }
}

/// Numbers from a seed (splitmix64).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}

/// Who takes from which lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Both from the same, and know it.
    Shared,
    /// Each from its own.
    Apart,
    /// Both from the client's, and each of them believes that it is the only one. Shows that this
    /// test finds what it looks for.
    Mistaken,
}

impl Kind {
    pub(super) fn sets(self, side: usize) -> ListSets {
        match self {
            Self::Shared => ListSets::Shared,
            Self::Apart => ListSets::OnePerSide([Side::Client, Side::Server][side]),
            Self::Mistaken => ListSets::OnePerSide(Side::Client),
        }
    }

    /// Bytes of memory for lists of `capacity` slices each.
    pub(super) fn memory_len(self, capacity: u32) -> usize {
        let list = LIST_HEADER_LEN + capacity as usize * (SLICE_HEADER_LEN + SLICE as usize);
        MANAGER_HEADER_LEN + list * if self == Self::Shared { 1 } else { 2 }
    }
}

/// What one side works with.
struct Player {
    side: usize,
    memory: Region,
    books: Region,
    classes: Classes,
    ledger: Box<[Entry]>,
    producer: Producer<Region>,
    consumer: Consumer<Region>,
    random: Random,
    /// Taken, and neither sent nor freed. The ledger has them.
    held: VecDeque<SliceId>,
    /// From the other side, and not yet freed. The ledger has them too.
    received: VecDeque<SliceId>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    taken: i64,
    sent: i64,
    freed: i64,
    batches: i64,
    empty: i64,
}

/// Why a side ends before its time, and in words.
type Found = (Finding, String);

fn broken(error: MemoryError) -> Found {
    (Finding::Broken, error.to_string())
}

impl Player {
    /// Gives way until something is so.
    fn wait(is_so: impl Fn() -> bool) {
        let deadline = Instant::now() + LONG;
        while !is_so() {
            assert!(Instant::now() < deadline, "the other side does not come");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn start(task: &str) -> Self {
        let parts: Vec<u64> = task.split(' ').map(|part| part.parse().unwrap()).collect();
        let [parent, buffer, queues, books, side, kind, seed] = parts[..] else {
            panic!("{task:?}");
        };
        let map = |number: u64| {
            let path = format!("/proc/{parent}/fd/{number}");
            let file = File::options().read(true).write(true).open(path).unwrap();
            Region::map_descriptor(file.into(), "memory", 1 << 20).unwrap()
        };
        let (memory, queues, books) = (map(buffer), Rc::new(map(queues)), map(books));
        let side = side as usize;
        let sets = [Kind::Shared, Kind::Apart, Kind::Mistaken][kind as usize].sets(side);
        let (lists, (producer, consumer)) = if side == 0 {
            let lists = create_lists(&memory, &[SliceClass::new(SLICE, 100)], sets).unwrap();
            let ends = event_queue::create(&queues, EVENTS, LAYOUT);
            // Release, pairs with the acquire load of the other side below.
            books.store_u32(books::READY, 1, Ordering::Release);
            (lists, ends)
        } else {
            Self::wait(|| books.load_u32(books::READY, Ordering::Acquire) != 0);
            (map_lists(&memory, sets).unwrap(), event_queue::map(&queues, LAYOUT).unwrap())
        };
        let (classes, ledger) = Classes::new(&memory, &lists).unwrap();
        Self {
            side,
            memory,
            books,
            classes,
            ledger,
            producer,
            consumer,
            random: Random(seed.wrapping_add(side as u64)),
            held: VecDeque::new(),
            received: VecDeque::new(),
            counts: Counts::default(),
        }
    }

    /// Swaps who has a slice. Gives who had it.
    fn swap_owner(&self, id: SliceId, owner: u32) -> u32 {
        // Acquire and release: the word is the slice's history, whoever writes it.
        self.books.swap_u32(books::OWNERS + 4 * id as usize, owner, Ordering::AcqRel)
    }

    /// Puts a slice into the ledger, as the manager does.
    fn enter(&self, id: SliceId, offset: u32) -> Result<(), Found> {
        let entry = &self.ledger[id as usize];
        if entry.offset.get() != 0 {
            return Err((Finding::Ledger, MemoryError::SharedTwice { offset }.to_string()));
        }
        entry.set(offset, 0, 0);
        Ok(())
    }

    fn take(&mut self) -> Result<bool, Found> {
        let want = 1 + self.random.below(4) as usize;
        let class = self.classes.iter().next().unwrap();
        let batch = class.take(&self.memory, want).map_err(broken)?;
        for &place in batch.places() {
            let (id, slice) = (class.first + place, class.list().slice(place));
            self.enter(id, slice as u32)?;
            let before = self.swap_owner(id, self.side as u32 + 1);
            if before != 0 {
                let text = format!("slice {id} was taken, and is with side {}", before - 1);
                return Err((Finding::Twice, text));
            }
            self.held.push_back(id);
        }
        let count = batch.places().len() as i64;
        self.counts.taken += count;
        self.counts.batches += i64::from(count > 0);
        self.counts.empty += i64::from(count == 0);
        Ok(count > 0)
    }

    /// Gives back slices that `owner` has taken.
    fn free(&mut self, ids: &[SliceId], owner: usize) -> Result<(), Found> {
        for &id in ids {
            self.ledger[id as usize].offset.set(0);
            let before = self.swap_owner(id, 0);
            if before != owner as u32 + 1 {
                let text =
                    format!("slice {id} was with side {owner}, and is {before} in the words");
                return Err((Finding::Twice, text));
            }
        }
        for stand in self.classes.stands_of(0) {
            let places: Vec<u32> =
                ids.iter().filter(|&&id| stand.has(id)).map(|&id| id - stand.first).collect();
            stand.list.give(&self.memory, &places).map_err(broken)?;
        }
        self.counts.freed += ids.len() as i64;
        Ok(())
    }

    /// Sends most of what is held, as far as there is room, and frees some of it unsent.
    fn dispose(&mut self, sends: bool) -> Result<bool, Found> {
        let mut unsent = Vec::new();
        let mut count = 0;
        while let Some(&id) = self.held.front() {
            if !sends || self.random.below(4) == 0 {
                unsent.push(id);
            } else {
                let offset = self.ledger[id as usize].offset.get();
                if !self.producer.push(Event { stream_id: id, offset, status: 0 }).unwrap() {
                    break;
                }
                // As in a message: linked by an offset that is none of the list's.
                let next = offset as usize + SLICE_NEXT_OFFSET;
                self.memory.store_u32(next, offset, Ordering::Relaxed);
                let flags = offset as usize + SLICE_FLAGS_OFFSET;
                self.memory.store_u8(flags, FLAG_HAS_NEXT | FLAG_IN_USE, Ordering::Relaxed);
                self.ledger[id as usize].offset.set(0);
                self.counts.sent += 1;
            }
            count += 1;
            self.held.pop_front();
        }
        self.free(&unsent, self.side)?;
        self.producer.publish();
        Ok(count > 0)
    }

    /// Receives what there is, and frees some of what has come.
    fn receive(&mut self, frees_all: bool) -> Result<bool, Found> {
        let mut count = self.consumer.available().unwrap() as usize;
        for _ in 0..count {
            let event = self.consumer.pop().unwrap();
            let id = self.classes.locate(event.offset);
            assert_eq!(id, Some(event.stream_id), "the queue carries what was sent");
            self.enter(event.stream_id, event.offset)?;
            self.received.push_back(event.stream_id);
        }
        self.consumer.publish();
        let some = self.random.below(self.received.len() as u64 + 1) as usize;
        let frees = if frees_all { self.received.len() } else { some };
        let ids: Vec<SliceId> = self.received.drain(..frees).collect();
        count += ids.len();
        self.free(&ids, 1 - self.side)?;
        Ok(count > 0)
    }

    /// Shows the test how far this side is.
    fn show_counts(&self) {
        let at = books::SIDES[self.side];
        self.books.store_i64(at + books::TAKEN, self.counts.taken);
        self.books.store_i64(at + books::SENT, self.counts.sent);
        self.books.store_i64(at + books::FREED, self.counts.freed);
        self.books.store_i64(at + books::BATCHES, self.counts.batches);
        self.books.store_i64(at + books::EMPTY, self.counts.empty);
    }

    fn taken_by_both(&self) -> i64 {
        let other = self.books.load_i64(books::SIDES[1 - self.side] + books::TAKEN);
        self.counts.taken + other
    }

    fn must_stop(&self) -> bool {
        self.books.load_u32(books::STOP, Ordering::Acquire) != 0
    }

    /// Takes, sends and frees until both have taken so many together, and then until nothing is on
    /// its way any more.
    fn play(&mut self, takes: i64) -> Result<(), Found> {
        let other_is_done = books::SIDES[1 - self.side] + books::IS_DONE;
        let (mut idle, mut is_done) = (0, false);
        loop {
            if self.must_stop() {
                return Ok(());
            }
            // Acquire, pairs with the release store below: what it sent before, the queue shows.
            let other_is_done = self.books.load_u32(other_is_done, Ordering::Acquire) != 0;
            let mut has_moved = self.receive(is_done)?;
            if is_done && other_is_done && !has_moved {
                return Ok(());
            }
            if !is_done {
                if self.held.len() < 8 {
                    has_moved |= self.take()?;
                }
                is_done = self.taken_by_both() >= takes;
                has_moved |= self.dispose(!is_done)?;
                if is_done {
                    let at = books::SIDES[self.side] + books::IS_DONE;
                    // Release, pairs with the acquire load of the other side above.
                    self.books.store_u32(at, 1, Ordering::Release);
                }
                self.show_counts();
            }
            idle = if has_moved { 0 } else { idle + 1 };
            match idle {
                0 => {}
                1..50 => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(50)),
            }
        }
    }

    fn end(&self, finding: Finding, text: &str) {
        self.show_counts();
        let at = books::SIDES[self.side];
        let text = &text.as_bytes()[..text.len().min(books::TEXT_LEN)];
        self.books.copy_in(at + books::TEXT, text);
        // Both release, for whoever loads them with acquire.
        self.books.store_u32(at + books::FINDING, finding as u32, Ordering::Release);
        if finding != Finding::Nothing {
            self.books.store_u32(books::STOP, 1, Ordering::Release);
        }
    }
}

/// What a side does, in a process of its own; nothing where nobody asks for it.
#[test]
fn side() {
    let Ok(task) = std::env::var(TASK) else { return };
    // However the test ends, this process does not go on, nor stays stopped.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).unwrap();
    let (task, takes) = task.rsplit_once(' ').unwrap();
    let mut player = Player::start(task);
    match player.play(takes.parse().unwrap()) {
        Ok(()) => player.end(Finding::Nothing, ""),
        Err((finding, text)) => player.end(finding, &text),
    }
}
