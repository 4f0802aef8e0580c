// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sizes of slices in one memory: which lists each of them has, and which of these this side
//! takes from.
//!
//! A size has one list for both sides, or one for each ([`ListSets`]). Slices are numbered through
//! all lists, in the order in which they stand in the memory; the number is that of a slice's entry
//! in the [ledger](crate::shm::pool::slice_table).
//!
//! Private memory of one core. What it says of the lists was checked when they were created or
//! mapped, and the peer cannot change it.

use crate::error::MemoryError;
use crate::shm::map::memory::Memory;
use crate::shm::pool::format::{ListSets, Lists};
use crate::shm::pool::free_list::{Batch, FreeList, MAX_BATCH};
use crate::shm::pool::magazine::Magazine;
use crate::shm::pool::owned_list::OwnedList;
use crate::shm::pool::prefetcher::LinkPrefetcher;
use crate::shm::pool::slice_table::{Entry, ListOwner, SliceId, SliceUsage};

/// The most slices that this side keeps a ledger for: 96 MiB of ledger.
const MAX_SLICES: u64 = 4 << 20;
/// The most slices in a magazine.
const MAX_MAGAZINE: usize = 2 * MAX_BATCH;

/// All sizes, and all lists.
pub(crate) struct Classes {
    /// Smallest slices first.
    classes: Vec<Class>,
    /// Set by set, in each of them in the order of the classes.
    stands: Vec<ListRange>,
    sets: ListSets,
}

/// One size of slices.
pub(crate) struct Class {
    /// Bytes of payload in each slice.
    pub(super) slice_capacity: u32,
    /// The private stack, the hottest slice last.
    pub(super) magazine: Magazine,
    /// The list that this side takes from.
    taker: Taker,
    /// What that list is expected to give next.
    scout: LinkPrefetcher,
    /// The number of that list's first slice.
    pub(crate) first: SliceId,
}

enum Taker {
    /// Both sides take from it.
    Shared(FreeList),
    /// Nobody else does.
    Alone(OwnedList),
}

/// A list, and the numbers of its slices.
pub(crate) struct ListRange {
    pub(crate) list: FreeList,
    /// Offset of the first byte behind the list. Fits: the whole memory does.
    end: u32,
    /// The number of its first slice.
    pub(crate) first: SliceId,
    /// The number behind that of its last slice.
    behind: SliceId,
}

impl ListRange {
    #[inline]
    pub(crate) fn has(&self, id: SliceId) -> bool {
        (self.first..self.behind).contains(&id)
    }
}

impl Classes {
    /// The sizes of a memory that was created or mapped, and a ledger for its slices.
    pub(crate) fn new<M: Memory>(
        memory: &M,
        lists: &Lists,
    ) -> Result<(Self, Box<[Entry]>), MemoryError> {
        let total = lists.slices();
        if total > MAX_SLICES {
            return Err(MemoryError::Field {
                what: "number of slices",
                value: total,
                problem: "more than 4 194 304",
            });
        }
        let count = lists.classes();
        let mut first = 0;
        let mut stands = Vec::with_capacity(lists.lists.len());
        let mut ledger = Vec::with_capacity(total as usize);
        for (number, &list) in lists.lists.iter().enumerate() {
            // Fits: neither a configuration nor `map_lists` lets a set have more than 32 lists.
            let class = (number % count) as u8;
            ledger.extend((0..list.capacity()).map(|_| Entry::new(class, list.slice_capacity())));
            let behind = first + list.capacity();
            stands.push(ListRange { list, end: list.end() as u32, first, behind });
            first = behind;
        }
        let class = |class: usize| {
            let lists_of_this_size = stands.iter().skip(class).step_by(count);
            let capacities = lists_of_this_size.map(|stand| stand.list.capacity() as usize);
            // It may fill with slices of either side, so the shorter list bounds it.
            let share = lists.sets.share_of_magazine();
            let limit = capacities.min().map_or(0, |shorter| (shorter / share).min(MAX_MAGAZINE));
            Class::new(memory, &stands[lists.sets.own() * count + class], lists.sets, limit)
        };
        let classes = (0..count).map(class).collect::<Result<_, _>>()?;
        Ok((Self { classes, stands, sets: lists.sets }, ledger.into_boxed_slice()))
    }

    /// Smallest slices first.
    #[inline]
    pub(crate) fn iter(&self) -> std::slice::Iter<'_, Class> {
        self.classes.iter()
    }

    /// The size that a ledger entry names.
    #[inline]
    pub(super) fn get(&self, class: u8) -> &Class {
        &self.classes[usize::from(class)]
    }

    /// The numbers of the sizes.
    pub(super) fn numbers(&self) -> impl Iterator<Item = u8> + use<> {
        // Fits, see `new`.
        0..self.classes.len() as u8
    }

    /// The lists with slices of one size: one, or one of each set.
    pub(crate) fn stands_of(&self, class: u8) -> impl Iterator<Item = &ListRange> {
        self.stands.iter().skip(usize::from(class)).step_by(self.classes.len())
    }

    /// The slice that starts at an offset from the start of the memory, if one does.
    #[inline]
    pub(crate) fn locate(&self, offset: u32) -> Option<SliceId> {
        let stand = self.stands.iter().find(|stand| offset < stand.end)?;
        Some(stand.first + stand.list.place_of_slice(offset)?)
    }

    /// Where the slice of this number stands.
    pub(super) fn offset_of(&self, id: SliceId) -> usize {
        let stand = self.stands.iter().find(|stand| stand.has(id));
        let stand = stand.expect("a number that the ledger has");
        stand.list.slice(id - stand.first)
    }

    /// The state of every list, in the order in which they stand in the memory.
    pub(super) fn usage<M: Memory>(&self, memory: &M) -> Vec<SliceUsage> {
        let usage = |(number, stand): (usize, &ListRange)| {
            let (set, class) = (number / self.classes.len(), number % self.classes.len());
            let magazine = self.classes[class].magazine.iter();
            SliceUsage {
                owner: match self.sets {
                    ListSets::Shared => ListOwner::Shared,
                    ListSets::OnePerSide(_) if set == self.sets.own() => ListOwner::Own,
                    ListSets::OnePerSide(_) => ListOwner::Peer,
                },
                slice_capacity: stand.list.slice_capacity(),
                free: stand.list.free(memory),
                magazine: magazine.filter(|&id| stand.has(id)).count() as u32,
                total: stand.list.capacity(),
            }
        };
        self.stands.iter().enumerate().map(usage).collect()
    }
}

/// One part in so many of a side's lists is kept for streams whose readers read.
const RESERVE_SHARE: u64 = 8;

impl Classes {
    /// Whether less is free of the lists that this side takes from than is to be kept.
    pub(super) fn is_short<M: Memory>(&self, memory: &M) -> bool {
        let (mut free, mut total) = (0, 0);
        for class in &self.classes {
            let (list, len) = (class.list(), u64::from(class.slice_capacity));
            let capacity = u64::from(list.capacity());
            // What the peer makes of the size is worth no more than the list.
            let spare = u64::try_from(list.free(memory)).unwrap_or(0) + class.magazine.len() as u64;
            free += len * spare.min(capacity);
            total += len * capacity;
        }
        free < total / RESERVE_SHARE
    }
}

impl Class {
    fn new<M: Memory>(
        memory: &M,
        own: &ListRange,
        sets: ListSets,
        limit: usize,
    ) -> Result<Self, MemoryError> {
        let taker = match sets {
            ListSets::Shared => Taker::Shared(own.list),
            ListSets::OnePerSide(_) => Taker::Alone(OwnedList::new(memory, own.list)?),
        };
        let (slice_capacity, magazine) = (own.list.slice_capacity(), Magazine::new(limit));
        let scout = LinkPrefetcher::new(own.list.capacity());
        Ok(Self { slice_capacity, magazine, taker, scout, first: own.first })
    }

    /// The list that this side takes from.
    pub(crate) fn list(&self) -> &FreeList {
        match &self.taker {
            Taker::Shared(list) => list,
            Taker::Alone(popper) => popper.list(),
        }
    }

    /// Takes up to `want` slices from the list.
    pub(crate) fn take<M: Memory>(&self, memory: &M, want: usize) -> Result<Batch, MemoryError> {
        let list = self.list();
        let head = match &self.taker {
            Taker::Shared(list) => list.head(memory),
            Taker::Alone(popper) => Ok(popper.head()),
        };
        // For a guess only: what is wrong with the head is found, and named, by the take itself.
        if let Ok(head) = head.and_then(|head| list.checked_place("list head", head)) {
            let free = usize::try_from(list.free(memory)).unwrap_or_default();
            self.scout.prefetch(memory, list, head, want.min(free));
        }
        let batch = match &self.taker {
            Taker::Shared(list) => list.take(memory, want),
            Taker::Alone(popper) => popper.take(memory, want),
        }?;
        self.scout.note(&batch);
        Ok(batch)
    }

    /// Whether there seems to be a slice to take, in the magazine or in the list.
    pub(super) fn has_spare<M: Memory>(&self, memory: &M) -> bool {
        !self.magazine.is_empty()
            || match &self.taker {
                Taker::Shared(list) => list.free(memory) > 1,
                Taker::Alone(popper) => popper.has_spare(memory),
            }
    }
}
