// SPDX-License-Identifier: MIT OR Apache-2.0
//! A task for each stream of a session.

use std::cell::Cell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

use super::session::Session;
use super::stream::Stream;
use super::wakers::WakerList;
use crate::error::Error;

/// The tasks that serve streams.
#[derive(Default)]
struct Tasks {
    running: Cell<usize>,
    ended: WakerList,
}

/// Counts for one task, until it ends, or is dropped with its executor, or panics.
struct Running(Rc<Tasks>);

impl Running {
    fn new(tasks: &Rc<Tasks>) -> Self {
        tasks.running.set(tasks.running.get() + 1);
        Self(Rc::clone(tasks))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.set(self.0.running.get() - 1);
        if self.0.running.get() == 0 {
            self.0.ended.wake_all();
        }
    }
}

impl Session {
    /// Accepts every stream that the peer opens and serves each in a task of its own, until the
    /// session is over and all the tasks have ended. Gives the reason of the session's end.
    ///
    /// What a stream's task gives is not looked at: an error of one stream is no error of the
    /// session. A panic of one ends the executor, as a panic of any task does.
    ///
    /// When the future is dropped, no more streams are accepted by it. Its tasks go on.
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
        let tasks = Rc::new(Tasks::default());
        let reason = loop {
            match self.accept().await {
                Ok(stream) => {
                    let serving = serve(stream);
                    let running = Running::new(&tasks);
                    glommio::spawn_local(async move {
                        serving.await;
                        drop(running);
                    })
                    .detach();
                }
                Err(reason) => break reason,
            }
        };
        poll_fn(|context| {
            if tasks.running.get() == 0 {
                return Poll::Ready(());
            }
            tasks.ended.register(context, None);
            Poll::Pending
        })
        .await;
        reason
    }
}
