// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which memories the accepted sessions of this process have, and as what.
//!
//! A queue memory belongs to one session. A client that names the queue of another session, which
//! any process of the same user can do, would otherwise have each of that session's requests
//! delivered twice, once as its own. Buffer memory may be shared: all sessions of a shmipc-go
//! manager name the same. But no memory is a queue and a buffer.
//!
//! Memories are told apart by device and inode, and a [`Claim`] lasts as long as its mapping, so
//! the inode is not given to another file meanwhile. Looking and entering are one step, under a
//! lock that is taken when a session is accepted or has ended, and at no other time.
//!
//! Only the accepting side claims: a client and a server in one process map the same memory, each
//! in its own role.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::error::HandshakeError;

/// Device and inode of a memory's file.
pub(super) type Identity = (u64, u64);

/// What a session uses a memory for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The memory of the event queues, of one session only.
    Queue,
    /// The buffer memory, which sessions may share.
    Buffer,
}

#[derive(Debug)]
enum Holders {
    Queue,
    /// Of so many sessions.
    Buffer(usize),
}

/// The memories of all accepted sessions of this process, of whichever listener and core.
static CLAIMS: Mutex<BTreeMap<Identity, Holders>> = Mutex::new(BTreeMap::new());

/// A session's entry for one of its memories, taken out when dropped.
#[derive(Debug)]
pub(super) struct Claim {
    identity: Identity,
}

impl Claim {
    /// Enters a memory.
    ///
    /// # Errors
    ///
    /// Another session has it for something that excludes this.
    pub(super) fn new(identity: Identity, purpose: Purpose) -> Result<Self, HandshakeError> {
        let mut claims = CLAIMS.lock().unwrap_or_else(PoisonError::into_inner);
        match (claims.get_mut(&identity), purpose) {
            (None, Purpose::Queue) => drop(claims.insert(identity, Holders::Queue)),
            (None, Purpose::Buffer) => drop(claims.insert(identity, Holders::Buffer(1))),
            (Some(Holders::Buffer(sessions)), Purpose::Buffer) => *sessions += 1,
            (Some(_), Purpose::Queue) => {
                return Err(HandshakeError::MemoryInUse { role: "queue" });
            }
            (Some(Holders::Queue), Purpose::Buffer) => {
                return Err(HandshakeError::MemoryInUse { role: "buffer" });
            }
        }
        Ok(Self { identity })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claims = CLAIMS.lock().unwrap_or_else(PoisonError::into_inner);
        match claims.get_mut(&self.identity) {
            Some(Holders::Buffer(sessions)) if *sessions > 1 => *sessions -= 1,
            _ => drop(claims.remove(&self.identity)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_is_of_one_session_and_a_buffer_of_many() {
        // No device has such a number.
        let [queue, buffer] = [(u64::MAX, 1), (u64::MAX, 2)];
        let in_use = |role| Some(HandshakeError::MemoryInUse { role });
        let first = Claim::new(queue, Purpose::Queue).unwrap();
        let shared = [(); 3].map(|()| Claim::new(buffer, Purpose::Buffer).unwrap());
        assert_eq!(Claim::new(queue, Purpose::Queue).err(), in_use("queue"));
        assert_eq!(Claim::new(queue, Purpose::Buffer).err(), in_use("buffer"));
        assert_eq!(Claim::new(buffer, Purpose::Queue).err(), in_use("queue"));
        drop(first);
        drop(Claim::new(queue, Purpose::Buffer).unwrap());
        drop(Claim::new(queue, Purpose::Queue).unwrap());
        for claim in shared {
            assert_eq!(Claim::new(buffer, Purpose::Queue).err(), in_use("queue"));
            drop(claim);
        }
        drop(Claim::new(buffer, Purpose::Queue).unwrap());
        assert!(!CLAIMS.lock().unwrap().keys().any(|&(device, _)| device == u64::MAX));
    }

    #[test]
    fn of_many_that_want_the_same_queue_at_once_one_gets_it() {
        let queue = (u64::MAX, 3);
        for _ in 0..200 {
            let threads: Vec<_> = (0..4)
                .map(|_| std::thread::spawn(move || Claim::new(queue, Purpose::Queue)))
                .collect();
            let claims: Vec<_> = threads.into_iter().map(|it| it.join().unwrap()).collect();
            assert_eq!(claims.iter().filter(|claim| claim.is_ok()).count(), 1);
        }
    }
}
