// SPDX-License-Identifier: MIT OR Apache-2.0
//! A stream's handle: bytes in both directions (WIRE chapter 5).

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use futures_lite::{AsyncBufRead, AsyncRead, AsyncWrite};

use super::loan::{Loan, Message};
use super::session::{SessionGuard, SessionInner};
use super::wakers::WakerSlot;
use crate::error::{Error, Result};
use crate::proto::stream::{OnClose, Path, StreamLife, StreamState};
use crate::shm::chain::{Chain, ChainQueue};
use crate::shm::manager::BufferManager;
use crate::wire::{Event, EventState};

/// The most bytes that one write puts behind one event. The peer reads the first piece while this
/// side writes the second, and its slices come back warm.
const WRITE_AT_MOST: usize = 256 << 10;
/// The most bytes that one FallbackData carries.
const FALLBACK_AT_MOST: usize = 64 << 10;
/// How much [`AsyncBufRead`] copies out of shared memory at a time.
const LENT_AT_MOST: usize = 16 << 10;

/// What a stream's handle and its session share.
pub(super) struct StreamInner {
    id: u32,
    life: Cell<StreamLife>,
    inbound: RefCell<ChainQueue>,
    reader: WakerSlot,
    /// Whether the peer has heard of the stream, and so must hear of its end.
    is_known_to_peer: Cell<bool>,
}

impl StreamInner {
    pub(super) fn new(id: u32, manager: &Rc<BufferManager>) -> Self {
        Self {
            id,
            life: Cell::new(StreamLife::new()),
            inbound: RefCell::new(ChainQueue::new(manager)),
            reader: WakerSlot::default(),
            is_known_to_peer: Cell::new(false),
        }
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    pub(super) fn is_known_to_peer(&self) -> bool {
        self.is_known_to_peer.get()
    }

    pub(super) fn note_known_to_peer(&self) {
        self.is_known_to_peer.set(true);
    }

    #[inline]
    pub(super) fn receive(&self, data: Chain) {
        self.note_known_to_peer();
        self.inbound.borrow_mut().push(data);
    }

    pub(super) fn peer_closed(&self) {
        self.change_life(StreamLife::peer_closed);
    }

    /// Whether a reader has something to do: data, or an end.
    #[inline]
    pub(super) fn has_news(&self) -> bool {
        !self.inbound.borrow().is_empty() || self.life.get().state() != StreamState::Open
    }

    pub(super) fn close(&self) -> OnClose {
        self.change_life(StreamLife::close)
    }

    /// Wakes the task that waits for data, if one does. Whether one did.
    #[inline]
    pub(super) fn wake(&self) -> bool {
        self.reader.wake()
    }

    /// Throws away what was not read. Gives how much of it had come over the socket.
    pub(super) fn discard(&self) -> usize {
        let mut inbound = self.inbound.borrow_mut();
        let socket_len = inbound.socket_len();
        inbound.clear();
        socket_len
    }

    fn change_life<T>(&self, change: impl FnOnce(&mut StreamLife) -> T) -> T {
        let mut life = self.life.get();
        let result = change(&mut life);
        self.life.set(life);
        result
    }
}

/// A stream of bytes to and from the peer.
///
/// Reading and writing copy, as with a socket, through [`AsyncRead`], [`AsyncBufRead`] and
/// [`AsyncWrite`]. A write is on its way when it returns; [`flush`] waits only for data that had
/// to go over the socket. Dropping a stream closes it, gives all its memory back, and loses
/// nothing that was written.
///
/// A stream is closed as a whole (the protocol has no half-close that all peers know): after
/// [`close`](Self::close) nothing more can be read, and a peer that has closed reads nothing more.
/// What a peer sent before it closed is read first, then comes the end.
///
/// [`flush`]: futures_lite::AsyncWriteExt::flush
pub struct Stream {
    session: Rc<SessionGuard>,
    inner: Rc<StreamInner>,
    /// What [`AsyncBufRead`] shows: a private copy, since the peer could change shared memory
    /// under a reference.
    lent: Lent,
    /// Until when this write waits for free slices.
    pool_deadline: Option<Instant>,
}

#[derive(Default)]
struct Lent {
    bytes: Vec<u8>,
    read: usize,
}

impl Lent {
    fn rest(&self) -> &[u8] {
        &self.bytes[self.read..]
    }
}

impl Stream {
    pub(super) fn new(session: Rc<SessionGuard>, inner: Rc<StreamInner>) -> Self {
        Self { session, inner, lent: Lent::default(), pool_deadline: None }
    }

    /// The stream's number, which the client chose. Both sides know it by this number.
    pub fn id(&self) -> u32 {
        self.inner.id
    }

    /// How many bytes have arrived and wait to be read.
    pub fn unread(&self) -> usize {
        self.lent.rest().len() + self.inner.inbound.borrow().len()
    }

    /// Whether the peer has closed the stream. What it sent before may still wait to be read.
    pub fn is_closed_by_peer(&self) -> bool {
        self.inner.life.get().state() == StreamState::ClosedByPeer
    }

    /// Whether this stream sends over the socket, because the pool once had no slice for it.
    pub fn is_fallen_back(&self) -> bool {
        self.inner.life.get().path() == Path::Socket
    }

    /// Closes the stream and waits until what was written has left this process.
    ///
    /// Not needed for anything but the wait: dropping the stream closes it too. Unread data is
    /// thrown away. Cancel-safe: the stream is closed at the first poll.
    ///
    /// # Errors
    ///
    /// The session ended before everything had left.
    pub async fn close(&mut self) -> Result<()> {
        self.close_now();
        let session = self.session.inner();
        poll_fn(|context| session.poll_flushed(context)).await
    }

    fn close_now(&mut self) {
        let session = self.session.inner();
        session.close_stream(&self.inner);
        session.flush_queue();
        self.lent = Lent::default();
    }

    /// Whether there is something to read: `Ok(true)` yes, `Ok(false)` never again.
    fn poll_readable(&self, context: &Context<'_>) -> Poll<Result<bool>> {
        if self.inner.inbound.borrow().is_empty() {
            let chain = ready!(self.poll_next(context))?;
            let Some(chain) = chain else { return Poll::Ready(Ok(false)) };
            self.inner.inbound.borrow_mut().push_front(chain);
        }
        Poll::Ready(Ok(true))
    }

    /// The next flush of the peer; `None` is the end.
    #[inline]
    fn poll_next(&self, context: &Context<'_>) -> Poll<Result<Option<Chain>>> {
        let (session, inner) = (self.session(), &*self.inner);
        let mut chain = inner.inbound.borrow_mut().pop();
        if chain.is_none() && inner.life.get().state() == StreamState::Open && !session.is_over() {
            chain = session.wait_in_place(inner).or_else(|| inner.inbound.borrow_mut().pop());
        }
        match chain {
            Some(chain) => Poll::Ready(Ok(Some(chain))),
            None => self.poll_end(context),
        }
    }

    /// Nothing has arrived: for ever, or until now?
    fn poll_end(&self, context: &Context<'_>) -> Poll<Result<Option<Chain>>> {
        let (session, inner) = (self.session(), &*self.inner);
        match inner.life.get().state() {
            StreamState::ClosedByPeer => return Poll::Ready(Ok(None)),
            StreamState::ClosedHere => return Poll::Ready(Err(Error::StreamClosed)),
            StreamState::Open => {}
        }
        if session.is_over() {
            return Poll::Ready(Err(session.end_error()));
        }
        if inner.reader.register(context) {
            let waiting = &session.activity.waiting_readers;
            waiting.set(waiting.get() + 1);
        }
        Poll::Pending
    }

    fn read_inbound(&self, to: &mut [u8]) -> usize {
        let mut inbound = self.inner.inbound.borrow_mut();
        let before = inbound.socket_len();
        let count = inbound.read(to);
        let from_socket = before - inbound.socket_len();
        drop(inbound);
        self.session.inner().note_unread(from_socket);
        count
    }

    /// Whether this stream may send.
    #[inline]
    fn check_open(&self) -> Result<()> {
        match self.inner.life.get().state() {
            StreamState::Open => {}
            StreamState::ClosedByPeer => return Err(Error::StreamClosedByPeer),
            StreamState::ClosedHere => return Err(Error::StreamClosed),
        }
        let session = self.session.inner();
        if session.is_over() { Err(session.end_error()) } else { Ok(()) }
    }

    /// Borrows shared memory for a message of up to `len` bytes.
    ///
    /// Waits while the pool is empty, up to [`pool_wait`](crate::ConfigBuilder::pool_wait); then,
    /// and on a stream that has [fallen back](Self::is_fallen_back), the loan is private memory.
    /// Cancel-safe: nothing is taken until it is given.
    ///
    /// # Errors
    ///
    /// The stream is closed, or the session over.
    #[inline]
    pub async fn alloc(&mut self, len: usize) -> Result<Loan> {
        poll_fn(|context| self.poll_alloc(context, len)).await
    }

    #[inline]
    fn poll_alloc(&mut self, context: &Context<'_>, len: usize) -> Poll<Result<Loan>> {
        self.check_open()?;
        let session = self.session.inner();
        if self.inner.life.get().path() == Path::SharedMemory {
            // Before any slice is taken: only an active session comes to rest again and gives back.
            session.activate();
            let allocated = session.lanes.manager.allocate(len, false);
            if let Some(chain) = allocated.map_err(|error| session.broken(error))? {
                self.pool_deadline = None;
                return Poll::Ready(Ok(Loan { chain }));
            }
            ready!(self.poll_pool(context))?;
        }
        let manager = Rc::clone(&self.session().lanes.manager);
        Poll::Ready(Ok(Loan { chain: Chain::private(manager, len) }))
    }

    /// Sends what was written into a loan, as one flush.
    ///
    /// A loan of any stream of the same session will do. One into which nothing was written is
    /// given back, and nothing is sent. Waits while the send queue is full. Cancel-safe: a send
    /// that is dropped before it ends has sent nothing, and gives the loan back.
    ///
    /// # Errors
    ///
    /// The stream is closed, the session over, or [`Error::ForeignLoan`]. The loan is given back.
    #[inline]
    pub async fn send(&mut self, loan: Loan) -> Result<()> {
        match self.send_now(loan.chain)? {
            None => Ok(()),
            Some(chain) => self.send_later(chain).await,
        }
    }

    /// Sends a chain if nothing has to be waited for; otherwise gives it back.
    #[inline]
    fn send_now(&mut self, chain: Chain) -> Result<Option<Chain>> {
        self.check_open()?;
        let count = chain.len();
        if count == 0 {
            return Ok(None);
        }
        if !chain.is_of(&self.session().lanes.manager) {
            return Err(Error::ForeignLoan);
        }
        let is_shared = chain.is_shared() && self.inner.life.get().path() == Path::SharedMemory;
        if !is_shared || self.is_queue_full()? {
            return Ok(Some(chain));
        }
        if let Some(offset) = chain.into_event_offset() {
            self.send_offset(offset, count)?;
        }
        Ok(None)
    }

    async fn send_later(&mut self, mut chain: Chain) -> Result<()> {
        loop {
            if !chain.is_shared() || self.inner.life.get().path() == Path::Socket {
                // Also when the stream fell back after the loan was made: in order, it can only
                // follow that way.
                self.inner.change_life(StreamLife::fall_back);
                return self.send_private(&chain.into_bytes()).await;
            }
            poll_fn(|context| self.poll_queue(context)).await?;
            match self.send_now(chain)? {
                None => return Ok(()),
                Some(left) => chain = left,
            }
        }
    }

    async fn send_private(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let sent = poll_fn(|context| {
                self.check_open()?;
                self.poll_send_fallback(context, bytes).map(Ok::<usize, Error>)
            });
            bytes = &bytes[sent.await?..];
        }
        Ok(())
    }

    /// Waits for the next flush of the peer, and takes it as a whole. `None` is the end: the peer
    /// closed the stream after all it sent.
    ///
    /// Cancel-safe: nothing is taken until it is given.
    ///
    /// # Errors
    ///
    /// The session is over, and everything that had arrived was taken.
    #[inline]
    pub async fn recv(&mut self) -> Result<Option<Message>> {
        poll_fn(|context| self.poll_recv(context)).await
    }

    #[inline]
    fn poll_recv(&mut self, context: &Context<'_>) -> Poll<Result<Option<Message>>> {
        if !self.lent.rest().is_empty() {
            return Poll::Ready(Ok(Some(self.take_lent())));
        }
        let chain = ready!(self.poll_next(context))?;
        let Some(chain) = chain else { return Poll::Ready(Ok(None)) };
        self.session().note_unread(chain.socket_len());
        Poll::Ready(Ok(Some(Message { chain })))
    }

    /// What [`AsyncBufRead`] has shown and nobody consumed.
    #[cold]
    fn take_lent(&mut self) -> Message {
        let bytes = Bytes::copy_from_slice(self.lent.rest());
        self.lent = Lent::default();
        let manager = Rc::clone(&self.session().lanes.manager);
        Message { chain: Chain::received(manager, bytes) }
    }

    fn poll_send(&mut self, context: &Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        self.check_open()?;
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if self.inner.life.get().path() == Path::SharedMemory
            && let Some(count) = ready!(self.poll_send_slices(context, bytes))?
        {
            return Poll::Ready(Ok(count));
        }
        self.poll_send_fallback(context, bytes).map(Ok)
    }

    /// Sends through shared memory. `None`: there are no slices, and will not be in time.
    fn poll_send_slices(
        &mut self,
        context: &Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<Option<usize>>> {
        ready!(self.poll_queue(context))?;
        let want = bytes.len().min(WRITE_AT_MOST);
        let written = self.session().lanes.manager.write_message(&bytes[..want]);
        let written = written.map_err(|error| self.session().broken(error))?;
        let Some((offset, count)) = written else {
            return self.poll_pool(context).map_ok(|()| None);
        };
        self.pool_deadline = None;
        self.send_offset(offset, count)?;
        Poll::Ready(Ok(Some(count)))
    }

    /// Waits until there is room for an event.
    fn poll_queue(&self, context: &Context<'_>) -> Poll<Result<()>> {
        self.check_open()?;
        let session = self.session();
        // Before any slice is taken: only an active session comes to rest again and gives back.
        session.activate();
        if self.is_queue_full()? {
            session.counters.queue_full.add(1);
            session.lanes.queue_waiting.register(context, None);
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    #[inline(always)]
    fn is_queue_full(&self) -> Result<bool> {
        let is_full = self.session().lanes.producer.borrow_mut().is_full();
        is_full.map_err(|error| self.session().broken(error))
    }

    /// Sends the event that hands slices to the peer. There is room for it.
    #[inline(always)]
    fn send_offset(&self, offset: u32, count: usize) -> Result<()> {
        let status = EventState::Open.to_status();
        let session = self.session();
        let sent = session.send_event(Event { stream_id: self.inner.id, offset, status })?;
        debug_assert!(sent, "there was room a moment ago");
        self.inner.is_known_to_peer.set(true);
        session.counters.bytes_sent.add(count as u64);
        session.activity.note_sent(count);
        Ok(())
    }

    /// The pool is empty: waits as long as the configuration says, then leaves shared memory.
    fn poll_pool(&mut self, context: &Context<'_>) -> Poll<Result<()>> {
        let session = self.session.inner();
        let now = Instant::now();
        let deadline = *self.pool_deadline.get_or_insert_with(|| {
            session.counters.pool_empty.add(1);
            now + session.config.pool_wait
        });
        if now < deadline {
            session.lanes.pool_waiting.register(context, Some(deadline));
            return Poll::Pending;
        }
        self.pool_deadline = None;
        self.inner.change_life(StreamLife::fall_back);
        Poll::Ready(Ok(()))
    }

    fn poll_send_fallback(&self, context: &Context<'_>, bytes: &[u8]) -> Poll<usize> {
        let session = self.session.inner();
        if session.outbox().is_full() {
            session.outbox().waiting().register(context, None);
            return Poll::Pending;
        }
        // Everything that was published before must be seen before; the peer drains its queue when
        // the message comes.
        session.flush_queue();
        let count = bytes.len().min(FALLBACK_AT_MOST);
        session.send_fallback(self.inner.id, &bytes[..count]);
        self.inner.is_known_to_peer.set(true);
        Poll::Ready(count)
    }

    #[inline]
    fn session(&self) -> &Rc<SessionInner> {
        self.session.inner()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.session.inner().close_stream(&self.inner);
    }
}

/// Reads what has arrived. `Ok(0)` is the end: the peer closed the stream after all it sent.
///
/// When the session is over, what had arrived is read first, then the error of the session.
/// Cancel-safe.
impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        to: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if to.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let rest = self.lent.rest();
        if !rest.is_empty() {
            let count = rest.len().min(to.len());
            to[..count].copy_from_slice(&rest[..count]);
            self.lent.read += count;
            return Poll::Ready(Ok(count));
        }
        let has_bytes = ready!(self.poll_readable(context))?;
        Poll::Ready(Ok(if has_bytes { self.read_inbound(to) } else { 0 }))
    }
}

/// Reads through a private buffer of up to 16 KiB.
///
/// The buffer is a copy: the peer can write shared memory at any time, and a reference to memory
/// that changes under it would be undefined behaviour.
impl AsyncBufRead for Stream {
    fn poll_fill_buf(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        if this.lent.rest().is_empty() && ready!(this.poll_readable(context))? {
            let len = this.inner.inbound.borrow().len().min(LENT_AT_MOST);
            let mut bytes = std::mem::take(&mut this.lent.bytes);
            bytes.resize(len, 0);
            let count = this.read_inbound(&mut bytes);
            bytes.truncate(count);
            this.lent = Lent { bytes, read: 0 };
        }
        Poll::Ready(Ok(this.lent.rest()))
    }

    fn consume(mut self: Pin<&mut Self>, count: usize) {
        self.lent.read = (self.lent.read + count).min(self.lent.bytes.len());
    }
}

/// Writes are sent at once: each goes into free slices and one event, and takes at most 256 KiB or
/// what the pool has. Many small writes are better collected first, as with a socket.
///
/// Waits while the send queue is full. While the pool is empty, waits for
/// [`pool_wait`](crate::ConfigBuilder::pool_wait), and then goes over the socket.
///
/// # Errors
///
/// `BrokenPipe` when the peer has closed the stream, `NotConnected` when this side has, otherwise
/// the end of the session. Cancel-safe: a write that is dropped has sent nothing, or returned.
impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_send(context, bytes).map_err(io::Error::from)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.session().flush_queue();
        self.session().poll_flushed(context).map_err(io::Error::from)
    }

    /// Closes the stream as a whole, like [`Stream::close`].
    fn poll_close(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.close_now();
        this.session().poll_flushed(context).map_err(io::Error::from)
    }
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Stream")
            .field("id", &self.id())
            .field("unread", &self.unread())
            .field("state", &self.inner.life.get().state())
            .finish_non_exhaustive()
    }
}
