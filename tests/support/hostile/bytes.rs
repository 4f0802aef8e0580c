// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bytes that are no message, or a message with no place where it stands.

use shmipc_glommio::Error::{self, Handshake, Wire};
use shmipc_glommio::{HandshakeError, WireError};

use super::due::{IsDue, due};
use crate::support::raw::{
    ACK, BY_FILE, BY_MEMFD, EXCHANGE, FALLBACK, READY, Stage, header, honest_paths, message, paths,
};

/// Bytes to send at a stage of the handshake, and the error that is due.
pub(crate) struct Bytes {
    pub(crate) name: &'static str,
    pub(crate) stage: Stage,
    pub(crate) bytes: Vec<u8>,
    pub(crate) is_due: IsDue,
}

fn case(name: &'static str, stage: Stage, bytes: Vec<u8>, is_due: IsDue) -> Bytes {
    Bytes { name, stage, bytes, is_due }
}

const IS_LENGTH: IsDue = due!(Wire(WireError::Length { .. }));
const IS_TOO_LONG: IsDue = due!(Wire(WireError::TooLong { .. }));
const IS_UNEXPECTED: IsDue = due!(Handshake(HandshakeError::Unexpected { .. }));
const IS_VERSION_2: IsDue = due!(Handshake(HandshakeError::VersionChanged { got: 2, .. }));

/// Headers that are none, whoever sends them.
pub(crate) fn bad_headers(stage: Stage) -> Vec<Bytes> {
    let magic = |magic, kind| header(8, magic, 3, kind);
    let length = |length, kind| header(length, 0x7758, 3, kind);
    let cases: [(_, _, IsDue); 16] = [
        ("wrong magic", magic(0x5877, EXCHANGE), due!(Wire(WireError::Magic(0x5877)))),
        ("HTTP", b"GET / HTTP/1.1\r\n\r\n".to_vec(), due!(Wire(WireError::Magic(0x2f20)))),
        ("version 0", message(EXCHANGE, 0, &[]), due!(Wire(WireError::Version(0)))),
        ("version 1", message(BY_FILE, 1, &[0; 4]), due!(Wire(WireError::Version(1)))),
        ("version 4", message(BY_FILE, 4, &[0; 4]), due!(Wire(WireError::Version(4)))),
        ("version 255", message(BY_FILE, 255, &[0; 4]), due!(Wire(WireError::Version(255)))),
        ("a negotiation of version 3", message(10, 3, b"{}"), due!(Wire(WireError::Version(3)))),
        ("type 11", message(11, 3, &[]), due!(Wire(WireError::Type(11)))),
        ("type 255", message(255, 3, &[]), due!(Wire(WireError::Type(255)))),
        ("length 0", length(0, EXCHANGE), IS_LENGTH),
        ("length 7", length(7, EXCHANGE), IS_LENGTH),
        ("length 9", length(9, EXCHANGE), IS_LENGTH),
        ("short data", length(15, FALLBACK), IS_LENGTH),
        ("long paths", length(8205, BY_MEMFD), IS_LENGTH),
        // No message of a handshake is longer than a negotiation can be.
        ("long data", length(16393, FALLBACK), IS_TOO_LONG),
        ("longest data", length(u32::MAX, FALLBACK), IS_TOO_LONG),
    ];
    let cases = cases.into_iter();
    cases.map(|(name, bytes, is_due)| case(name, stage, bytes, is_due)).collect()
}

/// Every message of version 3, with its type.
fn every_message() -> Vec<(&'static str, u8, Vec<u8>)> {
    let named = honest_paths("/q", "/b");
    let all: [(_, u8, &[u8]); 10] = [
        ("ShareMemoryByFilePath", BY_FILE, &named),
        ("SyncEvent", 1, &[]),
        ("StreamClose", 2, &[0; 4]),
        ("FallbackData", FALLBACK, &[0; 20]),
        ("ExchangeMetadata", EXCHANGE, &[]),
        ("ShareMemoryByMemfd", BY_MEMFD, &named),
        ("AckShareMemory", ACK, &[]),
        ("AckReadyRecvFd", READY, &[]),
        ("HotRestart", 8, &[0; 8]),
        ("HotRestartAck", 9, &[0; 8]),
    ];
    all.map(|(name, kind, payload)| (name, kind, message(kind, 3, payload))).into()
}

fn all_but(stage: Stage, due: &[u8]) -> Vec<Bytes> {
    let all = every_message().into_iter();
    all.filter(|(_, kind, _)| !due.contains(kind))
        .map(|(name, _, bytes)| case(name, stage, bytes, IS_UNEXPECTED))
        .collect()
}

/// Messages that a server must not take at a stage.
pub(crate) fn out_of_place_for_a_server(stage: Stage) -> Vec<Bytes> {
    let named = |kind, version| message(kind, version, &honest_paths("/q", "/b"));
    let versions = |version| message(EXCHANGE, version, &[]);
    let too_low: IsDue = due!(Handshake(HandshakeError::NoCommonVersion { peer: 1 | 2, .. }));
    let (due, others): (&[u8], _) = match stage {
        Stage::Opening => (
            &[EXCHANGE],
            vec![
                case("memfd of version 2", stage, named(BY_MEMFD, 2), IS_UNEXPECTED),
                case("at most version 2", stage, versions(2), too_low),
                case("at most version 1", stage, versions(1), too_low),
            ],
        ),
        _ => (
            &[BY_FILE, BY_MEMFD],
            vec![
                case("an opening of version 4", stage, message(10, 0, b"{}"), IS_UNEXPECTED),
                case("memfd, version 2 by now", stage, named(BY_MEMFD, 2), IS_VERSION_2),
                case("files, version 2 by now", stage, named(BY_FILE, 2), IS_VERSION_2),
            ],
        ),
    };
    let mut cases = all_but(stage, due);
    cases.extend(others);
    cases
}

/// Messages that a client must not take as the answer at a stage.
pub(crate) fn out_of_place_for_a_client(stage: Stage) -> Vec<Bytes> {
    let too_low: IsDue = due!(Handshake(HandshakeError::NoCommonVersion { peer: 1 | 2, .. }));
    let (due, others) = match stage {
        Stage::Opening => (EXCHANGE, vec![(1, too_low), (2, too_low)]),
        Stage::Announcement => (READY, vec![(2, IS_VERSION_2)]),
        Stage::Descriptors => (ACK, vec![(2, IS_VERSION_2)]),
    };
    let mut cases = all_but(stage, &[due]);
    cases.push(case("an answer of version 4", stage, message(10, 0, b"{}"), IS_UNEXPECTED));
    for (version, is_due) in others {
        let name = "the right message in another version";
        cases.push(case(name, stage, message(due, version, &[]), is_due));
    }
    cases
}

/// Paths that are not two paths.
pub(crate) fn bad_paths() -> Vec<Bytes> {
    let long = vec![b'x'; 4096];
    let mut behind = honest_paths("/q", "/b");
    behind.push(b'!');
    let is_path: IsDue = due!(Wire(WireError::Path { .. }));
    let cases = [
        ("no second length", paths((2, b"/q"), (0, b""))[..5].to_vec(), is_path),
        ("an empty queue path", paths((0, b""), (2, b"/b")), is_path),
        ("an empty buffer path", paths((2, b"/q"), (0, b"")), is_path),
        ("a queue path over the end", paths((200, b"/q"), (2, b"/b")), is_path),
        ("a buffer path over the end", paths((2, b"/q"), (3, b"/b")), is_path),
        ("the longest length", paths((2, b"/q"), (u16::MAX, b"/b")), is_path),
        ("a queue path of 4096", paths((4096, &long), (2, b"/b")), is_path),
        ("a buffer path of 4096", paths((2, b"/q"), (4096, &long)), is_path),
        ("a NUL", paths((3, b"/\0q"), (2, b"/b")), is_path),
        ("bytes behind", behind, IS_LENGTH),
    ];
    let mut all = Vec::new();
    for (name, payload, is_due) in cases {
        let by_memfd = message(BY_MEMFD, 3, &payload);
        all.push(case(name, Stage::Announcement, by_memfd, is_due));
        all.push(case(name, Stage::Opening, message(BY_FILE, 2, &payload), is_due));
    }
    all
}
