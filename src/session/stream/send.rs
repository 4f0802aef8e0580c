// SPDX-License-Identifier: MIT OR Apache-2.0
//! The futures with which memory is borrowed for a message, and the message is sent.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use crate::session::stream::loan::Loan;
use crate::session::stream::write_half::WriteHalf;
use shmipc_core::error::Result;
use shmipc_core::proto::stream_state::DataPath;
use shmipc_core::shm::chain::Chain;

/// A half for one operation. When that ends, or is given up, it waits for nothing any more.
pub(crate) struct EndsWait<'a>(pub(crate) &'a mut WriteHalf);

impl Drop for EndsWait<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.end_wait();
    }
}

/// Waits for memory to write a message into: see [`Stream::alloc`](crate::Stream::alloc).
///
/// ```
/// use futures_lite::future::poll_once;
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-alloc-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(move || async move {
/// # let config = shmipc_glommio::Config::builder().buffer_size(1 << 20).queue_capacity(64);
/// # let config = config.build().unwrap();
/// # let listener = shmipc_glommio::Listener::bind(&path, config.clone())?;
/// # let session = shmipc_glommio::Connector::new(config).connect(&path).await?;
/// # let peer = listener.accept().await?;
/// # let mut stream = session.open_stream()?;
/// // Memory that is there now: nothing is waited for.
/// if let Some(loan) = poll_once(stream.alloc(5)).await {
///     let mut loan = loan?;
///     loan.write(b"hello");
///     stream.send(loan).await?;
/// }
/// # assert_eq!(peer.accept().await?.recv().await?.unwrap().into_bytes(), "hello");
/// # std::io::Result::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
#[must_use = "futures do nothing unless they are awaited"]
pub struct AllocFuture<'a> {
    half: EndsWait<'a>,
    len: usize,
}

impl<'a> AllocFuture<'a> {
    #[inline]
    pub(crate) fn new(half: &'a mut WriteHalf, len: usize) -> Self {
        Self { half: EndsWait(half), len }
    }
}

impl Future for AllocFuture<'_> {
    type Output = Result<Loan>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let len = self.len;
        self.half.0.poll_alloc(context, len)
    }
}

/// Sends a message: see [`Stream::send`](crate::Stream::send).
///
/// ```
/// use futures_lite::future::poll_once;
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-send-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(move || async move {
/// # let config = shmipc_glommio::Config::builder().buffer_size(1 << 20).queue_capacity(64);
/// # let config = config.build().unwrap();
/// # let listener = shmipc_glommio::Listener::bind(&path, config.clone())?;
/// # let session = shmipc_glommio::Connector::new(config).connect(&path).await?;
/// # let peer = listener.accept().await?;
/// # let mut stream = session.open_stream()?;
/// let mut loan = stream.alloc(5).await?;
/// loan.write(b"hello");
/// // Now or not at all. What was not sent is given back.
/// match poll_once(stream.send(loan)).await {
///     Some(sent) => sent?,
///     None => println!("the peer is far behind"),
/// }
/// # assert_eq!(peer.accept().await?.recv().await?.unwrap().into_bytes(), "hello");
/// # std::io::Result::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
#[must_use = "futures do nothing unless they are awaited"]
pub struct SendFuture<'a> {
    half: EndsWait<'a>,
    /// Until it is sent, all at once: nothing is waited for between two parts of a message.
    chain: Option<Chain>,
}

impl Future for SendFuture<'_> {
    type Output = Result<()>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(chain) = self.chain.take() {
            match self.half.0.send_now(chain)? {
                None => return Poll::Ready(Ok(())),
                left => self.chain = left,
            }
        }
        self.get_mut().poll_slowly(context)
    }
}

impl<'a> SendFuture<'a> {
    #[inline]
    pub(crate) fn new(half: &'a mut WriteHalf, chain: Chain) -> Self {
        Self { half: EndsWait(half), chain: Some(chain) }
    }

    #[inline(never)]
    fn poll_slowly(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        while let Some(chain) = &self.chain {
            let is_shared = chain.is_shared();
            // Also when the stream fell back after the loan was made: in order, it can only follow
            // that way.
            if ready!(self.half.0.poll_path(context))? == DataPath::Socket {
                return self.poll_socket(context);
            }
            ready!(self.half.0.poll_room(context))?;
            let Some(mut chain) = self.chain.take() else { break };
            if !is_shared {
                chain = self.half.0.move_to_memory(chain, context)?;
            }
            if !chain.is_shared() {
                self.half.0.fall_back();
                self.chain = Some(chain);
                return self.poll_socket(context);
            }
            self.chain = self.half.0.send_now(chain)?;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_socket(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        let len = self.chain.as_ref().map_or(0, Chain::len);
        ready!(self.half.0.poll_socket_room(context, len))?;
        if let Some(chain) = self.chain.take() {
            self.half.0.send_whole_over_socket(&chain.into_bytes());
        }
        Poll::Ready(Ok(()))
    }
}
