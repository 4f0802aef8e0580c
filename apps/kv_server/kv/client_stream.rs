// SPDX-License-Identifier: MIT OR Apache-2.0
//! The bytes of one client, both ways: what has come and is not used up, and replies that it has
//! not taken yet.
//!
//! A client may write any number of commands before it reads the first reply. A server that waits
//! until a reply is taken, and reads nothing meanwhile, would wait for that client for ever. So
//! whenever a reply cannot be written, reading goes on:
//!
//! - up to [`READ_AHEAD`] bytes of commands, which are not executed yet. That is all that clients
//!   need which read while they write, and the replies stay where they are.
//! - When there are more, the client is still writing. The replies are put aside, and its commands
//!   are executed.
//! - When what is put aside reaches its limit ([`OutputLimits`]), nothing more is taken until the
//!   client takes something. If it takes nothing, it is told so behind the replies that it has
//!   coming, and the connection ends.
//!
//! Over shared memory it is the same: there the library lets a writer go on until the reader is as
//! far behind as its window allows.

use std::cell::Cell;
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_lite::future::or;
use futures_lite::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use glommio::timer::Timer;

use super::input::Input;
use super::reply::Replies;

/// How many bytes of commands are read while replies cannot be written, before replies are put
/// aside.
const READ_AHEAD: usize = 64 << 10;
/// What is put aside is kept in pieces of so many bytes.
const CHUNK: usize = 64 << 10;
/// How long a client may take to read anything of what it asked for, before it is given up.
const PATIENCE: Duration = Duration::from_secs(60);
/// The same, once it has come to its limit and goes on writing.
const PATIENCE_AT_LIMIT: Duration = Duration::from_secs(5);
/// And once it has been given up.
const PATIENCE_AT_END: Duration = Duration::from_secs(10);
/// How often that is looked at.
const CHECK: Duration = Duration::from_secs(1);
/// How long, and how much, a client may go on writing behind what it was hung up for. Its last
/// reply would be lost if the socket were closed on unread bytes.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 1 << 20;

/// What a client is told that has come to its limit, behind all replies that it has coming.
const LIMIT_REACHED: &[u8] = b"-ERR output buffer limit reached: read replies while commands \
    are written, or start with a larger --max-output\r\n";

/// How many bytes of replies are put aside at most, by the clients of one shard.
#[derive(Debug)]
pub(crate) struct OutputLimits {
    /// For one client.
    each: usize,
    /// For all of them together.
    all: usize,
    held: Cell<usize>,
}

impl OutputLimits {
    pub(crate) fn new(each: usize, all: usize) -> Self {
        Self { each, all, held: Cell::new(0) }
    }

    /// The memory that is held now.
    pub(crate) fn held(&self) -> usize {
        self.held.get()
    }
}

/// Where replies go.
pub(crate) trait ReplySink {
    /// Sends replies, or puts them aside, and forgets them but for memory of so many bytes.
    async fn send(&mut self, replies: &mut Replies, kept: usize) -> io::Result<()>;
}

/// The stream of one client.
pub(crate) struct ClientStream<S> {
    stream: S,
    pub(crate) input: Input,
    backlog: Backlog,
    /// Another shard of this process takes replies as fast as its own client does. It is not given
    /// up: that client is.
    is_patient: bool,
    /// Nothing more will come.
    has_ended: bool,
}

/// What became of replies.
enum Sent {
    Whole,
    /// They are put aside, or what is left of them.
    PutAside,
    /// The client is at its limit and takes nothing.
    Stalled,
}

impl<S: AsyncRead + AsyncWrite + Unpin> ClientStream<S> {
    pub(crate) fn new(stream: S, limits: &Rc<OutputLimits>, is_patient: bool) -> Self {
        Self {
            stream,
            input: Input::default(),
            backlog: Backlog::new(Rc::clone(limits)),
            is_patient,
            has_ended: false,
        }
    }

    /// Reads what is there, or waits until something is, and writes what was put aside meanwhile.
    /// What is unread now will have `expected_len` bytes before it can be used. Zero is the end,
    /// and then nothing is left to be written.
    pub(crate) async fn fill(&mut self, expected_len: usize) -> io::Result<usize> {
        if self.backlog.is_empty() && !self.has_ended {
            return self.input.fill(&mut self.stream, expected_len).await;
        }
        let mut stall = Stall::default();
        poll_fn(|context| self.poll_fill(context, expected_len, &mut stall)).await
    }

    fn poll_fill(
        &mut self,
        context: &mut Context<'_>,
        expected_len: usize,
        stall: &mut Stall,
    ) -> Poll<io::Result<usize>> {
        let is_written = self.poll_write(context, &mut &mut [][..], stall)?.is_ready();
        if !self.has_ended {
            match self.input.poll_fill(&mut self.stream, context, expected_len)? {
                Poll::Ready(0) => self.has_ended = true,
                Poll::Ready(count) => return Poll::Ready(Ok(count)),
                Poll::Pending => {}
            }
        }
        if is_written {
            return if self.has_ended { Poll::Ready(Ok(0)) } else { Poll::Pending };
        }
        ready!(stall.poll(context, (!self.is_patient).then_some(PATIENCE)));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    /// Writes what was put aside, and then these parts. Ready when nothing is left.
    fn poll_write(
        &mut self,
        context: &mut Context<'_>,
        left: &mut &mut [IoSlice<'_>],
        stall: &mut Stall,
    ) -> Poll<io::Result<()>> {
        loop {
            let front = self.backlog.front();
            let written = match (front.is_empty(), left.is_empty()) {
                (true, true) => return Poll::Ready(Ok(())),
                (true, false) => {
                    ready!(Pin::new(&mut self.stream).poll_write_vectored(context, left))?
                }
                (false, _) => ready!(Pin::new(&mut self.stream).poll_write(context, front))?,
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            stall.note_progress();
            match self.backlog.is_empty() {
                true => IoSlice::advance_slices(left, written),
                false => self.backlog.advance(written),
            }
        }
    }

    fn poll_send(
        &mut self,
        context: &mut Context<'_>,
        left: &mut &mut [IoSlice<'_>],
        stall: &mut Stall,
    ) -> Poll<io::Result<Sent>> {
        if self.poll_write(context, left, stall)?.is_ready() {
            return Poll::Ready(Ok(Sent::Whole));
        }
        while !self.has_ended && self.input.unread().len() < READ_AHEAD {
            match self.input.poll_fill(&mut self.stream, context, 0)? {
                Poll::Ready(0) => self.has_ended = true,
                Poll::Ready(_) => {}
                Poll::Pending => break,
            }
        }
        let is_far_ahead = self.input.unread().len() >= READ_AHEAD;
        let rest = left.iter().map(|part| part.len()).sum();
        if is_far_ahead && self.backlog.has_room(rest) {
            left.iter().for_each(|part| self.backlog.push(part));
            return Poll::Ready(Ok(Sent::PutAside));
        }
        let is_at_limit = is_far_ahead && !self.backlog.has_room_for_one(rest);
        let patience = if is_at_limit { PATIENCE_AT_LIMIT } else { PATIENCE };
        ready!(stall.poll(context, (!self.is_patient).then_some(patience)));
        match is_at_limit {
            true => Poll::Ready(Ok(Sent::Stalled)),
            false => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
        }
    }

    /// Writes all that is left, and throws away what comes meanwhile.
    async fn write_out(&mut self, left: &mut &mut [IoSlice<'_>]) -> io::Result<()> {
        let mut stall = Stall::default();
        let mut nowhere = [0; 4096];
        poll_fn(|context| {
            if self.poll_write(context, left, &mut stall)?.is_ready() {
                return Poll::Ready(Ok(()));
            }
            while !self.has_ended {
                match Pin::new(&mut self.stream).poll_read(context, &mut nowhere)? {
                    Poll::Ready(0) => self.has_ended = true,
                    Poll::Ready(_) => {}
                    Poll::Pending => break,
                }
            }
            ready!(stall.poll(context, Some(PATIENCE_AT_END)));
            Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
        })
        .await
    }

    /// Ends the connection so that the client gets its last reply.
    pub(crate) async fn hang_up(mut self) -> io::Result<()> {
        self.write_out(&mut &mut [][..]).await?;
        let mut stream = self.stream;
        stream.close().await?;
        let drain = async {
            let (mut buffer, mut left) = ([0; 4096], LINGER_BYTES);
            while left > 0 {
                match stream.read(&mut buffer).await? {
                    0 => break,
                    count => left = left.saturating_sub(count),
                }
            }
            Ok(())
        };
        let enough = async {
            glommio::timer::sleep(LINGER).await;
            Ok(())
        };
        or(drain, enough).await
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> ReplySink for ClientStream<S> {
    /// # Errors
    ///
    /// `QuotaExceeded`: the client has come to its limit, and has been told. `TimedOut`: it takes
    /// nothing.
    async fn send(&mut self, replies: &mut Replies, kept: usize) -> io::Result<()> {
        let mut parts = replies.parts();
        let mut left = &mut parts[..];
        // Empty parts go with those before them.
        IoSlice::advance_slices(&mut left, 0);
        let mut stall = Stall::default();
        let sent = poll_fn(|context| self.poll_send(context, &mut left, &mut stall)).await?;
        if matches!(sent, Sent::Stalled) {
            self.write_out(&mut left).await?;
            self.write_out(&mut &mut [IoSlice::new(LIMIT_REACHED)][..]).await?;
            let text = "it asked for more than it took, up to the limit of replies kept for it";
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, text));
        }
        drop(parts);
        replies.clear(kept);
        Ok(())
    }
}

/// How long nothing has been taken. Costs nothing until something had to wait.
#[derive(Default)]
struct Stall {
    waiting: Option<(Instant, Timer)>,
}

impl Stall {
    fn note_progress(&mut self) {
        if let Some((since, _)) = &mut self.waiting {
            *since = Instant::now();
        }
    }

    /// Ready when nothing has been taken for so long.
    fn poll(&mut self, context: &mut Context<'_>, patience: Option<Duration>) -> Poll<()> {
        let Some(patience) = patience else {
            return Poll::Pending;
        };
        loop {
            let start = || (Instant::now(), Timer::new(CHECK));
            let (since, timer) = self.waiting.get_or_insert_with(start);
            ready!(Pin::new(&mut *timer).poll(context));
            if since.elapsed() >= patience {
                return Poll::Ready(());
            }
            *timer = Timer::new(CHECK);
        }
    }
}

/// Replies that are put aside.
struct Backlog {
    chunks: VecDeque<Vec<u8>>,
    /// How much of the first chunk has been written.
    written: usize,
    limits: Rc<OutputLimits>,
}

impl Backlog {
    fn new(limits: Rc<OutputLimits>) -> Self {
        Self { chunks: VecDeque::new(), written: 0, limits }
    }

    fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// What is written next; empty when there is nothing.
    fn front(&self) -> &[u8] {
        self.chunks.front().map_or(&[], |chunk| &chunk[self.written..])
    }

    fn held_with(&self, more: usize) -> usize {
        self.chunks.len() * CHUNK + more.next_multiple_of(CHUNK)
    }

    /// Whether so much more is within the limit for one client.
    fn has_room_for_one(&self, more: usize) -> bool {
        self.held_with(more) <= self.limits.each
    }

    fn has_room(&self, more: usize) -> bool {
        let all = self.limits.held.get() + more.next_multiple_of(CHUNK);
        self.has_room_for_one(more) && all <= self.limits.all
    }

    fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = self.chunks.back().map_or(0, |last| CHUNK - last.len());
            if room == 0 {
                self.chunks.push_back(Vec::with_capacity(CHUNK));
                self.limits.held.set(self.limits.held.get() + CHUNK);
                continue;
            }
            let (fits, rest) = bytes.split_at(room.min(bytes.len()));
            self.chunks.back_mut().expect("one with room").extend_from_slice(fits);
            bytes = rest;
        }
    }

    /// So many bytes of the front have been written.
    fn advance(&mut self, count: usize) {
        self.written += count;
        if self.front().is_empty() && self.chunks.pop_front().is_some() {
            self.written = 0;
            self.limits.held.set(self.limits.held.get() - CHUNK);
        }
    }
}

impl Drop for Backlog {
    fn drop(&mut self) {
        self.limits.held.set(self.limits.held.get() - self.chunks.len() * CHUNK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_aside_comes_out_in_order_and_is_counted_as_memory() {
        let limits = Rc::new(OutputLimits::new(4 * CHUNK, 5 * CHUNK));
        let mut backlog = Backlog::new(Rc::clone(&limits));
        let data: Vec<u8> = (0..3 * CHUNK + 100).map(|at| (at / 7) as u8).collect();
        for piece in data.chunks(1000) {
            assert!(backlog.has_room(piece.len()) || backlog.held_with(0) == 4 * CHUNK);
            backlog.push(piece);
        }
        assert_eq!(limits.held(), 4 * CHUNK);
        assert!(!backlog.has_room_for_one(1));
        let other = Backlog::new(Rc::clone(&limits));
        assert!(
            other.has_room(CHUNK)
                && !other.has_room(CHUNK + 1)
                && other.has_room_for_one(2 * CHUNK)
        );
        let mut out = Vec::new();
        while !backlog.is_empty() && out.len() < 2 * CHUNK {
            let count = backlog.front().len().min(777);
            out.extend_from_slice(&backlog.front()[..count]);
            backlog.advance(count);
        }
        assert_eq!(out, data[..out.len()]);
        assert_eq!(limits.held(), 2 * CHUNK);
        drop(backlog);
        assert_eq!(limits.held(), 0);
    }
}
