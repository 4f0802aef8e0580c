// SPDX-License-Identifier: MIT OR Apache-2.0
//! Clients of version 4 with servers that take no more than version 3 or 2, and the other way
//! round. What servers say that are none of this crate is in `tests/hostile_peer.rs`.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use futures_lite::future::zip;
use shmipc_glommio::{
    Config, ConfigBuilder, Connector, Error, HandshakeError, Listener, MemoryKind, ProtocolVersion,
    Session, Wakeup,
};

use super::pair::{KINDS, answer, ask, config};
use crate::support::executor::{SocketPath, run, within};
use crate::{LIMIT, SOON, turn};

/// A listener that counts who comes, and keeps why it let them go.
struct Counted {
    path: SocketPath,
    listener: Listener,
    connections: Rc<Cell<usize>>,
    refused: Rc<RefCell<Vec<Error>>>,
}

impl Counted {
    fn new(accepted: ProtocolVersion) -> Self {
        let path = SocketPath::new();
        let config = Config::builder().max_accepted_protocol(accepted).build().unwrap();
        let listener = Listener::bind(path.as_str(), config).unwrap();
        let (connections, refused) = (Rc::new(Cell::new(0)), Rc::new(RefCell::default()));
        let counter = Rc::clone(&connections);
        listener.authorize(move |_| {
            counter.set(counter.get() + 1);
            true
        });
        let keeper: Rc<RefCell<Vec<Error>>> = Rc::clone(&refused);
        listener.on_rejected(move |error| keeper.borrow_mut().push(error.clone()));
        Self { path, listener, connections, refused }
    }

    async fn connect(&self, client: ConfigBuilder) -> (Session, Session) {
        let connector = Connector::new(client.build().unwrap());
        let connecting = connector.connect(self.path.as_str());
        let (client, server) = zip(connecting, self.listener.accept()).await;
        (client.unwrap(), server.unwrap())
    }
}

async fn talk(client: &Session, server: &Session) {
    const LENGTHS: [usize; 4] = [1, 8173, 100_000, 1 << 20];
    let mut near = client.open_stream().unwrap();
    let answering = async {
        let mut far = server.accept().await.unwrap();
        answer(&mut far, &LENGTHS).await;
    };
    zip(ask(&mut near, &LENGTHS), answering).await;
    drop(near);
    assert!(within(SOON, || client.pool_usage().is_full() && server.pool_usage().is_full()).await);
}

#[test]
fn a_client_falls_back_on_a_second_connection() {
    let _turn = turn();
    run(LIMIT, || async {
        for kind in KINDS {
            let at = Counted::new(ProtocolVersion::V3);
            let (client, server) = at.connect(config(kind).allow_v3_fallback(true)).await;
            for session in [&client, &server] {
                let is = (session.protocol(), session.wakeup(), session.has_single_popper_lists());
                assert_eq!(is, (ProtocolVersion::V3, Wakeup::Socket, false), "{kind:?}");
                assert_eq!(session.shard(), None);
            }
            assert_eq!(at.connections.get(), 2);
            let refused = at.refused.take();
            let due = HandshakeError::NoCommonVersion { peer: 4, needed: 3 };
            assert!(matches!(&refused[..], [Error::Handshake(error)] if *error == due));
            talk(&client, &server).await;
        }
    });
}

#[test]
fn a_client_that_must_not_fall_back_says_why_it_has_no_session() {
    let _turn = turn();
    run(LIMIT, || async {
        for kind in KINDS {
            for accepted in [ProtocolVersion::V3, ProtocolVersion::V2] {
                let at = Counted::new(accepted);
                let connector =
                    Connector::new(config(kind).allow_v3_fallback(false).build().unwrap());
                let error = connector.connect(at.path.as_str()).await.unwrap_err();
                let Error::Handshake(error) = error else { panic!("{error}") };
                let is_named = matches!(error, HandshakeError::Version4Unanswered { .. });
                assert!(is_named && error.to_string().contains("`allow_v3_fallback`"), "{error}");
                assert_eq!(at.connections.get(), 1);
            }
        }
    });
}

/// Version 2 is no fallback: who wants it asks for it. A server that takes nothing else is tried
/// twice, and not more.
#[test]
fn a_client_does_not_fall_back_further_than_to_version_3() {
    let _turn = turn();
    run(LIMIT, || async {
        for kind in KINDS {
            let at = Counted::new(ProtocolVersion::V2);
            let connector = Connector::new(config(kind).allow_v3_fallback(true).build().unwrap());
            let error = connector.connect(at.path.as_str()).await.unwrap_err();
            let Error::Handshake(error) = error else { panic!("{error}") };
            assert_eq!(error, HandshakeError::Closed { waiting_for: "ExchangeMetadata" });
            assert_eq!(at.connections.get(), 2);
        }
    });
}

#[test]
fn a_server_takes_all_versions_on_one_socket() {
    let _turn = turn();
    run(LIMIT, || async {
        let at = Counted::new(ProtocolVersion::V4);
        let plain = |memory, protocol| {
            Config::builder().memory(memory).protocol(protocol).buffer_size(8 << 20)
        };
        let mut clients = vec![
            (plain(MemoryKind::File, ProtocolVersion::V2), ProtocolVersion::V2),
            (plain(MemoryKind::File, ProtocolVersion::V3), ProtocolVersion::V3),
            (plain(MemoryKind::Memfd, ProtocolVersion::V3), ProtocolVersion::V3),
        ];
        clients.extend(KINDS.map(|kind| (config(kind), ProtocolVersion::V4)));
        let count = clients.len();
        let mut sessions = Vec::new();
        for (client, version) in clients {
            let (client, server) = at.connect(client).await;
            assert_eq!((client.protocol(), server.protocol()), (version, version));
            sessions.push((client, server));
        }
        // All of them at the same time.
        let talks: Vec<_> = sessions
            .into_iter()
            .map(|(client, server)| {
                glommio::spawn_local(async move { talk(&client, &server).await })
            })
            .collect();
        for one in talks {
            one.await;
        }
        assert_eq!((at.connections.get(), at.refused.borrow().len()), (count, 0));
    });
}

/// An attempt that failed by itself, and not by the connection, is not made again.
#[test]
fn nobody_there_is_no_reason_to_fall_back() {
    let _turn = turn();
    run(LIMIT, || async {
        let path = SocketPath::new();
        let connector = Connector::new(config(KINDS[0]).allow_v3_fallback(true).build().unwrap());
        let error = connector.connect(path.as_str()).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error}");
    });
}
