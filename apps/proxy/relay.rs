// SPDX-License-Identifier: MIT OR Apache-2.0
//! Carries bytes between two ends, both ways, until both ways have ended.
//!
//! Either end may be a socket or a stream of a session. How a connection ends on one side is how it
//! ends on the other, as far as that side can say so:
//!
//! - The end of one direction is passed on and the other direction goes on. A peer that is not of
//!   this crate knows no such end (see [`End::knows_half_close`]): when the server has finished,
//!   its stream is closed at once; when the client has finished, its server's stream is closed as
//!   soon as nothing has come from there for some time.
//! - A reset, or the loss of a session, ends both directions by a reset. An end that was read is
//!   never passed on as a clean one when the same socket turned out to be reset.
//! - Who has finished its own direction, and then goes, is gone: what is sent to it reaches nobody,
//!   so the other side is closed. All that it sent itself has been passed on. This is noticed
//!   without writing to it (see [`hangups`](crate::hangups)).
//!
//! One buffer serves all connections of the core, since what is read is nearly always written in
//! the same breath. A connection has memory of its own only while its reader is behind, and never
//! more than one buffer for each direction. So thousands of idle connections cost no buffers.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};

use crate::end::End;
use crate::hangups::{Hangup, Hangups};

/// Reads and writes in a row of one direction, before other connections have their turn.
const STEPS_PER_TURN: usize = 8;

/// What all connections of a core share: the buffer, and the count of what they carried.
pub(crate) struct Carrier {
    buffer: RefCell<Box<[u8]>>,
    hangups: Rc<Hangups>,
    /// For how long nothing must have come from a server whose client has finished, before it is
    /// told by a close, if it knows nothing else.
    half_close_timeout: Duration,
    /// Bytes from those who connected.
    pub(crate) up: Cell<u64>,
    /// Bytes to those who connected.
    pub(crate) down: Cell<u64>,
}

impl Carrier {
    /// At most `len` bytes are read at a time.
    pub(crate) fn new(len: usize, half_close_timeout: Duration) -> io::Result<Self> {
        Ok(Self {
            buffer: RefCell::new(vec![0; len].into()),
            hangups: Hangups::start()?,
            half_close_timeout,
            up: Cell::new(0),
            down: Cell::new(0),
        })
    }

    /// Carries everything from `near` to `far` and from `far` to `near`.
    ///
    /// Both are closed when this returns. When it fails or is dropped, both are reset: what came
    /// through must not be taken for all there was.
    pub(crate) async fn carry(&self, near: End, far: End) -> io::Result<()> {
        let mut relay = Relay {
            near,
            far,
            up: Direction::new(&self.up),
            down: Direction::new(&self.down),
            carrier: self,
            answered: 0,
            quiet: None,
        };
        loop {
            let turn = poll_fn(|context| relay.poll_turn(context, &mut self.buffer.borrow_mut()));
            match turn.await? {
                Turn::Last => {
                    relay.near.has_ended = true;
                    relay.far.has_ended = true;
                    return Ok(());
                }
                Turn::More => glommio::executor().yield_task_queue_now().await,
            }
        }
    }
}

/// One connection.
struct Relay<'a> {
    near: End,
    far: End,
    up: Direction<'a>,
    down: Direction<'a>,
    carrier: &'a Carrier,
    /// How much had gone up when something last went down.
    answered: u64,
    /// Runs while only the server may still say something, and does not know that.
    quiet: Option<Quiet>,
}

/// What a turn has come to.
enum Turn {
    /// There may be more at once, but others are to have their turn before.
    More,
    /// Everything is done.
    Last,
}

impl Relay<'_> {
    fn poll_turn(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<Turn>> {
        let went_up = self.up.poll_turn(context, &mut self.near, &mut self.far, buffer);
        let went_up = match went_up {
            Poll::Ready(Err(error)) if self.is_parting(&error) => {
                return Poll::Ready(Ok(Turn::Last));
            }
            went_up => went_up?,
        };
        let moved_down = self.down.moved;
        let went_down = self.down.poll_turn(context, &mut self.far, &mut self.near, buffer)?;
        if self.down.moved != moved_down {
            self.answered = self.up.moved;
        }
        if self.poll_ended(context)? {
            let failure = self.up.take_failure().or(self.down.take_failure());
            return Poll::Ready(failure.map_or(Ok(Turn::Last), Err));
        }
        let has_more = (went_up.is_ready() && !self.up.is_over())
            || (went_down.is_ready() && !self.down.is_over());
        if has_more { Poll::Ready(Ok(Turn::More)) } else { Poll::Pending }
    }

    /// Whether nothing is left to be done.
    fn poll_ended(&mut self, context: &mut Context<'_>) -> io::Result<bool> {
        let Self { near, far, up, down, carrier, quiet, .. } = self;
        if up.is_reading() && down.is_reading() {
            // Whoever is read from says everything there.
            return Ok(false);
        }
        match (up.is_over(), down.is_over()) {
            (true, true) => return Ok(true),
            // It has no other word for the end of its answer.
            (false, true) if !near.knows_half_close() => return Ok(true),
            _ => {}
        }
        for (end, incoming) in [(near, &*up), (&mut *far, &*down)] {
            if incoming.is_reading() {
                continue;
            }
            match end.poll_gone(context, &carrier.hangups) {
                Poll::Ready(Hangup::Reset(error)) if !incoming.is_over() || end.is_stream() => {
                    return Err(error);
                }
                // All that it sent is passed on.
                Poll::Ready(_) if incoming.is_over() => return Ok(true),
                // What it sent is still under way.
                Poll::Ready(_) | Poll::Pending => {}
            }
        }
        if up.is_over() && !far.knows_half_close() {
            let quiet = quiet.get_or_insert_with(|| Quiet::new(carrier.half_close_timeout));
            return Ok(quiet.poll(context, down).is_ready());
        }
        Ok(false)
    }

    /// Whether what was read from those who connected is that their process has gone, after it had
    /// been answered. Its streams go with it, and a peer that is not of this crate says no more.
    fn is_parting(&self, error: &io::Error) -> bool {
        let is_answered = self.answered == self.up.moved;
        let is_idle = self.up.is_reading() && self.down.is_reading();
        is_answered && is_idle && self.near.has_left_without_a_word(error)
    }
}

/// Waits until nothing has moved in a direction for some time.
struct Quiet {
    limit: Duration,
    since: Instant,
    moved: u64,
    timer: Pin<Box<dyn Future<Output = ()>>>,
}

impl Quiet {
    fn new(limit: Duration) -> Self {
        let timer = Box::pin(glommio::timer::sleep(limit));
        Self { limit, since: Instant::now(), moved: 0, timer }
    }

    fn poll(&mut self, context: &mut Context<'_>, direction: &Direction<'_>) -> Poll<()> {
        // What waits to be taken is no silence.
        if self.moved != direction.moved || !direction.is_reading() {
            self.moved = direction.moved;
            self.since = Instant::now();
        }
        while self.timer.as_mut().poll(context).is_ready() {
            let rest = self.limit.saturating_sub(self.since.elapsed());
            if rest.is_zero() {
                return Poll::Ready(());
            }
            self.timer = Box::pin(glommio::timer::sleep(rest));
        }
        Poll::Pending
    }
}

/// One way between the two ends.
struct Direction<'a> {
    state: State,
    /// Bytes that were written, in this connection.
    moved: u64,
    carried: &'a Cell<u64>,
}

enum State {
    Reading,
    /// This was read and waits to be written.
    Writing(Bytes),
    /// Everything is written, and the end is to be passed on.
    Ending,
    /// Nothing more goes this way: the end has been passed on, or whoever it is for has closed.
    Over,
    /// Nothing more goes this way, and what went may not have arrived.
    Failed(io::Error),
}

impl<'a> Direction<'a> {
    fn new(carried: &'a Cell<u64>) -> Self {
        Self { state: State::Reading, moved: 0, carried }
    }

    fn is_reading(&self) -> bool {
        matches!(self.state, State::Reading)
    }

    fn is_over(&self) -> bool {
        matches!(self.state, State::Over | State::Failed(_))
    }

    fn take_failure(&mut self) -> Option<io::Error> {
        match std::mem::replace(&mut self.state, State::Over) {
            State::Failed(error) => Some(error),
            _ => None,
        }
    }

    fn note_written(&mut self, count: usize) {
        self.moved += count as u64;
        self.carried.set(self.carried.get() + count as u64);
    }

    /// Goes on as far as it can, or as far as one turn goes.
    fn poll_turn(
        &mut self,
        context: &mut Context<'_>,
        from: &mut End,
        to: &mut End,
        buffer: &mut [u8],
    ) -> Poll<io::Result<()>> {
        for _ in 0..STEPS_PER_TURN {
            if self.is_over() {
                break;
            }
            self.state = ready!(self.poll_step(context, from, to, buffer))?;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_step(
        &mut self,
        context: &mut Context<'_>,
        from: &mut End,
        to: &mut End,
        buffer: &mut [u8],
    ) -> Poll<io::Result<State>> {
        let next = match &mut self.state {
            State::Reading => match ready!(from.io().poll_read(context, buffer))? {
                // A socket whose error was given once, to whoever wrote to it, then reads as ended.
                0 if from.was_reset => {
                    return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                }
                0 => State::Ending,
                count => {
                    let written = match to.io().poll_write(context, &buffer[..count]) {
                        Poll::Ready(Ok(written)) => written,
                        Poll::Ready(Err(error)) => return Poll::Ready(State::refused(to, error)),
                        Poll::Pending => 0,
                    };
                    self.note_written(written);
                    State::after(Bytes::copy_from_slice(&buffer[written..count]))
                }
            },
            State::Writing(rest) => {
                let written = match ready!(to.io().poll_write(context, rest)) {
                    Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    Ok(written) => written,
                    Err(error) => return Poll::Ready(State::refused(to, error)),
                };
                rest.advance(written);
                let next = State::after(std::mem::take(rest));
                self.note_written(written);
                next
            }
            State::Ending => match ready!(to.io().poll_close(context)) {
                Ok(()) => State::Over,
                // It has gone meanwhile, and needs no word.
                Err(error) if error.kind() == io::ErrorKind::NotConnected => State::Over,
                Err(error) => return Poll::Ready(Err(error)),
            },
            State::Over | State::Failed(_) => {
                unreachable!("a direction that is over is not gone on with")
            }
        };
        Poll::Ready(Ok(next))
    }
}

impl State {
    /// What a failure to write leads to. Whoever has gone may have answered before, and that is
    /// carried to its end the other way: a server need not read a request that it refuses.
    fn refused(to: &mut End, error: io::Error) -> io::Result<Self> {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Ok(Self::Over),
            io::ErrorKind::ConnectionReset => {
                to.was_reset = true;
                Ok(Self::Failed(error))
            }
            _ => Err(error),
        }
    }

    fn after(rest: Bytes) -> Self {
        if rest.is_empty() { Self::Reading } else { Self::Writing(rest) }
    }
}
