// SPDX-License-Identifier: MIT OR Apache-2.0
//! Peers that turn bad in a running session, on either side of it.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use shmipc_glommio::Error::{self, Handshake};
use shmipc_glommio::HandshakeError;
use shmipc_glommio::wire::Event;
use shmipc_glommio::wire::layout::LIST_SIZE_OFFSET;

use super::attacks::{
    Attack, attack, bad_chains, bad_indices, bad_lists, bad_messages, bad_offsets, bad_slices,
    bad_states,
};
use super::connecting::{RawServer, client_config};
use super::due::{IsDue, due};
use super::files::is_open_here;
use super::nonsense::nonsense;
use crate::support::bed::{Api, Bed, DEADLINE};
use crate::support::older_kernel;
use crate::support::raw::{Rig, memfd, message, open, read_u32, write_u32};
use crate::{bed, config};

/// Runs attacks against our server, and against our client.
fn attack_both_sides(attacks: fn() -> Vec<Attack>) {
    for api in [Api::Bytes, Api::Messages] {
        attack_both_sides_of(api, attacks);
    }
}

fn attack_both_sides_of(api: Api, attacks: fn() -> Vec<Attack>) {
    on_both_sides(api, |bed, side, next| {
        for Attack { name, run, is_due } in attacks() {
            let mut rig = next();
            rig.echo(b"honest as yet");
            rig.wait_for_rest();
            run(&mut rig);
            bed.must_end(&format!("{name}, by a {side}"), is_due, rig);
        }
    });
}

/// Gives what makes sessions with our server, and then what makes sessions with our client.
fn on_both_sides(api: Api, test: impl Fn(&Bed, &str, &dyn Fn() -> Rig)) {
    let bed = Bed::start_with(config().build().unwrap(), api);
    test(&bed, "client", &|| Rig::client(bed.path(), bed.name()));
    let server = RawServer::new(&bed, client_config());
    test(&bed, "server", &|| server.session(&bed));
    bed.finish();
}

#[test]
fn events_that_name_no_slice_end_their_session() {
    attack_both_sides(bad_offsets);
}

#[test]
fn chains_without_end_end_their_session() {
    attack_both_sides(bad_chains);
}

#[test]
fn slices_that_reach_outside_end_their_session() {
    attack_both_sides(bad_slices);
}

#[test]
fn unknown_states_end_their_session() {
    attack_both_sides(bad_states);
}

#[test]
fn indices_that_jump_end_their_session() {
    attack_both_sides(bad_indices);
}

#[test]
fn free_lists_that_lead_astray_end_their_session() {
    attack_both_sides(bad_lists);
}

#[test]
fn messages_out_of_place_end_their_session() {
    attack_both_sides(bad_messages);
}

/// Where the kernel does not refuse them already. What they are plays no part, nor what they come
/// with.
#[test]
fn descriptors_end_their_session() {
    older_kernel::begin();
    attack_both_sides(|| {
        let is_due: IsDue = due!(Handshake(HandshakeError::Descriptors { expected: 0, .. }));
        vec![
            attack("descriptors beside a ring", is_due, |rig| {
                let file = memfd("nonsense");
                rig.raw.send_with(&message(1, 3, &[]), &[file.as_fd(), file.as_fd()]);
            }),
            attack("descriptors beside data", is_due, |rig| {
                let file = memfd("nonsense");
                rig.raw.send_with(&message(3, 3, b"\0\0\0\x02\0\0\0\0data"), &[file.as_fd()]);
            }),
        ]
    });
    assert!(!is_open_here("nonsense"));
}

#[test]
fn nonsense_that_does_no_harm_ends_nothing() {
    on_both_sides(Api::Bytes, |bed, side, next| {
        for (name, run) in nonsense() {
            let mut rig = next();
            rig.wait_for_rest();
            run(&mut rig);
            rig.echo(b"still here");
            drop(rig);
            bed.must_see_it_gone(&format!("{name}, by a {side}"));
            if is_open_here("nonsense") {
                bed.note(format!("{name}, by a {side}: descriptors stay open"));
            }
        }
    });
}

/// A server cannot open streams, so what it sends on one that is not there was overtaken by the
/// stream's end, and only its slices matter.
#[test]
fn slices_for_a_stream_that_is_not_there_come_back() {
    let bed = bed();
    let server = RawServer::new(&bed, client_config());
    let mut rig = server.session(&bed);
    rig.wait_for_rest();
    let sizes = |rig: &Rig| -> Vec<u32> {
        let lists = rig.lists.iter();
        lists
            .map(|(at, _)| read_u32(&rig.buffer, u64::from(*at) + LIST_SIZE_OFFSET as u64))
            .collect()
    };
    let mut due = sizes(&rig);
    let [small, large] = [rig.fill(b"small"), rig.fill(&[7; 1000])];
    let on_77 = |offset| Event { stream_id: 77, ..open(offset) };
    rig.push(&[on_77(small), on_77(large)]);
    due.iter_mut().for_each(|size| *size += 1);
    let start = Instant::now();
    while sizes(&rig) != due {
        assert!(start.elapsed() < DEADLINE, "{:?}, not {due:?}", sizes(&rig));
        std::thread::sleep(Duration::from_millis(1));
    }
    rig.echo(b"still here");
    drop(rig);
    bed.must_see_it_gone("data for nobody");
    bed.finish();
}

/// A random number generator; the seed is in the name of what fails.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn next(&mut self, below: u64) -> u64 {
        // Knuth's multiplier; the low bits of such a generator repeat soon.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
        (self.0 >> 33) % below
    }

    /// A value that is wrong in an interesting way, or that may be right.
    fn value(&mut self, slices: &[u32]) -> u32 {
        match self.next(6) {
            0 => self.next(4) as u32,
            1 => u32::MAX - self.next(4) as u32,
            2 => slices[self.next(slices.len() as u64) as usize],
            3 => 1 << self.next(32),
            4 => self.next(2000) as u32,
            _ => self.next(1 << 32) as u32,
        }
    }

    /// Writes a word somewhere, mostly where it hurts.
    pub(super) fn scribble(&mut self, rig: &Rig, slices: &[u32]) {
        let value = self.value(slices);
        let (file, at): (&File, u64) = match self.next(4) {
            0 => {
                (&rig.queue, self.next(2) * rig.receive_base().max(rig.send_base()) + self.next(24))
            }
            1 => (&rig.queue, self.next(rig.queue.metadata().unwrap().len() - 4)),
            2 => {
                let list = rig.lists[self.next(rig.lists.len() as u64) as usize].0;
                (&rig.buffer, u64::from(list) + self.next(20))
            }
            _ => {
                let slice = slices[self.next(slices.len() as u64) as usize];
                (&rig.buffer, u64::from(slice) + self.next(17))
            }
        };
        // Mostly at words, where the fields are.
        let at = if self.next(8) == 0 { at } else { at & !3 };
        write_u32(file, at, value);
    }
}

/// A peer may write anything anywhere at any time. Which error that gives, or whether it gives one
/// at all, is chance; that nothing else comes of it is not.
#[test]
fn random_writes_end_no_more_than_their_session() {
    on_both_sides(Api::Bytes, |bed, side, next| {
        for seed in 0..150 {
            let name = format!("seed {seed}, by a {side}");
            let mut dice = Dice(seed);
            let mut rig = next();
            let slices = rig.all_slices();
            for _ in 0..dice.next(60) {
                match dice.next(4) {
                    0 => {
                        let offset = dice.value(&slices);
                        let status = dice.next(3) as u32;
                        let stream_id = 2 + dice.next(3) as u32;
                        rig.try_push(&[Event { stream_id, offset, status }]);
                    }
                    1 => rig.allow_v3_fallback(2, 0, b"answer me"),
                    _ => dice.scribble(&rig, &slices),
                }
            }
            rig.ring();
            drop(rig);
            if let Err(problem) = bed.fate() {
                bed.note(format!("{name}: {problem}"));
            }
            bed.must_go_on(&name);
        }
    });
}
