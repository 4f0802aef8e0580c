// SPDX-License-Identifier: MIT OR Apache-2.0
//! One core of a server, and the sessions that are its own.
//!
//! A session gets here by the core's own door, or from the [dealer](crate::server::acceptor), and
//! stays. Its handler runs as a task of this core; how it ends, by a panic too, concerns that
//! session only.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_lite::future::or;

use crate::connect::listener::{Adopter, Listener, Ready};
use crate::exec::contain::panic_text;
use crate::exec::runtime::{sleep, spawn_local};
use crate::exec::wake_audit::counting_foreign_wakes;
use crate::exec::wakers::WakerList;
use crate::net::socket::{Received, Socket};
use crate::server::acceptor::{Load, ShardInbox};
use crate::session::handle::Session;
use crate::session::serve::log_failure;
use crate::session::supervised::{Of, supervised};
use crate::session::supervision::ServedBy;
use shmipc_core::error::{Error, Result};
use shmipc_core::proto::session::ending::DrainPhase;

/// What the handlers of sessions and shards fail with.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// How often streams are looked at that should end: longer than somebody who is in the middle of
/// something takes to go on.
const DRAIN_INTERVAL: Duration = Duration::from_millis(20);
/// How long a session gets to end when the server has no more time: half of that until its peer has
/// taken what was sent, the other half once the handlers were cut.
const CLOSE_PATIENCE: Duration = Duration::from_millis(500);

/// What one shard of a server counted.
///
/// ```
/// use shmipc_glommio::{Cores, Server};
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-shards-{}", std::process::id()));
/// let server = Server::builder(&path).cores(Cores::Unpinned(2)).serve_streams(|_| async {})?;
/// for (index, shard) in server.stats().iter().enumerate() {
///     println!("shard {index}: {} of {} sessions are open", shard.open, shard.accepted);
/// }
/// # shmipc_glommio::Result::<()>::Ok(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ShardStats {
    /// Sessions that came to be, by both doors.
    pub accepted: u64,
    /// Those among them that came in at the shared door.
    pub dealt: u64,
    /// Sessions that are open.
    pub open: u64,
    /// Handlers that ended with an error: of sessions, and of streams with
    /// [`serve_streams`](crate::Session::serve_streams).
    pub failed: u64,
    /// Those among them that were of streams.
    pub failed_streams: u64,
    /// Sessions whose handler panicked.
    pub panicked: u64,
    /// Streams whose task panicked, of sessions that have ended; those of open sessions are in
    /// their own [counters](crate::SessionStats::panicked_streams).
    pub panicked_streams: u64,
    /// Peers that were dropped before they became a session.
    pub refused: u64,
    /// Wake-ups that other threads gave to tasks of sessions that have ended; those of open
    /// sessions are in their own [counters](crate::SessionStats::cross_core_wakes).
    pub cross_core_wakes: u64,
}

/// What a shard shares with the threads of its server.
pub(crate) struct ShardLink {
    pub(crate) inlet: Arc<ShardInbox>,
    counters: ShardCounters,
}

/// Written by the shard's thread alone, once per session or failed stream; read by any. They order
/// nothing.
#[derive(Default)]
struct ShardCounters {
    accepted: AtomicU64,
    dealt: AtomicU64,
    ended: AtomicU64,
    failed: AtomicU64,
    failed_streams: AtomicU64,
    panicked: AtomicU64,
    panicked_streams: AtomicU64,
    refused: AtomicU64,
    cross_core_wakes: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl ShardLink {
    pub(crate) fn new(inlet: ShardInbox) -> Self {
        Self { inlet: Arc::new(inlet), counters: ShardCounters::default() }
    }

    pub(crate) fn stats(&self) -> ShardStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        // The end of a session is counted after its beginning.
        let ended = get(&counters.ended);
        let accepted = get(&counters.accepted);
        ShardStats {
            accepted,
            dealt: get(&counters.dealt),
            open: accepted.saturating_sub(ended),
            failed: get(&counters.failed),
            failed_streams: get(&counters.failed_streams),
            panicked: get(&counters.panicked),
            panicked_streams: get(&counters.panicked_streams),
            refused: get(&counters.refused),
            cross_core_wakes: get(&counters.cross_core_wakes),
        }
    }
}

/// One core of a [`Server`](crate::Server), as its tasks see it.
///
/// Belongs to the core's executor. Cloning gives another handle.
///
/// ```
/// use std::cell::Cell;
/// use std::rc::Rc;
/// use shmipc_glommio::{Cores, Error, Server, Session, Shard};
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-shard-{}", std::process::id()));
/// let server = Server::builder(&path).cores(Cores::Unpinned(2)).start(|shard: Shard| async move {
///     // What only this core touches needs no lock.
///     let requests = Rc::new(Cell::new(0));
///     let counted = Rc::clone(&requests);
///     glommio::spawn_local(async move {
///         shard.stopping().await;
///         println!("shard {} had {} requests", shard.index(), counted.get());
///     })
///     .detach();
///     Ok::<_, Error>(move |session: Session| {
///         let requests = Rc::clone(&requests);
///         async move {
///             while let Ok(mut stream) = session.accept().await {
///                 while let Some(request) = stream.recv().await? {
///                     requests.set(requests.get() + 1);
///                     stream.forward(request).await?;
///                 }
///             }
///             Ok::<_, Error>(())
///         }
///     })
/// })?;
/// # server.stop(std::time::Duration::from_secs(5))?;
/// # shmipc_glommio::Result::<()>::Ok(())
/// ```
#[derive(Clone)]
pub struct Shard {
    inner: Rc<ShardInner>,
}

struct ShardInner {
    place: Place,
    link: Arc<ShardLink>,
    open: RefCell<BTreeMap<u64, Session>>,
    ended: WakerList,
    stop: Stop,
}

/// Where a shard stands among those of its server.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) index: usize,
    pub(crate) count: usize,
    pub(crate) core: Option<usize>,
    pub(crate) path: Arc<Path>,
}

/// How far the end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Phase {
    Serving,
    /// Until then sessions may come to rest by themselves.
    Draining(Instant),
    /// Handlers that still run are dropped.
    Cut,
}

struct Stop {
    phase: Cell<Phase>,
    waiting: WakerList,
}

impl Stop {
    fn advance(&self, phase: Phase) {
        self.phase.set(phase);
        self.waiting.wake_all();
    }

    async fn reached(&self, is_far_enough: impl Fn(Phase) -> bool) {
        let is_reached = || match is_far_enough(self.phase.get()) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        };
        self.waiting.until(is_reached).await;
    }
}

impl Shard {
    pub(crate) fn new(place: Place, link: Arc<ShardLink>) -> Self {
        let stop = Stop { phase: Cell::new(Phase::Serving), waiting: WakerList::default() };
        let (open, ended) = Default::default();
        Self { inner: Rc::new(ShardInner { place, link, open, ended, stop }) }
    }

    /// Which shard this is, from 0.
    pub fn index(&self) -> usize {
        self.inner.place.index
    }

    /// How many shards the server has.
    pub fn count(&self) -> usize {
        self.inner.place.count
    }

    /// The processor that this shard is pinned to, if it is.
    pub fn core(&self) -> Option<usize> {
        self.inner.place.core
    }

    /// The path of this shard's own door.
    pub fn path(&self) -> &Path {
        &self.inner.place.path
    }

    /// The sessions that are open on this core.
    pub fn sessions(&self) -> Vec<Session> {
        self.inner.open.borrow().values().cloned().collect()
    }

    /// What this shard counted.
    pub fn stats(&self) -> ShardStats {
        self.inner.link.stats()
    }

    /// Waits until the server is to stop. Cancel-safe.
    ///
    /// No more sessions come from then on. Those that are open come to their end: see
    /// [`Server::stop`](crate::Server::stop).
    pub async fn stopping(&self) {
        self.inner.stop.reached(|phase| phase != Phase::Serving).await;
    }

    /// Whether the server is to stop.
    pub fn is_stopping(&self) -> bool {
        self.inner.stop.phase.get() != Phase::Serving
    }

    /// Listens to the bell: takes in what is dealt, and begins to stop when it is time.
    pub(crate) async fn take_in(
        &self,
        bell: Socket,
        adopter: Adopter,
        stop_at: impl Fn() -> Option<Instant>,
    ) {
        let arrivals = Rc::new(WakerList::default());
        let adopting = adopt(Arc::clone(&self.inner.link), adopter, Rc::clone(&arrivals));
        let _adopting = spawn_local(adopting);
        // The other end goes with the server only, and the server waits for this.
        while bell.readable().await.is_ok() {
            while let Ok(Received::Bytes(_)) = bell.try_receive(&mut [0; 64]) {}
            self.inner.link.inlet.answer();
            arrivals.wake_all();
            if let Some(deadline) = stop_at()
                && self.inner.stop.phase.get() != Phase::Cut
            {
                self.inner.stop.advance(Phase::Draining(deadline));
            }
        }
    }

    /// Serves the sessions of `listener` until the server stops, or the listener fails.
    pub(crate) async fn serve<H, S, E>(&self, listener: &mut Listener, handler: H) -> Result<()>
    where
        H: Fn(Session) -> S + 'static,
        S: Future<Output = std::result::Result<(), E>> + 'static,
        E: Into<Failure>,
    {
        let handler = Rc::new(handler);
        let mut number = 0;
        loop {
            let stopped = async {
                self.stopping().await;
                Ok(None)
            };
            let accepted = async { listener.accept_ready().await.map(Some) };
            let Some(ready) = or(stopped, accepted).await? else {
                break;
            };
            number += 1;
            self.begin(number, ready, Rc::clone(&handler));
        }
        // Their peers think that they are connected, and may have asked for something already.
        listener.stop_accepting().await;
        while let Some(ready) = listener.take_ready() {
            number += 1;
            self.begin(number, ready, Rc::clone(&handler));
        }
        Ok(())
    }

    /// Starts the handler of a session.
    fn begin<H, S, E>(&self, number: u64, ready: Ready, handler: Rc<H>)
    where
        H: Fn(Session) -> S + 'static,
        S: Future<Output = std::result::Result<(), E>> + 'static,
        E: Into<Failure>,
    {
        let Ready { session, ticket, .. } = ready;
        let counters = &self.inner.link.counters;
        count(&counters.accepted);
        let load: Load = match ticket.map(Box::<dyn Any>::downcast) {
            Some(Ok(load)) => {
                count(&counters.dealt);
                *load
            }
            _ => self.inner.link.inlet.own_session(),
        };
        let link = Arc::clone(&self.inner.link);
        let served_by = ServedBy::new(self.index(), number, move || {
            count(&link.counters.failed);
            count(&link.counters.failed_streams);
        });
        // Nobody else says so.
        let _ = session.inner().supervision.served_by.set(served_by);
        self.inner.open.borrow_mut().insert(number, session.clone());
        let shard = self.clone();
        spawn_local(async move {
            let foreign_wakes = Arc::clone(&session.inner().counters.cross_core_wakes);
            let handled = {
                let session = session.clone();
                async move { handler(session).await.map_err(Into::into) }
            };
            let has_failed = |result: &std::result::Result<(), Failure>| result.is_err();
            let handled = supervised(session.inner(), Of::Session, has_failed, handled);
            let handled = counting_foreign_wakes(handled, foreign_wakes);
            let cut = async {
                shard.inner.stop.reached(|phase| phase == Phase::Cut).await;
                Ok(Ok(()))
            };
            let result = or(handled, cut).await;
            shard.let_streams_end(&session).await;
            shard.note_end(number, &session, result);
            shard.close(&session).await;
            shard.inner.open.borrow_mut().remove(&number);
            shard.inner.ended.wake_all();
            drop(load);
        })
        .detach();
    }

    fn note_end(
        &self,
        number: u64,
        session: &Session,
        result: std::thread::Result<std::result::Result<(), Failure>>,
    ) {
        let counters = &self.inner.link.counters;
        let (shard, reason) = (self.index(), session.end_reason());
        match result {
            Ok(Ok(())) => tracing::debug!(shard, session = number, ?reason, "session served"),
            Ok(Err(error)) => {
                count(&counters.failed);
                log_failure(session.inner(), None, &error);
            }
            Err(panic) => {
                count(&counters.panicked);
                let text = panic_text(&*panic);
                tracing::error!(shard, session = number, text, "handler panicked");
            }
        }
        let stats = session.stats();
        counters.cross_core_wakes.fetch_add(stats.cross_core_wakes, Ordering::Relaxed);
        counters.panicked_streams.fetch_add(stats.panicked_streams, Ordering::Relaxed);
        count(&counters.ended);
    }

    pub(crate) fn note_refused(&self) {
        count(&self.inner.link.counters.refused);
    }

    /// Has the handlers that still run dropped, as soon as they wait for something.
    pub(crate) fn cut(&self) {
        self.inner.stop.advance(Phase::Cut);
    }

    /// While the server stops, a handler that has ended may have left streams to tasks of its own,
    /// which have something to answer.
    async fn let_streams_end(&self, session: &Session) {
        let is_draining = || matches!(self.inner.stop.phase.get(), Phase::Draining(_));
        while is_draining() && !session.inner().is_over() && session.has_streams_in_hand() {
            sleep(DRAIN_INTERVAL / 4).await;
        }
    }

    /// Ends the sessions, each when its streams have ended; at the deadline, those that are left.
    pub(crate) async fn drain(&self) {
        for session in self.sessions() {
            session.begin_drain();
        }
        let began = Instant::now();
        let mut drain = DrainPhase::Look;
        let mut closing = BTreeSet::new();
        // Without a deadline, the listener failed before anybody asked.
        while let Phase::Draining(deadline) = self.inner.stop.phase.get() {
            let now = Instant::now();
            if self.inner.open.borrow().is_empty() || now >= deadline {
                break;
            }
            // Who is in the middle of something gets half of the time to come to its end, and the
            // answer the other half.
            if now >= began + deadline.saturating_duration_since(began) / 2 {
                drain = DrainPhase::All;
            }
            let open = self.inner.open.borrow().clone();
            for (number, session) in open {
                let is_done = session.drain_streams(drain);
                let may_close = drain != DrainPhase::Look && session.end_reason().is_none();
                if is_done && may_close && closing.insert(number) {
                    self.begin_close(session);
                }
            }
            if drain == DrainPhase::Look {
                drain = DrainPhase::Quiet;
            }
            sleep(DRAIN_INTERVAL.min(left_until(deadline))).await;
        }
        for session in self.sessions() {
            self.begin_close(session);
        }
        let end = Instant::now() + 2 * CLOSE_PATIENCE;
        while !self.inner.open.borrow().is_empty() && Instant::now() < end {
            self.ended_within(left_until(end)).await;
        }
        self.cut();
        while !self.inner.open.borrow().is_empty() {
            self.ended_within(CLOSE_PATIENCE).await;
        }
    }

    fn begin_close(&self, session: Session) {
        let shard = self.clone();
        spawn_local(async move { shard.close(&session).await }).detach();
    }

    /// Closes a session when its peer has taken what was sent to it, if it does so in time: before
    /// the session's own limit, and not long after the server has stopped.
    async fn close(&self, session: &Session) {
        let cut = async {
            self.inner.stop.reached(|phase| phase == Phase::Cut).await;
            sleep(CLOSE_PATIENCE).await;
            Ok(())
        };
        if let Err(error) = or(session.close(), cut).await {
            tracing::debug!(shard = self.index(), %error, "session closed");
        }
        session.inner().fail(Error::SessionClosed);
    }

    /// Shuts down the sockets of all sessions, of which no task will run again, so that peers know.
    pub(crate) fn abandon(self) {
        for session in self.sessions() {
            count(&self.inner.link.counters.ended);
            session.inner().socket.shut_down();
            // Its end would wake tasks of an executor that is no more.
            std::mem::forget(session);
        }
        std::mem::forget(self);
    }

    /// Waits until a session ends, but no longer than this.
    async fn ended_within(&self, patience: Duration) {
        let before = self.inner.open.borrow().len();
        let ended = self.inner.ended.until(|| match self.inner.open.borrow().len() < before {
            true => Poll::Ready(()),
            false => Poll::Pending,
        });
        or(ended, async {
            sleep(patience).await;
        })
        .await;
    }
}

impl fmt::Debug for Shard {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Shard")
            .field("index", &self.index())
            .field("count", &self.count())
            .field("core", &self.core())
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

fn left_until(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// Takes dealt connections into the listener, which has those wait for which it has no place.
async fn adopt(link: Arc<ShardLink>, adopter: Adopter, arrivals: Rc<WakerList>) {
    loop {
        let dealt = arrivals.until(|| link.inlet.take().map_or(Poll::Pending, Poll::Ready)).await;
        adopter.adopt(dealt.socket, Box::new(dealt.load));
        // There may be more, and more coming in meanwhile.
        futures_lite::future::yield_now().await;
    }
}
