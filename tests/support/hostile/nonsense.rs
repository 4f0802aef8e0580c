// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a peer can do in a running session that makes no sense and does no harm: the session goes
//! on.

use shmipc_glommio::wire::Event;
use shmipc_glommio::wire::layout::{
    LIST_CAPACITY_OFFSET, LIST_SIZE_OFFSET, LIST_SLICE_CAPACITY_OFFSET,
};

use crate::support::raw::{Rig, STREAM, layout, message, open, write_u32};

/// A stream that neither side has.
const NOBODYS: u32 = 77;

pub(crate) type Nonsense = (&'static str, fn(&mut Rig));

pub(crate) fn nonsense() -> Vec<Nonsense> {
    vec![
        ("StreamClose of a stream that is not", |rig| {
            rig.raw.send(&message(2, 3, &NOBODYS.to_be_bytes()));
        }),
        ("the end of a stream that is not", |rig| push_state(rig, NOBODYS, 1)),
        ("half the end of a stream that is not", |rig| push_state(rig, NOBODYS, 2)),
        ("an end over the socket of a stream that is not", |rig| {
            rig.allow_v3_fallback(NOBODYS, 1, b"");
        }),
        ("data without bytes over the socket", |rig| rig.allow_v3_fallback(STREAM, 0, b"")),
        ("a slice without bytes", |rig| {
            let offset = rig.fill(b"");
            rig.push(&[open(offset)]);
        }),
        ("undefined bits of a status", |rig| {
            let offset = rig.fill(b"bits");
            let status = 0xffff_ff00;
            rig.push(&[Event { status, ..open(offset) }]);
            assert_eq!(rig.receive(), b"bits");
        }),
        ("HotRestart", |rig| rig.raw.send(&message(8, 3, &[7; 8]))),
        ("HotRestartAck", |rig| rig.raw.send(&message(9, 3, &[7; 8]))),
        ("a thousand rings for nothing", |rig| {
            for _ in 0..1000 {
                rig.ring();
            }
        }),
        ("a working flag that is none", |rig| {
            let at = rig.receive_base() + layout().flag_offset() as u64;
            write_u32(&rig.queue, at, u32::MAX);
        }),
        ("capacities of queues", |rig| {
            for base in [rig.send_base(), rig.receive_base()] {
                let at = base + layout().capacity_offset() as u64;
                write_u32(&rig.queue, at, u32::MAX);
            }
        }),
        ("the number and the length of lists", |rig| {
            write_u32(&rig.buffer, 0, u32::MAX);
            write_u32(&rig.buffer, 4, u32::MAX);
        }),
        ("capacities of lists", |rig| {
            for (at, _) in rig.lists.clone() {
                let at = u64::from(at);
                write_u32(&rig.buffer, at + LIST_CAPACITY_OFFSET as u64, 0);
                write_u32(&rig.buffer, at + LIST_SLICE_CAPACITY_OFFSET as u64, u32::MAX);
            }
        }),
        ("the highest number of free slices", |rig| set_sizes(rig, i32::MAX)),
        ("the lowest number of free slices", |rig| {
            set_sizes(rig, i32::MIN);
            comes_over_the_socket(rig);
        }),
        ("no free slices", |rig| {
            set_sizes(rig, 0);
            comes_over_the_socket(rig);
        }),
    ]
}

fn push_state(rig: &mut Rig, stream_id: u32, status: u32) {
    let offset = 0;
    rig.push(&[Event { stream_id, offset, status }]);
}

fn set_sizes(rig: &mut Rig, size: i32) {
    for (at, _) in rig.lists.clone() {
        write_u32(&rig.buffer, u64::from(at) + LIST_SIZE_OFFSET as u64, size as u32);
    }
}

/// The other side finds no slice for its answer, and from then on sends over the socket.
fn comes_over_the_socket(rig: &mut Rig) {
    rig.allow_v3_fallback(STREAM, 0, b"x");
    assert_eq!(rig.receive_data(), b"x");
    rig.is_on_socket = true;
}
