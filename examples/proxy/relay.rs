// SPDX-License-Identifier: MIT OR Apache-2.0
//! Carries bytes between two ends, both ways, until both ways have ended.
//!
//! Either end may be a socket or a stream of a session. The end of one direction is passed on and
//! the other direction goes on; a failure of either ends both.
//!
//! One buffer serves all connections of the core, since what is read is nearly always written in
//! the same breath. A connection has memory of its own only while its reader is behind, and never
//! more than one buffer for each direction. So thousands of idle connections cost no buffers.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};

use crate::ends::End;

/// Reads and writes in a row of one direction, before other connections have their turn.
const STEPS_PER_TURN: usize = 8;

/// What all connections of a core share: the buffer, and the count of what they carried.
pub(crate) struct Carrier {
    buffer: RefCell<Box<[u8]>>,
    /// Bytes from those who connected.
    pub(crate) up: Cell<u64>,
    /// Bytes to those who connected.
    pub(crate) down: Cell<u64>,
}

impl Carrier {
    /// At most `len` bytes are read at a time.
    pub(crate) fn new(len: usize) -> Self {
        let buffer = RefCell::new(vec![0; len].into());
        Self { buffer, up: Cell::new(0), down: Cell::new(0) }
    }

    /// Carries everything from `near` to `far` and from `far` to `near`.
    ///
    /// Both are closed when this returns. When it fails or is dropped, sockets are reset: what came
    /// through must not be taken for all there was.
    pub(crate) async fn carry(&self, near: End, far: End) -> io::Result<()> {
        let (up, down) = (Direction::new(&self.up), Direction::new(&self.down));
        let mut relay = Relay { near, far, up, down, has_ended: false };
        loop {
            let turn = poll_fn(|context| relay.poll_turn(context, &mut self.buffer.borrow_mut()));
            match turn.await? {
                Turn::Last => break,
                Turn::More => glommio::executor().yield_task_queue_now().await,
            }
        }
        relay.has_ended = true;
        Ok(())
    }
}

/// One connection.
struct Relay<'a> {
    near: End,
    far: End,
    up: Direction<'a>,
    down: Direction<'a>,
    has_ended: bool,
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
        let Self { near, far, up, down, .. } = self;
        let went_up = up.poll_turn(context, near, far, buffer)?;
        let went_down = down.poll_turn(context, far, near, buffer)?;
        let is_done = match (up.is_over(), down.is_over()) {
            (true, true) => true,
            // All that one side sent is passed on. When it takes nothing any more, what the other
            // one sends would reach nobody.
            (true, false) => near.takes_nothing(context),
            (false, true) => far.takes_nothing(context),
            (false, false) => false,
        };
        if is_done {
            return Poll::Ready(
                up.take_failure().or(down.take_failure()).map_or(Ok(Turn::Last), Err),
            );
        }
        let has_more =
            (went_up.is_ready() && !up.is_over()) || (went_down.is_ready() && !down.is_over());
        if has_more { Poll::Ready(Ok(Turn::More)) } else { Poll::Pending }
    }
}

impl Drop for Relay<'_> {
    fn drop(&mut self) {
        if !self.has_ended {
            self.near.abort();
            self.far.abort();
        }
    }
}

/// One way between the two ends.
struct Direction<'a> {
    state: State,
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
        Self { state: State::Reading, carried }
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
                0 => State::Ending,
                count => {
                    let written = match to.io().poll_write(context, &buffer[..count]) {
                        Poll::Ready(Ok(written)) => written,
                        Poll::Ready(Err(error)) => return Poll::Ready(State::refused(error)),
                        Poll::Pending => 0,
                    };
                    self.carried.set(self.carried.get() + written as u64);
                    State::after(Bytes::copy_from_slice(&buffer[written..count]))
                }
            },
            State::Writing(rest) => {
                let written = match ready!(to.io().poll_write(context, rest)) {
                    Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    Ok(written) => written,
                    Err(error) => return Poll::Ready(State::refused(error)),
                };
                self.carried.set(self.carried.get() + written as u64);
                rest.advance(written);
                State::after(std::mem::take(rest))
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
    fn refused(error: io::Error) -> io::Result<Self> {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Ok(Self::Over),
            io::ErrorKind::ConnectionReset => Ok(Self::Failed(error)),
            _ => Err(error),
        }
    }

    fn after(rest: Bytes) -> Self {
        if rest.is_empty() { Self::Reading } else { Self::Writing(rest) }
    }
}
