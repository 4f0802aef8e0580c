// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bad peers in sessions of version 4 with each kind of wake-up, and what they can do to lists that
//! each side has for itself.

use shmipc_glommio::Error::{self, Memory};
use shmipc_glommio::MemoryError;
use shmipc_glommio::MemoryError::{Field, SharedTwice, SliceHeader};
use shmipc_glommio::wire::Features;
use shmipc_glommio::wire::layout::{
    FLAG_HAS_NEXT, FLAG_IN_USE, LIST_HEAD_OFFSET, LIST_HEADER_LEN, LIST_SIZE_OFFSET,
    LIST_TAIL_OFFSET, SLICE_HEADER_LEN,
};

use super::attacks::{Attack, attack, bad_chains, bad_indices, bad_offsets, bad_slices};
use super::connecting::RawServer;
use super::due::{IsDue, due};
use super::fields::note_unless_named;
use super::negotiating::asking;
use super::running::Dice;
use crate::bed;
use crate::support::bed::Bed;
use crate::support::negotiated::{KINDS, client, server};
use crate::support::raw::{Memory as RawMemory, Rig, open, write_u32};

/// Gives what makes sessions of this kind with our server, and then with our client.
fn on_both_sides(features: Features, test: impl Fn(&Bed, &str, &dyn Fn() -> Rig)) {
    let bed = bed();
    test(&bed, "client", &|| client(bed.path(), bed.name(), features));
    let there = RawServer::new(&bed, asking(features));
    test(&bed, "server", &|| server(there.accept(&bed), features));
    bed.finish();
}

fn kinds_with_lists_apart() -> impl Iterator<Item = Features> {
    KINDS.into_iter().filter(|features| features.owned_free_lists)
}

#[test]
fn a_session_of_version_4_ends_by_the_same_errors_whatever_wakes_it() {
    for features in KINDS {
        on_both_sides(features, |bed, side, next| {
            let attacks = [bad_offsets(), bad_chains(), bad_slices(), bad_indices()];
            for Attack { name, run, is_due } in attacks.into_iter().flatten() {
                let mut rig = next();
                rig.echo(b"honest as yet");
                rig.wait_for_rest();
                run(&mut rig);
                bed.must_end(&format!("{name}, by a {side}"), is_due, rig);
            }
        });
    }
}

/// The other side's set of lists, and this side's.
fn sets(rig: &Rig) -> [Vec<u32>; 2] {
    let headers: Vec<u32> = rig.lists.iter().map(|&(at, _)| at).collect();
    let (client, server) = headers.split_at(headers.len() / 2);
    match rig.send_base() {
        0 => [server.to_vec(), client.to_vec()],
        _ => [client.to_vec(), server.to_vec()],
    }
}

fn write_heads(rig: &Rig, offset: usize, value: u32) {
    for list in sets(rig).concat() {
        write_u32(&rig.buffer, u64::from(list) + offset as u64, value);
    }
}

/// The slices of the lists with these headers.
fn slices_of(rig: &Rig, headers: &[u32]) -> Vec<u32> {
    let lists = rig.lists.iter().filter(|(at, _)| headers.contains(at));
    lists
        .flat_map(|&(at, list)| {
            let stride = list.slice_capacity + SLICE_HEADER_LEN as u32;
            (0..list.capacity).map(move |place| at + LIST_HEADER_LEN as u32 + place * stride)
        })
        .collect()
}

/// Where the slices of a list are counted from.
fn base_of(rig: &Rig, slice: u32) -> u32 {
    let before = rig.lists.iter().map(|(at, _)| *at).filter(|&at| at < slice);
    before.max().unwrap() + LIST_HEADER_LEN as u32
}

/// What can be written over what without any harm: nobody reads it, or it only makes lists look
/// empty, or longer, than they are.
type Spoil = (&'static str, fn(&mut Rig));

fn harmless() -> Vec<Spoil> {
    vec![
        ("heads off the grid", |rig| write_heads(rig, LIST_HEAD_OFFSET, 5)),
        ("heads at the start", |rig| write_heads(rig, LIST_HEAD_OFFSET, 0)),
        ("heads outside", |rig| write_heads(rig, LIST_HEAD_OFFSET, u32::MAX)),
        ("sizes of nothing", |rig| write_heads(rig, LIST_SIZE_OFFSET, 0)),
        ("sizes below nothing", |rig| write_heads(rig, LIST_SIZE_OFFSET, 1 << 31)),
        ("sizes without end", |rig| write_heads(rig, LIST_SIZE_OFFSET, i32::MAX as u32)),
        ("free slices without flags", |rig| rig.change_free_slices(|slice| slice.flags = 0)),
        ("free slices with content", |rig| {
            rig.change_free_slices(|slice| (slice.size, slice.start) = (u32::MAX, u32::MAX));
        }),
        // A slice that comes round a second time may be one that was given back meanwhile; who wrote
        // the links spoils what it is sent itself.
        ("links into a circle of many", |rig| {
            let [theirs, _] = sets(rig);
            for header in theirs {
                let slices = slices_of(rig, &[header]);
                let next = slices[slices.len() / 2] - base_of(rig, slices[0]);
                for &slice in &slices[slices.len() - 8..] {
                    rig.change_slice(slice, |slice| {
                        (slice.next, slice.flags) = (next, FLAG_HAS_NEXT);
                    });
                }
            }
        }),
        ("the own set in ruins", |rig| {
            let [_, own] = sets(rig);
            for slice in slices_of(rig, &own) {
                rig.change_slice(slice, |slice| (slice.next, slice.flags) = (u32::MAX, 255));
            }
        }),
    ]
}

#[test]
fn what_nobody_reads_can_be_written_over() {
    for features in kinds_with_lists_apart() {
        on_both_sides(features, |bed, side, next| {
            for (name, spoil) in harmless() {
                let mut rig = next();
                rig.wait_for_rest();
                spoil(&mut rig);
                for round in 0..150 {
                    if !rig.is_answered_somehow() {
                        bed.note(format!("{name}, by a {side}: no answer {round}"));
                        break;
                    }
                    // In the middle of traffic, too.
                    if round == 20 {
                        spoil(&mut rig);
                    }
                }
                drop(rig);
                bed.must_see_it_gone(&format!("{name}, by a {side}"));
            }
            bed.must_go_on("what nobody reads");
        });
    }
}

const IS_FIELD: IsDue = due!(Memory(Field { .. }));
const IS_HEADER: IsDue = due!(Memory(SliceHeader { .. }));
const IS_TWICE: IsDue = due!(Memory(SharedTwice { .. }));

/// What ends the session as soon as the other side takes slices, or gives some back.
fn deadly() -> Vec<Attack> {
    let spoilt = |name, is_due, spoil: fn(&mut Rig)| {
        attack(name, is_due, move |rig| {
            spoil(rig);
            // All slices of the other side's set, and some.
            for _ in 0..200 {
                if !rig.is_answered_somehow() {
                    return;
                }
            }
        })
    };
    vec![
        spoilt("links off the grid", IS_FIELD, |rig| {
            rig.change_free_slices(|slice| slice.next += 4);
        }),
        spoilt("links outside", IS_FIELD, |rig| {
            rig.change_free_slices(|slice| slice.next = u32::MAX);
        }),
        spoilt("links over the end", IS_FIELD, |rig| {
            let [theirs, _] = sets(rig);
            for (at, list) in rig.lists.clone() {
                let end = list.capacity * (list.slice_capacity + SLICE_HEADER_LEN as u32);
                for slice in slices_of(rig, &[at]) {
                    if theirs.contains(&at) {
                        rig.change_slice(slice, |slice| slice.next = end);
                    }
                }
            }
        }),
        spoilt("free slices of another list", IS_HEADER, |rig| {
            rig.change_free_slices(|slice| slice.capacity += 4);
        }),
        spoilt("free slices that are in use", IS_HEADER, |rig| {
            rig.change_free_slices(|slice| slice.flags |= FLAG_IN_USE);
        }),
        spoilt("links into a circle of one", IS_TWICE, |rig| {
            let [theirs, _] = sets(rig);
            for slice in slices_of(rig, &theirs) {
                let next = slice - base_of(rig, slice);
                rig.change_slice(slice, |slice| {
                    (slice.next, slice.flags) = (next, FLAG_HAS_NEXT);
                });
            }
        }),
        attack("tails off the grid", IS_FIELD, |rig| {
            write_heads(rig, LIST_TAIL_OFFSET, 5);
            // It takes several slices at once, and gives back what it has not needed for a while.
            rig.allow_v3_fallback(2, 0, b"x");
        }),
        attack("tails outside", IS_FIELD, |rig| {
            write_heads(rig, LIST_TAIL_OFFSET, u32::MAX);
            rig.allow_v3_fallback(2, 0, b"x");
        }),
    ]
}

#[test]
fn lists_of_one_side_that_lead_astray_end_their_session() {
    for features in kinds_with_lists_apart() {
        on_both_sides(features, |bed, side, next| {
            for Attack { name, run, is_due } in deadly() {
                let mut rig = next();
                rig.echo(b"honest as yet");
                rig.wait_for_rest();
                run(&mut rig);
                bed.must_end(&format!("{name}, by a {side}"), is_due, rig);
            }
        });
    }
}

/// Whose list a slice stands in does not matter to who may send it: one that was received can be
/// sent back as it is. One that was never handed out can not be told from that, and harms the list
/// that it is in.
#[test]
fn slices_of_the_other_set_are_given_back_to_it_or_found_out() {
    for features in kinds_with_lists_apart() {
        on_both_sides(features, |bed, side, next| {
            let mut rig = next();
            rig.wait_for_rest();
            for round in 0..100_u32 {
                // Received from the other side's set, and sent on.
                let event = {
                    rig.allow_v3_fallback(2, 0, &round.to_ne_bytes());
                    rig.next_event()
                };
                rig.push(&[open(event.offset)]);
                assert_eq!(rig.receive(), round.to_ne_bytes());
            }
            rig.echo(b"nothing came of it");
            drop(rig);
            bed.must_see_it_gone(&format!("slices sent back, by a {side}"));

            for number in [0, 4, 5, 8, 20, 127, 128, 131, 159] {
                let mut rig = next();
                rig.echo(b"honest as yet");
                rig.wait_for_rest();
                let [theirs, _] = sets(&rig);
                let free = slices_of(&rig, &theirs)[number];
                rig.change_slice(free, |slice| (slice.size, slice.start) = (3, 0));
                rig.push(&[open(free)]);
                for _ in 0..200 {
                    if !rig.is_answered_somehow() {
                        break;
                    }
                }
                drop(rig);
                let name = format!("free slice {number} sent, by a {side}");
                note_unless_named(bed, &name, bed.fate());
            }
            let mut rig = next();
            let slice = rig.fill(b"once");
            rig.push(&[open(slice), open(slice)]);
            bed.must_end(&format!("one sent twice, by a {side}"), IS_TWICE, rig);
            // Again when it was given back: it is then the other side's to hand out, or free.
            let mut rig = next();
            let slice = rig.fill(b"once");
            rig.push(&[open(slice)]);
            assert_eq!(rig.receive(), b"once");
            rig.wait_for_rest();
            rig.push(&[open(slice)]);
            for _ in 0..200 {
                if !rig.is_answered_somehow() {
                    break;
                }
            }
            drop(rig);
            let name = format!("one sent again, by a {side}");
            note_unless_named(bed, &name, bed.fate());
            bed.must_go_on(&name);
        });
    }
}

/// Anything may be written anywhere at any time.
#[test]
fn random_writes_end_no_more_than_their_session_of_version_4() {
    for (number, features) in kinds_with_lists_apart().enumerate() {
        on_both_sides(features, |bed, side, next| {
            for seed in 0..60 {
                let name = format!("seed {seed} of {number}, by a {side}");
                let mut dice = Dice(seed * 3 + number as u64);
                let mut rig = next();
                let slices = rig.all_slices();
                for _ in 0..dice.next(60) {
                    match dice.next(4) {
                        0 => {
                            let offset = slices[dice.next(slices.len() as u64) as usize];
                            rig.try_push(&[open(offset)]);
                        }
                        1 => rig.allow_v3_fallback(2, 0, b"answer me"),
                        _ => dice.scribble(&rig, &slices),
                    }
                }
                rig.ring();
                drop(rig);
                note_unless_named(bed, &name, bed.fate());
                bed.must_go_on(&name);
            }
        });
    }
}

/// Memories that are laid out for another number of sets than was agreed on.
#[test]
fn a_memory_for_the_other_kind_of_lists_is_refused() {
    use std::os::fd::AsFd;

    use crate::support::negotiated::announced;
    use crate::support::raw::{Bell, CAPACITY, Terms};
    let bed = bed();
    let is_due: IsDue = |error| matches!(error, Error::Memory(MemoryError::Field { .. }));
    for features in [KINDS[0], KINDS[1]] {
        let terms = Terms {
            version: shmipc_glommio::ProtocolVersion::V4,
            lists_are_apart: !features.owned_free_lists,
            bell: Bell::Socket,
        };
        let [buffer, queue] = RawMemory::laid_out(CAPACITY, &terms).into_memfds(bed.name());
        let mut raw = announced(bed.path(), features);
        raw.send_with(&[0], &[buffer.as_fd(), queue.as_fd()]);
        bed.must_refuse(&format!("{features:?}"), is_due, raw);
    }
    bed.finish();
}
