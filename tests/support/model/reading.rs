// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a random reader does.

use std::io;
use std::time::Instant;

use bytes::Buf;
use futures_lite::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, StreamExt};
use shmipc_glommio::{Message, ReadHalf, Result, Stream};

use super::coverage::{Seen, count, see};
use super::expected::Expected;
use super::random::Random;
use super::world::{Patience, Place, What, patiently};
use super::writing::{Left, pause, random_deadline};

/// What a whole stream and a half of one have in common.
pub(crate) trait Reads: AsyncBufRead + futures_lite::AsyncRead + Unpin {
    async fn next_message(&mut self) -> Result<Option<Message>>;
    async fn next_of_messages(&mut self) -> Result<Option<Message>>;
    fn arrived(&self) -> usize;
    fn read_until(&mut self, deadline: Option<Instant>);
}

macro_rules! reads {
    ($half:ty, $set_deadline:ident) => {
        impl Reads for $half {
            async fn next_message(&mut self) -> Result<Option<Message>> {
                self.recv().await
            }

            async fn next_of_messages(&mut self) -> Result<Option<Message>> {
                self.messages().next().await.transpose()
            }

            fn arrived(&self) -> usize {
                self.unread()
            }

            fn read_until(&mut self, deadline: Option<Instant>) {
                self.$set_deadline(deadline);
            }
        }
    };
}

reads!(Stream, set_read_deadline);
reads!(ReadHalf, set_deadline);

/// What a reader remembers from one step to the next.
#[derive(Default)]
pub(crate) struct Reading {
    deadline: Option<Instant>,
    /// What `fill_buf` has shown and nobody has consumed.
    lent: Expected,
    /// Nothing can come any more.
    pub(crate) is_over: bool,
}

/// One random reader and what it reads from.
pub(crate) struct Reader<'a, R> {
    pub(crate) half: &'a mut R,
    pub(crate) state: &'a mut Reading,
    pub(crate) place: &'a Place,
    pub(crate) random: &'a mut Random,
    /// Whether the peer ends whatever happens here.
    pub(crate) may_wait: bool,
}

impl<R: Reads> Reader<'_, R> {
    pub(crate) async fn steps(&mut self, count: usize) {
        for _ in 0..count {
            if self.state.is_over {
                return;
            }
            self.step().await;
        }
    }

    /// Reads until nothing more comes.
    pub(crate) async fn drain(&mut self) {
        while !self.state.is_over {
            self.step().await;
        }
    }

    pub(crate) async fn step(&mut self) {
        see(Seen::Operations);
        let known = self.state.lent.len() + self.place.at_most();
        let arrived = self.half.arrived();
        // Asked before it is counted, more may come in between; the other way round not less.
        let at_most = known.max(self.state.lent.len() + self.place.at_most());
        assert!(arrived <= at_most, "{}: {arrived} bytes arrived of {at_most}", self.place);
        match self.random.below(24) {
            0..9 => self.receive().await,
            9..14 => self.read().await,
            14..19 => self.look_and_consume().await,
            19 => self.set_deadline(),
            _ => pause(self.random).await,
        }
    }

    fn patience(&mut self) -> Patience {
        Patience::random(self.random, self.may_wait)
    }

    async fn receive(&mut self) {
        let (place, patience) = (self.place, self.patience());
        let as_stream = self.random.one_in(4);
        let receiving = async {
            match as_stream {
                true => self.half.next_of_messages().await,
                false => self.half.next_message().await,
            }
        };
        match patiently(place, patience, Seen::RecvCancelled, receiving).await {
            Some(Ok(Some(message))) => {
                let content = self.content_of(&message);
                self.use_message(message, content);
            }
            Some(Ok(None)) => self.note_end(),
            Some(Err(error)) => self.judge(&error.into()),
            None => {}
        }
    }

    /// What a message must hold: a flush, or what was shown before.
    fn content_of(&mut self, message: &Message) -> Expected {
        let lent = std::mem::take(&mut self.state.lent);
        if lent.is_empty() {
            return self.place.take_flush(message.len());
        }
        see(Seen::LentTakenAsMessage);
        assert_eq!(lent.len(), message.len(), "{}: what was shown", self.place);
        lent
    }

    fn use_message(&mut self, mut message: Message, mut content: Expected) {
        assert!(!message.is_empty(), "{}: an empty message", self.place);
        if self.random.one_in(3) {
            self.read_part(&mut message, &mut content);
        }
        if self.random.one_in(6) {
            see(Seen::MessageSplit);
            let count = self.random.between(0, message.len());
            let front = message.split_to(count);
            let front_content = content.split_front(count);
            self.part_with(front, front_content);
        }
        self.part_with(message, content);
    }

    fn read_part(&mut self, message: &mut Message, content: &mut Expected) {
        let count = self.random.between(0, message.len());
        let mut bytes = vec![0; count];
        if self.random.one_in(2) {
            assert_eq!(message.peek(&mut bytes), count);
            let due = content.clone().split_front(count);
            self.check(&due, &bytes);
        }
        let due = content.split_front(count);
        if self.random.one_in(3) {
            message.skip(count);
        } else {
            bytes.fill(0);
            assert_eq!(message.read(&mut bytes), count);
            self.check(&due, &bytes);
        }
        assert_eq!(message.len(), content.len(), "{}", self.place);
    }

    fn part_with(&mut self, mut message: Message, content: Expected) {
        assert_eq!(message.len(), content.len(), "{}", self.place);
        match self.random.below(8) {
            0 => see(Seen::MessageDroppedUnread),
            1..3 => self.place.common.pot.put(Left::Message(message), content),
            3 => {
                see(Seen::MessageReadInPlace);
                let views = message.views(&self.place.common.trust).unwrap();
                self.check(&content, &views.flatten().copied().collect::<Vec<u8>>());
            }
            4 => {
                let mut bytes = vec![0; content.len()];
                message.buf(&self.place.common.trust).unwrap().copy_to_slice(&mut bytes);
                assert!(message.is_empty(), "{}", self.place);
                self.check(&content, &bytes);
            }
            _ => {
                let bytes = message.into_bytes();
                self.check(&content, &bytes);
            }
        }
    }

    async fn read(&mut self) {
        let (place, patience) = (self.place, self.patience());
        let most = self.random.pick(&[1, 7, 100, 1000, 20_000]);
        let mut bytes = vec![0; self.random.between(1, most)];
        let reading = self.half.read(&mut bytes);
        match patiently(place, patience, Seen::ReadCancelled, reading).await {
            Some(Ok(0)) => self.note_end(),
            Some(Ok(count)) => {
                let lent = &mut self.state.lent;
                let due = if lent.is_empty() {
                    place.take(count)
                } else {
                    assert!(count <= lent.len(), "{place}: {count} of what was shown");
                    lent.split_front(count)
                };
                self.check(&due, &bytes[..count]);
            }
            Some(Err(error)) => self.judge(&error),
            None => {}
        }
    }

    async fn look_and_consume(&mut self) {
        let (place, patience) = (self.place, self.patience());
        let looking = async { self.half.fill_buf().await.map(<[u8]>::to_vec) };
        match patiently(place, patience, Seen::FillCancelled, looking).await {
            Some(Ok(shown)) if shown.is_empty() => self.note_end(),
            Some(Ok(shown)) => {
                if self.state.lent.is_empty() {
                    self.state.lent = place.take(shown.len());
                }
                let lent = std::mem::take(&mut self.state.lent);
                self.check(&lent, &shown);
                self.state.lent = lent;
                let consumed = match self.random.below(3) {
                    0 => shown.len(),
                    _ => self.random.between(0, shown.len()),
                };
                self.half.consume(consumed);
                self.state.lent.split_front(consumed);
            }
            Some(Err(error)) => self.judge(&error),
            None => {}
        }
    }

    fn check(&self, due: &Expected, got: &[u8]) {
        count(Seen::BytesChecked, got.len() as u64);
        self.place.must(due.check(got));
    }

    fn set_deadline(&mut self) {
        self.state.deadline = random_deadline(self.random);
        self.half.read_until(self.state.deadline);
    }

    fn note_end(&mut self) {
        see(Seen::EndRead);
        assert!(self.state.lent.is_empty(), "{}: the end before what was shown", self.place);
        self.place.check_end();
        self.state.is_over = true;
    }

    fn judge(&mut self, error: &io::Error) {
        self.place.check_error(error, What::Read, self.state.deadline);
        if error.kind() == io::ErrorKind::TimedOut {
            see(Seen::ReadTimedOut);
            self.state.deadline = None;
            self.half.read_until(None);
            return;
        }
        self.state.is_over = true;
    }
}
