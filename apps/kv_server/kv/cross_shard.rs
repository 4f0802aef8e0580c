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

use futures_lite::AsyncWrite;
use futures_lite::future::or;
use shmipc_glommio::{Session, WriteHalf};

use super::client_stream::ReplySink;
use super::execute::{MAX_REPLY, REPLY_TOO_LONG};
use super::remote_shards::RemoteShards;
use super::reply::{self, Replies};
use super::reply_stream::{Failure, ReplyStream};

/// A batch ends when so many bytes of replies, or of commands for others, have come together.
const BATCH_BYTES: usize = 256 << 10;
/// A batch ends with so many commands.
const BATCH_COMMANDS: usize = 1024;
/// So many bytes of replies are sent before the rest of the batch's are there.
const MAX_OUTPUT: usize = 4 << 20;

/// What the replies to one client are made of.
pub(crate) struct CrossShardBatch {
    here: usize,
    pieces: Vec<Piece>,
    /// How many bytes of the replies made here belong to pieces already.
    placed: usize,
    commands: usize,
    queued: usize,
    outgoing: Vec<Outgoing>,
    reply_streams: Vec<ReplyStream>,
    /// Replies of several shards, put together.
    output: Replies,
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

impl CrossShardBatch {
    /// For a client of the shard `here`, one of so many. `may_refer`: long values are sent from
    /// where the store has them, if that goes.
    pub(crate) fn new(here: usize, shards: usize, may_refer: bool) -> Self {
        let reply_stream = |shard| match shard == here && may_refer {
            true => ReplyStream::referring(),
            false => ReplyStream::default(),
        };
        Self {
            here,
            pieces: Vec::new(),
            placed: 0,
            commands: 0,
            queued: 0,
            outgoing: (0..shards).map(|_| Outgoing::default()).collect(),
            reply_streams: (0..shards).map(reply_stream).collect(),
            output: Replies::new(),
        }
    }

    /// Where replies that are made here are written. Their place is behind all that was asked
    /// before.
    pub(crate) fn replies(&mut self) -> &mut Replies {
        self.reply_streams[self.here].made_here()
    }

    /// Whether it is time to send and to answer.
    pub(crate) fn is_full(&mut self) -> bool {
        self.commands >= BATCH_COMMANDS
            || self.queued >= BATCH_BYTES
            || self.replies().len() >= BATCH_BYTES
    }

    pub(crate) fn record_command(&mut self) {
        self.commands += 1;
    }

    /// Whether replies are to be put together of what several shards say.
    pub(crate) fn has_pieces(&self) -> bool {
        !self.pieces.is_empty()
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
        remote_shards: &RemoteShards,
        client: &mut impl ReplySink,
    ) -> io::Result<()> {
        if self.pieces.is_empty() {
            client.send(self.replies(), MAX_OUTPUT).await?;
        } else {
            self.place();
            // The client has not changed its version since the first of these pieces.
            self.output.protocol = self.replies().protocol;
            // They are taken apart again.
            self.replies().flatten();
            self.open_links(remote_shards).await;
            let Self { here, pieces, outgoing, reply_streams, output, .. } = self;
            let sending = async {
                poll_fn(|context| poll_send_all(outgoing, context)).await;
                pending().await
            };
            or(sending, join_all(pieces, *here, reply_streams, output, client)).await?;
            self.drop_failed_links();
        }
        self.reply_streams[self.here].forget_made_here(MAX_OUTPUT);
        (self.placed, self.commands, self.queued) = (0, 0, 0);
        Ok(())
    }

    async fn open_links(&mut self, remote_shards: &RemoteShards) {
        for (shard, (outgoing, reply_stream)) in
            self.outgoing.iter_mut().zip(&mut self.reply_streams).enumerate()
        {
            if outgoing.bytes.is_empty() || outgoing.is_linked() {
                continue;
            }
            *reply_stream = match remote_shards.open(shard).await {
                Ok((session, stream)) => {
                    let (reader, writer) = stream.split();
                    outgoing.link = Some((session, writer));
                    ReplyStream::linked(reader)
                }
                Err(error) => {
                    outgoing.cancel();
                    ReplyStream::failed(format!("ERR shard {shard} cannot be reached: {error}"))
                }
            };
        }
    }

    fn drop_failed_links(&mut self) {
        for (outgoing, reply_stream) in self.outgoing.iter_mut().zip(&mut self.reply_streams) {
            if reply_stream.has_failed() {
                outgoing.cancel();
                *reply_stream = ReplyStream::default();
            }
            outgoing.bytes.shrink_to(MAX_OUTPUT);
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

async fn join_all(
    pieces: &mut Vec<Piece>,
    here: usize,
    reply_streams: &mut [ReplyStream],
    output: &mut Replies,
    client: &mut impl ReplySink,
) -> io::Result<()> {
    for piece in pieces.drain(..) {
        let before = output.len();
        if let Err(failure) = join(piece, here, reply_streams, output).await {
            output.truncate(before);
            reply::error(output, format_args!("{failure}"));
        }
        if output.len() >= MAX_OUTPUT {
            client.send(output, MAX_OUTPUT).await?;
        }
    }
    client.send(output, MAX_OUTPUT).await
}

/// Appends the next piece. Whatever fails, the replies that belong to it have been taken.
async fn join(
    piece: Piece,
    here: usize,
    reply_streams: &mut [ReplyStream],
    output: &mut Replies,
) -> Result<(), Failure> {
    match piece {
        Piece::Here(len) => reply_streams[here].copy(output, len).await,
        Piece::Next(shard) => reply_streams[shard].copy_reply(output).await,
        Piece::Elements(owners) => join_elements(&owners, reply_streams, output).await,
        Piece::Sum(shards) => {
            let mut sum = 0;
            let mut result = Ok(());
            for shard in shards {
                match reply_streams[shard].number(b':').await {
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
                result = result.and(reply_streams[shard].status().await);
            }
            output.extend_from_slice(reply::OK);
            result
        }
        Piece::Text(head) => {
            let mut text = head.into_bytes();
            let mut result = Ok(());
            for reply_stream in reply_streams {
                let mut part = Replies::new();
                result = result.and(reply_stream.copy_reply(&mut part).await);
                let part = part.bytes();
                let body = part.iter().position(|&byte| byte == b'\n').map_or(0, |end| end + 1);
                text.extend_from_slice(part[body..].strip_suffix(b"\r\n").unwrap_or_default());
            }
            reply::verbatim(output, &text);
            result
        }
    }
}

async fn join_elements(
    owners: &[usize],
    reply_streams: &mut [ReplyStream],
    output: &mut Replies,
) -> Result<(), Failure> {
    let mut result = Ok(());
    let mut is_array = vec![None; reply_streams.len()];
    let before = output.len();
    reply::array(output, owners.len());
    for &owner in owners {
        let has_array = match is_array[owner] {
            Some(has_array) => has_array,
            None => {
                let len = reply_streams[owner].number(b'*').await;
                let has_array = len.is_ok();
                result = result.and(len.map(drop));
                is_array[owner] = Some(has_array);
                has_array
            }
        };
        if has_array {
            result = result.and(reply_streams[owner].copy_reply(output).await);
        }
        if output.len() - before > MAX_REPLY {
            output.truncate(before);
            result = Err(REPLY_TOO_LONG.into());
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use futures_lite::{AsyncReadExt, AsyncWriteExt};
    use glommio::{LocalExecutorBuilder, Placement};
    use shmipc_glommio::{Config, Listener};

    use super::*;
    use crate::kv::remote_shards::ONLY;

    impl ReplySink for Vec<u8> {
        async fn send(&mut self, replies: &mut Replies, kept: usize) -> io::Result<()> {
            replies.parts().iter().for_each(|part| self.extend_from_slice(part));
            replies.clear(kept);
            Ok(())
        }
    }

    fn config() -> Config {
        Config::builder().buffer_size(1 << 20).build().unwrap()
    }

    /// A shard that answers every first batch with this, then ends the session.
    async fn answer_once_each(listener: Listener, answer: &'static [u8], sessions: Rc<Cell<u32>>) {
        while let Ok(session) = listener.accept().await {
            sessions.set(sessions.get() + 1);
            let mut stream = session.accept().await.unwrap();
            let mut only = vec![0; ONLY.len()];
            stream.read_exact(&mut only).await.unwrap();
            assert_eq!(only, ONLY);
            stream.write_all(reply::OK).await.unwrap();
            let mut batch = [0; 1000];
            stream.read(&mut batch).await.unwrap();
            stream.write_all(answer).await.unwrap();
            session.close().await.unwrap();
        }
    }

    /// The replies to two commands for the other shard, between two of this one.
    async fn ask(batch: &mut CrossShardBatch, remote_shards: &RemoteShards) -> String {
        let mut client = Vec::new();
        batch.replies().extend_from_slice(b"+first\r\n");
        batch.forward(1, b"*1\r\n$3\r\nONE\r\n");
        batch.forward(1, b"*1\r\n$3\r\nTWO\r\n");
        batch.replies().extend_from_slice(b"+last\r\n");
        batch.finish(remote_shards, &mut client).await.unwrap();
        String::from_utf8(client).unwrap()
    }

    #[test]
    fn a_shard_that_fails_is_told_of_in_its_place_and_asked_again_later() {
        let name = format!("shmipc-kv-cross-shard-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let executor = LocalExecutorBuilder::new(Placement::Unbound).make().unwrap();
        executor.run(async move {
            let socket = |shard: usize| format!("{}.{shard}", path.display());
            let first = Listener::bind(socket(0), config()).unwrap();
            let remote_shards = RemoteShards::new(&path, config()).unwrap();
            let mut batch = CrossShardBatch::new(0, 2, true);
            let replies = ask(&mut batch, &remote_shards).await;
            let lines: Vec<&str> = replies.split("\r\n").collect();
            assert_eq!((lines[0], lines[3], lines.len()), ("+first", "+last", 5), "{replies}");
            assert!(lines[1].starts_with("-ERR shard 1 cannot be reached: "), "{replies}");
            assert_eq!(lines[1], lines[2]);

            let listener = Listener::bind(socket(1), config()).unwrap();
            let sessions = Rc::new(Cell::new(0));
            let answer = b"$3\r\none\r\n$3\r\ntw";
            let shard = answer_once_each(listener, answer, Rc::clone(&sessions));
            let shard = glommio::spawn_local(shard);
            for count in 1..4 {
                let replies = ask(&mut batch, &remote_shards).await;
                let rest = replies.strip_prefix("+first\r\n$3\r\none\r\n-ERR the shard's stream ");
                let rest = rest.unwrap_or_else(|| panic!("{replies}"));
                assert!(rest.ends_with("\r\n+last\r\n") && !rest.contains("tw"), "{replies}");
                // Sessions that end are made again, asked for or not.
                assert!(sessions.get() >= count);
            }
            shard.cancel().await;
            drop(first);
        });
    }
}
