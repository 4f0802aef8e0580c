// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files of shared memory that dead processes left behind.
//!
//! Whoever creates such a file holds a shared lock on it (`flock`) for as long as it has a name.
//! The kernel gives the lock up when its holder dies, however that happens, and it holds between
//! containers, where the number of a process says nothing. So a file with a name as this crate
//! makes them and without a lock is a left-over, and nothing else is.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::sys::stat::Mode;

use crate::error::Error;
use crate::shm::map::directory::{Directory, FileIdentity};

/// Prefixes whose left-overs this process has removed.
static DONE: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// The name of a session's memory, whose number is `random` and `number` together.
pub fn name(prefix: &Path, random: u64, number: u64, kind: &str) -> PathBuf {
    let mut path = prefix.as_os_str().to_owned();
    path.push(format!("_{}_{random:016x}_{number}_{kind}", std::process::id()));
    path.into()
}

/// Whether [`name`] makes such a name from a prefix that ends with `stem`.
fn is_name(name: &OsStr, stem: &OsStr) -> bool {
    let Some(rest) = name.as_bytes().strip_prefix(stem.as_bytes()) else {
        return false;
    };
    let parts: Vec<&[u8]> = rest.split(|&byte| byte == b'_').collect();
    let is_number = |part: &[u8]| !part.is_empty() && part.iter().all(u8::is_ascii_digit);
    let is_random = |part: &[u8]| {
        part.len() == 16 && part.iter().all(|&byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let [b"", process, random, number, b"buffer" | b"queue"] = parts[..] else {
        return false;
    };
    is_number(process) && is_random(random) && is_number(number)
}

/// Takes the lock that says that the creator of a file lives. `None`: somebody has taken the file
/// for a left-over and removed it, or is about to.
pub(super) fn lock_as_creator(file: File) -> io::Result<Option<Flock<File>>> {
    match lock(file, FlockArg::LockSharedNonblock)? {
        Some(lock) if lock.metadata()?.nlink() > 0 => Ok(Some(lock)),
        _ => Ok(None),
    }
}

/// Locks without waiting, if that can be done.
fn lock(file: File, kind: FlockArg) -> io::Result<Option<Flock<File>>> {
    match Flock::lock(file, kind) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno.into()),
    }
}

/// Removes left-overs of a prefix when this is called for the first time in this process.
pub fn remove_once(prefix: &Path) {
    let is_new = {
        let mut done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
        done.insert(prefix.to_owned())
    };
    if !is_new {
        return;
    }
    match remove(prefix) {
        Ok(0) => {}
        Ok(count) => tracing::info!(count, prefix = %prefix.display(), "left-over files removed"),
        // It is a favour to the system, and whoever needs the directory will find out.
        Err(error) => tracing::debug!(%error, prefix = %prefix.display(), "no look at left-overs"),
    }
}

/// Removes the shared-memory files that dead processes of this user left behind, with names that
/// begin with this [prefix](crate::ConfigBuilder::path_prefix). Gives how many.
///
/// The first listener of a process with this prefix does it, and the first session with
/// [file memory](crate::MemoryKind::File). memfd memory leaves nothing behind, nor does file memory
/// behind a handshake of version 3. A file is one that nobody has when its name is one that this
/// crate makes, and its creator's lock is gone; files of other implementations are left alone.
///
/// # Errors
///
/// [`Error::Os`]: the directory cannot be read, or a file not be removed.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// let prefix = std::env::temp_dir().join("orders");
/// let removed = shmipc_glommio::remove_leftovers(&prefix)?;
/// # assert_eq!(removed, 0);
/// # shmipc_glommio::Result::<()>::Ok(())
/// ```
pub fn remove_leftovers(prefix: impl AsRef<Path>) -> Result<usize, Error> {
    let prefix = prefix.as_ref();
    remove(prefix)
        .map_err(|error| Error::os_at("remove the files that nobody has of", prefix, error))
}

fn remove(prefix: &Path) -> io::Result<usize> {
    let (Some(directory), Some(stem)) = (prefix.parent(), prefix.file_name()) else {
        return Ok(0);
    };
    let opened = Directory::open(directory)?;
    let mut removed = 0;
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        if is_name(&name, stem) && remove_if_left(&opened, &name)? {
            removed += 1;
        }
    }
    Ok(removed)
}

fn remove_if_left(directory: &Directory, name: &OsStr) -> io::Result<bool> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = match nix::fcntl::openat(directory, name, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        // Somebody else's, a link, or gone already.
        Err(_) => return Ok(false),
    };
    let stat = file.metadata()?;
    if !stat.is_file() || stat.uid() != nix::unistd::geteuid().as_raw() {
        return Ok(false);
    }
    let Some(lock) = lock(file, FlockArg::LockExclusiveNonblock)? else {
        return Ok(false);
    };
    // The name may stand for another file by now.
    directory.remove(name, FileIdentity::of(&lock)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::map::region::Region;

    #[test]
    fn names_are_recognized() {
        let path = name(Path::new("/dev/shm/some_thing"), 0xab, 17, "queue");
        let made = path.file_name().unwrap();
        assert!(is_name(made, OsStr::new("some_thing")));
        assert!(!is_name(made, OsStr::new("some")));
        assert!(!is_name(made, OsStr::new("other")));
        for other in [
            "some_thing",
            "some_thing_1_00000000000000ab_1_other",
            "some_thing_1_00000000000000ab__queue",
            "some_thing_1_00000000000000AB_1_queue",
            "some_thing_1_ab_1_queue",
            "some_thing_x_00000000000000ab_1_queue",
            "some_thing_1_00000000000000ab_1_queue_1",
            // What shmipc-go makes.
            "some_thing_123_1700000000000000000_queue",
        ] {
            assert!(!is_name(OsStr::new(other), OsStr::new("some_thing")), "{other}");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn what_nobody_has_goes_and_what_somebody_has_stays() {
        let prefix = std::env::temp_dir().join(format!("shmipc-leftovers-{}", std::process::id()));
        let path = |number| name(&prefix, 1, number, "buffer");
        let (_region, live) = Region::create_file(&path(1), 4096).unwrap();
        for number in [2, 3] {
            fs::write(path(number), [0; 64]).unwrap();
        }
        let beside = prefix.with_extension("beside");
        fs::write(&beside, []).unwrap();
        std::os::unix::fs::symlink(&beside, path(4)).unwrap();
        fs::create_dir(path(5)).unwrap();
        assert_eq!(remove(&prefix).unwrap(), 2);
        assert_eq!(
            [1, 2, 3, 4, 5].map(|number| path(number).exists()),
            [true, false, false, true, true]
        );
        assert!(beside.exists());
        let entry = live.into_entry();
        assert_eq!(remove(&prefix).unwrap(), 0, "its creator lives as long as its name");
        drop(entry);
        assert!(!path(1).exists());
        fs::remove_file(path(4)).unwrap();
        fs::remove_file(beside).unwrap();
        fs::remove_dir(path(5)).unwrap();
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn a_creator_finds_out_that_its_file_was_taken_for_a_left_over() {
        let prefix = std::env::temp_dir().join(format!("shmipc-taken-{}", std::process::id()));
        let path = name(&prefix, 1, 1, "queue");
        // As created, and before it is locked.
        let file = File::create_new(&path).unwrap();
        assert_eq!(remove(&prefix).unwrap(), 1);
        assert!(lock_as_creator(file).unwrap().is_none());
    }
}
