//! What an operation costs besides time: system calls and allocations of this process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

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

/// Counts from its creation on, for the thread that made it and those that it starts.
pub(crate) struct Costs {
    allocations: u64,
    /// Absent where the kernel shows no tracepoints, or does not let us look.
    syscalls: Option<Counter>,
}

/// What was counted.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cost {
    pub(crate) allocations: u64,
    pub(crate) syscalls: Option<u64>,
}

/// The kernel's tracepoint at the entry of every system call: root only, and only where the tracing
/// file system is mounted (`mount -t tracefs nodev /sys/kernel/tracing`).
fn syscall_tracepoint() -> Option<Tracepoint> {
    let roots = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
    let read = |root| std::fs::read_to_string(format!("{root}/events/raw_syscalls/sys_enter/id"));
    let id = roots.into_iter().find_map(|root| read(root).ok())?;
    Some(Tracepoint::with_id(id.trim().parse().ok()?))
}

impl Costs {
    pub(crate) fn start() -> Self {
        let syscalls = syscall_tracepoint().and_then(|event| {
            let mut counter = Builder::new(event).inherit(true).include_kernel().build().ok()?;
            counter.enable().ok()?;
            Some(counter)
        });
        Self { allocations: ALLOCATIONS.load(Ordering::Relaxed), syscalls }
    }

    pub(crate) fn stop(mut self) -> Cost {
        let allocations = ALLOCATIONS.load(Ordering::Relaxed) - self.allocations;
        let syscalls = self.syscalls.as_mut().and_then(|counter| {
            counter.disable().ok()?;
            counter.read().ok()
        });
        Cost { allocations, syscalls }
    }
}
