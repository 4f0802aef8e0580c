// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who may come in, how many, and with how much.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::unistd::{Gid, Uid, chown, geteuid};
use shmipc_glommio::{AllowedPeers, Error, HandshakeError, MemoryError};

use super::due::{IsDue, due};
use super::files::Directory;
use crate::config;
use crate::support::bed::{Bed, DEADLINE, Fate};
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
    let bed = Bed::start(config().stall_timeout(Some(Duration::from_millis(400))).build().unwrap());
    let is_due: IsDue = due!(Error::PeerStalled(_));
    for _ in 0..3 {
        let mut rig = Rig::client(bed.path(), bed.name());
        rig.echo(b"alive");
        // Its answer is not taken.
        rig.allow_v3_fallback(STREAM, 0, b"x");
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

/// Runs `work` in a thread of another user, as far as files and sockets go.
fn as_user<T: Send + 'static>(uid: u32, work: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(move || {
        // SAFETY: the system call changes this thread only (unlike that of the C library), which
        // ends with this closure.
        let result = unsafe { nix::libc::syscall(nix::libc::SYS_setresuid, -1, uid, -1) };
        assert_eq!(result, 0);
        work()
    });
    thread.join().unwrap()
}

/// Behind more than a user may have under way, and more than may wait, an honest client of another
/// user comes in while most of them are still there.
#[test]
fn one_user_at_its_limit_holds_up_nobody_else() {
    if !geteuid().is_root() {
        println!("skipped: only root can be two users");
        return;
    }
    const SILENT: usize = 60;
    for (most_waiting, least_refused) in [(1024, 0), (20, SILENT - 4 - 20)] {
        // So long that none of them gives way by itself while the test runs.
        let config = config().allowed_peers(AllowedPeers::Any).handshake_timeout(6 * DEADLINE);
        let config = config.max_handshakes(8).max_handshakes_per_user(4);
        let bed = Bed::start(config.max_queued_handshakes(most_waiting).build().unwrap());
        let path = bed.path().to_owned();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666))
            .unwrap();
        let mut silent: Vec<_> =
            as_user(4321, move || (0..SILENT).map(|_| Raw::connect(&path)).collect());
        // A client of the bed's own.
        bed.must_go_on("one user's silent connections");
        let refused = silent.iter_mut().filter_map(|raw| raw.is_at_end().then_some(())).count();
        assert!(refused <= least_refused + 4, "{refused} had to go first");
        for _ in 0..least_refused {
            let fate = bed.fate();
            let is_due: IsDue = due!(Error::Handshake(HandshakeError::TooManyQueued(20)));
            assert!(matches!(&fate, Ok(Fate::Refused(error)) if is_due(error)), "{fate:?}");
        }
        drop(silent);
        for _ in 0..SILENT - least_refused {
            let fate = bed.fate();
            let is_due: IsDue =
                due!(Error::Handshake(HandshakeError::Closed { .. } | HandshakeError::GaveWay(_)));
            assert!(matches!(&fate, Ok(Fate::Refused(error)) if is_due(error)), "{fate:?}");
        }
        bed.finish();
    }
}

#[test]
fn refused_connections_without_end_leave_the_core_to_others() {
    let others = AllowedPeers::Users(vec![geteuid().as_raw()]);
    let bed = Bed::start(config().allowed_peers(others).build().unwrap());
    if !geteuid().is_root() {
        println!("skipped: only root can be two users");
        return bed.finish();
    }
    let path = bed.path().to_owned();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    let is_over = Arc::new(AtomicBool::new(false));
    let flooding: Vec<_> = (0..2)
        .map(|_| {
            let (path, is_over) = (path.clone(), Arc::clone(&is_over));
            std::thread::spawn(move || {
                as_user(4321, move || {
                    while !is_over.load(Ordering::Relaxed) {
                        // Its backlog may be full; then somebody else fills it.
                        drop(std::os::unix::net::UnixStream::connect(&path));
                    }
                });
            })
        })
        .collect();
    let mut rig = Rig::client(bed.path(), bed.name());
    for _ in 0..20 {
        rig.echo(b"through it all");
    }
    is_over.store(true, Ordering::Relaxed);
    for thread in flooding {
        thread.join().unwrap();
    }
    drop(rig);
    while !matches!(bed.fate(), Ok(Fate::Ended(Error::PeerClosed))) {}
    bed.finish();
}
