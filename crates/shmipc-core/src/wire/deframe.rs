// SPDX-License-Identifier: MIT OR Apache-2.0
//! Messages out of a byte stream that arrives in arbitrary pieces.
//!
//! Invariants:
//! - The memory held follows what has arrived, never what a length field claims (as long as the
//!   caller asks for [`Deframer::receive_hint`] bytes, or for a constant).
//! - Data that is handed out keeps at most an eighth more than its own length alive: either it is
//!   most of the block that it was received into, which is cut to size and not copied, or it is a
//!   copy of its own.
//! - Moving received bytes costs no more than a constant factor of receiving them, however the
//!   stream is cut.
//! - After an error every further call gives the same error: nothing is skipped to get in step.
//!
//! Trust: none in the bytes. The caller is trusted to call [`Deframer::next_message`] until it
//! gives `None` before it receives more, otherwise bytes pile up here instead of in the socket.

use std::mem;

use bytes::{Buf, Bytes};

use super::header::{FALLBACK_HEADER_LEN, HEADER_LEN, Header, MessageType};
use super::message::{Message, decode_fallback_fields};
use crate::error::WireError;

/// How much is received at once when nothing large is under way. SyncEvents have 8 bytes.
const RECEIVE_LEN: usize = 4096;

/// What a message that came over the socket costs besides its bytes, about.
pub const SOCKET_MESSAGE_COST: usize = 128;

/// The largest block that is kept while no message is under way.
const RETAINED_LEN: usize = 16 * 1024;

/// Cuts a byte stream into messages.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::wire::{Deframer, Message, sync_event};
///
/// # fn main() -> Result<(), shmipc_glommio::WireError> {
/// let mut deframer = Deframer::new(1 << 20);
/// for byte in sync_event(3) {
///     assert!(deframer.next_message()?.is_none());
///     deframer.space(1)[0] = byte;
///     deframer.commit(1);
/// }
/// let (header, message) = deframer.next_message()?.unwrap();
/// assert_eq!((header.version, message), (3, Message::SyncEvent));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Deframer {
    max_message_len: u32,
    /// All of it initialised; received bytes not handed out yet are in `start..end`.
    block: Vec<u8>,
    start: usize,
    end: usize,
}

impl Deframer {
    /// A deframer that refuses messages of more than `max_message_len` bytes, header included.
    ///
    /// It holds no memory before [`space`](Self::space) is called.
    pub fn new(max_message_len: u32) -> Self {
        Self { max_message_len, block: Vec::new(), start: 0, end: 0 }
    }

    /// Memory to receive into: all that is there, at least `min` bytes, and never none.
    ///
    /// What it holds is unspecified. [`commit`](Self::commit) says how much of it was received.
    pub fn space(&mut self, min: usize) -> &mut [u8] {
        let buffered = self.buffered();
        let needed = buffered.saturating_add(min.max(1));
        let oversized = self.block.len() > RETAINED_LEN.max(needed.saturating_mul(4));
        if oversized || self.block.len() < needed || self.block.len() - self.start < needed {
            // Moving within the block pays only when more bytes have gone than must be moved.
            if !oversized && self.block.len() >= needed && self.start >= buffered {
                self.block.copy_within(self.start..self.end, 0);
            } else {
                self.replace_block(needed);
            }
            self.start = 0;
            self.end = buffered;
        }
        &mut self.block[self.end..]
    }

    /// Moves what is buffered to the front of a new block of at least `needed` bytes.
    fn replace_block(&mut self, needed: usize) {
        // Doubling keeps small steps cheap. It stops at the end of the message under way, so that
        // a large message fills its block, and can be handed out without a copy.
        let doubled = self.buffered().saturating_mul(2);
        let useful = match self.wanted() {
            0 => doubled,
            wanted => self.buffered().saturating_add(wanted),
        };
        let length = needed.max(RECEIVE_LEN).max(doubled.min(useful));
        let mut block = vec![0; length];
        block[..self.buffered()].copy_from_slice(&self.block[self.start..self.end]);
        self.block = block;
    }

    /// Says that `n` bytes were received into the front of the last [`space`](Self::space).
    ///
    /// More than that space holds counts as all of it.
    pub fn commit(&mut self, n: usize) {
        self.end = self.end.saturating_add(n).min(self.block.len());
    }

    /// The next message, or `None` when more bytes must come first.
    ///
    /// # Errors
    /// The bytes are no message, or one over the limit. The session is over then.
    pub fn next_message(&mut self) -> Result<Option<(Header, Message)>, WireError> {
        let Some(header) = self.header()? else {
            return Ok(None);
        };
        let length = header.length as usize;
        let buffered = self.block.get(self.start..self.end).unwrap_or_default();
        let Some(frame) = buffered.get(..length) else {
            return Ok(None);
        };
        let payload = frame.get(HEADER_LEN..).unwrap_or_default();
        // At least half of the block: worth giving the block away for it.
        let whole_block = length >= self.block.len().div_ceil(2);
        let message = if header.message == MessageType::FallbackData && whole_block {
            let (stream_id, status) = decode_fallback_fields(&header, payload)?;
            let data = self.give_block_away(length);
            Message::FallbackData { stream_id, status, data }
        } else {
            let message = Message::decode_control(&header, payload)?;
            self.start += length;
            message
        };
        if self.is_empty() {
            self.start = 0;
            self.end = 0;
            if self.block.len() > RETAINED_LEN {
                self.block = Vec::new();
            }
        }
        Ok(Some((header, message)))
    }

    /// Takes the data of the FallbackData message of `length` bytes out together with its block.
    ///
    /// What was received behind it moves to a block of its own: less than that message is long.
    fn give_block_away(&mut self, length: usize) -> Bytes {
        let frame_end = self.start + length;
        let behind = self.block[frame_end..self.end].to_vec();
        let mut block = mem::replace(&mut self.block, behind);
        block.truncate(frame_end);
        if self.start > length / 16 {
            block.drain(..self.start);
            self.start = 0;
        }
        // The reader may keep it for long.
        block.shrink_to_fit();
        let mut data = Bytes::from(block);
        data.advance(self.start + FALLBACK_HEADER_LEN);
        self.start = 0;
        self.end = self.block.len();
        data
    }

    /// How many bytes the data of a message keeps allocated at most, as long as any of it is kept.
    pub fn held_by(data_len: usize) -> usize {
        data_len + data_len / 8 + FALLBACK_HEADER_LEN
    }

    /// What a message with so many bytes of data costs until it is taken: what its data
    /// [keeps](Self::held_by), and what this side needs to keep it.
    pub fn cost_of(data_len: usize) -> usize {
        Self::held_by(data_len) + SOCKET_MESSAGE_COST
    }

    /// Gives all memory back if nothing is buffered: for a session that goes idle.
    pub fn shrink(&mut self) {
        if self.is_empty() {
            *self = Self::new(self.max_message_len);
        }
    }

    /// Whether nothing is buffered: the stream stands between two messages.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// How many received bytes have not been handed out as messages yet.
    pub fn buffered(&self) -> usize {
        self.end - self.start
    }

    /// How many bytes the message under way still lacks; 0 when that is unknown, because its
    /// header is not complete or is none.
    ///
    /// It is the peer's claim: to size a receive, see [`receive_hint`](Self::receive_hint).
    pub fn wanted(&self) -> usize {
        match self.header() {
            Ok(Some(header)) => (header.length as usize).saturating_sub(self.buffered()),
            Ok(None) | Err(_) => 0,
        }
    }

    /// A good number of bytes to ask [`space`](Self::space) for.
    ///
    /// For a large message it grows with what has arrived of it: a peer that announces 16 MiB has
    /// to send them before it has made anybody allocate them.
    pub fn receive_hint(&self) -> usize {
        match self.wanted() {
            0 => RECEIVE_LEN,
            wanted => wanted.min(self.buffered().saturating_mul(3).max(RECEIVE_LEN)),
        }
    }

    /// The header at the front, if all of it has arrived.
    fn header(&self) -> Result<Option<Header>, WireError> {
        let buffered = self.block.get(self.start..self.end).unwrap_or_default();
        let Some(bytes) = buffered.first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let header = Header::decode(bytes)?;
        if header.length > self.max_message_len {
            let (length, limit) = (header.length, self.max_message_len);
            return Err(WireError::TooLong { length, limit });
        }
        Ok(Some(header))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::message::tests::{any_message, version_of};
    use crate::wire::{fallback_header, sync_event};

    const LIMIT: u32 = 4 << 20;

    /// Receives all of `bytes`, as a driver with a socket full of them would in one go.
    fn receive(deframer: &mut Deframer, bytes: &[u8]) {
        deframer.space(bytes.len())[..bytes.len()].copy_from_slice(bytes);
        deframer.commit(bytes.len());
    }

    /// Receives `bytes` as a driver does, a hint at a time, and collects the messages.
    fn drive(deframer: &mut Deframer, mut bytes: &[u8]) -> Vec<Message> {
        let mut messages = Vec::new();
        while !bytes.is_empty() {
            let hint = deframer.receive_hint();
            let space = deframer.space(hint);
            assert!(space.len() >= hint);
            let n = hint.min(bytes.len());
            space[..n].copy_from_slice(&bytes[..n]);
            deframer.commit(n);
            bytes = &bytes[n..];
            while let Some((_, message)) = deframer.next_message().unwrap() {
                messages.push(message);
            }
        }
        messages
    }

    fn fallback(data: &[u8]) -> Vec<u8> {
        let mut bytes = fallback_header(3, 2, 0, data.len() as u32).to_vec();
        bytes.extend_from_slice(data);
        bytes
    }

    fn data(message: Message) -> Bytes {
        match message {
            Message::FallbackData { data, .. } => data,
            other => panic!("{other:?}"),
        }
    }

    /// Whether `data` lies in the deframer's block.
    fn inside(block: std::ops::Range<*const u8>, data: &[u8]) -> bool {
        block.contains(&data.as_ptr())
    }

    #[test]
    fn a_large_message_is_not_copied_and_its_block_is_given_away() {
        let mut deframer = Deframer::new(LIMIT);
        let bytes = fallback(&vec![7; 1 << 20]);
        receive(&mut deframer, &bytes);
        receive(&mut deframer, &sync_event(3));
        let block = deframer.block.as_ptr_range();
        let (_, message) = deframer.next_message().unwrap().unwrap();
        let data = data(message);
        assert_eq!(data, bytes[16..]);
        assert!(inside(block, &data));
        assert!(deframer.block.len() < RETAINED_LEN);
        assert_eq!(deframer.next_message().unwrap().unwrap().1, Message::SyncEvent);
        assert!(deframer.is_empty());
    }

    #[test]
    fn a_small_message_does_not_keep_a_large_block_alive() {
        let mut deframer = Deframer::new(LIMIT);
        deframer.space(1 << 20);
        receive(&mut deframer, &fallback(b"small"));
        // The space for a megabyte was too much for so little, and is gone again by now.
        assert!(deframer.block.len() <= RETAINED_LEN);
        let block = deframer.block.as_ptr_range();
        let (_, message) = deframer.next_message().unwrap().unwrap();
        let data = data(message);
        assert_eq!(data, &b"small"[..]);
        assert!(!inside(block, &data));
    }

    #[test]
    fn a_large_block_is_given_back_when_the_last_message_is_out() {
        let mut deframer = Deframer::new(LIMIT);
        let bytes = fallback(b"small").repeat(10_000);
        receive(&mut deframer, &bytes);
        assert!(deframer.block.len() >= bytes.len());
        let mut count = 0;
        while deframer.next_message().unwrap().is_some() {
            count += 1;
        }
        assert_eq!((count, deframer.block.len()), (10_000, 0));
    }

    #[test]
    fn a_large_block_is_given_back_though_a_message_is_under_way() {
        let mut deframer = Deframer::new(LIMIT);
        let mut bytes = fallback(b"small").repeat(10_000);
        bytes.extend_from_slice(&sync_event(3)[..3]);
        receive(&mut deframer, &bytes);
        while deframer.next_message().unwrap().is_some() {}
        assert_eq!(deframer.buffered(), 3);
        assert!(!deframer.is_empty());
        deframer.space(100);
        assert!(deframer.block.len() <= RETAINED_LEN);
        receive(&mut deframer, &sync_event(3)[3..]);
        assert_eq!(deframer.next_message().unwrap().unwrap().1, Message::SyncEvent);
    }

    #[test]
    fn an_idle_deframer_can_give_all_back_but_never_loses_bytes() {
        let mut deframer = Deframer::new(LIMIT);
        receive(&mut deframer, &sync_event(3)[..5]);
        deframer.shrink();
        receive(&mut deframer, &sync_event(3)[5..]);
        assert_eq!(deframer.next_message().unwrap().unwrap().1, Message::SyncEvent);
        assert_ne!(deframer.block.len(), 0);
        deframer.shrink();
        assert_eq!(deframer.block.capacity(), 0);
        assert_eq!(drive(&mut deframer, &sync_event(3)), [Message::SyncEvent]);
    }

    #[test]
    fn a_claim_of_a_large_message_allocates_nothing_large() {
        let mut deframer = Deframer::new(LIMIT);
        receive(&mut deframer, &fallback_header(3, 2, 0, LIMIT - 16));
        let mut arrived = 16;
        assert_eq!(deframer.next_message(), Ok(None));
        assert_eq!(deframer.wanted(), LIMIT as usize - 16);
        while deframer.wanted() > 0 {
            let hint = deframer.receive_hint();
            deframer.space(hint);
            assert!(deframer.block.len() <= 4 * arrived + RECEIVE_LEN);
            deframer.commit(hint);
            arrived += hint;
            assert_eq!(deframer.wanted(), LIMIT as usize - arrived);
        }
        // And it ended in a block of just its size.
        assert_eq!(deframer.block.len(), LIMIT as usize);
        let (_, message) = deframer.next_message().unwrap().unwrap();
        assert_eq!(data(message).len(), LIMIT as usize - 16);
        assert_eq!((deframer.wanted(), deframer.block.len()), (0, 0));
    }

    #[test]
    fn wanted_is_known_with_the_header() {
        let mut deframer = Deframer::new(LIMIT);
        let bytes = fallback(&[7; 100]);
        receive(&mut deframer, &bytes[..7]);
        assert_eq!(deframer.wanted(), 0);
        receive(&mut deframer, &bytes[7..50]);
        assert_eq!((deframer.wanted(), deframer.receive_hint()), (66, 66));
        receive(&mut deframer, &bytes[50..]);
        assert_eq!((deframer.wanted(), deframer.buffered()), (0, 116));
    }

    #[test]
    fn the_limit_counts_the_header_and_is_allowed_itself() {
        let bytes = fallback(&[7; 84]);
        let mut deframer = Deframer::new(100);
        assert_eq!(drive(&mut deframer, &bytes).len(), 1);
        let mut deframer = Deframer::new(99);
        receive(&mut deframer, &bytes[..8]);
        let error = WireError::TooLong { length: 100, limit: 99 };
        assert_eq!(deframer.next_message(), Err(error));
        assert_eq!(deframer.wanted(), 0);
    }

    #[test]
    fn an_error_stays() {
        let mut deframer = Deframer::new(LIMIT);
        receive(&mut deframer, &sync_event(3));
        receive(&mut deframer, b"GET / HTTP/1.1\r\n");
        receive(&mut deframer, &sync_event(3));
        assert_eq!(deframer.next_message().unwrap().unwrap().1, Message::SyncEvent);
        for _ in 0..3 {
            assert_eq!(deframer.next_message(), Err(WireError::Magic(0x2f20)));
        }
        // The same for a header that is fine with a payload that is not.
        let mut deframer = Deframer::new(LIMIT);
        receive(&mut deframer, b"\0\0\0\x0e\x77\x58\x03\0\0\0\0\x02/b");
        receive(&mut deframer, &sync_event(3));
        for _ in 0..3 {
            assert!(matches!(deframer.next_message(), Err(WireError::Path { .. })));
        }
    }

    #[test]
    fn committing_more_than_the_space_counts_as_all_of_it() {
        let mut deframer = Deframer::new(LIMIT);
        deframer.commit(10);
        assert!(deframer.is_empty());
        let space = deframer.space(10).len();
        deframer.commit(usize::MAX);
        assert_eq!(deframer.buffered(), space);
        assert!(!deframer.space(0).is_empty());
    }

    #[test]
    fn a_partial_message_moves_to_the_front_of_the_same_block() {
        let mut deframer = Deframer::new(LIMIT);
        // All different, so that what stood at the front before cannot pass for what moved there.
        let messages: Vec<_> =
            (0..10_000).map(|stream_id| Message::StreamClose { stream_id }).collect();
        let mut bytes = Vec::new();
        for message in &messages {
            message.encode(3, &mut bytes).unwrap();
        }
        let block = deframer.space(1).as_ptr();
        let mut got = Vec::new();
        // Odd pieces, so that a message is under way most of the time.
        for piece in bytes.chunks(1021) {
            receive(&mut deframer, piece);
            while let Some((_, message)) = deframer.next_message().unwrap() {
                got.push(message);
            }
            assert_eq!(deframer.block.as_ptr(), block);
        }
        assert_eq!(got, messages);
    }

    #[test]
    fn small_steps_grow_a_block_seldom_and_to_no_more_than_the_message() {
        let mut deframer = Deframer::new(LIMIT);
        let bytes = fallback(&vec![7; 1_000_000]);
        let mut blocks = vec![0];
        for piece in bytes.chunks(100) {
            receive(&mut deframer, piece);
            if blocks[blocks.len() - 1] != deframer.block.len() {
                blocks.push(deframer.block.len());
            }
        }
        // 4 KiB eight times doubled are 1 MiB.
        assert_eq!((blocks.len(), blocks[blocks.len() - 1]), (1 + 9, bytes.len()));
        let (_, message) = deframer.next_message().unwrap().unwrap();
        assert_eq!(data(message), bytes[16..]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn any_split_gives_the_same_messages(
            messages in prop::collection::vec((any_message(20_000), 2u8..=3), 0..12),
            pieces in prop::collection::vec(
                prop_oneof![Just(1usize), 1usize..16, 1usize..5000, 1usize..100_000], 1..60,
            ),
        ) {
            let mut bytes = Vec::new();
            let with_version = |(message, version): (Message, u8)| {
                let version = version_of(message.message_type(), version);
                (message, version)
            };
            let messages: Vec<_> = messages.into_iter().map(with_version).collect();
            for (message, version) in &messages {
                message.encode(*version, &mut bytes).unwrap();
            }
            let mut deframer = Deframer::new(LIMIT);
            let mut got = Vec::new();
            let mut rest = &bytes[..];
            for piece in pieces.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, later) = rest.split_at((*piece).min(rest.len()));
                rest = later;
                let needed = deframer.buffered() + piece.len();
                receive(&mut deframer, piece);
                while let Some((header, message)) = deframer.next_message().unwrap() {
                    prop_assert_eq!(header.message, message.message_type());
                    got.push((message, header.version));
                }
                prop_assert!(deframer.block.len() <= RETAINED_LEN.max(4 * needed));
            }
            prop_assert!(deframer.is_empty());
            prop_assert_eq!(got, messages);
        }

        #[test]
        fn byte_by_byte_gives_the_same_messages(
            messages in prop::collection::vec(any_message(600), 0..12),
        ) {
            let mut deframer = Deframer::new(LIMIT);
            let mut got = Vec::new();
            let mut bytes = Vec::new();
            for message in &messages {
                message.encode(version_of(message.message_type(), 3), &mut bytes).unwrap();
            }
            for byte in bytes {
                prop_assert_eq!(deframer.next_message(), Ok(None));
                deframer.space(1)[0] = byte;
                deframer.commit(1);
                if let Some((_, message)) = deframer.next_message().unwrap() {
                    got.push(message);
                }
            }
            prop_assert_eq!(got, messages);
        }

        #[test]
        fn garbage_is_an_error_or_waited_for(
            bytes in prop::collection::vec(any::<u8>(), 8..200),
            piece in 1usize..64,
        ) {
            prop_assume!(bytes[4..6] != [0x77, 0x58]);
            let mut deframer = Deframer::new(LIMIT);
            let mut arrived = 0;
            for piece in bytes.chunks(piece) {
                receive(&mut deframer, piece);
                arrived += piece.len();
                let expected = if arrived < 8 {
                    Ok(None)
                } else {
                    Err(WireError::Magic(u16::from_be_bytes([bytes[4], bytes[5]])))
                };
                prop_assert_eq!(deframer.next_message(), expected);
            }
        }

        /// Garbage that gets past the magic more often: real messages with a few bytes changed.
        #[test]
        fn scrambled_messages_cost_no_more_than_their_bytes(
            messages in prop::collection::vec(any_message(600), 1..8),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            piece in 1usize..3000,
        ) {
            let mut bytes = Vec::new();
            for message in &messages {
                message.encode(version_of(message.message_type(), 3), &mut bytes).unwrap();
            }
            for (index, byte) in changes {
                let at = index.index(bytes.len());
                bytes[at] = byte;
            }
            let mut deframer = Deframer::new(LIMIT);
            let mut taken = Vec::new();
            'all: for piece in bytes.chunks(piece) {
                receive(&mut deframer, piece);
                prop_assert!(deframer.block.len() <= 4 * bytes.len() + RECEIVE_LEN);
                loop {
                    match deframer.next_message() {
                        Ok(Some((header, message))) => {
                            message.encode(header.version, &mut taken).unwrap();
                        }
                        Ok(None) => break,
                        Err(_) => break 'all,
                    }
                }
            }
            // Whatever was understood is, byte for byte, what came; nothing was skipped.
            prop_assert!(bytes.starts_with(&taken));
        }
    }
}
