// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sessions with the crate `shmipc` 0.2.1 in another process, in both roles, in every version, with
//! every kind of memory and every kind of wake-up that it knows.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use futures_lite::{AsyncReadExt, AsyncWriteExt};
use shmipc_glommio::{
    Client, Config, ConfigBuilder, Connector, Error, HandshakeError, Listener, MemoryKind,
    ProtocolVersion, Session, SessionStats, Stream, Wakeup,
};

mod support {
    pub(crate) mod executor;
    pub(crate) mod lists;
    pub(crate) mod payload;
    pub(crate) mod peer;
    pub(crate) mod process_memory;
}

use support::executor::{SocketPath, run, within};
use support::lists;
use support::payload::{Way, check, payload};
use support::peer::{OnNegotiation, Order, Peer, Plan, Role, be_peer};
use support::process_memory::{mapping, shared_files};

/// Until when the other process must have done a thing that takes it a moment.
const SOON: Duration = Duration::from_secs(10);
const MIB: u32 = 1 << 20;

/// The entry of the other process; nothing in this one.
#[test]
fn peer_process() {
    be_peer();
}

/// What the other process is, the memory between the two, the version, and how they wake each
/// other.
type Combination = (Role, MemoryKind, ProtocolVersion, Wakeup);

const POLLING: Wakeup = Wakeup::Polling(Duration::from_micros(100));
const OLD: [Combination; 5] = [
    (Role::Server, MemoryKind::Memfd, ProtocolVersion::V3, Wakeup::Socket),
    (Role::Server, MemoryKind::File, ProtocolVersion::V2, Wakeup::Socket),
    // The crate serves this, though its own client never asks for it.
    (Role::Server, MemoryKind::File, ProtocolVersion::V3, Wakeup::Socket),
    (Role::Client, MemoryKind::Memfd, ProtocolVersion::V3, Wakeup::Socket),
    (Role::Client, MemoryKind::File, ProtocolVersion::V2, Wakeup::Socket),
];
const VERSION_4: [Combination; 10] = [
    (Role::Server, MemoryKind::Memfd, ProtocolVersion::V4, Wakeup::Socket),
    (Role::Server, MemoryKind::Memfd, ProtocolVersion::V4, Wakeup::EventFd),
    (Role::Server, MemoryKind::Memfd, ProtocolVersion::V4, POLLING),
    (Role::Server, MemoryKind::File, ProtocolVersion::V4, Wakeup::Socket),
    (Role::Server, MemoryKind::File, ProtocolVersion::V4, POLLING),
    (Role::Client, MemoryKind::Memfd, ProtocolVersion::V4, Wakeup::Socket),
    (Role::Client, MemoryKind::Memfd, ProtocolVersion::V4, Wakeup::EventFd),
    (Role::Client, MemoryKind::Memfd, ProtocolVersion::V4, POLLING),
    (Role::Client, MemoryKind::File, ProtocolVersion::V4, Wakeup::Socket),
    (Role::Client, MemoryKind::File, ProtocolVersion::V4, POLLING),
];

/// One case of a test: what is exchanged, through how much memory, and what must be counted.
struct Case {
    name: &'static str,
    pool: u32,
    plan: Plan,
    is_due: fn(&SessionStats) -> bool,
}

fn no_fallback(stats: &SessionStats) -> bool {
    stats.fallback_sent == 0 && stats.fallback_received == 0
}

fn fallback_both_ways(stats: &SessionStats) -> bool {
    stats.fallback_sent > 0 && stats.fallback_received > 0
}

/// Runs a case in every combination, each with a process of its own.
fn in_every_combination(case: Case) {
    let limit = Duration::from_secs(240);
    run(limit, move || async move {
        for (number, combination) in OLD.into_iter().chain(VERSION_4).enumerate() {
            let (role, memory, protocol, wakeup) = combination;
            let context = format!("{}: they are {combination:?}", case.name);
            println!("{context}");
            let prefix = format!("/dev/shm/interop{}{}{number}", std::process::id(), case.name);
            let builder = Config::builder()
                .memory(memory)
                .protocol(protocol)
                .wakeup(if role == Role::Server { wakeup } else { Wakeup::Socket })
                .buffer_size(u64::from(case.pool))
                .path_prefix(&prefix)
                // What goes over the socket is decided by what is free, not by how fast they are.
                .fallback_after(Duration::ZERO)
                .handshake_timeout(SOON);
            let path = SocketPath::new();
            let order = Order {
                role,
                address: path.as_str().to_owned(),
                is_file: memory == MemoryKind::File,
                version_4: (protocol == ProtocolVersion::V4).then_some(wakeup),
                on_negotiation: OnNegotiation::Answer,
                prefix,
                pool: case.pool,
                plan: case.plan.clone(),
            };
            let (stats, agreed) = match role {
                Role::Server => as_client(builder, &order).await,
                Role::Client => as_server(builder, &order).await,
            };
            println!("{stats:?}");
            assert_eq!(agreed, (protocol, wakeup), "{context}");
            if matches!(wakeup, Wakeup::Polling(_)) {
                assert_eq!((stats.sync_events_sent, stats.sync_events_received), (0, 0));
            } else if !case.plan.one_way {
                assert!(stats.sync_events_sent + stats.sync_events_received > 0, "{context}");
            }
            assert!((case.is_due)(&stats), "{context}: {stats:?}");
        }
    });
}

/// What a session turned out to be.
type Agreed = (ProtocolVersion, Wakeup);

fn agreed(session: &Session) -> Agreed {
    assert!(!session.has_single_popper_lists(), "they do not know them");
    assert_eq!(session.shard(), None);
    (session.protocol(), session.wakeup())
}

/// Our client against their server.
async fn as_client(config: ConfigBuilder, order: &Order) -> (SessionStats, Agreed) {
    let mut peer = Peer::start("peer_process", order);
    assert!(within(SOON, || peer.is_ready()).await, "{:?}", peer.ended());
    talk_to(&mut peer, config, order).await
}

async fn talk_to(peer: &mut Peer, config: ConfigBuilder, order: &Order) -> (SessionStats, Agreed) {
    let connector = Connector::new(config.build().unwrap());
    let session = connector.connect(&order.address).await.unwrap();
    let plan = Rc::new(order.plan.clone());
    let workers: Vec<_> = (0..plan.at_once)
        .map(|_| {
            let (session, plan) = (session.clone(), Rc::clone(&plan));
            glommio::spawn_local(async move {
                for _ in 0..plan.streams / plan.at_once {
                    ask(session.open_stream().unwrap(), &plan).await;
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await;
    }
    assert!(within(SOON, || peer.is_done()).await, "{:?}", peer.ended());
    nothing_is_missing(&session, order).await;
    let result = (session.stats(), agreed(&session));
    drop(session);
    peer.dismiss();
    gone_without_a_trace(peer, order).await;
    result
}

/// Our server against their client.
async fn as_server(config: ConfigBuilder, order: &Order) -> (SessionStats, Agreed) {
    let listener = Listener::bind(&order.address, config.build().unwrap()).unwrap();
    serve_one(&listener, order).await
}

async fn serve_one(listener: &Listener, order: &Order) -> (SessionStats, Agreed) {
    let mut peer = Peer::start("peer_process", order);
    let session = listener.accept().await.unwrap();
    let plan = Rc::new(order.plan.clone());
    let mut streams = Vec::new();
    for _ in 0..plan.streams {
        let stream = session.accept().await.unwrap();
        let plan = Rc::clone(&plan);
        streams.push(glommio::spawn_local(async move {
            answer(stream, &plan).await;
        }));
    }
    for stream in streams {
        stream.await;
    }
    assert!(within(SOON, || peer.is_done()).await, "{:?}", peer.ended());
    nothing_is_missing(&session, order).await;
    let result = (session.stats(), agreed(&session));
    peer.dismiss();
    let reason = session.closed().await;
    assert!(matches!(reason, Error::PeerClosed), "{reason}");
    drop(session);
    gone_without_a_trace(&mut peer, order).await;
    result
}

/// The client's side of one stream.
async fn ask(mut stream: Stream, plan: &Plan) {
    let id = stream.id();
    for (number, &len) in (0..).zip(&plan.lengths) {
        send(&mut stream, &payload(Way::Request, id, number, len)).await;
        if plan.one_way {
            continue;
        }
        let mut reply = vec![0; len];
        stream.read_exact(&mut reply).await.unwrap();
        check(&reply, Way::Reply, id, number);
    }
}

/// The server's side of one stream.
async fn answer(mut stream: Stream, plan: &Plan) {
    let id = stream.id();
    for (number, &len) in (0..).zip(&plan.lengths) {
        let mut request = vec![0; len];
        stream.read_exact(&mut request).await.unwrap();
        check(&request, Way::Request, id, number);
        if !plan.one_way {
            send(&mut stream, &payload(Way::Reply, id, number, len)).await;
        }
    }
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "stream {id} goes on");
}

async fn send(stream: &mut Stream, bytes: &[u8]) {
    stream.write_all(bytes).await.unwrap();
    stream.flush().await.unwrap();
}

/// The peer gives its slices back when it hears that a stream is closed, which takes a moment.
async fn nothing_is_missing(session: &Session, order: &Order) {
    let is_full = within(SOON, || session.pool_usage().is_full()).await;
    assert!(is_full, "{:#?}", session.pool_usage());
    assert_eq!(session.stream_count(), 0);
    let name = [order.prefix.as_str(), "_buffer"];
    let lists = || lists::all_free(&mapping(&name).expect("the buffer memory is mapped"));
    let is_whole = within(SOON, || lists().is_ok()).await;
    assert!(is_whole, "{:?}, {:?}", lists(), session.pool_usage());
}

async fn gone_without_a_trace(peer: &mut Peer, order: &Order) {
    assert!(within(SOON, || peer.ended().is_some()).await, "the peer stays");
    let status = peer.ended().unwrap();
    assert!(status.success(), "{status}");
    let prefix = order.prefix.strip_prefix("/dev/shm/").unwrap().to_owned();
    let names = [prefix, format!("_{}_", peer.id())];
    let left = || shared_files(&names);
    assert!(within(SOON, || left().is_empty()).await, "{:?}", left());
    let maps = || std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(within(SOON, || !maps().contains(&order.prefix)).await, "still mapped");
}

/// Lengths below, at and above a slice, and two that take many slices.
const LENGTHS: [usize; 6] = [1, 64, 4 << 10, 100_000, 1 << 20, 16 << 20];

#[test]
fn messages_of_all_sizes_through_memory_that_holds_them() {
    in_every_combination(Case {
        name: "large",
        pool: 64 * MIB,
        plan: Plan { lengths: LENGTHS.repeat(2), streams: 2, at_once: 1, one_way: false },
        is_due: no_fallback,
    });
}

#[test]
fn messages_of_all_sizes_through_the_default_memory() {
    in_every_combination(Case {
        name: "default",
        pool: 32 * MIB,
        plan: Plan { lengths: LENGTHS.to_vec(), streams: 2, at_once: 1, one_way: false },
        is_due: |stats| stats.bytes_received >= 2 * (1 << 20),
    });
}

#[test]
fn sixty_four_streams_at_once() {
    in_every_combination(Case {
        name: "many",
        pool: 32 * MIB,
        plan: Plan {
            lengths: [64, 4 << 10, 1, 100_000, 8172, 8173].repeat(4),
            streams: 64,
            at_once: 64,
            one_way: false,
        },
        is_due: |stats| stats.events_sent >= 64 * 24,
    });
}

#[test]
fn ten_thousand_streams_one_after_the_other() {
    in_every_combination(Case {
        name: "churn",
        pool: 32 * MIB,
        plan: Plan { lengths: vec![64], streams: 10_000, at_once: 1, one_way: false },
        is_due: |stats| no_fallback(stats) && stats.events_received >= 10_000,
    });
}

#[test]
fn memory_that_runs_empty_in_the_middle_of_messages() {
    in_every_combination(Case {
        name: "empty",
        pool: MIB,
        // Small ones between, which find slices again and must still stay in order.
        plan: Plan {
            lengths: [1 << 20, 64, 1 << 20, 4096, 3 << 20].repeat(2),
            streams: 4,
            at_once: 2,
            one_way: false,
        },
        is_due: fallback_both_ways,
    });
}

#[test]
fn sixty_four_streams_over_memory_for_a_few() {
    in_every_combination(Case {
        name: "crowded",
        pool: MIB,
        plan: Plan {
            lengths: [64, 4 << 10, 1, 8172, 40_000, 8173].repeat(6),
            streams: 192,
            at_once: 64,
            one_way: false,
        },
        is_due: |stats| stats.pool_empty > 0,
    });
}

#[test]
fn a_burst_of_large_messages_over_a_small_memory() {
    in_every_combination(Case {
        name: "burst",
        pool: MIB,
        plan: Plan { lengths: vec![256 << 10; 4], streams: 64, at_once: 64, one_way: false },
        is_due: fallback_both_ways,
    });
}

#[test]
fn a_close_right_behind_the_data_comes_behind_it() {
    for (name, pool) in [("close", 64 * MIB), ("tight", MIB)] {
        in_every_combination(Case {
            name,
            pool,
            plan: Plan {
                lengths: vec![64, 256 << 10, 1, 100_000, 256 << 10],
                streams: 32,
                at_once: 8,
                one_way: true,
            },
            is_due: |stats| stats.events_sent + stats.events_received >= 32,
        });
    }
}

/// The combinations that a side which prefers version 4 tries first.
fn fallbacks(
    role: Role,
    on_negotiation: OnNegotiation,
) -> impl Iterator<Item = (MemoryKind, Wakeup, Order, SocketPath)> {
    let combinations = VERSION_4.into_iter().filter(move |&(other, ..)| other == role);
    combinations.enumerate().map(move |(number, (_, memory, _, wakeup))| {
        let path = SocketPath::new();
        let order = Order {
            role,
            address: path.as_str().to_owned(),
            is_file: memory == MemoryKind::File,
            version_4: Some(wakeup),
            on_negotiation,
            prefix: format!(
                "/dev/shm/fallback{}{role:?}{on_negotiation:?}{number}",
                std::process::id()
            ),
            pool: 8 * MIB,
            plan: Plan {
                lengths: [1, 64, 4 << 10, 100_000, 1 << 20].to_vec(),
                streams: 4,
                at_once: 2,
                one_way: false,
            },
        };
        (memory, wakeup, order, path)
    })
}

fn config_of(order: &Order, memory: MemoryKind) -> ConfigBuilder {
    Config::builder()
        .memory(memory)
        .buffer_size(order.pool.into())
        .path_prefix(&order.prefix)
        .handshake_timeout(SOON)
}

#[test]
fn our_client_falls_back_to_version_3_with_their_server_of_before() {
    run(Duration::from_secs(120), || async {
        for (memory, wakeup, order, _path) in fallbacks(Role::Server, OnNegotiation::Close) {
            println!("{memory:?}, {wakeup:?}");
            let config = config_of(&order, memory).protocol(ProtocolVersion::V4).wakeup(wakeup);
            let mut peer = Peer::start("peer_process", &order);
            assert!(within(SOON, || peer.is_ready()).await, "{:?}", peer.ended());
            let stubborn = Connector::new(config.clone().allow_v3_fallback(false).build().unwrap());
            // Also when the kernel calls it a reset, since something was unread.
            must_be_unanswered(stubborn.connect(&order.address).await.unwrap_err());
            assert!(within(SOON, || peer.negotiations_unanswered() == 1).await);
            let (stats, agreed) = talk_to(&mut peer, config, &order).await;
            assert_eq!(agreed, (ProtocolVersion::V3, Wakeup::Socket));
            assert_eq!(peer.negotiations_unanswered(), 2);
            assert!(stats.bytes_received > 4 << 20, "{stats:?}");
        }
    });
}

fn must_be_unanswered(error: Error) {
    let is_due = matches!(error, Error::Handshake(HandshakeError::Version4Unanswered { .. }));
    assert!(is_due, "{error}");
}

/// As the server of shmipc-go does.
#[test]
fn our_client_falls_back_to_version_3_with_their_server_that_stays_silent() {
    run(Duration::from_secs(120), || async {
        for (memory, wakeup, order, _path) in fallbacks(Role::Server, OnNegotiation::StaySilent) {
            println!("{memory:?}, {wakeup:?}");
            let config = config_of(&order, memory).protocol(ProtocolVersion::V4).wakeup(wakeup);
            let mut peer = Peer::start("peer_process", &order);
            assert!(within(SOON, || peer.is_ready()).await, "{:?}", peer.ended());
            let short = Duration::from_millis(100);
            let stubborn = config.clone().allow_v3_fallback(false).handshake_timeout(short);
            let stubborn = Connector::new(stubborn.build().unwrap());
            must_be_unanswered(stubborn.connect(&order.address).await.unwrap_err());
            assert!(within(SOON, || peer.negotiations_unanswered() == 1).await);
            let (stats, agreed) = talk_to(&mut peer, config, &order).await;
            assert_eq!(agreed, (ProtocolVersion::V3, Wakeup::Socket));
            assert_eq!(peer.negotiations_unanswered(), 2);
            assert!(stats.bytes_received > 4 << 20, "{stats:?}");
        }
    });
}

#[test]
fn their_client_falls_back_with_our_server_that_takes_no_more_than_version_3() {
    run(Duration::from_secs(120), || async {
        for (memory, wakeup, order, _path) in fallbacks(Role::Client, OnNegotiation::Answer) {
            println!("{memory:?}, {wakeup:?}");
            let config = config_of(&order, memory).max_accepted_protocol(ProtocolVersion::V3);
            let listener = Listener::bind(&order.address, config.build().unwrap()).unwrap();
            let refused = Rc::new(RefCell::new(Vec::new()));
            let note = Rc::clone(&refused);
            listener.on_rejected(move |error| note.borrow_mut().push(error.clone()));
            let (stats, agreed) = serve_one(&listener, &order).await;
            // With files it opens as it does when it is not told anything.
            let version = if order.is_file { ProtocolVersion::V2 } else { ProtocolVersion::V3 };
            assert_eq!(agreed, (version, Wakeup::Socket));
            assert!(stats.bytes_received > 4 << 20, "{stats:?}");
            let refused = refused.borrow();
            let is_due = |error: &Error| {
                let needed = HandshakeError::NoCommonVersion { peer: 4, needed: 3 };
                matches!(error, Error::Handshake(error) if *error == needed)
            };
            assert!(refused.len() == 1 && is_due(&refused[0]), "{refused:?}");
        }
    });
}

#[test]
fn the_crate_shmipc_is_a_server_of_one_shard() {
    let path = SocketPath::new();
    let lengths = vec![5, 100, 3000];
    let order = Order {
        role: Role::Server,
        address: path.as_str().to_owned(),
        version_4: None,
        on_negotiation: OnNegotiation::Answer,
        is_file: false,
        prefix: format!("/dev/shm/client{}", std::process::id()),
        pool: 2 << 20,
        plan: Plan { lengths: lengths.clone(), streams: 1, at_once: 1, one_way: false },
    };
    let mut peer = Peer::start("peer_process", &order);
    run(SOON, move || async move {
        assert!(within(SOON, || peer.is_ready()).await, "{:?}", peer.ended());
        let config = Config::builder().container().build().unwrap();
        let client = Client::builder(path.as_str()).config(config).build().unwrap();
        // Three exchanges on one stream: it is kept.
        for (number, len) in (0..).zip(lengths) {
            let exchange = client.with_stream(0, async |stream| {
                let request = payload(Way::Request, stream.id(), number, len);
                let mut loan = stream.alloc(request.len()).await?;
                loan.write(&request);
                stream.send(loan).await?;
                let mut reply = vec![0; len];
                stream.read_exact(&mut reply).await.unwrap();
                check(&reply, Way::Reply, stream.id(), number);
                Ok::<_, Error>(())
            });
            exchange.await.unwrap();
        }
        assert_eq!(client.shard_count().unwrap(), 1);
        let status = &client.status()[0];
        assert_eq!((status.idle_streams, status.connections), (1, 1));
        // Its end of the stream ends what the peer does.
        client.close().await.unwrap();
        assert!(within(SOON, || peer.is_done()).await, "{:?}", peer.ended());
        peer.dismiss();
        assert!(within(SOON, || peer.ended().is_some()).await);
        assert!(peer.ended().unwrap().success());
    });
}
