// SPDX-License-Identifier: MIT OR Apache-2.0
//! The eight bytes before every message on the socket (spec 3.1;
//! `docs/protocol.md#message-header`).
//!
//! `length u32` (header included) · `magic u16` · `version u8` · `type u8`, big-endian.
//!
//! Invariant: [`Header::decode`] refuses everything that can be refused by looking at the header
//! alone. Nobody has to buffer a payload whose length is nonsense.
//!
//! Trust: none; the bytes are the peer's.

use std::ops::RangeInclusive;

use crate::config::ProtocolVersion;
use crate::error::WireError;

/// Length of a header in bytes.
pub const HEADER_LEN: usize = 8;

/// The two bytes that mark a header.
pub const MAGIC: u16 = 0x7758;

/// One more than the longest path that Linux takes; it counts the NUL that messages do not carry.
pub const PATH_MAX: usize = 4096;

/// The longest JSON that a Negotiation carries here, in bytes. Peers in the field send some 200.
pub const MAX_NEGOTIATION_LEN: u32 = 16 << 10;

/// Length of a header where arithmetic with the length field needs it.
pub(super) const HEADER_LEN_U32: u32 = HEADER_LEN as u32;

/// Bytes of a FallbackData message before its data: header, stream id, status.
pub const FALLBACK_HEADER_LEN: usize = 16;

/// The shortest and the longest message that announces memory: two length fields, two paths.
const SHARE_MEMORY_LEN: RangeInclusive<u32> =
    HEADER_LEN_U32 + 4..=HEADER_LEN_U32 + 4 + 2 * PATH_MAX as u32;

/// Whether a message that announces nothing can have this version byte.
const fn is_message_byte(version: u8) -> bool {
    version == ProtocolVersion::V4.message_byte()
        || version == ProtocolVersion::V3.message_byte()
        || version == ProtocolVersion::V2.message_byte()
}

/// What kind of message follows a header. The names are the spec's.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::WireError;
/// use shmipc_glommio::wire::MessageType;
///
/// assert_eq!(MessageType::from_u8(3), Ok(MessageType::FallbackData));
/// assert_eq!(MessageType::FallbackData.as_u8(), 3);
/// assert_eq!(MessageType::from_u8(11), Err(WireError::Type(11)));
/// ```
#[repr(u8)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MessageType {
    /// The client names the files of its two memories.
    ShareMemoryByFilePath = 0,
    /// A doorbell: there are elements in the IO queue.
    SyncEvent = 1,
    /// A stream was closed while the IO queue was full.
    StreamClose = 2,
    /// Data of a stream that found no place in shared memory.
    FallbackData = 3,
    /// The version byte of the header is the sender's highest.
    ExchangeMetadata = 4,
    /// The client is about to send the descriptors of its two memories.
    ShareMemoryByMemfd = 5,
    /// The server has mapped both memories.
    AckShareMemory = 6,
    /// The server is ready to receive descriptors.
    AckReadyRecvFd = 7,
    /// The server is being replaced by a new one.
    HotRestart = 8,
    /// The client has moved to the new server.
    HotRestartAck = 9,
    /// What both sides can do, in JSON. Version 4 only.
    Negotiation = 10,
}

/// The shortest and the longest negotiation: an empty object, and the limit.
const NEGOTIATION_LEN: RangeInclusive<u32> =
    HEADER_LEN_U32 + 2..=HEADER_LEN_U32 + MAX_NEGOTIATION_LEN;

impl MessageType {
    /// Every type, in the order of their numbers.
    pub const ALL: [Self; 11] = [
        Self::ShareMemoryByFilePath,
        Self::SyncEvent,
        Self::StreamClose,
        Self::FallbackData,
        Self::ExchangeMetadata,
        Self::ShareMemoryByMemfd,
        Self::AckShareMemory,
        Self::AckReadyRecvFd,
        Self::HotRestart,
        Self::HotRestartAck,
        Self::Negotiation,
    ];

    /// The type that a header's last byte names.
    ///
    /// # Errors
    /// [`WireError::Type`] when it names none that versions 2 to 4 have.
    pub fn from_u8(byte: u8) -> Result<Self, WireError> {
        Self::ALL.get(usize::from(byte)).copied().ok_or(WireError::Type(byte))
    }

    /// The byte that stands for this type in a header.
    pub const fn as_u8(self) -> u8 {
        self as u8
    }

    /// The name that the spec gives it; errors carry it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ShareMemoryByFilePath => "ShareMemoryByFilePath",
            Self::SyncEvent => "SyncEvent",
            Self::StreamClose => "StreamClose",
            Self::FallbackData => "FallbackData",
            Self::ExchangeMetadata => "ExchangeMetadata",
            Self::ShareMemoryByMemfd => "ShareMemoryByMemfd",
            Self::AckShareMemory => "AckShareMemory",
            Self::AckReadyRecvFd => "AckReadyRecvFd",
            Self::HotRestart => "HotRestart",
            Self::HotRestartAck => "HotRestartAck",
            Self::Negotiation => "Negotiation",
        }
    }

    /// The lengths that a message of this type can have, header included, and the same in words.
    fn lengths(self) -> (RangeInclusive<u32>, &'static str) {
        match self {
            Self::SyncEvent
            | Self::ExchangeMetadata
            | Self::AckShareMemory
            | Self::AckReadyRecvFd => (8..=8, "8"),
            Self::StreamClose => (12..=12, "12"),
            Self::HotRestart | Self::HotRestartAck => (16..=16, "16"),
            Self::FallbackData => (FALLBACK_HEADER_LEN as u32..=u32::MAX, "16 or more"),
            Self::ShareMemoryByFilePath | Self::ShareMemoryByMemfd => {
                (SHARE_MEMORY_LEN, "12 to 8204")
            }
            Self::Negotiation => (NEGOTIATION_LEN, "10 to 16392"),
        }
    }
}

const _: () = {
    assert!(*SHARE_MEMORY_LEN.start() == 12 && *SHARE_MEMORY_LEN.end() == 8204);
    assert!(*NEGOTIATION_LEN.start() == 10 && *NEGOTIATION_LEN.end() == 16392);
    let mut number = 0;
    while number < MessageType::ALL.len() {
        assert!(MessageType::ALL[number] as usize == number);
        number += 1;
    }
};

/// A header.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::wire::{Header, MessageType};
///
/// let header = Header { length: 12, version: 3, message: MessageType::StreamClose };
/// assert_eq!(header.encode(), [0, 0, 0, 12, 0x77, 0x58, 3, 2]);
/// assert_eq!(Header::decode(&header.encode()), Ok(header));
/// // No StreamClose has 13 bytes.
/// assert!(Header::decode(&[0, 0, 0, 13, 0x77, 0x58, 3, 2]).is_err());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Length of the whole message in bytes, these eight included.
    pub length: u32,
    /// The [version byte](ProtocolVersion::message_byte); in an ExchangeMetadata the highest
    /// version that the sender knows.
    pub version: u8,
    /// What follows.
    pub message: MessageType,
}

impl Header {
    /// The header of a message that has nothing behind its header.
    pub const fn bare(version: u8, message: MessageType) -> Self {
        Self { length: HEADER_LEN_U32, version, message }
    }

    /// The eight bytes that go on the wire.
    pub const fn encode(&self) -> [u8; HEADER_LEN] {
        let [l0, l1, l2, l3] = self.length.to_be_bytes();
        let [m0, m1] = MAGIC.to_be_bytes();
        [l0, l1, l2, l3, m0, m1, self.version, self.message as u8]
    }

    /// Reads a header and checks all that can be checked without the payload.
    ///
    /// # Errors
    /// A wrong magic, a version or a type that this crate does not speak, and a length that the
    /// type cannot have.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, WireError> {
        let [l0, l1, l2, l3, m0, m1, version, message] = *bytes;
        let magic = u16::from_be_bytes([m0, m1]);
        if magic != MAGIC {
            return Err(WireError::Magic(magic));
        }
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        let header = Self { length, version, message: MessageType::from_u8(message)? };
        header.check()?;
        Ok(header)
    }

    /// Whether version and length are possible for this type of message.
    pub(super) fn check(&self) -> Result<(), WireError> {
        let can_be = match self.message {
            // A peer announces its highest version here, and that may be one of the future.
            MessageType::ExchangeMetadata => self.version != 0,
            MessageType::Negotiation => self.version == ProtocolVersion::V4.message_byte(),
            _ => is_message_byte(self.version),
        };
        if !can_be {
            return Err(WireError::Version(self.version));
        }
        let (lengths, expected) = self.message.lengths();
        if lengths.contains(&self.length) {
            Ok(())
        } else {
            Err(WireError::Length { message: self.message.name(), length: self.length, expected })
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(length: u32, version: u8, message: u8) -> [u8; 8] {
        let mut bytes = [0, 0, 0, 0, 0x77, 0x58, version, message];
        bytes[..4].copy_from_slice(&length.to_be_bytes());
        bytes
    }

    #[test]
    fn a_header_is_laid_out_as_the_spec_draws_it() {
        let header = Header { length: 0x0102, version: 3, message: MessageType::FallbackData };
        assert_eq!(header.encode(), [0, 0, 1, 2, 0x77, 0x58, 3, 3]);
        assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn a_wrong_magic_is_refused() {
        let mut swapped = bytes(8, 3, 1);
        swapped.swap(4, 5);
        assert_eq!(Header::decode(&swapped), Err(WireError::Magic(0x5877)));
        assert_eq!(Header::decode(b"GET / HT"), Err(WireError::Magic(0x2f20)));
    }

    #[test]
    fn only_an_announcement_may_carry_a_version_other_than_that_of_messages() {
        for message in 0..11 {
            let length = *MessageType::from_u8(message).unwrap().lengths().0.start();
            for version in 0..=u8::MAX {
                let allowed = match message {
                    4 => version >= 1,
                    10 => version == 0,
                    _ => [0, 2, 3].contains(&version),
                };
                let expected = if allowed { Ok(()) } else { Err(WireError::Version(version)) };
                let decoded = Header::decode(&bytes(length, version, message));
                assert_eq!(decoded.map(drop), expected, "type {message} version {version}");
            }
        }
    }

    #[test]
    fn an_unknown_type_is_refused() {
        for message in 11..=u8::MAX {
            assert_eq!(Header::decode(&bytes(16, 3, message)), Err(WireError::Type(message)));
        }
    }

    #[test]
    fn a_length_that_the_type_cannot_have_is_refused() {
        // Type, shortest, longest: the table in `docs/protocol.md#message-types`.
        let table: [(u8, u32, u32); 11] = [
            (0, 12, 8204),
            (1, 8, 8),
            (2, 12, 12),
            (3, 16, u32::MAX),
            (4, 8, 8),
            (5, 12, 8204),
            (6, 8, 8),
            (7, 8, 8),
            (8, 16, 16),
            (9, 16, 16),
            (10, 10, 16392),
        ];
        for (message, shortest, longest) in table {
            let version = if message == 10 { 0 } else { 3 };
            for length in [shortest, longest] {
                let header = Header::decode(&bytes(length, version, message)).unwrap();
                assert_eq!((header.length, header.message.as_u8()), (length, message));
            }
            for length in [0, 7, shortest - 1, longest.wrapping_add(1)] {
                assert!(
                    matches!(
                        Header::decode(&bytes(length, version, message)),
                        Err(WireError::Length { length: l, .. }) if l == length
                    ),
                    "type {message} length {length}"
                );
            }
        }
    }

    #[test]
    fn a_name_is_that_of_the_variant() {
        for message in MessageType::ALL {
            assert_eq!(message.name(), format!("{message:?}"));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn what_decodes_encodes_to_the_same_bytes(
            length in prop_oneof![0u32..40, 8190u32..8210, any::<u32>()],
            version in 0u8..5,
            message in 0u8..12,
        ) {
            let bytes = bytes(length, version, message);
            if let Ok(header) = Header::decode(&bytes) {
                prop_assert_eq!(header.encode(), bytes);
                prop_assert_eq!(
                    (header.length, header.version, header.message.as_u8()),
                    (length, version, message)
                );
            }
        }
    }
}
