// SPDX-License-Identifier: MIT OR Apache-2.0
//! One client: it writes commands, and reads one reply to each, in order.
//!
//! The same loop serves TCP, Unix sockets and streams over shared memory. It takes all commands
//! that have come, and answers them together. A client need not read while it writes, within
//! limits: [`ClientStream`].

use std::io;
use std::rc::Rc;

use futures_lite::future::yield_now;
use futures_lite::{AsyncRead, AsyncWrite};

use super::caller::{Caller, Flow};
use super::client_stream::ClientStream;
use super::cross_shard::CrossShardBatch;
use super::input::Input;
use super::origin::Origin;
use super::reply;
use super::resp::Parser;
use super::shard::{Counted, Shard};

/// After so many turns without a rest, others have theirs.
const TURNS: u32 = 8;

/// Why a batch of commands ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// There is no whole command left.
    Starved,
    /// There may be more, but there is enough to answer.
    Full,
    /// The client is hung up on.
    Over,
}

/// How a client is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Writes {
    /// A write takes bytes from one place.
    Plain,
    /// A write collects bytes from several places.
    Vectored,
}

/// Serves a client until it leaves, or breaks the protocol.
pub(crate) async fn serve(
    shard: &Rc<Shard>,
    stream: impl AsyncRead + AsyncWrite + Unpin,
    writes: Writes,
    origin: Origin,
) -> io::Result<()> {
    let _counted = Counted::new(&shard.counters.clients);
    let mut connection = Connection::new(shard, writes, origin);
    let mut stream = ClientStream::new(stream, &shard.output, origin.is_own_shard());
    let mut turns = 0;
    loop {
        let turn = connection.take_commands(&mut stream.input);
        let unread = stream.input.unread().len();
        match connection.batch.finish(&shard.remote_shards, &mut stream).await {
            Err(error) if error.kind() == io::ErrorKind::QuotaExceeded => {
                shard.complaints.tell(&origin, format_args!("{error}"));
                return stream.hang_up().await;
            }
            finished => finished?,
        }
        match turn {
            // More was read while replies could not be written: it comes before waiting for more.
            Turn::Starved if stream.input.unread().len() > unread => {}
            Turn::Starved => {
                if stream.fill(connection.parser.expected_len()).await? == 0 {
                    return Ok(());
                }
            }
            Turn::Full => {}
            Turn::Over => return stream.hang_up().await,
        }
        turns += 1;
        if turns % TURNS == 0 || turn == Turn::Full {
            yield_now().await;
        }
    }
}

struct Connection {
    parser: Parser,
    caller: Caller,
    batch: CrossShardBatch,
}

impl Connection {
    fn new(shard: &Rc<Shard>, writes: Writes, origin: Origin) -> Self {
        Self {
            parser: Parser::new(shard.settings.limits),
            caller: Caller::new(shard, origin),
            batch: CrossShardBatch::new(
                shard.place.index,
                shard.place.count,
                writes == Writes::Vectored,
            ),
        }
    }

    /// Executes, or passes on, the commands that are there.
    fn take_commands(&mut self, input: &mut Input) -> Turn {
        let Self { parser, caller, batch } = self;
        caller.start_turn();
        while !batch.is_full() {
            let len = match parser.parse(input.unread()) {
                Ok(Some(len)) => len,
                Ok(None) => return Turn::Starved,
                Err(error) => {
                    reply::error(batch.replies(), format_args!("ERR {error}"));
                    return Turn::Over;
                }
            };
            let flow = caller.take(parser.request(input.unread()), batch);
            if flow == Flow::Later {
                return Turn::Full;
            }
            parser.take();
            input.consume(len);
            if flow == Flow::HangUp {
                return Turn::Over;
            }
        }
        Turn::Full
    }
}
