// SPDX-License-Identifier: MIT OR Apache-2.0
//! The files of Unix sockets that something here listens on.
//!
//! A file that a dead listener left is replaced, one of a living listener never; it lives as long
//! as somebody accepts connections, or could. Who replaces files has a [turn](BindLock) at it.
//!
//! Who removes its own file needs none: a descriptor of the socket is kept until the file is gone.
//! So the file's number, by which it is known again, is not given to another one, and nobody takes
//! the listener for dead and replaces the file meanwhile. It is looked for in the directory where
//! it was put, also when the path leads elsewhere by then.
//!
//! A path that starts with `@`, or with a NUL byte, is an abstract name, as Go has it: no file, no
//! mode, no turn. It is taken while a socket has it and free when that is closed, so there is
//! nothing to replace or remove. Who listens under which name, the kernel says in `/proc/net/unix`.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, UnixCredentials, sockopt,
};
use nix::sys::stat::{FchmodatFlags, Mode};
use nix::unistd::{Gid, Pid, Uid};

use crate::net::bind_lock::BindLock;
use crate::net::fd_disposal::{self, PeerSocket};
use crate::net::fd_passing::refuse_descriptors;
use shmipc_core::config::SocketFile;
use shmipc_core::error::{ConfigError, Error, MAX_SOCKET_PATH};
use shmipc_core::shm::map::directory::{Directory, FileIdentity};

/// How many connections wait to be accepted.
const BACKLOG: i32 = 1024;

/// A Unix socket's entry in the file system, removed when this, or the first of its copies, is
/// dropped.
#[derive(Clone)]
pub(crate) struct SocketPath {
    path: Arc<Path>,
    entry: Arc<Entry>,
}

/// A socket's file.
struct SocketFileEntry {
    directory: Arc<Directory>,
    name: OsString,
    identity: FileIdentity,
}

struct Entry {
    /// `None`: an abstract name.
    file: Option<SocketFileEntry>,
    is_removed: AtomicBool,
    /// Open until the file is gone.
    socket: Option<OwnedFd>,
    /// Whether connections cannot have descriptors in their queues before they are accepted.
    refuses_descriptors: bool,
}

impl SocketPath {
    /// The name, and the file if it has one, of a socket that is bound to it.
    fn new(
        path: &Path,
        file: Option<SocketFileEntry>,
        socket: &OwnedFd,
        refuses_descriptors: bool,
    ) -> io::Result<Self> {
        let entry = Entry {
            file,
            is_removed: AtomicBool::new(false),
            // A name without a file is free as soon as nobody listens.
            socket: if is_abstract(path) && refuses_descriptors {
                None
            } else {
                Some(socket.try_clone()?)
            },
            refuses_descriptors,
        };
        Ok(Self { path: path.into(), entry: Arc::new(entry) })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        let Entry { file, is_removed, .. } = &*self.entry;
        // Only whoever is first; it orders nothing else.
        if is_removed.swap(true, Ordering::Relaxed) {
            return;
        }
        if let Some(SocketFileEntry { directory, name, identity }) = file {
            // It may be gone by now, or somebody else's; neither is worth a word.
            let _ = directory.remove(name, *identity);
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if let Some(socket) = self.socket.take().filter(|_| !self.refuses_descriptors) {
            // Whoever else has the socket open closes it before, or finds nobody in its queue.
            fd_disposal::close_listener(socket);
        }
    }
}

/// The address of the socket at `path`, of which the last part was appended for a shard, if it is
/// not empty.
///
/// # Errors
///
/// It is longer than an address may be.
pub(crate) fn address(path: &Path, suffix: &str) -> Result<UnixAddr, Error> {
    let len = path.as_os_str().len();
    if len > MAX_SOCKET_PATH {
        let (path, suffix) = (path.to_owned(), suffix.into());
        return Err(ConfigError::SocketPath { path, len, suffix }.into());
    }
    unix_address(path).map_err(|errno| Error::os_at("use the path of a Unix socket,", path, errno))
}

/// Why connecting to the socket at `path` failed, and what can be done about it.
pub(crate) fn connect_error(path: &Path, errno: Errno) -> Error {
    let error = Error::os_at("connect to the Unix socket", path, errno);
    match errno {
        Errno::ENOENT | Errno::ECONNREFUSED if is_abstract(path) => {
            error.advise("no server listens under that abstract name")
        }
        Errno::ENOENT => error.advise("no server has a socket there"),
        Errno::ECONNREFUSED if !leads_to_socket(path) => error.advise("what is there is no socket"),
        Errno::ECONNREFUSED => error.advise("the server that had its socket there is gone"),
        Errno::EACCES | Errno::EPERM => error.advise(who_may_connect(path)),
        _ => error,
    }
}

/// Whose a socket is, for those who may not connect to it.
fn who_may_connect(path: &Path) -> String {
    let me = nix::unistd::geteuid();
    match fs::symlink_metadata(path) {
        Ok(found) => format!(
            "it is of user {} and group {} with mode {:03o}, this process is user {me}: \
             `socket_mode` and `socket_owner` of the server decide who may connect",
            found.uid(),
            found.gid(),
            found.mode() & 0o777
        ),
        Err(_) => format!("user {me}, as whom this process runs, may not search its directory"),
    }
}

/// Listens at `path`, in the turn that the lock gives. Nobody can connect before the file is as it
/// is configured to be.
pub(crate) fn listen(
    path: &Path,
    file: &SocketFile,
    turn: &BindLock,
) -> io::Result<(OwnedFd, SocketPath)> {
    let address = unix_address(path)?;
    let fd = new_socket(SockFlag::empty())?;
    let refuses_descriptors = refuse_descriptors(&fd);
    if let Err(errno) = nix::sys::socket::bind(fd.as_raw_fd(), &address) {
        if errno != Errno::EADDRINUSE {
            return Err(errno.into());
        }
        remove_left_over(path, turn)?;
        nix::sys::socket::bind(fd.as_raw_fd(), &address)?;
    }
    if is_abstract(path) {
        nix::sys::socket::listen(&fd, Backlog::new(BACKLOG)?)?;
        let entry = SocketPath::new(path, None, &fd, refuses_descriptors)?;
        return Ok((fd, entry));
    }
    let (directory, name) = Directory::of(path)?;
    let identity = directory.find(&name)?;
    let file_entry = SocketFileEntry { directory, name, identity };
    let (directory, name) = (Arc::clone(&file_entry.directory), file_entry.name.clone());
    let entry = SocketPath::new(path, Some(file_entry), &fd, refuses_descriptors)?;
    // Before it listens, nobody can connect, whatever the mode was for a moment. Should somebody
    // have put a link there, it is not followed.
    let mode = Mode::from_bits_truncate(file.mode);
    let (directory, name) = (&*directory, &*name);
    nix::sys::stat::fchmodat(directory, name, mode, FchmodatFlags::NoFollowSymlink)?;
    if file.user.is_some() || file.group.is_some() {
        let (user, group) = (file.user.map(Uid::from_raw), file.group.map(Gid::from_raw));
        nix::unistd::fchownat(directory, name, user, group, AtFlags::AT_SYMLINK_NOFOLLOW)
            .map_err(|errno| cannot_give_away(file, errno))?;
    }
    nix::sys::socket::listen(&fd, Backlog::new(BACKLOG)?)?;
    Ok((fd, entry))
}

/// Whether a path is an abstract name.
pub(crate) fn is_abstract(path: &Path) -> bool {
    abstract_name(path).is_some()
}

fn abstract_name(path: &Path) -> Option<&[u8]> {
    let bytes = path.as_os_str().as_bytes();
    bytes.strip_prefix(b"@").or_else(|| bytes.strip_prefix(b"\0"))
}

/// The address of the socket at a path, or of the one with an abstract name.
fn unix_address(path: &Path) -> nix::Result<UnixAddr> {
    match abstract_name(path) {
        Some(name) => UnixAddr::new_abstract(name),
        None => UnixAddr::new(path),
    }
}

/// The number of the socket that listens under an abstract name, if the kernel shows one.
fn abstract_listener(name: &[u8], table: &[u8]) -> Option<u64> {
    /// `__SO_ACCEPTCON`
    const LISTENS: u32 = 1 << 16;
    table.split(|&byte| byte == b'\n').find_map(|line| {
        // Number, references, protocol, flags, type, state, inode, name.
        let start = line.len().checked_sub(name.len() + 1)?;
        let (fields, shown) = line.split_at(start);
        // A NUL byte is shown as `@`, at the start and elsewhere.
        let is_it = shown[0] == b'@'
            && shown[1..]
                .iter()
                .zip(name)
                .all(|(&shown, &byte)| shown == byte || (shown == b'@' && byte == 0));
        let fields = std::str::from_utf8(fields).ok().filter(|_| is_it)?;
        let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
        let &[_, _, _, flags, _, _, inode] = &fields[..] else {
            return None;
        };
        let flags = u32::from_str_radix(flags, 16).ok()?;
        if flags & LISTENS == 0 { None } else { inode.parse().ok() }
    })
}

/// Where shard `index` of a server at `path` listens.
pub(crate) fn shard_path(path: &Path, index: usize) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{index}"));
    name.into()
}

/// Whether a socket's file is there, of a living listener or of a dead one.
pub(crate) fn is_socket(path: &Path) -> bool {
    if is_abstract(path) {
        return socket_identity(path).is_some();
    }
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// The same for those who connect, whom the kernel takes to where a symbolic link leads.
pub(crate) fn leads_to_socket(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// What tells a socket's file from another one at the same path, if one is there.
pub(crate) fn socket_identity(path: &Path) -> Option<(u64, u64, i64, i64)> {
    if let Some(name) = abstract_name(path) {
        let table = fs::read("/proc/net/unix").ok()?;
        return abstract_listener(name, &table).map(|number| (0, number, 0, 0));
    }
    let metadata = fs::symlink_metadata(path).ok()?;
    let identity = (metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec());
    metadata.file_type().is_socket().then_some(identity)
}

/// Removes what a dead listener left at `path`, in somebody's turn.
///
/// # Errors
///
/// It lives, or it is no socket, or cannot be removed.
pub(crate) fn remove_left_over(path: &Path, turn: &BindLock) -> io::Result<()> {
    let in_use = |what: &str| Err(io::Error::new(io::ErrorKind::AddrInUse, what));
    if !is_abstract(path) && !is_socket(path) {
        return in_use("what is there is not a socket, and is left alone");
    }
    // The one that is found dead is the one that is removed.
    let found = if is_abstract(path) {
        None
    } else {
        let (directory, name) = Directory::of(path)?;
        match directory.find(&name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            identity => Some((directory, name, identity?)),
        }
    };
    match state(path, turn)? {
        Listening::Alive => return in_use("it is in use by a live server"),
        Listening::Ended => {
            return in_use(
                "the process that listened there has ended, and its socket is still open: the \
                 kernel clears up behind it, or another process has it, too; try again",
            );
        }
        Listening::Gone => {}
    }
    match found {
        Some((directory, name, identity)) => directory.remove(&name, identity).map(drop),
        None => Ok(()),
    }
}

/// How it stands with the socket at a path.
#[derive(Debug, PartialEq, Eq)]
enum Listening {
    Alive,
    /// The process that listened is no more, and something still listens.
    Ended,
    Gone,
}

/// Whether somebody listens on the socket at `path`.
///
/// The socket of a process that was killed may outlive it by some milliseconds, while the kernel
/// clears up behind its io_uring. That is waited for, as long as the turn has time. Not if it was a
/// process of another user, which could make it look so for as long as it likes.
fn state(path: &Path, turn: &BindLock) -> io::Result<Listening> {
    let address = unix_address(path)?;
    loop {
        // Without waiting: one whose backlog is full lives.
        // What listens there may pass descriptors, like any peer.
        let socket = PeerSocket::new(new_socket(SockFlag::SOCK_NONBLOCK)?);
        let fd = socket.fd();
        match nix::sys::socket::connect(fd.as_raw_fd(), &address) {
            Err(Errno::ECONNREFUSED | Errno::ENOENT) => return Ok(Listening::Gone),
            Err(errno @ (Errno::EACCES | Errno::EPERM)) => {
                let text = format!("another user's socket is there, which may be alive: {errno}");
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
            }
            Ok(()) if is_ghost(fd) => {
                if !turn.pause() {
                    return Ok(Listening::Ended);
                }
            }
            _ => return Ok(Listening::Alive),
        }
    }
}

/// Whether the process of this user that listened behind a connection is no more.
fn is_ghost(connection: BorrowedFd<'_>) -> bool {
    let credentials = nix::sys::socket::getsockopt(&connection, sockopt::PeerCredentials);
    let is_ours = |it: &UnixCredentials| it.uid() == nix::unistd::geteuid().as_raw();
    // A process of a container that this one cannot see has the number 0.
    let listener = credentials.ok().filter(is_ours).map_or(0, |credentials| credentials.pid());
    listener > 0 && nix::sys::signal::kill(Pid::from_raw(listener), None) == Err(Errno::ESRCH)
}

fn cannot_give_away(file: &SocketFile, errno: Errno) -> io::Error {
    let error = io::Error::from(errno);
    let whom = |what, id: Option<u32>| id.map(|id| format!(" {what} {id}")).unwrap_or_default();
    let (user, group) = (whom("user", file.user), whom("group", file.group));
    let text = format!("cannot be given to{user}{group}, as `socket_owner` says: {error}");
    io::Error::new(error.kind(), text)
}

fn new_socket(flags: SockFlag) -> io::Result<OwnedFd> {
    let flags = flags | SockFlag::SOCK_CLOEXEC;
    Ok(nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    const LONG: Duration = Duration::from_secs(60);
    const PRIVATE: SocketFile = SocketFile { mode: 0o600, user: None, group: None };

    fn listen(path: &Path, file: &SocketFile) -> io::Result<(OwnedFd, SocketPath)> {
        super::listen(path, file, &BindLock::take(path, LONG)?)
    }

    fn temporary(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("shmipc-path-{name}-{}", std::process::id()))
    }

    #[test]
    fn what_the_dead_left_is_replaced_and_the_living_refused() {
        let path = temporary("stale");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "the standard library leaves the file");
        let (fd, entry) = listen(&path, &PRIVATE).unwrap();
        let mode = fs::symlink_metadata(entry.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let error = listen(&path, &PRIVATE).map(drop).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().contains("live server"), "{error}");
        drop(entry);
        assert!(!path.exists());
        drop(fd);
    }

    #[test]
    fn an_abstract_name_has_no_file_and_no_lock_and_is_free_when_its_socket_is_closed() {
        for first in ["@", "\0"] {
            let name = format!("{first}shmipc-path-abstract-{}", std::process::id());
            let path = Path::new(&name);
            assert!(!is_socket(path));
            let (fd, entry) = listen(path, &PRIVATE).unwrap();
            assert!(is_socket(path) && socket_identity(path).is_some());
            assert!(!is_socket(&shard_path(path, 0)), "a longer name is another one");
            assert!(!is_socket(Path::new(&name[..name.len() - 1])), "and a shorter one");
            let error = listen(path, &PRIVATE).map(drop).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
            assert!(error.to_string().contains("live server"), "{error}");
            drop(fd);
            assert!(!is_socket(path), "the entry does not keep it");
            let _again = listen(path, &PRIVATE).unwrap();
            drop(entry);
            assert!(is_socket(path), "who comes later keeps the name");
        }
        assert!(!Path::new(&format!("@shmipc-path-abstract-{}.lock", std::process::id())).exists());
    }

    #[test]
    fn the_table_of_the_kernel_is_read_by_whole_names_of_listeners() {
        let table = b"Num       RefCount Protocol Flags    Type St Inode Path\n\
            ffff888: 00000002 00000000 00010000 0001 01 17 @a.0\n\
            ffff888: 00000002 00000000 00010000 0001 01 18 /tmp/@a\n\
            ffff888: 00000003 00000000 00000000 0001 03 19 @a\n\
            ffff888: 00000003 00000000 00000000 0001 03 20\n\
            ffff888: 00000002 00000000 00010000 0001 01 21 @with a space\n\
            ffff888: 00000002 00000000 00010000 0001 01 22 @nul@inside\n";
        assert_eq!(abstract_listener(b"a.0", table), Some(17));
        // A connection under that name, and a file.
        assert_eq!(abstract_listener(b"a", table), None);
        assert_eq!(abstract_listener(b"with a space", table), Some(21));
        assert_eq!(abstract_listener(b"space", table), None);
        assert_eq!(abstract_listener(b"nul\0inside", table), Some(22));
        assert_eq!(abstract_listener(b"", table), None);
        assert_eq!(abstract_listener(b"a.0", b"nonsense"), None);
    }

    #[test]
    fn one_with_a_full_backlog_lives() {
        let path = temporary("full");
        let fd = new_socket(SockFlag::empty()).unwrap();
        nix::sys::socket::bind(fd.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        nix::sys::socket::listen(&fd, Backlog::new(0).unwrap()).unwrap();
        let _waiting = UnixStream::connect(&path).unwrap();
        let turn = BindLock::take(&path, LONG).unwrap();
        assert_eq!(state(&path, &turn).unwrap(), Listening::Alive);
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn what_is_not_a_socket_stays() {
        let path = temporary("file");
        fs::write(&path, "precious").unwrap();
        let error = listen(&path, &PRIVATE).map(drop).unwrap_err();
        assert!(error.to_string().contains("not a socket"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_file_that_another_put_there_since_is_not_removed() {
        let path = temporary("other");
        let (_fd, entry) = listen(&path, &PRIVATE).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another").unwrap();
        drop(entry);
        assert!(path.exists());
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_successor_keeps_its_file() {
        // On many file systems a number that is free is given to the next file.
        for _ in 0..200 {
            let path = temporary("successor");
            let (fd, entry) = listen(&path, &PRIVATE).unwrap();
            // Somebody clears up, and takes the place. The old one closes before it looks.
            fs::remove_file(&path).unwrap();
            drop(fd);
            let successor = UnixListener::bind(&path).unwrap();
            drop(entry);
            assert!(path.exists(), "the successor has lost its file");
            drop(successor);
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn copies_remove_it_once() {
        let path = temporary("copies");
        let (fd, entry) = listen(&path, &PRIVATE).unwrap();
        let copy = entry.clone();
        drop(entry);
        assert!(!path.exists());
        let (_other, _its_entry) = listen(&path, &PRIVATE).unwrap();
        drop((fd, copy));
        assert!(path.exists());
    }

    #[test]
    fn what_cannot_be_given_away_is_not_left() {
        let path = temporary("owner");
        // Only the superuser may give files away; the test may be the superuser, though.
        let file =
            SocketFile { mode: 0o600, user: Some(nix::unistd::getuid().as_raw()), group: None };
        let (fd, entry) = listen(&path, &file).unwrap();
        drop((fd, entry));
        assert!(!path.exists());
        let locked = BindLock::take(&path, LONG).unwrap();
        let bad = SocketFile { mode: 0o600, user: Some(u32::MAX - 1), group: None };
        let result = super::listen(&path, &bad, &locked);
        // An error must not wait for the lock that its caller holds.
        if result.is_err() {
            assert!(!path.exists());
        }
    }

    #[test]
    fn mode_and_owner_are_as_configured() {
        let path = temporary("mode");
        let (user, group) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        let file = SocketFile { mode: 0o620, user: Some(user), group: Some(group) };
        let (_fd, _entry) = listen(&path, &file).unwrap();
        let metadata = fs::symlink_metadata(&path).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, 0o620);
        assert_eq!((metadata.uid(), metadata.gid()), (user, group));
    }

    #[test]
    fn of_many_that_find_a_stale_file_one_gets_it() {
        let path = temporary("race");
        for _ in 0..50 {
            drop(UnixListener::bind(&path).unwrap());
            let racers: Vec<_> = (0..4)
                .map(|_| {
                    let path = path.clone();
                    std::thread::spawn(move || listen(&path, &PRIVATE))
                })
                .collect();
            let results: Vec<_> = racers.into_iter().map(|racer| racer.join().unwrap()).collect();
            assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
            assert!(path.exists());
        }
    }
}
