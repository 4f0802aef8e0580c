//! Two processes on two processors, and slices of all points in turn.
//!
//! The server process is this program again. It reads points from its standard input, serves one at
//! a time, and answers on its standard output, so that nothing of one transport runs while another
//! is measured.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::count::{self, Cost};
use super::point::{Point, Slice, Transport};
use super::{floor, ours, sockets};

/// The processor of the client and of the server.
const CLIENT_CPU: usize = 0;
const SERVER_CPU: usize = 1;

/// How the server process is started: this program with this argument.
pub(crate) const SERVE: &str = "--serve-points";

/// Puts this thread, and those it starts, on one processor. A machine with one only stays as it is.
pub(crate) fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    if set.set(cpu).is_ok() {
        let _ = sched_setaffinity(Pid::from_raw(0), &set);
    }
}

/// What the server process is told when the measuring begins and ends, so that it counts the same
/// operations as this side.
pub(crate) const BEGIN: &str = "begin";
pub(crate) const END: &str = "end";

static SERVER_INPUT: Mutex<Option<ChildStdin>> = Mutex::new(None);

/// Sends a line to the server process, if there is one.
pub(crate) fn tell_server(line: &str) {
    if let Some(input) = &mut *SERVER_INPUT.lock().expect("nobody panics while writing") {
        writeln!(input, "{line}").expect("a live server");
    }
}

/// What one slice gave, and what it cost on both sides.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outcome {
    pub(crate) slice: Slice,
    pub(crate) syscalls_per_op: Option<f64>,
    pub(crate) allocations_per_op: f64,
}

/// The server process, and the end of its output.
pub(crate) struct Harness {
    child: Child,
    output: BufReader<ChildStdout>,
    directory: PathBuf,
    slices: usize,
}

impl Harness {
    pub(crate) fn start() -> Self {
        let directory = PathBuf::from(format!("/dev/shm/ping-pong-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("room in /dev/shm");
        let mut child = Command::new(std::env::current_exe().expect("a path to this program"))
            .arg(SERVE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program can be started");
        *SERVER_INPUT.lock().expect("nobody panics while writing") = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("piped"));
        pin(CLIENT_CPU);
        Self { child, output, directory, slices: 0 }
    }

    /// Has the server process serve a point, and gives the path to connect to.
    pub(crate) fn begin(&mut self, point: Point) -> PathBuf {
        self.slices += 1;
        let path = self.directory.join(self.slices.to_string());
        tell_server(&format!("{} {}", path.display(), point.to_line()));
        self.expect("ready");
        path
    }

    /// Waits until the server process has served the point, and gives what that cost.
    pub(crate) fn finish(&mut self, path: &Path) -> Cost {
        let answer = self.expect("done");
        let mut words = answer.split_whitespace().skip(1);
        let cost = Cost {
            allocations: words.next().and_then(|word| word.parse().ok()).unwrap_or(0),
            syscalls: words.next().and_then(|word| word.parse().ok()),
        };
        let _ = std::fs::remove_file(path);
        cost
    }

    /// Measures one slice of a point.
    pub(crate) fn run(&mut self, point: Point) -> Outcome {
        let path = self.begin(point);
        count::watch_this_thread();
        let slice = match point.transport {
            Transport::Floor | Transport::RawSame | Transport::RawRotating => {
                floor::measure(&path, point)
            }
            Transport::Ours(ours) => ours::measure(&path, ours, point),
            Transport::UdsBlocking => sockets::measure_blocking(&path, point),
            Transport::UdsGlommio => sockets::measure_glommio(&path, point),
            #[cfg(feature = "dev-shmipc")]
            Transport::ShmipcRs => super::shmipc_rs::measure(&path, point),
        };
        let cost = count::between();
        let server = self.finish(&path);
        let operations = slice.operations.max(1) as f64;
        let syscalls = cost.syscalls.zip(server.syscalls);
        Outcome {
            syscalls_per_op: syscalls.map(|(ours, theirs)| (ours + theirs) as f64 / operations),
            allocations_per_op: (cost.allocations + server.allocations) as f64 / operations,
            slice,
        }
    }

    fn expect(&mut self, word: &str) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("a live server");
        assert!(line.starts_with(word), "the server said {line:?}");
        line
    }
}

impl Drop for Harness {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// The server process: serves points until its standard input ends. This thread only listens to
/// what it is told; each point has a thread of its own.
pub(crate) fn serve() {
    let mut input = std::io::stdin().lock();
    // Kept, so that listening allocates nothing while something else is counted.
    let mut line = String::with_capacity(4096);
    while input.read_line(&mut line).expect("a pipe of text") > 0 {
        match line.trim_end() {
            BEGIN => count::begin(),
            END => count::end(),
            line => {
                let (path, point) = line.split_once(' ').expect("a path and a point");
                let (path, point) = (PathBuf::from(path), Point::from_line(point));
                let point = point.expect("a point");
                std::thread::spawn(move || serve_and_answer(&path, point));
            }
        }
        line.clear();
    }
}

fn serve_and_answer(path: &Path, point: Point) {
    pin(if point.shared_cpu { CLIENT_CPU } else { SERVER_CPU });
    count::watch_this_thread();
    serve_point(path, point);
    let Cost { allocations, syscalls } = count::between();
    match syscalls {
        Some(syscalls) => answer(&format!("done {allocations} {syscalls}")),
        None => answer(&format!("done {allocations} unknown")),
    }
}

fn serve_point(path: &Path, point: Point) {
    let ready = || answer("ready");
    match point.transport {
        Transport::Floor | Transport::RawSame | Transport::RawRotating => {
            ready();
            floor::serve(path, point);
        }
        Transport::Ours(ours) => ours::serve(path, ours, point, ready),
        Transport::UdsBlocking => sockets::serve_blocking(path, point, ready),
        Transport::UdsGlommio => sockets::serve_glommio(path, point, ready),
        #[cfg(feature = "dev-shmipc")]
        Transport::ShmipcRs => super::shmipc_rs::serve(path, point, ready),
    }
}

fn answer(line: &str) {
    let mut output = std::io::stdout().lock();
    // The client that is gone reads no more, and this process ends with its input.
    let _ = writeln!(output, "{line}").and_then(|()| output.flush());
}
