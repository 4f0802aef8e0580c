// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bad servers, and those that go or say nothing, in the handshake with our client.

use std::fs;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use shmipc_glommio::{
    Config, ConfigBuilder, Error, HandshakeError, MemoryKind, ProtocolVersion, SliceClass,
};

use super::bytes::{Bytes, bad_headers, out_of_place_for_a_client};
use super::due::{IsDue, due};
use super::files::{Directory, is_open_here};
use crate::support::bed::{Bed, Fate};
use crate::support::older_kernel;
use crate::support::raw::{
    ACK, BY_FILE, BY_MEMFD, CAPACITY, EXCHANGE, READY, Raw, Rig, STAGES, Stage, memfd, message,
};
use crate::{bed, config};

/// Memory for sessions with a raw server, which has few slices to lose.
pub(super) fn client_config() -> ConfigBuilder {
    config()
        .buffer_size(1 << 20)
        .queue_capacity(CAPACITY)
        .slice_classes([SliceClass::new(64, 30), SliceClass::new(1024, 60)])
}

/// Where raw servers listen.
pub(super) struct RawServer {
    listener: UnixListener,
    path: PathBuf,
    config: Config,
}

impl RawServer {
    /// A server that our client connects to with memory of this configuration.
    pub(super) fn new(bed: &Bed, config: ConfigBuilder) -> Self {
        let path = bed.path().with_extension("raw");
        let config = config.build().unwrap();
        Self { listener: UnixListener::bind(&path).unwrap(), path, config }
    }

    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    pub(super) fn accept(&self, bed: &Bed) -> Raw {
        bed.connect(&self.path, self.config.clone());
        Raw::accept(&self.listener)
    }

    /// A session with our client.
    pub(super) fn session(&self, bed: &Bed) -> Rig {
        Rig::server(self.accept(bed))
    }

    /// A connection of our client, to which a server was honest up to a stage.
    pub(super) fn at_stage(&self, bed: &Bed, stage: Stage) -> Raw {
        let mut raw = self.accept(bed);
        assert_eq!(raw.receive(8), message(EXCHANGE, 3, &[]));
        if stage == Stage::Opening {
            return raw;
        }
        raw.send(&message(EXCHANGE, 3, &[]));
        let (kind, _) = raw.receive_message();
        if stage == Stage::Announcement {
            return raw;
        }
        assert_eq!(kind, BY_MEMFD);
        raw.send(&message(READY, 3, &[]));
        assert_eq!(raw.receive_descriptors().len(), 2);
        raw
    }
}

impl Drop for RawServer {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[test]
fn a_client_names_what_is_wrong_with_the_answers_in_a_handshake() {
    let bed = bed();
    let server = RawServer::new(&bed, client_config());
    for stage in STAGES {
        let mut cases = bad_headers(stage);
        cases.extend(out_of_place_for_a_client(stage));
        for Bytes { name, stage, bytes, is_due } in cases {
            let mut raw = server.at_stage(&bed, stage);
            raw.send(&bytes);
            bed.must_refuse(&format!("{name} at {stage:?}"), is_due, raw);
        }
    }
    bed.finish();
}

#[test]
fn a_client_with_files_leaves_none_behind_when_it_fails() {
    let bed = bed();
    let directory = Directory::new("client");
    let config = client_config().memory(MemoryKind::File).path_prefix(directory.path("own"));
    let server = RawServer::new(&bed, config);
    let unexpected: IsDue = due!(Error::Handshake(HandshakeError::Unexpected { .. }));
    let closed: IsDue = due!(Error::Handshake(HandshakeError::Closed { .. }));
    for stage in [Stage::Opening, Stage::Announcement] {
        let mut raw = server.at_stage(&bed, stage);
        assert_eq!(directory.len(), 2, "the files are not where they are looked for");
        raw.send(&message(READY, 3, &[]));
        bed.must_refuse(&format!("nonsense at {stage:?}"), unexpected, raw);
        assert_eq!(directory.len(), 0, "after nonsense at {stage:?}");
        let raw = server.at_stage(&bed, stage);
        raw.socket.shutdown(Shutdown::Write).unwrap();
        bed.must_refuse(&format!("an end at {stage:?}"), closed, raw);
        assert_eq!(directory.len(), 0, "after an end at {stage:?}");
    }
    bed.finish();
}

/// A server of version 2 says nothing, so its client has a session before anybody has looked.
#[test]
fn a_client_of_version_2_sees_its_server_go() {
    let bed = bed();
    let directory = Directory::new("client2");
    let config = client_config()
        .memory(MemoryKind::File)
        .protocol(ProtocolVersion::V2)
        .path_prefix(directory.path("own"));
    let server = RawServer::new(&bed, config);
    for says in [&b""[..], &message(1, 2, &[])] {
        let mut raw = server.accept(&bed);
        assert_eq!(raw.receive_message().0, BY_FILE);
        raw.send(says);
        raw.socket.shutdown(Shutdown::Both).unwrap();
        bed.must_see_it_gone("a server of version 2 that went");
        assert_eq!(directory.len(), 0);
    }
    bed.finish();
}

#[test]
fn a_server_that_goes_after_any_byte_is_told_apart_from_a_broken_one() {
    let bed = bed();
    let server = RawServer::new(&bed, client_config());
    let is_closed: IsDue = due!(Error::Handshake(HandshakeError::Closed { .. }));
    for (stage, answer) in STAGES.into_iter().zip([EXCHANGE, READY, ACK]) {
        for len in 0..8 {
            let mut raw = server.at_stage(&bed, stage);
            raw.send(&message(answer, 3, &[])[..len]);
            raw.socket.shutdown(Shutdown::Write).unwrap();
            bed.must_refuse(&format!("{len} bytes at {stage:?}"), is_closed, raw);
        }
    }
    bed.finish();
}

#[test]
fn a_server_that_reads_nothing_any_more_is_gone_like_any_other() {
    let bed = bed();
    let server = RawServer::new(&bed, client_config());
    let is_closed: IsDue = due!(Error::Handshake(HandshakeError::Closed { .. }));
    for (stage, answer) in [(Stage::Opening, EXCHANGE), (Stage::Announcement, READY)] {
        let mut raw = server.at_stage(&bed, stage);
        raw.socket.shutdown(Shutdown::Read).unwrap();
        raw.send(&message(answer, 3, &[]));
        bed.must_refuse(&format!("what follows at {stage:?} is not read"), is_closed, raw);
    }
    // With bytes of ours unread, the kernel calls its end a reset.
    for _ in 0..50 {
        drop(server.accept(&bed));
        let fate = bed.fate();
        if !matches!(&fate, Ok(Fate::Refused(error)) if is_closed(error)) {
            bed.note(format!("one that went without reading: {fate:?}"));
        }
    }
    bed.must_go_on("fifty that went without reading");
    bed.finish();
}

#[test]
fn a_server_that_says_nothing_is_left_at_the_timeout() {
    let bed = bed();
    let timeout = Duration::from_millis(200);
    let server = RawServer::new(&bed, client_config().handshake_timeout(timeout));
    let is_due: IsDue = due!(Error::Handshake(HandshakeError::Timeout(_)));
    for (stage, answer) in STAGES.into_iter().zip([EXCHANGE, READY, ACK]) {
        for len in [0, 7] {
            let mut raw = server.at_stage(&bed, stage);
            raw.send(&message(answer, 3, &[])[..len]);
            bed.must_refuse(&format!("{len} bytes at {stage:?}"), is_due, raw);
        }
    }
    bed.finish();
}

/// Where the kernel does not refuse them already.
#[test]
fn a_client_takes_no_descriptors() {
    older_kernel::begin();
    let bed = bed();
    let server = RawServer::new(&bed, client_config());
    let is_due: IsDue = due!(Error::Handshake(HandshakeError::Descriptors { expected: 0, .. }));
    for (stage, answer) in STAGES.into_iter().zip([EXCHANGE, READY, ACK]) {
        for count in [1, 2, 20] {
            let name = format!("{}server{count}{stage:?}", bed.name());
            let files: Vec<_> = (0..count).map(|_| memfd(&name)).collect();
            let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            let mut raw = server.at_stage(&bed, stage);
            raw.send_with(&message(answer, 3, &[]), &fds);
            bed.must_refuse(&format!("{count} at {stage:?}"), is_due, raw);
            drop(files);
            if is_open_here(&name) {
                bed.note(format!("{count} at {stage:?}: descriptors stay open"));
            }
        }
    }
    bed.finish();
}

#[test]
fn a_client_speaks_version_3_with_a_server_of_any_higher_one() {
    let bed = bed();
    let server = RawServer::new(&bed, client_config());
    for version in [4, 255] {
        let mut raw = server.at_stage(&bed, Stage::Opening);
        raw.send(&message(EXCHANGE, version, &[]));
        assert_eq!(raw.receive_message().0, BY_MEMFD);
        raw.send(&message(READY, 3, &[]));
        assert_eq!(raw.receive_descriptors().len(), 2);
        raw.send(&message(ACK, 3, &[]));
        raw.socket.shutdown(Shutdown::Write).unwrap();
        bed.must_see_it_gone("a server of a higher version");
    }
    bed.finish();
}

#[test]
fn nobody_there_is_an_error_of_the_system() {
    let bed = bed();
    let path = bed.path().with_extension("nobody");
    for is_there in [false, true] {
        if is_there {
            // A socket file without anybody behind it.
            drop(UnixListener::bind(&path).unwrap());
        }
        bed.connect(&path, client_config().build().unwrap());
        let fate = bed.fate();
        assert!(matches!(fate, Ok(Fate::Refused(Error::Os { .. }))), "{fate:?}");
    }
    fs::remove_file(&path).unwrap();
    bed.finish();
}
