// SPDX-License-Identifier: MIT OR Apache-2.0
//! Peers that pass descriptors whose close takes long. Whoever drops the last reference to such a
//! file waits: no executor does.
//!
//! Each test runs as on a kernel that can refuse descriptors, and as on one that cannot.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use glommio::{LocalExecutorBuilder, Placement};
use nix::errno::Errno;
use nix::libc::linger;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};
use shmipc_glommio::{Config, Connector, Listener};

use super::connecting::{RawServer, client_config};
use super::files::Directory;
use crate::bed;
use crate::support::bed::{Bed, DEADLINE};
use crate::support::older_kernel::both;
use crate::support::raw::{EXCHANGE, Memory, Raw, Rig, STAGES, SYNC, Stage, at_stage, message};

/// For how long a close of what is passed takes: for as long as any test here.
const LINGER: i32 = 600;

/// How many are passed at once. Some of glommio's signals end the wait for one, after a tenth of a
/// second; all of them take longer than anybody is waited for here.
const AT_ONCE: usize = 100;

/// TCP sockets with unsent data that linger, and their peers, which do not read.
struct Slow {
    sockets: Vec<TcpStream>,
    _peers: Vec<TcpStream>,
}

impl Slow {
    fn new() -> Self {
        Self::of(AT_ONCE)
    }

    fn of(count: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // Little takes as long as much.
        setsockopt(&listener, sockopt::RcvBuf, &4096).unwrap();
        let mut slow = Self { sockets: Vec::new(), _peers: Vec::new() };
        for _ in 0..count {
            let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let option = linger { l_onoff: 1, l_linger: LINGER };
            setsockopt(&socket, sockopt::Linger, &option).unwrap();
            setsockopt(&socket, sockopt::SndBuf, &4096).unwrap();
            socket.set_nonblocking(true).unwrap();
            while (&socket).write(&[0; 1 << 12]).is_ok() {}
            slow.sockets.push(socket);
            slow._peers.push(listener.accept().unwrap().0);
        }
        slow
    }

    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.sockets.iter().map(AsFd::as_fd).collect()
    }

    /// Passes them on, if that can be, and keeps no reference to them, so that the other side has
    /// the last ones: it stands still meanwhile, or has not read any of it.
    fn pass(self, to: &UnixStream, bytes: &[u8], flags: MsgFlags) -> Slowness {
        let is_sent = pass(to, bytes, &self.fds(), flags);
        self.let_go(is_sent)
    }

    /// The same to one that runs, and may have closed them by the time that they are dropped here.
    fn pass_to_a_running_one(self, to: &UnixStream) -> Slowness {
        if !pass(to, b"hello", &self.fds(), MsgFlags::empty()) {
            return self.let_go(false);
        }
        let Self { sockets, _peers } = self;
        std::thread::spawn(move || drop(sockets));
        Slowness { _peers }
    }

    fn let_go(self, is_sent: bool) -> Slowness {
        let Self { sockets, _peers } = self;
        for socket in sockets {
            if !is_sent {
                // It is the last one, and dropping it would take long here.
                let at_once = linger { l_onoff: 1, l_linger: 0 };
                setsockopt(&socket, sockopt::Linger, &at_once).unwrap();
            }
        }
        Slowness { _peers }
    }
}

/// What has to be kept for as long as closes are to take long.
struct Slowness {
    _peers: Vec<TcpStream>,
}

/// Whether it was sent.
fn pass(to: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>], flags: MsgFlags) -> bool {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&raw)];
    let parts = [std::io::IoSlice::new(bytes)];
    let flags = flags | MsgFlags::MSG_NOSIGNAL;
    match sendmsg::<()>(to.as_raw_fd(), &parts, &control, flags, None) {
        Ok(sent) => {
            assert_eq!(sent, bytes.len());
            true
        }
        // The kernel refuses them, or the other side has gone, or knows nothing out of band.
        Err(Errno::EPERM | Errno::EPIPE | Errno::ECONNRESET | Errno::EOPNOTSUPP) => false,
        Err(errno) => panic!("{errno}"),
    }
}

/// Goes, and then others are served as if nothing were.
fn leave(bed: &Bed, name: &str, raw: Raw) {
    // Once while it is here, and once it is gone.
    bed.must_go_on(name);
    drop(raw);
    if let Err(problem) = bed.fate() {
        bed.note(format!("{name}: {problem}"));
    }
    bed.must_go_on(name);
}

/// The descriptors of an honest client, with which it is let in.
fn honest(raw: &Raw, name: &str) {
    let [buffer, queue] = Memory::honest().into_memfds(name);
    pass(&raw.socket, &[0], &[buffer.as_fd(), queue.as_fd()], MsgFlags::empty());
}

#[test]
fn what_a_client_passes_in_a_handshake_stops_no_core() {
    both(|| {
        let bed = bed();
        let mut slow = Vec::new();
        for stage in STAGES {
            for flags in [MsgFlags::empty(), MsgFlags::MSG_OOB] {
                let name = format!("{stage:?}, {flags:?}");
                let raw = at_stage(bed.path(), stage);
                let (here, bytes) = (Slow::new(), message(EXCHANGE, 3, &[]));
                let pass = || here.pass(&raw.socket, &bytes, flags);
                slow.push(bed.while_it_stands_still(pass));
                leave(&bed, &name, raw);
                slow.clear();
            }
            // And then something that a server answers to.
            let raw = at_stage(bed.path(), stage);
            let here = Slow::new();
            slow.push(bed.while_it_stands_still(|| {
                let here = here.pass(&raw.socket, b"x", MsgFlags::MSG_OOB);
                (&raw.socket).write_all(&message(EXCHANGE, 3, &[])).ok();
                here
            }));
            leave(&bed, "out of band first", raw);
            slow.clear();
        }
        bed.finish();
    });
}

#[test]
fn what_comes_in_place_of_memory_or_behind_it_stops_no_core() {
    both(|| {
        let bed = bed();
        let mut slow = Vec::new();
        for place in 0..3 {
            let [buffer, queue] = Memory::honest().into_memfds(bed.name());
            let here = Slow::new();
            let raw = at_stage(bed.path(), Stage::Descriptors);
            slow.push(bed.while_it_stands_still(|| {
                let mut fds = vec![buffer.as_fd(), queue.as_fd()];
                match place {
                    0 => fds.splice(0..1, here.fds()),
                    1 => fds.splice(1..2, here.fds()),
                    _ => fds.splice(2..2, here.fds()),
                };
                let is_sent = pass(&raw.socket, &[0], &fds, MsgFlags::empty());
                here.let_go(is_sent)
            }));
            leave(&bed, "among the memory", raw);
            slow.clear();
        }
        for flags in [MsgFlags::empty(), MsgFlags::MSG_OOB] {
            // Before they are received, there is time for more on any kernel.
            let raw = at_stage(bed.path(), Stage::Descriptors);
            let here: Vec<_> = (0..2).map(|_| Slow::new()).collect();
            slow.extend(bed.while_it_stands_still(|| {
                honest(&raw, bed.name());
                let pass = |here: Slow| here.pass(&raw.socket, &message(SYNC, 3, &[]), flags);
                here.into_iter().map(pass).collect::<Vec<_>>()
            }));
            leave(&bed, "behind the memory", raw);
            slow.clear();
        }
        bed.finish();
    });
}

#[test]
fn what_is_passed_in_a_running_session_stops_no_core() {
    both(|| {
        let bed = bed();
        let server = RawServer::new(&bed, client_config());
        let mut slow = Vec::new();
        let sessions: [&dyn Fn() -> Rig; 2] =
            [&|| Rig::client(bed.path(), bed.name()), &|| server.session(&bed)];
        for session in sessions {
            for flags in [MsgFlags::empty(), MsgFlags::MSG_OOB] {
                let mut rig = session();
                rig.echo(b"honest as yet");
                rig.wait_for_rest();
                let here: Vec<_> = (0..2).map(|_| Slow::new()).collect();
                slow.extend(bed.while_it_stands_still(|| {
                    let bytes = message(SYNC, 3, &[]);
                    let pass = |here: Slow| here.pass(&rig.raw.socket, &bytes, flags);
                    here.into_iter().map(pass).collect::<Vec<_>>()
                }));
                leave(&bed, "in a session", rig.raw);
                slow.clear();
            }
        }
        bed.finish();
    });
}

#[test]
fn what_a_server_passes_in_a_handshake_stops_no_core() {
    both(|| {
        let bed = bed();
        let server = RawServer::new(&bed, client_config());
        let mut slow = Vec::new();
        for stage in STAGES {
            for flags in [MsgFlags::empty(), MsgFlags::MSG_OOB] {
                let raw = server.at_stage(&bed, stage);
                let (here, bytes) = (Slow::new(), message(EXCHANGE, 3, &[]));
                let pass = || here.pass(&raw.socket, &bytes, flags);
                slow.push(bed.while_it_stands_still(pass));
                leave(&bed, &format!("a server at {stage:?}"), raw);
                slow.clear();
            }
        }
        bed.finish();
    });
}

#[test]
fn memory_by_path_with_something_slow_beside_it_stops_no_core() {
    both(|| {
        let directory = Directory::new("slow");
        let config = crate::config().path_prefix(directory.path("own")).build().unwrap();
        let bed = Bed::start(config);
        let [queue, buffer] = directory.put_memory(&Memory::honest());
        let raw = at_stage(bed.path(), Stage::Opening);
        let announcement = crate::support::raw::honest_paths(&queue, &buffer);
        let bytes = message(crate::support::raw::BY_FILE, 2, &announcement);
        let here = Slow::new();
        let pass = || here.pass(&raw.socket, &bytes, MsgFlags::empty());
        let slow = bed.while_it_stands_still(pass);
        leave(&bed, "by path", raw);
        bed.finish();
        drop(slow);
    });
}

/// A peer that is not let in has sent what it wants by then, and so have those that nobody has
/// accepted when the listener goes.
#[test]
fn the_close_of_connections_that_were_not_read_stops_no_core() {
    both(|| {
        let name = format!("shmipc-unread-{}.sock", std::process::id());
        let path = std::env::temp_dir().join(name);
        let _ = std::fs::remove_file(&path);
        let is_let_in = Arc::new(AtomicBool::new(false));
        let (done_there, done) = mpsc::channel();
        let (ready_there, ready) = mpsc::channel();
        let (there, let_in) = (path.clone(), Arc::clone(&is_let_in));
        let start = move || async move {
            let config = Config::builder().max_handshakes(1).handshake_timeout(DEADLINE * 20);
            let listener = Listener::bind(&there, config.build().unwrap()).unwrap();
            listener.authorize(move |_| let_in.load(Ordering::Relaxed));
            let refused = done_there.clone();
            listener.on_rejected(move |_| refused.send("refused").unwrap());
            ready_there.send(()).unwrap();
            let session = listener.accept().await.unwrap();
            done_there.send("accepted").unwrap();
            // One handshake is under way for ever, and the others wait for its place.
            glommio::timer::sleep(std::time::Duration::from_millis(100)).await;
            drop((listener, session));
            glommio::timer::sleep(std::time::Duration::from_millis(10)).await;
            done_there.send("closed").unwrap();
        };
        let executor = LocalExecutorBuilder::new(Placement::Unbound).spawn(start).unwrap();
        ready.recv_timeout(DEADLINE).unwrap();
        let next = || done.recv_timeout(DEADLINE).expect("the executor stands still");
        let mut slow = Vec::new();
        for _ in 0..3 {
            let raw = UnixStream::connect(&path).unwrap();
            slow.push(Slow::of(1).pass_to_a_running_one(&raw));
            assert_eq!(next(), "refused");
        }
        is_let_in.store(true, Ordering::Relaxed);
        let there = path.clone();
        let client = move || async move {
            let session = Connector::new(Config::default()).connect(&there).await.unwrap();
            session.closed().await;
        };
        let client = LocalExecutorBuilder::new(Placement::Unbound).spawn(client).unwrap();
        assert_eq!(next(), "accepted");
        let mut waiting = Vec::new();
        for _ in 0..4 {
            let Ok(raw) = UnixStream::connect(&path) else { break };
            slow.push(Slow::of(1).pass_to_a_running_one(&raw));
            waiting.push(raw);
        }
        // Some of them had their turn, perhaps.
        while next() != "closed" {}
        executor.join().unwrap();
        client.join().unwrap();
        let _ = std::fs::remove_file(&path);
    });
}
