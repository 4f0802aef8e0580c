// SPDX-License-Identifier: MIT OR Apache-2.0
//! Directories that are kept open, and files in them that are known again.
//!
//! A path says something else at any time: who may write to a directory on the way can put a link
//! there. So what is to be named a second time, to be removed for instance, is named within its
//! directory, which is kept open, and is recognized by its device and number. Only between that
//! look and the removal can the entry become another one, of the same name in the same directory,
//! and by somebody who could have removed it.
//!
//! All who use a directory share one descriptor of it.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag};
use nix::sys::stat::{FileStat, Mode};
use nix::unistd::UnlinkatFlags;

/// What tells a file from all others for as long as somebody has it open, or mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
}

impl FileIdentity {
    /// The directory that the file is in.
    pub fn of(file: &File) -> io::Result<Self> {
        let stat = file.metadata()?;
        Ok(Self { device: stat.dev(), inode: stat.ino() })
    }
}

impl From<FileStat> for FileIdentity {
    fn from(stat: FileStat) -> Self {
        Self { device: stat.st_dev, inode: stat.st_ino }
    }
}

/// A directory that is kept open.
#[derive(Debug)]
pub struct Directory {
    fd: OwnedFd,
    identity: FileIdentity,
}

/// Those that are open.
static OPEN: Mutex<BTreeMap<FileIdentity, Weak<Directory>>> = Mutex::new(BTreeMap::new());

const FLAGS: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

/// How what a peer names is found: on no link, and on no way out of where it has to be.
pub(super) fn beneath(flags: OFlag) -> OpenHow {
    OpenHow::new().flags(flags).resolve(
        ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_XDEV,
    )
}

impl Directory {
    /// The directory at a path of our own, or of our user's, which may be a link.
    pub fn open(path: &Path) -> io::Result<Arc<Self>> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        Self::shared(nix::fcntl::open(path, FLAGS, Mode::empty())?)
    }

    /// The directory of an entry at a path of our own, and the entry's name.
    pub fn of(path: &Path) -> io::Result<(Arc<Self>, OsString)> {
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        Ok((Self::open(directory)?, name.to_owned()))
    }

    /// A directory that a peer named, below this one, or this one itself.
    pub(super) fn below(&self, relative: &Path) -> io::Result<Arc<Self>> {
        let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
        Self::shared(nix::fcntl::openat2(self, relative, beneath(FLAGS))?)
    }

    fn shared(fd: OwnedFd) -> io::Result<Arc<Self>> {
        let identity = FileIdentity::from(nix::sys::stat::fstat(&fd)?);
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(directory) = open.get(&identity).and_then(Weak::upgrade) {
            return Ok(directory);
        }
        let directory = Arc::new(Self { fd, identity });
        open.insert(identity, Arc::downgrade(&directory));
        Ok(directory)
    }

    /// Device and inode.
    pub fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// What is there by this name, be it a link.
    pub fn find(&self, name: &OsStr) -> io::Result<FileIdentity> {
        let stat = nix::sys::stat::fstatat(self, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        Ok(stat.into())
    }

    /// Removes the entry of a file, if it is still that file's. Whether it was.
    pub fn remove(&self, name: &OsStr, file: FileIdentity) -> io::Result<bool> {
        let is_gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        match self.find(name) {
            Ok(found) if found == file => {}
            Ok(_) => return Ok(false),
            Err(error) if is_gone(&error) => return Ok(false),
            Err(error) => return Err(error),
        }
        match nix::unistd::unlinkat(self, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody may have opened it anew meanwhile.
        if open.get(&self.identity).is_some_and(|directory| directory.strong_count() == 0) {
            open.remove(&self.identity);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    fn temporary(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("shmipc-directory-{name}-{}", std::process::id()))
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn who_uses_a_directory_shares_its_descriptor() {
        let path = temporary("shared");
        fs::create_dir_all(path.join("below")).unwrap();
        let root = Directory::open(&path).unwrap();
        let same = Directory::open(&path).unwrap();
        assert!(Arc::ptr_eq(&root, &same));
        let below = root.below(Path::new("below")).unwrap();
        assert!(Arc::ptr_eq(&below, &Directory::open(&path.join("below")).unwrap()));
        assert!(Arc::ptr_eq(&root, &root.below(Path::new("")).unwrap()));
        let identity = below.identity();
        drop(below);
        let is_known = || OPEN.lock().unwrap().contains_key(&identity);
        assert!(!is_known());
        assert_eq!(root.below(Path::new("below")).unwrap().identity(), identity);
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn nothing_is_found_over_a_link_or_outside() {
        let path = temporary("links");
        fs::create_dir_all(path.join("inside/deep")).unwrap();
        symlink(path.join("inside"), path.join("link")).unwrap();
        let root = Directory::open(&path).unwrap();
        root.below(Path::new("inside/deep")).unwrap();
        for bad in ["link", "link/deep", "..", "inside/../..", "/dev/shm", "missing"] {
            assert!(root.below(Path::new(bad)).is_err(), "{bad}");
        }
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn only_the_file_that_is_meant_is_removed() {
        let path = temporary("remove");
        fs::create_dir(&path).unwrap();
        let root = Directory::open(&path).unwrap();
        let name = OsStr::new("file");
        let file = File::create(path.join(name)).unwrap();
        let identity = FileIdentity::of(&file).unwrap();
        // Another one stands there since, or a link to it.
        fs::rename(path.join(name), path.join("moved")).unwrap();
        assert!(!root.remove(name, identity).unwrap());
        fs::write(path.join(name), "precious").unwrap();
        assert!(!root.remove(name, identity).unwrap());
        fs::remove_file(path.join(name)).unwrap();
        symlink("moved", path.join(name)).unwrap();
        assert!(!root.remove(name, identity).unwrap());
        assert!(root.remove(OsStr::new("moved"), identity).unwrap());
        assert!(!path.join("moved").exists());
        fs::remove_dir_all(&path).unwrap();
    }
}
