// SPDX-License-Identifier: MIT OR Apache-2.0
//! The client's side of the handshakes of versions 2 and 3 (WIRE chapter 2; spec chapter 4).
//!
//! Invariants: see the parent module. The client opens with version 2 or 3, never more: a shmipc-go
//! server closes on any other opening. Both memories exist and are initialised before this starts.
//!
//! Trust: none in the server's messages.

use super::{NOT_YET, NOTHING_AFTER_FAILURE, NOTHING_MORE, require_version};
use crate::error::{ConfigError, Error, HandshakeError};
use crate::wire::{
    HEADER_LEN, Header, MemoryKind, MemoryPaths, Message, MessageType, ProtocolVersion,
};

/// The client's opening in version 3.
const EXCHANGE: [u8; HEADER_LEN] =
    Header::bare(ProtocolVersion::V3.as_u8(), MessageType::ExchangeMetadata).encode();

/// Where a message has its version byte.
const VERSION_AT: usize = 6;

/// What the driver has to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ClientStep<'a> {
    /// Send these bytes, then call [`ClientHandshake::sent`].
    Send(&'a [u8]),
    /// Send one byte with the descriptors, buffer first, then call [`ClientHandshake::sent`].
    SendDescriptors,
    /// Receive a message for [`ClientHandshake::receive`]; what is due, in words.
    AwaitMessage(&'static str),
    /// Done: the session speaks this version.
    Established(ProtocolVersion),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    SendExchange,
    AwaitExchange,
    SendAnnouncement(ProtocolVersion),
    AwaitReady,
    SendDescriptors,
    AwaitAck,
    Established(ProtocolVersion),
    Failed(HandshakeError),
}

impl State {
    /// Which message is due, in words.
    fn due(&self) -> &'static str {
        match self {
            Self::AwaitExchange => "ExchangeMetadata",
            Self::AwaitReady => "AckReadyRecvFd",
            Self::AwaitAck => "AckShareMemory",
            Self::SendExchange | Self::SendAnnouncement(_) | Self::SendDescriptors => NOT_YET,
            Self::Established(_) => NOTHING_MORE,
            Self::Failed(_) => NOTHING_AFTER_FAILURE,
        }
    }
}

/// A handshake, seen from the client.
#[derive(Debug, Clone)]
pub(crate) struct ClientHandshake {
    state: State,
    kind: MemoryKind,
    /// The message that names both memories, whole.
    announcement: Vec<u8>,
}

impl ClientHandshake {
    /// A handshake that opens with `version` and offers the memories at `paths`.
    ///
    /// # Errors
    /// [`ConfigError::MemfdNeedsVersion3`], and [`ConfigError::PathPrefix`] for a path that no
    /// message can carry.
    pub(crate) fn new(
        version: ProtocolVersion,
        kind: MemoryKind,
        paths: MemoryPaths,
    ) -> Result<Self, Error> {
        let state = match (version, kind) {
            (ProtocolVersion::V2, MemoryKind::Memfd) => {
                return Err(ConfigError::MemfdNeedsVersion3.into());
            }
            (ProtocolVersion::V2, MemoryKind::File) => State::SendAnnouncement(version),
            (ProtocolVersion::V3, _) => State::SendExchange,
        };
        if let Some(path) = paths.misfit() {
            return Err(ConfigError::PathPrefix(path.to_owned()).into());
        }
        let message = match kind {
            MemoryKind::File => Message::ShareMemoryByFilePath(paths),
            MemoryKind::Memfd => Message::ShareMemoryByMemfd(paths),
        };
        let mut announcement = Vec::new();
        message.encode(version.as_u8(), &mut announcement)?;
        Ok(Self { state, kind, announcement })
    }

    /// What the driver has to do next.
    pub(crate) fn step(&self) -> ClientStep<'_> {
        match &self.state {
            State::SendExchange => ClientStep::Send(&EXCHANGE),
            State::SendAnnouncement(_) => ClientStep::Send(&self.announcement),
            State::SendDescriptors => ClientStep::SendDescriptors,
            State::Established(version) => ClientStep::Established(*version),
            state @ (State::AwaitExchange
            | State::AwaitReady
            | State::AwaitAck
            | State::Failed(_)) => ClientStep::AwaitMessage(state.due()),
        }
    }

    /// The bytes, or the descriptors, of the last [`step`](Self::step) are sent, all of them.
    ///
    /// Without effect when nothing was to be sent.
    pub(crate) fn sent(&mut self) {
        self.state = match (&self.state, self.kind) {
            (State::SendExchange, _) => State::AwaitExchange,
            (State::SendAnnouncement(ProtocolVersion::V2), _) => {
                State::Established(ProtocolVersion::V2)
            }
            (State::SendAnnouncement(_), MemoryKind::File) => State::AwaitAck,
            (State::SendAnnouncement(_), MemoryKind::Memfd) => State::AwaitReady,
            (State::SendDescriptors, _) => State::AwaitAck,
            _ => return,
        };
    }

    /// A message came.
    ///
    /// # Errors
    /// It is not the one that was due. The handshake has failed then, and stays so.
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
    fn after(&mut self, version: u8, message: &Message) -> Result<State, HandshakeError> {
        match (&self.state, message) {
            (State::AwaitExchange, Message::ExchangeMetadata) => {
                self.agree(version).map(State::SendAnnouncement)
            }
            (State::AwaitReady, Message::AckReadyRecvFd) => {
                require_version(ProtocolVersion::V3, version, message)?;
                Ok(State::SendDescriptors)
            }
            (State::AwaitAck, Message::AckShareMemory) => {
                require_version(ProtocolVersion::V3, version, message)?;
                Ok(State::Established(ProtocolVersion::V3))
            }
            (State::Failed(error), _) => Err(error.clone()),
            (state, _) => Err(HandshakeError::Unexpected {
                got: message.message_type().name(),
                expected: state.due(),
            }),
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

    const FILE_V2: [u8; 7] = [0, 0, 0, 32, 0x77, 0x58, 2];

    fn client(version: ProtocolVersion, kind: MemoryKind) -> ClientHandshake {
        ClientHandshake::new(version, kind, paths()).unwrap()
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
            other => format!("{other:?}"),
        }
    }

    /// The versions and types of the messages that are allowed in a state.
    type Allowed = Vec<(u8, MessageType)>;

    /// A client in every state, by name.
    fn in_every_state() -> Vec<(String, ClientHandshake, Allowed)> {
        use MessageType::{AckReadyRecvFd, AckShareMemory, ExchangeMetadata};
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
                    assert_eq!(client.receive(&header, &message), Err(error.clone()));
                    assert_eq!(client.step(), ClientStep::AwaitMessage(NOTHING_AFTER_FAILURE));
                }
            }
        }
        // 15 states, 273 messages each; allowed are 254 + 253 announcements and 3 others.
        assert_eq!(refused, 15 * 273 - 254 - 253 - 3);
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
        assert_eq!(client.step(), ClientStep::Established(ProtocolVersion::V2));
    }

    #[test]
    fn sent_without_anything_to_send_changes_nothing() {
        for (name, mut client, _) in in_every_state() {
            let before = client.state.clone();
            let sends = matches!(client.step(), ClientStep::Send(_) | ClientStep::SendDescriptors);
            client.sent();
            assert_eq!(client.state != before, sends, "{name}");
        }
    }

    #[test]
    fn what_cannot_be_offered_is_refused_at_the_start() {
        let memfd = ClientHandshake::new(ProtocolVersion::V2, MemoryKind::Memfd, paths());
        assert!(matches!(memfd, Err(Error::Config(ConfigError::MemfdNeedsVersion3))));
        let long = std::path::PathBuf::from("/".repeat(4096));
        for kind in [MemoryKind::File, MemoryKind::Memfd] {
            for (queue, buffer) in [("/q".into(), long.clone()), (long.clone(), "/b".into())] {
                let paths = MemoryPaths { queue, buffer };
                let refused = ClientHandshake::new(ProtocolVersion::V3, kind, paths);
                assert!(matches!(
                    refused,
                    Err(Error::Config(ConfigError::PathPrefix(path))) if path == long
                ));
            }
        }
    }
}
