// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a [`Client`] is to be.

use std::fmt;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use crate::client::Client;
use crate::client::backoff::Backoff;
use crate::client::reconnect::{OnChange, SessionStatus};
use crate::connect::connector::Connector;
use shmipc_core::config::Config;
use shmipc_core::error::{ConfigError, Result};
use shmipc_core::shm::map::trust::PeerTrust;

/// The most sessions that one core keeps to one shard.
const MOST_SESSIONS: usize = 64;
/// Clocks do not reach as far as the longest durations.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// Says how a [`Client`] is to be.
///
/// ```
/// use std::time::Duration;
/// use shmipc_glommio::{Client, Config};
///
/// # glommio::LocalExecutorBuilder::default().spawn(|| async {
/// let client = Client::builder("/run/store.sock")
///     .config(Config::builder().small_messages().build()?)
///     .sessions_per_shard(2)
///     .backoff(Duration::from_millis(10), Duration::from_secs(1))
///     .acquire_timeout(Duration::from_secs(3))
///     .max_idle_streams(16)
///     .build()?;
/// # drop(client);
/// # shmipc_glommio::Result::<()>::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
#[must_use]
pub struct ClientBuilder {
    path: PathBuf,
    config: Config,
    trust: Option<PeerTrust>,
    settings: Settings,
}

/// What the sessions of a client have in common.
pub(crate) struct Settings {
    pub(crate) sessions: usize,
    pub(crate) idle_streams: usize,
    pub(crate) backoff: Backoff,
    pub(crate) patience: Duration,
    pub(crate) on_change: Option<OnChange>,
}

impl ClientBuilder {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self {
            path,
            config: Config::default(),
            trust: None,
            settings: Settings {
                sessions: 1,
                idle_streams: 64,
                backoff: Backoff { first: Duration::from_millis(5), most: Duration::from_secs(2) },
                patience: Duration::from_secs(5),
                on_change: None,
            },
        }
    }

    /// The configuration of the sessions. Default: [`Config::default`].
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// How many sessions are kept to each shard that is asked for, from 1 to 64. Default: one,
    /// which carries tens of thousands of streams; more give more buffer memory and queues.
    pub fn sessions_per_shard(mut self, sessions: usize) -> Self {
        self.settings.sessions = sessions;
        self
    }

    /// Between attempts to connect a random time passes, `first` at most after the first failure,
    /// twice as much after each further one, up to `most`. Default: 5 ms and 2 s.
    ///
    /// A session that lived for less than `most` counts as a failure too. What is not [worth a
    /// retry](crate::Error::is_retryable) is not tried again by itself, but when someone asks for a
    /// session `most` later, or after that.
    pub fn backoff(mut self, first: Duration, most: Duration) -> Self {
        self.settings.backoff = Backoff { first: first.min(LONGEST), most: most.min(LONGEST) };
        self
    }

    /// How long a caller waits for a session while there is none. Default: five seconds.
    pub fn acquire_timeout(mut self, patience: Duration) -> Self {
        self.settings.patience = patience.min(LONGEST);
        self
    }

    /// How many streams of a session are kept for reuse at most. Default: 64.
    pub fn max_idle_streams(mut self, streams: usize) -> Self {
        self.settings.idle_streams = streams;
        self
    }

    /// Says that the promise behind this token speaks for the server.
    pub fn trust_peer(mut self, trust: &PeerTrust) -> Self {
        self.trust = Some(*trust);
        self
    }

    /// Calls `tell` whenever the state of a session changes, with how it stands now. May use the
    /// client.
    pub fn on_change(mut self, tell: impl Fn(&SessionStatus) + 'static) -> Self {
        self.settings.on_change = Some(Rc::new(tell));
        self
    }

    /// Makes the client. It connects when it is first asked for something.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Limit`], when there would be no session, or too many, or when `first` is
    /// zero or more than `most`.
    pub fn build(self) -> Result<Client> {
        let Self { path, config, trust, settings } = self;
        let out_of_range = |what, value, problem| Err(ConfigError::Limit { what, value, problem });
        if !(1..=MOST_SESSIONS).contains(&settings.sessions) {
            out_of_range("sessions_per_shard", settings.sessions as u64, "not from 1 to 64")?;
        }
        let Backoff { first, most } = settings.backoff;
        if first.is_zero() || first > most {
            let first = u64::try_from(first.as_micros()).unwrap_or(u64::MAX);
            out_of_range("first back-off in microseconds", first, "zero, or more than the most")?;
        }
        let mut connector = Connector::new(config);
        if let Some(trust) = trust {
            connector = connector.trust_peer(&trust);
        }
        Ok(Client::new(path.into(), connector, settings))
    }
}

impl fmt::Debug for ClientBuilder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("ClientBuilder")
            .field("path", &self.path)
            .field("sessions_per_shard", &self.settings.sessions)
            .field("backoff", &self.settings.backoff)
            .field("patience", &self.settings.patience)
            .finish_non_exhaustive()
    }
}
