// SPDX-License-Identifier: MIT OR Apache-2.0
//! Taking turns at the files of sockets.
//!
//! Looking whether a listener lives and replacing its file are two steps. Whoever takes both holds
//! a lock meanwhile: on a file of its own, `PATH.lock`, which only this user can open, so that
//! nobody else can hold anybody up. A file that others can open, or that is another user's, is not
//! taken for it, and not waited for. All doors of a server, `PATH` and `PATH.<index>`, have the
//! same lock, by whomever they are opened.
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

use crate::net::socket_file::is_abstract;

const PAUSE: Duration = Duration::from_millis(1);

/// A turn at the files of the sockets of one path.
pub(crate) struct BindLock {
    /// `None`: an abstract name has no file, and needs no turn.
    lock: Option<(PathBuf, Flock<File>)>,
    /// Until when may be waited, for the turn and in it.
    until: Instant,
}

impl BindLock {
    /// Waits for the turn, on this thread, and for no longer than this. What is left of that time
    /// is there for waits in the turn.
    ///
    /// # Errors
    ///
    /// `AddrInUse` when another process of this user has the turn for all that time. Nobody else is
    /// waited for: a file that is another user's is an error at once.
    pub(crate) fn take(door: &Path, patience: Duration) -> io::Result<Self> {
        let until = Instant::now() + patience;
        if is_abstract(door) {
            return Ok(Self { lock: None, until });
        }
        let path = lock_path(door);
        loop {
            if let Some(lock) = Self::try_take(&path)? {
                return Ok(Self { lock: Some((path, lock)), until });
            }
            if Instant::now() >= until {
                let text = format!(
                    "another process of this user is about to listen there, or to find out whether \
                     somebody does: it has {} locked; try again",
                    path.display()
                );
                return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Waits a moment. `false`: there is no time left.
    pub(crate) fn pause(&self) -> bool {
        let has_time = Instant::now() < self.until;
        if has_time {
            std::thread::sleep(PAUSE);
        }
        has_time
    }

    fn try_take(path: &Path) -> io::Result<Option<Flock<File>>> {
        let named =
            |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_CLOEXEC | nix::libc::O_NONBLOCK)
            .open(path);
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let found = fs::symlink_metadata(path);
                let is_foreign = |it: &fs::Metadata| it.uid() != nix::unistd::geteuid().as_raw();
                return Err(match found.ok().filter(is_foreign) {
                    Some(found) => not_ours(path, &found),
                    None => named(error),
                });
            }
            Err(error) => return Err(named(error)),
        };
        // Before it is locked: whoever can open it could keep it locked for ever.
        let ours = file.metadata().map_err(named)?;
        let is_private = ours.is_file() && ours.mode() & 0o077 == 0;
        if !is_private || ours.uid() != nix::unistd::geteuid().as_raw() {
            return Err(not_ours(path, &ours));
        }
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => return Err(named(errno.into())),
        };
        let theirs = fs::symlink_metadata(path);
        let is_it = |found: fs::Metadata| (found.dev(), found.ino()) == (ours.dev(), ours.ino());
        Ok(theirs.is_ok_and(is_it).then_some(lock))
    }
}

/// Why a file is not taken for the lock.
fn not_ours(path: &Path, found: &fs::Metadata) -> io::Error {
    let (path, me) = (path.display(), nix::unistd::geteuid());
    let text = format!(
        "the lock file {path} is of user {} with mode {:o}, and this process, of user {me}, waits \
         for no file that others could keep locked: remove it, or have the socket in a directory \
         that only user {me} can write to",
        found.uid(),
        found.mode() & 0o7777
    );
    io::Error::new(io::ErrorKind::PermissionDenied, text)
}

impl Drop for BindLock {
    fn drop(&mut self) {
        if let Some((path, _lock)) = &self.lock {
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

    const LONG: Duration = Duration::from_secs(60);

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
                        let lock = BindLock::take(&path, LONG).unwrap();
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
        let lock = BindLock::take(&path, LONG).unwrap();
        let mode = fs::symlink_metadata(lock_path(&path)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(lock);
        let target = temporary("target");
        std::os::unix::fs::symlink(&target, lock_path(&path)).unwrap();
        let error = BindLock::take(&path, LONG).map(drop).unwrap_err();
        assert!(error.to_string().contains(".lock"), "{error}");
        assert!(!target.exists());
        fs::remove_file(lock_path(&path)).unwrap();
    }

    fn private(path: &Path) -> File {
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).unwrap()
    }

    #[test]
    fn the_turn_of_another_process_of_this_user_is_waited_for_as_long_as_agreed() {
        let path = temporary("held");
        let file = private(&lock_path(&path));
        let held = Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap();
        let error = BindLock::take(&path, Duration::from_millis(5)).map(drop).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().contains(".lock locked; try again"), "{error}");
        drop(held);
        drop(BindLock::take(&path, Duration::ZERO).unwrap());
    }

    /// With a patience that nobody has, so an error that comes did not wait.
    #[test]
    fn what_others_could_keep_locked_is_not_waited_for() {
        let path = temporary("foreign");
        let lock = lock_path(&path);
        let refused = || BindLock::take(&path, Duration::from_secs(1 << 20)).map(drop).unwrap_err();
        let is_due = |error: io::Error, uid: u32, mode: &str| {
            let text = error.to_string();
            let says = format!("{} is of user {uid} with mode {mode}", lock.display());
            assert!(text.contains(&says) && text.contains("directory"), "{text}");
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        };
        let me = nix::unistd::geteuid();
        // Everybody can open it.
        let file = private(&lock);
        file.set_permissions(fs::Permissions::from_mode(0o666)).unwrap();
        let held = Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap();
        is_due(refused(), me.as_raw(), "666");
        drop(held);
        fs::remove_file(&lock).unwrap();
        // A pipe, which may be opened by many, too.
        nix::unistd::mkfifo(&lock, nix::sys::stat::Mode::S_IRWXU).unwrap();
        is_due(refused(), me.as_raw(), "700");
        fs::remove_file(&lock).unwrap();
        if !me.is_root() {
            println!("skipped: only root can make files of other users");
            return;
        }
        let held = Flock::lock(private(&lock), FlockArg::LockExclusiveNonblock).unwrap();
        std::os::unix::fs::chown(&lock, Some(4321), None).unwrap();
        is_due(refused(), 4321, "600");
        assert!(lock.exists());
        drop(held);
        fs::remove_file(&lock).unwrap();
    }

    #[test]
    fn one_that_was_left_by_the_dead_is_no_obstacle() {
        let path = temporary("left");
        drop(private(&lock_path(&path)));
        drop(BindLock::take(&path, LONG).unwrap());
        assert!(!lock_path(&path).exists());
    }
}
