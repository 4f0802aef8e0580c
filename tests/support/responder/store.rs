// SPDX-License-Identifier: MIT OR Apache-2.0
//! GET, SET and INFO on a map, in RESP2, with one fault if one is asked for.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use nix::sys::resource::{UsageWho, getrusage};

/// What goes wrong, once, on every connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A byte of the answer is another one.
    Flip,
    /// The answer never comes.
    Drop,
    /// The answer comes twice.
    Repeat,
    /// The key is said to be unknown.
    Forget,
    /// The answer is an error.
    Refuse,
    /// The connection ends in the middle of the answer.
    Close,
    /// `INFO` is not known.
    NoInfo,
}

/// What all connections share.
#[derive(Default)]
pub(crate) struct Store {
    pub(crate) map: HashMap<Vec<u8>, Vec<u8>>,
    pub(crate) gets: u64,
    pub(crate) sets: u64,
}

pub(crate) type SharedStore = Arc<Mutex<Store>>;

/// One connection.
pub(crate) struct Answering {
    store: SharedStore,
    fault: Option<(Fault, u64)>,
    /// Whether a key may come here.
    is_mine: fn(&[u8]) -> bool,
    /// How many GET and SET came.
    count: u64,
    unread: Vec<u8>,
}

/// Whether the connection goes on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    GoOn,
    Close,
}

impl Answering {
    /// `fault` says what goes wrong, and at which request.
    pub(crate) fn new(
        store: SharedStore,
        fault: Option<(Fault, u64)>,
        is_mine: fn(&[u8]) -> bool,
    ) -> Self {
        Self { store, fault, is_mine, count: 0, unread: Vec::new() }
    }

    /// Answers the requests that are whole with these bytes.
    pub(crate) fn take(&mut self, bytes: &[u8], answers: &mut Vec<u8>) -> Next {
        self.unread.extend_from_slice(bytes);
        let unread = std::mem::take(&mut self.unread);
        let mut rest = &unread[..];
        while let Some((command, len)) = command(rest) {
            let command: Vec<&[u8]> = command.into_iter().map(|range| &rest[range]).collect();
            if self.answer(&command, answers) == Next::Close {
                return Next::Close;
            }
            rest = &rest[len..];
        }
        self.unread = rest.to_vec();
        Next::GoOn
    }

    fn answer(&mut self, command: &[&[u8]], answers: &mut Vec<u8>) -> Next {
        let start = answers.len();
        match command {
            [b"GET", key] => self.get(key, answers),
            [b"SET", key, value] => self.set(key, value, answers),
            [b"INFO", b"cpu"] if self.fault.is_none_or(|(fault, _)| fault != Fault::NoInfo) => {
                bulk(processor_times().as_bytes(), answers);
                return Next::GoOn;
            }
            _ => {
                answers.extend_from_slice(b"-ERR unknown command\r\n");
                return Next::GoOn;
            }
        }
        self.count += 1;
        match self.fault {
            Some((fault, at)) if at == self.count => self.spoil(fault, start, answers),
            _ => Next::GoOn,
        }
    }

    fn get(&self, key: &[u8], answers: &mut Vec<u8>) {
        let mut store = self.store.lock().unwrap();
        store.gets += 1;
        match store.map.get(key) {
            _ if !(self.is_mine)(key) => answers.extend_from_slice(b"-MOVED\r\n"),
            Some(value) => bulk(value, answers),
            None => answers.extend_from_slice(b"$-1\r\n"),
        }
    }

    fn set(&self, key: &[u8], value: &[u8], answers: &mut Vec<u8>) {
        if !(self.is_mine)(key) {
            return answers.extend_from_slice(b"-MOVED\r\n");
        }
        let mut store = self.store.lock().unwrap();
        store.sets += 1;
        match store.map.get_mut(key) {
            Some(old) => {
                old.clear();
                old.extend_from_slice(value);
            }
            None => _ = store.map.insert(key.to_vec(), value.to_vec()),
        }
        answers.extend_from_slice(b"+OK\r\n");
    }

    /// Does the wrong thing to the answer that begins at `start`.
    fn spoil(&mut self, fault: Fault, start: usize, answers: &mut Vec<u8>) -> Next {
        match fault {
            // The last byte of the value.
            Fault::Flip => {
                let at = answers.len() - 3;
                answers[at] ^= 0x10;
            }
            Fault::Drop => answers.truncate(start),
            Fault::Repeat => answers.extend_from_within(start..),
            Fault::Forget => answers.splice(start.., *b"$-1\r\n").for_each(drop),
            Fault::Refuse => answers.splice(start.., *b"-ERR out of order\r\n").for_each(drop),
            Fault::Close => {
                answers.truncate(start + 2);
                return Next::Close;
            }
            Fault::NoInfo => {}
        }
        Next::GoOn
    }
}

fn bulk(bytes: &[u8], answers: &mut Vec<u8>) {
    answers.extend_from_slice(format!("${}\r\n", bytes.len()).as_bytes());
    answers.extend_from_slice(bytes);
    answers.extend_from_slice(b"\r\n");
}

fn processor_times() -> String {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let seconds =
        |time: nix::sys::time::TimeVal| format!("{}.{:06}", time.tv_sec(), time.tv_usec());
    let (user, system) = (seconds(usage.user_time()), seconds(usage.system_time()));
    format!(
        "# CPU\r\nused_cpu_sys:{system}\r\nused_cpu_user:{user}\r\nused_cpu_user_children:9\r\n"
    )
}

/// The arguments of the first command, and where it ends. `None`: it is not whole.
fn command(bytes: &[u8]) -> Option<(Vec<Range<usize>>, usize)> {
    let (count, mut at) = number(bytes, 0, b'*')?;
    let mut arguments = Vec::new();
    for _ in 0..count {
        let (len, start) = number(bytes, at, b'$')?;
        at = start + len + 2;
        if bytes.len() < at {
            return None;
        }
        arguments.push(start..start + len);
    }
    Some((arguments, at))
}

/// The number of a line at `at`, and where the next line begins.
fn number(bytes: &[u8], at: usize, mark: u8) -> Option<(usize, usize)> {
    let line = bytes.get(at..)?;
    let end = line.windows(2).position(|pair| pair == b"\r\n")?;
    assert_eq!(line[0], mark, "{}", line[..end].escape_ascii());
    let digits = std::str::from_utf8(&line[1..end]).unwrap();
    Some((digits.parse().unwrap(), at + end + 2))
}
