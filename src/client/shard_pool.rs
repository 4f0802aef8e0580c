// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sessions that a client keeps to one shard.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use crate::client::builder::Settings;
use crate::client::reconnect::{ReconnectingSession, SessionStatus};
use crate::exec::task_set::TaskSet;
use crate::exec::wakers::WakerList;
use crate::session::handle::Session;
use shmipc_core::error::{Error, Result};

/// A shard's places for sessions, and the tasks that fill them. Dropped, the tasks end.
pub(crate) struct ShardPool {
    places: Vec<Rc<ReconnectingSession>>,
    pub(crate) waiting: Rc<WakerList>,
    pub(crate) tasks: TaskSet,
    /// Which session comes first among equals.
    turn: Cell<usize>,
    /// Why there will be none.
    ended: Cell<Option<Ended>>,
}

/// Why a client has no sessions to a shard any more.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Ended {
    /// The server has so many shards now, and this is none of them.
    HasOnly(usize),
    /// The client was closed.
    Closed,
}

impl Ended {
    pub(crate) fn error(self, index: usize) -> Error {
        match self {
            Self::HasOnly(count) => Error::NoSuchShard { index, count },
            Self::Closed => Error::SessionClosed,
        }
    }
}

pub(crate) enum Pick<T> {
    Taken(Rc<ReconnectingSession>, T),
    /// There are sessions, and none gives it.
    Refused(Error),
    /// There is no session.
    Nothing,
}

impl ShardPool {
    pub(crate) fn new(index: usize, settings: &Settings) -> Self {
        let kept = |number| {
            let tell = settings.on_change.clone();
            Rc::new(ReconnectingSession::new(index, number, settings.idle_streams, tell))
        };
        Self {
            places: (0..settings.sessions).map(kept).collect(),
            waiting: Rc::default(),
            tasks: TaskSet::default(),
            turn: Cell::new(0),
            ended: Cell::new(None),
        }
    }

    pub(crate) fn places(&self) -> &[Rc<ReconnectingSession>] {
        &self.places
    }

    pub(crate) fn ended(&self) -> Option<Ended> {
        self.ended.get()
    }

    /// No more attempts are made, and whoever waits for a session gets to know.
    pub(crate) fn end(&self, why: Ended) {
        self.ended.set(Some(why));
        self.waiting.wake_all();
    }

    /// Ends the tasks. Gives the sessions that there are.
    pub(crate) async fn dismantle(&self) -> Vec<Session> {
        self.tasks.cancel().await;
        self.places.iter().filter_map(|kept| kept.give_up()).collect()
    }

    pub(crate) fn status(&self) -> impl Iterator<Item = SessionStatus> {
        self.places.iter().map(|kept| kept.status())
    }

    /// Why the last session ended, or could not be made, if that is known of any.
    pub(crate) fn error(&self) -> Option<Error> {
        self.places.iter().find_map(|kept| kept.error())
    }

    /// Why nothing comes to wait for: every attempt has failed by something that is not worth a
    /// retry. When that was long enough ago, it is tried again, and there is something to wait for.
    pub(crate) fn failure(&self) -> Option<Error> {
        let failures: Option<Vec<_>> = self.places.iter().map(|kept| kept.failure()).collect();
        let failures = failures?;
        let now = Instant::now();
        if failures.iter().any(|(retry_after, _)| now >= *retry_after) {
            self.places.iter().for_each(|kept| kept.ask_again());
            return None;
        }
        failures.into_iter().next().map(|(_, error)| error)
    }

    /// Takes something from the session with the fewest streams in use that gives it.
    pub(crate) fn pick<T>(
        &self,
        take: impl Fn(&ReconnectingSession, &Session) -> Result<T>,
    ) -> Pick<T> {
        let count = self.places.len();
        let turn = self.turn.get();
        let in_turn = (0..count).map(|at| &self.places[(turn + at) % count]);
        let mut up: Vec<_> = in_turn.filter_map(|kept| Some((kept, kept.session()?))).collect();
        // Stable: of equals, the next in turn.
        up.sort_by_key(|(kept, session)| kept.busy_streams(session));
        let mut refused = None;
        for (kept, session) in up {
            match take(kept, &session) {
                Ok(taken) => {
                    self.turn.set((turn + 1) % count);
                    return Pick::Taken(Rc::clone(kept), taken);
                }
                Err(error @ Error::TooManyStreams(_)) => refused = Some(error),
                // It ended a moment ago; its task knows by now.
                Err(_) => {}
            }
        }
        refused.map_or(Pick::Nothing, Pick::Refused)
    }
}
