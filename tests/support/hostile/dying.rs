// SPDX-License-Identifier: MIT OR Apache-2.0
//! Peers in a process of their own that are stopped, or killed, at any point of a transfer.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shmipc_glommio::wire::Event;
use shmipc_glommio::wire::layout::{LIST_HEAD_OFFSET, LIST_SIZE_OFFSET, LIST_TAIL_OFFSET};
use shmipc_glommio::{Config, ConfigBuilder, Error, HandshakeError};

use super::connecting::client_config;
use super::due::{IsDue, due};
use crate::support::bed::{Bed, DEADLINE, Fate};
use crate::support::raw::{
    ACK, BY_MEMFD, EXCHANGE, Memory, READY, Raw, Rig, STREAM, honest_paths, layout, message, open,
    read_i64, read_u32, write_i64, write_u32,
};
use crate::{bed, config};

/// What a child is told: its side, its point, its signal, and a path, with colons between them.
const TASK: &str = "SHMIPC_HOSTILE_TASK";

/// Counts the points of a transfer, and sends this process a signal at one of them.
struct Points {
    left: u32,
    signal: Signal,
}

impl Points {
    fn next(&mut self) {
        if self.left == 0 {
            nix::sys::signal::raise(self.signal).unwrap();
        }
        self.left -= 1;
    }
}

/// How many points there are for a client, and for a server.
pub(super) const CLIENT_POINTS: u32 = 24;
const SERVER_POINTS: u32 = 22;

/// A client of a server of ours, from its connection on.
fn act_as_client(path: &Path, mut points: Points) {
    let mut raw = Raw::connect(path);
    points.next();
    let exchange = message(EXCHANGE, 3, &[]);
    raw.send(&exchange[..4]);
    points.next();
    raw.send(&exchange[4..]);
    points.next();
    raw.receive(8);
    points.next();
    let announcement = message(BY_MEMFD, 3, &honest_paths("dying queue", "dying buffer"));
    raw.send(&announcement[..20]);
    points.next();
    raw.send(&announcement[20..]);
    points.next();
    raw.receive(8);
    points.next();
    let [buffer, queue] = Memory::honest().into_memfds("dying");
    raw.send_with(&[0], &[buffer.as_fd(), queue.as_fd()]);
    points.next();
    raw.receive(8);
    points.next();
    transfer(Rig::new(raw, buffer, queue, true), points);
}

/// A server that a client of ours connects to.
fn act_as_server(path: &Path, mut points: Points) {
    // Between its bind and its listen a server refuses; so it is found when it listens.
    let early = path.with_extension("early");
    let listener = UnixListener::bind(&early).unwrap();
    fs::rename(&early, path).unwrap();
    let mut raw = Raw::accept(&listener);
    points.next();
    raw.receive(8);
    points.next();
    raw.send(&message(EXCHANGE, 3, &[])[..5]);
    points.next();
    raw.send(&message(EXCHANGE, 3, &[])[5..]);
    points.next();
    raw.receive_message();
    points.next();
    raw.send(&message(READY, 3, &[]));
    points.next();
    let mut fds = raw.receive_descriptors().into_iter();
    let (buffer, queue) = (fds.next().unwrap().into(), fds.next().unwrap().into());
    points.next();
    let mut rig = Rig::new(raw, buffer, queue, false);
    rig.raw.send(&message(ACK, 3, &[]));
    assert_eq!(rig.receive(), b"hello");
    transfer(rig, points);
}

/// What goes on in a session, step by step as a library takes them.
fn transfer(mut rig: Rig, mut points: Points) {
    rig.echo(b"in good health");
    points.next();
    // A message to the other side.
    let offset = rig.fill(b"the last words");
    points.next();
    let tail = read_i64(&rig.queue, rig.tail_at());
    let slot = (tail % i64::from(rig.capacity())) as u32;
    let at = rig.send_base() + shmipc_glommio::wire::layout::element_offset(slot);
    rig.queue.write_all_at(&open(offset).to_bytes()[..6], at).unwrap();
    points.next();
    rig.queue.write_all_at(&open(offset).to_bytes(), at).unwrap();
    points.next();
    write_i64(&rig.queue, rig.tail_at(), tail + 1);
    points.next();
    rig.ring();
    points.next();
    // And its answer.
    let event = rig.next_event();
    points.next();
    let working = rig.receive_base() + layout().flag_offset() as u64;
    write_u32(&rig.queue, working, 1);
    points.next();
    write_u32(&rig.queue, working, 0);
    points.next();
    // In the middle of giving a slice back: the tail is it, and nothing leads there.
    let (list, _) = rig.lists[0];
    let at = |field: usize| u64::from(list) + field as u64;
    let before = read_u32(&rig.buffer, at(LIST_TAIL_OFFSET));
    write_u32(&rig.buffer, at(LIST_TAIL_OFFSET), event.offset - list - 36);
    points.next();
    write_u32(&rig.buffer, at(LIST_TAIL_OFFSET), before);
    // In the middle of taking one: it is not counted any more, and still the head.
    let size = read_u32(&rig.buffer, at(LIST_SIZE_OFFSET));
    write_u32(&rig.buffer, at(LIST_SIZE_OFFSET), size - 1);
    points.next();
    let head = read_u32(&rig.buffer, at(LIST_HEAD_OFFSET));
    write_u32(&rig.buffer, at(LIST_HEAD_OFFSET), head);
    // Data over the socket, in two pieces.
    let mut payload = STREAM.to_be_bytes().to_vec();
    payload.extend([0, 0, 0, 0]);
    payload.extend([7; 100]);
    let data = message(3, 3, &payload);
    rig.raw.send(&data[..50]);
    points.next();
    rig.raw.send(&data[50..]);
    points.next();
    // The stream ends, and its end has not been rung for.
    let status = 1;
    rig.push(&[Event { status, ..open(0) }]);
    points.next();
    // What comes last ends the process anyway.
    points.left = 0;
    points.next();
}

/// Not a test by itself: what the children of this process run.
#[test]
fn as_a_child() {
    let Ok(task) = std::env::var(TASK) else { return };
    let mut parts = task.splitn(4, ':');
    let mut part = || parts.next().unwrap();
    let (side, left, signal, path) = (part(), part(), part(), part());
    let signal: Signal = signal.parse().unwrap();
    let points = Points { left: left.parse().unwrap(), signal };
    match side {
        "client" => act_as_client(Path::new(path), points),
        _ => act_as_server(Path::new(path), points),
    }
    unreachable!("it was to end by a signal");
}

/// A child that does not outlive its test.
pub(super) struct Actor(Child);

impl Actor {
    pub(super) fn start(side: &str, point: u32, signal: Signal, path: &Path) -> Self {
        let name = format!("{}::as_a_child", module_path!().split_once("::").unwrap().1);
        let task = format!("{side}:{point}:{signal}:{}", path.display());
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &name, "--nocapture", "--test-threads=1"])
            .env(TASK, task)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// Waits until it was killed.
    pub(super) fn wait(&mut self) {
        self.0.wait().unwrap();
    }

    /// Waits until it was stopped.
    fn wait_for_stop(&self) {
        let path = format!("/proc/{}/stat", self.0.id());
        let began = Instant::now();
        // The state follows the name, which is in brackets.
        let is_stopped = || {
            let stat = fs::read_to_string(&path).unwrap();
            stat.rsplit(") ").next().unwrap().starts_with('T')
        };
        while !is_stopped() {
            assert!(began.elapsed() < DEADLINE * 4, "the child does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0.id() as i32), Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

/// Where a child listens.
struct ListensAt(PathBuf);

impl ListensAt {
    fn new(bed: &Bed, point: u32) -> Self {
        Self(bed.path().with_extension(format!("dying{point}")))
    }

    /// Has our client connect there, once there is somebody.
    fn connect(&self, bed: &Bed, config: Config) {
        let began = Instant::now();
        while !self.0.exists() {
            assert!(began.elapsed() < DEADLINE * 4, "the child does not listen");
            std::thread::sleep(Duration::from_micros(200));
        }
        bed.connect(&self.0, config);
    }
}

impl Drop for ListensAt {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Whether an error says that a peer is gone, wherever it was at that time.
fn is_gone(fate: &Result<Fate, String>) -> bool {
    let (Ok(Fate::Ended(error)) | Ok(Fate::Refused(error))) = fate else { return false };
    error.is_peer_fault() || matches!(error, Error::PeerClosed)
}

#[test]
fn a_client_that_is_killed_at_any_point_takes_nothing_with_it() {
    let bed = Bed::start(config().build().unwrap());
    for point in 0..CLIENT_POINTS {
        let mut actor = Actor::start("client", point, Signal::SIGKILL, bed.path());
        actor.0.wait().unwrap();
        let fate = bed.fate();
        if !is_gone(&fate) {
            bed.note(format!("point {point}: {fate:?}"));
        }
        bed.must_go_on(&format!("a client killed at point {point}"));
    }
    bed.finish();
}

#[test]
fn a_server_that_is_killed_at_any_point_takes_nothing_with_it() {
    let bed = Bed::start(config().build().unwrap());
    for point in 0..SERVER_POINTS {
        let there = ListensAt::new(&bed, point);
        let mut actor = Actor::start("server", point, Signal::SIGKILL, &there.0);
        there.connect(&bed, client_config().build().unwrap());
        actor.0.wait().unwrap();
        let fate = bed.fate();
        if !is_gone(&fate) {
            bed.note(format!("point {point}: {fate:?}"));
        }
        bed.must_go_on(&format!("a server killed at point {point}"));
    }
    bed.finish();
}

/// Points at which a client has something to take, and was stopped.
const STOPPED_WITH_AN_ANSWER_DUE: [u32; 2] = [14, 21];
/// The same for a server.
const SERVER_STOPPED_WITH_AN_ANSWER_DUE: [u32; 2] = [12, 19];

/// What is asked of a session whose peer was stopped.
fn note_unless_due(bed: &Bed, name: &str, is_due: IsDue) {
    let fate = bed.fate();
    if !matches!(&fate, Ok(Fate::Refused(error) | Fate::Ended(error)) if is_due(error)) {
        bed.note(format!("{name}: {fate:?}"));
    }
    bed.must_go_on(name);
}

/// For how long a peer that has stopped is waited for: much longer than one that goes on takes for
/// anything, on a machine with other things to do.
const PATIENCE: Duration = Duration::from_secs(1);

/// Handshakes end soon, or sessions do: what a peer needs until it stops is not hurried.
fn in_handshakes(config: ConfigBuilder) -> Config {
    config.handshake_timeout(PATIENCE).build().unwrap()
}

fn in_sessions(config: ConfigBuilder) -> Config {
    config.stall_timeout(Some(PATIENCE)).build().unwrap()
}

const IS_LATE: IsDue = due!(Error::Handshake(HandshakeError::Timeout(_)));
const IS_STALLED: IsDue = due!(Error::PeerStalled(_));

#[test]
fn a_client_that_is_stopped_is_given_up() {
    let stop_at = |bed: &Bed, point, is_due| {
        let actor = Actor::start("client", point, Signal::SIGSTOP, bed.path());
        actor.wait_for_stop();
        note_unless_due(bed, &format!("a client stopped at point {point}"), is_due);
    };
    let bed = Bed::start(in_handshakes(config()));
    // The descriptors are on their way at the last point of the handshake: it is done then.
    (0..=6).for_each(|point| stop_at(&bed, point, IS_LATE));
    bed.finish();
    let bed = Bed::start(in_sessions(config()));
    STOPPED_WITH_AN_ANSWER_DUE.into_iter().for_each(|point| stop_at(&bed, point, IS_STALLED));
    bed.finish();
}

#[test]
fn a_server_that_is_stopped_is_given_up() {
    let bed = bed();
    let stop_at = |point, config, is_due| {
        let there = ListensAt::new(&bed, 100 + point);
        let actor = Actor::start("server", point, Signal::SIGSTOP, &there.0);
        there.connect(&bed, config);
        actor.wait_for_stop();
        note_unless_due(&bed, &format!("a server stopped at point {point}"), is_due);
    };
    (0..=6).for_each(|point| stop_at(point, in_handshakes(client_config()), IS_LATE));
    for point in SERVER_STOPPED_WITH_AN_ANSWER_DUE {
        stop_at(point, in_sessions(client_config()), IS_STALLED);
    }
    bed.finish();
}
