// SPDX-License-Identifier: MIT OR Apache-2.0
//! The receiving half of a stream.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use futures_lite::{AsyncBufRead, AsyncRead};

use crate::exec::deadline::Deadline;
use crate::session::guard::SessionGuard;
use crate::session::state::{SessionInner, StreamInner};
use crate::session::stream::loan::Message;
use shmipc_core::error::{Error, Result};
use shmipc_core::proto::session::stream::Half;
use shmipc_core::shm::chain::Chain;

/// How much [`AsyncBufRead`] copies out of shared memory at a time.
const LENT_AT_MOST: usize = 16 << 10;

/// The receiving half of a [`Stream`](crate::Stream), as [`split`](crate::Stream::split) gives it.
///
/// Dropping it throws away what is unread, and what still comes; the other half goes on. When both
/// halves are dropped, the stream is closed.
///
/// ```
/// use futures_lite::AsyncReadExt;
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-read-half-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(move || async move {
/// # let config = shmipc_glommio::Config::builder().buffer_size(1 << 20).queue_capacity(64);
/// # let config = config.build().unwrap();
/// # let listener = shmipc_glommio::Listener::bind(&path, config.clone())?;
/// # let session = shmipc_glommio::Connector::new(config).connect(&path).await?;
/// # let peer = listener.accept().await?;
/// # let mut other = session.open_stream()?;
/// # for text in ["hello", " world"] {
/// #     let mut loan = other.alloc(text.len()).await?;
/// #     loan.write(text.as_bytes());
/// #     other.send(loan).await?;
/// # }
/// # let mut stream = peer.accept().await?;
/// # drop(other);
/// let (mut reader, writer) = stream.split();
/// let reading = glommio::spawn_local(async move {
///     let mut text = String::new();
///     reader.read_to_string(&mut text).await?;
///     std::io::Result::Ok(text)
/// });
/// // Meanwhile another task has the writer.
/// assert_eq!(reading.await?, "hello world");
/// # std::io::Result::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
pub struct ReadHalf {
    session: Rc<SessionGuard>,
    inner: Rc<StreamInner>,
    /// What [`AsyncBufRead`] shows: a private copy, since the peer could change shared memory
    /// under a reference.
    lent: ReadBuffer,
    deadline: Deadline,
}

#[derive(Default)]
struct ReadBuffer {
    bytes: Vec<u8>,
    read: usize,
}

impl ReadBuffer {
    #[inline]
    fn rest(&self) -> &[u8] {
        &self.bytes[self.read..]
    }
}

impl ReadHalf {
    pub(crate) fn new(session: Rc<SessionGuard>, inner: Rc<StreamInner>) -> Self {
        Self { session, inner, lent: ReadBuffer::default(), deadline: Deadline::default() }
    }

    #[inline]
    fn session(&self) -> &Rc<SessionInner> {
        self.session.inner()
    }

    pub(crate) fn is_of(&self, inner: &Rc<StreamInner>) -> bool {
        Rc::ptr_eq(&self.inner, inner)
    }

    /// The stream's number.
    pub fn id(&self) -> u32 {
        self.inner.id()
    }

    /// How many bytes have arrived and wait to be read.
    pub fn unread(&self) -> usize {
        self.lent.rest().len() + self.inner.inbound.borrow().len()
    }

    /// Until when reads wait; `None`, the default, is for ever. What has arrived is read in any
    /// case; a read that would wait beyond it ends with [`Error::DeadlinePassed`]. What comes after
    /// that is there for the next read.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline.set(deadline);
    }

    /// Waits for the next message of the peer, and takes it as a whole. `None` is the end: the peer
    /// sends nothing more, and everything that it sent was taken.
    ///
    /// Cancel-safe: nothing is taken until it is given.
    ///
    /// # Errors
    ///
    /// Everything that had arrived was taken, and the session is over, or the peer has
    /// [reset](crate::Stream::reset) the stream; or the [deadline](Self::set_deadline) has passed.
    #[inline]
    pub fn recv(&mut self) -> RecvFuture<'_> {
        RecvFuture::new(self)
    }

    /// The messages of the peer as a [stream of futures](futures_lite::Stream), which ends with the
    /// peer's, or after the first error.
    pub fn messages(&mut self) -> Messages<'_> {
        Messages { half: self, is_over: false }
    }

    /// What is shown no more to anybody: the stream was closed.
    pub(crate) fn forget_lent(&mut self) {
        self.lent = ReadBuffer::default();
    }

    #[inline]
    pub(crate) fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Message>>> {
        if !self.lent.rest().is_empty() {
            return Poll::Ready(Ok(Some(self.take_lent())));
        }
        match ready!(self.poll_next(context))? {
            None => Poll::Ready(Ok(None)),
            Some(chain) => {
                let session = self.session();
                session.proto.on_taken(&**session, &self.inner, &chain);
                Poll::Ready(Ok(Some(Message { chain })))
            }
        }
    }

    /// What [`AsyncBufRead`] has shown and was not consumed.
    #[cold]
    fn take_lent(&mut self) -> Message {
        let bytes = Bytes::copy_from_slice(self.lent.rest());
        self.lent = ReadBuffer::default();
        let pool = Rc::clone(&self.session().memory.pool);
        let held = bytes.len();
        Message { chain: Chain::received(pool, bytes, held) }
    }

    /// The next message of the peer, which is not yet counted as taken; `None` is the end.
    #[inline]
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Chain>>> {
        let (session, inner) = (self.session(), &*self.inner);
        let mut chain = inner.pop_inbound();
        if chain.is_none() && session.proto.may_receive(inner) {
            chain = session.wait_in_place(inner);
        }
        match chain {
            Some(chain) => Poll::Ready(Ok(Some(chain))),
            None => self.poll_wait(context),
        }
    }

    /// Nothing has come so far. Waits, unless the end has come.
    fn poll_wait(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Chain>>> {
        let (session, inner) = (self.session.inner(), &*self.inner);
        if let Some(end) = session.proto.read_end(inner) {
            return Poll::Ready(end.map(|()| None));
        }
        if self.deadline.poll(context).is_ready() {
            return Poll::Ready(Err(Error::DeadlinePassed));
        }
        if inner.tasks.reader.register(context) {
            let waiting = &session.activity.waiting_readers;
            waiting.set(waiting.get() + 1);
            session.proto.on_reader_waits(session, inner);
        }
        Poll::Pending
    }

    /// Whether there is something to read: `Ok(true)` yes, `Ok(false)` never again.
    fn poll_readable(&mut self, context: &mut Context<'_>) -> Poll<Result<bool>> {
        if self.inner.inbound.borrow().is_empty() {
            let chain = ready!(self.poll_next(context))?;
            let Some(chain) = chain else { return Poll::Ready(Ok(false)) };
            self.inner.inbound.borrow_mut().push_front(chain);
        }
        Poll::Ready(Ok(true))
    }

    fn read_inbound(&self, to: &mut [u8]) -> usize {
        let session = self.session();
        let mut taken = None;
        let mut inbound = self.inner.inbound.borrow_mut();
        let before = inbound.socket_cost();
        let count = inbound.read(to, |chain| {
            let (occupied, over_socket) = taken.unwrap_or_default();
            taken = Some((occupied + chain.occupies(), over_socket | !chain.is_shared()));
        });
        let freed = before - inbound.socket_cost();
        drop(inbound);
        session.proto.on_unread_freed(session, freed);
        if let Some((occupied, over_socket)) = taken {
            session.proto.give_credit(session, &self.inner, occupied, over_socket);
        }
        count
    }
}

impl Drop for ReadHalf {
    fn drop(&mut self) {
        self.session().drop_half(&self.inner, Half::Read);
    }
}

/// Reads what has arrived. `Ok(0)` is the end: the peer sends nothing more, and all was read.
///
/// When the session is over, or the peer has [reset](crate::Stream::reset) the stream, what had
/// arrived is read first, then the error. Cancel-safe.
impl AsyncRead for ReadHalf {
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
impl AsyncBufRead for ReadHalf {
    fn poll_fill_buf(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        if this.lent.rest().is_empty() && ready!(this.poll_readable(context))? {
            let len = this.inner.inbound.borrow().len().min(LENT_AT_MOST);
            let mut bytes = std::mem::take(&mut this.lent.bytes);
            bytes.resize(len, 0);
            let count = this.read_inbound(&mut bytes);
            bytes.truncate(count);
            this.lent = ReadBuffer { bytes, read: 0 };
        }
        Poll::Ready(Ok(this.lent.rest()))
    }

    /// Takes what was shown as read. More than that is taken for all of it, as the standard
    /// library's readers do.
    fn consume(mut self: Pin<&mut Self>, count: usize) {
        let lent = &mut self.lent;
        lent.read += count.min(lent.bytes.len() - lent.read);
    }
}

/// Waits for the next message of the peer: see [`Stream::recv`](crate::Stream::recv).
///
/// ```
/// use futures_lite::future::poll_once;
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-recv-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(move || async move {
/// # let config = shmipc_glommio::Config::builder().buffer_size(1 << 20).queue_capacity(64);
/// # let config = config.build().unwrap();
/// # let listener = shmipc_glommio::Listener::bind(&path, config.clone())?;
/// # let session = shmipc_glommio::Connector::new(config).connect(&path).await?;
/// # let peer = listener.accept().await?;
/// # let mut other = session.open_stream()?;
/// # for text in ["hello", " world"] {
/// #     let mut loan = other.alloc(text.len()).await?;
/// #     loan.write(text.as_bytes());
/// #     other.send(loan).await?;
/// # }
/// # let mut stream = peer.accept().await?;
/// let message = stream.recv().await?.expect("more than the end");
/// assert_eq!(message.into_bytes(), "hello");
/// # drop(stream.recv().await?);
/// // What has come by now, without a wait.
/// assert!(poll_once(stream.recv()).await.is_none());
/// # std::io::Result::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
#[must_use = "futures do nothing unless they are awaited"]
pub struct RecvFuture<'a> {
    half: &'a mut ReadHalf,
}

impl<'a> RecvFuture<'a> {
    #[inline]
    pub(crate) fn new(half: &'a mut ReadHalf) -> Self {
        Self { half }
    }
}

impl Future for RecvFuture<'_> {
    type Output = Result<Option<Message>>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.half.poll_recv(context)
    }
}

/// The messages of the peer, one after the other: see
/// [`Stream::messages`](crate::Stream::messages).
///
/// ```
/// use futures_lite::StreamExt;
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-messages-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(move || async move {
/// # let config = shmipc_glommio::Config::builder().buffer_size(1 << 20).queue_capacity(64);
/// # let config = config.build().unwrap();
/// # let listener = shmipc_glommio::Listener::bind(&path, config.clone())?;
/// # let session = shmipc_glommio::Connector::new(config).connect(&path).await?;
/// # let peer = listener.accept().await?;
/// # let mut other = session.open_stream()?;
/// # for text in ["hello", " world"] {
/// #     let mut loan = other.alloc(text.len()).await?;
/// #     loan.write(text.as_bytes());
/// #     other.send(loan).await?;
/// # }
/// # let mut stream = peer.accept().await?;
/// # drop(other);
/// let mut lengths = Vec::new();
/// let mut messages = stream.messages();
/// while let Some(message) = messages.next().await {
///     lengths.push(message?.len());
/// }
/// assert_eq!(lengths, [5, 6]); // one for each message of the peer
/// # std::io::Result::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
#[must_use = "streams do nothing unless they are polled"]
pub struct Messages<'a> {
    half: &'a mut ReadHalf,
    is_over: bool,
}

impl futures_lite::Stream for Messages<'_> {
    type Item = Result<Message>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let message = ready!(self.half.poll_recv(context)).transpose();
        self.is_over = !matches!(message, Some(Ok(_)));
        Poll::Ready(message)
    }
}

impl std::fmt::Debug for ReadHalf {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("ReadHalf")
            .field("id", &self.id())
            .field("unread", &self.unread())
            .finish_non_exhaustive()
    }
}
