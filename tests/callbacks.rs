// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mistakes of the program itself, in what it passes in and how it calls: they cost one peer or one
//! stream, not the core.

use std::cell::Cell;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use futures_lite::future::zip;
use futures_lite::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use shmipc_glommio::{
    Client, Config, ConfigBuilder, Connector, Error, HandshakeError, Listener, Session,
};

use support::executor::{SocketPath, run, within};

mod support {
    pub(crate) mod executor;
}

const LIMIT: Duration = Duration::from_secs(60);

fn small() -> ConfigBuilder {
    Config::builder().container()
}

async fn pair(listener: &Listener, path: &SocketPath) -> (Session, Session) {
    let connector = Connector::new(small().build().unwrap());
    let (client, server) = zip(connector.connect(path.as_str()), listener.accept()).await;
    (client.unwrap(), server.unwrap())
}

#[test]
fn a_panic_in_authorize_or_on_refused_of_a_listener_costs_that_peer_only() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        // A place that were not given back would be missed at once.
        let config = small().max_handshakes(1).max_handshakes_per_user(1).build().unwrap();
        let listener = Listener::bind(path.as_str(), config).unwrap();
        let (asked, told) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
        let (by, to) = (Rc::clone(&asked), Rc::clone(&told));
        listener.authorize(move |_| {
            by.set(by.get() + 1);
            assert!(by.get() > 3, "who knows?");
            true
        });
        listener.on_rejected(move |error| {
            to.set(to.get() + 1);
            let is_due =
                matches!(error, Error::Handshake(HandshakeError::NotAuthorized { uid: Some(_) }));
            assert!(is_due, "{error}");
            panic!("what a pity");
        });
        let connector = Connector::new(small().build().unwrap());
        for _ in 0..3 {
            connector.connect(path.as_str()).await.unwrap_err();
        }
        let (client, server) = pair(&listener, &path).await;
        assert!(client.end_reason().is_none() && server.end_reason().is_none());
        assert_eq!((asked.get(), told.get()), (4, 3));
    });
}

/// Calls back when it is dropped.
struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[test]
fn a_callback_may_set_another_one_also_when_it_is_dropped() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let listener = Rc::new(Listener::bind(path.as_str(), small().build().unwrap()).unwrap());
        let again = Rc::downgrade(&listener);
        let setting = OnDrop(move || {
            if let Some(listener) = again.upgrade() {
                listener.authorize(|_| true);
                listener.on_rejected(|_| ());
            }
        });
        listener.authorize(move |_| {
            let _setting = &setting;
            false
        });
        listener.authorize(|_| true);
        pair(&listener, &path).await;
    });
}

#[test]
fn a_panic_in_on_change_ends_no_client() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let listener = Listener::bind(path.as_str(), small().build().unwrap()).unwrap();
        let changes = Rc::new(Cell::new(0));
        let count = Rc::clone(&changes);
        let client = Client::builder(path.as_str())
            .config(small().build().unwrap())
            .on_change(move |status| {
                count.set(count.get() + 1);
                panic!("{:?}", status.state);
            })
            .build()
            .unwrap();
        let (session, server) = zip(client.session(0), listener.accept()).await;
        assert!(session.unwrap().end_reason().is_none() && server.unwrap().end_reason().is_none());
        assert!(changes.get() >= 2);
        client.close().await.unwrap();
    });
}

#[test]
fn a_panic_in_what_makes_the_task_of_a_stream_costs_that_stream_only() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let listener = Listener::bind(path.as_str(), small().build().unwrap()).unwrap();
        let (client, server) = pair(&listener, &path).await;
        let counted = server.clone();
        let serving = glommio::spawn_local(async move {
            server
                .serve_streams(|mut stream| {
                    assert!(stream.id() != 2, "not this one");
                    async move {
                        let message = stream.recv().await?.unwrap();
                        stream.forward(message).await
                    }
                })
                .await
        });
        let mut first = client.open_stream().unwrap();
        first.write_all(b"x").await.unwrap();
        let mut second = client.open_stream().unwrap();
        second.write_all(b"hello").await.unwrap();
        let mut answer = [0; 5];
        second.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"hello");
        let error = first.read(&mut answer).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
        assert!(within(LIMIT, || counted.stats().panicked_streams == 1).await);
        client.close().await.unwrap();
        drop((first, second));
        assert!(matches!(serving.await, Error::PeerClosed));
    });
}

#[test]
fn consuming_more_than_was_lent_takes_all_of_that_and_no_more() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let listener = Listener::bind(path.as_str(), small().build().unwrap()).unwrap();
        let (client, server) = pair(&listener, &path).await;
        let mut near = client.open_stream().unwrap();
        near.write_all(b"first").await.unwrap();
        let mut far = server.accept().await.unwrap();
        for count in [6, 1 << 20, usize::MAX - 2, usize::MAX] {
            assert_eq!(far.fill_buf().await.unwrap(), b"first");
            Pin::new(&mut far).consume(2);
            assert_eq!(far.fill_buf().await.unwrap(), b"rst");
            Pin::new(&mut far).consume(count);
            assert_eq!(far.unread(), 0, "{count}");
            // Nothing is lent.
            Pin::new(&mut far).consume(count);
            near.write_all(b"second").await.unwrap();
            let mut bytes = [0; 6];
            far.read_exact(&mut bytes).await.unwrap();
            assert_eq!(&bytes, b"second", "{count}");
            near.write_all(b"first").await.unwrap();
        }
        assert_eq!(far.recv().await.unwrap().unwrap().into_bytes(), "first");
    });
}
