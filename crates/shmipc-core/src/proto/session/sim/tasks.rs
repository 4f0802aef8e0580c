// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tasks of a simulated program: one sends on a stream, one reads it, one closes the session.
//! They wait and send as the halves of a stream do.

use std::rc::Rc;
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::payload::{Payload, SentChain};
use crate::proto::session::driver::Driver;
use crate::proto::session::ending::{FinalStep, FinalWait};
use crate::proto::session::fallback::{PoolWait, ReserveGate, ReturnAttempts, ReturnStep};
use crate::proto::session::path_order::PathBarrier;
use crate::proto::session::send::{SendGate, SocketGate};
use crate::proto::session::sim::driver::{MESSAGE_LEN, Side, SimStream, Task};
use crate::proto::session::sim::link::SimPayload;
use crate::proto::stream_state::DataPath;
use crate::wire::FALLBACK_HEADER_LEN;

/// The most bytes that one FallbackData of a write carries.
const FALLBACK_AT_MOST: usize = 2 << 10;

/// How a message is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// Slices are borrowed, then sent as a whole.
    Loan,
    /// Bytes are written, as many as go.
    Write,
}

/// The memory of a loan.
enum Loan {
    Slices(Vec<u32>),
    Private,
}

/// The bytes of one direction of a stream: each is told by its place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pattern(u64);

impl Pattern {
    pub(super) fn new(stream_id: u32, from: usize) -> Self {
        Self((u64::from(stream_id) * 2 + from as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub(super) fn byte(self, at: u64) -> u8 {
        // Both parts count: neither a shift by a few bytes nor another stream looks the same.
        ((self.0 >> 32) ^ (at.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 24)) as u8
    }

    fn bytes(self, at: u64, len: usize) -> Bytes {
        (at..at + len as u64).map(|at| self.byte(at)).collect()
    }
}

/// The task that sends.
pub(super) struct Writer {
    pub(super) task: Task,
    how: How,
    /// How much of the present message is left.
    left: usize,
    loan: Option<Loan>,
    pattern: Pattern,
    /// How much went out in all.
    pub(super) sent: u64,
    fallback_after: Duration,
    pool_wait: PoolWait,
    barrier: PathBarrier,
    attempts: Option<ReturnAttempts>,
}

impl Writer {
    pub(super) fn new(pattern: Pattern, fallback_after: Duration) -> Self {
        Self {
            task: Task::default(),
            how: How::Write,
            left: 0,
            loan: None,
            pattern,
            sent: 0,
            fallback_after,
            pool_wait: PoolWait::default(),
            barrier: PathBarrier::default(),
            attempts: None,
        }
    }

    /// Whether a message is under way.
    pub(super) fn is_sending(&self) -> bool {
        self.left > 0
    }

    pub(super) fn begin(&mut self, how: How, len: usize) {
        (self.how, self.left) = (how, len);
    }

    /// The future of the present operation is dropped.
    pub(super) fn cancel(&mut self, side: &Side) {
        self.end_wait(side);
        if let Some(Loan::Slices(slices)) = self.loan.take() {
            side.pool().give_back(&slices);
        }
        self.left = 0;
    }

    fn end_wait(&mut self, side: &Side) {
        for list in [&side.room, &side.memory, &side.budget, &side.returning, &side.outbox.waiters]
        {
            list.remove(&self.task);
        }
        self.pool_wait.end();
    }

    /// Goes on with the present message until it is sent.
    pub(super) fn poll(&mut self, side: &Side, stream: &SimStream) -> Poll<Result<()>> {
        while self.left > 0 {
            let polled = match self.how {
                How::Loan => self.poll_loan(side, stream),
                How::Write => self.poll_write(side, stream),
            };
            if polled.is_ready() {
                self.end_wait(side);
            }
            self.left -= ready!(polled)?;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_path(&mut self, side: &Side, stream: &SimStream) -> Poll<DataPath> {
        if stream.state().path() == DataPath::SharedMemory {
            return Poll::Ready(DataPath::SharedMemory);
        }
        let attempts = self.attempts.get_or_insert_default();
        match side.proto.try_return(side, stream, attempts, side.now()) {
            ReturnStep::ToMemory => {
                self.attempts = None;
                Poll::Ready(DataPath::SharedMemory)
            }
            ReturnStep::StayOnSocket => Poll::Ready(DataPath::Socket),
            ReturnStep::Wait(until) => {
                stream.tasks.writer.register(&self.task);
                side.returning.register(&self.task, Some(until));
                side.activate();
                Poll::Pending
            }
        }
    }

    fn poll_room(&mut self, side: &Side, stream: &SimStream) -> Poll<Result<()>> {
        side.proto.check_open(stream)?;
        side.activate();
        match side.proto.queue_gate(side, stream)? {
            SendGate::Open(()) | SendGate::OnSocket => return Poll::Ready(Ok(())),
            SendGate::Window => drop(stream.tasks.writer.register(&self.task)),
            SendGate::Queue => side.room.register(&self.task, None),
        }
        Poll::Pending
    }

    fn poll_pool(&mut self, side: &Side, stream: &SimStream) -> Poll<()> {
        let (until, _) = self.pool_wait.until(side.now(), self.fallback_after);
        if side.now() < until {
            side.memory.register(&self.task, Some(until));
            return Poll::Pending;
        }
        self.pool_wait.expire();
        stream.state().fall_back();
        Poll::Ready(())
    }

    fn may_use_reserve(&self, side: &Side, stream: &SimStream, len: usize) -> bool {
        let gate = side.proto.reserve_gate(side, stream, len);
        if gate == ReserveGate::AwaitReader {
            stream.tasks.writer.register(&self.task);
        }
        gate == ReserveGate::Open
    }

    fn send_slices(
        &mut self,
        side: &Side,
        stream: &SimStream,
        slices: Vec<u32>,
        len: usize,
    ) -> Result<usize> {
        let occupies = side.pool().capacity_of(&slices) as u64;
        let bytes = self.pattern.bytes(self.sent, len);
        let offset = side.pool().send(side.number, slices, bytes);
        side.proto.send_written(side, stream, &SentChain { offset, len, occupies })?;
        self.sent += len as u64;
        Ok(len)
    }

    fn poll_write(&mut self, side: &Side, stream: &SimStream) -> Poll<Result<usize>> {
        side.proto.check_open(stream)?;
        if ready!(self.poll_path(side, stream)) == DataPath::SharedMemory {
            ready!(self.poll_room(side, stream))?;
            let mut len = self.left;
            let is_scarce = side.is_memory_short() && side.proto.is_extension_known();
            if is_scarce {
                len = len.min(side.smallest_slice());
            }
            let slices = if is_scarce && !self.may_use_reserve(side, stream, len) {
                None
            } else {
                side.pool().allocate(side.number, len, true)
            };
            if let Some(slices) = slices {
                self.pool_wait.end();
                let len = len.min(side.pool().capacity_of(&slices));
                return Poll::Ready(self.send_slices(side, stream, slices, len));
            }
            ready!(self.poll_pool(side, stream));
        }
        let len = side.proto.socket_piece(stream, self.left.min(FALLBACK_AT_MOST));
        ready!(self.poll_socket_room(side, stream, len))?;
        self.send_over_socket(side, stream, len);
        Poll::Ready(Ok(len))
    }

    fn poll_loan(&mut self, side: &Side, stream: &SimStream) -> Poll<Result<usize>> {
        if self.loan.is_none() {
            self.loan = Some(ready!(self.poll_alloc(side, stream))?);
        }
        let sent = self.poll_send(side, stream);
        if matches!(sent, Poll::Ready(Err(_))) {
            self.cancel(side);
        }
        sent
    }

    fn poll_alloc(&mut self, side: &Side, stream: &SimStream) -> Poll<Result<Loan>> {
        side.proto.check_open(stream)?;
        if ready!(self.poll_path(side, stream)) == DataPath::SharedMemory {
            side.activate();
            if let Some(slices) = self.allocate(side, stream) {
                return Poll::Ready(Ok(Loan::Slices(slices)));
            }
            ready!(self.poll_pool(side, stream));
        }
        Poll::Ready(Ok(Loan::Private))
    }

    fn allocate(&self, side: &Side, stream: &SimStream) -> Option<Vec<u32>> {
        if side.is_memory_short() && !self.may_use_reserve(side, stream, self.left) {
            return None;
        }
        side.pool().allocate(side.number, self.left, false)
    }

    /// Sends the loan.
    fn poll_send(&mut self, side: &Side, stream: &SimStream) -> Poll<Result<usize>> {
        let gate = side.proto.send_gate(side, stream)?;
        if !matches!((&gate, &self.loan), (SendGate::Open(()), Some(Loan::Slices(_)))) {
            if ready!(self.poll_path(side, stream)) == DataPath::Socket {
                return self.poll_send_whole(side, stream);
            }
            ready!(self.poll_room(side, stream))?;
        }
        if matches!(self.loan, Some(Loan::Private)) {
            side.activate();
            match self.allocate(side, stream) {
                Some(slices) => self.loan = Some(Loan::Slices(slices)),
                None => {
                    stream.state().fall_back();
                    return self.poll_send_whole(side, stream);
                }
            }
        }
        match self.loan.take() {
            Some(Loan::Slices(slices)) => {
                Poll::Ready(self.send_slices(side, stream, slices, self.left))
            }
            _ => Poll::Ready(Ok(self.left)),
        }
    }

    fn poll_send_whole(&mut self, side: &Side, stream: &SimStream) -> Poll<Result<usize>> {
        ready!(self.poll_socket_room(side, stream, self.left))?;
        if let Some(Loan::Slices(slices)) = self.loan.take() {
            side.pool().give_back(&slices);
        }
        let piece = MESSAGE_LEN as usize - FALLBACK_HEADER_LEN;
        let mut left = self.left;
        while left > 0 {
            self.send_over_socket(side, stream, left.min(piece));
            left -= left.min(piece);
        }
        Poll::Ready(Ok(self.left))
    }

    fn send_over_socket(&mut self, side: &Side, stream: &SimStream, len: usize) {
        let bytes = self.pattern.bytes(self.sent, len);
        side.proto.send_over_socket(side, stream, &bytes, side.now());
        self.sent += len as u64;
    }

    fn poll_socket_room(
        &mut self,
        side: &Side,
        stream: &SimStream,
        len: usize,
    ) -> Poll<Result<()>> {
        match side.proto.socket_gate(side, stream, &mut self.barrier, len)? {
            SocketGate::Open => return Poll::Ready(Ok(())),
            SocketGate::Window => drop(stream.tasks.writer.register(&self.task)),
            SocketGate::Budget => {
                stream.tasks.writer.register(&self.task);
                side.budget.register(&self.task, None);
            }
            SocketGate::Outbox => side.outbox.waiters.register(&self.task, None),
            SocketGate::Barrier => side.room.register(&self.task, None),
        }
        Poll::Pending
    }
}

/// The task that reads.
pub(super) struct Reader {
    pub(super) task: Task,
    /// What comes. `None`: anything.
    pattern: Option<Pattern>,
    /// How much was read in all.
    pub(super) received: u64,
    /// How much room in the sender's window was freed by that.
    pub(super) taken: u64,
}

impl Reader {
    pub(super) fn new(pattern: Pattern) -> Self {
        Self { task: Rc::new(true.into()), pattern: Some(pattern), received: 0, taken: 0 }
    }

    /// One that takes whatever comes.
    pub(super) fn any() -> Self {
        Self { task: Task::default(), pattern: None, received: 0, taken: 0 }
    }

    /// Reads a message, or so many bytes of one at most. `Ok(false)` is the end.
    pub(super) fn poll(
        &mut self,
        side: &Side,
        stream: &SimStream,
        at_most: Option<usize>,
        looks: bool,
    ) -> Poll<Result<bool>> {
        let mut payload = stream.pop_inbound();
        if looks && payload.is_none() && side.proto.may_receive(stream) {
            payload = side.look_in_place(stream);
        }
        let Some(payload) = payload else { return self.poll_wait(side, stream) };
        side.note_activity();
        match at_most {
            Some(count) => self.read_some(side, stream, payload, count),
            None => {
                side.proto.on_taken(side, stream, &payload);
                self.read(payload, usize::MAX);
            }
        }
        Poll::Ready(Ok(true))
    }

    fn read_some(&mut self, side: &Side, stream: &SimStream, payload: SimPayload, count: usize) {
        let (cost, occupied) = (payload.socket_cost(), payload.occupies());
        let over_socket = !payload.is_shared();
        match self.read(payload, count) {
            Some(rest) => stream.inbound.borrow_mut().0.push_front(rest),
            None => {
                side.proto.on_unread_freed(side, cost);
                side.proto.give_credit(side, stream, occupied, over_socket);
            }
        }
    }

    /// Checks bytes against the pattern. Returns what is left of the message.
    fn read(&mut self, mut payload: SimPayload, count: usize) -> Option<SimPayload> {
        for byte in payload.read(count) {
            let expected = self.pattern.map_or(byte, |pattern| pattern.byte(self.received));
            assert_eq!(byte, expected, "byte {} of the stream is another one", self.received);
            self.received += 1;
        }
        if payload.is_empty() {
            self.taken += payload.occupies();
            return None;
        }
        Some(payload)
    }

    fn poll_wait(&self, side: &Side, stream: &SimStream) -> Poll<Result<bool>> {
        if let Some(end) = side.proto.read_end(stream) {
            return Poll::Ready(end.map(|()| false));
        }
        if stream.tasks.reader.register(&self.task) {
            side.proto.on_reader_waits(side, stream);
        }
        Poll::Pending
    }
}

/// The task that closes a session.
pub(super) struct Closer {
    pub(super) task: Task,
    wait: FinalWait<u32>,
    until: Instant,
    again_at: Option<Instant>,
    has_begun: bool,
}

impl Closer {
    pub(super) fn new(side: &Side, limit: Duration) -> Self {
        Self {
            task: Rc::new(true.into()),
            wait: FinalWait::new(limit),
            until: side.now() + limit,
            again_at: None,
            has_begun: false,
        }
    }

    /// Whether its time has come, or it was woken.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.task.get() || now >= self.until || self.again_at.is_some_and(|at| now >= at)
    }

    /// Closes the session: what the program is told.
    pub(super) fn poll(&mut self, side: &Side) -> Poll<Result<()>> {
        self.task.set(false);
        let taken = match side.proto.end_reason() {
            Some(error) if !self.has_begun => Err(error),
            _ => ready!(self.poll_taken(side)),
        };
        side.proto.fail(side, taken.clone().err().unwrap_or(Error::SessionClosed));
        Poll::Ready(match taken {
            Err(Error::SessionClosed) => Ok(()),
            Err(Error::PeerClosed) if has_peer_taken_all(side) => Ok(()),
            taken => taken,
        })
    }

    fn poll_taken(&mut self, side: &Side) -> Poll<Result<()>> {
        if !self.has_begun {
            side.flush_queue();
            self.has_begun = true;
        }
        self.again_at = None;
        if side.now() >= self.until {
            return Poll::Ready(Err(side.proto.not_taken(side, &self.wait)));
        }
        loop {
            if side.outbox.is_cut.get() {
                return Poll::Ready(Err(side.proto.end_error()));
            }
            if !side.is_outbox_empty() {
                side.outbox.waiters.register(&self.task, None);
                return Poll::Pending;
            }
            match side.proto.poll_final(side, &mut self.wait, side.now())? {
                FinalStep::Done => return Poll::Ready(Ok(())),
                FinalStep::AwaitSocket => {}
                FinalStep::Again => {
                    self.task.set(true);
                    return Poll::Pending;
                }
                FinalStep::Pause => {
                    self.again_at = Some(side.now() + Duration::from_millis(1));
                    return Poll::Pending;
                }
            }
        }
    }
}

fn has_peer_taken_all(side: &Side) -> bool {
    if side.outbox.is_cut.get() {
        return false;
    }
    side.proto.has_peer_taken_all(side).unwrap_or_else(|| {
        let (mut slices, mut next) = (Vec::new(), Some(0));
        while let Some(from) = next {
            next = side.find_sent(from, &mut slices);
        }
        slices.is_empty()
    })
}
