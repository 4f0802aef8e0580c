// SPDX-License-Identifier: MIT OR Apache-2.0
//! The crate `redis` as a client.

use std::thread;

use redis::{Client, Cmd, Connection, Value};

/// How many connections load the server at the same time, and with how many commands at a time.
const CONNECTIONS: usize = 8;
const DEPTH: usize = 16;
const ROUNDS: usize = 60;

pub(crate) fn connect(url: &str) -> Connection {
    Client::open(url).and_then(|client| client.get_connection()).unwrap()
}

fn command(words: &[&str]) -> Cmd {
    let mut command = redis::cmd(words[0]);
    for word in &words[1..] {
        command.arg(*word);
    }
    command
}

/// Sends one command on a connection of its own. Gives the answer as `redis-cli` prints it.
pub(crate) fn ask(url: &str, words: &[&str]) -> String {
    match command(words).query(&mut connect(url)) {
        Ok(value) => show(&value) + "\n",
        Err(error) => {
            let (code, text) = (error.code(), error.detail());
            format!("{} {}\n\n", code.unwrap_or("no code"), text.unwrap_or_default())
        }
    }
}

fn show(value: &Value) -> String {
    match value {
        Value::Nil => String::new(),
        Value::Okay => "OK".into(),
        Value::Int(number) => number.to_string(),
        Value::SimpleString(text) => text.clone(),
        Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        Value::VerbatimString { text, .. } => text.clone(),
        Value::Array(values) => values.iter().map(show).collect::<Vec<_>>().join("\n"),
        Value::Map(pairs) => {
            let line = |(name, value): &(Value, Value)| format!("{}\n{}", show(name), show(value));
            pairs.iter().map(line).collect::<Vec<_>>().join("\n")
        }
        other => panic!("not known to redis-cli: {other:?}"),
    }
}

/// Loads the server from several connections, with small values and large ones, and checks every
/// answer.
pub(crate) fn load(url: &str) {
    ask(url, &["flushall"]);
    thread::scope(|scope| {
        for number in 0..CONNECTIONS {
            scope.spawn(move || small(url, number));
        }
        scope.spawn(|| large(url));
    });
}

fn small(url: &str, number: usize) {
    let mut connection = connect(url);
    for round in 0..ROUNDS {
        let mut pipeline = redis::pipe();
        let mut expected = Vec::new();
        for at in 0..DEPTH {
            let key = format!("load:{number}:{at}");
            let value = format!("{round}:{key:>60}");
            pipeline.set(&key, &value).get(&key).cmd("PING");
            pipeline.incr(format!("count:{number}"), 1);
            pipeline.mset(&[("load:a", "1"), ("load:b", "2"), ("load:c", "3")]);
            let got = Value::BulkString(value.into_bytes());
            let count = Value::Int((round * DEPTH + at + 1) as i64);
            let pong = Value::SimpleString("PONG".into());
            expected.extend([Value::Okay, got, pong, count, Value::Okay]);
        }
        let answers: Vec<Value> = pipeline.query(&mut connection).unwrap();
        assert!(answers == expected, "connection {number}, round {round}: {answers:?}");
    }
}

fn large(url: &str) {
    let mut connection = connect(url);
    for round in 0..6 {
        let mut pipeline = redis::pipe();
        let mut expected = Vec::new();
        for at in 0..8_u8 {
            let value = vec![at ^ round; 1 << 20];
            pipeline.set(format!("large:{at}"), &value).get(format!("large:{at}"));
            expected.extend([Value::Okay, Value::BulkString(value)]);
        }
        let answers: Vec<Value> = pipeline.query(&mut connection).unwrap();
        assert!(answers == expected, "round {round}");
    }
}
