// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who may come in, how many, and with how much.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::unistd::{Gid, Uid, chown, geteuid};
use shmipc_glommio::{AllowedPeers, Error, HandshakeError, MemoryError};

use super::due::{IsDue, due};
use super::files::Directory;
use crate::config;
use crate::support::bed::{Bed, Fate};
use crate::support::raw::{
    BY_FILE, Memory, Raw, Rig, STREAM, Stage, at_stage, honest_paths, message,
};

#[test]
fn other_users_are_refused_before_they_say_anything() {
    let me = geteuid().as_raw();
    // The listener's own honest client is of this user, too; so it is let in by its number.
    let bed = Bed::start(config().allowed_peers(AllowedPeers::Users(vec![me])).build().unwrap());
    bed.must_go_on("a list with this user");
    if !geteuid().is_root() {
        return bed.finish();
    }
    // A thread of another user, as far as files and sockets go.
    let path = bed.path().to_owned();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    let raw = std::thread::spawn(move || {
        // SAFETY: the system call changes this thread only (unlike that of the C library), which
        // ends with this closure.
        let result = unsafe { nix::libc::syscall(nix::libc::SYS_setresuid, -1, 4321, -1) };
        assert_eq!(result, 0);
        Raw::connect(&path)
    });
    let is_due: IsDue =
        due!(Error::Handshake(HandshakeError::PeerNotAllowed { uid: Some(4321), .. }));
    bed.must_refuse("another user", is_due, raw.join().unwrap());
    bed.finish();
}

#[test]
fn a_file_of_somebody_else_is_refused() {
    if !geteuid().is_root() {
        return;
    }
    let directory = Directory::new("owner");
    let bed = Bed::start(config().path_prefix(directory.path("own")).build().unwrap());
    let is_due: IsDue =
        due!(Error::Handshake(HandshakeError::FileOwner { owner: 4321, peer: 0, .. }));
    for number in [0, 1] {
        let paths = directory.put_memory(&Memory::honest());
        let other = (Some(Uid::from_raw(4321)), Some(Gid::from_raw(4321)));
        chown(&*paths[number], other.0, other.1).unwrap();
        let mut raw = Raw::connect(bed.path());
        raw.send(&message(BY_FILE, 2, &honest_paths(&paths[0], &paths[1])));
        bed.must_refuse("somebody else's file", is_due, raw);
        assert_eq!(directory.len(), 2, "it is not removed");
        std::fs::remove_file(&paths[number]).unwrap();
    }
    bed.finish();
}

#[test]
fn sessions_beyond_the_limit_are_refused_until_others_end() {
    // Two are the bed's own honest ones.
    let bed = Bed::start(config().max_sessions(4).build().unwrap());
    let first = Rig::client(bed.path(), bed.name());
    let second = Rig::client(bed.path(), bed.name());
    let is_due: IsDue = due!(Error::Handshake(HandshakeError::TooManySessions(4)));
    let third = || {
        let [buffer, queue] = Memory::honest().into_memfds(bed.name());
        let mut raw = at_stage(bed.path(), Stage::Descriptors);
        raw.send_with(&[0], &[buffer.as_fd(), queue.as_fd()]);
        raw
    };
    // With that, the bed's old session and these two there is room for one: its new one.
    let fourth = Rig::client(bed.path(), bed.name());
    let mut refused = third();
    assert!(matches!(bed.fate(), Ok(Fate::Refused(error)) if is_due(&error)));
    assert!(refused.is_closed_by_peer());
    drop(fourth);
    bed.must_see_it_gone("the fourth");
    drop(first);
    bed.must_see_it_gone("the first");
    let mut again = Rig::client(bed.path(), bed.name());
    again.echo(b"there is room again");
    drop((second, again));
    for _ in 0..2 {
        assert!(matches!(bed.fate(), Ok(Fate::Ended(Error::PeerClosed))));
    }
    bed.must_go_on("sessions that came and went");
    bed.finish();
}

#[test]
fn the_memory_of_all_sessions_is_bounded() {
    let bed = Bed::start(config().max_total_mapped_bytes(40 << 20).build().unwrap());
    let large = || {
        let memory = Memory { buffer_len: 16 << 20, ..Memory::honest() };
        let [buffer, queue] = memory.into_memfds(bed.name());
        let mut raw = at_stage(bed.path(), Stage::Descriptors);
        raw.send_with(&[0], &[buffer.as_fd(), queue.as_fd()]);
        raw
    };
    let mut kept: Vec<Raw> = (0..2)
        .map(|_| {
            let mut raw = large();
            raw.receive(8);
            raw
        })
        .collect();
    let is_due: IsDue = due!(Error::Memory(MemoryError::TooLarge { limit: 0x280_0000, .. }));
    bed.must_refuse("a third of 16 MiB", is_due, large());
    drop(kept.pop());
    bed.must_see_it_gone("one of them");
    let mut raw = large();
    raw.receive(8);
    drop((raw, kept));
    for _ in 0..2 {
        assert!(matches!(bed.fate(), Ok(Fate::Ended(Error::PeerClosed))));
    }
    bed.finish();
}

#[test]
fn what_is_not_taken_from_the_queue_ends_the_session_in_time() {
    let bed = Bed::start(config().stall_limit(Some(Duration::from_millis(400))).build().unwrap());
    let is_due: IsDue = due!(Error::PeerStalled(_));
    for _ in 0..3 {
        let mut rig = Rig::client(bed.path(), bed.name());
        rig.echo(b"alive");
        // Its answer is not taken.
        rig.fall_back(STREAM, 0, b"x");
        bed.must_end("a peer that takes nothing", is_due, rig);
    }
    // One that has nothing to take may be as quiet as it likes.
    let mut quiet = Rig::client(bed.path(), bed.name());
    quiet.echo(b"alive");
    std::thread::sleep(Duration::from_secs(1));
    quiet.echo(b"still alive");
    drop(quiet);
    bed.must_see_it_gone("the quiet one");
    bed.finish();
}
