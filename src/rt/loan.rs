// SPDX-License-Identifier: MIT OR Apache-2.0
//! Messages as values: memory that is lent to be written, and memory that has arrived.
//!
//! Both own their slices. A loan that is dropped, and a message that is read or dropped, give them
//! back; there is no ritual to forget.

use bytes::{Buf, Bytes};

use super::inbound::Segment;
use crate::error::{Error, Result};
use crate::shm::access::PeerTrust;
use crate::shm::chain::Chain;

/// Shared memory to write a message into, lent by [`Stream::alloc`](crate::Stream::alloc) and
/// passed on by [`Stream::send`](crate::Stream::send) without a copy.
///
/// It has one slice when one is large enough, otherwise several. What is sent is what was written,
/// so a loan may be larger than its message. Dropping it gives the memory back.
///
/// When the pool stays empty for as long as [configured](crate::ConfigBuilder::pool_wait), the
/// loan is private memory and goes over the socket; nothing else changes.
#[derive(Debug)]
pub struct Loan {
    pub(super) memory: LoanMemory,
    /// How many bytes were asked for.
    capacity: usize,
    /// Which promise speaks for the peer.
    trust: Option<u64>,
}

pub(super) enum LoanMemory {
    Slices(Chain),
    Private(Vec<u8>),
}

impl Loan {
    pub(super) fn new(memory: LoanMemory, capacity: usize, trust: Option<u64>) -> Self {
        Self { memory, capacity, trust }
    }

    /// How many bytes can be written in all.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many bytes have been written.
    pub fn len(&self) -> usize {
        match &self.memory {
            LoanMemory::Slices(chain) => chain.len(),
            LoanMemory::Private(bytes) => bytes.len(),
        }
    }

    /// Whether nothing has been written.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many bytes can still be written.
    pub fn remaining(&self) -> usize {
        self.capacity - self.len()
    }

    /// Whether the loan is shared memory, and not private memory that goes over the socket.
    pub fn is_shared(&self) -> bool {
        matches!(self.memory, LoanMemory::Slices(_))
    }

    /// Copies bytes behind those that were written, as many as there is room for. Gives how many.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        let bytes = &bytes[..bytes.len().min(self.remaining())];
        match &mut self.memory {
            LoanMemory::Slices(chain) => chain.write(bytes),
            LoanMemory::Private(private) => {
                private.extend_from_slice(bytes);
                bytes.len()
            }
        }
    }

    /// Gives the room behind what was written, slice by slice, to be written in place. Bytes count
    /// as written when [`advance`](Self::advance) says so; they hold something old until then.
    ///
    /// # Errors
    ///
    /// [`Error::NotTrusted`]: the token does not speak for the peer of this session.
    pub fn views<'a>(
        &'a mut self,
        trust: &'a PeerTrust,
    ) -> Result<impl Iterator<Item = &'a mut [u8]>> {
        if self.trust != Some(trust.id()) {
            return Err(Error::NotTrusted);
        }
        let mut remaining = self.remaining();
        let (shared, private) = match &mut self.memory {
            LoanMemory::Slices(chain) => (Some(chain.spare_views(trust)), None),
            LoanMemory::Private(bytes) => {
                let written = bytes.len();
                bytes.resize(self.capacity, 0);
                (None, Some(&mut bytes[written..]))
            }
        };
        let all = shared.into_iter().flatten().chain(private);
        Ok(all.map_while(move |view| {
            let count = view.len().min(remaining);
            remaining -= count;
            (count > 0).then(|| &mut view[..count])
        }))
    }

    /// Counts `count` bytes that were written through [`views`](Self::views), or as many as there
    /// is room for.
    pub fn advance(&mut self, count: usize) {
        let count = count.min(self.remaining());
        match &mut self.memory {
            LoanMemory::Slices(chain) => chain.advance(count),
            LoanMemory::Private(bytes) => bytes.resize(bytes.len() + count, 0),
        }
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

/// One flush of the peer, as [`Stream::recv`](crate::Stream::recv) gives it.
///
/// Its bytes stay in shared memory until they are copied out, or looked at through
/// [`views`](Self::views). Slices go back as they are consumed, and all of them when it is dropped.
#[derive(Debug)]
pub struct Message {
    pub(super) segment: Segment,
    trust: Option<u64>,
}

impl Message {
    pub(super) fn new(segment: Segment, trust: Option<u64>) -> Self {
        Self { segment, trust }
    }

    /// How many bytes there are to read.
    pub fn len(&self) -> usize {
        self.segment.len()
    }

    /// Whether everything was read.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it came through shared memory, and not over the socket.
    pub fn is_shared(&self) -> bool {
        matches!(self.segment, Segment::Slices(_))
    }

    /// Copies the first bytes out, as many as `to` holds, and consumes them. Gives how many.
    pub fn read(&mut self, to: &mut [u8]) -> usize {
        self.segment.read(to)
    }

    /// Copies the first bytes out, as many as `to` holds, and keeps them. Gives how many.
    pub fn peek(&self, to: &mut [u8]) -> usize {
        match &self.segment {
            Segment::Slices(chain) => chain.copy_out(to),
            Segment::Bytes(bytes) => {
                let count = bytes.len().min(to.len());
                to[..count].copy_from_slice(&bytes[..count]);
                count
            }
        }
    }

    /// Consumes `count` bytes unread, or all there are.
    pub fn skip(&mut self, count: usize) {
        match &mut self.segment {
            Segment::Slices(chain) => chain.consume(count),
            Segment::Bytes(bytes) => bytes.advance(count.min(bytes.len())),
        }
    }

    /// Copies everything into private memory and gives the slices back.
    pub fn into_bytes(self) -> Bytes {
        match self.segment {
            Segment::Bytes(bytes) => bytes,
            Segment::Slices(chain) => {
                let mut copy = vec![0; chain.len()];
                chain.copy_out(&mut copy);
                copy.into()
            }
        }
    }

    /// Looks at the bytes where they are, slice by slice.
    ///
    /// # Errors
    ///
    /// [`Error::NotTrusted`]: the token does not speak for the peer of this session.
    pub fn views<'a>(&'a self, trust: &'a PeerTrust) -> Result<impl Iterator<Item = &'a [u8]>> {
        if self.trust != Some(trust.id()) {
            return Err(Error::NotTrusted);
        }
        let (shared, private) = match &self.segment {
            Segment::Slices(chain) => (Some(chain.views(trust)), None),
            Segment::Bytes(bytes) => (None, Some(&bytes[..])),
        };
        Ok(shared.into_iter().flatten().chain(private))
    }
}

/// Reading consumes; the end of the message is the end.
impl std::io::Read for Message {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        Ok(Self::read(self, to))
    }
}

impl std::fmt::Debug for LoanMemory {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Slices(_) => "Slices",
            Self::Private(_) => "Private",
        })
    }
}
