// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every field of every header, set to every value that is interesting, before the memory is handed
//! over and in a running session.
//!
//! What has an error of its own is in the tables beside this one. Here it is only asked that the
//! peer's own session ends by an error with a name, or goes on; that it is not just any error; and
//! that nobody else notices.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use shmipc_glommio::Error;
use shmipc_glommio::wire::layout::{
    LIST_CAPACITY_OFFSET, LIST_HEAD_OFFSET, LIST_SIZE_OFFSET, LIST_SLICE_CAPACITY_OFFSET,
    LIST_TAIL_OFFSET, MANAGER_LIST_COUNT_OFFSET, MANAGER_USED_LEN_OFFSET, SLICE_CAPACITY_OFFSET,
    SLICE_FLAGS_OFFSET, SLICE_NEXT_OFFSET, SLICE_SIZE_OFFSET, SLICE_START_OFFSET, element_offset,
};

use super::connecting::{RawServer, client_config};
use crate::support::bed::{Bed, DEADLINE, Fate};
use crate::support::raw::{
    ACK, CAPACITY, LISTS, Memory, Rig, Stage, at_stage, layout, list_offset, message, open,
    read_i64,
};
use crate::{bed, config};

/// Which of the two memories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Of {
    Queue,
    Buffer,
}

/// A field of a header.
struct Field {
    name: String,
    of: Of,
    at: u64,
    /// Four bytes or eight.
    len: usize,
    /// The largest value that can be right.
    limit: i64,
}

/// The fields of headers that stand in the same place for both sides.
fn fields(half: u64) -> Vec<Field> {
    let mut fields = Vec::new();
    let mut add = |name: String, of, at, len, limit| {
        fields.push(Field { name, of, at, len, limit });
    };
    for (number, base) in [0, half].into_iter().enumerate() {
        let field = |name| format!("{name} of queue {number}");
        let at = |offset: usize| base + offset as u64;
        let capacity = i64::from(CAPACITY);
        add(field("capacity"), Of::Queue, at(layout().capacity_offset()), 4, capacity);
        add(field("flag"), Of::Queue, at(layout().flag_offset()), 4, 1);
        add(field("head"), Of::Queue, at(layout().head_offset()), 8, capacity);
        add(field("tail"), Of::Queue, at(layout().tail_offset()), 8, capacity);
    }
    let lists = LISTS.len() as i64;
    add("number of lists".into(), Of::Buffer, MANAGER_LIST_COUNT_OFFSET as u64, 4, lists);
    let all = list_offset(LISTS.len()) as i64 - 8;
    add("length of the lists".into(), Of::Buffer, MANAGER_USED_LEN_OFFSET as u64, 4, all);
    for (number, (slice_capacity, count)) in LISTS.into_iter().enumerate() {
        let field = |name| format!("{name} of list {number}");
        let at = |offset: usize| (list_offset(number) + offset) as u64;
        let last = i64::from((count - 1) * (slice_capacity + 20));
        add(field("size"), Of::Buffer, at(LIST_SIZE_OFFSET), 4, count.into());
        add(field("capacity"), Of::Buffer, at(LIST_CAPACITY_OFFSET), 4, count.into());
        add(field("head"), Of::Buffer, at(LIST_HEAD_OFFSET), 4, last);
        add(field("tail"), Of::Buffer, at(LIST_TAIL_OFFSET), 4, last);
        let at_slice = at(LIST_SLICE_CAPACITY_OFFSET);
        add(field("slice capacity"), Of::Buffer, at_slice, 4, slice_capacity.into());
    }
    fields
}

/// The fields of one slice header.
fn slice_fields(offset: u32, capacity: u32, last: i64) -> Vec<Field> {
    let field = |name: &str, at: usize, limit| Field {
        name: format!("{name} of a slice"),
        of: Of::Buffer,
        at: u64::from(offset) + at as u64,
        len: 4,
        limit,
    };
    vec![
        field("capacity", SLICE_CAPACITY_OFFSET, capacity.into()),
        field("size", SLICE_SIZE_OFFSET, capacity.into()),
        field("start", SLICE_START_OFFSET, capacity.into()),
        field("next", SLICE_NEXT_OFFSET, last),
        field("flags", SLICE_FLAGS_OFFSET, 3),
    ]
}

/// The values that a field is set to. `slices`: where slices stand.
fn values(field: &Field, slices: &[u32]) -> Vec<(&'static str, i64)> {
    let relative = i64::from(LISTS[0].0 + 20);
    vec![
        ("0", 0),
        ("1", 1),
        ("its limit", field.limit),
        ("its limit plus one", field.limit + 1),
        ("half of all ones", if field.len == 8 { i64::MAX } else { i64::from(i32::MAX) }),
        ("all ones", -1),
        ("the lowest", if field.len == 8 { i64::MIN } else { i64::from(i32::MIN) }),
        ("off the grid", relative + 2),
        ("another slice's", relative * 3),
        ("another slice's offset", i64::from(slices[7])),
    ]
}

fn bytes(field: &Field, value: i64) -> Vec<u8> {
    value.to_ne_bytes()[..field.len].to_vec()
}

/// Errors that name what a peer did.
fn is_named(error: &Error) -> bool {
    error.is_peer_fault() || matches!(error, Error::PeerClosed)
}

pub(super) fn note_unless_named(bed: &Bed, name: &str, fate: Result<Fate, String>) {
    match fate {
        Ok(Fate::Ended(error) | Fate::Refused(error)) if is_named(&error) => {}
        other => bed.note(format!("{name}: {other:?}")),
    }
}

#[test]
fn no_field_of_a_memory_that_is_handed_over_does_harm() {
    let bed = bed();
    let honest = Memory::honest();
    let slices: Vec<u32> = (0..8).map(|place| 44 + place * (LISTS[0].0 + 20)).collect();
    let last = i64::from((LISTS[0].1 - 1) * (LISTS[0].0 + 20));
    let half = honest.queue.len() as u64 / 2;
    let fields = fields(half).into_iter().chain(slice_fields(slices[0], LISTS[0].0, last));
    let mut cases = 0;
    for field in fields {
        for (value_name, value) in values(&field, &slices) {
            let name = format!("{} is {value_name}", field.name);
            let mut memory = honest.clone();
            let place = match field.of {
                Of::Queue => &mut memory.queue,
                Of::Buffer => &mut memory.buffer,
            };
            let value = bytes(&field, value);
            place[field.at as usize..field.at as usize + value.len()].copy_from_slice(&value);
            let [buffer, queue] = memory.into_memfds(bed.name());
            let mut raw = at_stage(bed.path(), Stage::Descriptors);
            raw.send_with(&[0], &[buffer.as_fd(), queue.as_fd()]);
            // Accepted, or closed.
            let mut answer = [0; 8];
            let is_accepted = std::io::Read::read_exact(&mut raw.socket, &mut answer).is_ok();
            if is_accepted {
                assert_eq!(answer[..], message(ACK, 3, &[]), "{name}");
                raw.send(&message(3, 3, &[0, 0, 0, 2, 0, 0, 0, 0, b'x']));
                raw.send(&message(1, 3, &[]));
            }
            drop(raw);
            note_unless_named(&bed, &name, bed.fate());
            cases += 1;
        }
        bed.must_go_on(&field.name);
    }
    println!("{cases} cases");
    bed.finish();
}

/// Does to a running session what is due, and lets it show whether it goes on.
fn set_while_running(rig: &mut Rig, field: &Field, value: i64) {
    let file = if field.of == Of::Queue { &rig.queue } else { &rig.buffer };
    file.write_all_at(&bytes(field, value), field.at).unwrap();
    rig.ring();
    rig.allow_v3_fallback(2, 0, b"answer me");
    // The answer goes where the other side thinks that it should, or there is none.
    let before = std::time::Instant::now();
    let tail = read_i64(&rig.queue, rig.received_tail_at());
    while before.elapsed() < DEADLINE / 1000 && !rig.raw.is_at_end() {
        if read_i64(&rig.queue, rig.received_tail_at()) != tail {
            break;
        }
        std::thread::yield_now();
    }
}

#[test]
fn no_field_that_changes_in_a_running_session_does_harm() {
    let bed = Bed::start(config().build().unwrap());
    let server = RawServer::new(&bed, client_config());
    let mut cases = 0;
    for side in ["client", "server"] {
        let next = || {
            if side == "client" {
                Rig::client(bed.path(), bed.name())
            } else {
                server.session(&bed)
            }
        };
        let half = next().queue.metadata().unwrap().len() / 2;
        bed.must_see_it_gone("one to measure");
        for field in fields(half) {
            let count = values(&field, &[0; 8]).len();
            for index in 0..count {
                let mut rig = next();
                let slices = rig.all_slices();
                let (value_name, value) = values(&field, &slices)[index];
                set_while_running(&mut rig, &field, value);
                drop(rig);
                let name = format!("{} becomes {value_name}, by a {side}", field.name);
                note_unless_named(&bed, &name, bed.fate());
                cases += 1;
            }
            bed.must_go_on(&field.name);
        }
        // Of a slice that is on its way, and of one that lies in its free list.
        for is_sent in [true, false] {
            for number in 0..5 {
                for index in 0..values(&fields(half)[0], &[0; 8]).len() {
                    let mut rig = next();
                    let slices = rig.all_slices();
                    let sent = rig.fill(b"x");
                    let capacity = rig.slice(sent).capacity;
                    let target = if is_sent { sent } else { slices[10] };
                    let field = slice_fields(target, capacity, 1000).swap_remove(number);
                    let (value_name, value) = values(&field, &slices)[index];
                    rig.buffer.write_all_at(&bytes(&field, value), field.at).unwrap();
                    rig.push(&[open(sent)]);
                    set_while_running(&mut rig, &field, value);
                    drop(rig);
                    let what = if is_sent { "on its way" } else { "that is free" };
                    let name = format!("{} {what} becomes {value_name}, by a {side}", field.name);
                    note_unless_named(&bed, &name, bed.fate());
                    cases += 1;
                }
            }
            bed.must_go_on("fields of slices");
        }
        // Of an event, which names a slice.
        for word in 0..3 {
            for index in 0..values(&fields(half)[0], &[0; 8]).len() {
                let mut rig = next();
                let slices = rig.all_slices();
                let offset = rig.fill(b"x");
                let tail = read_i64(&rig.queue, rig.tail_at());
                let limit = i64::from(slices[slices.len() - 1]);
                let at =
                    rig.send_base() + element_offset((tail % i64::from(rig.capacity())) as u32);
                let field = Field {
                    name: format!("word {word} of an event"),
                    of: Of::Queue,
                    at: at + 4 * word,
                    len: 4,
                    limit,
                };
                let (value_name, value) = values(&field, &slices)[index];
                rig.queue.write_all_at(&open(offset).to_bytes(), at).unwrap();
                rig.queue.write_all_at(&bytes(&field, value), field.at).unwrap();
                rig.queue.write_all_at(&(tail + 1).to_ne_bytes(), rig.tail_at()).unwrap();
                rig.ring();
                drop(rig);
                let name = format!("{} is {value_name}, by a {side}", field.name);
                note_unless_named(&bed, &name, bed.fate());
                cases += 1;
            }
        }
        bed.must_go_on("words of events");
    }
    println!("{cases} cases");
    bed.finish();
}
