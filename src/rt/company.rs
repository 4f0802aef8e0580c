// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sessions that have nothing to do, on a core that is awake for others.
//!
//! They could go to sleep, but then their peers would have to wake them: a system call, and more
//! on the other side; and while the poller spins, an eventfd is not heard before the next look at
//! io_uring. To look at a queue costs a few nanoseconds. So as long as the poller spins for other
//! sessions, these keep it company: they have no turns and do not keep it awake, but do not say
//! that they sleep, and their queues are looked at in each pass. When it has nobody left to spin
//! for, all of them go to sleep.

use std::rc::Rc;

use super::activity::Place;
use super::session::SessionInner;
use super::sweep::SweepList;

/// How many there are at most. The others sleep.
const MOST: usize = 16;

#[derive(Default)]
pub(super) struct Company {
    sessions: SweepList<Rc<SessionInner>>,
}

impl Company {
    /// Takes a session in that is not active any more. Gives the one for which there is no room
    /// then, which is to sleep: that which has had nothing to do for longest.
    pub(super) fn take_in(&self, session: Rc<SessionInner>) -> Option<Rc<SessionInner>> {
        let oldest = if self.sessions.len() < MOST { None } else { self.sessions.pop_first() };
        session.activity.place.set(Place::Company);
        self.sessions.push(session);
        oldest.filter(|oldest| oldest.activity.leave_company())
    }

    /// Puts those before the poller for which something has come.
    #[inline]
    pub(super) fn look(&self) {
        if !self.sessions.is_empty() {
            self.look_at_all();
        }
    }

    fn look_at_all(&self) {
        self.sessions.sweep(|session| {
            let place = &session.activity.place;
            if place.get() == Place::Company && session.has_events() {
                session.activity.note_looked_on();
                session.activate();
            }
            place.get() == Place::Company && !session.is_over()
        });
    }

    /// Adds all of them to those that are to sleep now.
    pub(super) fn leave(&self, tired: &SweepList<Rc<SessionInner>>) {
        self.sessions.drain(|session| {
            if session.activity.leave_company() {
                tired.push(session);
            }
        });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_lite::AsyncWriteExt;
    use futures_lite::future::zip;
    use glommio::LocalExecutorBuilder;

    use super::*;
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

    /// What comes over the socket is behind what is in the queue, and so somebody else than the
    /// poller takes that. Only a turn tells the peer that there is room again.
    #[test]
    fn what_is_taken_out_of_turn_is_followed_by_one() {
        let test = async {
            let _restless = pair(0, Spin::Forever).await;
            let [client, server] = pair(1, Spin::For(Duration::from_micros(1))).await;
            let mut near = client.open_stream().unwrap();
            near.write_all(b"first").await.unwrap();
            let mut far = server.accept().await.unwrap();
            assert_eq!(far.recv().await.unwrap().unwrap().into_bytes(), b"first"[..]);
            let place = &server.inner().activity.place;
            while place.get() != Place::Company {
                glommio::timer::sleep(Duration::from_millis(1)).await;
            }
            // None of this lets another task run.
            near.write_all(b"second").await.unwrap();
            client.inner().flush_queue();
            assert!(server.inner().has_events());
            server.inner().drain_all();
            assert!(!server.inner().has_events());
            assert_eq!(place.get(), Place::Active);

            let in_flight = || client.inner().lanes.producer.borrow_mut().in_flight().unwrap().1;
            assert_eq!(in_flight(), 1);
            while in_flight() > 0 {
                glommio::timer::sleep(Duration::from_millis(1)).await;
            }
            assert_eq!(far.recv().await.unwrap().unwrap().into_bytes(), b"second"[..]);
        };
        LocalExecutorBuilder::default().make().unwrap().run(test);
    }
}
