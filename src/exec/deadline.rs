// SPDX-License-Identifier: MIT OR Apache-2.0
//! A point in time until which a task waits, if it was given one.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use glommio::timer::Timer;

use crate::exec::task_waker::Relay;

/// Until when a stream's reads, or its writes, wait.
#[derive(Default)]
pub(crate) struct Deadline {
    at: Option<Instant>,
    /// Runs while a task waits. Without a deadline there is none, and nothing to pay for.
    timer: Option<(Timer, Relay)>,
}

impl Deadline {
    pub(crate) fn set(&mut self, at: Option<Instant>) {
        self.at = at;
        self.timer = None;
    }

    /// Whether the time has come; if not, the task is woken when it does.
    #[inline]
    pub(crate) fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        match self.at {
            None => Poll::Pending,
            Some(at) => self.poll_timer(context, at),
        }
    }

    #[inline(never)]
    fn poll_timer(&mut self, context: &mut Context<'_>, at: Instant) -> Poll<()> {
        let now = Instant::now();
        if now >= at {
            return Poll::Ready(());
        }
        let start = || (Timer::new(at - now), Relay::default());
        let (timer, relay) = self.timer.get_or_insert_with(start);
        if relay.poll(Pin::new(timer), context).is_ready() {
            self.timer = None;
            return Poll::Ready(());
        }
        Poll::Pending
    }
}
