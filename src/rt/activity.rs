// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a session has done lately, and so for how long it is worth looking at before it sleeps.

use std::cell::Cell;
use std::time::{Duration, Instant};

use super::spin::{After, SpinBudgets};

/// Whether the core's poller looks at this session, and since when it found nothing.
pub(super) struct Activity {
    pub(super) is_active: Cell<bool>,
    /// Whether its magazines will be emptied if it stays asleep.
    pub(super) will_rest: Cell<bool>,
    /// Turns in a row that found nothing.
    pub(super) idle_turns: Cell<u32>,
    /// How many of them are not timed, and when they were over.
    untimed_turns: Cell<u32>,
    idle_since: Cell<Instant>,
    slept_at: Cell<Instant>,
    spin: SpinBudgets,
    /// What the present wait came after.
    waits_after: Cell<After>,
    /// Bytes sent since something came.
    unanswered: Cell<u64>,
    /// How many events came together the last time.
    pub(super) last_batch: Cell<usize>,
    /// How many tasks wait for data of their streams.
    pub(super) waiting_readers: Cell<u32>,
    pub(super) in_place: InPlace,
}

impl Activity {
    /// So many turns that find nothing are not worth a look at the clock: a session that exchanges
    /// messages has them all the time.
    const IDLE_TURNS: u32 = 16;
    /// They are when waits were in vain for so long that to wait costs more than to wake up now and
    /// then.
    const FEWEST_TURNS: u32 = 2;

    /// How many bytes the peer is given a nanosecond for, before the budget begins: it has to read
    /// them, and to write an answer that may be as long.
    const BYTES_PER_NANOSECOND: u64 = 16;
    /// A sleep of less than so many full budgets is one that a wait might have bridged, if the
    /// other side had not slept as well.
    const FAR_TOO_LONG: u32 = 8;
    const MOST_PATIENCE: Duration = Duration::from_millis(1);

    pub(super) fn new() -> Self {
        Self {
            is_active: Cell::new(false),
            will_rest: Cell::new(false),
            idle_turns: Cell::new(0),
            untimed_turns: Cell::new(Self::IDLE_TURNS),
            idle_since: Cell::new(Instant::now()),
            slept_at: Cell::new(Instant::now()),
            spin: SpinBudgets::default(),
            waits_after: Cell::new(After::Receiving),
            unanswered: Cell::new(0),
            last_batch: Cell::new(0),
            waiting_readers: Cell::new(0),
            in_place: InPlace::default(),
        }
    }

    #[inline]
    pub(super) fn note_sent(&self, bytes: usize) {
        self.unanswered.set(self.unanswered.get().saturating_add(bytes as u64));
    }

    #[inline]
    pub(super) fn note_received(&self) {
        self.unanswered.set(0);
    }

    /// Something came: after how long a wait, if it was one that the clock was looked at for?
    #[inline]
    pub(super) fn note_end_of_wait(&self, full: Duration, now: Instant) {
        let turns = self.idle_turns.get();
        if turns == 0 {
            return;
        }
        let budget = self.spin.after(self.waits_after.get());
        if turns < self.untimed_turns.get() {
            return budget.note_hope();
        }
        budget.note_found(now.saturating_duration_since(self.idle_since.get()), full);
    }

    /// Nothing came, and the session goes to sleep.
    pub(super) fn note_sleep(&self, now: Instant) {
        self.slept_at.set(now);
        self.spin.after(self.waits_after.get()).note_in_vain();
    }

    /// The session is looked at again.
    pub(super) fn note_wake(&self, full: Duration) {
        if self.slept_at.get().elapsed() < full.saturating_mul(Self::FAR_TOO_LONG) {
            self.spin.after(self.waits_after.get()).note_hope();
        }
    }

    /// Counts a turn that found nothing, and says whether there was nothing for as long as is left
    /// of the budget, and as long as the peer needs for what it was sent.
    pub(super) fn is_idle(&self, full: Duration, now: Instant) -> bool {
        let turns = self.idle_turns.get().saturating_add(1);
        self.idle_turns.set(turns);
        if turns == 1 {
            self.begin_wait();
        }
        let untimed = self.untimed_turns.get();
        if turns <= untimed {
            if turns == untimed {
                self.idle_since.set(Instant::now());
            }
            return false;
        }
        let patience = Duration::from_nanos(self.unanswered.get() / Self::BYTES_PER_NANOSECOND);
        let full = full.saturating_add(patience.min(Self::MOST_PATIENCE));
        let budget = self.spin.after(self.waits_after.get()).of(full);
        now.saturating_duration_since(self.idle_since.get()) >= budget
    }

    /// The first turn that found nothing.
    #[inline]
    fn begin_wait(&self) {
        let has_sent = self.unanswered.get() > 0;
        let after = if has_sent { After::Sending } else { After::Receiving };
        self.waits_after.set(after);
        let is_in_vain = self.spin.after(after).is_hopeless();
        self.untimed_turns.set(if is_in_vain { Self::FEWEST_TURNS } else { Self::IDLE_TURNS });
    }
}

/// Waiting for the peer without the poller.
#[derive(Default)]
pub(super) struct InPlace {
    /// What is left to spend on it before the poller's next turn.
    pub(super) credit: Cell<usize>,
    /// How often it is not done, because it was in vain.
    pub(super) skips: Cell<u32>,
    /// How often it was not done the last time it was in vain.
    pub(super) penalty: Cell<u32>,
}
