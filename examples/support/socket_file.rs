// SPDX-License-Identifier: MIT OR Apache-2.0
//! A Unix socket's file, that goes with its listener, and only if it is still this one's: another
//! server may have bound the same path since, and the path may lead elsewhere.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::fcntl::{AtFlags, OFlag, open};
use nix::sys::stat::{FileStat, Mode, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

/// A socket's file, as it was found.
pub(crate) struct FoundFile {
    directory: OwnedFd,
    name: OsString,
    /// Device and number.
    identity: (u64, u64),
}

impl FoundFile {
    /// The file that is at `path` now, be it a link.
    pub(crate) fn at(path: &Path) -> io::Result<Self> {
        let Some(name) = path.file_name() else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = open(directory, flags, Mode::empty())?;
        let identity = identity(fstatat(&directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)?);
        Ok(Self { directory, name: name.to_owned(), identity })
    }

    /// Removes it, if it is still there.
    pub(crate) fn remove(&self) {
        let Self { directory, name, identity: ours } = self;
        let found = fstatat(directory, &**name, AtFlags::AT_SYMLINK_NOFOLLOW).map(identity);
        if found == Ok(*ours) {
            // It may be gone already, which is as well.
            let _ = unlinkat(directory, &**name, UnlinkatFlags::NoRemoveDir);
        }
    }
}

/// The file of a socket that is bound. Dropped before the socket is closed, so that no other file
/// has its number.
pub(crate) struct SocketFile(FoundFile);

impl SocketFile {
    /// The file at `path`, to which a socket was bound just now.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        FoundFile::at(path).map(Self)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.0.remove();
    }
}

fn identity(stat: FileStat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_the_file_that_was_bound_is_removed() {
        let directory = std::env::temp_dir().join(format!("socket-file-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let path = directory.join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        drop(SocketFile::of(&path).unwrap());
        assert!(!path.exists());
        drop(listener);
        // Another server takes the path.
        let _first = UnixListener::bind(&path).unwrap();
        let file = SocketFile::of(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _second = UnixListener::bind(&path).unwrap();
        drop(file);
        assert!(path.exists());
        // The directory is another one by now.
        let file = SocketFile::of(&path).unwrap();
        let moved = directory.with_extension("moved");
        fs::rename(&directory, &moved).unwrap();
        fs::create_dir(&directory).unwrap();
        fs::write(&path, "precious").unwrap();
        drop(file);
        assert!(path.exists() && !moved.join("socket").exists());
        fs::remove_dir_all(&directory).unwrap();
        fs::remove_dir_all(&moved).unwrap();
    }
}
