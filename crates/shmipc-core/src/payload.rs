// SPDX-License-Identifier: MIT OR Apache-2.0
//! Received messages, as a running session sees them, wherever their bytes lie.

/// A received message, or the part of one that a reader has not taken yet.
pub trait Payload {
    /// Whether it has no bytes.
    fn is_empty(&self) -> bool;

    /// What it takes from the sender's window: the capacity of its slices, or its bytes.
    fn occupies(&self) -> u64;

    /// Whether it lies in shared memory.
    fn is_shared(&self) -> bool;

    /// What it costs this side until it is taken, if it came over the socket; otherwise 0.
    fn socket_cost(&self) -> usize;
}

/// What a stream has received and its reader has not taken, oldest first.
pub trait Inbound<P> {
    /// Appends a message. One without bytes is dropped.
    fn push(&mut self, payload: P);

    /// Takes the oldest message.
    fn pop(&mut self) -> Option<P>;

    /// Whether there is none.
    fn is_empty(&self) -> bool;

    /// How many of the bytes came over the socket.
    fn socket_len(&self) -> usize;
}

/// A message whose slices are written for the peer to read, and are the peer's from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SentChain {
    /// Where its first slice starts in the buffer memory.
    pub offset: u32,
    /// How many bytes it has.
    pub len: usize,
    /// What it takes from the stream's window: the capacity of its slices.
    pub occupies: u64,
}
