// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an error of the operating system is about.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// What an operation of the system was about.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Target {
    /// A socket, a file or a directory.
    Path(PathBuf),
    /// An address.
    Address(SocketAddr),
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(formatter),
            Self::Address(address) => address.fmt(formatter),
        }
    }
}

impl From<&Path> for Target {
    fn from(path: &Path) -> Self {
        Self::Path(path.to_owned())
    }
}

impl From<SocketAddr> for Target {
    fn from(address: SocketAddr) -> Self {
        Self::Address(address)
    }
}
