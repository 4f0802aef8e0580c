// SPDX-License-Identifier: MIT OR Apache-2.0
//! What one core has: its store, its sessions with the other cores, and its counters.

use std::cell::{Cell, RefCell};
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use glommio::Task;
use shmipc_glommio::{Config, Session, Shard as Core};

use super::client_stream::OutputLimits;
use super::connection::{self, Writes};
use super::execute::Place;
use super::listeners::{self, ShardListeners};
use super::origin::{Complaints, Origin};
use super::remote_shards::RemoteShards;
use super::resp::Limits;
use super::store::Store;

/// How often keys that have expired are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_millis(100);
/// How many are removed before others get their turn.
const MAX_SWEEP: usize = 1000;

/// What all shards are told alike.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) limits: Limits,
    /// Where the server listens for sessions.
    pub(crate) shm: PathBuf,
    pub(crate) config: Config,
    pub(crate) is_debug_allowed: bool,
    /// How many bytes of replies are kept for one client, and for all of one shard.
    pub(crate) output: [usize; 2],
    pub(crate) started: Instant,
}

/// One shard, for the tasks of its core.
pub(crate) struct Shard {
    /// Its core, and the sessions there.
    pub(crate) core: Core,
    pub(crate) place: Place,
    pub(crate) settings: Settings,
    pub(crate) store: RefCell<Store>,
    pub(crate) remote_shards: RemoteShards,
    pub(crate) counters: Counters,
    pub(crate) output: Rc<OutputLimits>,
    pub(crate) complaints: Complaints,
}

/// What has happened in a shard.
#[derive(Default)]
pub(crate) struct Counters {
    /// Sessions over shared memory that live, those of other shards among them.
    pub(crate) sessions: Cell<u64>,
    /// Clients that are connected: sockets, and streams of sessions.
    pub(crate) clients: Cell<u64>,
    /// Clients that ever were.
    pub(crate) clients_ever: Cell<u64>,
    /// Commands taken, from clients and from other shards.
    pub(crate) commands: Cell<u64>,
    /// Commands, or parts of them, that were passed on to other shards.
    pub(crate) forwarded: Cell<u64>,
}

/// Counts something for as long as it lives.
pub(crate) struct Counted<'a>(&'a Cell<u64>);

impl<'a> Counted<'a> {
    pub(crate) fn new(counter: &'a Cell<u64>) -> Self {
        counter.set(counter.get() + 1);
        Self(counter)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl Shard {
    /// Counts one up, and gives the count.
    pub(crate) fn add(counter: &Cell<u64>) -> u64 {
        counter.set(counter.get() + 1);
        counter.get()
    }

    /// Tells the store what time it is.
    pub(crate) fn tell_time(&self, store: &mut Store) {
        store.set_now(self.settings.started.elapsed().as_millis() as u64);
    }
}

/// Starts a shard on the executor of this thread: its store, its listeners, its timer. They work as
/// long as the tasks live.
pub(crate) fn start_shard(
    core: Core,
    settings: Settings,
    listeners: ShardListeners,
) -> io::Result<(Rc<Shard>, Vec<Task<()>>)> {
    let shard = Rc::new(Shard {
        place: Place { index: core.index(), count: core.count() },
        core,
        store: RefCell::new(Store::new()),
        remote_shards: RemoteShards::new(&settings.shm, settings.config.clone())?,
        counters: Counters::default(),
        output: Rc::new(OutputLimits::new(settings.output[0], settings.output[1])),
        complaints: Complaints::default(),
        settings,
    });
    let mut tasks = listeners::open(&shard, listeners)?;
    tasks.push(glommio::spawn_local(sweep(Rc::clone(&shard))));
    Ok((shard, tasks))
}

/// Serves every stream of a session, until it ends.
pub(crate) async fn serve_session(shard: Rc<Shard>, session: Session) {
    let _counted = Counted::new(&shard.counters.sessions);
    let origin = Origin::Session(session.peer());
    let serve = |stream| {
        let shard = Rc::clone(&shard);
        // A stream that ends with an error has no reply to lose.
        async move {
            let _ = connection::serve(&shard, stream, Writes::Vectored, origin).await;
        }
    };
    session.serve_streams(serve).await;
}

/// Removes what has expired and is not asked for.
async fn sweep(shard: Rc<Shard>) {
    loop {
        glommio::timer::sleep(SWEEP_INTERVAL).await;
        loop {
            let has_more = {
                let mut store = shard.store.borrow_mut();
                shard.tell_time(&mut store);
                store.sweep(MAX_SWEEP)
            };
            if !has_more {
                break;
            }
            futures_lite::future::yield_now().await;
        }
    }
}
