// SPDX-License-Identifier: MIT OR Apache-2.0
//! Connections that wait for a place for their handshake.
//!
//! Each user has a queue of its own, and the users take turns. So a user that is at its limit, or
//! connects without end, is waited for by its own connections only.
//!
//! Each that waits has a descriptor open. Their number is bounded: for one listener by its
//! configuration, and for all listeners of the process by half of the descriptors that it may have.
//! At the bound, the newest connection of the user that has the most is let go.

use std::collections::VecDeque;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::resource::{Resource, getrlimit};

/// A user, if known.
type Uid = Option<u32>;

pub(crate) struct HandshakeQueue<T> {
    /// Users of whom something waits; whose turn it is first.
    users: VecDeque<(Uid, VecDeque<Entry<T>>)>,
    len: usize,
    most: usize,
}

struct Entry<T> {
    item: T,
    _counted: Counted,
}

impl<T> HandshakeQueue<T> {
    pub(crate) const fn new(most: usize) -> Self {
        Self { users: VecDeque::new(), len: 0, most }
    }

    pub(crate) const fn most(&self) -> usize {
        self.most
    }

    pub(crate) fn contains(&self, uid: Uid) -> bool {
        self.users.iter().any(|(user, _)| *user == uid)
    }

    /// How many wait of each user.
    pub(crate) fn counts(&self) -> impl Iterator<Item = (Uid, usize)> {
        self.users.iter().map(|(uid, waiting)| (*uid, waiting.len()))
    }

    /// Queues something of a user. Returns what had to go instead, if there was no room.
    pub(crate) fn push(&mut self, uid: Uid, item: T) -> Option<T> {
        let entry = Entry { item, _counted: Counted::new() };
        let is_full = self.len >= self.most || Counted::are_too_many();
        self.len += 1;
        match self.users.iter_mut().find(|(user, _)| *user == uid) {
            Some((_, waiting)) => waiting.push_back(entry),
            None => self.users.push_back((uid, VecDeque::from([entry]))),
        }
        if is_full { self.shed(uid) } else { None }
    }

    /// Takes out the newest of the user that has the most; among equals, of the one given.
    pub(crate) fn shed(&mut self, newest: Uid) -> Option<T> {
        let weight = |&at: &usize| {
            let (uid, waiting) = &self.users[at];
            (waiting.len(), *uid == newest)
        };
        let at = (0..self.users.len()).max_by_key(weight)?;
        self.take(at, VecDeque::pop_back).map(|(_, item)| item)
    }

    /// Takes out the oldest of the user whose turn it is, among those that `has_place` says.
    pub(crate) fn pop(&mut self, has_place: impl Fn(Uid) -> bool) -> Option<(Uid, T)> {
        let at = self.users.iter().position(|(uid, _)| has_place(*uid))?;
        // It is the last in turn now.
        let user = self.users.remove(at)?;
        self.users.push_back(user);
        self.take(self.users.len() - 1, VecDeque::pop_front)
    }

    fn take(
        &mut self,
        at: usize,
        take: impl FnOnce(&mut VecDeque<Entry<T>>) -> Option<Entry<T>>,
    ) -> Option<(Uid, T)> {
        let (uid, waiting) = self.users.get_mut(at)?;
        let (uid, entry) = (*uid, take(waiting)?);
        if waiting.is_empty() {
            self.users.remove(at);
        }
        self.len -= 1;
        Some((uid, entry.item))
    }

    /// Takes out everything.
    pub(crate) fn clear(&mut self) -> Vec<T> {
        self.len = 0;
        let waiting = self.users.drain(..).flat_map(|(_, waiting)| waiting);
        waiting.map(|entry| entry.item).collect()
    }
}

/// Counts for a connection that waits at some listener of this process.
struct Counted;

/// Orders nothing: a bound that is a little off does no harm.
static COUNT: AtomicUsize = AtomicUsize::new(0);

impl Counted {
    fn new() -> Self {
        COUNT.fetch_add(1, Ordering::Relaxed);
        Self
    }

    /// Whether those that wait have half of the descriptors that this process may open.
    fn are_too_many() -> bool {
        static MOST: OnceLock<usize> = OnceLock::new();
        let most = MOST.get_or_init(|| {
            let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
            usize::try_from(limit / 2).unwrap_or(usize::MAX)
        });
        COUNT.load(Ordering::Relaxed) > *most
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        COUNT.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(queue: &mut HandshakeQueue<u32>, has_place: impl Fn(Uid) -> bool) -> Vec<u32> {
        std::iter::from_fn(|| queue.pop(&has_place).map(|(_, item)| item)).collect()
    }

    #[test]
    fn users_take_turns_and_who_has_no_place_is_passed_over() {
        let mut queue = HandshakeQueue::new(100);
        for number in 0..3 {
            assert!(queue.push(Some(1), 10 + number).is_none());
        }
        for number in 0..2 {
            assert!(queue.push(Some(2), 20 + number).is_none());
        }
        assert!(queue.push(None, 30).is_none());
        assert!(queue.contains(None) && !queue.contains(Some(3)));
        assert_eq!(queue.pop(|uid| uid == Some(2)), Some((Some(2), 20)));
        assert_eq!(queue.pop(|_| false), None);
        assert_eq!(drain(&mut queue, |_| true), [10, 30, 21, 11, 12]);
        assert_eq!((queue.len, queue.users.len()), (0, 0));
    }

    #[test]
    fn at_the_bound_the_newest_of_the_user_with_the_most_goes() {
        let mut queue = HandshakeQueue::new(4);
        for number in 0..4 {
            assert_eq!(queue.push(Some(1), 10 + number), None);
        }
        assert_eq!(queue.push(Some(1), 14), Some(14));
        assert_eq!(queue.push(Some(2), 20), Some(13));
        assert_eq!(queue.push(Some(2), 21), Some(12));
        assert_eq!(queue.push(Some(2), 22), Some(22), "as many as the other");
        assert_eq!(queue.push(Some(1), 15), Some(15), "as many as the other");
        let gone = queue.push(Some(3), 30);
        assert!(gone == Some(11) || gone == Some(21), "{gone:?}");
        assert_eq!(queue.len, 4);
    }

    #[test]
    fn what_is_cleared_counts_no_more() {
        let mut queue = HandshakeQueue::new(4);
        for number in 0..4 {
            queue.push(Some(number), number);
        }
        assert_eq!(queue.shed(Some(2)), Some(2));
        assert_eq!(queue.clear(), [0, 1, 3]);
        assert_eq!((queue.len, queue.counts().count()), (0, 0));
        assert_eq!(queue.shed(None), None);
    }
}
