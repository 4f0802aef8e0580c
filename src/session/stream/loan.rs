// SPDX-License-Identifier: MIT OR Apache-2.0
//! Messages as values: memory that is lent to be written, and memory that has arrived.
//!
//! Both own their slices. A loan that is dropped, and a message that is read or dropped, give them
//! back; nothing has to be called for that.

use bytes::{Buf, Bytes};

use shmipc_core::error::{Error, Result};
use shmipc_core::shm::chain::Chain;
use shmipc_core::shm::chain::views::{SliceViews, SpareViews};
use shmipc_core::shm::map::trust::PeerTrust;

/// Shared memory to write a message into, lent by [`Stream::alloc`](crate::Stream::alloc) and
/// passed on by [`Stream::send`](crate::Stream::send) without a copy.
///
/// It has one slice when one is large enough, otherwise several. What is sent is what was written,
/// so a loan may be larger than its message. Dropping it gives the memory back.
///
/// When the pool stays empty for as long as [configured](crate::ConfigBuilder::fallback_after), the
/// loan is private memory and goes over the socket; nothing else changes.
///
/// ```
/// use std::io::Write;
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-loan-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(move || async move {
/// # let config = shmipc_glommio::Config::builder().buffer_size(1 << 20).queue_capacity(64);
/// # let config = config.build().unwrap();
/// # let listener = shmipc_glommio::Listener::bind(&path, config.clone())?;
/// # let session = shmipc_glommio::Connector::new(config).connect(&path).await?;
/// # let peer = listener.accept().await?;
/// # let mut stream = session.open_stream()?;
/// let mut loan = stream.alloc(64).await?;
/// loan.write(&7_u32.to_be_bytes());
/// write!(loan, "{} apples", 7)?;
/// assert_eq!((loan.len(), loan.remaining()), (12, loan.capacity() - 12));
/// stream.send(loan).await?; // 12 bytes, whatever its capacity is
/// # assert_eq!(peer.accept().await?.unread(), 12);
/// # std::io::Result::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
pub struct Loan {
    pub(crate) chain: Chain,
}

impl Loan {
    /// How many bytes can be written in all.
    #[inline]
    pub fn capacity(&self) -> usize {
        self.chain.capacity()
    }

    /// How many bytes have been written.
    #[inline]
    pub fn len(&self) -> usize {
        self.chain.len()
    }

    /// Whether nothing has been written.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many bytes can still be written.
    #[inline]
    pub fn remaining(&self) -> usize {
        self.capacity() - self.len()
    }

    /// Whether the loan is shared memory, and not private memory that goes over the socket.
    pub fn is_shared(&self) -> bool {
        self.chain.is_shared()
    }

    /// Copies bytes behind those that were written, as many as there is room for. Returns how many:
    /// what does not fit is not an error, unless it is written by [`std::io::Write::write_all`].
    #[inline]
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        self.chain.write(bytes)
    }

    /// Returns the room behind what was written, slice by slice, to be written in place. Bytes
    /// count as written when [`advance`](Self::advance) says so; they hold something old until
    /// then.
    ///
    /// # Errors
    ///
    /// [`Error::NotTrusted`]: the token does not speak for the peer of this session.
    #[inline]
    pub fn views<'a>(&'a mut self, trust: &'a PeerTrust) -> Result<ViewsMut<'a>> {
        self.chain.spare_views(trust).map(ViewsMut).ok_or(Error::NotTrusted)
    }

    /// Counts `count` bytes that were written through [`views`](Self::views), or as many as there
    /// is room for.
    #[inline]
    pub fn advance(&mut self, count: usize) {
        self.chain.advance(count);
    }
}

/// The room in a [`Loan`], slice by slice.
///
/// ```
/// use shmipc_glommio::{Connector, PeerTrust};
///
/// // SAFETY: both sides are this program. Neither writes to what it has sent.
/// let trust = unsafe { PeerTrust::new_unchecked() };
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-views-mut-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(move || async move {
/// # let config = shmipc_glommio::Config::builder().buffer_size(1 << 20).queue_capacity(64);
/// # let config = config.build().unwrap();
/// # let listener = shmipc_glommio::Listener::bind(&path, config.clone())?;
/// let session = Connector::new(config).trust_peer(&trust).connect(&path).await?;
/// # let peer = listener.accept().await?;
/// let mut stream = session.open_stream()?;
/// let mut loan = stream.alloc(1000).await?;
/// let mut written = 0;
/// for room in loan.views(&trust)? {
///     room.fill(7); // a decoder, say, that writes its output here
///     written += room.len();
/// }
/// loan.advance(written);
/// stream.send(loan).await?;
/// # assert_eq!(peer.accept().await?.unread(), written);
/// # std::io::Result::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
pub struct ViewsMut<'a>(SpareViews<'a>);

impl<'a> Iterator for ViewsMut<'a> {
    type Item = &'a mut [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a mut [u8]> {
        self.0.next()
    }
}

/// Writing never fails; it ends with `WriteZero` when the loan is full.
impl std::io::Write for Loan {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Ok(Self::write(self, bytes))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// One message of the peer, as [`Stream::recv`](crate::Stream::recv) gives it.
///
/// Its bytes stay in shared memory until they are copied out, or looked at through
/// [`views`](Self::views). Slices go back as they are consumed, and all of them when it is dropped.
///
/// ```
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-message-{}", std::process::id()));
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
/// let mut message = stream.recv().await?.expect("a message");
/// let mut first = [0; 2];
/// message.read(&mut first);
/// assert_eq!(first, *b"he");
/// assert_eq!(message.into_bytes(), "llo"); // what was left
/// # std::io::Result::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
pub struct Message {
    pub(crate) chain: Chain,
}

impl Message {
    /// How many bytes there are to read.
    #[inline]
    pub fn len(&self) -> usize {
        self.chain.len()
    }

    /// Whether everything was read.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it came through shared memory, and not over the socket.
    pub fn is_shared(&self) -> bool {
        self.chain.is_shared()
    }

    /// Copies the first bytes out, as many as `to` holds, and consumes them. Returns how many.
    pub fn read(&mut self, to: &mut [u8]) -> usize {
        self.chain.read(to)
    }

    /// Copies the first bytes out, as many as `to` holds, and keeps them. Returns how many.
    pub fn peek(&self, to: &mut [u8]) -> usize {
        self.chain.copy_out(to)
    }

    /// Consumes `count` bytes unread, or all there are.
    pub fn skip(&mut self, count: usize) {
        self.chain.consume(count);
    }

    /// Copies the first `N` bytes out and consumes them: an integer, say, or a small header. `None`
    /// when there are fewer, which are kept.
    ///
    /// ```
    /// # let path = std::env::temp_dir().join(format!("shmipc-doc-array-{}", std::process::id()));
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
    /// let mut message = stream.recv().await?.expect("a message");
    /// assert_eq!(message.read_array().map(u16::from_be_bytes), Some(0x6865)); // "he"
    /// assert_eq!(message.read_array::<4>(), None); // and there are 3 left
    /// # std::io::Result::Ok(()) }).unwrap().join().unwrap().unwrap();
    /// ```
    #[inline]
    pub fn read_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let bytes = self.peek_array()?;
        self.skip(N);
        Some(bytes)
    }

    /// The first `N` bytes, as [`read_array`](Self::read_array) gives them, which are kept.
    #[inline]
    pub fn peek_array<const N: usize>(&self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        (self.peek(&mut bytes) == N).then_some(bytes)
    }

    /// Takes the first `count` bytes, or all there are, off as a message of their own.
    ///
    /// Whole slices change hands. A cut inside a slice copies what stands before it in that slice
    /// into another one; when there is none, all that is taken off is copied into private memory.
    /// So each part that is kept occupies a slice at least: small parts are better
    /// [read](Self::read).
    pub fn split_to(&mut self, count: usize) -> Message {
        Message { chain: self.chain.split_to(count) }
    }

    /// A [`Buf`](bytes::Buf) over the bytes where they are, which consumes them.
    ///
    /// [`into_bytes`](Self::into_bytes) makes one of a copy, also for peers that are not trusted.
    ///
    /// # Errors
    ///
    /// [`Error::NotTrusted`]: the token does not speak for the peer of this session.
    pub fn buf<'a>(&'a mut self, trust: &'a PeerTrust) -> Result<MessageBuf<'a>> {
        if self.chain.views(trust).is_none() {
            return Err(Error::NotTrusted);
        }
        Ok(MessageBuf { chain: &mut self.chain, trust })
    }

    /// Copies everything into private memory and gives the slices back.
    pub fn into_bytes(self) -> Bytes {
        self.chain.into_bytes()
    }

    /// Looks at the bytes where they are, slice by slice.
    ///
    /// # Errors
    ///
    /// [`Error::NotTrusted`]: the token does not speak for the peer of this session.
    #[inline]
    pub fn views<'a>(&'a self, trust: &'a PeerTrust) -> Result<Views<'a>> {
        self.chain.views(trust).map(Views).ok_or(Error::NotTrusted)
    }
}

/// The bytes of a [`Message`] as a [`Buf`], where they are: see [`Message::buf`]. Slices go back as
/// they are consumed.
///
/// ```
/// use bytes::Buf;
/// use shmipc_glommio::{Listener, PeerTrust};
///
/// // SAFETY: both sides are this program. Neither writes to what it has sent.
/// let trust = unsafe { PeerTrust::new_unchecked() };
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-buf-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(move || async move {
/// # let config = shmipc_glommio::Config::builder().buffer_size(1 << 20).queue_capacity(64);
/// # let config = config.build().unwrap();
/// let listener = Listener::bind(&path, config.clone())?.trust_peer(&trust);
/// # let session = shmipc_glommio::Connector::new(config).connect(&path).await?;
/// # let peer = listener.accept().await?;
/// # let mut other = session.open_stream()?;
/// # for text in ["hello", " world"] {
/// #     let mut loan = other.alloc(text.len()).await?;
/// #     loan.write(text.as_bytes());
/// #     other.send(loan).await?;
/// # }
/// # let mut stream = peer.accept().await?;
/// let mut message = stream.recv().await?.expect("a message");
/// let mut bytes = message.buf(&trust)?;
/// assert_eq!((bytes.get_u8(), bytes.get_u16_le(), bytes.remaining()), (b'h', 0x6c65, 2));
/// # std::io::Result::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
pub struct MessageBuf<'a> {
    chain: &'a mut Chain,
    trust: &'a PeerTrust,
}

impl Buf for MessageBuf<'_> {
    fn remaining(&self) -> usize {
        self.chain.len()
    }

    fn chunk(&self) -> &[u8] {
        // The promise was checked when this was made.
        let mut views = self.chain.views(self.trust).into_iter().flatten();
        views.find(|view| !view.is_empty()).unwrap_or_default()
    }

    /// # Panics
    ///
    /// As [`Buf`] asks for it: when there are fewer bytes.
    fn advance(&mut self, count: usize) {
        assert!(count <= self.remaining(), "advance by {count} of {} bytes", self.remaining());
        self.chain.consume(count);
    }
}

/// The bytes of a [`Message`], slice by slice.
///
/// ```
/// use shmipc_glommio::{Listener, PeerTrust};
///
/// // SAFETY: both sides are this program. Neither writes to what it has sent.
/// let trust = unsafe { PeerTrust::new_unchecked() };
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-views-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(move || async move {
/// # let config = shmipc_glommio::Config::builder().buffer_size(1 << 20).queue_capacity(64);
/// # let config = config.build().unwrap();
/// let listener = Listener::bind(&path, config.clone())?.trust_peer(&trust);
/// # let session = shmipc_glommio::Connector::new(config).connect(&path).await?;
/// # let peer = listener.accept().await?;
/// # let mut other = session.open_stream()?;
/// # for text in ["hello", " world"] {
/// #     let mut loan = other.alloc(text.len()).await?;
/// #     loan.write(text.as_bytes());
/// #     other.send(loan).await?;
/// # }
/// # let mut stream = peer.accept().await?;
/// let message = stream.recv().await?.expect("a message");
/// let vowels = message.views(&trust)?.flatten().filter(|byte| b"aeiou".contains(byte)).count();
/// assert_eq!(vowels, 2); // of "hello"
/// # std::io::Result::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
pub struct Views<'a>(SliceViews<'a>);

impl<'a> Iterator for Views<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        self.0.next()
    }
}

/// Reading consumes; the end of the message is the end.
impl std::io::Read for Message {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        Ok(Self::read(self, to))
    }
}

impl std::fmt::Debug for Loan {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Loan")
            .field("len", &self.len())
            .field("capacity", &self.capacity())
            .field("is_shared", &self.is_shared())
            .finish()
    }
}

impl std::fmt::Debug for Message {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Message")
            .field("len", &self.len())
            .field("is_shared", &self.is_shared())
            .finish()
    }
}
