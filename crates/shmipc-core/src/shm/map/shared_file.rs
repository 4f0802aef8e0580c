// SPDX-License-Identifier: MIT OR Apache-2.0
//! The files of shared memory, and their entries in the file system.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::Flock;

use crate::shm::map::directory::{Directory, FileIdentity};

/// Where the file of a memory is, held so that it cannot be taken for another one.
pub struct FoundFile {
    pub(super) directory: Arc<Directory>,
    pub(super) name: OsString,
    pub(super) identity: FileIdentity,
}

/// A shared-memory file that was just created.
pub struct NewFile {
    entry: SharedFile,
}

impl NewFile {
    /// The entry of a file that this side has just created, and the lock that says that it lives.
    pub(super) fn new(mut entry: SharedFile, lock: Flock<File>) -> Self {
        entry.lock = Some(lock);
        Self { entry }
    }

    /// Has the file system set memory aside for `len` bytes from `offset` on. What is not set aside
    /// may turn out not to be there when it is touched, and who touches it is killed (`SIGBUS`).
    ///
    /// Sets aside a page in some 250 ns.
    pub fn reserve(&self, offset: usize, len: usize) -> io::Result<()> {
        let number = |value: usize| i64::try_from(value).map_err(io::Error::other);
        let mode = nix::fcntl::FallocateFlags::empty();
        let file = self.entry.lock.as_deref().expect("a new file is kept locked");
        Ok(nix::fcntl::fallocate(file, mode, number(offset)?, number(len)?)?)
    }

    /// The entry of the directory, which is removed when it is dropped.
    pub fn into_entry(self) -> SharedFile {
        self.entry
    }
}

/// A shared-memory file's entry in the file system. Dropping the last one in this process removes
/// the entry, if it is still that of the file that was mapped.
///
/// The last one: all sessions of a shmipc-go client name the same buffer file, and a later session
/// of it must still find the file when an earlier one ends. Mappings stay valid. A missing entry
/// is no error, since the other side removes it too.
pub struct SharedFile {
    place: FoundFile,
    /// Says that its creator lives, if that is who this is (see
    /// [`stale_files`](super::stale_files)).
    lock: Option<Flock<File>>,
}

/// An entry by its directory, its name and its file.
type EntryKey = (FileIdentity, OsString, FileIdentity);

/// How many [`SharedFile`]s each entry has. Touched when sessions come and go, never in between.
static ENTRIES: Mutex<BTreeMap<EntryKey, usize>> = Mutex::new(BTreeMap::new());

impl FoundFile {
    fn key(&self) -> EntryKey {
        (self.directory.identity(), self.name.clone(), self.identity)
    }
}

impl SharedFile {
    /// Takes part in the removal of a file that was mapped, and found to be shared memory.
    pub fn new(place: FoundFile) -> Self {
        let mut entries = ENTRIES.lock().unwrap_or_else(PoisonError::into_inner);
        *entries.entry(place.key()).or_default() += 1;
        Self { place, lock: None }
    }
}

impl Drop for SharedFile {
    fn drop(&mut self) {
        // Held while the file is removed, so that no session of this process maps it meanwhile and
        // counts on its name.
        let mut entries = ENTRIES.lock().unwrap_or_else(PoisonError::into_inner);
        let key = self.place.key();
        match entries.get_mut(&key) {
            Some(count) if *count > 1 => {
                *count -= 1;
                return;
            }
            _ => entries.remove(&key),
        };
        let FoundFile { directory, name, identity } = &self.place;
        match directory.remove(name, *identity) {
            Ok(true) => {}
            Ok(false) => tracing::trace!(?name, "removed by the other side, or replaced"),
            Err(error) => tracing::warn!(?name, %error, "cannot remove"),
        }
    }
}
