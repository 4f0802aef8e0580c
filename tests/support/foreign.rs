// SPDX-License-Identifier: MIT OR Apache-2.0
//! A peer that knows the protocol and nothing of this crate, and treats the end of a connection as
//! shmipc-go does: it looks at the hang-up first, and what it has not taken by then is lost.
//!
//! It reads and writes the shared memory through the kernel, on a thread of its own, and does
//! nothing by itself: the test says when it maps, takes, reads and gives back.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use shmipc_glommio::ProtocolVersion;
use shmipc_glommio::wire::layout::{
    FLAG_HAS_NEXT, FLAG_IN_USE, LIST_HEADER_LEN, MANAGER_HEADER_LEN, SLICE_HEADER_LEN,
    element_offset, queue_memory_len,
};
use shmipc_glommio::wire::{
    BufferManagerHeader, Event, ListHeader, QueueHeader, QueueLayout, SliceHeader,
};

/// More than anything here takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_micros(200);

const BY_FILE: u8 = 0;
pub(crate) const SYNC: u8 = 1;
pub(crate) const FALLBACK: u8 = 3;
pub(crate) const EXCHANGE: u8 = 4;
const BY_MEMFD: u8 = 5;
const ACK: u8 = 6;
const READY: u8 = 7;
pub(crate) const NEGOTIATION: u8 = 10;

/// What the client's side of this peer makes.
const CAPACITY: u32 = 32;
const SLICES: u32 = 64;
const SLICE: u32 = 1004;

pub(crate) fn message(kind: u8, version: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (8 + payload.len() as u32).to_be_bytes().to_vec();
    bytes.extend([0x77, 0x58, version, kind]);
    bytes.extend(payload);
    bytes
}

/// Accepts a connection.
pub(crate) fn accept(listener: &UnixListener) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    let mut socket = None;
    wait_until("a connection", || {
        socket = listener.accept().ok();
        socket.is_some()
    });
    let (socket, _) = socket.unwrap();
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(PAUSE);
    }
}

/// The next message of a socket: its version, its type, and what follows the header.
pub(crate) fn receive(socket: &mut UnixStream) -> (u8, u8, Vec<u8>) {
    let mut header = [0; 8];
    socket.read_exact(&mut header).unwrap();
    let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]);
    let mut payload = vec![0; length as usize - 8];
    socket.read_exact(&mut payload).unwrap();
    (header[6], header[7], payload)
}

/// A peer in a running session.
pub(crate) struct Foreign {
    pub(crate) socket: UnixStream,
    version: u8,
    layout: QueueLayout,
    queue: File,
    buffer: File,
    /// Where the queue starts that this side sends on, and where the other one.
    bases: (u64, u64),
    capacity: u32,
    /// Slices that this side may send.
    own: Vec<u32>,
}

impl Foreign {
    /// Shakes hands as a server. `before_mapping` runs when everything is there but the mapping.
    pub(crate) fn serve(mut socket: UnixStream, before_mapping: impl FnOnce()) -> Self {
        let (version, kind, payload) = receive(&mut socket);
        let kind_and_payload = if kind == EXCHANGE {
            assert_eq!(version, 3);
            socket.write_all(&message(EXCHANGE, 3, &[])).unwrap();
            let (_, kind, payload) = receive(&mut socket);
            (kind, payload)
        } else {
            assert_eq!((version, kind), (2, BY_FILE));
            (kind, payload)
        };
        before_mapping();
        let (buffer, queue) = match kind_and_payload {
            (BY_MEMFD, _) => {
                socket.write_all(&message(READY, 3, &[])).unwrap();
                let mut files = receive_descriptors(&socket).into_iter().map(File::from);
                (files.next().unwrap(), files.next().unwrap())
            }
            (_, payload) => {
                let (queue, rest) = split_path(&payload);
                let (buffer, _) = split_path(rest);
                let open = |path: &str| File::options().read(true).write(true).open(path);
                (open(buffer).unwrap(), open(queue).unwrap())
            }
        };
        if version == 3 {
            socket.write_all(&message(ACK, 3, &[])).unwrap();
        }
        Self::new(socket, version, buffer, queue, false)
    }

    /// Connects as a client of version 2, with memory in files of which these are the names.
    pub(crate) fn connect(path: &str, files: [&str; 2]) -> Self {
        let layout = QueueLayout::for_version(ProtocolVersion::V2);
        let half = queue_memory_len(CAPACITY) as usize / 2;
        let mut queue = vec![0; 2 * half];
        let header = QueueHeader { capacity: CAPACITY, flag: 0, head: 0, tail: 0 };
        for base in [0, half] {
            queue[base..][..24].copy_from_slice(&header.encode(layout));
        }
        let create = |path: &str, bytes: &[u8]| {
            let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
            file.write_all_at(bytes, 0).unwrap();
            file
        };
        let (buffer_bytes, own) = buffer();
        let queue = create(files[0], &queue);
        let buffer = create(files[1], &buffer_bytes);
        let mut socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut payload = Vec::new();
        for path in files {
            payload.extend((path.len() as u16).to_be_bytes());
            payload.extend(path.as_bytes());
        }
        socket.write_all(&message(BY_FILE, 2, &payload)).unwrap();
        let mut peer = Self::new(socket, 2, buffer, queue, true);
        peer.own = own;
        peer
    }

    fn new(socket: UnixStream, version: u8, buffer: File, queue: File, is_client: bool) -> Self {
        let half = queue.metadata().unwrap().len() / 2;
        let bases = if is_client { (0, half) } else { (half, 0) };
        let mut capacity = [0; 4];
        queue.read_exact_at(&mut capacity, 0).unwrap();
        let capacity = u32::from_ne_bytes(capacity);
        let layout = QueueLayout::for_version(ProtocolVersion::V3);
        Self { socket, version, layout, queue, buffer, bases, capacity, own: Vec::new() }
    }

    /// Whether the other side has ended the connection.
    pub(crate) fn is_hung_up(&self) -> bool {
        let mut polled = [PollFd::new(self.socket.as_fd(), PollFlags::empty())];
        nix::poll::poll(&mut polled, PollTimeout::ZERO).unwrap() > 0
    }

    fn index(&self, at: u64) -> i64 {
        let mut bytes = [0; 8];
        self.queue.read_exact_at(&mut bytes, at).unwrap();
        i64::from_ne_bytes(bytes)
    }

    fn received(&self) -> (u64, u64) {
        let base = self.bases.1;
        (base + self.layout.head_offset() as u64, base + self.layout.tail_offset() as u64)
    }

    /// How many events the other side has sent and this one has not taken.
    pub(crate) fn waiting(&self) -> i64 {
        let (head, tail) = self.received();
        self.index(tail) - self.index(head)
    }

    /// Takes the next event, unless the other side has hung up: then everything is lost.
    pub(crate) fn take(&self) -> Option<Event> {
        let (head_at, _) = self.received();
        let mut is_lost = false;
        wait_until("an event", || {
            is_lost = self.is_hung_up();
            is_lost || self.waiting() > 0
        });
        if is_lost {
            return None;
        }
        let head = self.index(head_at);
        let slot = (head % i64::from(self.capacity)) as u32;
        let mut bytes = [0; 12];
        self.queue.read_exact_at(&mut bytes, self.bases.1 + element_offset(slot)).unwrap();
        self.queue.write_all_at(&(head + 1).to_ne_bytes(), head_at).unwrap();
        Some(Event::from_bytes(&bytes))
    }

    /// Takes every event that there is.
    pub(crate) fn take_all(&self) {
        while self.waiting() > 0 {
            self.take();
        }
    }

    /// Reads what is in the socket. Whether something was.
    pub(crate) fn hears(&mut self) -> bool {
        let mut bytes = [0; 4096];
        let flags = MsgFlags::MSG_DONTWAIT;
        matches!(nix::sys::socket::recv(self.socket.as_raw_fd(), &mut bytes, flags), Ok(1..))
    }

    /// Says that this side sleeps, as one does that has taken everything.
    pub(crate) fn sleep(&self) {
        let at = self.bases.1 + self.layout.flag_offset() as u64;
        self.queue.write_all_at(&0_u32.to_ne_bytes(), at).unwrap();
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

    /// Reads the message that an event names, unless the other side has hung up.
    pub(crate) fn read(&self, event: Event) -> Option<Vec<u8>> {
        if self.is_hung_up() {
            return None;
        }
        let (mut bytes, mut at) = (Vec::new(), event.offset);
        loop {
            let header = self.slice(at);
            let from = bytes.len();
            bytes.resize(from + header.size as usize, 0);
            let data = u64::from(at) + SLICE_HEADER_LEN as u64;
            self.buffer.read_exact_at(&mut bytes[from..], data).unwrap();
            if !header.has_next() {
                return Some(bytes);
            }
            at = header.next;
        }
    }

    /// Gives the slices of a message back. (To no list: that takes atomic operations, and nobody
    /// misses them here.)
    pub(crate) fn free(&self, event: Event) {
        let mut at = event.offset;
        loop {
            let header = self.slice(at);
            self.change_slice(at, |slice| (slice.size, slice.start, slice.flags) = (0, 0, 0));
            if !header.has_next() {
                return;
            }
            at = header.next;
        }
    }

    /// Sends an event with one of this side's slices.
    pub(crate) fn send(&mut self, stream_id: u32, bytes: &[u8]) {
        let offset = self.own.pop().expect("a slice is left");
        self.change_slice(offset, |slice| {
            (slice.size, slice.start, slice.flags) = (bytes.len() as u32, 0, FLAG_IN_USE);
        });
        let data = u64::from(offset) + SLICE_HEADER_LEN as u64;
        self.buffer.write_all_at(bytes, data).unwrap();
        self.put(Event { stream_id, offset, status: 0 });
    }

    /// Puts an event into the queue, and rings.
    pub(crate) fn put(&mut self, event: Event) {
        let tail_at = self.bases.0 + self.layout.tail_offset() as u64;
        let tail = self.index(tail_at);
        let slot = (tail % i64::from(self.capacity)) as u32;
        let at = self.bases.0 + element_offset(slot);
        self.queue.write_all_at(&event.to_bytes(), at).unwrap();
        self.queue.write_all_at(&(tail + 1).to_ne_bytes(), tail_at).unwrap();
        self.say(SYNC, &[]);
    }

    pub(crate) fn say(&mut self, kind: u8, payload: &[u8]) {
        self.socket.write_all(&message(kind, self.version, payload)).unwrap();
    }

    /// Sends data of a stream over the socket.
    pub(crate) fn allow_v3_fallback(&mut self, stream_id: u32, data: &[u8]) {
        let mut payload = stream_id.to_be_bytes().to_vec();
        payload.extend([0; 4]);
        payload.extend(data);
        self.say(FALLBACK, &payload);
    }
}

fn split_path(bytes: &[u8]) -> (&str, &[u8]) {
    let len = usize::from(u16::from_be_bytes([bytes[0], bytes[1]]));
    (std::str::from_utf8(&bytes[2..2 + len]).unwrap(), &bytes[2 + len..])
}

fn receive_descriptors(socket: &UnixStream) -> Vec<OwnedFd> {
    let mut control = nix::cmsg_space!([RawFd; 2]);
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags).unwrap();
    let mut fds = Vec::new();
    for part in message.cmsgs().unwrap() {
        if let ControlMessageOwned::ScmRights(received) = part {
            // SAFETY: the kernel made them for this process a line before.
            fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    fds
}

/// A buffer memory with one list, and the slices of it that were taken from the list before anybody
/// else uses it.
fn buffer() -> (Vec<u8>, Vec<u32>) {
    const TAKEN: u32 = SLICES / 2;
    let stride = SLICE + SLICE_HEADER_LEN as u32;
    let used = LIST_HEADER_LEN as u32 + SLICES * stride;
    let mut bytes = BufferManagerHeader { list_count: 1, used_len: used }.encode().to_vec();
    let list = ListHeader {
        size: (SLICES - TAKEN) as i32,
        capacity: SLICES,
        head: TAKEN * stride,
        tail: (SLICES - 1) * stride,
        slice_capacity: SLICE,
    };
    bytes.extend(list.encode());
    for place in 1..=SLICES {
        let is_last = place == SLICES;
        let next = if is_last { 0 } else { place * stride };
        let flags = if is_last { 0 } else { FLAG_HAS_NEXT };
        let slice = SliceHeader { capacity: SLICE, size: 0, start: 0, next, flags };
        bytes.extend(slice.encode());
        bytes.resize(bytes.len() + SLICE as usize, 0);
    }
    let first = (MANAGER_HEADER_LEN + LIST_HEADER_LEN) as u32;
    (bytes, (0..TAKEN).map(|place| first + place * stride).collect())
}
