// SPDX-License-Identifier: MIT OR Apache-2.0
//! Futures of the program's, run so that their panics end nothing else.
//!
//! A panic in a task unwinds through its executor, with all sessions of that core. One in a
//! destructor is worse where glommio drops a task that was cancelled: it aborts the process. So
//! both end here, where the future is polled and where it is dropped.

use std::any::Any;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};

/// Returns what the future returns, or what its panic said.
pub(crate) struct Contained<F: Future> {
    /// Until it has ended.
    future: Option<Pin<Box<F>>>,
}

impl<F: Future> Contained<F> {
    pub(crate) fn new(future: F) -> Self {
        Self { future: Some(Box::pin(future)) }
    }

    /// Drops it, and gives what a destructor's panic said.
    fn end(&mut self) -> Result<(), Box<dyn Any + Send>> {
        let future = self.future.take();
        catch_unwind(AssertUnwindSafe(|| drop(future)))
    }
}

impl<F: Future> Future for Contained<F> {
    type Output = std::thread::Result<F::Output>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(future) = &mut self.future else {
            return Poll::Ready(Err(Box::new("polled after its end")));
        };
        // What a future was in the middle of when it panicked is dropped, and not looked at.
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context)));
        let output = match polled {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(output)) => Ok(output),
            Err(panic) => Err(panic),
        };
        let dropped = self.end();
        Poll::Ready(output.and_then(|output| dropped.map(|()| output)))
    }
}

impl<F: Future> Drop for Contained<F> {
    fn drop(&mut self) {
        if let Err(panic) = self.end() {
            let text = panic_text(&*panic);
            tracing::error!(text, "a destructor panicked in a task that was ended");
        }
    }
}

/// What a panic said, when it said something.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("panicked")
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use futures_lite::future::{block_on, poll_once, yield_now};

    use super::*;

    struct Fails;

    impl Drop for Fails {
        fn drop(&mut self) {
            panic!("in a destructor");
        }
    }

    #[test]
    fn panics_end_where_the_future_is() {
        block_on(async {
            assert_eq!(Contained::new(ready(7)).await.unwrap(), 7);
            let fails = async {
                yield_now().await;
                panic!("in the middle");
            };
            let panic = Contained::<Pin<Box<dyn Future<Output = ()>>>>::new(Box::pin(fails)).await;
            assert_eq!(panic_text(&*panic.unwrap_err()), "in the middle");
            let fails = async {
                let _fails = Fails;
                yield_now().await;
            };
            let panic = Contained::new(fails).await.unwrap_err();
            assert_eq!(panic_text(&*panic), "in a destructor");
        });
    }

    #[test]
    fn a_future_that_is_given_up_may_panic_in_its_destructor() {
        block_on(async {
            let never = async {
                let _fails = Fails;
                pending::<()>().await;
            };
            let mut never = Contained::new(never);
            assert!(poll_once(&mut never).await.is_none());
            drop(never);
        });
    }

    /// glommio drops the future of a cancelled task where a panic aborts.
    #[test]
    fn a_task_that_is_cancelled_may_panic_in_its_destructor() {
        glommio::LocalExecutorBuilder::default().make().unwrap().run(async {
            let task = glommio::spawn_local(async {
                let never = async {
                    let _fails = Fails;
                    pending::<()>().await;
                };
                drop(Contained::new(never).await);
            });
            yield_now().await;
            task.cancel().await;
        });
    }
}
