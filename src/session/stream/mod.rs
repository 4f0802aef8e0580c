// SPDX-License-Identifier: MIT OR Apache-2.0
//! A stream's handle, and what it shares with its session (`docs/protocol.md#streams`).

pub(crate) mod loan;
pub(crate) mod read_half;
pub(crate) mod send;
pub(crate) mod write_half;

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use futures_lite::{AsyncBufRead, AsyncRead, AsyncWrite};

use crate::exec::wakers::WakerSlot;
use crate::session::guard::SessionGuard;
use crate::session::state::Session;
use crate::session::stream::loan::{Loan, Message};
use crate::session::stream::read_half::{Messages, ReadHalf, RecvFuture};
use crate::session::stream::send::{AllocFuture, EndsWait, SendFuture};
use crate::session::stream::write_half::WriteHalf;
use shmipc_core::error::{Error, Result};
use shmipc_core::proto::flow_control::{ReceiveWindow, SendWindow};
use shmipc_core::proto::stream_state::{HalfState, StreamState};
use shmipc_core::shm::chain::Chain;
use shmipc_core::shm::chain_queue::ChainQueue;
use shmipc_core::shm::pool::SlicePool;

/// What a stream's halves and its session share.
pub(crate) struct StreamInner {
    id: u32,
    life: StreamState,
    pub(crate) inbound: RefCell<ChainQueue>,
    pub(crate) reader: WakerSlot,
    /// The task that waits for the peer's reader.
    pub(crate) writer: WakerSlot,
    pub(crate) sending: SendWindow,
    pub(crate) receiving: ReceiveWindow,
    /// Whether its credit waits for room in the queue.
    pub(crate) owes_credit: Cell<bool>,
    /// Whether its credit waits until the peer is awake.
    pub(crate) has_waiting_credit: Cell<bool>,
    /// Whether this side's direction has ended and the peer is not known to understand that.
    pub(crate) owes_end: Cell<bool>,
    /// The first slice of what was last sent through shared memory, by its offset; 0: nothing was.
    pub(crate) last_sent: Cell<u32>,
    /// Bytes that went over the socket since the peer last sent something.
    unanswered: Cell<u64>,
    /// Whether something of it came over the socket.
    has_come_by_socket: Cell<bool>,
    /// Whether the peer has heard of the stream, and so must hear of its end.
    is_known_to_peer: Cell<bool>,
    /// Whether something came since this was last looked at.
    has_received: Cell<bool>,
    /// What had been sent when that was looked at.
    sent_before: Cell<u64>,
    halves: Cell<Halves>,
}

/// Which halves of a stream's handle are left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Halves {
    Both,
    Only(Half),
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    Read,
    Write,
}

impl StreamInner {
    pub(crate) fn new(id: u32, manager: &Rc<SlicePool>) -> Self {
        Self {
            id,
            life: StreamState::new(),
            inbound: RefCell::new(ChainQueue::new(manager)),
            reader: WakerSlot::default(),
            writer: WakerSlot::default(),
            sending: SendWindow::default(),
            receiving: ReceiveWindow::default(),
            owes_credit: Cell::new(false),
            has_waiting_credit: Cell::new(false),
            owes_end: Cell::new(false),
            last_sent: Cell::new(0),
            unanswered: Cell::new(0),
            has_come_by_socket: Cell::new(false),
            is_known_to_peer: Cell::new(false),
            has_received: Cell::new(false),
            sent_before: Cell::new(0),
            halves: Cell::new(Halves::Both),
        }
    }

    #[inline]
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    #[inline]
    pub(crate) fn life(&self) -> &StreamState {
        &self.life
    }

    pub(crate) fn is_known_to_peer(&self) -> bool {
        self.is_known_to_peer.get()
    }

    #[inline]
    pub(crate) fn note_known_to_peer(&self) {
        self.is_known_to_peer.set(true);
    }

    /// Whether somebody could still read what comes.
    #[inline]
    pub(crate) fn has_reader(&self) -> bool {
        matches!(self.halves.get(), Halves::Both | Halves::Only(Half::Read))
    }

    /// How many bytes went over the socket of which nothing shows that the peer has read them: it
    /// has neither sent anything since, nor closed the stream. Only a peer of this crate says what
    /// it has read.
    pub(crate) fn unconfirmed(&self) -> u64 {
        match self.life.peer() {
            HalfState::Open | HalfState::HalfClosed => self.unanswered.get(),
            HalfState::Closed | HalfState::Reset => 0,
        }
    }

    pub(crate) fn note_unanswered(&self, len: u64) {
        self.unanswered.set(self.unanswered.get().saturating_add(len));
    }

    #[inline]
    pub(crate) fn note_answered(&self) {
        self.unanswered.set(0);
    }

    /// Whether what comes next will be taken, or thrown away, at once.
    pub(crate) fn is_waited_for(&self) -> bool {
        !self.has_reader() || self.reader.is_waiting() && self.inbound.borrow().is_empty()
    }

    /// Notes that something of it came.
    #[inline]
    pub(crate) fn note_received(&self) {
        self.note_known_to_peer();
        self.note_answered();
        self.has_received.set(true);
    }

    /// Notes that something of it came over the socket.
    pub(crate) fn note_come_by_socket(&self) {
        self.has_come_by_socket.set(true);
    }

    /// Whether either side has used the socket for it.
    fn has_used_socket(&self) -> bool {
        self.sending.has_used_socket() || self.has_come_by_socket.get()
    }

    #[inline]
    pub(crate) fn receive(&self, data: Chain) {
        self.note_received();
        self.inbound.borrow_mut().push(data);
    }

    /// The oldest flush, when it did not come straight to the reader.
    #[inline(never)]
    pub(crate) fn pop_inbound(&self) -> Option<Chain> {
        self.inbound.borrow_mut().pop()
    }

    /// Whether a reader has something to do: data, or an end.
    #[inline]
    pub(crate) fn has_news(&self) -> bool {
        !self.inbound.borrow().is_empty() || !self.life.can_receive()
    }

    /// Whether the peer has sent since this was last asked, and was not answered, or what it sent
    /// waits to be read. Then it is in the middle of something.
    pub(crate) fn is_in_the_middle(&self) -> bool {
        let sent = self.sending.sent();
        let has_sent = self.sent_before.replace(sent) != sent;
        let has_unread = !self.inbound.borrow().is_empty();
        // When it is read, a peer that waited for that goes on.
        self.has_received.replace(has_unread) && !has_sent || has_unread
    }

    /// Throws away what was not read. Gives what of it had come over the socket cost.
    pub(crate) fn discard(&self) -> usize {
        let mut inbound = self.inbound.borrow_mut();
        let mut cost = 0;
        while let Some(chain) = inbound.pop() {
            cost += chain.socket_cost();
        }
        cost
    }

    /// Which halves of the handle are left.
    pub(crate) fn halves(&self) -> Halves {
        self.halves.get()
    }

    /// Notes that one half of the handle is gone. Gives what is left.
    pub(crate) fn drop_half(&self, half: Half) -> Halves {
        let left = match self.halves.get() {
            Halves::Both if half == Half::Read => Halves::Only(Half::Write),
            Halves::Both => Halves::Only(Half::Read),
            Halves::Only(_) | Halves::None => Halves::None,
        };
        self.halves.set(left);
        left
    }
}

/// A stream of bytes to and from the peer, in flushes.
///
/// Three ways to use it, over the same state:
///
/// - [`AsyncRead`], [`AsyncBufRead`] and [`AsyncWrite`]: as a socket. These copy.
/// - [`alloc`](Self::alloc) lends shared memory, [`send`](Self::send) passes it on as one flush.
/// - [`recv`](Self::recv) takes one flush of the peer as a [`Message`].
///
/// What was written or sent is on its way when that returns; [`flush`] waits only for data that had
/// to go over the socket. Dropping a stream closes it, gives all its memory back, and loses nothing
/// that was written. What a peer sent before it closed is read first, then comes the end. A stream
/// that ends because something failed is [reset](Self::reset) instead, or dropped by a panic: then
/// the peer reads an error in place of the end.
///
/// ```
/// use shmipc_glommio::{Config, Connector, Error, Listener};
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-stream-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(move || async move {
/// let listener = Listener::bind(&path, Config::default())?;
/// let server = glommio::spawn_local(async move {
///     let mut stream = listener.accept().await?.accept().await?;
///     while let Some(message) = stream.recv().await? {
///         stream.forward(message).await?; // back where it came from, without a copy
///     }
///     Ok::<(), Error>(())
/// });
///
/// let session = Connector::new(Config::default()).connect(&path).await?;
/// let mut stream = session.open_stream()?;
/// let mut loan = stream.alloc(5).await?;
/// loan.write(b"hello");
/// stream.send(loan).await?;
/// let echo = stream.recv().await?.expect("an echo");
/// assert_eq!(echo.into_bytes(), "hello");
/// drop(stream); // the server reads the end
/// server.await?;
/// # Ok::<(), Error>(()) }).unwrap().join().unwrap().unwrap();
/// ```
///
/// [`flush`]: futures_lite::AsyncWriteExt::flush
pub struct Stream {
    reader: ReadHalf,
    writer: WriteHalf,
}

impl Stream {
    pub(crate) fn new(session: Rc<SessionGuard>, inner: Rc<StreamInner>) -> Self {
        Self {
            reader: ReadHalf::new(Rc::clone(&session), Rc::clone(&inner)),
            writer: WriteHalf::new(session, inner),
        }
    }

    /// The stream's number, which the client chose. Both sides know it by this number.
    pub fn id(&self) -> u32 {
        self.writer.id()
    }

    /// Whether nothing of what it was used for before is left on it.
    pub(crate) fn is_reusable(&self) -> bool {
        let inner = self.writer.inner();
        let is_whole =
            inner.life().here() == HalfState::Open && inner.life().peer() == HalfState::Open;
        let session = self.writer.session();
        // A peer that does not know the extension never returns to memory on a stream whose data
        // went over the socket, whichever side began with that, nor can this side
        // (`docs/protocol.md#fallback`).
        let may_use_memory = session.credit.is_known() || !inner.has_used_socket();
        is_whole && may_use_memory && self.unread() == 0 && !session.is_over()
    }

    pub(crate) fn inner(&self) -> &Rc<StreamInner> {
        self.writer.inner()
    }

    pub(crate) fn is_of_session(&self, session: &Session) -> bool {
        Rc::ptr_eq(self.writer.session(), session.inner())
    }

    /// How many bytes have arrived and wait to be read.
    pub fn unread(&self) -> usize {
        self.reader.unread()
    }

    /// Whether the peer sends nothing more: it has closed the stream, or its direction of it. What
    /// it sent before may still wait to be read.
    pub fn is_closed_by_peer(&self) -> bool {
        self.writer.inner().life().peer() != HalfState::Open
    }

    /// Whether the peer knows the end of one direction, and a reset: see
    /// [`Session::peer_knows_half_close`](crate::Session::peer_knows_half_close).
    pub fn peer_knows_half_close(&self) -> bool {
        self.writer.session().peer_knows_extension()
    }

    /// Whether this stream sends over the socket now, because the pool had no slice for it. With a
    /// peer of this crate that ends when its reader has taken what went that way.
    pub fn is_on_socket(&self) -> bool {
        self.writer.is_on_socket()
    }

    /// Until when reads wait: see [`ReadHalf::set_deadline`].
    pub fn set_read_deadline(&mut self, deadline: Option<Instant>) {
        self.reader.set_deadline(deadline);
    }

    /// Until when writes wait: see [`WriteHalf::set_deadline`].
    pub fn set_write_deadline(&mut self, deadline: Option<Instant>) {
        self.writer.set_deadline(deadline);
    }

    /// Borrows shared memory for a message of up to `len` bytes.
    ///
    /// Waits while the pool is empty, up to
    /// [`fallback_after`](crate::ConfigBuilder::fallback_after); then, and while the stream is
    /// [fallen back](Self::is_on_socket), the loan is private memory. Cancel-safe: nothing is taken
    /// until it is given.
    ///
    /// # Errors
    ///
    /// The stream is closed, the session over, or the
    /// [deadline](Self::set_write_deadline) has passed.
    #[inline]
    pub fn alloc(&mut self, len: usize) -> AllocFuture<'_> {
        self.writer.alloc(len)
    }

    /// Sends what was written into a loan, as one flush.
    ///
    /// A loan of any stream of the same session will do. One into which nothing was written is
    /// given back, and nothing is sent. Waits while the send queue is full, and while the peer's
    /// reader is too far behind. Cancel-safe: a send that is dropped before it ends has sent
    /// nothing.
    ///
    /// # Errors
    ///
    /// The stream is closed, the session over, the [deadline](Self::set_write_deadline) has
    /// passed, or [`Error::ForeignLoan`](crate::Error::ForeignLoan). In any case the loan is
    /// spent: what is not sent goes back to the pool.
    #[inline]
    pub fn send(&mut self, loan: Loan) -> SendFuture<'_> {
        self.writer.send(loan)
    }

    /// Passes a message on that was received on this stream or another one of the same session,
    /// without a copy: what of it is unread, as one flush. For the rest as [`send`](Self::send).
    #[inline]
    pub fn forward(&mut self, message: Message) -> SendFuture<'_> {
        self.writer.forward(message)
    }

    /// Waits for the next flush of the peer, and takes it as a whole. `None` is the end: the peer
    /// sends nothing more, and everything that it sent was taken.
    ///
    /// Cancel-safe: nothing is taken until it is given.
    ///
    /// # Errors
    ///
    /// Everything that had arrived was taken, and the session is over, or the peer has
    /// [reset](Self::reset) the stream; or the [deadline](Self::set_read_deadline) has passed.
    #[inline]
    pub fn recv(&mut self) -> RecvFuture<'_> {
        self.reader.recv()
    }

    /// The flushes of the peer as a [stream of futures](futures_lite::Stream), which ends with the
    /// peer's, or after the first error.
    pub fn messages(&mut self) -> Messages<'_> {
        self.reader.messages()
    }

    /// Tells the peer of a stream that was just [opened](crate::Session::open_stream), so that it
    /// can accept it and speak first. Nothing happens when the peer knows the stream already.
    ///
    /// A peer that is not of this crate is told nothing: it learns of a stream with its first bytes
    /// only. Waits while the send queue is full or the pool is empty, and in
    /// [version 2](crate::ProtocolVersion::V2) for up to 200 ms, once per session, until the server
    /// shows of which kind it is. Cancel-safe: told or not.
    ///
    /// # Errors
    ///
    /// The stream is closed, the session over, or the
    /// [deadline](Self::set_write_deadline) has passed.
    pub async fn announce(&mut self) -> Result<()> {
        self.writer.session().give_time_to_say().await;
        let writer = EndsWait(&mut self.writer);
        poll_fn(|context| writer.0.poll_announce(context)).await
    }

    /// Ends this side's direction and goes on reading: see [`WriteHalf::finish`].
    ///
    /// # Errors
    ///
    /// The session ended before everything had left.
    pub async fn finish(&mut self) -> Result<()> {
        self.writer.finish().await
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
        let session = self.writer.session();
        session.close_stream(self.writer.inner());
        session.flush_queue();
        self.reader.forget_lent();
        self.writer.session().flushed().await
    }

    /// Closes the stream as a failure: what was sent must not be taken for all there was.
    ///
    /// The peer reads what it got before, and then
    /// [`Error::StreamReset`](crate::Error::StreamReset) in place of the end; so it does when it
    /// writes. A peer that is not of this crate sees an ordinary close, since it knows no other.
    /// Unread data is thrown away. After this, reads and writes here fail as after
    /// [`close`](Self::close). Nothing happens when the stream is closed already.
    ///
    /// ```
    /// use futures_lite::AsyncWriteExt;
    /// use shmipc_glommio::Error;
    ///
    /// # let path = std::env::temp_dir().join(format!("shmipc-doc-reset-{}", std::process::id()));
    /// # glommio::LocalExecutorBuilder::default().spawn(move || async move {
    /// # let config = shmipc_glommio::Config::builder().buffer_size(1 << 20).queue_capacity(64);
    /// # let config = config.build().unwrap();
    /// # let listener = shmipc_glommio::Listener::bind(&path, config.clone())?;
    /// # let session = shmipc_glommio::Connector::new(config).connect(&path).await?;
    /// # let peer = listener.accept().await?;
    /// let mut sending = session.open_stream()?;
    /// sending.write_all(b"the first half").await?;
    /// sending.reset(); // the second half is nowhere to be found
    /// let mut receiving = peer.accept().await?;
    /// assert_eq!(receiving.recv().await?.unwrap().into_bytes(), "the first half");
    /// assert!(matches!(receiving.recv().await, Err(Error::StreamReset)));
    /// # std::io::Result::Ok(()) }).unwrap().join().unwrap().unwrap();
    /// ```
    pub fn reset(&mut self) {
        self.writer.reset();
        self.reader.forget_lent();
    }

    /// Waits until what is sent would reach no reader any more: see [`WriteHalf::closed`].
    pub async fn closed(&mut self) -> Error {
        self.writer.closed().await
    }

    /// Takes the two directions apart, so that two tasks of this core can have one each.
    pub fn split(self) -> (ReadHalf, WriteHalf) {
        (self.reader, self.writer)
    }

    /// Puts two halves of the same stream together again.
    ///
    /// # Errors
    ///
    /// They are of different streams: both come back.
    #[allow(clippy::result_large_err, reason = "the halves come back as they were given")]
    pub fn reunite(reader: ReadHalf, writer: WriteHalf) -> Result<Self, (ReadHalf, WriteHalf)> {
        if reader.is_of(writer.inner()) {
            Ok(Self { reader, writer })
        } else {
            Err((reader, writer))
        }
    }
}

/// Reads what has arrived. `Ok(0)` is the end: the peer sends nothing more, and all was read.
///
/// When the session is over, or the peer has [reset](Stream::reset) the stream, what had arrived is
/// read first, then the error. Cancel-safe.
impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        to: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.reader).poll_read(context, to)
    }
}

/// Reads through a private buffer of up to 16 KiB.
impl AsyncBufRead for Stream {
    fn poll_fill_buf(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        Pin::new(&mut self.get_mut().reader).poll_fill_buf(context)
    }

    fn consume(mut self: Pin<&mut Self>, count: usize) {
        Pin::new(&mut self.reader).consume(count);
    }
}

/// Writes are sent at once: see [`WriteHalf`]. Closing ends this side's direction, like
/// [`finish`](Stream::finish).
impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write_vectored(context, parts)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_close(context)
    }
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Stream")
            .field("id", &self.id())
            .field("unread", &self.unread())
            .field("life", self.writer.inner().life())
            .finish_non_exhaustive()
    }
}
