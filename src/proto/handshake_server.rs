// SPDX-License-Identifier: MIT OR Apache-2.0
//! The server's side of the handshakes of versions 2 and 3 (WIRE chapter 2; spec chapter 4).
//!
//! Invariants: see the parent module. The client's first message decides between the versions, as
//! it does in shmipc-go. An acknowledgement goes out only after both memories are mapped.
//!
//! Trust: none in the client's messages. Paths are passed on as they came; whether they may be
//! opened is for the driver to decide.

use std::mem;

use super::{NOT_YET, NOTHING_AFTER_FAILURE, NOTHING_MORE, require_version};
use crate::error::HandshakeError;
use crate::wire::{HEADER_LEN, Header, MemoryPaths, Message, MessageType, ProtocolVersion};

const VERSION: ProtocolVersion = ProtocolVersion::V3;
/// The three messages that a server of version 3 sends.
const EXCHANGE: [u8; HEADER_LEN] = reply(MessageType::ExchangeMetadata);
const READY: [u8; HEADER_LEN] = reply(MessageType::AckReadyRecvFd);
const ACK: [u8; HEADER_LEN] = reply(MessageType::AckShareMemory);

const fn reply(message: MessageType) -> [u8; HEADER_LEN] {
    Header::bare(VERSION.as_u8(), message).encode()
}

/// What the driver has to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ServerStep<'a> {
    /// Receive a message for [`ServerHandshake::receive`]; what is due, in words.
    AwaitMessage(&'static str),
    /// Send these bytes, then call [`ServerHandshake::sent`].
    Send(&'a [u8]),
    /// Receive one byte with two descriptors, buffer first, then call
    /// [`ServerHandshake::descriptors_received`].
    ReceiveDescriptors,
    /// Open and map the files of these paths, then call [`ServerHandshake::mapped`].
    MapFiles(&'a MemoryPaths),
    /// Map the descriptors received; the paths are only names. Then call
    /// [`ServerHandshake::mapped`].
    MapDescriptors(&'a MemoryPaths),
    /// Done: the session speaks this version.
    Established(ProtocolVersion),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    AwaitOpening,
    SendExchange,
    AwaitAnnouncement,
    SendReady(MemoryPaths),
    ReceiveDescriptors(MemoryPaths),
    MapDescriptors(MemoryPaths),
    MapFiles(ProtocolVersion, MemoryPaths),
    SendAck,
    Established(ProtocolVersion),
    Failed(HandshakeError),
}

impl State {
    /// Which message is due, in words.
    fn due(&self) -> &'static str {
        match self {
            Self::AwaitOpening => "ExchangeMetadata, or ShareMemoryByFilePath of version 2",
            Self::AwaitAnnouncement => "ShareMemoryByFilePath or ShareMemoryByMemfd",
            Self::SendExchange
            | Self::SendReady(_)
            | Self::ReceiveDescriptors(_)
            | Self::MapDescriptors(_)
            | Self::MapFiles(..)
            | Self::SendAck => NOT_YET,
            Self::Established(_) => NOTHING_MORE,
            Self::Failed(_) => NOTHING_AFTER_FAILURE,
        }
    }
}

/// A handshake, seen from the server.
#[derive(Debug, Clone)]
pub(crate) struct ServerHandshake {
    state: State,
}

impl ServerHandshake {
    /// A handshake of which nothing has happened yet.
    pub(crate) fn new() -> Self {
        Self { state: State::AwaitOpening }
    }

    /// What the driver has to do next.
    pub(crate) fn step(&self) -> ServerStep<'_> {
        match &self.state {
            State::SendExchange => ServerStep::Send(&EXCHANGE),
            State::SendReady(_) => ServerStep::Send(&READY),
            State::SendAck => ServerStep::Send(&ACK),
            State::ReceiveDescriptors(_) => ServerStep::ReceiveDescriptors,
            State::MapDescriptors(paths) => ServerStep::MapDescriptors(paths),
            State::MapFiles(_, paths) => ServerStep::MapFiles(paths),
            State::Established(version) => ServerStep::Established(*version),
            state @ (State::AwaitOpening | State::AwaitAnnouncement | State::Failed(_)) => {
                ServerStep::AwaitMessage(state.due())
            }
        }
    }

    /// The bytes of the last [`step`](Self::step) are sent, all of them.
    ///
    /// Without effect when nothing was to be sent.
    pub(crate) fn sent(&mut self) {
        self.advance(|state| match state {
            State::SendExchange => State::AwaitAnnouncement,
            State::SendReady(paths) => State::ReceiveDescriptors(paths),
            State::SendAck => State::Established(VERSION),
            other => other,
        });
    }

    /// The descriptors of both memories are here.
    ///
    /// Without effect when none were due.
    pub(crate) fn descriptors_received(&mut self) {
        self.advance(|state| match state {
            State::ReceiveDescriptors(paths) => State::MapDescriptors(paths),
            other => other,
        });
    }

    /// Both memories are mapped and hold together.
    ///
    /// Without effect when none were to be mapped.
    pub(crate) fn mapped(&mut self) {
        self.advance(|state| match state {
            // Version 2 has no acknowledgement: its client is using the queues already.
            State::MapFiles(ProtocolVersion::V2, _) => State::Established(ProtocolVersion::V2),
            State::MapFiles(..) | State::MapDescriptors(_) => State::SendAck,
            other => other,
        });
    }

    /// A message came.
    ///
    /// # Errors
    /// It is not one that was due. The handshake has failed then, and stays so.
    pub(crate) fn receive(
        &mut self,
        header: &Header,
        message: &Message,
    ) -> Result<(), HandshakeError> {
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
            (State::AwaitOpening, Message::ExchangeMetadata) if version >= VERSION.as_u8() => {
                Ok(State::SendExchange)
            }
            (State::AwaitOpening, Message::ExchangeMetadata) => {
                Err(HandshakeError::NoCommonVersion { peer: version, needed: VERSION.as_u8() })
            }
            (State::AwaitOpening, Message::ShareMemoryByFilePath(paths))
                if version == ProtocolVersion::V2.as_u8() =>
            {
                Ok(State::MapFiles(ProtocolVersion::V2, paths.clone()))
            }
            (State::AwaitAnnouncement, Message::ShareMemoryByFilePath(paths)) => {
                require_version(VERSION, version, message)?;
                Ok(State::MapFiles(VERSION, paths.clone()))
            }
            (State::AwaitAnnouncement, Message::ShareMemoryByMemfd(paths)) => {
                require_version(VERSION, version, message)?;
                Ok(State::SendReady(paths.clone()))
            }
            (State::Failed(error), _) => Err(error.clone()),
            (state, _) => Err(HandshakeError::Unexpected {
                got: message.message_type().name(),
                expected: state.due(),
            }),
        }
    }

    fn advance(&mut self, next: impl FnOnce(State) -> State) {
        let state = mem::replace(&mut self.state, State::AwaitOpening);
        self.state = next(state);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{every_message, paths};
    use super::*;

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
            ServerStep::MapFiles(p) => format!("map files {}", *p == paths()),
            ServerStep::MapDescriptors(p) => format!("map descriptors {}", *p == paths()),
            other => format!("{other:?}"),
        }
    }

    /// The versions and types of the messages that are allowed in a state.
    type Allowed = Vec<(u8, MessageType)>;

    /// A server in every state, by name.
    fn in_every_state() -> Vec<(String, ServerHandshake, Allowed)> {
        use MessageType::{ExchangeMetadata, ShareMemoryByFilePath, ShareMemoryByMemfd};
        let mut all = Vec::new();
        let mut note = |server: &ServerHandshake, allowed: Allowed| {
            all.push((step(server), server.clone(), allowed));
        };
        let file = Message::ShareMemoryByFilePath(paths());

        let mut v2 = ServerHandshake::new();
        let mut openings = vec![(2, ShareMemoryByFilePath)];
        openings.extend((3..=255).map(|version| (version, ExchangeMetadata)));
        note(&v2, openings);
        receive(&mut v2, 2, &file).unwrap();
        note(&v2, vec![]);
        v2.mapped();
        note(&v2, vec![]);

        let mut v3 = ServerHandshake::new();
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
                "ReceiveDescriptors",
                "map descriptors true",
                "send type 6 version 3",
                "Established(V3)",
            ]
        );
        all
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
        // 13 states, 273 messages each; allowed are 254 openings and 2 announcements.
        assert_eq!(refused, 13 * 273 - 254 - 2);
    }

    #[test]
    fn errors_tell_what_was_wrong() {
        let file = Message::ShareMemoryByFilePath(paths());
        let memfd = Message::ShareMemoryByMemfd(paths());
        let error = |server: &ServerHandshake, version, message| {
            receive(&mut server.clone(), version, message).unwrap_err()
        };
        let mut server = ServerHandshake::new();
        let expected = "ExchangeMetadata, or ShareMemoryByFilePath of version 2";
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
                matches!(server.step(), ServerStep::ReceiveDescriptors),
                matches!(server.step(), ServerStep::MapFiles(_) | ServerStep::MapDescriptors(_)),
            );
            assert_eq!(got, expected, "{name}");
        }
    }
}
