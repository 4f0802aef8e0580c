// SPDX-License-Identifier: MIT OR Apache-2.0
//! What bytes must be, and which of them are on their way in one direction of a stream.
//!
//! A byte is a function of a key (stream and direction) and a position, so nothing but pieces of
//! (key, position, length) has to be kept. A forwarded message keeps the pieces that it had.

use std::collections::VecDeque;

use super::random::mix;

#[derive(Clone, Copy)]
struct Piece {
    key: u64,
    from: u64,
    len: usize,
}

impl Piece {
    fn render(self, to: &mut [u8]) {
        let mut word = [0; 8];
        for (index, byte) in to.iter_mut().enumerate() {
            let at = self.from + index as u64;
            if index == 0 || at.is_multiple_of(8) {
                word = mix(self.key.wrapping_add(at / 8)).to_le_bytes();
            }
            *byte = word[(at % 8) as usize];
        }
    }
}

/// What some bytes in a row must be.
#[derive(Clone, Default)]
pub(crate) struct Expected {
    pieces: VecDeque<Piece>,
    len: usize,
}

impl Expected {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn push(&mut self, piece: Piece) {
        self.len += piece.len;
        self.pieces.push_back(piece);
    }

    fn append(&mut self, other: Self) {
        other.pieces.into_iter().for_each(|piece| self.push(piece));
    }

    /// Takes the first bytes off. There are as many.
    pub(crate) fn split_front(&mut self, count: usize) -> Self {
        let mut front = Self::default();
        while front.len < count {
            let piece = self.pieces.front_mut().expect("as many bytes as were asked for");
            let len = piece.len.min(count - front.len);
            front.push(Piece { len, ..*piece });
            piece.from += len as u64;
            piece.len -= len;
            self.len -= len;
            if piece.len == 0 {
                self.pieces.pop_front();
            }
        }
        front
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        let mut at = 0;
        for piece in &self.pieces {
            piece.render(&mut bytes[at..at + piece.len]);
            at += piece.len;
        }
        bytes
    }

    /// Compares all of it with what came.
    pub(crate) fn check(&self, got: &[u8]) -> Result<(), String> {
        let expected = self.bytes();
        if got == expected {
            return Ok(());
        }
        let wrong = got.iter().zip(&expected).position(|(a, b)| a != b);
        let (got, len) = (got.len(), self.len);
        Err(format!("{got} bytes came, {len} were due, the first that is wrong: {wrong:?}"))
    }
}

/// One direction of a stream: what was sent and is not read.
///
/// What a writer tries to send is put down before, and confirmed or withdrawn after: a reader on
/// another processor can be faster than the writer's return.
pub(crate) struct Lane {
    key: u64,
    next: u64,
    flushes: VecDeque<Expected>,
    attempt: Option<Attempt>,
}

struct Attempt {
    rest: Expected,
    /// How much of it was read already.
    taken: usize,
    /// Where it ended, when a reader has seen it as a whole.
    end: Option<usize>,
}

impl Lane {
    pub(crate) fn new(key: u64) -> Self {
        Self { key: mix(key), next: 0, flushes: VecDeque::new(), attempt: None }
    }

    /// New bytes for this direction. Those of an attempt that failed never come again, so that
    /// they are known when they arrive all the same.
    pub(crate) fn draft(&mut self, len: usize) -> Expected {
        let mut draft = Expected::default();
        draft.push(Piece { key: self.key, from: self.next, len });
        self.next += len as u64;
        draft
    }

    pub(crate) fn begin(&mut self, content: Expected) {
        assert!(self.attempt.is_none(), "one writer at a time");
        self.attempt = Some(Attempt { rest: content, taken: 0, end: None });
    }

    /// The first `count` bytes of the attempt were sent, as one flush.
    pub(crate) fn commit(&mut self, count: usize) -> Result<(), String> {
        let Attempt { mut rest, taken, end } = self.attempt.take().expect("an attempt");
        if count < taken || end.is_some_and(|end| end != count) {
            return Err(format!("{count} bytes were sent, {taken} of them came, ended at {end:?}"));
        }
        let rest = rest.split_front(count - taken);
        if !rest.is_empty() {
            self.flushes.push_back(rest);
        }
        Ok(())
    }

    /// Nothing was sent.
    pub(crate) fn withdraw(&mut self) -> Result<(), String> {
        match self.attempt.take() {
            Some(Attempt { taken: 1.., .. }) => Err("what was not sent has come".into()),
            _ => Ok(()),
        }
    }

    /// A reader got bytes, of any number of flushes.
    pub(crate) fn take(&mut self, mut count: usize) -> Result<Expected, String> {
        let mut all = Expected::default();
        while count > 0 {
            let Some(flush) = self.flushes.front_mut() else {
                all.append(self.take_attempt(count)?);
                break;
            };
            let part = flush.split_front(count.min(flush.len()));
            count -= part.len();
            all.append(part);
            if flush.is_empty() {
                self.flushes.pop_front();
            }
        }
        Ok(all)
    }

    /// A reader got the rest of a flush, which must be all of it.
    pub(crate) fn take_flush(&mut self, len: usize) -> Result<Expected, String> {
        if let Some(flush) = self.flushes.pop_front() {
            let due = flush.len();
            return if due == len {
                Ok(flush)
            } else {
                Err(format!("a flush that has {due} bytes left came with {len}"))
            };
        }
        let part = self.take_attempt(len)?;
        let attempt = self.attempt.as_mut().expect("it was read from");
        attempt.end = Some(attempt.taken);
        Ok(part)
    }

    fn take_attempt(&mut self, count: usize) -> Result<Expected, String> {
        match &mut self.attempt {
            Some(attempt) if attempt.end.is_none() && attempt.rest.len() >= count => {
                attempt.taken += count;
                Ok(attempt.rest.split_front(count))
            }
            _ => Err(format!("{count} bytes came that were not sent")),
        }
    }

    /// How many bytes can be on their way.
    pub(crate) fn at_most(&self) -> usize {
        let attempted = self.attempt.as_ref().map_or(0, |attempt| attempt.rest.len());
        self.flushes.iter().map(Expected::len).sum::<usize>() + attempted
    }
}
