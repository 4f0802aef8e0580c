// SPDX-License-Identifier: MIT OR Apache-2.0
//! Descriptors that come along a Unix socket, and how they are kept from stopping an executor.
//!
//! Whoever drops the last reference to an open file waits until it is closed, and the peer that
//! passed it decides how long that takes: a TCP socket with unsent data lingers, a file of a FUSE
//! file system is closed by a program of the peer's. Until a descriptor is known to be memory or an
//! eventfd, an executor's thread must not have the last reference to its file, also not in the
//! kernel: a receive without a control buffer closes what came along, and so does the close of a
//! socket with unread messages.
//!
//! - Where the kernel can refuse descriptors (`SO_PASSRIGHTS`, Linux 6.16), it does, except on a
//!   server's socket between its request for the memory and the receipt.
//! - Wherever they can come, a receive looks first ([`peek`]). That gives duplicates, while the
//!   socket's queue keeps its own references, so no duplicate is the last. Bytes are taken out of
//!   the queue only when nothing came with them, or what [`FdKind`] knows.
//! - File systems are told of each close of a descriptor, not of the last one only, and those of
//!   FUSE and of the network are waited for. So duplicates of what is not known are closed by
//!   [`fd_disposal`] as well. No more of them are made than tells that they are too many.
//! - A socket whose queue still has others is emptied, and closed, by [`fd_disposal`].
//! - A receive skips an out-of-band byte, and closes what came with it. So such bytes are kept in
//!   line with the others (`SO_OOBINLINE`).
//!
//! `unsafe` here: the control messages of `recvmsg`, and taking over the descriptors that the
//! kernel made for them. (`nix` returns none of them when some were cut.)

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::sockopt;
use nix::{setsockopt_impl, sockopt_impl};

use crate::net::fd_disposal;
use shmipc_core::shm::map::fd_kind::FdKind;

/// `asm-generic/socket.h`
const SO_PASSRIGHTS: libc::c_int = 83;

sockopt_impl!(
    /// Whether descriptors can be sent to a Unix socket.
    PassRights,
    SetOnly,
    libc::SOL_SOCKET,
    SO_PASSRIGHTS,
    bool
);

/// How many descriptors of one message are looked at: more than are ever due, and no more, since
/// duplicates of what is foreign stay open for as long as their closes take.
const MAX_LOOKED_AT: usize = 6;

/// What the control message of that many takes, in words so that it is aligned. It is full then.
const CONTROL_WORDS: usize = (size_of::<libc::cmsghdr>()
    + (MAX_LOOKED_AT * size_of::<RawFd>()).next_multiple_of(size_of::<usize>()))
    / size_of::<usize>();

/// Has the kernel refuse descriptors that are sent to a Unix socket from now on. Those that came
/// before stay in its queue. Whether the kernel does.
///
/// Of a listening socket, those that are accepted have it too, from when they connect.
pub(crate) fn refuse_descriptors(socket: impl AsFd) -> bool {
    let socket = socket.as_fd();
    // Not known on a kernel without it, and then nothing can come that way.
    let _ = nix::sys::socket::setsockopt(&socket, sockopt::OobInline, &true);
    set_pass_rights(socket, false).is_ok()
}

/// Lets descriptors come, where they were refused.
pub(crate) fn admit_descriptors(socket: impl AsFd) -> io::Result<()> {
    set_pass_rights(socket.as_fd(), true)
}

fn set_pass_rights(socket: BorrowedFd<'_>, passes: bool) -> io::Result<()> {
    Ok(nix::sys::socket::setsockopt(&socket, PassRights, &passes)?)
}

/// What stands first in a socket's queue.
pub(crate) struct Peeked {
    /// How many bytes. Zero: the end.
    pub(crate) bytes: usize,
    /// Duplicates of the descriptors that came with them.
    pub(crate) descriptors: Vec<OwnedFd>,
    /// Whether there were more of them: than are looked at, or than this process has room for.
    pub(crate) is_cut: bool,
    /// The user at the other end, of whom descriptors came.
    uid: Option<u32>,
}

impl Peeked {
    pub(crate) fn has_descriptors(&self) -> bool {
        self.is_cut || !self.descriptors.is_empty()
    }

    /// The descriptors, which are all known to be harmless to close.
    pub(crate) fn into_descriptors(mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.descriptors)
    }
}

impl Drop for Peeked {
    fn drop(&mut self) {
        let foreign = |fd: &OwnedFd| !FdKind::of(fd.as_fd()).is_harmless();
        let foreign: Vec<_> = self.descriptors.drain(..).filter(foreign).collect();
        if !foreign.is_empty() {
            fd_disposal::close_foreign(foreign, self.uid);
        }
    }
}

/// Looks at what is first in a socket's queue and leaves it there. `None`: nothing is there now.
///
/// The next receive of so many bytes takes exactly these, and the references to the files that came
/// with them.
pub(crate) fn peek(socket: BorrowedFd<'_>, to: &mut [u8]) -> io::Result<Option<Peeked>> {
    let mut control = [const { MaybeUninit::<usize>::uninit() }; CONTROL_WORDS];
    let mut part = libc::iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() };
    // SAFETY: plain data, for which zero is a valid value of every field.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    let bytes = loop {
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        // SAFETY: the parts of the message are those above, with their lengths, and outlive the
        // call, which writes nothing beyond them.
        let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
        match usize::try_from(count) {
            Ok(count) => break count,
            Err(_) => match Errno::last() {
                Errno::EINTR => {}
                Errno::EAGAIN => return Ok(None),
                errno => return Err(errno.into()),
            },
        }
    };
    let is_cut = message.msg_flags & libc::MSG_CTRUNC != 0;
    // SAFETY: the kernel has just filled it.
    let descriptors = unsafe { take_descriptors(&message) };
    let uid = if descriptors.is_empty() { None } else { fd_disposal::peer(socket) };
    Ok(Some(Peeked { bytes, descriptors, is_cut, uid }))
}

/// Every descriptor of a message's control messages, however much else is missing.
///
/// # Safety
///
/// `recvmsg` has filled the message, and nobody has taken its descriptors yet.
unsafe fn take_descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: `msg_control` holds as many bytes as `msg_controllen` says the kernel has written.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: null, or a header within these bytes, of which the buffer is aligned for one.
    while let Some(header) = unsafe { next.as_ref() } {
        if (header.cmsg_level, header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: no more than arithmetic.
            let (data, none) = unsafe { (libc::CMSG_DATA(next), libc::CMSG_LEN(0)) };
            let len = header.cmsg_len.saturating_sub(none as usize);
            for index in 0..len / size_of::<RawFd>() {
                // SAFETY: the message has that many descriptors, by its length. The kernel made
                // them for this process in the call, and nobody else knows of them.
                descriptors.push(unsafe {
                    OwnedFd::from_raw_fd(data.cast::<RawFd>().add(index).read_unaligned())
                });
            }
        }
        // SAFETY: as for the first one.
        next = unsafe { libc::CMSG_NXTHDR(message, next) };
    }
    descriptors
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Write};
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{ControlMessage, MsgFlags, recv, sendmsg};

    use super::*;

    fn send(socket: &UnixStream, fds: &[RawFd], flags: MsgFlags) -> nix::Result<usize> {
        let control = [ControlMessage::ScmRights(fds)];
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b"x")], &control, flags, None)
    }

    fn take(socket: &UnixStream, count: usize) {
        let taken = recv(socket.as_raw_fd(), &mut vec![0; count], MsgFlags::MSG_DONTWAIT);
        assert_eq!(taken, Ok(count));
    }

    /// Whether the reading end of a pipe is open anywhere.
    fn is_open(mut writing_end: &std::fs::File) -> bool {
        // Rust programs ignore SIGPIPE.
        writing_end.write(b"x").is_ok()
    }

    #[test]
    fn a_look_gives_duplicates_and_leaves_all_in_the_queue() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let (reading, writing) = nix::unistd::pipe().unwrap();
        let writing = std::fs::File::from(writing);
        ours.write_all(b"before").unwrap();
        send(&ours, &[reading.as_raw_fd(); MAX_LOOKED_AT], MsgFlags::empty()).unwrap();
        send(&ours, &[reading.as_raw_fd(); 253], MsgFlags::empty()).unwrap();
        ours.write_all(b"behind").unwrap();
        drop(reading);
        let mut bytes = [0; 100];
        for _ in 0..3 {
            let peeked = peek(theirs.as_fd(), &mut bytes).unwrap().unwrap();
            // Up to the one with descriptors, and no further.
            assert_eq!((peeked.bytes, &bytes[..7]), (7, &b"beforex"[..]));
            assert_eq!((peeked.descriptors.len(), peeked.is_cut), (MAX_LOOKED_AT, false));
            drop(peeked);
            assert!(is_open(&writing), "the queue still has it");
        }
        take(&theirs, 6);
        assert!(peek(theirs.as_fd(), &mut bytes).unwrap().unwrap().has_descriptors());
        take(&theirs, 1);
        let peeked = peek(theirs.as_fd(), &mut bytes).unwrap().unwrap();
        assert_eq!((peeked.descriptors.len(), peeked.is_cut), (MAX_LOOKED_AT, true));
        drop(peeked);
        take(&theirs, 1);
        // Its duplicates are closed elsewhere.
        while is_open(&writing) {
            std::thread::yield_now();
        }
        let peeked = peek(theirs.as_fd(), &mut bytes).unwrap().unwrap();
        assert_eq!((peeked.bytes, peeked.has_descriptors()), (6, false));
        take(&theirs, 6);
        assert!(peek(theirs.as_fd(), &mut bytes).unwrap().is_none());
        drop(ours);
        assert_eq!(peek(theirs.as_fd(), &mut bytes).unwrap().unwrap().bytes, 0);
    }

    #[test]
    fn an_out_of_band_byte_is_seen_before_it_is_skipped() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        refuse_descriptors(&theirs);
        // Where the kernel cannot refuse them, they are let in as it is.
        let _ = admit_descriptors(&theirs);
        let (reading, writing) = nix::unistd::pipe().unwrap();
        match send(&ours, &[reading.as_raw_fd()], MsgFlags::MSG_OOB) {
            // A kernel without `CONFIG_AF_UNIX_OOB`.
            Err(Errno::EOPNOTSUPP) => return,
            sent => assert_eq!(sent, Ok(1)),
        }
        ours.write_all(b"behind").unwrap();
        drop(reading);
        let mut bytes = [0; 100];
        let peeked = peek(theirs.as_fd(), &mut bytes).unwrap().unwrap();
        assert_eq!(peeked.descriptors.len(), 1);
        drop(peeked);
        assert!(is_open(&std::fs::File::from(writing)));
    }

    #[test]
    fn the_kernel_refuses_descriptors_where_it_can() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        if !refuse_descriptors(&theirs) {
            return println!("skipped: a kernel before 6.16");
        }
        let fds = [ours.as_raw_fd()];
        assert_eq!(send(&ours, &fds, MsgFlags::empty()), Err(Errno::EPERM));
        admit_descriptors(&theirs).unwrap();
        assert_eq!(send(&ours, &fds, MsgFlags::empty()), Ok(1));
        assert!(refuse_descriptors(&theirs));
        assert_eq!(send(&ours, &fds, MsgFlags::empty()), Err(Errno::EPERM));
        // What came while it could is still there.
        assert!(peek(theirs.as_fd(), &mut [0; 9]).unwrap().unwrap().has_descriptors());
    }
}
