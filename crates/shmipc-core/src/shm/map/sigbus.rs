// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guard against `SIGBUS`: what happens when a page of shared memory turns out not to be there.
//!
//! A peer can truncate a file that both have mapped, and a file system can run out of memory for a
//! page that was never touched. Whoever touches such a page gets the signal `SIGBUS`, which ends
//! the process. Here a handler puts zeroes where the region was, so that the access goes through,
//! and marks the region [lost](Guarded::is_lost); its session ends at its next turn. To everything
//! else that reads the region this is a peer that wrote zeroes, which it has to bear anyway.
//!
//! The handler is installed when the first region is mapped, and the signal unblocked on each
//! thread that maps one: regions do not leave their threads. Signals that are not about a region go
//! to the handler that was there before, the standard library's for instance.
//!
//! `unsafe` here: installing a signal handler, the handler itself, and mapping over a region.
//!
//! # What the handler relies on
//!
//! It may run at any instruction of any thread, so it takes no lock and allocates nothing: it walks
//! a list of chunks that only ever grows, and reads each slot under a version number (a sequence
//! lock), which it skips while somebody writes it. The slot of the region that faulted is not being
//! written: a region is entered before it is used and struck out after.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, Once, OnceLock, PoisonError};

use nix::libc;
use nix::sys::signal::{SigSet, Signal};

/// How many regions one allocation has room for.
const SLOTS: usize = 64;

/// Whether there is to be a handler: whichever of the two comes first, the first region or
/// [`disable_sigbus_guard`], decides, once.
static CHOICE: AtomicU8 = AtomicU8::new(UNDECIDED);
const UNDECIDED: u8 = 0;
const GUARDED: u8 = 1;
const DISABLED: u8 = 2;
static INSTALLED: Once = Once::new();

/// Decides, unless that is done. What it is.
fn choose(choice: u8) -> u8 {
    // Relaxed, both: the decision is all that is told, and orders nothing else.
    match CHOICE.compare_exchange(UNDECIDED, choice, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => choice,
        Err(earlier) => earlier,
    }
}

/// What was there before.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();
/// The first of the chunks, of which none is ever freed.
static CHUNKS: AtomicPtr<Chunk> = AtomicPtr::new(ptr::null_mut());
/// Slots that no region has. Whoever writes a slot holds this lock.
static FREE: Mutex<Vec<&'static Slot>> = Mutex::new(Vec::new());

struct Chunk {
    slots: [Slot; SLOTS],
    next: *mut Chunk,
}

/// Where a region lies.
struct Slot {
    /// Odd while the slot is written.
    version: AtomicU32,
    base: AtomicUsize,
    /// 0: no region.
    len: AtomicUsize,
    is_lost: AtomicBool,
}

impl Slot {
    const fn new() -> Self {
        Self {
            version: AtomicU32::new(0),
            base: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            is_lost: AtomicBool::new(false),
        }
    }

    /// The caller holds the lock of [`FREE`].
    fn write(&self, base: usize, len: usize) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        // Pairs with the acquire fence in `read`: who sees one of the stores below sees the odd
        // version, too, when it looks for the second time.
        fence(Ordering::Release);
        self.base.store(base, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        // Pairs with the acquire load in `read`: who sees this version sees what was stored.
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    /// Base and length that belong together, unless somebody is writing them.
    fn read(&self) -> Option<(usize, usize)> {
        let version = self.version.load(Ordering::Acquire);
        let range = (self.base.load(Ordering::Relaxed), self.len.load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        let is_whole = version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version;
        is_whole.then_some(range)
    }
}

/// A mapped range for which `SIGBUS` is caught, until this is dropped.
pub(super) struct Guarded {
    slot: &'static Slot,
}

impl Guarded {
    /// Guards a range that was mapped on the thread that will use it, unless the guard is
    /// [disabled](disable_sigbus_guard).
    pub(super) fn new(base: usize, len: usize) -> Option<Self> {
        if choose(GUARDED) == DISABLED {
            return None;
        }
        INSTALLED.call_once(install);
        unblock();
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = free.pop().unwrap_or_else(|| {
            let next = CHUNKS.load(Ordering::Relaxed);
            let chunk = Chunk { slots: [const { Slot::new() }; SLOTS], next };
            let chunk: &'static mut Chunk = Box::leak(Box::new(chunk));
            let place = ptr::from_mut(chunk);
            // Pairs with the acquire load in `find`. The lock keeps others from adding one.
            CHUNKS.store(place, Ordering::Release);
            // SAFETY: just leaked, so it lives for ever, and from now on it is only read.
            let chunk: &'static Chunk = unsafe { &*place };
            free.extend(&chunk.slots[1..]);
            &chunk.slots[0]
        });
        slot.is_lost.store(false, Ordering::Relaxed);
        slot.write(base, len);
        Some(Self { slot })
    }

    /// Whether the range is lost: it is private memory now, full of zeroes at first.
    #[inline]
    pub(super) fn is_lost(&self) -> bool {
        // Relaxed: set by a handler that ran on this thread, in the middle of an access.
        self.slot.is_lost.load(Ordering::Relaxed)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        self.slot.write(0, 0);
        free.push(self.slot);
    }
}

/// Has this crate leave the signal `SIGBUS` alone, in the whole process.
///
/// Without being told so, the first session installs a handler for it. A peer that truncates the
/// memory which it shares with us, or a file system without room for a page of it, raises the
/// signal here, and its default is to end the process. The handler puts zeroes where the memory
/// was, and ends the session with [`MemoryError::Lost`](crate::MemoryError::Lost). Every `SIGBUS`
/// that is not about shared memory of this crate goes to the handler that was there before. So a
/// handler that the program installs later has to pass on what it does not know, too.
///
/// Call this before anything else when the program has a handler that deals with it, or when all
/// memory is known to stay: sealed memfd memory of this crate does.
///
/// Returns `false` when it is too late: a session has been made, and the handler stays, for
/// sessions to come as well.
///
/// # Threads that block signals
///
/// A thread that blocks `SIGBUS` dies of a page that is not there, handler or not. So the signal is
/// unblocked on each thread that makes a session, also where the program has blocked all signals to
/// wait for them on another thread. What touches memory of a session runs on that thread only. A
/// program that blocks the signal again is not guarded on that thread.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// assert!(shmipc_glommio::disable_sigbus_guard());
/// ```
pub fn disable_sigbus_guard() -> bool {
    choose(DISABLED) == DISABLED
}

/// Lets this thread be told of pages that are not there. A signal of the kernel's for what a thread
/// does itself is never put off: one that is blocked ends the process.
fn unblock() {
    let mut bus = SigSet::empty();
    bus.add(Signal::SIGBUS);
    if let Err(error) = bus.thread_unblock() {
        tracing::warn!(%error, "no guard against SIGBUS on this thread");
    }
}

fn install() {
    // SAFETY: the structures are plain data that the calls below fill or read, for which zero is a
    // valid value of every field. The handler is one that may run at any time; see the page.
    let result = unsafe {
        let mut previous: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut previous) != 0 {
            Err(std::io::Error::last_os_error())
        } else {
            // Before it is needed. Nobody else gets here.
            let _ = PREVIOUS.set(previous);
            let mut action: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_bus_error;
            action.sa_sigaction = handler as libc::sighandler_t;
            // What the other one asked for, it gets when it is called from here.
            action.sa_mask = previous.sa_mask;
            let kept = previous.sa_flags & (libc::SA_NODEFER | libc::SA_RESTART);
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | kept;
            match libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        }
    };
    if let Err(error) = result {
        tracing::warn!(%error, "no guard against SIGBUS");
    }
}

/// The handler. Runs on the thread that touched the page, in the middle of the access.
extern "C" fn on_bus_error(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid `siginfo_t`; the place of `errno` is always there.
    let (code, address, errno) =
        unsafe { ((*info).si_code, (*info).si_addr() as usize, *libc::__errno_location()) };
    // Above 0 it is the kernel that speaks of an address; others can send the signal as well.
    let is_ours = code > 0 && find(address).is_some_and(replace);
    if !is_ours {
        pass_on(code, signal, info, context);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// The slot of the region that an address is in.
fn find(address: usize) -> Option<&'static Slot> {
    let mut chunk = CHUNKS.load(Ordering::Acquire);
    // SAFETY: null, or a chunk that was leaked and is not written any more.
    while let Some(here) = unsafe { chunk.as_ref() } {
        let holds = |slot: &&Slot| {
            slot.read()
                .is_some_and(|(base, len)| address.checked_sub(base).is_some_and(|at| at < len))
        };
        if let Some(slot) = here.slots.iter().find(holds) {
            return Some(slot);
        }
        chunk = here.next;
    }
    None
}

/// Puts zeroes where the region was. All of it: part of a mapping of huge pages could not be
/// replaced. Whether it was done.
fn replace(slot: &'static Slot) -> bool {
    let Some((base, len)) = slot.read() else { return false };
    slot.is_lost.store(true, Ordering::Relaxed);
    // SAFETY: the range is that of a region, which stays mapped until it has been struck out; the
    // thread that faulted is inside an access to it. Nobody has a reference into it whose contents
    // a peer could not change as well. `mmap` is a plain system call.
    let place = unsafe {
        libc::mmap(
            ptr::with_exposed_provenance_mut(base),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    place != libc::MAP_FAILED
}

/// Does what would have been done without this handler.
fn pass_on(code: c_int, signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let previous = PREVIOUS.get();
    match previous.map_or(libc::SIG_DFL, |previous| previous.sa_sigaction) {
        // Nobody can ignore a fault: the kernel would end the process.
        libc::SIG_IGN if code <= 0 => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: zeroes are the default action with an empty mask. The access faults again
            // when this returns, and a signal that somebody sent comes again, by `raise`.
            unsafe {
                let default: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, &raw const default, ptr::null_mut());
                if code <= 0 {
                    libc::raise(signal);
                }
            }
        }
        handler => {
            let takes_info = previous.is_some_and(|p| p.sa_flags & libc::SA_SIGINFO != 0);
            // SAFETY: it was installed as a handler of this kind, and is called as the kernel would
            // have called it.
            unsafe {
                if takes_info {
                    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                        std::mem::transmute(handler);
                    handler(signal, info, context);
                } else {
                    let handler: extern "C" fn(c_int) = std::mem::transmute(handler);
                    handler(signal);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::process::ExitStatusExt;
    use std::path::Path;
    use std::process::{Command, ExitStatus};

    use super::*;
    use crate::shm::map::memory::Memory;
    use crate::shm::map::region::Region;

    /// A mapped region whose file can still be truncated, and that file.
    fn truncatable(len: usize) -> (Region, File) {
        let name = c"fault-test";
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let file = File::from(nix::sys::memfd::memfd_create(name, flags).unwrap());
        file.set_len(len as u64).unwrap();
        let region = Region::map_descriptor(file.try_clone().unwrap().into(), "buffer", 1 << 30);
        (region.unwrap(), file)
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn truncated_memory_reads_as_zeroes_and_is_lost() {
        alone("truncated_memory_reads_as_zeroes_and_is_lost", truncate);
    }

    fn truncate() {
        const LEN: usize = 1 << 20;
        let (region, file) = truncatable(LEN);
        let (other, _file) = truncatable(LEN);
        for region in [&region, &other] {
            region.store_u32(LEN - 4, 7, Ordering::Relaxed);
        }
        file.set_len(4096).unwrap();
        assert_eq!(region.load_u32(LEN - 8192, Ordering::Relaxed), 0);
        assert!(region.is_lost() && !other.is_lost());
        region.copy_in(0, &[1; 100]);
        let mut all = vec![9; LEN];
        region.copy_out(0, &mut all);
        assert_eq!(all.iter().map(|&byte| usize::from(byte)).sum::<usize>(), 100);
        assert_eq!(other.load_u32(LEN - 4, Ordering::Relaxed), 7);
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn every_kind_of_access_survives() {
        alone("every_kind_of_access_survives", access_in_every_way);
    }

    fn access_in_every_way() {
        let accesses: [fn(&Region); 7] = [
            |region| region.store_u8(8192, 1, Ordering::Relaxed),
            |region| _ = region.fetch_add_u32(8192, 1, Ordering::AcqRel),
            |region| _ = region.compare_exchange_u32(8192, 0, 1),
            |region| region.store_i64(8196, -1),
            |region| _ = region.load_i64(8196),
            |region| region.copy_in(4000, &[1; 9000]),
            |region| region.copy_within(0, 8000, 4000),
        ];
        for access in accesses {
            let (region, file) = truncatable(16384);
            file.set_len(0).unwrap();
            access(&region);
            assert!(region.is_lost());
        }
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn threads_lose_their_own_regions_while_others_come_and_go() {
        alone("threads_lose_their_own_regions_while_others_come_and_go", lose_in_threads);
    }

    fn lose_in_threads() {
        std::thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || {
                    for round in 0..200 {
                        // More than one chunk holds.
                        let kept: Vec<_> = (0..20).map(|_| truncatable(8192)).collect();
                        let doomed = (round * 7 + thread) % kept.len();
                        kept[doomed].1.set_len(0).unwrap();
                        for (region, _) in &kept {
                            region.store_u32(4096, 1, Ordering::Relaxed);
                        }
                        for (index, (region, _)) in kept.iter().enumerate() {
                            assert_eq!(region.is_lost(), index == doomed);
                        }
                    }
                });
            }
        });
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn sealed_memory_cannot_be_lost() {
        let (region, fd) = Region::create_memfd(Path::new("x"), 8192).unwrap();
        assert!(File::from(fd).set_len(0).is_err());
        region.store_u32(4096, 1, Ordering::Relaxed);
        assert!(!region.is_lost());
    }

    const CASE: &str = "SHMIPC_FAULT_TEST";

    /// Runs a test of this file in a process of its own, where it does as `case` says.
    fn in_a_process(test: &str, case: &str) -> ExitStatus {
        let path = format!("{}::{test}", module_path!().split_once("::").unwrap().1);
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &path, "--nocapture", "--test-threads=1"])
            .env(CASE, case)
            .status()
            .unwrap()
    }

    /// Runs `body` in a process of its own. In this one the model checker's generators, which have
    /// a handler of SIGBUS too, may have taken it over.
    fn alone(test: &str, body: fn()) {
        match std::env::var(CASE) {
            Ok(_) => body(),
            Err(_) => assert!(in_a_process(test, "alone").success()),
        }
    }

    /// A mapping that is none of ours, and has no page behind it.
    fn fault_elsewhere() {
        let (region, file) = truncatable(4096);
        drop(region);
        // SAFETY: a new mapping of a file; touching it raises the signal, which is the point.
        unsafe {
            let map = memmap2::MmapOptions::new().len(4096).map_raw(&file).unwrap();
            file.set_len(0).unwrap();
            std::hint::black_box(map.as_ptr().read_volatile());
        }
    }

    static HANDLED: AtomicUsize = AtomicUsize::new(0);

    extern "C" fn with_info(signal: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
        // SAFETY: as the kernel calls it.
        let (inner, code) = unsafe { ((*info).si_signo, (*info).si_code) };
        if signal == libc::SIGBUS && inner == libc::SIGBUS && code == libc::BUS_ADRERR {
            std::process::exit(42);
        }
    }

    extern "C" fn without_info(_: c_int) {
        HANDLED.fetch_add(1, Ordering::Relaxed);
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn other_faults_go_where_they_would_have_gone() {
        use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal};
        let name = "other_faults_go_where_they_would_have_gone";
        let set = |handler, flags| {
            let action = SigAction::new(handler, flags, SigSet::empty());
            // SAFETY: the handlers here may run at any time.
            unsafe { nix::sys::signal::sigaction(Signal::SIGBUS, &action).unwrap() };
        };
        let bus = Signal::SIGBUS as i32;
        match std::env::var(CASE).as_deref() {
            Ok("default") => {
                set(SigHandler::SigDfl, SaFlags::empty());
                fault_elsewhere();
            }
            Ok("standard library") => fault_elsewhere(),
            Ok("ignored") => {
                set(SigHandler::SigIgn, SaFlags::empty());
                drop(truncatable(4096));
                nix::sys::signal::raise(Signal::SIGBUS).unwrap();
                fault_elsewhere();
            }
            Ok("sent") => {
                set(SigHandler::SigDfl, SaFlags::empty());
                drop(truncatable(4096));
                nix::sys::signal::raise(Signal::SIGBUS).unwrap();
            }
            Ok("with info") => {
                set(SigHandler::SigAction(with_info), SaFlags::SA_SIGINFO);
                fault_elsewhere();
            }
            Ok("without info") => {
                set(SigHandler::Handler(without_info), SaFlags::empty());
                drop(truncatable(4096));
                nix::sys::signal::raise(Signal::SIGBUS).unwrap();
                assert_eq!(HANDLED.load(Ordering::Relaxed), 1);
                std::process::exit(43);
            }
            Ok("disabled") => {
                assert!(disable_sigbus_guard());
                let (region, file) = truncatable(4096);
                file.set_len(0).unwrap();
                region.store_u32(0, 1, Ordering::Relaxed);
            }
            Ok("blocked") => {
                // As programs do that wait for their signals on one thread.
                SigSet::all().thread_block().unwrap();
                let lose = || {
                    let (region, file) = truncatable(4096);
                    file.set_len(0).unwrap();
                    region.store_u32(0, 1, Ordering::Relaxed);
                    assert!(region.is_lost());
                };
                lose();
                // Threads start as their parents are.
                SigSet::all().thread_block().unwrap();
                std::thread::spawn(lose).join().unwrap();
                std::process::exit(44);
            }
            Ok("disabled too late") => {
                drop(truncatable(4096));
                assert!(!disable_sigbus_guard());
                let (region, file) = truncatable(4096);
                file.set_len(0).unwrap();
                region.store_u32(0, 1, Ordering::Relaxed);
                assert!(region.is_lost() && !disable_sigbus_guard());
                std::process::exit(45);
            }
            Ok(other) => panic!("{other}"),
            Err(_) => {
                assert_eq!(in_a_process(name, "blocked").code(), Some(44));
                assert_eq!(in_a_process(name, "disabled too late").code(), Some(45));
                for case in ["default", "standard library", "ignored", "sent", "disabled"] {
                    assert_eq!(in_a_process(name, case).signal(), Some(bus), "{case}");
                }
                assert_eq!(in_a_process(name, "with info").code(), Some(42));
                assert_eq!(in_a_process(name, "without info").code(), Some(43));
            }
        }
    }
}
