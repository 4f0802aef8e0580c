// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lists that one side takes from, under the model checker.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use loom::thread;

use super::{Held, check};
use crate::shm::map::memory::Memory;
use crate::shm::pool::owned_list::OwnedList;
use crate::wire::layout::{LIST_TAIL_OFFSET, SLICE_FLAGS_OFFSET};

/// A list that one side takes from, and for each of its slices a cell that its holder writes to.
struct HeldAlone {
    held: Rc<Held>,
    popper: OwnedList,
}

impl HeldAlone {
    fn new(capacity: u32) -> Self {
        let held = Held::new(capacity);
        let popper = OwnedList::new(&*held.memory, held.list).unwrap();
        Self { held, popper }
    }

    /// What comes out is the taker's alone, and no order makes the list look broken.
    fn take(&self, want: usize) -> Vec<u32> {
        let places = self.popper.take(&*self.held.memory, want).unwrap().places().to_vec();
        for &place in &places {
            // SAFETY: loom checks that nobody else accesses the cell.
            self.held.holders[place as usize].with_mut(|cell| unsafe { *cell += 1 });
        }
        places
    }

    /// Takes all that is left, and puts it down in the order in which it came.
    fn drain(&self) -> Vec<u32> {
        let mut all = Vec::new();
        loop {
            match &self.take(4)[..] {
                [] => return all,
                places => all.extend(places),
            }
        }
    }

    /// Whether all slices but the last one come out, each once, and the list counts itself right.
    fn is_whole(&self) {
        let capacity = self.held.list.capacity();
        assert_eq!(self.held.list.free(&*self.held.memory), capacity.cast_signed());
        let mut all = self.drain();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!((count, all.len()), (capacity as usize - 1, capacity as usize - 1), "{all:?}");
    }
}

/// One side takes, and both give: slices that the peer holds come back while this side takes and
/// gives its own, more often than the list is long. No slice is lost or has two holders, also where
/// the list goes once round while somebody is in the middle of a step.
#[test]
#[cfg_attr(miri, ignore)]
fn with_one_taker_no_slice_is_lost_or_has_two_holders() {
    for (capacity, theirs, rounds, preemptions) in [(4, 2, 3, 3), (3, 1, 3, 4), (6, 3, 2, 3)] {
        check(preemptions, move || {
            let ours = HeldAlone::new(capacity);
            let sent = ours.take(theirs);
            assert_eq!(sent.len(), theirs);
            let other = Rc::clone(&ours.held);
            let peer = thread::spawn(move || {
                // One by one, and then the rest at once.
                other.give(&sent[..1]).unwrap();
                other.give(&sent[1..]).unwrap();
            });
            for round in 0..rounds {
                let taken = ours.take(1 + round % 2);
                ours.held.give(&taken).unwrap();
            }
            peer.join().unwrap();
            ours.is_whole();
        });
    }
}

/// Two givers at once, one of them the taker: wherever one of them stalls between its swap of the
/// tail and its link, the taker gets what is in front of the cut, never waits, and finds the rest
/// when the link is there.
#[test]
#[cfg_attr(miri, ignore)]
fn a_giver_that_stalls_between_its_swap_and_its_link_keeps_nobody_waiting() {
    let counts = || std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (cut, whole) = (counts(), counts());
    let (count_cut, count_whole) = (cut.clone(), whole.clone());
    check(4, move || {
        // 0 and 1 are with the peer and 2 with this side, so that the list is 3 alone.
        let ours = HeldAlone::new(4);
        assert_eq!(ours.take(2), [0, 1]);
        assert_eq!(ours.take(1), [2]);
        let other = Rc::clone(&ours.held);
        let peer = thread::spawn(move || other.give(&[0, 1]).unwrap());
        ours.held.give(&[2]).unwrap();
        // This side has linked behind 3, or behind 1, which may not be linked to 3 yet.
        let taken = ours.take(4);
        let counter = match &taken[..] {
            [] => &count_cut,
            [3] | [3, 2, 0] | [3, 0, 1] => &count_whole,
            other => panic!("{other:?} in front of a cut"),
        };
        counter.fetch_add(1, Ordering::Relaxed);
        ours.held.give(&taken).unwrap();
        peer.join().unwrap();
        ours.is_whole();
    });
    for (what, count) in [("cut", cut), ("whole", whole)] {
        let count = count.load(Ordering::Relaxed);
        assert!(count > 0, "the model does not get there: {what}");
        println!("{what} in {count} orders");
    }
}

/// A giver that dies between its swap and its link: the taker hands out what is in front of the
/// cut, each slice once, whatever comes behind it.
#[test]
#[cfg_attr(miri, ignore)]
fn what_is_in_front_of_a_giver_that_died_is_handed_out() {
    check(4, || {
        let ours = HeldAlone::new(6);
        assert_eq!(ours.take(3), [0, 1, 2]);
        let other = Rc::clone(&ours.held);
        let peer = thread::spawn(move || {
            // All of `give`, but for the link.
            let slice = other.list.slice(0);
            other.memory.store_u8(slice + SLICE_FLAGS_OFFSET, 0, Ordering::Relaxed);
            other.memory.swap_u32(LIST_TAIL_OFFSET, 0, Ordering::AcqRel);
        });
        ours.held.give(&[1]).unwrap();
        let mut taken = ours.take(4);
        ours.held.give(&[2]).unwrap();
        peer.join().unwrap();
        taken.extend(ours.drain());
        // In front of the cut: what was there, and what this side gave before the peer's swap.
        let longest = [3, 4, 5, 1, 2];
        assert!(taken.len() >= 2 && longest.starts_with(&taken), "{taken:?}");
    });
}
