// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests and answers, with several calls under way on one session.
//!
//! A request is one message on a stream, and the next one that comes back is its answer. Whoever
//! has several questions at the same time opens several streams, each of which serves any number
//! of calls, one after the other. A slow answer on one stream holds up no other.
//!
//! Server and client are two threads of this process, with an executor each.

#[allow(dead_code, reason = "the other examples use the rest")]
#[path = "support/cli.rs"]
mod cli;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use glommio::{LocalExecutorBuilder, spawn_local};
use shmipc_glommio::{
    Config, Connector, Cores, Listener, Message, PeerTrust, Result, Stream, preflight,
};
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Answered with the request itself.
const ECHO: u32 = 1;
/// The body is frames, each behind its length in 32 bits. Answered with the longest.
const LONGEST: u32 = 2;
/// The body is numbers of 32 bits. Answered with a [`Summary`].
const SUMMARY: u32 = 3;
/// In the answer to a request that makes no sense.
const REFUSED: u32 = u32::MAX;

/// How long a call may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How many streams the client opens, and how often it uses each for each operation.
const STREAMS: u32 = 8;
const ROUNDS: u32 = 200;

/// A body with a type: `zerocopy` has checked that any 16 bytes are one. All numbers here are
/// big-endian.
#[derive(Debug, PartialEq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Summary {
    sum: U64,
    least: U32,
    largest: U32,
}

/// Before every body: the number of the call in 64 bits, the operation and the body's length in 32.
const HEADER_LEN: usize = 16;

/// The number and the operation, when the length is right.
fn peek_header(message: &Message) -> Option<(u64, u32)> {
    let mut header = [0; HEADER_LEN];
    message.peek(&mut header);
    let mut fields = &header[..];
    let (id, operation, len) = (fields.get_u64(), fields.get_u32(), fields.get_u32() as usize);
    (len.checked_add(HEADER_LEN) == Some(message.len())).then_some((id, operation))
}

/// Sends a request or an answer: header and body, as one message.
async fn send(stream: &mut Stream, id: u64, operation: u32, body: &[u8]) -> Result<()> {
    let mut loan = stream.alloc(HEADER_LEN + body.len()).await?;
    loan.write(&id.to_be_bytes());
    loan.write(&operation.to_be_bytes());
    loan.write(&(body.len() as u32).to_be_bytes());
    loan.write(body);
    stream.send(loan).await
}

/// Takes the first frame off. `None` when it is not whole.
fn take_frame(body: &mut Message) -> Option<Message> {
    let len = body.read_array().map(u32::from_be_bytes)? as usize;
    (len <= body.len()).then(|| body.split_to(len))
}

fn longest(mut body: Message) -> Option<Bytes> {
    let mut longest = take_frame(&mut body)?;
    while !body.is_empty() {
        let frame = take_frame(&mut body)?;
        longest = if frame.len() > longest.len() { frame } else { longest };
    }
    Some(longest.into_bytes())
}

fn summary(mut body: impl Buf) -> Option<Bytes> {
    let (mut sum, mut least, mut largest) = (0, u32::MAX, 0);
    while body.has_remaining() {
        let number = body.try_get_u32().ok()?;
        (least, largest) = (least.min(number), largest.max(number));
        sum += u64::from(number);
    }
    let summary = Summary { sum: sum.into(), least: least.into(), largest: largest.into() };
    Some(Bytes::copy_from_slice(summary.as_bytes()))
}

/// Answers what comes on one stream.
async fn answer(mut stream: Stream, trust: PeerTrust) -> Result<()> {
    while let Some(mut request) = stream.recv().await? {
        let (id, operation) = peek_header(&request).unwrap_or((0, REFUSED));
        if operation == ECHO {
            // Header and all. Nobody here copies it, or looks at it.
            stream.forward(request).await?;
            continue;
        }
        request.skip(HEADER_LEN);
        let body = match operation {
            LONGEST => longest(request),
            SUMMARY => summary(request.buf(&trust)?),
            _ => None,
        };
        match body {
            Some(body) => send(&mut stream, id, operation, &body).await?,
            None => send(&mut stream, id, REFUSED, b"").await?,
        }
    }
    Ok(())
}

async fn serve(path: PathBuf, is_listening: mpsc::Sender<()>) -> io::Result<()> {
    // SAFETY: the client is this program, which does not write to what it has sent.
    let trust = unsafe { PeerTrust::new_unchecked() };
    let listener = Listener::bind(path, Config::default())?.trust_peer(&trust);
    is_listening.send(()).map_err(io::Error::other)?;
    let session = listener.accept().await?;
    // One client is all there is. The socket's path goes now, however this ends.
    drop(listener);
    while let Ok(stream) = session.accept().await {
        spawn_local(answer(stream, trust)).detach();
    }
    Ok(())
}

/// Sends a request and gives the body of its answer.
async fn call(stream: &mut Stream, id: u64, operation: u32, body: &[u8]) -> io::Result<Bytes> {
    let deadline = Some(Instant::now() + PATIENCE);
    stream.set_write_deadline(deadline);
    stream.set_read_deadline(deadline);
    send(stream, id, operation, body).await?;
    let mut answer = stream.recv().await?.ok_or(io::ErrorKind::UnexpectedEof)?;
    let header = peek_header(&answer);
    if header == Some((id, REFUSED)) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    check("header", header == Some((id, operation)))?;
    answer.skip(HEADER_LEN);
    Ok(answer.into_bytes())
}

fn check(what: &str, is_right: bool) -> io::Result<()> {
    if is_right { Ok(()) } else { Err(io::Error::other(format!("{what}: wrong answer"))) }
}

/// Asks on one stream for what is known already.
async fn ask(mut stream: Stream, first: u32) -> io::Result<()> {
    for number in first..first + ROUNDS {
        let id = u64::from(number);
        let text: Vec<u8> = (0..1 + 25 * number).map(|at| (number ^ at) as u8).collect();
        check("echo", call(&mut stream, id, ECHO, &text).await? == text)?;

        let mut frames = Vec::new();
        for frame in [&text[number as usize..], &text, b""] {
            frames.extend((frame.len() as u32).to_be_bytes());
            frames.extend(frame);
        }
        check("longest", call(&mut stream, id, LONGEST, &frames).await? == text)?;

        let numbers: Vec<u8> = (1..=number).flat_map(u32::to_be_bytes).collect();
        let answer = call(&mut stream, id, SUMMARY, &numbers).await?;
        let sum = (id * (id + 1) / 2).into();
        let expected = Summary { sum, least: 1.into(), largest: number.into() };
        check("summary", Summary::read_from_bytes(&answer) == Ok(expected))?;
    }
    Ok(())
}

async fn client(path: &Path) -> io::Result<()> {
    let session = Connector::new(Config::default()).connect(path).await?;
    let start = Instant::now();
    let mut asking = Vec::new();
    for number in 0..STREAMS {
        asking.push(spawn_local(ask(session.open_stream()?, 1 + number * ROUNDS)));
    }
    for task in asking {
        task.await?;
    }
    let calls = 3 * STREAMS * ROUNDS;
    let time = start.elapsed();
    cli::print(format_args!("{calls} calls on {STREAMS} streams answered in {time:.1?}"))?;

    let refusal = call(&mut session.open_stream()?, 7, 42, b"?").await.map_err(|e| e.kind());
    check("operation 42", refusal == Err(io::ErrorKind::Unsupported))?;
    cli::print(format_args!("operation 42 refused"))
}

fn main() -> ExitCode {
    let about = "Requests and answers, with several calls under way on one session";
    match cli::read_nothing("request_response", about) {
        Ok(()) => cli::end(run()),
        Err(status) => status,
    }
}

fn run() -> io::Result<()> {
    let path = std::env::temp_dir().join(format!("request-response-{}.sock", std::process::id()));
    let (is_listening, listening) = mpsc::channel();
    let at = path.clone();
    preflight(&Cores::Unpinned(2))?;
    let server = LocalExecutorBuilder::default().spawn(|| serve(at, is_listening))?;
    // No word comes from a server that cannot listen; joining it says why.
    if listening.recv().is_ok() {
        LocalExecutorBuilder::default().make()?.run(client(&path))?;
    }
    server.join()?
}
