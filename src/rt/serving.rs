// SPDX-License-Identifier: MIT OR Apache-2.0
//! A task for each stream of a session.

use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::sync::Arc;

use futures_lite::FutureExt;

use super::callback;
use super::own_core::counting_foreign_wakes;
use super::session::{Session, SessionInner};
use super::shard::panic_text;
use super::stream::Stream;
use super::tasks::TaskSet;
use crate::error::Error;

impl Session {
    /// Accepts every stream that the peer opens and serves each in a task of its own, until the
    /// session is over and all the tasks have ended. Gives the reason of the session's end.
    ///
    /// What a stream's task gives is not looked at: an error of one stream is no error of the
    /// session. Nor is a panic, which closes the stream, and is
    /// [counted](crate::SessionStats::panicked_streams).
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
        S: Future + 'static,
    {
        let tasks = TaskSet::default();
        let reason = loop {
            match self.accept().await {
                Ok(stream) => {
                    let foreign_wakes = Arc::clone(&self.inner().counters.cross_core_wakes);
                    // What makes the task of a stream is a part of it, also when it panics.
                    let Some(serving) = callback::call("serve_streams", || serve(stream)) else {
                        self.inner().counters.panicked_streams.add(1);
                        continue;
                    };
                    let serving = serve_one(serving, Rc::clone(self.inner()));
                    tasks.spawn(counting_foreign_wakes(serving, foreign_wakes));
                }
                Err(reason) => break reason,
            }
        };
        tasks.all_ended().await;
        reason
    }
}

/// Serves a stream, which is the only one that a panic of this closes.
async fn serve_one(serving: impl Future, session: Rc<SessionInner>) {
    if let Err(panic) = AssertUnwindSafe(serving).catch_unwind().await {
        session.counters.panicked_streams.add(1);
        tracing::error!(text = panic_text(&*panic), "the task of a stream panicked");
    }
}
