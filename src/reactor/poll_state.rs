// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a session has done lately, and so for how long it is worth looking at before it sleeps.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::reactor::spin_budget::{SpinBudgets, WaitKind};

/// What the core's poller does with a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Residency {
    /// It has turns.
    Active,
    /// It has none, but is looked at beside those that have.
    Standby,
    /// It sleeps, until somebody wakes it.
    Parked,
}

/// Whether the core's poller looks at this session, and since when it found nothing.
pub(crate) struct PollState {
    pub(crate) residency: Cell<Residency>,
    /// How often it has stopped having turns.
    pub(crate) retirements: Cell<u64>,
    /// Whether its magazines will be emptied if it has no turns for a while.
    pub(crate) will_rest: Cell<bool>,
    /// Turns in a row that found nothing.
    pub(crate) idle_turns: Cell<u32>,
    /// When the first [`Self::IDLE_TURNS`] of them were over, and the peer can have read what it
    /// was sent.
    idle_since: Cell<Instant>,
    spin: SpinBudgets,
    /// What the present wait came after.
    waits_after: Cell<WaitKind>,
    /// How long it may be.
    budget: Cell<Duration>,
    /// Whether it went on behind the session's last turn.
    has_retired: Cell<bool>,
    /// Bytes sent since something came.
    unanswered: Cell<u64>,
    /// How many events came together the last time.
    pub(crate) last_batch: Cell<usize>,
    /// How many tasks wait for data of their streams.
    pub(crate) waiting_readers: Cell<u32>,
    pub(crate) in_place: InlineBudget,
}

impl PollState {
    /// So many turns that find nothing are not worth a look at the clock: a session that exchanges
    /// messages has them all the time.
    const IDLE_TURNS: u32 = 16;
    /// So many are enough when it is not worth a look at the queue either.
    const IDLE_TURNS_AT_LEAST: u32 = 4;

    /// How many bytes the peer is given a nanosecond for, before the budget begins: it has to read
    /// them, and to write an answer that may be as long.
    const BYTES_PER_NANOSECOND: u64 = 16;
    const MOST_PATIENCE: Duration = Duration::from_millis(1);

    pub(crate) fn new() -> Self {
        Self {
            residency: Cell::new(Residency::Parked),
            retirements: Cell::new(0),
            will_rest: Cell::new(false),
            idle_turns: Cell::new(0),
            idle_since: Cell::new(Instant::now()),
            spin: SpinBudgets::default(),
            waits_after: Cell::new(WaitKind::Receiving),
            budget: Cell::new(Duration::ZERO),
            has_retired: Cell::new(false),
            unanswered: Cell::new(0),
            last_batch: Cell::new(0),
            waiting_readers: Cell::new(0),
            in_place: InlineBudget::default(),
        }
    }

    #[inline]
    pub(crate) fn note_sent(&self, bytes: usize) {
        self.unanswered.set(self.unanswered.get().saturating_add(bytes as u64));
    }

    #[inline]
    pub(crate) fn note_received(&self) {
        self.unanswered.set(0);
    }

    /// Something came: after how long a wait, if it was one that the clock was looked at for?
    #[inline]
    pub(crate) fn note_end_of_wait(&self, full: Duration, now: Instant) {
        if self.has_retired.get() || self.idle_turns.get() >= Self::IDLE_TURNS {
            let waited = now.saturating_duration_since(self.idle_since.get());
            let budget = self.spin.after(self.waits_after.get());
            if self.has_retired.take() {
                budget.note_woken(self.budget.get(), waited, full);
            } else {
                budget.note_found(waited, full);
            }
        }
    }

    /// Everything that was sent is shown to the peer: what is waited for now is something else.
    #[inline]
    pub(crate) fn note_flushed(&self) {
        self.note_wait_given_up();
        self.idle_turns.set(0);
    }

    /// This side has sent something, or was woken for something else, before anything came.
    #[inline]
    pub(crate) fn note_wait_given_up(&self) {
        if self.has_retired.take() {
            self.spin.after(self.waits_after.get()).note_in_vain();
        }
    }

    /// Nothing came, and the session has no more turns. Whether that is to be learned from.
    pub(crate) fn note_retired(&self, learns: bool) {
        self.in_place.credit.set(0);
        self.has_retired.set(learns);
        self.retirements.set(self.retirements.get() + 1);
    }

    /// Whether it has kept company, which it does not any more.
    pub(crate) fn leave_company(&self) -> bool {
        let has_kept_it = self.residency.get() == Residency::Standby;
        if has_kept_it {
            self.residency.set(Residency::Parked);
        }
        has_kept_it
    }

    /// It was looked at all the time after all, and something came.
    pub(crate) fn note_looked_on(&self) {
        self.budget.set(Duration::MAX);
    }

    /// Counts a turn that found nothing, and says whether there was nothing for as long as it is
    /// worth to wait, after the time that the peer needs for what it was sent.
    #[inline]
    pub(crate) fn is_idle(&self, full: Duration, now: Instant) -> bool {
        let turns = self.idle_turns.get().saturating_add(1);
        self.idle_turns.set(turns);
        if turns <= Self::IDLE_TURNS {
            if turns == Self::IDLE_TURNS
                || (turns == Self::IDLE_TURNS_AT_LEAST && self.spin.after(self.after()).is_none())
            {
                self.idle_turns.set(Self::IDLE_TURNS);
                self.begin_wait(full);
            }
            return false;
        }
        now.saturating_duration_since(self.idle_since.get()) >= self.budget.get()
    }

    fn after(&self) -> WaitKind {
        if self.unanswered.get() > 0 { WaitKind::Sending } else { WaitKind::Receiving }
    }

    fn begin_wait(&self, full: Duration) {
        self.note_wait_given_up();
        let after = self.after();
        let patience = Duration::from_nanos(self.unanswered.get() / Self::BYTES_PER_NANOSECOND);
        self.waits_after.set(after);
        self.budget.set(self.spin.after(after).of(full));
        self.idle_since.set(Instant::now() + patience.min(Self::MOST_PATIENCE));
    }
}

/// Waiting for the peer without the poller.
#[derive(Default)]
pub(crate) struct InlineBudget {
    /// What is left to spend on it before the poller's next turn.
    pub(crate) credit: Cell<usize>,
    /// How often it is not done, because it was in vain.
    pub(crate) skips: Cell<u32>,
    /// How often it was not done the last time it was in vain.
    pub(crate) penalty: Cell<u32>,
}
