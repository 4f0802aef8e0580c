// SPDX-License-Identifier: MIT OR Apache-2.0
//! Payload that tells where it belongs: no two positions of a message, no two messages, streams or
//! directions look alike, so a byte at the wrong place is seen.

/// Who sends a message.
#[derive(Clone, Copy)]
pub(crate) enum Way {
    Request = 1,
    Reply = 2,
}

/// The bytes of a message.
pub(crate) fn payload(way: Way, stream: u32, message: u32, len: usize) -> Vec<u8> {
    let seed = mix(u64::from(stream) << 34 | u64::from(message) << 2 | way as u64);
    let mut bytes = vec![0; len];
    // A word at a time, since a debug build that makes single bytes takes seconds for all of them.
    for (index, word) in bytes.chunks_mut(8).enumerate() {
        let value = seed.wrapping_add((index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
    }
    bytes
}

fn mix(value: u64) -> u64 {
    let spread = value.wrapping_mul(0xD6E8_FEB8_6659_FD93);
    (spread ^ (spread >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93)
}

/// Stops the test unless every byte is the right one, and says which is not.
pub(crate) fn check(got: &[u8], way: Way, stream: u32, message: u32) {
    let expected = payload(way, stream, message, got.len());
    if got != expected {
        let wrong = got.iter().zip(&expected).position(|(a, b)| a != b);
        let len = got.len();
        panic!("stream {stream}, message {message} of {len} bytes: wrong from byte {wrong:?}");
    }
}
