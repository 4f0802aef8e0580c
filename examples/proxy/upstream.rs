// SPDX-License-Identifier: MIT OR Apache-2.0
//! One session with a server, which is made again whenever it ends.

use std::cell::{Cell, RefCell};
use std::collections::hash_map::RandomState;
use std::future::poll_fn;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use futures_lite::future::or;
use shmipc_glommio::{Config, Connector, Error, Session, Stream};

use crate::tell;

/// How long the first pause between two attempts is, and the longest.
const PAUSES: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(10)..=Duration::from_secs(1);

/// Opens streams on a session that it keeps.
///
/// The session is shared by everybody who wants a stream. When it ends, or cannot be made, it is
/// tried again after a pause that grows; whoever wants a stream meanwhile waits, for some time.
pub(crate) struct Upstream {
    shared: Rc<Shared>,
    /// Stops when this is dropped. `None` once it was told to.
    keeping: Cell<Option<glommio::Task<()>>>,
}

struct Shared {
    path: PathBuf,
    state: RefCell<State>,
    /// Those who wait for a session. Woken after every attempt, so it does not grow for long.
    waiting: RefCell<Vec<Waker>>,
}

enum State {
    Connected(Session),
    /// Why there is no session, as far as that is known.
    Disconnected(Option<Error>),
}

impl Upstream {
    pub(crate) fn new(path: PathBuf, config: Config) -> Self {
        let state = RefCell::new(State::Disconnected(None));
        let shared = Rc::new(Shared { path, state, waiting: RefCell::default() });
        let keeping = glommio::spawn_local(keep(Rc::clone(&shared), Connector::new(config)));
        Self { shared, keeping: Cell::new(Some(keeping)) }
    }

    /// Opens a stream. Waits for a session if there is none, up to `patience`.
    pub(crate) async fn open_stream(&self, patience: Duration) -> io::Result<Stream> {
        let session = poll_fn(|context| self.shared.poll_session(context).map(Ok));
        let too_late = async {
            glommio::timer::sleep(patience).await;
            Err(self.shared.why_not())
        };
        Ok(or(session, too_late).await?.open_stream()?)
    }

    /// Ends the session, if there is one, and makes no other.
    pub(crate) async fn close(&self) {
        if let Some(keeping) = self.keeping.take() {
            keeping.cancel().await;
        }
        let last = self.shared.state.replace(State::Disconnected(None));
        if let State::Connected(session) = last {
            session.close().await;
        }
    }
}

impl Shared {
    fn poll_session(&self, context: &Context<'_>) -> Poll<Session> {
        match &*self.state.borrow() {
            State::Connected(session) if session.end_reason().is_none() => {
                return Poll::Ready(session.clone());
            }
            State::Connected(_) | State::Disconnected(_) => {}
        }
        self.waiting.borrow_mut().push(context.waker().clone());
        Poll::Pending
    }

    fn why_not(&self) -> io::Error {
        let reason = match &*self.state.borrow() {
            State::Disconnected(Some(error)) => error.to_string(),
            State::Disconnected(None) | State::Connected(_) => "not yet connected".to_owned(),
        };
        let path = self.path.display();
        io::Error::new(io::ErrorKind::TimedOut, format!("no session with {path}: {reason}"))
    }

    fn set(&self, state: State) {
        // What it was before goes when nothing is borrowed any more.
        let before = self.state.replace(state);
        drop(before);
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        for waker in waiting {
            waker.wake();
        }
    }
}

async fn keep(shared: Rc<Shared>, connector: Connector) {
    let path = shared.path.display();
    let mut pauses = Pauses::default();
    let mut is_told = false;
    loop {
        match connector.connect(&shared.path).await {
            Ok(session) => {
                tell(format_args!("connected with {path}"));
                let since = Instant::now();
                shared.set(State::Connected(session.clone()));
                let reason = session.closed().await;
                tell(format_args!("the session with {path} has ended: {reason}"));
                shared.set(State::Disconnected(Some(reason)));
                // One that ends as soon as it is made is no reason to hurry.
                if since.elapsed() > *PAUSES.end() {
                    pauses = Pauses::default();
                }
                is_told = false;
            }
            Err(error) => {
                if !is_told {
                    tell(format_args!("no session with {path}: {error}"));
                }
                is_told = true;
                shared.set(State::Disconnected(Some(error)));
            }
        }
        glommio::timer::sleep(pauses.next()).await;
    }
}

/// Pauses that double up to the longest. Each is shortened by chance, by up to a half: clients that
/// lost the same server do not come back at the same moment.
struct Pauses {
    longest: Duration,
}

impl Default for Pauses {
    fn default() -> Self {
        Self { longest: *PAUSES.start() }
    }
}

impl Pauses {
    fn next(&mut self) -> Duration {
        let longest = self.longest;
        self.longest = (longest * 2).min(*PAUSES.end());
        // The keys of the standard library's maps are the randomness that is at hand.
        let chance = RandomState::new().build_hasher().finish() as u32;
        longest - longest.mul_f64(f64::from(chance) / f64::from(u32::MAX) / 2.0)
    }
}
