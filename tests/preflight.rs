// SPDX-License-Identifier: MIT OR Apache-2.0
//! Limits that executors and sessions come up against, each in a process of its own: what it is
//! told, servers and clients alike.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::libc;
use nix::sys::resource::{Resource, setrlimit};
use shmipc_glommio::{
    Client, Config, ConfigBuilder, Connector, Cores, Error, Listener, MemoryKind, ResourceError,
    Server, SessionState, preflight,
};

use support::executor::{SocketPath, run};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
}

const LIMIT: Duration = Duration::from_secs(60);

/// What a child is told: the limit, and what to do under it.
const TASK: &str = "SHMIPC_PREFLIGHT_TASK";
/// What a line of a child's output begins with that says what came of it.
const RESULT: &str = "RESULT ";

/// A user that has no processes.
const LONELY_USER: u32 = 64_777;

fn small() -> ConfigBuilder {
    Config::builder().container()
}

/// Runs a task under a limit in a child. Gives what it said; it must end by itself.
fn under(limit: &str, task: &str) -> String {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "as_a_child", "--nocapture", "--test-threads=1"])
        .env(TASK, format!("{limit} {task}"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (said, errors) =
        (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success(), "{limit} {task}: {:?}\n{said}\n{errors}", child.status);
    assert!(!errors.contains("panicked"), "{limit} {task}: {errors}");
    let mut results = said.lines().filter_map(|line| line.split_once(RESULT));
    results.next().unwrap_or_else(|| panic!("{limit} {task}: {said}\n{errors}")).1.to_owned()
}

/// Not a test by itself.
#[test]
fn as_a_child() {
    let Ok(told) = std::env::var(TASK) else { return };
    let (limit, task) = told.split_once(' ').unwrap();
    set(limit);
    println!("{RESULT}{}", carry_out(task));
}

fn set(limit: &str) {
    let (name, value) = limit.split_once('=').unwrap_or((limit, ""));
    let number = || value.parse().unwrap();
    let rlimit = |resource| setrlimit(resource, number(), number()).unwrap();
    match name {
        "memlock" => rlimit(Resource::RLIMIT_MEMLOCK),
        "nofile" => rlimit(Resource::RLIMIT_NOFILE),
        "fsize" => rlimit(Resource::RLIMIT_FSIZE),
        "nproc" => {
            // The superuser has no such limit.
            rlimit(Resource::RLIMIT_NPROC);
            // Of this child alone, whose threads are all that count.
            become_user(LONELY_USER + std::process::id());
        }
        "user" => become_user(number() as u32),
        "taskset" => {
            let mut set = nix::sched::CpuSet::new();
            set.set(number() as usize).unwrap();
            nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).unwrap();
        }
        call => forbid(call_number(call), value.parse().unwrap()),
    }
}

fn become_user(user: u32) {
    nix::unistd::setgroups(&[]).unwrap();
    nix::unistd::setgid(user.into()).unwrap();
    nix::unistd::setuid(user.into()).unwrap();
}

fn call_number(call: &str) -> u32 {
    let number = match call {
        "io_uring_setup" => libc::SYS_io_uring_setup,
        "io_uring_enter" => libc::SYS_io_uring_enter,
        "io_uring_register" => libc::SYS_io_uring_register,
        "sched_setaffinity" => libc::SYS_sched_setaffinity,
        other => panic!("{other}"),
    };
    number as u32
}

/// Has a system call fail by this error, on this thread and those that it starts.
fn forbid(call: u32, errno: u32) {
    let statement = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equals = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let give = libc::BPF_RET | libc::BPF_K;
    let mut program = [
        // The number of the call is the first word.
        statement(load, 0, 0, 0),
        statement(equals, 0, 1, call),
        statement(give, 0, 0, libc::SECCOMP_RET_ERRNO | errno),
        statement(give, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: both calls read what they are given, which lives until they return.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter), 0);
    }
}

fn said<T>(result: Result<T, Error>) -> String {
    match result.map(drop) {
        Ok(()) => "fine".into(),
        Err(error @ Error::Resource(_)) => format!("typed: {error}"),
        Err(error) => format!("{error:?}: {error}"),
    }
}

fn carry_out(task: &str) -> String {
    let (task, value) = task.split_once('=').unwrap_or((task, ""));
    match task {
        "server" => {
            let path = SocketPath::new();
            let builder = Server::builder(path.as_str()).cores(Cores::Unpinned(2));
            let started = builder.config(small().build().unwrap()).serve_streams(|_| async {});
            let said = said(started);
            // Neither a socket nor a lock.
            let left = fs::read_dir(std::env::temp_dir()).unwrap().flatten().filter(|entry| {
                let name = entry.file_name();
                let own = Path::new(path.as_str()).file_name().unwrap().to_str().unwrap();
                name.to_string_lossy().starts_with(own)
            });
            assert_eq!(left.count(), 0, "something is left");
            said
        }
        "client" => said(preflight(&Cores::Unpinned(1))),
        "pinned client" => said(preflight(&Cores::Count(1))),
        "footprint" => {
            said(shmipc_glommio::preflight(&small().build().unwrap().footprint(1, 1, 1)))
        }
        "pinned server" => {
            let path = SocketPath::new();
            let builder = Server::builder(path.as_str()).cores(Cores::Count(1));
            said(builder.config(small().build().unwrap()).serve_streams(|_| async {}))
        }
        "checked session" => {
            match shmipc_glommio::preflight(&small().build().unwrap().footprint(1, 1, 1)) {
                Ok(()) => session(small()),
                error => said(error),
            }
        }
        "memfd session" => session(small()),
        "file session" => {
            let prefix = format!("/dev/shm/shmipc-preflight-{}", std::process::id());
            session(small().memory(MemoryKind::File).path_prefix(prefix))
        }
        "unchecked file session" => {
            let prefix = format!("/dev/shm/shmipc-preflight-{}", std::process::id());
            let files = small().memory(MemoryKind::File).path_prefix(prefix);
            session(files.preflight_memory(false))
        }
        "connect" => {
            let at = PathBuf::from(value);
            on_executor(async move || {
                let connector = Connector::new(small().build().unwrap());
                said(connector.connect(&at).await)
            })
        }
        "keep" => {
            let at = PathBuf::from(value);
            on_executor(async move || keep(&at).await)
        }
        "listen" => {
            let at = PathBuf::from(value);
            on_executor(async move || said(Listener::bind(&at, small().build().unwrap())))
        }
        other => panic!("{other}"),
    }
}

fn on_executor(task: impl AsyncFnOnce() -> String + Send + 'static) -> String {
    let builder = glommio::LocalExecutorBuilder::default();
    builder.spawn(move || async move { task().await }).unwrap().join().unwrap()
}

/// A listener and a client in one.
fn session(config: ConfigBuilder) -> String {
    on_executor(async move || {
        let path = SocketPath::new();
        let config = config.build().unwrap();
        let _listener = Listener::bind(path.as_str(), config.clone()).unwrap();
        said(Connector::new(config).connect(path.as_str()).await)
    })
}

/// What one who waits for a session of a client is told, and how the client stands then.
async fn keep(at: &Path) -> String {
    let client = Client::builder(at).config(small().build().unwrap()).acquire_timeout(LIMIT);
    let client = client.build().unwrap();
    let said = said(client.session(0).await);
    let state = &client.status()[0].state;
    assert!(matches!(state, SessionState::Failed { .. }), "{state:?}");
    said
}

fn can_change_user() -> bool {
    let is_root = nix::unistd::geteuid().is_root();
    if !is_root {
        println!("skipped: only the superuser can run something as another user");
    }
    is_root
}

#[track_caller]
fn check(limit: &str, task: &str, parts: &[&str]) {
    let said = under(limit, task);
    assert!(said.starts_with("typed: "), "{limit} {task}: {said}");
    for part in parts {
        assert!(said.contains(part), "{limit} {task}: {part:?} is not in: {said}");
    }
}

#[test]
fn without_limits_everything_is_fine() {
    for task in ["server", "client", "footprint", "memfd session", "file session"] {
        assert_eq!(under("fsize=1000000000", task), "fine", "{task}");
    }
}

#[test]
fn io_uring_that_is_forbidden_is_told_as_that() {
    let parts = ["io_uring cannot be used", "seccomp", "allow io_uring_setup"];
    for call in ["io_uring_setup", "io_uring_enter", "io_uring_register"] {
        for errno in [libc::EPERM, libc::ENOSYS, libc::EACCES] {
            check(&format!("{call}={errno}"), "client", &[&parts[..], &[call]].concat());
        }
        check(&format!("{call}={}", libc::EPERM), "server", &parts);
        check(&format!("{call}={}", libc::EPERM), "footprint", &parts);
    }
}

#[test]
fn too_little_locked_memory_is_told_with_the_limit() {
    for task in ["server", "client", "footprint"] {
        check("memlock=65536", task, &["65536 bytes", "524288", "`ulimit -l`", "LimitMEMLOCK="]);
    }
}

#[test]
fn too_few_open_files_are_told_with_the_limit() {
    for task in ["server", "client", "footprint"] {
        check("nofile=12", task, &["12 files may be open", "`ulimit -n`", "LimitNOFILE="]);
    }
}

/// However few there may be: what is not enough is said, and nothing panics.
#[test]
fn no_number_of_open_files_or_threads_is_a_surprise() {
    let check = |limit: &str, task: &str| {
        let said = under(limit, task);
        assert!(said == "fine" || said.starts_with("typed: "), "{limit} {task}: {said}");
        said == "fine"
    };
    for task in ["server", "checked session"] {
        let fine: Vec<_> =
            (10..90).step_by(8).map(|n| check(&format!("nofile={n}"), task)).collect();
        assert!(!fine[0] && fine[fine.len() - 1], "{fine:?}");
    }
    if can_change_user() {
        let fine: Vec<_> =
            (2..12).step_by(2).map(|n| check(&format!("nproc={n}"), "server")).collect();
        assert!(!fine[0] && fine[fine.len() - 1], "{fine:?}");
    }
}

#[test]
fn too_few_threads_are_told_with_the_limit() {
    if !can_change_user() {
        return;
    }
    // Of the two that the test itself has, to begin with.
    for (limit, task) in [("nproc=2", "client"), ("nproc=4", "server"), ("nproc=2", "footprint")] {
        let (_, number) = limit.split_once('=').unwrap();
        let of_user = format!("limit of this user: {number}");
        check(limit, task, &[&of_user, "threads are needed", "`ulimit -u`", "TasksMax="]);
    }
}

#[test]
fn pinning_that_is_forbidden_is_told_with_the_processor() {
    let limit = format!("sched_setaffinity={}", libc::EPERM);
    let parts = ["pinned to processor 0", "Cores::Unpinned", "taskset", "seccomp"];
    check(&limit, "pinned client", &parts);
    check(&limit, "pinned server", &parts);
    assert_eq!(under(&limit, "client"), "fine");
    assert_eq!(under(&limit, "server"), "fine");
}

#[test]
fn memory_that_is_longer_than_files_may_be_kills_nobody() {
    for task in ["memfd session", "file session", "unchecked file session", "footprint"] {
        check("fsize=65536", task, &["65536 bytes", "takes 2097152", "`ulimit -f`", "LimitFSIZE="]);
        // Between the length of the queues and that of the buffers.
        check("fsize=2097151", task, &["2097151 bytes", "takes 2097152"]);
    }
    // A server makes no such files.
    assert_eq!(under("fsize=65536", "server"), "fine");
    let left = fs::read_dir("/dev/shm").unwrap().flatten();
    let left = left.filter(|entry| entry.file_name().to_string_lossy().contains("preflight"));
    assert_eq!(left.count(), 0);
}

#[test]
fn one_who_may_not_connect_is_told_whose_socket_it_is_and_does_not_wait() {
    if !can_change_user() {
        return;
    }
    run(LIMIT, || async {
        let path = SocketPath::new();
        let _listener = Listener::bind(path.as_str(), small().build().unwrap()).unwrap();
        for task in ["connect", "keep"] {
            let said = under(&format!("user={LONELY_USER}"), &format!("{task}={}", path.as_str()));
            for part in [
                path.as_str(),
                "Permission denied",
                "of user 0 and group 0 with mode 600",
                &format!("this process is user {LONELY_USER}"),
                "`socket_mode`",
            ] {
                assert!(said.contains(part), "{task}: {part:?} is not in: {said}");
            }
        }
        let directory = std::env::temp_dir().join(format!("shmipc-closed-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
        let at = directory.join("x.sock");
        let user = format!("user={LONELY_USER}");
        let connecting = under(&user, &format!("connect={}", at.display()));
        let listening = under(&user, &format!("listen={}", at.display()));
        fs::remove_dir(&directory).unwrap();
        assert!(connecting.contains("x.sock: Permission denied"), "{connecting}");
        assert!(connecting.contains("may not search its directory"), "{connecting}");
        assert!(listening.contains("x.sock: "), "{listening}");
        assert!(listening.contains("must be able to create files in"), "{listening}");
    });
}

#[test]
fn what_can_be_told_from_the_outside_can_be_told_from_the_type() {
    let error = Error::from(ResourceError::FileSize { what: "it", needed: 2, limit: 1 });
    assert_eq!(error.kind(), std::io::ErrorKind::FileTooLarge);
    assert!(!error.is_retryable() && !error.is_peer_fault());
}
