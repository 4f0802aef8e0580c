// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a peer can make this side hold is what the limits count: bytes that are allocated, not
//! bytes that are said to be there.

use std::time::Duration;

use futures_lite::future::{or, zip};
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use shmipc_glommio::{Config, Connector, Listener, Session, SliceClass};

use support::executor::{SocketPath, run};
use support::live_bytes::{LiveBytes, alone, live_bytes};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
    pub(crate) mod live_bytes;
}

#[global_allocator]
static ALLOCATOR: LiveBytes = LiveBytes;

const MIB: i64 = 1 << 20;

async fn pair(path: &SocketPath, client: Config, server: Config) -> [Session; 2] {
    let listener = Listener::bind(path.as_str(), server).unwrap();
    let connector = Connector::new(client);
    let (client, server) = zip(connector.connect(path.as_str()), listener.accept()).await;
    [client.unwrap(), server.unwrap()]
}

/// All but a hundred bytes of each message are read: the rest may not keep the messages.
#[test]
fn the_rest_of_a_message_keeps_no_more_than_the_limit() {
    const STREAMS: usize = 64;
    const MESSAGE: usize = 1 << 20;
    let _alone = alone();
    run(Duration::from_secs(120), || async {
        let path = SocketPath::new();
        // A message does not fit into the pool, so each goes over the socket.
        let builder = || Config::builder().buffer_size(1 << 20).queue_capacity(256);
        // Does not bound by itself what it has sent and is unread, as other implementations.
        let client = builder().fallback_after(Duration::ZERO).max_unread_fallback_bytes(1 << 30);
        let client = client.build().unwrap();
        let server = builder().max_unread_fallback_bytes(4 << 20).build().unwrap();
        let [client, server] = pair(&path, client, server).await;
        let before = live_bytes();
        let mut held = Vec::new();
        let mut bytes = vec![0; MESSAGE];
        for _ in 0..STREAMS {
            let mut stream = client.open_stream().unwrap();
            let sending = async {
                let mut loan = stream.alloc(MESSAGE).await.unwrap();
                loan.write(&[7; MESSAGE]);
                stream.send(loan).await.unwrap();
                stream.flush().await.unwrap();
            };
            let reading = async {
                let mut stream = server.accept().await.unwrap();
                stream.read_exact(&mut bytes[100..]).await.unwrap();
                stream
            };
            let ((), read) = zip(sending, reading).await;
            assert_eq!(read.unread(), 100);
            held.push((stream, read));
        }
        assert!(client.stats().fallback_sent >= STREAMS as u64);
        let live = live_bytes() - before - MESSAGE as i64;
        assert!(live < 5 * MIB, "{} KiB are held", live >> 10);
        // And none of them is lost.
        for (_, stream) in &mut held {
            let mut rest = [0; 100];
            stream.read_exact(&mut rest).await.unwrap();
            assert_eq!(rest, [7; 100]);
        }
    });
}

/// Messages that are read in part hold all of their memory until more of them is read, so with too
/// many of them no more is received.
#[test]
fn messages_that_are_read_in_part_count_as_a_whole() {
    const STREAMS: usize = 64;
    const PIECE: usize = 64 << 10;
    let _alone = alone();
    run(Duration::from_secs(120), || async {
        let path = SocketPath::new();
        let builder = || Config::builder().buffer_size(1 << 20).queue_capacity(256);
        // Does not bound by itself what it has sent and is unread, as other implementations.
        let client = builder().fallback_after(Duration::ZERO).max_unread_fallback_bytes(1 << 30);
        let client = client.build().unwrap();
        let server = builder().max_unread_fallback_bytes(1 << 20).build().unwrap();
        let [client, server] = pair(&path, client, server).await;
        // The pool is empty, so what is written goes over the socket, in pieces of 64 KiB.
        let mut held = Vec::new();
        let mut holder = client.open_stream().unwrap();
        loop {
            let loan = holder.alloc(100).await.unwrap();
            if holder.is_on_socket() {
                break;
            }
            held.push(loan);
        }
        let before = live_bytes();
        let payload = vec![7; PIECE];
        let payload: &'static [u8] = payload.leak();
        let writing = async {
            let mut streams = Vec::new();
            for _ in 0..STREAMS {
                let mut stream = client.open_stream().unwrap();
                stream.write_all(payload).await.unwrap();
                streams.push(stream);
            }
            futures_lite::future::pending::<()>().await;
        };
        let reading = async {
            let mut streams = Vec::new();
            loop {
                let accepted = or(async { Some(server.accept().await.unwrap()) }, async {
                    glommio::timer::sleep(Duration::from_millis(500)).await;
                    None
                });
                let Some(mut stream) = accepted.await else { break };
                // Not quite half.
                stream.read_exact(&mut [0; PIECE * 2 / 5]).await.unwrap();
                streams.push(stream);
            }
            streams
        };
        let streams = or(reading, async {
            writing.await;
            unreachable!("it waits for ever")
        })
        .await;
        // 16 whole pieces are the limit; what counts what is unread takes 27.
        assert!((8..=20).contains(&streams.len()), "{} were received", streams.len());
        drop((held, before));
    });
}

/// Books on millions of tiny slices are larger than the slices.
#[test]
fn private_tables_are_counted_with_the_memory_that_they_are_about() {
    let _alone = alone();
    run(Duration::from_secs(120), || async {
        let path = SocketPath::new();
        let tiny = [SliceClass::new(16, 100)];
        let client = Config::builder().buffer_size(8 << 20).slice_classes(tiny);
        let client = client.queue_capacity(64).build().unwrap();
        let server = Config::builder().max_total_mapped_bytes(16 << 20).build().unwrap();
        let listener = Listener::bind(path.as_str(), server).unwrap();
        let (say, refused) = std::sync::mpsc::channel();
        listener.on_rejected(move |error| say.send(error.to_string()).unwrap());
        let connector = Connector::new(client);
        let connecting = connector.connect(path.as_str());
        let accepted = or(async { Some(listener.accept().await) }, async {
            drop(connecting.await);
            None
        });
        assert!(accepted.await.is_none(), "8 MiB with 30 MiB of books were taken in");
        let refused = refused.recv().unwrap();
        assert!(refused.contains("all sessions"), "{refused}");
    });
}

/// Streams that nobody has accepted: a bounded number, of a known size.
#[test]
fn a_stream_that_waits_to_be_accepted_costs_at_most_half_a_kibibyte() {
    const STREAMS: i64 = 10_000;
    let _alone = alone();
    run(Duration::from_secs(120), || async {
        let path = SocketPath::new();
        let config = Config::builder().queue_capacity(1 << 14).build().unwrap();
        let [client, server] = pair(&path, config.clone(), config).await;
        let mut streams = Vec::new();
        for _ in 0..STREAMS {
            streams.push(client.open_stream().unwrap());
        }
        let before = live_bytes();
        for stream in &mut streams {
            stream.announce().await.unwrap();
        }
        while server.stream_count() < STREAMS as usize {
            glommio::timer::sleep(Duration::from_millis(1)).await;
        }
        let each = (live_bytes() - before) / STREAMS;
        println!("{each} bytes a stream that waits to be accepted");
        assert!(each <= 512, "{each} bytes");
    });
}
