// SPDX-License-Identifier: MIT OR Apache-2.0
//! For how long a session that has nothing to do is looked at before it sleeps.
//!
//! A look that finds something in time saves both sides a wake-up; one that does not costs its time
//! for nothing. Which of the two it will be is much the same from one time to the next: a peer that
//! waits for its answer comes back within microseconds, one that sends what a clock tells it does
//! not. So the budget that was configured is a limit. It shrinks while it is spent in vain, and
//! grows to twice what was waited when something came. It is kept apart for waits after this side
//! has sent, when an answer may come, and after it has received.
//!
//! Once both sides sleep after every message, each sees nothing but the time that the other takes
//! to wake up, and neither would find out that its peer answers at once. So now and then one of
//! the waits is as long as it may be: when it meets the answer, the other side is met awake too.

use std::cell::Cell;
use std::time::Duration;

/// What a wait came after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    /// This side has sent something, and nothing came since.
    Sending,
    Receiving,
}

/// What is left of a session's budgets.
#[derive(Debug, Default)]
pub(super) struct SpinBudgets {
    after_sending: SpinBudget,
    after_receiving: SpinBudget,
}

impl SpinBudgets {
    #[inline]
    pub(super) fn after(&self, after: After) -> &SpinBudget {
        match after {
            After::Sending => &self.after_sending,
            After::Receiving => &self.after_receiving,
        }
    }
}

/// What is left of one budget.
#[derive(Debug, Default)]
pub(super) struct SpinBudget {
    /// How many times it is halved.
    halved: Cell<u32>,
    /// How often it was spent in vain.
    in_vain: Cell<u32>,
}

impl SpinBudget {
    /// The least budget is a sixteenth of the full one.
    const MOST_HALVED: u32 = 4;
    /// Of so many waits in vain one is as long as it may be.
    const PROBE: u32 = 64;

    /// How long this wait may be, of a budget that is `full` at most.
    #[inline]
    pub(super) fn of(&self, full: Duration) -> Duration {
        if self.in_vain.get() % Self::PROBE == Self::PROBE - 1 {
            return full;
        }
        full / (1 << self.halved.get())
    }

    /// Something came after such a wait.
    #[inline]
    pub(super) fn note_found(&self, waited: Duration, full: Duration) {
        while self.halved.get() > 0 && full / (1 << self.halved.get()) < waited.saturating_mul(2) {
            self.halved.set(self.halved.get() - 1);
        }
    }

    /// Nothing came, and the session goes to sleep.
    pub(super) fn note_in_vain(&self) {
        self.in_vain.set(self.in_vain.get().wrapping_add(1));
        self.halved.set((self.halved.get() + 1).min(Self::MOST_HALVED));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: Duration = Duration::from_micros(64);

    fn micros(budget: &SpinBudget) -> u128 {
        budget.of(FULL).as_micros()
    }

    #[test]
    fn what_is_spent_in_vain_shrinks() {
        let budget = SpinBudget::default();
        let waits: Vec<_> = (0..6)
            .map(|_| {
                let wait = micros(&budget);
                budget.note_in_vain();
                wait
            })
            .collect();
        assert_eq!(waits, [64, 32, 16, 8, 4, 4]);
    }

    #[test]
    fn one_wait_of_many_is_full() {
        let budget = SpinBudget::default();
        (0..10).for_each(|_| budget.note_in_vain());
        let waits: Vec<_> = (0..640)
            .map(|_| {
                budget.note_in_vain();
                micros(&budget)
            })
            .collect();
        assert_eq!(waits.iter().filter(|&&wait| wait == 64).count(), 10);
        assert_eq!(waits.iter().filter(|&&wait| wait == 4).count(), 630);
    }

    #[test]
    fn it_grows_to_twice_what_was_waited() {
        let budget = SpinBudget::default();
        (0..5).for_each(|_| budget.note_in_vain());
        for (waited, becomes) in [(1, 4), (2, 4), (3, 8), (3, 8), (10, 32), (2, 32), (33, 64)] {
            budget.note_found(Duration::from_micros(waited), FULL);
            assert_eq!(micros(&budget), becomes, "after {waited}");
        }
        budget.note_found(Duration::MAX / 2, FULL);
        assert_eq!(micros(&budget), 64);
    }

    #[test]
    fn waits_of_two_kinds_do_not_mix() {
        let budgets = SpinBudgets::default();
        budgets.after(After::Receiving).note_in_vain();
        assert_eq!(micros(budgets.after(After::Sending)), 64);
        assert_eq!(micros(budgets.after(After::Receiving)), 32);
    }

    #[test]
    fn it_counts_for_ever() {
        let budget = SpinBudget::default();
        budget.in_vain.set(u32::MAX);
        budget.note_in_vain();
        assert_eq!(micros(&budget), 32);
    }
}
