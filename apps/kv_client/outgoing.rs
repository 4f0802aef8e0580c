// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bytes that a pipeline has to write: copied when they are few, otherwise left where they are.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::ops::Range;

use smallvec::SmallVec;

use super::values::Values;

/// What is written with one write, part by part.
pub(crate) type Parts<'a> = SmallVec<[IoSlice<'a>; 9]>;

pub(crate) struct Outgoing {
    /// Up to this length a value is copied behind its command.
    max_copied: usize,
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
    /// Values of up to so many bytes are copied, so that they and their commands are one part.
    pub(crate) fn new(max_copied: usize) -> Self {
        Self { max_copied, bytes: Vec::new(), written: 0, values: VecDeque::new() }
    }

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
        if place.len() <= self.max_copied {
            self.bytes.extend_from_slice(values.bytes(place));
        } else {
            self.values.push_back(LongValue { behind: self.bytes.len(), place });
        }
    }

    /// What is to be written, part by part. None of them is empty.
    #[inline]
    pub(crate) fn parts<'a>(&'a self, values: &'a Values) -> Parts<'a> {
        let mut parts = Parts::new();
        let mut from = self.written;
        for value in &self.values {
            if value.behind > from {
                parts.push(IoSlice::new(&self.bytes[from..value.behind]));
                from = value.behind;
            }
            parts.push(IoSlice::new(values.bytes(value.place.clone())));
        }
        if self.bytes.len() > from {
            parts.push(IoSlice::new(&self.bytes[from..]));
        }
        parts
    }

    /// Notes that so many bytes of the [`parts`](Self::parts) were written.
    #[inline]
    pub(crate) fn advance(&mut self, mut count: usize) {
        while let Some(value) = self.values.front_mut() {
            let before = (value.behind - self.written).min(count);
            self.written += before;
            count -= before;
            let of_it = value.place.len().min(count);
            value.place.start += of_it;
            count -= of_it;
            if !value.place.is_empty() || self.written < value.behind {
                return;
            }
            self.values.pop_front();
        }
        self.written += count;
        if self.written == self.bytes.len() {
            self.bytes.clear();
            self.written = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However it is cut, and wherever values stand, what is written is what was put.
    #[test]
    fn it_comes_out_as_it_went_in() {
        let values = Values::new(1, 10);
        for max_copied in [9, 10] {
            for step in 1..70 {
                let mut outgoing = Outgoing::new(max_copied);
                let (mut expected, mut written) = (Vec::new(), Vec::new());
                for round in 0..3_u32 {
                    for key in 0..3 {
                        let place = values.place(round, key, 0);
                        let head: &[u8] = if key == 1 { b"" } else { b"head" };
                        outgoing.put(head);
                        outgoing.put_value(&values, place.clone());
                        outgoing.put(b".");
                        expected.extend_from_slice(&[head, values.bytes(place), b"."].concat());
                    }
                    while !outgoing.is_empty() {
                        let all: Vec<u8> =
                            outgoing.parts(&values).iter().flat_map(|part| part.to_vec()).collect();
                        assert!(outgoing.parts(&values).iter().all(|part| !part.is_empty()));
                        let count = step.min(all.len());
                        written.extend_from_slice(&all[..count]);
                        outgoing.advance(count);
                    }
                }
                assert_eq!(written, expected, "{step} at a time");
            }
        }
    }
}
