// SPDX-License-Identifier: MIT OR Apache-2.0
//! What shmipc-go 0.2.0 was captured to say and to write, read and written again by `wire`.
//!
//! Every expectation is taken from the `.txt` beside the capture, none from this crate's output.
//! The captures are from x86-64: little-endian, with the packed queue layout.
#![cfg(target_endian = "little")]

use bytes::Bytes;
use shmipc_core::wire::layout::{
    LIST_HEADER_LEN, MANAGER_HEADER_LEN, QUEUE_HEADER_LEN, SLICE_HEADER_LEN, element_offset,
    list_len, queue_len, queue_memory_len,
};
use shmipc_core::wire::{
    BufferManagerHeader, Deframer, EVENT_LEN, Event, EventState, HEADER_LEN, Header, ListHeader,
    MemoryPaths, Message, QueueHeader, QueueLayout, SliceHeader, fallback_header, sync_event,
};

macro_rules! vector {
    ($name:literal) => {
        include_bytes!(concat!("vectors/", $name)).as_slice()
    };
}

const FRESH_BUFFER: &[u8] = vector!("buffer-1MiB-default-fresh.bin");
const BUSY_BUFFER: &[u8] = vector!("buffer-1MiB-default-3inflight.bin");

/// Every message of a stream with its version, in one piece and byte by byte.
fn messages(bytes: &[u8]) -> Vec<(u8, Message)> {
    let take = |piece: usize| {
        let mut deframer = Deframer::new(1 << 20);
        let mut messages = Vec::new();
        for piece in bytes.chunks(piece) {
            deframer.space(piece.len())[..piece.len()].copy_from_slice(piece);
            deframer.commit(piece.len());
            while let Some((header, message)) = deframer.next_message().unwrap() {
                messages.push((header.version, message));
            }
        }
        assert!(deframer.is_empty());
        messages
    };
    let whole = take(bytes.len());
    assert_eq!(take(1), whole);
    whole
}

fn encoded(messages: &[(u8, Message)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (version, message) in messages {
        message.encode(*version, &mut bytes).unwrap();
    }
    bytes
}

/// That a capture is these messages and nothing else, both ways.
#[track_caller]
fn assert_is(capture: &[u8], expected: &[(u8, Message)]) {
    assert_eq!(messages(capture), expected);
    assert_eq!(encoded(expected), capture);
}

fn paths(queue: &str, buffer: &str) -> MemoryPaths {
    MemoryPaths { queue: queue.into(), buffer: buffer.into() }
}

/// Bytes at an offset, as an array.
#[track_caller]
fn at<const N: usize>(memory: &[u8], offset: usize) -> &[u8; N] {
    memory[offset..].first_chunk().unwrap()
}

#[test]
fn handshake_of_version_2_with_files() {
    let announcement = paths("/dev/shm/golab_0_29959_queue_0", "/dev/shm/golab_0_29959_buffer");
    let sync = || (2, Message::SyncEvent);
    let client =
        [(2, Message::ShareMemoryByFilePath(announcement)), sync(), sync(), sync(), sync()];
    assert_is(vector!("handshake-v2-file.c2s.bin"), &client);
    assert_eq!(encoded(&client[..1]).len(), 71);
    assert_is(vector!("handshake-v2-file.s2c.bin"), &[sync(), sync(), sync()]);
}

#[test]
fn handshake_of_version_3_with_files() {
    let announcement = paths("/dev/shm/pyraw_v3file_queue_0", "/dev/shm/pyraw_v3file_buffer");
    let sync = || (3, Message::SyncEvent);
    let exchange = || (3, Message::ExchangeMetadata);
    let client =
        [exchange(), (3, Message::ShareMemoryByFilePath(announcement)), sync(), sync(), sync()];
    assert_is(vector!("handshake-v3-file.c2s.bin"), &client);
    assert_eq!(encoded(&client[..2]).len(), 77);
    let server = [exchange(), (3, Message::AckShareMemory), sync(), sync()];
    assert_is(vector!("handshake-v3-file.s2c.bin"), &server);
}

#[test]
fn handshake_of_version_3_with_memfd() {
    let announcement = paths("/dev/shm/golab_0_30924_queue_0", "/dev/shm/golab_0_30924_buffer");
    let sync = || (3, Message::SyncEvent);
    let exchange = || (3, Message::ExchangeMetadata);
    // One byte in the middle carries the descriptors and is part of no message.
    let capture = vector!("handshake-v3-memfd.c2s.bin");
    let (before, descriptors, after) = (&capture[..79], &capture[79..80], &capture[80..]);
    assert_is(before, &[exchange(), (3, Message::ShareMemoryByMemfd(announcement))]);
    assert_eq!(descriptors, [0]);
    assert_is(after, &[sync(), sync(), sync()]);
    let server =
        [exchange(), (3, Message::AckReadyRecvFd), (3, Message::AckShareMemory), sync(), sync()];
    assert_is(vector!("handshake-v3-memfd.s2c.bin"), &server);
}

#[test]
fn fallback_data_both_ways() {
    let data: Vec<u8> = (0..2000u32).map(|i| (i * 131 + (i >> 8)) as u8).collect();
    let message =
        || Message::FallbackData { stream_id: 2, status: 0, data: Bytes::from(data.clone()) };
    for capture in [vector!("event-fallback-v3-c2s.bin"), vector!("event-fallback-v3-s2c.bin")] {
        assert_eq!(capture.len(), 2016);
        assert_is(capture, &[(3, message())]);
        assert_eq!(fallback_header(3, 2, 0, 2000), capture[..16]);
    }
}

#[test]
fn hot_restart_and_its_answer() {
    assert_is(vector!("event-hotrestart-v3-s2c.bin"), &[(3, Message::HotRestart { epoch: 7 })]);
    assert_is(
        vector!("event-hotrestartack-v3-c2s.bin"),
        &[(3, Message::HotRestartAck { epoch: 7 })],
    );
}

#[test]
fn sync_events_and_stream_close() {
    assert_is(vector!("event-polling-v2.bin"), &[(2, Message::SyncEvent)]);
    assert_is(vector!("event-polling-v3.bin"), &[(3, Message::SyncEvent)]);
    assert_eq!(sync_event(2), vector!("event-polling-v2.bin"));
    assert_eq!(sync_event(3), vector!("event-polling-v3.bin"));
    assert_is(vector!("event-streamclose-v3.bin"), &[(3, Message::StreamClose { stream_id: 2 })]);
}

#[test]
fn a_capture_cut_short_is_waited_for_at_every_byte() {
    let capture = vector!("event-fallback-v3-c2s.bin");
    let header = Header::decode(at(capture, 0)).unwrap();
    assert_eq!(header.encode(), capture[..HEADER_LEN]);
    for end in 0..capture.len() {
        let mut deframer = Deframer::new(2016);
        deframer.space(end)[..end].copy_from_slice(&capture[..end]);
        deframer.commit(end);
        assert_eq!(deframer.next_message(), Ok(None), "{end}");
        assert_eq!(deframer.buffered(), end);
        assert_eq!(deframer.wanted(), if end < HEADER_LEN { 0 } else { 2016 - end });
    }
}

/// One queue of a snapshot: its header, and its elements up to the capacity.
fn queue(memory: &[u8], which: usize, capacity: u32) -> (QueueHeader, Vec<Event>) {
    assert_eq!(memory.len() as u64, queue_memory_len(capacity));
    let base = which * queue_len(capacity) as usize;
    let bytes = at::<QUEUE_HEADER_LEN>(memory, base);
    let header = QueueHeader::decode(QueueLayout::PackedX86, bytes);
    assert_eq!(header.encode(QueueLayout::PackedX86), *bytes);
    let elements = (0..capacity).map(|slot| {
        let bytes = at::<EVENT_LEN>(memory, base + element_offset(slot) as usize);
        let event = Event::from_bytes(bytes);
        assert_eq!(event.to_bytes(), *bytes);
        event
    });
    (header, elements.collect())
}

fn event(stream_id: u32, offset: u32, status: u32) -> Event {
    Event { stream_id, offset, status }
}

#[test]
fn a_fresh_queue() {
    let memory = vector!("queue-cap8192-fresh.bin");
    for which in 0..2 {
        let (header, elements) = queue(memory, which, 8192);
        assert_eq!((header.capacity, header.head, header.tail), (8192, 0, 0));
        assert!(elements.iter().all(|&element| element == event(0, 0, 0)));
    }
}

#[test]
fn a_queue_with_three_messages_in_flight() {
    let memory = vector!("queue-cap64-3inflight.bin");
    let (header, elements) = queue(memory, 0, 64);
    assert_eq!(header, QueueHeader { capacity: 64, flag: 1, head: 0, tail: 3 });
    assert_eq!(elements[..3], [event(2, 44, 0), event(2, 516_176, 0), event(2, 548_944, 0)]);
    assert!(elements[..3].iter().all(|element| element.state() == EventState::Open));
    assert!(elements[3..].iter().all(|&element| element == event(0, 0, 0)));
}

#[test]
fn a_queue_after_five_echoes_and_a_close() {
    let memory = vector!("queue-cap64-after-5-echoes.bin");
    let (header, elements) = queue(memory, 0, 64);
    assert_eq!(header, QueueHeader { capacity: 64, flag: 0, head: 6, tail: 6 });
    assert_eq!(elements[5], event(2, 0, 1));
    assert_eq!(elements[5].state(), EventState::Closed);
    for element in &elements[..5] {
        assert_eq!((element.stream_id, element.state()), (2, EventState::Open));
    }
    let (header, elements) = queue(memory, 1, 64);
    assert_eq!(header, QueueHeader { capacity: 64, flag: 0, head: 5, tail: 5 });
    for element in &elements[..5] {
        assert_eq!((element.stream_id, element.state()), (2, EventState::Open));
    }
}

/// The lists of a buffer memory with where they stand.
fn lists(memory: &[u8]) -> Vec<(usize, ListHeader)> {
    let bytes = at::<MANAGER_HEADER_LEN>(memory, 0);
    let manager = BufferManagerHeader::decode(bytes);
    assert_eq!(manager.encode(), *bytes);
    assert_eq!(manager, BufferManagerHeader { list_count: 3, used_len: 942_188 });
    let mut offset = MANAGER_HEADER_LEN;
    let mut lists = Vec::new();
    for _ in 0..manager.list_count {
        let bytes = at::<LIST_HEADER_LEN>(memory, offset);
        let list = ListHeader::decode(bytes);
        // The counters behind the fields are anybody's guess.
        assert_eq!(list.encode()[..20], bytes[..20]);
        lists.push((offset, list));
        offset += list_len(list.capacity, list.slice_capacity) as usize;
    }
    assert_eq!(offset, MANAGER_HEADER_LEN + manager.used_len as usize);
    lists
}

fn slice(memory: &[u8], offset: usize) -> SliceHeader {
    let bytes = at::<SLICE_HEADER_LEN>(memory, offset);
    let slice = SliceHeader::decode(bytes);
    assert_eq!(slice.encode(), *bytes);
    slice
}

/// The free slices of a list from head to tail, as offsets from the end of its header.
fn free_slices(memory: &[u8], (offset, list): (usize, ListHeader)) -> Vec<u32> {
    let region = offset + LIST_HEADER_LEN;
    let mut free = vec![list.head];
    for _ in 0..list.capacity {
        let last = free[free.len() - 1];
        let header = slice(memory, region + last as usize);
        assert_eq!(header.capacity, list.slice_capacity);
        assert!(!header.in_use());
        if !header.has_next() {
            assert_eq!(last, list.tail);
            assert_eq!(free.len(), list.size as usize);
            return free;
        }
        free.push(header.next);
    }
    panic!("the free list at {offset} does not end");
}

#[test]
fn a_fresh_buffer() {
    assert_eq!(FRESH_BUFFER.len(), 1 << 20);
    let lists = lists(FRESH_BUFFER);
    let shape: Vec<_> =
        lists.iter().map(|(at, list)| (*at, list.capacity, list.slice_capacity)).collect();
    assert_eq!(shape, [(8, 63, 8172), (516_140, 9, 32748), (811_088, 1, 131_052)]);
    for (offset, list) in lists {
        let free = free_slices(FRESH_BUFFER, (offset, list));
        let step = SLICE_HEADER_LEN as u32 + list.slice_capacity;
        let expected: Vec<u32> = (0..list.capacity).map(|index| index * step).collect();
        assert_eq!(free, expected);
    }
}

/// A message as a reader takes it: its slices with their offsets, and its data.
fn chain(memory: &[u8], first: u32) -> (Vec<(u32, SliceHeader)>, Vec<u8>) {
    let (mut slices, mut data, mut offset) = (Vec::new(), Vec::new(), first);
    // As many as there are slices at all; a longer chain has a cycle.
    for _ in 0..63 + 9 + 1 {
        let header = slice(memory, offset as usize);
        slices.push((offset, header));
        let begin = offset as usize + SLICE_HEADER_LEN + header.start as usize;
        data.extend_from_slice(&memory[begin..begin + header.size as usize]);
        if !header.has_next() {
            return (slices, data);
        }
        offset = header.next;
    }
    panic!("the chain from {first} does not end");
}

/// Message `m` of the lab, straight from its description; `m` counts from 0.
fn pattern(m: u32, length: u32) -> Vec<u8> {
    (0..length).map(|i| (i * 131 + m * 17 + (i >> 8) + (i >> 16) * 3) as u8).collect()
}

#[test]
fn a_buffer_with_three_messages_in_flight() {
    let (_, elements) = queue(vector!("queue-cap64-3inflight.bin"), 0, 64);
    let messages: Vec<_> =
        elements[..3].iter().map(|event| chain(BUSY_BUFFER, event.offset)).collect();
    let shape = |message: usize| {
        let slices = messages[message].0.iter();
        slices.map(|(offset, header)| (*offset, header.size, header.flags)).collect::<Vec<_>>()
    };
    assert_eq!(shape(0), [(44, 100, 2)]);
    assert_eq!(shape(1), [(516_176, 20000, 2)]);
    assert_eq!(
        shape(2),
        [(548_944, 32748, 3), (581_712, 32748, 3), (614_480, 32748, 3), (647_248, 1756, 2)]
    );
    for (slices, _) in &messages {
        assert!(slices.iter().all(|(_, header)| header.in_use() && header.start == 0));
    }
    // The last slice still has the next that it had in the free list, and must not be followed.
    let last = messages[2].0[3].1;
    assert!(last.next != 0 && !last.has_next());
    for (number, length) in [(0, 100), (1, 20000), (2, 100_000)] {
        let (_, data) = &messages[number as usize];
        assert!(*data == pattern(number, length), "message {number}");
    }
}

#[test]
fn what_is_in_flight_is_missing_from_the_free_lists() {
    let lists = lists(BUSY_BUFFER);
    let sizes: Vec<_> = lists.iter().map(|(_, list)| (list.capacity, list.size)).collect();
    assert_eq!(sizes, [(63, 62), (9, 4), (1, 1)]);
    let in_flight = [44, 516_176, 548_944, 581_712, 614_480, 647_248];
    for list in lists {
        for free in free_slices(BUSY_BUFFER, list) {
            let offset = list.0 + LIST_HEADER_LEN + free as usize;
            assert!(!in_flight.contains(&offset));
        }
    }
}
