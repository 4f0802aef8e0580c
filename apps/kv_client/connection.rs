// SPDX-License-Identifier: MIT OR Apache-2.0
//! One connection: its keys, its pipelines, and the requests that are under way on them.
//!
//! Over a socket a connection has one pipeline. Over shared memory it has one to each shard. A single
//! task works on all of them: fill the free slots, write what there is to write, take the answers
//! that are there, and again; it sleeps when none of that goes on. It goes on reading while it
//! cannot write, since the server may do the same.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::counters::{Counters, Latencies, Watch};
use super::failure::Failure;
use super::format::Format;
use super::options::Options;
use super::pipe::Pipe;
use super::pipeline::{Pipeline, PipelineError};
use super::rate::RateSchedule;
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
    pipelines: Vec<Pipeline>,
    work: Work,
    format: Format,
    schedule: Option<RateSchedule>,
    counters: Counters,
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
            pipelines: pipes.into_iter().map(|pipe| Pipeline::new(pipe, options.depth)).collect(),
            format: Format::new(prefix, values),
            schedule: None,
            counters: Counters::new(latencies),
            watch,
            buffer,
        }
    }

    pub(crate) fn number(&self) -> usize {
        self.number
    }

    /// Carries out a plan, at a schedule if one is given, otherwise as fast as the depth allows.
    pub(crate) async fn run(
        &mut self,
        plan: Plan,
        schedule: Option<RateSchedule>,
    ) -> Result<(), Failure> {
        self.work.begin(plan);
        self.schedule = schedule;
        self.counters.now = Instant::now();
        poll_fn(|context| self.poll_run(context)).await
    }

    fn poll_run(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        for _ in 0..ROUNDS {
            self.fill();
            if self.counters.outstanding == 0 && self.work.is_done() {
                return Poll::Ready(Ok(()));
            }
            if self.poll_pipelines(context)? {
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
        if self.schedule.is_some() {
            self.counters.now = Instant::now();
        }
        while self.counters.outstanding < self.depth && !self.work.is_done() {
            let since = match &mut self.schedule {
                None => self.counters.now,
                Some(schedule) => match schedule.take_due(self.counters.now) {
                    Some(due) => due,
                    None => break,
                },
            };
            let request = self.work.next(since);
            self.pipelines[request.pipeline as usize].push(request, &self.format);
            self.counters.outstanding += 1;
        }
        self.watch.outstanding.set(self.counters.outstanding);
    }

    /// Writes and reads on every pipeline that has requests outstanding. Gives whether something moved.
    #[inline]
    fn poll_pipelines(&mut self, context: &mut Context<'_>) -> Result<bool, Failure> {
        let Self { pipelines, format, counters, buffer, .. } = self;
        let outstanding = counters.outstanding;
        let buffer = &mut **buffer.borrow_mut();
        let mut poll = || -> Result<bool, PipelineError> {
            let mut has_moved = false;
            for pipeline in pipelines.iter_mut().filter(|pipeline| !pipeline.is_idle()) {
                has_moved |= pipeline.poll_write(context, format)?;
            }
            for pipeline in pipelines.iter_mut().filter(|pipeline| !pipeline.is_idle()) {
                has_moved |= pipeline.poll_answers(context, buffer, format, counters)?;
            }
            Ok(has_moved)
        };
        poll().map_err(|failure| match failure {
            PipelineError::Answer(failure) => failure,
            PipelineError::Pipe(source) => {
                Failure::Lost { connection: self.number, outstanding, source }
            }
        })
    }

    /// Waits for the next request to become due, if there is a slot that waits for it.
    #[inline]
    fn poll_due(&mut self, context: &mut Context<'_>) -> Poll<()> {
        match &mut self.schedule {
            Some(schedule) if self.counters.outstanding < self.depth && !self.work.is_done() => {
                schedule.poll_due(context)
            }
            _ => Poll::Pending,
        }
    }

    /// What the server says about its processor time.
    pub(crate) async fn server_info(&mut self) -> Result<String, Failure> {
        let Self { pipelines, format, buffer, watch, .. } = self;
        let pipeline = &mut pipelines[0];
        let mut answer = Vec::new();
        pipeline.ask_info();
        watch.outstanding.set(1);
        let text = poll_fn(|context| {
            pipeline.poll_info(context, &mut buffer.borrow_mut(), format, &mut answer)
        })
        .await;
        watch.outstanding.set(0);
        let connection = self.number;
        text.map_err(|source| Failure::Lost { connection, outstanding: 1, source })
    }
}
