// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a random writer does.

use std::cell::RefCell;
use std::io;
use std::time::{Duration, Instant};

use futures_lite::{AsyncWrite, AsyncWriteExt};
use shmipc_glommio::{Loan, Message, Result, Stream, WriteHalf};

use super::coverage::{Seen, see};
use super::expected::Expected;
use super::random::Random;
use super::world::{Patience, Place, What, patiently};

/// What a whole stream and a half of one have in common.
pub(crate) trait Writes: AsyncWrite + Unpin {
    async fn lend(&mut self, len: usize) -> Result<Loan>;
    async fn pass(&mut self, loan: Loan) -> Result<()>;
    async fn pass_on(&mut self, message: Message) -> Result<()>;
    async fn end(&mut self) -> Result<()>;
    fn write_until(&mut self, deadline: Option<Instant>);
}

macro_rules! writes {
    ($half:ty, $set_deadline:ident) => {
        impl Writes for $half {
            async fn lend(&mut self, len: usize) -> Result<Loan> {
                self.alloc(len).await
            }

            async fn pass(&mut self, loan: Loan) -> Result<()> {
                self.send(loan).await
            }

            async fn pass_on(&mut self, message: Message) -> Result<()> {
                self.forward(message).await
            }

            async fn end(&mut self) -> Result<()> {
                self.finish().await
            }

            fn write_until(&mut self, deadline: Option<Instant>) {
                self.$set_deadline(deadline);
            }
        }
    };
}

writes!(Stream, set_write_deadline);
writes!(WriteHalf, set_deadline);

/// Loans and messages that one stream of a side leaves for the others.
#[derive(Default)]
pub(crate) struct Pot(RefCell<Vec<(Left, Expected)>>);

pub(crate) enum Left {
    Loan(Loan),
    Message(Message),
}

impl Pot {
    /// So that not everything ends up there.
    const ROOM: usize = 4;

    pub(crate) fn put(&self, left: Left, content: Expected) {
        let mut pot = self.0.borrow_mut();
        if pot.len() == Self::ROOM {
            pot.remove(0);
        }
        pot.push((left, content));
    }

    fn get(&self, random: &mut Random) -> Option<(Left, Expected)> {
        let mut pot = self.0.borrow_mut();
        let len = pot.len();
        (len > 0).then(|| pot.swap_remove(random.below(len)))
    }

    pub(crate) fn clear(&self) {
        self.0.borrow_mut().clear();
    }
}

/// What a writer remembers from one step to the next.
#[derive(Default)]
pub(crate) struct Writing {
    deadline: Option<Instant>,
    /// Nothing can be sent any more.
    pub(crate) is_over: bool,
}

/// One random writer and what it writes to.
pub(crate) struct Writer<'a, W> {
    pub(crate) half: &'a mut W,
    pub(crate) state: &'a mut Writing,
    pub(crate) place: &'a Place,
    pub(crate) random: &'a mut Random,
    /// Whether somebody reads on the other side whatever happens here.
    pub(crate) may_wait: bool,
}

impl<W: Writes> Writer<'_, W> {
    pub(crate) async fn steps(&mut self, count: usize) {
        for _ in 0..count {
            if self.state.is_over {
                return;
            }
            self.step().await;
        }
    }

    pub(crate) async fn step(&mut self) {
        see(Seen::Operations);
        match self.random.below(32) {
            0..8 => self.write().await,
            8..17 => self.lend_and_send().await,
            17..20 => self.send_what_was_left().await,
            20..22 => self.write_many().await,
            22..24 => self.set_deadline(),
            24..26 => self.flush().await,
            26 => self.hoard().await,
            _ => pause(self.random).await,
        }
    }

    fn len(&mut self) -> usize {
        match self.random.below(16) {
            0..7 => self.random.between(1, 100),
            7..12 => self.random.between(1, 1500),
            12..15 => self.random.between(1, 9000),
            _ => self.random.between(1, 100_000),
        }
    }

    fn patience(&mut self) -> Patience {
        Patience::random(self.random, self.may_wait)
    }

    async fn write(&mut self) {
        let len = self.len();
        self.write_bytes(len).await;
    }

    /// More than a small queue holds, without a pause.
    async fn write_many(&mut self) {
        for _ in 0..self.random.between(10, 40) {
            if self.state.is_over {
                return;
            }
            let len = self.random.between(1, 16);
            self.write_bytes(len).await;
        }
    }

    async fn write_bytes(&mut self, len: usize) {
        let (place, patience) = (self.place, self.patience());
        let content = place.draft(len);
        let bytes = content.bytes();
        let attempt = place.attempt(content);
        let writing = self.half.write(&bytes);
        match patiently(place, patience, Seen::WriteCancelled, writing).await {
            Some(Ok(count)) => {
                assert!((1..=len).contains(&count), "{place}: wrote {count} of {len}");
                attempt.commit(count);
            }
            Some(Err(error)) => {
                drop(attempt);
                self.judge(&error);
            }
            None => {}
        }
    }

    async fn lend(&mut self, len: usize) -> Option<Loan> {
        let (place, patience) = (self.place, self.patience());
        let lending = self.half.lend(len);
        match patiently(place, patience, Seen::AllocCancelled, lending).await? {
            Ok(loan) => {
                assert_eq!((loan.capacity(), loan.len()), (len, 0), "{place}: {loan:?}");
                if !loan.is_shared() {
                    see(Seen::PrivateLoan);
                }
                Some(loan)
            }
            Err(error) => {
                self.judge(&error.into());
                None
            }
        }
    }

    async fn lend_and_send(&mut self) {
        let len = self.len() - 1;
        let Some(mut loan) = self.lend(len).await else { return };
        let written = if self.random.one_in(4) { self.random.between(0, len) } else { len };
        let content = self.place.draft(written);
        let bytes = content.bytes();
        let cut = self.random.between(0, written);
        self.fill(&mut loan, &bytes[..cut]);
        self.fill(&mut loan, &bytes[cut..]);
        assert_eq!(loan.len(), written, "{}: {loan:?}", self.place);
        match self.random.below(10) {
            0 => see(Seen::LoanDropped),
            1 => self.place.common.pot.put(Left::Loan(loan), content),
            _ => self.send(Left::Loan(loan), content).await,
        }
    }

    fn fill(&mut self, loan: &mut Loan, bytes: &[u8]) {
        match self.random.below(4) {
            0 => {
                see(Seen::LoanFilledInPlace);
                let mut rest = bytes;
                for view in loan.views(&self.place.common.trust).unwrap() {
                    let count = view.len().min(rest.len());
                    view[..count].copy_from_slice(&rest[..count]);
                    rest = &rest[count..];
                }
                assert!(rest.is_empty(), "{}: no room in {loan:?}", self.place);
                loan.advance(bytes.len());
            }
            1 => io::Write::write_all(loan, bytes).unwrap(),
            _ => assert_eq!(loan.write(bytes), bytes.len(), "{}: {loan:?}", self.place),
        }
    }

    /// Keeps a large part of the memory for a while.
    async fn hoard(&mut self) {
        let len = self.random.between(10_000, 200_000);
        let loan = self.lend(len).await;
        pause(self.random).await;
        drop(loan);
    }

    async fn send_what_was_left(&mut self) {
        let left = self.place.common.pot.get(self.random);
        if let Some((left, content)) = left {
            let seen = match left {
                Left::Loan(_) => Seen::LoanOfOtherStream,
                Left::Message(_) => Seen::Forwarded,
            };
            see(seen);
            self.send(left, content).await;
        }
    }

    async fn send(&mut self, left: Left, content: Expected) {
        let (place, patience, len) = (self.place, self.patience(), content.len());
        let attempt = place.attempt(content);
        let sending = async {
            match left {
                Left::Loan(loan) => self.half.pass(loan).await,
                Left::Message(message) => self.half.pass_on(message).await,
            }
        };
        match patiently(place, patience, Seen::SendCancelled, sending).await {
            Some(Ok(())) => attempt.commit(len),
            Some(Err(error)) => {
                drop(attempt);
                self.judge(&error.into());
            }
            None => {}
        }
    }

    async fn flush(&mut self) {
        let patience = self.patience();
        let flushing = self.half.flush();
        // It waits for the socket only, and gives up nothing.
        if let Some(Err(error)) =
            patiently(self.place, patience, Seen::WriteCancelled, flushing).await
        {
            self.judge(&error);
        }
    }

    fn set_deadline(&mut self) {
        self.state.deadline = random_deadline(self.random);
        self.half.write_until(self.state.deadline);
    }

    /// Ends this direction, one way or the other, and sees to it that it is ended.
    pub(crate) async fn finish(&mut self) {
        let place = self.place;
        place.note_finished();
        let by_close = self.random.one_in(2);
        let patience = self.patience();
        let finishing = async {
            match by_close {
                true => self.half.close().await,
                false => self.half.end().await.map_err(io::Error::from),
            }
        };
        if let Some(Err(error)) = patiently(place, patience, Seen::WriteCancelled, finishing).await
        {
            place.check_error(&error, What::Write, None);
        }
        if let Err(error) = self.half.write(b"x").await {
            see(Seen::RefusedAfterOwnEnd);
            self.judge(&error);
        } else {
            panic!("{place}: wrote after the end");
        }
        assert!(self.state.is_over, "{place}: its end ends the writing");
    }

    fn judge(&mut self, error: &io::Error) {
        self.place.check_error(error, What::Write, self.state.deadline);
        match error.kind() {
            io::ErrorKind::TimedOut => {
                see(Seen::WriteTimedOut);
                self.state.deadline = None;
                self.half.write_until(None);
                return;
            }
            io::ErrorKind::BrokenPipe => see(Seen::RefusedByPeersClose),
            _ => {}
        }
        self.state.is_over = true;
    }
}

/// Soon, or before now. Mostly never.
pub(crate) fn random_deadline(random: &mut Random) -> Option<Instant> {
    match random.below(4) {
        0 => Instant::now().checked_sub(Duration::from_millis(1)),
        1 => Some(Instant::now() + random.micros(1000)),
        _ => None,
    }
}

/// Lets others run, for a while.
pub(crate) async fn pause(random: &mut Random) {
    if random.one_in(3) {
        glommio::timer::sleep(random.micros(800)).await;
    } else {
        for _ in 0..random.below(6) {
            futures_lite::future::yield_now().await;
        }
    }
}
