// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a stream has received and its reader has not yet taken, in the order of arrival.

use std::collections::VecDeque;

use bytes::{Buf, Bytes};

use crate::shm::chain::Chain;

/// One flush of the peer.
pub(super) enum Segment {
    /// Through shared memory. The slices go back as they are read.
    Slices(Chain),
    /// Over the socket.
    Bytes(Bytes),
}

impl Segment {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Slices(chain) => chain.len(),
            Self::Bytes(bytes) => bytes.len(),
        }
    }

    /// Copies the first bytes out, as many as `to` holds, and consumes them.
    pub(super) fn read(&mut self, to: &mut [u8]) -> usize {
        match self {
            Self::Slices(chain) => chain.read(to),
            Self::Bytes(bytes) => {
                let count = bytes.len().min(to.len());
                bytes.copy_to_slice(&mut to[..count]);
                count
            }
        }
    }

    /// How many bytes of it came over the socket.
    pub(super) fn socket_len(&self) -> usize {
        match self {
            Self::Slices(_) => 0,
            Self::Bytes(bytes) => bytes.len(),
        }
    }
}

impl std::fmt::Debug for Segment {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = if self.socket_len() > 0 { "Bytes" } else { "Slices" };
        formatter.debug_struct(name).field("len", &self.len()).finish_non_exhaustive()
    }
}

/// A queue of segments.
#[derive(Default)]
pub(super) struct Inbound {
    segments: VecDeque<Segment>,
    len: usize,
    /// How much of it came over the socket.
    socket_len: usize,
}

impl Inbound {
    pub(super) fn push(&mut self, segment: Segment) {
        self.len += segment.len();
        self.socket_len += segment.socket_len();
        // One without bytes gives its slices back here.
        if segment.len() > 0 {
            self.segments.push_back(segment);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn socket_len(&self) -> usize {
        self.socket_len
    }

    /// Copies out the first bytes, as many as `to` holds. Gives how many.
    pub(super) fn read(&mut self, to: &mut [u8]) -> usize {
        let mut copied = 0;
        while copied < to.len() {
            let Some(front) = self.segments.front_mut() else {
                break;
            };
            let before = front.socket_len();
            copied += front.read(&mut to[copied..]);
            self.socket_len -= before - front.socket_len();
            if front.len() == 0 {
                self.segments.pop_front();
            }
        }
        self.len -= copied;
        copied
    }

    /// Takes the oldest flush as a whole.
    pub(super) fn pop(&mut self) -> Option<Segment> {
        let segment = self.segments.pop_front()?;
        self.len -= segment.len();
        self.socket_len -= segment.socket_len();
        Some(segment)
    }

    /// Throws everything away.
    pub(super) fn clear(&mut self) {
        self.segments.clear();
        self.len = 0;
        self.socket_len = 0;
    }
}
