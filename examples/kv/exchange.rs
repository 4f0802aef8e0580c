// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commands for other shards, and the replies of all shards put together.
//!
//! A batch of commands of one client becomes one batch for each shard, and these go out at the same
//! time, on a stream that this client has to that shard alone. Each shard answers in order, so a
//! list of [`Piece`]s is enough to tell which reply comes next, and from where.
//!
//! No two shards can block each other: batches are sent while replies are read, and a shard that
//! serves such a stream asks nobody else.

use std::future::{pending, poll_fn};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_lite::future::or;
use futures_lite::{AsyncReadExt, AsyncWrite};
use shmipc_glommio::{ReadHalf, Session, WriteHalf};

use super::input::Input;
use super::peers::Peers;
use super::reply::{self, Replies};
use super::resp::integer;

/// A batch ends when so many bytes of replies, or of commands for others, have come together.
const BATCH_BYTES: usize = 256 << 10;
/// A batch ends with so many commands.
const BATCH_COMMANDS: usize = 1024;
/// So many bytes of replies are sent before the rest of the batch's are there.
const OUTPUT_AT_MOST: usize = 4 << 20;
/// The longest line of a shard's reply.
const LINE_AT_MOST: usize = 64 << 10;

/// What the replies to one client are made of.
pub(crate) struct Exchange {
    here: usize,
    pieces: Vec<Piece>,
    /// How many bytes of the replies made here belong to pieces already.
    placed: usize,
    commands: usize,
    queued: usize,
    outgoing: Vec<Outgoing>,
    sources: Vec<Source>,
}

/// What comes next.
#[derive(Debug)]
enum Piece {
    /// So many bytes of the replies made here.
    Here(usize),
    /// The next reply of a shard.
    Next(usize),
    /// One array of elements, each out of the array of its shard.
    Elements(Vec<usize>),
    /// The sum of the replies of several shards.
    Sum(Vec<usize>),
    /// OK, when several shards say so.
    AllOk(Vec<usize>),
    /// A text, and behind it those of all shards.
    Text(String),
}

/// How the replies of several shards become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Merge {
    Elements,
    Sum,
    AllOk,
}

/// What is to be sent to a shard.
#[derive(Default)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    link: Option<(Session, WriteHalf)>,
}

/// Where the replies of a shard come from.
enum Source {
    Here { replies: Replies, used: usize },
    Link { reader: Option<ReadHalf>, input: Input, failure: Option<Failure> },
}

/// The text of an error reply: a shard could not be asked, or said no.
type Failure = String;

impl Exchange {
    /// For a client of the shard `here`, one of so many.
    pub(crate) fn new(here: usize, shards: usize) -> Self {
        let source = |shard| match shard {
            _ if shard == here => Source::Here { replies: Replies::new(), used: 0 },
            _ => Source::no_link(),
        };
        Self {
            here,
            pieces: Vec::new(),
            placed: 0,
            commands: 0,
            queued: 0,
            outgoing: (0..shards).map(|_| Outgoing::default()).collect(),
            sources: (0..shards).map(source).collect(),
        }
    }

    /// Where replies that are made here are written. Their place is behind all that was asked
    /// before.
    pub(crate) fn replies(&mut self) -> &mut Replies {
        match &mut self.sources[self.here] {
            Source::Here { replies, .. } => replies,
            Source::Link { .. } => unreachable!("the own shard's source is made in `new`"),
        }
    }

    /// Whether it is time to send and to answer.
    pub(crate) fn is_full(&mut self) -> bool {
        self.commands >= BATCH_COMMANDS
            || self.queued >= BATCH_BYTES
            || self.replies().len() >= BATCH_BYTES
    }

    pub(crate) fn note_command(&mut self) {
        self.commands += 1;
    }

    /// Passes a command on to a shard. Its reply is the client's.
    pub(crate) fn forward(&mut self, shard: usize, command: &[u8]) {
        self.place();
        self.queue(shard, command);
        self.pieces.push(Piece::Next(shard));
    }

    /// Appends a part of a command for a shard.
    pub(crate) fn queue(&mut self, shard: usize, bytes: &[u8]) {
        self.outgoing[shard].bytes.extend_from_slice(bytes);
        self.queued += bytes.len();
    }

    /// Gives the replies made up to now their place, before one that is made of several.
    pub(crate) fn place(&mut self) {
        let len = self.replies().len();
        if len > self.placed {
            self.pieces.push(Piece::Here(len - self.placed));
            self.placed = len;
        }
    }

    /// Makes one reply of those that the shards give to the parts of a command, this one's, if it
    /// has a part, the last of the replies made here. For [`Merge::Elements`] these are the owners
    /// of all elements.
    pub(crate) fn merge(&mut self, merge: Merge, shards: Vec<usize>) {
        self.placed = self.replies().len();
        self.pieces.push(match merge {
            Merge::Elements => Piece::Elements(shards),
            Merge::Sum => Piece::Sum(shards),
            Merge::AllOk => Piece::AllOk(shards),
        });
    }

    /// Makes one text of this and those that all shards give.
    pub(crate) fn merge_text(&mut self, head: String) {
        self.placed = self.replies().len();
        self.pieces.push(Piece::Text(head));
    }

    /// Sends what is to be sent, and answers the client once all replies are there.
    pub(crate) async fn finish(
        &mut self,
        peers: &Peers,
        client: &mut (impl AsyncWrite + Unpin),
    ) -> io::Result<()> {
        if self.pieces.is_empty() {
            send(client, self.replies()).await?;
        } else {
            self.place();
            self.open_links(peers).await;
            let Self { pieces, outgoing, sources, .. } = self;
            let sending = async {
                poll_fn(|context| poll_send_all(outgoing, context)).await;
                pending().await
            };
            or(sending, join_all(pieces, sources, client)).await?;
            self.drop_failed_links();
            self.replies().clear();
        }
        if let Source::Here { replies, used } = &mut self.sources[self.here] {
            *used = 0;
            replies.shrink_to(OUTPUT_AT_MOST);
        }
        (self.placed, self.commands, self.queued) = (0, 0, 0);
        Ok(())
    }

    async fn open_links(&mut self, peers: &Peers) {
        for (shard, (outgoing, source)) in
            self.outgoing.iter_mut().zip(&mut self.sources).enumerate()
        {
            if outgoing.bytes.is_empty() || outgoing.is_linked() {
                continue;
            }
            *source = match peers.open(shard).await {
                Ok((session, stream)) => {
                    let (reader, writer) = stream.split();
                    outgoing.link = Some((session, writer));
                    Source::linked(reader)
                }
                Err(error) => {
                    outgoing.cancel();
                    Source::failed(format!("ERR shard {shard} cannot be reached: {error}"))
                }
            };
        }
    }

    fn drop_failed_links(&mut self) {
        for (outgoing, source) in self.outgoing.iter_mut().zip(&mut self.sources) {
            if let Source::Link { failure: Some(_), .. } = source {
                outgoing.cancel();
                *source = Source::no_link();
            }
            outgoing.bytes.shrink_to(OUTPUT_AT_MOST);
        }
    }
}

impl Outgoing {
    /// Whether there is a link, as far as one can know before it is used.
    fn is_linked(&self) -> bool {
        self.link.as_ref().is_some_and(|(session, _)| session.end_reason().is_none())
    }

    fn cancel(&mut self) {
        *self = Self::default();
    }

    /// Sends what there is. That it cannot be sent, whoever waits for the replies will learn.
    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<()> {
        while let Some((_, writer)) = &mut self.link
            && self.sent < self.bytes.len()
        {
            match ready!(Pin::new(writer).poll_write(context, &self.bytes[self.sent..])) {
                Ok(count) if count > 0 => self.sent += count,
                _ => break,
            }
        }
        self.bytes.clear();
        self.sent = 0;
        Poll::Ready(())
    }
}

fn poll_send_all(outgoing: &mut [Outgoing], context: &mut Context<'_>) -> Poll<()> {
    let mut all = Poll::Ready(());
    for outgoing in outgoing {
        if outgoing.poll_send(context).is_pending() {
            all = Poll::Pending;
        }
    }
    all
}

/// Sends replies to a client, and forgets them.
async fn send(client: &mut (impl AsyncWrite + Unpin), replies: &mut Replies) -> io::Result<()> {
    use futures_lite::AsyncWriteExt;
    if !replies.is_empty() {
        client.write_all(replies).await?;
        client.flush().await?;
        replies.clear();
    }
    Ok(())
}

async fn join_all(
    pieces: &mut Vec<Piece>,
    sources: &mut [Source],
    client: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    let mut output = Replies::new();
    for piece in pieces.drain(..) {
        let before = output.len();
        if let Err(failure) = join(piece, sources, &mut output).await {
            output.truncate(before);
            reply::error(&mut output, format_args!("{failure}"));
        }
        if output.len() >= OUTPUT_AT_MOST {
            send(client, &mut output).await?;
        }
    }
    send(client, &mut output).await
}

/// Appends the next piece. Whatever fails, the replies that belong to it have been taken.
async fn join(piece: Piece, sources: &mut [Source], output: &mut Replies) -> Result<(), Failure> {
    match piece {
        Piece::Here(len) => {
            for source in sources.iter_mut() {
                if let Source::Here { replies, used } = source {
                    output.extend_from_slice(&replies[*used..*used + len]);
                    *used += len;
                }
            }
            Ok(())
        }
        Piece::Next(shard) => sources[shard].copy_reply(output).await,
        Piece::Elements(owners) => join_elements(&owners, sources, output).await,
        Piece::Sum(shards) => {
            let mut sum = 0;
            let mut result = Ok(());
            for shard in shards {
                match sources[shard].number(b':').await {
                    Ok(number) => sum += number,
                    Err(failure) => result = Err(failure),
                }
            }
            reply::integer(output, sum);
            result
        }
        Piece::AllOk(shards) => {
            let mut result = Ok(());
            for shard in shards {
                let line = sources[shard].line().await;
                result = result.and(line.map(drop));
            }
            output.extend_from_slice(reply::OK);
            result
        }
        Piece::Text(head) => {
            let mut text = head.into_bytes();
            let mut result = Ok(());
            for source in sources {
                let mut part = Vec::new();
                result = result.and(source.copy_reply(&mut part).await);
                let body = part.iter().position(|&byte| byte == b'\n').map_or(0, |end| end + 1);
                text.extend_from_slice(part[body..].strip_suffix(b"\r\n").unwrap_or_default());
            }
            reply::bulk(output, &text);
            result
        }
    }
}

async fn join_elements(
    owners: &[usize],
    sources: &mut [Source],
    output: &mut Replies,
) -> Result<(), Failure> {
    let mut result = Ok(());
    let mut is_array = vec![None; sources.len()];
    reply::array(output, owners.len());
    for &owner in owners {
        let has_array = match is_array[owner] {
            Some(has_array) => has_array,
            None => {
                let len = sources[owner].number(b'*').await;
                let has_array = len.is_ok();
                result = result.and(len.map(drop));
                is_array[owner] = Some(has_array);
                has_array
            }
        };
        if has_array {
            result = result.and(sources[owner].copy_reply(output).await);
        }
    }
    result
}

impl Source {
    fn no_link() -> Self {
        Self::Link { reader: None, input: Input::default(), failure: None }
    }

    fn linked(reader: ReadHalf) -> Self {
        Self::Link { reader: Some(reader), input: Input::default(), failure: None }
    }

    fn failed(failure: Failure) -> Self {
        Self::Link { reader: None, input: Input::default(), failure: Some(failure) }
    }

    fn unread(&self) -> &[u8] {
        match self {
            Self::Here { replies, used } => &replies[*used..],
            Self::Link { input, .. } => input.unread(),
        }
    }

    fn consume(&mut self, count: usize) {
        match self {
            Self::Here { used, .. } => *used += count,
            Self::Link { input, .. } => input.consume(count),
        }
    }

    /// Waits for more bytes.
    async fn more(&mut self) -> Result<(), Failure> {
        let Self::Link { reader, input, failure } = self else {
            return Err("ERR a reply of this shard is missing".into());
        };
        if let Some(failure) = failure {
            return Err(failure.clone());
        }
        let result = match reader {
            Some(reader) => input.fill(reader, 0).await,
            None => Ok(0),
        };
        let text = match result {
            Ok(1..) => return Ok(()),
            Ok(0) => "ERR the shard's stream has ended".to_owned(),
            Err(error) => format!("ERR the shard's stream failed: {error}"),
        };
        Err(failure.insert(text).clone())
    }

    /// Reads exactly so many bytes that have not come yet straight to where they go.
    async fn read_onto(&mut self, output: &mut Replies, len: usize) -> Result<(), Failure> {
        let Self::Link { reader: Some(reader), failure, .. } = self else {
            return self.more().await;
        };
        let start = output.len();
        output.resize(start + len, 0);
        match reader.read_exact(&mut output[start..]).await {
            Ok(()) => Ok(()),
            Err(error) => {
                let text = format!("ERR the shard's stream failed: {error}");
                Err(failure.insert(text).clone())
            }
        }
    }

    /// Takes a line without its end. One that is an error is a failure.
    async fn line(&mut self) -> Result<Vec<u8>, Failure> {
        let mut searched = 0;
        loop {
            let unread = self.unread();
            if let Some(end) = unread[searched..].iter().position(|&byte| byte == b'\n') {
                let end = searched + end;
                let line = unread[..end].strip_suffix(b"\r").unwrap_or(&unread[..end]).to_vec();
                self.consume(end + 1);
                return match line.strip_prefix(b"-") {
                    Some(error) => Err(String::from_utf8_lossy(error).into_owned()),
                    None => Ok(line),
                };
            }
            searched = unread.len();
            if searched > LINE_AT_MOST {
                return Err(self.give_up());
            }
            self.more().await?;
        }
    }

    /// Takes a line that is a letter and a number.
    async fn number(&mut self, letter: u8) -> Result<i64, Failure> {
        let line = self.line().await?;
        let number = line.strip_prefix(&[letter]).and_then(integer);
        number.ok_or_else(|| self.give_up())
    }

    /// The shard said what it should not. Nothing behind that can be understood.
    fn give_up(&mut self) -> Failure {
        let text = "ERR the shard's reply makes no sense".to_owned();
        if let Self::Link { failure, reader, .. } = self {
            *failure = Some(text.clone());
            *reader = None;
        }
        text
    }

    /// Appends the next reply, whatever it is.
    async fn copy_reply(&mut self, output: &mut Replies) -> Result<(), Failure> {
        let mut left: usize = 1;
        while left > 0 {
            left -= 1;
            let line = self.line().await?;
            let count = match line.first() {
                Some(b'$' | b'*') => integer(&line[1..]).ok_or_else(|| self.give_up())?,
                _ => 0,
            };
            output.extend_from_slice(&line);
            output.extend_from_slice(b"\r\n");
            // The length of nothing is -1.
            let Ok(count) = usize::try_from(count) else { continue };
            match line[0] {
                b'$' => self.copy(output, count.saturating_add(2)).await?,
                b'*' => left = left.saturating_add(count),
                _ => {}
            }
        }
        Ok(())
    }

    async fn copy(&mut self, output: &mut Replies, len: usize) -> Result<(), Failure> {
        let unread = self.unread();
        let here = len.min(unread.len());
        output.extend_from_slice(&unread[..here]);
        self.consume(here);
        if here < len { self.read_onto(output, len - here).await } else { Ok(()) }
    }
}
