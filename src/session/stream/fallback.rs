// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sending half on its way to the socket, and over it.

use std::task::{Context, Poll, ready};
use std::time::Instant;

use crate::session::send_wait::WaitsFor;
use crate::session::stream::write_half::WriteHalf;
use shmipc_core::error::{Error, Result};
use shmipc_core::proto::session::send::SocketGate;
use shmipc_core::shm::chain::Chain;
use shmipc_core::wire::FALLBACK_HEADER_LEN;

impl WriteHalf {
    /// The pool is empty: waits as long as the configuration says, then leaves shared memory.
    pub(crate) fn poll_pool(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        let session = self.session.inner();
        let now = Instant::now();
        let (until, is_new) =
            self.fallback_after.until(now, session.config.settings().fallback_after);
        if is_new {
            session.counters.pool_empty.add(1);
        }
        if now < until {
            self.waiting.begin(session, WaitsFor::Memory(Some(until)), context);
            ready!(self.deadline.poll(context));
            self.fallback_after.end();
            return Poll::Ready(Err(Error::DeadlinePassed));
        }
        self.fallback_after.expire();
        self.inner.state().fall_back();
        Poll::Ready(Ok(()))
    }

    /// Puts a message into slices that was written into private memory, now that there are some.
    /// Returns it as it is if there are not.
    #[cold]
    pub(crate) fn move_to_memory(&self, chain: Chain, context: &Context<'_>) -> Result<Chain> {
        let session = self.session();
        let pool = &session.memory.pool;
        if !chain.is_of(pool) {
            return Err(Error::ForeignLoan);
        }
        session.activate();
        if pool.is_short() && !self.may_use_reserve(context, chain.len()) {
            return Ok(chain);
        }
        let slices = pool.allocate(chain.len(), false);
        let Some(mut slices) = slices.map_err(|error| session.fail_memory(error))? else {
            return Ok(chain);
        };
        let bytes = chain.into_bytes();
        let count = slices.write(&bytes);
        debug_assert_eq!(count, bytes.len(), "it was allocated for that");
        Ok(slices)
    }

    /// Leaves shared memory for a message of private memory.
    pub(crate) fn fall_back(&self) {
        self.inner.state().fall_back();
    }

    /// Sends bytes over the socket, the first `max_len` of them.
    pub(crate) fn poll_send_fallback(
        &mut self,
        context: &mut Context<'_>,
        bytes: &[u8],
        max_len: usize,
    ) -> Poll<Result<usize>> {
        let count = self.session().proto.socket_piece(&self.inner, bytes.len().min(max_len));
        ready!(self.poll_socket_room(context, count))?;
        self.send_over_socket(&bytes[..count]);
        Poll::Ready(Ok(count))
    }

    /// Sends a whole message over the socket, of which there is room for the first piece: in one
    /// piece, since it is one message, as long as the peer takes messages that long. What is longer
    /// goes all the same, and nothing is waited for in between: half a message is none.
    pub(crate) fn send_whole_over_socket(&self, bytes: &[u8]) {
        let limits = &self.session().config.settings().limits;
        for piece in bytes.chunks(limits.message_len as usize - FALLBACK_HEADER_LEN) {
            self.send_over_socket(piece);
        }
    }

    fn send_over_socket(&self, piece: &[u8]) {
        let session = self.session();
        session.proto.send_over_socket(&**session, &self.inner, piece, Instant::now());
    }

    /// Waits until a message of this stream may go over the socket.
    pub(crate) fn poll_socket_room(
        &mut self,
        context: &mut Context<'_>,
        len: usize,
    ) -> Poll<Result<()>> {
        let session = self.session.inner();
        let gate = session.proto.socket_gate(session, &self.inner, &mut self.barrier, len)?;
        match gate {
            SocketGate::Open => return Poll::Ready(Ok(())),
            SocketGate::Window => {
                if self.inner.tasks.writer.register(context) {
                    session.counters.window_full.add(1);
                }
            }
            SocketGate::Budget => {
                self.inner.tasks.writer.register(context);
                self.waiting.begin(session, WaitsFor::Readers, context);
            }
            SocketGate::Outbox => self.waiting.begin(session, WaitsFor::Socket, context),
            SocketGate::Barrier => self.waiting.begin(session, WaitsFor::Room, context),
        }
        self.poll_deadline(context)
    }
}
