// SPDX-License-Identifier: MIT OR Apache-2.0
//! Closing Unix sockets whose queue may hold descriptors of the peer's, whose close may take as
//! long as the peer likes (see [`fd_passing`](crate::net::fd_passing)).
//!
//! Most sockets are empty when they are closed, or hold bytes, or memory that came too late: these
//! are [emptied](is_harmless) on the spot. What is left is emptied by a helper thread, which waits
//! where the kernel waits, and the socket's last reference is dropped only behind that.
//!
//! Each socket has a thread of its own, so none waits for another one, as long as there are not too
//! many of them: [`MAX_THREADS`] in all and [`MAX_THREADS_PER_USER`]. Sockets beyond that wait in a
//! queue, as open as they were. They are few, since nothing is accepted from a user who has
//! [too many](has_too_many_unclosed) of them, and at last from nobody. A thread that cannot be
//! started is tried again with the next socket.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::exec::runtime::TcpStream;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, sockopt};

use crate::net::descriptor::fd_of_stream;
use crate::net::fd_passing::{peek, refuse_descriptors};
use shmipc_core::shm::map::fd_kind::FdKind;

/// The most threads that empty sockets, in all and for one user.
const MAX_THREADS: usize = 256;
const MAX_THREADS_PER_USER: usize = 64;
/// Their stacks: they do nothing but receive.
const STACK_LEN: usize = 64 << 10;
/// How many sockets of one user, and of all, may wait to be emptied while more are accepted.
const MAX_UNCLOSED_PER_USER: usize = 128;
const MAX_UNCLOSED: usize = 1024;
/// How much is taken out of a socket on the spot: so many times so many bytes, which is more than a
/// socket's buffer has by default.
const LOOKS: usize = 64;
const LOOK_LEN: usize = 4096;
/// How often, and how long apart, a listener's queue is tried when no descriptor is left.
const ACCEPT_TRIES: usize = 500;
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// A user, if known.
type Uid = Option<u32>;

/// A connected Unix socket, which nobody has read from yet.
#[derive(Debug)]
pub(crate) struct PeerSocket {
    /// Until it is closed, or taken.
    fd: Option<OwnedFd>,
    refuses_descriptors: bool,
}

impl PeerSocket {
    /// Has the kernel refuse descriptors, if it can.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        let refuses_descriptors = refuse_descriptors(&fd);
        Self { fd: Some(fd), refuses_descriptors }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().expect("it is not taken yet").as_fd()
    }

    /// The descriptor, and whether the kernel refuses to have others sent to it.
    pub(crate) fn into_parts(mut self) -> (OwnedFd, bool) {
        (self.fd.take().expect("it is taken once"), self.refuses_descriptors)
    }
}

impl Drop for PeerSocket {
    fn drop(&mut self) {
        if let Some(fd) = self.fd.take().filter(|_| !self.refuses_descriptors) {
            close(fd);
        }
    }
}

/// Closes a connected Unix socket without waiting for what its peer has passed.
pub(crate) fn close(fd: OwnedFd) {
    if !is_harmless(fd.as_fd()) {
        let uid = peer(fd.as_fd());
        submit(Job { target: Target::Connection(fd), uid });
    }
}

/// As [`close`], for a socket that glommio has taken over.
pub(crate) fn close_stream(stream: TcpStream) {
    let fd = fd_of_stream(&stream);
    if is_harmless(fd) {
        return drop(stream);
    }
    let uid = peer(fd);
    match fd.try_clone_to_owned() {
        // While the duplicate is open, closing the other one is nothing.
        Ok(duplicate) => {
            drop(stream);
            submit(Job { target: Target::Connection(duplicate), uid });
        }
        // There is no room for it. So it stays open here while the helper empties it.
        Err(_) => {
            let is_empty = Arc::new(AtomicBool::new(false));
            let target = Target::Kept(fd.as_raw_fd(), Arc::clone(&is_empty));
            KEPT.with_borrow_mut(|kept| kept.0.push(Kept { stream: Some(stream), is_empty }));
            submit(Job { target, uid });
        }
    }
}

/// Closes a listening Unix socket whose connections were not all accepted.
pub(crate) fn close_listener(fd: OwnedFd) {
    submit(Job { target: Target::Listener(fd), uid: None });
}

/// Closes duplicates of what a peer has passed that may take long to close.
pub(crate) fn close_foreign(fds: Vec<OwnedFd>, uid: Uid) {
    submit(Job { target: Target::Duplicates(fds), uid });
}

/// Whether nothing is to be accepted from a user, since so many of its sockets could not be closed.
/// Returns how many.
pub(crate) fn has_too_many_unclosed(uid: Uid) -> Option<usize> {
    if UNCLOSED.load(Ordering::Relaxed) < MAX_UNCLOSED_PER_USER {
        return None;
    }
    let count = books().unclosed.get(&uid).copied().unwrap_or(0);
    Some(count).filter(|&count| count >= MAX_UNCLOSED_PER_USER)
}

/// Whether nothing is to be accepted from anybody for that reason.
pub(crate) fn are_too_many_unclosed() -> bool {
    UNCLOSED.load(Ordering::Relaxed) >= MAX_UNCLOSED
}

/// Closes what was kept on this thread and is empty by now, and has another try at threads that
/// could not be started.
pub(crate) fn catch_up() {
    KEPT.with_borrow_mut(|kept| {
        // Pairs with the release store of the helper: its last use of the socket is over.
        kept.0.retain(|kept| !kept.is_empty.load(Ordering::Acquire));
    });
    if UNCLOSED.load(Ordering::Relaxed) > 0 {
        start_helpers();
    }
}

/// Empties a socket as far as nothing is in it whose close could take long. Whether it is empty,
/// and stays so.
fn is_harmless(socket: BorrowedFd<'_>) -> bool {
    // From here on nobody can put anything in. It also has io_uring end what waits for the socket,
    // before this call returns, so that nobody is in the middle of a receive.
    let _ = nix::sys::socket::shutdown(socket.as_raw_fd(), Shutdown::Both);
    let mut bytes = [0; LOOK_LEN];
    for _ in 0..LOOKS {
        let peeked = match peek(socket, &mut bytes) {
            Ok(Some(peeked)) => peeked,
            Ok(None) => return true,
            // It was the error of the peer's end, and is told once.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => continue,
            // Not to be seen is not to be trusted.
            Err(_) => return false,
        };
        if peeked.bytes == 0 {
            return true;
        }
        let is_known = |fd: &OwnedFd| FdKind::of(fd.as_fd()).is_harmless();
        if peeked.is_cut || !peeked.descriptors.iter().all(is_known) {
            return false;
        }
        // The duplicates are still open, so nothing is closed by this.
        if receive(socket.as_raw_fd(), &mut bytes[..peeked.bytes]).is_err() {
            return false;
        }
    }
    false
}

fn receive(socket: RawFd, to: &mut [u8]) -> nix::Result<usize> {
    loop {
        match nix::sys::socket::recv(socket, to, MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EINTR) => {}
            received => return received,
        }
    }
}

/// Who is at the other end, if that is known.
pub(crate) fn peer(socket: BorrowedFd<'_>) -> Uid {
    nix::sys::socket::getsockopt(&socket, sockopt::PeerCredentials).ok().map(|found| found.uid())
}

thread_local! {
    static KEPT: RefCell<AllKept> = const { RefCell::new(AllKept(Vec::new())) };
}

/// Sockets that stay open on this thread until a helper has emptied them.
struct AllKept(Vec<Kept>);

struct Kept {
    stream: Option<TcpStream>,
    is_empty: Arc<AtomicBool>,
}

impl Drop for AllKept {
    fn drop(&mut self) {
        for kept in &mut self.0 {
            if !kept.is_empty.load(Ordering::Acquire) {
                // The thread ends. Its helper may still be at it, so nobody may have the number.
                std::mem::forget(kept.stream.take());
            }
        }
    }
}

/// Something that a helper closes.
struct Job {
    target: Target,
    uid: Uid,
}

enum Target {
    Connection(OwnedFd),
    /// Somebody else's, who closes it when this has become true.
    Kept(RawFd, Arc<AtomicBool>),
    Listener(OwnedFd),
    /// Of descriptors whose files are open elsewhere.
    Duplicates(Vec<OwnedFd>),
}

#[derive(Default)]
struct Books {
    waiting: VecDeque<Job>,
    threads: usize,
    threads_of: BTreeMap<Uid, usize>,
    unclosed: BTreeMap<Uid, usize>,
}

static BOOKS: Mutex<Books> = Mutex::new(Books {
    waiting: VecDeque::new(),
    threads: 0,
    threads_of: BTreeMap::new(),
    unclosed: BTreeMap::new(),
});

/// How many sockets are in the books, for those who need no more than a hint.
static UNCLOSED: AtomicUsize = AtomicUsize::new(0);

fn books() -> MutexGuard<'static, Books> {
    BOOKS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Books {
    /// A socket of a user who has not all the threads that one user may have.
    fn take(&mut self) -> Option<Job> {
        let has_thread = |job: &Job| {
            self.threads_of.get(&job.uid).is_none_or(|&threads| threads < MAX_THREADS_PER_USER)
        };
        let at = self.waiting.iter().position(has_thread)?;
        let job = self.waiting.remove(at)?;
        *self.threads_of.entry(job.uid).or_default() += 1;
        Some(job)
    }

    fn note_done(&mut self, uid: Uid) {
        for counts in [&mut self.threads_of, &mut self.unclosed] {
            match counts.get_mut(&uid) {
                Some(count) if *count > 1 => *count -= 1,
                _ => drop(counts.remove(&uid)),
            }
        }
        // Relaxed, here and everywhere: a hint, that orders nothing.
        UNCLOSED.fetch_sub(1, Ordering::Relaxed);
    }
}

fn submit(job: Job) {
    {
        let mut books = books();
        *books.unclosed.entry(job.uid).or_default() += 1;
        UNCLOSED.fetch_add(1, Ordering::Relaxed);
        books.waiting.push_back(job);
    }
    start_helpers();
}

/// Starts a helper if something waits for one. It finds for itself what: what a thread that cannot
/// be started was to own would be dropped here.
fn start_helpers() {
    {
        let mut books = books();
        if books.waiting.is_empty() || books.threads >= MAX_THREADS {
            return;
        }
        books.threads += 1;
    }
    let builder = std::thread::Builder::new().name("shmipc-close".into()).stack_size(STACK_LEN);
    if let Err(error) = builder.spawn(help) {
        books().threads -= 1;
        tracing::warn!(%error, "no thread to close what a peer has passed; tried again later");
    }
}

/// What a helper does.
fn help() {
    loop {
        let job = {
            let mut books = books();
            match books.take() {
                Some(job) => job,
                None => {
                    books.threads -= 1;
                    return;
                }
            }
        };
        let uid = job.uid;
        close_here(job.target);
        books().note_done(uid);
    }
}

/// Closes a socket however long that takes.
fn close_here(target: Target) {
    match target {
        Target::Connection(fd) => empty(fd.as_raw_fd()),
        Target::Kept(fd, is_empty) => {
            empty(fd);
            // Pairs with the acquire load in `catch_up`.
            is_empty.store(true, Ordering::Release);
        }
        Target::Listener(fd) => refuse_waiting(fd),
        Target::Duplicates(fds) => drop(fds),
    }
}

/// Takes everything out of a socket that was shut down. What came with it is closed by the kernel,
/// and this thread waits for that.
fn empty(socket: RawFd) {
    let mut bytes = [0; LOOK_LEN];
    loop {
        match receive(socket, &mut bytes) {
            Ok(0) => return,
            Ok(_) | Err(Errno::ECONNRESET) => {}
            Err(_) => return,
        }
    }
}

/// Closes the connections that nobody accepted, each as the socket that it is.
fn refuse_waiting(fd: OwnedFd) {
    // No more come, and accepting waits for none.
    let _ = nix::sys::socket::shutdown(fd.as_raw_fd(), Shutdown::Both);
    let listener = UnixListener::from(fd);
    let mut tries = 0;
    loop {
        match listener.accept() {
            Ok((connection, _)) => close(connection.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM) if tries < ACCEPT_TRIES => {
                    tries += 1;
                    std::thread::sleep(ACCEPT_PAUSE);
                }
                _ => return,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{IoSlice, Read, Write};
    use std::net::{TcpListener, TcpStream as StdTcpStream};
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    use nix::libc::linger;
    use nix::sys::socket::{ControlMessage, sendmsg};

    use super::*;

    /// For how long a close of a lingering socket takes, if its peer does not read.
    const LINGER: Duration = Duration::from_secs(60);

    /// A TCP socket with unsent data that lingers, and its peer, that does not read.
    fn lingering() -> (StdTcpStream, StdTcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = StdTcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (peer, _) = listener.accept().unwrap();
        let option = linger { l_onoff: 1, l_linger: LINGER.as_secs() as i32 };
        nix::sys::socket::setsockopt(&socket, sockopt::Linger, &option).unwrap();
        socket.set_nonblocking(true).unwrap();
        while (&socket).write(&[0; 1 << 16]).is_ok() {}
        (socket, peer)
    }

    /// Passes descriptors with one byte.
    fn pass(to: &UnixStream, fds: &[BorrowedFd<'_>]) {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&raw)];
        let parts = [IoSlice::new(b"x")];
        sendmsg::<()>(to.as_raw_fd(), &parts, &control, MsgFlags::empty(), None).unwrap();
    }

    /// A connection, as on a kernel that cannot refuse descriptors, and its peer.
    fn connection() -> (PeerSocket, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (PeerSocket { fd: Some(ours.into()), refuses_descriptors: false }, theirs)
    }

    /// A connection that has a pipe in its queue, and what reads the end of that when it is closed.
    fn with_pipe() -> (PeerSocket, File) {
        let (socket, peer) = connection();
        let (reading, writing) = nix::unistd::pipe().unwrap();
        pass(&peer, &[writing.as_fd()]);
        (socket, reading.into())
    }

    #[test]
    fn a_close_that_takes_long_holds_up_nobody() {
        let start = Instant::now();
        let mut peers = Vec::new();
        for _ in 0..20 {
            let (socket, to) = connection();
            let (slow, peer) = lingering();
            // What comes in front and behind does not hide it.
            (&to).write_all(&[7; 5000]).unwrap();
            pass(&to, &[slow.as_fd()]);
            (&to).write_all(b"more").unwrap();
            drop((slow, socket));
            peers.push(peer);
        }
        // Others that are foreign as well are closed meanwhile.
        for _ in 0..20 {
            let (socket, mut pipe) = with_pipe();
            drop(socket);
            assert_eq!(pipe.read(&mut [0]).unwrap(), 0);
        }
        assert!(start.elapsed() < LINGER, "closing waited for what was passed");
        drop(peers);
    }

    #[test]
    fn memory_and_events_are_closed_on_the_spot() {
        let (socket, peer) = connection();
        let memory = nix::sys::memfd::memfd_create(c"x", nix::sys::memfd::MFdFlags::empty());
        let event = nix::sys::eventfd::EventFd::new().unwrap();
        pass(&peer, &[memory.unwrap().as_fd(), event.as_fd()]);
        (&peer).write_all(&[1; 10_000]).unwrap();
        assert!(is_harmless(socket.fd()));
        assert!(peek(socket.fd(), &mut [0; 9]).unwrap().is_none_or(|peeked| peeked.bytes == 0));
        assert!((&peer).write(b"x").is_err(), "nobody can put in more");
    }

    #[test]
    fn a_stream_that_cannot_be_duplicated_is_kept_until_it_is_empty() {
        let executor = glommio::LocalExecutorBuilder::default().make().unwrap();
        executor.run(async {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (reading, writing) = nix::unistd::pipe().unwrap();
            pass(&theirs, &[writing.as_fd()]);
            drop(writing);
            let (raw, is_empty) = (ours.as_raw_fd(), Arc::new(AtomicBool::new(false)));
            let _ = nix::sys::socket::shutdown(raw, Shutdown::Both);
            submit(Job { target: Target::Kept(raw, Arc::clone(&is_empty)), uid: None });
            assert_eq!(File::from(reading).read(&mut [0]).unwrap(), 0);
            let start = Instant::now();
            while !is_empty.load(Ordering::Acquire) {
                assert!(start.elapsed() < LINGER);
                glommio::timer::sleep(Duration::from_millis(1)).await;
            }
            assert_eq!((&ours).read(&mut [0]).unwrap(), 0, "it is still this side's");
        });
    }

    #[test]
    fn connections_that_nobody_accepted_are_closed_elsewhere() {
        let path = std::env::temp_dir().join(format!("shmipc-backlog-{}", std::process::id()));
        let start = Instant::now();
        let listener = UnixListener::bind(&path).unwrap();
        let mut clients = Vec::new();
        let (slow, peer) = lingering();
        for fd in [slow.as_fd(), std::io::stdin().as_fd()] {
            let client = UnixStream::connect(&path).unwrap();
            pass(&client, &[fd]);
            clients.push(client);
        }
        std::fs::remove_file(&path).unwrap();
        drop(slow);
        close_listener(listener.into());
        // Both see the end, whatever the other one has sent.
        for mut client in clients {
            let end = client.read(&mut [0]);
            let is_reset = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionReset;
            assert!(matches!(&end, Ok(0)) || end.is_err_and(|error| is_reset(&error)));
        }
        assert!(start.elapsed() < LINGER);
        drop(peer);
    }
}
