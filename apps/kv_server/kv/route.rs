// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which shards a command is for.

use super::command::{Scope, Spec};
use super::cursor;
use super::resp::Request;
use super::slots::shard_of;

/// Where a command goes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// It is for one shard.
    To(usize),
    /// It has keys of several shards: the owner of each of its keys, in order.
    Split(Vec<usize>),
    /// It is for every shard.
    Everywhere,
}

/// Finds out where a command goes that came in at the shard `here`.
pub(crate) fn route(spec: &Spec, request: Request<'_>, here: usize, shards: usize) -> Route {
    let owner = |key: &[u8]| shard_of(key, shards);
    if shards == 1 {
        return Route::To(here);
    }
    match spec.scope {
        Scope::Connection => Route::To(here),
        Scope::Key(index) if index >= request.len() => Route::To(here),
        Scope::Key(index) => Route::To(owner(request.get(index))),
        Scope::Keys => gather(request.from(1).map(owner)),
        Scope::Pairs => gather(request.from(1).step_by(2).map(owner)),
        Scope::Cursor => Route::To(cursor::shard(request.get(1), shards).unwrap_or(here)),
        Scope::Every => Route::Everywhere,
    }
}

/// One owner, when all are the same. There is at least one.
fn gather(mut owners: impl Iterator<Item = usize>) -> Route {
    let first = owners.next().unwrap_or_default();
    let mut same = 1;
    while let Some(owner) = owners.next() {
        if owner != first {
            let mut all = vec![first; same];
            all.push(owner);
            all.extend(owners);
            return Route::Split(all);
        }
        same += 1;
    }
    Route::To(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::reply::Replies;
    use crate::kv::resp::{Limits, Parser};

    fn route_of(line: &str, here: usize, shards: usize) -> Route {
        let mut parser = Parser::new(Limits::for_bulk(100));
        let line = format!("{line}\r\n");
        parser.parse(line.as_bytes()).unwrap().unwrap();
        let request = parser.request(line.as_bytes());
        let spec = Spec::of(request, &mut Replies::new()).unwrap();
        route(spec, request, here, shards)
    }

    #[test]
    fn commands_go_to_the_owners_of_their_keys() {
        // Slots of Redis Cluster: foo 12182, bar 5061, hello 866.
        assert_eq!(route_of("get foo", 0, 2), Route::To(1));
        assert_eq!(route_of("set hello foo", 1, 2), Route::To(0));
        assert_eq!(route_of("mget bar hello", 1, 2), Route::To(0));
        assert_eq!(route_of("del bar hello foo bar", 0, 2), Route::Split(vec![0, 0, 1, 0]));
        assert_eq!(route_of("mset foo hello bar foo", 0, 2), Route::Split(vec![1, 0]));
        assert_eq!(route_of("mset foo hello bar foo", 0, 1), Route::To(0));
        assert_eq!(route_of("ping", 1, 2), Route::To(1));
        assert_eq!(route_of("debug sleep 1", 1, 2), Route::To(1));
        assert_eq!(route_of("debug sleep 1 bar", 1, 2), Route::To(0));
        assert_eq!(route_of("scan 7", 0, 3), Route::To(1));
        assert_eq!(route_of("dbsize", 0, 3), Route::Everywhere);
    }
}
