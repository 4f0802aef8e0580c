// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which commands there are, how many arguments they take, and where their keys stand.

use super::reply::{self, Replies};
use super::resp::Request;

/// A command that is understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    Auth,
    Client,
    Describe,
    Config,
    CrossProtocol,
    DbSize,
    Debug,
    Decr,
    DecrBy,
    Del,
    Echo,
    Exists,
    Expire,
    FlushAll,
    Get,
    Hello,
    Incr,
    IncrBy,
    Info,
    MGet,
    MSet,
    PExpire,
    PTtl,
    Persist,
    Ping,
    Quit,
    Scan,
    Select,
    Set,
    SetEx,
    Shard,
    Ttl,
}

/// What of a command says which shards it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Nothing: it is answered where it comes in.
    Connection,
    /// The argument with this number, if it is there.
    Key(usize),
    /// All arguments.
    Keys,
    /// Every other argument.
    Pairs,
    /// The cursor, which is the first argument.
    Cursor,
    /// It is for every shard.
    Every,
}

/// What is known of a command before it is executed.
#[derive(Debug)]
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    pub(crate) command: Command,
    pub(crate) scope: Scope,
    /// How many arguments it has at least and at most, its name among them.
    least: usize,
    most: usize,
}

const MANY: usize = usize::MAX;

/// Sorted by name.
static SPECS: &[Spec] = &[
    spec("auth", Command::Auth, Scope::Connection, 2, 3),
    spec("client", Command::Client, Scope::Connection, 2, MANY),
    spec("command", Command::Describe, Scope::Connection, 1, MANY),
    spec("config", Command::Config, Scope::Connection, 2, MANY),
    spec("dbsize", Command::DbSize, Scope::Every, 1, 1),
    spec("debug", Command::Debug, Scope::Key(3), 2, 4),
    spec("decr", Command::Decr, Scope::Key(1), 2, 2),
    spec("decrby", Command::DecrBy, Scope::Key(1), 3, 3),
    spec("del", Command::Del, Scope::Keys, 2, MANY),
    spec("echo", Command::Echo, Scope::Connection, 2, 2),
    spec("exists", Command::Exists, Scope::Keys, 2, MANY),
    spec("expire", Command::Expire, Scope::Key(1), 3, 3),
    spec("flushall", Command::FlushAll, Scope::Every, 1, 2),
    spec("flushdb", Command::FlushAll, Scope::Every, 1, 2),
    spec("get", Command::Get, Scope::Key(1), 2, 2),
    spec("hello", Command::Hello, Scope::Connection, 1, MANY),
    spec("host:", Command::CrossProtocol, Scope::Connection, 1, MANY),
    spec("incr", Command::Incr, Scope::Key(1), 2, 2),
    spec("incrby", Command::IncrBy, Scope::Key(1), 3, 3),
    spec("info", Command::Info, Scope::Every, 1, MANY),
    spec("mget", Command::MGet, Scope::Keys, 2, MANY),
    spec("mset", Command::MSet, Scope::Pairs, 3, MANY),
    spec("persist", Command::Persist, Scope::Key(1), 2, 2),
    spec("pexpire", Command::PExpire, Scope::Key(1), 3, 3),
    spec("ping", Command::Ping, Scope::Connection, 1, 2),
    spec("post", Command::CrossProtocol, Scope::Connection, 1, MANY),
    spec("pttl", Command::PTtl, Scope::Key(1), 2, 2),
    spec("quit", Command::Quit, Scope::Connection, 1, MANY),
    spec("scan", Command::Scan, Scope::Cursor, 2, MANY),
    spec("select", Command::Select, Scope::Connection, 2, 2),
    spec("set", Command::Set, Scope::Key(1), 3, MANY),
    spec("setex", Command::SetEx, Scope::Key(1), 4, 4),
    spec("shard", Command::Shard, Scope::Connection, 2, 2),
    spec("ttl", Command::Ttl, Scope::Key(1), 2, 2),
];

const MAX_NAME: usize = 8;

const fn spec(
    name: &'static str,
    command: Command,
    scope: Scope,
    least: usize,
    most: usize,
) -> Spec {
    Spec { name, command, scope, least, most }
}

/// How many commands there are, for clients that ask.
pub(crate) fn count() -> usize {
    SPECS.iter().filter(|spec| spec.command != Command::CrossProtocol).count()
}

impl Spec {
    /// Finds the command that a request is for, and checks how many arguments it has. `None`: the
    /// client has been told what is wrong.
    pub(crate) fn of(request: Request<'_>, replies: &mut Replies) -> Option<&'static Self> {
        let Some(spec) = find(request.get(0)) else {
            refuse_unknown(request, replies);
            return None;
        };
        let is_odd = request.len() % 2 == 1;
        let fits = (spec.least..=spec.most).contains(&request.len());
        if !fits || (spec.scope == Scope::Pairs && !is_odd) {
            let name = spec.name;
            reply::error(
                replies,
                format_args!("ERR wrong number of arguments for '{name}' command"),
            );
            return None;
        }
        Some(spec)
    }
}

fn find(name: &[u8]) -> Option<&'static Spec> {
    let mut lower = [0; MAX_NAME];
    let lower = lower.get_mut(..name.len())?;
    lower.copy_from_slice(name);
    lower.make_ascii_lowercase();
    let found = SPECS.binary_search_by(|spec| spec.name.as_bytes().cmp(lower));
    found.ok().map(|index| &SPECS[index])
}

fn refuse_unknown(request: Request<'_>, replies: &mut Replies) {
    const SHOWN: usize = 128;
    let shown =
        |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN)]).into_owned();
    let mut arguments = String::new();
    for argument in request.from(1) {
        if arguments.len() >= SHOWN {
            break;
        }
        arguments += &format!("'{}' ", shown(argument));
    }
    let name = shown(request.get(0));
    reply::error(
        replies,
        format_args!("ERR unknown command '{name}', with args beginning with: {arguments}"),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_is_found_by_its_name() {
        for spec in SPECS {
            assert_eq!(find(spec.name.to_uppercase().as_bytes()).unwrap().name, spec.name);
        }
        assert_eq!(SPECS.iter().map(|spec| spec.name.len()).max(), Some(MAX_NAME));
        for name in [&b""[..], b"ge", b"gett", b"get ", b"flushallx", &[b'x'; 1000]] {
            assert!(find(name).is_none());
        }
    }
}
