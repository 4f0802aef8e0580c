// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ending a session when its peer has taken what was sent: the waits of
//! [`ending`](shmipc_core::proto::session::ending).

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use futures_lite::future::{or, poll_fn, yield_now};

use crate::exec::runtime::sleep;
use crate::exec::task_waker::relayed;
use crate::exec::wakers::WakerSlot;
use crate::session::local_reactor::LocalReactor;
use crate::session::state::SessionInner;
use shmipc_core::error::{Error, Result};
use shmipc_core::proto::session::ending::{FinalStep, FinalWait};
use shmipc_core::shm::pool::SliceId;

/// How long the first pause between two looks is, and the longest: each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_micros(100);
const MAX_PAUSE: Duration = Duration::from_millis(5);

impl SessionInner {
    /// Waits until the peer has taken all that was sent to it before now. What is sent meanwhile is
    /// not waited for. Cancel-safe.
    ///
    /// # Errors
    ///
    /// [`Error::NotTaken`], if it has not by the end of its time; why the session ended, if it did
    /// so before.
    pub(crate) async fn let_peer_take(&self, limit: Duration) -> Result<()> {
        let wait = RefCell::new(FinalWait::new(limit));
        let too_late = async {
            relayed(sleep(limit)).await;
            Err(self.proto.not_taken(self, &wait.borrow()))
        };
        or(self.wait_until_taken(&wait), too_late).await
    }

    async fn wait_until_taken(&self, wait: &RefCell<FinalWait<SliceId>>) -> Result<()> {
        self.flush_queue();
        self.flushed().await?;
        let mut pause = FIRST_PAUSE;
        loop {
            let step = self.proto.poll_final(self, &mut wait.borrow_mut(), Instant::now())?;
            match step {
                FinalStep::Done => return Ok(()),
                FinalStep::AwaitSocket => self.flushed().await?,
                FinalStep::Again => {
                    pause = FIRST_PAUSE;
                    yield_now().await;
                }
                FinalStep::Pause => {
                    relayed(sleep(pause)).await;
                    pause = (pause * 2).min(MAX_PAUSE);
                }
            }
        }
    }

    /// The peer has ended the session. Whether it had taken everything by then, as far as can be
    /// told.
    pub(crate) async fn has_peer_taken_all(&self) -> bool {
        if self.socket.outbox.is_cut() {
            return false;
        }
        if let Some(has_taken_all) = self.proto.has_peer_taken_all(self) {
            return has_taken_all;
        }
        let (mut slices, mut next) = (Vec::new(), Some(SliceId::default()));
        while let Some(from) = next {
            next = self.memory.pool.find_sent(from, &mut slices);
            yield_now().await;
        }
        slices.is_empty()
    }

    /// The last handle of a user is gone. Ends the session, at once or when the peer has taken what
    /// was sent to it.
    pub(crate) fn end_at_last(self: &Rc<Self>) {
        self.flush_queue();
        let is_sent = self.socket.outbox.is_empty() && !self.proto.is_waited_for_at_end(self);
        if self.is_over() || is_sent {
            return self.fail(Error::SessionClosed);
        }
        self.proto.refuse_unaccepted(self);
        self.reactor.shared().push(self);
    }
}

thread_local! {
    static SOCKETS: ShutDownAtEnd = const { ShutDownAtEnd(RefCell::new(Vec::new())) };
}

/// Sessions that wait for their peer when their thread ends. Their tasks never run again, and
/// glommio drops nothing of them, so their peers have to be told here.
struct ShutDownAtEnd(RefCell<Vec<Weak<SessionInner>>>);

impl Drop for ShutDownAtEnd {
    fn drop(&mut self) {
        for session in self.0.borrow().iter().filter_map(Weak::upgrade) {
            session.socket.shut_down();
            // To end it would wake tasks of an executor that is no more.
            std::mem::forget(session);
        }
    }
}

/// Sessions whose handles are gone, while their peer takes what was sent to it.
///
/// A handle can be dropped where no task can be started: outside of the executor. So one that is
/// there already takes over.
#[derive(Default)]
pub(crate) struct Lingering {
    new: RefCell<Vec<Rc<SessionInner>>>,
    count: Cell<usize>,
    task: WakerSlot,
}

impl Lingering {
    fn push(&self, session: &Rc<SessionInner>) {
        // It does not matter when the thread is at its end already.
        let _ = SOCKETS.try_with(|sockets| {
            let mut sockets = sockets.0.borrow_mut();
            sockets.retain(|session| session.upgrade().is_some_and(|session| !session.is_over()));
            sockets.push(Rc::downgrade(session));
        });
        self.count.set(self.count.get() + 1);
        self.new.borrow_mut().push(Rc::clone(session));
        self.task.wake();
    }

    /// Whether no session waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.count.get() == 0
    }
}

/// Ends sessions whose handles are gone, each in a task of its own.
pub(crate) async fn end_lingering(reactor: Rc<LocalReactor>) {
    loop {
        let sessions = poll_fn(|context| {
            let sessions = std::mem::take(&mut *reactor.shared().new.borrow_mut());
            if !sessions.is_empty() {
                return std::task::Poll::Ready(sessions);
            }
            reactor.shared().task.register(context);
            std::task::Poll::Pending
        })
        .await;
        for session in sessions {
            let of = Rc::clone(&reactor);
            reactor.spawn(async move {
                let limit = session.config.settings().limits.close_timeout;
                let taken = session.let_peer_take(limit).await;
                session.fail(taken.err().unwrap_or(Error::SessionClosed));
                let count = &of.shared().count;
                count.set(count.get() - 1);
            });
        }
    }
}
