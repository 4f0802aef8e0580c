// SPDX-License-Identifier: MIT OR Apache-2.0
//! The two IO queues of a session, and when what is in them is published.

use std::cell::{Cell, RefCell, RefMut};

use crate::exec::wakers::WakerList;
use shmipc_core::error::MemoryError;
use shmipc_core::shm::event_queue::{Consumer, Producer};
use shmipc_core::shm::map::region::Region;
use shmipc_core::wire::Event;

/// How many events are published with one store, in the middle of a batch.
const PUBLISH_EVERY: i64 = 8;

/// Both queues of a session, from this side.
pub(crate) struct Queues {
    pub(crate) producer: RefCell<Producer<Region>>,
    pub(crate) consumer: RefCell<Consumer<Region>>,
    /// Tasks that wait for room in the send queue.
    pub(crate) waiters: WakerList,
    /// Whether something was put into the queue since the peer's working flag was last looked at.
    pub(crate) must_look: Cell<bool>,
}

/// Room for one event in the send queue. The queue cannot be used otherwise meanwhile.
pub(crate) struct QueueSlot<'a> {
    producer: RefMut<'a, Producer<Region>>,
    must_look: &'a Cell<bool>,
}

impl QueueSlot<'_> {
    /// Puts the event there: see [`Queues::push`].
    #[inline(always)]
    pub(crate) fn commit(mut self, event: Event) {
        self.producer.push_into_room(event);
        if !self.must_look.replace(true) || self.producer.unpublished() >= PUBLISH_EVERY {
            self.producer.publish();
        }
    }
}

impl Queues {
    pub(crate) fn new(producer: Producer<Region>, consumer: Consumer<Region>) -> Self {
        Self {
            producer: RefCell::new(producer),
            consumer: RefCell::new(consumer),
            waiters: WakerList::default(),
            must_look: Cell::new(false),
        }
    }

    /// Puts an event into the send queue. `Ok(false)`: it is full.
    ///
    /// The first event since the last turn is published at once, for latency. Those that follow it
    /// are published a few at a time, so that the peer works on them while this side makes more,
    /// and the rest at the next turn, which also looks whether the peer must be woken.
    #[inline]
    pub(crate) fn push(&self, event: Event) -> Result<bool, MemoryError> {
        let slot = self.reserve()?;
        Ok(slot.map(|slot| slot.commit(event)).is_some())
    }

    /// Reserves room for the next event of the send queue. `None`: it is full.
    #[inline(always)]
    pub(crate) fn reserve(&self) -> Result<Option<QueueSlot<'_>>, MemoryError> {
        let mut producer = self.producer.borrow_mut();
        let is_full = producer.is_full()?;
        Ok((!is_full).then_some(QueueSlot { producer, must_look: &self.must_look }))
    }

    /// Whether the peer has published events that were not taken yet.
    #[inline]
    pub(crate) fn has_events(&self) -> bool {
        // What is wrong with the queue is found, and named, when it is drained.
        self.consumer.borrow_mut().has_events().unwrap_or(true)
    }

    /// Tells the peer how much was taken, if nothing is being taken at this moment: that fails for
    /// another reason.
    pub(crate) fn give_back_taken(&self) {
        if let Ok(mut consumer) = self.consumer.try_borrow_mut() {
            consumer.publish();
        }
    }

    #[inline]
    pub(crate) fn is_lost(&self) -> bool {
        self.consumer.borrow().is_lost()
    }

    /// Wakes those that wait for room, if there is some.
    pub(crate) fn wake_waiters(&self) -> Result<(), MemoryError> {
        if !self.waiters.is_empty() && !self.producer.borrow_mut().is_full()? {
            self.waiters.wake_all();
        }
        Ok(())
    }
}
