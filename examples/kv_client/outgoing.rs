// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bytes that a lane has to write: copied when they are few, otherwise left where they are.

use std::collections::VecDeque;
use std::ops::Range;

use super::values::Values;

/// Up to this length a value is copied behind its command, so that both are one write.
const COPIED_AT_MOST: usize = 16 << 10;

#[derive(Default)]
pub(crate) struct Outgoing {
    /// Commands, and short values.
    bytes: Vec<u8>,
    written: usize,
    /// Long values, first to last.
    values: VecDeque<LongValue>,
}

struct LongValue {
    /// How many of [`Outgoing::bytes`] come before it.
    behind: usize,
    /// What of it is not yet written.
    place: Range<usize>,
}

impl Outgoing {
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Appends bytes, and gives them to be changed.
    #[inline]
    pub(crate) fn put(&mut self, bytes: &[u8]) -> &mut [u8] {
        let at = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        &mut self.bytes[at..]
    }

    /// Appends a value. Something must be put behind it.
    #[inline]
    pub(crate) fn put_value(&mut self, values: &Values, place: Range<usize>) {
        if place.len() <= COPIED_AT_MOST {
            self.bytes.extend_from_slice(values.bytes(place));
        } else {
            self.values.push_back(LongValue { behind: self.bytes.len(), place });
        }
    }

    /// What to write next.
    #[inline]
    pub(crate) fn next<'a>(&'a self, values: &'a Values) -> &'a [u8] {
        match self.values.front() {
            None => &self.bytes[self.written..],
            Some(value) if value.behind == self.written => values.bytes(value.place.clone()),
            Some(value) => &self.bytes[self.written..value.behind],
        }
    }

    /// Notes that so much of [`next`](Self::next) was written.
    #[inline]
    pub(crate) fn advance(&mut self, count: usize) {
        match self.values.front_mut() {
            Some(value) if value.behind == self.written => {
                value.place.start += count;
                if value.place.is_empty() {
                    self.values.pop_front();
                }
            }
            _ => self.written += count,
        }
        if self.written == self.bytes.len() {
            self.bytes.clear();
            self.written = 0;
        }
    }
}
