// SPDX-License-Identifier: MIT OR Apache-2.0
//! One clone of a task's waker, however many things the task waits for.
//!
//! glommio 0.9 counts the clones of a task's waker in 16 bits with a sign, and panics at the
//! 32 768th. A task that waits on many streams, deadlines or lists at once would have one clone for
//! each. So each core keeps one [`TaskWaker`] a task, and everything of this crate that stores a
//! waker stores a reference to that one.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Wake, Waker};

/// What [`Waker::will_wake`] compares.
type Identity = (usize, usize);

thread_local! {
    /// The tasks that wait for something of this crate on this thread.
    static WAITING: RefCell<BTreeMap<Identity, Weak<TaskWaker>>> =
        const { RefCell::new(BTreeMap::new()) };
}

/// The waker of a task, to be shared by all that the task waits for.
pub(crate) struct TaskWaker {
    waker: Waker,
}

impl TaskWaker {
    /// The one of the task that is polled with `context`.
    pub(crate) fn of(context: &Context<'_>) -> Arc<Self> {
        let waker = context.waker();
        WAITING.with_borrow_mut(|waiting| {
            let known = waiting.get(&identity(waker)).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let new = Arc::new(Self { waker: waker.clone() });
                waiting.insert(identity(waker), Arc::downgrade(&new));
                new
            })
        })
    }

    /// Whether it is the one of the task that is polled with `context`.
    #[inline]
    pub(crate) fn is_of(&self, context: &Context<'_>) -> bool {
        self.waker.will_wake(context.waker())
    }

    #[inline]
    pub(crate) fn wake_task(&self) {
        self.waker.wake_by_ref();
    }
}

fn identity(waker: &Waker) -> Identity {
    // The clone that is kept holds on to what it points at, so no other task has the same.
    (waker.data().addr(), std::ptr::from_ref(waker.vtable()).addr())
}

impl Drop for TaskWaker {
    fn drop(&mut self) {
        // At the end of a thread the map may be gone already.
        let _ = WAITING.try_with(|waiting| waiting.borrow_mut().remove(&identity(&self.waker)));
    }
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_task();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.wake_task();
    }
}

/// Polls what keeps clones of the waker that it is given: glommio's timers and sockets. They get
/// one whose clones are not counted by glommio. It belongs to one of them, which keeps it.
#[derive(Default)]
pub(crate) struct Relay {
    task: Option<(Arc<TaskWaker>, Waker)>,
}

impl Relay {
    pub(crate) fn poll<F: Future>(
        &mut self,
        future: Pin<&mut F>,
        context: &Context<'_>,
    ) -> Poll<F::Output> {
        let known = self.task.take_if(|(task, _)| task.is_of(context));
        let (_, waker) = self.task.insert(known.unwrap_or_else(|| {
            let task = TaskWaker::of(context);
            let waker = Waker::from(Arc::clone(&task));
            (task, waker)
        }));
        future.poll(&mut Context::from_waker(waker))
    }
}

/// Runs a future of glommio's so that it keeps no clone of the task's own waker.
pub(crate) async fn relayed<F: Future>(future: F) -> F::Output {
    let mut future = std::pin::pin!(future);
    let mut relay = Relay::default();
    std::future::poll_fn(move |context| relay.poll(future.as_mut(), context)).await
}

#[cfg(test)]
pub(crate) fn waiting_tasks() -> usize {
    WAITING.with_borrow(BTreeMap::len)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Task;

    impl Wake for Task {
        fn wake(self: Arc<Self>) {}
    }

    #[test]
    fn a_task_has_one_clone_however_much_it_waits_for() {
        let task = Arc::new(Task);
        let waker = Waker::from(Arc::clone(&task));
        let context = Context::from_waker(&waker);
        let before = Arc::strong_count(&task);
        let kept: Vec<_> = (0..1000).map(|_| TaskWaker::of(&context)).collect();
        assert_eq!(Arc::strong_count(&task), before + 1);
        let other = Waker::from(Arc::new(Task));
        let others = TaskWaker::of(&Context::from_waker(&other));
        assert!(kept.iter().all(|kept| kept.is_of(&context)) && !others.is_of(&context));
        assert_eq!(waiting_tasks(), 2);
        drop((kept, others));
        assert_eq!((Arc::strong_count(&task), waiting_tasks()), (before, 0));
    }

    #[test]
    fn what_glommio_keeps_is_no_clone_of_the_tasks_waker() {
        let task = Arc::new(Task);
        let waker = Waker::from(Arc::clone(&task));
        let before = Arc::strong_count(&task);
        let kept = RefCell::new(Vec::new());
        let keeps = relayed(std::future::poll_fn(|context: &mut Context<'_>| {
            kept.borrow_mut().push(context.waker().clone());
            Poll::<()>::Pending
        }));
        let mut keeps = std::pin::pin!(keeps);
        for _ in 0..100 {
            assert!(keeps.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        }
        assert_eq!((kept.borrow().len(), Arc::strong_count(&task)), (100, before + 1));
    }
}
