// SPDX-License-Identifier: MIT OR Apache-2.0
//! A session: one connection, its shared memory, and its streams (spec chapters 2 and 6).
//!
//! [`SessionInner`] is the state; what happens to it when something arrives or is sent is in
//! [`receiving`](crate::session::receive) and [`sending`](crate::session::transmit). The handles
//! that users hold, [`Session`] and [`Stream`](crate::Stream), keep a [`SessionGuard`]; when the
//! last of them goes, the session ends. Tasks and the stream table hold the inner state only, so no
//! circle keeps a session alive.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::exec::wake_audit::counting_foreign_wakes;
use crate::exec::wakers::WakerList;
use crate::net::admission::SessionPermit;
use crate::net::credentials::PeerCredentials;
use crate::net::socket::Socket;
use crate::reactor::poll_state::PollState;
use crate::reactor::sweep::SweepList;
use crate::session::established::{Established, SessionMemory};
use crate::session::flow_control::Credit;
use crate::session::guard::SessionGuard;
use crate::session::local_reactor::LocalReactor;
use crate::session::outbox::Outbox;
use crate::session::path_order::DeferredClose;
use crate::session::receive;
use crate::session::send_wait::{SendWait, WaitsFor};
use crate::session::stall::StallClock;
use crate::session::stream::{Stream, StreamInner};
use crate::session::wakeup::Doorbell;
use crate::stats::{Counters, PoolUsage, SessionStats};
use shmipc_core::config::{Config, ProtocolVersion, Wakeup};
use shmipc_core::error::{Error, MemoryError, Result};
use shmipc_core::proto::Negotiated;
use shmipc_core::proto::stream_table::{Role, StreamTable};
use shmipc_core::shm::event_queue::{Consumer, Producer};
use shmipc_core::shm::pool::SlicePool;
use shmipc_core::shm::region::{Region, SharedFile};
use shmipc_core::wire::{Deframer, ShardIdentity};

/// A session whose client does not hear whether its server has come to have it.
const UNANSWERED: (Role, ProtocolVersion) = (Role::Client, ProtocolVersion::V2);

/// Everything that both handles and tasks of a session share.
pub(crate) struct SessionInner {
    pub(crate) role: Role,
    pub(crate) agreement: Negotiated,
    pub(crate) config: Rc<Config>,
    pub(crate) channels: Channels,
    pub(crate) streams: RefCell<StreamTable<Rc<StreamInner>>>,
    pub(crate) accepts: AcceptQueue,
    pub(crate) supervision: crate::session::supervised::Supervision,
    pub(crate) activity: PollState,
    pub(crate) counters: Counters,
    pub(crate) inbox: SocketReader,
    pub(crate) credit: Credit,
    pub(crate) poller: Rc<LocalReactor>,
    pub(crate) movement: StallClock,
    pub(crate) peer: PeerCredentials,
    socket: Socket,
    doorbell: Doorbell,
    outbox: Outbox,
    ending: CloseState,
    _admitted: Option<SessionPermit>,
}

/// The shared memory of a session.
pub(crate) struct Channels {
    pub(crate) producer: RefCell<Producer<Region>>,
    pub(crate) consumer: RefCell<Consumer<Region>>,
    pub(crate) manager: Rc<SlicePool>,
    /// Tasks that wait for room in the send queue.
    pub(crate) queue_waiting: WakerList,
    /// Tasks that wait for free slices.
    pub(crate) pool_waiting: WakerList,
    /// Streams whose close waits for room in the send queue, or until the peer has read.
    pub(crate) kept_closes: RefCell<VecDeque<DeferredClose>>,
    /// Streams that were dropped unused, and that the peer is not told of yet.
    pub(crate) unused: RefCell<Vec<u32>>,
    /// Whether something was published since the peer's working flag was last looked at.
    pub(crate) must_look: Cell<bool>,
}

/// Streams that the peer opened and nobody has taken yet.
#[derive(Default)]
pub(crate) struct AcceptQueue {
    pub(crate) ready: RefCell<VecDeque<Rc<StreamInner>>>,
    pub(crate) waiting: WakerList,
    /// Whether no more are taken in.
    pub(crate) is_over: Cell<bool>,
}

impl Channels {
    /// Whether memory of the session is gone.
    #[inline]
    pub(crate) fn are_lost(&self) -> bool {
        self.manager.is_lost() || self.consumer.borrow().is_lost()
    }
}

/// What came over the socket and is not yet handled.
pub(crate) struct SocketReader {
    pub(crate) deframer: RefCell<Deframer>,
    /// Streams whose close came by the queue, while data of them may still be in the socket.
    pub(crate) closing: SweepList<u32>,
    /// Bytes that came over the socket and wait in streams.
    pub(crate) unread_bytes: Cell<usize>,
    /// Whether a send found that the peer is gone.
    pub(crate) is_hung_up: Cell<bool>,
    /// The reader, while it waits for streams to be read.
    pub(crate) paused: WakerList,
}

/// Why and whether the session is over.
#[derive(Default)]
struct CloseState {
    is_over: Cell<bool>,
    error: RefCell<Option<Error>>,
    waiting: WakerList,
    files: RefCell<Vec<SharedFile>>,
}

impl SessionInner {
    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    pub(crate) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    pub(crate) fn doorbell(&self) -> &Doorbell {
        &self.doorbell
    }

    /// Why the session is over, if it is.
    pub(crate) fn ended(&self) -> Option<Error> {
        self.ending.error.borrow().clone()
    }

    #[inline]
    pub(crate) fn is_over(&self) -> bool {
        self.ending.is_over.get()
    }

    /// Why the session is over, for those who know that it is.
    #[cold]
    pub(crate) fn end_error(&self) -> Error {
        self.ended().unwrap_or(Error::SessionClosed)
    }

    /// Ends the session: every stream, every waiting task and the peer get to know. The first
    /// reason stays.
    pub(crate) fn fail(&self, error: Error) {
        if self.is_over() {
            return;
        }
        // What is found in memory that is gone is no more than a consequence.
        let is_lost = matches!(error, Error::Memory(_)) && self.channels.are_lost();
        let error = if is_lost { MemoryError::Lost.into() } else { error };
        if error.is_peer_fault() {
            tracing::warn!(%error, "session ends");
        } else {
            tracing::debug!(%error, "session ends");
        }
        self.ending.is_over.set(true);
        *self.ending.error.borrow_mut() = Some(error);
        let streams = self.streams.borrow().all();
        for stream in streams {
            self.wake_reader(&stream);
            stream.writer.wake();
        }
        self.channels.queue_waiting.wake_all();
        self.credit.budget_waiting.wake_all();
        self.credit.returning.wake_all();
        self.channels.pool_waiting.wake_all();
        self.accepts.waiting.wake_all();
        self.inbox.paused.wake_all();
        self.ending.waiting.wake_all();
        self.outbox.clear();
        self.channels.manager.set_resting(true);
        // The peer can see what was taken. Who is in the middle of taking fails for another reason.
        if let Ok(mut consumer) = self.channels.consumer.try_borrow_mut() {
            consumer.publish();
        }
        // Wakes the reader, and tells the peer.
        self.socket.shut_down();
        self.ending.files.borrow_mut().clear();
        self.poller.watching().note_end();
    }

    /// Tells the peer that this side is gone, which will not run any more.
    pub(crate) fn abandon(&self) {
        self.socket.shut_down();
        self.ending.files.borrow_mut().clear();
    }

    /// Ends the session because its memory does not hold together, and gives the error on.
    #[cold]
    pub(crate) fn broken(&self, error: MemoryError) -> Error {
        let error = Error::from(error);
        self.fail(error.clone());
        error
    }

    /// The version byte of this session's messages.
    pub(crate) fn version_byte(&self) -> u8 {
        self.agreement.version.message_byte()
    }

    /// Waits until the session is over.
    pub(crate) async fn over(&self) -> Error {
        let ended = || self.ended().map_or(Poll::Pending, Poll::Ready);
        self.ending.waiting.until(ended).await
    }

    fn accepted(&self) -> Poll<Result<Rc<StreamInner>>> {
        if let Some(stream) = self.accepts.ready.borrow_mut().pop_front() {
            return Poll::Ready(Ok(stream));
        }
        if let Some(error) = self.ended() {
            return Poll::Ready(Err(error));
        }
        if self.accepts.is_over.get() {
            return Poll::Ready(Err(Error::SessionClosed));
        }
        Poll::Pending
    }

    /// Waits until the socket has taken all that was sent.
    pub(crate) async fn flushed(&self) -> Result<()> {
        self.outbox.waiting().until(|| self.is_flushed()).await
    }

    /// [`flushed`](Self::flushed), for those that are no future.
    #[inline]
    pub(crate) fn poll_flushed(
        &self,
        wait: &mut SendWait,
        context: &Context<'_>,
    ) -> Poll<Result<()>> {
        let flushed = self.is_flushed();
        if flushed.is_pending() {
            wait.begin(self, WaitsFor::Socket, context);
        }
        flushed
    }

    #[inline]
    fn is_flushed(&self) -> Poll<Result<()>> {
        if self.outbox.is_cut() {
            return Poll::Ready(Err(self.end_error()));
        }
        if self.outbox.is_empty() {
            return Poll::Ready(Ok(()));
        }
        if let Some(error) = self.ended() {
            return Poll::Ready(Err(error));
        }
        Poll::Pending
    }
}

/// A connection to one peer, over which any number of streams run.
///
/// A session lives on the executor that made it. Cloning gives another handle on the same session;
/// it ends when it is [closed](Self::close), when the peer goes away or breaks the protocol, and
/// when the last handle on it and on its streams is dropped.
///
/// ```
/// use shmipc_glommio::{Config, Connector, Error, Listener};
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-session-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(|| async move {
/// # let config = Config::builder().buffer_size(1 << 20).queue_capacity(64).build()?;
/// # let listener = Listener::bind(&path, config.clone())?;
/// # let server = glommio::spawn_local(async move {
/// #     let session = listener.accept().await?;
/// #     while let Ok(mut stream) = session.accept().await {
/// #         let message = stream.recv().await?.unwrap();
/// #         stream.forward(message).await?;
/// #     }
/// #     Err::<(), Error>(session.closed().await)
/// # });
/// let session = Connector::new(config).connect(&path).await?;
/// for question in ["hello", "is it true?"] {
///     // Streams cost little: one for each question, if that is convenient.
///     let mut stream = session.open_stream()?;
///     let mut loan = stream.alloc(question.len()).await?;
///     loan.write(question.as_bytes());
///     stream.send(loan).await?;
///     let answer = stream.recv().await?.expect("an answer");
///     assert_eq!(answer.into_bytes(), question);
/// }
/// session.close().await?;
/// assert!(matches!(session.closed().await, Error::SessionClosed));
/// # assert!(matches!(server.await, Err(Error::PeerClosed)));
/// # Ok::<(), Error>(()) }).unwrap().join().unwrap().unwrap();
/// ```
#[derive(Clone)]
pub struct Session {
    guard: Rc<SessionGuard>,
}

impl Session {
    /// Starts the session: from here on it reacts to the peer.
    pub(crate) fn start(established: Established, config: &Rc<Config>, trust: Option<u64>) -> Self {
        let Established { role, peer, socket, agreement, memory, doorbell } = established;
        let SessionMemory { producer, consumer, manager, files, admitted } = memory;
        let credit = Credit::new(&manager, config, role);
        let inner = Rc::new(SessionInner {
            role,
            agreement,
            config: Rc::clone(config),
            channels: Channels {
                producer: RefCell::new(producer),
                consumer: RefCell::new(consumer),
                manager,
                queue_waiting: WakerList::default(),
                pool_waiting: WakerList::default(),
                kept_closes: RefCell::default(),
                unused: RefCell::default(),
                must_look: Cell::new(false),
            },
            streams: RefCell::new(StreamTable::new(role, config.settings().limits.streams)),
            accepts: AcceptQueue::default(),
            supervision: Default::default(),
            activity: PollState::new(),
            counters: Counters::default(),
            inbox: SocketReader {
                deframer: RefCell::new(Deframer::new(config.settings().limits.message_len)),
                closing: SweepList::default(),
                unread_bytes: Cell::new(0),
                is_hung_up: Cell::new(false),
                paused: WakerList::default(),
            },
            credit,
            poller: LocalReactor::current(),
            movement: StallClock::of_peer((role, agreement.version) == UNANSWERED),
            peer,
            socket,
            doorbell,
            outbox: Outbox::default(),
            ending: CloseState { files: RefCell::new(files), ..CloseState::default() },
            _admitted: admitted,
        });
        inner.channels.manager.trust(trust);
        let session = Rc::downgrade(&inner);
        inner.channels.manager.on_broken(move || {
            // Its turn with the poller finds out what it is.
            if let Some(session) = session.upgrade() {
                session.activate();
            }
        });
        inner.poller.demand(config.settings().reactor_interval);
        let foreign_wakes = Arc::clone(&inner.counters.cross_core_wakes);
        let reading = receive::read_socket(Rc::clone(&inner));
        inner.poller.spawn(counting_foreign_wakes(reading, foreign_wakes));
        inner.listen_at_doorbell();
        inner.poller.watch(&inner);
        // Events may be there already: a client of version 2 does not wait for an answer.
        inner.activate();
        inner.show_up();
        Self { guard: SessionGuard::new(inner) }
    }

    pub(crate) fn inner(&self) -> &Rc<SessionInner> {
        self.guard.inner()
    }

    /// Opens a stream. The peer learns of it with the first bytes that are sent on it.
    ///
    /// Only the client of a session can open streams (`docs/protocol.md#stream-ids`).
    ///
    /// # Errors
    ///
    /// The session is over, [`Error::TooManyStreams`], or [`Error::NotClient`] on a server.
    pub fn open_stream(&self) -> Result<Stream> {
        let inner = self.inner();
        if let Some(error) = inner.ended() {
            return Err(error);
        }
        if inner.role == Role::Server {
            return Err(Error::NotClient);
        }
        let mut streams = inner.streams.borrow_mut();
        let opened = streams.open(|id| Rc::new(StreamInner::new(id, &inner.channels.manager)));
        let stream = opened.ok_or(Error::TooManyStreams(inner.config.settings().limits.streams))?;
        Ok(Stream::new(Rc::clone(&self.guard), stream))
    }

    /// Waits for the next stream that the peer opens.
    ///
    /// Streams that came before the session ended are still handed out. Cancel-safe: no stream is
    /// lost when the future is dropped.
    ///
    /// # Errors
    ///
    /// The session is over: [`Error::PeerClosed`] in the ordinary case.
    pub async fn accept(&self) -> Result<Stream> {
        let inner = self.inner();
        let stream = inner.accepts.waiting.until(|| inner.accepted()).await?;
        Ok(Stream::new(Rc::clone(&self.guard), stream))
    }

    /// Waits until the session is over and says why. Cancel-safe.
    pub async fn closed(&self) -> Error {
        self.inner().over().await
    }

    /// Why the session is over, if it is.
    pub fn end_reason(&self) -> Option<Error> {
        self.inner().ended()
    }

    /// Ends the session when its peer has taken what was sent before.
    ///
    /// Waits until the socket has taken what was sent over it. A peer that is not of this crate
    /// drops what it has not read when the connection ends; so it is waited for until it has taken
    /// every event, and has given back every buffer slice, that was sent to it before the call.
    /// What is sent meanwhile is not waited for. Of what went over the socket only that shows that
    /// such a peer has read it: it answers on the stream, or closes it before this side does. So
    /// wait for that before closing; what has neither is waited for as long as it may be, and makes
    /// the result an error, though it may have been read. A server that keeps the memory of a
    /// message while its stream is open is helped by closing the streams first.
    ///
    /// Streams end with [`Error::SessionClosed`]. Dropping every handle ends the session in the
    /// same way, in the background, as long as the executor runs: a program whose executor ends
    /// waits here, or for [`shutdown_executor`](crate::shutdown_executor). Cancel-safe: a session
    /// that has not ended goes on.
    ///
    /// # Errors
    ///
    /// [`Error::NotTaken`], when the peer is not known to have taken everything within the
    /// [configured time](crate::ConfigBuilder::close_timeout). Why the session had ended before, if
    /// it was not closed on this side; but a peer that went away after it had taken everything is
    /// no error. The session is over in any case.
    pub async fn close(&self) -> Result<()> {
        self.close_within(self.inner().config.settings().limits.close_timeout).await
    }

    pub(crate) async fn close_within(&self, limit: Duration) -> Result<()> {
        let inner = self.inner();
        let taken = match inner.ended() {
            Some(error) => Err(error),
            None => inner.let_peer_take(limit).await,
        };
        inner.fail(taken.clone().err().unwrap_or(Error::SessionClosed));
        match taken {
            // Closed before, or by another handle meanwhile.
            Err(Error::SessionClosed) => Ok(()),
            Err(Error::PeerClosed) if inner.has_peer_taken_all().await => Ok(()),
            taken => taken,
        }
    }

    /// The protocol version that both sides agreed on.
    pub fn protocol(&self) -> ProtocolVersion {
        self.inner().agreement.version
    }

    /// How the sides wake each other.
    pub fn wakeup(&self) -> Wakeup {
        self.inner().agreement.wakeup
    }

    /// Whether each side takes slices from lists that are its own
    /// (see [`owned_free_lists`](crate::ConfigBuilder::owned_free_lists)).
    pub fn has_single_popper_lists(&self) -> bool {
        self.inner().agreement.owned_free_lists
    }

    /// Whether the peer knows the end of one direction of a stream and a reset, as far as it has
    /// said by now: one of this crate does. Any other learns of an end only when the whole stream
    /// is closed, and takes a reset for a close.
    ///
    /// A server that is met in [version 2](ProtocolVersion::V2) says so when it maps the memory,
    /// which the client does not wait for: for some milliseconds this may be `false` and become
    /// `true`. It never becomes `false` again.
    ///
    /// ```
    /// use shmipc_glommio::{Config, Connector, Listener};
    ///
    /// # let path = std::env::temp_dir().join(format!("shmipc-doc-half-{}", std::process::id()));
    /// # glommio::LocalExecutorBuilder::default().spawn(move || async move {
    /// # let listener = Listener::bind(&path, Config::default())?;
    /// let session = Connector::new(Config::default()).connect(&path).await?;
    /// assert!(session.peer_knows_half_close()); // a listener of this crate
    /// # shmipc_glommio::Result::<()>::Ok(()) }).unwrap().join().unwrap().unwrap();
    /// ```
    pub fn peer_knows_half_close(&self) -> bool {
        self.inner().peer_knows_extension()
    }

    /// Which shard of its server the session is with, and how many there are, if the server has
    /// said so: a [`Server`](crate::Server) does, in version 4.
    ///
    /// ```
    /// use shmipc_glommio::{Config, Connector, Cores, ProtocolVersion, Server, Session};
    ///
    /// # let path = std::env::temp_dir().join(format!("shmipc-doc-shard-{}", std::process::id()));
    /// # let path = path.to_str().unwrap();
    /// let server = Server::builder(path).cores(Cores::Count(1)).start(|_shard| async {
    ///     Ok::<_, shmipc_glommio::Error>(|session: Session| async move {
    ///         session.closed().await;
    ///         Ok::<_, shmipc_glommio::Error>(())
    ///     })
    /// })?;
    /// # let path = path.to_owned();
    /// # glommio::LocalExecutorBuilder::default().spawn(|| async move {
    /// let config = Config::builder().protocol(ProtocolVersion::V4).build()?;
    /// let session = Connector::new(config).connect(&path).await?;
    /// let shard = session.shard().expect("a `Server` says so");
    /// assert_eq!((shard.index, shard.count), (0, 1));
    /// # shmipc_glommio::Result::<()>::Ok(()) }).unwrap().join().unwrap().unwrap();
    /// # server.stop(std::time::Duration::from_secs(5))?;
    /// # shmipc_glommio::Result::<()>::Ok(())
    /// ```
    pub fn shard(&self) -> Option<ShardIdentity> {
        self.inner().agreement.shard
    }

    /// Who is at the other end.
    pub fn peer(&self) -> PeerCredentials {
        self.inner().peer
    }

    /// How many streams are open.
    pub fn stream_count(&self) -> usize {
        self.inner().streams.borrow().len()
    }

    /// The session's counters at this moment.
    pub fn stats(&self) -> SessionStats {
        self.inner().counters.get()
    }

    /// How many slices of the buffer memory are free at this moment.
    pub fn pool_usage(&self) -> PoolUsage {
        let manager = &self.inner().channels.manager;
        PoolUsage { lists: manager.usage(), held: manager.held() }
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Session")
            .field("protocol", &self.protocol())
            .field("streams", &self.stream_count())
            .field("ended", &self.end_reason())
            .finish_non_exhaustive()
    }
}
