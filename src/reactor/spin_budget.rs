// SPDX-License-Identifier: MIT OR Apache-2.0
//! For how long a session that has nothing to do is looked at before it sleeps.
//!
//! A look that finds something in time saves both sides a wake-up; one that does not costs its time
//! for nothing. What is configured is the price of a wake-up, and with it the limit: to look for
//! longer than that never pays. Below it, what pays depends on when something comes, which is much
//! the same from one time to the next: a peer that waits for its answer is back within
//! microseconds, one that sends what a clock tells it is not. So each session remembers how long
//! its last waits were, also those that it slept through, and looks for as long as would have cost
//! it least. Waits after this side has sent, when an answer may come, and after it has received
//! are kept apart.
//!
//! A wait that was slept through seems longer than it was, by the time that it took to wake up,
//! which nobody knows. So it counts as half of what it can have been at most: when that makes it
//! worth a look the next time, it becomes known.
//!
//! Once both sides sleep after every message, each sees its own delay and the other's, and might
//! never find out that its peer answers at once. So now and then one of the waits is as long as it
//! may be, and when that finds something, those that were longer are forgotten: the other side is
//! met awake then, too.

use std::cell::Cell;
use std::time::Duration;

/// What a wait came after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WaitKind {
    /// This side has sent something, and nothing came since.
    Sending,
    Receiving,
}

/// The budgets of a session.
#[derive(Debug, Default)]
pub(crate) struct SpinBudgets {
    after_sending: SpinBudget,
    after_receiving: SpinBudget,
}

impl SpinBudgets {
    #[inline]
    pub(crate) fn after(&self, after: WaitKind) -> &SpinBudget {
        match after {
            WaitKind::Sending => &self.after_sending,
            WaitKind::Receiving => &self.after_receiving,
        }
    }
}

/// How many lengths a budget can have, apart from none: the full one, a half of it, and so on.
const LENGTHS: usize = 6;

/// The budget for waits of one kind.
#[derive(Debug)]
pub(crate) struct SpinBudget {
    /// How many of the last waits were over within each length, but not within the one before;
    /// then those that were longer. Old ones count less.
    waits: [Cell<u32>; LENGTHS + 1],
    /// How many of the lengths are within the budget.
    within: Cell<usize>,
    /// How many waits there were.
    count: Cell<u32>,
}

impl Default for SpinBudget {
    fn default() -> Self {
        Self { waits: Default::default(), within: Cell::new(LENGTHS), count: Cell::new(0) }
    }
}

/// What a wait counts at first.
const ONE: u32 = 1 << 16;

/// Each wait takes this part of what the earlier ones count, as a power of two.
const FADING: u32 = 4;

/// The full budget, and the price of a wake-up, in units of the shortest length.
const FULL: u64 = length(LENGTHS);

/// In units of the shortest.
const fn length(within: usize) -> u64 {
    if within == 0 { 0 } else { 1 << (within - 1) }
}

impl SpinBudget {
    /// Of so many waits one is as long as it may be.
    const PROBE: u32 = 64;

    /// How long the next wait may be, of a budget that is `full` at most.
    pub(crate) fn of(&self, full: Duration) -> Duration {
        if self.is_probe() {
            return full;
        }
        part(full, self.within.get())
    }

    /// Whether the next wait is not worth a look.
    #[inline]
    pub(crate) fn is_none(&self) -> bool {
        self.within.get() == 0 && !self.is_probe()
    }

    #[inline]
    fn is_probe(&self) -> bool {
        self.count.get() % Self::PROBE == Self::PROBE - 1
    }

    /// Something came while this side looked for it.
    pub(crate) fn note_found(&self, waited: Duration, full: Duration) {
        if waited > part(full, self.within.get()) && waited <= full {
            self.waits[LENGTHS].set(0);
        }
        self.note(index_of(waited, full));
    }

    /// Something came after this side had looked for it so long, and then slept. Then all of the
    /// wait was so long, with the time that it took to wake up.
    pub(crate) fn note_woken(&self, looked: Duration, waited: Duration, full: Duration) {
        // To wake up takes no longer than it costs.
        let at_least = looked.max(waited.saturating_sub(full)).min(waited);
        self.note(index_of(at_least + (waited - at_least) / 2, full));
    }

    /// Nothing came for longer than it is worth to wait.
    pub(crate) fn note_in_vain(&self) {
        self.note(LENGTHS);
    }

    fn note(&self, index: usize) {
        self.count.set(self.count.get().wrapping_add(1));
        for count in &self.waits {
            count.set(count.get() - count.get().div_ceil(1 << FADING));
        }
        self.waits[index].set(self.waits[index].get() + ONE);
        self.within.set(cheapest(&self.waits.each_ref().map(Cell::get)));
    }
}

/// Which of the lengths a wait was within, and not within the one before.
fn index_of(waited: Duration, full: Duration) -> usize {
    (0..LENGTHS).find(|index| waited <= part(full, index + 1)).unwrap_or(LENGTHS)
}

fn part(full: Duration, within: usize) -> Duration {
    if within == 0 {
        return Duration::ZERO;
    }
    // No budget is longer than some years.
    let full = u64::try_from(full.as_nanos()).unwrap_or(u64::MAX);
    Duration::from_nanos(full >> (LENGTHS - within))
}

/// Which budget would have cost least for these waits: those within it cost their own length, all
/// others the whole budget and a wake-up. Of those that cost the same the shortest, but for none.
fn cheapest(waits: &[u32; LENGTHS + 1]) -> usize {
    let mut others: u64 = waits.iter().copied().map(u64::from).sum();
    let mut found = 0;
    let (mut best, mut least) = (0, others * FULL);
    for within in 1..=LENGTHS {
        let more = u64::from(waits[within - 1]);
        others -= more;
        found += more * length(within);
        let cost = found + others * (length(within) + FULL);
        if cost < least || (cost == least && best == 0) {
            (best, least) = (within, cost);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FULL_BUDGET: Duration = Duration::from_micros(64);

    fn micros(budget: &SpinBudget) -> u128 {
        budget.of(FULL_BUDGET).as_micros()
    }

    /// A wait of a session: looks for as long as it may, and sleeps then, from which to wake up
    /// takes so long. What it cost, and how long it was.
    fn wait(budget: &SpinBudget, micros: u64, wakes_in: u64) -> (u64, u64) {
        let allowed = budget.of(FULL_BUDGET);
        let looked = allowed.as_micros() as u64;
        if micros <= looked {
            budget.note_found(Duration::from_micros(micros), FULL_BUDGET);
            return (micros, micros);
        }
        let woken = micros + wakes_in;
        budget.note_woken(allowed, Duration::from_micros(woken), FULL_BUDGET);
        (looked + 64, woken)
    }

    #[test]
    fn it_begins_in_full_and_is_gone_after_a_few_waits_in_vain() {
        let budget = SpinBudget::default();
        let waits: Vec<_> = (0..5)
            .map(|_| {
                let wait = micros(&budget);
                budget.note_in_vain();
                wait
            })
            .collect();
        assert_eq!(waits[0], 64);
        assert_eq!(waits[2..], [0, 0, 0]);
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
        assert_eq!(waits.iter().filter(|&&wait| wait == 0).count(), 630);
    }

    #[test]
    fn it_is_as_long_as_most_waits_are() {
        for (waited, becomes) in
            [(0, 2), (1, 2), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64)]
        {
            let budget = SpinBudget::default();
            (0..100).for_each(|_| {
                wait(&budget, waited, 30);
            });
            assert_eq!(micros(&budget), becomes, "waits of {waited}");
        }
    }

    #[test]
    fn rare_long_waits_are_slept_through() {
        let budget = SpinBudget::default();
        for turn in 0..1000 {
            wait(&budget, if turn % 8 == 0 { 900 } else { 5 }, 30);
            if turn > 50 && turn % 64 < 62 {
                assert_eq!(micros(&budget), 8, "turn {turn}");
            }
        }
    }

    /// Two sides that answer at once, both asleep: one after the other stays awake.
    #[test]
    fn two_sides_wake_each_other_up_for_good() {
        for wakes_in in [5, 20, 40, 60] {
            let [near, far] = [SpinBudget::default(), SpinBudget::default()];
            (0..200).for_each(|_| {
                near.note_in_vain();
                far.note_in_vain();
            });
            let mut far_was_woken = wakes_in;
            let mut messages = 0;
            loop {
                messages += 1;
                let (_, near_waited) = wait(&near, 1 + far_was_woken, wakes_in);
                let near_was_woken = near_waited - (1 + far_was_woken);
                let (_, far_waited) = wait(&far, 1 + near_was_woken, wakes_in);
                far_was_woken = far_waited - (1 + near_was_woken);
                if near_was_woken + far_was_woken == 0 {
                    break;
                }
                assert!(messages < 200, "they need {wakes_in}");
            }
            for _ in 0..1000 {
                assert_eq!(wait(&near, 1, wakes_in).1, 1);
                assert_eq!(wait(&far, 1, wakes_in).1, 1);
            }
        }
    }

    #[test]
    fn waits_of_two_kinds_do_not_mix() {
        let budgets = SpinBudgets::default();
        (0..5).for_each(|_| budgets.after(WaitKind::Receiving).note_in_vain());
        assert_eq!(micros(budgets.after(WaitKind::Sending)), 64);
        assert_eq!(micros(budgets.after(WaitKind::Receiving)), 0);
    }

    #[test]
    fn it_counts_for_ever() {
        let budget = SpinBudget::default();
        budget.count.set(u32::MAX);
        budget.note_in_vain();
        assert_eq!(budget.count.get(), 0);
        // All waits the same: what they count stays bounded.
        (0..10_000).for_each(|_| budget.note_in_vain());
        assert!(budget.waits[LENGTHS].get() <= ONE << FADING);
    }

    #[test]
    fn budgets_of_all_lengths() {
        for full in [0, 1, 31, 50_000, u64::MAX / 4] {
            let full = Duration::from_nanos(full);
            assert_eq!(part(full, 0), Duration::ZERO);
            assert_eq!(part(full, LENGTHS), full);
            let budget = SpinBudget::default();
            budget.note_woken(Duration::ZERO, Duration::MAX, full);
            budget.note_found(Duration::ZERO, full);
            assert!(budget.of(full) <= full);
        }
    }

    proptest! {
        /// Whatever comes, it costs little more than the best budget that never changes. (To know
        /// in advance which that is would not be fair, but it is close.)
        #[test]
        fn it_is_nearly_as_good_as_the_best_that_is_fixed(
            lengths in prop::collection::vec(prop_oneof![1u64..8, 1u64..70, 60u64..1000], 1..4),
            turns in prop::collection::vec(any::<prop::sample::Index>(), 400..500),
            wakes_in in 0u64..40,
        ) {
            let waits: Vec<u64> = turns.iter().map(|turn| *turn.get(&lengths)).collect();
            let budget = SpinBudget::default();
            let cost: u64 = waits.iter().map(|&micros| wait(&budget, micros, wakes_in).0).sum();
            let fixed = |budget: u64| -> u64 {
                let cost = |&wait: &u64| if wait <= budget { wait } else { budget + 64 };
                waits.iter().map(cost).sum()
            };
            let best = (0..=LENGTHS).map(|within| fixed(length(within) * 2)).min().unwrap();
            let bound = best * 3 / 2 + 300;
            prop_assert!(cost <= bound, "{} where {} would do: {:?}", cost, best, lengths);
        }
    }
}
