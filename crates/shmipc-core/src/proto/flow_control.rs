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
//! A sender that sleeps is not woken for credit that it can do without: what is due is kept until
//! this side sends something anyway, or until the sender may have come to its end. It has, when as
//! much as a window has come without credit for it; all that a sender sent before it had to wait
//! does come.
//!
//! Trust: none in the peer. Credit for more than was sent counts as credit for what was sent.

use std::cell::Cell;

/// How much credit for what came over the socket is told at once: more often than otherwise, since
/// the sender may wait for it to leave the socket, and wants to see that the reader reads.
const SOCKET_CREDIT: u64 = 16 << 10;

/// What this side has sent on a stream and the peer's reader has not taken.
#[derive(Debug, Default)]
pub struct SendWindow {
    sent: Cell<u64>,
    credited: Cell<u64>,
    /// What had been sent when something last went over the socket.
    socket_until: Cell<u64>,
    /// Bytes that went over the socket and were not taken, and what they cost there.
    socket_bytes: Cell<u64>,
    socket_cost: Cell<u64>,
    /// How much had been credited and sent when the peer was asked for more.
    asked_at: Cell<Option<(u64, u64)>>,
    /// How much had been sent when the peer said that its reader waits for more.
    wanted_at: Cell<Option<u64>>,
}

impl SendWindow {
    /// Whether one more message may be sent.
    #[inline]
    pub fn has_room(&self, window: u64) -> bool {
        self.sent.get() - self.credited.get() < window
    }

    /// Counts a message that went through shared memory.
    #[inline]
    pub fn record_sent(&self, size: u64) {
        self.sent.set(self.sent.get().wrapping_add(size));
    }

    /// How much was sent until now.
    pub fn sent(&self) -> u64 {
        self.sent.get()
    }

    /// How much of it the peer's reader has taken, as far as it has said so.
    pub fn credited(&self) -> u64 {
        self.credited.get()
    }

    /// Whether something has gone over the socket.
    pub fn has_used_socket(&self) -> bool {
        self.socket_until.get() > 0
    }

    /// What the peer's reader has not taken, as far as it has said so, and what that costs the peer
    /// where it went over the socket.
    pub fn held(&self) -> u64 {
        let unread = self.sent.get() - self.credited.get();
        unread.saturating_sub(self.socket_bytes.get()) + self.socket_cost.get()
    }

    /// Whether the peer's reader has taken everything, and said so.
    pub fn is_all_taken(&self) -> bool {
        self.credited.get() == self.sent.get()
    }

    /// Counts a message that went over the socket, and what it costs the peer until it is taken.
    pub fn record_sent_over_socket(&self, size: u64, cost: u64) {
        self.record_sent(size);
        self.socket_until.set(self.sent.get());
        self.socket_bytes.set(self.socket_bytes.get() + size);
        self.socket_cost.set(self.socket_cost.get() + cost);
    }

    /// The peer's reader has taken so much. Returns how much of what it cost on the socket that is.
    pub fn credit(&self, size: u64) -> u64 {
        let unread = self.sent.get() - self.credited.get();
        self.credited.set(self.credited.get() + size.min(unread));
        let (bytes, cost) = (self.socket_bytes.get(), self.socket_cost.get());
        if bytes == 0 {
            return 0;
        }
        let left = bytes.min(self.socket_until.get().saturating_sub(self.credited.get()));
        // Each byte of it cost as much as the others, as far as is known here.
        let left_cost = (u128::from(cost) * u128::from(left) / u128::from(bytes)) as u64;
        self.socket_bytes.set(left);
        self.socket_cost.set(left_cost);
        cost - left_cost
    }

    /// The stream is over. Returns what it still cost on the socket.
    pub fn take_socket_cost(&self) -> u64 {
        self.socket_bytes.set(0);
        self.socket_cost.take()
    }

    /// Whether the peer has not been asked yet for more credit than it has given by now, or whether
    /// its reader waits for more than was sent by now.
    pub fn may_ask(&self) -> bool {
        self.asked_at.get() != Some((self.credited.get(), self.sent.get()))
    }

    /// Records that the peer was asked, with what was credited and sent by now.
    pub fn on_asked(&self) {
        self.asked_at.set(Some((self.credited.get(), self.sent.get())));
    }

    /// The peer says that its reader waits. It counts for the next message only, and not at all
    /// while something is on its way that the peer did not know of.
    pub fn on_reader_wanted(&self) {
        if self.is_all_taken() {
            self.wanted_at.set(Some(self.sent.get()));
        }
    }

    /// Whether the peer's reader waits for the next message.
    pub fn is_wanted(&self) -> bool {
        self.wanted_at.get() == Some(self.sent.get())
    }

    /// Whether the peer's reader has taken everything that went over the socket.
    #[inline]
    pub fn is_socket_done(&self) -> bool {
        self.credited.get() >= self.socket_until.get()
    }
}

/// What this side's reader has taken and the peer has no credit for yet.
#[derive(Debug, Default)]
pub struct ReceiveWindow {
    owed: Cell<u64>,
    /// All that has come and that no credit was told for, taken or not.
    uncredited: Cell<u64>,
    /// Whether the peer waits for credit sooner than it would otherwise be told.
    hurry: Cell<Hurry>,
    /// Whether the peer wants to know when a reader waits.
    wants_reader: Cell<bool>,
}

/// Why a peer waits for credit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Hurry {
    #[default]
    No,
    /// Some of it came over the socket: the peer wants to leave the socket again.
    Socket,
    /// It has asked.
    Asked,
}

/// Whether, and how urgently, the peer is told of credit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CreditUpdate {
    /// It is little as yet.
    Not,
    /// If the peer is awake, or when this side sends something else.
    Soon,
    /// Even if the peer has to be woken for it.
    Now,
}

impl ReceiveWindow {
    /// Takes what is owed, as far as one event can tell it.
    pub fn take(&self) -> u32 {
        let owed = self.owed.get();
        let credit = u32::try_from(owed).unwrap_or(u32::MAX);
        self.owed.set(owed - u64::from(credit));
        // What is owed has come.
        self.uncredited.set(self.uncredited.get().saturating_sub(credit.into()));
        credit
    }

    /// Puts credit back that could not be told.
    pub fn put_back(&self, credit: u32) {
        self.owed.set(self.owed.get() + u64::from(credit));
        self.uncredited.set(self.uncredited.get() + u64::from(credit));
    }

    fn is_due_in_a_hurry(&self, owed: u64, done: bool, window: u64) -> bool {
        let is_asked = self.hurry.get() == Hurry::Asked;
        let is_due = is_asked || done || owed >= SOCKET_CREDIT.min(window / 2);
        if is_due {
            self.hurry.set(if done || is_asked { Hurry::No } else { Hurry::Socket });
        }
        is_due
    }

    /// The peer asks for credit: now, or when the reader takes the next message.
    /// Records that the peer was asked, with what was credited and sent by now.
    pub fn on_asked(&self) {
        self.hurry.set(Hurry::Asked);
    }

    /// Whether the peer wants to know when a reader waits.
    #[inline]
    pub fn wants_reader(&self) -> bool {
        self.wants_reader.get()
    }

    /// Records whether the peer wants to know when a reader waits.
    pub fn set_wants_reader(&self, wants: bool) {
        self.wants_reader.set(wants);
    }

    /// A message came.
    #[inline]
    pub fn record_arrival(&self, size: u64) {
        self.uncredited.set(self.uncredited.get().wrapping_add(size));
    }

    /// Whether the sender may wait for credit, or is about to: a little before it has to.
    #[inline]
    pub fn is_sender_near_its_end(&self, window: u64) -> bool {
        self.uncredited.get() >= window - window / 4
    }

    /// The reader took a message. Credit is due once it is half a window, or less of what came over
    /// the socket, and when the reader is `done` with that.
    #[inline]
    pub fn record_taken(
        &self,
        size: u64,
        over_socket: bool,
        done: bool,
        window: u64,
    ) -> CreditUpdate {
        let owed = self.owed.get() + size;
        self.owed.set(owed);
        if over_socket && self.hurry.get() == Hurry::No {
            self.hurry.set(Hurry::Socket);
        }
        if self.hurry.get() != Hurry::No && self.is_due_in_a_hurry(owed, done, window) {
            return CreditUpdate::Now;
        }
        match owed >= window / 2 {
            true if self.is_sender_near_its_end(window) => CreditUpdate::Now,
            true => CreditUpdate::Soon,
            false => CreditUpdate::Not,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_full_window_waits_for_credit() {
        let window = SendWindow::default();
        window.record_sent(60);
        assert!(window.has_room(100));
        window.record_sent(60);
        assert!(!window.has_room(100));
        window.credit(19);
        assert!(!window.has_room(100));
        window.credit(2);
        assert!(window.has_room(100));
        window.credit(u64::MAX);
        assert!(window.has_room(1), "no more credit than what was sent");
        window.record_sent(1);
        assert!(!window.has_room(1));
    }

    #[test]
    fn the_socket_is_left_when_all_of_it_was_taken() {
        let window = SendWindow::default();
        window.record_sent(10);
        window.record_sent_over_socket(5, 133);
        assert!(!window.is_socket_done());
        window.credit(14);
        assert!(!window.is_socket_done());
        window.credit(1);
        assert!(window.is_socket_done());
    }

    #[test]
    fn a_reader_waits_for_one_message_and_for_none_while_some_are_on_their_way() {
        let window = SendWindow::default();
        assert!(!window.is_wanted() && window.may_ask());
        window.on_asked();
        assert!(!window.may_ask());
        window.on_reader_wanted();
        assert!(window.is_wanted());
        window.record_sent_over_socket(5, 133);
        assert!(!window.is_wanted() && window.may_ask());
        window.on_reader_wanted();
        assert!(!window.is_wanted(), "the peer has not said that it has the last one");
        window.credit(5);
        window.on_reader_wanted();
        assert!(window.is_wanted());
    }

    #[test]
    fn credit_for_the_socket_comes_when_the_reader_is_done() {
        let window = ReceiveWindow::default();
        (0..3).for_each(|_| window.record_arrival(10));
        assert_eq!(window.record_taken(10, true, false, 1000), CreditUpdate::Not);
        assert_eq!(window.record_taken(10, false, true, 1000), CreditUpdate::Now);
        assert_eq!(window.take(), 20);
        assert_eq!(window.record_taken(10, false, true, 1000), CreditUpdate::Not);
    }

    #[test]
    fn credit_waits_as_long_as_the_sender_has_room() {
        let window = ReceiveWindow::default();
        (0..7).for_each(|_| window.record_arrival(10));
        let due: Vec<_> = (0..7).map(|_| window.record_taken(10, false, false, 100)).collect();
        assert_eq!(due, [[CreditUpdate::Not; 4].as_slice(), &[CreditUpdate::Soon; 3]].concat());
        assert!(!window.is_sender_near_its_end(100));
        window.record_arrival(10);
        assert!(window.is_sender_near_its_end(100));
        assert_eq!(window.record_taken(10, false, false, 100), CreditUpdate::Now);
        assert_eq!(window.take(), 80);
        window.put_back(80);
        assert!(window.is_sender_near_its_end(100), "it was not told");
        assert_eq!(window.take(), 80);
        assert!(!window.is_sender_near_its_end(100));
    }

    proptest! {
        /// The sender sleeps or not, as it likes; what it has sent comes when it comes.
        #[test]
        fn nobody_waits_for_a_reader_that_took_everything(
            window in 1u64..5000,
            messages in prop::collection::vec(
                (1u64..3000, any::<bool>(), 0u32..4, 0u32..3, any::<bool>()),
                1..200,
            ),
        ) {
            let (sender, receiver) = (SendWindow::default(), ReceiveWindow::default());
            let mut way = std::collections::VecDeque::new();
            let mut queue = std::collections::VecDeque::new();
            let is_kept = Cell::new(false);
            let tell = || {
                is_kept.set(false);
                sender.credit(u64::from(receiver.take()));
            };
            let come = |message: (u64, bool)| {
                receiver.record_arrival(message.0);
                if is_kept.get() && receiver.is_sender_near_its_end(window) {
                    tell();
                }
                message
            };
            let read = |(size, over_socket), done, is_asleep| {
                match receiver.record_taken(size, over_socket, done, window) {
                    CreditUpdate::Not => {}
                    CreditUpdate::Soon if is_asleep => is_kept.set(true),
                    CreditUpdate::Soon | CreditUpdate::Now => tell(),
                }
            };
            for (size, over_socket, comes, reads, is_asleep) in messages {
                if !sender.has_room(window) {
                    // Everything comes. That less than a window of it is unread is known then.
                    queue.extend(way.drain(..).map(come));
                    let unread: u64 = queue.iter().map(|(size, _)| size).sum();
                    prop_assert!(sender.has_room(window) || unread >= window / 2);
                    // The reader takes everything: then there must be room.
                    while let Some(message) = queue.pop_front() {
                        read(message, queue.is_empty(), true);
                    }
                    prop_assert!(sender.has_room(window));
                    prop_assert!(sender.is_socket_done());
                }
                if over_socket {
                    sender.record_sent_over_socket(size, size + 128);
                } else {
                    sender.record_sent(size);
                }
                way.push_back((size, over_socket));
                let unread: u64 = way.iter().chain(&queue).map(|(size, _)| size).sum();
                prop_assert!(unread < window + size);
                for _ in 0..comes {
                    queue.extend(way.pop_front().map(come));
                }
                for _ in 0..reads {
                    let Some(message) = queue.pop_front() else { break };
                    read(message, queue.is_empty(), is_asleep);
                }
            }
        }
    }
}
