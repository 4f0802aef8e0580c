// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that moves while it is read: another thread writes to it, or it is taken away. And flags
//! that say the same all the time.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use shmipc_glommio::wire::Event;
use shmipc_glommio::wire::layout::SLICE_HEADER_LEN;
use shmipc_glommio::{Error, MemoryError};

use super::attacks::{Attack, attack};
use super::connecting::{RawServer, client_config};
use super::due::{IsDue, due};
use super::files::Directory;
use super::negotiating::asking;
use crate::support::bed::{Api, Bed, DEADLINE, Fate};
use crate::support::negotiated::{self, KINDS};
use crate::support::raw::{Rig, STREAM, layout, open, read_i64, write_u32};
use crate::{bed, config};

/// For how long memory is scribbled on.
const A_WHILE: Duration = Duration::from_millis(60);

/// Where a thread writes, and what.
type Place = (&'static str, fn(&Rig) -> (bool, Vec<u64>));

fn places() -> Vec<Place> {
    fn of_slices(rig: &Rig, words: impl Fn(u32) -> Vec<u64>) -> (bool, Vec<u64>) {
        (false, rig.all_slices().into_iter().flat_map(words).collect())
    }
    vec![
        ("headers of slices", |rig| {
            of_slices(rig, |slice| (0..5).map(|word| u64::from(slice) + 4 * word).collect())
        }),
        ("flags of slices", |rig| of_slices(rig, |slice| vec![u64::from(slice) + 16])),
        ("sizes of slices", |rig| of_slices(rig, |slice| vec![u64::from(slice) + 4])),
        ("payload", |rig| {
            of_slices(rig, |slice| {
                let data = u64::from(slice) + SLICE_HEADER_LEN as u64;
                (0..16).map(|word| data + 4 * word).collect()
            })
        }),
        ("headers of lists", |rig| {
            let words = |&(at, _): &(u32, _)| (0..5).map(move |word| u64::from(at) + 4 * word);
            (false, rig.lists.iter().flat_map(words).collect())
        }),
        ("events", |rig| {
            let at = rig.send_base() + 24;
            (true, (0..u64::from(rig.capacity()) * 3).map(|word| at + 4 * word).collect())
        }),
        ("indices of queues", |rig| {
            let words = |base| (0..6).map(move |word| base + 4 * word);
            (true, words(rig.send_base()).chain(words(rig.receive_base())).collect())
        }),
    ]
}

/// A thread writes all over some part of the memory while messages are exchanged. Whatever the
/// other side makes of it, it ends by an error with a name when it ends.
#[test]
fn fields_may_be_rewritten_while_they_are_read() {
    for api in [Api::Bytes, Api::Messages] {
        let bed = Bed::start_with(config().build().unwrap(), api);
        let server = RawServer::new(&bed, client_config());
        rewrite_everything(&bed, |side| match side {
            "client" => Rig::client(bed.path(), bed.name()),
            _ => server.session(&bed),
        });
        bed.finish();
    }
}

/// The same with lists that each side has for itself, and with every wake-up.
#[test]
fn fields_may_be_rewritten_while_they_are_read_in_version_4() {
    for features in KINDS.into_iter().filter(|features| features.owned_free_lists) {
        let bed = Bed::start(config().build().unwrap());
        let server = RawServer::new(&bed, asking(features));
        rewrite_everything(&bed, |side| match side {
            "client" => negotiated::client(bed.path(), bed.name(), features),
            _ => negotiated::server(server.accept(&bed), features),
        });
        bed.finish();
    }
}

/// Sets a flag when it goes.
struct SetAtLast<'a>(&'a AtomicBool);

impl Drop for SetAtLast<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn rewrite_everything(bed: &Bed, next: impl Fn(&str) -> Rig) {
    for (place, words) in places() {
        for side in ["client", "server"] {
            let mut rig = next(side);
            let (in_queue, words) = words(&rig);
            let file = if in_queue { &rig.queue } else { &rig.buffer }.try_clone().unwrap();
            let slices = rig.all_slices();
            let is_over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                // Also when this side panics: the scope waits for the other one.
                let _over = SetAtLast(&is_over);
                scope.spawn(|| {
                    let mut random = 88_172_645_463_325_252_u64;
                    let mut next = || {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        random
                    };
                    while !is_over.load(Ordering::Relaxed) {
                        let at = words[(next() % words.len() as u64) as usize];
                        let value = match next() % 4 {
                            0 => next() as u32,
                            1 => (next() % 200) as u32,
                            2 => slices[(next() % slices.len() as u64) as usize],
                            _ => (next() % 4) as u32,
                        };
                        write_u32(&file, at, value);
                        if next() % 64 == 0 {
                            std::thread::yield_now();
                        }
                    }
                });
                let began = Instant::now();
                while began.elapsed() < A_WHILE && !rig.raw.is_at_end() {
                    for (number, &slice) in slices.iter().enumerate().take(20) {
                        let stream_id = STREAM + (number as u32 % 3);
                        rig.try_push(&[Event { stream_id, ..open(slice) }]);
                    }
                    rig.allow_v3_fallback(STREAM, 0, b"answer me");
                    let tail = read_i64(&rig.queue, rig.received_tail_at());
                    rig.queue.write_all_at(&tail.to_ne_bytes(), rig.head_at()).unwrap();
                }
            });
            drop(rig);
            let name = format!("{place} rewritten by a {side}");
            match bed.fate() {
                Ok(Fate::Ended(error))
                    if error.is_peer_fault() || matches!(error, Error::PeerClosed) => {}
                other => bed.note(format!("{name}: {other:?}")),
            }
            bed.must_go_on(&name);
        }
    }
}

const IS_LOST: IsDue = due!(Error::Memory(MemoryError::Lost));

fn truncations() -> Vec<Attack> {
    let mut all = Vec::new();
    for (what, of_queue) in [("the queue", true), ("the buffers", false)] {
        for len in [0, 4096] {
            all.push(attack(format!("{what} cut to {len} bytes"), IS_LOST, move |rig| {
                let file = if of_queue { &rig.queue } else { &rig.buffer };
                // What can be cut of it without a page of it going away is no loss.
                if file.metadata().unwrap().len() <= len {
                    return file.set_len(0).unwrap();
                }
                file.set_len(len).unwrap();
            }));
        }
    }
    all
}

#[test]
fn memory_that_is_truncated_in_use_ends_its_session() {
    let directory = Directory::new("cut");
    let prefix = directory.path("own");
    for api in [Api::Bytes, Api::Messages] {
        let bed = Bed::start_with(config().path_prefix(&prefix).build().unwrap(), api);
        for with_files in [false, true] {
            for Attack { name, run, is_due } in truncations() {
                let name = format!("{name}, files: {with_files}");
                let mut rig = if with_files {
                    Rig::client_with_files(bed.path(), &directory)
                } else {
                    Rig::client(bed.path(), bed.name())
                };
                rig.echo(b"honest as yet");
                rig.wait_for_rest();
                run(&mut rig);
                // The first word of a page that is left may be read for long; so make it need all.
                for _ in 0..400 {
                    rig.allow_v3_fallback(STREAM, 0, &[7; 200]);
                }
                let fate = bed.fate();
                if !matches!(&fate, Ok(Fate::Ended(error)) if is_due(error)) {
                    bed.note(format!("{name}: {fate:?}"));
                }
                bed.must_go_on(&name);
            }
        }
        bed.finish();
    }
}

#[test]
fn memory_that_is_truncated_while_it_is_handed_over_is_refused() {
    let bed = bed();
    for round in 0..50 {
        let [buffer, queue] = crate::support::raw::Memory::honest().into_memfds(bed.name());
        let stage = crate::support::raw::Stage::Descriptors;
        let mut raw = crate::support::raw::at_stage(bed.path(), stage);
        let cut = if round % 2 == 0 { &buffer } else { &queue };
        std::thread::scope(|scope| {
            let began = Instant::now();
            scope.spawn(move || {
                while began.elapsed() < Duration::from_micros(20 * round) {
                    std::hint::spin_loop();
                }
                cut.set_len(0).unwrap();
            });
            let fds = [&buffer, &queue].map(std::os::fd::AsFd::as_fd);
            raw.send_with(&[0], &fds);
        });
        raw.send(&crate::support::raw::message(1, 3, &[]));
        drop(raw);
        match bed.fate() {
            Ok(Fate::Refused(error) | Fate::Ended(error))
                if error.is_peer_fault() || matches!(error, Error::PeerClosed) => {}
            other => bed.note(format!("round {round}: {other:?}")),
        }
    }
    bed.must_go_on("fifty that took their memory away");
    bed.finish();
}

/// The other side's flag is the peer's to read; it can lie about its own, and about ours.
#[test]
fn a_flag_that_is_always_set_and_one_that_never_is_hold_nobody_up() {
    let bed = bed();
    let server = RawServer::new(&bed, client_config());
    for value in [0, 1, u32::MAX] {
        for side in ["client", "server"] {
            let mut rig = match side {
                "client" => Rig::client(bed.path(), bed.name()),
                _ => server.session(&bed),
            };
            let bases = [rig.send_base(), rig.receive_base()];
            let flags = bases.map(|base| base + layout().flag_offset() as u64);
            let file = rig.queue.try_clone().unwrap();
            let is_over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !is_over.load(Ordering::Relaxed) {
                        flags.iter().for_each(|&at| write_u32(&file, at, value));
                        std::thread::yield_now();
                    }
                });
                let began = Instant::now();
                for number in 0..200_u32 {
                    rig.echo(&number.to_ne_bytes());
                    assert!(began.elapsed() < DEADLINE * 4);
                }
                is_over.store(true, Ordering::Relaxed);
            });
            drop(rig);
            bed.must_see_it_gone(&format!("flags that are {value}, by a {side}"));
        }
    }
    bed.finish();
}

/// Two streams that are given the same slice.
#[test]
fn a_slice_for_two_streams_ends_the_session() {
    let bed = bed();
    let mut rig = Rig::client(bed.path(), bed.name());
    let offset = rig.fill(b"for both");
    let other = Event { stream_id: STREAM + 2, ..open(offset) };
    rig.push(&[open(offset), other]);
    let is_due: IsDue = due!(Error::Memory(MemoryError::SharedTwice { .. }));
    bed.must_end("one slice for two streams", is_due, rig);
    bed.finish();
}
