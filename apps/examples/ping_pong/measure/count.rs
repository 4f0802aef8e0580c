//! What an operation costs besides time: system calls and allocations of this process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use perf_event::events::Tracepoint;
use perf_event::{Builder, Counter};

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// The system's allocator, which counts how often it is asked.
pub(crate) struct CountingAllocator;

// SAFETY: everything is handed on to the system's allocator; counting changes nothing.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

/// What was counted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cost {
    pub(crate) allocations: u64,
    pub(crate) syscalls: Option<u64>,
}

impl Cost {
    const NOTHING: Self = Self { allocations: 0, syscalls: None };
}

/// The kernel's tracepoint at the entry of every system call: root only, and only where the tracing
/// file system is mounted (`mount -t tracefs nodev /sys/kernel/tracing`).
fn syscall_tracepoint() -> Option<Tracepoint> {
    let roots = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
    let read = |root| std::fs::read_to_string(format!("{root}/events/raw_syscalls/sys_enter/id"));
    let id = roots.into_iter().find_map(|root| read(root).ok())?;
    Some(Tracepoint::with_id(id.trim().parse().ok()?))
}

/// The system calls of the thread that is measured, and of those that it starts. Absent where the
/// kernel shows no tracepoints, or does not let us look.
static SYSCALLS: Mutex<Option<Counter>> = Mutex::new(None);
/// What had been counted when the measuring began and ended.
static WINDOW: Mutex<(Cost, Cost)> = Mutex::new((Cost::NOTHING, Cost::NOTHING));

/// From here on it is this thread whose system calls are counted.
pub(crate) fn watch_this_thread() {
    let counter = syscall_tracepoint().and_then(|event| {
        let mut counter = Builder::new(event).inherit(true).include_kernel().build().ok()?;
        counter.enable().ok()?;
        Some(counter)
    });
    *lock(&SYSCALLS) = counter;
}

fn so_far() -> Cost {
    let syscalls = lock(&SYSCALLS).as_mut().and_then(|counter| counter.read().ok());
    Cost { allocations: ALLOCATIONS.load(Ordering::Relaxed), syscalls }
}

/// Set-up and warming are over.
pub(crate) fn begin() {
    lock(&WINDOW).0 = so_far();
}

/// The last operation is over.
pub(crate) fn end() {
    let now = so_far();
    lock(&WINDOW).1 = now;
}

/// What was counted from the last [`begin`] to the last [`end`].
pub(crate) fn between() -> Cost {
    let (begin, end) = *lock(&WINDOW);
    Cost {
        allocations: end.allocations.saturating_sub(begin.allocations),
        syscalls: end.syscalls.zip(begin.syscalls).map(|(end, begin)| end.saturating_sub(begin)),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nobody panics while counting")
}
