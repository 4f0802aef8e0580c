// SPDX-License-Identifier: MIT OR Apache-2.0
//! Loads, stores and copies in shared memory, by offset.
//!
//! Invariants: no reference to shared memory leaves this file, and no access leaves the region. An
//! offset that comes from the peer is checked by the caller, who can name what was wrong with it;
//! the bounds checks here are the second line and panic only on a mistake of this crate.
//!
//! Data races. The fields of headers are read and written as relaxed or stronger atomics, so a
//! peer that writes at the same time gives a stale or a fresh value, never undefined behaviour.
//! Payload is copied byte-wise between private memory and the region; a peer that rewrites payload
//! under the copy scrambles its own bytes, and no invariant of this process rests on them.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use crate::shm::map::memory::{
    Memory, ODD_FIELDS, is_exchangeable, is_one_access, load_halves, store_halves,
};
use crate::shm::map::region::Region;

/// Everything unsafe in this file rests on the promise of [`Region`]: its bytes stay mapped,
/// readable and writable as long as it lives, and nobody forms a reference to them.
impl Region {
    /// A pointer to `len` bytes at `at`, all of them inside.
    #[inline(always)]
    fn pointer(&self, at: usize, len: usize) -> *mut u8 {
        let inside = self.len().checked_sub(len).is_some_and(|last| at <= last);
        assert!(inside, "access outside the shared memory: {len} bytes at {at}");
        // SAFETY: `at + len <= self.len()`, checked above, so the result stays inside the region.
        unsafe { self.base().as_ptr().add(at) }
    }

    /// A reference to payload.
    ///
    /// # Safety
    ///
    /// This side holds the slice that the bytes are in, and nothing writes to them while the
    /// reference lives: no [`Self::view_mut`] of them lives, and the peer is one that a
    /// [`PeerTrust`] speaks for.
    #[inline(always)]
    pub(in crate::shm) unsafe fn view(&self, at: usize, len: usize) -> &[u8] {
        // SAFETY: inside and mapped, checked by `pointer`; nobody writes, promised by the caller.
        unsafe { std::slice::from_raw_parts(self.pointer(at, len), len) }
    }

    /// A reference through which payload can be written.
    ///
    /// # Safety
    ///
    /// As [`Self::view`], and no other reference to these bytes lives.
    #[inline(always)]
    #[allow(clippy::mut_from_ref, reason = "the caller holds the slice, and there is one holder")]
    pub(in crate::shm) unsafe fn view_mut(&self, at: usize, len: usize) -> &mut [u8] {
        // SAFETY: inside and mapped, checked by `pointer`; nobody else reads or writes, promised by
        // the caller.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(at, len), len) }
    }

    /// For 32-bit fields that are not at a multiple of four.
    #[cold]
    #[inline(never)]
    fn odd_pointer(&self, at: usize) -> *mut u32 {
        assert!(ODD_FIELDS || at.is_multiple_of(4), "misaligned 32-bit field at {at}");
        self.pointer(at, 4).cast()
    }

    /// The same for one that is exchanged.
    #[cold]
    #[inline(never)]
    fn exchanged_pointer(&self, at: usize) -> *mut u32 {
        assert!(is_exchangeable(at), "a lock on the field at {at} would split");
        self.odd_pointer(at)
    }

    #[cold]
    #[inline(never)]
    fn load_odd_words<const N: usize>(&self, at: usize) -> [u32; N] {
        std::array::from_fn(|index| odd::load(self.odd_pointer(at + 4 * index)))
    }

    #[cold]
    #[inline(never)]
    fn store_odd_words<const N: usize>(&self, at: usize, words: [u32; N]) {
        for (index, word) in words.into_iter().enumerate() {
            odd::store(self.odd_pointer(at + 4 * index), word, Ordering::Relaxed);
        }
    }

    #[inline(always)]
    fn u32(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4), "misaligned 32-bit field at {at}");
        // SAFETY: `pointer` checked the bounds, the line above the alignment (a region starts at a
        // multiple of 64), and the bytes are only ever accessed atomically.
        unsafe { AtomicU32::from_ptr(self.pointer(at, 4).cast()) }
    }

    #[inline(always)]
    fn words<const N: usize>(&self, at: usize) -> &[AtomicU32; N] {
        assert!(at.is_multiple_of(4), "misaligned 32-bit fields at {at}");
        // SAFETY: as in `u32`, for all N at once; an array has no padding.
        unsafe { &*self.pointer(at, 4 * N).cast() }
    }

    #[inline(always)]
    fn u8(&self, at: usize) -> &AtomicU8 {
        // SAFETY: `pointer` checked the bounds, and a byte needs no alignment.
        unsafe { AtomicU8::from_ptr(self.pointer(at, 1)) }
    }
}

impl Memory for Region {
    #[inline(always)]
    fn len(&self) -> usize {
        Self::len(self)
    }

    #[inline]
    fn is_lost(&self) -> bool {
        Self::is_lost(self)
    }

    #[inline(always)]
    fn load_u32(&self, at: usize, order: Ordering) -> u32 {
        if !at.is_multiple_of(4) {
            return odd::load(self.odd_pointer(at));
        }
        self.u32(at).load(order)
    }

    #[inline(always)]
    fn store_u32(&self, at: usize, value: u32, order: Ordering) {
        if !at.is_multiple_of(4) {
            return odd::store(self.odd_pointer(at), value, order);
        }
        self.u32(at).store(value, order);
    }

    #[inline(always)]
    fn swap_u32(&self, at: usize, value: u32, order: Ordering) -> u32 {
        if !at.is_multiple_of(4) {
            return odd::swap(self.exchanged_pointer(at), value);
        }
        self.u32(at).swap(value, order)
    }

    #[inline(always)]
    fn fetch_add_u32(&self, at: usize, value: u32, order: Ordering) -> u32 {
        if !at.is_multiple_of(4) {
            return odd::fetch_add(self.exchanged_pointer(at), value);
        }
        self.u32(at).fetch_add(value, order)
    }

    #[inline(always)]
    fn compare_exchange_u32(&self, at: usize, current: u32, new: u32) -> Result<u32, u32> {
        if !at.is_multiple_of(4) {
            return odd::compare_exchange(self.exchanged_pointer(at), current, new);
        }
        self.u32(at).compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
    }

    #[inline(always)]
    fn load_words<const N: usize>(&self, at: usize) -> [u32; N] {
        if !at.is_multiple_of(4) {
            return self.load_odd_words(at);
        }
        self.words(at).each_ref().map(|word| word.load(Ordering::Relaxed))
    }

    #[inline(always)]
    fn store_words<const N: usize>(&self, at: usize, words: [u32; N]) {
        if !at.is_multiple_of(4) {
            return self.store_odd_words(at, words);
        }
        for (field, word) in self.words::<N>(at).iter().zip(words) {
            field.store(word, Ordering::Relaxed);
        }
    }

    #[inline(always)]
    fn load_u8(&self, at: usize, order: Ordering) -> u8 {
        self.u8(at).load(order)
    }

    #[inline(always)]
    fn store_u8(&self, at: usize, value: u8, order: Ordering) {
        self.u8(at).store(value, order);
    }

    #[inline(always)]
    fn load_i64(&self, at: usize) -> i64 {
        if !is_one_access(at) {
            return load_halves(self, at);
        }
        packed::load(self.pointer(at, 8).cast())
    }

    #[inline(always)]
    fn store_i64(&self, at: usize, value: i64) {
        if !is_one_access(at) {
            return store_halves(self, at, value);
        }
        packed::store(self.pointer(at, 8).cast(), value);
    }

    #[inline(always)]
    fn full_fence(&self) {
        full_fence();
    }

    #[inline(always)]
    fn copy_in(&self, at: usize, from: &[u8]) {
        // SAFETY: `pointer` checked the destination, `from` is a valid source, and they cannot
        // overlap, since no Rust reference points into the region. On races see the module's page.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), self.pointer(at, from.len()), from.len());
        }
    }

    #[inline(always)]
    fn copy_out(&self, at: usize, to: &mut [u8]) {
        // SAFETY: as in `copy_in`, the other way round.
        unsafe {
            std::ptr::copy_nonoverlapping(self.pointer(at, to.len()), to.as_mut_ptr(), to.len());
        }
    }

    fn copy_within(&self, from: usize, to: usize, len: usize) {
        // SAFETY: `pointer` checked both; `copy` allows them to overlap. On races see the module's
        // page.
        unsafe { std::ptr::copy(self.pointer(from, len), self.pointer(to, len), len) };
    }

    #[inline(always)]
    fn relax(&self) {
        std::hint::spin_loop();
    }

    #[inline(always)]
    fn prefetch(&self, at: usize) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        if at < Self::len(self) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: a prefetch reads nothing and cannot fault; the address is inside anyway.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.base().as_ptr().add(at).cast()) };
        }
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        let _ = at;
    }
}

/// 8-byte accesses at multiples of four, which no Rust atomic may do.
///
/// The callers have checked that the eight bytes are mapped, and that they are read and written in
/// one go ([`is_one_access`]).
#[cfg(all(target_arch = "x86_64", not(miri)))]
mod packed {
    use std::arch::asm;

    #[inline(always)]
    pub(super) fn load(pointer: *const i64) -> i64 {
        let value;
        // SAFETY: the bytes are mapped (checked by `Region::pointer`); a `mov` inside a cache line
        // is atomic on x86-64 at any alignment, and a load acquires. Without `nomem` and `readonly`
        // the compiler moves no other access over it.
        unsafe {
            asm!("mov {value}, qword ptr [{pointer}]",
                value = out(reg) value, pointer = in(reg) pointer,
                options(nostack, preserves_flags));
        }
        value
    }

    #[inline(always)]
    pub(super) fn store(pointer: *mut i64, value: i64) {
        // SAFETY: as in `load`; a store releases on x86-64.
        unsafe {
            asm!("mov qword ptr [{pointer}], {value}",
                value = in(reg) value, pointer = in(reg) pointer,
                options(nostack, preserves_flags));
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", not(miri))))]
mod packed {
    use std::sync::atomic::{AtomicI64, Ordering};

    #[inline(always)]
    pub(super) fn load(pointer: *mut i64) -> i64 {
        // SAFETY: mapped, and aligned: here that is what `is_one_access` asks for.
        unsafe { AtomicI64::from_ptr(pointer) }.load(Ordering::Acquire)
    }

    #[inline(always)]
    pub(super) fn store(pointer: *mut i64, value: i64) {
        // SAFETY: as in `load`.
        unsafe { AtomicI64::from_ptr(pointer) }.store(value, Ordering::Release);
    }
}

/// 32-bit accesses at any offset, which no Rust atomic may do.
///
/// A field inside one cache line is read and written in one go. One that crosses two may be torn;
/// it is one that nobody writes while another reads it, or one that is checked.
#[cfg(all(target_arch = "x86_64", not(miri)))]
mod odd {
    use std::arch::asm;
    use std::sync::atomic::Ordering;

    pub(super) fn load(pointer: *const u32) -> u32 {
        let value;
        // SAFETY: the bytes are mapped (checked by `Region::pointer`); a load acquires. Without
        // `nomem` and `readonly` the compiler moves no other access over it.
        unsafe {
            asm!("mov {value:e}, dword ptr [{pointer}]",
                value = out(reg) value, pointer = in(reg) pointer,
                options(nostack, preserves_flags));
        }
        value
    }

    pub(super) fn store(pointer: *mut u32, value: u32, _: Ordering) {
        // SAFETY: as in `load`; a store releases on x86-64. No caller asks for more.
        unsafe {
            asm!("mov dword ptr [{pointer}], {value:e}",
                value = in(reg) value, pointer = in(reg) pointer,
                options(nostack, preserves_flags));
        }
    }

    pub(super) fn swap(pointer: *mut u32, mut value: u32) -> u32 {
        // SAFETY: as in `load`, inside one cache line (checked by the caller); an exchange with
        // memory is locked, and orders everything.
        unsafe {
            asm!("xchg dword ptr [{pointer}], {value:e}",
                value = inout(reg) value, pointer = in(reg) pointer,
                options(nostack, preserves_flags));
        }
        value
    }

    pub(super) fn fetch_add(pointer: *mut u32, mut value: u32) -> u32 {
        // SAFETY: as in `swap`.
        unsafe {
            asm!("lock xadd dword ptr [{pointer}], {value:e}",
                value = inout(reg) value, pointer = in(reg) pointer, options(nostack));
        }
        value
    }

    pub(super) fn compare_exchange(pointer: *mut u32, current: u32, new: u32) -> Result<u32, u32> {
        let found: u32;
        // SAFETY: as in `swap`.
        unsafe {
            asm!("lock cmpxchg dword ptr [{pointer}], {new:e}",
                new = in(reg) new, pointer = in(reg) pointer, inout("eax") current => found,
                options(nostack));
        }
        if found == current { Ok(found) } else { Err(found) }
    }
}

#[cfg(not(all(target_arch = "x86_64", not(miri))))]
mod odd {
    use std::sync::atomic::Ordering;

    // `Region::odd_pointer` has panicked: `ODD_FIELDS` is false, and no memory with such fields is
    // mapped.
    pub(super) fn load(_: *const u32) -> u32 {
        unreachable!()
    }

    pub(super) fn store(_: *mut u32, _: u32, _: Ordering) {
        unreachable!()
    }

    pub(super) fn swap(_: *mut u32, _: u32) -> u32 {
        unreachable!()
    }

    pub(super) fn fetch_add(_: *mut u32, _: u32) -> u32 {
        unreachable!()
    }

    pub(super) fn compare_exchange(_: *mut u32, _: u32, _: u32) -> Result<u32, u32> {
        unreachable!()
    }
}

/// A full fence; on x86-64 a locked instruction, which takes an eighth of the time of `mfence`.
#[inline(always)]
pub fn full_fence() {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: adds nothing to the word at the top of the stack, which is always mapped; without
    // `nomem` the compiler moves no access over it.
    unsafe {
        std::arch::asm!("lock or dword ptr [rsp], 0", options(nostack));
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    std::sync::atomic::fence(Ordering::SeqCst);
}
