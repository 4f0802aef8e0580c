// SPDX-License-Identifier: MIT OR Apache-2.0
//! Making glommio look at its rings while a task of this core is always runnable.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;

use futures_lite::future::yield_now;

use crate::exec::wakers::WakerSlot;
use crate::net::socket::{Received, Socket};

/// Makes glommio look at its rings: a byte through a socket pair completes a receive on the latency
/// ring, and that preempts.
///
/// Two pairs take strict turns. A look at the rings submits the receives that wait to be submitted,
/// and finds those that have completed; the task of the pair that was used runs after it, and its
/// next receive waits for the next look. So of the two, the one that was not used is the one whose
/// receive the kernel has.
pub(crate) struct RingKick {
    pairs: Vec<Socket>,
    state: Rc<RingKickState>,
}

#[derive(Default)]
struct RingKickState {
    /// Which pair is next.
    turn: Cell<usize>,
    /// Whether a byte is on its way, so that none is sent to a receive that is not submitted.
    is_under_way: Cell<bool>,
    /// The poller, while it waits for the first byte to arrive.
    arrived: WakerSlot,
}

/// A task that receives.
type Swallow = Pin<Box<dyn Future<Output = ()>>>;

impl RingKick {
    /// `spawn` starts a task beside the poller's.
    pub(crate) fn new(spawn: impl Fn(Swallow)) -> Self {
        let state = Rc::new(RingKickState::default());
        let pairs: io::Result<Vec<_>> = (0..2).map(|_| UnixStream::pair()).collect();
        let Ok(pairs) = pairs else {
            // Out of descriptors. Sessions work without; sockets and timers beside them are later.
            tracing::warn!("no socket pair: io_uring is looked at less often while sessions spin");
            return Self { pairs: Vec::new(), state };
        };
        let start = |(index, (near, far)): (usize, (UnixStream, UnixStream))| {
            let far = Socket::of_our_own(OwnedFd::from(far));
            spawn(Box::pin(swallow(far, index, Rc::clone(&state))));
            Socket::of_our_own(OwnedFd::from(near))
        };
        Self { pairs: pairs.into_iter().enumerate().map(start).collect(), state }
    }

    /// Sends the first byte and waits until it has arrived: from then on the kernel has a receive.
    ///
    /// While nobody spins, glommio looks at its rings as soon as there is nothing else to do. A
    /// byte sent while somebody does would wait for the timer of 100 ms.
    pub(crate) async fn first(&self) {
        // Once the receives have begun, so that the byte is not found there without a look.
        for _ in 0..self.pairs.len() {
            yield_now().await;
        }
        self.send();
        poll_fn(|context| {
            if !self.state.is_under_way.get() {
                return Poll::Ready(());
            }
            self.state.arrived.register(context);
            Poll::Pending
        })
        .await;
    }

    /// Sends a byte, unless one is on its way.
    pub(crate) fn send(&self) {
        if let Some(socket) = self.pairs.get(self.state.turn.get())
            && !self.state.is_under_way.replace(true)
        {
            // One byte at a time always fits.
            let _ = socket.try_send(&[0]);
        }
    }
}

/// Receives until the other end goes, and passes the turn on.
async fn swallow(socket: Socket, index: usize, state: Rc<RingKickState>) {
    while socket.readable().await.is_ok() {
        match socket.try_receive(&mut [0; 8]) {
            Ok(Received::Bytes(_)) => {
                state.turn.set(1 - index);
                state.is_under_way.set(false);
                state.arrived.wake();
            }
            Ok(Received::Nothing) => {}
            Ok(Received::End | Received::Descriptors(_)) | Err(_) => break,
        }
    }
    // Nobody will: sessions work without.
    state.is_under_way.set(false);
    state.arrived.wake();
}
