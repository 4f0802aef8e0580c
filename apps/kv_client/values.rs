// SPDX-License-Identifier: MIT OR Apache-2.0
//! Numbers and values that look random, and are the same again for the same seed.

use std::ops::Range;

/// How many places a value can start at. With a short value, all of it stays near the processor.
const PLACES: usize = 1 << 14;
/// How far the next version of a value starts from the last: odd, so that it takes [`PLACES`]
/// versions to come to the same place again.
const STRIDE: u64 = 5281;

/// What the generator of Steele, Lea and Flood ("SplitMix") makes of a number.
#[inline]
fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// A sequence of numbers.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// The sequence of a seed, one of many.
    pub(crate) fn new(seed: u64, number: u64) -> Self {
        Self(mix(seed ^ mix(number)))
    }

    #[inline]
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }
}

/// All values: windows into one random block.
///
/// Where a value's window starts depends on its key and version, so a value of another key or
/// version differs in nearly every byte, and to compare is all that it takes to verify.
pub(crate) struct Values {
    block: Vec<u8>,
    len: usize,
}

impl Values {
    /// Values of `len` bytes each.
    pub(crate) fn new(seed: u64, len: usize) -> Self {
        let mut random = Random::new(seed, u64::MAX);
        let mut block = vec![0; len + PLACES];
        for piece in block.chunks_mut(8) {
            piece.copy_from_slice(&random.next().to_le_bytes()[..piece.len()]);
        }
        Self { block, len }
    }

    /// How long every value is.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where a value stands.
    #[inline]
    pub(crate) fn place(&self, connection: u32, key: u32, version: u32) -> Range<usize> {
        let first = mix((u64::from(connection) << 32) | u64::from(key));
        let at = first.wrapping_add(STRIDE.wrapping_mul(version.into())) as usize % PLACES;
        at..at + self.len
    }

    #[inline]
    pub(crate) fn bytes(&self, place: Range<usize>) -> &[u8] {
        &self.block[place]
    }
}
