// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a session is brought to its end without losing what its peer has asked for.
//!
//! The protocol has no word for "I am about to go". So this side behaves as if the peer had said
//! that: it takes no more streams, and each stream ends behind what has come of it. Whoever serves
//! it reads to the end, answers, and drops it. When no stream is left, the session can go.
//!
//! A stream must not end in the middle of a request. Where requests begin and end is not known
//! here; but somebody who is in the middle of one goes on sending, and is not answered meanwhile.
//! So as long as a stream moves like that, it gets its end last.

use std::rc::Rc;

use crate::session::state::SessionInner;
use crate::session::stream::StreamInner;

/// Which streams get their end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DrainPhase {
    /// None yet: this is the first look at what moves.
    Look,
    /// Those that are not in the middle of something.
    Quiet,
    /// All.
    All,
}

impl SessionInner {
    /// Takes no more streams than have come by now.
    pub(crate) fn begin_drain(self: &Rc<Self>) {
        self.drain_all();
        self.accepts.is_over.set(true);
        self.accepts.waiting.wake_all();
    }

    /// Looks at the streams, and lets end those whose turn it is. Whether nothing is left: no
    /// stream, and nothing that waits for the socket.
    pub(crate) fn drain_streams(&self, drain: DrainPhase) -> bool {
        let streams = self.streams.borrow().all();
        for stream in &streams {
            let is_in_the_middle = stream.is_in_the_middle();
            let ends = match drain {
                DrainPhase::Look => false,
                DrainPhase::Quiet => !is_in_the_middle,
                DrainPhase::All => true,
            };
            if ends && stream.life().can_receive() {
                self.end_reading(stream);
            }
        }
        streams.is_empty() && self.outbox().is_empty()
    }

    /// Whether somebody here has a stream in hand, or half of one.
    pub(crate) fn has_streams_in_hand(&self) -> bool {
        self.streams.borrow().len() > self.accepts.ready.borrow().len()
    }

    fn end_reading(&self, stream: &StreamInner) {
        stream.life().drain();
        self.wake_reader(stream);
    }
}
