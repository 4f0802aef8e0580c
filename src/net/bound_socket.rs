// SPDX-License-Identifier: MIT OR Apache-2.0
//! A Unix socket that listens, with its file.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;

use crate::net::bind_lock::BindLock;
use crate::net::socket_file::{self, SocketPath};
use shmipc_core::config::Config;
use shmipc_core::error::{Error, Result};

/// A Unix socket that listens. It can be opened on one thread and served on another.
pub(crate) struct BoundSocket {
    pub(crate) fd: OwnedFd,
    pub(crate) path: SocketPath,
}

impl BoundSocket {
    /// Opens the door of one listener. Waits on this thread, if that can help, for no longer than
    /// this.
    pub(crate) fn open(path: &Path, config: &Config, patience: Duration) -> Result<Self> {
        socket_file::address(path, "")?;
        Self::open_in_turn(path, config, &Self::turn(path, patience)?)
    }

    /// Waits for the turn at the doors of one server.
    pub(crate) fn turn(path: &Path, patience: Duration) -> Result<BindLock> {
        BindLock::take(path, patience).map_err(|error| listen_error(path, error))
    }

    pub(crate) fn open_in_turn(path: &Path, config: &Config, turn: &BindLock) -> Result<Self> {
        let (fd, path) = socket_file::listen(path, &config.settings().socket_file, turn)
            .map_err(|error| listen_error(path, error))?;
        Ok(Self { fd, path })
    }
}

/// Why listening on the socket at `path` failed, and what can be done about it.
pub(crate) fn listen_error(path: &Path, error: io::Error) -> Error {
    let kind = error.kind();
    let error = Error::os_at("listen on the Unix socket", path, error);
    let directory = match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    };
    match kind {
        io::ErrorKind::NotFound if !directory.exists() => {
            error.advise(format!("the directory {} is not there", directory.display()))
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            let (directory, me) = (directory.display(), nix::unistd::geteuid());
            error.advise(format!(
                "user {me}, as whom this process runs, must be able to create files in \
                 {directory}, and may not replace those of others"
            ))
        }
        _ => error,
    }
}

/// Whether accepting can work again later.
pub(crate) fn is_passing(error: &Error) -> bool {
    let Error::Os { source, .. } = error else {
        return false;
    };
    let errno = source.raw_os_error().map(Errno::from_raw);
    matches!(
        errno,
        Some(
            Errno::EMFILE
                | Errno::ENFILE
                | Errno::ENOMEM
                | Errno::ENOBUFS
                | Errno::ECONNABORTED
                | Errno::EINTR
                | Errno::EAGAIN
                | Errno::EPROTO
        )
    )
}
