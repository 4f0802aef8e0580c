// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a peer can do in a running session, on either side of it, that ends the session by an error
//! with a name.

use shmipc_glommio::Error::{self, Handshake, Memory, Wire};
use shmipc_glommio::MemoryError::{Field, Offset, QueueIndex, SharedTwice, SliceHeader as Header};
use shmipc_glommio::wire::layout::{FLAG_HAS_NEXT, FLAG_IN_USE, SLICE_HEADER_LEN};
use shmipc_glommio::wire::{Event, SliceHeader};
use shmipc_glommio::{HandshakeError, WireError};

use super::due::{IsDue, due};
use crate::support::raw::{
    ACK, BY_FILE, BY_MEMFD, EXCHANGE, FALLBACK, READY, Rig, STREAM, header, honest_paths, message,
    open, read_i64, write_i64,
};

/// What is done to a session, and the error that is due.
pub(crate) struct Attack {
    pub(crate) name: String,
    pub(crate) run: Box<dyn Fn(&mut Rig)>,
    pub(crate) is_due: IsDue,
}

pub(crate) fn attack(
    name: impl Into<String>,
    is_due: IsDue,
    run: impl Fn(&mut Rig) + 'static,
) -> Attack {
    Attack { name: name.into(), run: Box::new(run), is_due }
}

const IS_OFFSET: IsDue = due!(Memory(Offset { .. }));
const IS_TWICE: IsDue = due!(Memory(SharedTwice { .. }));
const IS_HEADER: IsDue = due!(Memory(Header { .. }));
const IS_FIELD: IsDue = due!(Memory(Field { .. }));
const IS_HEAD: IsDue = due!(Memory(QueueIndex { index: "head", .. }));
const IS_TAIL: IsDue = due!(Memory(QueueIndex { index: "tail", .. }));

/// Events that name what is no slice.
pub(crate) fn bad_offsets() -> Vec<Attack> {
    let at = |name, find: fn(&mut Rig) -> u32| {
        attack(name, IS_OFFSET, move |rig| {
            let offset = find(rig);
            rig.push(&[open(offset)]);
        })
    };
    vec![
        at("offset 0", |_| 0),
        at("the second word", |_| 4),
        at("a list header", |rig| rig.lists[0].0),
        at("the header of the second list", |rig| rig.lists[1].0),
        at("a slice and four", |rig| rig.fill(b"x") + 4),
        at("a slice and one", |rig| rig.fill(b"x") + 1),
        at("a slice less four", |rig| rig.fill(b"x") - 4),
        at("behind the last slice", |rig| {
            let (_, list) = rig.lists[1];
            rig.all_slices().last().unwrap() + list.slice_capacity + SLICE_HEADER_LEN as u32
        }),
        at("the last offset", |_| u32::MAX),
        at("the last offset on a word", |_| u32::MAX - 3),
        attack("a bad slice when half-closed", IS_OFFSET, |rig| {
            let status = 2;
            rig.push(&[Event { status, ..open(5) }]);
        }),
        attack("a good slice, then a bad one", IS_OFFSET, |rig| {
            let good = rig.fill(b"good");
            rig.push(&[open(good), open(1)]);
        }),
        // An element that was never written is all zeros.
        attack("an event that was not written", IS_OFFSET, |rig| {
            move_tail(rig, |tail| tail + 1);
        }),
    ]
}

/// Chains of slices that do not end, or lead astray.
pub(crate) fn bad_chains() -> Vec<Attack> {
    let next_of = |name, next: fn(u32) -> u32| {
        attack(name, IS_OFFSET, move |rig| {
            let offset = rig.fill(b"x");
            send_chain(rig, &[offset], Some(next(offset)));
        })
    };
    vec![
        attack("the same slice twice", IS_TWICE, |rig| {
            let offset = rig.fill(b"once");
            rig.push(&[open(offset), open(offset)]);
        }),
        attack("a slice that is its own next", IS_TWICE, |rig| {
            let offset = rig.fill(b"me");
            send_chain(rig, &[offset], Some(offset));
        }),
        attack("two slices in a circle", IS_TWICE, |rig| {
            let slices = [rig.fill(b"you"), rig.fill(b"me")];
            send_chain(rig, &slices, Some(slices[0]));
        }),
        attack("a chain that ends in a circle", IS_TWICE, |rig| {
            let slices = [rig.fill(b"1"), rig.fill(b"2"), rig.fill(b"3")];
            send_chain(rig, &slices, Some(slices[1]));
        }),
        attack("a chain longer than the memory", IS_TWICE, |rig| {
            let slices = rig.all_slices();
            send_chain(rig, &slices, Some(slices[0]));
        }),
        next_of("a next off the grid", |offset| offset + 4),
        next_of("a next outside", |_| u32::MAX),
        next_of("a next of 0", |_| 0),
        attack("a second slice that is too full", IS_HEADER, |rig| {
            let slices = [rig.fill(b"1"), rig.fill(b"2")];
            rig.change_slice(slices[1], |slice| slice.size = slice.capacity + 1);
            send_chain(rig, &slices, None);
        }),
    ]
}

/// Links slices behind each other, the last to `end` if there is one, and sends them.
fn send_chain(rig: &mut Rig, slices: &[u32], end: Option<u32>) {
    let links = slices[1..].iter().copied().map(Some).chain([end]);
    for (&slice, link) in slices.iter().zip(links) {
        if let Some(next) = link {
            rig.change_slice(slice, |slice| (slice.next, slice.flags) = (next, FLAG_HAS_NEXT));
        }
    }
    rig.push(&[open(slices[0])]);
}

/// Slice headers that are not those of their list, or whose bytes lie outside of the slice.
pub(crate) fn bad_slices() -> Vec<Attack> {
    let of = |name, change: fn(&mut SliceHeader)| {
        attack(name, IS_HEADER, move |rig| {
            let offset = rig.fill(b"x");
            rig.change_slice(offset, change);
            rig.push(&[open(offset)]);
        })
    };
    vec![
        of("a size above the capacity", |slice| slice.size = slice.capacity + 1),
        of("the largest size", |slice| slice.size = u32::MAX),
        of("a start above the capacity", |slice| slice.start = slice.capacity + 1),
        of("the largest start", |slice| slice.start = u32::MAX),
        of("bytes over the end", |slice| {
            (slice.start, slice.size) = (8, slice.capacity - 7);
        }),
        of("a byte behind the end", |slice| {
            (slice.start, slice.size) = (slice.capacity, 1);
        }),
        of("start and size that wrap", |slice| {
            (slice.start, slice.size) = (8, u32::MAX - 4);
        }),
        of("start and size that wrap to 0", |slice| {
            (slice.start, slice.size) = (u32::MAX, 1);
        }),
        of("a larger capacity", |slice| slice.capacity += 4),
        of("a smaller capacity", |slice| slice.capacity -= 4),
        of("no capacity", |slice| slice.capacity = 0),
        of("all capacity", |slice| slice.capacity = u32::MAX),
    ]
}

/// States of streams that there are not, in events and over the socket.
pub(crate) fn bad_states() -> Vec<Attack> {
    let in_event = (3..=255).map(|status| {
        attack(format!("state {status}"), IS_FIELD, move |rig| {
            let offset = rig.fill(b"x");
            rig.push(&[Event { status, ..open(offset) }]);
        })
    });
    let over_socket = [3, 4, 128, 255].map(|status| {
        attack(format!("state {status} over the socket"), IS_FIELD, move |rig| {
            rig.allow_v3_fallback(STREAM, status, b"x");
        })
    });
    in_event.chain(over_socket).collect()
}

/// Queue indices that no honest peer has.
pub(crate) fn bad_indices() -> Vec<Attack> {
    let tail = |name, change: fn(i64) -> i64| {
        attack(name, IS_TAIL, move |rig| {
            move_tail(rig, change);
        })
    };
    let head = |name, change: fn(i64) -> i64| {
        attack(name, IS_HEAD, move |rig| {
            // The other side looks at the head only when its queue seems full, and goes on from
            // what it finds. So it is full twice: once it finds what is honest, then what is not.
            let capacity = i64::from(rig.capacity());
            let (head_at, tail_at) = (rig.head_at(), rig.received_tail_at());
            rig.provoke(capacity - read_i64(&rig.queue, tail_at));
            write_i64(&rig.queue, head_at, capacity);
            rig.provoke(capacity);
            write_i64(&rig.queue, head_at, change(capacity));
            rig.allow_v3_fallback(STREAM, 0, b"x");
        })
    };
    vec![
        tail("a tail that goes back", |tail| tail - 1),
        tail("a tail too far ahead", |tail| tail + 33),
        tail("a negative tail", |_| -1),
        tail("the lowest tail", |_| i64::MIN),
        tail("the highest tail", |_| i64::MAX),
        head("a head that goes back", |head| head - 1),
        head("a head too far ahead", |head| head + 33),
        head("a negative head", |_| -1),
        head("the lowest head", |_| i64::MIN),
        head("the highest head", |_| i64::MAX),
    ]
}

fn move_tail(rig: &mut Rig, change: impl Fn(i64) -> i64) {
    let at = rig.tail_at();
    write_i64(&rig.queue, at, change(read_i64(&rig.queue, at)));
    rig.ring();
}

/// Free lists that lead astray. The other side needs slices, or gives some back.
pub(crate) fn bad_lists() -> Vec<Attack> {
    let spoilt = |name, is_due, spoil: fn(&mut Rig)| {
        attack(name, is_due, move |rig| {
            spoil(rig);
            rig.provoke_to_the_end();
        })
    };
    vec![
        spoilt("heads off the grid", IS_FIELD, |rig| {
            rig.change_lists(|list| list.head += 4);
        }),
        spoilt("heads behind the last slice", IS_FIELD, |rig| {
            rig.change_lists(|list| list.head = list.capacity * (list.slice_capacity + 20));
        }),
        spoilt("heads at the end of all memory", IS_FIELD, |rig| {
            rig.change_lists(|list| list.head = u32::MAX);
        }),
        spoilt("links off the grid", IS_FIELD, |rig| {
            rig.change_free_slices(|slice| slice.next += 4);
        }),
        spoilt("links outside", IS_FIELD, |rig| {
            rig.change_free_slices(|slice| slice.next = u32::MAX);
        }),
        spoilt("free slices that are in use", IS_HEADER, |rig| {
            rig.change_free_slices(|slice| slice.flags |= FLAG_IN_USE);
        }),
        spoilt("free slices of another list", IS_HEADER, |rig| {
            rig.change_free_slices(|slice| slice.capacity += 4);
        }),
        spoilt("a free list that is a circle", IS_TWICE, |rig| {
            rig.change_lists(|list| list.head = 0);
            for (at, _) in rig.lists.clone() {
                rig.change_slice(at + 36, |slice| (slice.next, slice.flags) = (0, FLAG_HAS_NEXT));
            }
        }),
        attack("tails off the grid", IS_FIELD, |rig| {
            rig.change_lists(|list| list.tail += 4);
            // It takes several slices at once, and gives back what it does not need.
            rig.allow_v3_fallback(STREAM, 0, b"x");
        }),
    ]
}

/// Bytes on the socket that a running session has no place for.
pub(crate) fn bad_messages() -> Vec<Attack> {
    let unexpected: IsDue = due!(Handshake(HandshakeError::Unexpected { .. }));
    let of = |name, is_due, bytes: Vec<u8>| {
        attack(name, is_due, move |rig| {
            rig.raw.send(&bytes);
        })
    };
    let named = honest_paths("/q", "/b");
    let length: IsDue = due!(Wire(WireError::Length { .. }));
    let too_long: IsDue = due!(Wire(WireError::TooLong { .. }));
    let changed: IsDue = due!(Handshake(HandshakeError::VersionChanged { .. }));
    vec![
        of("garbage", due!(Wire(WireError::Magic(0x5858))), vec![0x58; 64]),
        of("ExchangeMetadata", unexpected, message(EXCHANGE, 3, &[])),
        of("ShareMemoryByFilePath", unexpected, message(BY_FILE, 3, &named)),
        of("ShareMemoryByMemfd", unexpected, message(BY_MEMFD, 3, &named)),
        of("AckShareMemory", unexpected, message(ACK, 3, &[])),
        of("AckReadyRecvFd", unexpected, message(READY, 3, &[])),
        of("SyncEvent of version 2", changed, message(1, 2, &[])),
        of("SyncEvent of version 4's byte", changed, message(1, 0, &[])),
        of("SyncEvent of version 1", due!(Wire(WireError::Version(1))), message(1, 1, &[])),
        of("SyncEvent of version 4", due!(Wire(WireError::Version(4))), message(1, 4, &[])),
        of("a negotiation", changed, message(10, 0, b"{}")),
        of("a negotiation of version 3", due!(Wire(WireError::Version(3))), message(10, 3, b"{}")),
        of("type 11", due!(Wire(WireError::Type(11))), message(11, 3, &[])),
        of("type 255", due!(Wire(WireError::Type(255))), message(255, 3, &[])),
        of("length 0", length, header(0, 0x7758, 3, 1)),
        of("length 7", length, header(7, 0x7758, 3, 1)),
        of("data of length 15", length, header(15, 0x7758, 3, FALLBACK)),
        of("data of length 8", length, message(FALLBACK, 3, &[])),
        of("a short StreamClose", length, message(2, 3, &[0; 3])),
        of("a long StreamClose", length, message(2, 3, &[0; 5])),
        of("data over the limit", too_long, header((1 << 20) + 1, 0x7758, 3, FALLBACK)),
        of("the longest data", too_long, header(u32::MAX, 0x7758, 3, FALLBACK)),
        attack("half a message, then nothing", due!(Error::PeerClosed), |rig| {
            rig.raw.send(&message(1, 3, &[])[..5]);
            rig.raw.socket.shutdown(std::net::Shutdown::Write).unwrap();
        }),
    ]
}
