// SPDX-License-Identifier: MIT OR Apache-2.0
//! `kv_server` as the program it is.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};
use std::{fs, thread};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

/// The longest that anything here may take on a machine that is busy with other things. Nothing
/// passes or fails by how fast it is within that.
pub(crate) const LONG: Duration = Duration::from_secs(100);

/// A child that does not outlive its test.
pub(crate) struct Running {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Running {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(example_path("kv_server"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self { child, lines, seen: Vec::new() }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        nix::sys::signal::kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// The next line on stderr that starts with this, and what is behind it.
    pub(crate) fn line_with(&mut self, start: &str) -> String {
        let deadline = Instant::now() + LONG;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => self.seen.push(line),
                Err(error) => panic!("no line {start:?}: {error}; stderr: {:#?}", self.seen),
            }
            if let Some(rest) = self.seen.last().and_then(|line| line.strip_prefix(start)) {
                return rest.to_owned();
            }
        }
    }

    /// Waits for the end. Gives how it ended and what it wrote to stdout.
    pub(crate) fn end(&mut self) -> (ExitStatus, String) {
        let deadline = Instant::now() + LONG;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end; stderr: {:#?}", self.seen);
            thread::sleep(Duration::from_millis(5));
        };
        let mut output = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut output).unwrap();
        (status, output)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server with all three doors, in a directory of its own.
pub(crate) struct Server {
    pub(crate) process: Running,
    pub(crate) tcp: String,
    directory: Directory,
}

/// Goes with what is in it.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("shmipc-kv-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(crate) fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // A test that fails says more than what is left here.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Server {
    pub(crate) fn start(shards: usize) -> Self {
        Self::start_in(Directory::new(), shards)
    }

    pub(crate) fn start_in(directory: Directory, shards: usize) -> Self {
        Self::start_in_with(directory, shards, &[])
    }

    #[allow(dead_code, reason = "not every test starts it with more")]
    pub(crate) fn start_with(shards: usize, options: &[&str]) -> Self {
        Self::start_in_with(Directory::new(), shards, options)
    }

    fn start_in_with(directory: Directory, shards: usize, options: &[&str]) -> Self {
        let (unix, shm, shards) =
            (directory.file("unix"), directory.file("shm"), &shards.to_string());
        let doors = ["--tcp", "127.0.0.1:0", "--unix", &unix, "--shm", &shm];
        let mut process =
            Running::start(&[&doors[..], &["--shards", shards, "--debug"], options].concat());
        let tcp = process.line_with("listening on tcp ");
        assert_eq!(process.line_with("listening on unix "), unix);
        assert_eq!(process.line_with("listening on shm "), format!("{shm} ({shards} shards)"));
        assert_eq!(process.line_with("ready"), "");
        Self { process, tcp, directory }
    }

    pub(crate) fn unix(&self) -> String {
        self.directory.file("unix")
    }

    pub(crate) fn shm(&self, shard: usize) -> String {
        self.directory.file(&format!("shm.{shard}"))
    }

    pub(crate) fn any_shm(&self) -> String {
        self.directory.file("shm")
    }

    /// How the crate `redis` finds the two doors, in a version of the protocol.
    #[allow(dead_code, reason = "not every test has it")]
    pub(crate) fn urls(&self, version: &str) -> [String; 2] {
        [
            format!("redis://{}/?protocol={version}", self.tcp),
            format!("redis+unix://{}?protocol={version}", self.unix()),
        ]
    }

    /// Ends the server as an administrator would. Gives the directory, empty.
    pub(crate) fn stop(mut self) -> Directory {
        self.process.signal(Signal::SIGTERM);
        let (status, _) = self.process.end();
        assert!(status.success(), "{status}; stderr: {:#?}", self.process.seen);
        assert_eq!(self.directory.files(), [""; 0], "sockets are left");
        self.directory
    }

    /// Kills the server. Gives the directory with what it has left there.
    pub(crate) fn kill(mut self) -> Directory {
        self.process.signal(Signal::SIGKILL);
        self.process.end();
        self.directory
    }
}

/// An example as the program it is.
pub(crate) fn example_path(name: &str) -> PathBuf {
    // target/<profile>/deps/kv-<hash>
    let this = std::env::current_exe().unwrap();
    let profile = this.parent().unwrap().parent().unwrap();
    let places = [profile.join(name), profile.join("examples").join(name)];
    let path = places.into_iter().find(|path| path.exists());
    path.unwrap_or_else(|| panic!("{name} is missing: cargo build --bins --examples"))
}

/// Waits until something is so.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
