// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which streams a session has, and which it has had (`docs/protocol.md#stream-ids`).
//!
//! Streams are numbered by the client, upwards from 2; the server learns of one with the first
//! event that names it. An event for a number that is not in the table is therefore either a new
//! stream or data that was under way when this side closed an old one, and the two must not be
//! confused: the first is accepted, the second is given back. Numbers are compared as serial
//! numbers, so a session may wrap around.
//!
//! A client may use its streams in another order than it opened them in, and never use some, so
//! what the peer has used is everything up to the highest number, less the gaps. A client of this
//! crate tells from time to time which streams it has dropped unused, so the gaps that it leaves
//! are streams that are open, and a few more.
//!
//! Whom it trusts: nobody. A peer can open streams up to the limit, and can leave gaps in its
//! numbers up to [`MAX_GAPS`]; neither costs more than a table entry. Beyond, the lowest numbers
//! are [forgotten](StreamTable::is_forgotten): what comes for one of them is refused, and the peer
//! is told.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

/// The number that no stream has: implementations count from 2, and so does a session that has had
/// all numbers once.
pub const NO_STREAM: u32 = 0;

/// The number of the first stream that a client of this crate opens, as shmipc-go does.
const FIRST_STREAM: u32 = 2;

/// How many ranges of numbers that were passed over are remembered. Beyond, the lowest is
/// forgotten. So many take less than 2 MiB.
const MAX_GAPS: usize = 1 << 16;
/// How many streams can be looked up without hashing.
const NEAR: usize = 64;

const fn place(id: u32) -> usize {
    id as usize % NEAR
}

/// Which end of the session this side is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The side that connected; its streams have odd numbers.
    Client,
    /// The side that accepted; its streams have even numbers.
    Server,
}

/// The streams of a session by number.
pub struct StreamTable<T> {
    role: Role,
    limit: usize,
    streams: HashMap<u32, T, BuildHasherDefault<StreamHasher>>,
    /// The same streams again, each at the place that its number gives, as far as there is room:
    /// numbers are given out in order, so the streams of a session mostly have a place each.
    near: [Option<(u32, T)>; NEAR],
    /// Client: the number to try next.
    next: u32,
    /// Server: what the peer has used.
    used: UsedNumbers,
}

impl<T: Clone> StreamTable<T> {
    /// A table with room for `limit` streams.
    pub fn new(role: Role, limit: usize) -> Self {
        Self {
            role,
            limit,
            streams: HashMap::default(),
            near: [const { None }; NEAR],
            next: FIRST_STREAM,
            used: UsedNumbers::new(),
        }
    }

    /// How many streams there are.
    pub fn len(&self) -> usize {
        self.streams.len()
    }

    /// Whether there is no stream.
    pub fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    /// Whether there is no room for another stream.
    pub fn is_full(&self) -> bool {
        self.streams.len() >= self.limit
    }

    /// Whether data for this number, which is not in the table, opens a stream. If not, the stream
    /// was closed here, or never existed: what comes is given back.
    pub fn is_new(&self, id: u32) -> bool {
        self.role == Role::Server && id != NO_STREAM && !self.used.contains(id)
    }

    /// Server: whether this number is too far below the highest to know whether the peer has used
    /// it. If it has not, it must be told that the stream is refused.
    pub fn is_forgotten(&self, id: u32) -> bool {
        self.role == Role::Server && self.used.is_forgotten(id)
    }

    /// Server: the peer has closed a stream that is not in the table. Only one of this crate closes
    /// streams that it has `never_used`, in the order of its queue.
    pub fn note_closed(&mut self, id: u32, never_used: bool) {
        if self.role == Role::Client {
            return;
        }
        match never_used {
            true => self.used.insert(id),
            // It may be a number that is no stream's.
            false => self.used.fill(id),
        }
    }

    /// A stream of the table.
    #[inline]
    pub fn get(&self, id: u32) -> Option<&T> {
        match &self.near[place(id)] {
            Some((number, stream)) if *number == id => Some(stream),
            _ => self.streams.get(&id),
        }
    }

    /// Server: notes that the peer has used this number, whether the stream is accepted or not.
    pub fn note_used(&mut self, id: u32) {
        self.used.insert(id);
    }

    /// Server: enters a stream that the peer opened.
    pub fn insert(&mut self, id: u32, stream: T) {
        self.used.insert(id);
        self.enter(id, stream);
    }

    fn enter(&mut self, id: u32, stream: T) {
        self.near[place(id)] = Some((id, stream.clone()));
        self.streams.insert(id, stream);
    }

    /// Client: enters a stream under the next free number, if the limit allows one more.
    pub fn open(&mut self, make: impl FnOnce(u32) -> T) -> Option<T> {
        if self.is_full() {
            return None;
        }
        // Ends: there are fewer streams than numbers.
        while self.next == NO_STREAM || self.streams.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let stream = make(self.next);
        self.enter(self.next, stream.clone());
        self.next = self.next.wrapping_add(1);
        Some(stream)
    }

    /// Client: as if all numbers before this one had been given out.
    #[cfg(any(test, feature = "test-util"))]
    pub fn skip_to(&mut self, next: u32) {
        self.next = next;
    }

    /// Takes a stream out of the table.
    pub fn remove(&mut self, id: u32) -> Option<T> {
        let near = &mut self.near[place(id)];
        if near.as_ref().is_some_and(|(number, _)| *number == id) {
            *near = None;
        }
        self.streams.remove(&id)
    }

    /// All streams, in no order.
    pub fn all(&self) -> Vec<T> {
        self.streams.values().cloned().collect()
    }
}

/// The numbers that a peer has used: everything up to the highest, less the gaps.
///
/// Numbers are kept as positions that do not wrap around: the first round's are the numbers
/// themselves, and each round adds 2^32.
struct UsedNumbers {
    highest: Option<u64>,
    /// Ranges that were passed over: the last of each by its first.
    gaps: BTreeMap<u64, u64>,
    /// What lies below is forgotten.
    known_from: u64,
}

impl UsedNumbers {
    const fn new() -> Self {
        Self { highest: None, gaps: BTreeMap::new(), known_from: 0 }
    }

    /// Where a number stands, as near to the highest as can be. `None`: before the first round.
    fn position(id: u32, highest: u64) -> Option<u64> {
        // The low half of a position is the number.
        let distance = id.wrapping_sub(highest as u32).cast_signed();
        highest.checked_add_signed(distance.into())
    }

    fn gap_of(&self, position: u64) -> Option<(u64, u64)> {
        let (&first, &last) = self.gaps.range(..=position).next_back()?;
        (position <= last).then_some((first, last))
    }

    fn contains(&self, id: u32) -> bool {
        let Some(highest) = self.highest else { return false };
        Self::position(id, highest)
            .is_none_or(|position| position <= highest && self.gap_of(position).is_none())
    }

    fn is_forgotten(&self, id: u32) -> bool {
        let Some(highest) = self.highest else { return false };
        Self::position(id, highest).is_none_or(|position| position < self.known_from)
    }

    fn insert(&mut self, id: u32) {
        let Some(highest) = self.highest else {
            // Numbers below the first one that arrives may still be on their way.
            if id > FIRST_STREAM {
                self.gaps.insert(FIRST_STREAM.into(), u64::from(id) - 1);
            }
            self.highest = Some(id.into());
            return;
        };
        let Some(position) = Self::position(id, highest) else { return };
        if position <= highest {
            return self.fill(id);
        }
        if position > highest + 1 {
            self.gaps.insert(highest + 1, position - 1);
            self.forget_lowest();
        }
        self.highest = Some(position);
    }

    /// Takes a number out of its gap, if it is in one.
    fn fill(&mut self, id: u32) {
        let position = self.highest.and_then(|highest| Self::position(id, highest));
        let Some(position) = position else { return };
        let Some((first, last)) = self.gap_of(position) else { return };
        if first < position {
            self.gaps.insert(first, position - 1);
        } else {
            self.gaps.remove(&first);
        }
        if position < last {
            self.gaps.insert(position + 1, last);
        }
        self.forget_lowest();
    }

    fn forget_lowest(&mut self) {
        if self.gaps.len() > MAX_GAPS
            && let Some((_, last)) = self.gaps.pop_first()
        {
            self.known_from = last + 1;
        }
    }
}

/// Stream numbers are small and dense, and a peer that picks them to collide slows its own session
/// only; a multiplication spreads them well enough and costs a cycle.
#[derive(Default)]
struct StreamHasher(u64);

impl Hasher for StreamHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u32(u32::from(byte) ^ self.0 as u32);
        }
    }

    fn write_u32(&mut self, number: u32) {
        // Fibonacci hashing; the table takes its bits from both ends, so the halves are folded.
        let spread = u64::from(number).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = spread ^ (spread >> 32);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn server() -> StreamTable<u32> {
        StreamTable::new(Role::Server, 4)
    }

    #[test]
    fn a_client_counts_from_two_and_stops_at_the_limit() {
        let mut table = StreamTable::new(Role::Client, 3);
        let ids: Vec<_> = (0..4).map(|_| table.open(|id| id)).collect();
        assert_eq!(ids, [Some(2), Some(3), Some(4), None]);
        assert_eq!(table.remove(3), Some(3));
        assert!(table.get(3).is_none() && !table.is_new(3));
        assert_eq!(table.open(|id| id), Some(5));
        assert!(!table.is_new(99), "a server opens no streams");
    }

    #[test]
    fn a_client_skips_numbers_in_use_when_it_wraps() {
        let mut table = StreamTable::new(Role::Client, 10);
        table.open(|id| id);
        table.next = u32::MAX;
        assert_eq!(table.open(|id| id), Some(u32::MAX));
        assert_eq!(table.open(|id| id), Some(1), "0 is no stream");
        assert_eq!(table.open(|id| id), Some(3));
    }

    #[test]
    fn there_is_no_stream_0() {
        let mut table = server();
        assert!(!table.is_new(NO_STREAM));
        table.insert(7, 7);
        assert!(!table.is_new(NO_STREAM));
        table.note_used(u32::MAX - 3);
        assert!(!table.is_new(NO_STREAM));
    }

    #[test]
    fn late_data_of_a_closed_stream_opens_nothing() {
        let mut table = server();
        assert!(table.is_new(2));
        table.insert(2, 2);
        assert_eq!(table.get(2), Some(&2));
        table.remove(2);
        assert!(table.get(2).is_none() && !table.is_new(2));
    }

    #[test]
    fn streams_whose_first_events_come_out_of_order_are_all_new() {
        let mut table = server();
        table.insert(7, 7);
        for id in [3, 2, 6, 4] {
            assert!(table.is_new(id), "{id}");
            table.note_used(id);
            assert!(!table.is_new(id), "{id}");
        }
        assert!(table.is_new(5));
        assert!(table.is_new(8));
    }

    #[test]
    fn numbers_wrap_around() {
        let mut table = server();
        table.used.highest = Some((7 << 32) - 2);
        assert!(!table.is_new(u32::MAX - 1));
        table.note_used(1);
        assert!(table.is_new(u32::MAX));
        assert!(!table.is_new(NO_STREAM), "also as a gap");
        assert!(!table.is_new(1));
        assert!(table.is_new(2));
    }

    #[test]
    fn a_stream_that_is_used_after_all_others_is_new() {
        let mut table = server();
        // Every other one is used, and the second as the last.
        for id in (3..2 * MAX_GAPS as u32).step_by(2) {
            assert!(table.is_new(id));
            table.note_used(id);
        }
        for id in (2..2 * MAX_GAPS as u32).step_by(2) {
            assert!(table.is_new(id) && !table.is_forgotten(id), "{id}");
            table.note_used(id);
            assert!(!table.is_new(id));
        }
        assert!(table.used.gaps.is_empty());
    }

    #[test]
    fn gaps_are_bounded_and_what_is_beyond_is_known_to_be_forgotten() {
        let mut table = server();
        let steps = MAX_GAPS as u32 + 100;
        for step in 1..=steps {
            table.note_used(2 * step + 1);
        }
        assert_eq!(table.used.gaps.len(), MAX_GAPS);
        for step in 1..=steps {
            let is_forgotten = step <= 100;
            let unused = 2 * step;
            assert_eq!(table.is_forgotten(unused), is_forgotten, "{unused}");
            assert_eq!(table.is_new(unused), !is_forgotten, "{unused}");
            assert!(!table.is_new(unused + 1));
        }
        assert!(!table.is_forgotten(2 * steps + 2) && table.is_new(2 * steps + 2));
    }

    #[test]
    fn a_stream_that_is_closed_unused_leaves_no_gap() {
        let mut table = server();
        table.note_used(5);
        for id in [3, 9, 0, 2, 4] {
            table.note_closed(id, false);
        }
        assert!(table.used.gaps.is_empty());
        assert!(!table.is_new(3) && table.is_new(9));
        table.note_closed(6, true);
        assert!(!table.is_new(6) && table.is_new(7));
        assert!(table.used.gaps.is_empty());
    }

    proptest! {
        #[test]
        fn used_numbers_agree_with_a_set(
            ids in prop::collection::vec(0u32..200, 0..150),
            // The first round, and one that wraps around in the middle.
            base in prop::sample::select(vec![2, u32::MAX - 99]),
        ) {
            let mut used = UsedNumbers::new();
            let mut model = HashSet::new();
            if base != 2 {
                used.highest = Some((3 << 32) - 101);
            }
            for id in ids {
                used.insert(base.wrapping_add(id));
                model.insert(id);
                for probe in 0..200 {
                    let is_used = used.contains(base.wrapping_add(probe));
                    prop_assert_eq!(is_used, model.contains(&probe), "{}", probe);
                }
            }
        }
    }
}
