// SPDX-License-Identifier: MIT OR Apache-2.0
//! The handle of a stream (`docs/protocol.md#streams`).

pub(crate) mod fallback;
pub(crate) mod loan;
pub(crate) mod read_half;
pub(crate) mod send;
pub(crate) mod write_half;

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use futures_lite::{AsyncBufRead, AsyncRead, AsyncWrite};

use crate::session::guard::SessionGuard;
use crate::session::state::{SessionInner, StreamInner};
use crate::session::stream::loan::{Loan, Message};
use crate::session::stream::read_half::{Messages, ReadHalf, RecvFuture};
use crate::session::stream::send::{AllocFuture, EndsWait, SendFuture};
use crate::session::stream::write_half::WriteHalf;
use shmipc_core::error::{Error, Result};
use shmipc_core::proto::stream_state::HalfState;

/// A stream of bytes to and from the peer, in messages.
///
/// Three ways to use it, over the same state:
///
/// - [`AsyncRead`], [`AsyncBufRead`] and [`AsyncWrite`]: as a socket. These copy.
/// - [`alloc`](Self::alloc) lends shared memory, [`send`](Self::send) passes it on as one message.
/// - [`recv`](Self::recv) takes one message of the peer as a [`Message`].
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
        self.unread() == 0 && self.writer.session().proto.is_reusable(self.inner())
    }

    pub(crate) fn inner(&self) -> &Rc<StreamInner> {
        self.writer.inner()
    }

    pub(crate) fn is_of_session(&self, session: &Rc<SessionInner>) -> bool {
        Rc::ptr_eq(self.writer.session(), session)
    }

    /// How many bytes have arrived and wait to be read.
    pub fn unread(&self) -> usize {
        self.reader.unread()
    }

    /// Whether the peer sends nothing more: it has closed the stream, or its direction of it. What
    /// it sent before may still wait to be read.
    pub fn is_closed_by_peer(&self) -> bool {
        self.writer.inner().state().peer() != HalfState::Open
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
        AllocFuture::new(&mut self.writer, len)
    }

    /// Sends what was written into a loan, as one message.
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
        SendFuture::new(&mut self.writer, loan.chain)
    }

    /// Passes a message on that was received on this stream or another one of the same session,
    /// without a copy: what of it is unread, as one message. For the rest as [`send`](Self::send).
    #[inline]
    pub fn forward(&mut self, message: Message) -> SendFuture<'_> {
        SendFuture::new(&mut self.writer, message.chain)
    }

    /// Waits for the next message of the peer, and takes it as a whole. `None` is the end: the peer
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
        RecvFuture::new(&mut self.reader)
    }

    /// The messages of the peer as a [stream of futures](futures_lite::Stream), which ends with the
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
        session.proto.close_stream(session, self.writer.inner());
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
            .field("state", self.writer.inner().state())
            .finish_non_exhaustive()
    }
}
