// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a session ends without losing what it has sent last, and how it is brought to its end.
//!
//! A peer of this crate that sees the connection end takes what was sent before. Others do not:
//! shmipc-go looks at the hang-up first and drops its queue, and what its streams had received and
//! was not read yet (`docs/protocol.md#ending-a-session`). So towards a peer that is not known to
//! be of this crate the connection stays up, for the time of
//! [`close_timeout`](crate::ConfigBuilder::close_timeout) at most, until the peer
//!
//! - has read the socket,
//! - has taken every event that was in the queue when the close began, and
//! - has given back every slice that it had then: its head stands behind an event as soon as the
//!   event is popped, long before a reader has seen the data. How many slices a list counts says
//!   nothing, since several sessions can share one memory.
//!
//! Data that went over the socket leaves no such mark, and no message of the protocol says that it
//! was read. What shows it is what the peer's user does next: it answers on the stream, or closes
//! it. (Not after this side has closed it: then the peer's own close is not told.) So as long as
//! neither comes, the connection stays up for the whole time, which is what a slow reader needs,
//! and the close does not say that all was taken. Data of which the time has passed already gets a
//! short while behind a [barrier](super::path_order), which tells when the event loop of the peer
//! has handled it.
//!
//! A version 2 client does not know whether the server is there at all. That it has taken the first
//! event shows it; a server of this crate, which takes the rest by itself, says so when it maps.
//!
//! Nothing of this is counted while messages flow: all of it is found when the session ends.
//!
//! # Draining
//!
//! The protocol has no word for "I am about to go". So this side behaves as if the peer had said
//! that: it takes no more streams, and each stream ends behind what has come of it. Its handler
//! reads to the end, answers, and drops it. When no stream is left, the session can go.
//!
//! A stream must not end in the middle of a request. Where requests begin and end is not known
//! here; but a peer that is in the middle of one goes on sending, and is not answered meanwhile. So
//! as long as a stream moves like that, it gets its end last.

use std::time::{Duration, Instant};

use crate::error::{Error, MemoryError, Result};
use crate::proto::session::RunningSession;
use crate::proto::session::driver::Driver;
use crate::proto::session::stream::StreamEntry;
use crate::proto::session::transmit::closed;
use crate::proto::stream_table::NO_STREAM;

/// How long a reader gets at least for what its event loop has handed to it, of which nothing tells
/// when it was read: data that came over the socket.
const TIME_TO_READ: Duration = Duration::from_millis(100);

/// For how long a peer may be awake before the barrier is left out. It cannot be put in order with
/// the socket while the peer looks at the queue by itself.
const TIME_TO_SLEEP: Duration = Duration::from_millis(200);

/// A close that waits until the peer has taken what was sent before it.
#[derive(Debug)]
pub struct FinalWait<S> {
    limit: Duration,
    stage: Stage<S>,
}

#[derive(Debug)]
enum Stage<S> {
    /// The socket takes what was sent over it.
    Unsent,
    /// The closes of streams are told. The end of a stream whose close is lost looks cut off.
    Closes,
    /// The slices that the peer has are found.
    Collecting { began: Instant, events: i64, next: S, slices: Vec<S> },
    /// They come back.
    Outstanding(Outstanding<S>),
}

/// What a close waits for.
#[derive(Debug)]
struct Outstanding<S> {
    /// How many events there were.
    events: i64,
    /// The slices that the peer had, less those that it has given back since.
    slices: Vec<S>,
    barrier: SocketBarrier,
}

/// Whether data that went over the socket has been handled.
#[derive(Debug, Clone, Copy)]
enum SocketBarrier {
    /// A barrier is to be put into the queue, since this time.
    Due(Instant),
    /// It is the event of this number.
    At(i64),
    /// The peer's readers have until then, if nothing shows before that they have read it.
    Passed(Instant),
    /// Nothing went over the socket of which it is not known that it was read.
    Unneeded,
}

/// How far a [`FinalWait`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinalStep {
    /// The peer has taken everything, or takes it by itself.
    Done,
    /// There is more to look at, once other tasks had their turn.
    Again,
    /// Nothing until the socket has taken what was sent.
    AwaitSocket,
    /// The peer is to be looked at again after a pause. The first pause is for what was
    /// outstanding until now.
    Pause,
}

impl<S> FinalWait<S> {
    /// A close that waits this long at most. The time itself is kept by the driver.
    pub fn new(limit: Duration) -> Self {
        Self { limit, stage: Stage::Unsent }
    }

    fn outstanding(&self) -> Option<&Outstanding<S>> {
        match &self.stage {
            Stage::Outstanding(outstanding) => Some(outstanding),
            _ => None,
        }
    }
}

/// Which streams get their end while a session is drained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DrainPhase {
    /// None yet: this is the first look at what moves.
    Look,
    /// Those that are not in the middle of something.
    Quiet,
    /// All.
    All,
}

impl<D: Driver> RunningSession<D> {
    /// Goes on with a close. What is sent meanwhile is not waited for.
    ///
    /// # Errors
    ///
    /// The session ended; or [`Error::NotTaken`], when it is certain that nothing will show that
    /// the peer has read everything.
    pub fn poll_final(
        &self,
        driver: &D,
        wait: &mut FinalWait<D::SliceId>,
        now: Instant,
    ) -> Result<FinalStep> {
        loop {
            match &mut wait.stage {
                Stage::Unsent => {
                    driver.flush_queue();
                    if driver.unsent_bytes() > 0 {
                        return Ok(FinalStep::AwaitSocket);
                    }
                    if !self.is_waited_for_at_end(driver) {
                        return Ok(FinalStep::Done);
                    }
                    wait.stage = Stage::Closes;
                }
                Stage::Closes => {
                    self.check_end()?;
                    if self.has_deferred_closes() {
                        return Ok(FinalStep::Pause);
                    }
                    let events = driver.events_pushed();
                    let (next, slices) = (D::SliceId::default(), Vec::new());
                    wait.stage = Stage::Collecting { began: now, events, next, slices };
                }
                Stage::Collecting { began, events, next, slices } => {
                    if let Some(more) = driver.find_sent(*next, slices) {
                        *next = more;
                        return Ok(FinalStep::Again);
                    }
                    let barrier = match self.unconfirmed() {
                        0 => SocketBarrier::Unneeded,
                        _ => SocketBarrier::Due(*began),
                    };
                    let (events, slices) = (*events, std::mem::take(slices));
                    wait.stage = Stage::Outstanding(Outstanding { events, slices, barrier });
                }
                Stage::Outstanding(_) => return self.poll_outstanding(driver, wait, now),
            }
        }
    }

    fn poll_outstanding(
        &self,
        driver: &D,
        wait: &mut FinalWait<D::SliceId>,
        now: Instant,
    ) -> Result<FinalStep> {
        self.check_end()?;
        // It may be one of this crate that has mapped only now.
        self.look_for_extension(driver);
        let limit = wait.limit;
        let Stage::Outstanding(outstanding) = &mut wait.stage else { return Ok(FinalStep::Again) };
        if !self.is_waited_for_at_end(driver) {
            return Ok(FinalStep::Done);
        }
        outstanding.slices.retain(|&slice| driver.is_with_peer(slice));
        let is_quiet = self.taken(driver)? >= outstanding.events && outstanding.slices.is_empty();
        if !is_quiet || !self.pass_barrier(driver, limit, &mut outstanding.barrier, now)? {
            return Ok(FinalStep::Pause);
        }
        // What is sent meanwhile is not waited for.
        if !matches!(outstanding.barrier, SocketBarrier::Unneeded) && self.unconfirmed() > 0 {
            return Err(self.not_taken(driver, wait));
        }
        Ok(FinalStep::Done)
    }

    /// Whether the peer could lose what was sent to it if the connection ended now.
    pub fn is_waited_for_at_end(&self, driver: &D) -> bool {
        driver.has_sent() && !self.credit.is_known()
    }

    fn check_end(&self) -> Result<()> {
        self.end_reason().map_or(Ok(()), Err)
    }

    /// How many bytes went over the socket of which nothing shows that they were read.
    fn unconfirmed(&self) -> u64 {
        let streams = self.all_streams();
        let of_open = streams.iter().map(|stream| stream.unconfirmed());
        of_open.fold(self.credit.unconfirmed.get(), u64::saturating_add)
    }

    /// The peer has ended the session. Whether it had taken everything by then, as far as can be
    /// told from this side. `None`: it had if it has no slice of this side any more.
    pub fn has_peer_taken_all(&self, driver: &D) -> Option<bool> {
        // Also those that were not published yet.
        let has_taken_events =
            driver.in_flight().is_ok_and(|(taken, _)| taken == driver.events_pushed());
        let left_in_socket = driver.unsent_bytes() + driver.bytes_in_socket();
        if self.has_deferred_closes() || !has_taken_events || left_in_socket > 0 {
            return Some(false);
        }
        if self.credit.is_known() {
            // What its readers have taken that way has credit.
            return Some(self.credit.socket_unread.get() == 0);
        }
        if self.unconfirmed() > 0 { Some(false) } else { None }
    }

    /// How many events the peer has taken, of all that there were.
    fn taken(&self, driver: &D) -> Result<i64> {
        let taken = self.events_taken(driver)?;
        if driver.is_memory_lost() {
            return Err(self.fail_memory(driver, MemoryError::Lost));
        }
        Ok(taken)
    }

    /// Whether data that went over the socket has been read, or handled and its readers had their
    /// time.
    fn pass_barrier(
        &self,
        driver: &D,
        limit: Duration,
        barrier: &mut SocketBarrier,
        now: Instant,
    ) -> Result<bool> {
        if self.unconfirmed() == 0 {
            return Ok(true);
        }
        match *barrier {
            SocketBarrier::Unneeded => return Ok(true),
            SocketBarrier::Passed(until) => return Ok(now >= until),
            SocketBarrier::Due(_) | SocketBarrier::At(_)
                if driver.unsent_bytes() > 0 || driver.bytes_in_socket() > 0 =>
            {
                return Ok(false);
            }
            SocketBarrier::At(number) if self.taken(driver)? < number => return Ok(false),
            SocketBarrier::At(_) => {}
            SocketBarrier::Due(since) if driver.wakes_through_socket() => {
                if driver.is_peer_asleep() {
                    // The SyncEvent for it goes behind the data, and nothing else wakes the peer.
                    if self.push(driver, closed(NO_STREAM))? {
                        *barrier = SocketBarrier::At(driver.events_pushed());
                        driver.flush_queue();
                    }
                    return Ok(false);
                }
                if now.saturating_duration_since(since) < TIME_TO_SLEEP {
                    return Ok(false);
                }
            }
            SocketBarrier::Due(_) => {}
        }
        // They had as much time as they get, if it went that long ago.
        let sent = self.credit.last_over_socket.get().unwrap_or(now);
        *barrier = SocketBarrier::Passed((now + TIME_TO_READ).max(sent + limit));
        Ok(false)
    }

    /// What is left of a close that has waited for as long as it may.
    #[cold]
    pub fn not_taken(&self, driver: &D, wait: &FinalWait<D::SliceId>) -> Error {
        let left = wait.outstanding();
        let events = driver.in_flight().map_or(0, |(taken, _)| {
            let until = left.map_or_else(|| driver.events_pushed(), |left| left.events);
            u32::try_from(until - taken).unwrap_or_default()
        });
        let slices = left.map_or(0, |left| left.slices.len());
        let socket_bytes = driver.unsent_bytes() + driver.bytes_in_socket();
        let unconfirmed = self.unconfirmed();
        Error::NotTaken { after: wait.limit, events, slices, socket_bytes, unconfirmed }
    }

    /// Looks at the streams, and lets those end whose turn it is. Whether no stream is left.
    pub fn drain_streams(&self, driver: &D, phase: DrainPhase) -> bool {
        let streams = self.all_streams();
        for stream in &streams {
            let is_mid_request = stream.take_mid_request();
            let ends = match phase {
                DrainPhase::Look => false,
                DrainPhase::Quiet => !is_mid_request,
                DrainPhase::All => true,
            };
            if ends && stream.state().can_receive() {
                self.end_reading(driver, stream);
            }
        }
        streams.is_empty()
    }

    fn end_reading(&self, driver: &D, stream: &StreamEntry<D>) {
        stream.state().drain();
        driver.wake_reader(stream);
    }
}
