// SPDX-License-Identifier: MIT OR Apache-2.0
//! A simulated side's turns, its socket, and how it is woken: as a front end does it.

use crate::error::{Error, MemoryError};
use crate::proto::session::driver::Driver;
use crate::proto::session::sim::driver::{Residency, Side, SimStream, SocketTask};
use crate::proto::session::sim::link::SimPayload;
use crate::wire::Message;

const EVENTS_PER_TURN: usize = 256;
const EVENTS_IN_PLACE: usize = 16;
const WORTH_LOOKING_AGAIN: usize = 16;
const RECEIVES_PER_TURN: usize = 16;
const RECEIVES_WHEN_HUNG_UP: usize = 1 << 12;

/// What one receive came to.
enum Received {
    /// How much room was left.
    Bytes(usize),
    Nothing,
    End,
}

impl Side {
    /// The session begins.
    pub(super) fn start(&self) {
        self.activate();
        self.proto.announce_server(self);
    }

    /// One turn. `may_rest`: it does not go on looking for a while when there is nothing.
    pub(super) fn turn(&self, may_rest: bool) {
        let now = self.now();
        let has_moved = match self.drain(EVENTS_PER_TURN) {
            Ok(0) => false,
            Ok(_) => {
                self.proto.look_for_extension_early(self);
                true
            }
            Err(error) => {
                self.proto.fail(self, error.into());
                false
            }
        };
        if !has_moved && self.inn.show_head() {
            self.note_activity();
        }
        self.finish_closing();
        let is_paused = self.proto.has_too_much_unread();
        if !self.is_over() && (self.is_hung_up.get() || (is_paused && self.pipe_in.is_closed.get()))
        {
            self.hang_up();
        }
        self.proto.send_deferred_closes(self, now);
        self.proto.send_due_credit(self);
        self.wake_waiting();
        let has_sent = self.must_look.get();
        self.flush_queue();
        if self.is_over() {
            self.residency.set(Residency::Asleep);
        } else if !has_moved && !has_sent && may_rest {
            let is_waited_for =
                !self.room.is_empty() || !self.memory.is_empty() || !self.returning.is_empty();
            if !is_waited_for && !self.proto.has_deferred_work() {
                self.residency.set(Residency::Standby);
            }
        }
    }

    /// One that is not active is looked at. It sleeps if nothing has come, unless it `stays`.
    pub(super) fn look(&self, stays: bool) {
        if self.is_over() {
            self.residency.set(Residency::Asleep);
        } else if self.is_foreign {
            self.residency.set(Residency::Asleep);
            self.drain_as_others();
        } else if self.inn.available() > 0 {
            self.activate();
        } else if !stays {
            self.residency.set(Residency::Asleep);
            if !self.inn.try_sleep() {
                self.activate();
            }
        }
    }

    fn wake_waiting(&self) {
        if self.out.is_full().is_ok_and(|is_full| !is_full) {
            self.room.wake_all();
        }
        self.returning.wake_expired(self.now());
        if self.might_allocate() {
            self.memory.wake_all();
        } else {
            self.memory.wake_expired(self.now());
        }
    }

    fn drain(&self, limit: usize) -> Result<usize, MemoryError> {
        let mut taken = 0;
        while taken < limit && !self.is_over() {
            let count = self.inn.available().min(limit - taken);
            for _ in 0..count {
                if let Some(event) = self.inn.pop() {
                    self.note_activity();
                    self.proto.on_event(self, event)?;
                }
            }
            taken += count;
            if count < WORTH_LOOKING_AGAIN {
                break;
            }
        }
        Ok(taken)
    }

    pub(super) fn drain_all(&self) {
        match self.drain(self.inn.available_now()) {
            Ok(0) => {}
            Ok(_) => self.activate(),
            Err(error) => self.proto.fail(self, error.into()),
        }
    }

    /// The reader of a stream looks at the queue itself, once.
    pub(super) fn look_in_place(&self, stream: &SimStream) -> Option<SimPayload> {
        self.flush_queue();
        let count = self.inn.available().min(EVENTS_IN_PLACE);
        let mut payload = None;
        for index in 0..count {
            if index == 0 {
                self.proto.look_for_extension_early(self);
            }
            let Some(event) = self.inn.pop() else { break };
            self.note_activity();
            let result = match index {
                0 => self.proto.on_event_for(self, stream, event).map(|got| payload = got),
                _ => self.proto.on_event(self, event),
            };
            if let Err(error) = result {
                self.proto.fail(self, error.into());
                return None;
            }
        }
        payload.or_else(|| if stream.has_news() { stream.pop_inbound() } else { None })
    }

    /// The peer rang at the eventfd, or, in a session that polls, it is time to look.
    pub(super) fn on_bell(&self) {
        self.bell.set(false);
        if self.is_over() {
            return;
        }
        self.proto.on_wakeup(self);
        self.drain_as_others();
    }

    /// Others take what is there until they can sleep, as soon as they are woken.
    fn drain_as_others(&self) {
        while self.is_foreign && !self.is_over() {
            self.drain_all();
            if self.inn.try_sleep() {
                break;
            }
        }
    }

    fn finish_closing(&self) {
        let closes = self.proto.waiting_closes();
        if closes > 0 && (self.receive_messages(usize::MAX) || self.is_over()) {
            self.note_activity();
            self.proto.on_socket_read(self, closes);
        }
    }

    /// The task that reads the socket. At most so many bytes come at once.
    pub(super) fn read_socket(&self, at_most: usize) {
        if self.is_over() {
            return;
        }
        if self.proto.has_too_much_unread() {
            self.socket_task.set(SocketTask::Paused);
            return;
        }
        self.socket_task.set(SocketTask::Reading);
        if self.receive_messages(at_most) {
            self.finish_closing();
        }
    }

    /// Whether the task that reads the socket has something to do.
    pub(super) fn is_socket_ready(&self) -> bool {
        !self.is_over()
            && match self.socket_task.get() {
                SocketTask::Reading => self.pipe_in.is_readable(),
                SocketTask::Woken => true,
                SocketTask::Paused => false,
            }
    }

    fn receive_messages(&self, at_most: usize) -> bool {
        for _ in 0..RECEIVES_PER_TURN {
            if self.is_over() || self.proto.has_too_much_unread() {
                return false;
            }
            match self.receive_once(at_most) {
                Ok(Received::Bytes(room)) if room > 0 => return self.deframer.borrow().is_empty(),
                Ok(Received::Bytes(_)) => {}
                Ok(Received::Nothing) => return self.deframer.borrow().is_empty(),
                Ok(Received::End) => {
                    self.on_connection_end();
                    return true;
                }
                Err(error) => {
                    self.proto.fail(self, error);
                    return false;
                }
            }
        }
        false
    }

    fn receive_once(&self, at_most: usize) -> Result<Received, Error> {
        let received = {
            let mut deframer = self.deframer.borrow_mut();
            let hint = deframer.receive_hint();
            let space = deframer.space(hint);
            let room = space.len().min(at_most.max(1));
            let count = self.pipe_in.read(&mut space[..room]);
            deframer.commit(count);
            match count {
                0 if self.pipe_in.is_closed.get() => Received::End,
                0 => Received::Nothing,
                _ => Received::Bytes(room - count),
            }
        };
        if matches!(received, Received::Bytes(_)) {
            self.note_activity();
        }
        loop {
            let next = self.deframer.borrow_mut().next_message()?;
            let Some((header, message)) = next else { return Ok(received) };
            let is_wakeup = message == Message::SyncEvent;
            self.proto.on_message(self, &header, message)?;
            if is_wakeup {
                self.drain_as_others();
            }
        }
    }

    fn hang_up(&self) {
        for _ in 0..RECEIVES_WHEN_HUNG_UP {
            match self.receive_once(usize::MAX) {
                Ok(Received::Bytes(_)) => {}
                Ok(Received::Nothing | Received::End) => break,
                Err(error) => return self.proto.fail(self, error),
            }
        }
        self.on_connection_end();
    }

    fn on_connection_end(&self) {
        self.note_activity();
        if !self.is_foreign {
            return self.proto.on_peer_gone(self);
        }
        // Its streams end with what they had not read.
        for stream in self.proto.all_streams() {
            stream.discard();
        }
        self.proto.fail(self, Error::PeerClosed);
    }
}
