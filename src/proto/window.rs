// SPDX-License-Identifier: MIT OR Apache-2.0
//! How much of a stream may wait unread on the other side.
//!
//! Between two sides of this crate, and only there (see [`Extension`](crate::wire::Extension)): the
//! sender counts what it has sent, the receiver gives credit for what its reader has taken. What is
//! counted is what a message occupies: the capacity of its slices, since that is what a slow reader
//! keeps from others, or its bytes when it went over the socket.
//!
//! A sender may send while less than the window is unread, so what is unread stays below the window
//! and one message. A receiver gives credit for half a window at once; since less than that is not
//! yet given when everything was taken, a sender never waits for a reader that has nothing to read.
//!
//! Whom it trusts: nobody. Credit for more than was sent counts as credit for what was sent.

use std::cell::Cell;

/// What this side has sent on a stream and the peer's reader has not taken.
#[derive(Debug, Default)]
pub(crate) struct SendWindow {
    sent: Cell<u64>,
    credited: Cell<u64>,
    /// What had been sent when something last went over the socket.
    socket_until: Cell<u64>,
}

impl SendWindow {
    /// Whether one more message may be sent.
    #[inline]
    pub(crate) fn has_room(&self, window: u64) -> bool {
        self.sent.get() - self.credited.get() < window
    }

    /// Counts a message that went through shared memory.
    #[inline]
    pub(crate) fn note_sent(&self, size: u64) {
        self.sent.set(self.sent.get().wrapping_add(size));
    }

    /// How much was sent until now.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.get()
    }

    /// Whether something has gone over the socket.
    pub(crate) fn has_used_socket(&self) -> bool {
        self.socket_until.get() > 0
    }

    /// Counts bytes that went over the socket.
    pub(crate) fn note_sent_over_socket(&self, size: u64) {
        self.note_sent(size);
        self.socket_until.set(self.sent.get());
    }

    /// The peer's reader has taken so much.
    pub(crate) fn credit(&self, size: u64) {
        let unread = self.sent.get() - self.credited.get();
        self.credited.set(self.credited.get() + size.min(unread));
    }

    /// Whether the peer's reader has taken everything that went over the socket.
    #[inline]
    pub(crate) fn is_socket_done(&self) -> bool {
        self.credited.get() >= self.socket_until.get()
    }
}

/// What this side's reader has taken and the peer has no credit for yet.
#[derive(Debug, Default)]
pub(crate) struct ReceiveWindow {
    owed: Cell<u64>,
    /// Whether some of it came over the socket: the peer waits for that, to leave the socket again.
    owes_for_socket: Cell<bool>,
}

impl ReceiveWindow {
    /// Takes what is owed, as far as one event can tell it.
    pub(crate) fn take(&self) -> u32 {
        let owed = self.owed.get();
        let credit = u32::try_from(owed).unwrap_or(u32::MAX);
        self.owed.set(owed - u64::from(credit));
        credit
    }

    /// Puts credit back that could not be told.
    pub(crate) fn put_back(&self, credit: u32) {
        self.owed.set(self.owed.get() + u64::from(credit));
    }

    /// The reader took a message. Gives the credit that is due now: half a window of it, or all
    /// when the reader is `done` with what came over the socket.
    #[inline]
    pub(crate) fn note_taken(
        &self,
        size: u64,
        over_socket: bool,
        done: bool,
        window: u64,
    ) -> Option<u32> {
        let owed = self.owed.get() + size;
        self.owed.set(owed);
        if over_socket {
            self.owes_for_socket.set(true);
        }
        if owed >= window / 2 || (done && self.owes_for_socket.get()) {
            self.owes_for_socket.set(!done && self.owes_for_socket.get());
            return Some(self.take());
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_full_window_waits_for_credit() {
        let window = SendWindow::default();
        window.note_sent(60);
        assert!(window.has_room(100));
        window.note_sent(60);
        assert!(!window.has_room(100));
        window.credit(19);
        assert!(!window.has_room(100));
        window.credit(2);
        assert!(window.has_room(100));
        window.credit(u64::MAX);
        assert!(window.has_room(1), "no more credit than what was sent");
        window.note_sent(1);
        assert!(!window.has_room(1));
    }

    #[test]
    fn the_socket_is_left_when_all_of_it_was_taken() {
        let window = SendWindow::default();
        window.note_sent(10);
        window.note_sent_over_socket(5);
        assert!(!window.is_socket_done());
        window.credit(14);
        assert!(!window.is_socket_done());
        window.credit(1);
        assert!(window.is_socket_done());
    }

    #[test]
    fn credit_for_the_socket_comes_when_the_reader_is_done() {
        let window = ReceiveWindow::default();
        assert_eq!(window.note_taken(10, true, false, 1000), None);
        assert_eq!(window.note_taken(10, false, true, 1000), Some(20));
        assert_eq!(window.note_taken(10, false, true, 1000), None);
    }

    proptest! {
        #[test]
        fn nobody_waits_for_a_reader_that_took_everything(
            window in 1u64..5000,
            messages in prop::collection::vec((1u64..3000, any::<bool>(), 0u32..4), 1..200),
        ) {
            let (sender, receiver) = (SendWindow::default(), ReceiveWindow::default());
            let mut queue = std::collections::VecDeque::new();
            for (size, over_socket, reads) in messages {
                if !sender.has_room(window) {
                    // The reader takes everything: then there must be room.
                    while let Some((size, over_socket)) = queue.pop_front() {
                        let done = queue.is_empty();
                        if let Some(credit) = receiver.note_taken(size, over_socket, done, window) {
                            sender.credit(u64::from(credit));
                        }
                    }
                    prop_assert!(sender.has_room(window));
                    prop_assert!(sender.is_socket_done());
                }
                if over_socket {
                    sender.note_sent_over_socket(size);
                } else {
                    sender.note_sent(size);
                }
                queue.push_back((size, over_socket));
                let unread: u64 = queue.iter().map(|(size, _)| size).sum();
                prop_assert!(unread < window + size);
                for _ in 0..reads {
                    let Some((size, over_socket)) = queue.pop_front() else { break };
                    let done = queue.is_empty();
                    if let Some(credit) = receiver.note_taken(size, over_socket, done, window) {
                        sender.credit(u64::from(credit));
                    }
                }
            }
        }
    }
}
