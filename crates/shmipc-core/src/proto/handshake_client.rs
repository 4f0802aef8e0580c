// SPDX-License-Identifier: MIT OR Apache-2.0
//! The client's side of the handshakes of versions 2 to 4 (spec chapter 4;
//! `docs/protocol.md#handshakes`).
//!
//! Invariants: see the parent module. The client opens with version 2 or 3, never more, since a
//! shmipc-go server does not answer any other opening; or with version 4's own message, which older
//! servers do not answer either, and then [falls back](ClientHandshake::may_fall_back). Both
//! memories are created and initialised before they are announced, and in versions 2 and 3 before
//! anything is said.
//!
//! Trust: none in the server's messages.

use super::{NOT_YET, NOTHING_AFTER_FAILURE, NOTHING_MORE, Negotiated, require_version};
use crate::error::{ConfigError, Error, HandshakeError};
use crate::wire::{
    Features, HEADER_LEN, Header, MemoryKind, MemoryPaths, Message, MessageType,
    NegotiationRequest, NegotiationResponse, ProtocolVersion,
};

/// The client's opening in version 3.
const EXCHANGE: [u8; HEADER_LEN] =
    Header::bare(ProtocolVersion::V3.as_u8(), MessageType::ExchangeMetadata).encode();

/// Where a message has its version byte.
const VERSION_AT: usize = 6;

/// What the driver has to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum ClientStep<'a> {
    /// Create and initialise both memories as agreed, then call
    /// [`ClientHandshake::memory_created`].
    CreateMemory(&'a Negotiated),
    /// Send these bytes, then call [`ClientHandshake::sent`].
    Send(&'a [u8]),
    /// Send one byte with the descriptors, buffer first, behind both memories those of the eventfds
    /// if they were agreed on, then call [`ClientHandshake::sent`].
    SendDescriptors,
    /// Receive a message for [`ClientHandshake::receive`]; what is due, in words.
    AwaitMessage(&'static str),
    /// Done: the session is one of this kind.
    Established(&'a Negotiated),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    SendNegotiation,
    AwaitNegotiation,
    CreateMemory(Negotiated),
    SendExchange,
    AwaitExchange,
    SendAnnouncement(Negotiated),
    AwaitReady(Negotiated),
    SendDescriptors(Negotiated),
    AwaitAck(Negotiated),
    Established(Negotiated),
    Failed(HandshakeError),
}

impl State {
    /// Which message is due, in words.
    fn due(&self) -> &'static str {
        match self {
            Self::AwaitNegotiation => "Negotiation",
            Self::AwaitExchange => "ExchangeMetadata",
            Self::AwaitReady(_) => "AckReadyRecvFd",
            Self::AwaitAck(_) => "AckShareMemory",
            Self::SendNegotiation
            | Self::CreateMemory(_)
            | Self::SendExchange
            | Self::SendAnnouncement(_)
            | Self::SendDescriptors(_) => NOT_YET,
            Self::Established(_) => NOTHING_MORE,
            Self::Failed(_) => NOTHING_AFTER_FAILURE,
        }
    }
}

/// A handshake, seen from the client.
#[derive(Debug, Clone)]
pub struct ClientHandshake {
    state: State,
    kind: MemoryKind,
    /// What is offered in version 4, and the message that does it, whole.
    features: Features,
    negotiation: Vec<u8>,
    /// The message that names both memories, whole.
    announcement: Vec<u8>,
}

impl ClientHandshake {
    /// A handshake that opens with `version` and offers the memories at `paths`, and in version 4
    /// these features.
    ///
    /// # Errors
    /// [`ConfigError::MemfdNeedsVersion3`], [`ConfigError::EventFdNeedsMemfd`], and
    /// [`ConfigError::PathPrefix`] for a path that no message can carry.
    pub fn new(
        version: ProtocolVersion,
        kind: MemoryKind,
        features: Features,
        paths: MemoryPaths,
    ) -> Result<Self, Error> {
        let state = match (version, kind) {
            (ProtocolVersion::V2, MemoryKind::Memfd) => {
                return Err(ConfigError::MemfdNeedsVersion3.into());
            }
            (ProtocolVersion::V4, MemoryKind::File) if features.eventfd => {
                return Err(ConfigError::EventFdNeedsMemfd.into());
            }
            (ProtocolVersion::V4, _) => State::SendNegotiation,
            _ => State::CreateMemory(Negotiated::plain(version)),
        };
        if let Some(path) = paths.misfit() {
            return Err(ConfigError::PathPrefix(path.to_owned()).into());
        }
        let message = match kind {
            MemoryKind::File => Message::ShareMemoryByFilePath(paths),
            MemoryKind::Memfd => Message::ShareMemoryByMemfd(paths),
        };
        let mut announcement = Vec::new();
        message.encode(version.message_byte(), &mut announcement)?;
        let mut negotiation = Vec::new();
        if version == ProtocolVersion::V4 {
            let json = NegotiationRequest::offering(features).encode();
            let message = Message::Negotiation(json.into());
            message.encode(version.message_byte(), &mut negotiation)?;
        }
        Ok(Self { state, kind, features, negotiation, announcement })
    }

    /// What the driver has to do next.
    pub fn step(&self) -> ClientStep<'_> {
        match &self.state {
            State::SendNegotiation => ClientStep::Send(&self.negotiation),
            State::CreateMemory(agreement) => ClientStep::CreateMemory(agreement),
            State::SendExchange => ClientStep::Send(&EXCHANGE),
            State::SendAnnouncement(_) => ClientStep::Send(&self.announcement),
            State::SendDescriptors(_) => ClientStep::SendDescriptors,
            State::Established(agreement) => ClientStep::Established(agreement),
            state @ (State::AwaitNegotiation
            | State::AwaitExchange
            | State::AwaitReady(_)
            | State::AwaitAck(_)
            | State::Failed(_)) => ClientStep::AwaitMessage(state.due()),
        }
    }

    /// Whether a server that closes the connection now, or stays silent, is one that does not know
    /// version 4, as far as can be told.
    pub fn may_fall_back(&self) -> bool {
        matches!(self.state, State::SendNegotiation | State::AwaitNegotiation)
    }

    /// Both memories are there.
    ///
    /// Without effect when none were to be created.
    pub fn memory_created(&mut self) {
        if let State::CreateMemory(agreement) = self.state {
            self.state = match agreement.version {
                ProtocolVersion::V3 => State::SendExchange,
                ProtocolVersion::V2 | ProtocolVersion::V4 => State::SendAnnouncement(agreement),
            };
        }
    }

    /// The bytes, or the descriptors, of the last [`step`](Self::step) are sent, all of them.
    ///
    /// Without effect when nothing was to be sent.
    pub fn sent(&mut self) {
        self.state = match (&self.state, self.kind) {
            (State::SendNegotiation, _) => State::AwaitNegotiation,
            (State::SendExchange, _) => State::AwaitExchange,
            (&State::SendAnnouncement(agreement), _)
                if agreement.version == ProtocolVersion::V2 =>
            {
                State::Established(agreement)
            }
            (&State::SendAnnouncement(agreement), MemoryKind::File) => State::AwaitAck(agreement),
            (&State::SendAnnouncement(agreement), MemoryKind::Memfd) => {
                State::AwaitReady(agreement)
            }
            (&State::SendDescriptors(agreement), _) => State::AwaitAck(agreement),
            _ => return,
        };
    }

    /// A message came.
    ///
    /// # Errors
    /// It is not the one that was due. The handshake has failed then, and stays so.
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
    fn after(&mut self, version: u8, message: &Message) -> Result<State, HandshakeError> {
        match (&self.state, message) {
            (State::AwaitNegotiation, Message::Negotiation(json)) => {
                self.selected(json).map(State::CreateMemory)
            }
            // A server of this crate says so also when it finds out later that it will not have
            // the session, in place of what is due.
            (
                State::SendAnnouncement(agreement)
                | State::AwaitReady(agreement)
                | State::SendDescriptors(agreement)
                | State::AwaitAck(agreement),
                Message::Negotiation(json),
            ) if agreement.version == ProtocolVersion::V4 && self.is_refusal(json) => {
                self.selected(json).map(State::CreateMemory)
            }
            (State::AwaitExchange, Message::ExchangeMetadata) => {
                let version = self.agree(version)?;
                Ok(State::SendAnnouncement(Negotiated::plain(version)))
            }
            (&State::AwaitReady(agreement), Message::AckReadyRecvFd) => {
                require_version(agreement.version, version, message)?;
                Ok(State::SendDescriptors(agreement))
            }
            (&State::AwaitAck(agreement), Message::AckShareMemory) => {
                require_version(agreement.version, version, message)?;
                Ok(State::Established(agreement))
            }
            (State::Failed(error), _) => Err(error.clone()),
            (state, _) => Err(HandshakeError::Unexpected {
                got: message.message_type().name(),
                expected: state.due(),
            }),
        }
    }

    fn is_refusal(&self, json: &[u8]) -> bool {
        let response = NegotiationResponse::decode(json, self.features);
        matches!(response, Ok(NegotiationResponse::Refused { .. }))
    }

    /// What the server selected, if it was offered.
    fn selected(&self, json: &[u8]) -> Result<Negotiated, HandshakeError> {
        let response = NegotiationResponse::decode(json, self.features);
        match response.map_err(HandshakeError::Negotiation)? {
            NegotiationResponse::Refused { code, message } => {
                Err(HandshakeError::Refused { code, message })
            }
            NegotiationResponse::Selected { protocol, features, shard } => {
                if protocol != u64::from(ProtocolVersion::V4.as_u8()) {
                    return Err(HandshakeError::VersionNotOffered(protocol));
                }
                if let Some(feature) = features.beyond(self.features) {
                    return Err(HandshakeError::NotOffered(feature));
                }
                // Not more often than this side has asked for, whatever the server does itself.
                let polling = features.polling.max(features.polling.and(self.features.polling));
                let features = Features { polling, ..features };
                Ok(Negotiated::by_features(features, shard))
            }
        }
    }

    /// The version that both sides speak, given the server's highest.
    fn agree(&mut self, peer: u8) -> Result<ProtocolVersion, HandshakeError> {
        let (v2, v3) = (ProtocolVersion::V2, ProtocolVersion::V3);
        match self.kind {
            _ if peer >= v3.as_u8() => Ok(v3),
            MemoryKind::File if peer == v2.as_u8() => {
                // The two versions name the files alike; only the header says which one it is.
                if let Some(byte) = self.announcement.get_mut(VERSION_AT) {
                    *byte = peer;
                }
                Ok(v2)
            }
            MemoryKind::File => Err(HandshakeError::NoCommonVersion { peer, needed: v2.as_u8() }),
            MemoryKind::Memfd => Err(HandshakeError::NoCommonVersion { peer, needed: v3.as_u8() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{every_message, paths};
    use super::*;
    use crate::config::Wakeup;
    use crate::wire::ShardIdentity;

    const FILE_V2: [u8; 7] = [0, 0, 0, 32, 0x77, 0x58, 2];

    /// A client that offers no features, and has created its memory if that comes first.
    fn client(version: ProtocolVersion, kind: MemoryKind) -> ClientHandshake {
        let none = Features::default();
        let mut client = ClientHandshake::new(version, kind, none, paths()).unwrap();
        client.memory_created();
        client
    }

    fn answer(response: &NegotiationResponse) -> Message {
        Message::Negotiation(response.encode().into())
    }

    fn receive(
        client: &mut ClientHandshake,
        version: u8,
        message: &Message,
    ) -> Result<(), HandshakeError> {
        let kind = message.message_type();
        // The length is of no interest to a handshake.
        client.receive(&Header { length: 8, version, message: kind }, message)
    }

    /// What the next step is about, without the data.
    fn step(client: &ClientHandshake) -> String {
        match client.step() {
            ClientStep::Send(bytes) => format!("send type {} version {}", bytes[7], bytes[6]),
            ClientStep::CreateMemory(agreement) => format!("create for {:?}", agreement.version),
            ClientStep::Established(agreement) => format!("Established({:?})", agreement.version),
            other => format!("{other:?}"),
        }
    }

    /// The versions and types of the messages that are allowed in a state.
    type Allowed = Vec<(u8, MessageType)>;

    /// A client in every state, by name.
    fn in_every_state() -> Vec<(String, ClientHandshake, Allowed)> {
        use MessageType::{AckReadyRecvFd, AckShareMemory, ExchangeMetadata, Negotiation};
        let v3_or_more = |low: u8| (low..=255).map(|v| (v, ExchangeMetadata)).collect::<Vec<_>>();
        let mut all = Vec::new();
        let mut note = |client: &ClientHandshake, allowed: Allowed| {
            let name = format!("{:?} {}", client.kind, step(client));
            all.push((name, client.clone(), allowed));
        };

        let mut v2 = client(ProtocolVersion::V2, MemoryKind::File);
        note(&v2, vec![]);
        v2.sent();
        note(&v2, vec![]);

        let mut file = client(ProtocolVersion::V3, MemoryKind::File);
        note(&file, vec![]);
        file.sent();
        note(&file, v3_or_more(2));
        let mut down = file.clone();
        receive(&mut down, 2, &Message::ExchangeMetadata).unwrap();
        note(&down, vec![]);
        receive(&mut file, 3, &Message::ExchangeMetadata).unwrap();
        note(&file, vec![]);
        file.sent();
        note(&file, vec![(3, AckShareMemory)]);
        receive(&mut file, 3, &Message::AckShareMemory).unwrap();
        note(&file, vec![]);

        let mut memfd = client(ProtocolVersion::V3, MemoryKind::Memfd);
        note(&memfd, vec![]);
        memfd.sent();
        note(&memfd, v3_or_more(3));
        receive(&mut memfd, 3, &Message::ExchangeMetadata).unwrap();
        note(&memfd, vec![]);
        memfd.sent();
        note(&memfd, vec![(3, AckReadyRecvFd)]);
        receive(&mut memfd, 3, &Message::AckReadyRecvFd).unwrap();
        note(&memfd, vec![]);
        memfd.sent();
        note(&memfd, vec![(3, AckShareMemory)]);
        receive(&mut memfd, 3, &Message::AckShareMemory).unwrap();
        note(&memfd, vec![]);

        let none = Features::default();
        let fresh = ClientHandshake::new(ProtocolVersion::V3, MemoryKind::File, none, paths());
        note(&fresh.unwrap(), vec![]);
        let mut v4 = client(ProtocolVersion::V4, MemoryKind::File);
        note(&v4, vec![]);
        v4.sent();
        note(&v4, vec![(0, Negotiation)]);
        let selected = answer(&NegotiationResponse::selecting(none, None));
        receive(&mut v4, 0, &selected).unwrap();
        note(&v4, vec![]);
        v4.memory_created();
        note(&v4, vec![]);
        v4.sent();
        note(&v4, vec![(0, AckShareMemory)]);
        receive(&mut v4, 0, &Message::AckShareMemory).unwrap();
        note(&v4, vec![]);

        let names: Vec<_> = all.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "File send type 0 version 2",
                "File Established(V2)",
                "File send type 4 version 3",
                "File AwaitMessage(\"ExchangeMetadata\")",
                "File send type 0 version 2",
                "File send type 0 version 3",
                "File AwaitMessage(\"AckShareMemory\")",
                "File Established(V3)",
                "Memfd send type 4 version 3",
                "Memfd AwaitMessage(\"ExchangeMetadata\")",
                "Memfd send type 5 version 3",
                "Memfd AwaitMessage(\"AckReadyRecvFd\")",
                "Memfd SendDescriptors",
                "Memfd AwaitMessage(\"AckShareMemory\")",
                "Memfd Established(V3)",
                "File create for V3",
                "File send type 10 version 0",
                "File AwaitMessage(\"Negotiation\")",
                "File create for V4",
                "File send type 0 version 0",
                "File AwaitMessage(\"AckShareMemory\")",
                "File Established(V4)",
            ]
        );
        all
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn every_deviation_is_an_error_and_the_end() {
        let mut refused = 0;
        for (name, client, allowed) in in_every_state() {
            for (header, message) in every_message() {
                let mut client = client.clone();
                let got = client.receive(&header, &message);
                let due = allowed.contains(&(header.version, header.message));
                assert_eq!(got.is_ok(), due, "{name}: {header:?} gave {got:?}");
                let Err(error) = got else { continue };
                refused += 1;
                // Not even the whole rest of an honest handshake brings it back.
                for (header, message) in every_message() {
                    client.sent();
                    client.memory_created();
                    assert_eq!(client.receive(&header, &message), Err(error.clone()));
                    assert_eq!(client.step(), ClientStep::AwaitMessage(NOTHING_AFTER_FAILURE));
                }
            }
        }
        // 22 states, 283 messages each; allowed are 254 + 253 announcements and 5 others.
        assert_eq!(refused, 22 * 283 - 254 - 253 - 5);
    }

    #[test]
    fn errors_tell_what_was_wrong() {
        let error = |client: &mut ClientHandshake, version, message| {
            receive(client, version, &message).unwrap_err()
        };
        let mut fresh = client(ProtocolVersion::V3, MemoryKind::Memfd);
        assert_eq!(
            error(&mut fresh, 3, Message::AckShareMemory),
            HandshakeError::Unexpected { got: "AckShareMemory", expected: NOT_YET }
        );
        let mut opened = client(ProtocolVersion::V3, MemoryKind::Memfd);
        opened.sent();
        assert_eq!(
            error(&mut opened.clone(), 2, Message::ExchangeMetadata),
            HandshakeError::NoCommonVersion { peer: 2, needed: 3 }
        );
        assert_eq!(
            error(&mut opened.clone(), 3, Message::AckReadyRecvFd),
            HandshakeError::Unexpected { got: "AckReadyRecvFd", expected: "ExchangeMetadata" }
        );
        receive(&mut opened, 3, &Message::ExchangeMetadata).unwrap();
        opened.sent();
        assert_eq!(
            error(&mut opened, 2, Message::AckReadyRecvFd),
            HandshakeError::VersionChanged { message: "AckReadyRecvFd", got: 2, agreed: 3 }
        );
        let mut file = client(ProtocolVersion::V3, MemoryKind::File);
        file.sent();
        assert_eq!(
            error(&mut file, 1, Message::ExchangeMetadata),
            HandshakeError::NoCommonVersion { peer: 1, needed: 2 }
        );
        let mut done = client(ProtocolVersion::V2, MemoryKind::File);
        done.sent();
        assert_eq!(
            error(&mut done, 2, Message::AckShareMemory),
            HandshakeError::Unexpected { got: "AckShareMemory", expected: NOTHING_MORE }
        );
    }

    #[test]
    fn with_files_a_server_of_version_2_is_met_half_way() {
        let mut client = client(ProtocolVersion::V3, MemoryKind::File);
        client.sent();
        receive(&mut client, 2, &Message::ExchangeMetadata).unwrap();
        let ClientStep::Send(bytes) = client.step() else { panic!("nothing to send") };
        assert_eq!(bytes[..7], FILE_V2);
        let payload = bytes::Bytes::copy_from_slice(&bytes[8..]);
        let header = Header::decode(bytes.first_chunk().unwrap()).unwrap();
        let message = Message::decode(&header, payload);
        assert_eq!(message, Ok(Message::ShareMemoryByFilePath(paths())));
        client.sent();
        assert_eq!(client.step(), ClientStep::Established(&Negotiated::plain(ProtocolVersion::V2)));
    }

    #[test]
    fn sent_without_anything_to_send_changes_nothing() {
        for (name, mut client, _) in in_every_state() {
            let before = client.state.clone();
            let sends = matches!(client.step(), ClientStep::Send(_) | ClientStep::SendDescriptors);
            let creates = matches!(client.step(), ClientStep::CreateMemory(_));
            let mut after = client.clone();
            after.memory_created();
            assert_eq!(after.state != before, creates, "{name}");
            client.sent();
            assert_eq!(client.state != before, sends, "{name}");
        }
    }

    #[test]
    fn what_is_agreed_on_is_what_the_server_selected() {
        let millisecond = Some(std::time::Duration::from_millis(1));
        let all = Features { polling: millisecond, eventfd: true, owned_free_lists: true };
        let agreed = |offered, response: &NegotiationResponse| {
            let (version, kind) = (ProtocolVersion::V4, MemoryKind::Memfd);
            let mut client = ClientHandshake::new(version, kind, offered, paths()).unwrap();
            client.sent();
            receive(&mut client, 0, &answer(response))?;
            let ClientStep::CreateMemory(&agreement) = client.step() else { panic!("{client:?}") };
            client.memory_created();
            client.sent();
            receive(&mut client, 0, &Message::AckReadyRecvFd)?;
            client.sent();
            receive(&mut client, 0, &Message::AckShareMemory)?;
            assert_eq!(client.step(), ClientStep::Established(&agreement));
            assert_eq!(agreement.version, version);
            Ok((agreement.wakeup, agreement.owned_free_lists, agreement.shard))
        };
        let shard = Some(ShardIdentity { index: 1, count: 2 });
        let none = Features::default();
        let select = NegotiationResponse::selecting;
        assert_eq!(agreed(all, &select(none, shard)), Ok((Wakeup::Socket, false, shard)));
        let eventfd = Features { eventfd: true, ..none };
        assert_eq!(agreed(all, &select(eventfd, None)), Ok((Wakeup::EventFd, false, None)));
        let lists = Features { owned_free_lists: true, ..none };
        assert_eq!(agreed(all, &select(lists, None)), Ok((Wakeup::Socket, true, None)));
        // Polling goes before eventfd, and at the server's interval, but not more often than this
        // side has asked for, nor as seldom as never.
        for (granted, kept) in [(1070, 1070), (70, 1000), (1, 1000), (u64::MAX, 1_000_000)] {
            let polling = Some(std::time::Duration::from_micros(granted));
            let response = select(Features { polling, ..all }, None);
            let kept = Wakeup::Polling(std::time::Duration::from_micros(kept));
            assert_eq!(agreed(all, &response), Ok((kept, true, None)));
        }
        for (features, name) in [
            (eventfd, "eventfd_wakeup"),
            (lists, "single_popper_lists"),
            (Features { polling: millisecond, ..none }, "event_queue_polling"),
        ] {
            let refused = agreed(none, &select(features, None));
            assert_eq!(refused, Err(HandshakeError::NotOffered(name)));
        }
        let old = NegotiationResponse::Selected { protocol: 3, features: none, shard: None };
        assert_eq!(agreed(none, &old), Err(HandshakeError::VersionNotOffered(3)));
        let refusal = NegotiationResponse::refusal("CODE", "words");
        assert_eq!(
            agreed(none, &refusal),
            Err(HandshakeError::Refused { code: "CODE".into(), message: "words".into() })
        );
    }

    #[test]
    fn a_refusal_may_come_in_place_of_anything_that_is_due() {
        let none = Features::default();
        let refusal = answer(&NegotiationResponse::refusal("FULL", "words"));
        let selection = answer(&NegotiationResponse::selecting(none, None));
        for kind in [MemoryKind::File, MemoryKind::Memfd] {
            let mut client = client(ProtocolVersion::V4, kind);
            client.sent();
            receive(&mut client, 0, &selection).unwrap();
            client.memory_created();
            for _ in 0..4 {
                let mut refused = client.clone();
                let error = receive(&mut refused, 0, &refusal).unwrap_err();
                let (code, message) = ("FULL".into(), "words".into());
                assert_eq!(error, HandshakeError::Refused { code, message }, "{client:?}");
                assert!(!refused.may_fall_back());
                // A second answer is none.
                let error = receive(&mut client.clone(), 0, &selection).unwrap_err();
                assert!(matches!(error, HandshakeError::Unexpected { .. }), "{error}");
                client.sent();
                if matches!(client.step(), ClientStep::AwaitMessage("AckReadyRecvFd")) {
                    receive(&mut client.clone(), 0, &refusal).unwrap_err();
                    receive(&mut client, 0, &Message::AckReadyRecvFd).unwrap();
                }
            }
        }
        // Not in other versions.
        let mut older = client(ProtocolVersion::V3, MemoryKind::File);
        older.sent();
        receive(&mut older, 3, &Message::ExchangeMetadata).unwrap();
        older.sent();
        let error = receive(&mut older, 0, &refusal).unwrap_err();
        assert!(matches!(error, HandshakeError::Unexpected { .. }), "{error}");
    }

    #[test]
    fn only_before_an_answer_is_there_a_way_back() {
        for (name, client, _) in in_every_state() {
            let is_unanswered = name.contains("type 10") || name.contains("\"Negotiation\"");
            assert_eq!(client.may_fall_back(), is_unanswered, "{name}");
        }
        let mut refused = client(ProtocolVersion::V4, MemoryKind::File);
        refused.sent();
        receive(&mut refused, 0, &answer(&NegotiationResponse::refusal("", ""))).unwrap_err();
        assert!(!refused.may_fall_back());
        let mut garbled = client(ProtocolVersion::V4, MemoryKind::File);
        garbled.sent();
        let garbage = Message::Negotiation("{}".into());
        let error = receive(&mut garbled, 0, &garbage).unwrap_err();
        assert!(matches!(error, HandshakeError::Negotiation(_)), "{error}");
        assert!(!garbled.may_fall_back());
    }

    #[test]
    fn what_cannot_be_offered_is_refused_at_the_start() {
        let none = Features::default();
        let memfd = ClientHandshake::new(ProtocolVersion::V2, MemoryKind::Memfd, none, paths());
        assert!(matches!(memfd, Err(Error::Config(ConfigError::MemfdNeedsVersion3))));
        let eventfd = Features { eventfd: true, ..none };
        let file = ClientHandshake::new(ProtocolVersion::V4, MemoryKind::File, eventfd, paths());
        assert!(matches!(file, Err(Error::Config(ConfigError::EventFdNeedsMemfd))));
        let long = std::path::PathBuf::from("/".repeat(4096));
        for kind in [MemoryKind::File, MemoryKind::Memfd] {
            for (queue, buffer) in [("/q".into(), long.clone()), (long.clone(), "/b".into())] {
                let paths = MemoryPaths { queue, buffer };
                let refused = ClientHandshake::new(ProtocolVersion::V3, kind, none, paths);
                assert!(matches!(
                    refused,
                    Err(Error::Config(ConfigError::PathPrefix(path))) if path == long
                ));
            }
        }
    }
}
