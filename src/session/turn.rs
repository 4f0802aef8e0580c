// SPDX-License-Identifier: MIT OR Apache-2.0
//! A session's turn with the reactor, and the short wait of a task that looks at the queue itself.

use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::reactor::poll_state::PollState;
use crate::reactor::pollable::{PollOutcome, Pollable};
use crate::session::close::Lingering;
use crate::session::state::{BufferMemory, SessionInner, StreamInner};
use shmipc_core::config::Spin;
use shmipc_core::error::{Error, MemoryError};
use shmipc_core::shm::chain::Chain;

/// The most events that one turn takes before the other sessions get theirs.
const EVENTS_PER_TURN: usize = 256;
/// How many events a task takes at once that looks at the queue itself.
const EVENTS_IN_PLACE: usize = 16;
/// After so many events in one go, the queue is looked at again in the same turn.
const WORTH_LOOKING_AGAIN: usize = 16;
/// How many events ahead a slice is brought near.
const LOOK_AHEAD: u32 = 2;
/// How often a task looks at the queue itself before it sleeps: a microsecond or so, within which a
/// peer answers that is at it, even if its own task has to go over its reactor.
const IN_PLACE_LOOKS: usize = 600;
/// After so many of these looks, the queues of the core's other sessions are looked at too.
const LOOKS_AT_OTHERS: usize = 8;
/// How many waits are not made in place after some that were in vain.
const IN_PLACE_SKIPS: u32 = 63;
/// What a session's tasks may spend in a row without the reactor's turn: some 20 us, so that other
/// tasks, and what io_uring has for them, are not kept waiting for much longer.
const IN_PLACE_CREDIT: usize = 32;
/// What a message costs of it: itself, and one more for so many bytes.
const IN_PLACE_COST: usize = 1;
const IN_PLACE_BYTES: usize = 32 << 10;

impl SessionInner {
    /// One turn of the reactor.
    pub(crate) fn turn(&self, now: Instant) -> PollOutcome {
        let spins = self.config.settings().spin != Spin::Never;
        self.activity.in_place.credit.set(if spins { IN_PLACE_CREDIT } else { 0 });
        if self.queues.must_look.get() {
            self.activity.note_wait_given_up();
        }
        let moved = match self.drain(EVENTS_PER_TURN) {
            Ok(0) => false,
            Ok(count) => {
                self.activity.last_batch.set(count);
                if let Spin::For(full) = self.config.settings().spin {
                    self.activity.note_end_of_wait(full, now);
                }
                self.proto.look_for_extension_early(self);
                true
            }
            Err(error) => {
                self.fail(error.into());
                false
            }
        };
        if !moved {
            // The peer needs its slots back only when the queue is half full, which `pop` sees to;
            // to write the line that it publishes on more often than that would only slow it down.
            self.queues.consumer.borrow_mut().publish();
        }
        self.finish_closing();
        // While the socket is not read, its end would not be noticed.
        let is_paused = self.proto.has_too_much_unread();
        if self.socket.is_hung_up.get() || (is_paused && self.socket.socket.is_hung_up()) {
            self.hang_up();
        }
        if self.proto.has_deferred_closes() {
            // Of this moment: a peer's time to read must not begin with the pass.
            self.proto.send_deferred_closes(self, Instant::now());
        }
        self.proto.send_due_credit(self);
        self.wake_waiting(now);
        let sent = self.queues.must_look.get();
        self.flush_queue();
        let stay = self.stay(now, moved || sent);
        // Last: all of this may have met what is wrong.
        let is_lost = || self.is_memory_lost().then_some(MemoryError::Lost);
        match self.memory.pool.take_broken().or_else(is_lost) {
            None => stay,
            Some(error) => {
                self.fail(error.into());
                PollOutcome::Closed
            }
        }
    }

    fn stay(&self, now: Instant, had_traffic: bool) -> PollOutcome {
        if self.is_over() {
            return PollOutcome::Closed;
        }
        let spins = match self.config.settings().spin {
            Spin::Never => had_traffic,
            Spin::For(full) => had_traffic || !self.activity.is_idle(full, now),
            _ => true,
        };
        if had_traffic {
            self.activity.idle_turns.set(0);
        }
        if spins {
            return if had_traffic { PollOutcome::Progress } else { PollOutcome::Spinning };
        }
        let is_waited_for = !self.queues.waiters.is_empty()
            || !self.memory.waiters.is_empty()
            || !self.waiters.returning.is_empty();
        if is_waited_for || self.proto.has_deferred_work() {
            return PollOutcome::Blocked;
        }
        self.activity.note_retired(matches!(self.config.settings().spin, Spin::For(_)));
        PollOutcome::Idle
    }

    /// Tells the peer that the queue is not looked at any more, until the socket or the doorbell
    /// wakes this side. `false`: something came meanwhile.
    pub(crate) fn fall_asleep(&self) -> bool {
        let result = self.queues.consumer.borrow_mut().try_sleep();
        match result {
            Ok(true) if self.is_memory_lost() => self.fail(MemoryError::Lost.into()),
            Ok(true) => self.counters.sleeps.add(1),
            Ok(false) => return false,
            Err(error) => self.fail(error.into()),
        }
        true
    }

    /// Takes up to `limit` events from the queue. Returns how many there were.
    #[inline]
    fn drain(&self, limit: usize) -> Result<usize, MemoryError> {
        let mut taken = 0;
        while taken < limit && !self.is_over() {
            let available = self.queues.consumer.borrow_mut().available()? as usize;
            let count = available.min(limit - taken);
            for _ in 0..count {
                let (event, ahead) = {
                    let mut consumer = self.queues.consumer.borrow_mut();
                    (consumer.pop(), consumer.offset_ahead(LOOK_AHEAD))
                };
                if let Some(offset) = ahead {
                    self.memory.pool.prefetch(offset);
                }
                if let Some(event) = event {
                    self.proto.on_event(self, event)?;
                }
            }
            taken += count;
            // What came while these were handled waits for the next turn, unless it is much.
            if count < WORTH_LOOKING_AGAIN {
                break;
            }
        }
        self.counters.events_received.add(taken as u64);
        Ok(taken)
    }

    /// Whether the peer has published events that were not taken yet.
    #[inline]
    pub(crate) fn has_events(&self) -> bool {
        self.queues.has_events()
    }

    /// Waits a moment for data of a stream that the calling task would otherwise sleep for, and
    /// drains the queue itself. Returns the stream's next chain when that is what came; everything
    /// else goes its way, behind it.
    ///
    /// The way over the reactor and back costs more than a peer that is at it takes to answer. It
    /// is taken all the same when other streams wait too, since their tasks could run meanwhile;
    /// when the [credit](IN_PLACE_CREDIT) is spent, since a task that never sleeps lets no other
    /// run; and for a while after waits in vain.
    pub(crate) fn wait_in_place(self: &Rc<Self>, stream: &StreamInner) -> Option<Chain> {
        let activity = &self.activity;
        let in_place = &activity.in_place;
        if in_place.credit.get() == 0
            || activity.waiting_readers.get() > 0
            || activity.last_batch.get() > 1
        {
            return None;
        }
        let skips = in_place.skips.get();
        if skips > 0 {
            in_place.skips.set(skips - 1);
            return None;
        }
        self.flush_queue();
        for look in 1..=IN_PLACE_LOOKS {
            // Without a pause: it would take longer than the look, and this ends soon.
            if !self.has_events() {
                if look % LOOKS_AT_OTHERS == 0 && self.reactor.has_events_beside(self) {
                    // The same task may wait for them too.
                    return None;
                }
                continue;
            }
            let chain = match self.drain_in_place(stream) {
                Ok(chain) => chain,
                Err(error) => {
                    self.fail(error.into());
                    return None;
                }
            };
            if chain.is_some() || stream.has_news() {
                let len = chain.as_ref().map_or(0, Chain::len);
                let cost = IN_PLACE_COST + len / IN_PLACE_BYTES;
                in_place.credit.set(in_place.credit.get().saturating_sub(cost));
                in_place.penalty.set(0);
                self.reactor.note_wait_in_place();
                return chain.or_else(|| stream.pop_inbound());
            }
        }
        let penalty = (in_place.penalty.get() * 2 + 1).min(IN_PLACE_SKIPS);
        in_place.penalty.set(penalty);
        in_place.skips.set(penalty);
        None
    }

    /// Takes the events that are there, and returns the first chain if it is one of this stream.
    #[inline]
    fn drain_in_place(&self, stream: &StreamInner) -> Result<Option<Chain>, MemoryError> {
        let available = self.queues.consumer.borrow_mut().available()? as usize;
        let count = available.min(EVENTS_IN_PLACE);
        if count > 0 {
            self.proto.look_for_extension_early(self);
        }
        let mut chain = None;
        for index in 0..count {
            let event = self.queues.consumer.borrow_mut().pop();
            let Some(event) = event else { break };
            if index == 0 {
                chain = self.proto.on_event_for(self, stream, event)?;
            } else {
                self.proto.on_event(self, event)?;
            }
        }
        self.activity.last_batch.set(count);
        self.counters.events_received.add(count as u64);
        Ok(chain)
    }

    /// Takes every event that was published before now. A peer that goes on publishing meanwhile
    /// cannot hold us.
    pub(crate) fn drain_all(&self) {
        let available = self.queues.consumer.borrow_mut().available_now();
        // They are known now, so one round takes them all.
        let result = available.and_then(|count| self.drain(count as usize));
        match result {
            Ok(0) => {}
            // What is to follow, as telling the peer that its slots are free, is done in a turn.
            Ok(_) => self.activate(),
            Err(error) => self.fail(error.into()),
        }
    }

    fn wake_waiting(&self, now: Instant) {
        if let Err(error) = self.queues.wake_waiters() {
            self.fail(error.into());
        }
        if !self.waiters.returning.is_empty() {
            self.waiters.returning.wake_expired(now);
        }
        let BufferMemory { pool, waiters } = &self.memory;
        if !waiters.is_empty() {
            if pool.might_allocate() {
                waiters.wake_all();
            } else {
                waiters.wake_expired(now);
            }
        }
    }
}

impl Pollable for SessionInner {
    type Shared = Lingering;

    fn activity(&self) -> &PollState {
        &self.activity
    }

    #[inline]
    fn is_over(&self) -> bool {
        self.is_over()
    }

    #[inline]
    fn has_events(&self) -> bool {
        self.has_events()
    }

    #[inline]
    fn turn(self: &Rc<Self>, now: Instant) -> PollOutcome {
        SessionInner::turn(self, now)
    }

    fn activate(self: &Rc<Self>) {
        SessionInner::activate(self);
    }

    fn may_be_looked_at(&self) -> bool {
        self.config.settings().spin != Spin::Never
    }

    fn set_working(&self) {
        self.queues.consumer.borrow().set_working();
    }

    fn fall_asleep(self: &Rc<Self>) -> bool {
        SessionInner::fall_asleep(self)
    }

    fn set_resting(&self, is_resting: bool) {
        self.memory.pool.set_resting(is_resting);
    }

    fn stall_timeout(&self) -> Option<Duration> {
        self.config.settings().limits.stall
    }

    fn look_after(&self, passed: Duration) {
        self.proto.check_liveness(self, passed);
    }

    fn terminate(&self) {
        self.fail(Error::SessionClosed);
    }

    fn abandon(&self) {
        self.abandon();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_lite::AsyncWriteExt;
    use futures_lite::future::zip;
    use glommio::LocalExecutorBuilder;

    use crate::reactor::poll_state::Residency;
    use crate::{Config, Connector, Listener, Session, Spin};

    async fn pair(number: u32, spin: Spin) -> [Session; 2] {
        let name = format!("shmipc-company-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let config = Config::builder().buffer_size(1 << 20).spin(spin).build().unwrap();
        let listener = Listener::bind(&path, config.clone()).unwrap();
        let connector = Connector::new(config);
        let (client, server) = zip(connector.connect(&path), listener.accept()).await;
        [client.unwrap(), server.unwrap()]
    }

    /// What comes over the socket is behind what is in the queue, and so that is not always
    /// taken in a turn. Only a turn tells the peer that there is room again.
    #[test]
    fn what_is_taken_out_of_turn_is_followed_by_one() {
        let test = async {
            let _restless = pair(0, Spin::Forever).await;
            let [client, server] = pair(1, Spin::For(Duration::from_micros(1))).await;
            let mut near = client.open_stream().unwrap();
            near.write_all(b"first").await.unwrap();
            let mut far = server.accept().await.unwrap();
            assert_eq!(far.recv().await.unwrap().unwrap().into_bytes(), b"first"[..]);
            let place = &server.inner().activity.residency;
            while place.get() != Residency::Standby {
                glommio::timer::sleep(Duration::from_millis(1)).await;
            }
            // None of this lets another task run.
            near.write_all(b"second").await.unwrap();
            client.inner().flush_queue();
            assert!(server.inner().has_events());
            server.inner().drain_all();
            assert!(!server.inner().has_events());
            assert_eq!(place.get(), Residency::Active);

            let in_flight = || client.inner().queues.producer.borrow_mut().in_flight().unwrap().1;
            assert_eq!(in_flight(), 1);
            while in_flight() > 0 {
                glommio::timer::sleep(Duration::from_millis(1)).await;
            }
            assert_eq!(far.recv().await.unwrap().unwrap().into_bytes(), b"second"[..]);
        };
        LocalExecutorBuilder::default().make().unwrap().run(test);
    }
}
