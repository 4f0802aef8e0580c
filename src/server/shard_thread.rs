// SPDX-License-Identifier: MIT OR Apache-2.0
//! The thread of one shard of a server, and what it shares with the others.

use std::cell::RefCell;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::exec::options::ExecutorOptions;
use crate::exec::runtime::spawn_local;
use futures_lite::future::or;

use crate::connect::listener::Listener;
use crate::exec::callback;
use crate::exec::contain::panic_text;
use crate::net::bound_socket::BoundSocket;
use crate::net::credentials::PeerCredentials;
use crate::net::socket::Socket;
use crate::net::socket_file::SocketPath;
use crate::preflight::thread_error;
use crate::server::shard::{Failure, Place, Shard, ShardLink};
use crate::session::handle::Session;
use crate::session::local_reactor::shutdown_executor;
use shmipc_core::config::Config;
use shmipc_core::error::{Error, Result};
use shmipc_core::wire::ShardIdentity;

pub(crate) type OnRefused = Arc<dyn Fn(usize, &Error) + Send + Sync>;

pub(crate) type Authorize = Arc<dyn Fn(&PeerCredentials) -> bool + Send + Sync>;

/// Tells the program of a peer that was refused.
pub(crate) fn tell_refused(on_rejected: Option<&OnRefused>, index: usize, error: &Error) {
    if let Some(tell) = on_rejected {
        callback::call("on_rejected", || tell(index, error));
    }
}

/// What all threads of a server know.
pub(crate) struct Common {
    pub(crate) links: Vec<Arc<ShardLink>>,
    /// The files of all doors, in the order in which they are removed: the shared one, then those
    /// of the shards from the first on.
    pub(crate) doors: Mutex<Vec<SocketPath>>,
    /// Tells the dealer to stop.
    pub(crate) control: UnixStream,
    pub(crate) stop_at: Mutex<Option<Instant>>,
    pub(crate) patience: Duration,
}

impl Common {
    /// Has everybody stop within this time. Who is told twice takes the earlier.
    pub(crate) fn stop(&self, patience: Duration) {
        // No clock reaches as far as the longest durations.
        let longest = Duration::from_secs(365 * 24 * 3600);
        let at = Instant::now() + patience.min(longest);
        let mut stop_at = self.stop_at.lock().unwrap_or_else(PoisonError::into_inner);
        *stop_at = Some(stop_at.map_or(at, |earlier| earlier.min(at)));
        drop(stop_at);
        // Here and not by each core, so that clients do not see some of the shards only. Whoever
        // comes next can open the same doors from now on.
        let doors = std::mem::take(&mut *self.doors());
        doors.into_iter().for_each(drop);
        // It has ended already when this fails.
        let _ = self.control.shutdown(Shutdown::Both);
        for link in &self.links {
            link.inlet.ring();
        }
    }

    /// Has the shared door removed before those of the shards, or now if it is time already.
    pub(crate) fn add_shared_door(&self, path: SocketPath) {
        let mut doors = self.doors();
        // Who stops says so before looking at the doors.
        if self.stop_at().is_none() {
            doors.insert(0, path);
        }
    }

    fn doors(&self) -> MutexGuard<'_, Vec<SocketPath>> {
        self.doors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn stop_at(&self) -> Option<Instant> {
        *self.stop_at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What goes to the thread of one shard.
pub(crate) struct Core {
    pub(crate) place: Place,
    pub(crate) door: BoundSocket,
    pub(crate) bell: OwnedFd,
    pub(crate) common: Arc<Common>,
    pub(crate) config: Config,
    pub(crate) trust: Option<u64>,
    pub(crate) on_rejected: Option<OnRefused>,
    pub(crate) authorize: Option<Authorize>,
}

/// Stops the whole server when one of its threads ends, whatever for: data of a shard, or the way
/// to the shards, would be missing.
pub(crate) struct StopsAll(pub(crate) Arc<Common>);

/// What has to be cleared away from outside when the executor of a core is ended by a panic.
///
/// glommio does not drop the tasks of such an executor, and what they own stays open. So that peers
/// do not wait for a core that is no more, its sockets are shut down.
#[derive(Default)]
struct CrashCleanup {
    door: Option<(OwnedFd, SocketPath)>,
    shard: Option<Shard>,
}

type SharedWreck = Rc<RefCell<CrashCleanup>>;

impl CrashCleanup {
    fn new(door: &BoundSocket) -> Result<SharedWreck> {
        let fd = door.fd.try_clone().map_err(|error| Error::os("duplicate a socket", error))?;
        let door = Some((fd, door.path.clone()));
        Ok(Rc::new(RefCell::new(Self { door, shard: None })))
    }

    fn clear(self) {
        let Self { door, shard } = self;
        if let Some((fd, path)) = door {
            // First its file: nobody finds it any more.
            drop(path);
            // It may be closed already, by the unwinding.
            let _ = nix::sys::socket::shutdown(fd.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        }
        if let Some(shard) = shard {
            shard.abandon();
        }
    }
}

impl Drop for StopsAll {
    fn drop(&mut self) {
        if self.0.stop_at().is_none() {
            self.0.stop(self.0.patience);
        }
    }
}

impl Core {
    /// Starts the thread of a shard. It says one word to `tell` once it is ready.
    pub(crate) fn start<F, M, H, S, E, D>(
        self,
        executor: ExecutorOptions,
        factory: F,
        tell: mpsc::Sender<()>,
    ) -> Result<JoinHandle<Result<()>>>
    where
        F: Fn(Shard) -> M + Send + 'static,
        M: Future<Output = std::result::Result<H, E>> + 'static,
        E: Into<Failure> + 'static,
        H: Fn(Session) -> S + 'static,
        S: Future<Output = std::result::Result<(), D>> + 'static,
        D: Into<Failure> + 'static,
    {
        let (index, processor) = (self.place.index, self.place.core);
        let name = executor.name_of_thread(index);
        let run = move || {
            let _stops_all = StopsAll(Arc::clone(&self.common));
            let wreck = CrashCleanup::new(&self.door)?;
            let shown = Rc::clone(&wreck);
            let run = AssertUnwindSafe(|| {
                let executor = executor
                    .make(processor)
                    .map_err(|error| shard_error(index, Box::new(error)))?;
                executor.run(async move {
                    let result = self.run(factory, tell, Rc::clone(&shown)).await;
                    // Nothing is left that somebody would have to clear away.
                    shown.take();
                    shutdown_executor().await;
                    result
                })
            });
            catch_unwind(run).unwrap_or_else(|panic| {
                wreck.take().clear();
                Err(shard_error(index, panic_text(&*panic).into()))
            })
        };
        std::thread::Builder::new().name(name).spawn(run).map_err(|error| {
            match thread_error(error) {
                Ok(too_few) => too_few.into(),
                Err(error) => shard_error(index, error.into()),
            }
        })
    }

    /// The whole life of a shard, which can be seen from outside meanwhile.
    async fn run<F, M, H, S, E, D>(
        self,
        factory: F,
        tell: mpsc::Sender<()>,
        wreck: SharedWreck,
    ) -> Result<()>
    where
        F: Fn(Shard) -> M,
        M: Future<Output = std::result::Result<H, E>>,
        E: Into<Failure> + 'static,
        H: Fn(Session) -> S + 'static,
        S: Future<Output = std::result::Result<(), D>> + 'static,
        D: Into<Failure> + 'static,
    {
        let Self { place, door, bell, common, config, trust, on_rejected, authorize } = self;
        let index = place.index;
        let shard = Shard::new(place, Arc::clone(&common.links[index]));
        wreck.borrow_mut().shard = Some(shard.clone());
        let count = common.links.len();
        // A process has not that many threads.
        let identity = ShardIdentity { index: index as u32, count: count as u32 };
        let mut listener = Listener::at(door, config).trust_as(trust).for_shard(identity);
        let refusing = shard.clone();
        listener.on_rejected(move |error| {
            refusing.note_refused();
            tell_refused(on_rejected.as_ref(), index, error);
        });
        if let Some(authorize) = authorize {
            listener.authorize(move |peer| authorize(peer));
        }
        let bell = Socket::of_our_own(bell);
        let (hearing, adopter) = (shard.clone(), listener.adopter());
        let taking_in = spawn_local(async move {
            hearing.take_in(bell, adopter, || common.stop_at()).await;
        });
        let made = async { factory(shard.clone()).await.map(Some).map_err(Into::into) };
        let stopped = async {
            shard.stopping().await;
            Ok(None)
        };
        let Some(handler) = or(made, stopped).await.map_err(|error| shard_error(index, error))?
        else {
            return Ok(());
        };
        let _ = tell.send(());
        drop(tell);
        let served = shard.serve(&mut listener, handler).await;
        // Its path goes with it, and who still waits there is let go.
        drop(listener);
        wreck.borrow_mut().door.take();
        shard.drain().await;
        taking_in.cancel().await;
        served.map_err(|error| shard_error(index, error.into()))
    }
}

pub(crate) fn shard_error(index: usize, source: Failure) -> Error {
    Error::Shard { index, source: Arc::from(source) }
}
