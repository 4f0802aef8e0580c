// SPDX-License-Identifier: MIT OR Apache-2.0
//! A peer that does not use the library: sockets, bytes, and memory that it reads and writes
//! through the kernel, so that it can break every rule and still be safe code.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recv, recvmsg, sendmsg};
use shmipc_glommio::ProtocolVersion;
use shmipc_glommio::wire::layout::{
    FLAG_HAS_NEXT, FLAG_IN_USE, LIST_HEAD_OFFSET, LIST_HEADER_LEN, LIST_SIZE_OFFSET,
    MANAGER_HEADER_LEN, SLICE_HEADER_LEN, element_offset, list_len, queue_len,
};
use shmipc_glommio::wire::{
    BufferManagerHeader, Event, ListHeader, QueueHeader, QueueLayout, SliceHeader,
};

use super::bed::DEADLINE;
use super::hostile::files::Directory;

pub(crate) const EXCHANGE: u8 = 4;
pub(crate) const BY_FILE: u8 = 0;
pub(crate) const BY_MEMFD: u8 = 5;
pub(crate) const READY: u8 = 7;
pub(crate) const ACK: u8 = 6;
pub(crate) const FALLBACK: u8 = 3;
pub(crate) const SYNC: u8 = 1;

/// Any eight bytes of a header.
pub(crate) fn header(length: u32, magic: u16, version: u8, kind: u8) -> Vec<u8> {
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.extend(magic.to_be_bytes());
    bytes.extend([version, kind]);
    bytes
}

/// A message whose length is right.
pub(crate) fn message(kind: u8, version: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = header(8 + payload.len() as u32, 0x7758, version, kind);
    bytes.extend(payload);
    bytes
}

/// Two paths as messages have them; the lengths may be wrong.
pub(crate) fn paths(queue: (u16, &[u8]), buffer: (u16, &[u8])) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (len, path) in [queue, buffer] {
        bytes.extend(len.to_be_bytes());
        bytes.extend(path);
    }
    bytes
}

/// Two paths with their lengths.
pub(crate) fn honest_paths(queue: &str, buffer: &str) -> Vec<u8> {
    paths((queue.len() as u16, queue.as_bytes()), (buffer.len() as u16, buffer.as_bytes()))
}

/// A connection, from the bad side.
pub(crate) struct Raw {
    pub(crate) socket: UnixStream,
    /// What was received before anybody asked for it.
    kept: VecDeque<u8>,
}

impl Raw {
    pub(crate) fn connect(path: &Path) -> Self {
        Self::over(UnixStream::connect(path).unwrap())
    }

    /// Accepts a connection, or gives up at the deadline.
    pub(crate) fn accept(listener: &UnixListener) -> Self {
        listener.set_nonblocking(true).unwrap();
        let start = Instant::now();
        loop {
            match listener.accept() {
                Ok((socket, _)) => return Self::over(socket),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    assert!(start.elapsed() < DEADLINE, "nobody connects");
                    std::thread::sleep(Duration::from_micros(200));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn over(socket: UnixStream) -> Self {
        socket.set_nonblocking(false).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.set_write_timeout(Some(DEADLINE)).unwrap();
        let kept = VecDeque::new();
        Self { socket, kept }
    }

    /// Sends bytes. The other side may have closed already, which is for the test to judge by what
    /// it says.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        match self.socket.write_all(bytes) {
            Err(error) if !is_gone(&error) => panic!("{error}"),
            _ => {}
        }
    }

    /// Sends bytes with descriptors attached to the first of them.
    pub(crate) fn send_with(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights };
        let parts = [IoSlice::new(bytes)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        let sent = sendmsg::<()>(self.socket.as_raw_fd(), &parts, control, flags, None);
        assert_eq!(sent.unwrap(), bytes.len());
    }

    pub(crate) fn receive(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.kept.drain(..len.min(self.kept.len())).collect();
        let kept = bytes.len();
        bytes.resize(len, 0);
        self.socket.read_exact(&mut bytes[kept..]).unwrap();
        bytes
    }

    /// The next message: its type and what follows the header.
    pub(crate) fn receive_message(&mut self) -> (u8, Vec<u8>) {
        let header = self.receive(8);
        let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]);
        (header[7], self.receive(length as usize - 8))
    }

    /// Receives one byte and the descriptors that come with it.
    pub(crate) fn receive_descriptors(&mut self) -> Vec<OwnedFd> {
        let mut control = nix::cmsg_space!([RawFd; 4]);
        let mut byte = [0];
        let mut parts = [IoSliceMut::new(&mut byte)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let fd = self.socket.as_raw_fd();
        let message = recvmsg::<()>(fd, &mut parts, Some(&mut control), flags).unwrap();
        let mut fds = Vec::new();
        for part in message.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(received) = part {
                // SAFETY: the kernel made them for this process a line before.
                fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        fds
    }

    /// Whether the other side has closed the connection by now. Keeps what else it sent.
    pub(crate) fn is_at_end(&mut self) -> bool {
        let mut bytes = [0; 4096];
        loop {
            match recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
                Ok(0) | Err(Errno::ECONNRESET) => return true,
                Ok(count) => self.kept.extend(&bytes[..count]),
                Err(Errno::EAGAIN) => return false,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// What else the other side sends before it closes.
    pub(crate) fn receive_to_end(&mut self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.kept.drain(..).collect();
        match self.socket.read_to_end(&mut bytes) {
            Err(error) if !is_gone(&error) => panic!("{error}"),
            _ => bytes,
        }
    }

    /// Whether the other side has closed the connection.
    pub(crate) fn is_closed_by_peer(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.socket.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => is_gone(&error),
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
}

/// Capacity of the queues that the raw client makes.
pub(crate) const CAPACITY: u32 = 32;
/// Slice capacity and number of slices of the lists that the raw client makes.
pub(crate) const LISTS: [(u32, u32); 2] = [(64, 128), (1024, 32)];

pub(crate) fn layout() -> QueueLayout {
    QueueLayout::for_version(ProtocolVersion::V3)
}

/// The bytes of both memories, to be spoilt before they are handed over.
#[derive(Clone)]
pub(crate) struct Memory {
    pub(crate) queue: Vec<u8>,
    pub(crate) buffer: Vec<u8>,
    /// How long the memories are at least; what is behind the bytes costs nothing.
    pub(crate) queue_len: u64,
    pub(crate) buffer_len: u64,
}

impl Memory {
    /// As an honest client lays them out.
    pub(crate) fn honest() -> Self {
        Self::with_capacity(CAPACITY)
    }

    /// The same with queues of another capacity.
    pub(crate) fn with_capacity(capacity: u32) -> Self {
        Self::laid_out(capacity, &Terms::VERSION_3)
    }

    /// As an honest client lays them out that has agreed on this.
    pub(crate) fn laid_out(capacity: u32, terms: &Terms) -> Self {
        let header = QueueHeader { capacity, flag: 0, head: 0, tail: 0 };
        let mut queue = vec![0; 2 * queue_len(capacity) as usize];
        let half = queue.len() / 2;
        for base in [0, half] {
            put(&mut queue, base, &header.encode(terms.layout()));
        }
        let sets = if terms.lists_are_apart { 2 } else { 1 };
        Self { queue, buffer: honest_buffer(sets), queue_len: 0, buffer_len: 0 }
    }

    /// Changes the header of one of the two queues.
    pub(crate) fn change_queue(&mut self, number: usize, change: impl FnOnce(&mut QueueHeader)) {
        let base = number * (self.queue.len() / 2);
        let mut header = QueueHeader::decode(layout(), self.queue[base..].first_chunk().unwrap());
        change(&mut header);
        put(&mut self.queue, base, &header.encode(layout()));
    }

    /// Changes the header of the buffer memory.
    pub(crate) fn change_manager(&mut self, change: impl FnOnce(&mut BufferManagerHeader)) {
        let mut header = BufferManagerHeader::decode(self.buffer.first_chunk().unwrap());
        change(&mut header);
        put(&mut self.buffer, 0, &header.encode());
    }

    /// Changes the header of one of the lists.
    pub(crate) fn change_list(&mut self, number: usize, change: impl FnOnce(&mut ListHeader)) {
        let at = list_offset(number);
        let mut header = ListHeader::decode(self.buffer[at..].first_chunk().unwrap());
        change(&mut header);
        put(&mut self.buffer, at, &header.encode());
    }

    /// Memfds with these bytes, buffer first, whose names hold `name`.
    pub(crate) fn into_memfds(self, name: &str) -> [File; 2] {
        let memories =
            [(self.buffer, self.buffer_len, "buffer"), (self.queue, self.queue_len, "queue")];
        memories.map(|(bytes, len, role)| {
            let file = memfd(&format!("{name}_{role}"));
            file.set_len(len).unwrap();
            file.write_all_at(&bytes, 0).unwrap();
            file
        })
    }
}

pub(crate) fn memfd(name: &str) -> File {
    memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap().into()
}

fn honest_buffer(sets: usize) -> Vec<u8> {
    let lists = sets * LISTS.len();
    let mut buffer = vec![0; list_offset(lists)];
    let header = BufferManagerHeader {
        list_count: lists as u16,
        used_len: (buffer.len() - MANAGER_HEADER_LEN) as u32,
    };
    put(&mut buffer, 0, &header.encode());
    for (number, (slice_capacity, count)) in LISTS.into_iter().cycle().take(lists).enumerate() {
        let at = list_offset(number);
        let stride = slice_capacity + SLICE_HEADER_LEN as u32;
        let list = ListHeader {
            size: count as i32,
            capacity: count,
            head: 0,
            tail: (count - 1) * stride,
            slice_capacity,
        };
        put(&mut buffer, at, &list.encode());
        for place in 0..count {
            let is_last = place + 1 == count;
            let slice = SliceHeader {
                capacity: slice_capacity,
                size: 0,
                start: 0,
                next: if is_last { 0 } else { (place + 1) * stride },
                flags: if is_last { 0 } else { FLAG_HAS_NEXT },
            };
            let slice_at = at + LIST_HEADER_LEN + (place * stride) as usize;
            put(&mut buffer, slice_at, &slice.encode());
        }
    }
    buffer
}

/// Where a list of the raw client's memory stands; behind the last one, where the memory ends.
pub(crate) fn list_offset(number: usize) -> usize {
    let before = LISTS.into_iter().cycle().take(number);
    let len: u64 = before.map(|(slice, count)| list_len(count, slice)).sum();
    MANAGER_HEADER_LEN + len as usize
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// What a raw peer has agreed on with the other side.
pub(crate) struct Terms {
    pub(crate) version: ProtocolVersion,
    /// Whether each side has a set of lists for itself.
    pub(crate) lists_are_apart: bool,
    pub(crate) bell: Bell,
}

/// How a raw peer wakes the other side.
pub(crate) enum Bell {
    Socket,
    /// What this side writes, and what it would read.
    EventFds([File; 2]),
    /// It does not.
    Nobody,
}

impl Terms {
    pub(crate) const VERSION_3: Self = Self::old(ProtocolVersion::V3);

    const fn old(version: ProtocolVersion) -> Self {
        Self { version, lists_are_apart: false, bell: Bell::Socket }
    }

    fn layout(&self) -> QueueLayout {
        QueueLayout::for_version(self.version)
    }
}

/// A raw peer in a running session.
pub(crate) struct Rig {
    pub(crate) raw: Raw,
    pub(crate) queue: File,
    pub(crate) buffer: File,
    is_client: bool,
    pub(crate) terms: Terms,
    /// Where the second queue starts.
    half: u64,
    capacity: u32,
    /// Whether the other side sends on our stream over the socket.
    pub(crate) is_on_socket: bool,
    /// Where the lists stand, and what their headers said at the start.
    pub(crate) lists: Vec<(u32, ListHeader)>,
    /// Slices by their capacity that are this side's: what it has taken, and what it has received.
    own: BTreeMap<u32, Vec<u32>>,
}

/// How many slices of each list a raw peer takes before the session starts; later it could not do
/// so, since writes through the kernel are no atomic operations.
const TAKEN: u32 = 4;
/// The stream that a raw peer uses.
pub(crate) const STREAM: u32 = 2;

impl Rig {
    /// Shakes hands as an honest client does.
    pub(crate) fn client(path: &Path, name: &str) -> Self {
        let [buffer, queue] = Memory::honest().into_memfds(name);
        let mut rig = Self::new(at_stage(path, Stage::Descriptors), buffer, queue, true);
        let fds = [rig.buffer.as_fd(), rig.queue.as_fd()];
        rig.raw.send_with(&[0], &fds);
        assert_eq!(rig.raw.receive(8), message(ACK, 3, &[]));
        rig
    }

    /// Shakes hands as an honest server does, and hears the client's hello.
    pub(crate) fn server(mut raw: Raw) -> Self {
        assert_eq!(raw.receive_message().0, EXCHANGE);
        raw.send(&message(EXCHANGE, 3, &[]));
        assert_eq!(raw.receive_message().0, BY_MEMFD);
        raw.send(&message(READY, 3, &[]));
        let mut files = raw.receive_descriptors().into_iter().map(File::from);
        let (Some(buffer), Some(queue)) = (files.next(), files.next()) else {
            panic!("no descriptors");
        };
        let mut rig = Self::new(raw, buffer, queue, false);
        rig.raw.send(&message(ACK, 3, &[]));
        assert_eq!(rig.receive(), b"hello");
        rig
    }

    /// A session whose handshake is done, or is about to be.
    pub(crate) fn new(raw: Raw, buffer: File, queue: File, is_client: bool) -> Self {
        Self::on(Terms::VERSION_3, raw, buffer, queue, is_client)
    }

    /// The same, on other terms.
    pub(crate) fn on(terms: Terms, raw: Raw, buffer: File, queue: File, is_client: bool) -> Self {
        let lists = read_lists(&buffer);
        // The client's set stands first.
        let half_of_them = lists.len() / 2;
        let takes_from = match (terms.lists_are_apart, is_client) {
            (false, _) => &lists[..],
            (true, true) => &lists[..half_of_them],
            (true, false) => &lists[half_of_them..],
        };
        let own = takes_from.iter().map(|&(at, list)| take_slices(&buffer, at, list));
        let own = own.collect();
        let half = queue.metadata().unwrap().len() / 2;
        let capacity = read_u32(&queue, 0);
        let is_on_socket = false;
        Self { raw, queue, buffer, is_client, terms, half, capacity, is_on_socket, lists, own }
    }

    /// Shakes hands in version 2, with memory in files of this directory.
    pub(crate) fn client_with_files(path: &Path, directory: &Directory) -> Self {
        let paths = directory.put_memory(&Memory::honest());
        let open = |path: &str| File::options().read(true).write(true).open(path).unwrap();
        let [queue, buffer] = paths.each_ref().map(|path| open(path));
        let terms = Terms::old(ProtocolVersion::V2);
        let mut rig = Self::on(terms, Raw::connect(path), buffer, queue, true);
        let [queue, buffer] = &paths;
        rig.raw.send(&message(BY_FILE, 2, &honest_paths(queue, buffer)));
        rig
    }

    /// Where the queue starts that this side sends on.
    pub(crate) fn send_base(&self) -> u64 {
        if self.is_client { 0 } else { self.half }
    }

    /// Where the queue starts that the other side sends on.
    pub(crate) fn receive_base(&self) -> u64 {
        if self.is_client { self.half } else { 0 }
    }

    pub(crate) fn capacity(&self) -> u32 {
        self.capacity
    }

    pub(crate) fn tail_at(&self) -> u64 {
        self.send_base() + self.terms.layout().tail_offset() as u64
    }

    pub(crate) fn head_at(&self) -> u64 {
        self.receive_base() + self.terms.layout().head_offset() as u64
    }

    /// Puts events into the queue, all at once, and rings.
    pub(crate) fn push(&mut self, events: &[Event]) {
        self.put(events);
        self.ring();
    }

    /// The same without ringing.
    pub(crate) fn put(&mut self, events: &[Event]) {
        let tail = read_i64(&self.queue, self.tail_at());
        self.put_at(tail, events);
    }

    /// The same behind a tail that was read, and found to be one.
    fn put_at(&mut self, tail: i64, events: &[Event]) {
        for (number, event) in (tail..).zip(events) {
            let slot = (number % i64::from(self.capacity)) as u32;
            let at = self.send_base() + element_offset(slot);
            self.queue.write_all_at(&event.to_bytes(), at).unwrap();
        }
        write_i64(&self.queue, self.tail_at(), tail + events.len() as i64);
    }

    /// Waits until the other side has given every slice back that it does not hold.
    pub(crate) fn wait_for_rest(&self) {
        let own: usize = self.own.values().map(Vec::len).sum();
        let all: u32 = self.lists.iter().map(|(_, list)| list.capacity).sum();
        let start = Instant::now();
        loop {
            let sizes = self
                .lists
                .iter()
                .map(|(at, _)| read_u32(&self.buffer, u64::from(*at) + LIST_SIZE_OFFSET as u64));
            if sizes.sum::<u32>() + own as u32 == all {
                return;
            }
            assert!(start.elapsed() < DEADLINE, "slices are missing");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    pub(crate) fn ring(&mut self) {
        match &mut self.terms.bell {
            Bell::Socket => self.raw.send(&message(SYNC, self.terms.version.message_byte(), &[])),
            Bell::EventFds([ours, _]) => match ours.write(&1_u64.to_ne_bytes()) {
                // A bell that is as loud as can be.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                rung => assert_eq!(rung.unwrap(), 8),
            },
            Bell::Nobody => {}
        }
    }

    /// How many messages of the other side came over the socket that nobody has asked for.
    pub(crate) fn over_the_socket(&self) -> usize {
        self.raw.kept.len()
    }

    /// Says that this side sleeps, so that the other one rings the next time.
    pub(crate) fn sleep(&self) {
        let at = self.receive_base() + self.terms.layout().flag_offset() as u64;
        write_u32(&self.queue, at, 0);
    }

    /// Puts events into a queue that may be broken by now.
    pub(crate) fn try_push(&mut self, events: &[Event]) {
        let tail = read_i64(&self.queue, self.tail_at());
        // Once: somebody may be writing over it.
        if (0..1 << 40).contains(&tail) {
            self.put_at(tail, events);
            self.ring();
        }
    }

    /// The next event of the other side, which it has to send in time.
    pub(crate) fn next_event(&mut self) -> Event {
        let tail_at = self.received_tail_at();
        let head = read_i64(&self.queue, self.head_at());
        let start = Instant::now();
        while read_i64(&self.queue, tail_at) <= head {
            assert!(start.elapsed() < DEADLINE, "no event comes");
            std::thread::sleep(Duration::from_micros(50));
        }
        let slot = (head % i64::from(self.capacity)) as u32;
        let mut bytes = [0; 12];
        let at = self.receive_base() + element_offset(slot);
        self.queue.read_exact_at(&mut bytes, at).unwrap();
        write_i64(&self.queue, self.head_at(), head + 1);
        Event::from_bytes(&bytes)
    }

    pub(crate) fn slice(&self, offset: u32) -> SliceHeader {
        let mut bytes = [0; SLICE_HEADER_LEN];
        self.buffer.read_exact_at(&mut bytes, offset.into()).unwrap();
        SliceHeader::decode(&bytes)
    }

    pub(crate) fn change_slice(&self, offset: u32, change: impl FnOnce(&mut SliceHeader)) {
        let mut header = self.slice(offset);
        change(&mut header);
        self.buffer.write_all_at(&header.encode(), offset.into()).unwrap();
    }

    /// Every slice of the memory, free or not, list by list.
    pub(crate) fn all_slices(&self) -> Vec<u32> {
        let lists = self.lists.iter();
        lists
            .flat_map(|&(at, list)| {
                let first = at + LIST_HEADER_LEN as u32;
                let stride = list.slice_capacity + SLICE_HEADER_LEN as u32;
                (0..list.capacity).map(move |place| first + place * stride)
            })
            .collect()
    }

    /// Changes the slices that this side has not taken.
    pub(crate) fn change_free_slices(&self, change: impl Fn(&mut SliceHeader)) {
        for offset in self.all_slices() {
            if !self.own.values().any(|own| own.contains(&offset)) {
                self.change_slice(offset, &change);
            }
        }
    }

    /// Changes the headers of all lists.
    pub(crate) fn change_lists(&self, change: impl Fn(&mut ListHeader)) {
        for &(at, _) in &self.lists {
            let mut bytes = [0; LIST_HEADER_LEN];
            self.buffer.read_exact_at(&mut bytes, at.into()).unwrap();
            let mut header = ListHeader::decode(&bytes);
            change(&mut header);
            self.buffer.write_all_at(&header.encode(), at.into()).unwrap();
        }
    }

    /// A slice of this side's with `bytes` in it, as an event would name it.
    pub(crate) fn fill(&mut self, bytes: &[u8]) -> u32 {
        let mut fitting = self.own.range_mut(bytes.len() as u32..);
        let offset = fitting.find_map(|(_, slices)| slices.pop());
        let offset = offset.expect("a slice is left");
        self.change_slice(offset, |slice| {
            (slice.size, slice.start, slice.flags) = (bytes.len() as u32, 0, FLAG_IN_USE);
        });
        let at = u64::from(offset) + SLICE_HEADER_LEN as u64;
        self.buffer.write_all_at(bytes, at).unwrap();
        offset
    }

    /// The payload of the next event, whose slice is this side's from now on.
    pub(crate) fn receive(&mut self) -> Vec<u8> {
        if self.is_on_socket {
            return self.receive_data();
        }
        let event = self.next_event();
        assert_eq!((event.stream_id, event.status & 0xff), (STREAM, 0));
        let header = self.slice(event.offset);
        assert!(!header.has_next());
        let mut bytes = vec![0; header.size as usize];
        let at = u64::from(event.offset + header.start) + SLICE_HEADER_LEN as u64;
        self.buffer.read_exact_at(&mut bytes, at).unwrap();
        self.own.entry(header.capacity).or_default().push(event.offset);
        bytes
    }

    /// Sends a message with data over the socket.
    pub(crate) fn allow_v3_fallback(&mut self, stream: u32, status: u32, data: &[u8]) {
        let mut payload = stream.to_be_bytes().to_vec();
        payload.extend(status.to_be_bytes());
        payload.extend(data);
        self.raw.send(&message(FALLBACK, self.terms.version.message_byte(), &payload));
    }

    /// The data of the next FallbackData on our stream.
    pub(crate) fn receive_data(&mut self) -> Vec<u8> {
        loop {
            match self.raw.receive_message() {
                (SYNC, _) => {}
                (FALLBACK, payload) => {
                    assert_eq!(payload[..8], [0, 0, 0, STREAM as u8, 0, 0, 0, 0]);
                    return payload[8..].to_vec();
                }
                (other, _) => panic!("a message of type {other}"),
            }
        }
    }

    /// Makes the other side put so many events into its queue, and takes none of them.
    pub(crate) fn provoke(&mut self, count: i64) {
        for _ in 0..count {
            assert!(self.is_answered(DEADLINE), "neither an answer nor an end");
        }
    }

    /// Makes the other side send, and so need slices, until it does not any more.
    pub(crate) fn provoke_to_the_end(&mut self) {
        for _ in 0..300 {
            if !self.is_answered(Duration::from_secs(1)) {
                return;
            }
            // So that the queue never is full.
            let tail = read_i64(&self.queue, self.received_tail_at());
            write_i64(&self.queue, self.head_at(), tail);
        }
    }

    /// Sends a byte over the socket. Whether an answer to it comes by the queue.
    fn is_answered(&mut self, limit: Duration) -> bool {
        let before = read_i64(&self.queue, self.received_tail_at());
        self.allow_v3_fallback(STREAM, 0, b"x");
        // One at a time, since the other side may answer several at once.
        let start = Instant::now();
        while read_i64(&self.queue, self.received_tail_at()) == before {
            if self.raw.is_at_end() || start.elapsed() > limit {
                return false;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        true
    }

    /// Sends a byte over the socket. Whether an answer comes, by whichever way, and the other side
    /// is there. Takes the answer, not its slice, and sleeps meanwhile as one does that has taken
    /// everything: what goes over the socket waits for that.
    pub(crate) fn is_answered_somehow(&mut self) -> bool {
        self.is_answered_while(true)
    }

    /// [`is_answered_somehow`](Self::is_answered_somehow), asleep meanwhile or not.
    pub(crate) fn is_answered_while(&mut self, sleeps: bool) -> bool {
        let (tail_at, kept) = (self.received_tail_at(), self.raw.kept.len());
        let tail = read_i64(&self.queue, tail_at);
        self.allow_v3_fallback(STREAM, 0, b"x");
        let start = Instant::now();
        while start.elapsed() < DEADLINE {
            if self.raw.is_at_end() {
                return false;
            }
            if sleeps {
                self.sleep();
            }
            let now = read_i64(&self.queue, tail_at);
            if now != tail || self.raw.kept.len() > kept {
                write_i64(&self.queue, self.head_at(), now);
                return true;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        false
    }

    /// Where the tail of the other side's queue stands.
    pub(crate) fn received_tail_at(&self) -> u64 {
        self.receive_base() + self.terms.layout().tail_offset() as u64
    }

    /// Sends bytes and gets the same back.
    pub(crate) fn echo(&mut self, bytes: &[u8]) {
        let offset = self.fill(bytes);
        self.push(&[open(offset)]);
        assert_eq!(self.receive(), bytes);
    }
}

/// An event that carries data on the stream of a raw peer.
pub(crate) fn open(offset: u32) -> Event {
    Event { stream_id: STREAM, offset, status: 0 }
}

/// Where the lists of a memory stand, and their headers.
fn read_lists(buffer: &File) -> Vec<(u32, ListHeader)> {
    let mut bytes = [0; MANAGER_HEADER_LEN];
    buffer.read_exact_at(&mut bytes, 0).unwrap();
    let mut at = MANAGER_HEADER_LEN as u32;
    let mut lists = Vec::new();
    for _ in 0..BufferManagerHeader::decode(&bytes).list_count {
        let mut bytes = [0; LIST_HEADER_LEN];
        buffer.read_exact_at(&mut bytes, at.into()).unwrap();
        let list = ListHeader::decode(&bytes);
        lists.push((at, list));
        at += list_len(list.capacity, list.slice_capacity) as u32;
    }
    lists
}

/// Takes the first slices of a list that nobody else uses yet.
fn take_slices(buffer: &File, at: u32, list: ListHeader) -> (u32, Vec<u32>) {
    let stride = list.slice_capacity + SLICE_HEADER_LEN as u32;
    let size_at = u64::from(at) + LIST_SIZE_OFFSET as u64;
    let head_at = u64::from(at) + LIST_HEAD_OFFSET as u64;
    write_u32(buffer, size_at, list.size as u32 - TAKEN);
    write_u32(buffer, head_at, TAKEN * stride);
    let first = at + LIST_HEADER_LEN as u32;
    let slices = (0..TAKEN).map(|place| first + place * stride).collect();
    (list.slice_capacity, slices)
}

/// All stages, in their order.
pub(crate) const STAGES: [Stage; 3] = [Stage::Opening, Stage::Announcement, Stage::Descriptors];

/// How far an honest client gets before it turns bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Nothing was said.
    Opening,
    /// Versions were exchanged.
    Announcement,
    /// The server waits for descriptors.
    Descriptors,
}

/// A client that was honest up to a stage of the handshake of version 3.
pub(crate) fn at_stage(path: &Path, stage: Stage) -> Raw {
    let mut raw = Raw::connect(path);
    if stage == Stage::Opening {
        return raw;
    }
    raw.send(&message(EXCHANGE, 3, &[]));
    assert_eq!(raw.receive(8), message(EXCHANGE, 3, &[]));
    if stage == Stage::Announcement {
        return raw;
    }
    raw.send(&message(BY_MEMFD, 3, &honest_paths("raw queue", "raw buffer")));
    assert_eq!(raw.receive(8), message(READY, 3, &[]));
    raw
}

pub(crate) fn read_u32(file: &File, at: u64) -> u32 {
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, at).unwrap();
    u32::from_ne_bytes(bytes)
}

pub(crate) fn write_u32(file: &File, at: u64, value: u32) {
    file.write_all_at(&value.to_ne_bytes(), at).unwrap();
}

pub(crate) fn read_i64(file: &File, at: u64) -> i64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at).unwrap();
    i64::from_ne_bytes(bytes)
}

pub(crate) fn write_i64(file: &File, at: u64, value: i64) {
    file.write_all_at(&value.to_ne_bytes(), at).unwrap();
}
