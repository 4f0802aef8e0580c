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
use std::time::Duration;

use futures_lite::future::{or, poll_once, yield_now};
use nix::errno::Errno;

use crate::exec::runtime::sleep;
use crate::net::admission::{Admission, SessionPermit};
use crate::net::credentials::PeerCredentials;
use crate::net::eventfd::create_event_fds;
use crate::net::fd_passing::Peeked;
use crate::net::socket::{Passed, Received, Socket};
use crate::session::established::{Established, SessionMemory};
use crate::session::extension::show_extension;
use crate::session::socket_io::is_gone;
use crate::session::wakeup::Doorbell;
use shmipc_core::config::{Config, MemoryKind, ProtocolVersion, Wakeup};
use shmipc_core::error::{Error, HandshakeError, ResourceError};
use shmipc_core::proto::Negotiated;
use shmipc_core::proto::handshake_client::{ClientHandshake, ClientStep};
use shmipc_core::proto::stream_table::Role;
use shmipc_core::shm::event_queue;
use shmipc_core::shm::map::claims::Purpose;
use shmipc_core::shm::map::fd_kind::FdKind;
use shmipc_core::shm::map::region::Region;
use shmipc_core::shm::map::shared_file::{NewFile, SharedFile};
use shmipc_core::shm::map::stale_files;
use shmipc_core::shm::pool::SlicePool;
use shmipc_core::shm::pool::format::{ListSets, Side};
use shmipc_core::wire::layout::QueueLayout;
use shmipc_core::wire::negotiation::printable;
use shmipc_core::wire::{Deframer, Features, Header, MAX_NEGOTIATION_LEN, MemoryPaths, Message};

/// The most bytes that a message of a handshake has: more than two paths of 4095 bytes.
const HANDSHAKE_MESSAGE_LEN: u32 = 8 + MAX_NEGOTIATION_LEN;

/// How much of the name of what is no eventfd is told, in bytes.
const LONGEST_NAME: usize = 256;

/// How much memory of a file is set aside before other tasks get their turn: a quarter of a
/// millisecond's work.
const RESERVED_AT_ONCE: usize = 1 << 20;

/// How long a server may take for its answer to the opening of version 4, at the most, before it is
/// taken for one that does not know it: hundreds of times what an answer takes. A server that was
/// slower is asked again later.
const LONGEST_SILENCE: Duration = Duration::from_millis(500);

/// Why a client's handshake failed.
pub(crate) struct ConnectError {
    pub(crate) error: Error,
    /// Whether it was in the way of a server that does not know version 4.
    pub(crate) may_fall_back: bool,
}

/// How far a server is with its answer to the opening of version 4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Nothing was asked yet, or not in version 4, or the connection has ended.
    NotDue,
    /// It has said nothing.
    CreditUpdate,
    /// It has said something.
    Given,
}

/// The client's side, opening with this version. The caller bounds the time, except that a server
/// which says nothing to version 4 is given up early when there is something to fall back to.
pub(crate) async fn connect(
    socket: Socket,
    config: &Config,
    version: ProtocolVersion,
    answer: &Cell<Answer>,
) -> Result<Established, ConnectError> {
    answer.set(Answer::NotDue);
    let fixed = |error| ConnectError { error, may_fall_back: false };
    let peer = socket.peer().map_err(fixed)?;
    peer.check(&config.settings().allowed_peers, "server").map_err(|error| fixed(error.into()))?;
    if socket.is_tcp() && config.settings().memory == MemoryKind::Memfd {
        return Err(fixed(HandshakeError::DescriptorsOverTcp.into()));
    }
    let paths = new_paths(&config.settings().path_prefix);
    let features = offered_features(config);
    let mut handshake =
        ClientHandshake::new(version, config.settings().memory, features, paths.clone())
            .map_err(fixed)?;
    let mut inbox = Inbox::new();
    let driven = drive_client(&mut handshake, &mut inbox, &socket, &paths, config, answer).await;
    let (agreement, created) = driven.map_err(|error| {
        // Whoever has said a part of something knows the version.
        let is_unheard = handshake.may_fall_back() && inbox.deframer.is_empty();
        let is_closed = is_unheard && is_end_of_connection(&error);
        if is_closed {
            answer.set(Answer::NotDue);
        }
        let is_silent = is_unheard && answer.get() == Answer::CreditUpdate;
        let may_fall_back = is_closed || is_silent;
        if is_closed && !config.settings().falls_back {
            let how = "it closed the connection";
            return fixed(HandshakeError::Version4Unanswered { how }.into());
        }
        ConnectError { error, may_fall_back }
    })?;
    let Created { mut memory, doorbell, .. } = created;
    if agreement.version != ProtocolVersion::V2 {
        // The server has mapped them; without their names nothing is left behind, come what may.
        memory.files.clear();
    }
    Ok(Established { role: Role::Client, peer, socket, agreement, memory, doorbell })
}

fn offered_features(config: &Config) -> Features {
    Features {
        polling: match config.settings().wakeup {
            Wakeup::Polling(interval) => Some(interval),
            _ => None,
        },
        eventfd: config.settings().wakeup == Wakeup::EventFd,
        owned_free_lists: config.offers_owned_free_lists(),
    }
}

/// Whether the peer ended the connection, rather than to say something.
fn is_end_of_connection(error: &Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
    matches!(error, Error::Handshake(HandshakeError::Closed { .. }))
        || matches!(error, Error::Os { .. } if matches!(error.kind(), BrokenPipe | ConnectionReset))
}

async fn drive_client(
    handshake: &mut ClientHandshake,
    inbox: &mut Inbox,
    socket: &Socket,
    paths: &MemoryPaths,
    config: &Config,
    answer: &Cell<Answer>,
) -> Result<(Negotiated, Created), Error> {
    let mut created = None;
    loop {
        match handshake.step() {
            ClientStep::CreateMemory(agreement) => {
                created = Some(create_memory(paths, config, agreement).await?);
                handshake.memory_created();
            }
            ClientStep::Send(bytes) => match send_all(socket, bytes).await {
                Ok(()) => handshake.sent(),
                Err(error) => return Err(last_words(handshake, inbox, socket, error).await),
            },
            ClientStep::SendDescriptors => {
                let created = created.as_ref().expect("memory is created before it is announced");
                match send_descriptors(socket, &created.descriptors).await {
                    Ok(()) => handshake.sent(),
                    Err(error) => return Err(last_words(handshake, inbox, socket, error).await),
                }
            }
            ClientStep::AwaitMessage(due) => {
                if handshake.may_fall_back() {
                    answer.set(Answer::CreditUpdate);
                    await_answer(inbox, socket, config).await?;
                    answer.set(Answer::Given);
                }
                let (header, message) = inbox.receive(socket, due).await?;
                handshake.receive(&header, &message)?;
            }
            ClientStep::Established(&agreement) => {
                let created = created.expect("no handshake ends without memory");
                return Ok((agreement, created));
            }
        }
    }
}

/// Waits until the server says something to the opening of version 4, or ends the connection.
///
/// # Errors
///
/// It does not for so long that it is taken for one that does not know the version: a quarter of
/// the handshake's time, so that the rest suffices for version 3, and no more than
/// [`LONGEST_SILENCE`].
async fn await_answer(inbox: &Inbox, socket: &Socket, config: &Config) -> Result<(), Error> {
    if !inbox.deframer.is_empty() {
        return Ok(());
    }
    if !config.settings().falls_back {
        return socket.readable().await;
    }
    let limit = (config.settings().limits.handshake_timeout / 4).min(LONGEST_SILENCE);
    let silent = async {
        sleep(limit).await;
        Err(HandshakeError::Timeout(limit).into())
    };
    or(socket.readable(), silent).await
}

/// Why sending failed: a server that has gone may have said why.
async fn last_words(
    handshake: &mut ClientHandshake,
    inbox: &mut Inbox,
    socket: &Socket,
    error: Error,
) -> Error {
    if !is_end_of_connection(&error) {
        return error;
    }
    // Not waited for: it has gone, and what it said before that is there.
    match poll_once(inbox.receive(socket, "nothing more")).await {
        Some(Ok((header, message))) => match handshake.receive(&header, &message) {
            Err(refused @ HandshakeError::Refused { .. }) => refused.into(),
            _ => error,
        },
        Some(Err(_)) | None => error,
    }
}

/// The doorbell of a session that has no eventfds.
pub(crate) fn without_descriptors(agreement: &Negotiated) -> Doorbell {
    match agreement.wakeup {
        Wakeup::Polling(interval) => Doorbell::Polling(interval),
        _ => Doorbell::Socket,
    }
}

/// What has arrived and is not yet a whole message.
pub(crate) struct Inbox {
    deframer: Deframer,
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self { deframer: Deframer::new(HANDSHAKE_MESSAGE_LEN) }
    }

    pub(crate) async fn receive(
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
                0 => shmipc_core::wire::HEADER_LEN - self.deframer.buffered().min(7),
                wanted => wanted,
            };
            let space = &mut self.deframer.space(missing)[..missing];
            let received = socket
                .try_receive(space)
                .map_err(|error| broken_off("receive in a handshake", due, error))?;
            match received {
                Received::Bytes(count) => self.deframer.commit(count),
                Received::Descriptors(got) => {
                    return Err(HandshakeError::Descriptors { got, expected: 0 }.into());
                }
                Received::Nothing => socket.readable().await?,
                Received::End => return Err(HandshakeError::Closed { waiting_for: due }.into()),
            }
        }
    }

    /// So many descriptors: of the buffer memory, of the queue memory, and then of eventfds.
    pub(crate) async fn receive_descriptors(
        &mut self,
        socket: &Socket,
        expected: usize,
    ) -> Result<Vec<OwnedFd>, Error> {
        if !self.deframer.is_empty() {
            return Err(HandshakeError::StrayBytes.into());
        }
        loop {
            let failed = |error| broken_off("receive descriptors", "descriptors", error);
            match socket.peek_descriptors().map_err(failed)? {
                Passed::Descriptors(peeked) => {
                    check_descriptors(&peeked, expected)?;
                    // Only now: what is refused must not be closed here.
                    socket.take_byte().map_err(failed)?;
                    socket.end_passing();
                    return Ok(peeked.into_descriptors());
                }
                Passed::Nothing => socket.readable().await?,
                Passed::End => {
                    return Err(HandshakeError::Closed { waiting_for: "descriptors" }.into());
                }
            }
        }
    }
}

/// Checks that as many descriptors came as are due, of memory first, and then of eventfds. What has
/// passed can be closed on any thread.
fn check_descriptors(peeked: &Peeked, expected: usize) -> Result<(), Error> {
    let got = peeked.descriptors.len();
    // The kernel makes as many as there is room for.
    if peeked.is_cut && got < expected {
        return Err(ResourceError::no_room_for_descriptors(expected).into());
    }
    if peeked.is_cut || got != expected {
        return Err(HandshakeError::Descriptors { got, expected }.into());
    }
    for (fd, role) in peeked.descriptors.iter().zip(["buffer", "queue", "", ""]) {
        match (FdKind::of(fd.as_fd()), role) {
            (FdKind::Memory, "buffer" | "queue") | (FdKind::EventFd, "") => {}
            (FdKind::Other(name), "") => {
                let name = printable(&name, LONGEST_NAME);
                return Err(HandshakeError::NotAnEventFd(name).into());
            }
            (kind, "") => {
                return Err(HandshakeError::NotAnEventFd(kind.name().to_owned()).into());
            }
            (kind, role) => {
                return Err(HandshakeError::DescriptorKind { role, kind: kind.name() }.into());
            }
        }
    }
    Ok(())
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

pub(crate) async fn send_all(socket: &Socket, mut bytes: &[u8]) -> Result<(), Error> {
    let failed = |error| broken_off("send in a handshake", TO_BE_READ, error);
    let sent = socket.try_send(bytes).map_err(failed)?;
    bytes = &bytes[sent..];
    if bytes.is_empty() {
        return Ok(());
    }
    let mut sender = socket.sender();
    while !bytes.is_empty() {
        let sent = futures_lite::future::poll_fn(|context| sender.poll_send(context, bytes));
        bytes = &bytes[sent.await.map_err(failed)?..];
    }
    Ok(())
}

async fn send_descriptors(socket: &Socket, descriptors: &[OwnedFd]) -> Result<(), Error> {
    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    // The peer has read all that was sent before and answered it, so there is room, unless it fills
    // our side with nonsense; then the handshake's time runs out.
    while !socket
        .try_send_descriptors(&descriptors)
        .map_err(|error| broken_off("send descriptors", TO_BE_READ, error))?
    {
        sleep(std::time::Duration::from_millis(1)).await;
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
    let name = |kind: &str| stale_files::name(prefix, random, number, kind);
    debug_assert!(name("buffer").as_os_str().as_bytes().len() < 255);
    MemoryPaths { queue: name("queue"), buffer: name("buffer") }
}

/// Whose the buffer lists are, seen from this side.
pub(crate) fn list_sets(agreement: &Negotiated, side: Side) -> ListSets {
    if agreement.owned_free_lists { ListSets::OnePerSide(side) } else { ListSets::Shared }
}

/// What a client has made for a session.
struct Created {
    memory: SessionMemory,
    doorbell: Doorbell,
    /// What goes to the server: of memfd memory.
    descriptors: Vec<OwnedFd>,
}

async fn create_memory(
    paths: &MemoryPaths,
    config: &Config,
    agreement: &Negotiated,
) -> Result<Created, Error> {
    let queue_len = event_queue::queues_len(config.settings().queue_capacity);
    let buffer_len = config.settings().buffer_size as usize;
    if config.settings().checks_memory {
        config.footprint(1, 1, 1).check_shared_memory()?;
    }
    let mut files = Vec::new();
    let (buffer, queue, mut descriptors) = if config.settings().memory == MemoryKind::Memfd {
        let (buffer, buffer_fd) = Region::create_memfd(&paths.buffer, buffer_len)?;
        let (queue, queue_fd) = Region::create_memfd(&paths.queue, queue_len)?;
        (buffer, queue, vec![buffer_fd, queue_fd])
    } else {
        stale_files::remove_once(&config.settings().path_prefix);
        let (buffer, buffer_file) = Region::create_file(&paths.buffer, buffer_len)?;
        let (queue, queue_file) = Region::create_file(&paths.queue, queue_len)?;
        for (file, len) in [(buffer_file, buffer_len), (queue_file, queue_len)] {
            if config.settings().checks_memory {
                reserve(&file, len, config).await?;
            }
            files.push(file.into_entry());
        }
        (buffer, queue, Vec::new())
    };
    let doorbell = if agreement.wakeup == Wakeup::EventFd {
        let event_fds = create_event_fds()?;
        let duplicate =
            |fd: &OwnedFd| fd.try_clone().map_err(|error| Error::os("duplicate an eventfd", error));
        let doorbell = Doorbell::event_fds(duplicate(&event_fds[0])?, duplicate(&event_fds[1])?)?;
        descriptors.extend(event_fds);
        doorbell
    } else {
        without_descriptors(agreement)
    };
    let manager = SlicePool::create(
        &Rc::new(buffer),
        &config.settings().slice_classes,
        list_sets(agreement, Side::Client),
    )?;
    show_extension(&manager, config, Role::Client);
    let layout = QueueLayout::for_version(agreement.version);
    let (producer, consumer) =
        event_queue::create(&Rc::new(queue), config.settings().queue_capacity, layout);
    let memory = SessionMemory { files, producer, consumer, manager, admitted: None };
    Ok(Created { memory, doorbell, descriptors })
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

pub(crate) fn map_descriptors(
    descriptors: Vec<OwnedFd>,
    agreement: &Negotiated,
    config: &Config,
    admission: &Rc<Admission>,
) -> Result<(SessionMemory, Doorbell), Error> {
    // Before anything is made for it.
    let admitted = admission.session()?;
    let mut descriptors = descriptors.into_iter();
    let (Some(buffer), Some(queue)) = (descriptors.next(), descriptors.next()) else {
        unreachable!("as many as were expected came");
    };
    // The first one the client writes.
    let doorbell = match (descriptors.next(), descriptors.next()) {
        (Some(ours), Some(theirs)) => Doorbell::event_fds(theirs, ours)?,
        _ => without_descriptors(agreement),
    };
    let limit = config.settings().limits.mapped_bytes;
    let buffer = Region::map_descriptor(buffer, "buffer", limit)?;
    let queue = Region::map_descriptor(queue, "queue", limit)?;
    Ok((map_memory(buffer, queue, agreement, config, admitted)?, doorbell))
}

pub(crate) fn map_files(
    paths: &MemoryPaths,
    peer: PeerCredentials,
    agreement: &Negotiated,
    config: &Config,
    admission: &Rc<Admission>,
) -> Result<SessionMemory, Error> {
    let admitted = admission.session()?;
    let limit = config.settings().limits.mapped_bytes;
    let directory = config.settings().path_prefix.parent().unwrap_or(Path::new("/"));
    let map = |path, role| Region::map_file(directory, path, role, limit, peer.uid);
    let (queue, queue_file) = map(&paths.queue, "queue")?;
    let (buffer, buffer_file) = map(&paths.buffer, "buffer")?;
    let mut memory = map_memory(buffer, queue, agreement, config, admitted)?;
    // Only now: a file that turned out to be something else is not this session's to remove.
    memory.files = vec![SharedFile::new(queue_file), SharedFile::new(buffer_file)];
    Ok(memory)
}

fn map_memory(
    mut buffer: Region,
    mut queue: Region,
    agreement: &Negotiated,
    config: &Config,
    admitted: SessionPermit,
) -> Result<SessionMemory, Error> {
    // Before this side keeps books on it.
    admitted.count_mapped(buffer.len() as u64)?;
    admitted.count_mapped(queue.len() as u64)?;
    // Before anything is written to it: it may be another session's.
    queue.claim(Purpose::Queue)?;
    buffer.claim(Purpose::Buffer)?;
    let layout = QueueLayout::for_version(agreement.version);
    let (producer, consumer) = event_queue::map(&Rc::new(queue), layout)?;
    let sets = list_sets(agreement, Side::Server);
    let may_keep = |bytes| admitted.count_mapped(bytes);
    let manager = SlicePool::map_within(&Rc::new(buffer), sets, may_keep)?;
    show_extension(&manager, config, Role::Server);
    let (files, admitted) = (Vec::new(), Some(admitted));
    Ok(SessionMemory { files, producer, consumer, manager, admitted })
}
