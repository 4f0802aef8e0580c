// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memories that do not hold together when they are handed over.

use shmipc_glommio::Error::{self, Memory as Broken};
use shmipc_glommio::MemoryError::{Field, QueueIndex, TooLarge, TooSmall};

use super::due::{IsDue, due};
use crate::support::raw::{CAPACITY, LISTS, Memory};

/// What is done to an honest memory, and the error that is due.
pub(crate) type Spoilt = (&'static str, fn(&mut Memory), IsDue);

const IS_SMALL: IsDue = due!(Broken(TooSmall { .. }));
const IS_FIELD: IsDue = due!(Broken(Field { .. }));
const IS_LARGE: IsDue = due!(Broken(TooLarge { .. }));
const IS_HEAD: IsDue = due!(Broken(QueueIndex { index: "head", .. }));
const IS_TAIL: IsDue = due!(Broken(QueueIndex { index: "tail", .. }));

pub(crate) fn bad_queues() -> Vec<Spoilt> {
    vec![
        ("no queue memory", |memory| memory.queue.clear(), IS_SMALL),
        ("queues of 47 bytes", |memory| memory.queue.truncate(47), IS_SMALL),
        ("queues of odd size", |memory| memory.queue.push(0), IS_SMALL),
        ("halves of odd size", |memory| memory.queue.extend([0; 2]), IS_SMALL),
        ("capacity 0", |memory| memory.change_queue(0, |queue| queue.capacity = 0), IS_FIELD),
        (
            "capacity 0 in the second queue",
            |memory| memory.change_queue(1, |queue| queue.capacity = 0),
            IS_FIELD,
        ),
        (
            "capacity above the memory",
            |memory| memory.change_queue(0, |queue| queue.capacity = CAPACITY + 1),
            IS_FIELD,
        ),
        (
            "capacity above every memory",
            |memory| memory.change_queue(1, |queue| queue.capacity = u32::MAX),
            IS_FIELD,
        ),
        (
            // Times twelve it is 8 in 32 bits.
            "capacity that wraps",
            |memory| memory.change_queue(0, |queue| queue.capacity = 0x5555_5556),
            IS_FIELD,
        ),
        ("head above tail", |memory| memory.change_queue(0, |queue| queue.head = 1), IS_TAIL),
        (
            "head above tail in the second queue",
            |memory| memory.change_queue(1, |queue| queue.head = 1),
            IS_TAIL,
        ),
        (
            "more than there is room for",
            |memory| memory.change_queue(0, |queue| queue.tail = i64::from(CAPACITY) + 1),
            IS_TAIL,
        ),
        ("a negative head", |memory| memory.change_queue(0, |queue| queue.head = -1), IS_HEAD),
        ("a negative tail", |memory| memory.change_queue(1, |queue| queue.tail = -1), IS_TAIL),
        (
            "negative indices",
            |memory| {
                memory.change_queue(0, |queue| (queue.head, queue.tail) = (i64::MIN, i64::MIN));
            },
            IS_HEAD,
        ),
        (
            "indices at their end",
            |memory| {
                memory.change_queue(0, |queue| (queue.head, queue.tail) = (i64::MAX, i64::MAX));
            },
            IS_HEAD,
        ),
        ("queues over the limit", |memory| memory.queue_len = 1 << 40, IS_LARGE),
    ]
}

pub(crate) fn bad_buffers() -> Vec<Spoilt> {
    vec![
        ("no buffer memory", |memory| memory.buffer.clear(), IS_SMALL),
        ("4 bytes", |memory| memory.buffer.truncate(4), IS_SMALL),
        ("7 bytes", |memory| memory.buffer.truncate(7), IS_SMALL),
        ("8 bytes", |memory| memory.buffer.truncate(8), IS_SMALL),
        ("43 bytes", |memory| memory.buffer.truncate(43), IS_SMALL),
        ("a header and no list", |memory| shrink_to(memory, 8), IS_SMALL),
        ("less than a list header", |memory| shrink_to(memory, 43), IS_SMALL),
        ("a list header and no slice", |memory| shrink_to(memory, 44), IS_SMALL),
        ("no list", |memory| memory.change_manager(|header| header.list_count = 0), IS_FIELD),
        ("33 lists", |memory| memory.change_manager(|header| header.list_count = 33), IS_FIELD),
        (
            "65535 lists",
            |memory| memory.change_manager(|header| header.list_count = u16::MAX),
            IS_FIELD,
        ),
        (
            "one list more than there are",
            |memory| memory.change_manager(|header| header.list_count += 1),
            IS_SMALL,
        ),
        (
            "lists longer than the memory",
            |memory| memory.change_manager(|header| header.used_len += 1),
            IS_SMALL,
        ),
        (
            "lists longer than every memory",
            |memory| memory.change_manager(|header| header.used_len = u32::MAX),
            IS_SMALL,
        ),
        (
            "lists longer than they say",
            |memory| memory.change_manager(|header| header.used_len -= 4),
            IS_SMALL,
        ),
        ("buffers over the limit", |memory| memory.buffer_len = 1 << 40, IS_LARGE),
    ]
}

/// Leaves so many bytes, and a header that knows it.
fn shrink_to(memory: &mut Memory, len: usize) {
    memory.buffer.truncate(len);
    memory.change_manager(|header| header.used_len = len as u32 - 8);
}

pub(crate) fn bad_lists() -> Vec<Spoilt> {
    vec![
        ("no slices", |memory| memory.change_list(0, |list| list.capacity = 0), IS_FIELD),
        ("a slice too many", |memory| memory.change_list(1, |list| list.capacity += 1), IS_SMALL),
        (
            "more slices than there can be",
            |memory| memory.change_list(0, |list| list.capacity = u32::MAX),
            IS_SMALL,
        ),
        (
            // Times the 84 bytes of a slice it is 0 in 32 bits.
            "a number of slices that wraps",
            |memory| memory.change_list(0, |list| list.capacity = 1 << 30),
            IS_SMALL,
        ),
        ("slices of 0", |memory| memory.change_list(0, |list| list.slice_capacity = 0), IS_FIELD),
        ("slices of 63", |memory| memory.change_list(0, |list| list.slice_capacity = 63), IS_FIELD),
        ("slices of 62", |memory| memory.change_list(0, |list| list.slice_capacity = 62), IS_FIELD),
        (
            "slices of all bytes",
            |memory| memory.change_list(0, |list| list.slice_capacity = u32::MAX),
            IS_SMALL,
        ),
        (
            "slices of nearly all bytes",
            |memory| memory.change_list(0, |list| list.slice_capacity = u32::MAX - 3),
            IS_SMALL,
        ),
        (
            // More than 64 bits hold, and with what is before the list, hardly anything.
            "as many slices of as many bytes as can be",
            |memory| {
                memory.change_list(0, |list| {
                    (list.capacity, list.slice_capacity) = (u32::MAX, u32::MAX - 3);
                });
            },
            IS_SMALL,
        ),
        (
            // With its header a slice has 0 bytes in 32 bits.
            "slices that wrap",
            |memory| memory.change_list(1, |list| list.slice_capacity = u32::MAX - 19),
            IS_SMALL,
        ),
        (
            "large slices before small ones",
            |memory| {
                memory.change_list(0, |list| {
                    (list.capacity, list.slice_capacity) = (8, 84 * 16 - 20);
                    (list.head, list.tail) = (0, 0);
                });
            },
            IS_FIELD,
        ),
        ("head off the grid", |memory| memory.change_list(0, |list| list.head = 4), IS_FIELD),
        ("tail off the grid", |memory| memory.change_list(1, |list| list.tail += 4), IS_FIELD),
        (
            "head behind the last slice",
            |memory| memory.change_list(0, |list| list.head = LISTS[0].1 * (LISTS[0].0 + 20)),
            IS_FIELD,
        ),
        ("tail at the end", |memory| memory.change_list(0, |list| list.tail = u32::MAX), IS_FIELD),
        (
            "five million slices",
            |memory| {
                let slices = 5_000_000;
                memory.change_manager(|header| {
                    (header.list_count, header.used_len) = (1, 36 + 24 * slices);
                });
                memory.change_list(0, |list| {
                    (list.capacity, list.slice_capacity) = (slices, 4);
                    (list.head, list.tail) = (0, 0);
                });
                memory.buffer_len = 8 + 36 + 24 * u64::from(slices);
            },
            IS_FIELD,
        ),
    ]
}
