// SPDX-License-Identifier: MIT OR Apache-2.0
//! One connection: its keys, its lanes, and the requests that are under way on them.
//!
//! Over a socket a connection has one lane. Over shared memory it has one to each shard. A single
//! task works on all of them: fill the free slots, write what there is to write, take the answers
//! that are there, and again; it sleeps when none of that goes on. It goes on reading while it
//! cannot write, since the server may do the same.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::failure::Failure;
use super::format::Format;
use super::lane::{Lane, LaneFailure};
use super::options::Options;
use super::pace::Pace;
use super::pipe::Pipe;
use super::tally::{Latencies, Tally, Watch};
use super::values::Values;
use super::work::{Plan, Work};

/// How much is read in one go: little enough to stay near the processor until it is verified.
const BUFFER_LEN: usize = 64 << 10;

/// What is read and not yet verified. Nothing stays in it, so all connections of an executor have
/// the same one, which the processor keeps near.
pub(crate) type ReadBuffer = Box<[u8]>;

pub(crate) fn read_buffer() -> Rc<RefCell<ReadBuffer>> {
    Rc::new(RefCell::new(vec![0; BUFFER_LEN].into()))
}

/// How many rounds are made at most before the other tasks of the executor get their turn.
const ROUNDS: u32 = 64;

pub(crate) struct Connection {
    number: usize,
    depth: usize,
    lanes: Vec<Lane>,
    work: Work,
    format: Format,
    pace: Option<Pace>,
    tally: Tally,
    watch: Rc<Watch>,
    buffer: Rc<RefCell<ReadBuffer>>,
}

impl Connection {
    pub(crate) fn new(
        number: usize,
        pipes: Vec<Pipe>,
        options: &Options,
        values: Rc<Values>,
        latencies: Latencies,
        watch: Rc<Watch>,
        buffer: Rc<RefCell<ReadBuffer>>,
    ) -> Self {
        let prefix = number as u32;
        Self {
            number,
            depth: options.depth,
            work: Work::new(prefix, options.keys, pipes.len(), options.reads, options.seed),
            lanes: pipes.into_iter().map(|pipe| Lane::new(pipe, options.depth)).collect(),
            format: Format::new(prefix, values),
            pace: None,
            tally: Tally::new(latencies),
            watch,
            buffer,
        }
    }

    pub(crate) fn number(&self) -> usize {
        self.number
    }

    /// Carries out a plan, at a pace if one is given, otherwise as fast as the depth allows.
    pub(crate) async fn run(&mut self, plan: Plan, pace: Option<Pace>) -> Result<(), Failure> {
        self.work.begin(plan);
        self.pace = pace;
        self.tally.now = Instant::now();
        poll_fn(|context| self.poll_run(context)).await
    }

    fn poll_run(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        for _ in 0..ROUNDS {
            self.fill();
            if self.tally.outstanding == 0 && self.work.is_done() {
                return Poll::Ready(Ok(()));
            }
            if self.poll_lanes(context)? {
                self.watch.moves.set(self.watch.moves.get() + 1);
            } else if self.poll_due(context).is_pending() {
                return Poll::Pending;
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }

    /// Fills the free slots with requests that are due.
    #[inline]
    fn fill(&mut self) {
        if self.pace.is_some() {
            self.tally.now = Instant::now();
        }
        while self.tally.outstanding < self.depth && !self.work.is_done() {
            let since = match &mut self.pace {
                None => self.tally.now,
                Some(pace) => match pace.take_due(self.tally.now) {
                    Some(due) => due,
                    None => break,
                },
            };
            let request = self.work.next(since);
            self.lanes[request.lane as usize].push(request, &self.format);
            self.tally.outstanding += 1;
        }
        self.watch.outstanding.set(self.tally.outstanding);
    }

    /// Writes and reads on every lane that has requests outstanding. Gives whether something moved.
    #[inline]
    fn poll_lanes(&mut self, context: &mut Context<'_>) -> Result<bool, Failure> {
        let Self { lanes, format, tally, buffer, .. } = self;
        let outstanding = tally.outstanding;
        let buffer = &mut **buffer.borrow_mut();
        let mut poll = || -> Result<bool, LaneFailure> {
            let mut has_moved = false;
            for lane in lanes.iter_mut().filter(|lane| !lane.is_idle()) {
                has_moved |= lane.poll_write(context, format)?;
            }
            for lane in lanes.iter_mut().filter(|lane| !lane.is_idle()) {
                has_moved |= lane.poll_answers(context, buffer, format, tally)?;
            }
            Ok(has_moved)
        };
        poll().map_err(|failure| match failure {
            LaneFailure::Answer(failure) => failure,
            LaneFailure::Pipe(source) => {
                Failure::Lost { connection: self.number, outstanding, source }
            }
        })
    }

    /// Waits for the next request to become due, if there is a slot that waits for it.
    #[inline]
    fn poll_due(&mut self, context: &mut Context<'_>) -> Poll<()> {
        match &mut self.pace {
            Some(pace) if self.tally.outstanding < self.depth && !self.work.is_done() => {
                pace.poll_due(context)
            }
            _ => Poll::Pending,
        }
    }

    /// What the server says about its processor time.
    pub(crate) async fn server_info(&mut self) -> Result<String, Failure> {
        let Self { lanes, format, buffer, watch, .. } = self;
        let lane = &mut lanes[0];
        let mut answer = Vec::new();
        lane.ask_info();
        watch.outstanding.set(1);
        let text = poll_fn(|context| {
            lane.poll_info(context, &mut buffer.borrow_mut(), format, &mut answer)
        })
        .await;
        watch.outstanding.set(0);
        let connection = self.number;
        text.map_err(|source| Failure::Lost { connection, outstanding: 1, source })
    }
}
