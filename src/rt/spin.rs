// SPDX-License-Identifier: MIT OR Apache-2.0
//! For how long a session that has nothing to do is looked at before it sleeps.
//!
//! A look that finds something in time saves both sides a wake-up; one that does not costs its time
//! for nothing. Which of the two it will be is much the same from one time to the next: a peer that
//! waits for its answer comes back within microseconds, one that sends what a clock tells it does
//! not. So the budget that was configured is a limit. It shrinks while it is spent in vain, and is
//! there in full again as soon as something came that the least budget would have missed.
//!
//! Once both sides sleep after every message, each sees nothing but the time that the other takes
//! to wake up, and neither would find out that its peer answers at once. So now and then one of
//! the waits is as long as it may be: when it meets the answer, the other side is met awake too.

use std::cell::Cell;
use std::time::Duration;

/// What is left of a session's budget.
#[derive(Debug, Default)]
pub(super) struct SpinBudget {
    /// How many times it is halved.
    halved: Cell<u32>,
    /// How often it was spent in vain since something came in time.
    in_vain: Cell<u32>,
}

impl SpinBudget {
    /// The least budget is an eighth of the full one.
    const MOST_HALVED: u32 = 3;
    /// Of so many waits one is as long as it may be.
    const PROBE: u32 = 16;

    /// How long this wait may be, of a budget that is `full` at most.
    #[inline]
    pub(super) fn of(&self, full: Duration) -> Duration {
        full / (1 << self.halved.get())
    }

    fn least(full: Duration) -> Duration {
        full / (1 << Self::MOST_HALVED)
    }

    /// Something came after such a wait.
    #[inline]
    pub(super) fn note_found(&self, waited: Duration, full: Duration) {
        if waited > Self::least(full) {
            self.halved.set(0);
            self.in_vain.set(0);
        }
    }

    /// Nothing came, and the session goes to sleep.
    pub(super) fn note_in_vain(&self) {
        let in_vain = self.in_vain.get().wrapping_add(1);
        self.in_vain.set(in_vain);
        let is_probe = in_vain.is_multiple_of(Self::PROBE);
        self.halved.set(if is_probe { 0 } else { in_vain.min(Self::MOST_HALVED) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: Duration = Duration::from_micros(48);
    const LEAST: Duration = Duration::from_micros(6);

    #[test]
    fn what_is_spent_in_vain_shrinks() {
        let budget = SpinBudget::default();
        let waits: Vec<_> = (0..5)
            .map(|_| {
                let wait = budget.of(FULL);
                budget.note_in_vain();
                wait.as_micros()
            })
            .collect();
        assert_eq!(waits, [48, 24, 12, 6, 6]);
    }

    #[test]
    fn one_wait_of_many_is_full() {
        let budget = SpinBudget::default();
        let mut full = 0;
        for _ in 0..1600 {
            full += u32::from(budget.of(FULL) == FULL);
            budget.note_in_vain();
        }
        assert_eq!(full, 100, "the first one among them");
        let spent: Duration = (0..16)
            .map(|_| {
                budget.note_in_vain();
                budget.of(FULL)
            })
            .sum();
        assert_eq!(spent, FULL + 15 * LEAST);
    }

    #[test]
    fn what_the_least_would_have_missed_brings_the_full_budget_back() {
        let budget = SpinBudget::default();
        for _ in 0..5 {
            budget.note_in_vain();
        }
        budget.note_found(LEAST, FULL);
        assert_eq!(budget.of(FULL), LEAST, "it was long enough");
        budget.note_found(LEAST + Duration::from_nanos(1), FULL);
        assert_eq!(budget.of(FULL), FULL);
        budget.note_in_vain();
        assert_eq!(budget.of(FULL), FULL / 2, "from the beginning");
    }

    #[test]
    fn it_counts_for_ever() {
        let budget = SpinBudget::default();
        budget.in_vain.set(u32::MAX - 1);
        budget.note_in_vain();
        budget.note_in_vain();
        assert_eq!(budget.of(FULL), FULL);
    }
}
