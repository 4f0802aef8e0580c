// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sending half of a stream.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use futures_lite::AsyncWrite;

use crate::exec::deadline::Deadline;
use crate::session::guard::SessionGuard;
use crate::session::send_wait::{SendWait, WaitsFor};
use crate::session::state::{SessionInner, StreamInner};
use crate::session::stream::loan::{Loan, Message};
use crate::session::stream::send::{AllocFuture, SendFuture};
use shmipc_core::error::{Error, Result};
use shmipc_core::proto::session::fallback::{PoolWait, ReserveGate, ReturnAttempts, ReturnStep};
use shmipc_core::proto::session::path_order::PathBarrier;
use shmipc_core::proto::session::send::SendGate;
use shmipc_core::proto::session::stream::Half;
use shmipc_core::proto::stream_state::DataPath;
use shmipc_core::shm::chain::{Chain, SentChain};

/// The most bytes that one write puts behind one event. The peer reads the first piece while this
/// side writes the second, and its slices come back warm.
const WRITE_AT_MOST: usize = 256 << 10;
/// The most bytes that one FallbackData of a write carries.
const FALLBACK_AT_MOST: usize = 64 << 10;

/// The sending half of a [`Stream`](crate::Stream), as [`split`](crate::Stream::split) gives it.
///
/// Dropping it [finishes](Self::finish) this direction; the other half goes on. When both halves
/// are dropped, the stream is closed.
///
/// ```
/// use futures_lite::AsyncWriteExt;
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-write-half-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(move || async move {
/// # let config = shmipc_glommio::Config::builder().buffer_size(1 << 20).queue_capacity(64);
/// # let config = config.build().unwrap();
/// # let listener = shmipc_glommio::Listener::bind(&path, config.clone())?;
/// # let session = shmipc_glommio::Connector::new(config).connect(&path).await?;
/// # let peer = listener.accept().await?;
/// # let mut stream = session.open_stream()?;
/// let (reader, mut writer) = stream.split();
/// let writing = glommio::spawn_local(async move {
///     writer.write_all(b"hello").await?;
///     writer.finish().await?; // the peer reads the end, and can still answer
///     std::io::Result::Ok(())
/// });
/// # writing.await?;
/// # let mut accepted = peer.accept().await?;
/// # assert_eq!(accepted.recv().await?.unwrap().into_bytes(), "hello");
/// # assert!(accepted.recv().await?.is_none());
/// # std::io::Result::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
pub struct WriteHalf {
    pub(crate) session: Rc<SessionGuard>,
    pub(crate) inner: Rc<StreamInner>,
    pub(crate) fallback_after: PoolWait,
    pub(crate) deadline: Deadline,
    /// How far the stream is on its way to the socket.
    pub(crate) barrier: PathBarrier,
    /// What the present operation waits for in the session.
    pub(crate) waiting: SendWait,
    /// While it uses the socket.
    return_attempts: Option<Box<ReturnAttempts>>,
}

impl WriteHalf {
    pub(crate) fn new(session: Rc<SessionGuard>, inner: Rc<StreamInner>) -> Self {
        Self {
            session,
            inner,
            fallback_after: PoolWait::default(),
            deadline: Deadline::default(),
            barrier: PathBarrier::default(),
            waiting: SendWait::default(),
            return_attempts: None,
        }
    }

    #[inline]
    pub(crate) fn session(&self) -> &Rc<SessionInner> {
        self.session.inner()
    }

    #[inline]
    pub(crate) fn inner(&self) -> &Rc<StreamInner> {
        &self.inner
    }

    /// The stream's number.
    pub fn id(&self) -> u32 {
        self.inner.id()
    }

    /// Whether this stream sends over the socket now, because the pool had no slice for it.
    pub fn is_on_socket(&self) -> bool {
        self.inner.state().path() == DataPath::Socket
    }

    /// Until when writes, allocations and sends wait; `None`, the default, is for ever. One that
    /// would wait beyond it ends with [`Error::DeadlinePassed`], and has sent nothing more.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline.set(deadline);
    }

    /// Borrows shared memory for a message of up to `len` bytes.
    ///
    /// Waits while the pool is empty, up to
    /// [`fallback_after`](crate::ConfigBuilder::fallback_after); then, and while the stream is
    /// [fallen back](Self::is_on_socket), the loan is private memory. A stream that is fallen back
    /// waits a moment for the peer's reader when there are free slices, to come back to shared
    /// memory. Cancel-safe: nothing is taken until it is given, and the next one waits anew.
    ///
    /// # Errors
    ///
    /// The stream is closed, the session over, or the [deadline](Self::set_deadline) has passed.
    #[inline]
    pub fn alloc(&mut self, len: usize) -> AllocFuture<'_> {
        AllocFuture::new(self, len)
    }

    /// Sends what was written into a loan, as one message.
    ///
    /// A loan of any stream of the same session will do. One into which nothing was written is
    /// given back, and nothing is sent. Waits while the send queue is full, and while the peer's
    /// reader is too far behind. Cancel-safe: a send that is dropped before it ends has sent
    /// nothing, and one that has sent something has sent all.
    ///
    /// A loan of private memory goes into shared memory when there are slices by now, and over the
    /// socket otherwise; there, what is longer than
    /// [`max_message_len`](crate::ConfigBuilder::max_message_len) arrives as several messages.
    ///
    /// # Errors
    ///
    /// The stream is closed, the session over, the [deadline](Self::set_deadline) has passed, or
    /// [`Error::ForeignLoan`]. In any case the loan is spent: what is not
    /// sent goes back to the pool.
    #[inline]
    pub fn send(&mut self, loan: Loan) -> SendFuture<'_> {
        SendFuture::new(self, loan.chain)
    }

    /// Passes a message on that was received on this stream or another one of the same session,
    /// without a copy: what of it is unread, as one message. For the rest as [`send`](Self::send).
    #[inline]
    pub fn forward(&mut self, message: Message) -> SendFuture<'_> {
        SendFuture::new(self, message.chain)
    }

    /// Ends this direction: the peer reads the end after all that was sent. The other direction
    /// goes on. Waits until what was written has left this process.
    ///
    /// A peer that is not of this crate does not know the end of one direction. It is told when the
    /// stream is closed. Cancel-safe: the direction is ended at the first poll.
    ///
    /// # Errors
    ///
    /// The session ended before everything had left.
    pub async fn finish(&mut self) -> Result<()> {
        self.finish_now();
        self.session.inner().flushed().await
    }

    /// Closes the whole stream as a failure: see [`Stream::reset`](crate::Stream::reset).
    pub fn reset(&mut self) {
        let session = self.session.inner();
        session.proto.reset_stream(session, &self.inner);
        session.flush_queue();
    }

    /// Waits until what is sent would reach no reader any more, and says why: the peer has closed
    /// or reset the stream, the session is over, or this side has closed the stream. A peer that
    /// has only finished its own direction still reads. Cancel-safe.
    ///
    /// For those that have nothing to send, or wait for something else to send: a server that works
    /// on an answer for a client that may have gone.
    ///
    /// ```
    /// use futures_lite::AsyncWriteExt;
    /// use shmipc_glommio::Error;
    ///
    /// # let path = std::env::temp_dir().join(format!("shmipc-doc-closed-{}", std::process::id()));
    /// # glommio::LocalExecutorBuilder::default().spawn(move || async move {
    /// # let config = shmipc_glommio::Config::builder().buffer_size(1 << 20).queue_capacity(64);
    /// # let config = config.build().unwrap();
    /// # let listener = shmipc_glommio::Listener::bind(&path, config.clone())?;
    /// # let session = shmipc_glommio::Connector::new(config).connect(&path).await?;
    /// # let peer = listener.accept().await?;
    /// let mut asking = session.open_stream()?;
    /// asking.write_all(b"how long will it take?").await?;
    /// let (_, mut answering) = peer.accept().await?.split();
    /// drop(asking); // who asked has no time
    /// assert!(matches!(answering.closed().await, Error::StreamClosedByPeer));
    /// # std::io::Result::Ok(()) }).unwrap().join().unwrap().unwrap();
    /// ```
    pub async fn closed(&mut self) -> Error {
        poll_fn(|context| self.poll_closed(context)).await
    }

    fn poll_closed(&mut self, context: &Context<'_>) -> Poll<Error> {
        if let Some(error) = self.session().proto.write_end(&self.inner) {
            return Poll::Ready(error);
        }
        self.inner.tasks.writer.register(context);
        Poll::Pending
    }

    fn finish_now(&self) {
        let session = self.session.inner();
        session.proto.half_close_stream(session, &self.inner);
        session.flush_queue();
    }

    /// The present operation is over, or given up.
    #[inline]
    pub(crate) fn end_wait(&mut self) {
        if self.waiting.is_present() {
            self.waiting.end(self.session.inner());
            // The next one that needs memory waits anew.
            self.fallback_after.end();
        }
    }

    /// Tells the peer of a stream on which nothing was sent: see
    /// [`Stream::announce`](crate::Stream::announce).
    pub(crate) fn poll_announce(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        let session = self.session.inner();
        session.proto.check_open(&self.inner)?;
        if self.inner.is_known_to_peer() || !session.peer_knows_extension() {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_room(context))?;
        let session = self.session.inner();
        // A slice without bytes. The peer gives it back as soon as it comes, not when it is read,
        // so no credit will be given for it and none is asked for.
        let written = session.memory.pool.write_message(&[], 0);
        if let Some(sent) = written.map_err(|error| session.fail_memory(error))? {
            return Poll::Ready(self.send_written(&SentChain { occupies: 0, ..sent }));
        }
        // Over the socket it would say nothing to the peer, so it waits for as long as it takes.
        self.waiting.begin(session, WaitsFor::Memory(None), context);
        self.poll_deadline(context)
    }

    /// Waits, but not beyond the deadline.
    pub(crate) fn poll_deadline<T>(&mut self, context: &mut Context<'_>) -> Poll<Result<T>> {
        self.deadline.poll(context).map(|()| Err(Error::DeadlinePassed))
    }

    /// Which way data goes now, if it may.
    #[inline]
    pub(crate) fn poll_path(&mut self, context: &mut Context<'_>) -> Poll<Result<DataPath>> {
        match self.session().proto.send_path(&self.inner)? {
            DataPath::SharedMemory => Poll::Ready(Ok(DataPath::SharedMemory)),
            DataPath::Socket => self.poll_return(context),
        }
    }

    #[cold]
    fn poll_return(&mut self, context: &mut Context<'_>) -> Poll<Result<DataPath>> {
        let session = self.session.inner();
        let attempts = self.return_attempts.get_or_insert_default();
        match session.proto.try_return(session, &self.inner, attempts, Instant::now()) {
            ReturnStep::ToMemory => {
                self.return_attempts = None;
                Poll::Ready(Ok(DataPath::SharedMemory))
            }
            ReturnStep::StayOnSocket => Poll::Ready(Ok(DataPath::Socket)),
            ReturnStep::Wait(until) => {
                self.inner.tasks.writer.register(context);
                self.waiting.begin(session, WaitsFor::Return(until), context);
                // The credit comes by the queue.
                session.activate();
                self.poll_deadline(context)
            }
        }
    }

    #[inline]
    pub(crate) fn poll_alloc(
        &mut self,
        context: &mut Context<'_>,
        len: usize,
    ) -> Poll<Result<Loan>> {
        if ready!(self.poll_path(context))? == DataPath::SharedMemory {
            let session = self.session.inner();
            // Before any slice is taken: only an active session comes to rest again and gives back.
            session.activate();
            let pool = &session.memory.pool;
            if !pool.is_short() || self.may_use_reserve(context, len) {
                let allocated = pool.allocate(len, false);
                if let Some(chain) = allocated.map_err(|error| session.fail_memory(error))? {
                    return Poll::Ready(Ok(Loan { chain }));
                }
            }
            ready!(self.poll_pool(context))?;
        }
        let pool = Rc::clone(&self.session().memory.pool);
        Poll::Ready(Ok(Loan { chain: Chain::private(pool, len) }))
    }

    /// Little memory is free. Whether a message may have of it.
    #[cold]
    pub(crate) fn may_use_reserve(&self, context: &Context<'_>, len: usize) -> bool {
        let session = self.session();
        match session.proto.reserve_gate(session, &self.inner, len) {
            ReserveGate::Open => true,
            ReserveGate::TooLong => false,
            ReserveGate::AwaitReader => {
                self.inner.tasks.writer.register(context);
                false
            }
        }
    }

    /// Sends a chain if nothing has to be waited for; otherwise gives it back.
    #[inline]
    pub(crate) fn send_now(&mut self, chain: Chain) -> Result<Option<Chain>> {
        let session = self.session();
        let gate = session.proto.send_gate(&**session, &self.inner)?;
        if chain.is_empty() {
            return Ok(None);
        }
        if !chain.is_of(&session.memory.pool) {
            return Err(Error::ForeignLoan);
        }
        let SendGate::Open(slot) = gate else { return Ok(Some(chain)) };
        if !chain.is_shared() {
            return Ok(Some(chain));
        }
        if let Some(sent) = chain.into_sent() {
            session.proto.send_slices(&**session, &self.inner, slot, &sent);
        }
        Ok(None)
    }

    /// Waits until there is room for an event of this stream.
    pub(crate) fn poll_room(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        let session = self.session.inner();
        session.proto.check_open(&self.inner)?;
        session.activate();
        match session.proto.queue_gate(session, &self.inner)? {
            SendGate::Open(_) | SendGate::OnSocket => return Poll::Ready(Ok(())),
            SendGate::Window => {
                if self.inner.tasks.writer.register(context) {
                    session.counters.window_full.add(1);
                }
            }
            SendGate::Queue => {
                session.counters.queue_full.add(1);
                self.waiting.begin(session, WaitsFor::Room, context);
            }
        }
        self.poll_deadline(context)
    }

    /// Sends the event that hands slices to the peer. There was room for it a moment ago.
    #[inline]
    fn send_written(&self, sent: &SentChain) -> Result<()> {
        let session = self.session();
        session.proto.send_written(&**session, &self.inner, sent)
    }

    #[inline]
    fn poll_write_once(
        &mut self,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = self.poll_write_parts(context, parts);
        if written.is_ready() {
            self.end_wait();
        }
        written.map_err(io::Error::from)
    }

    /// Writes what these parts are together, or the first of it.
    #[inline]
    fn poll_write_parts(
        &mut self,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        // Fits: they are in memory at the same time, or the same several times over.
        let len = parts.iter().fold(0, |len: usize, part| len.saturating_add(part.len()));
        if len == 0 {
            return Poll::Ready(self.session().proto.check_open(&self.inner).map(|()| 0));
        }
        if ready!(self.poll_path(context))? == DataPath::SharedMemory
            && let Some(count) = ready!(self.poll_send_slices(context, parts, len))?
        {
            return Poll::Ready(Ok(count));
        }
        // One part at a time: the socket takes its time anyway.
        let first = parts.iter().find(|part| !part.is_empty());
        self.poll_send_fallback(context, first.map_or(&[], |part| part), FALLBACK_AT_MOST)
    }

    /// Sends through shared memory. `None`: there are no slices, and will not be in time.
    #[inline]
    fn poll_send_slices(
        &mut self,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
        len: usize,
    ) -> Poll<Result<Option<usize>>> {
        ready!(self.poll_room(context))?;
        let session = self.session();
        let pool = &session.memory.pool;
        let mut len = len.min(WRITE_AT_MOST);
        if pool.is_short() && session.proto.is_extension_known() {
            len = len.min(pool.smallest_slice());
            if !self.may_use_reserve(context, len) {
                return self.poll_pool(context).map_ok(|()| None);
            }
        }
        let written = pool.write_message(parts, len);
        let Some(sent) = written.map_err(|error| session.fail_memory(error))? else {
            return self.poll_pool(context).map_ok(|()| None);
        };
        self.fallback_after.end();
        self.send_written(&sent)?;
        Poll::Ready(Ok(Some(sent.len)))
    }
}

impl Drop for WriteHalf {
    fn drop(&mut self) {
        self.end_wait();
        self.session().drop_half(&self.inner, Half::Write);
    }
}

/// Writes are sent at once: each goes into free slices and one event, and takes at most 256 KiB or
/// what the pool has. Many small writes are better collected first, as with a socket; a vectored
/// write collects its parts in the slices themselves.
///
/// Waits while the send queue is full, and while the peer's reader is too far behind. While the
/// pool is empty, waits for [`fallback_after`](crate::ConfigBuilder::fallback_after), and then goes
/// over the socket.
///
/// # Errors
///
/// `BrokenPipe` when the peer has closed the stream, `ConnectionReset` when it has
/// [reset](crate::Stream::reset) it, `NotConnected` when this side has closed it, `TimedOut`
/// when the deadline has passed, otherwise the end of the session. Cancel-safe: a write that is
/// dropped has sent nothing, or returned.
impl AsyncWrite for WriteHalf {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_write_once(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_write_once(context, parts)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let session = this.session.inner();
        session.flush_queue();
        session.poll_flushed(&mut this.waiting, context).map_err(io::Error::from)
    }

    /// Ends this direction, like [`WriteHalf::finish`].
    fn poll_close(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.finish_now();
        let session = this.session.inner();
        session.poll_flushed(&mut this.waiting, context).map_err(io::Error::from)
    }
}

impl std::fmt::Debug for WriteHalf {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("WriteHalf")
            .field("id", &self.id())
            .field("is_on_socket", &self.is_on_socket())
            .finish_non_exhaustive()
    }
}
