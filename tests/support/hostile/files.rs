// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files and descriptors that are no shared memory, or none of this peer's.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, SealFlag};
use nix::sys::stat::Mode;
use shmipc_glommio::Error::{self, Handshake};
use shmipc_glommio::{HandshakeError, MemoryError};

use super::due::{IsDue, due};
use crate::support::raw::{Memory, memfd};

/// A directory below `/dev/shm` that goes away with this.
pub(crate) struct Directory(pub(crate) PathBuf);

impl Directory {
    pub(crate) fn new(name: &str) -> Self {
        let path = Path::new("/dev/shm").join(format!("bad-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    /// How many entries there are.
    pub(crate) fn len(&self) -> usize {
        fs::read_dir(&self.0).unwrap().count()
    }

    /// Puts the files of an honest client there. Their paths, queue first.
    pub(crate) fn put_memory(&self, memory: &Memory) -> [String; 2] {
        let paths = [self.path("queue"), self.path("buffer")];
        fs::write(&paths[0], &memory.queue).unwrap();
        fs::write(&paths[1], &memory.buffer).unwrap();
        paths
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn is_os(error: &Error, kind: ErrorKind) -> bool {
    matches!(error, Error::Os { source, .. } if source.kind() == kind)
}

fn is_loop(error: &Error) -> bool {
    let is = |source: &io::Error| source.raw_os_error() == Some(nix::libc::ELOOP);
    matches!(error, Error::Os { source, .. } if is(source))
}

/// Paths that no session may have, beside those of two good files in the directory.
pub(crate) fn bad_files(directory: &Directory) -> Vec<(&'static str, String, IsDue)> {
    let inside = |name| directory.path(name);
    symlink(inside("queue"), inside("link")).unwrap();
    fs::create_dir(inside("directory")).unwrap();
    nix::unistd::mkfifo(&*directory.0.join("fifo"), Mode::S_IRWXU).unwrap();
    fs::write(inside("empty"), []).unwrap();
    let outside = format!("{}-outside", directory.0.display());
    let refused: IsDue = |error| is_os(error, ErrorKind::PermissionDenied);
    vec![
        ("a path outside", outside, refused),
        ("a path elsewhere", "/etc/passwd".to_owned(), refused),
        ("a relative path", "queue".to_owned(), refused),
        ("a path that climbs", inside("../../../etc/passwd"), refused),
        ("a link", inside("link"), is_loop),
        ("a directory", inside("directory"), |error| is_os(error, ErrorKind::IsADirectory)),
        ("nothing there", inside("missing"), |error| is_os(error, ErrorKind::NotFound)),
        ("a fifo", inside("fifo"), due!(Handshake(HandshakeError::DescriptorKind { .. }))),
        ("an empty file", inside("empty"), due!(Error::Memory(MemoryError::TooSmall { .. }))),
    ]
}

/// Descriptors to send, whose names hold the one given.
type Make = fn(&str) -> Vec<File>;

/// Too few descriptors, too many, and those of other things than memory.
pub(crate) fn bad_descriptors() -> Vec<(&'static str, Make, IsDue)> {
    let is_count: IsDue = due!(Handshake(HandshakeError::Descriptors { expected: 2, .. }));
    let is_kind: IsDue = due!(Handshake(HandshakeError::DescriptorKind { .. }));
    vec![
        ("no descriptor", |name| copies(name, 0), is_count),
        ("one descriptor", |name| copies(name, 1), is_count),
        ("three descriptors", |name| copies(name, 3), is_count),
        ("sixteen descriptors", |name| copies(name, 16), is_count),
        ("seventeen descriptors", |name| copies(name, 17), is_count),
        ("twenty descriptors", |name| copies(name, 20), is_count),
        ("as many descriptors as can be", |name| copies(name, 253), is_count),
        ("a pipe as buffer", |name| vec![pipe(), queue(name)], is_kind),
        ("a pipe as queue", |name| vec![buffer(name), pipe()], is_kind),
        ("a socket as buffer", |name| vec![socket(), queue(name)], is_kind),
        ("a socket as queue", |name| vec![buffer(name), socket()], is_kind),
        ("a directory as buffer", |name| vec![directory(), queue(name)], is_kind),
        ("a directory as queue", |name| vec![buffer(name), directory()], is_kind),
        ("a device as buffer", |name| vec![device(), queue(name)], is_kind),
        ("a device as queue", |name| vec![buffer(name), device()], is_kind),
        ("a file on a disk as buffer", |name| vec![on_a_disk(), queue(name)], is_kind),
        (
            "what cannot be written",
            |name| vec![read_only(name), queue(name)],
            due!(Error::Os { .. }),
        ),
        ("a sealed buffer", |name| vec![sealed(buffer(name)), queue(name)], due!(Error::Os { .. })),
        ("a sealed queue", |name| vec![buffer(name), sealed(queue(name))], due!(Error::Os { .. })),
        (
            "a buffer that only the peer can write",
            |name| vec![sealed_for_others(buffer(name)), queue(name)],
            due!(Error::Os { .. }),
        ),
    ]
}

fn copies(name: &str, count: usize) -> Vec<File> {
    (0..count).map(|_| memfd(name)).collect()
}

fn buffer(name: &str) -> File {
    let [buffer, _] = Memory::honest().into_memfds(name);
    buffer
}

fn queue(name: &str) -> File {
    let [_, queue] = Memory::honest().into_memfds(name);
    queue
}

fn pipe() -> File {
    File::from(nix::unistd::pipe().unwrap().0)
}

fn socket() -> File {
    File::from(OwnedFd::from(UnixStream::pair().unwrap().0))
}

fn directory() -> File {
    File::open("/dev/shm").unwrap()
}

fn device() -> File {
    File::options().read(true).write(true).open("/dev/zero").unwrap()
}

fn read_only(name: &str) -> File {
    let memory = buffer(name);
    File::open(format!("/proc/self/fd/{}", memory.as_raw_fd())).unwrap()
}

fn on_a_disk() -> File {
    File::open(std::env::current_exe().unwrap()).unwrap()
}

/// Memory that nobody can write to any more.
fn sealed(memory: File) -> File {
    with_seal(memory, SealFlag::F_SEAL_WRITE)
}

/// Memory that is written by those only who have mapped it already.
fn sealed_for_others(memory: File) -> File {
    with_seal(memory, SealFlag::F_SEAL_FUTURE_WRITE)
}

fn with_seal(memory: File, seal: SealFlag) -> File {
    nix::fcntl::fcntl(&memory, FcntlArg::F_ADD_SEALS(seal)).unwrap();
    memory
}

/// Whether a descriptor of this process is open whose file has a name that holds `name`.
pub(crate) fn is_open_here(name: &str) -> bool {
    let entries = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let mut links = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    links.any(|link| link.to_string_lossy().contains(name))
}
