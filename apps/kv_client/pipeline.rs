// SPDX-License-Identifier: MIT OR Apache-2.0
//! One way to the server, on which answers come in the order of their requests.

use std::collections::VecDeque;
use std::io;
use std::task::{Context, Poll};

use super::counters::Counters;
use super::failure::Failure;
use super::format::{Format, INFO_CPU, info_text};
use super::outgoing::Outgoing;
use super::pipe::{Piece, Pipe};
use super::work::Request;

pub(crate) struct Pipeline {
    pipe: Pipe,
    outgoing: Outgoing,
    outstanding: VecDeque<Request>,
    /// How much of the next answer has come.
    position: usize,
}

impl Pipeline {
    pub(crate) fn new(pipe: Pipe, depth: usize) -> Self {
        Self {
            outgoing: Outgoing::new(pipe.max_copied()),
            pipe,
            outstanding: VecDeque::with_capacity(depth),
            position: 0,
        }
    }

    /// Whether nothing is to be written, and nothing will come.
    #[inline]
    pub(crate) fn is_idle(&self) -> bool {
        self.outstanding.is_empty()
    }

    /// Takes a request, to be written when the pipeline is polled.
    #[inline]
    pub(crate) fn push(&mut self, request: Request, format: &Format) {
        format.write(&request, &mut self.outgoing);
        self.outstanding.push_back(request);
    }

    /// Writes as much as goes. Gives whether something went.
    #[inline]
    pub(crate) fn poll_write(
        &mut self,
        context: &mut Context<'_>,
        format: &Format,
    ) -> io::Result<bool> {
        let mut has_moved = false;
        while !self.outgoing.is_empty() {
            let parts = self.outgoing.parts(format.values());
            match self.pipe.poll_write(context, &parts)? {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(count) => {
                    drop(parts);
                    self.outgoing.advance(count);
                }
                Poll::Pending => break,
            }
            has_moved = true;
        }
        Ok(has_moved)
    }

    /// Reads and verifies what is there. Gives whether something was.
    #[inline]
    pub(crate) fn poll_answers(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut [u8],
        format: &Format,
        counters: &mut Counters,
    ) -> Result<bool, PipelineError> {
        let mut has_moved = false;
        while let Poll::Ready(Piece { len, has_more }) = self.pipe.poll_read(context, buffer)? {
            if len == 0 {
                return Err(closed().into());
            }
            has_moved = true;
            let answered = format.verify(&buffer[..len], &self.outstanding, &mut self.position)?;
            counters.record_answered(self.outstanding.drain(..answered));
            // To look again for what may have come meanwhile can wait until its slot is filled.
            if !has_more {
                break;
            }
        }
        Ok(has_moved)
    }

    /// Begins to ask what the server says about its processor time.
    pub(crate) fn ask_info(&mut self) {
        self.outgoing.put(INFO_CPU);
    }

    /// Waits for that, and collects it in `answer`.
    pub(crate) fn poll_info(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut [u8],
        format: &Format,
        answer: &mut Vec<u8>,
    ) -> Poll<io::Result<String>> {
        self.poll_write(context, format)?;
        while let Poll::Ready(Piece { len, .. }) = self.pipe.poll_read(context, buffer)? {
            if len == 0 {
                return Poll::Ready(Err(closed()));
            }
            answer.extend_from_slice(&buffer[..len]);
            if let Some(text) = info_text(answer) {
                return Poll::Ready(Ok(text));
            }
        }
        Poll::Pending
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection")
}

/// Why a pipeline is of no more use.
pub(crate) enum PipelineError {
    Pipe(io::Error),
    Answer(Failure),
}

impl From<io::Error> for PipelineError {
    fn from(error: io::Error) -> Self {
        Self::Pipe(error)
    }
}

impl From<Failure> for PipelineError {
    fn from(failure: Failure) -> Self {
        Self::Answer(failure)
    }
}
