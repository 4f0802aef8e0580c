// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether a task is woken by its own core only.
//!
//! A wake-up from another thread costs glommio a system call there, and here a look at io_uring
//! that comes when it comes. Nothing in this crate does that to a session. What the handler of a
//! session waits for is its author's choice, though; so its wake-ups are looked at, and counted.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Wake, Waker};

/// Runs a future and counts the wake-ups that other threads give it.
pub(crate) async fn counting_foreign_wakes<F: Future>(
    future: F,
    count: Arc<AtomicU64>,
) -> F::Output {
    let mut future = pin!(future);
    // The same task most often comes with the same waker; then nothing is made.
    let mut known: Option<(Waker, Waker)> = None;
    poll_fn(move |context| {
        let known = match &mut known {
            Some((inner, watching)) if inner.will_wake(context.waker()) => watching,
            slot => {
                let inner = context.waker().clone();
                let watching =
                    Watching { inner: inner.clone(), here: here(), count: count.clone() };
                &mut slot.insert((inner, Waker::from(Arc::new(watching)))).1
            }
        };
        future.as_mut().poll(&mut Context::from_waker(known))
    })
    .await
}

/// A waker that knows its own thread.
struct Watching {
    inner: Waker,
    here: usize,
    count: Arc<AtomicU64>,
}

impl Watching {
    #[inline]
    fn look(&self) {
        if self.here != here() {
            // A statistic: it orders nothing, so there is nothing for it to pair with.
            self.count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Wake for Watching {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.look();
        self.inner.wake_by_ref();
    }
}

/// A number that no other thread alive has: where its thread-local memory lies.
#[inline]
fn here() -> usize {
    thread_local! {
        static PLACE: u8 = const { 0 };
    }
    PLACE.with(|place| std::ptr::from_ref(place).addr())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::task::Poll;

    /// Waits until somebody has taken its waker out of here and used it.
    async fn wait_at(place: Arc<Mutex<Option<Waker>>>, times: u32) {
        let mut left = times;
        poll_fn(move |context| {
            let was_woken = place.lock().unwrap().replace(context.waker().clone()).is_none();
            left -= u32::from(was_woken);
            if left == 0 { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    #[test]
    fn wake_ups_of_other_threads_are_counted_and_none_of_ones_own() {
        let count = Arc::new(AtomicU64::new(0));
        let place = Arc::default();
        // The first look counts as one that was woken.
        let waiting = counting_foreign_wakes(wait_at(Arc::clone(&place), 4), Arc::clone(&count));
        let mut waiting = pin!(waiting);
        let mut context = Context::from_waker(Waker::noop());
        for foreign in [false, true, true] {
            assert!(waiting.as_mut().poll(&mut context).is_pending());
            let waker = place.lock().unwrap().take().unwrap();
            if foreign {
                std::thread::spawn(|| waker.wake()).join().unwrap();
            } else {
                waker.wake();
            }
        }
        assert!(waiting.as_mut().poll(&mut context).is_ready());
        assert_eq!(count.load(Ordering::Relaxed), 2);
    }
}
