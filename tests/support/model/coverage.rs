// SPDX-License-Identifier: MIT OR Apache-2.0
//! What happened over all seeds, so that the test notices when it no longer tests something.

use std::sync::atomic::{AtomicU64, Ordering};

use shmipc_glommio::{ProtocolVersion, Session, SessionStats, Wakeup};

macro_rules! happenings {
    ($($name:ident),* $(,)?) => {
        /// Something that must happen at least once in a full run.
        #[derive(Debug, Clone, Copy)]
        pub(crate) enum Seen { $($name),* }

        const ALL: &[Seen] = &[$(Seen::$name),*];
        static COUNTS: [AtomicU64; ALL.len()] = [const { AtomicU64::new(0) }; ALL.len()];
    };
}

happenings! {
    Seeds,
    Streams,
    Operations,
    BytesChecked,
    // As the sessions themselves count.
    FallbackSent,
    QueueFull,
    PoolEmpty,
    WindowFull,
    Sleeps,
    // What sessions of version 4 had agreed on, and that it was of use.
    WakesBySocket,
    WakesByEventFd,
    Polls,
    WokenByEventFd,
    SleptWhilePolling,
    SinglePopperLists,
    SharedListsInVersion4,
    SinglePopperListEmpty,
    // Futures that were dropped after they had been polled.
    WriteCancelled,
    AllocCancelled,
    SendCancelled,
    RecvCancelled,
    ReadCancelled,
    FillCancelled,
    AcceptCancelled,
    LifeCutShort,
    // Deadlines that ended an operation.
    WriteTimedOut,
    ReadTimedOut,
    // What is done with loans and messages.
    LoanDropped,
    LoanFilledInPlace,
    LoanOfOtherStream,
    PrivateLoan,
    Forwarded,
    MessageSplit,
    MessageReadInPlace,
    MessageDroppedUnread,
    LentTakenAsMessage,
    // Ends.
    EndRead,
    RefusedByPeersClose,
    RefusedAfterOwnEnd,
    EndedEarlyByClient,
    EndedEarlyByServer,
    TooManyStreams,
}

pub(crate) fn see(what: Seen) {
    count(what, 1);
}

pub(crate) fn count(what: Seen, times: u64) {
    COUNTS[what as usize].fetch_add(times, Ordering::Relaxed);
}

/// What a session is, and what it has counted.
pub(crate) fn add_session(session: &Session) {
    let stats = session.stats();
    add_stats(&stats);
    if session.protocol() != ProtocolVersion::V4 {
        return;
    }
    match session.wakeup() {
        Wakeup::EventFd => {
            see(Seen::WakesByEventFd);
            count(Seen::WokenByEventFd, stats.sync_events_received);
        }
        Wakeup::Polling(_) => {
            see(Seen::Polls);
            count(Seen::SleptWhilePolling, stats.sleeps);
            assert_eq!((stats.sync_events_sent, stats.sync_events_received), (0, 0));
        }
        _ => see(Seen::WakesBySocket),
    }
    if session.has_single_popper_lists() {
        see(Seen::SinglePopperLists);
        count(Seen::SinglePopperListEmpty, stats.pool_empty);
    } else {
        see(Seen::SharedListsInVersion4);
    }
}

fn add_stats(stats: &SessionStats) {
    count(Seen::FallbackSent, stats.fallback_sent);
    count(Seen::QueueFull, stats.queue_full);
    count(Seen::PoolEmpty, stats.pool_empty);
    count(Seen::WindowFull, stats.window_full);
    count(Seen::Sleeps, stats.sleeps);
}

/// One line, and what never happened.
pub(crate) fn report() -> (String, Vec<Seen>) {
    let count_of = |&what: &Seen| COUNTS[what as usize].load(Ordering::Relaxed);
    let line: Vec<_> = ALL.iter().map(|what| format!("{what:?} {}", count_of(what))).collect();
    let never = ALL.iter().copied().filter(|what| count_of(what) == 0).collect();
    (line.join(", "), never)
}
