// SPDX-License-Identifier: MIT OR Apache-2.0
//! Peers that agree on eventfds, and then send something else, or do with them whatever the other
//! owner of an open file can do.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use shmipc_glommio::Error::{self, Handshake};
use shmipc_glommio::{HandshakeError, ProtocolVersion};

use super::connecting::RawServer;
use super::due::{IsDue, due};
use super::files::is_open_here;
use super::negotiating::asking;
use crate::support::bed::Bed;
use crate::support::negotiated::{
    KINDS, WITH_EVENT_FDS, announced, client, client_with, event_fd, negotiated, server,
};
use crate::support::raw::{
    BY_FILE, Bell, CAPACITY, Memory, Rig, STREAM, SYNC, Terms, honest_paths, memfd, message, open,
};
use crate::{bed, config};

/// The most that a write leaves in an eventfd: one more would wait.
const FULL: u64 = u64::MAX - 1;

/// For how long a peer does what it does.
const A_WHILE: Duration = Duration::from_millis(150);

/// How many streams a session may have where that matters.
const STREAMS: usize = 16;

/// How often the other side is made to ring, or is rung at.
const ROUNDS: u32 = 30;

#[test]
fn files_are_not_announced_where_eventfds_are_to_come() {
    let bed = bed();
    for features in [KINDS[2], KINDS[3]] {
        let mut raw = negotiated(bed.path(), features);
        raw.send(&message(BY_FILE, 0, &honest_paths("/dev/shm/q", "/dev/shm/b")));
        let is_due: IsDue =
            due!(Handshake(HandshakeError::Unexpected { got: "ShareMemoryByFilePath", .. }));
        bed.must_refuse("files", is_due, raw);
    }
    bed.finish();
}

/// Memories of a client, and as many eventfds.
fn descriptors(name: &str, event_fds: usize) -> Vec<File> {
    let terms = Terms { lists_are_apart: true, version: ProtocolVersion::V4, bell: Bell::Nobody };
    let mut files: Vec<_> = Memory::laid_out(CAPACITY, &terms).into_memfds(name).into();
    files.extend((0..event_fds).map(|_| event_fd()));
    files
}

#[test]
fn as_many_descriptors_are_due_as_were_agreed_on() {
    let bed = bed();
    let of_four: IsDue = due!(Handshake(HandshakeError::Descriptors { expected: 4, .. }));
    let of_two: IsDue = due!(Handshake(HandshakeError::Descriptors { expected: 2, .. }));
    for (number, features) in KINDS.into_iter().enumerate() {
        let is_due = if features.eventfd { of_four } else { of_two };
        for count in [0, 1, 2, 3, 4, 5, 6, 16, 17, 200] {
            if count == if features.eventfd { 4 } else { 2 } {
                continue;
            }
            let name = format!("{}of{count}kind{number}x", bed.name());
            let mut files = descriptors(&name, count.max(2) - 2);
            files.truncate(count);
            let mut raw = announced(bed.path(), features);
            let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            raw.send_with(&[0], &fds);
            bed.must_refuse(&name, is_due, raw);
            drop(files);
            if is_open_here(&name) {
                bed.note(format!("{name}: descriptors stay open"));
            }
        }
    }
    bed.finish();
}

/// What is not an eventfd.
fn others(name: &str) -> Vec<(&'static str, File)> {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let poll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::EPOLL_CLOEXEC);
    let file = |path| File::options().read(true).write(true).open(path).unwrap();
    // What looks like one by its name.
    let liar = std::env::temp_dir().join(format!("{name}anon_inode:[eventfd]"));
    std::fs::write(&liar, [0; 8]).unwrap();
    let named = file(liar.to_str().unwrap());
    std::fs::remove_file(&liar).unwrap();
    vec![
        ("the end of a pipe to read", reader.into()),
        ("the end of a pipe to write", writer.into()),
        ("a socket", OwnedFd::from(UnixStream::pair().unwrap().0).into()),
        ("a file", named),
        ("a memfd", memfd(name)),
        ("a memfd with the name of an eventfd", memfd("anon_inode:[eventfd]")),
        ("a device", file("/dev/zero")),
        ("a directory", File::open("/dev/shm").unwrap()),
        ("an epoll", poll.unwrap().0.into()),
    ]
}

#[test]
fn what_is_no_eventfd_is_named_and_refused() {
    let bed = bed();
    let is_due: IsDue = due!(Handshake(HandshakeError::NotAnEventFd(_)));
    let is_kind: IsDue = due!(Handshake(HandshakeError::DescriptorKind { .. }));
    for place in [2, 3] {
        for (what, file) in others(bed.name()) {
            let mut files = descriptors(bed.name(), 2);
            files[place] = file;
            let mut raw = announced(bed.path(), WITH_EVENT_FDS);
            let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            raw.send_with(&[0], &fds);
            bed.must_refuse(&format!("{what} at {place}"), is_due, raw);
        }
    }
    for place in [0, 1] {
        let mut files = descriptors(bed.name(), 2);
        files[place] = event_fd();
        let mut raw = announced(bed.path(), WITH_EVENT_FDS);
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        raw.send_with(&[0], &fds);
        bed.must_refuse(&format!("an eventfd as memory {place}"), is_kind, raw);
    }
    bed.finish();
}

/// Sessions with eventfds, with our server and with our client.
fn on_both_sides(test: impl Fn(&Bed, &str, Rig)) {
    let bed = bed();
    for features in [KINDS[2], KINDS[3]] {
        test(&bed, "client", client(bed.path(), bed.name(), features));
        bed.must_go_on("a client");
        let server_there = RawServer::new(&bed, asking(features));
        test(&bed, "server", server(server_there.accept(&bed), features));
        bed.must_go_on("a server");
    }
    bed.finish();
}

fn event_fds(rig: &Rig) -> [File; 2] {
    match &rig.terms.bell {
        Bell::EventFds(files) => files.each_ref().map(|file| file.try_clone().unwrap()),
        _ => panic!("there are none"),
    }
}

fn set_flags(file: &File, flags: OFlag) {
    fcntl(file, FcntlArg::F_SETFL(flags)).unwrap();
}

/// Adds to an eventfd as much as fits.
fn fill(mut file: &File) {
    set_flags(file, OFlag::O_NONBLOCK);
    for value in [FULL, 1 << 63, 1 << 32, 1 << 16, 1, 1] {
        match file.write(&value.to_ne_bytes()) {
            Err(error) if error.kind() != ErrorKind::WouldBlock => panic!("{error}"),
            _ => {}
        }
    }
}

/// Lets another thread do something all the time while the test goes on.
fn meanwhile(spoil: impl Fn() + Sync, go_on: impl FnOnce()) {
    meanwhile_until(spoil, || {}, go_on);
}

/// The same with a thread that may wait for what `release` does.
fn meanwhile_until(spoil: impl Fn() + Sync, release: impl Fn(), go_on: impl FnOnce()) {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                spoil();
            }
        });
        // Also when this side panics, so that the thread ends.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(go_on));
        is_over.store(true, Ordering::Relaxed);
        while !thread.is_finished() {
            release();
            std::thread::sleep(Duration::from_millis(1));
        }
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Makes the other side ring, by sleeping before each of its answers.
fn make_it_ring(rig: &mut Rig, rounds: u32) {
    for number in 0..rounds {
        rig.sleep();
        rig.echo(&number.to_ne_bytes());
    }
}

/// A write to such an eventfd would wait for as long as the peer likes, and the core with it.
#[test]
fn an_eventfd_that_is_full_and_blocks_holds_nobody_up() {
    on_both_sides(|bed, side, mut rig| {
        let [_, theirs] = event_fds(&rig);
        fill(&theirs);
        set_flags(&theirs, OFlag::empty());
        make_it_ring(&mut rig, ROUNDS);
        bed.must_go_on("a full eventfd");
        // And one that is filled again all the time; somebody has to empty it for that.
        meanwhile(
            || {
                let mut count = [0; 8];
                let _ = (&theirs).read(&mut count);
                fill(&theirs);
                set_flags(&theirs, OFlag::empty());
                std::thread::sleep(Duration::from_micros(50));
            },
            || {
                let start = Instant::now();
                while start.elapsed() < A_WHILE {
                    make_it_ring(&mut rig, 1);
                }
                bed.must_go_on("an eventfd that is filled again and again");
            },
        );
        drop(rig);
        bed.must_see_it_gone(&format!("full eventfds, by a {side}"));
    });
}

#[test]
fn an_eventfd_that_turns_non_blocking_all_the_time_still_wakes() {
    on_both_sides(|bed, side, mut rig| {
        let [ours, _] = event_fds(&rig);
        for _ in 0..ROUNDS {
            set_flags(&ours, OFlag::O_NONBLOCK);
            rig.echo(b"non-blocking");
            set_flags(&ours, OFlag::empty());
            rig.echo(b"blocking");
        }
        meanwhile(
            || {
                set_flags(&ours, OFlag::O_NONBLOCK);
                std::thread::yield_now();
            },
            || {
                let start = Instant::now();
                let mut number: u32 = 0;
                while start.elapsed() < A_WHILE || number < ROUNDS {
                    rig.echo(&number.to_ne_bytes());
                    number += 1;
                }
                bed.must_go_on("an eventfd that does not block");
            },
        );
        drop(rig);
        bed.must_see_it_gone(&format!("flags of eventfds, by a {side}"));
    });
}

/// Whoever reads what is meant for the other side takes its wake-ups away, and harms itself alone.
#[test]
fn an_eventfd_that_is_read_empty_by_the_wrong_side_is_the_peers_loss() {
    on_both_sides(|bed, side, mut rig| {
        let [ours, _] = event_fds(&rig);
        set_flags(&ours, OFlag::O_NONBLOCK);
        let write = || {
            let _ = (&ours).write(&1_u64.to_ne_bytes());
        };
        meanwhile_until(
            || {
                // It waits when the other side was faster with the flags.
                set_flags(&ours, OFlag::O_NONBLOCK);
                let _ = (&ours).read(&mut [0; 8]);
            },
            write,
            || {
                let start = Instant::now();
                while start.elapsed() < A_WHILE {
                    write();
                    assert!(rig.is_answered_somehow(), "the socket wakes all the same");
                    // Slowly: the slices of the answers do not come back.
                    std::thread::sleep(Duration::from_millis(2));
                }
                bed.must_go_on("an eventfd that is read empty");
            },
        );
        // From now on they arrive.
        rig.echo(b"heard again");
        drop(rig);
        bed.must_see_it_gone(&format!("stolen wake-ups, by a {side}"));
    });
}

/// One that takes everything and never says that it has handled it: what has to go over the socket,
/// since its slices do not come back, goes there all the same, a little later.
#[test]
fn a_peer_that_never_says_that_it_is_done_is_not_waited_for_for_ever() {
    on_both_sides(|bed, side, mut rig| {
        let kept = rig.over_the_socket();
        let mut answers = 0;
        while rig.over_the_socket() == kept {
            assert!(rig.is_answered_while(false), "after {answers} answers, by a {side}");
            answers += 1;
            assert!(answers < 10_000, "there are not that many slices");
        }
        assert!(answers > 1, "the first ones come by the queue");
        bed.must_go_on("a peer that is always at it");
        drop(rig);
        bed.must_see_it_gone(&format!("a peer that is always at it, as a {side}"));
    });
}

/// One that has streams refused without end and takes nothing: the closes that it has to be told of
/// by its queue, since its paths are not in order, are not kept without end.
#[test]
fn closes_that_nobody_takes_end_their_session() {
    let bed = Bed::start(config().max_streams(STREAMS).build().unwrap());
    let is_due: IsDue = due!(Error::PeerNotReading);
    for features in [KINDS[2], KINDS[3], KINDS[4]] {
        let mut rig = client(bed.path(), bed.name(), features);
        // As many as are kept, and those in the queue.
        for stream in 0..(1 << 16) + 2 * (STREAMS as u32 + CAPACITY) {
            rig.allow_v3_fallback(STREAM + stream, 0, b"x");
        }
        bed.must_end(&format!("closes, with {features:?}"), is_due, rig);
    }
    bed.finish();
}

#[test]
fn a_flood_of_wake_ups_leaves_time_for_others() {
    on_both_sides(|bed, side, mut rig| {
        let [ours, theirs] = event_fds(&rig);
        fill(&ours);
        rig.echo(b"one that was full");
        meanwhile(
            || {
                let _ = (&ours).write(&1_u64.to_ne_bytes());
                let _ = (&theirs).write(&1_u64.to_ne_bytes());
            },
            || {
                let start = Instant::now();
                while start.elapsed() < A_WHILE {
                    rig.echo(b"in the noise");
                    bed.must_go_on("a flood");
                }
            },
        );
        drop(rig);
        bed.must_see_it_gone(&format!("a flood, by a {side}"));
    });
}

/// Eventfds of the client's making that never run empty, or ring at their own side.
#[test]
fn eventfds_of_another_kind_hold_nobody_up() {
    let bed = bed();
    for features in [KINDS[2], KINDS[3]] {
        let endless = || -> File {
            let flags = EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_CLOEXEC;
            let event_fd = EventFd::from_value_and_flags(0, flags).unwrap();
            event_fd.write(FULL).unwrap();
            OwnedFd::from(event_fd).into()
        };
        let one = event_fd();
        let other = one.try_clone().unwrap();
        let cases = [
            ("semaphores that hold all numbers", [endless(), endless()]),
            ("one for both directions", [one, other]),
        ];
        for (name, event_fds) in cases {
            let mut rig = client_with(bed.path(), bed.name(), features, Some(event_fds));
            let start = Instant::now();
            while start.elapsed() < A_WHILE {
                // A write to a full one would keep this thread.
                if name.starts_with("one") {
                    rig.ring();
                }
                rig.sleep();
                let offset = rig.fill(b"noise");
                rig.put(&[open(offset)]);
                if name.starts_with("one") {
                    rig.ring();
                }
                assert_eq!(rig.receive(), b"noise");
                bed.must_go_on(name);
            }
            drop(rig);
            bed.must_see_it_gone(name);
        }
    }
    bed.finish();
}

/// A SyncEvent is a wake-up in every kind of session.
#[test]
fn sync_events_over_the_socket_wake_too() {
    let bed = bed();
    for features in KINDS {
        let sides: [&dyn Fn() -> Rig; 2] = [&|| client(bed.path(), bed.name(), features), &|| {
            let there = RawServer::new(&bed, asking(features));
            server(there.accept(&bed), features)
        }];
        for make in sides {
            let mut rig = make();
            for number in 0..ROUNDS {
                let offset = rig.fill(&number.to_ne_bytes());
                rig.put(&[open(offset)]);
                rig.raw.send(&message(SYNC, 0, &[]));
                assert_eq!(rig.receive(), number.to_ne_bytes());
            }
            // Many at once.
            rig.raw.send(&message(SYNC, 0, &[]).repeat(1000));
            rig.echo(b"behind them");
            drop(rig);
            bed.must_see_it_gone("SyncEvents");
        }
        bed.must_go_on("SyncEvents");
    }
    bed.finish();
}

/// A peer that has closed its descriptors can be heard by the socket alone; it cannot be told from
/// one that sleeps, and is not waited for.
#[test]
fn a_peer_that_closes_its_eventfds_is_served_over_the_socket() {
    on_both_sides(|bed, side, mut rig| {
        rig.echo(b"as yet");
        rig.terms.bell = Bell::Socket;
        for number in 0..ROUNDS {
            rig.sleep();
            rig.echo(&number.to_ne_bytes());
        }
        drop(rig);
        bed.must_see_it_gone(&format!("closed eventfds, by a {side}"));
    });
}
