// SPDX-License-Identifier: MIT OR Apache-2.0
//! The handle that users have on a session.

use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::exec::wake_audit::counting_foreign_wakes;
use crate::net::credentials::PeerCredentials;
use crate::session::established::Established;
use crate::session::guard::SessionGuard;
use crate::session::receive;
use crate::session::state::SessionInner;
use crate::session::stream::Stream;
use crate::stats::{PoolUsage, SessionStats};
use shmipc_core::config::{Config, ProtocolVersion, Wakeup};
use shmipc_core::error::{Error, Result};
use shmipc_core::proto::session::ending::DrainPhase;
use shmipc_core::wire::ShardIdentity;

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
        let inner = SessionInner::new(established, config);
        let pool = &inner.memory.pool;
        pool.trust(trust);
        let session = Rc::downgrade(&inner);
        pool.on_broken(move || {
            // Its turn with the reactor finds out what it is.
            if let Some(session) = session.upgrade() {
                session.activate();
            }
        });
        inner.reactor.demand(config.settings().reactor_interval);
        let foreign_wakes = Arc::clone(&inner.counters.cross_core_wakes);
        let reading = receive::read_socket(Rc::clone(&inner));
        inner.reactor.spawn(counting_foreign_wakes(reading, foreign_wakes));
        inner.listen_at_doorbell();
        inner.reactor.watch(&inner);
        // Events may be there already: a client of version 2 does not wait for an answer.
        inner.activate();
        inner.proto.announce_server(&inner);
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
        let stream = inner.proto.open_stream(inner)?;
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
        let accepted = || match inner.proto.accept_stream() {
            Ok(None) => Poll::Pending,
            Ok(Some(stream)) => Poll::Ready(Ok(stream)),
            Err(error) => Poll::Ready(Err(error)),
        };
        let stream = inner.waiters.accept.until(accepted).await?;
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

    /// Takes no more streams than have come by now.
    pub(crate) fn begin_drain(&self) {
        self.inner().proto.stop_accepting(self.inner());
    }

    /// Lets streams end whose turn it is. Whether nothing is left: no stream, and nothing that
    /// waits for the socket.
    pub(crate) fn drain_streams(&self, phase: DrainPhase) -> bool {
        let inner = self.inner();
        let is_without_streams = inner.proto.drain_streams(inner, phase);
        is_without_streams && inner.socket.outbox.is_empty()
    }

    /// Whether the program has a stream in hand, or half of one.
    pub(crate) fn has_streams_in_hand(&self) -> bool {
        self.inner().proto.has_streams_in_hand()
    }

    /// The protocol version that both sides agreed on.
    pub fn protocol(&self) -> ProtocolVersion {
        self.inner().proto.negotiated().version
    }

    /// How the sides wake each other.
    pub fn wakeup(&self) -> Wakeup {
        self.inner().proto.negotiated().wakeup
    }

    /// Whether each side takes slices from lists that are its own
    /// (see [`owned_free_lists`](crate::ConfigBuilder::owned_free_lists)).
    pub fn has_single_popper_lists(&self) -> bool {
        self.inner().proto.negotiated().owned_free_lists
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
        self.inner().proto.negotiated().shard
    }

    /// Who is at the other end.
    pub fn peer(&self) -> PeerCredentials {
        self.inner().peer
    }

    /// How many streams are open.
    pub fn stream_count(&self) -> usize {
        self.inner().proto.stream_count()
    }

    /// The session's counters at this moment.
    pub fn stats(&self) -> SessionStats {
        self.inner().counters.get()
    }

    /// How many slices of the buffer memory are free at this moment.
    pub fn pool_usage(&self) -> PoolUsage {
        let pool = &self.inner().memory.pool;
        PoolUsage { lists: pool.usage(), held: pool.held() }
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

#[cfg(test)]
mod tests {
    use futures_lite::future::zip;
    use glommio::LocalExecutorBuilder;

    use crate::{Config, Connector, Listener};

    /// What is sent for no stream would be taken for data of that one.
    #[test]
    fn a_session_that_has_had_all_stream_numbers_goes_on_and_has_no_stream_0() {
        let test = async {
            let name = format!("shmipc-wrapping-{}", std::process::id());
            let path = std::env::temp_dir().join(name);
            let config = Config::builder().container().build().unwrap();
            let listener = Listener::bind(&path, config.clone()).unwrap();
            let connector = Connector::new(config);
            let (client, server) = zip(connector.connect(&path), listener.accept()).await;
            let (client, server) = (client.unwrap(), server.unwrap());
            let mut open = Vec::new();
            for start in [None, Some(u32::MAX / 2), Some(u32::MAX - 1)] {
                if let Some(start) = start {
                    client.inner().proto.skip_to_stream(start);
                }
                for _ in 0..6 {
                    let mut near = client.open_stream().unwrap();
                    let text = near.id().to_string();
                    for _ in 0..2 {
                        let mut loan = near.alloc(text.len()).await.unwrap();
                        loan.write(text.as_bytes());
                        near.send(loan).await.unwrap();
                    }
                    let mut far = server.accept().await.unwrap();
                    assert_eq!(far.id(), near.id());
                    for _ in 0..2 {
                        let message = far.recv().await.unwrap().unwrap();
                        assert_eq!(message.into_bytes(), text);
                    }
                    open.push((near, far));
                }
            }
            let ids: Vec<_> = open.iter().map(|(near, _)| near.id()).collect();
            assert_eq!(ids[..6], [2, 3, 4, 5, 6, 7]);
            assert_eq!(ids[12..], [u32::MAX - 1, u32::MAX, 1, 8, 9, 10], "not 0, nor one in use");
            assert!(client.end_reason().is_none() && server.end_reason().is_none());
        };
        LocalExecutorBuilder::default().make().unwrap().run(test);
    }
}
