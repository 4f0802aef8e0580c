// SPDX-License-Identifier: MIT OR Apache-2.0
//! The elements of an IO queue (spec 6.2; `docs/protocol.md#events`).
//!
//! `stream id u32` · `offset u32` · `status u32`, in the byte order of the host.
//!
//! Invariant: every twelve bytes are an event, and become the same twelve bytes again.
//!
//! Trust: none. An offset is a number from the peer until the buffer manager has checked it.

/// Length of an event in bytes.
pub const EVENT_LEN: usize = 12;

/// What the sender says about the state of its stream.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::wire::EventState;
///
/// // Only the low 8 bits of a status count.
/// assert_eq!(EventState::from_status(0xabcd_ef01), EventState::Closed);
/// assert_eq!(EventState::HalfClosed.to_status(), 2);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventState {
    /// The stream is open, the event carries data.
    Open,
    /// The stream is closed, or [reset](Event::is_reset).
    Closed,
    /// The stream is closed in one direction: the sender sends nothing more.
    HalfClosed,
    /// Of this crate: the sender's reader has taken as many bytes of the stream as the offset says.
    /// Only between two sides that have the [extension](super::Extension).
    Credit,
    /// None that is known.
    Unknown(u8),
}

impl EventState {
    /// The state that a status tells: of an event, or of a FallbackData message.
    pub const fn from_status(status: u32) -> Self {
        // The cast keeps the low 8 bits; the others are undefined.
        match status as u8 {
            0 => Self::Open,
            1 => Self::Closed,
            2 => Self::HalfClosed,
            3 => Self::Credit,
            other => Self::Unknown(other),
        }
    }

    /// A status that tells this state, with the undefined bits at zero.
    pub const fn to_status(self) -> u32 {
        match self {
            Self::Open => 0,
            Self::Closed => 1,
            Self::HalfClosed => 2,
            Self::Credit => 3,
            Self::Unknown(other) => other as u32,
        }
    }
}

/// The status of a stream that its sender ends as a failure: closed, and a mark among the bits that
/// are undefined elsewhere. Only between two sides that have the [extension](super::Extension); for
/// all others it is a close.
pub const RESET_STATUS: u32 = EventState::Closed.to_status() | RESET_MARK;

/// The lowest of the undefined bits.
const RESET_MARK: u32 = 1 << 8;

/// Whether a status, of an event or of a FallbackData message, says that the stream is reset. From
/// a peer without the [extension](super::Extension) it says nothing: the bit is undefined there.
pub const fn is_reset(status: u32) -> bool {
    matches!(EventState::from_status(status), EventState::Closed) && status & RESET_MARK != 0
}

/// The status of [credit](EventState::Credit) that also says that a reader waits on the stream and
/// has taken everything that came, so that a message will be taken at once. The answer to an event
/// of credit for nothing. Not in the spec, and no more than credit for a side of this crate that
/// does not know it.
pub const READER_WAITS_STATUS: u32 = EventState::Credit.to_status() | READER_WAITS_MARK;

const READER_WAITS_MARK: u32 = 1 << 8;

/// An element of an IO queue.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::wire::{Event, EventState};
///
/// // A message of stream 7, whose first slice stands 8192 bytes into the buffer memory.
/// let event = Event { stream_id: 7, offset: 8192, status: EventState::Open.to_status() };
/// assert_eq!(Event::from_bytes(&event.to_bytes()), event);
/// assert_eq!(event.state(), EventState::Open);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Which stream.
    pub stream_id: u32,
    /// The first buffer slice, from the start of the buffer memory.
    pub offset: u32,
    /// The stream's state in the low 8 bits.
    pub status: u32,
}

impl Event {
    /// The state in [`status`](Self::status).
    pub const fn state(&self) -> EventState {
        EventState::from_status(self.status)
    }

    /// Whether the [status](Self::status) says that the stream is [reset](is_reset).
    pub const fn is_reset(&self) -> bool {
        is_reset(self.status)
    }

    /// Whether it is [credit](EventState::Credit) that says that a reader
    /// [waits](READER_WAITS_STATUS).
    pub const fn says_reader_waits(&self) -> bool {
        matches!(self.state(), EventState::Credit) && self.status & READER_WAITS_MARK != 0
    }

    /// The event as the three words that stand in the queue.
    pub const fn to_words(self) -> [u32; 3] {
        [self.stream_id, self.offset, self.status]
    }

    /// The event that three words of a queue are.
    pub const fn from_words([stream_id, offset, status]: [u32; 3]) -> Self {
        Self { stream_id, offset, status }
    }

    /// The event as it stands in the queue's memory.
    pub const fn to_bytes(self) -> [u8; EVENT_LEN] {
        let [i0, i1, i2, i3] = self.stream_id.to_ne_bytes();
        let [o0, o1, o2, o3] = self.offset.to_ne_bytes();
        let [s0, s1, s2, s3] = self.status.to_ne_bytes();
        [i0, i1, i2, i3, o0, o1, o2, o3, s0, s1, s2, s3]
    }

    /// The event that twelve bytes of a queue's memory are.
    pub const fn from_bytes(bytes: &[u8; EVENT_LEN]) -> Self {
        let [i0, i1, i2, i3, o0, o1, o2, o3, s0, s1, s2, s3] = *bytes;
        Self {
            stream_id: u32::from_ne_bytes([i0, i1, i2, i3]),
            offset: u32::from_ne_bytes([o0, o1, o2, o3]),
            status: u32::from_ne_bytes([s0, s1, s2, s3]),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_state_is_in_the_low_eight_bits() {
        let state = |status| Event { stream_id: 2, offset: 0, status }.state();
        assert_eq!(state(0), EventState::Open);
        assert_eq!(state(0xffff_ff00), EventState::Open);
        assert_eq!(state(0xabcd_ef01), EventState::Closed);
        assert_eq!(state(2), EventState::HalfClosed);
        assert_eq!(state(0x103), EventState::Credit);
        assert_eq!(state(0x104), EventState::Unknown(4));
    }

    #[test]
    fn states_become_the_spec_s_numbers_and_states_again() {
        assert_eq!(EventState::Open.to_status(), 0);
        assert_eq!(EventState::Closed.to_status(), 1);
        assert_eq!(EventState::HalfClosed.to_status(), 2);
        for status in 0..=255 {
            assert_eq!(EventState::from_status(status).to_status(), status);
        }
    }

    #[test]
    fn a_reset_is_a_close_with_a_mark() {
        assert_eq!(EventState::from_status(RESET_STATUS), EventState::Closed);
        assert!(is_reset(RESET_STATUS) && is_reset(0xffff_ff01));
        for status in [0, 1, 2, 3, 0x100, 0x102, 0x201, 0xffff_fe01] {
            assert!(!is_reset(status), "{status:#x}");
        }
    }

    #[test]
    fn a_reader_that_waits_is_credit_with_a_mark() {
        let says = |status| Event { stream_id: 2, offset: 0, status }.says_reader_waits();
        assert_eq!(EventState::from_status(READER_WAITS_STATUS), EventState::Credit);
        assert!(says(READER_WAITS_STATUS) && says(0xffff_ff03));
        for status in [0, 1, 2, 3, 0x100, 0x101, 0x102, 0x203, RESET_STATUS] {
            assert!(!says(status), "{status:#x}");
        }
    }

    proptest! {
        #[test]
        fn words_and_bytes_tell_the_same(stream_id: u32, offset: u32, status: u32) {
            let event = Event { stream_id, offset, status };
            prop_assert_eq!(event.to_words(), [stream_id, offset, status]);
            prop_assert_eq!(Event::from_words(event.to_words()), event);
            let expected: Vec<u8> = event.to_words().iter().flat_map(|w| w.to_ne_bytes()).collect();
            prop_assert_eq!(&event.to_bytes()[..], &expected[..]);
            prop_assert_eq!(Event::from_bytes(&event.to_bytes()), event);
        }
    }
}
