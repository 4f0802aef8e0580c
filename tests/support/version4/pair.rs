// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two sides of this crate on one executor, what they say to each other, and what must be left.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures_lite::future::zip;
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use shmipc_glommio::{
    Config, ConfigBuilder, Connector, Listener, MemoryKind, ProtocolVersion, Session, Stream,
    Wakeup,
};

use crate::SOON;
use crate::support::executor::{SocketPath, within};
use crate::support::lists;
use crate::support::payload::{Way, check, payload};
use crate::support::process_memory::{mappings, shared_files};

/// Memory, and how the sides wake each other.
pub(crate) type Kind = (MemoryKind, Wakeup);

pub(crate) const INTERVAL: Duration = Duration::from_micros(200);
pub(crate) const KINDS: [Kind; 5] = [
    (MemoryKind::Memfd, Wakeup::Socket),
    (MemoryKind::Memfd, Wakeup::EventFd),
    (MemoryKind::Memfd, Wakeup::Polling(INTERVAL)),
    (MemoryKind::File, Wakeup::Socket),
    (MemoryKind::File, Wakeup::Polling(INTERVAL)),
];

/// A client that takes nothing but version 4.
pub(crate) fn config((memory, wakeup): Kind) -> ConfigBuilder {
    Config::builder()
        .memory(memory)
        .protocol(ProtocolVersion::V4)
        .wakeup(wakeup)
        .allow_v3_fallback(false)
        .handshake_timeout(SOON)
        .buffer_size(8 << 20)
        .queue_capacity(64)
}

/// Both ends of a session.
pub(crate) struct Pair {
    pub(crate) client: Session,
    pub(crate) server: Session,
    /// What the names of the memory hold.
    name: String,
}

impl Pair {
    /// A session of this kind. Both sides have agreed on all that they were asked for.
    pub(crate) async fn of(kind: Kind, config: ConfigBuilder) -> Self {
        let pair = Self::new(config.clone(), config).await;
        for session in [&pair.client, &pair.server] {
            assert_eq!((session.protocol(), session.wakeup()), (ProtocolVersion::V4, kind.1));
            assert_eq!(session.shard(), None, "a listener is no shard");
        }
        pair
    }

    pub(crate) async fn new(client: ConfigBuilder, server: ConfigBuilder) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("version4x{}x{number}x", std::process::id());
        let path = SocketPath::new();
        let listener = Listener::bind(path.as_str(), server.build().unwrap()).unwrap();
        let client = client.path_prefix(format!("/dev/shm/{name}")).build().unwrap();
        let connector = Connector::new(client);
        let (client, server) = zip(connector.connect(path.as_str()), listener.accept()).await;
        let (client, server) = (client.unwrap(), server.unwrap());
        assert_eq!(client.protocol(), server.protocol());
        assert_eq!(client.wakeup(), server.wakeup());
        assert_eq!(client.has_single_popper_lists(), server.has_single_popper_lists());
        Self { client, server, name }
    }

    /// A stream's two ends, of which the server's has read one byte.
    pub(crate) async fn open(&self) -> (Stream, Stream) {
        let mut near = self.client.open_stream().unwrap();
        near.write_all(&[7]).await.unwrap();
        let mut far = self.server.accept().await.unwrap();
        let mut byte = [0];
        far.read_exact(&mut byte).await.unwrap();
        assert_eq!((byte, near.id()), ([7], far.id()));
        (near, far)
    }

    /// Every slice is in its list, by both sides' books and as the lists lie in the memory.
    pub(crate) async fn nothing_is_missing(&self) {
        let sides = [&self.client, &self.server];
        let is_full = || sides.iter().all(|side| side.pool_usage().is_full());
        let usage = || sides.map(Session::pool_usage);
        assert!(within(SOON, is_full).await, "{:#?}", usage());
        assert_eq!(sides.map(Session::stream_count), [0, 0]);
        let memories = || mappings(&[&self.name, "_buffer"]);
        assert_eq!(memories().len(), 2, "one mapping a side");
        let are_whole = || memories().iter().all(|memory| lists::all_free(memory).is_ok());
        let lists = || memories().iter().map(|memory| lists::all_free(memory)).collect::<Vec<_>>();
        assert!(within(SOON, are_whole).await, "{:?}", lists());
    }

    /// Both sides end, and nothing is left in the file system or mapped.
    pub(crate) async fn end(self) {
        let Self { client, server, name } = self;
        drop(client);
        server.closed().await;
        drop(server);
        let maps = || std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(within(SOON, || !maps().contains(&name)).await, "{name} is still mapped");
        assert_eq!(shared_files(&[name]), [""; 0]);
    }
}

/// Open descriptors of this process.
pub(crate) fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// How many descriptors an executor has that has had a session of this kind.
pub(crate) async fn descriptors_at_rest(kind: Kind) -> usize {
    let pair = Pair::of(kind, config(kind)).await;
    drop(pair.open().await);
    pair.end().await;
    // What is closed by io_uring is so at its next look.
    glommio::timer::sleep(Duration::from_millis(20)).await;
    descriptors()
}

/// There are no more descriptors than there were.
pub(crate) async fn no_descriptor_is_left(before: usize) {
    let is_so = within(SOON, || descriptors() <= before).await;
    assert!(is_so, "{} descriptors, there were {before}", descriptors());
}

/// The client's side of a stream: messages of these lengths, each with an answer as long.
pub(crate) async fn ask(stream: &mut Stream, lengths: &[usize]) {
    let id = stream.id();
    for (number, &len) in (0..).zip(lengths) {
        stream.write_all(&payload(Way::Request, id, number, len)).await.unwrap();
        let mut reply = vec![0; len];
        stream.read_exact(&mut reply).await.unwrap();
        check(&reply, Way::Reply, id, number);
    }
}

/// The server's side of it.
pub(crate) async fn answer(stream: &mut Stream, lengths: &[usize]) {
    let id = stream.id();
    for (number, &len) in (0..).zip(lengths) {
        let mut request = vec![0; len];
        stream.read_exact(&mut request).await.unwrap();
        check(&request, Way::Request, id, number);
        stream.write_all(&payload(Way::Reply, id, number, len)).await.unwrap();
    }
}

/// Asks and answers on a new stream, to its end.
pub(crate) async fn exchange(pair: &Pair, lengths: &[usize]) {
    let mut near = pair.client.open_stream().unwrap();
    let answering = async {
        let mut far = pair.server.accept().await.unwrap();
        answer(&mut far, lengths).await;
        assert_eq!(far.read(&mut [0]).await.unwrap(), 0, "stream {} goes on", far.id());
    };
    let asking = async {
        ask(&mut near, lengths).await;
        near.close().await.unwrap();
    };
    zip(asking, answering).await;
}
