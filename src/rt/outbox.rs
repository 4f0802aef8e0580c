// SPDX-License-Identifier: MIT OR Apache-2.0
//! What waits for the socket to take it, in order.
//!
//! A message goes out at once when the socket takes it. Only what the socket does not take is kept,
//! and a task waits for the socket; it exists only while something is kept.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;

use bytes::{Buf, Bytes};
use futures_lite::future::poll_fn;

use super::sending::is_gone;
use super::session::SessionInner;
use super::socket::Socket;
use super::wakers::WakerList;

/// Payload waits until less than this is kept, so that a slow peer costs a bounded amount of
/// memory.
const KEEP_AT_MOST: usize = 256 << 10;

/// What may be kept besides payload.
const KEEP_OF_OTHERS: usize = 4 << 20;

/// The outbound half of a session's socket.
#[derive(Default)]
pub(super) struct Outbox {
    kept: RefCell<VecDeque<Bytes>>,
    kept_bytes: Cell<usize>,
    /// How much may be kept, of a message that is longer than others, until nothing is.
    allowed_bytes: Cell<usize>,
    /// Whether the task that waits for the socket runs.
    has_task: Cell<bool>,
    waiting: WakerList,
    /// Whether something was thrown away, since the session ended first.
    is_cut: Cell<bool>,
}

impl Outbox {
    /// Sends a message, or keeps it behind those that were kept. Gives whether a task must be
    /// started to send the rest.
    pub(super) fn send(&self, socket: &Socket, message: &[u8]) -> io::Result<bool> {
        let sent = if self.is_empty() { socket.try_send(message)? } else { 0 };
        if sent < message.len() {
            self.kept.borrow_mut().push_back(Bytes::copy_from_slice(&message[sent..]));
            self.kept_bytes.set(self.kept_bytes.get() + message.len() - sent);
            return Ok(!self.has_task.replace(true));
        }
        Ok(false)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.kept_bytes.get() == 0
    }

    /// How many bytes the socket has not taken.
    pub(super) fn len(&self) -> usize {
        self.kept_bytes.get()
    }

    /// Whether payload should wait.
    pub(super) fn is_full(&self) -> bool {
        self.kept_bytes.get() >= KEEP_AT_MOST
    }

    /// Tasks that wait until the outbox is no longer full, or empty.
    pub(super) fn waiting(&self) -> &WakerList {
        &self.waiting
    }

    /// Forgets everything: the socket is gone.
    pub(super) fn clear(&self) {
        self.kept.borrow_mut().clear();
        if self.kept_bytes.replace(0) > 0 {
            self.is_cut.set(true);
        }
        self.waiting.wake_all();
    }

    /// Whether something was thrown away.
    pub(super) fn is_cut(&self) -> bool {
        self.is_cut.get()
    }

    /// Whether more is kept than payload can be, so that the rest are messages that the peer makes
    /// this side send, and does not read.
    pub(super) fn is_overfull(&self, message_len: u32) -> bool {
        let payload = (KEEP_AT_MOST + message_len as usize).max(self.allowed_bytes.get());
        self.kept_bytes.get() > payload.saturating_add(KEEP_OF_OTHERS)
    }

    /// Says that a message of so many bytes comes, in however many pieces.
    pub(super) fn make_room(&self, len: usize) {
        let kept = if self.is_empty() { 0 } else { self.allowed_bytes.get() };
        // Each piece has a header.
        let needed = self.kept_bytes.get().saturating_add(len).saturating_add(len / 64);
        self.allowed_bytes.set(kept.max(needed));
    }

    fn drop_front(&self, sent: usize) {
        let mut kept = self.kept.borrow_mut();
        let Some(front) = kept.front_mut() else {
            return;
        };
        if sent >= front.len() {
            kept.pop_front();
        } else {
            front.advance(sent);
        }
        self.kept_bytes.set(self.kept_bytes.get().saturating_sub(sent));
    }
}

/// Sends what was kept until nothing is.
pub(super) async fn send_kept(session: Rc<SessionInner>) {
    let result = send_until_empty(&session).await;
    session.outbox().has_task.set(false);
    match result {
        Err(crate::Error::Os { source, .. }) if is_gone(&source) => session.note_hung_up(),
        Err(error) => session.fail(error),
        Ok(()) => {}
    }
}

async fn send_until_empty(session: &SessionInner) -> Result<(), crate::Error> {
    let mut sender = session.socket().sender()?;
    let outbox = session.outbox();
    while !outbox.is_empty() {
        let sent = poll_fn(|context| {
            let kept = outbox.kept.borrow();
            match kept.front() {
                Some(front) => sender.poll_send(context, front),
                // Cleared, since the session ended meanwhile.
                None => std::task::Poll::Ready(Ok(0)),
            }
        })
        .await
        .map_err(|error| crate::Error::os("send to the peer", error))?;
        outbox.drop_front(sent);
        outbox.waiting.wake_all();
    }
    Ok(())
}
