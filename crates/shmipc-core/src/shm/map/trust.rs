// SPDX-License-Identifier: MIT OR Apache-2.0
//! The promise that peers keep to the protocol, which references into shared memory rest on.
//!
//! `unsafe` here: making the promise.

use std::sync::atomic::{AtomicU64, Ordering};

/// A promise about the peers of a listener or connector, and with it the right to look at shared
/// memory through references.
///
/// Shared memory stays writable for the peer, also while it is this side's turn. A Rust reference
/// to memory that changes under it is undefined behaviour, so without this token messages are
/// copied. With it, `Message::views` and `Loan::views` give references into the shared memory
/// itself.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::PeerTrust;
///
/// // SAFETY: the store is ours; it writes a slice only between allocating and sending it.
/// let trust = unsafe { PeerTrust::new_unchecked() };
/// // It is for `Connector::trust_peer`, and for those of listeners, clients and servers.
/// # let _ = trust;
/// ```
#[derive(Debug, Clone, Copy)]
pub struct PeerTrust {
    id: u64,
}

impl PeerTrust {
    /// Makes the promise. It holds for the sessions of those listeners and connectors that are told
    /// to be trusting with this token.
    ///
    /// # Safety
    ///
    /// No peer of those sessions writes to a buffer slice that it has not allocated, or that it
    /// has sent and not received back, for as long as this process can hold a reference to it.
    /// This is what every honest implementation of the protocol does; a peer that is buggy or
    /// hostile breaks it, as a program that writes to a file breaks `memmap2`'s promise.
    pub unsafe fn new_unchecked() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        // Relaxed: only the numbers must differ.
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    /// Tells promises apart.
    pub fn id(&self) -> u64 {
        self.id
    }
}
