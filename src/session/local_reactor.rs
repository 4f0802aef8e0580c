// SPDX-License-Identifier: MIT OR Apache-2.0
//! The reactor of this thread's executor.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use crate::exec::runtime::{executor_id, sleep};
use crate::reactor::poll_loop::{Reactor, run};
use crate::session::close::end_lingering;
use crate::session::state::SessionInner;

/// The reactor that drives sessions.
pub(crate) type LocalReactor = Reactor<SessionInner>;

/// How long the executor is given to close what is left, when it is shut down.
const LAST_LOOK: Duration = Duration::from_millis(1);

/// Ends what this crate runs on this executor, and waits until all of it is dropped: sessions end,
/// their memory is unmapped and their descriptors are closed, as far as no handle is left.
///
/// To be called at the end of an executor's life, in a program that goes on without it: glommio
/// does not drop tasks that still wait when their executor ends, and so nothing that they own. The
/// shards of a [`Server`](crate::Server) do this by themselves.
///
/// Sessions, listeners and clients of this executor end: what waits for them gets
/// [`Error::SessionClosed`](crate::Error::SessionClosed), and the files of sockets are removed. The
/// descriptor and the memory of a session go when the last handle on it is dropped; so a task that
/// owns one and waits for something else should be cancelled first. Without this call, or after a
/// panic, peers are still told at the end of the thread, and files removed, but descriptors and
/// memory stay for as long as the process.
///
/// ```
/// use shmipc_glommio::{Config, Connector, Listener};
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-shut-down-{}", std::process::id()));
/// glommio::LocalExecutorBuilder::default()
///     .spawn(move || async move {
///         let _listener = Listener::bind(&path, Config::default())?;
///         let session = Connector::new(Config::default()).connect(&path).await?;
///         drop(session);
///         shmipc_glommio::shutdown_executor().await;
///         shmipc_glommio::Result::<()>::Ok(())
///     })
///     .unwrap()
///     .join()
///     .unwrap()?;
/// # shmipc_glommio::Result::<()>::Ok(())
/// ```
pub async fn shutdown_executor() {
    // Not a new one, if there is none.
    let executor = executor_id();
    let Some(poller) = Current::get().filter(|poller| poller.executor() == executor) else {
        return;
    };
    poller.end_others();
    // Each of them ends in time by itself.
    while !poller.shared().is_empty() {
        sleep(LAST_LOOK).await;
    }
    poller.watching().end_sessions();
    // Tasks of the program that wait for something of these sessions end by that.
    sleep(LAST_LOOK).await;
    poller.cancel_tasks().await;
    // What was dropped with them is closed by io_uring, when it is looked at the next time.
    sleep(LAST_LOOK).await;
}

thread_local! {
    static CURRENT: Current = const { Current(RefCell::new(None)) };
}

/// The poller of this thread's executor.
struct Current(RefCell<Option<Rc<LocalReactor>>>);

impl Current {
    fn get() -> Option<Rc<LocalReactor>> {
        CURRENT.with(|current| current.0.borrow().clone())
    }

    fn set(poller: Option<Rc<LocalReactor>>) {
        let before = CURRENT.with(|current| current.0.replace(poller));
        // An executor that has ended, and left what it had.
        if let Some(before) = before {
            before.abandon();
        }
    }
}

impl Drop for Current {
    /// The thread ends, and its executor was not shut down, or ended by a panic.
    fn drop(&mut self) {
        if let Some(poller) = self.0.take() {
            poller.abandon();
        }
    }
}

impl LocalReactor {
    /// The poller of the executor that runs this task; started if need be.
    pub(crate) fn current() -> Rc<Self> {
        let executor = executor_id();
        if let Some(poller) = Current::get().filter(|poller| poller.executor() == executor) {
            return poller;
        }
        let poller = Rc::new(Self::new());
        Current::set(Some(Rc::clone(&poller)));
        let forget = Forget(Rc::clone(&poller));
        let running = run(Rc::clone(&poller));
        poller.spawn(async move {
            let _forget = forget;
            running.await;
        });
        poller.spawn(end_lingering(Rc::clone(&poller)));
        poller
    }
}

/// Ends with the poller's task: there is another one from then on.
struct Forget(Rc<LocalReactor>);

impl Drop for Forget {
    fn drop(&mut self) {
        // At the end of the thread there is none any more.
        let _ = CURRENT.try_with(|current| {
            current.0.borrow_mut().take_if(|poller| Rc::ptr_eq(poller, &self.0))
        });
    }
}
