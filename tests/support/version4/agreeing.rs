// SPDX-License-Identifier: MIT OR Apache-2.0
//! What two sides agree on, and what neither can be asked for.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use futures_lite::future::zip;
use shmipc_glommio::wire::{
    Features, Header, MAX_NEGOTIATION_LEN, Message, NegotiationRequest, NegotiationResponse,
};
use shmipc_glommio::{
    Config, ConfigBuilder, ConfigError, Connector, Error, HandshakeError, ListOwner, Listener,
    MemoryKind, ProtocolVersion, SliceClass, Wakeup,
};

use super::pair::{INTERVAL, KINDS, Pair, config, exchange};
use crate::support::executor::{SocketPath, run};
use crate::{LIMIT, SOON, turn};

#[test]
fn both_sides_have_to_want_lists_of_their_own() {
    let _turn = turn();
    run(LIMIT, || async {
        for kind in KINDS {
            for (client, server) in [(true, true), (true, false), (false, true), (false, false)] {
                let with = |wants| config(kind).owned_free_lists(wants);
                let pair = Pair::new(with(client), with(server)).await;
                assert_eq!(pair.client.has_single_popper_lists(), client && server);
                exchange(&pair, &[100, 100_000, 1 << 20]).await;
                pair.nothing_is_missing().await;
                let owners = |session: &shmipc_glommio::Session| -> Vec<ListOwner> {
                    session.pool_usage().lists.iter().map(|list| list.owner).collect()
                };
                let (own, peer, shared) = (ListOwner::Own, ListOwner::Peer, ListOwner::Shared);
                let [near, far] = [&pair.client, &pair.server].map(owners);
                match client && server {
                    true => {
                        assert_eq!(near, [own, own, own, peer, peer, peer]);
                        assert_eq!(far, [peer, peer, peer, own, own, own]);
                    }
                    false => assert_eq!([near, far], [[shared; 3], [shared; 3]]),
                }
                pair.end().await;
            }
        }
    });
}

#[test]
fn lists_that_could_hand_out_nothing_are_not_offered() {
    /// As many bytes as hold so many slices of one class, its share in two lists.
    fn two_lists(slices: u64) -> u64 {
        8 + 2 * 36 + slices * 1024
    }
    let _turn = turn();
    run(LIMIT, || async {
        let single = |bytes| {
            let classes = [SliceClass::new(1024 - 20, 100)];
            config(KINDS[0]).buffer_size(bytes).slice_classes(classes)
        };
        // The default's largest slices are 20 per cent, of 128 KiB each.
        let default = |bytes| config(KINDS[0]).buffer_size(bytes);
        let cases: [(ConfigBuilder, bool); 7] = [
            (single(two_lists(4)), true),
            (single(two_lists(4) - 1), false),
            (single(two_lists(3)), false),
            (single(two_lists(2)), false),
            (default(1 << 20), false),
            (default(2 << 20), false),
            (default(3 << 20), true),
        ];
        for (number, (config, is_offered)) in cases.into_iter().enumerate() {
            let pair = Pair::new(config.clone(), config).await;
            let has = pair.client.has_single_popper_lists();
            assert_eq!(has, is_offered, "case {number}");
            assert_eq!(pair.client.protocol(), ProtocolVersion::V4);
            exchange(&pair, &[1, 1000, 5000, 300_000]).await;
            pair.nothing_is_missing().await;
            pair.end().await;
        }
    });
}

#[test]
fn what_no_session_can_have_is_an_error_of_the_configuration() {
    use MemoryKind::{File, Memfd};
    use ProtocolVersion::{V2, V3, V4};
    let built = |memory, protocol, wakeup| {
        let builder = Config::builder().memory(memory).protocol(protocol).wakeup(wakeup);
        builder.build().map(|config| assert_eq!(config.wakeup(), wakeup))
    };
    let polling = Wakeup::Polling(INTERVAL);
    for (protocol, memory) in [(V2, File), (V3, File), (V3, Memfd)] {
        assert_eq!(built(memory, protocol, Wakeup::Socket), Ok(()));
        for wakeup in [Wakeup::EventFd, polling] {
            let error = built(memory, protocol, wakeup);
            assert_eq!(error, Err(ConfigError::WakeupNeedsVersion4), "{protocol:?}, {wakeup:?}");
        }
    }
    assert_eq!(built(File, V4, Wakeup::EventFd), Err(ConfigError::EventFdNeedsMemfd));
    for (memory, wakeup) in KINDS {
        assert_eq!(built(memory, V4, wakeup), Ok(()));
    }
    let shortest = Wakeup::SHORTEST_INTERVAL;
    let longest = Wakeup::LONGEST_INTERVAL;
    let nano = Duration::from_nanos(1);
    assert_eq!((shortest, longest), (Duration::from_micros(50), Duration::from_secs(1)));
    for interval in [shortest, longest] {
        assert_eq!(built(Memfd, V4, Wakeup::Polling(interval)), Ok(()));
    }
    for interval in [Duration::ZERO, nano, shortest - nano, longest + nano, Duration::MAX] {
        let error = built(Memfd, V4, Wakeup::Polling(interval)).unwrap_err();
        assert!(error.to_string().contains("interval of polling"), "{error}");
        assert!(matches!(error, ConfigError::Limit { .. }));
    }
}

/// Sends a request, and gives the answer to it.
fn negotiate(mut socket: impl Read + Write, request: NegotiationRequest) -> NegotiationResponse {
    let offered = Features { polling: Some(INTERVAL), ..request.features };
    let message = Message::Negotiation(request.encode().into());
    let mut bytes = Vec::new();
    message.encode(0, &mut bytes).unwrap();
    socket.write_all(&bytes).unwrap();
    let mut header = [0; 8];
    socket.read_exact(&mut header).unwrap();
    let header = Header::decode(&header).unwrap();
    assert!(header.version == 0 && header.length <= 8 + MAX_NEGOTIATION_LEN);
    let mut json = vec![0; header.length as usize - 8];
    socket.read_exact(&mut json).unwrap();
    NegotiationResponse::decode(&json, offered).unwrap()
}

/// Listens until the closure, on a thread of its own, has ended.
async fn while_listening(test: impl FnOnce(&str, std::net::SocketAddr) + Send + 'static) {
    let path = SocketPath::new();
    let config = Config::builder().handshake_timeout(SOON).build().unwrap();
    let _unix = Listener::bind(path.as_str(), config.clone()).unwrap();
    let tcp = Listener::bind_tcp("127.0.0.1:0".parse().unwrap(), config).unwrap();
    let address = tcp.tcp_address().unwrap();
    let at = path.as_str().to_owned();
    let thread = std::thread::spawn(move || test(&at, address));
    while !thread.is_finished() {
        glommio::timer::sleep(Duration::from_millis(1)).await;
    }
    thread.join().unwrap();
}

#[test]
fn a_server_selects_of_what_is_offered_one_wake_up_and_within_limits() {
    let _turn = turn();
    run(LIMIT, || async {
        while_listening(|path, tcp| {
            let of = |features| {
                let request = NegotiationRequest::offering(features);
                let answers = [
                    negotiate(UnixStream::connect(path).unwrap(), request.clone()),
                    negotiate(TcpStream::connect(tcp).unwrap(), request),
                ];
                answers.map(|answer| match answer {
                    NegotiationResponse::Selected { protocol: 4, features, shard: None } => {
                        features
                    }
                    other => panic!("{other:?}"),
                })
            };
            let none = Features::default();
            assert_eq!(of(none), [none; 2]);
            let lists = Features { owned_free_lists: true, ..none };
            assert_eq!(of(lists), [lists; 2]);
            // Descriptors do not go over TCP.
            let event_fd = Features { eventfd: true, ..none };
            assert_eq!(of(event_fd), [event_fd, none]);
            let polling = |interval| Features { polling: Some(interval), ..none };
            let micros = Duration::from_micros;
            assert_eq!(of(polling(micros(123))), [polling(micros(123)); 2]);
            for (asked, granted) in [
                (micros(1), Wakeup::SHORTEST_INTERVAL),
                (micros(49), Wakeup::SHORTEST_INTERVAL),
                (micros(1_000_001), Wakeup::LONGEST_INTERVAL),
                (micros(u64::MAX), Wakeup::LONGEST_INTERVAL),
            ] {
                assert_eq!(of(polling(asked)), [polling(granted); 2]);
            }
            let all = Features { polling: Some(INTERVAL), eventfd: true, ..lists };
            assert_eq!(of(all), [Features { eventfd: false, ..all }; 2]);
        })
        .await;
    });
}

#[test]
fn over_tcp_there_is_version_4_with_files() {
    let _turn = turn();
    run(LIMIT, || async {
        let any_port = "127.0.0.1:0".parse().unwrap();
        let listener = Listener::bind_tcp(any_port, Config::default()).unwrap();
        let address = listener.tcp_address().unwrap();
        for kind in KINDS {
            let connector = Connector::new(config(kind).build().unwrap());
            if kind.0 == MemoryKind::Memfd {
                let error = connector.connect_tcp(address).await.unwrap_err();
                let Error::Handshake(error) = error else { panic!("{error}") };
                assert_eq!(error, HandshakeError::DescriptorsOverTcp);
                continue;
            }
            let (client, server) = zip(connector.connect_tcp(address), listener.accept()).await;
            let (client, server) = (client.unwrap(), server.unwrap());
            for session in [&client, &server] {
                let is = (session.protocol(), session.wakeup(), session.has_single_popper_lists());
                assert_eq!(is, (ProtocolVersion::V4, kind.1, true));
            }
            let mut near = client.open_stream().unwrap();
            let asking = super::pair::ask(&mut near, &[1, 100_000]);
            let answering = async {
                let mut far = server.accept().await.unwrap();
                super::pair::answer(&mut far, &[1, 100_000]).await;
            };
            zip(asking, answering).await;
        }
    });
}
