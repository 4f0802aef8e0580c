// SPDX-License-Identifier: MIT OR Apache-2.0
//! A small server for the key-value client to talk to: right, or wrong on purpose.

pub(crate) mod store;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use futures_lite::AsyncWriteExt;
use shmipc_glommio::{Config, Listener, Session, Stream};

use store::{Answering, Fault, Next, SharedStore};

/// What goes wrong, and at which request of a connection.
pub(crate) type Wrong = Option<(Fault, u64)>;

/// Whether a key belongs to a shard.
pub(crate) type IsMine = fn(&[u8]) -> bool;

/// Serves a Unix socket on threads, until the process ends.
pub(crate) fn unix(path: &Path, store: &SharedStore, wrong: Wrong) {
    let listener = UnixListener::bind(path).unwrap();
    let store = store.clone();
    thread::spawn(move || {
        while let Ok((socket, _)) = listener.accept() {
            let answering = Answering::new(store.clone(), wrong, |_| true);
            thread::spawn(move || serve_socket(&socket, &socket, answering));
        }
    });
}

/// Serves TCP on threads, until the process ends. Gives the address.
pub(crate) fn tcp(store: &SharedStore, wrong: Wrong) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let store = store.clone();
    thread::spawn(move || {
        while let Ok((socket, _)) = listener.accept() {
            socket.set_nodelay(true).unwrap();
            let answering = Answering::new(store.clone(), wrong, |_| true);
            thread::spawn(move || serve_socket(&socket, &socket, answering));
        }
    });
    address
}

/// Reads or writes, never both: it is for the client to see that this comes to an end.
fn serve_socket(mut reader: impl Read, mut writer: impl Write, mut answering: Answering) {
    let mut buffer = vec![0; 64 << 10];
    let mut answers = Vec::new();
    while let Ok(count @ 1..) = reader.read(&mut buffer) {
        let next = answering.take(&buffer[..count], &mut answers);
        if writer.write_all(&answers).is_err() || next == Next::Close {
            return;
        }
        answers.clear();
    }
}

/// Shards that serve sessions, all on one executor. Dropping it stops them.
pub(crate) struct Shards {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Shards {
    pub(crate) fn start(
        config: &Config,
        shards: Vec<(PathBuf, IsMine)>,
        store: &SharedStore,
        wrong: Wrong,
    ) -> Self {
        let (stop, stopped) = mpsc::channel();
        let (ready, is_ready) = mpsc::channel();
        let (config, store) = (config.clone(), store.clone());
        let thread = thread::spawn(move || {
            let executor = glommio::LocalExecutorBuilder::default().make().unwrap();
            executor.run(async move {
                let mut serving = Vec::new();
                for (path, is_mine) in shards {
                    let listener = Listener::bind(path, config.clone()).unwrap();
                    let store = store.clone();
                    let answering = move || Answering::new(store.clone(), wrong, is_mine);
                    serving.push(glommio::spawn_local(accept(listener, answering)));
                }
                ready.send(()).unwrap();
                while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                    glommio::timer::sleep(Duration::from_millis(5)).await;
                }
                for task in serving {
                    // Takes the listener along, and with it the socket.
                    task.cancel().await;
                }
            });
        });
        is_ready.recv().unwrap();
        Self { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Shards {
    fn drop(&mut self) {
        drop(self.stop.take());
        let result = self.thread.take().unwrap().join();
        if !thread::panicking() {
            result.unwrap();
        }
    }
}

async fn accept(listener: Listener, answering: impl Fn() -> Answering + Clone + 'static) {
    while let Ok(session) = listener.accept().await {
        glommio::spawn_local(serve_session(session, answering.clone())).detach();
    }
}

async fn serve_session(session: Session, answering: impl Fn() -> Answering) {
    while let Ok(stream) = session.accept().await {
        glommio::spawn_local(serve_stream(stream, answering())).detach();
    }
}

/// Reads or writes, never both, as on a socket.
async fn serve_stream(mut stream: Stream, mut answering: Answering) {
    let mut buffer = vec![0; 64 << 10];
    let mut answers = Vec::new();
    while let Ok(Some(mut message)) = stream.recv().await {
        while !message.is_empty() {
            let count = message.read(&mut buffer);
            let next = answering.take(&buffer[..count], &mut answers);
            if stream.write_all(&answers).await.is_err() || next == Next::Close {
                return;
            }
            answers.clear();
        }
    }
}
