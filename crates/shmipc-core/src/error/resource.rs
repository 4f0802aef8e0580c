// SPDX-License-Identifier: MIT OR Apache-2.0
//! What this machine has too little of, or does not let this process have.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};

/// This machine, or what this process may have of it, cannot hold what was asked for.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::{Config, Error, MemoryKind, ResourceError};
///
/// let config = Config::builder().memory(MemoryKind::File).build()?;
/// // No machine has a million gigabytes in `/dev/shm`.
/// let error = config.footprint(1, 1 << 20, 1 << 15).check_memory().unwrap_err();
/// assert!(matches!(error, Error::Resource(ResourceError::SharedMemory { .. })));
/// # shmipc_glommio::Result::<()>::Ok(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResourceError {
    /// The file system of shared-memory files has too little space. In containers `/dev/shm` often
    /// has 64 MiB.
    #[error("{directory:?} has {available} bytes left, the shared memory takes {needed}")]
    SharedMemory {
        /// Where the files would be.
        directory: PathBuf,
        /// How many bytes they would take.
        needed: u64,
        /// How many there are.
        available: u64,
    },
    /// A control group of this process may not use as much memory.
    #[error("control group {group:?} has {available} bytes left, the shared memory takes {needed}")]
    ControlGroup {
        /// Where the system shows the group.
        group: PathBuf,
        /// How many bytes are needed.
        needed: u64,
        /// How many the group has left.
        available: u64,
    },
    /// This process may not lock enough memory for the rings of its executors (`RLIMIT_MEMLOCK`).
    #[error(
        "{limit} bytes of memory may be locked, the executors take {needed}: raise the limit with \
         `ulimit -l`, or `LimitMEMLOCK=` of a systemd unit"
    )]
    LockedMemory {
        /// How many bytes are needed.
        needed: u64,
        /// The limit.
        limit: u64,
    },
    /// This process may not have enough files open (`RLIMIT_NOFILE`).
    #[error(
        "{limit} files may be open, {used} are, and {needed} more are needed: raise the limit with \
         `ulimit -n`, or `LimitNOFILE=` of a systemd unit"
    )]
    OpenFiles {
        /// How many descriptors are needed beside those that are open.
        needed: u64,
        /// How many are open.
        used: u64,
        /// The limit.
        limit: u64,
    },
    /// This process, its user or its control group may not have enough threads (`RLIMIT_NPROC`, or
    /// `pids.max` of a control group).
    #[error(
        "{needed} threads are needed, {had} could be had ({}): raise the limit with `ulimit -u`, \
         `TasksMax=` of a systemd unit, or the container's limit of processes",
        limits(*limit, *group_limit)
    )]
    Threads {
        /// How many are needed, beside those that run.
        needed: u32,
        /// How many of them there could be.
        had: u32,
        /// The limit of processes and threads of this user, if there is one.
        limit: Option<u64>,
        /// That of a control group of this process, if there is one and it can be seen.
        group_limit: Option<u64>,
    },
    /// A file of this process may not become as large as its memory (`RLIMIT_FSIZE`, which holds
    /// for files in memory too). Going on would have it killed by `SIGXFSZ`.
    #[error(
        "files may have {limit} bytes, {what} takes {needed}: raise the limit with `ulimit -f`, or \
         `LimitFSIZE=` of a systemd unit, or configure a smaller memory"
    )]
    FileSize {
        /// Which memory.
        what: &'static str,
        /// How many bytes it takes.
        needed: u64,
        /// The limit.
        limit: u64,
    },
    /// The threads of this process may not be pinned to a processor.
    #[error(
        "a thread cannot be pinned to processor {processor}: {}: run without pinning \
         (`Cores::Unpinned`), choose a processor of this process's set (`taskset`, `cpuset`), or \
         allow `sched_setaffinity` in its seccomp profile",
        io::Error::from_raw_os_error(*errno)
    )]
    Affinity {
        /// Which processor.
        processor: usize,
        /// What the system said.
        errno: i32,
    },
    /// The kernel does not let this process use io_uring, on which its executors are built.
    #[error("io_uring cannot be used: {call}: {}: {problem}", io::Error::from_raw_os_error(*errno))]
    IoUring {
        /// Which system call failed.
        call: &'static str,
        /// What the system said; `EOPNOTSUPP` when an operation is missing.
        errno: i32,
        /// Why, as far as can be told, and what to do.
        problem: Box<IoUringProblem>,
    },
}

impl ResourceError {
    /// There was no room for so many descriptors.
    pub fn no_room_for_descriptors(needed: usize) -> Self {
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
        // Below the limit, they can be counted only with a descriptor for doing so.
        let used = std::fs::read_dir("/proc/self/fd").map_or(limit, |open| open.count() as u64 - 1);
        Self::OpenFiles { needed: needed as u64, used: used.min(limit), limit }
    }
}

/// Why io_uring cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IoUringProblem {
    /// A sysctl has it switched off.
    #[error(
        "the sysctl kernel.io_uring_disabled is {value}: set it to 0, or to 1 with this process in \
         the group of kernel.io_uring_group"
    )]
    Disabled {
        /// The value of `kernel.io_uring_disabled`.
        value: u32,
    },
    /// A filter of system calls forbids it.
    #[error(
        "a seccomp filter forbids it, as those of container runtimes do by default: allow \
         io_uring_setup, io_uring_enter and io_uring_register"
    )]
    Seccomp,
    /// The kernel is too old, or built without it.
    #[error("kernel {release} has no {missing}: 5.8 or later is needed, with CONFIG_IO_URING")]
    Kernel {
        /// The kernel's release.
        release: String,
        /// What it lacks.
        missing: &'static str,
    },
    /// Something else: the system's own error says as much as is known.
    #[error("no setting that is known here is in the way")]
    Unknown,
}

impl ResourceError {
    pub(super) fn kind(&self) -> io::ErrorKind {
        match self {
            Self::SharedMemory { .. } => io::ErrorKind::StorageFull,
            Self::ControlGroup { .. } | Self::LockedMemory { .. } => io::ErrorKind::OutOfMemory,
            Self::OpenFiles { .. } | Self::Threads { .. } => io::ErrorKind::QuotaExceeded,
            Self::FileSize { .. } => io::ErrorKind::FileTooLarge,
            Self::Affinity { errno, .. } | Self::IoUring { errno, .. } => {
                io::Error::from_raw_os_error(*errno).kind()
            }
        }
    }

    /// Whether it can be different later, when others have given something back.
    pub(super) fn is_retryable(&self) -> bool {
        match self {
            Self::SharedMemory { .. }
            | Self::ControlGroup { .. }
            | Self::OpenFiles { .. }
            | Self::Threads { .. } => true,
            Self::LockedMemory { .. }
            | Self::FileSize { .. }
            | Self::Affinity { .. }
            | Self::IoUring { .. } => false,
        }
    }
}

fn limits(user: Option<u64>, group: Option<u64>) -> String {
    let text = |what, limit: Option<u64>| {
        limit.map_or_else(|| format!("{what}: no limit"), |limit| format!("{what}: {limit}"))
    };
    format!("{}, {}", text("limit of this user", user), text("of its control group", group))
}

/// What to do about an error that any call can give.
pub(super) fn advice(error: &io::Error) -> Option<String> {
    match Errno::from_raw(error.raw_os_error()?) {
        Errno::EMFILE => {
            let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
            Some(format!(
                "this process may have {limit} files open: raise the limit with `ulimit -n`, or \
                 `LimitNOFILE=` of a systemd unit"
            ))
        }
        Errno::ENFILE => Some("the system has no file left: see the sysctl fs.file-max".into()),
        _ => None,
    }
}
