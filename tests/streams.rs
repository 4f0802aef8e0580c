// SPDX-License-Identifier: MIT OR Apache-2.0
//! Streams under pressure and in halves: slow readers, empty pools, deadlines, ends of one
//! direction.

use std::cell::Cell;
use std::future::Future;
use std::io::IoSlice;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Buf;
use futures_lite::future::{poll_fn, poll_once, yield_now, zip};
use futures_lite::{AsyncReadExt, AsyncWriteExt, StreamExt};
use shmipc_glommio::{
    Config, Connector, Error, Listener, MemoryKind, Message, PeerTrust, ProtocolVersion, Session,
    Spin, Stream,
};

use support::executor::{SocketPath, run};
use support::session_pair::{open, pair, pattern, recv, send, small, until};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod session_pair;
}

const LIMIT: Duration = Duration::from_secs(60);

/// Whether every slice of both sides is free.
fn all_free(client: &Session, server: &Session) -> bool {
    let (client, server) = (client.pool_usage(), server.pool_usage());
    client.held == 0
        && server.held == 0
        && client.lists.iter().zip(&server.lists).all(|(near, far)| {
            i64::from(near.free) + i64::from(near.magazine) + i64::from(far.magazine)
                == i64::from(near.total)
        })
}

async fn answer_all(session: Session) {
    while let Ok(mut stream) = session.accept().await {
        glommio::spawn_local(async move {
            while let Ok(Some(message)) = stream.recv().await {
                if stream.forward(message).await.is_err() {
                    return;
                }
            }
        })
        .detach();
    }
}

#[test]
fn a_reader_that_stops_holds_up_only_its_own_stream() {
    run(LIMIT, || async {
        let window = 128 << 10;
        let config = || Config::builder().buffer_size(4 << 20).stream_window(window);
        let (client, server) = pair(config(), config()).await;
        let (mut near, mut far) = open(&client, &server).await;
        // Slices of 8 KiB: less than 4 MiB of payload, but far more than the window.
        let sent = Rc::new(Cell::new(0));
        let writing = glommio::spawn_local({
            let sent = Rc::clone(&sent);
            async move {
                for number in 0..2000 {
                    send(&mut near, &pattern(number, 1000)).await.unwrap();
                    sent.set(number + 1);
                }
                near
            }
        });
        glommio::spawn_local(answer_all(server.clone())).detach();
        let others: Vec<_> = (0..63)
            .map(|seed| {
                let mut stream = client.open_stream().unwrap();
                glommio::spawn_local(async move {
                    for number in 0..200 {
                        let message = pattern(seed * 1000 + number, 700);
                        send(&mut stream, &message).await.unwrap();
                        assert_eq!(recv(&mut stream).await.unwrap(), message);
                    }
                })
            })
            .collect();
        for other in others {
            other.await;
        }
        let stuck = sent.get();
        assert!(stuck < 2000, "nothing held the sender back");
        // What is unread stays below the window and one message.
        let unread: u64 = server.pool_usage().held.into();
        assert!(unread * 8172 < window + 8192, "{unread} slices are held");
        assert!(client.stats().window_full > 0);
        assert_eq!(client.stats().fallback_sent, 0, "the others never ran out of slices");
        assert_eq!(server.stats().fallback_sent, 0);
        for number in 0..2000 {
            assert_eq!(recv(&mut far).await.unwrap(), pattern(number, 1000), "{number}");
        }
        drop((writing.await, far));
        until(|| all_free(&client, &server)).await;
    });
}

#[test]
fn a_burst_over_a_small_pool_arrives_and_traffic_returns_to_shared_memory() {
    run(LIMIT, || async {
        let config = || small().fallback_after(Duration::from_micros(100)).queue_capacity(256);
        let (client, server) = pair(config(), config()).await;
        glommio::spawn_local(answer_all(server.clone())).detach();
        let streams: Vec<_> = (0..64)
            .map(|seed| {
                let mut stream = client.open_stream().unwrap();
                glommio::spawn_local(async move {
                    for number in 0..4 {
                        let message = pattern(seed * 10 + number, 256 << 10);
                        send(&mut stream, &message).await.unwrap();
                        assert!(recv(&mut stream).await.unwrap() == message, "{seed} {number}");
                    }
                    stream
                })
            })
            .collect();
        let mut after = Vec::new();
        for stream in streams {
            after.push(stream.await);
        }
        let before = (client.stats().fallback_sent, server.stats().fallback_sent);
        assert!(before.0 > 0 && before.1 > 0, "the pool never ran empty: {before:?}");
        until(|| all_free(&client, &server)).await;
        // The same streams, on both sides: not one of them stays on the socket.
        for (seed, stream) in after.iter_mut().enumerate() {
            for number in 0..3 {
                let message = pattern(seed + number, 5000);
                send(stream, &message).await.unwrap();
                assert!(recv(stream).await.unwrap() == message);
            }
            assert!(!stream.is_on_socket());
        }
        assert_eq!((client.stats().fallback_sent, server.stats().fallback_sent), before);
        drop(after);
        until(|| all_free(&client, &server)).await;
    });
}

#[test]
fn bytes_go_back_to_shared_memory_behind_those_that_went_over_the_socket() {
    run(LIMIT, || async {
        let config = || small().fallback_after(Duration::ZERO).stream_window(1 << 30);
        let (client, server) = pair(config(), config()).await;
        let (mut near, mut far) = open(&client, &server).await;
        let message = pattern(1, 3 << 20);
        let writing = async {
            near.write_all(&message).await.unwrap();
            near.flush().await.unwrap();
        };
        let mut all = vec![0; message.len()];
        zip(writing, async { far.read_exact(&mut all).await.unwrap() }).await;
        assert!(all == message && client.stats().fallback_sent > 0);
        // The reader has taken all of it, and credit for that comes by the queue.
        let mut number = 0;
        while near.is_on_socket() {
            number += 1;
            assert!(number < 100, "it stays on the socket");
            let message = pattern(number, 100);
            near.write_all(&message).await.unwrap();
            assert_eq!(recv(&mut far).await.unwrap(), message);
            glommio::timer::sleep(Duration::from_millis(1)).await;
        }
        let before = client.stats().fallback_sent;
        for number in 0..20 {
            let message = pattern(number, 100);
            near.write_all(&message).await.unwrap();
            assert_eq!(recv(&mut far).await.unwrap(), message);
        }
        assert_eq!(client.stats().fallback_sent, before);
    });
}

#[test]
fn one_direction_ends_and_the_other_goes_on() {
    run(LIMIT, || async {
        let (client, server) = pair(small(), small()).await;
        let (mut near, mut far) = open(&client, &server).await;
        near.write_all(b"the last").await.unwrap();
        near.finish().await.unwrap();
        assert!(matches!(send(&mut near, b"more").await, Err(Error::StreamClosed)));
        let mut all = Vec::new();
        far.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"the last");
        assert!(far.is_closed_by_peer());
        assert!(recv(&mut far).await.is_none(), "an end stays");
        for number in 0..100 {
            send(&mut far, &[number]).await.unwrap();
            assert_eq!(recv(&mut near).await.unwrap(), [number]);
        }
        far.finish().await.unwrap();
        assert!(recv(&mut near).await.is_none());
        drop((near, far));
        until(|| client.stream_count() + server.stream_count() == 0).await;
        until(|| all_free(&client, &server)).await;
    });
}

#[test]
fn a_stream_may_begin_with_its_end() {
    run(LIMIT, || async {
        let (client, server) = pair(small(), small()).await;
        let mut near = client.open_stream().unwrap();
        AsyncWriteExt::close(&mut near).await.unwrap();
        let mut far = server.accept().await.unwrap();
        assert!(recv(&mut far).await.is_none());
        far.write_all(b"an answer to nothing").await.unwrap();
        drop(far);
        assert_eq!(recv(&mut near).await.unwrap(), b"an answer to nothing");
        assert!(recv(&mut near).await.is_none());
    });
}

#[test]
fn a_stream_that_is_announced_can_be_spoken_on_by_the_peer_first() {
    run(LIMIT, || async {
        let (client, server) = pair(small(), small().stream_window(4096)).await;
        let mut near = client.open_stream().unwrap();
        near.announce().await.unwrap();
        near.announce().await.unwrap();
        assert_eq!(client.stats().events_sent, 1, "once is enough");
        let mut far = server.accept().await.unwrap();
        far.write_all(b"welcome").await.unwrap();
        assert_eq!(recv(&mut near).await.unwrap(), b"welcome");
        // Nothing of the window is used up: one message fills it, and the next one waits.
        assert_eq!(far.unread(), 0);
        send(&mut near, b"thanks").await.unwrap();
        assert_eq!(client.stats().window_full, 0);
        assert_eq!(recv(&mut far).await.unwrap(), b"thanks");
        // One that is closed without a word is heard of as well.
        let mut silent = client.open_stream().unwrap();
        silent.announce().await.unwrap();
        drop((silent, near));
        let mut heard = server.accept().await.unwrap();
        assert!(recv(&mut heard).await.is_none());
        drop((heard, far));
        until(|| client.stream_count() + server.stream_count() == 0).await;
        until(|| all_free(&client, &server)).await;
    });
}

#[test]
fn an_announcement_waits_for_a_server_that_has_not_said_what_it_knows() {
    run(LIMIT, || async {
        let config = small().memory(MemoryKind::File).protocol(ProtocolVersion::V2);
        let config = config.build().unwrap();
        let path = SocketPath::new();
        let listener = Listener::bind(path.as_str(), config.clone()).unwrap();
        for _ in 0..10 {
            // In this version it is connected before the server has looked at the memory.
            let client = Connector::new(config.clone()).connect(path.as_str()).await.unwrap();
            let mut near = client.open_stream().unwrap();
            near.announce().await.unwrap();
            let server = listener.accept().await.unwrap();
            let mut far = server.accept().await.unwrap();
            far.write_all(b"welcome").await.unwrap();
            assert_eq!(recv(&mut near).await.unwrap(), b"welcome");
        }
    });
}

#[test]
fn an_announcement_waits_for_memory() {
    run(LIMIT, || async {
        let (client, server) = pair(small(), small()).await;
        let mut other = client.open_stream().unwrap();
        // All there is.
        let mut loans = Vec::new();
        while let Some(loan) = poll_once(other.alloc(1)).await {
            loans.push(loan.unwrap());
        }
        let mut near = client.open_stream().unwrap();
        assert!(poll_once(near.announce()).await.is_none());
        near.set_write_deadline(Some(Instant::now()));
        assert!(matches!(near.announce().await, Err(Error::DeadlinePassed)));
        near.set_write_deadline(None);
        let giving_back = async {
            glommio::timer::sleep(Duration::from_millis(5)).await;
            loans.clear();
        };
        zip(giving_back, async { near.announce().await.unwrap() }).await;
        let mut far = server.accept().await.unwrap();
        far.write_all(b"welcome").await.unwrap();
        assert_eq!(recv(&mut near).await.unwrap(), b"welcome");
    });
}

#[test]
fn the_end_of_one_direction_comes_behind_its_data_on_every_path() {
    run(LIMIT, || async {
        // Over the socket, and through a queue that is full.
        let empty = || small().fallback_after(Duration::ZERO).stream_window(1 << 30);
        for (config, len) in [(empty(), 3 << 20), (small().queue_capacity(16), 100_000)] {
            let (client, server) = pair(config.clone(), config).await;
            let (near, mut far) = open(&client, &server).await;
            let (mut reader, mut writer) = near.split();
            let message = pattern(len, len);
            let writing = async {
                let step = message.len().div_ceil(40);
                for piece in message.chunks(step) {
                    writer.write_all(piece).await.unwrap();
                }
                drop(writer);
            };
            let mut all = Vec::new();
            zip(writing, async { far.read_to_end(&mut all).await.unwrap() }).await;
            assert!(all == message);
            send(&mut far, b"got it").await.unwrap();
            let answer = reader.recv().await.unwrap().unwrap();
            assert_eq!(answer.into_bytes(), "got it");
        }
    });
}

#[test]
fn halves_work_in_two_tasks_and_close_when_both_are_gone() {
    run(LIMIT, || async {
        let (client, server) = pair(small(), small()).await;
        let (near, far) = open(&client, &server).await;
        let other = client.open_stream().unwrap();
        let (mut reader, mut writer) = near.split();
        let (other_reader, other_writer) = other.split();
        let (_, kept) = Stream::reunite(other_reader, writer).map(drop).unwrap_err();
        writer = kept;
        drop(other_writer);
        let echo = glommio::spawn_local(async move {
            let (mut reader, mut writer) = far.split();
            while let Some(message) = reader.recv().await.unwrap() {
                writer.forward(message).await.unwrap();
            }
        });
        let reading = glommio::spawn_local(async move {
            for number in 0..500usize {
                let message = reader.recv().await.unwrap().unwrap();
                assert_eq!(message.into_bytes(), pattern(number, 1 + number * 7));
            }
            reader
        });
        for number in 0..500usize {
            let mut loan = writer.alloc(1 + number * 7).await.unwrap();
            loan.write(&pattern(number, 1 + number * 7));
            writer.send(loan).await.unwrap();
        }
        let reader = reading.await;
        let mut stream = Stream::reunite(reader, writer).unwrap();
        stream.finish().await.unwrap();
        echo.await;
        assert!(recv(&mut stream).await.is_none());
        drop(stream);
        until(|| client.stream_count() + server.stream_count() == 0).await;
        until(|| all_free(&client, &server)).await;
    });
}

#[test]
fn what_comes_for_a_reader_that_is_gone_goes_back_and_holds_nobody_up() {
    run(LIMIT, || async {
        let (client, server) = pair(small(), small()).await;
        let (mut near, far) = open(&client, &server).await;
        let (reader, mut writer) = far.split();
        send(&mut near, &[1; 50_000]).await.unwrap();
        drop(reader);
        // Many windows.
        for _ in 0..100 {
            send(&mut near, &[2; 50_000]).await.unwrap();
        }
        writer.write_all(b"still here").await.unwrap();
        assert_eq!(recv(&mut near).await.unwrap(), b"still here");
        until(|| all_free(&client, &server)).await;
    });
}

#[test]
fn deadlines_end_waits_and_lose_nothing() {
    run(LIMIT, || async {
        let config = || small().fallback_after(Duration::from_secs(3600)).stream_window(1 << 30);
        let (client, server) = pair(config(), config()).await;
        let (mut near, mut far) = open(&client, &server).await;
        let soon = || Some(Instant::now() + Duration::from_millis(5));
        // Nothing comes.
        far.set_read_deadline(soon());
        assert!(matches!(far.recv().await, Err(Error::DeadlinePassed)));
        let error = far.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
        // What has come is read, whatever the time.
        send(&mut near, b"late").await.unwrap();
        until(|| far.unread() == 4).await;
        assert_eq!(recv(&mut far).await.unwrap(), b"late");
        far.set_read_deadline(None);
        // No slices, for an hour.
        let mut loans = Vec::new();
        near.set_write_deadline(soon());
        let error = loop {
            match near.alloc(100_000).await {
                Ok(loan) => loans.push(loan),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Error::DeadlinePassed) && !loans.is_empty());
        let error = near.write_all(&[0; 1 << 20]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
        drop(loans);
        near.set_write_deadline(None);
        // What the write that failed had sent arrives, and then what comes after it.
        near.write_all(b"on and on").await.unwrap();
        drop(near);
        let mut all = Vec::new();
        far.read_to_end(&mut all).await.unwrap();
        assert!(all.ends_with(b"on and on") && all.len() < 1 << 20);
        drop(far);
        until(|| all_free(&client, &server)).await;
    });
}

#[test]
fn a_sender_waits_for_the_reader_no_longer_than_its_deadline() {
    run(LIMIT, || async {
        let (client, server) = pair(small(), small().stream_window(16 << 10)).await;
        let (mut near, mut far) = open(&client, &server).await;
        near.set_write_deadline(Some(Instant::now() + Duration::from_millis(20)));
        let mut sent = 0;
        while send(&mut near, &pattern(sent, 500)).await.is_ok() {
            sent += 1;
        }
        assert!((2..=4).contains(&sent), "{sent} messages went into a window of two slices");
        // A waiting send that is dropped has sent nothing.
        near.set_write_deadline(None);
        {
            let mut loan = near.alloc(3).await.unwrap();
            loan.write(b"not");
            let mut sending = pin!(near.send(loan));
            for _ in 0..10 {
                let is_ready =
                    poll_fn(|context| Poll::Ready(sending.as_mut().poll(context).is_ready()));
                assert!(!is_ready.await);
                yield_now().await;
            }
        }
        for number in 0..sent {
            assert_eq!(recv(&mut far).await.unwrap(), pattern(number, 500));
        }
        send(&mut near, b"then this").await.unwrap();
        assert_eq!(recv(&mut far).await.unwrap(), b"then this");
        drop((near, far));
        until(|| all_free(&client, &server)).await;
    });
}

#[test]
fn a_loan_is_written_in_turns_by_copy_and_in_place() {
    run(LIMIT, || async {
        // SAFETY: both sides are this test.
        let trust = unsafe { PeerTrust::new_unchecked() };
        let path = SocketPath::new();
        let config = small().fallback_after(Duration::ZERO).stream_window(1 << 30).build().unwrap();
        let listener = Listener::bind(path.as_str(), config.clone()).unwrap();
        let connector = Connector::new(config).trust_peer(&trust);
        let (client, server) = zip(connector.connect(path.as_str()), listener.accept()).await;
        let (client, server) = (client.unwrap(), server.unwrap());
        let (mut near, mut far) = open(&client, &server).await;
        let message = pattern(5, 300_000);
        let mut kept = Vec::new();
        for is_shared in [true, false] {
            let mut loan = near.alloc(message.len()).await.unwrap();
            assert_eq!(loan.is_shared(), is_shared);
            let slice = loan.views(&trust).unwrap().next().unwrap().len();
            // The first slice is filled to its end, and the views begin with the next one.
            let mut written = loan.write(&message[..slice.min(200_000)]);
            let mut step = 1000;
            while written < message.len() {
                let view = loan.views(&trust).unwrap().next().unwrap();
                let count = view.len().min(step);
                view[..count].copy_from_slice(&message[written..written + count]);
                loan.advance(count);
                written += count;
                let rest = &message[written..];
                written += loan.write(&rest[..rest.len().min(777)]);
                step += 10_000;
            }
            assert_eq!((loan.len(), loan.remaining()), (message.len(), 0));
            assert!(loan.views(&trust).unwrap().next().is_none());
            near.send(loan).await.unwrap();
            let mut all = vec![0; message.len()];
            far.read_exact(&mut all).await.unwrap();
            assert!(all == message, "shared: {is_shared}");
            if is_shared {
                // From now on there is nothing to lend.
                while let Ok(loan) = near.alloc(8000).await
                    && loan.is_shared()
                {
                    kept.push(loan);
                }
            }
        }
    });
}

#[test]
fn messages_are_a_stream_of_futures_that_ends() {
    run(LIMIT, || async {
        let (client, server) = pair(small(), small()).await;
        let (mut near, mut far) = open(&client, &server).await;
        // Less than a window.
        for number in 0..6 {
            send(&mut near, &pattern(number, 100 * number + 1)).await.unwrap();
        }
        near.finish().await.unwrap();
        let lens: Vec<_> = far.messages().map(|message| message.unwrap().len()).collect().await;
        assert_eq!(lens, (0..6).map(|number| 100 * number + 1).collect::<Vec<_>>());
        // A session that ends is an error, once.
        drop((near, client));
        until(|| server.end_reason().is_some()).await;
        let (_, mut lone) = {
            let (client, server) = pair(small(), small()).await;
            let ends = open(&client, &server).await;
            drop(server);
            ends
        };
        let rest: Vec<_> = lone.messages().collect().await;
        assert!(matches!(rest[..], [Err(_)] | []), "{rest:?}");
    });
}

#[test]
fn messages_are_cut_read_and_passed_on() {
    run(LIMIT, || async {
        // SAFETY: both sides are this test.
        let trust = unsafe { PeerTrust::new_unchecked() };
        let path = SocketPath::new();
        let config = small().build().unwrap();
        let listener = Listener::bind(path.as_str(), config.clone()).unwrap().trust_peer(&trust);
        let connector = Connector::new(config);
        let (client, server) = zip(connector.connect(path.as_str()), listener.accept()).await;
        let (client, server) = (client.unwrap(), server.unwrap());
        let (mut near, mut far) = open(&client, &server).await;
        let (mut near_other, mut far_other) = open(&client, &server).await;
        let mut bytes = 7u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&pattern(1, 300_000));
        send(&mut near, &bytes).await.unwrap();
        let mut message = far.recv().await.unwrap().unwrap();
        assert_eq!(message.read_array().map(u32::from_be_bytes), Some(7));
        let mut front = message.split_to(100_000);
        let nothing: Message = front.split_to(0);
        assert!(nothing.is_empty());
        assert_eq!((front.len(), message.len()), (100_000, 200_000));
        // One part through a `Buf`, the other one on, over another stream.
        let mut buf = front.buf(&trust).unwrap();
        let mut copy = vec![0; 100_000];
        buf.copy_to_slice(&mut copy);
        assert!(copy == pattern(1, 300_000)[..100_000] && !buf.has_remaining());
        drop(front);
        assert!(message.is_shared());
        far_other.forward(message).await.unwrap();
        let mut rest = near_other.recv().await.unwrap().unwrap();
        assert!(rest.buf(&trust).is_err(), "the client made no promise");
        let mut eight = [0; 8];
        assert_eq!(rest.read(&mut eight), 8);
        assert_eq!(eight, pattern(1, 300_000)[100_000..100_008]);
        assert!(rest.into_bytes() == pattern(1, 300_000)[100_008..]);
        // A message of another session is given back.
        let (strange_client, strange_server) = pair(small(), small()).await;
        let (mut strange, mut stranger) = open(&strange_client, &strange_server).await;
        send(&mut strange, b"foreign").await.unwrap();
        let foreign = stranger.recv().await.unwrap().unwrap();
        assert!(matches!(far.forward(foreign).await, Err(Error::ForeignLoan)));
        drop((near, far, near_other, far_other));
        until(|| all_free(&client, &server)).await;
        until(|| all_free(&strange_client, &strange_server)).await;
    });
}

#[test]
fn a_vectored_write_is_one_message_of_all_its_parts() {
    run(LIMIT, || async {
        let (client, server) = pair(small(), small()).await;
        let (mut near, mut far) = open(&client, &server).await;
        let many = [1000; 60];
        for lens in [&[5][..], &[0, 5, 0, 7, 0], &[3000, 10, 20_000], &many, &[0, 100_000, 1]] {
            let parts: Vec<_> = lens.iter().enumerate().map(|(n, &len)| pattern(n, len)).collect();
            let slices: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
            let before = client.stats().events_sent;
            let whole = parts.concat();
            assert_eq!(near.write_vectored(&slices).await.unwrap(), whole.len(), "{lens:?}");
            assert_eq!(client.stats().events_sent - before, 1, "{lens:?}");
            assert_eq!(recv(&mut far).await.unwrap(), whole, "{lens:?}");
        }
        for nothing in [&[][..], &[IoSlice::new(b""), IoSlice::new(b"")]] {
            assert_eq!(near.write_vectored(nothing).await.unwrap(), 0);
        }
    });
}

#[test]
fn a_vectored_write_goes_on_where_the_last_one_ended() {
    run(LIMIT, || async {
        // Longer than one write takes, and than the pool holds, so that some of it uses the socket.
        let config = || small().fallback_after(Duration::ZERO).stream_window(1 << 30);
        let (client, server) = pair(config(), config()).await;
        let (mut near, mut far) = open(&client, &server).await;
        let parts: Vec<_> = (0..40).map(|number| pattern(number, 50_000 + number)).collect();
        let whole = parts.concat();
        let writing = async {
            let mut slices: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
            let mut left = &mut slices[..];
            let mut writes = 0;
            while !left.is_empty() {
                let count = near.write_vectored(left).await.unwrap();
                assert!(count > 0);
                IoSlice::advance_slices(&mut left, count);
                writes += 1;
            }
            near.finish().await.unwrap();
            writes
        };
        let reading = async {
            until(|| client.stats().fallback_sent > 0).await;
            let mut all = Vec::new();
            far.read_to_end(&mut all).await.unwrap();
            all
        };
        let (writes, all) = zip(writing, reading).await;
        assert!(all == whole && writes > 7, "{writes} writes");
    });
}

#[test]
fn a_sleeping_sender_is_not_woken_for_credit_that_it_can_do_without() {
    run(LIMIT, || async {
        let config = || small().stream_window(64 << 10).spin(Spin::Never);
        let (client, server) = pair(config(), config()).await;
        let (mut near, mut far) = open(&client, &server).await;
        let asleep = async |session: &Session| {
            let before = session.stats().sleeps;
            until(|| session.stats().sleeps > before).await;
        };
        // Five slices of 8 KiB: more than half the window.
        for number in 0..5 {
            zip(asleep(&client), async {
                send(&mut near, &pattern(number, 5000)).await.unwrap();
            })
            .await;
        }
        let before = server.stats();
        for number in 0..5 {
            assert_eq!(recv(&mut far).await.unwrap(), pattern(number, 5000));
        }
        glommio::timer::sleep(Duration::from_millis(10)).await;
        let after = server.stats();
        assert_eq!(after.sync_events_sent, before.sync_events_sent, "it was woken");
        assert_eq!(after.credits_sent, before.credits_sent);
        // With the next thing that is sent anyway, the credit is sent too.
        send(&mut far, b"answer").await.unwrap();
        assert_eq!(recv(&mut near).await.unwrap(), b"answer");
        until(|| server.stats().credits_sent == before.credits_sent + 1).await;
        assert!(server.stats().sync_events_sent <= before.sync_events_sent + 1);
    });
}

#[test]
fn a_sleeping_sender_is_woken_for_credit_that_it_waits_for() {
    run(LIMIT, || async {
        let config = || small().stream_window(64 << 10).spin(Spin::Never);
        let (client, server) = pair(config(), config()).await;
        let (mut near, mut far) = open(&client, &server).await;
        for round in 0..50 {
            // What is read first is credited when nobody waits for it; then the window runs full.
            let writing = async {
                for number in 0..30 {
                    send(&mut near, &pattern(number, 5000)).await.unwrap();
                }
            };
            let reading = async {
                let mut number = 0;
                for pause in [round % 6, 5, 7] {
                    for _ in 0..pause {
                        assert_eq!(recv(&mut far).await.unwrap(), pattern(number, 5000));
                        number += 1;
                    }
                    glommio::timer::sleep(Duration::from_millis(2)).await;
                }
                while number < 30 {
                    assert_eq!(recv(&mut far).await.unwrap(), pattern(number, 5000));
                    number += 1;
                }
            };
            zip(writing, reading).await;
        }
        assert!(client.stats().window_full > 0, "it never had to wait");
    });
}

#[test]
fn a_session_that_stays_asleep_keeps_no_slices_to_itself() {
    run(LIMIT, || async {
        let (client, server) = pair(small(), small()).await;
        let (mut near, mut far) = open(&client, &server).await;
        let kept = |session: &Session| -> u32 {
            session.pool_usage().lists.iter().map(|list| list.magazine).sum()
        };
        let mut has_kept = 0;
        for _ in 0..20 {
            let before = client.stats().sleeps;
            send(&mut near, b"question").await.unwrap();
            let question = far.recv().await.unwrap().unwrap();
            far.forward(question).await.unwrap();
            assert_eq!(recv(&mut near).await.unwrap(), b"question");
            until(|| client.stats().sleeps > before).await;
            has_kept += u32::from(kept(&client) > 0);
        }
        assert!(has_kept > 0, "it gives everything back whenever it sleeps");
        let sleeps = client.stats().sleeps;
        until(|| kept(&client) == 0 && kept(&server) == 0).await;
        assert_eq!(client.stats().sleeps, sleeps, "it was woken for that");
        assert!(all_free(&client, &server));
        // And what is released while it sleeps goes back, too.
        send(&mut near, b"late").await.unwrap();
        let late = far.recv().await.unwrap().unwrap();
        until(|| kept(&client) == 0 && kept(&server) == 0).await;
        assert_eq!(server.pool_usage().held, 1);
        drop(late);
        assert!(all_free(&client, &server));
    });
}
