// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the algorithms ask of a memory, and where fields may stand in it.
//!
//! [`Memory`] is implemented for mapped memory ([`access`](super::access)) and, in tests, for the
//! memory of a model checker.

use std::sync::atomic::Ordering;

/// Shared memory as the algorithms see it.
///
/// All offsets are in bytes from the start. 32-bit fields stand at multiples of four, or on x86-64
/// anywhere, if those that are exchanged stay inside one cache line ([`is_exchangeable`]).
#[allow(clippy::len_without_is_empty, reason = "no memory is empty")]
pub trait Memory {
    /// Bytes of the memory.
    fn len(&self) -> usize;

    /// Whether it is not shared any more, because a page of it was not there.
    fn is_lost(&self) -> bool;

    /// Loads a 32-bit field.
    fn load_u32(&self, at: usize, order: Ordering) -> u32;
    /// Stores a 32-bit field.
    fn store_u32(&self, at: usize, value: u32, order: Ordering);
    /// Exchanges a 32-bit field, and returns what it was.
    fn swap_u32(&self, at: usize, value: u32, order: Ordering) -> u32;
    /// Adds to a 32-bit field, and returns what it was.
    fn fetch_add_u32(&self, at: usize, value: u32, order: Ordering) -> u32;
    /// Compare and swap, acquire and release when it succeeds, acquire when it fails.
    fn compare_exchange_u32(&self, at: usize, current: u32, new: u32) -> Result<u32, u32>;

    /// Relaxed loads of `N` neighbouring 32-bit fields, each for itself.
    fn load_words<const N: usize>(&self, at: usize) -> [u32; N];
    /// Relaxed stores of `N` neighbouring 32-bit fields, each for itself.
    fn store_words<const N: usize>(&self, at: usize, words: [u32; N]);

    /// Loads one byte.
    fn load_u8(&self, at: usize, order: Ordering) -> u8;
    /// Stores one byte.
    fn store_u8(&self, at: usize, value: u8, order: Ordering);

    /// An 8-byte load with acquire ordering, at a multiple of four. In one go if it
    /// [can be](is_one_access), and in halves otherwise ([`load_halves`]).
    fn load_i64(&self, at: usize) -> i64;
    /// An 8-byte store with release ordering, under the same rule.
    fn store_i64(&self, at: usize, value: i64);
    /// Orders every earlier store before every later load, as both sides of the working flag need.
    fn full_fence(&self);

    /// Copies payload into the memory.
    fn copy_in(&self, at: usize, from: &[u8]);
    /// Copies payload out of the memory.
    fn copy_out(&self, at: usize, to: &mut [u8]);
    /// Copies payload from one slice to another one.
    fn copy_within(&self, from: usize, to: usize, len: usize);
    /// Brings the line at `at` near before it is needed. No effect on what is read.
    fn prefetch(&self, at: usize);
    /// Gives way for a moment, in a loop that waits for the other side's next step.
    fn relax(&self);
}

/// Whether an 8-byte field at `at` is read and written in one go.
///
/// On x86-64 a plain 8-byte move inside one cache line is atomic, whatever its alignment; elsewhere
/// it must be aligned.
pub const fn is_one_access(at: usize) -> bool {
    if cfg!(all(target_arch = "x86_64", not(miri))) { at % 64 <= 56 } else { at.is_multiple_of(8) }
}

/// Whether 32-bit fields may stand where they are not aligned. Other machines than x86-64 have no
/// such accesses that are atomic.
pub const ODD_FIELDS: bool = cfg!(all(target_arch = "x86_64", not(miri)));

/// Whether a 32-bit field at `at` can be exchanged: a lock that crosses a cache line stops every
/// processor of the machine, and may be answered with a signal.
pub const fn is_exchangeable(at: usize) -> bool {
    at.is_multiple_of(4) || ODD_FIELDS && at % 64 <= 60
}

/// How often a field is read again whose upper half has changed meanwhile. An honest peer changes
/// it once in 2^32 events.
const HALVES_TRIES: usize = 16;

/// Reads an 8-byte field whose halves are in two cache lines: the upper one, the lower one, and the
/// upper one again, until it has not changed.
///
/// While the writer carries into the upper half, what is read may be neither the old value nor the
/// new one; whoever reads an index checks it, and looks again.
#[cold]
#[inline(never)]
pub fn load_halves<M: Memory>(memory: &M, at: usize) -> i64 {
    let (lower_at, upper_at) = halves(at);
    // Acquire, pairs with the release stores of the halves.
    let load = |at| memory.load_u32(at, Ordering::Acquire);
    let mut upper = load(upper_at);
    let mut lower = 0;
    for _ in 0..HALVES_TRIES {
        lower = load(lower_at);
        let again = load(upper_at);
        if again == upper {
            break;
        }
        upper = again;
    }
    (u64::from(upper) << 32 | u64::from(lower)).cast_signed()
}

/// Writes such a field, the lower half first: in between it is too small and never too large.
#[cold]
#[inline(never)]
pub fn store_halves<M: Memory>(memory: &M, at: usize, value: i64) {
    let (lower_at, upper_at) = halves(at);
    let value = value.cast_unsigned();
    // Release, pairs with the acquire loads of the halves.
    memory.store_u32(lower_at, value as u32, Ordering::Release);
    memory.store_u32(upper_at, (value >> 32) as u32, Ordering::Release);
}

const fn halves(at: usize) -> (usize, usize) {
    if cfg!(target_endian = "little") { (at, at + 4) } else { (at + 4, at) }
}
