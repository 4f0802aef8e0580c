// SPDX-License-Identifier: MIT OR Apache-2.0
//! A list that is looked through from time to time, while what is done about its items adds others.
//!
//! Sessions are activated, put to sleep and given up by what happens to other sessions, so a list
//! of them changes in the middle of a look. It is not borrowed meanwhile: its items are taken out,
//! and those that stay are put back before those that came. Also when a look is ended by a panic.

use std::cell::RefCell;

/// Items in the order in which they came.
#[derive(Debug)]
pub(crate) struct SweepList<T> {
    items: RefCell<Vec<T>>,
}

impl<T> Default for SweepList<T> {
    fn default() -> Self {
        Self { items: RefCell::default() }
    }
}

impl<T> SweepList<T> {
    #[inline]
    pub(crate) fn push(&self, item: T) {
        self.items.borrow_mut().push(item);
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.items.borrow().len()
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.items.borrow().is_empty()
    }

    /// Takes the item out that came first.
    pub(crate) fn pop_first(&self) -> Option<T> {
        let mut items = self.items.borrow_mut();
        if items.is_empty() { None } else { Some(items.remove(0)) }
    }

    /// Looks for an item among the first few, without taking any out. `is_it` leaves the list
    /// alone.
    #[inline]
    pub(crate) fn any_of_first(&self, count: usize, is_it: impl FnMut(&T) -> bool) -> bool {
        self.items.borrow().iter().take(count).any(is_it)
    }

    /// Looks at each item once, and keeps those for which `visit` says so. Items that are added
    /// meanwhile stay, behind the others, and are looked at the next time. Whether there are any.
    #[inline]
    pub(crate) fn sweep(&self, visit: impl FnMut(&mut T) -> bool) -> bool {
        let mut taken = Taken { list: self, items: self.items.take() };
        taken.items.retain_mut(visit);
        taken.put_back()
    }

    /// Takes all items out, one after the other. Those that are added meanwhile stay.
    pub(crate) fn drain(&self, mut visit: impl FnMut(T)) {
        let mut taken = Taken { list: self, items: self.items.take() };
        // What is left in the list keeps its room.
        taken.items.drain(..).for_each(&mut visit);
    }
}

/// The items of a list while they are looked at.
struct Taken<'a, T> {
    list: &'a SweepList<T>,
    items: Vec<T>,
}

impl<T> Taken<'_, T> {
    #[inline]
    fn put_back(&mut self) -> bool {
        let mut added = self.list.items.borrow_mut();
        let has_added = !added.is_empty();
        self.items.append(&mut added);
        *added = std::mem::take(&mut self.items);
        has_added
    }
}

impl<T> Drop for Taken<'_, T> {
    #[inline]
    fn drop(&mut self) {
        // After `put_back` there is nothing more to give.
        if self.items.capacity() > 0 {
            self.put_back();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::rc::Rc;

    use super::*;

    fn list(items: impl IntoIterator<Item = u32>) -> SweepList<u32> {
        let list = SweepList::default();
        items.into_iter().for_each(|item| list.push(item));
        list
    }

    fn items(list: &SweepList<u32>) -> Vec<u32> {
        list.items.borrow().clone()
    }

    #[test]
    fn what_is_added_during_a_look_stays_and_waits_for_the_next() {
        let list = list(0..4);
        let mut seen = Vec::new();
        let has_added = list.sweep(|&mut item| {
            seen.push(item);
            list.push(item + 10);
            item % 2 == 0
        });
        assert!(has_added);
        assert_eq!((seen, items(&list)), (vec![0, 1, 2, 3], vec![0, 2, 10, 11, 12, 13]));
        assert!(!list.sweep(|_| true));
        assert_eq!(items(&list), [0, 2, 10, 11, 12, 13]);
    }

    #[test]
    fn what_is_added_while_the_last_is_taken_out_stays() {
        let list = list([1]);
        assert!(list.sweep(|_| {
            list.push(2);
            false
        }));
        assert_eq!(items(&list), [2]);
        list.drain(|item| list.push(item + 1));
        assert_eq!(items(&list), [3]);
    }

    /// An item whose end adds another, as that of a session may.
    struct Adds(Rc<SweepList<Adds>>, bool);

    impl Drop for Adds {
        fn drop(&mut self) {
            if self.1 {
                self.0.push(Adds(Rc::clone(&self.0), false));
            }
        }
    }

    #[test]
    fn an_item_that_is_taken_out_may_add_and_look() {
        let list = Rc::new(SweepList::default());
        for _ in 0..3 {
            list.push(Adds(Rc::clone(&list), true));
        }
        assert!(list.sweep(|_| false));
        assert_eq!(list.len(), 3);
        // A look within a look finds what was added, and takes none of the others.
        let mut within = 0;
        list.sweep(|item| {
            item.0.sweep(|_| {
                within += 1;
                true
            });
            item.0.push(Adds(Rc::clone(&item.0), false));
            true
        });
        assert_eq!((within, list.len()), (1 + 2, 6));
        list.drain(drop);
        assert!(list.is_empty());
    }

    #[test]
    fn a_panic_during_a_look_loses_nothing() {
        let list = list(0..4);
        let look = AssertUnwindSafe(|| {
            list.sweep(|&mut item| {
                list.push(item + 10);
                assert!(item != 2, "this one fails");
                true
            })
        });
        assert!(catch_unwind(look).is_err());
        assert_eq!(items(&list), [0, 1, 2, 3, 10, 11, 12]);
    }

    #[test]
    fn room_is_kept_from_look_to_look() {
        let list = list(0..100);
        list.sweep(|_| false);
        assert!(list.items.borrow().capacity() >= 100 && list.is_empty());
        (0..50).for_each(|item| list.push(item));
        list.drain(drop);
        assert!(list.items.borrow().capacity() >= 100 && list.is_empty());
        assert_eq!(list.pop_first(), None);
    }
}
