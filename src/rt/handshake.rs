// SPDX-License-Identifier: MIT OR Apache-2.0
//! Drives a handshake over a socket: carries out the steps of `proto`'s state machines, creates or
//! maps the memory, and ends with everything that a session is made of.

use std::cell::Cell;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;

use futures_lite::future::yield_now;
use nix::errno::Errno;

use super::admission::{Admission, Admitted};
use super::credit::show_extension;
use super::peer::PeerCredentials;
use super::sending::is_gone;
use super::socket::{Received, Socket};
use crate::config::{Config, MemoryKind, ProtocolVersion};
use crate::error::{Error, HandshakeError, MemoryError};
use crate::proto::handshake_client::{ClientHandshake, ClientStep};
use crate::proto::handshake_server::{ServerHandshake, ServerStep};
use crate::proto::session::Role;
use crate::shm::leftovers;
use crate::shm::manager::BufferManager;
use crate::shm::queue::{self, Consumer, Producer};
use crate::shm::region::{NewFile, Region, SharedFile};
use crate::wire::layout::QueueLayout;
use crate::wire::{Deframer, Header, MemoryPaths, Message};

/// The most bytes that a message of a handshake has: two paths of 4095 bytes and their lengths.
const HANDSHAKE_MESSAGE_LEN: u32 = 8 + 2 * (2 + 4095);

/// How much memory of a file is set aside before other tasks get their turn: a quarter of a
/// millisecond's work.
const RESERVED_AT_ONCE: usize = 1 << 20;

/// What two sides agreed on, ready to carry a session.
pub(super) struct Established {
    pub(super) role: Role,
    pub(super) peer: PeerCredentials,
    pub(super) socket: Socket,
    pub(super) version: ProtocolVersion,
    pub(super) memory: SessionMemory,
}

/// Both memories of a session, from one side.
pub(super) struct SessionMemory {
    pub(super) producer: Producer<Region>,
    pub(super) consumer: Consumer<Region>,
    pub(super) manager: Rc<BufferManager>,
    /// Entries in the file system, removed when dropped.
    pub(super) files: Vec<SharedFile>,
    /// What a listener counts it by.
    pub(super) admitted: Option<Admitted>,
}

/// The client's side. The caller bounds the time.
pub(super) async fn connect(socket: Socket, config: &Config) -> Result<Established, Error> {
    let peer = socket.peer()?;
    peer.check(&config.allowed_peers)?;
    if socket.is_tcp() && config.memory == MemoryKind::Memfd {
        return Err(HandshakeError::DescriptorsOverTcp.into());
    }
    let paths = new_paths(&config.path_prefix);
    let (mut memory, descriptors) = create_memory(&paths, config).await?;
    let mut handshake = ClientHandshake::new(config.protocol, config.memory, paths)?;
    let mut inbox = Inbox::new();
    let version = loop {
        match handshake.step() {
            ClientStep::Send(bytes) => {
                send_all(&socket, bytes).await?;
                handshake.sent();
            }
            ClientStep::SendDescriptors => {
                let [buffer, queue] = descriptors.as_ref().expect("memfd memory has descriptors");
                send_descriptors(&socket, buffer, queue).await?;
                handshake.sent();
            }
            ClientStep::AwaitMessage(due) => {
                let (header, message) = inbox.receive(&socket, due).await?;
                handshake.receive(&header, &message)?;
            }
            ClientStep::Established(version) => break version,
        }
    };
    if version == ProtocolVersion::V3 {
        // The server has mapped them; without their names nothing is left behind, come what may.
        memory.files.clear();
    }
    Ok(Established { role: Role::Client, peer, socket, version, memory })
}

/// The server's side, with a peer that may be spoken to. The caller bounds the time.
pub(super) async fn accept(
    socket: Socket,
    peer: PeerCredentials,
    config: &Config,
    admission: &Rc<Admission>,
) -> Result<Established, Error> {
    let mut handshake = ServerHandshake::new();
    let mut inbox = Inbox::new();
    let mut descriptors = None;
    let mut memory = None;
    let version = loop {
        match handshake.step() {
            ServerStep::AwaitMessage(due) => {
                let (header, message) = inbox.receive(&socket, due).await?;
                if socket.is_tcp() && matches!(message, Message::ShareMemoryByMemfd(_)) {
                    return Err(HandshakeError::DescriptorsOverTcp.into());
                }
                handshake.receive(&header, &message)?;
            }
            ServerStep::Send(bytes) => {
                send_all(&socket, bytes).await?;
                handshake.sent();
            }
            ServerStep::ReceiveDescriptors => {
                descriptors = Some(inbox.receive_descriptors(&socket).await?);
                handshake.descriptors_received();
            }
            ServerStep::MapDescriptors(_) => {
                let [buffer, queue] = descriptors.take().expect("received a step before");
                memory = Some(map_descriptors(buffer, queue, config, admission)?);
                handshake.mapped();
            }
            ServerStep::MapFiles(paths) => {
                memory = Some(map_files(paths, peer, config, admission)?);
                handshake.mapped();
            }
            ServerStep::Established(version) => break version,
        }
    };
    let memory = memory.expect("no handshake ends without memory");
    // What was found in memory that went away meanwhile is not worth much.
    if memory.manager.is_lost() || memory.consumer.is_lost() {
        return Err(MemoryError::Lost.into());
    }
    Ok(Established { role: Role::Server, peer, socket, version, memory })
}

/// What has arrived and is not yet a whole message.
struct Inbox {
    deframer: Deframer,
}

impl Inbox {
    fn new() -> Self {
        Self { deframer: Deframer::new(HANDSHAKE_MESSAGE_LEN) }
    }

    async fn receive(
        &mut self,
        socket: &Socket,
        due: &'static str,
    ) -> Result<(Header, Message), Error> {
        loop {
            if let Some(message) = self.deframer.next_message()? {
                return Ok(message);
            }
            // One message at a time: what comes behind it is the session's, or carries descriptors.
            let missing = match self.deframer.wanted() {
                0 => crate::wire::HEADER_LEN - self.deframer.buffered().min(7),
                wanted => wanted,
            };
            let space = &mut self.deframer.space(missing)[..missing];
            let (received, descriptors) = socket
                .try_receive_with_descriptors(space)
                .map_err(|error| broken_off("receive in a handshake", due, error))?;
            if !descriptors.is_empty() {
                let got = descriptors.len();
                return Err(HandshakeError::Descriptors { got, expected: 0 }.into());
            }
            match received {
                Received::Bytes(count) => self.deframer.commit(count),
                Received::Nothing => socket.readable().await?,
                Received::End => return Err(HandshakeError::Closed { waiting_for: due }.into()),
            }
        }
    }

    /// The descriptors of the buffer memory and of the queue memory, in this order.
    async fn receive_descriptors(&mut self, socket: &Socket) -> Result<[OwnedFd; 2], Error> {
        if !self.deframer.is_empty() {
            return Err(HandshakeError::StrayBytes.into());
        }
        loop {
            let mut byte = [0];
            let (received, descriptors) = socket
                .try_receive_with_descriptors(&mut byte)
                .map_err(|error| broken_off("receive descriptors", "descriptors", error))?;
            match received {
                Received::Bytes(_) => {
                    return <[OwnedFd; 2]>::try_from(descriptors).map_err(|descriptors| {
                        let got = descriptors.len();
                        HandshakeError::Descriptors { got, expected: 2 }.into()
                    });
                }
                Received::Nothing => socket.readable().await?,
                Received::End => {
                    return Err(HandshakeError::Closed { waiting_for: "descriptors" }.into());
                }
            }
        }
    }
}

/// What a socket says that failed. A peer that goes may be noticed by what it sends no more, or by
/// what it does not take any more; both are the same end.
fn broken_off(operation: &'static str, waiting_for: &'static str, error: io::Error) -> Error {
    if is_gone(&error) {
        return HandshakeError::Closed { waiting_for }.into();
    }
    Error::os(operation, error)
}

/// What is due from a peer that is sent something.
const TO_BE_READ: &str = "the reading of a message";

async fn send_all(socket: &Socket, mut bytes: &[u8]) -> Result<(), Error> {
    let failed = |error| broken_off("send in a handshake", TO_BE_READ, error);
    let sent = socket.try_send(bytes).map_err(failed)?;
    bytes = &bytes[sent..];
    if bytes.is_empty() {
        return Ok(());
    }
    let mut sender = socket.sender()?;
    while !bytes.is_empty() {
        let sent = futures_lite::future::poll_fn(|context| sender.poll_send(context, bytes));
        bytes = &bytes[sent.await.map_err(failed)?..];
    }
    Ok(())
}

async fn send_descriptors(socket: &Socket, buffer: &OwnedFd, queue: &OwnedFd) -> Result<(), Error> {
    // The peer has read all that was sent before and answered it, so there is room, unless it fills
    // our side with nonsense; then the handshake's time runs out.
    while !socket
        .try_send_descriptors(&[buffer.as_fd(), queue.as_fd()])
        .map_err(|error| broken_off("send descriptors", TO_BE_READ, error))?
    {
        glommio::timer::sleep(std::time::Duration::from_millis(1)).await;
    }
    Ok(())
}

thread_local! {
    static SESSIONS: Cell<u64> = const { Cell::new(0) };
}

/// Names for a session's two memories that no other session has, on this host or in another
/// container that shares its `/dev/shm`: shmipc-go and the crate `shmipc` know a buffer memory by
/// its name even when they get a descriptor, and would take two of the same name for one.
fn new_paths(prefix: &Path) -> MemoryPaths {
    let number = SESSIONS.replace(SESSIONS.get() + 1);
    // The standard library's own source of randomness, seeded by the system per thread.
    let random = RandomState::new().build_hasher().finish();
    let name = |kind: &str| leftovers::name(prefix, random, number, kind);
    debug_assert!(name("buffer").as_os_str().as_bytes().len() < 255);
    MemoryPaths { queue: name("queue"), buffer: name("buffer") }
}

type Descriptors = Option<[OwnedFd; 2]>;

async fn create_memory(
    paths: &MemoryPaths,
    config: &Config,
) -> Result<(SessionMemory, Descriptors), Error> {
    let queue_len = queue::queues_len(config.queue_capacity);
    let buffer_len = config.buffer_size as usize;
    if config.checks_memory {
        config.footprint(1, 1, 1).check_shared_memory()?;
    }
    let mut files = Vec::new();
    let (buffer, queue, descriptors) = match config.memory {
        MemoryKind::Memfd => {
            let (buffer, buffer_fd) = Region::create_memfd(&paths.buffer, buffer_len)?;
            let (queue, queue_fd) = Region::create_memfd(&paths.queue, queue_len)?;
            (buffer, queue, Some([buffer_fd, queue_fd]))
        }
        MemoryKind::File => {
            leftovers::remove_once(&config.path_prefix);
            let (buffer, buffer_file) = Region::create_file(&paths.buffer, buffer_len)?;
            let (queue, queue_file) = Region::create_file(&paths.queue, queue_len)?;
            for (file, len) in [(buffer_file, buffer_len), (queue_file, queue_len)] {
                if config.checks_memory {
                    reserve(&file, len, config).await?;
                }
                files.push(file.into_entry());
            }
            (buffer, queue, None)
        }
    };
    let manager = BufferManager::create(&Rc::new(buffer), &config.slice_classes)?;
    show_extension(&manager, config, Role::Client);
    let layout = QueueLayout::for_version(config.protocol);
    let (producer, consumer) = queue::create(&Rc::new(queue), config.queue_capacity, layout);
    Ok((SessionMemory { producer, consumer, manager, files, admitted: None }, descriptors))
}

/// Has the memory of a file set aside. What was free a moment ago, others may have been promised,
/// other sessions of this program for instance.
async fn reserve(file: &NewFile, len: usize, config: &Config) -> Result<(), Error> {
    for offset in (0..len).step_by(RESERVED_AT_ONCE) {
        if let Err(error) = file.reserve(offset, RESERVED_AT_ONCE.min(len - offset)) {
            let errno = error.raw_os_error().map(Errno::from_raw);
            match errno {
                // What the file system does not do, it does not need perhaps.
                Some(Errno::EOPNOTSUPP | Errno::ENOSYS) => return Ok(()),
                Some(Errno::ENOSPC) => return Err(config.footprint(1, 1, 1).lacks_space()),
                _ => return Err(Error::os("reserve shared memory", error)),
            }
        }
        yield_now().await;
    }
    Ok(())
}

fn map_descriptors(
    buffer: OwnedFd,
    queue: OwnedFd,
    config: &Config,
    admission: &Rc<Admission>,
) -> Result<SessionMemory, Error> {
    let admitted = admission.session()?;
    let limit = config.limits.mapped_bytes;
    let buffer = Region::map_descriptor(buffer, "buffer", limit)?;
    let queue = Region::map_descriptor(queue, "queue", limit)?;
    map_memory(buffer, queue, config, admitted)
}

fn map_files(
    paths: &MemoryPaths,
    peer: PeerCredentials,
    config: &Config,
    admission: &Rc<Admission>,
) -> Result<SessionMemory, Error> {
    let admitted = admission.session()?;
    let limit = config.limits.mapped_bytes;
    let directory = config.path_prefix.parent().unwrap_or(Path::new("/"));
    let queue = Region::map_file(directory, &paths.queue, "queue", limit, peer.uid)?;
    let buffer = Region::map_file(directory, &paths.buffer, "buffer", limit, peer.uid)?;
    let mut memory = map_memory(buffer, queue, config, admitted)?;
    // Only now: a file that turned out to be something else is not this session's to remove.
    memory.files = vec![SharedFile::new(&paths.queue), SharedFile::new(&paths.buffer)];
    Ok(memory)
}

fn map_memory(
    buffer: Region,
    queue: Region,
    config: &Config,
    admitted: Admitted,
) -> Result<SessionMemory, Error> {
    // Before this side keeps books on it.
    admitted.count_mapped(buffer.len() as u64)?;
    admitted.count_mapped(queue.len() as u64)?;
    // Versions 2 and 3 have the same layout.
    let layout = QueueLayout::for_version(ProtocolVersion::V3);
    let (producer, consumer) = queue::map(&Rc::new(queue), layout)?;
    let manager = BufferManager::map(&Rc::new(buffer))?;
    show_extension(&manager, config, Role::Server);
    let (files, admitted) = (Vec::new(), Some(admitted));
    Ok(SessionMemory { producer, consumer, manager, files, admitted })
}
