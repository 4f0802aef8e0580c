// SPDX-License-Identifier: MIT OR Apache-2.0
//! The examples as processes: started, watched, signalled, and never left behind.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

/// The longest that anything here may take on a machine that is busy with other things. Nothing
/// passes or fails by how fast it is within that.
pub(crate) const LONG: Duration = Duration::from_secs(100);

/// A child process that does not outlive its test.
pub(crate) struct Process {
    pub(crate) child: Child,
    /// What it writes to stderr.
    pub(crate) lines: Receiver<String>,
    /// Everything that was taken out of `lines`, to be shown when something fails.
    pub(crate) seen: Vec<String>,
}

impl Process {
    pub(crate) fn start(example: &str, arguments: &[&str]) -> Self {
        Self::spawn(Command::new(example_path(example)).args(arguments))
    }

    pub(crate) fn spawn(command: &mut Command) -> Self {
        let mut child = command
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

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        nix::sys::signal::kill(self.pid(), signal).unwrap();
    }

    /// The next line on stderr that has `part` in it.
    pub(crate) fn line_with(&mut self, part: &str) -> String {
        let deadline = Instant::now() + LONG;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => self.seen.push(line),
                Err(error) => panic!("no line with {part:?}: {error}; stderr: {:#?}", self.seen),
            }
            if let Some(line) = self.seen.last().filter(|line| line.contains(part)) {
                return line.clone();
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
        let mut stdout = self.child.stdout.take().unwrap();
        stdout.read_to_string(&mut output).unwrap();
        (status, output)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn example_path(name: &str) -> PathBuf {
    // target/<profile>/deps/examples-<hash>
    let this = std::env::current_exe().unwrap();
    let profile = this.parent().unwrap().parent().unwrap();
    let places = [profile.join(name), profile.join("examples").join(name)];
    let path = places.into_iter().find(|path| path.exists());
    path.unwrap_or_else(|| panic!("{name} is missing: cargo build --bins --examples"))
}

/// Files in /dev/shm that carry the number of a process in their name.
pub(crate) fn shared_memory_files(pid: Pid) -> Vec<String> {
    let pid = pid.to_string();
    let names = fs::read_dir("/dev/shm").unwrap().flatten();
    names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.split('_').any(|part| part == pid))
        .collect()
}

/// Waits until something is so.
pub(crate) fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + LONG;
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
