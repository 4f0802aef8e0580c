// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether executors can run here at all: looked at before the first one is made.
//!
//! The runtime panics, or ends the process, where the system does not give it what it takes: rings
//! of io_uring, a thread, a descriptor, a processor. What it says then is not what is wrong. So
//! everything that an executor takes is tried here first, in small, and given back.
//!
//! What is looked at can change a moment later; this is for mistakes, not for races.

use std::fs;
use std::io;
use std::sync::mpsc;

use io_uring::{IoUring, Probe, opcode};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::Resource;
use nix::unistd::Pid;

use shmipc_core::error::{IoUringProblem, ResourceError};
use shmipc_core::limits::limit_of;

/// glommio refuses to start with a limit of locked memory below this.
const MIN_LOCKED_MEMORY: u64 = 512 << 10;
/// What the rings of an executor lock where the kernel counts them by this limit (before 5.12).
const LOCKED_PER_EXECUTOR: u64 = 64 << 10;

/// An executor is a thread, and has one more for calls that block.
const THREADS_PER_EXECUTOR: usize = 2;
/// Descriptors of an executor: three rings and what wakes it, and of this crate's poller a socket
/// pair and a ring; of a server's shard also two sockets that listen, with a duplicate each, and
/// a socket pair.
const DESCRIPTORS_PER_EXECUTOR: u64 = 16;
/// Descriptors of a session while it is made: its socket and a duplicate, the memories, eventfds.
const DESCRIPTORS_TO_CONNECT: u64 = 8;
/// Those that stay: its socket, and two eventfds.
const DESCRIPTORS_PER_SESSION: u64 = 3;

/// The most threads that are started to see whether there may be as many.
const MAX_THREADS_TRIED: usize = 512;
/// The stack of a thread that does nothing.
const SMALL_STACK: usize = 64 << 10;

/// Entries of the ring that is tried.
const ENTRIES: u32 = 8;

/// What is wanted.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Wanted {
    pub(crate) executors: usize,
    /// Threads beside those of executors.
    pub(crate) more_threads: usize,
    pub(crate) sessions: u64,
}

impl Wanted {
    fn threads(self) -> usize {
        self.executors.saturating_mul(THREADS_PER_EXECUTOR).saturating_add(self.more_threads)
    }

    fn descriptors(self) -> u64 {
        let executors = (self.executors as u64).saturating_mul(DESCRIPTORS_PER_EXECUTOR);
        let sessions = self.sessions.saturating_mul(DESCRIPTORS_PER_SESSION);
        let connecting = if self.sessions > 0 { DESCRIPTORS_TO_CONNECT } else { 0 };
        executors.saturating_add(sessions).saturating_add(connecting)
    }
}

/// Looks at everything that executors take, but for processors of their own.
pub(crate) fn check(wanted: Wanted) -> Result<(), ResourceError> {
    if wanted.executors == 0 {
        return Ok(());
    }
    let release = kernel_release();
    let locked = limit_of(Resource::RLIMIT_MEMLOCK);
    fits_locked_memory(wanted.executors as u64, locked, counts_rings(&release))?;
    let used = open_files().unwrap_or(0);
    fits_open_files(wanted.descriptors(), used, limit_of(Resource::RLIMIT_NOFILE))?;
    try_io_uring(&release)?;
    try_threads(wanted.threads())
}

/// Whether threads may be pinned to these processors. Tried on a thread of its own, so that this
/// one stays where it may run.
pub(crate) fn check_processors(processors: Vec<usize>) -> Result<(), ResourceError> {
    if processors.is_empty() {
        return Ok(());
    }
    let try_all = move || {
        for processor in processors {
            let mut set = CpuSet::new();
            set.set(processor)
                .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
                .map_err(|errno| ResourceError::Affinity { processor, errno: errno as i32 })?;
        }
        Ok(())
    };
    match small_thread().spawn(try_all) {
        Ok(thread) => thread.join().unwrap_or(Ok(())),
        Err(_) => Err(too_few_threads(1, 0)),
    }
}

/// What goes wrong when a thread is started.
pub(crate) fn thread_error(error: io::Error) -> Result<ResourceError, io::Error> {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EAGAIN) => Ok(too_few_threads(1, 0)),
        _ => Err(error),
    }
}

fn kernel_release() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().to_owned()
}

/// Whether this kernel counts the rings of io_uring as locked memory, all of a user's together.
fn counts_rings(release: &str) -> bool {
    let mut numbers = release.split(['.', '-']).map_while(|part| part.trim().parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) => (major, minor) < (5, 12),
        // It is not known; new ones are more common.
        _ => false,
    }
}

fn fits_locked_memory(
    executors: u64,
    limit: Option<u64>,
    counts_rings: bool,
) -> Result<(), ResourceError> {
    let counted = if counts_rings { executors } else { 0 };
    let needed = counted.saturating_mul(LOCKED_PER_EXECUTOR).max(MIN_LOCKED_MEMORY);
    match limit {
        Some(limit) if limit < needed => Err(ResourceError::LockedMemory { needed, limit }),
        _ => Ok(()),
    }
}

/// How many descriptors this process has, if that can be seen.
fn open_files() -> Option<u64> {
    // Less the one that the directory is read by.
    Some(fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1) as u64)
}

fn fits_open_files(needed: u64, used: u64, limit: Option<u64>) -> Result<(), ResourceError> {
    match limit {
        Some(limit) if limit < used.saturating_add(needed) => {
            Err(ResourceError::OpenFiles { needed, used, limit })
        }
        _ => Ok(()),
    }
}

/// The operations that glommio 0.9 takes for granted; it ends the process when one is missing.
const OPERATIONS: [(u8, &str); 23] = [
    (opcode::Nop::CODE, "IORING_OP_NOP"),
    (opcode::Readv::CODE, "IORING_OP_READV"),
    (opcode::Writev::CODE, "IORING_OP_WRITEV"),
    (opcode::Fsync::CODE, "IORING_OP_FSYNC"),
    (opcode::ReadFixed::CODE, "IORING_OP_READ_FIXED"),
    (opcode::WriteFixed::CODE, "IORING_OP_WRITE_FIXED"),
    (opcode::PollAdd::CODE, "IORING_OP_POLL_ADD"),
    (opcode::PollRemove::CODE, "IORING_OP_POLL_REMOVE"),
    (opcode::SendMsg::CODE, "IORING_OP_SENDMSG"),
    (opcode::RecvMsg::CODE, "IORING_OP_RECVMSG"),
    (opcode::Timeout::CODE, "IORING_OP_TIMEOUT"),
    (opcode::TimeoutRemove::CODE, "IORING_OP_TIMEOUT_REMOVE"),
    (opcode::Accept::CODE, "IORING_OP_ACCEPT"),
    (opcode::LinkTimeout::CODE, "IORING_OP_LINK_TIMEOUT"),
    (opcode::Connect::CODE, "IORING_OP_CONNECT"),
    (opcode::Fallocate::CODE, "IORING_OP_FALLOCATE"),
    (opcode::OpenAt::CODE, "IORING_OP_OPENAT"),
    (opcode::Close::CODE, "IORING_OP_CLOSE"),
    (opcode::Statx::CODE, "IORING_OP_STATX"),
    (opcode::Read::CODE, "IORING_OP_READ"),
    (opcode::Write::CODE, "IORING_OP_WRITE"),
    (opcode::Send::CODE, "IORING_OP_SEND"),
    (opcode::Recv::CODE, "IORING_OP_RECV"),
];

/// Makes a ring, asks it what it can do, and hands it nothing to do: all three of its system calls.
fn try_io_uring(release: &str) -> Result<(), ResourceError> {
    let failed = |call: &'static str| move |error: io::Error| denied(call, &error, release);
    let ring = IoUring::new(ENTRIES).map_err(failed("io_uring_setup"))?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).map_err(failed("io_uring_register"))?;
    let missing = OPERATIONS.iter().find(|(operation, _)| !probe.is_supported(*operation));
    if let Some(&(_, missing)) = missing {
        let problem = Box::new(IoUringProblem::Kernel { release: release.to_owned(), missing });
        let errno = Errno::EOPNOTSUPP as i32;
        return Err(ResourceError::IoUring { call: "io_uring_register", errno, problem });
    }
    ring.submitter().submit().map(drop).map_err(failed("io_uring_enter"))
}

/// Why a call of io_uring failed.
fn denied(call: &'static str, error: &io::Error, release: &str) -> ResourceError {
    let errno = error.raw_os_error().unwrap_or(0);
    match (Errno::from_raw(errno), limit_of(Resource::RLIMIT_MEMLOCK)) {
        (Errno::ENOMEM, Some(limit)) if counts_rings(release) => {
            return ResourceError::LockedMemory { needed: limit + LOCKED_PER_EXECUTOR, limit };
        }
        (Errno::EMFILE, _) => {
            let (used, limit) = (open_files().unwrap_or(0), limit_of(Resource::RLIMIT_NOFILE));
            let limit = limit.unwrap_or(u64::MAX);
            return ResourceError::OpenFiles { needed: DESCRIPTORS_PER_EXECUTOR, used, limit };
        }
        _ => {}
    }
    let number = |path| fs::read_to_string(path).ok()?.trim().parse::<u32>().ok();
    let disabled = number("/proc/sys/kernel/io_uring_disabled").unwrap_or(0);
    let problem = Box::new(problem_of(errno, disabled, has_filter(), release));
    ResourceError::IoUring { call, errno, problem }
}

fn problem_of(errno: i32, disabled: u32, has_filter: bool, release: &str) -> IoUringProblem {
    match Errno::from_raw(errno) {
        Errno::EPERM if disabled > 0 => IoUringProblem::Disabled { value: disabled },
        _ if has_filter && errno != Errno::ENOMEM as i32 => IoUringProblem::Seccomp,
        Errno::ENOSYS | Errno::EINVAL => {
            IoUringProblem::Kernel { release: release.to_owned(), missing: "io_uring" }
        }
        _ => IoUringProblem::Unknown,
    }
}

/// Whether a filter of system calls is laid on this thread.
fn has_filter() -> bool {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let mode = status.lines().find_map(|line| line.strip_prefix("Seccomp:"));
    mode.is_some_and(|mode| mode.trim() == "2")
}

fn small_thread() -> std::thread::Builder {
    std::thread::Builder::new().name("shmipc-preflight".into()).stack_size(SMALL_STACK)
}

/// Starts as many threads at a time as will be needed, and lets them end.
fn try_threads(needed: usize) -> Result<(), ResourceError> {
    let mut threads = Vec::new();
    let mut failed = false;
    let (hold, held) = mpsc::channel::<()>();
    let held = std::sync::Arc::new(std::sync::Mutex::new(held));
    for _ in 0..needed.min(MAX_THREADS_TRIED) {
        let held = std::sync::Arc::clone(&held);
        // They wait one behind the other, until the channel is closed.
        match small_thread().spawn(move || held.lock().map(|held| held.recv().is_ok()).is_ok()) {
            Ok(thread) => threads.push(thread),
            Err(_) => {
                failed = true;
                break;
            }
        }
    }
    let had = threads.len();
    drop(hold);
    for thread in threads {
        let _ = thread.join();
    }
    if failed { Err(too_few_threads(needed, had)) } else { Ok(()) }
}

fn too_few_threads(needed: usize, had: usize) -> ResourceError {
    let (limit, group_limit) = (limit_of(Resource::RLIMIT_NPROC), group_limit());
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    ResourceError::Threads { needed: number(needed), had: number(had), limit, group_limit }
}

/// The tightest `pids.max` of this process's control groups that can be seen (version 2).
fn group_limit() -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let groups = std::path::Path::new(path).ancestors();
    let limits = groups.filter_map(|group| {
        let file = std::path::Path::new("/sys/fs/cgroup").join(group).join("pids.max");
        // "max" is no number, and no limit.
        fs::read_to_string(file).ok()?.trim().parse().ok()
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_kernels_count_rings() {
        for old in ["4.19.0", "5.4.0-150-generic", "5.11\n"] {
            assert!(counts_rings(old), "{old}");
        }
        for new in ["5.12.0", "6.18.2-microvm\n", "10.0", "", "strange"] {
            assert!(!counts_rings(new), "{new}");
        }
    }

    #[test]
    fn locked_memory_is_enough_or_named() {
        assert_eq!(fits_locked_memory(2, Some(512 << 10), true), Ok(()));
        assert_eq!(fits_locked_memory(2, None, true), Ok(()));
        let error = fits_locked_memory(2, Some(64 << 10), false).unwrap_err();
        assert_eq!(error, ResourceError::LockedMemory { needed: 512 << 10, limit: 64 << 10 });
        assert!(fits_locked_memory(1000, Some(8 << 20), true).is_err());
        assert_eq!(fits_locked_memory(1000, Some(8 << 20), false), Ok(()));
    }

    #[test]
    fn open_files_are_those_there_are_and_those_to_come() {
        assert_eq!(fits_open_files(16, 10, Some(26)), Ok(()));
        assert_eq!(fits_open_files(16, 10, None), Ok(()));
        let error = fits_open_files(16, 11, Some(26)).unwrap_err();
        assert_eq!(error, ResourceError::OpenFiles { needed: 16, used: 11, limit: 26 });
        assert!(fits_open_files(u64::MAX, 11, Some(26)).is_err());
    }

    #[test]
    fn why_io_uring_fails_is_told_by_what_is_known() {
        let problem = |errno: Errno, disabled, has_filter| {
            problem_of(errno as i32, disabled, has_filter, "5.0.1").to_string()
        };
        let disabled = problem(Errno::EPERM, 2, true);
        assert!(disabled.contains("kernel.io_uring_disabled is 2"), "{disabled}");
        for errno in [Errno::EPERM, Errno::ENOSYS, Errno::EACCES] {
            assert!(problem(errno, 0, true).contains("seccomp"), "{errno}");
        }
        for errno in [Errno::ENOSYS, Errno::EINVAL] {
            let old = problem(errno, 0, false);
            assert!(old.contains("kernel 5.0.1 has no io_uring: 5.8"), "{old}");
        }
        assert!(problem(Errno::EPERM, 0, false).contains("no setting that is known"));
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn this_machine_will_do() {
        check(Wanted { executors: 2, more_threads: 1, sessions: 4 }).unwrap();
        check(Wanted::default()).unwrap();
        let error = check(Wanted { executors: 1, sessions: 1 << 40, ..Wanted::default() });
        assert!(matches!(error, Err(ResourceError::OpenFiles { .. })), "{error:?}");
        let error = check_processors(vec![1000]).unwrap_err();
        assert!(matches!(error, ResourceError::Affinity { processor: 1000, .. }), "{error}");
    }
}
