// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tasks that belong to something, and end with it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::Poll;

use glommio::{Task, TaskQueueHandle};

use crate::exec::wakers::WakerList;

/// Tasks of this core. When the set is dropped, they are cancelled.
#[derive(Default)]
pub(crate) struct TaskSet {
    /// Those that run, and those that have ended and whose place was not needed since.
    places: RefCell<Vec<Option<Task<()>>>>,
    ledger: Rc<Ledger>,
}

/// What the tasks themselves write to.
#[derive(Default)]
struct Ledger {
    running: Cell<usize>,
    /// Places whose tasks have ended.
    free: RefCell<Vec<usize>>,
    all_ended: WakerList,
}

/// Counts for one task, until it ends, is cancelled, or panics.
struct Running {
    ledger: Rc<Ledger>,
    place: usize,
}

impl Drop for Running {
    fn drop(&mut self) {
        let Self { ledger, place } = self;
        ledger.free.borrow_mut().push(*place);
        ledger.running.set(ledger.running.get() - 1);
        if ledger.running.get() == 0 {
            ledger.all_ended.wake_all();
        }
    }
}

impl TaskSet {
    /// Starts a task, in the queue of the task that calls this.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let place = self.place();
        let running = self.running(place);
        let task = glommio::spawn_local(async move {
            let _running = running;
            task.await;
        });
        self.put(place, task);
    }

    /// Starts a task in another queue of this executor.
    pub(crate) fn spawn_into(
        &self,
        queue: TaskQueueHandle,
        task: impl Future<Output = ()> + 'static,
    ) {
        let place = self.place();
        let running = self.running(place);
        let task = glommio::spawn_local_into(
            async move {
                let _running = running;
                task.await;
            },
            queue,
        );
        self.put(place, task.expect("queues live as long as their executor"));
    }

    /// A place that no task has.
    fn place(&self) -> usize {
        let free = self.ledger.free.borrow_mut().pop();
        free.unwrap_or_else(|| {
            let mut places = self.places.borrow_mut();
            places.push(None);
            places.len() - 1
        })
    }

    fn running(&self, place: usize) -> Running {
        self.ledger.running.set(self.ledger.running.get() + 1);
        Running { ledger: Rc::clone(&self.ledger), place }
    }

    /// Keeps a task, which may have run already, and started others.
    fn put(&self, place: usize, task: Task<()>) {
        let before = self.places.borrow_mut()[place].replace(task);
        // It has ended; nothing is cancelled by this.
        drop(before);
    }

    /// How many have not ended.
    pub(crate) fn running_count(&self) -> usize {
        self.ledger.running.get()
    }

    /// Waits until all have ended. Cancel-safe.
    pub(crate) async fn all_ended(&self) {
        let have_ended = || match self.running_count() {
            0 => Poll::Ready(()),
            _ => Poll::Pending,
        };
        self.ledger.all_ended.until(have_ended).await;
    }

    /// Cancels all. What they own is dropped when the executor comes to it.
    pub(crate) fn cancel_soon(&self) {
        let tasks: Vec<_> = self.places.borrow_mut().iter_mut().filter_map(Option::take).collect();
        drop(tasks);
    }

    /// Cancels all, and waits until what they own is dropped. The caller is none of them.
    pub(crate) async fn cancel(&self) {
        let mut index = 0;
        loop {
            // Each place stays where it is: the task itself says when it is free.
            let task = self.places.borrow_mut().get_mut(index).map(Option::take);
            match task {
                Some(Some(task)) => drop(task.cancel().await),
                Some(None) => {}
                None => return,
            }
            index += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::future::{pending, yield_now};

    fn run<F: Future<Output = ()> + 'static>(test: impl FnOnce() -> F) {
        glommio::LocalExecutorBuilder::default().make().unwrap().run(test());
    }

    /// Never ends, and counts for as long as it is not dropped.
    async fn held(witness: Rc<()>) {
        pending::<()>().await;
        drop(witness);
    }

    #[test]
    fn tasks_end_with_their_set() {
        run(async || {
            let witness = Rc::new(());
            let set = TaskSet::default();
            for _ in 0..10 {
                set.spawn(held(Rc::clone(&witness)));
            }
            yield_now().await;
            assert_eq!((set.running_count(), Rc::strong_count(&witness)), (10, 11));
            drop(set);
            while Rc::strong_count(&witness) > 1 {
                yield_now().await;
            }
        });
    }

    #[test]
    fn cancelling_waits_until_all_is_dropped() {
        run(async || {
            let witness = Rc::new(());
            let set = TaskSet::default();
            for _ in 0..10 {
                set.spawn(held(Rc::clone(&witness)));
            }
            set.cancel().await;
            assert_eq!((set.running_count(), Rc::strong_count(&witness)), (0, 1));
            // And it can be used again.
            set.spawn(held(Rc::clone(&witness)));
            set.spawn(async {});
            yield_now().await;
            assert_eq!((set.running_count(), Rc::strong_count(&witness)), (1, 2));
            set.cancel().await;
        });
    }

    #[test]
    fn places_of_tasks_that_ended_are_used_again() {
        run(async || {
            let set = Rc::new(TaskSet::default());
            let witness = Rc::new(());
            set.spawn(held(Rc::clone(&witness)));
            for _ in 0..1000 {
                let (inner, seen) = (Rc::clone(&set), Rc::clone(&witness));
                set.spawn(async move {
                    // A task may start one before its own handle is where it belongs.
                    inner.spawn(async move { drop(seen) });
                });
                set.spawn(yield_now());
                yield_now().await;
                yield_now().await;
            }
            assert!(set.places.borrow().len() <= 8, "{}", set.places.borrow().len());
            assert_eq!(Rc::strong_count(&witness), 2, "the first still runs");
            set.cancel().await;
            set.all_ended().await;
            assert_eq!(Rc::strong_count(&witness), 1);
        });
    }

    #[test]
    fn all_ended_wakes_when_the_last_one_ends() {
        run(async || {
            let set = TaskSet::default();
            let ended = Rc::new(Cell::new(0));
            for turns in 0..5 {
                let ended = Rc::clone(&ended);
                set.spawn(async move {
                    for _ in 0..turns {
                        yield_now().await;
                    }
                    ended.set(ended.get() + 1);
                });
            }
            set.all_ended().await;
            assert_eq!(ended.get(), 5);
        });
    }
}
