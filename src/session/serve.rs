// SPDX-License-Identifier: MIT OR Apache-2.0
//! A task for each stream of a session.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use crate::exec::callback;
use crate::exec::contain::panic_text;
use crate::exec::log_limit::LogLimit;
use crate::exec::task_set::TaskSet;
use crate::exec::wake_audit::counting_foreign_wakes;
use crate::session::handle::Session;
use crate::session::state::{SessionInner, StreamInner};
use crate::session::stream::Stream;
use crate::session::supervised::{Of, StreamOutcome, supervised};
use crate::session::supervision::ServedBy;
use shmipc_core::error::Error;

impl Session {
    /// Accepts every stream that the peer opens and serves each in a task of its own, until the
    /// session is over and all the tasks have ended. Returns why the session ended.
    ///
    /// A task that fails or panics ends its stream only: it is [reset](Stream::reset), so that a
    /// peer of this crate reads [`Error::StreamReset`] behind what it got, and not a clean end. It
    /// is [counted](crate::SessionStats::failed_streams), and logged as a warning, at most once a
    /// second on each core. A stream is reset, too, when its task is dropped before it has ended.
    /// One that the task has [closed](Stream::close) itself, or dropped before it went on to
    /// something else, is closed.
    ///
    /// When the future is dropped, so are its tasks, as soon as each waits for something.
    ///
    /// ```
    /// use futures_lite::io;
    /// use shmipc_glommio::{Config, Connector, Error, Listener};
    ///
    /// # let path = std::env::temp_dir().join(format!("shmipc-doc-serve-{}", std::process::id()));
    /// # glommio::LocalExecutorBuilder::default().spawn(|| async move {
    /// # let listener = Listener::bind(&path, Config::default())?;
    /// let server = glommio::spawn_local(async move {
    ///     let session = listener.accept().await?;
    ///     let reason = session
    ///         .serve_streams(|stream| async {
    ///             let (reader, writer) = stream.split();
    ///             io::copy(reader, writer).await
    ///         })
    ///         .await;
    ///     assert!(matches!(reason, Error::PeerClosed));
    ///     Ok::<_, Error>(())
    /// });
    /// # let session = Connector::new(Config::default()).connect(&path).await?;
    /// # let mut stream = session.open_stream()?;
    /// # let mut loan = stream.alloc(5).await?;
    /// # loan.write(b"hello");
    /// # stream.send(loan).await?;
    /// # assert_eq!(stream.recv().await?.unwrap().into_bytes(), "hello");
    /// # drop((stream, session));
    /// # server.await?;
    /// # shmipc_glommio::Result::<()>::Ok(()) }).unwrap().join().unwrap().unwrap();
    /// ```
    pub async fn serve_streams<F, S>(&self, serve: F) -> Error
    where
        F: Fn(Stream) -> S,
        S: Future<Output: StreamOutcome> + 'static,
    {
        let tasks = TaskSet::default();
        let reason = loop {
            match self.accept().await {
                Ok(stream) => {
                    let session = Rc::clone(self.inner());
                    let foreign_wakes = Arc::clone(&session.counters.cross_core_wakes);
                    let inner = Rc::clone(stream.inner());
                    // What makes the task of a stream is a part of it, also when it panics.
                    let Some(serving) = callback::call("serve_streams", || serve(stream)) else {
                        session.counters.panicked_streams.add(1);
                        continue;
                    };
                    let serving = serve_one(serving, inner, session);
                    tasks.spawn(counting_foreign_wakes(serving, foreign_wakes));
                }
                Err(reason) => break reason,
            }
        };
        tasks.all_ended().await;
        reason
    }
}

/// Serves a stream, which is the only one that a failure or a panic of this ends.
async fn serve_one(
    serving: impl Future<Output: StreamOutcome>,
    stream: Rc<StreamInner>,
    session: Rc<SessionInner>,
) {
    let has_failed = |outcome: &_| StreamOutcome::failure(outcome).is_some();
    match supervised(&session, Of::Stream(&stream), has_failed, serving).await {
        Ok(outcome) => {
            if let Some(error) = outcome.failure() {
                session.counters.failed_streams.add(1);
                if let Some(served_by) = session.supervision.served_by.get() {
                    served_by.record_failed_stream();
                }
                log_failure(&session, Some(stream.id()), error);
            }
        }
        Err(panic) => {
            session.counters.panicked_streams.add(1);
            let Labels { shard, number: session, uid, pid } = labels(&session);
            let (text, stream) = (panic_text(&*panic), stream.id());
            tracing::error!(shard, session, uid, pid, stream, text, "a handler panicked");
        }
    }
}

/// By what a session is known in the log.
struct Labels {
    shard: Option<usize>,
    number: Option<u64>,
    uid: Option<u32>,
    pid: Option<u32>,
}

fn labels(session: &SessionInner) -> Labels {
    let served_by = session.supervision.served_by.get();
    let peer = session.peer;
    Labels {
        shard: served_by.map(ServedBy::shard),
        number: served_by.map(ServedBy::session),
        uid: peer.uid,
        pid: peer.pid,
    }
}

/// Logs that the handler of a session, or of one of its streams, failed. A peer can have them fail
/// as often as it likes, so this is told at most once a second.
#[cold]
pub(crate) fn log_failure(session: &SessionInner, stream: Option<u32>, error: &dyn fmt::Display) {
    thread_local! {
        static FAILURES: RefCell<LogLimit> = const { RefCell::new(LogLimit::new()) };
    }
    let turn = FAILURES.with_borrow_mut(|limit| limit.turn(Instant::now()));
    let Some(untold) = turn else { return };
    let Labels { shard, number: session, uid, pid } = labels(session);
    tracing::warn!(shard, session, uid, pid, stream, %error, untold, "a handler failed");
}
