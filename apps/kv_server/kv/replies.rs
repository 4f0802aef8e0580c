// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the replies to a client are collected until they are sent.
//!
//! Over shared memory the bytes of a value are copied once, from where the store has them into the
//! slices of the message: until then the replies only refer to them. A socket takes one buffer at a
//! time, so for a socket everything is copied together first.

use std::io::IoSlice;

use smallvec::SmallVec;

use super::store::Value;

/// A value this long is referred to. To copy a shorter one costs no more than that.
const REFERRED_FROM: usize = 512;

/// What is sent with one write, part by part.
pub(crate) type Parts<'a> = SmallVec<[IoSlice<'a>; 9]>;

/// The version of the protocol of Redis that a client is spoken to in.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    #[default]
    Resp2,
    /// With types of its own for nothing, maps and texts.
    Resp3,
}

/// Replies, one behind the other.
#[derive(Debug, Default)]
pub(crate) struct Replies {
    /// How those that are put in from now on are written.
    pub(crate) protocol: Protocol,
    bytes: Vec<u8>,
    /// The values that are not among the bytes, first to last.
    values: Vec<Referred>,
    /// The length of all these together.
    values_len: usize,
    may_refer: bool,
}

#[derive(Debug)]
struct Referred {
    /// How many of the bytes come before it.
    behind: usize,
    value: Value,
}

impl Replies {
    /// All of them in one buffer.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Long values stay where they are.
    pub(crate) fn referring() -> Self {
        Self { may_refer: true, ..Self::default() }
    }

    /// How many bytes they are altogether.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() + self.values_len
    }

    pub(crate) fn push(&mut self, byte: u8) {
        self.bytes.push(byte);
    }

    pub(crate) fn extend_from_slice(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Appends a value.
    pub(crate) fn put_value(&mut self, value: &Value) {
        if self.may_refer && value.len() >= REFERRED_FROM {
            self.values_len += value.len();
            self.values.push(Referred { behind: self.bytes.len(), value: Value::clone(value) });
        } else {
            self.bytes.extend_from_slice(value);
        }
    }

    /// Appends so many bytes, to be written over.
    pub(crate) fn grow(&mut self, len: usize) -> &mut [u8] {
        let start = self.bytes.len();
        self.bytes.resize(start + len, 0);
        &mut self.bytes[start..]
    }

    /// Forgets all but so many bytes.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.flatten();
        self.bytes.truncate(len);
    }

    /// Copies everything together, for [`bytes`](Self::bytes).
    pub(crate) fn flatten(&mut self) {
        if self.values.is_empty() {
            return;
        }
        let mut bytes = Vec::with_capacity(self.len());
        self.parts().iter().for_each(|part| bytes.extend_from_slice(part));
        self.bytes = bytes;
        self.values.clear();
        self.values_len = 0;
    }

    /// All of them. Nothing must have been put in since they were [copied](Self::flatten), unless
    /// values do not stay where they are.
    pub(crate) fn bytes(&self) -> &[u8] {
        debug_assert!(self.values.is_empty());
        &self.bytes
    }

    /// All of them, part by part.
    pub(crate) fn parts(&self) -> Parts<'_> {
        let mut parts = Parts::with_capacity(2 * self.values.len() + 1);
        let mut from = 0;
        for Referred { behind, value } in &self.values {
            parts.push(IoSlice::new(&self.bytes[from..*behind]));
            parts.push(IoSlice::new(value));
            from = *behind;
        }
        parts.push(IoSlice::new(&self.bytes[from..]));
        parts
    }

    /// Forgets all of them, and keeps memory for so many bytes.
    pub(crate) fn clear(&mut self, kept: usize) {
        self.bytes.clear();
        self.bytes.shrink_to(kept);
        self.values.clear();
        self.values_len = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(len: usize) -> Value {
        (0..len).map(|at| at as u8).collect()
    }

    fn collect(replies: &Replies) -> Vec<u8> {
        replies.parts().iter().flat_map(|part| part.to_vec()).collect()
    }

    #[test]
    fn they_are_the_same_whether_values_are_copied_or_referred_to() {
        let long = value(5000);
        for may_refer in [false, true] {
            let mut replies = Replies { may_refer, ..Replies::new() };
            let mut expected = Vec::new();
            for text in [&b""[..], b"one", b"", b"two"] {
                replies.extend_from_slice(text);
                replies.put_value(&long);
                replies.put_value(&value(3));
                replies.push(b'!');
                expected.extend_from_slice(&[text, &long, &value(3), b"!"].concat());
                assert_eq!(replies.len(), expected.len());
                assert_eq!(collect(&replies), expected);
            }
            assert_eq!(replies.parts().len(), if may_refer { 9 } else { 1 });
            replies.flatten();
            assert_eq!(replies.bytes(), expected);
            replies.put_value(&long);
            replies.truncate(expected.len() + 7);
            assert_eq!(replies.bytes(), [&expected[..], &long[..7]].concat());
            replies.clear(0);
            assert_eq!((replies.len(), collect(&replies).len()), (0, 0));
        }
    }

    #[test]
    fn nothing_refers_to_a_value_any_longer_than_needed() {
        let long = value(REFERRED_FROM);
        let mut replies = Replies::referring();
        replies.put_value(&long);
        assert_eq!(std::rc::Rc::strong_count(&long), 2);
        replies.clear(1 << 20);
        assert_eq!(std::rc::Rc::strong_count(&long), 1);
    }
}
