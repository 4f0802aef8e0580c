// SPDX-License-Identifier: MIT OR Apache-2.0
//! Messages as values: memory that is lent to be written, and memory that has arrived.
//!
//! Both own their slices. A loan that is dropped, and a message that is read or dropped, give them
//! back; there is no ritual to forget.

use bytes::{Buf, Bytes};

use super::inbound::Segment;
use crate::error::{Error, Result};
use crate::shm::access::PeerTrust;
use crate::shm::chain::{Chain, SliceViews, SpareViews};

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
    #[inline]
    pub(super) fn new(memory: LoanMemory, capacity: usize, trust: Option<u64>) -> Self {
        Self { memory, capacity, trust }
    }

    /// How many bytes can be written in all.
    #[inline]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many bytes have been written.
    #[inline]
    pub fn len(&self) -> usize {
        match &self.memory {
            LoanMemory::Slices(chain) => chain.len(),
            LoanMemory::Private(bytes) => bytes.len(),
        }
    }

    /// Whether nothing has been written.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many bytes can still be written.
    #[inline]
    pub fn remaining(&self) -> usize {
        self.capacity - self.len()
    }

    /// Whether the loan is shared memory, and not private memory that goes over the socket.
    pub fn is_shared(&self) -> bool {
        matches!(self.memory, LoanMemory::Slices(_))
    }

    /// Copies bytes behind those that were written, as many as there is room for. Gives how many.
    #[inline]
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
    #[inline]
    pub fn views<'a>(&'a mut self, trust: &'a PeerTrust) -> Result<ViewsMut<'a>> {
        if self.trust != Some(trust.id()) {
            return Err(Error::NotTrusted);
        }
        let remaining = self.remaining();
        let room = match &mut self.memory {
            LoanMemory::Slices(chain) => Room::Slices(chain.spare_views(trust)),
            LoanMemory::Private(bytes) => {
                let written = bytes.len();
                bytes.resize(self.capacity, 0);
                Room::Private(Some(&mut bytes[written..]))
            }
        };
        Ok(ViewsMut { room, remaining })
    }

    /// Counts `count` bytes that were written through [`views`](Self::views), or as many as there
    /// is room for.
    #[inline]
    pub fn advance(&mut self, count: usize) {
        let count = count.min(self.remaining());
        match &mut self.memory {
            LoanMemory::Slices(chain) => chain.advance(count),
            LoanMemory::Private(bytes) => bytes.resize(bytes.len() + count, 0),
        }
    }
}

/// The room in a [`Loan`], slice by slice.
pub struct ViewsMut<'a> {
    room: Room<'a>,
    remaining: usize,
}

enum Room<'a> {
    Slices(SpareViews<'a>),
    Private(Option<&'a mut [u8]>),
}

impl<'a> Iterator for ViewsMut<'a> {
    type Item = &'a mut [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a mut [u8]> {
        let view = match &mut self.room {
            Room::Slices(views) => views.next(),
            Room::Private(bytes) => bytes.take(),
        }?;
        let count = view.len().min(self.remaining);
        self.remaining -= count;
        (count > 0).then(|| &mut view[..count])
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
    #[inline]
    pub(super) fn new(segment: Segment, trust: Option<u64>) -> Self {
        Self { segment, trust }
    }

    /// How many bytes there are to read.
    #[inline]
    pub fn len(&self) -> usize {
        self.segment.len()
    }

    /// Whether everything was read.
    #[inline]
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
    #[inline]
    pub fn views<'a>(&'a self, trust: &'a PeerTrust) -> Result<Views<'a>> {
        if self.trust != Some(trust.id()) {
            return Err(Error::NotTrusted);
        }
        Ok(match &self.segment {
            Segment::Slices(chain) => Views(Part::Slices(chain.views(trust))),
            Segment::Bytes(bytes) => Views(Part::Private(Some(bytes))),
        })
    }
}

/// The bytes of a [`Message`], slice by slice.
pub struct Views<'a>(Part<'a>);

enum Part<'a> {
    Slices(SliceViews<'a>),
    Private(Option<&'a [u8]>),
}

impl<'a> Iterator for Views<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        match &mut self.0 {
            Part::Slices(views) => views.next(),
            Part::Private(bytes) => bytes.take(),
        }
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
