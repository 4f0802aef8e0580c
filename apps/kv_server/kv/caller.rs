// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who calls, and what becomes of each of its commands.

use std::rc::Rc;
use std::time::Duration;

use super::command::{self, Command, Scope, Spec};
use super::cross_shard::{CrossShardBatch, Merge};
use super::execute;
use super::info::{self, Sections};
use super::origin::Origin;
use super::reply::{self, EMPTY_ARRAY, OK, Protocol, Replies};
use super::resp::{Request, integer};
use super::route::{Route, route};
use super::shard::Shard;
use super::store::Store;

const MAX_NAME: usize = 256;
const WRONG_PASSWORD: &str = "WRONGPASS invalid username-password pair or user is disabled.";
/// The longest that DEBUG SLEEP sleeps.
const MAX_SLEEP: f64 = 60.0;

/// One client, for its shard.
pub(crate) struct Caller {
    shard: Rc<Shard>,
    id: u64,
    name: Vec<u8>,
    reach: Reach,
    origin: Origin,
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
    /// This command is to be taken again, once those before it are answered.
    Later,
    HangUp,
}

impl Caller {
    pub(crate) fn new(shard: &Rc<Shard>, origin: Origin) -> Self {
        let number = Shard::add(&shard.counters.clients_ever);
        let id = number * shard.place.count as u64 + shard.place.index as u64;
        Self { shard: Rc::clone(shard), id, name: Vec::new(), reach: Reach::All, origin }
    }

    /// Before the commands that have come are taken.
    pub(crate) fn start_turn(&self) {
        self.shard.tell_time(&mut self.shard.store.borrow_mut());
    }

    /// Executes a command, or has it executed by those whose keys it has.
    pub(crate) fn take(&mut self, request: Request<'_>, batch: &mut CrossShardBatch) -> Flow {
        if request.len() == 0 {
            return Flow::GoOn;
        }
        let spec = Spec::of(request, batch.replies());
        if spec.is_some_and(|spec| spec.command == Command::Hello) && batch.has_pieces() {
            // What was asked before is answered in the version of before.
            return Flow::Later;
        }
        batch.record_command();
        Shard::add(&self.shard.counters.commands);
        let Some(spec) = spec else {
            return Flow::GoOn;
        };
        let place = self.shard.place;
        match (route(spec, request, place.index, place.count), self.reach) {
            (Route::To(shard), _) if shard == place.index => {
                return self.execute(spec, request, batch.replies());
            }
            (Route::Everywhere, Reach::Here) => {
                return self.execute(spec, request, batch.replies());
            }
            (_, Reach::Here) => {
                let text = format_args!("ERR not a key of this shard");
                reply::error(batch.replies(), text);
            }
            (Route::To(shard), Reach::All) => {
                Shard::add(&self.shard.counters.forwarded);
                batch.forward(shard, request.bytes());
            }
            (Route::Split(owners), Reach::All) => self.split(spec, request, owners, batch),
            (Route::Everywhere, Reach::All) => self.ask_all(spec, request, batch),
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
            Command::Describe => describe(request, replies),
            Command::Config if is(request.get(1), "GET") => reply::map(replies, 0),
            Command::Auth => auth(request, replies),
            Command::CrossProtocol => {
                let name = String::from_utf8_lossy(request.get(0)).into_owned();
                self.shard.complaints.tell(
                    &self.origin,
                    format_args!(
                        "possible attack: {name:?} is no command but a line of HTTP, so somebody \
                        may have a browser or a web server send commands here; the connection is \
                        closed"
                    ),
                );
                return Flow::HangUp;
            }
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
                reply::verbatim(replies, text.as_bytes());
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
        batch: &mut CrossShardBatch,
    ) {
        batch.place();
        let here = self.shard.place.index;
        let mut keys = vec![0; self.shard.place.count];
        owners.iter().for_each(|&owner| keys[owner] += 1);
        if keys[here] > 0 {
            let mut store = self.shard.store.borrow_mut();
            self.execute_part(&mut store, spec, request, &owners, keys[here], batch.replies());
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
                batch.queue(shard, bytes.bytes());
            }
        }
        for (index, argument) in request.from(1).enumerate() {
            let owner = owners[index / words];
            if owner != here {
                bytes.clear(usize::MAX);
                reply::bulk(&mut bytes, argument);
                batch.queue(owner, bytes.bytes());
            }
        }
        match spec.command {
            Command::MGet => batch.merge(Merge::Elements, owners),
            Command::MSet => batch.merge(Merge::AllOk, others),
            _ => batch.merge(Merge::Sum, others),
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
    fn ask_all(&mut self, spec: &Spec, request: Request<'_>, batch: &mut CrossShardBatch) {
        let sections = Sections::of(request);
        if spec.command == Command::Info && !sections.shards {
            self.execute(spec, request, batch.replies());
            return;
        }
        batch.place();
        let place = self.shard.place;
        for shard in (0..place.count).filter(|&shard| shard != place.index) {
            Shard::add(&self.shard.counters.forwarded);
            batch.queue(shard, request.bytes());
        }
        if spec.command == Command::Info {
            reply::bulk(batch.replies(), info::line(&self.shard).as_bytes());
            batch.merge_text(info::head(&self.shard, sections));
            return;
        }
        self.execute(spec, request, batch.replies());
        let merge = if spec.command == Command::DbSize { Merge::Sum } else { Merge::AllOk };
        batch.merge(merge, (0..place.count).collect());
    }

    /// `HELLO [version [AUTH user password] [SETNAME name]]`: from its reply on the client is
    /// spoken to in that version.
    fn hello(&mut self, request: Request<'_>, replies: &mut Replies) {
        let protocol = match (request.len(), integer(request.get(1))) {
            (1, _) => replies.protocol,
            (_, Some(2)) => Protocol::Resp2,
            (_, Some(3)) => Protocol::Resp3,
            (_, Some(_)) => {
                let text = format_args!("NOPROTO unsupported protocol version");
                return reply::error(replies, text);
            }
            (_, None) => {
                let text = format_args!("ERR Protocol version is not an integer or out of range");
                return reply::error(replies, text);
            }
        };
        let mut name = None;
        let mut at = 2;
        while at < request.len() {
            let (option, left) = (request.get(at), request.len() - at - 1);
            match () {
                () if is(option, "AUTH") && left >= 2 => {
                    if !is_known_user(request.get(at + 1)) {
                        return reply::error(replies, format_args!("{WRONG_PASSWORD}"));
                    }
                    at += 3;
                }
                () if is(option, "SETNAME") && left >= 1 => {
                    name = Some(request.get(at + 1));
                    at += 2;
                }
                () => {
                    let option = shown(option);
                    return reply::error(
                        replies,
                        format_args!("ERR Syntax error in HELLO option '{option}'"),
                    );
                }
            }
        }
        if let Some(Err(text)) = name.map(|name| self.set_name(name)) {
            return reply::error(replies, format_args!("{text}"));
        }
        replies.protocol = protocol;
        let fields = [
            ("server", "kv_server"),
            ("version", env!("CARGO_PKG_VERSION")),
            ("mode", "standalone"),
        ];
        reply::map(replies, fields.len() + 4);
        for (name, value) in fields {
            reply::bulk(replies, name.as_bytes());
            reply::bulk(replies, value.as_bytes());
        }
        let version = if protocol == Protocol::Resp3 { 3 } else { 2 };
        for (name, value) in [("proto", version), ("id", self.id as i64)] {
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
        let is_switch = is(request.get(2), "ON") || is(request.get(2), "OFF");
        match request.len() {
            2 if is(subcommand, "ID") => reply::integer(replies, self.id as i64),
            2 if is(subcommand, "GETNAME") && self.name.is_empty() => reply::null(replies),
            2 if is(subcommand, "GETNAME") => reply::bulk(replies, &self.name),
            2 if is(subcommand, "INFO") => {
                let version = if replies.protocol == Protocol::Resp3 { 3 } else { 2 };
                let name = String::from_utf8_lossy(&self.name);
                let text = format!("id={} name={name} db=0 resp={version}\n", self.id);
                reply::verbatim(replies, text.as_bytes());
            }
            3 if is(subcommand, "SETNAME") => match self.set_name(request.get(2)) {
                Ok(()) => replies.extend_from_slice(OK),
                Err(text) => reply::error(replies, format_args!("{text}")),
            },
            // What library a client is made with interests nobody here.
            4 if is(subcommand, "SETINFO") => {
                let option = request.get(2);
                match is(option, "LIB-NAME") || is(option, "LIB-VER") {
                    true => replies.extend_from_slice(OK),
                    false => {
                        let option = shown(option);
                        reply::error(replies, format_args!("ERR Unrecognized option '{option}'"));
                    }
                }
            }
            // No client is evicted, and no key has a time of its last use.
            3 if (is(subcommand, "NO-EVICT") || is(subcommand, "NO-TOUCH")) && is_switch => {
                replies.extend_from_slice(OK);
            }
            _ => unknown_subcommand("CLIENT", request, replies),
        }
    }

    fn set_name(&mut self, name: &[u8]) -> Result<(), &'static str> {
        if name.len() > MAX_NAME || !name.iter().all(u8::is_ascii_graphic) {
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
        match seconds.filter(|seconds| (0.0..=MAX_SLEEP).contains(seconds)) {
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

/// There are no passwords: as in a Redis without one, the default user may say any.
fn is_known_user(user: &[u8]) -> bool {
    user == b"default"
}

fn auth(request: Request<'_>, replies: &mut Replies) {
    match request.len() {
        3 if is_known_user(request.get(1)) => replies.extend_from_slice(OK),
        3 => reply::error(replies, format_args!("{WRONG_PASSWORD}")),
        _ => {
            let text = format_args!(
                "ERR AUTH <password> called without any password configured for the default user. \
                Are you sure your configuration is correct?"
            );
            reply::error(replies, text);
        }
    }
}

/// Clients ask what commands there are, and get by without an answer.
fn describe(request: Request<'_>, replies: &mut Replies) {
    match request.get(1) {
        about if is(about, "COUNT") => reply::integer(replies, command::count() as i64),
        about if is(about, "DOCS") => reply::map(replies, 0),
        about if is(about, "INFO") => {
            reply::array(replies, request.len() - 2);
            request.from(2).for_each(|_| reply::null(replies));
        }
        _ => replies.extend_from_slice(EMPTY_ARRAY),
    }
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

/// The start of what a client said, for an error.
fn shown(word: &[u8]) -> std::borrow::Cow<'_, str> {
    const SHOWN: usize = 128;
    String::from_utf8_lossy(&word[..word.len().min(SHOWN)])
}

fn unknown_subcommand(command: &str, request: Request<'_>, replies: &mut Replies) {
    let subcommand = shown(request.get(1));
    reply::error(
        replies,
        format_args!(
            "ERR unknown subcommand or wrong number of arguments for '{subcommand}'. \
            Try {command} HELP."
        ),
    );
}
