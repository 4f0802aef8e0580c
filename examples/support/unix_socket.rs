// SPDX-License-Identifier: MIT OR Apache-2.0
//! Unix sockets by path or by abstract name: `@name` has no file, and goes with its listener.
//!
//! `unsafe` here: handing a socket that is connected over to glommio, which connects to paths only,
//! and a socket option that `nix` does not know.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use glommio::net::UnixStream;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::sys::socket::{
    AddressFamily, GetSockOpt, SockFlag, SockType, UnixAddr, connect as nix_connect, socket,
    sockopt,
};

/// The abstract name that `@name` stands for. A file of such a name is `./@name`.
pub(crate) fn abstract_name(path: &Path) -> Option<&[u8]> {
    path.as_os_str().as_bytes().strip_prefix(b"@")
}

/// The address of a socket at a path, or of one with an abstract name.
pub(crate) fn address(path: &Path) -> io::Result<UnixAddr> {
    match abstract_name(path) {
        Some(name) => Ok(UnixAddr::new_abstract(name)?),
        None => Ok(UnixAddr::new(path)?),
    }
}

/// Whether the process at the other end is this user's, or the superuser's, as with a file of mode
/// 0600. An abstract name has no mode: everybody finds it.
pub(crate) fn is_same_user(socket: BorrowedFd<'_>) -> bool {
    let found = sockopt::PeerCredentials.get(&socket);
    let this = nix::unistd::geteuid().as_raw();
    found.is_ok_and(|peer| peer.uid() == this || peer.uid() == 0)
}

/// Has the kernel refuse descriptors that are sent to a Unix socket, or to those that it accepts,
/// if it can (`SO_PASSRIGHTS`, Linux 6.16). Nothing here wants any, and whoever receives one closes
/// it, for as long as its sender has made that take.
pub(crate) fn refuse_descriptors(socket: BorrowedFd<'_>) {
    const SO_PASSRIGHTS: libc::c_int = 83;
    let passes: libc::c_int = 0;
    // SAFETY: the option takes an `int`, which is read during the call. Where it is not known,
    // nothing is changed.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            std::ptr::from_ref(&passes).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        );
    }
}

/// Connects to a Unix socket.
pub(crate) async fn connect(path: &Path) -> io::Result<UnixStream> {
    let fd = connect_descriptor(path).await?;
    // SAFETY: `into_raw_fd` gives up the ownership that the stream takes over.
    Ok(unsafe { UnixStream::from_raw_fd(fd.into_raw_fd()) })
}

/// The same, for those who hold the socket in another type: glommio's does not show its descriptor.
pub(crate) async fn connect_descriptor(path: &Path) -> io::Result<OwnedFd> {
    let address = address(path)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    refuse_descriptors(fd.as_fd());
    // It connects at once, or says that the listener's backlog is full.
    while let Err(errno) = nix_connect(fd.as_raw_fd(), &address) {
        if errno != Errno::EAGAIN {
            return Err(errno.into());
        }
        glommio::timer::sleep(Duration::from_millis(1)).await;
    }
    // io_uring would hand every "nothing yet" to us instead of waiting.
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(fd)
}
