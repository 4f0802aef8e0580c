// SPDX-License-Identifier: MIT OR Apache-2.0
//! The thread of one shard of a server, and what it shares with the others.

use std::cell::RefCell;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures_lite::future::or;
use glommio::LocalExecutorBuilder;

use super::listener::{Door, Listener};
use super::poller::Poller;
use super::session::Session;
use super::shard::{Failure, Place, Shard, ShardLink, panic_text};
use super::socket::Socket;
use super::socket_path::SocketPath;
use crate::config::Config;
use crate::error::{Error, Result};

pub(super) type OnRefused = Arc<dyn Fn(usize, &Error) + Send + Sync>;

/// What all threads of a server know.
pub(super) struct Common {
    pub(super) links: Vec<Arc<ShardLink>>,
    /// Tells the dealer to stop.
    pub(super) control: UnixStream,
    pub(super) stop_at: Mutex<Option<Instant>>,
    pub(super) patience: Duration,
}

impl Common {
    /// Has everybody stop within this time. Who is told twice takes the earlier.
    pub(super) fn stop(&self, patience: Duration) {
        // No clock reaches as far as the longest durations.
        let longest = Duration::from_secs(365 * 24 * 3600);
        let at = Instant::now() + patience.min(longest);
        let mut stop_at = self.stop_at.lock().unwrap_or_else(PoisonError::into_inner);
        *stop_at = Some(stop_at.map_or(at, |earlier| earlier.min(at)));
        drop(stop_at);
        // It has ended already when this fails.
        let _ = self.control.shutdown(Shutdown::Both);
        for link in &self.links {
            link.inlet.ring();
        }
    }

    pub(super) fn stop_at(&self) -> Option<Instant> {
        *self.stop_at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What goes to the thread of one shard.
pub(super) struct Core {
    pub(super) place: Place,
    pub(super) door: Door,
    pub(super) bell: OwnedFd,
    pub(super) common: Arc<Common>,
    pub(super) config: Config,
    pub(super) trust: Option<u64>,
    pub(super) on_refused: Option<OnRefused>,
}

/// Stops the whole server when one core ends, whatever for: data of that shard would be missing.
struct StopsAll(Arc<Common>);

/// What has to be cleared away from outside when the executor of a core is ended by a panic.
///
/// glommio does not drop the tasks of such an executor, and what they own stays open. So that peers
/// do not wait for a core that is no more, its sockets are shut down.
#[derive(Default)]
struct Wreck {
    door: Option<(OwnedFd, SocketPath)>,
    shard: Option<Shard>,
}

type SharedWreck = Rc<RefCell<Wreck>>;

impl Wreck {
    fn new(door: &Door) -> Result<SharedWreck> {
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
    pub(super) fn start<F, M, H, S, E, D>(
        self,
        executor: LocalExecutorBuilder,
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
        let index = self.place.index;
        let run = move || {
            let _stops_all = StopsAll(Arc::clone(&self.common));
            let wreck = Wreck::new(&self.door)?;
            let shown = Rc::clone(&wreck);
            let run = AssertUnwindSafe(|| {
                let executor = executor
                    .make()
                    .map_err(|error| shard_error(index, Box::new(io::Error::from(error))))?;
                executor.run(async move {
                    let result = self.run(factory, tell, Rc::clone(&shown)).await;
                    // Nothing is left that somebody would have to clear away.
                    shown.take();
                    Poller::shut_down().await;
                    result
                })
            });
            std::panic::catch_unwind(run).unwrap_or_else(|panic| {
                wreck.take().clear();
                Err(shard_error(index, panic_text(&*panic).into()))
            })
        };
        std::thread::Builder::new()
            .name(format!("shard-{index}"))
            .spawn(run)
            .map_err(|error| shard_error(index, error.into()))
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
        let Self { place, door, bell, common, config, trust, on_refused } = self;
        let index = place.index;
        let shard = Shard::new(place, Arc::clone(&common.links[index]));
        wreck.borrow_mut().shard = Some(shard.clone());
        let mut listener = Listener::at(door, config).trust_as(trust);
        let refusing = shard.clone();
        listener.on_refused(move |error| {
            refusing.note_refused();
            if let Some(tell) = &on_refused {
                tell(index, error);
            }
        });
        let bell = Socket::connected(bell);
        let (hearing, adopter) = (shard.clone(), listener.adopter());
        let taking_in = glommio::spawn_local(async move {
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

pub(super) fn shard_error(index: usize, source: Failure) -> Error {
    Error::Shard { index, source: Arc::from(source) }
}
