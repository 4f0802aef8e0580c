// SPDX-License-Identifier: MIT OR Apache-2.0
//! What two sides of this crate do beyond versions 2 and 3 of the protocol
//! (`docs/protocol.md#extension-of-this-crate`).
//!
//! Those versions negotiate nothing. Two bytes of the buffer memory's header are unused, and zero
//! with every other implementation; here the client puts one byte there when it lays the memory
//! out, and the server the other when it maps it. A side that finds a zero
//! speaks the protocol as it is, and so does one that finds something it does not know.
//!
//! Between two that know each other:
//!
//! - A stream may be [half-closed](super::EventState::HalfClosed).
//! - A stream may be [reset](super::Event::is_reset): closed as a failure. A side of this crate
//!   that does not know that yet takes it for a close.
//! - A reader gives [credit](super::EventState::Credit) for what it has taken, and a sender does
//!   not send more than the reader's window. A sender that had to use the socket goes back to
//!   shared memory when the reader has taken what went that way. An event of credit for 0 bytes
//!   asks for the credit that the other side keeps until it is worth an event, and opens a stream
//!   that nothing was sent on. It is [answered](super::READER_WAITS_STATUS) when a reader waits on
//!   the stream. A side of this crate that does not know that yet never answers so, and does not
//!   open the stream.
//! - A client tells of streams that it closed and never used, so that the server need not remember
//!   that their numbers were passed over.
//!
//! Trust: none. A peer that lies about its window deceives itself.

/// One side's byte: bit 7 is set, bits 5 and 6 are zero, bits 0 to 4 are the window's logarithm.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::wire::Extension;
///
/// let ours = Extension::with_window(3 << 20);
/// assert_eq!(ours.window(), 2 << 20); // the power of two below
/// assert_eq!(Extension::from_byte(ours.to_byte()), Some(ours));
/// // What another implementation leaves there.
/// assert_eq!(Extension::from_byte(0), None);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extension {
    /// The window of each stream of this side, as a power of two of bytes.
    window_log2: u8,
}

impl Extension {
    const MARK: u8 = 0x80;
    const SMALLEST: u8 = 12;
    const LARGEST: u8 = 31;

    /// For a window of the power of two at or below `window`, between 4 KiB and 2 GiB.
    pub fn with_window(window: u64) -> Self {
        let log2 = window.max(1).ilog2() as u8;
        Self { window_log2: log2.clamp(Self::SMALLEST, Self::LARGEST) }
    }

    /// How much of a stream may wait unread, in bytes of slices.
    pub const fn window(self) -> u64 {
        1 << self.window_log2
    }

    /// The byte in the header.
    pub const fn to_byte(self) -> u8 {
        Self::MARK | self.window_log2
    }

    /// What the peer's byte says. `None`: nothing that this side knows.
    pub const fn from_byte(byte: u8) -> Option<Self> {
        let window_log2 = byte & !Self::MARK;
        let is_known =
            byte & Self::MARK != 0 && window_log2 >= Self::SMALLEST && window_log2 <= Self::LARGEST;
        if is_known { Some(Self { window_log2 }) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_is_what_it_was_made_from_or_nothing() {
        let known: Vec<u8> = (0..=u8::MAX)
            .filter(|&byte| {
                let extension = Extension::from_byte(byte);
                extension.is_none_or(|extension| extension.to_byte() == byte) && extension.is_some()
            })
            .collect();
        assert_eq!(known, (0x80 + 12..=0x80 + 31).collect::<Vec<u8>>());
    }

    #[test]
    fn windows_are_powers_of_two() {
        let window = |bytes| Extension::with_window(bytes).window();
        assert_eq!(window(0), 4096);
        assert_eq!(window(3 << 20), 2 << 20);
        assert_eq!(window(u64::MAX), 2 << 30);
    }
}
