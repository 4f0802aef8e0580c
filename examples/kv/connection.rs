// SPDX-License-Identifier: MIT OR Apache-2.0
//! One client: it writes commands, and reads one reply to each, in order.
//!
//! The same loop serves TCP, Unix sockets and streams over shared memory. It takes all commands
//! that have come, and answers them together.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use futures_lite::future::{or, yield_now};
use futures_lite::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::caller::{Caller, Flow};
use super::exchange::Exchange;
use super::input::Input;
use super::reply;
use super::resp::Parser;
use super::shard::{Counted, Shard};

/// How long, and how much, a client may go on writing behind what it was hung up for. Its last
/// reply would be lost if the socket were closed on unread bytes.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 1 << 20;
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
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    writes: Writes,
) -> io::Result<()> {
    let _counted = Counted::new(&shard.counters.clients);
    let mut connection = Connection::new(shard, writes);
    let mut turns = 0;
    loop {
        let turn = connection.take_commands();
        connection.exchange.finish(&shard.peers, &mut stream).await?;
        match turn {
            Turn::Starved => {
                let expected_len = connection.parser.expected_len();
                if connection.input.fill(&mut stream, expected_len).await? == 0 {
                    return Ok(());
                }
            }
            Turn::Full => {}
            Turn::Over => return hang_up(stream).await,
        }
        turns += 1;
        if turns % TURNS == 0 || turn == Turn::Full {
            yield_now().await;
        }
    }
}

struct Connection {
    input: Input,
    parser: Parser,
    caller: Caller,
    exchange: Exchange,
}

impl Connection {
    fn new(shard: &Rc<Shard>, writes: Writes) -> Self {
        Self {
            input: Input::default(),
            parser: Parser::new(shard.settings.limits),
            caller: Caller::new(shard),
            exchange: Exchange::new(
                shard.place.index,
                shard.place.count,
                writes == Writes::Vectored,
            ),
        }
    }

    /// Executes, or passes on, the commands that are there.
    fn take_commands(&mut self) -> Turn {
        let Self { input, parser, caller, exchange } = self;
        caller.start_turn();
        while !exchange.is_full() {
            let len = match parser.parse(input.unread()) {
                Ok(Some(len)) => len,
                Ok(None) => return Turn::Starved,
                Err(error) => {
                    reply::error(exchange.replies(), format_args!("ERR {error}"));
                    return Turn::Over;
                }
            };
            let flow = caller.take(parser.request(input.unread()), exchange);
            parser.take();
            input.consume(len);
            if flow == Flow::HangUp {
                return Turn::Over;
            }
        }
        Turn::Full
    }
}

/// Ends a connection so that the client gets its last reply.
async fn hang_up(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    stream.close().await?;
    let drain = async {
        let (mut buffer, mut left) = ([0; 4096], LINGER_BYTES);
        while left > 0 {
            match stream.read(&mut buffer).await? {
                0 => break,
                count => left = left.saturating_sub(count),
            }
        }
        Ok(())
    };
    let enough = async {
        glommio::timer::sleep(LINGER).await;
        Ok(())
    };
    or(drain, enough).await
}
