// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a descriptor that a peer passed is.

use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::fcntl::FcntlArg;

/// How `/proc` shows an eventfd.
const EVENT_FD: &str = "anon_inode:[eventfd]";

/// What a descriptor is, found out without asking its file system, which may be a program of a
/// peer's (FUSE) that answers when it likes.
#[derive(Debug, PartialEq, Eq)]
pub enum FdKind {
    /// A memfd, or a regular file of a file system in memory.
    Memory,
    /// An eventfd.
    EventFd,
    /// Something else, by the name that `/proc` shows for it.
    Other(String),
}

impl FdKind {
    /// What the descriptor is.
    pub fn of(fd: BorrowedFd<'_>) -> Self {
        // Answered by the kernel for memory, and refused for everything else.
        if nix::fcntl::fcntl(fd, FcntlArg::F_GET_SEALS).is_ok() {
            return Self::Memory;
        }
        let name = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        match name.map(|name| name.to_string_lossy().into_owned()) {
            Ok(name) if name == EVENT_FD => Self::EventFd,
            Ok(name) => Self::Other(name),
            Err(error) => Self::Other(error.to_string()),
        }
    }

    /// Whether to close it is nothing to wait for.
    pub fn is_harmless(&self) -> bool {
        matches!(self, Self::Memory | Self::EventFd)
    }

    /// What it is, in words.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::EventFd => "an eventfd",
            Self::Other(name) if name.starts_with("pipe:") => "a pipe",
            Self::Other(name) if name.starts_with("socket:") => "a socket",
            Self::Other(name) if name.starts_with('/') => {
                "a directory, a device, or a file that is not in memory"
            }
            Self::Other(_) => "of another kind",
        }
    }
}
