// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files of a file system whose program answers when it likes (FUSE), passed by a peer. Such a file
//! system is told of each close of a descriptor, also of one that is not the last of its file.

use std::fs::{File, OpenOptions};
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_lite::{AsyncReadExt, AsyncWriteExt};
use glommio::{LocalExecutorBuilder, Placement};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use shmipc_glommio::{Config, Connector, Listener};

/// Far above what anything here takes.
const LONG: Duration = Duration::from_secs(60);

/// A file system with one file, whose program can stop to answer to closes.
struct SlowFiles {
    at: PathBuf,
    is_silent: Arc<AtomicBool>,
    /// How many closes were not answered.
    unanswered: Arc<AtomicUsize>,
    /// Dropped last, since its close may not be answered either.
    file: Option<OwnedFd>,
}

/// Numbers of requests (`linux/fuse.h`).
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;

impl SlowFiles {
    /// `None`: this user may not mount it, or this kernel does not know it.
    fn mount(name: &str) -> Option<Self> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").ok()?;
        let at = std::env::temp_dir().join(format!("shmipc-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&at).unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        if mount(Some("slow"), &at, Some("fuse"), MsFlags::empty(), Some(&*options)).is_err() {
            std::fs::remove_dir(&at).unwrap();
            return None;
        }
        let (is_silent, unanswered) = (Arc::default(), Arc::default());
        let mut files = Self { at, is_silent, unanswered, file: None };
        let (is_silent, unanswered) = (Arc::clone(&files.is_silent), Arc::clone(&files.unanswered));
        std::thread::spawn(move || answer(&device, &is_silent, &unanswered));
        let file = OpenOptions::new().read(true).write(true).open(files.at.join("file"));
        files.file = Some(file.unwrap().into());
        Some(files)
    }
}

impl Drop for SlowFiles {
    fn drop(&mut self) {
        // By force: it ends what waits for an answer, too.
        let _ = umount2(&self.at, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
        let _ = std::fs::remove_dir(&self.at);
    }
}

/// The program behind the file system, until it is unmounted.
fn answer(mut device: &File, is_silent: &AtomicBool, unanswered: &AtomicUsize) {
    let words = |words: &[u32]| words.iter().flat_map(|it| it.to_ne_bytes()).collect::<Vec<u8>>();
    // Inode, mode and links, of which the last two differ between the directory and the file.
    let attributes = |inode: u32| {
        let mode = if inode == 1 { 0o40_755 } else { 0o100_666 };
        let mut all = vec![inode, 0, 4096, 0, 8, 0];
        all.extend([0; 9]);
        all.extend([mode, 1, 0, 0, 0, 4096, 0]);
        words(&all)
    };
    let mut request = vec![0; 1 << 20];
    while let Ok(len) = device.read(&mut request) {
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let (kind, inode) = (word(4), word(16));
        assert!(len >= 40);
        let (error, payload) = match kind {
            INIT => {
                let mut answer = vec![7, 31, 0, 0, 0, 1 << 17, 1];
                answer.extend([0; 9]);
                (0, words(&answer))
            }
            LOOKUP => (0, [words(&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0]), attributes(2)].concat()),
            GETATTR => (0, [words(&[0; 4]), attributes(inode)].concat()),
            OPEN => (0, words(&[1, 0, 0, 0])),
            FLUSH if is_silent.load(Ordering::SeqCst) => {
                unanswered.fetch_add(1, Ordering::SeqCst);
                continue;
            }
            FLUSH | RELEASE => (0, Vec::new()),
            FORGET | INTERRUPT => continue,
            _ => (nix::libc::ENOSYS, Vec::new()),
        };
        let header = words(&[16 + payload.len() as u32, error.wrapping_neg() as u32]);
        let _ = device.write_all(&[&header, &request[8..16], &payload].concat());
    }
}

fn message(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (8 + payload.len() as u32).to_be_bytes().to_vec();
    bytes.extend([0x77, 0x58, 3, kind]);
    bytes.extend(payload);
    bytes
}

/// Shakes hands up to where the descriptors are due, and passes these.
fn pass(path: &Path, fds: &[RawFd]) -> UnixStream {
    let mut socket = UnixStream::connect(path).unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    let mut answer = [0; 8];
    socket.write_all(&message(4, &[])).unwrap();
    socket.read_exact(&mut answer).unwrap();
    socket.write_all(&message(5, b"\0\x01q\0\x01b")).unwrap();
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(answer[7], 7, "asks for descriptors");
    let rights = [ControlMessage::ScmRights(fds)];
    let flags = MsgFlags::empty();
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&[0])], &rights, flags, None).unwrap();
    socket
}

fn config() -> Config {
    Config::builder().buffer_size(1 << 20).queue_capacity(64).build().unwrap()
}

/// Returns when an honest client was served.
fn honest_echo(path: &Path) {
    let path = path.to_owned();
    let client = LocalExecutorBuilder::new(Placement::Unbound).spawn(move || async move {
        let session = Connector::new(config()).connect(&path).await.unwrap();
        let mut stream = session.open_stream().unwrap();
        stream.write_all(b"hello").await.unwrap();
        stream.read_exact(&mut [0; 5]).await.unwrap();
    });
    client.unwrap().join().unwrap();
}

#[test]
fn a_file_system_that_does_not_answer_to_closes_holds_up_nobody() {
    let Some(files) = SlowFiles::mount("slow-files") else {
        return println!("skipped: FUSE cannot be mounted here");
    };
    let path = std::env::temp_dir().join(format!("shmipc-slow-{}.sock", std::process::id()));
    let (bound, is_bound) = std::sync::mpsc::channel();
    let at = path.clone();
    // It lives as long as the process, since a server that is held up cannot be ended.
    std::thread::spawn(move || {
        let executor = LocalExecutorBuilder::new(Placement::Unbound).make().unwrap();
        executor.run(async move {
            let listener = Listener::bind(&at, config()).unwrap();
            bound.send(()).unwrap();
            while let Ok(session) = listener.accept().await {
                glommio::spawn_local(async move {
                    while let Ok(mut stream) = session.accept().await {
                        let mut bytes = [0; 5];
                        while stream.read_exact(&mut bytes).await.is_ok() {
                            let _ = stream.write_all(&bytes).await;
                        }
                    }
                })
                .detach();
            }
        });
    });
    is_bound.recv().unwrap();
    honest_echo(&path);
    let memory = memfd_create(c"slow", MFdFlags::MFD_CLOEXEC).unwrap();
    let slow = files.file.as_ref().unwrap();
    files.is_silent.store(true, Ordering::SeqCst);
    let (memory, slow) = (memory.as_raw_fd(), slow.as_raw_fd());
    let mut sockets = Vec::new();
    for fds in [vec![slow, slow], vec![memory, slow], vec![slow; 253], vec![slow]] {
        sockets.push(pass(&path, &fds));
        let (served, is_served) = std::sync::mpsc::channel();
        let at = path.clone();
        std::thread::spawn(move || {
            honest_echo(&at);
            let _ = served.send(());
        });
        let in_time = is_served.recv_timeout(LONG);
        assert!(in_time.is_ok(), "nobody is served since {} descriptors came", fds.len());
    }
    let start = Instant::now();
    while files.unanswered.load(Ordering::SeqCst) < 4 {
        assert!(start.elapsed() < LONG, "the passed files are not closed");
        std::thread::sleep(Duration::from_millis(1));
    }
    let _ = std::fs::remove_file(&path);
}
