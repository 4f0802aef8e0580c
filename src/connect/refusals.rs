// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who is refused gets to know why, and so does who runs the server.
//!
//! A peer of version 4 is told by an answer with an error, as far as it has begun to negotiate.
//! Nothing here waits for it: what does not fit into its socket at once is not sent, and one that
//! is refused before it has said anything gets a moment for its first message, while few others do.
//!
//! The log has every reason at once, and then at most once a second with the number of those that
//! were not logged, so that a flood of peers is not a flood of lines.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_lite::future::or;

use crate::connect::handshake_server::Acceptance;
use crate::exec::log_limit::LogLimit;
use crate::exec::runtime::sleep;
use crate::exec::wakers::WakerList;
use crate::net::credentials::PeerCredentials;
use shmipc_core::error::{Error, HandshakeError};

/// How many peers at a time may take a moment to say that they speak version 4, before they are
/// told that they are refused. Others are not told.
const MAX_FAREWELLS: usize = 16;
/// How long that moment is.
const FAREWELL_TIME: Duration = Duration::from_millis(200);

/// The refusals of a listener.
#[derive(Default)]
pub(crate) struct Refusals {
    /// One entry for each reason that there was; there are a handful.
    reasons: RefCell<Vec<Reason>>,
    farewells: Cell<usize>,
}

struct Reason {
    name: &'static str,
    limit: LogLimit,
}

/// A peer that is about to be told that it is refused.
pub(crate) struct Farewell<'a> {
    refusals: &'a Refusals,
}

impl Drop for Farewell<'_> {
    fn drop(&mut self) {
        self.refusals.farewells.set(self.refusals.farewells.get() - 1);
    }
}

impl Refusals {
    /// Logs that a peer was refused at a listener's socket.
    pub(crate) fn log(&self, listener: &str, peer: Option<&PeerCredentials>, error: &Error) {
        if matches!(error, Error::Handshake(HandshakeError::Closed { .. })) {
            // Nobody was refused: it has gone by itself.
            tracing::debug!(listener, %error, "peer went away in its handshake");
            return;
        }
        let reason = error.refusal_code().unwrap_or("FAILED");
        let Some(untold) = self.turn_to_tell(reason, Instant::now()) else { return };
        let uid = peer.and_then(|peer| peer.uid);
        let pid = peer.and_then(|peer| peer.pid);
        tracing::warn!(listener, reason, uid, pid, %error, untold, "peer refused");
    }

    /// Whether a reason is to be told now, and of how many it was not told since it was last.
    fn turn_to_tell(&self, name: &'static str, now: Instant) -> Option<u64> {
        let mut reasons = self.reasons.borrow_mut();
        let known = reasons.iter().position(|reason| reason.name == name);
        let at = known.unwrap_or(reasons.len());
        if known.is_none() {
            reasons.push(Reason { name, limit: LogLimit::new() });
        }
        reasons[at].limit.turn(now)
    }

    /// Lets a peer have its moment, if there are not too many that do.
    pub(crate) fn farewell(&self) -> Option<Farewell<'_>> {
        if self.farewells.get() >= MAX_FAREWELLS {
            return None;
        }
        self.farewells.set(self.farewells.get() + 1);
        Some(Farewell { refusals: self })
    }
}

/// Whether handshakes that are under way are to end.
#[derive(Default)]
pub(crate) struct Stop {
    is_stopping: Cell<bool>,
    waiting: WakerList,
}

impl Stop {
    pub(crate) fn begin(&self) {
        self.is_stopping.set(true);
        self.waiting.wake_all();
    }

    pub(crate) async fn begun(&self) {
        let is_stopping = || if self.is_stopping.get() { Poll::Ready(()) } else { Poll::Pending };
        self.waiting.until(is_stopping).await;
    }
}

/// Tells a peer that it is refused, if it is quick to say that it could understand that.
pub(crate) async fn say_farewell(
    acceptance: Acceptance,
    error: Error,
    refusals: Rc<Refusals>,
    stop: Rc<Stop>,
) {
    let Some(_farewell) = refusals.farewell() else { return };
    let too_late = or(stop.begun(), async {
        sleep(FAREWELL_TIME).await;
    });
    or(acceptance.tell_refused_at_first(&error), too_late).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_is_told_at_once_and_then_once_a_second_with_a_count() {
        let refusals = Refusals::default();
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        assert_eq!(refusals.turn_to_tell("FULL", at(0)), Some(0));
        for millisecond in 1..1000 {
            assert_eq!(refusals.turn_to_tell("FULL", at(millisecond)), None);
        }
        assert_eq!(refusals.turn_to_tell("NOT_ALLOWED", at(500)), Some(0), "another reason");
        assert_eq!(refusals.turn_to_tell("FULL", at(1000)), Some(999));
        assert_eq!(refusals.turn_to_tell("FULL", at(5000)), Some(0));
        assert_eq!(refusals.turn_to_tell("NOT_ALLOWED", at(5000)), Some(0));
    }

    #[test]
    fn farewells_are_bounded() {
        let refusals = Refusals::default();
        let all: Vec<_> = std::iter::from_fn(|| refusals.farewell()).collect();
        assert_eq!(all.len(), MAX_FAREWELLS);
        drop(all);
        assert!(refusals.farewell().is_some());
    }
}
