// SPDX-License-Identifier: MIT OR Apache-2.0
//! The server's side of the handshakes of versions 2 to 4 (spec chapter 4;
//! `docs/protocol.md#handshakes`).
//!
//! Invariants: see the parent module. The client's first message decides between the versions, as
//! it does in shmipc-go and in the crate `shmipc`. An acknowledgement goes out only after both
//! memories are mapped. A feature is selected only if it was offered and this side has it.
//!
//! Trust: none in the client's messages. Paths are passed on as they came; whether they may be
//! opened is for the driver to decide.

use std::mem;
use std::time::Duration;

use super::{NOT_YET, NOTHING_AFTER_FAILURE, NOTHING_MORE, Negotiated, require_version};
use crate::config::Wakeup;
use crate::error::HandshakeError;
use crate::wire::negotiation::{JSON_PARSE_ERROR, VERSION_NOT_SUPPORTED};
use crate::wire::{
    Features, HEADER_LEN, Header, MemoryPaths, Message, MessageType, NegotiationRequest,
    NegotiationResponse, ProtocolVersion, ShardIdentity,
};

/// The message that a server of version 3 answers an opening with.
const EXCHANGE: [u8; HEADER_LEN] =
    Header::bare(ProtocolVersion::V3.as_u8(), MessageType::ExchangeMetadata).encode();
/// The other messages without a payload, for the byte of version 3 and that of version 4.
const READY: [[u8; HEADER_LEN]; 2] = replies(MessageType::AckReadyRecvFd);
const ACK: [[u8; HEADER_LEN]; 2] = replies(MessageType::AckShareMemory);

const fn replies(message: MessageType) -> [[u8; HEADER_LEN]; 2] {
    let (v3, v4) = (ProtocolVersion::V3.message_byte(), ProtocolVersion::V4.message_byte());
    [Header::bare(v3, message).encode(), Header::bare(v4, message).encode()]
}

/// The one of two replies that fits the version.
fn reply<'a>(replies: &'a [[u8; HEADER_LEN]; 2], agreement: &Negotiated) -> &'a [u8] {
    &replies[usize::from(agreement.version == ProtocolVersion::V4)]
}

/// How many descriptors of memories there are, and how many of eventfds.
const MEMORIES: usize = 2;
const EVENT_FDS: usize = 2;

/// What this side can do on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerCapabilities {
    /// The highest version.
    pub highest: ProtocolVersion,
    /// Whether the connection carries descriptors.
    pub has_descriptors: bool,
    /// Whether each side may have lists for itself.
    pub owned_free_lists: bool,
    /// How often it is willing to look at a queue.
    pub min_polling_interval: Duration,
    /// Which shard this is.
    pub shard: Option<ShardIdentity>,
}

impl ServerCapabilities {
    /// The features of those offered that the session gets: one kind of wake-up at most.
    fn select(&self, offered: Features) -> Features {
        let shortest = self.min_polling_interval.min(Wakeup::LONGEST_INTERVAL);
        let polling =
            offered.polling.map(|interval| interval.clamp(shortest, Wakeup::LONGEST_INTERVAL));
        Features {
            polling,
            eventfd: polling.is_none() && offered.eventfd && self.has_descriptors,
            owned_free_lists: offered.owned_free_lists && self.owned_free_lists,
        }
    }
}

/// What the driver has to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum ServerStep<'a> {
    /// Receive a message for [`ServerHandshake::receive`]; what is due, in words.
    AwaitMessage(&'static str),
    /// Send these bytes, then call [`ServerHandshake::sent`].
    Send(&'a [u8]),
    /// Receive one byte with so many descriptors, buffer first, then the queue, then the eventfd
    /// that the client writes and the one that the server writes; then call
    /// [`ServerHandshake::descriptors_received`].
    ReceiveDescriptors(usize),
    /// Open and map the files of these paths, then call [`ServerHandshake::mapped`].
    MapFiles(&'a Negotiated, &'a MemoryPaths),
    /// Map the descriptors received; the paths are only names. Then call
    /// [`ServerHandshake::mapped`].
    MapDescriptors(&'a Negotiated, &'a MemoryPaths),
    /// Done: the session is one of this kind.
    Established(&'a Negotiated),
    /// Over: the client has been told.
    Refused(&'a HandshakeError),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    AwaitOpening,
    SendExchange,
    /// The whole message.
    SendSelection(Vec<u8>, Negotiated),
    /// The whole message, and why.
    SendRefusal(Vec<u8>, HandshakeError),
    Refused(HandshakeError),
    AwaitAnnouncement(Negotiated),
    SendReady(Negotiated, MemoryPaths),
    ReceiveDescriptors(Negotiated, MemoryPaths),
    MapDescriptors(Negotiated, MemoryPaths),
    MapFiles(Negotiated, MemoryPaths),
    SendAck(Negotiated),
    Established(Negotiated),
    Failed(HandshakeError),
}

impl State {
    /// Which message is due, in words.
    fn due(&self) -> &'static str {
        match self {
            Self::AwaitOpening => {
                "ExchangeMetadata, Negotiation, or ShareMemoryByFilePath of version 2"
            }
            Self::AwaitAnnouncement(agreement) if agreement.wakeup == Wakeup::EventFd => {
                "ShareMemoryByMemfd, since eventfds are to come"
            }
            Self::AwaitAnnouncement(_) => "ShareMemoryByFilePath or ShareMemoryByMemfd",
            Self::SendExchange
            | Self::SendSelection(..)
            | Self::SendRefusal(..)
            | Self::SendReady(..)
            | Self::ReceiveDescriptors(..)
            | Self::MapDescriptors(..)
            | Self::MapFiles(..)
            | Self::SendAck(_) => NOT_YET,
            Self::Established(_) => NOTHING_MORE,
            Self::Refused(_) | Self::Failed(_) => NOTHING_AFTER_FAILURE,
        }
    }
}

/// A handshake, seen from the server.
#[derive(Debug, Clone)]
pub struct ServerHandshake {
    state: State,
    abilities: ServerCapabilities,
}

impl ServerHandshake {
    /// A handshake of which nothing has happened yet.
    pub fn new(abilities: ServerCapabilities) -> Self {
        Self { state: State::AwaitOpening, abilities }
    }

    /// What the driver has to do next.
    pub fn step(&self) -> ServerStep<'_> {
        match &self.state {
            State::SendExchange => ServerStep::Send(&EXCHANGE),
            State::SendSelection(message, _) | State::SendRefusal(message, _) => {
                ServerStep::Send(message)
            }
            State::SendReady(agreement, _) => ServerStep::Send(reply(&READY, agreement)),
            State::SendAck(agreement) => ServerStep::Send(reply(&ACK, agreement)),
            State::ReceiveDescriptors(agreement, _) => {
                let has_event_fds = agreement.wakeup == Wakeup::EventFd;
                ServerStep::ReceiveDescriptors(MEMORIES + if has_event_fds { EVENT_FDS } else { 0 })
            }
            State::MapDescriptors(agreement, paths) => ServerStep::MapDescriptors(agreement, paths),
            State::MapFiles(agreement, paths) => ServerStep::MapFiles(agreement, paths),
            State::Established(agreement) => ServerStep::Established(agreement),
            State::Refused(error) => ServerStep::Refused(error),
            state @ (State::AwaitOpening | State::AwaitAnnouncement(_) | State::Failed(_)) => {
                ServerStep::AwaitMessage(state.due())
            }
        }
    }

    /// The bytes of the last [`step`](Self::step) are sent, all of them.
    ///
    /// Without effect when nothing was to be sent.
    pub fn sent(&mut self) {
        self.advance(|state| match state {
            State::SendExchange => State::AwaitAnnouncement(Negotiated::plain(ProtocolVersion::V3)),
            State::SendSelection(_, agreement) => State::AwaitAnnouncement(agreement),
            State::SendRefusal(_, error) => State::Refused(error),
            State::SendReady(agreement, paths) => State::ReceiveDescriptors(agreement, paths),
            State::SendAck(agreement) => State::Established(agreement),
            other => other,
        });
    }

    /// Whether what is to be sent now has the peer pass descriptors.
    pub fn asks_for_descriptors(&self) -> bool {
        matches!(self.state, State::SendReady(..))
    }

    /// The descriptors of both memories are here.
    ///
    /// Without effect when none were due.
    pub fn descriptors_received(&mut self) {
        self.advance(|state| match state {
            State::ReceiveDescriptors(agreement, paths) => State::MapDescriptors(agreement, paths),
            other => other,
        });
    }

    /// Both memories are mapped and hold together.
    ///
    /// Without effect when none were to be mapped.
    pub fn mapped(&mut self) {
        self.advance(|state| match state {
            State::MapFiles(agreement, _) | State::MapDescriptors(agreement, _) => {
                // Version 2 has no acknowledgement: its client is using the queues already.
                match agreement.version {
                    ProtocolVersion::V2 => State::Established(agreement),
                    ProtocolVersion::V3 | ProtocolVersion::V4 => State::SendAck(agreement),
                }
            }
            other => other,
        });
    }

    /// A message came.
    ///
    /// # Errors
    /// It is not one that was due. The handshake has failed then, and stays so.
    pub fn receive(&mut self, header: &Header, message: &Message) -> Result<(), HandshakeError> {
        match self.after(header.version, message) {
            Ok(state) => {
                self.state = state;
                Ok(())
            }
            Err(error) => {
                self.state = State::Failed(error.clone());
                Err(error)
            }
        }
    }

    /// The state after a message.
    fn after(&self, version: u8, message: &Message) -> Result<State, HandshakeError> {
        match (&self.state, message) {
            (State::AwaitOpening, _) => self.after_opening(version, message),
            (&State::AwaitAnnouncement(agreement), Message::ShareMemoryByFilePath(paths))
                if agreement.wakeup != Wakeup::EventFd =>
            {
                require_version(agreement.version, version, message)?;
                Ok(State::MapFiles(agreement, paths.clone()))
            }
            (&State::AwaitAnnouncement(agreement), Message::ShareMemoryByMemfd(paths)) => {
                require_version(agreement.version, version, message)?;
                Ok(State::SendReady(agreement, paths.clone()))
            }
            (State::Failed(error) | State::Refused(error), _) => Err(error.clone()),
            (state, _) => Err(unexpected(state, message)),
        }
    }

    /// The state after the first message.
    fn after_opening(&self, version: u8, message: &Message) -> Result<State, HandshakeError> {
        let (v2, v3, v4) = (ProtocolVersion::V2, ProtocolVersion::V3, ProtocolVersion::V4);
        let highest = self.abilities.highest;
        match message {
            Message::ExchangeMetadata if version >= v3.as_u8() && highest >= v3 => {
                Ok(State::SendExchange)
            }
            // With a peer that could do more, it is this side that cannot.
            Message::ExchangeMetadata => {
                let needed = v3.as_u8().min(highest.as_u8());
                Err(HandshakeError::NoCommonVersion { peer: version, needed })
            }
            Message::ShareMemoryByFilePath(paths) if version == v2.message_byte() => {
                Ok(State::MapFiles(Negotiated::plain(v2), paths.clone()))
            }
            Message::Negotiation(json) if highest >= v4 => Ok(self.negotiate(json)),
            // As one that does not know the message: the client may fall back.
            Message::Negotiation(_) => {
                Err(HandshakeError::NoCommonVersion { peer: v4.as_u8(), needed: highest.as_u8() })
            }
            _ => Err(unexpected(&self.state, message)),
        }
    }

    /// The state after the client has said what it can do.
    fn negotiate(&self, json: &[u8]) -> State {
        match NegotiationRequest::decode(json) {
            Ok(request) if request.offers_version_4 => {
                let features = self.abilities.select(request.features);
                let shard = self.abilities.shard;
                State::SendSelection(
                    answer(NegotiationResponse::selecting(features, shard)),
                    Negotiated::by_features(features, shard),
                )
            }
            Ok(_) => State::SendRefusal(
                answer(NegotiationResponse::refusal(
                    VERSION_NOT_SUPPORTED,
                    "this server negotiates version 4 only",
                )),
                HandshakeError::Version4NotOffered,
            ),
            Err(error) => State::SendRefusal(
                answer(NegotiationResponse::refusal(JSON_PARSE_ERROR, &error.to_string())),
                HandshakeError::Negotiation(error),
            ),
        }
    }

    /// The message that tells a client of version 4 that it is refused, whole, at any moment before
    /// it is acknowledged. `None`: it has not said that it speaks version 4, or knows already.
    pub fn refusal(&self, code: &str, words: &str) -> Option<Vec<u8>> {
        let negotiated = match &self.state {
            State::SendSelection(_, agreement)
            | State::AwaitAnnouncement(agreement)
            | State::SendReady(agreement, _)
            | State::ReceiveDescriptors(agreement, _)
            | State::MapDescriptors(agreement, _)
            | State::MapFiles(agreement, _)
            | State::SendAck(agreement) => agreement.version == ProtocolVersion::V4,
            State::AwaitOpening
            | State::SendExchange
            | State::SendRefusal(..)
            | State::Refused(_)
            | State::Established(_)
            | State::Failed(_) => false,
        };
        negotiated.then(|| refusal_message(code, words))
    }

    fn advance(&mut self, next: impl FnOnce(State) -> State) {
        let state = mem::replace(&mut self.state, State::AwaitOpening);
        self.state = next(state);
    }
}

/// An answer as a whole message.
fn answer(response: NegotiationResponse) -> Vec<u8> {
    let message = Message::Negotiation(response.encode().into());
    let mut bytes = Vec::new();
    message.encode(ProtocolVersion::V4.message_byte(), &mut bytes).expect("an answer is short");
    bytes
}

/// The answer to a client of version 4 that is refused.
pub fn refusal_message(code: &str, words: &str) -> Vec<u8> {
    answer(NegotiationResponse::refusal(code, words))
}

fn unexpected(state: &State, message: &Message) -> HandshakeError {
    HandshakeError::Unexpected { got: message.message_type().name(), expected: state.due() }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{every_message, paths};
    use super::*;

    const ALL: ServerCapabilities = ServerCapabilities {
        highest: ProtocolVersion::V4,
        has_descriptors: true,
        owned_free_lists: true,
        min_polling_interval: Wakeup::SHORTEST_INTERVAL,
        shard: None,
    };

    fn fresh() -> ServerHandshake {
        ServerHandshake::new(ALL)
    }

    fn request(features: Features) -> Message {
        Message::Negotiation(NegotiationRequest::offering(features).encode().into())
    }

    fn receive(
        server: &mut ServerHandshake,
        version: u8,
        message: &Message,
    ) -> Result<(), HandshakeError> {
        let kind = message.message_type();
        // The length is of no interest to a handshake.
        server.receive(&Header { length: 8, version, message: kind }, message)
    }

    /// What the next step is about, without the data.
    fn step(server: &ServerHandshake) -> String {
        match server.step() {
            ServerStep::Send(bytes) => format!("send type {} version {}", bytes[7], bytes[6]),
            ServerStep::AwaitMessage(_) => "await".into(),
            ServerStep::MapFiles(_, p) => format!("map files {}", *p == paths()),
            ServerStep::MapDescriptors(_, p) => format!("map descriptors {}", *p == paths()),
            ServerStep::Established(agreement) => format!("Established({:?})", agreement.version),
            other => format!("{other:?}"),
        }
    }

    /// The versions and types of the messages that are allowed in a state.
    type Allowed = Vec<(u8, MessageType)>;

    /// A server in every state, by name.
    fn in_every_state() -> Vec<(String, ServerHandshake, Allowed)> {
        use MessageType::{
            ExchangeMetadata, Negotiation, ShareMemoryByFilePath, ShareMemoryByMemfd,
        };
        let mut all = Vec::new();
        let mut note = |server: &ServerHandshake, allowed: Allowed| {
            all.push((step(server), server.clone(), allowed));
        };
        let file = Message::ShareMemoryByFilePath(paths());

        let mut v2 = fresh();
        let mut openings = vec![(2, ShareMemoryByFilePath)];
        openings.extend((3..=255).map(|version| (version, ExchangeMetadata)));
        openings.push((0, Negotiation));
        note(&v2, openings);
        receive(&mut v2, 2, &file).unwrap();
        note(&v2, vec![]);
        v2.mapped();
        note(&v2, vec![]);

        let mut v3 = fresh();
        receive(&mut v3, 3, &Message::ExchangeMetadata).unwrap();
        note(&v3, vec![]);
        v3.sent();
        note(&v3, vec![(3, ShareMemoryByFilePath), (3, ShareMemoryByMemfd)]);

        let mut by_file = v3.clone();
        receive(&mut by_file, 3, &file).unwrap();
        note(&by_file, vec![]);
        by_file.mapped();
        note(&by_file, vec![]);
        by_file.sent();
        note(&by_file, vec![]);

        receive(&mut v3, 3, &Message::ShareMemoryByMemfd(paths())).unwrap();
        note(&v3, vec![]);
        v3.sent();
        note(&v3, vec![]);
        v3.descriptors_received();
        note(&v3, vec![]);
        v3.mapped();
        note(&v3, vec![]);
        v3.sent();
        note(&v3, vec![]);

        let mut v4 = fresh();
        receive(&mut v4, 0, &request(Features::default())).unwrap();
        note(&v4, vec![]);
        v4.sent();
        note(&v4, vec![(0, ShareMemoryByFilePath), (0, ShareMemoryByMemfd)]);
        let mut by_file = v4.clone();
        receive(&mut by_file, 0, &file).unwrap();
        note(&by_file, vec![]);
        by_file.mapped();
        note(&by_file, vec![]);
        by_file.sent();
        note(&by_file, vec![]);
        receive(&mut v4, 0, &Message::ShareMemoryByMemfd(paths())).unwrap();
        note(&v4, vec![]);

        let mut refused = fresh();
        receive(&mut refused, 0, &Message::Negotiation("[]".into())).unwrap();
        note(&refused, vec![]);

        let names: Vec<_> = all.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "await",
                "map files true",
                "Established(V2)",
                "send type 4 version 3",
                "await",
                "map files true",
                "send type 6 version 3",
                "Established(V3)",
                "send type 7 version 3",
                "ReceiveDescriptors(2)",
                "map descriptors true",
                "send type 6 version 3",
                "Established(V3)",
                "send type 10 version 0",
                "await",
                "map files true",
                "send type 6 version 0",
                "Established(V4)",
                "send type 7 version 0",
                "send type 10 version 0",
            ]
        );
        all
    }

    #[test]
    fn a_client_of_version_4_can_be_refused_until_it_is_acknowledged() {
        for (name, server, _) in in_every_state() {
            let speaks_version_4 = match &server.state {
                State::SendSelection(..) => true,
                State::AwaitAnnouncement(agreement)
                | State::SendReady(agreement, _)
                | State::ReceiveDescriptors(agreement, _)
                | State::MapDescriptors(agreement, _)
                | State::MapFiles(agreement, _)
                | State::SendAck(agreement) => agreement.version == ProtocolVersion::V4,
                _ => false,
            };
            let refusal = server.refusal("FULL", "words");
            assert_eq!(refusal.is_some(), speaks_version_4, "{name}");
            let Some(bytes) = refusal else { continue };
            let header = Header::decode(bytes.first_chunk().unwrap()).unwrap();
            assert_eq!((header.version, header.message), (0, MessageType::Negotiation));
            let response =
                NegotiationResponse::decode(&bytes[HEADER_LEN..], Features::default()).unwrap();
            assert_eq!(response, NegotiationResponse::refusal("FULL", "words"));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn every_deviation_is_an_error_and_the_end() {
        let mut refused = 0;
        for (name, server, allowed) in in_every_state() {
            for (header, message) in every_message() {
                let mut server = server.clone();
                let got = server.receive(&header, &message);
                let due = allowed.contains(&(header.version, header.message));
                assert_eq!(got.is_ok(), due, "{name}: {header:?} gave {got:?}");
                let Err(error) = got else { continue };
                refused += 1;
                // Not even the whole rest of an honest handshake brings it back.
                for (header, message) in every_message() {
                    server.sent();
                    server.descriptors_received();
                    server.mapped();
                    assert_eq!(server.receive(&header, &message), Err(error.clone()));
                    assert_eq!(server.step(), ServerStep::AwaitMessage(NOTHING_AFTER_FAILURE));
                }
            }
        }
        // 20 states, 283 messages each; allowed are 255 openings and 4 announcements.
        assert_eq!(refused, 20 * 283 - 255 - 4);
    }

    #[test]
    fn errors_tell_what_was_wrong() {
        let file = Message::ShareMemoryByFilePath(paths());
        let memfd = Message::ShareMemoryByMemfd(paths());
        let error = |server: &ServerHandshake, version, message| {
            receive(&mut server.clone(), version, message).unwrap_err()
        };
        let mut server = fresh();
        let expected = "ExchangeMetadata, Negotiation, or ShareMemoryByFilePath of version 2";
        assert_eq!(
            error(&server, 2, &Message::ExchangeMetadata),
            HandshakeError::NoCommonVersion { peer: 2, needed: 3 }
        );
        assert_eq!(
            error(&server, 3, &file),
            HandshakeError::Unexpected { got: "ShareMemoryByFilePath", expected }
        );
        assert_eq!(
            error(&server, 2, &memfd),
            HandshakeError::Unexpected { got: "ShareMemoryByMemfd", expected }
        );
        receive(&mut server, 4, &Message::ExchangeMetadata).unwrap();
        assert_eq!(
            error(&server, 3, &memfd),
            HandshakeError::Unexpected { got: "ShareMemoryByMemfd", expected: NOT_YET }
        );
        server.sent();
        assert_eq!(
            error(&server, 2, &file),
            HandshakeError::VersionChanged { message: "ShareMemoryByFilePath", got: 2, agreed: 3 }
        );
        receive(&mut server, 3, &file).unwrap();
        server.mapped();
        server.sent();
        assert_eq!(
            error(&server, 3, &Message::SyncEvent),
            HandshakeError::Unexpected { got: "SyncEvent", expected: NOTHING_MORE }
        );
    }

    #[test]
    fn only_the_report_that_is_due_has_an_effect() {
        for (name, server, _) in in_every_state() {
            let moves = |report: fn(&mut ServerHandshake)| {
                let mut after = server.clone();
                report(&mut after);
                after.state != server.state
            };
            let got = (
                moves(ServerHandshake::sent),
                moves(ServerHandshake::descriptors_received),
                moves(ServerHandshake::mapped),
            );
            let expected = (
                matches!(server.step(), ServerStep::Send(_)),
                matches!(server.step(), ServerStep::ReceiveDescriptors(_)),
                matches!(server.step(), ServerStep::MapFiles(..) | ServerStep::MapDescriptors(..)),
            );
            assert_eq!(got, expected, "{name}");
        }
    }

    /// What a server with these abilities says to a request, and agrees on.
    fn negotiate(
        abilities: ServerCapabilities,
        request: &Message,
    ) -> (NegotiationResponse, ServerHandshake) {
        let mut server = ServerHandshake::new(abilities);
        receive(&mut server, 0, request).unwrap();
        let ServerStep::Send(bytes) = server.step() else { panic!("{server:?}") };
        let header = Header::decode(bytes.first_chunk().unwrap()).unwrap();
        assert_eq!((header.version, header.message), (0, MessageType::Negotiation));
        assert_eq!(header.length as usize, bytes.len());
        let response = NegotiationResponse::decode(&bytes[HEADER_LEN..], Features::default());
        server.sent();
        (response.unwrap(), server)
    }

    #[test]
    fn what_is_offered_is_selected_if_this_side_has_it() {
        let polling = |micros| Some(Duration::from_micros(micros));
        let all = Features { polling: polling(70), eventfd: true, owned_free_lists: true };
        let two = Features { polling: None, ..all };
        let none = Features::default();
        let shard = Some(ShardIdentity { index: 1, count: 2 });
        let table = [
            (ALL, none, none, Wakeup::Socket),
            (ALL, two, two, Wakeup::EventFd),
            // Of two kinds of wake-up the first.
            (ALL, all, Features { eventfd: false, ..all }, Wakeup::Polling(all.polling.unwrap())),
            (
                ALL,
                Features { polling: polling(1), ..none },
                Features { polling: polling(50), ..none },
                Wakeup::Polling(Duration::from_micros(50)),
            ),
            (
                ALL,
                Features { polling: polling(u64::MAX), ..none },
                Features { polling: polling(1_000_000), ..none },
                Wakeup::Polling(Duration::from_secs(1)),
            ),
            (
                ServerCapabilities { min_polling_interval: Duration::from_millis(5), ..ALL },
                all,
                Features { polling: polling(5000), eventfd: false, ..all },
                Wakeup::Polling(Duration::from_millis(5)),
            ),
            (
                ServerCapabilities { has_descriptors: false, ..ALL },
                two,
                Features { eventfd: false, ..two },
                Wakeup::Socket,
            ),
            (
                ServerCapabilities { owned_free_lists: false, ..ALL },
                two,
                Features { owned_free_lists: false, ..two },
                Wakeup::EventFd,
            ),
        ];
        for (abilities, offered, selected, wakeup) in table {
            let abilities = ServerCapabilities { shard, ..abilities };
            let (response, mut server) = negotiate(abilities, &request(offered));
            assert_eq!(response, NegotiationResponse::selecting(selected, shard));
            receive(&mut server, 0, &Message::ShareMemoryByMemfd(paths())).unwrap();
            server.sent();
            let descriptors = if wakeup == Wakeup::EventFd { 4 } else { 2 };
            assert_eq!(server.step(), ServerStep::ReceiveDescriptors(descriptors));
            server.descriptors_received();
            server.mapped();
            server.sent();
            let owned_free_lists = selected.owned_free_lists;
            let version = ProtocolVersion::V4;
            let agreement = Negotiated { version, wakeup, owned_free_lists, shard };
            assert_eq!(server.step(), ServerStep::Established(&agreement));
        }
    }

    #[test]
    fn eventfds_come_with_memfds_only() {
        let eventfd = Features { eventfd: true, ..Features::default() };
        let (_, mut server) = negotiate(ALL, &request(eventfd));
        let file = Message::ShareMemoryByFilePath(paths());
        let error = receive(&mut server, 0, &file).unwrap_err();
        let expected = "ShareMemoryByMemfd, since eventfds are to come";
        let got = "ShareMemoryByFilePath";
        assert_eq!(error, HandshakeError::Unexpected { got, expected });
    }

    #[test]
    fn who_is_refused_is_told_why() {
        let none = NegotiationRequest { offers_version_4: false, features: Features::default() };
        for (json, code) in [
            (none.encode(), VERSION_NOT_SUPPORTED),
            (b"{".to_vec(), JSON_PARSE_ERROR),
            (b"{\"supports_protocols\":[4]}".to_vec(), JSON_PARSE_ERROR),
            (b"[[[[[[[[[[[[[[[[[[[[".to_vec(), JSON_PARSE_ERROR),
        ] {
            let (response, server) = negotiate(ALL, &Message::Negotiation(json.into()));
            assert!(
                matches!(&response, NegotiationResponse::Refused { code: c, .. } if c == code),
                "{response:?}"
            );
            let ServerStep::Refused(error) = server.step() else { panic!("{server:?}") };
            let is_named = match code {
                VERSION_NOT_SUPPORTED => *error == HandshakeError::Version4NotOffered,
                _ => matches!(error, HandshakeError::Negotiation(_)),
            };
            assert!(is_named, "{error:?}");
        }
    }

    #[test]
    fn a_server_of_an_older_version_does_not_know_the_newer_ones() {
        let of = |highest| ServerHandshake::new(ServerCapabilities { highest, ..ALL });
        let v3 = of(ProtocolVersion::V3);
        let opening = request(Features::default());
        assert_eq!(
            receive(&mut v3.clone(), 0, &opening),
            Err(HandshakeError::NoCommonVersion { peer: 4, needed: 3 })
        );
        receive(&mut v3.clone(), 3, &Message::ExchangeMetadata).unwrap();
        let mut v2 = of(ProtocolVersion::V2);
        assert_eq!(
            receive(&mut v2.clone(), 3, &Message::ExchangeMetadata),
            Err(HandshakeError::NoCommonVersion { peer: 3, needed: 2 })
        );
        receive(&mut v2, 2, &Message::ShareMemoryByFilePath(paths())).unwrap();
    }
}
