// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the socket has not taken yet.

use std::rc::Rc;
use std::task::{Context, Poll};

use crate::session::send_wait::{SendWait, WaitsFor};
use crate::session::socket_io::is_gone;
use crate::session::state::SessionInner;
use shmipc_core::error::{Error, Result};

/// Sends what was kept until nothing is.
pub(crate) async fn send_kept(session: Rc<SessionInner>) {
    match session.socket.outbox.send_kept(&session.socket.socket).await {
        Err(error) if is_gone(&error) => session.on_hang_up(),
        Err(error) => session.fail(Error::os("send to the peer", error)),
        Ok(()) => {}
    }
}

impl SessionInner {
    /// Waits until the socket has taken all that was sent.
    pub(crate) async fn flushed(&self) -> Result<()> {
        self.socket.outbox.waiting().until(|| self.is_flushed()).await
    }

    /// [`flushed`](Self::flushed), for those that are no future.
    #[inline]
    pub(crate) fn poll_flushed(
        &self,
        wait: &mut SendWait,
        context: &Context<'_>,
    ) -> Poll<Result<()>> {
        let flushed = self.is_flushed();
        if flushed.is_pending() {
            wait.begin(self, WaitsFor::Socket, context);
        }
        flushed
    }

    #[inline]
    fn is_flushed(&self) -> Poll<Result<()>> {
        let outbox = &self.socket.outbox;
        if outbox.is_cut() {
            return Poll::Ready(Err(self.proto.end_error()));
        }
        if outbox.is_empty() {
            return Poll::Ready(Ok(()));
        }
        self.ended().map_or(Poll::Pending, |error| Poll::Ready(Err(error)))
    }
}
