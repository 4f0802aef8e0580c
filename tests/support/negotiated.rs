// SPDX-License-Identifier: MIT OR Apache-2.0
//! Raw peers of version 4, on either side.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use shmipc_glommio::wire::{Features, NegotiationRequest, NegotiationResponse};
use shmipc_glommio::{ProtocolVersion, Wakeup};

use super::raw::{
    ACK, BY_MEMFD, Bell, CAPACITY, Memory, READY, Raw, Rig, Terms, honest_paths, message,
};

pub(crate) const NEGOTIATION: u8 = 10;

/// What sessions of version 4 can be.
pub(crate) const KINDS: [Features; 6] = [
    kind(false, None, false),
    kind(false, None, true),
    kind(true, None, false),
    kind(true, None, true),
    kind(false, Some(Duration::from_micros(100)), false),
    kind(false, Some(Duration::from_micros(100)), true),
];
pub(crate) const WITH_EVENT_FDS: Features = KINDS[3];

const fn kind(eventfd: bool, polling: Option<Duration>, owned_free_lists: bool) -> Features {
    Features { polling, eventfd, owned_free_lists }
}

/// How a client of ours asks for the wake-ups of these features.
pub(crate) fn wakeup(features: Features) -> Wakeup {
    match features.polling {
        Some(interval) => Wakeup::Polling(interval),
        None if features.eventfd => Wakeup::EventFd,
        None => Wakeup::Socket,
    }
}

/// A negotiation of these bytes, which need not be JSON.
pub(crate) fn negotiation(json: &[u8]) -> Vec<u8> {
    message(NEGOTIATION, 0, json)
}

pub(crate) fn request(features: Features) -> Vec<u8> {
    negotiation(&NegotiationRequest::offering(features).encode())
}

pub(crate) fn selection(features: Features) -> Vec<u8> {
    negotiation(&NegotiationResponse::selecting(features, None).encode())
}

/// A client that was granted these features.
pub(crate) fn negotiated(path: &Path, features: Features) -> Raw {
    let mut raw = Raw::connect(path);
    raw.send(&request(features));
    let (kind, json) = raw.receive_message();
    let answer = NegotiationResponse::decode(&json, features).unwrap();
    let due = NegotiationResponse::selecting(features, None);
    assert_eq!((kind, answer), (NEGOTIATION, due));
    raw
}

/// A client that was granted these features, and has announced memory by descriptors.
pub(crate) fn announced(path: &Path, features: Features) -> Raw {
    let mut raw = negotiated(path, features);
    raw.send(&message(BY_MEMFD, 0, &honest_paths("raw queue", "raw buffer")));
    assert_eq!(raw.receive(8), message(READY, 0, &[]));
    raw
}

/// An eventfd as honest clients make them.
pub(crate) fn event_fd() -> File {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    OwnedFd::from(EventFd::from_value_and_flags(0, flags).unwrap()).into()
}

fn terms(features: Features, event_fds: Option<[File; 2]>) -> Terms {
    let bell = match event_fds {
        _ if features.polling.is_some() => Bell::Nobody,
        Some(files) => Bell::EventFds(files),
        None => Bell::Socket,
    };
    let version = ProtocolVersion::V4;
    Terms { version, lists_are_apart: features.owned_free_lists, bell }
}

/// Shakes hands as an honest client does.
pub(crate) fn client(path: &Path, name: &str, features: Features) -> Rig {
    let event_fds = features.eventfd.then(|| [event_fd(), event_fd()]);
    client_with(path, name, features, event_fds)
}

/// The same with other eventfds.
pub(crate) fn client_with(
    path: &Path,
    name: &str,
    features: Features,
    event_fds: Option<[File; 2]>,
) -> Rig {
    let terms = terms(features, event_fds);
    let [buffer, queue] = Memory::laid_out(CAPACITY, &terms).into_memfds(name);
    let mut rig = Rig::on(terms, announced(path, features), buffer, queue, true);
    let mut fds: Vec<BorrowedFd<'_>> = vec![rig.buffer.as_fd(), rig.queue.as_fd()];
    if let Bell::EventFds([ours, theirs]) = &rig.terms.bell {
        fds.extend([ours.as_fd(), theirs.as_fd()]);
    }
    rig.raw.send_with(&[0], &fds);
    assert_eq!(rig.raw.receive(8), message(ACK, 0, &[]));
    rig
}

/// Shakes hands as an honest server does that grants all of these features, and hears the client's
/// hello.
pub(crate) fn server(mut raw: Raw, features: Features) -> Rig {
    let (kind, json) = raw.receive_message();
    let request = NegotiationRequest::decode(&json).unwrap();
    assert_eq!((kind, request), (NEGOTIATION, NegotiationRequest::offering(features)));
    raw.send(&selection(features));
    server_after_selection(raw, features)
}

/// The rest of it.
pub(crate) fn server_after_selection(mut raw: Raw, features: Features) -> Rig {
    assert_eq!(raw.receive_message().0, BY_MEMFD);
    raw.send(&message(READY, 0, &[]));
    let files: Vec<File> = raw.receive_descriptors().into_iter().map(File::from).collect();
    let (memories, event_fds) = match files.len() {
        2 if !features.eventfd => (files, None),
        4 if features.eventfd => {
            let mut files = files;
            let event_fds = files.split_off(2);
            let [theirs, ours] = <[File; 2]>::try_from(event_fds).unwrap();
            (files, Some([ours, theirs]))
        }
        other => panic!("{other} descriptors"),
    };
    let [buffer, queue] = <[File; 2]>::try_from(memories).unwrap();
    let mut rig = Rig::on(terms(features, event_fds), raw, buffer, queue, false);
    rig.raw.send(&message(ACK, 0, &[]));
    assert_eq!(rig.receive(), b"hello");
    rig
}
