// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who calls, and what becomes of each of its commands.

use std::rc::Rc;
use std::time::Duration;

use super::command::{Command, Scope, Spec};
use super::exchange::{Exchange, Merge};
use super::execute;
use super::info::{self, Sections};
use super::reply::{self, EMPTY_ARRAY, NULL, OK, Replies};
use super::resp::{Request, integer};
use super::route::{Route, route};
use super::shard::Shard;
use super::store::Store;

const NAME_AT_MOST: usize = 256;
/// The longest that DEBUG SLEEP sleeps.
const SLEEP_AT_MOST: f64 = 60.0;

/// One client, for its shard.
pub(crate) struct Caller {
    shard: Rc<Shard>,
    id: u64,
    name: Vec<u8>,
    reach: Reach,
}

/// For whom the commands of a client are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// For whichever shard has the keys.
    All,
    /// For this shard alone: the client said `SHARD ONLY`.
    Here,
}

/// Whether the client is served on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    GoOn,
    HangUp,
}

impl Caller {
    pub(crate) fn new(shard: &Rc<Shard>) -> Self {
        let number = Shard::add(&shard.counters.clients_ever);
        let id = number * shard.place.count as u64 + shard.place.index as u64;
        Self { shard: Rc::clone(shard), id, name: Vec::new(), reach: Reach::All }
    }

    /// Before the commands that have come are taken.
    pub(crate) fn start_turn(&self) {
        self.shard.tell_time(&mut self.shard.store.borrow_mut());
    }

    /// Executes a command, or has it executed by those whose keys it has.
    pub(crate) fn take(&mut self, request: Request<'_>, exchange: &mut Exchange) -> Flow {
        if request.len() == 0 {
            return Flow::GoOn;
        }
        exchange.note_command();
        Shard::add(&self.shard.counters.commands);
        let Some(spec) = Spec::of(request, exchange.replies()) else {
            return Flow::GoOn;
        };
        let place = self.shard.place;
        match (route(spec, request, place.index, place.count), self.reach) {
            (Route::To(shard), _) if shard == place.index => {
                return self.execute(spec, request, exchange.replies());
            }
            (Route::Everywhere, Reach::Here) => {
                return self.execute(spec, request, exchange.replies());
            }
            (_, Reach::Here) => {
                let text = format_args!("ERR not a key of this shard");
                reply::error(exchange.replies(), text);
            }
            (Route::To(shard), Reach::All) => {
                Shard::add(&self.shard.counters.forwarded);
                exchange.forward(shard, request.bytes());
            }
            (Route::Split(owners), Reach::All) => self.split(spec, request, owners, exchange),
            (Route::Everywhere, Reach::All) => self.ask_all(spec, request, exchange),
        }
        Flow::GoOn
    }

    /// Executes a command here.
    fn execute(&mut self, spec: &Spec, request: Request<'_>, replies: &mut Replies) -> Flow {
        match spec.command {
            Command::Ping if request.len() == 1 => replies.extend_from_slice(b"+PONG\r\n"),
            Command::Ping | Command::Echo => reply::bulk(replies, request.get(1)),
            Command::Select => select(request, replies),
            Command::Hello => self.hello(request, replies),
            Command::Client => self.client(request, replies),
            Command::Describe => replies.extend_from_slice(EMPTY_ARRAY),
            Command::Config if is(request.get(1), "GET") => replies.extend_from_slice(EMPTY_ARRAY),
            Command::Config => unknown_subcommand("CONFIG", request, replies),
            Command::Shard if is(request.get(1), "ONLY") => {
                self.reach = Reach::Here;
                replies.extend_from_slice(OK);
            }
            Command::Shard => unknown_subcommand("SHARD", request, replies),
            Command::Debug => self.debug(request, replies),
            Command::Info => {
                let sections = Sections::of(request);
                let mut text = match self.reach {
                    Reach::All => info::head(&self.shard, sections),
                    Reach::Here => String::new(),
                };
                if sections.shards {
                    text += &info::line(&self.shard);
                }
                reply::bulk(replies, text.as_bytes());
            }
            Command::Quit => {
                replies.extend_from_slice(OK);
                return Flow::HangUp;
            }
            command => {
                let mut store = self.shard.store.borrow_mut();
                execute::execute(&mut store, self.shard.place, command, request, replies);
            }
        }
        Flow::GoOn
    }

    /// Gives each owner its part of a command with several keys.
    fn split(
        &self,
        spec: &Spec,
        request: Request<'_>,
        owners: Vec<usize>,
        exchange: &mut Exchange,
    ) {
        exchange.place();
        let here = self.shard.place.index;
        let mut keys = vec![0; self.shard.place.count];
        owners.iter().for_each(|&owner| keys[owner] += 1);
        if keys[here] > 0 {
            let mut store = self.shard.store.borrow_mut();
            self.execute_part(&mut store, spec, request, &owners, keys[here], exchange.replies());
        }
        let words = if spec.scope == Scope::Pairs { 2 } else { 1 };
        let mut bytes = Replies::new();
        let mut others = Vec::new();
        for (shard, &keys) in keys.iter().enumerate() {
            if keys > 0 {
                others.push(shard);
            }
            if keys > 0 && shard != here {
                Shard::add(&self.shard.counters.forwarded);
                bytes.clear(usize::MAX);
                reply::array(&mut bytes, 1 + keys * words);
                reply::bulk(&mut bytes, spec.name.as_bytes());
                exchange.queue(shard, bytes.bytes());
            }
        }
        for (index, argument) in request.from(1).enumerate() {
            let owner = owners[index / words];
            if owner != here {
                bytes.clear(usize::MAX);
                reply::bulk(&mut bytes, argument);
                exchange.queue(owner, bytes.bytes());
            }
        }
        match spec.command {
            Command::MGet => exchange.merge(Merge::Elements, owners),
            Command::MSet => exchange.merge(Merge::AllOk, others),
            _ => exchange.merge(Merge::Sum, others),
        }
    }

    /// Executes the part of a command whose keys are of this shard.
    fn execute_part(
        &self,
        store: &mut Store,
        spec: &Spec,
        request: Request<'_>,
        owners: &[usize],
        count: usize,
        replies: &mut Replies,
    ) {
        let here = self.shard.place.index;
        if spec.scope == Scope::Pairs {
            let is_mine = |number: usize| owners[number] == here;
            if let Err(refusal) = execute::pairs(store, request, is_mine, replies) {
                reply::error(replies, format_args!("{refusal}"));
            }
            return;
        }
        let mine = request.from(1).zip(owners).filter(|(_, owner)| **owner == here);
        execute::keys(store, spec.command, mine.map(|(key, _)| key), count, replies);
    }

    /// Asks every shard, this one among them.
    fn ask_all(&mut self, spec: &Spec, request: Request<'_>, exchange: &mut Exchange) {
        let sections = Sections::of(request);
        if spec.command == Command::Info && !sections.shards {
            self.execute(spec, request, exchange.replies());
            return;
        }
        exchange.place();
        let place = self.shard.place;
        for shard in (0..place.count).filter(|&shard| shard != place.index) {
            Shard::add(&self.shard.counters.forwarded);
            exchange.queue(shard, request.bytes());
        }
        if spec.command == Command::Info {
            reply::bulk(exchange.replies(), info::line(&self.shard).as_bytes());
            exchange.merge_text(info::head(&self.shard, sections));
            return;
        }
        self.execute(spec, request, exchange.replies());
        let merge = if spec.command == Command::DbSize { Merge::Sum } else { Merge::AllOk };
        exchange.merge(merge, (0..place.count).collect());
    }

    fn hello(&mut self, request: Request<'_>, replies: &mut Replies) {
        if request.len() > 1 {
            match integer(request.get(1)) {
                Some(2) => {}
                Some(_) => {
                    let text = format_args!("NOPROTO unsupported protocol version");
                    return reply::error(replies, text);
                }
                None => {
                    let text =
                        format_args!("ERR Protocol version is not an integer or out of range");
                    return reply::error(replies, text);
                }
            }
        }
        match request.len() {
            0..=2 => {}
            4 if is(request.get(2), "SETNAME") => {
                if let Err(text) = self.set_name(request.get(3)) {
                    return reply::error(replies, format_args!("{text}"));
                }
            }
            _ => return reply::error(replies, format_args!("ERR Syntax error in HELLO")),
        }
        let fields = [
            ("server", "kv_server"),
            ("version", env!("CARGO_PKG_VERSION")),
            ("mode", "standalone"),
        ];
        reply::array(replies, 2 * (fields.len() + 4));
        for (name, value) in fields {
            reply::bulk(replies, name.as_bytes());
            reply::bulk(replies, value.as_bytes());
        }
        for (name, value) in [("proto", 2), ("id", self.id as i64)] {
            reply::bulk(replies, name.as_bytes());
            reply::integer(replies, value);
        }
        reply::bulk(replies, b"role");
        reply::bulk(replies, b"master");
        reply::bulk(replies, b"modules");
        replies.extend_from_slice(EMPTY_ARRAY);
    }

    fn client(&mut self, request: Request<'_>, replies: &mut Replies) {
        let subcommand = request.get(1);
        match request.len() {
            2 if is(subcommand, "ID") => reply::integer(replies, self.id as i64),
            2 if is(subcommand, "GETNAME") && self.name.is_empty() => {
                replies.extend_from_slice(NULL);
            }
            2 if is(subcommand, "GETNAME") => reply::bulk(replies, &self.name),
            3 if is(subcommand, "SETNAME") => match self.set_name(request.get(2)) {
                Ok(()) => replies.extend_from_slice(OK),
                Err(text) => reply::error(replies, format_args!("{text}")),
            },
            // What library a client is made with interests nobody here.
            4 if is(subcommand, "SETINFO") => replies.extend_from_slice(OK),
            _ => unknown_subcommand("CLIENT", request, replies),
        }
    }

    fn set_name(&mut self, name: &[u8]) -> Result<(), &'static str> {
        if name.len() > NAME_AT_MOST || !name.iter().all(u8::is_ascii_graphic) {
            return Err("ERR Client names cannot contain spaces, newlines or special characters.");
        }
        self.name = name.to_vec();
        Ok(())
    }

    /// `DEBUG SLEEP seconds [key]` blocks the core of this shard, or of the one that owns the key,
    /// with everything that it serves. For tests of what the others do meanwhile.
    fn debug(&self, request: Request<'_>, replies: &mut Replies) {
        if !self.shard.settings.is_debug_allowed {
            let text = format_args!("ERR DEBUG command not allowed: start with --debug");
            return reply::error(replies, text);
        }
        if request.len() < 3 || !is(request.get(1), "SLEEP") {
            return unknown_subcommand("DEBUG", request, replies);
        }
        let seconds: Option<f64> =
            std::str::from_utf8(request.get(2)).ok().and_then(|text| text.parse().ok());
        match seconds.filter(|seconds| (0.0..=SLEEP_AT_MOST).contains(seconds)) {
            Some(seconds) => {
                std::thread::sleep(Duration::from_secs_f64(seconds));
                self.start_turn();
                replies.extend_from_slice(OK);
            }
            None => reply::error(replies, format_args!("ERR value is not a valid float")),
        }
    }
}

fn is(word: &[u8], name: &str) -> bool {
    word.eq_ignore_ascii_case(name.as_bytes())
}

fn select(request: Request<'_>, replies: &mut Replies) {
    match integer(request.get(1)) {
        Some(0) => replies.extend_from_slice(OK),
        Some(_) => reply::error(replies, format_args!("ERR DB index is out of range")),
        None => {
            let text = format_args!("ERR value is not an integer or out of range");
            reply::error(replies, text);
        }
    }
}

fn unknown_subcommand(command: &str, request: Request<'_>, replies: &mut Replies) {
    const SHOWN: usize = 128;
    let subcommand = request.get(1);
    let subcommand = String::from_utf8_lossy(&subcommand[..subcommand.len().min(SHOWN)]);
    let text = format_args!(
        "ERR unknown subcommand or wrong number of arguments for '{subcommand}'. \
        Try {command} HELP."
    );
    reply::error(replies, text);
}
