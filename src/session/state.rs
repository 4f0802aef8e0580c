// SPDX-License-Identifier: MIT OR Apache-2.0
//! The state of a session, in parts, and the actions that the state machine asks for.
//!
//! What happens to a session is decided by [`RunningSession`], which knows no runtime. Here is what
//! it drives: the [queues](Queues), the [buffer memory](BufferMemory), the
//! [socket](crate::session::socket_io::SocketIo), and the tasks that wait.
//!
//! The handles that users hold, [`Session`](crate::Session) and [`Stream`](crate::Stream), keep a
//! [`SessionGuard`](crate::session::guard::SessionGuard); when the last of them goes, the session
//! ends. Tasks and the stream table hold the inner state only, so no circle keeps a session alive.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::task::Poll;

use crate::exec::wakers::{WakerList, WakerSlot};
use crate::net::admission::SessionPermit;
use crate::net::credentials::PeerCredentials;
use crate::reactor::poll_state::{PollState, Residency};
use crate::session::established::{Established, SessionMemory};
use crate::session::extension::stream_window;
use crate::session::local_reactor::LocalReactor;
use crate::session::queues::Queues;
use crate::session::socket_io::SocketIo;
use crate::session::supervision::Supervision;
use crate::session::wakeup::Doorbell;
use crate::stats::Counters;
use shmipc_core::config::Config;
use shmipc_core::error::{Error, MemoryError};
use shmipc_core::proto::session::driver::Driver;
use shmipc_core::proto::session::stream::StreamEntry;
use shmipc_core::proto::session::{RunningSession, SessionLimits};
use shmipc_core::shm::map::shared_file::SharedFile;
use shmipc_core::shm::pool::SlicePool;

/// A stream, as its handles and its session share it.
pub(crate) type StreamInner = StreamEntry<SessionInner>;

/// Everything that both handles and tasks of a session share.
pub(crate) struct SessionInner {
    /// For tasks that are started, and for the reactor.
    me: Weak<Self>,
    pub(crate) proto: RunningSession<Self>,
    pub(crate) config: Rc<Config>,
    pub(crate) queues: Queues,
    pub(crate) memory: BufferMemory,
    pub(crate) socket: SocketIo,
    pub(crate) doorbell: Doorbell,
    pub(crate) waiters: Waiters,
    pub(crate) supervision: Supervision<StreamInner>,
    pub(crate) activity: PollState,
    pub(crate) counters: Counters,
    pub(crate) reactor: Rc<LocalReactor>,
    pub(crate) peer: PeerCredentials,
    /// Entries in the file system, which go with the session.
    files: RefCell<Vec<SharedFile>>,
    /// Whether the peer had its time to say what it knows: see `give_time_to_say`.
    pub(crate) had_time_to_say: Cell<bool>,
    _permit: Option<SessionPermit>,
}

/// The buffer memory, and the tasks that wait for free slices.
pub(crate) struct BufferMemory {
    pub(crate) pool: Rc<SlicePool>,
    pub(crate) waiters: WakerList,
}

/// Tasks that wait for something else than the queue, the memory or the socket.
#[derive(Default)]
pub(crate) struct Waiters {
    /// For a stream of the peer.
    pub(crate) accept: WakerList,
    /// Until less of what went over the socket is unread.
    pub(crate) budget: WakerList,
    /// Until a time, whether their streams can leave the socket.
    pub(crate) returning: WakerList,
    /// For the end of the session.
    pub(crate) end: WakerList,
}

/// The tasks that wait for a stream.
#[derive(Default)]
pub(crate) struct StreamTasks {
    pub(crate) reader: WakerSlot,
    /// The task that waits for the peer's reader.
    pub(crate) writer: WakerSlot,
}

impl SessionInner {
    /// A session whose handshake is done. Nothing runs yet.
    pub(crate) fn new(established: Established, config: &Rc<Config>) -> Rc<Self> {
        let Established { role, peer, socket, agreement, memory, doorbell } = established;
        let SessionMemory { producer, consumer, manager, files, admitted } = memory;
        let limits = &config.settings().limits;
        let proto = RunningSession::new(
            role,
            agreement,
            SessionLimits {
                streams: limits.streams,
                unread_fallback_bytes: limits.unread_fallback_bytes,
                stream_window: stream_window(&manager, config),
                stall: limits.stall,
            },
        );
        let session = Rc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            proto,
            config: Rc::clone(config),
            queues: Queues::new(producer, consumer),
            memory: BufferMemory { pool: manager, waiters: WakerList::default() },
            socket: SocketIo::new(socket, limits.message_len),
            doorbell,
            waiters: Waiters::default(),
            supervision: Supervision::default(),
            activity: PollState::new(),
            counters: Counters::default(),
            reactor: LocalReactor::current(),
            peer,
            files: RefCell::new(files),
            had_time_to_say: Cell::new(false),
            _permit: admitted,
        });
        session.proto.look_for_extension(&session);
        session
    }

    /// This session, for a task that is started. `None` only while it is being dropped.
    pub(crate) fn shared(&self) -> Option<Rc<Self>> {
        self.me.upgrade()
    }

    /// Why the session is over, if it is.
    pub(crate) fn ended(&self) -> Option<Error> {
        self.proto.end_reason()
    }

    #[inline]
    pub(crate) fn is_over(&self) -> bool {
        self.proto.is_over()
    }

    /// Ends the session. The first reason stays.
    pub(crate) fn fail(&self, error: Error) {
        self.proto.fail(self, error);
    }

    /// Ends the session because its memory does not hold together, and returns the error.
    #[cold]
    pub(crate) fn fail_memory(&self, error: MemoryError) -> Error {
        self.proto.fail_memory(self, error)
    }

    /// What else the end of the session is, beside its streams.
    pub(crate) fn stop(&self) {
        self.queues.waiters.wake_all();
        self.waiters.budget.wake_all();
        self.waiters.returning.wake_all();
        self.memory.waiters.wake_all();
        self.waiters.accept.wake_all();
        self.socket.paused.wake_all();
        self.waiters.end.wake_all();
        self.socket.outbox.clear();
        self.memory.pool.set_resting(true);
        self.queues.give_back_taken();
        // Wakes the reader, and tells the peer.
        self.abandon();
        self.reactor.watching().note_end();
    }

    /// Tells the peer that this side is gone, and removes its files.
    pub(crate) fn abandon(&self) {
        self.socket.shut_down();
        self.files.borrow_mut().clear();
    }

    /// Waits until the session is over.
    pub(crate) async fn over(&self) -> Error {
        let ended = || self.ended().map_or(Poll::Pending, Poll::Ready);
        self.waiters.end.until(ended).await
    }

    /// Whether memory of the session is gone.
    #[inline]
    pub(crate) fn is_memory_lost(&self) -> bool {
        self.memory.pool.is_lost() || self.queues.is_lost()
    }

    /// Has the reactor drive the session.
    #[inline]
    pub(crate) fn activate(&self) {
        if self.activity.residency.get() != Residency::Active && !self.is_over() {
            self.activate_now();
        }
    }

    #[inline(never)]
    fn activate_now(&self) {
        if let Some(session) = self.shared() {
            self.reactor.activate(&session);
        }
    }

    /// Wakes the task that reads a stream.
    #[inline]
    pub(crate) fn wake_reader(&self, stream: &StreamInner) {
        let woken = u32::from(stream.tasks.reader.wake());
        self.activity.waiting_readers.set(self.activity.waiting_readers.get() - woken);
    }

    /// Publishes every event so far, and wakes the peer if it sleeps.
    #[inline]
    pub(crate) fn flush_queue(&self) {
        Driver::flush_queue(self);
    }
}
