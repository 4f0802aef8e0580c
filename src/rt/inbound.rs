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
    fn len(&self) -> usize {
        match self {
            Self::Slices(chain) => chain.len(),
            Self::Bytes(bytes) => bytes.len(),
        }
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
        if let Segment::Bytes(bytes) = &segment {
            self.socket_len += bytes.len();
        }
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
            copied += match front {
                Segment::Slices(chain) => chain.read(&mut to[copied..]),
                Segment::Bytes(bytes) => {
                    let count = bytes.len().min(to.len() - copied);
                    bytes.copy_to_slice(&mut to[copied..copied + count]);
                    self.socket_len -= count;
                    count
                }
            };
            if front.len() == 0 {
                self.segments.pop_front();
            }
        }
        self.len -= copied;
        copied
    }

    /// Throws everything away.
    pub(super) fn clear(&mut self) {
        self.segments.clear();
        self.len = 0;
        self.socket_len = 0;
    }
}
