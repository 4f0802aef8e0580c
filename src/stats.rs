// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a session counted.
//!
//! Counters are plain integers owned by the session's core; reading them costs nothing but a copy.
//! One counts what other threads do, and is an atomic; it orders nothing.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use shmipc_core::shm::pool::SliceUsage;

/// A session's counters at one moment. All of them only grow.
///
/// ```
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-stats-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(|| async move {
/// # let config = shmipc_glommio::Config::builder().buffer_size(1 << 20).queue_capacity(64);
/// # let config = config.build().unwrap();
/// # let listener = shmipc_glommio::Listener::bind(&path, config.clone())?;
/// # let session = shmipc_glommio::Connector::new(config).connect(&path).await?;
/// # let peer = listener.accept().await?;
/// # let mut stream = session.open_stream()?;
/// let before = session.stats();
/// let mut loan = stream.alloc(1000).await?;
/// loan.write(&[7; 1000]);
/// stream.send(loan).await?;
/// let now = session.stats();
/// assert_eq!(now.bytes_sent - before.bytes_sent, 1000);
/// if now.fallback_sent > before.fallback_sent {
///     println!("the buffer memory is too small for what is under way");
/// }
/// # std::io::Result::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct SessionStats {
    /// Events put into the send queue: messages and closes.
    pub events_sent: u64,
    /// Events taken from the receive queue.
    pub events_received: u64,
    /// Payload bytes sent through shared memory.
    pub bytes_sent: u64,
    /// Payload bytes received through shared memory.
    pub bytes_received: u64,
    /// Wake-ups sent, by SyncEvent or eventfd, one for each time the peer had to be woken.
    pub sync_events_sent: u64,
    /// Wake-ups received, by SyncEvent or eventfd. Several that came before they were looked at are
    /// one of an eventfd.
    pub sync_events_received: u64,
    /// FallbackData messages sent, because the pool had run empty.
    pub fallback_sent: u64,
    /// FallbackData messages received.
    pub fallback_received: u64,
    /// Times that a sender found the send queue full and waited.
    pub queue_full: u64,
    /// Times that a sender found no free slice and waited.
    pub pool_empty: u64,
    /// Times that a sender found the peer's reader too far behind and waited.
    pub window_full: u64,
    /// Times that this side told the peer how far a reader is.
    pub credits_sent: u64,
    /// Times that this side stopped looking at its queue until it is woken: after it had found
    /// nothing for as long as it polls, and with no other session that the core polls for.
    pub sleeps: u64,
    /// Tasks of [`serve_streams`](crate::Session::serve_streams) that ended with an error.
    pub failed_streams: u64,
    /// Tasks of [`serve_streams`](crate::Session::serve_streams) that panicked.
    pub panicked_streams: u64,
    /// Times that another thread woke the task that reads this session's socket, a task of
    /// [`serve_streams`](crate::Session::serve_streams), or under a [`Server`](crate::Server) the
    /// session's handler. Each costs both threads microseconds. This crate does not do that; a
    /// handler that waits for other threads does.
    pub cross_core_wakes: u64,
}

/// The free slices of a session's buffer memory.
///
/// ```
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-pool-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(|| async move {
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
/// let message = stream.recv().await?.expect("a message");
/// // Its slice is held until it is read or dropped.
/// let usage = peer.pool_usage();
/// assert!(usage.held > 0 && !usage.is_full());
/// for list in &usage.lists {
///     println!("{} of {} slices of {} bytes", list.free, list.total, list.slice_capacity);
/// }
/// # drop(message);
/// # std::io::Result::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolUsage {
    /// One entry per list, smallest slices first. Where each side has lists of its own, all of the
    /// client's come before all of the server's.
    pub lists: Vec<SliceUsage>,
    /// Slices that received or half-written messages of this side hold.
    pub held: u32,
}

impl PoolUsage {
    /// Whether every slice of every list is free, in the list itself or in this side's magazine.
    pub fn is_full(&self) -> bool {
        self.held == 0
            && self.lists.iter().all(|list| {
                i64::from(list.free) + i64::from(list.magazine) == i64::from(list.total)
            })
    }
}

macro_rules! counters {
    ($($name:ident),* $(,)?) => {
        /// The counters themselves.
        #[derive(Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: Count,)*
            /// The only counter that other threads write.
            pub(crate) cross_core_wakes: Arc<AtomicU64>,
        }

        impl Counters {
            pub(crate) fn get(&self) -> SessionStats {
                SessionStats {
                    $($name: self.$name.get(),)*
                    cross_core_wakes: self.cross_core_wakes.load(Ordering::Relaxed),
                }
            }
        }
    };
}

counters! {
    events_sent,
    events_received,
    bytes_sent,
    bytes_received,
    sync_events_sent,
    sync_events_received,
    fallback_sent,
    fallback_received,
    queue_full,
    pool_empty,
    window_full,
    credits_sent,
    sleeps,
    failed_streams,
    panicked_streams,
}

/// A number that only grows.
#[derive(Default)]
pub(crate) struct Count(Cell<u64>);

impl Count {
    #[inline]
    pub(crate) fn get(&self) -> u64 {
        self.0.get()
    }

    #[inline]
    pub(crate) fn add(&self, count: u64) {
        self.0.set(self.0.get().wrapping_add(count));
    }
}
