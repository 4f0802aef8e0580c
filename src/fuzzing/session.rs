// SPDX-License-Identifier: MIT OR Apache-2.0
//! A whole session with a peer that does what the bytes of a fuzzer say.

use std::cell::{Cell, RefCell};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use futures_lite::future::yield_now;
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use glommio::LocalExecutor;

use crate::connect::handshake_client::list_sets;
use crate::exec::task_set::TaskSet;
use crate::net::credentials::PeerCredentials;
use crate::net::eventfd::create_event_fds;
use crate::net::fd_disposal::PeerSocket;
use crate::net::socket::Socket;
use crate::session::established::{Established, SessionMemory};
use crate::session::handle::Session;
use crate::session::stream::Stream;
use crate::session::wakeup::Doorbell;
use shmipc_core::config::{Config, ProtocolVersion, Spin, Wakeup};
use shmipc_core::error::Error;
use shmipc_core::fuzzing::{BUFFER_LEN, CLASSES, Input, QUEUE_CAPACITY, poke};
use shmipc_core::proto::Negotiated;
use shmipc_core::proto::stream_table::Role;
use shmipc_core::shm::chain::Chain;
use shmipc_core::shm::event_queue::{self, Consumer, Producer};
use shmipc_core::shm::map::region::Region;
use shmipc_core::shm::pool::SlicePool;
use shmipc_core::shm::pool::format::Side;
use shmipc_core::wire::layout::QueueLayout;
use shmipc_core::wire::{Event, fallback_header, sync_event};

/// What is sent beyond this is not: the other side need not read it at once.
const SENT_AT_MOST: usize = 32 << 10;

thread_local! {
    static EXECUTOR: LocalExecutor =
        glommio::LocalExecutorBuilder::default().make().expect("io_uring works here");
    static CONFIGS: [Rc<Config>; 2] =
        [Spin::Never, Spin::For(Duration::from_micros(20))].map(|spin| {
            let limits = Config::builder().max_streams(4).max_unread_fallback_bytes(4096);
            let config = limits.spin(spin).fallback_after(Duration::ZERO).max_message_len(4096);
            Rc::new(config.build().expect("valid"))
        });
}

/// A session with a peer that writes into its memory, sends, and goes: it ends by that, and leaves
/// nothing.
pub fn session(data: &[u8]) {
    EXECUTOR.with(|executor| executor.run(run(data.to_vec())));
}

/// The peer's side: honest parts, to be used as it likes.
struct Peer {
    socket: UnixStream,
    sent: usize,
    buffer: Rc<Region>,
    queues: Rc<Region>,
    manager: Rc<SlicePool>,
    producer: Producer<Region>,
    consumer: Consumer<Region>,
    held: Vec<Chain<Region>>,
    /// What its messages carry.
    version: u8,
    /// What it rings at, if not by the socket; and what it is rung at.
    eventfds: Option<(OwnedFd, OwnedFd)>,
}

async fn run(data: Vec<u8>) {
    let mut input = Input(&data);
    let first = input.byte().unwrap_or(0);
    let role = if first & 1 == 0 { Role::Server } else { Role::Client };
    let version = if first & 8 == 0 { ProtocolVersion::V3 } else { ProtocolVersion::V4 };
    let has_eventfds = first & 24 == 24;
    let wakeup = if has_eventfds { Wakeup::EventFd } else { Wakeup::Socket };
    let owned_free_lists = version == ProtocolVersion::V4;
    let agreement = Negotiated { wakeup, owned_free_lists, ..Negotiated::plain(version) };
    let (mut peer, established) = pair(role, agreement);
    let config = CONFIGS.with(|configs| Rc::clone(&configs[usize::from(first >> 1 & 1)]));
    let session = Session::start(established, &config, None);
    let manager = Rc::clone(&session.inner().memory.pool);
    let tasks = Rc::new(TaskSet::default());
    let by_messages = Rc::new(Cell::new(first & 4 == 0));
    serve(&session, &tasks, &by_messages);
    let kept = Rc::new(RefCell::new(Vec::new()));
    while let Some(action) = input.byte() {
        match action % 12 {
            // Our own side's part: streams that are opened, if it may.
            11 => {
                if let Ok(mut stream) = session.open_stream() {
                    let kept = Rc::clone(&kept);
                    // It may have to wait for what the peer does next, and does here.
                    tasks.spawn(async move {
                        // The session may be over.
                        let _ = stream.write_all(&[action; 100]).await;
                        kept.borrow_mut().push(stream);
                    });
                }
            }
            10 => {
                let stream = kept.borrow_mut().pop();
                drop(stream);
            }
            9 => {
                for _ in 0..=action / 12 {
                    yield_now().await;
                }
            }
            _ => peer.act(action, &mut input),
        }
    }
    for _ in 0..4 {
        yield_now().await;
    }
    drop(peer);
    let error = session.closed().await;
    let is_named = error.is_peer_fault() || matches!(error, Error::PeerClosed);
    assert!(is_named, "{error}");
    tasks.all_ended().await;
    kept.borrow_mut().clear();
    drop(session);
    assert_eq!(manager.held(), 0);
}

/// Answers on streams that the peer opens.
fn serve(session: &Session, tasks: &Rc<TaskSet>, by_messages: &Rc<Cell<bool>>) {
    let (accepting, by_messages) = (session.clone(), Rc::clone(by_messages));
    let inner = Rc::clone(tasks);
    tasks.spawn(async move {
        while let Ok(stream) = accepting.accept().await {
            let is_by_messages = by_messages.replace(!by_messages.get());
            inner.spawn(async move {
                // Why it ended is for the session to say.
                let _ = if is_by_messages { messages(stream).await } else { bytes(stream).await };
            });
        }
    });
}

async fn messages(mut stream: Stream) -> Result<(), Error> {
    while let Some(message) = stream.recv().await? {
        let mut answer = stream.alloc(message.len()).await?;
        let bytes = message.into_bytes();
        answer.write(&bytes);
        stream.send(answer).await?;
    }
    Ok(())
}

async fn bytes(mut stream: Stream) -> Result<(), Error> {
    let mut some = [0; 300];
    loop {
        let Ok(count @ 1..) = stream.read(&mut some).await else { return Ok(()) };
        if stream.write_all(&some[..count]).await.is_err() {
            return Ok(());
        }
    }
}

/// Both sides of a session whose handshake is done.
fn pair(role: Role, agreement: Negotiated) -> (Peer, Established) {
    let layout = QueueLayout::for_version(agreement.version);
    let (buffer, buffer_fd) = Region::create_memfd(Path::new("fuzz"), BUFFER_LEN).expect("memory");
    let queue_len = event_queue::queues_len(QUEUE_CAPACITY);
    let (queues, queue_fd) = Region::create_memfd(Path::new("fuzz"), queue_len).expect("memory");
    let map = |fd| Rc::new(Region::map_descriptor(fd, "memory", 1 << 20).expect("a memfd"));
    let (other_buffer, other_queues) = (map(buffer_fd), map(queue_fd));
    let (buffer, queues) = (Rc::new(buffer), Rc::new(queues));
    let manager = SlicePool::create(&buffer, &CLASSES, list_sets(&agreement, Side::Client))
        .expect("there is room");
    let (producer, consumer) = event_queue::create(&queues, QUEUE_CAPACITY, layout);
    let other_manager =
        SlicePool::map(&other_buffer, list_sets(&agreement, Side::Server)).expect("honest");
    let (other_producer, other_consumer) = event_queue::map(&other_queues, layout).expect("honest");
    let (socket, other) = UnixStream::pair().expect("a pair");
    // Whoever would wait for room here would wait for itself.
    other.set_nonblocking(true).expect("a socket");
    let client = (buffer, queues, manager, producer, consumer);
    let server = (other_buffer, other_queues, other_manager, other_producer, other_consumer);
    let (ours, theirs) = if role == Role::Client { (client, server) } else { (server, client) };
    let (_, _, manager, producer, consumer) = ours;
    let memory = SessionMemory { producer, consumer, manager, files: Vec::new(), admitted: None };
    let peer = PeerCredentials::default();
    let (doorbell, eventfds) = match agreement.wakeup {
        Wakeup::EventFd => {
            let [near, far] = create_event_fds().expect("eventfds");
            let own = |fd: &OwnedFd| fd.try_clone().expect("a descriptor");
            let doorbell = Doorbell::event_fds(own(&near), own(&far)).expect("eventfds");
            (doorbell, Some((far, near)))
        }
        _ => (Doorbell::Socket, None),
    };
    let socket = Socket::connected(PeerSocket::new(socket.into()));
    let established = Established { role, peer, socket, agreement, memory, doorbell };
    let version = agreement.version.message_byte();
    let (buffer, queues, manager, producer, consumer) = theirs;
    let peer = Peer {
        socket: other,
        sent: 0,
        buffer,
        queues,
        manager,
        producer,
        consumer,
        held: Vec::new(),
        version,
        eventfds,
    };
    (peer, established)
}

impl Peer {
    fn send(&mut self, bytes: &[u8]) {
        if self.sent + bytes.len() <= SENT_AT_MOST {
            self.sent += bytes.len();
            // The other side may have ended the session, or have no room for so many small pieces.
            let _ = self.socket.write_all(bytes);
        }
    }

    fn push(&mut self, event: Event) {
        // What it has done to its own memory may be in its way.
        if let Ok(true) = self.producer.push(event) {
            self.producer.publish();
        }
        self.ring();
    }

    fn ring(&mut self) {
        match &self.eventfds {
            // Never as much as it can hold: the other side has made it one that waits, and is on
            // the same thread.
            Some((far, _)) => drop(nix::unistd::write(far.as_fd(), &1u64.to_ne_bytes())),
            None => self.send(&sync_event(self.version)),
        }
    }

    fn act(&mut self, action: u8, input: &mut Input<'_>) {
        let stream_id = 2 + u32::from(action / 12 % 4);
        match action % 12 {
            0..=1 => poke(input, &*self.buffer, &*self.queues),
            2 => {
                let bytes = input.bytes(usize::from(action));
                if let Ok(Some(mut chain)) = self.manager.allocate(bytes.len().max(1), false) {
                    chain.write(bytes);
                    if let Some(parcel) = chain.into_sent() {
                        let status = u32::from(action / 48 % 3);
                        self.push(Event { stream_id, offset: parcel.offset, status });
                    }
                }
            }
            3 => {
                let (offset, status) = (input.word(44), input.byte().unwrap_or(0));
                self.push(Event { stream_id, offset, status: u32::from(status % 8) });
            }
            4 => self.push(Event { stream_id, offset: 0, status: 1 }),
            5 => {
                let data = input.bytes(usize::from(action) * 4);
                let status = u32::from(input.byte().unwrap_or(0) % 4);
                self.send(&fallback_header(self.version, stream_id, status, data.len() as u32));
                self.send(data);
            }
            6 => {
                let bytes = input.bytes(usize::from(action / 12));
                self.send(bytes);
            }
            7 => {
                // Takes what was sent to it, and keeps some of it.
                while let Ok(1..) = self.consumer.available() {
                    let Some(event) = self.consumer.pop() else { break };
                    if let Ok(chain) = self.manager.adopt(event.offset) {
                        self.held.push(chain);
                    }
                }
                self.consumer.publish();
                self.held.truncate(usize::from(action / 12));
            }
            8 if action > 240 => self.send(&sync_event(self.version)),
            _ => self.ring(),
        }
    }
}
