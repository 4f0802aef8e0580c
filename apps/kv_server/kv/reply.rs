// SPDX-License-Identifier: MIT OR Apache-2.0
//! Replies, as they are written.

use std::fmt::{self, Write};

pub(crate) use super::replies::{Protocol, Replies};
use super::store::Value;

pub(crate) const OK: &[u8] = b"+OK\r\n";
pub(crate) const EMPTY_ARRAY: &[u8] = b"*0\r\n";

/// An error, whose text starts with its kind: `ERR syntax error`.
pub(crate) fn error(replies: &mut Replies, text: fmt::Arguments<'_>) {
    replies.push(b'-');
    // A line end inside would be the start of another reply.
    let mut line = OneLine(replies);
    // Writing to memory does not fail.
    let _ = line.write_fmt(text);
    replies.extend_from_slice(b"\r\n");
}

pub(crate) fn integer(replies: &mut Replies, value: i64) {
    header(replies, b':', value);
}

pub(crate) fn bulk(replies: &mut Replies, bytes: &[u8]) {
    header(replies, b'$', bytes.len() as i64);
    replies.extend_from_slice(bytes);
    replies.extend_from_slice(b"\r\n");
}

/// Nothing: a key is not there.
pub(crate) fn null(replies: &mut Replies) {
    replies.extend_from_slice(match replies.protocol {
        Protocol::Resp2 => b"$-1\r\n",
        Protocol::Resp3 => b"_\r\n",
    });
}

/// So many pairs follow. Without a type for them they are an array.
pub(crate) fn map(replies: &mut Replies, len: usize) {
    match replies.protocol {
        Protocol::Resp2 => array(replies, 2 * len),
        Protocol::Resp3 => header(replies, b'%', len as i64),
    }
}

/// A text for people.
pub(crate) fn verbatim(replies: &mut Replies, text: &[u8]) {
    match replies.protocol {
        Protocol::Resp2 => bulk(replies, text),
        Protocol::Resp3 => {
            let kind = b"txt:";
            header(replies, b'=', (kind.len() + text.len()) as i64);
            replies.extend_from_slice(kind);
            replies.extend_from_slice(text);
            replies.extend_from_slice(b"\r\n");
        }
    }
}

/// A value of the store's.
pub(crate) fn value(replies: &mut Replies, value: &Value) {
    header(replies, b'$', value.len() as i64);
    replies.put_value(value);
    replies.extend_from_slice(b"\r\n");
}

pub(crate) fn array(replies: &mut Replies, len: usize) {
    header(replies, b'*', len as i64);
}

/// A letter, a number and a line end.
fn header(replies: &mut Replies, letter: u8, value: i64) {
    replies.push(letter);
    digits(value, |digits| replies.extend_from_slice(digits));
    replies.extend_from_slice(b"\r\n");
}

/// Writes a number as it is stored and sent.
pub(crate) fn digits<T>(value: i64, write: impl FnOnce(&[u8]) -> T) -> T {
    let mut digits = [0; 20];
    let mut at = digits.len();
    let mut rest = value.unsigned_abs();
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    if value < 0 {
        at -= 1;
        digits[at] = b'-';
    }
    write(&digits[at..])
}

struct OneLine<'a>(&'a mut Replies);

impl Write for OneLine<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let one_line = text.bytes().map(|byte| if byte.is_ascii_control() { b' ' } else { byte });
        one_line.for_each(|byte| self.0.push(byte));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_type_in_version_3_has_it_there_only() {
        let written = |protocol| {
            let mut replies = Replies::new();
            replies.protocol = protocol;
            null(&mut replies);
            map(&mut replies, 2);
            verbatim(&mut replies, b"a b");
            bulk(&mut replies, b"c");
            replies.bytes().to_vec()
        };
        assert_eq!(written(Protocol::Resp2), b"$-1\r\n*4\r\n$3\r\na b\r\n$1\r\nc\r\n");
        assert_eq!(written(Protocol::Resp3), b"_\r\n%2\r\n=7\r\ntxt:a b\r\n$1\r\nc\r\n");
    }

    #[test]
    fn replies_look_as_the_protocol_has_them() {
        let mut replies = Replies::new();
        integer(&mut replies, i64::MIN);
        integer(&mut replies, 0);
        integer(&mut replies, i64::MAX);
        bulk(&mut replies, b"a\r\n");
        array(&mut replies, 10);
        error(&mut replies, format_args!("ERR {}", "two\r\nlines"));
        let expected = ":-9223372036854775808\r\n:0\r\n:9223372036854775807\r\n$3\r\na\r\n\r\n\
            *10\r\n-ERR two  lines\r\n";
        assert_eq!(replies.bytes(), expected.as_bytes());
    }
}
