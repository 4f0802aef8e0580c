// SPDX-License-Identifier: MIT OR Apache-2.0
//! Peers that try to be taken for others.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use futures_lite::future::or;
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use nix::unistd::geteuid;
use shmipc_glommio::{
    Config, Connector, Error, HandshakeError, Listener, MemoryKind, ProtocolVersion,
};

use super::due::{IsDue, due};
use super::files::Directory;
use crate::support::bed::{Bed, DEADLINE, Fate};
use crate::support::executor::{run, within};
use crate::support::raw::{ACK, BY_FILE, Memory, Rig, Stage, at_stage, honest_paths, message};
use crate::{bed, config};

const NOBODY: u32 = 65534;

/// The memory in this role is another session's.
macro_rules! in_use {
    ($role:literal) => {
        due!(Error::Handshake(HandshakeError::MemoryInUse { role: $role })) as IsDue
    };
}

/// Runs `work` in a thread of another user, as far as files and sockets go. `false`, with the
/// reason printed, where this process may not do that.
fn as_user(uid: u32, work: impl FnOnce() + Send + 'static) -> bool {
    if !geteuid().is_root() {
        println!("skipped: only root can become another user");
        return false;
    }
    let thread = std::thread::spawn(move || {
        // SAFETY: the system call changes this thread only (unlike that of the C library), which
        // ends with this closure.
        let result = unsafe { nix::libc::syscall(nix::libc::SYS_setresuid, -1, uid, -1) };
        assert_eq!(result, 0);
        work();
    });
    thread.join().unwrap();
    true
}

/// Waits until a socket with this port is in none of the states ESTABLISHED and FIN_WAIT1.
fn wait_for_the_last_acknowledgement(port: u16) {
    let began = Instant::now();
    let port = format!(":{port:04X}");
    let is_under_way = |line: &str| {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        fields[1].ends_with(&port) && ["01", "04"].contains(&fields[3])
    };
    while fs::read_to_string("/proc/net/tcp").unwrap().lines().any(is_under_way) {
        assert!(began.elapsed() < DEADLINE);
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What a listener over TCP makes of a client of user 65534 that sends the version 2 message of
/// files that belong to root, and ends like this before it is accepted.
async fn fate_of(name: &str, end: fn(TcpStream)) -> Option<Error> {
    let directory = Directory::new(name);
    let config: Config = config().path_prefix(directory.path("own")).build().unwrap();
    let listener = Listener::bind_tcp("127.0.0.1:0".parse().unwrap(), config).unwrap();
    let refused = Rc::new(RefCell::new(None));
    let told = Rc::clone(&refused);
    listener.on_rejected(move |error| *told.borrow_mut() = Some(error.clone()));
    listener.authorize(|peer| peer.uid == Some(0));
    let [queue, buffer] = directory.put_memory(&Memory::honest());
    let opening = message(BY_FILE, 2, &honest_paths(&queue, &buffer));
    let address = listener.tcp_address().unwrap();
    // This executor does nothing meanwhile, so the connection waits to be accepted.
    let has_sent = as_user(NOBODY, move || {
        let mut socket = TcpStream::connect(address).unwrap();
        socket.write_all(&opening).unwrap();
        let port = socket.local_addr().unwrap().port();
        end(socket);
        wait_for_the_last_acknowledgement(port);
    });
    if !has_sent {
        return None;
    }
    let accepted = or(async { Some(listener.accept().await) }, async {
        within(DEADLINE, || refused.borrow().is_some()).await;
        None
    });
    if let Some(session) = accepted.await {
        panic!("{name}: a session of {:?}", session.unwrap().peer());
    }
    assert!(fs::exists(queue).unwrap() && fs::exists(buffer).unwrap(), "{name}: files are gone");
    refused.take()
}

#[test]
fn a_tcp_client_that_has_gone_is_not_taken_for_root() {
    run(2 * DEADLINE, || async {
        let Some(error) = fate_of("gone", drop).await else { return };
        let is_due =
            matches!(error, Error::Handshake(HandshakeError::PeerNotAllowed { uid: None, .. }));
        assert!(is_due, "{error:?}");
    });
}

#[test]
fn a_tcp_client_that_has_shut_down_is_not_taken_for_root() {
    run(2 * DEADLINE, || async {
        let end = |socket: TcpStream| {
            socket.shutdown(Shutdown::Write).unwrap();
            std::mem::forget(socket);
        };
        let Some(error) = fate_of("shut", end).await else { return };
        let is_due = matches!(error, Error::Handshake(HandshakeError::PeerNotAllowed { .. }));
        assert!(is_due, "{error:?}");
    });
}

#[test]
fn a_tcp_client_that_has_reset_the_connection_is_not_taken_for_root() {
    run(2 * DEADLINE, || async {
        let end = |socket: TcpStream| {
            let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
            let option = nix::sys::socket::sockopt::Linger;
            nix::sys::socket::setsockopt(&socket, option, &linger).unwrap();
        };
        // Whatever it is called, it is refused.
        drop(fate_of("reset", end).await);
    });
}

#[test]
fn the_files_of_another_session_make_no_session() {
    let directory = Directory::new("stolen");
    let bed = Bed::start(config().path_prefix(directory.path("own")).build().unwrap());
    let mut honest = Rig::client_with_files(bed.path(), &directory);
    honest.echo(b"before");
    let [queue, buffer] = ["queue", "buffer"].map(|name| directory.path(name));
    let stages = [(Stage::Opening, 2), (Stage::Announcement, 3)];
    let cases = [
        ("both", &queue, &buffer, in_use!("queue")),
        ("its buffer for a queue", &buffer, &queue, in_use!("queue")),
        ("its queue for both", &queue, &queue, in_use!("queue")),
        ("its buffer for both", &buffer, &buffer, in_use!("queue")),
    ];
    for (stage, version) in stages {
        for (name, queue, buffer, is_due) in cases {
            let mut raw = at_stage(bed.path(), stage);
            raw.send(&message(BY_FILE, version, &honest_paths(queue, buffer)));
            bed.must_refuse(&format!("{name} in version {version}"), is_due, raw);
            assert_eq!(directory.len(), 2, "{name}: the files stay");
            // Delivered once, and answered to whom it is from.
            honest.echo(b"between");
        }
    }
    // Another listener of the process, and of another kind.
    let mut socket = TcpStream::connect(bed.tcp_address()).unwrap();
    socket.write_all(&message(BY_FILE, 2, &honest_paths(&queue, &buffer))).unwrap();
    let fate = bed.fate();
    let is_due: IsDue = in_use!("queue");
    assert!(matches!(&fate, Ok(Fate::Refused(error)) if is_due(error)), "{fate:?}");
    honest.echo(b"after");
    drop(honest);
    bed.must_see_it_gone("the honest one");
    bed.finish();
}

#[test]
fn the_descriptors_of_another_session_make_no_session() {
    let bed = bed();
    let mut honest = Rig::client(bed.path(), bed.name());
    honest.echo(b"before");
    let [other_buffer, other_queue] = Memory::honest().into_memfds(bed.name());
    let [queue, buffer] = [&honest.queue, &honest.buffer].map(|file| file.try_clone().unwrap());
    let cases = [
        ("both", &buffer, &queue, in_use!("queue")),
        ("its queue", &other_buffer, &queue, in_use!("queue")),
        ("its queue for a buffer", &queue, &other_queue, in_use!("buffer")),
        ("its buffer for a queue", &other_buffer, &buffer, in_use!("queue")),
        ("one of its own for both", &other_queue, &other_queue, in_use!("buffer")),
    ];
    for (name, buffer, queue, is_due) in cases {
        let mut raw = at_stage(bed.path(), Stage::Descriptors);
        raw.send_with(&[0], &[buffer.as_fd(), queue.as_fd()]);
        bed.must_refuse(name, is_due, raw);
        honest.echo(b"between");
    }
    drop((honest, queue, buffer, other_queue, other_buffer));
    bed.must_see_it_gone("the honest one");
    bed.finish();
}

/// As all sessions of a manager of shmipc-go do.
#[test]
fn sessions_may_share_one_buffer_memory_and_bring_a_queue_again_when_its_session_has_ended() {
    let bed = bed();
    let mut first = Rig::client(bed.path(), bed.name());
    let buffer = first.buffer.try_clone().unwrap();
    first.echo(b"first");
    let shake = |queue: &File| {
        let mut raw = at_stage(bed.path(), Stage::Descriptors);
        raw.send_with(&[0], &[buffer.as_fd(), queue.as_fd()]);
        assert_eq!(raw.receive(8), message(ACK, 3, &[]));
        raw
    };
    let queues = [(); 3].map(|()| {
        let [_, queue] = Memory::honest().into_memfds(bed.name());
        queue
    });
    for _ in 0..3 {
        let others: Vec<_> = queues.iter().map(shake).collect();
        first.echo(b"still");
        for other in others {
            drop(other);
            bed.must_see_it_gone("one of those that share");
        }
    }
    first.echo(b"last");
    drop((first, buffer, queues));
    bed.must_see_it_gone("the first");
    bed.finish();
}

#[test]
fn a_client_and_a_server_of_one_process_have_the_same_memory() {
    run(2 * DEADLINE, || async {
        for (version, memory) in [
            (ProtocolVersion::V2, MemoryKind::File),
            (ProtocolVersion::V3, MemoryKind::File),
            (ProtocolVersion::V3, MemoryKind::Memfd),
            (ProtocolVersion::V4, MemoryKind::Memfd),
        ] {
            let directory = Directory::new("both-sides");
            let config = config().container().protocol(version).memory(memory);
            let config = config.path_prefix(directory.path("own")).build().unwrap();
            let listener = Listener::bind(directory.0.join("door"), config.clone()).unwrap();
            let connector = Connector::new(config);
            let mut sessions = Vec::new();
            for _ in 0..3 {
                let client = connector.connect(directory.0.join("door")).await.unwrap();
                let server = listener.accept().await.unwrap();
                let mut stream = client.open_stream().unwrap();
                stream.write_all(b"hello").await.unwrap();
                let mut bytes = [0; 5];
                server.accept().await.unwrap().read_exact(&mut bytes).await.unwrap();
                assert_eq!(&bytes, b"hello", "{version:?} {memory:?}");
                sessions.push((client, server));
            }
        }
    });
}
