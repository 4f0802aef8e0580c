// SPDX-License-Identifier: MIT OR Apache-2.0
//! What two sides say to each other, in every kind of session.

use std::rc::Rc;

use futures_lite::future::zip;
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use shmipc_glommio::{Error, Spin, Wakeup};

use super::pair::{
    KINDS, Kind, Pair, answer, ask, config, descriptors_at_rest, exchange, no_descriptor_is_left,
};
use crate::support::executor::{run, within};
use crate::support::payload::{Way, check, payload};
use crate::{LIMIT, SOON, turn};

/// Below, at and above a slice, many slices, and more than the whole memory.
const LENGTHS: [usize; 10] = [1, 63, 64, 4096, 8172, 8173, 40_000, 100_000, 1 << 20, 4_000_000];

/// Runs a test in sessions of every kind, and looks for what is left of each.
fn in_every_kind<F: Future<Output = ()>>(test: impl Fn(Kind) -> F + Copy + Send + 'static) {
    let _turn = turn();
    run(LIMIT, move || async move {
        for kind in KINDS {
            println!("{kind:?}");
            let before = descriptors_at_rest(kind).await;
            test(kind).await;
            no_descriptor_is_left(before).await;
        }
    });
}

#[test]
fn messages_of_all_sizes_both_ways() {
    in_every_kind(|kind| async move {
        let spins = [Spin::Never, config(kind).build().unwrap().spin()];
        for (spin, is_apart) in [(spins[0], true), (spins[1], true), (spins[1], false)] {
            let config = config(kind).spin(spin).owned_free_lists(is_apart).buffer_size(3 << 20);
            let pair = Pair::of(kind, config).await;
            assert_eq!(pair.client.has_single_popper_lists(), is_apart);
            exchange(&pair, &LENGTHS).await;
            let sides = [&pair.client, &pair.server].map(|side| side.stats());
            let bytes: u64 = LENGTHS.iter().map(|&len| len as u64).sum();
            for stats in &sides {
                assert!(stats.bytes_sent <= bytes && stats.bytes_received <= bytes);
                assert!(stats.bytes_sent > 1 << 20, "not by memory: {stats:?}");
            }
            pair.nothing_is_missing().await;
            pair.end().await;
        }
    });
}

#[test]
fn sixty_four_streams_at_once() {
    in_every_kind(|kind| async move {
        const LENGTHS: [usize; 5] = [64, 8173, 1, 4096, 30_000];
        const STREAMS: usize = 64;
        let pair = Rc::new(Pair::of(kind, config(kind)).await);
        let asking: Vec<_> = (0..STREAMS)
            .map(|_| {
                let pair = Rc::clone(&pair);
                glommio::spawn_local(async move {
                    let mut stream = pair.client.open_stream().unwrap();
                    for _ in 0..4 {
                        ask(&mut stream, &LENGTHS).await;
                    }
                })
            })
            .collect();
        let mut answering = Vec::new();
        for _ in 0..STREAMS {
            let mut stream = pair.server.accept().await.unwrap();
            answering.push(glommio::spawn_local(async move {
                for _ in 0..4 {
                    answer(&mut stream, &LENGTHS).await;
                }
                assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
            }));
        }
        for task in asking.into_iter().chain(answering) {
            task.await;
        }
        let pair = Rc::into_inner(pair).expect("the tasks are over");
        assert!(pair.client.stats().events_sent >= 64 * 20, "{:?}", pair.client.stats());
        pair.nothing_is_missing().await;
        pair.end().await;
    });
}

/// Both directions at the same time, so that each side finds its own lists empty.
#[test]
fn memory_that_runs_empty_is_used_again() {
    in_every_kind(|kind| async move {
        const LEN: usize = 3 << 20;
        let classes = [(1004, 40), (8172, 60)];
        let classes = classes.map(|(len, percent)| shmipc_glommio::SliceClass::new(len, percent));
        // Nobody waits for a reader, only for memory.
        let window = 4 * LEN as u64;
        let config = config(kind).buffer_size(1 << 20).slice_classes(classes).stream_window(window);
        let pair = Pair::of(kind, config).await;
        assert!(pair.client.has_single_popper_lists());
        for _ in 0..2 {
            let (near, far) = pair.open().await;
            let (mut near_reader, mut near_writer) = near.split();
            let (mut far_reader, mut far_writer) = far.split();
            let id = near_reader.id();
            let there = async {
                near_writer.write_all(&payload(Way::Request, id, 0, LEN)).await.unwrap();
            };
            let back = async {
                far_writer.write_all(&payload(Way::Reply, id, 0, LEN)).await.unwrap();
            };
            let heard_there = async {
                // Only when nothing fits any more.
                let is_empty = || pair.client.stats().fallback_sent > 0;
                assert!(within(SOON, is_empty).await);
                let mut bytes = vec![0; LEN];
                far_reader.read_exact(&mut bytes).await.unwrap();
                check(&bytes, Way::Request, id, 0);
            };
            let heard_back = async {
                let is_empty = || pair.server.stats().fallback_sent > 0;
                assert!(within(SOON, is_empty).await);
                let mut bytes = vec![0; LEN];
                near_reader.read_exact(&mut bytes).await.unwrap();
                check(&bytes, Way::Reply, id, 0);
            };
            zip(zip(there, back), zip(heard_there, heard_back)).await;
        }
        let sides = || [&pair.client, &pair.server].map(|side| side.stats());
        let is_closed = || pair.client.stream_count() + pair.server.stream_count() == 0;
        assert!(within(SOON, is_closed).await);
        let before = sides();
        for stats in &before {
            assert!(stats.pool_empty > 0 && stats.fallback_sent > 1, "{stats:?}");
        }
        // And back: a new stream does not touch the socket.
        exchange(&pair, &[64, 8173, 100_000]).await;
        for (before, after) in before.iter().zip(sides()) {
            assert_eq!(before.fallback_sent, after.fallback_sent);
            assert_eq!(after.bytes_sent - before.bytes_sent, 64 + 8173 + 100_000);
        }
        pair.nothing_is_missing().await;
        pair.end().await;
    });
}

#[test]
fn ends_of_one_direction_and_of_both_come_behind_the_data() {
    in_every_kind(|kind| async move {
        // The last through a memory that does not hold it by far.
        for (len, pool) in [(0, 8 << 20), (100_000, 8 << 20), (1 << 20, 1 << 20)] {
            let pair = Pair::of(kind, config(kind).buffer_size(pool)).await;
            for closes in [false, true] {
                let (mut near, mut far) = pair.open().await;
                let id = near.id();
                let asking = async {
                    near.write_all(&payload(Way::Request, id, 0, len)).await.unwrap();
                    near.finish().await.unwrap();
                    let mut reply = Vec::new();
                    near.read_to_end(&mut reply).await.unwrap();
                    assert_eq!(reply.len(), 2 * len + 1);
                    check(&reply, Way::Reply, id, 0);
                    drop(near);
                };
                let answering = async {
                    let mut request = Vec::new();
                    far.read_to_end(&mut request).await.unwrap();
                    assert_eq!(request.len(), len);
                    check(&request, Way::Request, id, 0);
                    far.write_all(&payload(Way::Reply, id, 0, 2 * len + 1)).await.unwrap();
                    match closes {
                        true => far.close().await.unwrap(),
                        false => far.finish().await.unwrap(),
                    }
                    drop(far);
                };
                zip(asking, answering).await;
            }
            // One that is closed with something unread on both sides.
            let (mut near, mut far) = pair.open().await;
            near.write_all(&[1; 10_000]).await.unwrap();
            far.write_all(&[2; 10_000]).await.unwrap();
            assert!(within(SOON, || near.unread() > 0 && far.unread() > 0).await);
            drop(near);
            assert!(within(SOON, || far.is_closed_by_peer()).await);
            let error = far.write_all(&[3; 10]).await.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
            drop(far);
            pair.nothing_is_missing().await;
            pair.end().await;
        }
    });
}

/// Neither side looks at its queue by itself, so a wake-up that is lost is a message that never
/// comes.
#[test]
fn sides_that_are_asleep_hear_every_message() {
    in_every_kind(|kind| async move {
        const MESSAGES: u64 = 150;
        let pair = Pair::of(kind, config(kind).spin(Spin::Never)).await;
        let (mut near, mut far) = pair.open().await;
        let sides = || [&pair.client, &pair.server].map(|side| side.stats());
        let at_rest = async || {
            // A side that sleeps has counted it, and what it is woken by comes no more.
            let before = sides().map(|stats| (stats.sleeps, stats.sync_events_received));
            glommio::timer::sleep(std::time::Duration::from_micros(300)).await;
            before == sides().map(|stats| (stats.sleeps, stats.sync_events_received))
        };
        let rest = async || {
            let began = std::time::Instant::now();
            while !at_rest().await {
                assert!(began.elapsed() < SOON, "never asleep: {:?}", sides());
            }
        };
        rest().await;
        let before = sides();
        let mut byte = [0];
        for number in 0..MESSAGES {
            near.write_all(&[number as u8]).await.unwrap();
            far.read_exact(&mut byte).await.unwrap();
            assert_eq!(byte, [number as u8]);
            rest().await;
            far.write_all(&[!number as u8]).await.unwrap();
            near.read_exact(&mut byte).await.unwrap();
            assert_eq!(byte, [!number as u8]);
            rest().await;
        }
        let after = sides();
        for (side, (before, after)) in before.iter().zip(&after).enumerate() {
            let sent = after.sync_events_sent - before.sync_events_sent;
            let sleeps = after.sleeps - before.sleeps;
            assert!(sleeps >= MESSAGES, "side {side}: {sleeps} sleeps");
            match kind.1 {
                Wakeup::Polling(_) => {
                    assert_eq!((after.sync_events_sent, after.sync_events_received), (0, 0));
                }
                // One for each message, and none for nothing but the odd credit.
                _ => assert!((MESSAGES..=2 * MESSAGES).contains(&sent), "side {side}: {after:?}"),
            }
        }
        for (one, other) in [(0, 1), (1, 0)] {
            assert_eq!(after[one].sync_events_sent, after[other].sync_events_received);
        }
        drop((near, far));
        pair.nothing_is_missing().await;
        pair.end().await;
    });
}

/// Streams of the other side learn of it, whichever way it goes.
#[test]
fn the_end_of_a_session_reaches_the_other_side() {
    in_every_kind(|kind| async move {
        for by_client in [true, false] {
            let pair = Pair::of(kind, config(kind)).await;
            let (near, far) = pair.open().await;
            let (first, last, mut stream, other) = match by_client {
                true => (&pair.client, &pair.server, far, near),
                false => (&pair.server, &pair.client, near, far),
            };
            let waiting = async {
                let error = stream.read(&mut [0]).await.unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
            };
            zip(waiting, first.close()).await.1.unwrap();
            assert!(matches!(last.end_reason(), Some(Error::PeerClosed)));
            assert!(matches!(first.end_reason(), Some(Error::SessionClosed)));
            drop((stream, other));
            pair.end().await;
        }
    });
}
