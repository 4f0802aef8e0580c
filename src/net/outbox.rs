// SPDX-License-Identifier: MIT OR Apache-2.0
//! What waits for the socket to take it, in order.
//!
//! A message goes out at once when the socket takes it. Only what the socket does not take is kept,
//! and a task waits for the socket; it exists only while something is kept.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::task::Poll;

use futures_lite::future::poll_fn;

use crate::exec::wakers::WakerList;
use crate::net::socket::Socket;
use shmipc_core::wire::FALLBACK_HEADER_LEN;

/// Payload waits until less than this is kept, so that a slow peer costs a bounded amount of
/// memory.
const KEEP_AT_MOST: usize = 256 << 10;

/// What may be kept besides payload.
const KEEP_OF_OTHERS: usize = 4 << 20;

/// How much memory small messages share.
const PIECE_LEN: usize = 4096;

/// The outbound half of a session's socket.
#[derive(Default)]
pub(crate) struct Outbox {
    kept: RefCell<Kept>,
    /// Whether the task that waits for the socket runs.
    has_task: Cell<bool>,
    waiting: WakerList,
    /// How many bytes came here until now.
    taken_in: Cell<u64>,
    /// Whether something was thrown away, since the session ended first.
    is_cut: Cell<bool>,
}

/// What waits for the socket: bytes in pieces of memory that are filled one after the other, so
/// that a message of twelve bytes costs twelve.
#[derive(Default)]
struct Kept {
    pieces: VecDeque<Piece>,
    unsent: usize,
    /// How much memory the pieces have.
    held: usize,
    /// How many bytes of them are of messages without payload. A piece counts until all of it is
    /// sent.
    without_payload: usize,
}

struct Piece {
    bytes: Vec<u8>,
    sent: usize,
    without_payload: usize,
}

impl Kept {
    fn push(&mut self, mut bytes: &[u8], has_payload: bool) {
        self.unsent += bytes.len();
        while !bytes.is_empty() {
            let room =
                self.pieces.back().map_or(0, |last| last.bytes.capacity() - last.bytes.len());
            if room == 0 {
                let piece = Vec::with_capacity(bytes.len().max(PIECE_LEN));
                self.held += piece.capacity();
                self.pieces.push_back(Piece { bytes: piece, sent: 0, without_payload: 0 });
                continue;
            }
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            if let Some(last) = self.pieces.back_mut() {
                last.bytes.extend_from_slice(now);
                let counted = if has_payload { 0 } else { now.len() };
                last.without_payload += counted;
                self.without_payload += counted;
            }
            bytes = later;
        }
    }

    /// The oldest bytes.
    fn front(&self) -> Option<&[u8]> {
        self.pieces.front().map(|piece| &piece.bytes[piece.sent..])
    }

    /// Forgets the oldest bytes, so many of them.
    fn drop_front(&mut self, sent: usize) {
        let Some(front) = self.pieces.front_mut() else { return };
        front.sent += sent;
        self.unsent -= sent;
        if front.sent >= front.bytes.len() {
            self.held -= front.bytes.capacity();
            self.without_payload -= front.without_payload;
            self.pieces.pop_front();
        }
    }
}

impl Outbox {
    /// Sends a message, or keeps it behind those that were kept. Gives whether a task must be
    /// started to send the rest.
    pub(crate) fn send(&self, socket: &Socket, message: &[u8]) -> io::Result<bool> {
        self.taken_in.set(self.taken_in.get() + message.len() as u64);
        let sent = if self.is_empty() { socket.try_send(message) } else { Ok(0) };
        // Also what is refused, so that the session does not end as if it had been taken.
        let taken = *sent.as_ref().unwrap_or(&0);
        if taken < message.len() {
            let has_payload = message.len() > FALLBACK_HEADER_LEN;
            self.kept.borrow_mut().push(&message[taken..], has_payload);
            sent?;
            return Ok(!self.has_task.replace(true));
        }
        Ok(false)
    }

    /// Sends what is kept until nothing is: the task of [`send`](Self::send).
    pub(crate) async fn send_kept(&self, socket: &Socket) -> io::Result<()> {
        let result = self.send_until_empty(socket).await;
        self.has_task.set(false);
        result
    }

    async fn send_until_empty(&self, socket: &Socket) -> io::Result<()> {
        let mut sender = socket.sender();
        while !self.is_empty() {
            let sent = poll_fn(|context| {
                let kept = self.kept.borrow();
                match kept.front() {
                    Some(front) => sender.poll_send(context, front),
                    // Cleared, since the session ended meanwhile.
                    None => Poll::Ready(Ok(0)),
                }
            })
            .await?;
            self.kept.borrow_mut().drop_front(sent);
            self.waiting.wake_all();
        }
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.kept.borrow().pieces.is_empty()
    }

    /// How many bytes the socket has not taken.
    pub(crate) fn len(&self) -> usize {
        self.kept.borrow().unsent
    }

    /// How many bytes came here until now.
    pub(crate) fn taken_in(&self) -> u64 {
        self.taken_in.get()
    }

    /// Whether payload should wait.
    pub(crate) fn is_full(&self) -> bool {
        self.kept.borrow().held >= KEEP_AT_MOST
    }

    /// Tasks that wait until the outbox is no longer full, or empty.
    pub(crate) fn waiting(&self) -> &WakerList {
        &self.waiting
    }

    /// Forgets everything: the socket is gone.
    pub(crate) fn clear(&self) {
        let kept = self.kept.take();
        if !kept.pieces.is_empty() {
            self.is_cut.set(true);
        }
        self.waiting.wake_all();
    }

    /// Whether something was thrown away.
    pub(crate) fn is_cut(&self) -> bool {
        self.is_cut.get()
    }

    /// Whether more is kept that is no payload than a peer leads to that reads. Payload is bounded
    /// by itself: it waits when the outbox is full.
    pub(crate) fn is_overfull(&self) -> bool {
        self.kept.borrow().without_payload > KEEP_OF_OTHERS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is kept is what memory it takes, and every byte comes out in its order.
    #[test]
    fn small_messages_share_memory() {
        const MESSAGES: u32 = 100_000;
        let mut kept = Kept::default();
        let message = |number: u32| {
            let len = if number.is_multiple_of(1000) { 20_000 } else { 12 };
            (0..len).map(move |at: u32| (number ^ at) as u8).collect::<Vec<u8>>()
        };
        let mut bytes = 0;
        for number in 0..MESSAGES {
            let message = message(number);
            bytes += message.len();
            kept.push(&message, message.len() > FALLBACK_HEADER_LEN);
        }
        let held: usize = kept.pieces.iter().map(|piece| piece.bytes.capacity()).sum();
        assert_eq!(kept.held, held);
        assert!(kept.held < bytes + bytes / 8, "{} for {bytes}", kept.held);
        assert!(kept.pieces.len() < 1000, "{} allocations", kept.pieces.len());
        assert_eq!(kept.without_payload, 12 * (MESSAGES - MESSAGES / 1000) as usize);
        let mut expected = (0..MESSAGES).flat_map(message);
        let mut step = 0;
        while let Some(front) = kept.front() {
            step = (step * 7 + 13) % 9973;
            let sent = front.len().min(step + 1);
            assert!(front[..sent].iter().all(|&byte| expected.next() == Some(byte)));
            kept.drop_front(sent);
        }
        assert_eq!(expected.next(), None);
        assert_eq!((kept.held, kept.without_payload), (0, 0));
    }

    #[test]
    fn a_peer_that_reads_nothing_makes_no_more_kept_than_the_bound() {
        let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
        let run = async move {
            let socket = Socket::connected(crate::net::fd_disposal::PeerSocket::new(near.into()));
            let outbox = Outbox::default();
            let mut sent = 0;
            while !outbox.is_overfull() {
                outbox.send(&socket, &[7; 12]).unwrap();
                sent += 12;
                assert!(sent < 16 << 20, "it ends");
            }
            let held = outbox.kept.borrow().held;
            assert!(held < KEEP_OF_OTHERS + (64 << 10), "{held} bytes");
            outbox.clear();
            assert!(outbox.is_empty() && outbox.is_cut() && !outbox.is_overfull());
        };
        glommio::LocalExecutorBuilder::default().make().unwrap().run(run);
    }
}
