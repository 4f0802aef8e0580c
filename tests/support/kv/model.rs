// SPDX-License-Identifier: MIT OR Apache-2.0
//! A store that is too simple to be wrong, and commands to compare with it.

use std::collections::BTreeMap;

use super::client::{Reply, encode};
use super::random::Random;

/// Starts from `SHMIPC_SEED`, or from the clock, and says so.
pub(crate) fn random() -> Random {
    let given = std::env::var("SHMIPC_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| {
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
        now.as_nanos() as u64
    });
    eprintln!("SHMIPC_SEED={seed}");
    Random::new(seed)
}

/// Bytes that are quickly made, and not all alike.
fn bytes(random: &mut Random, len: usize) -> Vec<u8> {
    let mut bytes = vec![random.next() as u8; len];
    bytes.chunks_mut(61).for_each(|chunk| chunk[0] = random.next() as u8);
    bytes
}

/// Cuts bytes into pieces of random lengths.
pub(crate) fn cut(random: &mut Random, bytes: &[u8], longest: usize) -> Vec<Vec<u8>> {
    let mut pieces = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let len = random.between(1, longest).min(rest.len());
        pieces.push(rest[..len].to_vec());
        rest = &rest[len..];
    }
    pieces
}

type Words = Vec<Vec<u8>>;

/// What a store has to say to the commands that [`pipeline`] makes.
#[derive(Default)]
pub(crate) struct Model(BTreeMap<Vec<u8>, Vec<u8>>);

impl Model {
    fn get(&self, key: &[u8]) -> Reply {
        Reply::Bulk(self.0.get(key).cloned())
    }

    fn answer(&mut self, words: &Words) -> Reply {
        let ok = Reply::Status("OK".into());
        let count = |count: usize| Reply::Integer(count as i64);
        match &words[0][..] {
            b"GET" => self.get(&words[1]),
            b"SET" => {
                self.0.insert(words[1].clone(), words[2].clone());
                ok
            }
            b"MSET" => {
                for pair in words[1..].chunks(2) {
                    self.0.insert(pair[0].clone(), pair[1].clone());
                }
                ok
            }
            b"MGET" => Reply::Array(words[1..].iter().map(|key| self.get(key)).collect()),
            b"DEL" => count(words[1..].iter().filter(|key| self.0.remove(*key).is_some()).count()),
            b"EXISTS" => count(words[1..].iter().filter(|key| self.0.contains_key(*key)).count()),
            b"DBSIZE" => count(self.0.len()),
            b"FLUSHALL" => {
                self.0.clear();
                ok
            }
            b"INCR" => {
                let value = self.0.entry(words[1].clone()).or_insert_with(|| b"0".to_vec());
                let number = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                match number.filter(|number: &i64| number.to_string().as_bytes() == value) {
                    Some(number) => {
                        *value = (number + 1).to_string().into_bytes();
                        Reply::Integer(number + 1)
                    }
                    None => {
                        let text = "ERR value is not an integer or out of range";
                        Reply::Error(text.into())
                    }
                }
            }
            b"ECHO" => Reply::Bulk(Some(words[1].clone())),
            b"GET2" => {
                Reply::Error("ERR unknown command 'GET2', with args beginning with: ".into())
            }
            other => panic!("no model of {}", other.escape_ascii()),
        }
    }
}

fn command(random: &mut Random, prefix: &str, largest: usize) -> Words {
    let key = |random: &mut Random| format!("{prefix}{}", random.below(40)).into_bytes();
    let value = |random: &mut Random| {
        let bound = random.pick(&[8, 8, 100, 100, 1000, largest]);
        let len = random.between(0, bound);
        bytes(random, len)
    };
    let name = random.pick(&["GET", "SET", "MSET", "MGET", "DEL", "EXISTS", "INCR", "ECHO"]);
    let mut words = vec![name.as_bytes().to_vec()];
    match name {
        "GET" | "INCR" => words.push(key(random)),
        "SET" => words.extend([key(random), value(random)]),
        "ECHO" => words.push(value(random)),
        "MSET" => {
            for _ in 0..=random.below(8) {
                words.extend([key(random), value(random)]);
            }
        }
        _ => words.extend((0..=random.below(12)).map(|_| key(random)).collect::<Vec<_>>()),
    }
    words
}

/// So many commands, and what they must be answered, when nobody else is there.
pub(crate) fn pipeline(
    random: &mut Random,
    model: &mut Model,
    prefix: &str,
    count: usize,
    largest: usize,
) -> (Vec<u8>, Vec<Reply>) {
    answered(model, count, || match random.below(100) {
        0 => vec![b"DBSIZE".to_vec()],
        1 => vec![b"FLUSHALL".to_vec()],
        2 => vec![b"GET2".to_vec()],
        _ => command(random, prefix, largest),
    })
}

/// So many commands, and what they must be answered, when others have keys of other prefixes.
pub(crate) fn undisturbed_pipeline(
    random: &mut Random,
    model: &mut Model,
    prefix: &str,
    count: usize,
    largest: usize,
) -> (Vec<u8>, Vec<Reply>) {
    answered(model, count, || command(random, prefix, largest))
}

fn answered(
    model: &mut Model,
    count: usize,
    mut command: impl FnMut() -> Words,
) -> (Vec<u8>, Vec<Reply>) {
    let (mut bytes, mut replies) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let words = command();
        bytes.extend(encode(&words));
        replies.push(model.answer(&words));
    }
    (bytes, replies)
}

/// Stops the test at the first reply that is not as it must be.
pub(crate) fn compare(got: &[Reply], expected: &[Reply]) {
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        if got != expected {
            let (got, expected) = (format!("{got:?}"), format!("{expected:?}"));
            let short = |text: &str| text.chars().take(200).collect::<String>();
            panic!("reply {index}: {} instead of {}", short(&got), short(&expected));
        }
    }
    assert_eq!(got.len(), expected.len());
}
