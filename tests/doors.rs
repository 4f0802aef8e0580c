// SPDX-License-Identifier: MIT OR Apache-2.0
//! The doors of servers: who sees how many of them, who may open them, and what is left.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use shmipc_glommio::{Config, Connector, Cores, Error, Listener, Server, ServerBuilder, Spin};

use support::executor::{SocketPath, run};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
}

const LIMIT: Duration = Duration::from_secs(60);

fn small() -> Config {
    Config::builder().container().build().unwrap()
}

fn server(path: &SocketPath, shards: usize) -> ServerBuilder {
    Server::builder(path.as_str()).cores(Cores::Unpinned(shards)).config(small())
}

/// What of a server's files is there.
fn files(path: &SocketPath) -> Vec<String> {
    let name = path.as_str().rsplit('/').next().unwrap().to_owned();
    let entries = fs::read_dir(std::env::temp_dir()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut files: Vec<_> = names.filter(|file| file.starts_with(&name)).collect();
    files.sort();
    files.iter().map(|file| file[name.len()..].to_owned()).collect()
}

#[test]
fn clients_see_all_shards_or_none() {
    const SHARDS: usize = 4;
    let path = SocketPath::new();
    let (at, is_over) = (path.as_str().to_owned(), Arc::new(AtomicBool::new(false)));
    let stop = Arc::clone(&is_over);
    let looking = std::thread::spawn(move || {
        let mut seen = BTreeSet::new();
        while !stop.load(Ordering::Relaxed) {
            seen.insert(Connector::shard_count(&at).unwrap_or(0));
        }
        seen
    });
    for _ in 0..20 {
        let server = server(&path, SHARDS).serve_streams(|_| async {}).unwrap();
        assert_eq!(files(&path), ["", ".0", ".1", ".2", ".3"]);
        server.stop(Duration::ZERO).unwrap();
        assert!(files(&path).is_empty());
    }
    is_over.store(true, Ordering::Relaxed);
    assert_eq!(looking.join().unwrap(), BTreeSet::from([0, SHARDS]));
}

/// Leaves what a server leaves that was killed.
fn leave_behind(path: &SocketPath, shards: usize) {
    let doors = (0..shards).map(|index| format!("{}.{index}", path.as_str()));
    for door in doors.chain([path.as_str().to_owned()]) {
        drop(UnixListener::bind(door).unwrap());
    }
}

#[test]
fn what_a_larger_server_left_is_cleared_away_before_anybody_is_let_in() {
    let path = SocketPath::new();
    leave_behind(&path, 5);
    assert_eq!(Connector::shard_count(path.as_str()).unwrap(), 5);
    let server = server(&path, 2).serve_streams(|_| async {}).unwrap();
    assert_eq!(files(&path), ["", ".0", ".1"]);
    server.stop(Duration::ZERO).unwrap();
    assert!(files(&path).is_empty());
}

#[test]
fn of_two_that_start_at_the_same_time_one_starts() {
    for _ in 0..10 {
        let path = SocketPath::new();
        leave_behind(&path, 3);
        let at = path.as_str().to_owned();
        let starting: Vec<_> = (0..3)
            .map(|_| {
                let at = at.clone();
                std::thread::spawn(move || {
                    let builder = Server::builder(at).cores(Cores::Unpinned(1)).config(small());
                    // The handle is for its own thread; what counts is what came of it.
                    match builder.serve_streams(|_| async {}) {
                        Ok(server) => {
                            std::thread::sleep(Duration::from_millis(30));
                            server.stop(Duration::ZERO).unwrap();
                            None
                        }
                        Err(error) => Some(error),
                    }
                })
            })
            .collect();
        let results: Vec<_> = starting.into_iter().map(|one| one.join().unwrap()).collect();
        assert!(results.iter().any(Option::is_none), "{results:?}");
        for error in results.into_iter().flatten() {
            let Error::Os { source, .. } = &error else { panic!("{error}") };
            assert_eq!(source.kind(), ErrorKind::AddrInUse, "{error}");
        }
        assert!(files(&path).is_empty(), "{:?}", files(&path));
    }
}

#[test]
fn a_successor_opens_the_doors_while_the_old_one_drains() {
    let path = SocketPath::new();
    let at = path.as_str().to_owned();
    let first = server(&path, 2)
        .serve_streams(|mut stream| async move {
            while let Some(message) = stream.recv().await? {
                glommio::timer::sleep(Duration::from_millis(200)).await;
                stream.forward(message).await?;
            }
            Ok::<_, Error>(())
        })
        .unwrap();
    let stopper = first.stopper();
    let is_done = Arc::new(AtomicBool::new(false));
    let done = Arc::clone(&is_done);
    run(LIMIT, move || async move {
        let session = Connector::new(small()).connect_shard(&at, 1).await.unwrap();
        let mut stream = session.open_stream().unwrap();
        let mut loan = stream.alloc(5).await.unwrap();
        loan.write(b"hello");
        stream.send(loan).await.unwrap();
        stopper.stop(LIMIT);
        // Blocks this executor, but not the server that answers meanwhile.
        let second = Server::builder(&at).cores(Cores::Unpinned(2)).config(small());
        let second = second.serve_streams(|_| async {}).unwrap();
        assert_eq!(stream.recv().await.unwrap().unwrap().into_bytes(), "hello");
        session.closed().await;
        assert!(Connector::new(small()).connect_shard(&at, 1).await.is_ok());
        second.stop(Duration::ZERO).unwrap();
        done.store(true, Ordering::Relaxed);
    });
    first.join().unwrap();
    assert!(is_done.load(Ordering::Relaxed));
    assert!(files(&path).is_empty());
}

#[test]
fn the_doors_of_others_are_respected_one_by_one() {
    let path = SocketPath::new();
    let other = UnixListener::bind(format!("{}.1", path.as_str())).unwrap();
    let error = server(&path, 2).serve_streams(|_| async {}).unwrap_err().to_string();
    assert!(error.contains(".1: it is in use by a live server"), "{error}");
    assert_eq!(files(&path), [".1"], "nothing else is left");
    drop(other);
    fs::remove_file(format!("{}.1", path.as_str())).unwrap();
    fs::write(path.as_str(), "precious").unwrap();
    let error = server(&path, 2).serve_streams(|_| async {}).unwrap_err().to_string();
    assert!(error.contains("not a socket"), "{error}");
    assert_eq!(files(&path), [""]);
}

#[test]
fn who_locks_the_directory_holds_up_nobody() {
    use nix::fcntl::{Flock, FlockArg};
    let path = SocketPath::new();
    let directory = fs::File::open(std::env::temp_dir()).unwrap();
    let _held =
        Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, errno)| errno).unwrap();
    run(LIMIT, move || async move {
        let listener = Listener::bind(path.as_str(), small()).unwrap();
        Connector::new(small()).connect(path.as_str()).await.unwrap();
        drop(listener);
        assert!(files(&path).is_empty());
    });
}

#[test]
fn who_panics_when_told_of_a_peer_does_not_stop_the_server() {
    let path = SocketPath::new();
    let told = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&told);
    let patience = Duration::from_millis(500);
    let config = Config::builder().container().handshake_timeout(patience);
    let server = server(&path, 1)
        .config(config.build().unwrap())
        .on_rejected(move |_, _| {
            counter.fetch_add(1, Ordering::Relaxed);
            panic!("as told");
        })
        .serve_streams(|_| async {})
        .unwrap();
    let _silent: Vec<_> = (0..3).map(|_| UnixStream::connect(path.as_str()).unwrap()).collect();
    let start = Instant::now();
    while told.load(Ordering::Relaxed) < 3 && start.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(2));
    }
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        Connector::new(small()).connect(&at).await.unwrap();
        Connector::new(small()).connect_shard(&at, 0).await.unwrap();
    });
    assert_eq!(told.load(Ordering::Relaxed), 3);
    assert_eq!(server.stats()[0].refused, 3);
    server.stop(Duration::ZERO).unwrap();
}

#[test]
fn durations_that_make_no_sense_are_refused_or_capped() {
    let zero = Config::builder().handshake_timeout(Duration::ZERO).build().unwrap_err();
    assert!(zero.to_string().contains("handshake_timeout"), "{zero}");
    let path = SocketPath::new();
    let endless = Config::builder()
        .container()
        .handshake_timeout(Duration::MAX)
        .fallback_after(Duration::MAX)
        .reactor_interval(Duration::MAX)
        .spin(Spin::For(Duration::from_secs(1)))
        .build()
        .unwrap();
    let builder = server(&path, 1).config(endless.clone()).shutdown_grace(Duration::MAX);
    let server = builder.serve_streams(|_| async {}).unwrap();
    let at = path.as_str().to_owned();
    run(LIMIT, move || async move {
        let session = Connector::new(endless).connect(&at).await.unwrap();
        let mut stream = session.open_stream().unwrap();
        // More than there is, so that somebody waits.
        let mut loans = Vec::new();
        while let Some(loan) = futures_lite::future::poll_once(stream.alloc(1)).await {
            loans.push(loan.unwrap());
        }
        loans.clear();
        drop(stream.alloc(1).await.unwrap());
    });
    server.stop(Duration::MAX).unwrap();
}

/// A process that says so locks a file, or another one that it has.
fn lock_of(path: &SocketPath) -> fs::File {
    let lock = format!("{}.lock", path.as_str());
    fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(lock).unwrap()
}

#[test]
fn a_lock_of_another_user_stops_no_core() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can make files of other users");
        return;
    }
    let path = SocketPath::new();
    let at = path.as_str().to_owned();
    let lock = format!("{at}.lock");
    let file = lock_of(&path);
    std::os::unix::fs::chown(&lock, Some(4321), None).unwrap();
    let held = Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap();
    run(LIMIT, move || async move {
        let began = Instant::now();
        let errors = [
            Listener::bind(&at, small()).map(drop).unwrap_err(),
            Listener::bind_within(&at, small(), LIMIT).await.map(drop).unwrap_err(),
            Server::builder(&at)
                .cores(Cores::Unpinned(1))
                .config(small())
                .serve_streams(|_| async { Ok::<_, Error>(()) })
                .map(drop)
                .unwrap_err(),
        ];
        // It was 10 s each.
        assert!(began.elapsed() < Duration::from_secs(8));
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
            let text = error.to_string();
            assert!(text.contains(".lock is of user 4321 with mode 600"), "{text}");
            assert!(text.contains("remove it"), "{text}");
        }
    });
    drop(held);
    fs::remove_file(lock).unwrap();
}

#[test]
fn a_lock_that_a_process_of_this_user_keeps_holds_no_core_up_for_long() {
    let path = SocketPath::new();
    let at = path.as_str().to_owned();
    let lock = format!("{at}.lock");
    let held = Flock::lock(lock_of(&path), FlockArg::LockExclusiveNonblock).unwrap();
    let remove = lock.clone();
    run(LIMIT, move || async move {
        let began = Instant::now();
        let error = Listener::bind(&at, small()).map(drop).unwrap_err();
        assert!(began.elapsed() < Duration::from_secs(5), "it was 10 s");
        assert_eq!(error.kind(), ErrorKind::AddrInUse, "{error}");
        assert!(error.to_string().contains("try again"), "{error}");
        // While one task waits, another one of its core has it let go.
        let binding = glommio::spawn_local(async move {
            Listener::bind_within(at, small(), LIMIT).await.map(drop)
        });
        glommio::timer::sleep(Duration::from_millis(20)).await;
        fs::remove_file(remove).unwrap();
        drop(held);
        binding.await.unwrap();
    });
    assert!(!fs::exists(lock).unwrap());
}

/// A socket at `path` on which a process of this user listened last that has ended, and that lives
/// on with whoever has what is returned.
fn socket_of_the_dead(path: &str, uid: u32) -> UnixListener {
    use std::os::unix::process::CommandExt;
    let listener = UnixListener::bind(path).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o666)).unwrap();
    let socket = listener.try_clone().unwrap();
    let listen = move || {
        let backlog = nix::sys::socket::Backlog::MAXALLOWABLE;
        Ok(nix::sys::socket::listen(&socket, backlog)?)
    };
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.arg("--list").stdout(std::process::Stdio::null()).uid(uid);
    // SAFETY: between fork and exec it makes one system call, and allocates nothing.
    unsafe { command.pre_exec(listen) };
    match command.spawn() {
        Ok(mut child) => drop(child.wait().unwrap()),
        // The test program may be in a directory of root's; it has listened before that.
        Err(error) => assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}"),
    }
    listener
}

#[test]
fn a_socket_that_outlives_its_process_holds_no_core_up_for_long() {
    let me = nix::unistd::geteuid().as_raw();
    let path = SocketPath::new();
    let at = path.as_str().to_owned();
    let dead = socket_of_the_dead(&at, me);
    run(LIMIT, move || async move {
        let began = Instant::now();
        let error = Listener::bind(&at, small()).map(drop).unwrap_err();
        assert!(began.elapsed() < Duration::from_millis(1800), "it was 2 s");
        assert_eq!(error.kind(), ErrorKind::AddrInUse, "{error}");
        assert!(error.to_string().contains("has ended"), "{error}");
        // Started again by a supervisor, it waits for the kernel without stopping its core.
        let binding = glommio::spawn_local({
            let at = at.clone();
            async move { Listener::bind_within(at, small(), LIMIT).await.map(drop) }
        });
        glommio::timer::sleep(Duration::from_millis(20)).await;
        drop(dead);
        binding.await.unwrap();
    });
}

#[test]
fn a_process_of_another_user_that_has_ended_is_not_waited_for() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can start processes of other users");
        return;
    }
    let path = SocketPath::new();
    let _dead = socket_of_the_dead(path.as_str(), 4321);
    let error = Server::builder(path.as_str())
        .cores(Cores::Unpinned(1))
        .config(small())
        .serve_streams(|_| async { Ok::<_, Error>(()) })
        .map(drop)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddrInUse, "{error}");
    assert!(error.to_string().contains("live server"), "{error}");
}
