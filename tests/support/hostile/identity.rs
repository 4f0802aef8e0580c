// SPDX-License-Identifier: MIT OR Apache-2.0
//! Peers that try to be taken for others.

use std::cell::RefCell;
use std::fs;
use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::rc::Rc;
use std::time::{Duration, Instant};

use futures_lite::future::or;
use nix::unistd::geteuid;
use shmipc_glommio::{Config, Error, HandshakeError, Listener};

use super::files::Directory;
use crate::config;
use crate::support::bed::DEADLINE;
use crate::support::executor::{run, within};
use crate::support::raw::{BY_FILE, Memory, honest_paths, message};

const NOBODY: u32 = 65534;

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
    listener.on_refused(move |error| *told.borrow_mut() = Some(error.clone()));
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
