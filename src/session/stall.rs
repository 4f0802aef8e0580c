// SPDX-License-Identifier: MIT OR Apache-2.0
//! Waits for a peer that has yet to show that it has mapped the memory.

use std::rc::Weak;

use crate::exec::runtime::sleep;
use crate::session::state::SessionInner;

/// How many parts the time is waited in that a server of version 2 has for the first event. When
/// both sides were stopped meanwhile, that counts as one of them.
const PARTS_OF_FIRST: u32 = 8;

/// Ends a session whose peer does not take the first event in time.
pub(crate) async fn await_first_event_taken(session: Weak<SessionInner>) {
    for part in 1..=PARTS_OF_FIRST {
        let Some(limit) =
            session.upgrade().map(|session| session.config.settings().limits.handshake_timeout)
        else {
            return;
        };
        sleep(limit / PARTS_OF_FIRST).await;
        let Some(session) = session.upgrade().filter(|session| !session.is_over()) else {
            return;
        };
        if session.proto.has_taken_any(&*session) {
            return;
        }
        if part == PARTS_OF_FIRST {
            session.proto.on_unproven(&*session, limit);
        }
    }
}
