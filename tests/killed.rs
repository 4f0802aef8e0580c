// SPDX-License-Identifier: MIT OR Apache-2.0
//! Processes killed under load, hundreds of times, on either side: those that are left keep
//! serving, and nothing of the dead stays. Alone in its program: it counts what this process has.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use shmipc_glommio::{
    Client, Config, Cores, Error, MemoryKind, ProtocolVersion, Server, Stream, remove_leftovers,
};

use support::executor::{SocketPath, run};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
}

/// How often either side is killed.
const KILLS: usize = 250;
/// After so many, everything is there that is made once.
const WARM: usize = 25;
const SHARDS: usize = 2;
const LIMIT: Duration = Duration::from_secs(300);

/// What a child is told: what it is, where, and the prefix of its files.
const TASK: &str = "SHMIPC_KILLED_TASK";

/// Every third process has its memory in files.
fn config(prefix: &Path, with_files: bool) -> Config {
    let builder = Config::builder().container().path_prefix(prefix);
    let builder = if with_files {
        builder.protocol(ProtocolVersion::V2).memory(MemoryKind::File)
    } else {
        builder
    };
    builder.build().unwrap()
}

async fn echo(mut stream: Stream) -> Result<(), Error> {
    while let Some(message) = stream.recv().await? {
        stream.forward(message).await?;
    }
    Ok(())
}

fn serve(path: &str, config: Config) -> Server {
    let builder = Server::builder(path).cores(Cores::Unpinned(SHARDS)).config(config);
    builder.serve_streams(echo).unwrap()
}

/// Sends bytes that nobody else sends, and looks at what comes back.
async fn exchange(client: &Client, number: u64) -> Result<(), Error> {
    let len = 8 + (number.wrapping_mul(7919) % 20_000) as usize;
    let byte = |at: usize| (number.wrapping_mul(31).wrapping_add(at as u64 * 7)) as u8;
    let request: Vec<u8> = (0..len).map(byte).collect();
    let ask = client.with_stream(number as usize % SHARDS, async |stream| {
        let mut sent = 0;
        while sent < len {
            let mut loan = stream.alloc(len - sent).await?;
            sent += loan.write(&request[sent..]);
            stream.send(loan).await?;
        }
        let mut answer = Vec::new();
        while answer.len() < len {
            match stream.recv().await? {
                Some(message) => answer.extend_from_slice(&message.into_bytes()),
                None => return Err(Error::PeerClosed),
            }
        }
        assert!(answer == request, "request {number} came back as something else");
        Ok::<_, Error>(())
    });
    ask.await
}

/// Not a test by itself: what is killed.
#[test]
fn as_a_child() {
    let Ok(task) = std::env::var(TASK) else { return };
    let mut parts = task.split(':');
    let mut part = || parts.next().unwrap().to_owned();
    let (role, at, prefix, with_files) = (part(), part(), part(), part() == "true");
    let config = config(Path::new(&prefix), with_files);
    if role == "server" {
        let _server = serve(&at, config);
        println!("ready");
        std::thread::sleep(LIMIT);
        return;
    }
    run(LIMIT, move || async move {
        let client = Client::builder(&at).config(config).build().unwrap();
        for number in 0.. {
            exchange(&client, number).await.unwrap();
            if number == 3 {
                println!("ready");
            }
        }
    });
}

struct Doomed(Child);

impl Doomed {
    /// Starts a child, and waits until it is at work.
    fn start(role: &str, path: &str, prefix: &Path, with_files: bool) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "as_a_child", "--nocapture"])
            .env(TASK, format!("{role}:{path}:{}:{with_files}", prefix.display()))
            .stdout(Stdio::piped())
            .spawn();
        let mut child = child.unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let doomed = Self(child);
        // In the middle of a line of the test's own.
        let is_ready = output.lines().map_while(Result::ok).any(|line| line.contains("ready"));
        assert!(is_ready, "a child that was to be killed ended by itself");
        doomed
    }
}

impl Drop for Doomed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What this process has, and what is left of others.
#[derive(Debug, Clone, Copy)]
struct Possessions {
    resident_kib: u64,
    descriptors: usize,
    mappings: usize,
    files: usize,
}

impl Possessions {
    fn now(prefix: &Path) -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        let resident_kib = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        let name = prefix.file_name().unwrap().to_str().unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let entries = std::fs::read_dir("/dev/shm").unwrap().flatten();
        Self {
            resident_kib,
            descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
            mappings: maps.lines().filter(|line| line.contains(name)).count(),
            files: entries
                .filter(|entry| entry.file_name().to_string_lossy().starts_with(name))
                .count(),
        }
    }

    /// Waits until it stays the same for a while: sessions that are about to come have come, and
    /// those that ended have gone.
    fn settled(prefix: &Path) -> Self {
        let start = Instant::now();
        let mut last = Self::now(prefix);
        loop {
            std::thread::sleep(Duration::from_millis(100));
            let now = Self::now(prefix);
            let counts = |of: &Self| (of.descriptors, of.mappings, of.files);
            if counts(&now) == counts(&last) {
                return now;
            }
            last = now;
            assert!(start.elapsed() < LIMIT / 10, "it does not settle: {now:?}");
        }
    }

    /// Waits until no more is there than before.
    fn must_be_no_more_than(before: Self, prefix: &Path) {
        let start = Instant::now();
        loop {
            let now = Self::now(prefix);
            // Pages that the allocator keeps are no leak; a leak of one session's ledger and tables
            // for each kill would be 30 MiB.
            let is_back = now.resident_kib < before.resident_kib + (8 << 10)
                && now.descriptors <= before.descriptors
                && now.mappings <= before.mappings
                && now.files == 0;
            if is_back {
                println!("from {before:?} to {now:?}");
                return;
            }
            assert!(start.elapsed() < LIMIT / 10, "from {before:?} to {now:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// An honest client on a thread of its own.
struct Honest {
    is_over: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<()>,
}

impl Honest {
    /// Asks all the time. `patient`: answers may fail while there is no server.
    fn start(path: &str, prefix: &Path, patient: bool) -> Self {
        let (is_over, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (over, count) = (Arc::clone(&is_over), Arc::clone(&served));
        let (path, config) = (path.to_owned(), config(prefix, false));
        let (tell, started) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            run(LIMIT * 2, move || async move {
                let builder = Client::builder(&path).config(config);
                let client = builder.backoff(Duration::from_millis(1), Duration::from_millis(20));
                let client = client.build().unwrap();
                for number in 1_000_000.. {
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                    match exchange(&client, number).await {
                        Ok(()) => _ = count.fetch_add(1, Ordering::Relaxed),
                        Err(error) => assert!(patient, "an honest client is cut off: {error}"),
                    }
                    let _ = tell.send(());
                }
                // Whoever is killed has not taken everything.
                let _ = client.close().await;
                shmipc_glommio::shutdown_executor().await;
            });
        });
        started.recv().unwrap();
        Self { is_over, served, thread }
    }

    fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }

    /// Waits until it was served again.
    fn must_be_served(&self) {
        self.must_be_served_often(1);
    }

    /// Waits until it was served so often. It asks one shard after the other.
    fn must_be_served_often(&self, times: u64) {
        let (due, start) = (self.served() + times, Instant::now());
        while self.served() < due {
            assert!(start.elapsed() < LIMIT / 10, "an honest client is not served any more");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn finish(self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

/// Different pauses before the kills, so that they come at any point of an exchange.
fn pause(number: usize) -> Duration {
    Duration::from_micros((number * 7919 % 3000) as u64)
}

#[test]
fn nothing_stays_of_processes_that_are_killed_under_load() {
    let prefix = PathBuf::from(format!("/dev/shm/shmipc-killed-{}", std::process::id()));

    // Clients of a server that goes on.
    let path = SocketPath::new();
    let server = serve(path.as_str(), config(&prefix, false));
    let honest = Honest::start(path.as_str(), &prefix, false);
    let mut before = None;
    for number in 0..KILLS {
        let doomed = Doomed::start("client", path.as_str(), &prefix, number % 3 == 0);
        std::thread::sleep(pause(number));
        drop(doomed);
        honest.must_be_served();
        if number == WARM {
            before = Some(Possessions::settled(&prefix));
        }
    }
    // The server's side removes the names of files that its sessions had.
    Possessions::must_be_no_more_than(before.unwrap(), &prefix);
    honest.finish();
    server.stop(LIMIT).unwrap();

    // Servers of a client that goes on, and of two that have their memory in files.
    let path = SocketPath::new();
    let first = Doomed::start("server", path.as_str(), &prefix, false);
    let honest = Honest::start(path.as_str(), &prefix, true);
    drop(first);
    let mut before = None;
    for number in 0..KILLS {
        let doomed = Doomed::start("server", path.as_str(), &prefix, false);
        honest.must_be_served();
        if number == WARM {
            // With a session to each shard of a server that lives, as at the end.
            honest.must_be_served_often(4 * SHARDS as u64);
            before = Some(Possessions::settled(&prefix));
        }
        std::thread::sleep(pause(number));
        drop(doomed);
    }
    let last = Doomed::start("server", path.as_str(), &prefix, false);
    honest.must_be_served();
    Possessions::must_be_no_more_than(before.unwrap(), &prefix);
    honest.finish();
    drop(last);
    assert_eq!(remove_leftovers(&prefix).unwrap(), 0);
    assert_eq!(Possessions::now(&prefix).mappings, 0);
}
