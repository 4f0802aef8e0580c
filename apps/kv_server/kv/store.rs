// SPDX-License-Identifier: MIT OR Apache-2.0
//! The keys of one shard.
//!
//! A store has one owner, the thread that made it, and counts who touches its keys: the owner, or
//! somebody else. That the second count stays at zero is what the whole design is about. No lock
//! and no atomic is in here; what tells the time is told from outside.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use hashbrown::HashTable;
use smallvec::SmallVec;

use super::reply::digits;
use super::resp::integer;
use super::slab::Slab;

/// A moment, in milliseconds since the store was made.
pub(crate) type Moment = u64;

/// A key. A short one stands in its entry, so that to compare it is one look at memory.
type Key = SmallVec<[u8; 24]>;

/// A value, which replies may still refer to after it was replaced. It never leaves its thread.
pub(crate) type Value = Rc<[u8]>;

/// Keys, values, and when they expire.
#[derive(Debug)]
pub(crate) struct Store {
    /// The slots of all entries, to be found by their keys. The numbers alone are few bytes each.
    slots: HashTable<u32>,
    hasher: RandomState,
    entries: Slab<Entry>,
    /// The entries that expire, the next one first.
    expiring: BTreeSet<(Moment, u32)>,
    now: Moment,
    owner: ThreadNumber,
    touches: Touches,
}

#[derive(Debug)]
struct Entry {
    key: Key,
    value: Value,
    expires: Option<Moment>,
}

/// How often keys were touched: looked up, made, changed, removed or listed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Touches {
    /// By the thread that made the store.
    pub(crate) by_owner: u64,
    /// By any other thread.
    pub(crate) by_others: u64,
}

/// When a value that is set expires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expiry {
    Never,
    At(Moment),
    /// As the value before, if there was one.
    Kept,
}

/// Why a value cannot be counted up or down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CountError {
    NotANumber,
    Overflow,
}

/// The store has as many keys as it can number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full;

impl Store {
    /// An empty store. The thread that calls this is its owner.
    pub(crate) fn new() -> Self {
        Self {
            slots: HashTable::new(),
            hasher: RandomState::new(),
            entries: Slab::new(),
            expiring: BTreeSet::new(),
            now: 0,
            owner: ThreadNumber::current(),
            touches: Touches::default(),
        }
    }

    /// Tells the store what time it is. Time does not run backwards.
    pub(crate) fn set_now(&mut self, now: Moment) {
        self.now = self.now.max(now);
    }

    pub(crate) fn now(&self) -> Moment {
        self.now
    }

    /// How many keys there are. One that has expired counts until it is swept.
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn touches(&self) -> Touches {
        self.touches
    }

    pub(crate) fn get(&mut self, key: &[u8]) -> Option<&Value> {
        let slot = self.find(key)?;
        Some(&self.entries.get(slot)?.value)
    }

    pub(crate) fn contains(&mut self, key: &[u8]) -> bool {
        self.find(key).is_some()
    }

    pub(crate) fn set(&mut self, key: &[u8], value: &[u8], expiry: Expiry) -> Result<(), Full> {
        let Some(slot) = self.find(key) else {
            return self.insert(key, value.into(), expiry);
        };
        if let Some(entry) = self.entries.get_mut(slot) {
            // In its place, if it fits exactly and nobody is about to send what stands there.
            match Rc::get_mut(&mut entry.value).filter(|there| there.len() == value.len()) {
                Some(there) => there.copy_from_slice(value),
                None => entry.value = value.into(),
            }
        }
        match expiry {
            Expiry::Kept => {}
            Expiry::Never => self.set_expires(slot, None),
            Expiry::At(moment) => self.set_expires(slot, Some(moment)),
        }
        Ok(())
    }

    /// Whether the key was there.
    pub(crate) fn remove(&mut self, key: &[u8]) -> bool {
        match self.find(key) {
            Some(slot) => {
                self.take_out(slot);
                true
            }
            None => false,
        }
    }

    /// Adds to a number, or to zero when the key is not there. Gives the sum.
    pub(crate) fn add(&mut self, key: &[u8], by: i64) -> Result<Result<i64, CountError>, Full> {
        let text = |number| digits(number, |text| Value::from(text));
        let found = self.find(key).and_then(|slot| self.entries.get_mut(slot));
        let Some(entry) = found else {
            return self.insert(key, text(by), Expiry::Never).map(|()| Ok(by));
        };
        let Some(number) = integer(&entry.value) else {
            return Ok(Err(CountError::NotANumber));
        };
        let Some(sum) = number.checked_add(by) else {
            return Ok(Err(CountError::Overflow));
        };
        entry.value = text(sum);
        Ok(Ok(sum))
    }

    /// When a key expires; `None` when it is not there.
    pub(crate) fn expiry(&mut self, key: &[u8]) -> Option<Option<Moment>> {
        let slot = self.find(key)?;
        Some(self.entries.get(slot)?.expires)
    }

    /// Changes when a key expires; a moment that has passed removes it. Whether the key was there.
    pub(crate) fn set_expiry(&mut self, key: &[u8], expires: Option<Moment>) -> bool {
        let Some(slot) = self.find(key) else {
            return false;
        };
        match expires {
            Some(moment) if moment <= self.now => self.take_out(slot),
            _ => self.set_expires(slot, expires),
        }
        true
    }

    pub(crate) fn clear(&mut self) {
        self.touch();
        self.slots = HashTable::new();
        self.entries = Slab::new();
        self.expiring.clear();
    }

    /// Shows the keys of up to so many slots, from a slot on, while `show` wants more. Gives the
    /// slot to go on with, unless that was all.
    ///
    /// A key that is there from the first call of a scan to the last is shown exactly once.
    pub(crate) fn scan(
        &mut self,
        from: usize,
        slots: usize,
        mut show: impl FnMut(&[u8]) -> bool,
    ) -> Option<usize> {
        let slot_count = self.entries.slot_count();
        let end = from.saturating_add(slots).min(slot_count);
        let mut at = from;
        let mut wants_more = true;
        while at < end && wants_more {
            let entry = u32::try_from(at).ok().and_then(|slot| self.entries.get(slot));
            at += 1;
            let Some(entry) = entry else { continue };
            self.touches.note(self.owner);
            if entry.expires.is_none_or(|moment| moment > self.now) {
                wants_more = show(&entry.key);
            }
        }
        (at < slot_count).then_some(at)
    }

    /// Removes up to so many keys that have expired. Whether there may be more.
    pub(crate) fn sweep(&mut self, at_most: usize) -> bool {
        for _ in 0..at_most {
            match self.expiring.first() {
                Some(&(moment, slot)) if moment <= self.now => {
                    self.touch();
                    self.take_out(slot);
                }
                _ => return false,
            }
        }
        true
    }

    fn touch(&mut self) {
        self.touches.note(self.owner);
    }

    /// Where a key is, unless it has expired. Every access by key goes through here.
    fn find(&mut self, key: &[u8]) -> Option<u32> {
        self.touch();
        let Self { slots, entries, hasher, .. } = self;
        let is_it = |&slot: &u32| entries.get(slot).is_some_and(|entry| entry.key[..] == *key);
        let slot = *slots.find(hasher.hash_one(key), is_it)?;
        let expires = entries.get(slot)?.expires;
        if expires.is_some_and(|moment| moment <= self.now) {
            self.take_out(slot);
            return None;
        }
        Some(slot)
    }

    fn insert(&mut self, key: &[u8], value: Value, expiry: Expiry) -> Result<(), Full> {
        let expires = match expiry {
            Expiry::At(moment) => Some(moment),
            Expiry::Never | Expiry::Kept => None,
        };
        let Self { slots, entries, hasher, .. } = self;
        let slot = entries.insert(Entry { key: key.into(), value, expires }).ok_or(Full)?;
        let hash_of = |&slot: &u32| {
            // Every slot that is in the table is taken.
            entries.get(slot).map_or(0, |entry| hasher.hash_one(&entry.key[..]))
        };
        slots.insert_unique(hasher.hash_one(key), slot, hash_of);
        self.expiring.extend(expires.map(|moment| (moment, slot)));
        Ok(())
    }

    fn set_expires(&mut self, slot: u32, expires: Option<Moment>) {
        let Some(entry) = self.entries.get_mut(slot) else { return };
        let before = std::mem::replace(&mut entry.expires, expires);
        if let Some(moment) = before {
            self.expiring.remove(&(moment, slot));
        }
        self.expiring.extend(expires.map(|moment| (moment, slot)));
    }

    fn take_out(&mut self, slot: u32) {
        self.set_expires(slot, None);
        if let Some(entry) = self.entries.remove(slot) {
            let hash = self.hasher.hash_one(&entry.key[..]);
            if let Ok(found) = self.slots.find_entry(hash, |&number| number == slot) {
                found.remove();
            }
        }
    }
}

impl Touches {
    fn note(&mut self, owner: ThreadNumber) {
        if owner == ThreadNumber::current() {
            self.by_owner += 1;
        } else {
            self.by_others += 1;
        }
    }
}

/// Names a thread: no two that ever ran have the same. Cheaper to ask for than
/// [`ThreadId`](std::thread::ThreadId).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ThreadNumber(u64);

impl ThreadNumber {
    fn current() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        thread_local! {
            // Relaxed: only that numbers differ matters.
            static NUMBER: u64 = NEXT.fetch_add(1, Ordering::Relaxed);
        }
        Self(NUMBER.with(|&number| number))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    fn scan_all(
        store: &mut Store,
        slots: usize,
        mut between: impl FnMut(&mut Store),
    ) -> Vec<Vec<u8>> {
        let mut keys = Vec::new();
        let mut from = Some(0);
        while let Some(slot) = from {
            from = store.scan(slot, slots, |key| {
                keys.push(key.to_vec());
                keys.len() % 3 != 0
            });
            between(store);
        }
        keys
    }

    #[test]
    fn what_was_set_is_there_until_it_is_removed() {
        let mut store = Store::new();
        assert_eq!(store.get(b"a"), None);
        store.set(b"a", b"1", Expiry::Never).unwrap();
        store.set(b"a", b"22", Expiry::Never).unwrap();
        let kept = store.get(b"a").cloned();
        assert_eq!(kept.as_deref(), Some(&b"22"[..]));
        store.set(b"a", b"33", Expiry::Never).unwrap();
        assert_eq!(kept.as_deref(), Some(&b"22"[..]), "what is about to be sent stays as it was");
        assert_eq!(store.get(b"a").map(|value| &value[..]), Some(&b"33"[..]));
        assert_eq!(store.len(), 1);
        assert!(store.remove(b"a") && !store.remove(b"a"));
        assert_eq!(store.len(), 0);
    }

    #[test]
    fn counting() {
        let mut store = Store::new();
        assert_eq!(store.add(b"n", 5).unwrap(), Ok(5));
        assert_eq!(store.add(b"n", -7).unwrap(), Ok(-2));
        assert_eq!(store.get(b"n").map(|value| &value[..]), Some(&b"-2"[..]));
        store.set(b"n", b"9223372036854775807", Expiry::Never).unwrap();
        assert_eq!(store.add(b"n", 1).unwrap(), Err(CountError::Overflow));
        store.set(b"n", b"1 ", Expiry::Never).unwrap();
        assert_eq!(store.add(b"n", 1).unwrap(), Err(CountError::NotANumber));
    }

    #[test]
    fn keys_expire_when_looked_for_and_when_swept() {
        let mut store = Store::new();
        for key in [b"a", b"b", b"c", b"d"] {
            store.set(key, b"x", Expiry::At(10)).unwrap();
        }
        assert!(store.set_expiry(b"c", Some(30)) && store.set_expiry(b"d", None));
        assert!(!store.set_expiry(b"e", Some(30)));
        store.add(b"n", 1).unwrap().unwrap();
        store.set_expiry(b"n", Some(20));
        store.add(b"n", 1).unwrap().unwrap();
        assert_eq!(store.expiry(b"n"), Some(Some(20)), "counting keeps the time");
        store.set_now(9);
        assert!(store.contains(b"a"));
        store.set_now(10);
        assert!(!store.contains(b"a"));
        assert_eq!(store.len(), 4, "one was found expired");
        assert_eq!(scan_all(&mut store, 100, |_| {}).len(), 3, "an expired one is not shown");
        assert!(!store.sweep(100));
        assert_eq!(store.len(), 3);
        store.set(b"c", b"y", Expiry::Kept).unwrap();
        assert_eq!(store.expiry(b"c"), Some(Some(30)));
        store.set(b"c", b"y", Expiry::Never).unwrap();
        assert_eq!((store.expiry(b"c"), store.expiry(b"e")), (Some(None), None));
        assert!(store.set_expiry(b"c", Some(10)), "a moment that has passed");
        assert!(!store.contains(b"c"));
    }

    #[test]
    fn a_sweep_stops_at_its_bound() {
        let mut store = Store::new();
        for number in 0..10 {
            store.set(&[number], b"", Expiry::At(1)).unwrap();
        }
        store.set_now(1);
        assert!(store.sweep(4));
        assert_eq!(store.len(), 6);
        assert!(!store.sweep(100));
        assert_eq!(store.len(), 0);
    }

    #[test]
    fn touches_of_another_thread_are_noticed() {
        let mut store = Store::new();
        store.set(b"a", b"1", Expiry::Never).unwrap();
        assert_eq!(store.touches(), Touches { by_owner: 1, by_others: 0 });
        // It cannot be given to another thread, so it is made to look like one of another.
        store.owner = std::thread::spawn(ThreadNumber::current).join().unwrap();
        store.get(b"a");
        store.scan(0, 10, |_| true);
        assert_eq!(store.touches(), Touches { by_owner: 1, by_others: 2 });
    }

    proptest! {
        #[test]
        fn a_scan_shows_what_was_there_all_the_while(
            first in prop::collection::hash_set(0_u8..60, 0..60),
            changes in prop::collection::vec((any::<bool>(), 0_u8..60), 0..200),
            slots in 1_usize..8,
        ) {
            let mut store = Store::new();
            for &key in &first {
                store.set(&[key], b"", Expiry::Never).unwrap();
            }
            let mut always = first.clone();
            let mut ever = first;
            let mut changes = changes.into_iter();
            let keys = scan_all(&mut store, slots, |store| {
                for (is_set, key) in changes.by_ref().take(3) {
                    if is_set {
                        store.set(&[key], b"", Expiry::Never).unwrap();
                        ever.insert(key);
                    } else {
                        store.remove(&[key]);
                        always.remove(&key);
                    }
                }
            });
            let mut times: HashMap<u8, u32> = HashMap::new();
            for key in &keys {
                *times.entry(key[0]).or_default() += 1;
            }
            let shown: HashSet<u8> = times.keys().copied().collect();
            prop_assert!(always.is_subset(&shown) && shown.is_subset(&ever));
            prop_assert!(always.iter().all(|key| times[key] == 1));
        }
    }
}
