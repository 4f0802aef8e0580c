// SPDX-License-Identifier: MIT OR Apache-2.0
//! A peer that may do anything, for one side: bytes of a fuzzer become events, bytes of the socket,
//! indices of the queue, time, and what the program does.
//!
//! Nothing that it does may panic, or go on for ever. What this side keeps of it stays bounded, its
//! slices come back when it is done, and a session that has ended does nothing more.

use std::cell::Cell;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use crate::config::{ProtocolVersion, Wakeup};
use crate::error::Error;
use crate::fuzzing::Input;
use crate::proto::Negotiated;
use crate::proto::session::SessionLimits;
use crate::proto::session::driver::{Driver, SharedStream};
use crate::proto::session::ending::DrainPhase;
use crate::proto::session::sim::driver::{Link, Residency, Side};
use crate::proto::session::sim::link::{EventQueue, Pipe, Pool};
use crate::proto::session::sim::tasks::{Closer, How, Pattern, Reader, Writer};
use crate::proto::session::stream::Half;
use crate::proto::stream_table::Role;
use crate::wire::{Event, EventState, Extension, fallback_header, sync_event};

const STREAMS: usize = 8;
const UNREAD: usize = 16 << 10;
/// What one receive may bring beyond the limit.
const UNREAD_SLACK: usize = 1 << 20;

struct Handle {
    stream: SharedStream<Side>,
    writer: Option<Writer>,
    reader: Option<Reader>,
}

struct Hostile {
    side: Rc<Side>,
    link: Link,
    /// The number of the peer.
    peer: usize,
    handles: Vec<Handle>,
    closer: Option<Closer>,
    /// Where messages start that the peer has written and not sent.
    written: Vec<u32>,
}

/// One side of a session, and a peer that does what these bytes say.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input(data);
    let mut hostile = Hostile::new(&mut input);
    while let Some(action) = input.byte() {
        hostile.act(action, &mut input);
        hostile.check();
    }
    hostile.end();
}

impl Hostile {
    fn new(input: &mut Input<'_>) -> Self {
        let first = input.byte().unwrap_or(0);
        let (role, peer) = if first & 1 == 0 { (Role::Client, 1) } else { (Role::Server, 0) };
        let version = match first & 6 {
            0 => ProtocolVersion::V2,
            2 => ProtocolVersion::V3,
            _ => ProtocolVersion::V4,
        };
        let wakeup = match (version, first >> 3 & 3) {
            (ProtocolVersion::V4, 1) => Wakeup::EventFd,
            (ProtocolVersion::V4, 2) => Wakeup::Polling(Duration::from_micros(100)),
            _ => Wakeup::Socket,
        };
        let negotiated = Negotiated { wakeup, ..Negotiated::plain(version) };
        let limits = SessionLimits {
            streams: STREAMS,
            unread_fallback_bytes: UNREAD,
            stream_window: 4096,
            stall: Some(Duration::from_millis(50)),
        };
        let clock = Rc::new(Cell::new(Instant::now()));
        let extension = (first & 32 == 0).then(|| Extension::with_window(4096));
        let link = Link {
            pool: Pool::new(&[(64, 6), (512, 3)], 1 + usize::from(first >> 6 & 1)),
            queues: [(), ()].map(|()| Rc::new(EventQueue::new(8))),
            pipes: [(), ()].map(|()| Pipe::new(1500)),
            bells: Default::default(),
            extensions: [(), ()].map(|()| Rc::new(Cell::new(extension))),
            clock,
        };
        let side = Side::new(role, negotiated, limits, &link, false);
        side.start();
        Self { side, link, peer, handles: Vec::new(), closer: None, written: Vec::new() }
    }

    fn act(&mut self, action: u8, input: &mut Input<'_>) {
        let side = Rc::clone(&self.side);
        match action % 32 {
            0..5 => self.send_event(input),
            5 => self.link.queues[self.peer].publish(),
            6..8 => self.send_message(input),
            8 => drop(self.link.pipes[self.peer].write(input.bytes(usize::from(action)))),
            9 => self.write_slices(input),
            10 => self.take_events(),
            11 => drop(self.link.pipes[1 - self.peer].read(&mut [0; 300])),
            12 => self.say(input),
            13 => self.pass_time(input),
            14..17 => side.turn(action & 32 != 0),
            17 => side.look(action & 32 != 0),
            18 | 19 => side.read_socket(if action & 32 == 0 { usize::MAX } else { 9 }),
            20 => side.send_kept(),
            21 => side.on_bell(),
            22 => self.open(),
            23 | 24 => self.write(input),
            25 | 26 => self.read(input),
            27 => self.end_half(input),
            28 => self.end_stream(input),
            29 => self.close(),
            30 => self.drain(action),
            _ => self.break_link(action),
        }
        self.accept();
    }

    fn send_event(&self, input: &mut Input<'_>) {
        let kind = input.byte().unwrap_or(0);
        let status = match kind % 8 {
            0..3 => EventState::Open.to_status(),
            3 => EventState::Closed.to_status() | u32::from(kind & 64 != 0) << 8,
            4 => EventState::HalfClosed.to_status(),
            5 | 6 => EventState::Credit.to_status() | u32::from(kind & 64 != 0) << 8,
            _ => input.number::<2>() as u32,
        };
        let offset = match kind >> 3 & 3 {
            0 => 0,
            1 => self.written.last().copied().unwrap_or(64),
            2 => 64 * u32::from(input.byte().unwrap_or(1)),
            _ => input.word(1000),
        };
        let event = Event { stream_id: self.stream_id(input), offset, status };
        let queue = &self.link.queues[self.peer];
        if matches!(queue.push(event), Ok(true)) && kind & 128 == 0 {
            queue.publish();
        }
    }

    fn stream_id(&self, input: &mut Input<'_>) -> u32 {
        match input.byte().unwrap_or(2) {
            near @ 0..200 => u32::from(near % 16),
            _ => input.word(u32::MAX),
        }
    }

    fn send_message(&self, input: &mut Input<'_>) {
        let version = self.side.proto.version_byte();
        let kind = input.byte().unwrap_or(0);
        let pipe = &self.link.pipes[self.peer];
        if kind.is_multiple_of(8) {
            pipe.write(&sync_event(version));
            return;
        }
        let len = if kind & 8 == 0 { usize::from(kind) } else { 0 };
        let status = [0, 0, 0, 1, 2, 0x101, 3, 0x1_0000][usize::from(kind % 8)];
        let header = fallback_header(version, self.stream_id(input), status, len as u32);
        // A part of it is as good as the whole.
        pipe.write(&header);
        pipe.write(&vec![kind; len]);
    }

    /// A message of the peer's in slices, which it may send, or not, or twice.
    fn write_slices(&mut self, input: &mut Input<'_>) {
        let len = usize::from(input.byte().unwrap_or(0)) * 4;
        let Some(slices) = self.link.pool.allocate(self.peer, len, true) else { return };
        if !slices.is_empty() {
            let len = len.min(self.link.pool.capacity_of(&slices));
            self.written.push(self.link.pool.send(self.peer, slices, vec![7; len].into()));
        }
    }

    fn take_events(&self) {
        let queue = &self.link.queues[1 - self.peer];
        queue.available_now();
        while let Some(event) = queue.pop() {
            // What it was sent it takes, and gives back at once.
            if event.state() == EventState::Open
                && let Ok((slices, _)) = self.link.pool.adopt(event.offset)
            {
                self.link.pool.give_back(&slices);
            }
        }
        queue.show_head();
    }

    fn say(&self, input: &mut Input<'_>) {
        let byte = input.byte().unwrap_or(0);
        self.link.extensions[self.peer].set(Extension::from_byte(byte | 0x80));
        if byte & 64 != 0 {
            self.link.queues[1 - self.peer].try_sleep();
        }
    }

    fn pass_time(&mut self, input: &mut Input<'_>) {
        let passed = Duration::from_millis(input.byte().unwrap_or(1).into());
        self.link.clock.set(self.link.clock.get() + passed);
        self.side.proto.check_liveness(&*self.side, passed);
        if let Some(closer) = &mut self.closer
            && closer.poll(&self.side).is_ready()
        {
            self.closer = None;
            assert!(self.side.is_over());
        }
    }

    fn add(&mut self, stream: SharedStream<Side>) {
        let writer = Writer::new(Pattern::new(stream.id(), 0), Duration::from_millis(1));
        self.handles.push(Handle { stream, writer: Some(writer), reader: Some(Reader::any()) });
    }

    fn open(&mut self) {
        if let Ok(stream) = self.side.proto.open_stream(&*self.side) {
            self.add(stream);
        }
    }

    fn accept(&mut self) {
        while self.side.number == 1
            && let Ok(Some(stream)) = self.side.proto.accept_stream()
        {
            self.add(stream);
        }
    }

    fn handle(&mut self, input: &mut Input<'_>) -> Option<&mut Handle> {
        let index = usize::from(input.byte()?);
        let count = self.handles.len().max(1);
        self.handles.get_mut(index % count)
    }

    fn write(&mut self, input: &mut Input<'_>) {
        let side = Rc::clone(&self.side);
        let (kind, len) = (input.byte().unwrap_or(0), input.number::<2>() as usize % 3000);
        let Some(handle) = self.handle(input) else { return };
        let Some(writer) = &mut handle.writer else { return };
        if kind & 1 != 0 {
            writer.cancel(&side);
        }
        if !writer.is_sending() {
            writer.begin(if kind & 2 == 0 { How::Loan } else { How::Write }, len);
        }
        if let Poll::Ready(Err(error)) = writer.poll(&side, &handle.stream) {
            let is_closed = !handle.stream.state().can_send();
            assert!(is_closed || side.is_over(), "a stream cannot be sent on: {error}");
            writer.cancel(&side);
        }
    }

    fn read(&mut self, input: &mut Input<'_>) {
        let side = Rc::clone(&self.side);
        let kind = input.byte().unwrap_or(0);
        let Some(handle) = self.handle(input) else { return };
        let Some(reader) = &mut handle.reader else { return };
        let at_most = (kind & 1 != 0).then_some(usize::from(kind) + 1);
        if let Poll::Ready(Err(error)) = reader.poll(&side, &handle.stream, at_most, kind & 2 != 0)
        {
            let is_reset = matches!(error, Error::StreamReset | Error::StreamClosed);
            assert!(is_reset || side.is_over(), "a stream cannot be read: {error}");
        }
    }

    fn end_half(&mut self, input: &mut Input<'_>) {
        let side = Rc::clone(&self.side);
        let is_writer = input.byte().unwrap_or(0) & 1 == 0;
        let Some(handle) = self.handle(input) else { return };
        if is_writer && let Some(mut writer) = handle.writer.take() {
            writer.cancel(&side);
            side.drop_half(&handle.stream, Half::Write);
        } else if !is_writer && handle.reader.take().is_some() {
            side.drop_half(&handle.stream, Half::Read);
        }
        self.forget_dropped();
    }

    fn forget_dropped(&mut self) {
        self.handles.retain(|handle| handle.writer.is_some() || handle.reader.is_some());
    }

    fn end_stream(&mut self, input: &mut Input<'_>) {
        let side = Rc::clone(&self.side);
        let kind = input.byte().unwrap_or(0);
        let Some(handle) = self.handle(input) else { return };
        match kind % 3 {
            0 => side.proto.close_stream(&*side, &handle.stream),
            1 => side.proto.reset_stream(&*side, &handle.stream),
            _ => side.proto.half_close_stream(&*side, &handle.stream),
        }
        side.flush_queue();
    }

    fn close(&mut self) {
        if self.closer.is_none() && !self.side.is_over() {
            self.closer = Some(Closer::new(&self.side, Duration::from_millis(200)));
        }
    }

    fn drain(&self, action: u8) {
        let phase = [DrainPhase::Look, DrainPhase::Quiet, DrainPhase::All];
        if action & 32 != 0 {
            self.side.proto.stop_accepting(&*self.side);
        }
        self.side.proto.drain_streams(&*self.side, phase[usize::from(action >> 6) % 3]);
    }

    fn break_link(&self, action: u8) {
        match action >> 5 {
            0 => self.link.queues[1 - self.peer].is_broken.set(true),
            1 => self.link.pipes.iter().for_each(|pipe| pipe.is_closed.set(true)),
            2 => self.side.note_hung_up(),
            _ => self.link.pipes[self.peer].lose_last(usize::from(action)),
        }
    }

    fn check(&self) {
        let (side, proto) = (&self.side, &self.side.proto);
        assert!(proto.stream_count() <= STREAMS);
        assert!(proto.unread_bytes.get() <= UNREAD + UNREAD_SLACK);
        assert!(side.unsent_bytes() <= 1 << 20, "{} bytes are kept", side.unsent_bytes());
        if side.is_over() {
            assert!(proto.end_reason().is_some());
            assert!(side.is_outbox_empty() || side.pipe_out.is_closed.get());
        }
    }

    /// The connection ends, and then everything does.
    fn end(mut self) {
        self.link.pipes.iter().for_each(|pipe| pipe.is_closed.set(true));
        self.side.note_hung_up();
        self.side.turn(true);
        assert!(self.side.is_over());
        self.accept();
        for Handle { stream, writer, reader } in self.handles.drain(..) {
            if let Some(mut writer) = writer {
                writer.cancel(&self.side);
                self.side.drop_half(&stream, Half::Write);
            }
            if reader.is_some() {
                self.side.drop_half(&stream, Half::Read);
            }
        }
        assert_eq!(self.side.proto.stream_count(), 0);
        // Those that went to the peer are its own; no other is held.
        assert_eq!(self.link.pool.held(), 0);
        assert_eq!(self.side.residency.get(), Residency::Asleep);
    }
}
