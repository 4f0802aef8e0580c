// SPDX-License-Identifier: MIT OR Apache-2.0
//! Shared memory as a whole: created or mapped, and given back.
//!
//! Invariants: a [`Region`] is mapped, readable and writable from creation to drop, and starts at a
//! multiple of 64. Its length is what `fstat` said once, checked against a limit; nothing that the
//! peer writes changes it. A memfd that this side creates is sealed against shrinking and growing;
//! what else is truncated under us is [caught](crate::shm::map::sigbus).

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::ptr::NonNull;

use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag};
use nix::sys::memfd::MFdFlags;
use nix::sys::stat::Mode;

use crate::error::{Error, HandshakeError, MemoryError};
use crate::limits;
use crate::shm::map::claims::{Claim, Purpose};
use crate::shm::map::directory::{Directory, FileIdentity, beneath};
use crate::shm::map::fd_kind::FdKind;
use crate::shm::map::shared_file::{FoundFile, NewFile, SharedFile};
use crate::shm::map::sigbus::Guarded;
use crate::shm::map::stale_files;

/// Makes a memfd that nobody can execute, nor make executable (`linux/memfd.h`).
const MFD_NOEXEC_SEAL: u32 = 8;

/// Memory that another party may read and write at any time.
pub struct Region {
    base: NonNull<u8>,
    len: usize,
    backing: Backing,
}

enum Backing {
    Mapping {
        /// Dropped first: it must not speak of what is not mapped any more.
        guard: Option<Guarded>,
        #[allow(dead_code, reason = "held for its drop, which unmaps")]
        mapping: MmapRaw,
        /// Device and inode of the file.
        identity: (u64, u64),
        /// Dropped last: as long as it is mapped, the inode is not another file's.
        claim: Option<Claim>,
    },
    Heap {
        #[allow(dead_code, reason = "held for its drop, which frees the memory")]
        lines: Vec<Line>,
    },
}

/// A part of memory on the heap, aligned as a mapping is to a cache line.
#[derive(Clone)]
#[repr(align(64))]
struct Line(#[allow(dead_code, reason = "accessed through the region's base")] [u8; LINE]);

const LINE: usize = 64;

#[allow(clippy::len_without_is_empty, reason = "no memory is empty")]
impl Region {
    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Bytes of the mapping.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Enters it as a memory of an accepted session, until it is dropped (see [`claims`]).
    ///
    /// # Errors
    ///
    /// It is another session's.
    ///
    /// [`claims`]: crate::shm::map::claims
    pub fn claim(&mut self, purpose: Purpose) -> Result<(), HandshakeError> {
        if let Backing::Mapping { identity, claim, .. } = &mut self.backing {
            *claim = Some(Claim::new(*identity, purpose)?);
        }
        Ok(())
    }

    /// Whether a page of it was not there, and all of it is private zeroes since
    /// (see [`sigbus`](crate::shm::map::sigbus)).
    #[inline]
    pub fn is_lost(&self) -> bool {
        match &self.backing {
            Backing::Mapping { guard, .. } => guard.as_ref().is_some_and(Guarded::is_lost),
            Backing::Heap { .. } => false,
        }
    }

    /// Zeroed memory on the heap, for tests and models that need no peer.
    #[cfg_attr(not(test), allow(dead_code))]
    pub fn heap(len: usize) -> Self {
        let mut lines = vec![Line([0; LINE]); len.max(1).div_ceil(LINE)];
        // Stays where it is: a vector that is moved leaves its items in place.
        let base = NonNull::new(lines.as_mut_ptr().cast()).expect("a vector with items");
        Self { base, len, backing: Backing::Heap { lines } }
    }

    /// An anonymous memory of `len` zero bytes, and its descriptor to pass on.
    pub fn create_memfd(name: &Path, len: usize) -> Result<(Self, OwnedFd), Error> {
        let failed = |error| Error::os("create a memfd", error);
        // The kernel takes up to 249 bytes of name and shows them in /proc; they decide nothing.
        let bytes = name.as_os_str().as_bytes();
        let name = CString::new(&bytes[bytes.len().saturating_sub(249)..])
            .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
        let create = |more| {
            let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | more;
            nix::sys::memfd::memfd_create(name.as_c_str(), flags)
        };
        let fd = match create(MFdFlags::from_bits_retain(MFD_NOEXEC_SEAL)) {
            // A kernel before 6.3 does not know it.
            Err(Errno::EINVAL) => create(MFdFlags::empty()),
            result => result,
        };
        let file = File::from(fd.map_err(|error| failed(error.into()))?);
        limits::check_file_size("a session's memory", len as u64)?;
        file.set_len(len as u64).map_err(failed)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        nix::fcntl::fcntl(&file, FcntlArg::F_ADD_SEALS(seals))
            .map_err(|error| failed(error.into()))?;
        let region = Self::map(&file, len)?;
        Ok((region, file.into()))
    }

    /// A new file of `len` zero bytes that only this user can open, and its entry in the file
    /// system, which goes away with the returned [`SharedFile`].
    pub fn create_file(path: &Path, len: usize) -> Result<(Self, NewFile), Error> {
        let failed = |error| {
            Error::os_at("create the shared-memory file", path, error)
                .advise("`path_prefix` says where such files are made")
        };
        limits::check_file_size("a session's memory", len as u64)?;
        let (directory, name) = Directory::of(path).map_err(failed)?;
        let flags =
            OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        // Before it is locked, it looks like one that nobody has, and may be taken for one.
        let file = loop {
            let file = nix::fcntl::openat(&*directory, &*name, flags, mode);
            let file = File::from(file.map_err(|errno| failed(errno.into()))?);
            if let Some(file) = stale_files::lock_as_creator(file).map_err(failed)? {
                break file;
            }
        };
        let identity = FileIdentity::of(&file).map_err(failed)?;
        let entry = SharedFile::new(FoundFile { directory, name, identity });
        file.set_len(len as u64).map_err(failed)?;
        let region = Self::map(&file, len)?;
        Ok((region, NewFile::new(entry, file)))
    }

    /// Maps what a peer passed as a descriptor. `role` names the memory in errors.
    pub fn map_descriptor(fd: OwnedFd, role: &'static str, limit: u64) -> Result<Self, Error> {
        // A page of any other file may take as long as its file system likes, which may be a
        // program of the peer's (FUSE), and then this thread waits for it.
        let kind = FdKind::of(fd.as_fd());
        if kind != FdKind::Memory {
            return Err(HandshakeError::DescriptorKind { role, kind: kind.name() }.into());
        }
        Self::map_given(&File::from(fd), role, limit)
    }

    /// Maps what a peer named by a path below `directory`. `role` names the memory in errors.
    ///
    /// No link is followed on the way, and no way out of the directory and its file system. The
    /// file must belong to this user, if one is known.
    pub fn map_file(
        directory: &Path,
        path: &Path,
        role: &'static str,
        limit: u64,
        owner: Option<u32>,
    ) -> Result<(Self, FoundFile), Error> {
        let failed = |error| Error::os_at("open the peer's shared-memory file", path, error);
        let outside = || {
            let error = io::Error::new(
                io::ErrorKind::PermissionDenied,
                "not below the directory of the configured prefix",
            );
            failed(error).advise(format!(
                "by `path_prefix`, this side takes files below {} only: the peer's must be there",
                directory.display()
            ))
        };
        let Ok(relative) = path.strip_prefix(directory) else { return Err(outside()) };
        let (Some(between), Some(name)) = (relative.parent(), relative.file_name()) else {
            return Err(outside());
        };
        let below = Directory::open(directory).map_err(|error| {
            Error::os_at("open the directory of shared memory", directory, error)
        })?;
        let find = || {
            let directory = below.below(between)?;
            // Not blocking, since the path may name a pipe.
            let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
            let file = nix::fcntl::openat2(&*directory, name, beneath(flags))?;
            Ok((directory, File::from(file)))
        };
        let (directory, file) = match find() {
            Err(error) if is_outside(&error) => return Err(outside()),
            result => result.map_err(failed)?,
        };
        let stat = file.metadata().map_err(failed)?;
        if let Some(peer) = owner.filter(|&owner| owner != stat.uid()) {
            return Err(HandshakeError::FileOwner { role, owner: stat.uid(), peer }.into());
        }
        let identity = FileIdentity::of(&file).map_err(failed)?;
        let region = Self::map_given(&file, role, limit)?;
        Ok((region, FoundFile { directory, name: name.to_owned(), identity }))
    }

    fn map_given(file: &File, role: &'static str, limit: u64) -> Result<Self, Error> {
        let stat =
            file.metadata().map_err(|error| Error::os("stat the peer's shared memory", error))?;
        let kind = stat.file_type();
        if !kind.is_file() {
            let kind = match () {
                () if kind.is_dir() => "a directory",
                () if kind.is_socket() => "a socket",
                () if kind.is_fifo() => "a pipe",
                () if kind.is_char_device() || kind.is_block_device() => "a device",
                () => "of another kind",
            };
            return Err(HandshakeError::DescriptorKind { role, kind }.into());
        }
        let have = stat.size();
        if have > limit {
            return Err(MemoryError::TooLarge { what: role, have, limit }.into());
        }
        if have == 0 {
            return Err(MemoryError::TooSmall { what: role, needed: 1, have }.into());
        }
        let len = usize::try_from(have).map_err(|_| MemoryError::TooLarge {
            what: role,
            have,
            limit: usize::MAX as u64,
        })?;
        Self::map(file, len)
    }

    fn map(file: &File, len: usize) -> Result<Self, Error> {
        let stat = file.metadata().map_err(|error| Error::os("stat shared memory", error))?;
        let identity = (stat.dev(), stat.ino());
        let mapping = MmapOptions::new()
            .len(len)
            .map_raw(&file.as_fd())
            .map_err(|error| Error::os("map shared memory", error))?;
        let base = NonNull::new(mapping.as_mut_ptr()).expect("mmap gives no null pointer");
        let guard = Guarded::new(base.as_ptr().expose_provenance(), len);
        Ok(Self { base, len, backing: Backing::Mapping { guard, mapping, identity, claim: None } })
    }
}

fn is_outside(error: &io::Error) -> bool {
    error.raw_os_error().map(Errno::from_raw) == Some(Errno::EXDEV)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::shm::map::memory::Memory;

    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("shmipc-region-{}-{name}", std::process::id()))
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn two_mappings_of_a_memfd_see_each_other() {
        let (ours, fd) = Region::create_memfd(Path::new("/dev/shm/x_buffer"), 8192).unwrap();
        let theirs = Region::map_descriptor(fd, "buffer", 1 << 20).unwrap();
        ours.store_u32(4096, 77, Ordering::Release);
        assert_eq!(theirs.load_u32(4096, Ordering::Acquire), 77);
        theirs.store_i64(4, -9);
        assert_eq!(ours.load_i64(4), -9);
        ours.copy_in(8000, b"hello");
        let mut bytes = [0; 5];
        theirs.copy_out(8000, &mut bytes);
        assert_eq!(&bytes, b"hello");
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn a_created_memfd_is_sealed_and_close_on_exec() {
        let (_region, fd) = Region::create_memfd(Path::new("x"), 4096).unwrap();
        let flags = nix::fcntl::fcntl(&fd, FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags & nix::libc::FD_CLOEXEC, nix::libc::FD_CLOEXEC);
        let seals = nix::fcntl::fcntl(&fd, FcntlArg::F_GET_SEALS).unwrap();
        let due = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        assert!(SealFlag::from_bits_retain(seals).contains(due), "{seals:#x}");
        let file = File::from(fd);
        for len in [0, 4095, 8192] {
            assert!(file.set_len(len).is_err(), "{len}");
        }
        let mode = file.metadata().unwrap().mode();
        let knows =
            nix::sys::memfd::memfd_create(c"x", MFdFlags::from_bits_retain(MFD_NOEXEC_SEAL));
        assert!(mode & 0o111 == 0 || knows.is_err(), "executable: {mode:o}");
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn a_created_file_is_private_exclusive_and_removed() {
        let path = path("created");
        let (_region, file) = Region::create_file(&path, 4096).unwrap();
        file.reserve(0, 4096).unwrap();
        let entry = file.into_entry();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(matches!(Region::create_file(&path, 4096), Err(Error::Os { .. })));
        let owner = nix::unistd::geteuid().as_raw();
        let map = |owner| Region::map_file(&std::env::temp_dir(), &path, "queue", 1 << 20, owner);
        let ((_mapped, _), (_also_mapped, found)) = (map(Some(owner)).unwrap(), map(None).unwrap());
        let error = map(Some(owner + 1)).err().unwrap();
        let wrong = HandshakeError::FileOwner { role: "queue", owner, peer: owner + 1 };
        assert!(matches!(error, Error::Handshake(error) if error == wrong));
        let other = SharedFile::new(found);
        drop(entry);
        assert!(path.exists(), "another session of this process has it");
        drop(other);
        assert!(!path.exists());
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn what_is_no_memory_is_refused_by_name() {
        let (read, _write) = nix::unistd::pipe().unwrap();
        let refused = |result: Result<Region, Error>| result.err().unwrap().to_string();
        assert!(refused(Region::map_descriptor(read, "buffer", 100)).contains("a pipe"));
        let directory = File::open("/tmp").unwrap();
        let text = refused(Region::map_descriptor(directory.into(), "queue", 100));
        assert!(text.contains("queue memory is a directory"), "{text}");
        let event_fd = nix::sys::eventfd::EventFd::new().unwrap();
        assert_eq!(FdKind::of(event_fd.as_fd()), FdKind::EventFd);
        let text = refused(Region::map_descriptor(event_fd.into(), "queue", 100));
        assert!(text.contains("queue memory is an eventfd"), "{text}");
        let (_region, fd) = Region::create_memfd(Path::new("x"), 4096).unwrap();
        assert!(refused(Region::map_descriptor(fd, "buffer", 4095)).contains("limit is 4095"));

        let target = path("target");
        let link = path("link");
        fs::write(&target, [0; 64]).unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let mapped = Region::map_file(&std::env::temp_dir(), &link, "queue", 100, None);
        let text = refused(mapped.map(|(region, _)| region));
        assert!(text.contains("open the peer's"), "{text}");
        assert!(target.exists(), "a refused file is not removed");
        fs::remove_file(&target).unwrap();
        fs::remove_file(&link).unwrap();
    }

    /// A root server removed a file of anybody's this way.
    #[test]
    #[cfg_attr(miri, ignore)]
    fn a_directory_that_was_replaced_by_a_link_is_not_followed_to_remove_a_file() {
        let root = path("replaced");
        let [inside, moved, elsewhere] = ["inside", "moved", "elsewhere"].map(|at| root.join(at));
        fs::create_dir_all(&inside).unwrap();
        fs::create_dir(&elsewhere).unwrap();
        fs::write(inside.join("memory"), [0; 64]).unwrap();
        fs::write(elsewhere.join("memory"), "precious").unwrap();
        let (region, found) =
            Region::map_file(&root, &inside.join("memory"), "queue", 100, None).unwrap();
        let entry = SharedFile::new(found);
        fs::rename(&inside, &moved).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &inside).unwrap();
        drop((entry, region));
        assert_eq!(fs::read_to_string(elsewhere.join("memory")).unwrap(), "precious");
        assert!(!moved.join("memory").exists(), "the file that was mapped is removed");
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn a_file_that_took_the_place_of_the_memory_is_not_removed() {
        let path = path("in-its-place");
        fs::write(&path, [0; 64]).unwrap();
        let map = || Region::map_file(&std::env::temp_dir(), &path, "queue", 100, None).unwrap();
        let (_region, found) = map();
        let entry = SharedFile::new(found);
        fs::remove_file(&path).unwrap();
        fs::write(&path, [1; 64]).unwrap();
        // A session of the successor's has it, too, and goes by it alone.
        let (_other, found) = map();
        let successor = SharedFile::new(found);
        drop(entry);
        assert!(path.exists());
        drop(successor);
        assert!(!path.exists());
    }

    #[test]
    #[should_panic(expected = "outside the shared memory")]
    fn an_access_past_the_end_is_stopped() {
        Region::heap(64).store_u32(64, 1, Ordering::Relaxed);
    }
}
