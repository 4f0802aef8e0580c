// SPDX-License-Identifier: MIT OR Apache-2.0
//! What one slow or absent reader, an empty pool and a dropped future must not do to others: keep a
//! stream on the socket, lose a stream, stop other streams, or leave half a message behind.

use std::cell::Cell;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::time::{Duration, Instant};

use futures_lite::future::{or, poll_once, yield_now, zip};
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use shmipc_glommio::{
    Config, ConfigBuilder, Error, Loan, ProtocolVersion, ReadHalf, Session, Stream, WriteHalf,
};

use support::executor::run;
use support::session_pair::{open, pair, pattern, recv, send, small, until};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod session_pair;
}

const LIMIT: Duration = Duration::from_secs(120);

#[derive(Clone, Copy)]
enum Api {
    Loans,
    Bytes,
}

/// A sender that never stops, and a reader that pauses until the sender has had to use the socket.
/// Gives how many of the messages that the reader then read had come over the socket.
async fn messages_over_the_socket_after_a_pause(api: Api, len: usize, messages: usize) -> u64 {
    let config = || small().stream_window(4 << 20).queue_capacity(1024);
    let (client, server) = pair(config(), config()).await;
    let (mut near, mut far) = open(&client, &server).await;
    let stops = Rc::new(Cell::new(false));
    let writing = glommio::spawn_local({
        let stops = Rc::clone(&stops);
        async move {
            let mut number = 0;
            while !stops.get() {
                let message = pattern(number, len);
                match api {
                    Api::Loans => send(&mut near, &message).await.unwrap(),
                    Api::Bytes => near.write_all(&message).await.unwrap(),
                }
                number += 1;
                // Others have their turn, as they would on other cores.
                yield_now().await;
            }
            near.finish().await.unwrap();
        }
    });
    until(|| client.stats().fallback_sent > 100).await;
    let mut message = vec![0; len];
    for number in 0..messages {
        far.read_exact(&mut message).await.unwrap();
        assert!(message == pattern(number, len), "{number}");
    }
    stops.set(true);
    let mut rest = Vec::new();
    far.read_to_end(&mut rest).await.unwrap();
    writing.await;
    client.stats().fallback_sent
}

#[test]
fn loans_come_back_to_shared_memory_while_the_sender_keeps_sending() {
    for len in [64, 8000, 30_000] {
        run(LIMIT, move || async move {
            let messages = 30_000_000 / (len + 1000);
            let socket = messages_over_the_socket_after_a_pause(Api::Loans, len, messages).await;
            // What filled the window while nobody read is 4 MiB at most, and a little.
            let in_the_window = (4 << 20) / len as u64 + 500;
            assert!(
                socket < in_the_window.min(messages as u64 / 2) + 500,
                "{socket} of {messages}"
            );
        });
    }
}

#[test]
fn bytes_come_back_to_shared_memory_while_the_sender_keeps_sending() {
    for len in [64, 8000, 30_000] {
        run(LIMIT, move || async move {
            let messages = 30_000_000 / (len + 1000);
            let socket = messages_over_the_socket_after_a_pause(Api::Bytes, len, messages).await;
            let in_the_window = (4 << 20) / len as u64 + 500;
            assert!(
                socket < in_the_window.min(messages as u64 / 2) + 500,
                "{socket} of {messages}"
            );
        });
    }
}

#[test]
fn a_reader_that_stays_away_does_not_keep_its_sender_from_the_window() {
    run(LIMIT, || async {
        let config = || small().stream_window(4 << 20).queue_capacity(1024);
        let (client, server) = pair(config(), config()).await;
        let (mut near, mut far) = open(&client, &server).await;
        // More than the pool has: the rest goes over the socket, and no wait for the reader, who
        // comes only when all of it was sent.
        let messages = 300;
        for number in 0..messages {
            send(&mut near, &pattern(number, 8000)).await.unwrap();
        }
        assert!(client.stats().fallback_sent > 100);
        for number in 0..messages {
            assert!(recv(&mut far).await.unwrap() == pattern(number, 8000), "{number}");
        }
    });
}

/// Opens streams, and uses one after each `unused` that it drops or keeps. Then writes on the
/// first.
async fn the_first_stream_comes_last(steps: usize, keeps: bool) {
    let config = || small().queue_capacity(1024).max_streams(1 << 20);
    let (client, server) = pair(config(), config()).await;
    let mut first = client.open_stream().unwrap();
    let mut kept = Vec::new();
    for step in 0..steps {
        let mut used = client.open_stream().unwrap();
        used.write_all(&[step as u8]).await.unwrap();
        let unused = client.open_stream().unwrap();
        if keeps {
            kept.push(unused);
        }
        let mut accepted = server.accept().await.unwrap();
        assert_eq!(recv(&mut accepted).await.unwrap(), [step as u8]);
    }
    first.write_all(b"still there").await.unwrap();
    let mut accepted = server.accept().await.unwrap();
    assert_eq!(recv(&mut accepted).await.unwrap(), b"still there");
    accepted.write_all(b"an answer").await.unwrap();
    assert_eq!(recv(&mut first).await.unwrap(), b"an answer");
    for (number, mut unused) in kept.into_iter().enumerate() {
        unused.write_all(&pattern(number, 4)).await.unwrap();
        let mut accepted = server.accept().await.unwrap();
        assert_eq!(recv(&mut accepted).await.unwrap(), pattern(number, 4));
    }
}

#[test]
fn a_stream_is_served_that_is_first_used_after_many_that_were_used_and_dropped() {
    run(LIMIT, || the_first_stream_comes_last(1025, false));
}

#[test]
fn every_other_of_many_streams_may_be_used_first() {
    run(LIMIT, || the_first_stream_comes_last(1030, true));
}

#[test]
fn a_stream_that_is_used_too_late_to_be_known_is_closed_and_not_left_waiting() {
    run(LIMIT, || async {
        let config = || small().queue_capacity(1024).max_streams(1 << 20);
        let (client, server) = pair(config(), config()).await;
        // Each of them is a number that the server has to remember.
        let mut unused = Vec::new();
        for _ in 0..(1 << 16) / 64 + 1 {
            let mut used = Vec::new();
            for step in 0..64 {
                unused.push(client.open_stream().unwrap());
                let mut stream = client.open_stream().unwrap();
                stream.write_all(&[step]).await.unwrap();
                used.push(stream);
            }
            for _ in 0..64 {
                drop(server.accept().await.unwrap());
            }
        }
        let mut served = unused.pop().unwrap();
        for stream in &mut unused[..5] {
            stream.write_all(b"too late").await.unwrap();
            // An end, and no wait without one.
            assert!(matches!(stream.recv().await, Err(Error::StreamReset)));
            assert!(stream.is_closed_by_peer());
        }
        served.write_all(b"in time").await.unwrap();
        let mut accepted = server.accept().await.unwrap();
        assert_eq!(recv(&mut accepted).await.unwrap(), b"in time");
    });
}

/// Who sends to readers that stay away.
#[derive(Debug, Clone, Copy)]
enum Sender {
    Client,
    Server,
    Both,
}

#[derive(Debug, Clone, Copy)]
enum Flood {
    Bytes,
    Loans(usize),
}

/// Opens `count` streams whose readers stay away, and sends on them until nothing moves any more.
/// Then short requests on other streams, old and new ones, are answered.
async fn others_are_answered(
    version: ProtocolVersion,
    count: usize,
    sender: Sender,
    messages: Flood,
) {
    let config = || Config::builder().protocol(version);
    let (client, server) = pair(config(), config()).await;
    let (mut old_near, mut old_far) = open(&client, &server).await;
    let sent = Rc::new(Cell::new(0));
    // Open, and nothing is done with them.
    let _idle = stall((&client, &server), count, sender, messages, &sent).await;
    for number in 0..50 {
        send(&mut old_near, &[1; 10]).await.unwrap();
        assert_eq!(recv(&mut old_far).await.unwrap(), [1; 10], "{number}");
        send(&mut old_far, &[2; 10]).await.unwrap();
        assert_eq!(recv(&mut old_near).await.unwrap(), [2; 10], "{number}");
        let mut near = client.open_stream().unwrap();
        near.write_all(&[3; 10]).await.unwrap();
        let mut far = server.accept().await.unwrap();
        assert_eq!(recv(&mut far).await.unwrap(), [3; 10], "{number}");
        far.write_all(&[4; 10]).await.unwrap();
        assert_eq!(recv(&mut near).await.unwrap(), [4; 10], "{number}");
    }
    // Longer ones too.
    for number in 0..5 {
        let message = pattern(number, 100_000);
        let (sending, receiving) = (old_near.write_all(&message), async {
            let mut bytes = vec![0; message.len()];
            old_far.read_exact(&mut bytes).await.unwrap();
            bytes
        });
        let (sent, bytes) = zip(sending, receiving).await;
        sent.unwrap();
        assert!(bytes == message);
    }
    // Its tasks end before the executor does.
    client.close().await.unwrap();
    // It may have heard already that the other side is gone.
    let _ = server.close().await;
    until(|| Rc::strong_count(&sent) == 1).await;
}

const BOTH_VERSIONS: [ProtocolVersion; 2] = [ProtocolVersion::V3, ProtocolVersion::V4];

#[test]
fn many_stalled_readers_hold_up_only_themselves() {
    for version in BOTH_VERSIONS {
        for count in [44, 48, 200, 2000] {
            for sender in [Sender::Client, Sender::Server] {
                println!("{version:?} {count} {sender:?}");
                run(LIMIT, move || others_are_answered(version, count, sender, Flood::Bytes));
            }
        }
    }
}

#[test]
fn many_stalled_readers_on_both_sides_hold_up_only_themselves() {
    for version in BOTH_VERSIONS {
        for count in [48, 300] {
            println!("{version:?} {count}");
            run(LIMIT, move || others_are_answered(version, count, Sender::Both, Flood::Bytes));
        }
    }
}

#[test]
fn many_stalled_readers_of_loans_hold_up_only_themselves() {
    for version in BOTH_VERSIONS {
        for len in [100, 40_000, 1 << 20] {
            println!("{version:?} {len}");
            let messages = Flood::Loans(len);
            run(LIMIT, move || others_are_answered(version, 300, Sender::Server, messages));
        }
    }
}

/// Opens `count` streams, sends on them to readers that stay away until nothing moves any more, and
/// returns what keeps them open.
async fn stall(
    (client, server): (&Session, &Session),
    count: usize,
    sender: Sender,
    messages: Flood,
    sent: &Rc<Cell<u64>>,
) -> (Vec<ReadHalf>, Vec<WriteHalf>) {
    let (mut idle, mut unused) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let (near, far) = open(client, server).await;
        let ((near_reader, near_writer), (far_reader, far_writer)) = (near.split(), far.split());
        let mut writers = vec![near_writer, far_writer];
        match sender {
            Sender::Client => unused.extend(writers.pop()),
            Sender::Server => unused.push(writers.remove(0)),
            Sender::Both => {}
        }
        for mut writer in writers {
            let sent = Rc::clone(sent);
            glommio::spawn_local(async move {
                loop {
                    let result = match messages {
                        Flood::Bytes => writer.write_all(&[7; 100_000]).await.map_err(drop),
                        Flood::Loans(len) => {
                            send_on(&mut writer, &vec![7; len]).await.map_err(drop)
                        }
                    };
                    if result.is_err() {
                        return;
                    }
                    sent.set(sent.get() + 1);
                }
            })
            .detach();
        }
        idle.extend([near_reader, far_reader]);
    }
    loop {
        let before = sent.get();
        glommio::timer::sleep(Duration::from_millis(200)).await;
        if sent.get() == before {
            return (idle, unused);
        }
    }
}

async fn send_on(writer: &mut WriteHalf, bytes: &[u8]) -> Result<(), Error> {
    let mut loan = writer.alloc(bytes.len()).await?;
    assert_eq!(loan.write(bytes), bytes.len());
    writer.send(loan).await
}

#[test]
fn stalled_readers_of_a_short_message_each_hold_up_only_themselves() {
    for version in BOTH_VERSIONS {
        run(LIMIT, move || async move {
            let config = small().protocol(version).queue_capacity(1024).stream_window(4096);
            let config = config.max_unread_fallback_bytes(4 << 20);
            let (client, server) = pair(config.clone(), config).await;
            let (mut near, mut far) = open(&client, &server).await;
            let sent = Rc::new(Cell::new(0));
            // More than there is room for, if each takes one.
            let messages = Flood::Loans(4000);
            let _idle = stall((&client, &server), 1200, Sender::Server, messages, &sent).await;
            for number in 0..20 {
                let (near, far) = match number % 2 == 0 {
                    true => (&mut near, &mut far),
                    false => (&mut far, &mut near),
                };
                let (received, sent) = zip(recv(near), send(far, &[number; 10])).await;
                sent.unwrap();
                assert_eq!(received.unwrap(), [number; 10]);
            }
            client.close().await.unwrap();
            let _ = server.close().await;
            until(|| Rc::strong_count(&sent) == 1).await;
        });
    }
}

/// How requests are sent, and answered piece by piece.
#[derive(Debug, Clone, Copy)]
enum Requests {
    /// Written as a whole before the answer is read.
    WrittenFirst,
    /// Sent as one loan before the answer is read.
    LentFirst,
    /// Written while the answer is read.
    WrittenMeanwhile,
}

/// Sends requests of 60 000 bytes and has them echoed while the readers of other streams stay away:
/// on a new stream each, and on one that was open before. Whether each came back in time.
async fn long_requests_are_answered(
    config: ConfigBuilder,
    (count, sender, messages): (usize, Sender, Flood),
    requests: Requests,
    patience: Duration,
) -> bool {
    println!("{count} {sender:?} {messages:?} {requests:?}");
    let (client, server) = pair(config.clone(), config).await;
    let (mut old_near, mut old_far) = open(&client, &server).await;
    let sent = Rc::new(Cell::new(0));
    let idle = stall((&client, &server), count, sender, messages, &sent).await;
    let mut are_answered = true;
    for number in 0..10 {
        let message = pattern(number, 60_000);
        let is_new = number % 2 == 0;
        let mut new_near = None;
        let near = match is_new {
            true => new_near.insert(client.open_stream().unwrap()),
            false => &mut old_near,
        };
        let (server, old_far, len) = (&server, &mut old_far, message.len());
        let echo = async {
            let mut new_far = None;
            let far = match is_new {
                true => new_far.insert(server.accept().await.unwrap()),
                false => old_far,
            };
            let mut left = len;
            while left > 0 {
                let piece = recv(far).await.unwrap();
                left -= piece.len();
                match requests {
                    Requests::LentFirst => send(far, &piece).await.unwrap(),
                    _ => far.write_all(&piece).await.unwrap(),
                }
            }
        };
        let request = async {
            let mut answer = vec![0; len];
            match requests {
                Requests::WrittenFirst => near.write_all(&message).await.unwrap(),
                Requests::LentFirst => send(near, &message).await.unwrap(),
                Requests::WrittenMeanwhile => {
                    let (mut reader, mut writer) = futures_lite::io::split(&mut *near);
                    let writing = async { writer.write_all(&message).await.unwrap() };
                    let reading = async { reader.read_exact(&mut answer).await.unwrap() };
                    zip(writing, reading).await;
                    assert!(answer == message, "{number}");
                    return;
                }
            }
            near.read_exact(&mut answer).await.unwrap();
            assert!(answer == message, "{number}");
        };
        let in_time = async {
            zip(echo, request).await;
            true
        };
        let too_late = async {
            glommio::timer::sleep(patience).await;
            false
        };
        are_answered &= or(in_time, too_late).await;
        if !are_answered {
            break;
        }
    }
    drop(idle);
    client.close().await.unwrap();
    let _ = server.close().await;
    until(|| Rc::strong_count(&sent) == 1).await;
    are_answered
}

#[test]
fn a_request_that_is_written_before_its_answer_is_read_passes_many_stalled_readers() {
    for version in BOTH_VERSIONS {
        for stalled in [
            (48, Sender::Both, Flood::Bytes),
            (100, Sender::Both, Flood::Loans(65_536)),
            (500, Sender::Both, Flood::Loans(200)),
            (500, Sender::Client, Flood::Loans(200)),
            (480, Sender::Both, Flood::Loans(60_000)),
        ] {
            run(LIMIT, move || async move {
                let config = Config::builder().protocol(version);
                let requests = Requests::WrittenFirst;
                assert!(long_requests_are_answered(config, stalled, requests, LIMIT).await);
            });
        }
    }
}

#[test]
fn a_long_loan_passes_however_many_readers_of_long_loans_stay_away() {
    let messages = Flood::Loans(65_536);
    for version in BOTH_VERSIONS {
        for stalled in [
            (640, Sender::Both, messages),
            (1000, Sender::Client, messages),
            (2500, Sender::Server, messages),
        ] {
            run(LIMIT, move || async move {
                let config = Config::builder().protocol(version);
                let requests = Requests::LentFirst;
                assert!(long_requests_are_answered(config, stalled, requests, LIMIT).await);
            });
        }
    }
}

/// What is written before its answer is read waits in the memory that stalled streams have their
/// share of too: 80 KiB each, of eleven sixteenths of `max_unread_fallback_bytes`.
#[test]
fn a_request_that_is_written_before_its_answer_is_read_passes_as_many_as_there_are_shares_for() {
    let stalled = (150, Sender::Both, Flood::Loans(60_000));
    for (limit, requests, passes) in [
        // 70 shares.
        (8 << 20, Requests::WrittenFirst, false),
        // Who reads meanwhile needs none.
        (8 << 20, Requests::WrittenMeanwhile, true),
        // 280 shares.
        (32 << 20, Requests::WrittenFirst, true),
    ] {
        run(LIMIT, move || async move {
            let config = Config::builder().buffer_size(4 << 20).stream_window(2 << 20);
            let config = config.max_unread_fallback_bytes(limit);
            let patience = if passes { LIMIT } else { Duration::from_secs(2) };
            let answered = long_requests_are_answered(config, stalled, requests, patience).await;
            assert_eq!(answered, passes);
        });
    }
}

/// Another implementation sends whatever is unread. All its streams wait once that is
/// `max_unread_fallback_bytes`, and nothing is lost.
#[test]
fn a_sender_without_credit_stops_its_session_at_the_limit_of_unread_bytes() {
    for (limit, passes) in [(4 << 20, false), (64 << 20, true)] {
        run(LIMIT, move || async move {
            // Does not bound by itself what it has sent and is unread.
            let client = small().max_unread_fallback_bytes(1 << 40).stream_window(2 << 20);
            let server = small().max_unread_fallback_bytes(limit).stream_window(2 << 20);
            let (client, server) = pair(client, server).await;
            let (mut other_near, mut other_far) = open(&client, &server).await;
            let sent = Rc::new(Cell::new(0));
            let (mut near, mut far) = (Vec::new(), Vec::new());
            for _ in 0..12 {
                let (stream, stalled) = open(&client, &server).await;
                near.push(stream);
                far.push(stalled);
            }
            for mut stream in near {
                let sent = Rc::clone(&sent);
                glommio::spawn_local(async move {
                    for number in 0..10 {
                        send(&mut stream, &pattern(number, 60_000)).await.unwrap();
                        sent.set(sent.get() + 1);
                    }
                    stream.finish().await.unwrap();
                })
                .detach();
            }
            // Until nothing moves any more. Both sides run on this executor, so each look is behind
            // whatever they could do since the one before.
            let (mut seen, mut still) = ((0, 0), 0);
            while still < 200 {
                glommio::timer::sleep(Duration::from_millis(1)).await;
                let now = (sent.get(), server.stats().fallback_received);
                still = if now == seen { still + 1 } else { 0 };
                seen = now;
            }
            assert_eq!(sent.get() == 12 * 10, passes, "{} were sent", sent.get());
            other_near.write_all(b"another").await.unwrap();
            if !passes {
                let wait = Duration::from_millis(500);
                other_far.set_read_deadline(Some(Instant::now() + wait));
            }
            match other_far.recv().await {
                Ok(Some(message)) => assert!(passes && *message.into_bytes() == *b"another"),
                Err(Error::DeadlinePassed) => assert!(!passes),
                other => panic!("{other:?}"),
            }
            other_far.set_read_deadline(None);
            for mut stalled in far {
                let mut bytes = Vec::new();
                stalled.read_to_end(&mut bytes).await.unwrap();
                let expected: Vec<u8> = (0..10).flat_map(|n| pattern(n, 60_000)).collect();
                assert!(bytes == expected, "{} bytes", bytes.len());
            }
            if !passes {
                assert_eq!(recv(&mut other_far).await.unwrap(), b"another");
            }
        });
    }
}

/// As soon as `count` polls of it, and what happens between them, are over, the future is dropped.
async fn poll_and_drop<F: Future>(future: F, count: usize) -> Option<F::Output> {
    let mut future = pin!(future);
    for _ in 0..count {
        if let Some(output) = poll_once(&mut future).await {
            return Some(output);
        }
        yield_now().await;
    }
    None
}

#[test]
fn a_send_that_is_dropped_has_sent_all_or_nothing() {
    run(LIMIT, || async {
        let mut was_sent = 0;
        let mut was_dropped = 0;
        for polls in 1..40 {
            let config = || {
                let limit = 4096;
                small()
                    .fallback_after(Duration::ZERO)
                    .max_message_len(limit)
                    .stream_window(16 << 10)
            };
            let (client, server) = pair(config(), config()).await;
            let (mut near, mut far) = open(&client, &server).await;
            let mut other = client.open_stream().unwrap();
            let mut loans = Vec::new();
            loop {
                let loan = other.alloc(1).await.unwrap();
                if !loan.is_shared() {
                    break;
                }
                loans.push(loan);
            }
            // Far above what a message of the socket, and the window, may have.
            let message = pattern(polls, 100_000);
            let mut loan = near.alloc(message.len()).await.unwrap();
            assert!(!loan.is_shared());
            loan.write(&message);
            let reading = glommio::spawn_local(async move {
                let mut bytes = Vec::new();
                far.read_to_end(&mut bytes).await.unwrap();
                bytes
            });
            match poll_and_drop(near.send(loan), polls).await {
                Some(sent) => {
                    sent.unwrap();
                    was_sent += 1;
                }
                None => was_dropped += 1,
            }
            drop(loans);
            near.finish().await.unwrap();
            let bytes = reading.await;
            let is_whole = bytes.is_empty() || bytes == message;
            assert!(is_whole, "{} of {} bytes after {polls} polls", bytes.len(), message.len());
        }
        println!("{was_sent} were sent, {was_dropped} dropped");
    });
}

#[test]
fn a_send_whose_deadline_passes_has_sent_all_or_nothing() {
    run(LIMIT, || async {
        let config = || {
            let limit = 4096;
            small().fallback_after(Duration::ZERO).max_message_len(limit).stream_window(16 << 10)
        };
        let (client, server) = pair(config(), config()).await;
        let (mut near, mut far) = open(&client, &server).await;
        let mut other = client.open_stream().unwrap();
        let mut loans = Vec::new();
        while other.alloc(1).await.is_ok_and(|loan| {
            let is_shared = loan.is_shared();
            loans.push(loan);
            is_shared
        }) {}
        let mut expected = Vec::new();
        let mut was_late = 0;
        for number in 0..10 {
            let message = pattern(number, 100_000);
            let mut loan = near.alloc(message.len()).await.unwrap();
            loan.write(&message);
            near.set_write_deadline(Some(Instant::now() + Duration::from_millis(5)));
            match near.send(loan).await {
                Ok(()) => expected.extend(message),
                Err(Error::DeadlinePassed) => was_late += 1,
                Err(error) => panic!("{error}"),
            }
            near.set_write_deadline(None);
        }
        assert!(was_late > 0, "nothing was ever late");
        let mut bytes = Vec::new();
        let finishing = async { near.finish().await.unwrap() };
        zip(finishing, async { far.read_to_end(&mut bytes).await.unwrap() }).await;
        assert!(bytes == expected, "{} bytes, {} were sent", bytes.len(), expected.len());
    });
}

/// Borrows all the memory there is, also what the other side keeps for a moment.
async fn all_memory(stream: &mut Stream, other_side: &Session) -> Vec<Loan> {
    let mut loans = Vec::new();
    loop {
        while let Some(loan) = poll_once(stream.alloc(1)).await {
            loans.push(loan.unwrap());
        }
        // The last slice of a list stays.
        let lists = other_side.pool_usage().lists;
        if lists.iter().all(|list| list.free <= 1 && list.magazine == 0) {
            return loans;
        }
        glommio::timer::sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn an_alloc_that_is_dropped_leaves_no_deadline_to_the_next() {
    run(LIMIT, || async {
        let wait = Duration::from_millis(100);
        let config = || small().fallback_after(wait);
        let (client, server) = pair(config(), config()).await;
        let (mut near, _far) = open(&client, &server).await;
        let mut other = client.open_stream().unwrap();
        let loans = all_memory(&mut other, &server).await;
        assert!(poll_once(near.alloc(1)).await.is_none());
        glommio::timer::sleep(2 * wait).await;
        // It has not waited yet.
        let start = Instant::now();
        let loan = near.alloc(1).await.unwrap();
        assert!(!loan.is_shared() && start.elapsed() >= wait, "after {:?}", start.elapsed());
        drop(loans);
    });
}

#[test]
fn a_write_that_is_dropped_leaves_no_deadline_to_the_next() {
    run(LIMIT, || async {
        let wait = Duration::from_millis(100);
        let config = || small().fallback_after(wait);
        let (client, server) = pair(config(), config()).await;
        let (mut near, mut far) = open(&client, &server).await;
        let mut other = client.open_stream().unwrap();
        let loans = all_memory(&mut other, &server).await;
        assert!(poll_once(near.write(b"given up")).await.is_none());
        glommio::timer::sleep(10 * wait).await;
        // An other write waits anew, and has memory when there is some in time.
        assert!(poll_once(near.write(b"another")).await.is_none(), "it did not wait");
        drop(loans);
        near.write_all(b"another").await.unwrap();
        assert_eq!(recv(&mut far).await.unwrap(), b"another");
        assert_eq!(client.stats().fallback_sent, 0);
    });
}
