// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the reactor drives, as it sees it.

use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::reactor::poll_state::PollState;

/// What a session does next with its place among the active ones, from the least wakeful on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum PollOutcome {
    /// It has ended.
    Closed,
    /// Its spin budget is over.
    Idle,
    /// Tasks wait for the peer, which tells nobody when it makes room.
    Blocked,
    /// It had traffic within its spin budget.
    Spinning,
    /// It had traffic in this turn.
    Progress,
}

/// A session, to the reactor. Its methods are called from the reactor's own tasks.
pub(crate) trait Pollable: Sized + 'static {
    /// What the sessions of an executor share, beside the reactor.
    type Shared: Default;

    fn activity(&self) -> &PollState;
    fn is_over(&self) -> bool;
    /// Whether the peer has published events that nobody took yet.
    fn has_events(&self) -> bool;
    /// One turn.
    fn turn(self: &Rc<Self>, now: Instant) -> PollOutcome;
    /// Puts the session among the active ones.
    fn activate(self: &Rc<Self>);
    /// Whether its queue may be looked at when it has nothing to do.
    fn may_be_looked_at(&self) -> bool;
    /// Tells the peer that this side looks at the queue from now on.
    fn set_working(&self);
    /// Tells the peer that nobody looks at the queue any more. `false`: something came meanwhile.
    fn fall_asleep(self: &Rc<Self>) -> bool;
    /// Gives free slices back to the peer, or keeps some again.
    fn set_resting(&self, is_resting: bool);
    /// For how long the peer may leave what was sent to it.
    fn stall_timeout(&self) -> Option<Duration>;
    /// Checks the peer and the memory, so long after the last time.
    fn look_after(&self, passed: Duration);
    /// Ends the session since its executor does.
    fn terminate(&self);
    /// Tells the peer that this side is gone. Wakes nobody: the executor is no more.
    fn abandon(&self);
}
