// SPDX-License-Identifier: MIT OR Apache-2.0
//! Taking turns at the files of sockets.
//!
//! Looking whether a listener lives and replacing its file are two steps. Whoever takes both holds
//! a lock meanwhile: on a file of its own, `PATH.lock`, which only this user can open, so that
//! nobody else can hold anybody up. All doors of a server, `PATH` and `PATH.<index>`, have the same
//! lock, by whomever they are opened.
//!
//! The file goes with the lock. So who has waited for it looks whether it is still the one that
//! others find; if not, it was a turn with nobody else in it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::socket_path::is_abstract;

/// How long the turn of others is waited for: longer than a turn takes, even one that has to wait
/// for the kernel to clear up behind a process that was killed.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(5);

/// A turn at the files of the sockets of one path.
pub(super) struct DoorLock {
    /// `None`: an abstract name has no file, and needs no turn.
    held: Option<(PathBuf, Flock<File>)>,
}

impl DoorLock {
    /// Waits for the turn.
    pub(super) fn take(door: &Path) -> io::Result<Self> {
        if is_abstract(door) {
            return Ok(Self { held: None });
        }
        let path = lock_path(door);
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(lock) = Self::try_take(&path)? {
                return Ok(Self { held: Some((path, lock)) });
            }
            if Instant::now() >= end {
                let text = format!("somebody else keeps {} locked", path.display());
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn try_take(path: &Path) -> io::Result<Option<Flock<File>>> {
        let named =
            |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_CLOEXEC | nix::libc::O_NONBLOCK)
            .open(path)
            .map_err(named)?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => return Err(named(errno.into())),
        };
        let ours = lock.metadata().map_err(named)?;
        // Whoever owns it could hold everybody up.
        if ![nix::unistd::geteuid().as_raw(), 0].contains(&ours.uid()) {
            return Err(named(io::Error::other("it belongs to another user")));
        }
        let theirs = fs::symlink_metadata(path);
        let is_it = |found: fs::Metadata| (found.dev(), found.ino()) == (ours.dev(), ours.ino());
        Ok(theirs.is_ok_and(is_it).then_some(lock))
    }
}

impl Drop for DoorLock {
    fn drop(&mut self) {
        if let Some((path, _lock)) = &self.held {
            // While it is locked: nobody else has this file.
            let _ = fs::remove_file(path);
        }
    }
}

/// The lock of a door: that of `PATH` for `PATH.<index>`.
fn lock_path(door: &Path) -> PathBuf {
    let is_index = |extension: &std::ffi::OsStr| {
        extension.to_str().is_some_and(|text| text.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let mut name = match door.extension() {
        Some(extension) if is_index(extension) => door.with_extension("").into_os_string(),
        _ => door.as_os_str().to_owned(),
    };
    name.push(".lock");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    fn temporary(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("shmipc-lock-{name}-{}", std::process::id()))
    }

    #[test]
    fn doors_of_one_server_have_one_lock() {
        let path = |door: &str| lock_path(Path::new(door)).to_str().unwrap().to_owned();
        assert_eq!(path("/run/store"), "/run/store.lock");
        assert_eq!(path("/run/store.17"), "/run/store.lock");
        assert_eq!(path("/run/store.sock"), "/run/store.sock.lock");
        assert_eq!(path("/run/store.sock.0"), "/run/store.sock.lock");
        assert_eq!(path("/run.3/store"), "/run.3/store.lock");
    }

    #[test]
    fn one_at_a_time_has_the_turn_and_nothing_is_left() {
        let path = temporary("turns");
        let (inside, turns) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (path, inside) = (path.clone(), Arc::clone(&inside));
                let turns = Arc::clone(&turns);
                std::thread::spawn(move || {
                    for _ in 0..100 {
                        let lock = DoorLock::take(&path).unwrap();
                        assert!(!inside.swap(true, Ordering::SeqCst), "two at a time");
                        turns.fetch_add(1, Ordering::SeqCst);
                        std::thread::yield_now();
                        inside.store(false, Ordering::SeqCst);
                        drop(lock);
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(turns.load(Ordering::SeqCst), 400);
        assert!(!lock_path(&path).exists());
    }

    #[test]
    fn nobody_else_can_open_it_and_no_link_is_followed() {
        let path = temporary("mode");
        let lock = DoorLock::take(&path).unwrap();
        let mode = fs::symlink_metadata(lock_path(&path)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(lock);
        let target = temporary("target");
        std::os::unix::fs::symlink(&target, lock_path(&path)).unwrap();
        let error = DoorLock::take(&path).map(drop).unwrap_err();
        assert!(error.to_string().contains(".lock"), "{error}");
        assert!(!target.exists());
        fs::remove_file(lock_path(&path)).unwrap();
    }

    #[test]
    fn one_that_was_left_by_the_dead_is_no_obstacle() {
        let path = temporary("left");
        fs::write(lock_path(&path), "").unwrap();
        drop(DoorLock::take(&path).unwrap());
        assert!(!lock_path(&path).exists());
    }
}
