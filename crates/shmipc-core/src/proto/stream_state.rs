// SPDX-License-Identifier: MIT OR Apache-2.0
//! The state of one stream (spec 6.2; `docs/protocol.md#closing-a-stream`).
//!
//! Each side ends its own direction, or the whole stream. Others have a number for the first
//! ("half-closed"), but none of them sends it or understands it; whether the peer does is for the
//! caller to know.

use std::cell::Cell;

/// How far one side has gone towards the end of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HalfState {
    /// It may send.
    Open,
    /// It sends nothing more, and still reads.
    HalfClosed,
    /// It neither sends nor reads.
    Closed,
    /// As closed, and what it sent must not be taken for all there was.
    Reset,
}

impl HalfState {
    /// Whether it neither sends nor reads any more.
    #[inline]
    pub fn is_gone(self) -> bool {
        matches!(self, Self::Closed | Self::Reset)
    }
}

/// Which way data of this stream goes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataPath {
    /// Slices, and an event in the IO queue.
    SharedMemory,
    /// FallbackData over the socket.
    Socket,
}

/// What has to be done when this side ends something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseNotice {
    /// The peer must be told, behind all that was sent on this path.
    Tell(DataPath),
    /// The peer has closed already, or knows.
    Nothing,
}

/// The life of a stream, as this side sees it.
#[derive(Debug)]
pub struct StreamState {
    here: Cell<HalfState>,
    peer: Cell<HalfState>,
    path: Cell<DataPath>,
    /// Whether this side reads only what has come by now.
    is_drained: Cell<bool>,
}

impl Default for StreamState {
    fn default() -> Self {
        Self::new()
    }
}

impl StreamState {
    /// A stream that is open in both directions.
    pub const fn new() -> Self {
        Self {
            here: Cell::new(HalfState::Open),
            peer: Cell::new(HalfState::Open),
            path: Cell::new(DataPath::SharedMemory),
            is_drained: Cell::new(false),
        }
    }

    /// The state of the direction from here.
    #[inline]
    pub fn here(&self) -> HalfState {
        self.here.get()
    }

    /// The state of the direction from the peer.
    #[inline]
    pub fn peer(&self) -> HalfState {
        self.peer.get()
    }

    /// Which way data goes now.
    #[inline]
    pub fn path(&self) -> DataPath {
        self.path.get()
    }

    /// Whether what this side sends reaches a reader.
    #[inline]
    pub fn can_send(&self) -> bool {
        self.here.get() == HalfState::Open && !self.peer.get().is_gone()
    }

    /// Whether neither side has ended anything.
    pub fn is_open(&self) -> bool {
        self.here.get() == HalfState::Open && self.peer.get() == HalfState::Open
    }

    /// Whether something may still come that this side reads.
    #[inline]
    pub fn can_receive(&self) -> bool {
        let may_come = self.peer.get() == HalfState::Open && !self.is_drained.get();
        !self.here.get().is_gone() && may_come
    }

    /// This side waits for nothing more: behind what has come is the end, as if the peer had ended
    /// its direction.
    pub fn drain(&self) {
        self.is_drained.set(true);
    }

    /// From now on this stream sends over the socket.
    pub fn fall_back(&self) {
        self.path.set(DataPath::Socket);
    }

    /// From now on it sends through shared memory again: the peer has taken all that went over the
    /// socket.
    pub fn return_to_memory(&self) {
        self.path.set(DataPath::SharedMemory);
    }

    /// This side sends nothing more.
    pub fn half_close(&self) -> CloseNotice {
        if self.here.get() != HalfState::Open {
            return CloseNotice::Nothing;
        }
        self.here.set(HalfState::HalfClosed);
        self.tell_unless_closed()
    }

    /// This side closes.
    pub fn close(&self) -> CloseNotice {
        match self.here.replace(HalfState::Closed) {
            HalfState::Closed | HalfState::Reset => CloseNotice::Nothing,
            HalfState::Open | HalfState::HalfClosed => self.tell_unless_closed(),
        }
    }

    fn tell_unless_closed(&self) -> CloseNotice {
        match self.peer.get() {
            HalfState::Closed | HalfState::Reset => CloseNotice::Nothing,
            HalfState::Open | HalfState::HalfClosed => CloseNotice::Tell(self.path.get()),
        }
    }

    /// The peer sends nothing more.
    pub fn peer_half_closed(&self) {
        if self.peer.get() == HalfState::Open {
            self.peer.set(HalfState::HalfClosed);
        }
    }

    /// The peer has closed.
    pub fn peer_closed(&self) {
        if !self.peer.get().is_gone() {
            self.peer.set(HalfState::Closed);
        }
    }

    /// The peer has ended the stream as a failure. A close says that all had been sent before, and
    /// nothing comes behind one.
    pub fn peer_reset(&self) {
        if !self.peer.get().is_gone() {
            self.peer.set(HalfState::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peer_is_told_once_and_on_the_path_of_the_data() {
        let life = StreamState::new();
        life.fall_back();
        assert_eq!(life.close(), CloseNotice::Tell(DataPath::Socket));
        assert_eq!(life.close(), CloseNotice::Nothing);
        assert_eq!(life.half_close(), CloseNotice::Nothing);
        assert!(!life.can_send() && !life.can_receive());
    }

    #[test]
    fn a_peer_that_closed_is_not_told() {
        let life = StreamState::new();
        life.peer_closed();
        assert!(!life.can_send() && !life.can_receive());
        assert_eq!(life.close(), CloseNotice::Nothing);
    }

    #[test]
    fn a_drained_stream_is_read_to_its_end_and_still_sends() {
        let life = StreamState::new();
        life.drain();
        assert!(life.can_send() && !life.can_receive());
        assert_eq!(life.peer(), HalfState::Open);
        assert_eq!(life.close(), CloseNotice::Tell(DataPath::SharedMemory));
    }

    #[test]
    fn a_reset_is_a_close_that_stays_one_of_its_kind() {
        let life = StreamState::new();
        life.peer_half_closed();
        life.peer_reset();
        assert!(!life.can_send() && !life.can_receive());
        life.peer_closed();
        assert_eq!(life.peer(), HalfState::Reset);
        assert_eq!(life.close(), CloseNotice::Nothing);

        let life = StreamState::new();
        life.peer_closed();
        life.peer_reset();
        assert_eq!(life.peer(), HalfState::Closed, "it had sent everything");
    }

    #[test]
    fn each_direction_ends_for_itself() {
        let life = StreamState::new();
        assert_eq!(life.half_close(), CloseNotice::Tell(DataPath::SharedMemory));
        assert_eq!(life.half_close(), CloseNotice::Nothing);
        assert!(!life.can_send() && life.can_receive());
        life.peer_half_closed();
        assert!(!life.can_receive());
        assert_eq!(
            life.close(),
            CloseNotice::Tell(DataPath::SharedMemory),
            "its table waits for it"
        );

        let life = StreamState::new();
        life.peer_half_closed();
        assert!(life.can_send() && !life.can_receive());
        life.peer_closed();
        life.peer_half_closed();
        assert_eq!(life.peer(), HalfState::Closed);
    }
}
