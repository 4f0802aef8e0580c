// SPDX-License-Identifier: MIT OR Apache-2.0
//! What commands do to the store of the shard that owns their keys.

use super::command::Command;
use super::cursor;
use super::glob;
use super::reply::{self, OK, Replies};
use super::resp::{Request, integer};
use super::store::{CountError, Expiry, Full, Moment, Store};

const NOT_AN_INTEGER: &str = "ERR value is not an integer or out of range";
const SYNTAX: &str = "ERR syntax error";
/// How many slots one step of a scan looks at, at most.
const MAX_SCAN: usize = 10_000;
const DEFAULT_SCAN: usize = 10;
/// A step of a scan ends when its keys have so many bytes.
const SCAN_BYTES: usize = 1 << 20;
const MAX_PATTERN: usize = 4096;
/// The longest reply to MGET. Naming a large value many times costs the client little.
pub(crate) const MAX_REPLY: usize = 256 << 20;
pub(crate) const REPLY_TOO_LONG: &str = "ERR reply is longer than 256 MiB";

/// Which of how many shards a store is: a scan goes on with the next one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) index: usize,
    pub(crate) count: usize,
}

/// An error reply's text.
type Refusal = String;

/// Executes a command, all of whose keys are in this store, and writes its one reply.
pub(crate) fn execute(
    store: &mut Store,
    place: Place,
    command: Command,
    request: Request<'_>,
    replies: &mut Replies,
) {
    let before = replies.len();
    if let Err(refusal) = try_execute(store, place, command, request, replies) {
        replies.truncate(before);
        reply::error(replies, format_args!("{refusal}"));
    }
}

fn try_execute(
    store: &mut Store,
    place: Place,
    command: Command,
    request: Request<'_>,
    replies: &mut Replies,
) -> Result<(), Refusal> {
    let key = request.get(1);
    match command {
        Command::Get => value(store, key, replies),
        Command::Set => set(store, request, replies)?,
        Command::SetEx => {
            let expiry = expiry_in(store, request.get(2), 1000, "setex")?;
            store.set(key, request.get(3), expiry).map_err(full)?;
            replies.extend_from_slice(OK);
        }
        Command::Incr => count(store, key, 1, replies)?,
        Command::Decr => count(store, key, -1, replies)?,
        Command::IncrBy => count(store, key, number(request.get(2))?, replies)?,
        Command::DecrBy => {
            let by = number(request.get(2))?.checked_neg();
            count(store, key, by.ok_or("ERR decrement would overflow")?, replies)?;
        }
        Command::Expire => expire(store, request, 1000, "expire", replies)?,
        Command::PExpire => expire(store, request, 1, "pexpire", replies)?,
        Command::Ttl => left(store, key, |left| left.saturating_add(500) / 1000, replies),
        Command::PTtl => left(store, key, |left| left, replies),
        Command::Persist => {
            let has_expiry = store.expiry(key).flatten().is_some();
            reply::integer(replies, i64::from(has_expiry && store.set_expiry(key, None)));
        }
        Command::Del | Command::Exists | Command::MGet => {
            keys(store, command, request.from(1), request.len() - 1, replies);
        }
        Command::MSet => pairs(store, request, |_| true, replies)?,
        Command::Scan => scan(store, place, request, replies)?,
        Command::DbSize => reply::integer(replies, store.len() as i64),
        Command::FlushAll => flush(store, request, replies)?,
        // Those that have nothing to do with keys are answered elsewhere.
        _ => return Err("ERR not a command of a store".into()),
    }
    Ok(())
}

/// DEL, EXISTS or MGET, for keys that are all in this store.
pub(crate) fn keys<'a>(
    store: &mut Store,
    command: Command,
    keys: impl Iterator<Item = &'a [u8]>,
    len: usize,
    replies: &mut Replies,
) {
    match command {
        Command::MGet => values(store, keys, len, replies),
        Command::Del => {
            reply::integer(replies, keys.filter(|key| store.remove(key)).count() as i64);
        }
        _ => reply::integer(replies, keys.filter(|key| store.contains(key)).count() as i64),
    }
}

fn values<'a>(
    store: &mut Store,
    keys: impl Iterator<Item = &'a [u8]>,
    len: usize,
    replies: &mut Replies,
) {
    let before = replies.len();
    reply::array(replies, len);
    for key in keys {
        value(store, key, replies);
        if replies.len() - before > MAX_REPLY {
            replies.truncate(before);
            return reply::error(replies, format_args!("{REPLY_TOO_LONG}"));
        }
    }
}

/// MSET, for those of its keys that are wanted here. They are counted from zero.
pub(crate) fn pairs(
    store: &mut Store,
    request: Request<'_>,
    is_wanted: impl Fn(usize) -> bool,
    replies: &mut Replies,
) -> Result<(), Refusal> {
    let mut arguments = request.from(1);
    let mut number = 0;
    while let (Some(key), Some(value)) = (arguments.next(), arguments.next()) {
        if is_wanted(number) {
            store.set(key, value, Expiry::Never).map_err(full)?;
        }
        number += 1;
    }
    replies.extend_from_slice(OK);
    Ok(())
}

fn full(_: Full) -> Refusal {
    "OOM this shard has as many keys as it can hold".into()
}

fn number(bytes: &[u8]) -> Result<i64, Refusal> {
    integer(bytes).ok_or_else(|| NOT_AN_INTEGER.into())
}

fn value(store: &mut Store, key: &[u8], replies: &mut Replies) {
    match store.get(key) {
        Some(value) => reply::value(replies, value),
        None => reply::null(replies),
    }
}

fn count(store: &mut Store, key: &[u8], by: i64, replies: &mut Replies) -> Result<(), Refusal> {
    match store.add(key, by).map_err(full)? {
        Ok(sum) => reply::integer(replies, sum),
        Err(CountError::NotANumber) => return Err(NOT_AN_INTEGER.into()),
        Err(CountError::Overflow) => {
            return Err("ERR increment or decrement would overflow".into());
        }
    }
    Ok(())
}

/// When what is told in seconds or milliseconds from now will be.
fn moment(store: &Store, time: i64, unit: i64, command: &str) -> Result<i64, Refusal> {
    let invalid = || format!("ERR invalid expire time in '{command}' command");
    let time = time.checked_mul(unit).ok_or_else(invalid)?;
    time.checked_add(store.now() as i64).ok_or_else(invalid)
}

/// The expiry of a value that is set with a time to live, which must be positive.
fn expiry_in(store: &Store, time: &[u8], unit: i64, command: &str) -> Result<Expiry, Refusal> {
    let time = number(time)?;
    if time <= 0 {
        return Err(format!("ERR invalid expire time in '{command}' command"));
    }
    moment(store, time, unit, command).map(|moment| Expiry::At(moment as Moment))
}

/// What a client may ask of SET besides setting.
#[derive(Default)]
struct SetOptions {
    expiry: Option<Expiry>,
    condition: Option<Condition>,
    gives_old: bool,
}

#[derive(PartialEq)]
enum Condition {
    IsThere,
    IsNotThere,
}

fn set_options(store: &Store, request: Request<'_>) -> Result<SetOptions, Refusal> {
    let mut options = SetOptions::default();
    let mut arguments = request.from(3);
    while let Some(argument) = arguments.next() {
        let is = |name: &str| argument.eq_ignore_ascii_case(name.as_bytes());
        let mut expiry = |unit| {
            let time = arguments.next().ok_or(SYNTAX)?;
            expiry_in(store, time, unit, "set").map(Some)
        };
        match () {
            () if is("GET") => options.gives_old = true,
            () if is("NX") && options.condition != Some(Condition::IsThere) => {
                options.condition = Some(Condition::IsNotThere);
            }
            () if is("XX") && options.condition != Some(Condition::IsNotThere) => {
                options.condition = Some(Condition::IsThere);
            }
            () if options.expiry.is_some() => return Err(SYNTAX.into()),
            () if is("KEEPTTL") => options.expiry = Some(Expiry::Kept),
            () if is("EX") => options.expiry = expiry(1000)?,
            () if is("PX") => options.expiry = expiry(1)?,
            () => return Err(SYNTAX.into()),
        }
    }
    Ok(options)
}

fn set(store: &mut Store, request: Request<'_>, replies: &mut Replies) -> Result<(), Refusal> {
    let (key, new) = (request.get(1), request.get(2));
    let options = set_options(store, request)?;
    let is_wanted = match options.condition {
        None => true,
        Some(Condition::IsThere) => store.contains(key),
        Some(Condition::IsNotThere) => !store.contains(key),
    };
    if options.gives_old {
        value(store, key, replies);
    } else {
        match is_wanted {
            true => replies.extend_from_slice(OK),
            false => reply::null(replies),
        }
    }
    if is_wanted {
        store.set(key, new, options.expiry.unwrap_or(Expiry::Never)).map_err(full)?;
    }
    Ok(())
}

fn expire(
    store: &mut Store,
    request: Request<'_>,
    unit: i64,
    command: &str,
    replies: &mut Replies,
) -> Result<(), Refusal> {
    let moment = moment(store, number(request.get(2))?, unit, command)?;
    // What was before the store was made has passed in any case.
    let was_there = store.set_expiry(request.get(1), Some(moment.max(0) as Moment));
    reply::integer(replies, i64::from(was_there));
    Ok(())
}

fn left(store: &mut Store, key: &[u8], show: impl Fn(i64) -> i64, replies: &mut Replies) {
    let left = match store.expiry(key) {
        None => -2,
        Some(None) => -1,
        Some(Some(moment)) => show(moment.saturating_sub(store.now()) as i64),
    };
    reply::integer(replies, left);
}

fn flush(store: &mut Store, request: Request<'_>, replies: &mut Replies) -> Result<(), Refusal> {
    let how = request.get(1);
    let is_known = [&b""[..], b"async", b"sync"].iter().any(|word| how.eq_ignore_ascii_case(word));
    if !is_known {
        return Err(SYNTAX.into());
    }
    store.clear();
    replies.extend_from_slice(OK);
    Ok(())
}

fn scan(
    store: &mut Store,
    place: Place,
    request: Request<'_>,
    replies: &mut Replies,
) -> Result<(), Refusal> {
    let from = cursor::slot(request.get(1), place.count).ok_or("ERR invalid cursor")?;
    let (mut pattern, mut slots) = (&b"*"[..], DEFAULT_SCAN);
    let mut options = request.from(2);
    while let Some(option) = options.next() {
        let value = options.next().ok_or(SYNTAX)?;
        if option.eq_ignore_ascii_case(b"MATCH") {
            pattern = value;
        } else if option.eq_ignore_ascii_case(b"COUNT") {
            slots = usize::try_from(number(value)?).unwrap_or(0);
        } else {
            return Err(SYNTAX.into());
        }
    }
    if slots == 0 || pattern.len() > MAX_PATTERN {
        return Err(SYNTAX.into());
    }
    let (mut keys, mut len) = (Replies::new(), 0);
    let next = store.scan(from, slots.min(MAX_SCAN), |key| {
        if pattern == b"*" || glob::fits(pattern, key) {
            reply::bulk(&mut keys, key);
            len += 1;
        }
        keys.len() < SCAN_BYTES
    });
    reply::array(replies, 2);
    reply::bulk(replies, cursor::next(next, place.index, place.count).to_string().as_bytes());
    reply::array(replies, len);
    replies.extend_from_slice(keys.bytes());
    Ok(())
}
