// SPDX-License-Identifier: MIT OR Apache-2.0
//! Laying out a buffer memory, and checking one that a peer laid out
//! (`docs/protocol.md#buffer-memory`).

use std::sync::atomic::Ordering;

use crate::config::SliceClass;
use crate::error::MemoryError;
use crate::shm::map::memory::Memory;
use crate::shm::pool::free_list::FreeList;
use crate::wire::layout::{
    LIST_HEADER_LEN, MANAGER_HEADER_LEN, MANAGER_LIST_COUNT_OFFSET, MANAGER_USED_LEN_OFFSET,
    SLICE_HEADER_LEN, list_len,
};

/// The most lists that this side maps, in one set.
const MAX_LISTS: usize = 32;

/// Whether the two sides take slices from the same lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListSets {
    /// They do, as the spec has it: one list for each size.
    Shared,
    /// Each side takes from lists of its own, and gives to those of both. Every size stands there
    /// twice, in the spec's own format: first the client's lists, smallest slices first, then the
    /// server's, of the same sizes. Both sides must have agreed on it. This is which one we are.
    OnePerSide(Side),
}

/// Which side of a session this process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The one that creates the memory.
    Client,
    /// The one that maps it.
    Server,
}

impl ListSets {
    /// A magazine holds at most one part in so many of a list, so that it does not starve the peer.
    ///
    /// More where each side has lists for itself: only what was received is the peer's, and a reply
    /// of several MiB then lies where the request lay (`docs/performance.md`).
    pub(super) const fn share_of_magazine(self) -> usize {
        match self {
            Self::Shared => 8,
            Self::OnePerSide(_) => 4,
        }
    }

    fn count(self) -> usize {
        match self {
            Self::Shared => 1,
            Self::OnePerSide(_) => 2,
        }
    }

    /// The fewest slices that make a list of use. The last one is never handed out, and nobody else
    /// can lend its lists to a side whose own are of no use.
    fn least_slices(self) -> u32 {
        match self {
            Self::Shared => 1,
            Self::OnePerSide(_) => 2,
        }
    }

    /// Which of the sets this side takes from.
    pub(super) fn own(self) -> usize {
        match self {
            Self::Shared | Self::OnePerSide(Side::Client) => 0,
            Self::OnePerSide(Side::Server) => 1,
        }
    }
}

/// The lists of a memory, set by set.
pub(crate) struct Lists {
    /// All sets have the same slice capacities, smallest first.
    pub(crate) lists: Vec<FreeList>,
    pub(super) sets: ListSets,
}

impl Lists {
    /// How many slices there are.
    pub(super) fn slices(&self) -> u64 {
        self.lists.iter().map(|list| u64::from(list.capacity())).sum()
    }

    /// How many sizes of slices there are.
    pub(super) fn classes(&self) -> usize {
        self.lists.len() / self.sets.count()
    }
}

/// Lays out the memory: every class gets its share of what the headers leave, and every set of
/// lists the same part of it.
pub(crate) fn create_lists<M: Memory>(
    memory: &M,
    classes: &[SliceClass],
    sets: ListSets,
) -> Result<Lists, MemoryError> {
    let have = memory.len() as u64;
    let headers = (MANAGER_HEADER_LEN + LIST_HEADER_LEN * classes.len() * sets.count()) as u64;
    let room = have.saturating_sub(headers);
    let mut lists = Vec::with_capacity(classes.len() * sets.count());
    let mut at = MANAGER_HEADER_LEN;
    for class in (0..sets.count()).flat_map(|_| classes) {
        let stride = u64::from(class.capacity) + SLICE_HEADER_LEN as u64;
        let count = room * u64::from(class.percent) / 100 / stride / sets.count() as u64;
        let least = u64::from(sets.least_slices());
        // Fits: the whole memory is below 4 GiB (checked by the configuration).
        let needed = at as u64 + list_len(count.max(least) as u32, class.capacity);
        if count < least || needed > have {
            return Err(MemoryError::TooSmall { what: "a buffer list", needed, have });
        }
        let list = FreeList::create(memory, at, count as u32, class.capacity);
        at = list.end();
        lists.push(list);
    }
    // Relaxed: the handshake's socket orders it.
    let used = (at - MANAGER_HEADER_LEN) as u32;
    memory.store_u32(MANAGER_LIST_COUNT_OFFSET, (lists.len() as u32).to_le(), Ordering::Relaxed);
    memory.store_u32(MANAGER_USED_LEN_OFFSET, used, Ordering::Relaxed);
    Ok(Lists { lists, sets })
}

/// Checks a memory that the peer laid out.
pub(crate) fn map_lists<M: Memory>(memory: &M, sets: ListSets) -> Result<Lists, MemoryError> {
    let have = memory.len() as u64;
    if have < MANAGER_HEADER_LEN as u64 {
        let needed = MANAGER_HEADER_LEN as u64;
        return Err(MemoryError::TooSmall { what: "the buffer header", needed, have });
    }
    if have > u64::from(u32::MAX) {
        let limit = u64::from(u32::MAX);
        return Err(MemoryError::TooLarge { what: "buffer memory", have, limit });
    }
    // Two bytes of count, two unused.
    let first_word = memory.load_u32(MANAGER_LIST_COUNT_OFFSET, Ordering::Acquire).to_le();
    let count = (first_word & 0xffff) as usize;
    let classes = count / sets.count();
    if !(1..=MAX_LISTS).contains(&classes) || !count.is_multiple_of(sets.count()) {
        let problem = match sets {
            ListSets::Shared => "expected 1 to 32",
            ListSets::OnePerSide(_) => "expected twice 1 to 32",
        };
        return Err(MemoryError::Field { what: "list count", value: count as u64, problem });
    }
    let used = u64::from(memory.load_u32(MANAGER_USED_LEN_OFFSET, Ordering::Acquire));
    let end = MANAGER_HEADER_LEN as u64 + used;
    if end > have {
        return Err(MemoryError::TooSmall { what: "the lists", needed: end, have });
    }
    let mut lists: Vec<FreeList> = Vec::with_capacity(count);
    let mut at = MANAGER_HEADER_LEN;
    for number in 0..count {
        let list = FreeList::map(memory, at, end as usize)?;
        check_place_in_set(&lists, number, classes, &list)?;
        if list.capacity() < sets.least_slices() {
            return Err(MemoryError::Field {
                what: "list capacity",
                value: u64::from(list.capacity()),
                problem: "a list of one side must hold two slices",
            });
        }
        at = list.end();
        lists.push(list);
    }
    Ok(Lists { lists, sets })
}

/// Checks that the slices of a list have the size that is its turn, by the lists before it.
fn check_place_in_set(
    before: &[FreeList],
    number: usize,
    classes: usize,
    list: &FreeList,
) -> Result<(), MemoryError> {
    let capacity = list.slice_capacity();
    let wrong = |problem| {
        let value = u64::from(capacity);
        Err(MemoryError::Field { what: "slice capacity", value, problem })
    };
    if number >= classes {
        // The first set goes from small to large, and so does this one if it is the same.
        if before[number % classes].slice_capacity() != capacity {
            return wrong("both sets have slices of the same sizes");
        }
    } else if before.last().is_some_and(|last| last.slice_capacity() >= capacity) {
        return wrong("lists go from small slices to large");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::shm::map::region::Region;
    use crate::shm::pool::SlicePool;

    const CLASSES: [SliceClass; 3] =
        [SliceClass::new(64, 50), SliceClass::new(256, 30), SliceClass::new(1024, 20)];
    const CLIENT: ListSets = ListSets::OnePerSide(Side::Client);
    const SERVER: ListSets = ListSets::OnePerSide(Side::Server);

    fn shape(lists: &Lists) -> Vec<(u32, u32)> {
        lists.lists.iter().map(|list| (list.slice_capacity(), list.capacity())).collect()
    }

    #[test]
    fn every_size_stands_there_once_or_twice() {
        let memory = Region::heap(64 << 10);
        let shared = create_lists(&memory, &CLASSES, ListSets::Shared).unwrap();
        let once = shape(&shared);
        assert_eq!(once, [(64, 389), (256, 71), (1024, 12)]);
        assert_eq!(shape(&map_lists(&memory, ListSets::Shared).unwrap()), once);

        let memory = Region::heap(64 << 10);
        let apart = create_lists(&memory, &CLASSES, CLIENT).unwrap();
        let twice = shape(&apart);
        assert_eq!(twice[..3], [(64, 194), (256, 35), (1024, 6)]);
        assert_eq!(twice[..3], twice[3..]);
        let mapped = map_lists(&memory, SERVER).unwrap();
        assert_eq!((shape(&mapped), mapped.classes()), (twice, 3));
        // The header counts all of them, and their end is where the last one ends.
        assert_eq!(memory.load_u32(MANAGER_LIST_COUNT_OFFSET, Ordering::Relaxed).to_le(), 6);
        let used = memory.load_u32(MANAGER_USED_LEN_OFFSET, Ordering::Relaxed);
        assert_eq!(MANAGER_HEADER_LEN + used as usize, mapped.lists[5].end());
        // One behind the other, and a full list each.
        for pair in mapped.lists.windows(2) {
            assert_eq!(pair[0].end() + LIST_HEADER_LEN, pair[1].slice(0));
        }
        for list in &mapped.lists {
            assert_eq!(list.free(&memory), list.capacity().cast_signed());
        }
    }

    #[test]
    fn what_leaves_a_list_nothing_to_hand_out_is_too_small() {
        let classes = [SliceClass::new(64, 100)];
        let len = |slices: usize| MANAGER_HEADER_LEN + 2 * LIST_HEADER_LEN + slices * 84;
        for (slices, holds) in [(0, false), (1, false), (3, false), (4, true), (5, true)] {
            let memory = Region::heap(len(slices));
            match create_lists(&memory, &classes, CLIENT) {
                Ok(lists) => {
                    assert!(holds, "{slices}");
                    assert_eq!(shape(&lists), [(64, 2), (64, 2)]);
                }
                Err(error) => {
                    assert!(!holds, "{slices}");
                    assert!(matches!(error, MemoryError::TooSmall { what: "a buffer list", .. }));
                }
            }
        }
        // A list of both sides is as it always was.
        let memory = Region::heap(MANAGER_HEADER_LEN + LIST_HEADER_LEN + 84);
        assert_eq!(shape(&create_lists(&memory, &classes, ListSets::Shared).unwrap()), [(64, 1)]);
    }

    #[test]
    fn sets_that_are_not_the_same_twice_are_refused() {
        let refused = |change: &dyn Fn(&Region, &Lists)| {
            let memory = Region::heap(32 << 10);
            let lists = create_lists(&memory, &CLASSES, CLIENT).unwrap();
            change(&memory, &lists);
            map_lists(&memory, SERVER).map(drop).unwrap_err().to_string()
        };
        let store = |memory: &Region, at, value| memory.store_u32(at, value, Ordering::Relaxed);
        for count in [0, 1, 3, 5, 66, 0xffff] {
            let error = refused(&|memory, _| store(memory, MANAGER_LIST_COUNT_OFFSET, count));
            assert!(error.contains("list count"), "{count}: {error}");
        }
        // Two of six: the second list is then the server's, and has slices of another size.
        let error = refused(&|memory, _| store(memory, MANAGER_LIST_COUNT_OFFSET, 2));
        assert!(error.contains("same sizes"), "{error}");
        for used in [32 << 10, u32::MAX, 0, 35] {
            let error = refused(&|memory, _| store(memory, MANAGER_USED_LEN_OFFSET, used));
            assert!(error.contains("needs"), "{used}: {error}");
        }
        let header = |lists: &Lists, number: usize| lists.lists[number].slice(0) - LIST_HEADER_LEN;
        let smaller = |number: usize| {
            refused(&|memory, lists| {
                FreeList::create(memory, header(lists, number), 4, 60);
            })
        };
        assert!(smaller(1).contains("small slices to large"), "{}", smaller(1));
        for number in 3..6 {
            assert!(smaller(number).contains("same sizes"), "{}", smaller(number));
        }
        let one = |number: usize| {
            refused(&|memory, lists| {
                let capacity = lists.lists[number].slice_capacity();
                FreeList::create(memory, header(lists, number), 1, capacity);
            })
        };
        assert!(one(0).contains("two slices") && one(4).contains("two slices"), "{}", one(4));
    }

    #[test]
    fn a_memory_with_one_set_is_no_memory_with_two() {
        // Of four lists, the later two are not the earlier two again.
        let memory = Region::heap(32 << 10);
        let classes: Vec<_> = [64, 128, 256, 512].map(|len| SliceClass::new(len, 25)).into();
        create_lists(&memory, &classes, ListSets::Shared).unwrap();
        assert!(map_lists(&memory, SERVER).is_err());
        // And the other way round.
        let memory = Region::heap(32 << 10);
        create_lists(&memory, &classes, CLIENT).unwrap();
        assert!(map_lists(&memory, ListSets::Shared).is_err());
    }

    #[test]
    fn as_many_lists_as_there_may_be() {
        let classes: Vec<_> = (1..=33).map(|size| SliceClass::new(size * 4, 3)).collect();
        let memory = Region::heap(256 << 10);
        for sets in [ListSets::Shared, CLIENT] {
            create_lists(&memory, &classes[..32], sets).unwrap();
            assert_eq!(map_lists(&memory, sets).unwrap().classes(), 32);
            create_lists(&memory, &classes, sets).unwrap();
            let error = map_lists(&memory, sets).map(drop).unwrap_err();
            assert!(matches!(error, MemoryError::Field { what: "list count", .. }));
        }
    }

    /// The lists of a memory whose slices have these sizes, as a peer lays them out.
    fn peers_lists(capacities: &[u32]) -> Result<(Rc<Region>, Rc<SlicePool>), MemoryError> {
        let memory = Rc::new(Region::heap(64 << 10));
        let mut at = MANAGER_HEADER_LEN;
        for &capacity in capacities {
            at = FreeList::create(&*memory, at, 7, capacity).end();
        }
        memory.store_u32(MANAGER_LIST_COUNT_OFFSET, capacities.len() as u32, Ordering::Relaxed);
        let used = (at - MANAGER_HEADER_LEN) as u32;
        memory.store_u32(MANAGER_USED_LEN_OFFSET, used, Ordering::Relaxed);
        let manager = SlicePool::map(&memory, ListSets::Shared)?;
        Ok((memory, manager))
    }

    #[test]
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    fn slices_of_any_size_are_taken_whose_list_headers_are_in_one_line() {
        let (mut taken, mut refused) = (0, 0);
        for first in [1, 2, 3, 63, 64, 65, 1001] {
            for second in 1002..1070 {
                // The third list's header stands behind both.
                let (memory, manager) = match peers_lists(&[first, second, 4099]) {
                    Ok(mapped) => mapped,
                    Err(error) => {
                        assert!(error.to_string().contains("place of a list header"), "{error}");
                        refused += 1;
                        continue;
                    }
                };
                taken += 1;
                let bytes: Vec<u8> = (0..9000_u32).map(|index| index as u8).collect();
                for len in [1, 60, 1000, 9000] {
                    let mut chain = manager.allocate(len, false).unwrap().unwrap();
                    assert_eq!(chain.write(&bytes[..len]), len);
                    let parcel = chain.into_sent().unwrap();
                    let other = SlicePool::map(&memory, ListSets::Shared).unwrap();
                    let came = other.adopt(parcel.offset).unwrap();
                    assert!(came.into_bytes() == bytes[..len]);
                    other.set_resting(true);
                }
                manager.set_resting(true);
                assert!(manager.usage().iter().all(|list| list.free == 7), "{first} {second}");
            }
        }
        assert!(taken > 100 && refused > 10, "{taken} taken, {refused} refused");
    }
}
