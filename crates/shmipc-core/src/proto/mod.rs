// SPDX-License-Identifier: MIT OR Apache-2.0
//! The state machines of the protocol, without socket, clock or runtime.
//!
//! - [`handshake_client`], [`handshake_server`]: from a fresh connection to an agreed version and
//!   shared memory (spec chapter 4; `docs/protocol.md#handshakes`).
//! - [`stream_table`]: which streams there are, and which numbers were used.
//! - [`stream_state`]: what one stream may do next.
//! - [`flow_control`]: the arithmetic of credit.
//!
//! The handshakes are pulled: the driver asks for the next step, carries it out, and reports it.
//! Time is the driver's, which drops a handshake that takes too long.
//!
//! Invariants: a handshake is established only after every message that its version requires, in
//! order, and never after an error.
//!
//! Trust: none in the peer's messages. The driver is trusted to report only what it has done.

pub mod flow_control;
pub mod handshake_client;
pub mod handshake_server;
pub mod session;
pub mod stream_state;
pub mod stream_table;

use crate::config::Wakeup;
use crate::error::HandshakeError;
use crate::wire::{Features, Message, ProtocolVersion, ShardIdentity};

/// What the two sides of a session have agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Negotiated {
    /// The version that both speak.
    pub version: ProtocolVersion,
    /// How each side wakes the other one.
    pub wakeup: Wakeup,
    /// Whether each side has buffer lists for itself.
    pub owned_free_lists: bool,
    /// Which shard the server is, if it said so.
    pub shard: Option<ShardIdentity>,
}

impl Negotiated {
    /// A session of a version that has no features.
    pub const fn plain(version: ProtocolVersion) -> Self {
        Self { version, wakeup: Wakeup::Socket, owned_free_lists: false, shard: None }
    }

    /// A session of version 4 with these features.
    fn by_features(features: Features, shard: Option<ShardIdentity>) -> Self {
        let wakeup = match features.polling {
            // A server that grants another interval than it was asked for looks that often itself;
            // this side looks as often as a timer can.
            Some(interval) => {
                Wakeup::Polling(interval.clamp(Wakeup::SHORTEST_INTERVAL, Wakeup::LONGEST_INTERVAL))
            }
            None if features.eventfd => Wakeup::EventFd,
            None => Wakeup::Socket,
        };
        let owned_free_lists = features.owned_free_lists;
        Self { version: ProtocolVersion::V4, wakeup, owned_free_lists, shard }
    }
}

/// What is due when nothing is any more.
const NOTHING_MORE: &str = "nothing more of the handshake";
/// What is due while it is this side's turn.
const NOT_YET: &str = "nothing before this side's next step";
/// What is due after an error.
const NOTHING_AFTER_FAILURE: &str = "nothing after a failed handshake";

/// That a message carries the version that was agreed before.
fn require_version(
    agreed: ProtocolVersion,
    version: u8,
    message: &Message,
) -> Result<(), HandshakeError> {
    if version == agreed.message_byte() {
        Ok(())
    } else {
        Err(HandshakeError::VersionChanged {
            message: message.message_type().name(),
            got: version,
            agreed: agreed.message_byte(),
        })
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::handshake_client::{ClientHandshake, ClientStep};
    use super::handshake_server::{ServerCapabilities, ServerHandshake, ServerStep};
    use super::*;
    use crate::wire::{Deframer, Header, MemoryKind, MemoryPaths, MessageType};

    pub(super) fn paths() -> MemoryPaths {
        MemoryPaths { queue: "/dev/shm/q".into(), buffer: "/dev/shm/b".into() }
    }

    /// One message of every type with every version that its header can carry.
    pub(super) fn every_message() -> Vec<(Header, Message)> {
        let message = |kind| {
            match kind {
                MessageType::ShareMemoryByFilePath => Message::ShareMemoryByFilePath(paths()),
                MessageType::SyncEvent => Message::SyncEvent,
                MessageType::StreamClose => Message::StreamClose { stream_id: 2 },
                MessageType::FallbackData => Message::FallbackData {
                    stream_id: 2,
                    status: 0,
                    data: Bytes::from_static(b"x"),
                },
                MessageType::ExchangeMetadata => Message::ExchangeMetadata,
                MessageType::ShareMemoryByMemfd => Message::ShareMemoryByMemfd(paths()),
                MessageType::AckShareMemory => Message::AckShareMemory,
                MessageType::AckReadyRecvFd => Message::AckReadyRecvFd,
                MessageType::HotRestart => Message::HotRestart { epoch: 7 },
                MessageType::HotRestartAck => Message::HotRestartAck { epoch: 7 },
                // Both a request and an answer.
                MessageType::Negotiation => Message::Negotiation(Bytes::from_static(
                    br#"{"supports_protocols":[4],"selected_protocol":4,
                    "sdk_name":"","sdk_version":""}"#,
                )),
            }
        };
        let mut messages = Vec::new();
        for kind in MessageType::ALL {
            for version in 0..=u8::MAX {
                let mut bytes = Vec::new();
                if message(kind).encode(version, &mut bytes).is_ok() {
                    let header = Header::decode(bytes.first_chunk().unwrap()).unwrap();
                    messages.push((header, message(kind)));
                }
            }
        }
        assert_eq!(messages.len(), 9 * 3 + 255 + 1);
        messages
    }

    fn server() -> ServerHandshake {
        ServerHandshake::new(ServerCapabilities {
            highest: ProtocolVersion::HIGHEST,
            has_descriptors: true,
            owned_free_lists: true,
            min_polling_interval: Wakeup::SHORTEST_INTERVAL,
            shard: None,
        })
    }

    /// What went over the connection of two handshakes, and what was done besides.
    #[derive(Debug, Default)]
    struct Transcript {
        client_sent: Vec<u8>,
        server_sent: Vec<u8>,
        descriptors_sent: usize,
        descriptors_received: usize,
        mapped_files: Vec<MemoryPaths>,
        mapped_descriptors: Vec<MemoryPaths>,
    }

    /// Lets a client and a server loose on each other until both are established.
    fn run(
        client: &mut ClientHandshake,
        server: &mut ServerHandshake,
    ) -> (Transcript, Negotiated, Negotiated) {
        let mut transcript = Transcript::default();
        let (mut to_client, mut to_server) = (Deframer::new(10_000), Deframer::new(10_000));
        let put = |deframer: &mut Deframer, bytes: &[u8]| {
            deframer.space(bytes.len())[..bytes.len()].copy_from_slice(bytes);
            deframer.commit(bytes.len());
        };
        for _ in 0..20 {
            let mut established = (None, None);
            match client.step() {
                ClientStep::CreateMemory(_) => client.memory_created(),
                ClientStep::Send(bytes) => {
                    transcript.client_sent.extend_from_slice(bytes);
                    put(&mut to_server, bytes);
                    client.sent();
                }
                ClientStep::SendDescriptors => {
                    transcript.descriptors_sent += 1;
                    client.sent();
                }
                ClientStep::AwaitMessage(_) => {
                    if let Some((header, message)) = to_client.next_message().unwrap() {
                        client.receive(&header, &message).unwrap();
                    }
                }
                ClientStep::Established(agreement) => established.0 = Some(*agreement),
            }
            match server.step() {
                ServerStep::Send(bytes) => {
                    transcript.server_sent.extend_from_slice(bytes);
                    put(&mut to_client, bytes);
                    server.sent();
                }
                ServerStep::ReceiveDescriptors(_) => {
                    if transcript.descriptors_received < transcript.descriptors_sent {
                        transcript.descriptors_received += 1;
                        server.descriptors_received();
                    }
                }
                ServerStep::MapFiles(_, paths) => {
                    transcript.mapped_files.push(paths.clone());
                    server.mapped();
                }
                ServerStep::MapDescriptors(_, paths) => {
                    transcript.mapped_descriptors.push(paths.clone());
                    server.mapped();
                }
                ServerStep::AwaitMessage(_) => {
                    if let Some((header, message)) = to_server.next_message().unwrap() {
                        server.receive(&header, &message).unwrap();
                    }
                }
                ServerStep::Established(agreement) => established.1 = Some(*agreement),
                ServerStep::Refused(error) => panic!("{error}"),
            }
            if let (Some(client), Some(server)) = established {
                assert!(to_client.is_empty() && to_server.is_empty());
                return (transcript, client, server);
            }
        }
        panic!("no end: {client:?} {server:?}");
    }

    #[test]
    fn every_client_comes_to_terms_with_the_server() {
        use ProtocolVersion::{V2, V3, V4};
        // Version, memory, what the client sends, what the server sends, whether descriptors go.
        let table: [(_, _, &[u8], &[u8], usize); 5] = [
            (V2, MemoryKind::File, &[0], &[], 0),
            (V3, MemoryKind::File, &[4, 0], &[4, 6], 0),
            (V3, MemoryKind::Memfd, &[4, 5], &[4, 7, 6], 1),
            (V4, MemoryKind::File, &[10, 0], &[10, 6], 0),
            (V4, MemoryKind::Memfd, &[10, 5], &[10, 7, 6], 1),
        ];
        let types = |bytes: &[u8], version: ProtocolVersion| {
            let mut deframer = Deframer::new(10_000);
            deframer.space(bytes.len())[..bytes.len()].copy_from_slice(bytes);
            deframer.commit(bytes.len());
            let mut types = Vec::new();
            while let Some((header, message)) = deframer.next_message().unwrap() {
                assert_eq!(header.version, version.message_byte());
                types.push(message.message_type().as_u8());
            }
            assert!(deframer.is_empty());
            types
        };
        for (version, kind, client_sends, server_sends, descriptors) in table {
            let features = Features { owned_free_lists: true, ..Features::default() };
            let mut client = ClientHandshake::new(version, kind, features, paths()).unwrap();
            let (transcript, client, server) = run(&mut client, &mut server());
            assert_eq!(client, server);
            assert_eq!(client.version, version);
            assert_eq!(client.owned_free_lists, version == V4);
            assert_eq!(types(&transcript.client_sent, version), client_sends);
            assert_eq!(types(&transcript.server_sent, version), server_sends);
            assert_eq!(transcript.descriptors_sent, descriptors);
            assert_eq!(transcript.descriptors_received, descriptors);
            let mapped = match kind {
                MemoryKind::File => (transcript.mapped_files, transcript.mapped_descriptors),
                MemoryKind::Memfd => (transcript.mapped_descriptors, transcript.mapped_files),
            };
            assert_eq!(mapped, (vec![paths()], vec![]));
        }
    }

    /// The handshakes of ours, byte for byte as shmipc-go was seen to do them.
    #[test]
    fn the_bytes_are_those_that_were_captured() {
        use ProtocolVersion::{V2, V3};
        macro_rules! vector {
            ($name:literal) => {
                &include_bytes!(concat!("../../tests/vectors/", $name))[..]
            };
        }
        let golab = |id: &str| MemoryPaths {
            queue: format!("/dev/shm/golab_0_{id}_queue_0").into(),
            buffer: format!("/dev/shm/golab_0_{id}_buffer").into(),
        };
        let python = MemoryPaths {
            queue: "/dev/shm/pyraw_v3file_queue_0".into(),
            buffer: "/dev/shm/pyraw_v3file_buffer".into(),
        };
        // With the number of bytes, each way, that are the handshake.
        let table = [
            (
                (V2, MemoryKind::File, golab("29959")),
                (vector!("handshake-v2-file.c2s.bin"), 71),
                (vector!("handshake-v2-file.s2c.bin"), 0),
            ),
            (
                (V3, MemoryKind::File, python),
                (vector!("handshake-v3-file.c2s.bin"), 77),
                (vector!("handshake-v3-file.s2c.bin"), 16),
            ),
            (
                (V3, MemoryKind::Memfd, golab("30924")),
                (vector!("handshake-v3-memfd.c2s.bin"), 79),
                (vector!("handshake-v3-memfd.s2c.bin"), 24),
            ),
        ];
        for ((version, kind, paths), (c2s, c2s_len), (s2c, s2c_len)) in table {
            let none = Features::default();
            let mut client = ClientHandshake::new(version, kind, none, paths).unwrap();
            let (transcript, ..) = run(&mut client, &mut server());
            assert_eq!(transcript.client_sent, &c2s[..c2s_len]);
            assert_eq!(transcript.server_sent, &s2c[..s2c_len]);
        }
    }
}
