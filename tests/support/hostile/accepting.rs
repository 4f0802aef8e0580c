// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bad clients, and those that go or say nothing, in the handshake with our server.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use shmipc_glommio::{Error, HandshakeError};

use super::bytes::{Bytes, bad_headers, bad_paths, out_of_place_for_a_server};
use super::due::{IsDue, due};
use super::files::{Directory, bad_descriptors, bad_files, is_open_here};
use super::memories::{bad_buffers, bad_lists, bad_queues};
use crate::support::bed::{Bed, DEADLINE, Fate};
use crate::support::older_kernel;
use crate::support::raw::{
    ACK, BY_FILE, BY_MEMFD, EXCHANGE, Memory, READY, Raw, Rig, STAGES, SYNC, Stage, at_stage,
    honest_paths, memfd, message,
};
use crate::{bed, config};

#[test]
fn a_server_names_what_is_wrong_with_the_bytes_of_a_handshake() {
    let bed = bed();
    let mut cases = bad_paths();
    for stage in [Stage::Opening, Stage::Announcement] {
        cases.extend(bad_headers(stage));
        cases.extend(out_of_place_for_a_server(stage));
    }
    for case in cases {
        let name = format!("{} at {:?}", case.name, case.stage);
        let mut raw = at_stage(bed.path(), case.stage);
        raw.send(&case.bytes);
        bed.must_refuse(&name, case.is_due, raw);
    }
    bed.finish();
}

#[test]
fn a_server_opens_only_files_of_its_directory_that_can_be_memory() {
    for (stage, version) in [(Stage::Opening, 2), (Stage::Announcement, 3)] {
        let directory = Directory::new(&format!("files{version}"));
        let bed = Bed::start(config().path_prefix(directory.path("own")).build().unwrap());
        let good = directory.put_memory(&Memory::honest());
        for (name, bad, is_due) in bad_files(&directory) {
            for [queue, buffer] in [[&bad, &good[1]], [&good[0], &bad]] {
                let name = format!("{name}: {queue} and {buffer}");
                let mut raw = at_stage(bed.path(), stage);
                raw.send(&message(BY_FILE, version, &honest_paths(queue, buffer)));
                bed.must_refuse(&name, is_due, raw);
                directory.put_memory(&Memory::honest());
            }
        }
        bed.finish();
    }
}

#[test]
fn a_server_follows_no_link_out_of_its_directory() {
    let [directory, other] = ["inside", "elsewhere"].map(Directory::new);
    let bed = Bed::start(config().path_prefix(directory.path("own")).build().unwrap());
    other.put_memory(&Memory::honest());
    symlink(&other.0, directory.path("way")).unwrap();
    let mut raw = at_stage(bed.path(), Stage::Opening);
    let [queue, buffer] = ["way/queue", "way/buffer"].map(|name| directory.path(name));
    raw.send(&message(BY_FILE, 2, &honest_paths(&queue, &buffer)));
    // The connection of a peer that is let in stays open.
    raw.socket.shutdown(Shutdown::Write).unwrap();
    bed.must_refuse("a link on the way", due!(Error::Os { .. }), raw);
    bed.finish();
}

#[test]
fn a_refused_peer_has_no_files_removed() {
    let directory = Directory::new("victims");
    let bed = Bed::start(config().path_prefix(directory.path("own")).build().unwrap());
    let victim = directory.path("victim");
    fs::write(&victim, "somebody else's").unwrap();
    let [queue, _] = directory.put_memory(&Memory::honest());
    let missing = directory.path("missing");
    // One that is no queue, one whose buffer is missing, one whose buffer is none.
    for [queue, buffer] in [[&victim, &missing], [&queue, &missing], [&queue, &victim]] {
        let name = format!("{queue} and {buffer}");
        let mut raw = at_stage(bed.path(), Stage::Opening);
        raw.send(&message(BY_FILE, 2, &honest_paths(queue, buffer)));
        bed.must_refuse(&name, |_| true, raw);
        assert_eq!(fs::read(&victim).unwrap(), b"somebody else's", "{name}");
        assert_eq!(directory.len(), 3, "{name}");
    }
    bed.finish();
}

/// Memory given by path was removed by its path: a root server removed a file of anybody's.
#[test]
fn a_directory_that_becomes_a_link_has_no_file_elsewhere_removed() {
    let [root, elsewhere] = ["replaced", "precious"].map(Directory::new);
    let bed = Bed::start(config().path_prefix(root.path("own")).build().unwrap());
    let inside = Directory(root.0.join("inside"));
    fs::create_dir(&inside.0).unwrap();
    let mut rig = Rig::client_with_files(bed.path(), &inside);
    rig.echo(b"honest as yet");
    let names: Vec<_> =
        fs::read_dir(&inside.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    for name in &names {
        fs::write(elsewhere.0.join(name), "precious").unwrap();
    }
    fs::rename(&inside.0, root.0.join("moved")).unwrap();
    symlink(&elsewhere.0, &inside.0).unwrap();
    drop(rig);
    bed.must_see_it_gone("a client that moved its directory");
    assert_eq!((names.len(), elsewhere.len()), (2, 2));
    // What was mapped is removed where it is.
    assert_eq!(fs::read_dir(root.0.join("moved")).unwrap().count(), 0);
    fs::remove_file(&inside.0).unwrap();
    bed.finish();
}

#[test]
fn a_server_takes_two_descriptors_of_memory_and_keeps_no_others() {
    let bed = bed();
    for (number, (name, make, is_due)) in bad_descriptors().into_iter().enumerate() {
        let file_name = format!("{}descriptor{number}x", bed.name());
        let files = make(&file_name);
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let mut raw = at_stage(bed.path(), Stage::Descriptors);
        raw.send_with(&[0], &fds);
        bed.must_refuse(name, is_due, raw);
        drop(files);
        if is_open_here(&file_name) {
            bed.note(format!("{name}: descriptors stay open"));
        }
    }
    bed.finish();
}

/// Where the kernel does not refuse them already.
#[test]
fn descriptors_that_come_early_are_refused() {
    older_kernel::begin();
    let bed = bed();
    let is_due: IsDue = due!(Error::Handshake(HandshakeError::Descriptors { expected: 0, .. }));
    let announcement = message(BY_MEMFD, 3, &honest_paths("queue", "buffer"));
    let cases = [(Stage::Opening, message(EXCHANGE, 3, &[])), (Stage::Announcement, announcement)];
    for (stage, bytes) in cases {
        for count in [1, 2, 20] {
            let name = format!("{}early{count}{stage:?}", bed.name());
            let files: Vec<_> = (0..count).map(|_| memfd(&name)).collect();
            let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            let mut raw = at_stage(bed.path(), stage);
            raw.send_with(&bytes, &fds);
            bed.must_refuse(&name, is_due, raw);
            drop(files);
            if is_open_here(&name) {
                bed.note(format!("{name}: descriptors stay open"));
            }
        }
    }
    bed.finish();
}

#[test]
fn a_server_maps_no_memory_that_does_not_hold_together() {
    let bed = bed();
    let cases = [bad_queues(), bad_buffers(), bad_lists()];
    for (name, spoil, is_due) in cases.into_iter().flatten() {
        let mut memory = Memory::honest();
        spoil(&mut memory);
        let [buffer, queue] = memory.into_memfds(bed.name());
        let mut raw = at_stage(bed.path(), Stage::Descriptors);
        raw.send_with(&[0], &[buffer.as_fd(), queue.as_fd()]);
        bed.must_refuse(name, is_due, raw);
    }
    bed.finish();
}

/// On x86-64 the indices of version 2 and 3 are misaligned, and some are in two cache lines.
#[test]
fn a_server_takes_queues_of_every_capacity() {
    let bed = bed();
    for capacity in (1..=48).chain([50, 1000, 5000]) {
        let [buffer, queue] = Memory::with_capacity(capacity).into_memfds(bed.name());
        let mut raw = at_stage(bed.path(), Stage::Descriptors);
        raw.send_with(&[0], &[buffer.as_fd(), queue.as_fd()]);
        assert_eq!(raw.receive(8), message(ACK, 3, &[]), "{capacity}");
        drop(raw);
        assert!(matches!(bed.fate(), Ok(Fate::Ended(Error::PeerClosed))));
    }
    bed.finish();
}

/// All bytes of an honest client of version 3, with the length of the answer to each part.
fn honest_client() -> [(Vec<u8>, usize); 2] {
    let announcement = message(BY_MEMFD, 3, &honest_paths("queue", "buffer"));
    [(message(EXCHANGE, 3, &[]), 8), (announcement, 8)]
}

#[test]
fn a_client_that_goes_after_any_byte_is_told_apart_from_a_broken_one() {
    let bed = bed();
    let is_closed: IsDue = due!(Error::Handshake(HandshakeError::Closed { .. }));
    let parts = honest_client();
    let total: usize = parts.iter().map(|(bytes, _)| bytes.len()).sum();
    for len in 0..=total {
        let mut raw = Raw::connect(bed.path());
        let mut left = len;
        for (bytes, answer) in &parts {
            let count = left.min(bytes.len());
            raw.send(&bytes[..count]);
            left -= count;
            if count == bytes.len() {
                raw.receive(*answer);
            }
        }
        raw.socket.shutdown(Shutdown::Write).unwrap();
        bed.must_refuse(&format!("{len} bytes"), is_closed, raw);
    }
    let [queue, buffer] = ["/dev/shm/none_queue", "/dev/shm/none_buffer"];
    let opening = message(BY_FILE, 2, &honest_paths(queue, buffer));
    for len in 0..opening.len() {
        let mut raw = Raw::connect(bed.path());
        raw.send(&opening[..len]);
        raw.socket.shutdown(Shutdown::Write).unwrap();
        bed.must_refuse(&format!("{len} bytes of version 2"), is_closed, raw);
    }
    bed.finish();
}

#[test]
fn a_client_that_goes_without_reading_the_answer_is_gone_like_any_other() {
    let bed = bed();
    for _ in 0..50 {
        let mut raw = Raw::connect(bed.path());
        raw.send(&message(EXCHANGE, 3, &[]));
        drop(raw);
        match bed.fate() {
            // The end may be noticed in the middle of the answer, which is the same end.
            Ok(Fate::Refused(Error::Handshake(HandshakeError::Closed { .. }))) => {}
            other => panic!("{other:?}"),
        }
    }
    bed.must_go_on("fifty that went");
    bed.finish();
}

/// Where the peer has closed its side of reading, the kernel says so to whoever sends.
#[test]
fn a_client_that_reads_nothing_any_more_is_gone_at_every_answer() {
    let bed = bed();
    let is_due: IsDue = due!(Error::Handshake(HandshakeError::Closed { .. }));
    for stage in STAGES {
        let mut raw = at_stage(bed.path(), stage);
        raw.socket.shutdown(Shutdown::Read).unwrap();
        match stage {
            Stage::Opening => raw.send(&message(EXCHANGE, 3, &[])),
            Stage::Announcement => {
                raw.send(&message(BY_MEMFD, 3, &honest_paths("queue", "buffer")));
            }
            Stage::Descriptors => {
                let [buffer, queue] = Memory::honest().into_memfds(bed.name());
                raw.send_with(&[0], &[buffer.as_fd(), queue.as_fd()]);
            }
        }
        bed.must_refuse(&format!("an answer at {stage:?} that is not read"), is_due, raw);
    }
    bed.finish();
}

#[test]
fn a_handshake_may_come_byte_by_byte_and_announce_any_higher_version() {
    let bed = bed();
    for version in [3, 4, 255] {
        let mut raw = Raw::connect(bed.path());
        let [(mut exchange, _), (announcement, _)] = honest_client();
        exchange[6] = version;
        for (bytes, answer) in [(exchange, EXCHANGE), (announcement, READY)] {
            for byte in bytes {
                raw.send(&[byte]);
                std::thread::sleep(Duration::from_micros(100));
            }
            assert_eq!(raw.receive(8), message(answer, 3, &[]));
        }
        let [buffer, queue] = Memory::honest().into_memfds(bed.name());
        raw.send_with(&[0], &[buffer.as_fd(), queue.as_fd()]);
        assert_eq!(raw.receive(8), message(ACK, 3, &[]));
        drop(raw);
        assert!(matches!(bed.fate(), Ok(Fate::Ended(Error::PeerClosed))));
    }
    bed.finish();
}

#[test]
fn silence_ends_at_the_timeout_wherever_it_starts() {
    let timeout = Duration::from_millis(500);
    let bed = Bed::start(config().handshake_timeout(timeout).build().unwrap());
    let is_due: IsDue = due!(Error::Handshake(HandshakeError::Timeout(_)));
    for stage in STAGES {
        for said in [0, 3, 8, 11] {
            let mut raw = at_stage(bed.path(), stage);
            if stage != Stage::Descriptors {
                let announcement = message(BY_FILE, 2, &honest_paths("queue", "buffer"));
                raw.send(&announcement[..said]);
            }
            bed.must_refuse(&format!("{said} bytes at {stage:?}"), is_due, raw);
        }
    }
    bed.finish();
}

#[test]
fn a_handshake_that_drips_ends_at_the_timeout_too() {
    let timeout = Duration::from_millis(500);
    let bed = Bed::start(config().handshake_timeout(timeout).build().unwrap());
    let mut raw = at_stage(bed.path(), Stage::Announcement);
    let long = message(BY_MEMFD, 3, &honest_paths(&"q".repeat(4000), "/b"));
    let start = Instant::now();
    let mut bytes = long.iter();
    while !raw.is_at_end() {
        assert!(start.elapsed() < DEADLINE, "it may drip for ever");
        raw.send(&[*bytes.next().unwrap()]);
        std::thread::sleep(Duration::from_millis(5));
    }
    let is_due: IsDue = due!(Error::Handshake(HandshakeError::Timeout(_)));
    bed.must_refuse("dripping", is_due, raw);
    bed.finish();
}

#[test]
fn hundreds_of_silent_connections_do_not_keep_an_honest_one_out() {
    let timeout = Duration::from_secs(1);
    let bed = Bed::start(config().handshake_timeout(timeout).build().unwrap());
    let silent: Vec<_> = (0..300).map(|_| Raw::connect(bed.path())).collect();
    bed.must_go_on("three hundred that say nothing");
    for _ in &silent {
        match bed.fate() {
            Ok(Fate::Refused(Error::Handshake(
                HandshakeError::GaveWay(_) | HandshakeError::Timeout(_),
            ))) => {}
            other => panic!("{other:?}"),
        }
    }
    drop(silent);
    bed.must_go_on("all of them went");
    bed.finish();
}

/// Slow on purpose, each of them: a byte now and then, at every stage, for as long as it is let.
#[test]
fn hundreds_of_dripping_handshakes_do_not_keep_an_honest_one_out() {
    const DRIPPING: usize = 300;
    let timeout = Duration::from_secs(1);
    let bed = Bed::start(config().handshake_timeout(timeout).build().unwrap());
    let mut bytes = message(EXCHANGE, 3, &[]);
    bytes.extend(message(BY_MEMFD, 3, &honest_paths(&"q".repeat(4000), "buffer")));
    let (path, is_over) = (bed.path().to_owned(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut all: Vec<_> = (0..DRIPPING).map(|_| Raw::connect(&path)).collect();
            // Some of them have got further than others before they begin.
            for (number, raw) in all.iter_mut().enumerate() {
                raw.send(&bytes[..number % 20]);
            }
            let mut round = 0;
            while !is_over.load(Ordering::Relaxed) {
                for (number, raw) in all.iter_mut().enumerate() {
                    let at = number % 20 + round;
                    raw.send(&bytes[at..=at]);
                }
                round += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        for _ in 0..3 {
            bed.must_go_on("three hundred that drip");
        }
        for _ in 0..DRIPPING {
            match bed.fate() {
                Ok(Fate::Refused(Error::Handshake(
                    HandshakeError::GaveWay(_) | HandshakeError::Timeout(_),
                ))) => {}
                other => bed.note(format!("one that drips: {other:?}")),
            }
        }
        is_over.store(true, Ordering::Relaxed);
    });
    bed.must_go_on("all of them went");
    bed.finish();
}

#[test]
fn over_tcp_there_are_files_and_no_descriptors() {
    let directory = Directory::new("tcp");
    let bed = Bed::start(config().path_prefix(directory.path("own")).build().unwrap());
    let connect = || {
        let socket = TcpStream::connect(bed.tcp_address()).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket
    };
    let over_tcp: IsDue = due!(Error::Handshake(HandshakeError::DescriptorsOverTcp));
    let mut socket = connect();
    let [(exchange, _), (announcement, _)] = honest_client();
    socket.write_all(&exchange).unwrap();
    socket.read_exact(&mut [0; 8]).unwrap();
    socket.write_all(&announcement).unwrap();
    let fate = bed.fate();
    assert!(matches!(&fate, Ok(Fate::Refused(error)) if over_tcp(error)), "{fate:?}");
    assert_eq!(socket.read(&mut [0]).unwrap(), 0);
    for Bytes { name, bytes, is_due, .. } in bad_headers(Stage::Opening) {
        let mut socket = connect();
        socket.write_all(&bytes).unwrap();
        let fate = bed.fate();
        assert!(matches!(&fate, Ok(Fate::Refused(error)) if is_due(error)), "{name}: {fate:?}");
        bed.must_go_on(name);
    }
    let [queue, buffer] = directory.put_memory(&Memory::honest());
    let mut socket = connect();
    socket.write_all(&message(BY_FILE, 2, &honest_paths(&queue, &buffer))).unwrap();
    socket.write_all(&message(SYNC, 3, &[])).unwrap();
    let changed: IsDue = due!(Error::Handshake(HandshakeError::VersionChanged { .. }));
    let fate = bed.fate();
    assert!(matches!(&fate, Ok(Fate::Ended(error)) if changed(error)), "{fate:?}");
    assert_eq!(directory.len(), 0, "the files of a session stay");
    bed.finish();
}
