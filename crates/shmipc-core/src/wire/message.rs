// SPDX-License-Identifier: MIT OR Apache-2.0
//! The messages on the socket (spec 3.1 and 3.2; `docs/protocol.md#messages`).
//!
//! Invariants: what [`Message::encode`] writes, [`Message::decode`] reads back as the same value;
//! a message that either refuses leaves no trace. Data of a FallbackData message is handed on
//! without a copy.
//!
//! Trust: none. A path that comes out of here is well-formed, nothing more: whether it may be
//! opened is for whoever opens it to decide.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use bytes::{Buf, Bytes};

use super::header::{
    FALLBACK_HEADER_LEN, HEADER_LEN, HEADER_LEN_U32, Header, MAX_NEGOTIATION_LEN, MessageType,
    PATH_MAX,
};
use crate::error::WireError;

/// The most data, in bytes, that one FallbackData message can carry.
pub const MAX_FALLBACK_DATA: u32 = u32::MAX - FALLBACK_HEADER_LEN as u32;

/// The names of the two memories of a session.
///
/// For memfd memory they are only names; for file memory both sides open them.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::wire::{MemoryPaths, Message};
///
/// let paths = MemoryPaths { queue: "/dev/shm/a_queue".into(), buffer: "/dev/shm/a".into() };
/// let mut bytes = Vec::new();
/// Message::ShareMemoryByFilePath(paths).encode(2, &mut bytes)?;
/// assert_eq!(bytes.len(), 8 + 2 + 16 + 2 + 10); // a header, and each path behind its length
/// # Ok::<(), shmipc_glommio::WireError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryPaths {
    /// The memory with the two IO queues.
    pub queue: PathBuf,
    /// The memory with the buffer slices.
    pub buffer: PathBuf,
}

impl MemoryPaths {
    /// A path of these that no message can carry.
    pub fn misfit(&self) -> Option<&Path> {
        let fits = |path| check_path(MessageType::ShareMemoryByFilePath, path_bytes(path)).is_ok();
        [&*self.queue, &*self.buffer].into_iter().find(|path| !fits(path))
    }

    /// Whether both paths fit a message.
    fn check(&self, message: MessageType) -> Result<(), WireError> {
        check_path(message, path_bytes(&self.queue))?;
        check_path(message, path_bytes(&self.buffer))
    }

    /// Length in bytes on the wire. No overflow: the paths are in memory.
    fn encoded_len(&self) -> usize {
        2 + path_bytes(&self.queue).len() + 2 + path_bytes(&self.buffer).len()
    }

    fn encode(&self, message: MessageType, out: &mut Vec<u8>) -> Result<(), WireError> {
        for path in [&self.queue, &self.buffer] {
            let path = path_bytes(path);
            let length = u16::try_from(path.len()).map_err(|_| too_long(message, path.len()))?;
            out.extend_from_slice(&length.to_be_bytes());
            out.extend_from_slice(path);
        }
        Ok(())
    }

    fn decode(header: &Header, payload: &[u8]) -> Result<Self, WireError> {
        let (queue, rest) = decode_path(header.message, payload)?;
        let (buffer, rest) = decode_path(header.message, rest)?;
        if rest.is_empty() {
            Ok(Self { queue, buffer })
        } else {
            Err(length_error(header, "no bytes behind the second path"))
        }
    }
}

/// A message with what it carries.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use bytes::Bytes;
/// use shmipc_glommio::wire::{HEADER_LEN, Header, Message};
///
/// let mut bytes = Vec::new();
/// Message::StreamClose { stream_id: 7 }.encode(3, &mut bytes)?;
/// // And back. A `Deframer` does this for bytes that arrive in pieces.
/// let header = Header::decode(bytes.first_chunk().unwrap())?;
/// let payload = Bytes::from(bytes).slice(HEADER_LEN..);
/// assert_eq!(Message::decode(&header, payload)?, Message::StreamClose { stream_id: 7 });
/// # Ok::<(), shmipc_glommio::WireError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Message {
    /// The client names the files of its two memories.
    ShareMemoryByFilePath(MemoryPaths),
    /// A doorbell: there are elements in the IO queue.
    SyncEvent,
    /// A stream was closed while the IO queue was full.
    StreamClose {
        /// Which stream.
        stream_id: u32,
    },
    /// Data of a stream that found no place in shared memory.
    FallbackData {
        /// Which stream.
        stream_id: u32,
        /// As the status of an [`Event`](super::Event).
        status: u32,
        /// The data; when decoded, a part of what was received and no copy of it.
        data: Bytes,
    },
    /// The version byte of the header is the sender's highest.
    ExchangeMetadata,
    /// The client is about to send the descriptors of its two memories.
    ShareMemoryByMemfd(MemoryPaths),
    /// The server has mapped both memories.
    AckShareMemory,
    /// The server is ready to receive descriptors.
    AckReadyRecvFd,
    /// The server is being replaced by a new one.
    HotRestart {
        /// The number of the new server's generation.
        epoch: u64,
    },
    /// The client has moved to the new server.
    HotRestartAck {
        /// The epoch of the HotRestart that this answers.
        epoch: u64,
    },
    /// What both sides can do, version 4's opening and the answer to it: JSON, for
    /// [`NegotiationRequest`](super::NegotiationRequest) and
    /// [`NegotiationResponse`](super::NegotiationResponse) to read.
    Negotiation(Bytes),
}

impl Message {
    /// The type that stands for this message in a header.
    pub fn message_type(&self) -> MessageType {
        match self {
            Self::ShareMemoryByFilePath(_) => MessageType::ShareMemoryByFilePath,
            Self::SyncEvent => MessageType::SyncEvent,
            Self::StreamClose { .. } => MessageType::StreamClose,
            Self::FallbackData { .. } => MessageType::FallbackData,
            Self::ExchangeMetadata => MessageType::ExchangeMetadata,
            Self::ShareMemoryByMemfd(_) => MessageType::ShareMemoryByMemfd,
            Self::AckShareMemory => MessageType::AckShareMemory,
            Self::AckReadyRecvFd => MessageType::AckReadyRecvFd,
            Self::HotRestart { .. } => MessageType::HotRestart,
            Self::HotRestartAck { .. } => MessageType::HotRestartAck,
            Self::Negotiation(_) => MessageType::Negotiation,
        }
    }

    /// Reads the message that `header` announces out of `payload`, the bytes behind the header.
    ///
    /// # Errors
    /// [`WireError::Length`] when `payload` is not what the header, or the type, says;
    /// [`WireError::Path`] for a path that is empty, longer than 4095 bytes, holds a NUL or runs
    /// over the end.
    pub fn decode(header: &Header, mut payload: Bytes) -> Result<Self, WireError> {
        if header.message != MessageType::FallbackData {
            return Self::decode_control(header, &payload);
        }
        let (stream_id, status) = decode_fallback_fields(header, &payload)?;
        payload.advance(FALLBACK_HEADER_LEN - HEADER_LEN);
        Ok(Self::FallbackData { stream_id, status, data: payload })
    }

    /// The same for all but FallbackData, of which nothing refers to the payload afterwards.
    pub(super) fn decode_control(header: &Header, payload: &[u8]) -> Result<Self, WireError> {
        check_announced(header, payload)?;
        let message = match header.message {
            MessageType::ShareMemoryByFilePath => {
                Self::ShareMemoryByFilePath(MemoryPaths::decode(header, payload)?)
            }
            MessageType::ShareMemoryByMemfd => {
                Self::ShareMemoryByMemfd(MemoryPaths::decode(header, payload)?)
            }
            MessageType::StreamClose => {
                Self::StreamClose { stream_id: u32::from_be_bytes(exactly(header, payload)?) }
            }
            MessageType::HotRestart => {
                Self::HotRestart { epoch: u64::from_be_bytes(exactly(header, payload)?) }
            }
            MessageType::HotRestartAck => {
                Self::HotRestartAck { epoch: u64::from_be_bytes(exactly(header, payload)?) }
            }
            MessageType::Negotiation => Self::Negotiation(Bytes::copy_from_slice(payload)),
            MessageType::SyncEvent => bare(header, payload, Self::SyncEvent)?,
            MessageType::ExchangeMetadata => bare(header, payload, Self::ExchangeMetadata)?,
            MessageType::AckShareMemory => bare(header, payload, Self::AckShareMemory)?,
            MessageType::AckReadyRecvFd => bare(header, payload, Self::AckReadyRecvFd)?,
            MessageType::FallbackData => {
                let (stream_id, status) = decode_fallback_fields(header, payload)?;
                let data = payload.get(FALLBACK_HEADER_LEN - HEADER_LEN..).unwrap_or_default();
                Self::FallbackData { stream_id, status, data: Bytes::copy_from_slice(data) }
            }
        };
        Ok(message)
    }

    /// Appends the message, header included, to `out`.
    ///
    /// `version` goes into the header: the [byte](super::ProtocolVersion::message_byte) of the
    /// agreed version or, for ExchangeMetadata, the sender's highest.
    ///
    /// # Errors
    /// What could not be decoded again is refused, and then `out` is as it was: a path that is
    /// empty, holds a NUL or is longer than 4095 bytes, more than [`MAX_FALLBACK_DATA`] bytes of
    /// data, a negotiation that is empty or longer than 16 KiB, and a version that this message
    /// cannot carry.
    pub fn encode(&self, version: u8, out: &mut Vec<u8>) -> Result<(), WireError> {
        let message = self.message_type();
        let payload_len = match self {
            Self::SyncEvent
            | Self::ExchangeMetadata
            | Self::AckShareMemory
            | Self::AckReadyRecvFd => 0,
            Self::StreamClose { .. } => 4,
            Self::HotRestart { .. } | Self::HotRestartAck { .. } => 8,
            Self::FallbackData { data, .. } => {
                FALLBACK_HEADER_LEN - HEADER_LEN + checked_data_len(data.len())? as usize
            }
            Self::ShareMemoryByFilePath(paths) | Self::ShareMemoryByMemfd(paths) => {
                paths.check(message)?;
                paths.encoded_len()
            }
            // More is the same to the header's check, which refuses it.
            Self::Negotiation(json) => json.len().min(MAX_NEGOTIATION_LEN as usize + 1),
        };
        let length = u32::try_from(HEADER_LEN + payload_len).unwrap_or(u32::MAX);
        let header = Header { length, version, message };
        header.check()?;
        out.reserve(HEADER_LEN + payload_len);
        out.extend_from_slice(&header.encode());
        match self {
            Self::ShareMemoryByFilePath(paths) | Self::ShareMemoryByMemfd(paths) => {
                paths.encode(message, out)?;
            }
            Self::StreamClose { stream_id } => out.extend_from_slice(&stream_id.to_be_bytes()),
            Self::HotRestart { epoch } | Self::HotRestartAck { epoch } => {
                out.extend_from_slice(&epoch.to_be_bytes());
            }
            Self::FallbackData { stream_id, status, data } => {
                out.extend_from_slice(&stream_id.to_be_bytes());
                out.extend_from_slice(&status.to_be_bytes());
                out.extend_from_slice(data);
            }
            Self::Negotiation(json) => out.extend_from_slice(json),
            Self::SyncEvent
            | Self::ExchangeMetadata
            | Self::AckShareMemory
            | Self::AckReadyRecvFd => {}
        }
        Ok(())
    }
}

/// The bytes before the data of a FallbackData message, for a sender that has the data elsewhere.
///
/// `data_len` is at most [`MAX_FALLBACK_DATA`]; the length field cannot say more.
pub const fn fallback_header(
    version: u8,
    stream_id: u32,
    status: u32,
    data_len: u32,
) -> [u8; FALLBACK_HEADER_LEN] {
    debug_assert!(data_len <= MAX_FALLBACK_DATA);
    let length = data_len.saturating_add(FALLBACK_HEADER_LEN as u32);
    let header = Header { length, version, message: MessageType::FallbackData };
    let [h0, h1, h2, h3, h4, h5, h6, h7] = header.encode();
    let [i0, i1, i2, i3] = stream_id.to_be_bytes();
    let [s0, s1, s2, s3] = status.to_be_bytes();
    [h0, h1, h2, h3, h4, h5, h6, h7, i0, i1, i2, i3, s0, s1, s2, s3]
}

/// A whole SyncEvent message.
pub const fn sync_event(version: u8) -> [u8; HEADER_LEN] {
    Header::bare(version, MessageType::SyncEvent).encode()
}

/// The stream id and the status of a FallbackData message.
pub(super) fn decode_fallback_fields(
    header: &Header,
    payload: &[u8],
) -> Result<(u32, u32), WireError> {
    check_announced(header, payload)?;
    let &[i0, i1, i2, i3, s0, s1, s2, s3] = payload
        .first_chunk::<{ FALLBACK_HEADER_LEN - HEADER_LEN }>()
        .ok_or_else(|| length_error(header, "16 or more"))?;
    Ok((u32::from_be_bytes([i0, i1, i2, i3]), u32::from_be_bytes([s0, s1, s2, s3])))
}

/// The payload must be the one that the header announces, whoever put the two together.
fn check_announced(header: &Header, payload: &[u8]) -> Result<(), WireError> {
    let announced = header.length.checked_sub(HEADER_LEN_U32);
    if announced.is_some_and(|announced| announced as usize == payload.len()) {
        Ok(())
    } else {
        Err(length_error(header, "the header and the bytes that came"))
    }
}

fn length_error(header: &Header, expected: &'static str) -> WireError {
    WireError::Length { message: header.message.name(), length: header.length, expected }
}

/// `message`, if there is nothing behind its header.
fn bare(header: &Header, payload: &[u8], message: Message) -> Result<Message, WireError> {
    if payload.is_empty() { Ok(message) } else { Err(length_error(header, "8")) }
}

/// The payload as an array, if it has that length.
fn exactly<const N: usize>(header: &Header, payload: &[u8]) -> Result<[u8; N], WireError> {
    payload.try_into().map_err(|_| length_error(header, if N == 4 { "12" } else { "16" }))
}

/// The length of a FallbackData message's data as its header can carry it.
fn checked_data_len(data_len: usize) -> Result<u32, WireError> {
    u32::try_from(data_len).ok().filter(|&len| len <= MAX_FALLBACK_DATA).ok_or(WireError::Length {
        message: MessageType::FallbackData.name(),
        length: u32::MAX,
        expected: "at most 4294967279 bytes of data",
    })
}

fn path_bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

fn too_long(message: MessageType, length: usize) -> WireError {
    WireError::Path { message: message.name(), length, problem: "longer than 4095 bytes" }
}

fn check_path(message: MessageType, path: &[u8]) -> Result<(), WireError> {
    let problem = if path.is_empty() {
        "empty"
    } else if path.len() >= PATH_MAX {
        return Err(too_long(message, path.len()));
    } else if path.contains(&0) {
        "holds a NUL"
    } else {
        return Ok(());
    };
    Err(WireError::Path { message: message.name(), length: path.len(), problem })
}

/// One path from the front of `bytes`, and what follows it.
fn decode_path(message: MessageType, bytes: &[u8]) -> Result<(PathBuf, &[u8]), WireError> {
    let Some((&length, rest)) = bytes.split_first_chunk::<2>() else {
        return Err(WireError::Path {
            message: message.name(),
            length: 0,
            problem: "no length field",
        });
    };
    let length = usize::from(u16::from_be_bytes(length));
    let Some((path, rest)) = rest.split_at_checked(length) else {
        return Err(WireError::Path {
            message: message.name(),
            length,
            problem: "runs over the end",
        });
    };
    check_path(message, path)?;
    Ok((PathBuf::from(OsStr::from_bytes(path)), rest))
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn paths(queue: &[u8], buffer: &[u8]) -> MemoryPaths {
        let path = |bytes| PathBuf::from(OsStr::from_bytes(bytes));
        MemoryPaths { queue: path(queue), buffer: path(buffer) }
    }

    fn header(length: u32, message: MessageType) -> Header {
        Header { length, version: 3, message }
    }

    /// Decodes a payload behind the header that fits its length.
    fn decode(message: MessageType, payload: &[u8]) -> Result<Message, WireError> {
        let length = u32::try_from(8 + payload.len()).unwrap();
        Message::decode(&header(length, message), Bytes::copy_from_slice(payload))
    }

    /// The version byte that a message of a kind can go with, among others.
    pub(crate) fn version_of(message: MessageType, version: u8) -> u8 {
        if message == MessageType::Negotiation { 0 } else { version }
    }

    /// Any message that can go on the wire; paths need not be UTF-8.
    pub(crate) fn any_message(max_data: usize) -> impl Strategy<Value = Message> {
        let path = || {
            prop_oneof![
                9 => prop::collection::vec(1u8..=255, 1..40),
                1 => prop::collection::vec(1u8..=255, 4090..4096),
            ]
        };
        let memory = move || (path(), path()).prop_map(|(q, b)| paths(&q, &b));
        let data = prop::collection::vec(any::<u8>(), 0..max_data);
        prop_oneof![
            memory().prop_map(Message::ShareMemoryByFilePath),
            memory().prop_map(Message::ShareMemoryByMemfd),
            Just(Message::SyncEvent),
            Just(Message::ExchangeMetadata),
            Just(Message::AckShareMemory),
            Just(Message::AckReadyRecvFd),
            any::<u32>().prop_map(|stream_id| Message::StreamClose { stream_id }),
            any::<u64>().prop_map(|epoch| Message::HotRestart { epoch }),
            any::<u64>().prop_map(|epoch| Message::HotRestartAck { epoch }),
            prop::collection::vec(any::<u8>(), 2..300)
                .prop_map(|json| Message::Negotiation(json.into())),
            (any::<u32>(), any::<u32>(), data).prop_map(|(stream_id, status, data)| {
                Message::FallbackData { stream_id, status, data: data.into() }
            }),
        ]
    }

    #[test]
    fn paths_go_queue_first_with_their_lengths() {
        let message = Message::ShareMemoryByFilePath(paths(b"/q", b"/buf"));
        let mut bytes = Vec::new();
        message.encode(2, &mut bytes).unwrap();
        assert_eq!(bytes, b"\0\0\0\x12\x77\x58\x02\0\0\x02/q\0\x04/buf");
    }

    #[test]
    fn data_is_handed_on_without_a_copy() {
        let payload = Bytes::from_static(b"\0\0\0\x02\0\0\0\x01data");
        let at = payload[8..].as_ptr();
        let header = header(20, MessageType::FallbackData);
        let Message::FallbackData { stream_id, status, data } =
            Message::decode(&header, payload).unwrap()
        else {
            panic!("not FallbackData");
        };
        assert_eq!((stream_id, status, &data[..]), (2, 1, &b"data"[..]));
        assert_eq!(data.as_ptr(), at);
    }

    #[test]
    fn broken_paths_are_refused() {
        let problem = |payload: &[u8]| match decode(MessageType::ShareMemoryByMemfd, payload) {
            Err(WireError::Path { message, length, problem }) => {
                assert_eq!(message, "ShareMemoryByMemfd");
                (length, problem)
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(problem(b""), (0, "no length field"));
        assert_eq!(problem(b"\0"), (0, "no length field"));
        assert_eq!(problem(b"\0\x02/q"), (0, "no length field"));
        assert_eq!(problem(b"\0\x02/q\0"), (0, "no length field"));
        assert_eq!(problem(b"\0\x02/q\0\0"), (0, "empty"));
        assert_eq!(problem(b"\0\0\0\x02/b"), (0, "empty"));
        assert_eq!(problem(b"\0\x02/q\0\x05/buf"), (5, "runs over the end"));
        assert_eq!(problem(b"\xff\xff/q\0\x04/buf"), (0xffff, "runs over the end"));
        assert_eq!(problem(b"\0\x02/\0\0\x04/buf"), (2, "holds a NUL"));
        let mut long = vec![0x10, 0x00];
        long.extend_from_slice(&[b'q'; 4096]);
        long.extend_from_slice(b"\0\x02/b");
        assert_eq!(problem(&long), (4096, "longer than 4095 bytes"));
        assert!(matches!(
            decode(MessageType::ShareMemoryByMemfd, b"\0\x02/q\0\x04/buf!"),
            Err(WireError::Length { length: 19, .. })
        ));
    }

    #[test]
    fn the_longest_paths_go_both_ways() {
        let message = Message::ShareMemoryByMemfd(paths(&[b'q'; 4095], &[b'b'; 4095]));
        let mut bytes = Vec::new();
        message.encode(3, &mut bytes).unwrap();
        assert_eq!(decode(MessageType::ShareMemoryByMemfd, &bytes[8..]), Ok(message));
    }

    #[test]
    fn a_payload_other_than_announced_is_refused_for_every_type() {
        for message in MessageType::ALL {
            for announced in 0..40u32 {
                for length in (0..40usize).filter(|&length| length + 8 != announced as usize) {
                    let payload = Bytes::from(vec![0; length]);
                    assert!(
                        matches!(
                            Message::decode(&header(announced, message), payload),
                            Err(WireError::Length { .. })
                        ),
                        "{message:?} announced {announced} payload {length}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_header_built_by_hand_cannot_give_a_type_another_length() {
        for message in MessageType::ALL {
            let fits = |payload: usize| match message {
                MessageType::StreamClose => payload == 4,
                MessageType::HotRestart | MessageType::HotRestartAck => payload == 8,
                MessageType::FallbackData => payload >= 8,
                // Whether it is one, is found when it is read. Headers have their own limit.
                MessageType::Negotiation => true,
                // Zeros are two empty paths, and those are refused at any length.
                MessageType::ShareMemoryByFilePath | MessageType::ShareMemoryByMemfd => false,
                _ => payload == 0,
            };
            for payload in 0..40 {
                let decoded = decode(message, &vec![0; payload]);
                assert_eq!(decoded.is_ok(), fits(payload), "{message:?} {payload} {decoded:?}");
            }
        }
    }

    #[test]
    fn what_cannot_be_decoded_is_not_encoded() {
        let mut out = b"before".to_vec();
        let long = [b'x'; 4096];
        for (queue, buffer) in [
            (&b""[..], &b"/b"[..]),
            (b"/q", b""),
            (b"/q\0", b"/b"),
            (b"/q", b"/\0b"),
            (&long, b"/b"),
            (b"/q", &long),
        ] {
            let message = Message::ShareMemoryByFilePath(paths(queue, buffer));
            assert!(matches!(message.encode(3, &mut out), Err(WireError::Path { .. })));
        }
        assert_eq!(Message::SyncEvent.encode(1, &mut out), Err(WireError::Version(1)));
        assert_eq!(Message::SyncEvent.encode(4, &mut out), Err(WireError::Version(4)));
        for (json, version) in [(1, 0), (MAX_NEGOTIATION_LEN as usize + 1, 0), (1 << 20, 0), (2, 3)]
        {
            let message = Message::Negotiation(vec![b' '; json].into());
            assert!(message.encode(version, &mut out).is_err(), "{json} {version}");
        }
        assert_eq!(Message::ExchangeMetadata.encode(0, &mut out), Err(WireError::Version(0)));
        assert_eq!(out, b"before");
        Message::ExchangeMetadata.encode(4, &mut out).unwrap();
        assert_eq!(&out[6..], [0, 0, 0, 8, 0x77, 0x58, 4, 4]);
    }

    #[test]
    fn more_data_than_the_length_field_can_say_is_refused() {
        // The limit is tested by its function: four gigabytes are too much for a test.
        let max = MAX_FALLBACK_DATA as usize;
        assert_eq!(checked_data_len(max), Ok(MAX_FALLBACK_DATA));
        assert!(matches!(checked_data_len(max + 1), Err(WireError::Length { .. })));
        assert!(matches!(checked_data_len(usize::MAX), Err(WireError::Length { .. })));
        assert_eq!(fallback_header(3, 0, 0, MAX_FALLBACK_DATA)[..4], [0xff; 4]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn a_message_survives_the_way_there_and_back(
            message in any_message(300),
            version in 2u8..=3,
        ) {
            let version = version_of(message.message_type(), version);
            let mut bytes = Vec::new();
            message.encode(version, &mut bytes).unwrap();
            let header = Header::decode(bytes.first_chunk().unwrap()).unwrap();
            prop_assert_eq!(header.length as usize, bytes.len());
            prop_assert_eq!((header.version, header.message), (version, message.message_type()));
            let payload = Bytes::copy_from_slice(&bytes[8..]);
            prop_assert_eq!(Message::decode_control(&header, &payload), Ok(message.clone()));
            prop_assert_eq!(Message::decode(&header, payload), Ok(message));
        }

        #[test]
        fn the_short_cuts_write_what_encode_writes(
            version in 2u8..=3,
            stream_id: u32,
            status: u32,
            data in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let mut short = fallback_header(version, stream_id, status, data.len() as u32).to_vec();
            short.extend_from_slice(&data);
            let mut bytes = Vec::new();
            let message = Message::FallbackData { stream_id, status, data: data.into() };
            message.encode(version, &mut bytes).unwrap();
            prop_assert_eq!(short, bytes);
            let mut bytes = Vec::new();
            Message::SyncEvent.encode(version, &mut bytes).unwrap();
            prop_assert_eq!(&sync_event(version)[..], &bytes[..]);
        }

        #[test]
        fn what_decodes_encodes_to_the_same_bytes(
            message in 0u8..11,
            payload in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..24),
                prop::collection::vec(0u8..4, 0..24),
            ],
        ) {
            let message = MessageType::from_u8(message).unwrap();
            if let Ok(decoded) = decode(message, &payload) {
                let mut bytes = Vec::new();
                // An empty negotiation has no header that announces it.
                let version = version_of(message, 3);
                if decoded.encode(version, &mut bytes).is_ok() || payload.len() > 1 {
                    prop_assert_eq!(&bytes[8..], &payload[..]);
                }
            }
        }
    }
}
