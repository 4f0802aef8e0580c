// SPDX-License-Identifier: MIT OR Apache-2.0
//! How many peers a listener deals with at the same time, and what they may bring.
//!
//! There is a bounded number of places for handshakes, in all and for each user. Whoever comes
//! while all are taken waits in a [queue](crate::connect::handshake_queue) of its user. But a peer
//! that connects and then says nothing must not keep others out for as long as a handshake may
//! take: while somebody waits for a place, handshakes that have taken an eighth of that time give
//! theirs up. An honest one takes a fraction of a millisecond, or what it takes to set memory
//! aside.
//!
//! A place is kept until the session is taken by the program. From then on it counts as a session,
//! with its memory, until it is dropped.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_lite::future::or;

use crate::exec::runtime::sleep;
use crate::exec::wakers::{WakerList, WakerSlot};
use shmipc_core::config::Limits;
use shmipc_core::error::{ALL_MEMORY, Error, HandshakeError, MemoryError};

/// A user, if known.
type Uid = Option<u32>;

/// The books of one listener.
pub(crate) struct Admission {
    limits: Limits,
    taken: Cell<usize>,
    taken_by: RefCell<BTreeMap<Uid, usize>>,
    /// Those that shake hands, the longest first.
    shaking: RefCell<Vec<Rc<Shaking>>>,
    /// Counts what may let somebody in, or somebody go: places given back, connections that begin
    /// to wait, handshakes that begin.
    changes: Cell<u64>,
    changed: WakerList,
    sessions: Cell<usize>,
    mapped_bytes: Cell<u64>,
}

struct Shaking {
    uid: Uid,
    since: Instant,
    /// When its time was over for the first time that somebody looked. This core may have done
    /// something else until then, and what the peer has said may not have been read.
    late_since: Cell<Option<Instant>>,
    must_go: Cell<bool>,
    waker: WakerSlot,
}

/// A place for a handshake, or for a session that waits to be taken.
pub(crate) struct HandshakePermit {
    admission: Rc<Admission>,
    uid: Uid,
}

/// A session that counts, with the memory that was mapped for it.
pub(crate) struct SessionPermit {
    admission: Rc<Admission>,
    mapped_bytes: Cell<u64>,
}

impl Admission {
    pub(crate) fn new(limits: &Limits) -> Rc<Self> {
        Rc::new(Self {
            limits: limits.clone(),
            taken: Cell::new(0),
            taken_by: RefCell::default(),
            shaking: RefCell::default(),
            changes: Cell::new(0),
            changed: WakerList::default(),
            sessions: Cell::new(0),
            mapped_bytes: Cell::new(0),
        })
    }

    /// How long a handshake may take while others wait for its place.
    fn grace(&self) -> Duration {
        self.limits.handshake_timeout / 8
    }

    /// How often something has changed.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.get()
    }

    pub(crate) fn note_change(&self) {
        self.changes.set(self.changes.get() + 1);
        self.changed.wake_all();
    }

    /// Waits until something changes that had not changed by then, or until `at`. Cancel-safe.
    pub(crate) async fn changed_since(&self, seen: u64, at: Option<Instant>) {
        let changed = self.changed.until(|| match self.changes.get() == seen {
            true => Poll::Pending,
            false => Poll::Ready(()),
        });
        let Some(at) = at else { return changed.await };
        let later = async {
            sleep(at.saturating_duration_since(Instant::now())).await;
        };
        or(changed, later).await;
    }

    fn taken_by(&self, uid: Uid) -> usize {
        self.taken_by.borrow().get(&uid).copied().unwrap_or(0)
    }

    /// Whether there is a place for a peer of this user.
    pub(crate) fn has_place(&self, uid: Uid) -> bool {
        self.taken.get() < self.limits.handshakes
            && self.taken_by(uid) < self.limits.handshakes_per_user
    }

    /// Takes a place for a peer of this user, if there is one.
    pub(crate) fn try_place(self: &Rc<Self>, uid: Uid) -> Option<HandshakePermit> {
        if !self.has_place(uid) {
            return None;
        }
        self.taken.set(self.taken.get() + 1);
        *self.taken_by.borrow_mut().entry(uid).or_default() += 1;
        Some(HandshakePermit { admission: Rc::clone(self), uid })
    }

    /// Has those give up their places that have had them for too long, as many of them as help
    /// those who wait: so many of each user. When the next one will have had its place for too
    /// long.
    pub(crate) fn dismiss(&self, waiting: impl Iterator<Item = (Uid, usize)>) -> Option<Instant> {
        let earliest = waiting.filter_map(|(uid, count)| self.dismiss_for(uid, count));
        earliest.min()
    }

    fn dismiss_for(&self, uid: Uid, count: usize) -> Option<Instant> {
        let is_users_limit = self.taken_by(uid) >= self.limits.handshakes_per_user;
        let shaking = self.shaking.borrow();
        let helps = |shaking: &&Rc<Shaking>| !is_users_limit || shaking.uid == uid;
        let mut going = shaking.iter().filter(helps).filter(|it| it.must_go.get()).count();
        let now = Instant::now();
        let mut next: Option<Instant> = None;
        for shaking in shaking.iter().filter(helps).filter(|it| !it.must_go.get()) {
            if going >= count {
                return None;
            }
            let mut at = shaking.since + self.grace();
            if at <= now {
                // All that are late are seen to be so now, so that they go together.
                let late_since = shaking.late_since.get().unwrap_or(now);
                shaking.late_since.set(Some(late_since));
                at = late_since + self.grace() / 2;
            }
            if at <= now {
                shaking.must_go.set(true);
                shaking.waker.wake();
                going += 1;
            } else {
                next = Some(next.map_or(at, |next| next.min(at)));
            }
        }
        next
    }

    /// Whether there may be one session more now. Asked before a peer is promised anything; it
    /// counts only [later](Self::session).
    ///
    /// # Errors
    ///
    /// There are as many as there may be.
    pub(crate) fn check_sessions(&self) -> Result<(), HandshakeError> {
        let most = self.limits.sessions;
        if self.sessions.get() >= most {
            Err(HandshakeError::TooManySessions(most))
        } else {
            Ok(())
        }
    }

    /// Counts a session from its handshake on.
    ///
    /// # Errors
    ///
    /// There are as many as there may be.
    pub(crate) fn session(self: &Rc<Self>) -> Result<SessionPermit, HandshakeError> {
        self.check_sessions()?;
        self.sessions.set(self.sessions.get() + 1);
        Ok(SessionPermit { admission: Rc::clone(self), mapped_bytes: Cell::new(0) })
    }
}

impl HandshakePermit {
    /// Carries on a handshake for as long as it may keep its place.
    pub(crate) async fn shake<T>(
        &self,
        handshake: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let shaking = Rc::new(Shaking {
            uid: self.uid,
            since: Instant::now(),
            late_since: Cell::new(None),
            must_go: Cell::new(false),
            waker: WakerSlot::default(),
        });
        let entry = Entry { admission: &self.admission, shaking };
        self.admission.shaking.borrow_mut().push(Rc::clone(&entry.shaking));
        self.admission.note_change();
        let dismissed = poll_fn(|context| {
            if entry.shaking.must_go.get() {
                return Poll::Ready(());
            }
            entry.shaking.waker.register(context);
            Poll::Pending
        });
        or(handshake, async {
            dismissed.await;
            Err(HandshakeError::GaveWay(entry.shaking.since.elapsed()).into())
        })
        .await
    }
}

impl Drop for HandshakePermit {
    fn drop(&mut self) {
        let admission = &self.admission;
        admission.taken.set(admission.taken.get() - 1);
        let mut taken_by = admission.taken_by.borrow_mut();
        match taken_by.get_mut(&self.uid) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(taken_by.remove(&self.uid)),
        }
        drop(taken_by);
        admission.note_change();
    }
}

/// A handshake's line in the books.
struct Entry<'a> {
    admission: &'a Admission,
    shaking: Rc<Shaking>,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.admission.shaking.borrow_mut().retain(|entry| !Rc::ptr_eq(entry, &self.shaking));
    }
}

impl SessionPermit {
    /// Counts memory that the peer brings, and what this side keeps for it.
    ///
    /// # Errors
    ///
    /// All sessions together would have more than they may.
    pub(crate) fn count_mapped(&self, bytes: u64) -> Result<(), MemoryError> {
        let limit = self.admission.limits.total_mapped_bytes;
        let have = self.admission.mapped_bytes.get().saturating_add(bytes);
        if have > limit {
            let what = ALL_MEMORY;
            return Err(MemoryError::TooLarge { what, have, limit });
        }
        self.admission.mapped_bytes.set(have);
        self.mapped_bytes.set(self.mapped_bytes.get() + bytes);
        Ok(())
    }
}

impl Drop for SessionPermit {
    fn drop(&mut self) {
        let admission = &self.admission;
        admission.sessions.set(admission.sessions.get() - 1);
        admission.mapped_bytes.set(admission.mapped_bytes.get() - self.mapped_bytes.get());
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use futures_lite::future::{poll_once, yield_now};

    use super::*;
    use shmipc_core::config::Config;

    fn run<F: Future<Output = ()> + 'static>(test: impl FnOnce() -> F) {
        glommio::LocalExecutorBuilder::default().make().unwrap().run(test());
    }

    fn admission(handshakes: usize, per_user: usize) -> Rc<Admission> {
        let builder = Config::builder().max_handshakes(handshakes);
        let config = builder.max_handshakes_per_user(per_user).max_sessions(2);
        let config =
            config.max_total_mapped_bytes(100).handshake_timeout(Duration::from_millis(80));
        Admission::new(&config.build().unwrap().settings().limits)
    }

    /// Waits for a place, as if nobody else did.
    async fn wait_for_place(admission: &Rc<Admission>, uid: Uid) -> HandshakePermit {
        loop {
            let seen = admission.changes();
            if let Some(place) = admission.try_place(uid) {
                return place;
            }
            let next = admission.dismiss([(uid, 1)].into_iter());
            admission.changed_since(seen, next).await;
        }
    }

    #[test]
    fn places_are_bounded_in_all_and_for_each_user() {
        run(async || {
            let admission = admission(3, 2);
            let first = wait_for_place(&admission, Some(1)).await;
            let second = wait_for_place(&admission, Some(1)).await;
            assert!(poll_once(wait_for_place(&admission, Some(1))).await.is_none());
            let other = wait_for_place(&admission, None).await;
            assert!(poll_once(wait_for_place(&admission, Some(2))).await.is_none());
            let waiting = glommio::spawn_local({
                let admission = Rc::clone(&admission);
                async move { wait_for_place(&admission, Some(1)).await }
            });
            yield_now().await;
            drop(other);
            drop(wait_for_place(&admission, Some(2)).await);
            drop(second);
            let third = waiting.await;
            drop((first, third));
            assert_eq!(admission.taken.get(), 0);
            assert!(admission.taken_by.borrow().is_empty());
        });
    }

    #[test]
    fn who_is_slow_gives_way_to_those_who_wait() {
        run(async || {
            let admission = admission(3, 2);
            let silent = |uid| {
                let admission = Rc::clone(&admission);
                glommio::spawn_local(async move {
                    let place = wait_for_place(&admission, uid).await;
                    place.shake(pending::<Result<(), Error>>()).await
                })
            };
            let slow = silent(Some(1));
            let other = silent(Some(2));
            yield_now().await;
            let ready = wait_for_place(&admission, Some(1)).await;
            // In all there are none left, and of this user neither: only one of its own helps.
            let place = wait_for_place(&admission, Some(1)).await;
            let error = slow.await.unwrap_err();
            assert!(matches!(error, Error::Handshake(HandshakeError::GaveWay(_))), "{error}");
            assert_eq!(admission.shaking.borrow().len(), 1, "another user's goes on");
            // Now it is in the way, too.
            let last = wait_for_place(&admission, Some(3)).await;
            assert!(other.await.is_err());
            assert!(admission.shaking.borrow().is_empty());
            drop((ready, place, last));
        });
    }

    #[test]
    fn a_core_that_was_busy_reads_what_has_come_before_it_dismisses() {
        run(async || {
            let admission = admission(1, 1);
            let place = wait_for_place(&admission, None).await;
            let answered = Rc::new(Cell::new(false));
            let answer = Rc::clone(&answered);
            let quick = glommio::spawn_local(async move {
                let read = poll_fn(|context| {
                    context.waker().wake_by_ref();
                    if answer.get() { Poll::Ready(()) } else { Poll::Pending }
                });
                let handshake = async {
                    read.await;
                    Ok::<_, Error>(())
                };
                let result = place.shake(handshake).await;
                drop(place);
                result
            });
            yield_now().await;
            // This core, and not the peer, takes longer than the peer may.
            std::thread::sleep(admission.grace() * 3);
            let waiting = glommio::spawn_local({
                let admission = Rc::clone(&admission);
                async move { drop(wait_for_place(&admission, Some(1)).await) }
            });
            yield_now().await;
            answered.set(true);
            quick.await.unwrap();
            waiting.await;
        });
    }

    #[test]
    fn sessions_and_their_memory_are_bounded() {
        let admission = admission(1, 1);
        let one = admission.session().unwrap();
        let two = admission.session().unwrap();
        assert_eq!(admission.session().err(), Some(HandshakeError::TooManySessions(2)));
        one.count_mapped(60).unwrap();
        two.count_mapped(40).unwrap();
        let error = two.count_mapped(1).unwrap_err();
        assert!(matches!(error, MemoryError::TooLarge { have: 101, limit: 100, .. }), "{error}");
        assert!(two.count_mapped(u64::MAX).is_err());
        drop(one);
        two.count_mapped(60).unwrap();
        drop(two);
        assert_eq!((admission.sessions.get(), admission.mapped_bytes.get()), (0, 0));
    }
}
