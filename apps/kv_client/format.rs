// SPDX-License-Identifier: MIT OR Apache-2.0
//! RESP2: how requests are written, and how their answers must read.
//!
//! What the right answer is, is known to the byte. So answers are not parsed but compared, piece by
//! piece as they come; only an answer that differs is looked at for what it says instead.

use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;

use super::failure::Failure;
use super::outgoing::Outgoing;
use super::values::Values;
use super::work::{Operation, Request};

/// A key is the number of its connection and its own, in hexadecimal digits, with a colon between.
const KEY_LEN: usize = 13;
const LINE_END: &[u8] = b"\r\n";
const WRITTEN: &[u8] = b"+OK\r\n";
/// How much of a wrong answer is shown.
const SHOWN: usize = 120;

pub(crate) fn key_name(connection: u32, key: u32) -> [u8; KEY_LEN] {
    let mut name = [b':'; KEY_LEN];
    name[..4].copy_from_slice(&digits::<4>(connection));
    name[5..].copy_from_slice(&digits::<8>(key));
    name
}

/// The last `N` hexadecimal digits of a number.
#[inline]
fn digits<const N: usize>(number: u32) -> [u8; N] {
    std::array::from_fn(|at| {
        let digit = (number >> (4 * (N - 1 - at))) as usize % 16;
        b"0123456789abcdef"[digit]
    })
}

/// How one connection writes and reads.
pub(crate) struct Format {
    connection: u32,
    values: Rc<Values>,
    /// A command up to its key, with the key of number 0.
    get: Vec<u8>,
    set: Vec<u8>,
    /// What stands between a key and its value.
    value_head: Vec<u8>,
}

impl Format {
    pub(crate) fn new(connection: u32, values: Rc<Values>) -> Self {
        let key = key_name(connection, 0);
        let name = String::from_utf8_lossy(&key);
        let command = |arguments: u32, verb: &str| {
            format!("*{arguments}\r\n$3\r\n{verb}\r\n${KEY_LEN}\r\n{name}").into_bytes()
        };
        Self {
            connection,
            get: command(2, "GET"),
            set: command(3, "SET"),
            value_head: format!("${}\r\n", values.len()).into_bytes(),
            values,
        }
    }

    pub(crate) fn values(&self) -> &Values {
        &self.values
    }

    /// Appends a request.
    #[inline]
    pub(crate) fn write(&self, request: &Request, to: &mut Outgoing) {
        let command = match request.operation {
            Operation::Get => &self.get,
            Operation::Set => &self.set,
        };
        let command = to.put(command);
        if let Some(key) = command.last_chunk_mut() {
            *key = digits::<8>(request.key);
        }
        to.put(LINE_END);
        if request.operation == Operation::Set {
            to.put(&self.value_head);
            to.put_value(&self.values, self.place(request));
            to.put(LINE_END);
        }
    }

    #[inline]
    fn place(&self, request: &Request) -> Range<usize> {
        self.values.place(self.connection, request.key, request.version)
    }

    /// The answer that a request must get.
    #[inline]
    fn answer(&self, request: &Request) -> [&[u8]; 3] {
        match request.operation {
            Operation::Set => [WRITTEN, b"", b""],
            Operation::Get => [&self.value_head, self.values.bytes(self.place(request)), LINE_END],
        }
    }

    /// Verifies bytes that came, for the requests that are outstanding on the same pipeline. Gives how
    /// many of these are answered now. `position` is how much of the next answer has come.
    #[inline]
    pub(crate) fn verify(
        &self,
        mut bytes: &[u8],
        outstanding: &VecDeque<Request>,
        position: &mut usize,
    ) -> Result<usize, Failure> {
        let mut answered = 0;
        while !bytes.is_empty() {
            let Some(request) = outstanding.get(answered) else {
                let connection = self.connection as usize;
                return Err(Failure::Unasked { connection, got: show(bytes) });
            };
            let mut start = 0;
            for piece in self.answer(request) {
                // To compare nothing is a call, too.
                if piece.is_empty() {
                    continue;
                }
                let done = position.saturating_sub(start).min(piece.len());
                let rest = &piece[done..];
                let count = rest.len().min(bytes.len());
                if rest[..count] != bytes[..count] {
                    return Err(self.explain(request, *position, bytes));
                }
                *position += count;
                bytes = &bytes[count..];
                start += piece.len();
            }
            if *position < start {
                break;
            }
            *position = 0;
            answered += 1;
        }
        Ok(answered)
    }

    /// What is wrong with an answer of which `position` bytes were right, and these follow.
    #[cold]
    fn explain(&self, request: &Request, position: usize, bytes: &[u8]) -> Failure {
        let [head, value, _] = self.answer(request);
        let right = self.answer(request).concat();
        let is_same = |(right, came): &(&u8, &u8)| right == came;
        let same = right[position..].iter().zip(bytes).take_while(is_same).count();
        let at = position + same;
        let name = self.name(request);
        if position == 0 && bytes.starts_with(b"-") {
            let line = bytes[1..].split(|&byte| byte == b'\r').next().unwrap_or_default();
            return Failure::Refused { request: name, text: lossy(line) };
        }
        let whole = match request.operation {
            Operation::Set => "+OK".to_owned(),
            Operation::Get => format!("{} bytes of version {}", value.len(), request.version),
        };
        let (expected, got) = if at < head.len() {
            (whole, show(&[&head[..position], bytes].concat()))
        } else if let Some(right) = value.get(at - head.len()) {
            let expected = format!("byte {} of {whole} to be {right:#04x}", at - head.len());
            (expected, format!("{:#04x}", bytes[same]))
        } else {
            (whole, format!("{} behind it", show(&bytes[same..])))
        };
        Failure::Wrong { request: name, expected, got }
    }

    fn name(&self, request: &Request) -> String {
        let verb = match request.operation {
            Operation::Get => "GET",
            Operation::Set => "SET",
        };
        format!("{verb} {}", lossy(&key_name(self.connection, request.key)))
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN)]).into_owned()
}

fn show(bytes: &[u8]) -> String {
    format!("\"{}\"", bytes[..bytes.len().min(SHOWN)].escape_ascii())
}

/// Asks for what a server says about its processor time.
pub(crate) const INFO_CPU: &[u8] = b"*2\r\n$4\r\nINFO\r\n$3\r\ncpu\r\n";
/// The longest answer to it that makes sense.
const MAX_INFO: usize = 1 << 20;

/// The text of an answer to [`INFO_CPU`]. `None`: it is not whole yet. An answer that is no text,
/// of a server that does not know the command, gives an empty one.
pub(crate) fn info_text(answer: &[u8]) -> Option<String> {
    let end = answer.windows(2).position(|pair| pair == LINE_END)?;
    let line = String::from_utf8_lossy(&answer[..end]);
    let len = line.strip_prefix('$').and_then(|len| len.parse::<usize>().ok());
    let Some(len) = len.filter(|&len| len <= MAX_INFO) else {
        return Some(String::new());
    };
    let text = answer.get(end + 2..end + 2 + len)?;
    answer.get(end + 2 + len..end + 4 + len)?;
    Some(String::from_utf8_lossy(text).into_owned())
}
