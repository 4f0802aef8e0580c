// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who gets in, and what dead processes leave behind.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::unistd::{getegid, geteuid};
use shmipc_glommio::{
    AllowedPeers, Config, ConfigBuilder, Connector, Cores, Error, HandshakeError, Listener,
    MemoryKind, PeerCredentials, ProtocolVersion, Server, remove_leftovers,
};

use support::executor::{SocketPath, run, within};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
}

const LIMIT: Duration = Duration::from_secs(60);

fn small() -> ConfigBuilder {
    Config::builder().container()
}

fn is_me(peer: PeerCredentials) -> bool {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    (peer.uid, peer.gid, peer.pid) == (Some(uid), Some(gid), Some(std::process::id()))
}

#[test]
fn both_sides_know_who_is_at_the_other_end() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let listener = Listener::bind(path.as_str(), small().build().unwrap()).unwrap();
        let connector = Connector::new(small().build().unwrap());
        let client = connector.connect(path.as_str()).await.unwrap();
        let server = listener.accept().await.unwrap();
        assert!(is_me(client.peer()) && is_me(server.peer()));
    });
}

#[test]
fn a_server_of_somebody_else_is_not_spoken_to() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let listener = Listener::bind(path.as_str(), small().build().unwrap()).unwrap();
        let refused = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&refused);
        listener.on_rejected(move |error| told.lock().unwrap().push(error.clone()));
        let others = AllowedPeers::Users(vec![geteuid().as_raw() + 1]);
        let config = small().allowed_peers(others).build().unwrap();
        let error = Connector::new(config).connect(path.as_str()).await.unwrap_err();
        let uid = Some(geteuid().as_raw());
        let is_due = |error: &Error| matches!(error, Error::Handshake(HandshakeError::PeerNotAllowed { uid: u, .. }) if *u == uid);
        assert!(is_due(&error), "{error}");
        assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::PermissionDenied);
        assert!(within(LIMIT, || !refused.lock().unwrap().is_empty()).await);
        let is_closed =
            |error: &Error| matches!(error, Error::Handshake(HandshakeError::Closed { .. }));
        assert!(is_closed(&refused.lock().unwrap()[0]), "nothing was sent");
    });
}

#[test]
fn over_tcp_the_owner_of_the_socket_is_asked_for() {
    run(LIMIT, || async {
        let files = || {
            let prefix = format!("/dev/shm/shmipc-trust-{}", std::process::id());
            small().memory(MemoryKind::File).path_prefix(prefix)
        };
        let connect = async |allowed: AllowedPeers| {
            let config = files().allowed_peers(allowed.clone()).build().unwrap();
            let listener = Listener::bind_tcp("127.0.0.1:0".parse().unwrap(), config).unwrap();
            let connector =
                Connector::new(files().allowed_peers(AllowedPeers::Any).build().unwrap());
            let result = connector.connect_tcp(listener.tcp_address().unwrap()).await;
            result.map(|session| session.peer().uid)
        };
        let uid = connect(AllowedPeers::Any).await.unwrap();
        let Some(uid) = uid else {
            // A kernel that does not tell: nobody is let in who is not known.
            assert!(connect(AllowedPeers::SameUser).await.is_err());
            return;
        };
        assert_eq!(uid, geteuid().as_raw());
        connect(AllowedPeers::SameUser).await.unwrap();
        assert!(connect(AllowedPeers::Users(vec![uid + 1])).await.is_err());
    });
}

/// A server of root mapped files of root's, and removed them, for a client of nobody's that had
/// closed its socket.
#[test]
fn over_tcp_a_client_that_has_gone_names_no_files() {
    run(LIMIT, || async {
        let config = || small().memory(MemoryKind::File).allowed_peers(AllowedPeers::Any);
        let local = "127.0.0.1:0".parse().unwrap();
        let listener = Listener::bind_tcp(local, config().build().unwrap()).unwrap();
        let address = listener.tcp_address().unwrap();
        let refused = Arc::new(Mutex::new(Vec::new()));
        let tell = Arc::clone(&refused);
        listener.on_rejected(move |error| tell.lock().unwrap().push(error.clone()));
        // Nothing is accepted before this task waits.
        let mut client = std::net::TcpStream::connect(address).unwrap();
        client
            .write_all(b"\0\0\0\x2a\x77\x58\x02\0\0\x0f/dev/shm/gone_q\0\x0f/dev/shm/gone_b")
            .unwrap();
        drop(client);
        assert!(within(LIMIT, || !refused.lock().unwrap().is_empty()).await);
        let error = refused.lock().unwrap()[0].clone();
        let connected = Connector::new(config().build().unwrap()).connect_tcp(address).await;
        if connected.unwrap().peer().uid.is_none() {
            return println!("skipped: a kernel that does not tell");
        }
        let is_due = matches!(error, Error::Handshake(HandshakeError::UnknownOwner));
        assert!(is_due, "{error}");
    });
}

#[test]
fn a_listener_asks_the_program_about_every_peer() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let listener = Listener::bind(path.as_str(), small().build().unwrap()).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let by = Arc::clone(&asked);
        listener.authorize(move |peer| {
            let mut asked = by.lock().unwrap();
            asked.push(*peer);
            asked.len() % 2 == 0
        });
        let refused = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&refused);
        listener.on_rejected(move |error| told.lock().unwrap().push(error.clone()));
        let connector = Connector::new(small().build().unwrap());
        for _ in 0..2 {
            connector.connect(path.as_str()).await.unwrap_err();
            let session = connector.connect(path.as_str()).await.unwrap();
            assert!(session.end_reason().is_none());
        }
        assert_eq!(asked.lock().unwrap().len(), 4);
        assert!(asked.lock().unwrap().iter().all(|&peer| is_me(peer)));
        let uid = Some(geteuid().as_raw());
        let refused = refused.lock().unwrap();
        assert_eq!(refused.len(), 2);
        for error in &*refused {
            let Error::Handshake(error) = error else { panic!("{error}") };
            assert_eq!(*error, HandshakeError::NotAuthorized { uid });
        }
    });
}

#[test]
fn a_server_asks_at_every_door_and_a_panic_is_no_yes() {
    let path = SocketPath::new();
    let server = Server::builder(path.as_str())
        .cores(Cores::Unpinned(2))
        .config(small().build().unwrap())
        .authorize(|_| panic!("who knows?"))
        .serve_streams(|_| async {})
        .unwrap();
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let connector = Connector::new(small().build().unwrap());
        connector.connect_shard(&at, 0).await.unwrap_err();
        connector.connect_shard(&at, 1).await.unwrap_err();
        connector.connect(&at).await.unwrap_err();
    });
    let refused: u64 = server.stats().iter().map(|shard| shard.refused).sum();
    assert_eq!(refused, 3);
    server.stop(LIMIT).unwrap();
}

/// What a server in a user namespace is told: the path of its socket.
const NAMESPACE: &str = "SHMIPC_TRUST_NAMESPACE";

/// Not a test by itself: a server that says what becomes of the peers that come.
#[test]
fn as_a_server_in_a_user_namespace() {
    let Ok(at) = std::env::var(NAMESPACE) else { return };
    run(LIMIT, move || async move {
        println!("\nserver: user {}", geteuid());
        let config = small().allowed_peers(AllowedPeers::SameUser).socket_mode(0o666);
        let listener = Listener::bind(&at, config.build().unwrap()).unwrap();
        listener.on_rejected(|error| println!("\nserver: refused, {error:?}"));
        println!("\nserver: ready");
        loop {
            let session = listener.accept().await.unwrap();
            println!("\nserver: session, {:?}", session.peer());
        }
    });
}

/// Starts this test again in a user namespace of its own, in which user 0 outside is the one given.
/// `None`: with nobody mapped at all.
fn start_in_namespace(at: &str, inside: Option<u32>) -> std::io::Result<Child> {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "as_a_server_in_a_user_namespace", "--nocapture"]);
    command.env(NAMESPACE, at).stdout(Stdio::piped());
    let map = inside.map(|inside| format!("{inside} 0 1"));
    let enter = move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER)?;
        if let Some(map) = &map {
            let flags = nix::fcntl::OFlag::O_WRONLY;
            let mode = nix::sys::stat::Mode::empty();
            let file = nix::fcntl::open(c"/proc/self/uid_map", flags, mode)?;
            nix::unistd::write(file, map.as_bytes())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made, and nothing is allocated.
    unsafe { command.pre_exec(enter) };
    command.spawn()
}

#[test]
fn in_a_user_namespace_a_user_who_is_not_mapped_is_not_the_same_user() {
    if !geteuid().is_root() {
        println!("skipped: the peers are of several users, which only root can be");
        return;
    }
    for inside in [None, Some(65534)] {
        let path = SocketPath::new();
        let mut server = match start_in_namespace(path.as_str(), inside) {
            Ok(child) => Doomed(child),
            Err(error) => {
                println!("skipped: this kernel lets nobody make a user namespace: {error}");
                return;
            }
        };
        let said = std::io::BufReader::new(server.0.stdout.take().unwrap());
        let mut said = std::io::BufRead::lines(said)
            .map(Result::unwrap)
            .filter_map(|line| line.strip_prefix("server: ").map(str::to_owned));
        assert_eq!(said.next().unwrap(), "user 65534", "{inside:?}");
        assert_eq!(said.next().unwrap(), "ready", "{inside:?}");
        // A stranger, and one whose number the server has, seen from outside.
        for uid in [4321, 65534] {
            let at = path.as_str().to_owned();
            let connecting = std::thread::spawn(move || {
                // SAFETY: the system call changes this thread only (unlike that of the C library),
                // which ends with this closure.
                let result = unsafe { nix::libc::syscall(nix::libc::SYS_setresuid, -1, uid, -1) };
                assert_eq!(result, 0);
                std::os::unix::net::UnixStream::connect(at).unwrap()
            });
            let _socket = connecting.join().unwrap();
            let fate = said.next().unwrap();
            let is_due = fate.starts_with("refused, Handshake(PeerNotAllowed { uid: None,");
            assert!(is_due, "user {uid} of a server with {inside:?}: {fate}");
        }
    }
}

/// What a child is told: the socket to connect to, and the prefix of its files.
const TASK: &str = "SHMIPC_TRUST_TASK";

fn with_files(prefix: &Path) -> Config {
    let builder = small().protocol(ProtocolVersion::V2).memory(MemoryKind::File);
    builder.path_prefix(prefix).build().unwrap()
}

/// Not a test by itself: a client that stays until it is killed.
#[test]
fn as_a_child() {
    let Ok(task) = std::env::var(TASK) else { return };
    let (at, prefix) = task.split_once(':').unwrap();
    let (at, prefix) = (at.to_owned(), PathBuf::from(prefix));
    run(LIMIT, move || async move {
        let session = Connector::new(with_files(&prefix)).connect(&at).await.unwrap();
        session.closed().await;
        std::future::pending::<()>().await;
    });
}

struct Doomed(Child);

impl Drop for Doomed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How many files of a prefix there are, and how many of them are of this process.
fn files(prefix: &Path, of: &Doomed) -> (usize, usize) {
    let name = prefix.file_name().unwrap().to_str().unwrap();
    let own = format!("{name}_{}_", of.0.id());
    let entries = std::fs::read_dir(prefix.parent().unwrap()).unwrap().flatten();
    let names = entries.map(|entry| entry.file_name().into_string().unwrap());
    let names: Vec<_> = names.filter(|file| file.starts_with(name)).collect();
    (names.len(), names.iter().filter(|file| file.starts_with(&own)).count())
}

fn wait_for_two_files(prefix: &Path, of: &Doomed) {
    let began = std::time::Instant::now();
    while files(prefix, of).1 < 2 {
        assert!(began.elapsed() < LIMIT);
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn files_of_dead_processes_are_removed_and_those_of_live_ones_are_not() {
    let path = SocketPath::new();
    let prefix = PathBuf::from(format!("/dev/shm/shmipc-left-{}", std::process::id()));
    // Takes connections, and knows nothing of files.
    let _listener = std::os::unix::net::UnixListener::bind(path.as_str()).unwrap();
    let start = || {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "as_a_child", "--nocapture"])
            .env(TASK, format!("{}:{}", path.as_str(), prefix.display()))
            .stdout(Stdio::null())
            .spawn();
        Doomed(child.unwrap())
    };
    let kill = |doomed: &mut Doomed| {
        doomed.0.kill().unwrap();
        doomed.0.wait().unwrap();
    };
    let mut first = start();
    wait_for_two_files(&prefix, &first);
    assert_eq!(remove_leftovers(&prefix).unwrap(), 0, "it lives");
    kill(&mut first);
    assert_eq!(files(&prefix, &first), (2, 2), "nobody has removed them as yet");
    // What the first one left is removed before the second one makes its own.
    let mut second = start();
    wait_for_two_files(&prefix, &second);
    assert_eq!(files(&prefix, &second), (2, 2));
    assert_eq!(remove_leftovers(&prefix).unwrap(), 0, "it lives");
    kill(&mut second);
    assert_eq!(remove_leftovers(&prefix).unwrap(), 2);
    assert_eq!(files(&prefix, &second), (0, 0));
}
