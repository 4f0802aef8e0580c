// SPDX-License-Identifier: MIT OR Apache-2.0
//! What has come from a client and is not yet used up.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_lite::AsyncRead;

/// How much room a read has at least.
const ROOM: usize = 16 << 10;
/// The largest buffer that is kept for the next command.
const KEPT: usize = 4 << 20;

/// A buffer that bytes are read into at the end and used up at the start.
#[derive(Default)]
pub(crate) struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    pub(crate) fn unread(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(crate) fn consume(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
    }

    /// Reads what is there, or waits until something is. What is unread now will have
    /// `expected_len` bytes before it can be used. Zero is the end.
    pub(crate) async fn fill(
        &mut self,
        from: &mut (impl AsyncRead + Unpin),
        expected_len: usize,
    ) -> io::Result<usize> {
        poll_fn(|context| self.poll_fill(from, context, expected_len)).await
    }

    /// The same, for callers that wait for something else, too.
    pub(crate) fn poll_fill(
        &mut self,
        from: &mut (impl AsyncRead + Unpin),
        context: &mut Context<'_>,
        expected_len: usize,
    ) -> Poll<io::Result<usize>> {
        self.make_room(expected_len);
        let count = ready!(Pin::new(from).poll_read(context, &mut self.bytes[self.end..]))?;
        self.end += count;
        Poll::Ready(Ok(count))
    }

    fn make_room(&mut self, expected_len: usize) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if self.bytes.len() > KEPT && expected_len <= KEPT {
                self.bytes = Vec::new();
            }
        }
        let is_short = |input: &Self| {
            let len = input.bytes.len();
            len - input.end < ROOM || len - input.start < expected_len
        };
        if is_short(self) && self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        // Twice what has come, whatever has been announced: a client that only announces much gets
        // little.
        if self.bytes.len() - self.end < ROOM {
            self.bytes.resize((2 * self.end).max(2 * ROOM), 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_as_they_went_in() {
        let data: Vec<u8> = (0..300_000_u32).map(|at| (at / 7) as u8).collect();
        let mut from = &data[..];
        let mut input = Input::default();
        let mut out = Vec::new();
        futures_lite::future::block_on(async {
            let mut turn = 0;
            while input.fill(&mut from, 5000 * (turn % 20)).await.unwrap() > 0 {
                turn += 1;
                let count = input.unread().len() * 2 / 3;
                out.extend_from_slice(&input.unread()[..count]);
                input.consume(count);
            }
        });
        out.extend_from_slice(input.unread());
        assert_eq!(out, data);
    }

    #[test]
    fn a_large_buffer_is_given_back() {
        let data = vec![1; 9 << 20];
        let mut from = &data[..];
        let mut input = Input::default();
        futures_lite::future::block_on(async {
            while input.fill(&mut from, data.len()).await.unwrap() > 0 {}
            input.consume(data.len());
            input.fill(&mut from, 0).await.unwrap();
        });
        assert_eq!(input.bytes.len(), 2 * ROOM);
    }
}
