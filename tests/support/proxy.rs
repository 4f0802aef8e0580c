// SPDX-License-Identifier: MIT OR Apache-2.0
//! The proxy as a process, alone and in a pair, and servers of sockets behind it.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{fs, thread};

use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::Value;

use super::executor::SocketPath;
use super::payload::{Way, check, payload};
use super::process::{LONG, Process, example_path, shared_memory_files};

/// A server that does one thing with every connection, each on a thread of its own.
pub(crate) struct Server {
    /// As the proxy takes it.
    pub(crate) address: String,
    is_stopping: Arc<AtomicBool>,
    accepting: Option<thread::JoinHandle<()>>,
}

type Handler = Arc<dyn Fn(UnixStream) -> io::Result<()> + Send + Sync>;

impl Server {
    pub(crate) fn unix(
        path: &str,
        handler: impl Fn(UnixStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let _ = fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        let accept = move || listener.accept().map(|(stream, _)| stream);
        Self::start(format!("unix:{path}"), accept, Arc::new(handler))
    }

    pub(crate) fn tcp(
        handler: impl Fn(UnixStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap());
        // The standard library's types differ in how they are made, not in what they can do.
        let accept = move || listener.accept().map(|(stream, _)| OwnedFd::from(stream).into());
        Self::start(address, accept, Arc::new(handler))
    }

    pub(crate) fn start(
        address: String,
        accept: impl Fn() -> io::Result<UnixStream> + Send + 'static,
        handler: Handler,
    ) -> Self {
        let is_stopping = Arc::new(AtomicBool::new(false));
        let stops = Arc::clone(&is_stopping);
        let accepting = thread::spawn(move || {
            loop {
                let stream = accept().unwrap();
                if stops.load(Ordering::Relaxed) {
                    return;
                }
                let handler = Arc::clone(&handler);
                // What fails here is seen by the client.
                let serve = move || drop(handler(stream));
                thread::Builder::new().stack_size(256 << 10).spawn(serve).unwrap();
            }
        });
        Self { address, is_stopping, accepting: Some(accepting) }
    }
}

impl Drop for Server {
    /// Nobody listens any more when this is done; the connections go on.
    fn drop(&mut self) {
        self.is_stopping.store(true, Ordering::Relaxed);
        let (kind, place) = self.address.split_once(':').unwrap();
        let woken = match kind {
            "tcp" => TcpStream::connect(place).map(drop),
            _ => UnixStream::connect(place).map(drop),
        };
        if woken.is_ok() {
            // A panic of it was told when it happened.
            let _ = self.accepting.take().unwrap().join();
        }
    }
}

pub(crate) fn echo(mut stream: UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            count => stream.write_all(&buffer[..count])?,
        }
    }
}

/// A proxy, and where clients reach it.
pub(crate) struct Proxy {
    pub(crate) process: Process,
    pub(crate) address: String,
}

impl Proxy {
    /// Started by a shell whose limit of descriptors is low, as they often are.
    pub(crate) fn start(listen: &str, connect: &str, options: &[&str]) -> Self {
        Self::start_limited("-Sn 256", listen, connect, options)
    }

    pub(crate) fn start_limited(
        limit: &str,
        listen: &str,
        connect: &str,
        options: &[&str],
    ) -> Self {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("ulimit {limit} && exec \"$0\" \"$@\"")]);
        shell.arg(example_path("proxy")).args(["--listen", listen, "--connect", connect]);
        let mut process = Process::spawn(shell.args(options));
        let line = process.line_with("listening on ");
        Self { process, address: line.strip_prefix("listening on ").unwrap().to_owned() }
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let address = self.address.strip_prefix("tcp:").unwrap();
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.set_write_timeout(Some(LONG)).unwrap();
        stream
    }

    /// Ends it as an administrator would. Gives what it carried.
    pub(crate) fn stop(mut self) -> Value {
        self.process.signal(Signal::SIGTERM);
        self.totals()
    }

    /// Waits until it has ended by itself, or by a signal that it was sent.
    pub(crate) fn totals(&mut self) -> Value {
        let line = self.process.line_with(r#""event":"end""#);
        let (status, _) = self.process.end();
        assert!(status.success(), "{status}; stderr: {:#?}", self.process.seen);
        let (kind, path) = self.address.split_once(':').unwrap();
        assert!(kind == "tcp" || !Path::new(path).exists(), "the socket is left");
        assert_eq!(shared_memory_files(self.process.pid()), [""; 0]);
        serde_json::from_str(&line).unwrap()
    }
}

/// Two proxies with a session between them: a port of TCP here, the server there.
pub(crate) struct Pair {
    pub(crate) near: Proxy,
    pub(crate) far: Proxy,
    pub(crate) _path: SocketPath,
}

impl Pair {
    pub(crate) fn to(server: &Server) -> Self {
        Self::with_options(server, &[])
    }

    pub(crate) fn with_options(server: &Server, options: &[&str]) -> Self {
        let path = SocketPath::new();
        let between = format!("shm:{}", path.as_str());
        let far = Proxy::start(&between, &server.address, options);
        let near = Proxy::start("tcp:127.0.0.1:0", &between, options);
        Self { near, far, _path: path }
    }

    /// Ends both, and checks that both saw the same. Gives what the near one carried.
    pub(crate) fn stop(self) -> Value {
        let near = self.near.stop();
        let far = self.far.stop();
        for what in ["connections", "bytes_up", "bytes_down"] {
            assert_eq!(near[what], far[what], "{near}, {far}");
        }
        assert_eq!(near["failed"], 0, "{near}");
        assert_eq!(far["failed"], 0, "{far}");
        near
    }
}

/// Sends messages of these sizes, one behind the other, while the same bytes come back.
pub(crate) fn echo_all(stream: &TcpStream, number: u32, sizes: &[usize]) {
    thread::scope(|scope| {
        let mut writer = stream;
        scope.spawn(move || {
            for (message, &size) in sizes.iter().enumerate() {
                writer.write_all(&payload(Way::Request, number, message as u32, size)).unwrap();
            }
        });
        let mut reader = stream;
        for (message, &size) in sizes.iter().enumerate() {
            let mut echoed = vec![0; size];
            reader.read_exact(&mut echoed).unwrap();
            check(&echoed, Way::Request, number, message as u32);
        }
    });
}

/// Sees to it that the end of a connection is a reset.
pub(crate) fn reset(stream: impl AsFd) {
    let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&stream, sockopt::Linger, &at_once).unwrap();
}

/// Whether the connection was ended by the other side, in whichever way.
pub(crate) fn has_ended(mut stream: &TcpStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}

/// How many descriptors a process has open.
pub(crate) fn descriptors(process: &Process) -> usize {
    fs::read_dir(format!("/proc/{}/fd", process.pid())).unwrap().count()
}
