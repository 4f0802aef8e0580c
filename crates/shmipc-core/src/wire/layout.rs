// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where things stand in the shared memory (spec 5.1 and 6.2; `docs/protocol.md#io-queues` and
//! `docs/protocol.md#buffer-memory`).
//!
//! Constants and pure functions only: nothing here touches shared memory. The header types are for
//! snapshots, bytes that nobody writes any more, as tests and tools have them; live memory is read
//! field by field at the offsets given here.
//!
//! Invariants: all numbers are in the byte order of the host, and every header type encodes to the
//! bytes that it was decoded from, apart from bytes without a meaning. Lengths are computed in
//! `u64` and cannot overflow.
//!
//! Trust: none. A decoded header is what the peer wrote, with nothing checked.

use super::event::EVENT_LEN;
use crate::config::ProtocolVersion;

/// Length of the header of one IO queue in bytes.
pub const QUEUE_HEADER_LEN: usize = 24;

/// Length of the buffer manager's header in bytes.
pub const MANAGER_HEADER_LEN: usize = 8;
/// Where the buffer manager's header has the number of lists, a `u16`.
pub const MANAGER_LIST_COUNT_OFFSET: usize = 0;
/// Where the client's [extension](super::Extension) stands, a `u8` that is 0 in others.
pub const MANAGER_CLIENT_EXTENSION_OFFSET: usize = 2;
/// Where the server's stands.
pub const MANAGER_SERVER_EXTENSION_OFFSET: usize = 3;
/// Where it has the length of all lists together, a `u32`.
pub const MANAGER_USED_LEN_OFFSET: usize = 4;

/// Length of a buffer list's header in bytes.
pub const LIST_HEADER_LEN: usize = 36;
/// Where a list's header has the number of free slices, an `i32`.
pub const LIST_SIZE_OFFSET: usize = 0;
/// Where it has the number of all slices, a `u32`.
pub const LIST_CAPACITY_OFFSET: usize = 4;
/// Where it has the offset of the first free slice, a `u32`.
pub const LIST_HEAD_OFFSET: usize = 8;
/// Where it has the offset of the last free slice, a `u32`.
pub const LIST_TAIL_OFFSET: usize = 12;
/// Where it has the number of data bytes of each slice, a `u32`.
pub const LIST_SLICE_CAPACITY_OFFSET: usize = 16;

/// Length of a buffer slice's header in bytes.
pub const SLICE_HEADER_LEN: usize = 20;
/// Where a slice's header has the number of data bytes that it can hold, a `u32`.
pub const SLICE_CAPACITY_OFFSET: usize = 0;
/// Where it has the number of data bytes that it holds, a `u32`.
pub const SLICE_SIZE_OFFSET: usize = 4;
/// Where it has the place of the first data byte, from the end of the header, a `u32`.
pub const SLICE_START_OFFSET: usize = 8;
/// Where it has the offset of the next slice, a `u32`.
pub const SLICE_NEXT_OFFSET: usize = 12;
/// Where it has the flags, a `u8`.
pub const SLICE_FLAGS_OFFSET: usize = 16;

/// The slice's next is valid.
pub const FLAG_HAS_NEXT: u8 = 1;
/// The slice is part of a message. Peers exist that never set it.
pub const FLAG_IN_USE: u8 = 2;

/// What a cache line is taken to be: 64 bytes on every x86-64.
const CACHE_LINE: u64 = 64;

/// Where the fields of an IO queue's header stand.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::wire::{ProtocolVersion, QueueLayout};
///
/// let layout = QueueLayout::for_version(ProtocolVersion::V3);
/// assert!(layout.indices_are_atomic(8192));
/// // Packed, the head of the second of two such queues would lie across two cache lines.
/// assert!(!QueueLayout::PackedX86.indices_are_atomic(50));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QueueLayout {
    /// Versions 2 and 3 on x86-64: head and tail are misaligned, at 4 and 12.
    PackedX86,
    /// Version 4, and everywhere else: head and tail are aligned, at 8 and 16.
    Aligned,
}

impl QueueLayout {
    /// The layout that a session of this version has on this machine.
    pub const fn for_version(version: ProtocolVersion) -> Self {
        match version {
            ProtocolVersion::V2 | ProtocolVersion::V3 => {
                if cfg!(target_arch = "x86_64") {
                    Self::PackedX86
                } else {
                    Self::Aligned
                }
            }
            ProtocolVersion::V4 => Self::Aligned,
        }
    }

    /// Where the capacity stands, a `u32`.
    pub const fn capacity_offset(self) -> usize {
        0
    }

    /// Where the working flag stands, a `u32`.
    pub const fn flag_offset(self) -> usize {
        match self {
            Self::PackedX86 => 20,
            Self::Aligned => 4,
        }
    }

    /// Where the head stands, an `i64` that the consumer writes.
    pub const fn head_offset(self) -> usize {
        match self {
            Self::PackedX86 => 4,
            Self::Aligned => 8,
        }
    }

    /// Where the tail stands, an `i64` that the producer writes.
    pub const fn tail_offset(self) -> usize {
        match self {
            Self::PackedX86 => 12,
            Self::Aligned => 16,
        }
    }

    /// Whether head and tail of both queues can be read and written in one go.
    ///
    /// The aligned layout needs them aligned for that, the packed one inside one cache line each.
    /// Both queues stand behind each other in memory that starts at a page.
    pub const fn indices_are_atomic(self, capacity: u32) -> bool {
        let second = queue_len(capacity);
        let (head, tail) = (self.head_offset() as u64, self.tail_offset() as u64);
        self.is_atomic_at(head)
            && self.is_atomic_at(tail)
            && self.is_atomic_at(second + head)
            && self.is_atomic_at(second + tail)
    }

    const fn is_atomic_at(self, offset: u64) -> bool {
        match self {
            Self::PackedX86 => offset % CACHE_LINE <= CACHE_LINE - 8,
            Self::Aligned => offset.is_multiple_of(8),
        }
    }
}

/// Length of one IO queue in bytes: its header and `capacity` elements.
pub const fn queue_len(capacity: u32) -> u64 {
    QUEUE_HEADER_LEN as u64 + EVENT_LEN as u64 * capacity as u64
}

/// Length in bytes of the memory that holds both IO queues.
pub const fn queue_memory_len(capacity: u32) -> u64 {
    2 * queue_len(capacity)
}

/// Where the element in `slot` stands, from the start of its queue.
pub const fn element_offset(slot: u32) -> u64 {
    queue_len(slot)
}

/// Length in bytes of a buffer list: its header and `capacity` slices.
///
/// `u64::MAX` when it is even more than that; no memory has that length.
pub const fn list_len(capacity: u32, slice_capacity: u32) -> u64 {
    (SLICE_HEADER_LEN as u64 + slice_capacity as u64)
        .saturating_mul(capacity as u64)
        .saturating_add(LIST_HEADER_LEN as u64)
}

// Every field lies inside its header, right behind the one before it.
const _: () = {
    assert!(MANAGER_LIST_COUNT_OFFSET + 4 == MANAGER_USED_LEN_OFFSET);
    assert!(MANAGER_USED_LEN_OFFSET + 4 == MANAGER_HEADER_LEN);
    assert!(LIST_SIZE_OFFSET + 4 == LIST_CAPACITY_OFFSET);
    assert!(LIST_CAPACITY_OFFSET + 4 == LIST_HEAD_OFFSET);
    assert!(LIST_HEAD_OFFSET + 4 == LIST_TAIL_OFFSET);
    assert!(LIST_TAIL_OFFSET + 4 == LIST_SLICE_CAPACITY_OFFSET);
    assert!(LIST_SLICE_CAPACITY_OFFSET + 4 + 16 == LIST_HEADER_LEN);
    assert!(SLICE_CAPACITY_OFFSET + 4 == SLICE_SIZE_OFFSET);
    assert!(SLICE_SIZE_OFFSET + 4 == SLICE_START_OFFSET);
    assert!(SLICE_START_OFFSET + 4 == SLICE_NEXT_OFFSET);
    assert!(SLICE_NEXT_OFFSET + 4 == SLICE_FLAGS_OFFSET);
    assert!(SLICE_FLAGS_OFFSET + 4 == SLICE_HEADER_LEN);
    assert!(FLAG_HAS_NEXT & FLAG_IN_USE == 0);
};
const _: () = {
    let packed = QueueLayout::PackedX86;
    assert!(packed.capacity_offset() + 4 == packed.head_offset());
    assert!(packed.head_offset() + 8 == packed.tail_offset());
    assert!(packed.tail_offset() + 8 == packed.flag_offset());
    assert!(packed.flag_offset() + 4 == QUEUE_HEADER_LEN);
    let aligned = QueueLayout::Aligned;
    assert!(aligned.capacity_offset() + 4 == aligned.flag_offset());
    assert!(aligned.flag_offset() + 4 == aligned.head_offset());
    assert!(aligned.head_offset() + 8 == aligned.tail_offset());
    assert!(aligned.tail_offset() + 8 == QUEUE_HEADER_LEN);
};

/// A snapshot of an IO queue's header.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::wire::{QueueHeader, QueueLayout};
///
/// # let header = QueueHeader { capacity: 8192, flag: 1, head: 40, tail: 42 };
/// # let captured = header.encode(QueueLayout::PackedX86);
/// let header = QueueHeader::decode(QueueLayout::PackedX86, &captured);
/// assert_eq!(header.tail - header.head, 2); // so many elements wait
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueHeader {
    /// The number of elements.
    pub capacity: u32,
    /// 1 while the consumer is awake.
    pub flag: u32,
    /// How many elements were taken, ever.
    pub head: i64,
    /// How many elements were put in, ever.
    pub tail: i64,
}

impl QueueHeader {
    /// Reads a captured header.
    pub fn decode(layout: QueueLayout, bytes: &[u8; QUEUE_HEADER_LEN]) -> Self {
        Self {
            capacity: u32::from_ne_bytes(field(bytes, layout.capacity_offset())),
            flag: u32::from_ne_bytes(field(bytes, layout.flag_offset())),
            head: i64::from_ne_bytes(field(bytes, layout.head_offset())),
            tail: i64::from_ne_bytes(field(bytes, layout.tail_offset())),
        }
    }

    /// The header's bytes.
    pub fn encode(&self, layout: QueueLayout) -> [u8; QUEUE_HEADER_LEN] {
        let mut bytes = [0; QUEUE_HEADER_LEN];
        put(&mut bytes, layout.capacity_offset(), self.capacity.to_ne_bytes());
        put(&mut bytes, layout.flag_offset(), self.flag.to_ne_bytes());
        put(&mut bytes, layout.head_offset(), self.head.to_ne_bytes());
        put(&mut bytes, layout.tail_offset(), self.tail.to_ne_bytes());
        bytes
    }
}

/// A snapshot of the header of the buffer memory.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::wire::BufferManagerHeader;
/// use shmipc_glommio::wire::layout::list_len;
///
/// // One list of 100 slices of 4076 bytes.
/// let header = BufferManagerHeader { list_count: 1, used_len: list_len(100, 4076) as u32 };
/// assert_eq!(header.used_len, 36 + 100 * (20 + 4076));
/// assert_eq!(BufferManagerHeader::decode(&header.encode()), header);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BufferManagerHeader {
    /// How many buffer lists follow.
    pub list_count: u16,
    /// Length of all lists together, without this header.
    pub used_len: u32,
}

impl BufferManagerHeader {
    /// Reads a captured header.
    pub fn decode(bytes: &[u8; MANAGER_HEADER_LEN]) -> Self {
        Self {
            list_count: u16::from_ne_bytes(field(bytes, MANAGER_LIST_COUNT_OFFSET)),
            used_len: u32::from_ne_bytes(field(bytes, MANAGER_USED_LEN_OFFSET)),
        }
    }

    /// The header's bytes; the two unused ones are 0.
    pub fn encode(&self) -> [u8; MANAGER_HEADER_LEN] {
        let mut bytes = [0; MANAGER_HEADER_LEN];
        put(&mut bytes, MANAGER_LIST_COUNT_OFFSET, self.list_count.to_ne_bytes());
        put(&mut bytes, MANAGER_USED_LEN_OFFSET, self.used_len.to_ne_bytes());
        bytes
    }
}

/// A snapshot of a buffer list's header, without the counters that nobody agrees on.
///
/// Head and tail count from the end of this header.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::wire::ListHeader;
///
/// # let (tail, slice_capacity) = (99 * 4096, 4076);
/// # let header = ListHeader { size: 98, capacity: 100, head: 0, tail, slice_capacity };
/// # let captured = header.encode();
/// let header = ListHeader::decode(&captured);
/// assert_eq!(header.capacity as i32 - header.size, 2); // so many slices are in use
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListHeader {
    /// How many slices are free; below zero for a moment while several allocate.
    pub size: i32,
    /// How many slices there are.
    pub capacity: u32,
    /// Where the first free slice stands.
    pub head: u32,
    /// Where the last free slice stands.
    pub tail: u32,
    /// How many data bytes each slice can hold.
    pub slice_capacity: u32,
}

impl ListHeader {
    /// Reads a captured header.
    pub fn decode(bytes: &[u8; LIST_HEADER_LEN]) -> Self {
        Self {
            size: i32::from_ne_bytes(field(bytes, LIST_SIZE_OFFSET)),
            capacity: u32::from_ne_bytes(field(bytes, LIST_CAPACITY_OFFSET)),
            head: u32::from_ne_bytes(field(bytes, LIST_HEAD_OFFSET)),
            tail: u32::from_ne_bytes(field(bytes, LIST_TAIL_OFFSET)),
            slice_capacity: u32::from_ne_bytes(field(bytes, LIST_SLICE_CAPACITY_OFFSET)),
        }
    }

    /// The header's bytes; the counters are 0.
    pub fn encode(&self) -> [u8; LIST_HEADER_LEN] {
        let mut bytes = [0; LIST_HEADER_LEN];
        put(&mut bytes, LIST_SIZE_OFFSET, self.size.to_ne_bytes());
        put(&mut bytes, LIST_CAPACITY_OFFSET, self.capacity.to_ne_bytes());
        put(&mut bytes, LIST_HEAD_OFFSET, self.head.to_ne_bytes());
        put(&mut bytes, LIST_TAIL_OFFSET, self.tail.to_ne_bytes());
        put(&mut bytes, LIST_SLICE_CAPACITY_OFFSET, self.slice_capacity.to_ne_bytes());
        bytes
    }
}

/// A snapshot of a buffer slice's header.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::wire::SliceHeader;
/// use shmipc_glommio::wire::layout::FLAG_HAS_NEXT;
///
/// # let flags = FLAG_HAS_NEXT;
/// # let header = SliceHeader { capacity: 4076, size: 4076, start: 0, next: 8192, flags };
/// # let captured = header.encode();
/// let header = SliceHeader::decode(&captured);
/// if header.flags & FLAG_HAS_NEXT != 0 {
///     assert_eq!(header.next, 8192); // where the message goes on
/// }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SliceHeader {
    /// How many data bytes the slice can hold.
    pub capacity: u32,
    /// How many it holds.
    pub size: u32,
    /// Where the first of them stands, from the end of this header.
    pub start: u32,
    /// The next slice: from the end of the list header in a free list, from the start of the buffer
    /// memory in a message.
    pub next: u32,
    /// [`FLAG_HAS_NEXT`] and [`FLAG_IN_USE`].
    pub flags: u8,
}

impl SliceHeader {
    /// Reads a captured header.
    pub fn decode(bytes: &[u8; SLICE_HEADER_LEN]) -> Self {
        let [flags] = field(bytes, SLICE_FLAGS_OFFSET);
        Self {
            capacity: u32::from_ne_bytes(field(bytes, SLICE_CAPACITY_OFFSET)),
            size: u32::from_ne_bytes(field(bytes, SLICE_SIZE_OFFSET)),
            start: u32::from_ne_bytes(field(bytes, SLICE_START_OFFSET)),
            next: u32::from_ne_bytes(field(bytes, SLICE_NEXT_OFFSET)),
            flags,
        }
    }

    /// The header's bytes; the three unused ones are 0.
    pub fn encode(&self) -> [u8; SLICE_HEADER_LEN] {
        let mut bytes = [0; SLICE_HEADER_LEN];
        put(&mut bytes, SLICE_CAPACITY_OFFSET, self.capacity.to_ne_bytes());
        put(&mut bytes, SLICE_SIZE_OFFSET, self.size.to_ne_bytes());
        put(&mut bytes, SLICE_START_OFFSET, self.start.to_ne_bytes());
        put(&mut bytes, SLICE_NEXT_OFFSET, self.next.to_ne_bytes());
        put(&mut bytes, SLICE_FLAGS_OFFSET, [self.flags]);
        bytes
    }

    /// Whether [`next`](Self::next) is valid.
    pub const fn has_next(&self) -> bool {
        self.flags & FLAG_HAS_NEXT != 0
    }

    /// Whether the slice is marked as part of a message.
    pub const fn in_use(&self) -> bool {
        self.flags & FLAG_IN_USE != 0
    }
}

/// The `N` bytes of a header from a constant `offset`: in range, by the assertions above.
fn field<const N: usize, const H: usize>(header: &[u8; H], offset: usize) -> [u8; N] {
    std::array::from_fn(|i| header[offset + i])
}

/// Writes the `N` bytes of a header from a constant `offset`.
fn put<const N: usize, const H: usize>(header: &mut [u8; H], offset: usize, bytes: [u8; N]) {
    header[offset..offset + N].copy_from_slice(&bytes);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lengths_are_those_of_the_captured_files() {
        assert_eq!(queue_len(8192), 98328);
        assert_eq!(queue_memory_len(8192), 196_656);
        assert_eq!(element_offset(0), 24);
        assert_eq!(element_offset(8192), queue_len(8192));
        assert_eq!(list_len(63, 8172), 516_140 - 8);
        assert_eq!(list_len(9, 32748), 811_088 - 516_140);
    }

    #[test]
    fn no_length_overflows() {
        assert_eq!(queue_memory_len(u32::MAX), 2 * (24 + 12 * 0xffff_ffff));
        assert_eq!(list_len(u32::MAX, u32::MAX), u64::MAX);
        assert_eq!(list_len(1, u32::MAX), 36 + 20 + 0xffff_ffff);
    }

    #[test]
    fn capacities_that_are_multiples_of_16_keep_indices_in_one_piece() {
        for capacity in (0..=16384).step_by(16).chain([16_777_216]) {
            assert!(QueueLayout::PackedX86.indices_are_atomic(capacity), "{capacity}");
            assert!(QueueLayout::Aligned.indices_are_atomic(capacity), "{capacity}");
        }
    }

    #[test]
    fn capacities_that_split_an_index_are_found() {
        // With 3 the second queue starts at 60, its head stands at 64 and its tail at 72. With 2 it
        // starts at 48 and its tail stands at 60, with 8 at 120 and its head stands at 124.
        assert!(QueueLayout::PackedX86.indices_are_atomic(3));
        assert!(!QueueLayout::PackedX86.indices_are_atomic(2));
        assert!(!QueueLayout::PackedX86.indices_are_atomic(8));
        assert!(QueueLayout::Aligned.indices_are_atomic(2));
        assert!(!QueueLayout::Aligned.indices_are_atomic(3));
        // The last place in a line, and the first one behind it.
        assert!(QueueLayout::PackedX86.is_atomic_at(184));
        assert!(!QueueLayout::PackedX86.is_atomic_at(188));
    }

    #[test]
    fn this_machine_has_the_layout_of_its_architecture() {
        let expected = if std::env::consts::ARCH == "x86_64" { (4, 12, 20) } else { (8, 16, 4) };
        for version in [ProtocolVersion::V2, ProtocolVersion::V3] {
            let layout = QueueLayout::for_version(version);
            let got = (layout.head_offset(), layout.tail_offset(), layout.flag_offset());
            assert_eq!(got, expected);
        }
    }

    proptest! {
        #[test]
        fn headers_survive_the_way_there_and_back(
            words: [u32; 5],
            half: u16,
            byte: u8,
            head: i64,
            tail: i64,
        ) {
            let [a, b, c, d, e] = words;
            for layout in [QueueLayout::PackedX86, QueueLayout::Aligned] {
                let queue = QueueHeader { capacity: a, flag: b, head, tail };
                prop_assert_eq!(QueueHeader::decode(layout, &queue.encode(layout)), queue);
            }
            let manager = BufferManagerHeader { list_count: half, used_len: a };
            prop_assert_eq!(BufferManagerHeader::decode(&manager.encode()), manager);
            let list = ListHeader {
                size: a as i32, capacity: b, head: c, tail: d, slice_capacity: e,
            };
            prop_assert_eq!(ListHeader::decode(&list.encode()), list);
            let slice = SliceHeader { capacity: a, size: b, start: c, next: d, flags: byte };
            prop_assert_eq!(SliceHeader::decode(&slice.encode()), slice);
        }
    }
}
