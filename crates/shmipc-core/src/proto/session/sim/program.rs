// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the two programs do with their streams, and what they may see.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::proto::session::driver::{Driver, SharedStream};
use crate::proto::session::sim::driver::Side;
use crate::proto::session::sim::setup::{Knows, Rng, Setup};
use crate::proto::session::sim::tasks::{How, Pattern, Reader, Writer};
use crate::proto::session::stream::Half;

/// How many messages a task sends or reads in a row.
const IN_A_ROW: usize = 4;

/// How a program ends a direction of a stream, or the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    Finish,
    DropHalf,
    DropBoth,
    Close,
    Reset,
    /// It could not send any more.
    Broken,
}

/// What became of the reader of a direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// The peer has not accepted the stream.
    Unknown,
    Reads,
    /// It did not want to read on.
    Gone,
    End,
    Reset,
    /// The session was over.
    Over,
}

/// One direction of a stream.
#[derive(Debug)]
struct Direction {
    sent: u64,
    used_socket: bool,
    ending: Option<Ending>,
    /// Whether the sender knew of the extension at its end.
    knew: bool,
    received: u64,
    fate: Fate,
}

struct Handle {
    side: usize,
    stream: SharedStream<Side>,
    writer: Option<Writer>,
    reader: Option<Reader>,
    messages: usize,
    ending: Ending,
    /// Behind how many bytes its reader stops.
    stops_at: u64,
    /// How often its reader is passed over, of a hundred.
    slow: usize,
}

/// Whether there was a task to poll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turned {
    Polled,
    Nothing,
}

/// The programs of both sides.
pub(super) struct Program {
    handles: Vec<Handle>,
    /// By stream and sender.
    directions: BTreeMap<(u32, usize), Direction>,
    pub(super) opened: usize,
    pub(super) is_cut: bool,
    pub(super) is_drained: bool,
    /// Whether every reader reads.
    pub(super) is_finale: bool,
    has_checked_reason: [bool; 2],
    /// What each side had sent of each stream when it began to close the session.
    at_close: [Option<Vec<(u32, u64)>>; 2],
    results: [Option<Result<()>>; 2],
    may_refuse: bool,
    fallback_after: Duration,
    longest: usize,
}

impl Program {
    pub(super) fn new(setup: &Setup) -> Self {
        Self {
            handles: Vec::new(),
            directions: BTreeMap::new(),
            opened: 0,
            is_cut: false,
            is_drained: false,
            is_finale: false,
            has_checked_reason: [false; 2],
            at_close: [None, None],
            results: [None, None],
            may_refuse: setup.may_refuse(),
            fallback_after: setup.fallback_after,
            longest: setup.longest,
        }
    }

    fn direction(&mut self, id: u32, from: usize) -> &mut Direction {
        self.directions.get_mut(&(id, from)).expect("a handle has both directions")
    }

    fn add(&mut self, side: usize, stream: SharedStream<Side>, setup: &Setup, rng: &mut Rng) {
        let id = stream.id();
        let is_known = setup.knows != Knows::Neither;
        let endings = [Ending::DropBoth, Ending::Close, Ending::Reset];
        let more = [Ending::Finish, Ending::Finish, Ending::Finish, Ending::DropHalf];
        let ending = match rng.below(7) {
            // A peer that does not know a half-close would wait for ever.
            chosen if chosen < 3 || !(is_known || side == 1) => endings[chosen % 3],
            chosen => more[chosen - 3],
        };
        let new = Direction {
            sent: 0,
            used_socket: false,
            ending: None,
            knew: false,
            received: 0,
            fate: Fate::Unknown,
        };
        self.directions.insert((id, side), new);
        if side == 1 {
            self.direction(id, 0).fate = Fate::Reads;
            // The client has opened it, and reads.
            self.direction(id, 1).fate = match self.reads(0, id) {
                true => Fate::Reads,
                false => Fate::Gone,
            };
        }
        let writer = Writer::new(Pattern::new(id, side), self.fallback_after);
        writer.task.set(true);
        self.handles.push(Handle {
            side,
            stream,
            writer: Some(writer),
            reader: Some(Reader::new(Pattern::new(id, 1 - side))),
            messages: rng.pick(&[0, 1, 3, 10, 40]),
            ending,
            stops_at: if rng.chance(10) { rng.below(3000) as u64 } else { u64::MAX },
            slow: rng.pick(&[0, 0, 50, 100]),
        });
    }

    fn reads(&self, side: usize, id: u32) -> bool {
        let is_its = |handle: &&Handle| handle.side == side && handle.stream.id() == id;
        self.handles.iter().find(is_its).is_some_and(|handle| handle.reader.is_some())
    }

    pub(super) fn open(&mut self, setup: &Setup, sides: &[Rc<Side>; 2], rng: &mut Rng) {
        self.opened += 1;
        match sides[0].proto.open_stream(&*sides[0]) {
            Ok(stream) => self.add(0, stream, setup, rng),
            Err(Error::TooManyStreams(_)) => {}
            Err(error) => assert!(sides[0].is_over(), "a stream cannot be opened: {error}"),
        }
    }

    fn accept(&mut self, setup: &Setup, side: &Side, rng: &mut Rng) -> Turned {
        if side.number == 0 || !side.accepting.get() {
            return Turned::Nothing;
        }
        match side.proto.accept_stream() {
            Ok(Some(stream)) => self.add(1, stream, setup, rng),
            Ok(None) => side.accepting.set(false),
            Err(error) => {
                side.accepting.set(false);
                assert!(side.is_over() || self.is_drained, "none is accepted: {error}");
            }
        }
        Turned::Polled
    }

    /// Polls a task of a side that was woken, if there is one.
    pub(super) fn poll_one(
        &mut self,
        setup: &Setup,
        sides: &[Rc<Side>; 2],
        side: usize,
        rng: &mut Rng,
    ) -> Turned {
        if self.accept(setup, &sides[side], rng) == Turned::Polled {
            return Turned::Polled;
        }
        let (count, start) = (self.handles.len(), rng.below(self.handles.len()));
        for index in (start..count).chain(0..start) {
            let handle = &self.handles[index];
            if handle.side != side {
                continue;
            }
            let writes = handle.writer.as_ref().is_some_and(|writer| writer.task.get());
            let reads = handle.reader.as_ref().is_some_and(|reader| reader.task.get());
            let reads = reads && (self.is_finale || !rng.chance(handle.slow));
            if writes && (!reads || rng.chance(50)) {
                self.poll_writer(index, sides, rng);
            } else if reads {
                self.poll_reader(index, sides, rng);
            } else {
                continue;
            }
            let handle = &self.handles[index];
            if handle.writer.is_none() && handle.reader.is_none() {
                self.handles.swap_remove(index);
            }
            return Turned::Polled;
        }
        Turned::Nothing
    }

    fn poll_writer(&mut self, index: usize, sides: &[Rc<Side>; 2], rng: &mut Rng) {
        for _ in 0..IN_A_ROW {
            let handle = &mut self.handles[index];
            let (side, id) = (handle.side, handle.stream.id());
            let Some(writer) = &mut handle.writer else { return };
            writer.task.set(false);
            if writer.is_sending() {
                let polled = writer.poll(&sides[side], &handle.stream);
                let (sent, used_socket) = (writer.sent, handle.stream.sending.has_used_socket());
                let own = self.direction(id, side);
                (own.sent, own.used_socket) = (sent, used_socket);
                match polled {
                    Poll::Pending => return,
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(error)) => {
                        self.check_send_error(id, &sides[side], &error);
                        return self.end_writing(index, sides, Ending::Broken);
                    }
                }
            }
            let handle = &mut self.handles[index];
            if handle.messages == 0 {
                let ending = handle.ending;
                return self.end_writing(index, sides, ending);
            }
            handle.messages -= 1;
            let how = rng.pick(&[How::Loan, How::Write]);
            let longest = rng.pick(&[30, self.longest, self.longest]);
            if let Some(writer) = &mut handle.writer {
                writer.begin(how, 1 + rng.below(longest));
                writer.task.set(true);
            }
        }
    }

    fn end_writing(&mut self, index: usize, sides: &[Rc<Side>; 2], ending: Ending) {
        let handle = &mut self.handles[index];
        let (side, stream) = (&*sides[handle.side], Rc::clone(&handle.stream));
        if let Some(mut writer) = handle.writer.take() {
            writer.cancel(side);
        }
        let has_closed = matches!(ending, Ending::DropBoth | Ending::Close | Ending::Reset);
        let had_reader = handle.reader.is_some();
        if has_closed {
            handle.reader = None;
        }
        match ending {
            Ending::Finish => side.proto.half_close_stream(side, &stream),
            Ending::Close => side.proto.close_stream(side, &stream),
            Ending::Reset => side.proto.reset_stream(side, &stream),
            Ending::DropHalf | Ending::DropBoth | Ending::Broken => {}
        }
        if matches!(ending, Ending::Finish | Ending::Close | Ending::Reset) {
            side.flush_queue();
        }
        side.drop_half(&stream, Half::Write);
        if has_closed && had_reader {
            side.drop_half(&stream, Half::Read);
        }
        side.note_activity();
        let knew = side.proto.is_extension_known();
        let own = self.direction(stream.id(), side.number);
        (own.ending, own.knew) = (Some(ending), knew);
        if has_closed && had_reader {
            self.note_fate(stream.id(), side.number, Fate::Gone);
        }
    }

    /// What became of the reader at this side.
    fn note_fate(&mut self, id: u32, side: usize, fate: Fate) {
        if let Some(direction) = self.directions.get_mut(&(id, 1 - side)) {
            direction.fate = fate;
        }
    }

    fn poll_reader(&mut self, index: usize, sides: &[Rc<Side>; 2], rng: &mut Rng) {
        for _ in 0..IN_A_ROW {
            let handle = &mut self.handles[index];
            let (side, stream) = (&*sides[handle.side], Rc::clone(&handle.stream));
            let (id, stops_at) = (stream.id(), handle.stops_at);
            let Some(reader) = &mut handle.reader else { return };
            reader.task.set(false);
            let at_most = if rng.chance(30) { Some(1 + rng.below(2000)) } else { None };
            let polled = reader.poll(side, &stream, at_most, rng.chance(20));
            let received = reader.received;
            let fate = match polled {
                Poll::Pending => return,
                Poll::Ready(Ok(true)) if received < stops_at => {
                    reader.task.set(true);
                    None
                }
                Poll::Ready(Ok(true)) => Some(Fate::Gone),
                Poll::Ready(Ok(false)) => Some(Fate::End),
                Poll::Ready(Err(Error::StreamReset)) => Some(Fate::Reset),
                Poll::Ready(Err(error)) => {
                    assert!(side.is_over(), "a reader of stream {id} fails: {error}");
                    Some(Fate::Over)
                }
            };
            if let Some(from) = self.directions.get_mut(&(id, 1 - side.number)) {
                from.received = received;
                assert!(received <= from.sent, "{received} bytes came of stream {id}: {from:?}");
            } else {
                assert_eq!(received, 0, "stream {id} has no sender");
            }
            if let Some(fate) = fate {
                self.handles[index].reader = None;
                side.drop_half(&stream, Half::Read);
                side.note_activity();
                self.note_fate(id, side.number, fate);
                return self.check_read_end(id, side, fate);
            }
        }
    }

    /// Wakes tasks for nothing, or has them end before they are done.
    pub(super) fn disturb(&mut self, sides: &[Rc<Side>; 2], side: usize, rng: &mut Rng) {
        let index = rng.below(self.handles.len());
        let Some(handle) = self.handles.get_mut(index).filter(|handle| handle.side == side) else {
            return;
        };
        match rng.below(10) {
            0..4 => {
                handle.writer.iter().for_each(|writer| writer.task.set(true));
                handle.reader.iter().for_each(|reader| reader.task.set(true));
            }
            4..7 => {
                if let Some(writer) = &mut handle.writer {
                    writer.cancel(&sides[side]);
                    writer.task.set(true);
                }
            }
            7 => handle.stops_at = 0,
            8 => handle.messages = 0,
            _ => handle.slow = 0,
        }
    }

    /// Whether the peer of this side has ended the whole stream, as far as its program knows.
    fn has_peer_ended(&self, id: u32, side: usize) -> bool {
        let Some(peer) = self.directions.get(&(id, 1 - side)) else { return self.may_refuse };
        let is_gone = peer.ending.is_some()
            && self.directions.get(&(id, side)).is_some_and(|own| own.fate != Fate::Reads);
        matches!(peer.ending, Some(Ending::DropBoth | Ending::Close | Ending::Reset)) || is_gone
    }

    fn check_send_error(&self, id: u32, side: &Side, error: &Error) {
        let is_due = match error {
            Error::StreamClosedByPeer | Error::StreamReset => self.has_peer_ended(id, side.number),
            _ => side.is_over(),
        };
        assert!(is_due, "stream {id} of side {} cannot be sent on: {error}", side.number);
    }

    fn check_read_end(&self, id: u32, side: &Side, fate: Fate) {
        let from = self.directions.get(&(id, 1 - side.number));
        let is_drained = self.is_drained && side.number == 1;
        let is_right = match (fate, from) {
            (Fate::End, None) => self.may_refuse && !side.proto.is_extension_known(),
            // Others drop what is unread when the session ends.
            (Fate::End, Some(_)) if is_drained || (side.is_foreign && side.is_over()) => true,
            (Fate::End, Some(from)) => match from.ending {
                None => false,
                Some(Ending::Reset) => !from.knew,
                Some(_) => from.received == from.sent,
            },
            (Fate::Reset, None) => self.may_refuse,
            (Fate::Reset, Some(from)) => from.ending == Some(Ending::Reset) && from.knew,
            _ => true,
        };
        let number = side.number;
        assert!(is_right, "the reader of stream {id} at side {number} sees {fate:?} of {from:?}");
    }

    pub(super) fn check_reason(&mut self, sides: &[Rc<Side>; 2], side: usize, reason: &Error) {
        if std::mem::replace(&mut self.has_checked_reason[side], true) {
            return;
        }
        let is_right = match reason {
            Error::SessionClosed | Error::NotTaken { .. } => self.at_close[side].is_some(),
            Error::PeerClosed => sides[1 - side].is_over() || self.is_cut,
            _ => false,
        };
        assert!(is_right, "the session of side {side} ends: {reason}");
    }

    /// Every program has come to its end.
    pub(super) fn check_end(&self, sides: &[Rc<Side>; 2]) {
        if let Some(handle) = self.handles.first() {
            let (side, id) = (handle.side, handle.stream.id());
            let halves = [handle.writer.is_some(), handle.reader.is_some()];
            let (here, there) =
                (self.directions.get(&(id, side)), self.directions.get(&(id, 1 - side)));
            let state = handle.stream.state();
            panic!(
                "stream {id} of side {side} is stuck, [writer, reader]: {halves:?}, {state:?}, \
                 from here {here:?}, from there {there:?}"
            );
        }
        if sides.iter().any(|side| side.is_over()) {
            return;
        }
        for ((id, side), direction) in &self.directions {
            let number = sides[*side].proto.stream_count();
            assert_eq!(number, 0, "streams are left at side {side}");
            let is_right = match direction.fate {
                Fate::Unknown => direction.sent == 0 || self.may_refuse,
                Fate::Reads => false,
                Fate::Gone | Fate::End | Fate::Reset | Fate::Over => true,
            };
            assert!(is_right, "stream {id} from side {side} is lost: {direction:?}");
        }
    }

    /// Whether a side has begun to close the session.
    pub(super) fn has_closed(&self, side: usize) -> bool {
        self.at_close[side].is_some()
    }

    /// A side begins to close the session.
    pub(super) fn note_close(&mut self, side: usize) {
        let own = self.directions.iter().filter(|((_, from), _)| *from == side);
        self.at_close[side] = Some(own.map(|((id, _), own)| (*id, own.sent)).collect());
    }

    pub(super) fn note_closed(&mut self, side: usize, result: &Result<()>) {
        self.results[side] = Some(result.clone());
    }

    /// A close that has succeeded has lost nothing.
    pub(super) fn check_closed(&self, sides: &[Rc<Side>; 2]) {
        for side in 0..2 {
            let result = self.results[side].as_ref().expect("a close ends");
            let (true, Some(sent)) = (result.is_ok(), &self.at_close[side]) else { continue };
            // What others drop when they end looks as if it had been read.
            let is_first = !matches!(sides[side].proto.end_reason(), Some(Error::PeerClosed));
            if sides[1 - side].is_foreign && !is_first {
                continue;
            }
            for (id, sent) in sent {
                let direction = &self.directions[&(*id, side)];
                let is_right = match direction.fate {
                    _ if direction.ending == Some(Ending::Reset) => true,
                    // What an answer shows of it is no more than likely.
                    _ if direction.used_socket && !sides[side].proto.is_extension_known() => true,
                    _ if self.is_drained && side == 0 => true,
                    Fate::Gone | Fate::Reset => true,
                    Fate::Unknown => *sent == 0 || self.may_refuse,
                    Fate::Reads | Fate::End | Fate::Over => direction.received >= *sent,
                };
                assert!(is_right, "side {side} closed well, {sent} of stream {id}: {direction:?}");
            }
        }
    }
}
