// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tasks of this core that wait for something to change.
//!
//! A task that waits in a [`WakerList`] has a [`Registration`], which is taken out of the list when
//! the wait ends, whatever it ends by. All who wait are woken, not one of them, so a wake-up is not
//! lost when the task that got it is dropped before it runs.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use slab::Slab;

use crate::exec::task_waker::TaskWaker;

/// One task that waits. A second one that waits for the same thing takes its place.
#[derive(Default)]
pub(crate) struct WakerSlot {
    waker: RefCell<Option<Arc<TaskWaker>>>,
    /// Whether the task waits now. The waker stays when it does not: most often the same task comes
    /// back, and cloning and dropping a waker each time costs as much as waking.
    is_waiting: Cell<bool>,
}

impl WakerSlot {
    /// Notes that the task waits. Whether nobody did before.
    #[inline]
    pub(crate) fn register(&self, context: &Context<'_>) -> bool {
        let mut slot = self.waker.borrow_mut();
        if !slot.as_ref().is_some_and(|waker| waker.is_of(context)) {
            *slot = Some(TaskWaker::of(context));
        }
        !self.is_waiting.replace(true)
    }

    /// Whether a task waits.
    pub(crate) fn is_waiting(&self) -> bool {
        self.is_waiting.get()
    }

    /// Wakes the task, if one waits. Whether one did.
    #[inline]
    pub(crate) fn wake(&self) -> bool {
        if !self.is_waiting.replace(false) {
            return false;
        }
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_task();
        }
        true
    }
}

/// A list with more room than this gives it back when it becomes empty.
const KEPT_ROOM: usize = 32;

/// Any number of waits, each possibly with a time at which it wants to know anyway.
#[derive(Default)]
pub(crate) struct WakerList {
    /// Made for the first wait: most sessions never have one.
    queue: RefCell<Option<Box<Queue>>>,
    count: Cell<usize>,
    /// Tells a registration apart from a later one in the same place.
    next: Cell<u64>,
}

/// A wait's place in a [`WakerList`]. Registered again, it keeps its place.
#[derive(Debug, Default)]
pub(crate) struct Registration {
    at: Option<(usize, u64)>,
}

/// The waits, linked in the order in which they came.
#[derive(Default)]
struct Queue {
    entries: Slab<Entry>,
    first: Option<usize>,
    last: Option<usize>,
    /// None of them wants to know before this.
    earliest: Option<Instant>,
}

struct Entry {
    number: u64,
    waker: Arc<TaskWaker>,
    deadline: Option<Instant>,
    before: Option<usize>,
    after: Option<usize>,
}

impl WakerList {
    /// Has the task woken that is polled with `context`, once: by [`wake_all`](Self::wake_all), or
    /// when its time has come.
    pub(crate) fn register(
        &self,
        registration: &mut Registration,
        context: &Context<'_>,
        deadline: Option<Instant>,
    ) {
        let mut queue = self.queue.borrow_mut();
        let queue = queue.get_or_insert_default();
        if let Some(at) = deadline {
            queue.earliest = Some(queue.earliest.map_or(at, |earliest| earliest.min(at)));
        }
        if let Some(entry) = queue.entry_of(registration) {
            entry.deadline = deadline;
            if !entry.waker.is_of(context) {
                entry.waker = TaskWaker::of(context);
            }
            return;
        }
        let number = self.next.get();
        self.next.set(number + 1);
        let key = queue.push(number, TaskWaker::of(context), deadline);
        registration.at = Some((key, number));
        self.count.set(queue.entries.len());
    }

    /// Ends a wait. Nothing happens to one that has been woken.
    pub(crate) fn remove(&self, registration: &mut Registration) {
        let removed = match &mut *self.queue.borrow_mut() {
            Some(queue) => queue.take(registration),
            None => None,
        };
        // Not while the list is borrowed: it may be the last reference to the task.
        if removed.is_some() {
            self.note_removed();
        }
    }

    /// Waits until `ready` gives something. It is asked now, and whenever the list is woken.
    pub(crate) async fn until<T>(&self, mut ready: impl FnMut() -> Poll<T>) -> T {
        let mut waiting = Waiting { list: self, registration: Registration::default() };
        poll_fn(move |context| {
            let polled = ready();
            if polled.is_pending() {
                self.register(&mut waiting.registration, context, None);
            }
            polled
        })
        .await
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.count.get() == 0
    }

    /// Wakes everybody, in the order in which they came. Who comes meanwhile is not woken.
    #[inline]
    pub(crate) fn wake_all(&self) {
        if !self.is_empty() {
            self.wake_those_before(self.next.get());
        }
    }

    #[inline(never)]
    fn wake_those_before(&self, number: u64) {
        // One at a time: who is woken may look at the list.
        while let Some(waker) = self.pop_before(number) {
            waker.wake_task();
        }
        self.note_removed();
    }

    fn pop_before(&self, number: u64) -> Option<Arc<TaskWaker>> {
        let mut queue = self.queue.borrow_mut();
        let queue = queue.as_mut()?;
        let key = queue.first.filter(|&key| queue.entries[key].number < number)?;
        let waker = queue.unlink(key);
        self.count.set(queue.entries.len());
        Some(waker)
    }

    /// Wakes those whose time has come.
    pub(crate) fn wake_expired(&self, now: Instant) {
        let late = match &mut *self.queue.borrow_mut() {
            Some(queue) if queue.earliest.is_some_and(|at| at <= now) => queue.take_expired(now),
            _ => return,
        };
        self.note_removed();
        for waker in late {
            waker.wake_task();
        }
    }

    /// Counts again, and lets go of what was needed for many waits.
    fn note_removed(&self) {
        let mut queue = self.queue.borrow_mut();
        let count = queue.as_ref().map_or(0, |queue| queue.entries.len());
        self.count.set(count);
        if count == 0 && queue.as_ref().is_some_and(|queue| queue.entries.capacity() > KEPT_ROOM) {
            *queue = None;
        }
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.count.get()
    }
}

impl Queue {
    /// The entry of a registration that has not been woken.
    fn entry_of(&mut self, registration: &Registration) -> Option<&mut Entry> {
        let (key, number) = registration.at?;
        self.entries.get_mut(key).filter(|entry| entry.number == number)
    }

    fn take(&mut self, registration: &mut Registration) -> Option<Arc<TaskWaker>> {
        let (key, number) = registration.at.take()?;
        let is_there = self.entries.get(key).is_some_and(|entry| entry.number == number);
        is_there.then(|| self.unlink(key))
    }

    fn push(&mut self, number: u64, waker: Arc<TaskWaker>, deadline: Option<Instant>) -> usize {
        let before = self.last;
        let key = self.entries.insert(Entry { number, waker, deadline, before, after: None });
        match before {
            Some(before) => self.entries[before].after = Some(key),
            None => self.first = Some(key),
        }
        self.last = Some(key);
        key
    }

    fn unlink(&mut self, key: usize) -> Arc<TaskWaker> {
        let Entry { waker, before, after, .. } = self.entries.remove(key);
        match before {
            Some(before) => self.entries[before].after = after,
            None => self.first = after,
        }
        match after {
            Some(after) => self.entries[after].before = before,
            None => self.last = before,
        }
        waker
    }

    fn take_expired(&mut self, now: Instant) -> Vec<Arc<TaskWaker>> {
        let mut late = Vec::new();
        self.earliest = None;
        let mut at = self.first;
        while let Some(key) = at {
            let entry = &self.entries[key];
            at = entry.after;
            match entry.deadline {
                Some(deadline) if deadline <= now => late.push(self.unlink(key)),
                Some(deadline) => {
                    let earliest =
                        self.earliest.map_or(deadline, |earliest| earliest.min(deadline));
                    self.earliest = Some(earliest);
                }
                None => {}
            }
        }
        late
    }
}

/// Takes a registration out of its list when the wait ends.
struct Waiting<'a> {
    list: &'a WakerList,
    registration: Registration,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.list.remove(&mut self.registration);
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::rc::Rc;
    use std::sync::Mutex;
    use std::task::{Wake, Waker};
    use std::time::Duration;

    use super::*;

    /// A task that tells when it was woken.
    struct Task {
        name: u32,
        woken: Arc<Mutex<Vec<u32>>>,
    }

    impl Wake for Task {
        fn wake(self: Arc<Self>) {
            self.woken.lock().unwrap().push(self.name);
        }
    }

    #[derive(Default)]
    struct Tasks {
        woken: Arc<Mutex<Vec<u32>>>,
    }

    impl Tasks {
        fn waker(&self, name: u32) -> Waker {
            Waker::from(Arc::new(Task { name, woken: Arc::clone(&self.woken) }))
        }

        fn woken(&self) -> Vec<u32> {
            std::mem::take(&mut *self.woken.lock().unwrap())
        }
    }

    fn register(list: &WakerList, waker: &Waker, deadline: Option<Instant>) -> Registration {
        let mut registration = Registration::default();
        list.register(&mut registration, &Context::from_waker(waker), deadline);
        registration
    }

    #[test]
    fn waits_that_end_are_no_longer_registered() {
        let (list, tasks) = (WakerList::default(), Tasks::default());
        let _stays = register(&list, &tasks.waker(0), None);
        for name in 1..20_000 {
            let waker = tasks.waker(name);
            let mut wait = pin!(list.until(|| Poll::<()>::Pending));
            assert!(wait.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            // Polled again, it has one registration as before.
            assert!(wait.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            assert_eq!(list.len(), 2);
        }
        assert_eq!(list.len(), 1);
        assert!(list.queue.borrow().as_ref().unwrap().entries.capacity() < 10);
        list.wake_all();
        assert_eq!((tasks.woken(), list.len()), (vec![0], 0));
    }

    #[test]
    fn waits_are_woken_in_the_order_in_which_they_came() {
        let (list, tasks) = (WakerList::default(), Tasks::default());
        let mut waits: Vec<_> =
            (0..1000).map(|name| register(&list, &tasks.waker(name), None)).collect();
        for at in (0..1000).filter(|at| at % 3 != 0) {
            list.remove(&mut waits[at]);
            list.remove(&mut waits[at]);
        }
        // They take the places of those that have gone, but not their turn.
        let _later: Vec<_> =
            (1000..1500).map(|name| register(&list, &tasks.waker(name), None)).collect();
        assert_eq!(list.len(), 334 + 500);
        list.wake_all();
        let expected: Vec<u32> = (0..1000).filter(|at| at % 3 == 0).chain(1000..1500).collect();
        assert_eq!((tasks.woken(), list.len()), (expected, 0));
        assert!(list.queue.borrow().is_none(), "the room for so many goes");
        // What is left of the old registrations takes nothing of the new ones.
        let mut new = register(&list, &tasks.waker(7), None);
        waits.iter_mut().for_each(|wait| list.remove(wait));
        assert_eq!(list.len(), 1);
        list.remove(&mut new);
        assert!(list.is_empty());
    }

    #[test]
    fn a_wait_that_is_polled_by_another_task_wakes_that_one() {
        let (list, tasks) = (WakerList::default(), Tasks::default());
        let mut wait = register(&list, &tasks.waker(1), None);
        list.register(&mut wait, &Context::from_waker(&tasks.waker(2)), None);
        list.wake_all();
        assert_eq!(tasks.woken(), [2]);
        // It has been woken, so it is a new one now.
        list.register(&mut wait, &Context::from_waker(&tasks.waker(3)), None);
        assert_eq!(list.len(), 1);
        list.remove(&mut wait);
        list.wake_all();
        assert!(tasks.woken().is_empty());
    }

    #[test]
    fn those_whose_time_has_come_are_woken_and_no_others() {
        let (list, tasks) = (WakerList::default(), Tasks::default());
        let now = Instant::now();
        let after = |seconds| now + Duration::from_secs(seconds);
        let _waits: Vec<_> = [Some(after(3)), None, Some(after(1)), Some(after(2)), Some(after(1))]
            .into_iter()
            .zip(0..)
            .map(|(deadline, name)| register(&list, &tasks.waker(name), deadline))
            .collect();
        list.wake_expired(now);
        assert!(tasks.woken().is_empty());
        list.wake_expired(after(1));
        assert_eq!((tasks.woken(), list.len()), (vec![2, 4], 3));
        list.wake_expired(after(2));
        assert_eq!(tasks.woken(), [3]);
        list.wake_expired(after(9));
        list.wake_expired(after(9));
        assert_eq!((tasks.woken(), list.len()), (vec![0], 1));
    }

    /// Waits again, or ends another wait, when it is woken.
    struct Meddler<F: Fn()>(F);

    impl<F: Fn() + Send + Sync> Wake for Meddler<F> {
        fn wake(self: Arc<Self>) {
            (self.0)();
        }
    }

    #[test]
    fn who_is_woken_may_wait_again_and_end_other_waits() {
        thread_local! {
            static LIST: Rc<WakerList> = Rc::default();
            static OTHER: RefCell<Registration> = RefCell::default();
            static AGAIN: RefCell<Vec<Registration>> = RefCell::default();
        }
        let tasks = Tasks::default();
        let list = LIST.with(Rc::clone);
        let waker = tasks.waker(1);
        let again = waker.clone();
        let meddler = Waker::from(Arc::new(Meddler(move || {
            let list = LIST.with(Rc::clone);
            OTHER.with_borrow_mut(|other| list.remove(other));
            AGAIN.with_borrow_mut(|waits| waits.push(register(&list, &again, None)));
        })));
        let _first = register(&list, &meddler, None);
        let other = register(&list, &tasks.waker(2), None);
        OTHER.set(other);
        list.wake_all();
        // The other has gone before its turn came, and the new one is for the next time.
        assert!(tasks.woken().is_empty());
        assert_eq!(list.len(), 1);
        list.wake_all();
        assert_eq!((tasks.woken(), list.len()), (vec![1], 0));
    }

    /// What is woken is everybody, so nobody depends on one task's getting somewhere.
    #[test]
    fn a_wake_up_of_a_task_that_is_dropped_is_not_lost_to_others() {
        let (list, tasks) = (WakerList::default(), Tasks::default());
        let [mut first, _second] = [1, 2].map(|name| register(&list, &tasks.waker(name), None));
        list.wake_all();
        list.remove(&mut first);
        assert_eq!(tasks.woken(), [1, 2]);
    }
}
