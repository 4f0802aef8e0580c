// SPDX-License-Identifier: MIT OR Apache-2.0
//! What happens to one side of a stream from the day it is there.

use futures_lite::future::{or, zip};
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use shmipc_glommio::{ReadHalf, Stream, WriteHalf};

use super::coverage::{Seen, see};
use super::random::Random;
use super::reading::{Reader, Reading};
use super::world::{Handle, Part, Patience, Place, What, patiently};
use super::writing::{Writer, Writing};

/// The most steps of a reader or writer in one go.
const STEPS: usize = 16;

/// Uses the stream and ends it, or drops it in the middle of something.
pub(crate) async fn live(stream: Handle<Stream>, mut random: Random) {
    let is_cut_short = random.one_in(8);
    let time = random.micros(4000);
    let life = Life::new(stream, random).run();
    if is_cut_short {
        let end = async {
            glommio::timer::sleep(time).await;
            see(Seen::LifeCutShort);
        };
        or(life, end).await;
    } else {
        life.await;
    }
}

struct Life {
    stream: Handle<Stream>,
    reading: Reading,
    writing: Writing,
    random: Random,
}

impl Life {
    fn new(stream: Handle<Stream>, random: Random) -> Self {
        Self { stream, reading: Reading::default(), writing: Writing::default(), random }
    }

    async fn run(mut self) {
        for _ in 0..self.random.below(3) {
            self = match self.random.below(2) {
                0 => self.by_turns().await,
                _ => self.in_halves().await,
            };
        }
        self.end().await;
    }

    /// Reads and writes by turns. Nothing waits for ever, since the other side may do the same.
    async fn by_turns(mut self) -> Self {
        let place = self.stream.place.clone();
        for _ in 0..self.random.below(2 * STEPS) {
            let (half, random) = (&mut *self.stream, &mut self.random);
            if random.one_in(2) {
                let state = &mut self.reading;
                Reader { half, state, place: &place, random, may_wait: false }.steps(1).await;
            } else {
                let state = &mut self.writing;
                Writer { half, state, place: &place, random, may_wait: false }.steps(1).await;
            }
        }
        self
    }

    /// Reads and writes at the same time, in one task or two, and puts the halves together again.
    async fn in_halves(self) -> Self {
        let (mut reader, mut writer, mut random) = self.split();
        let steps = (random.below(STEPS), random.below(STEPS));
        let in_tasks = random.one_in(2);
        let reading = async move {
            reader.reader(false).steps(steps.0).await;
            reader
        };
        let writing = async move {
            writer.writer(false).steps(steps.1).await;
            writer
        };
        let (reader, writer) = if in_tasks {
            zip(glommio::spawn_local(reading), glommio::spawn_local(writing)).await
        } else {
            zip(reading, writing).await
        };
        let ((reader, place), (writer, _), reading, writing) =
            (reader.half.into_inner(), writer.half.into_inner(), reader.state, writer.state);
        let stream = Stream::reunite(reader, writer)
            .unwrap_or_else(|_| panic!("{place}: halves of the same stream"));
        Self { stream: Handle::whole(stream, place), reading, writing, random }
    }

    fn split(self) -> (ReadTask, WriteTask, Random) {
        let Self { stream, reading, writing, mut random } = self;
        let (stream, place) = stream.into_inner();
        let (reader, writer) = stream.split();
        let reader = ReadTask {
            half: Handle::new(reader, Part::Reader, place.clone()),
            place: place.clone(),
            state: reading,
            random: random.fork(),
        };
        let writer = WriteTask {
            half: Handle::new(writer, Part::Writer, place.clone()),
            place,
            state: writing,
            random: random.fork(),
        };
        (reader, writer, random)
    }

    async fn end(mut self) {
        match self.random.below(12) {
            0 => drop(self),
            1 => self.close().await,
            2..5 => self.finish_then_drain().await,
            5 => {
                let (reader, writer, _) = self.split();
                drop(reader);
                writer.run_to_end().await;
            }
            6 => {
                let (mut reader, writer, _) = self.split();
                drop(writer);
                reader.reader(true).drain().await;
            }
            choice => {
                let (mut reader, writer, _) = self.split();
                let reading = async move { reader.reader(true).drain().await };
                let writing = async move { writer.run_to_end().await };
                if choice < 9 {
                    zip(reading, writing).await;
                } else {
                    zip(glommio::spawn_local(reading), glommio::spawn_local(writing)).await;
                }
            }
        }
    }

    async fn finish_then_drain(mut self) {
        let place = self.stream.place.clone();
        let (half, random) = (&mut *self.stream, &mut self.random);
        let state = &mut self.writing;
        Writer { half, state, place: &place, random, may_wait: false }.finish().await;
        let (half, state) = (&mut *self.stream, &mut self.reading);
        Reader { half, state, place: &place, random, may_wait: true }.drain().await;
    }

    /// After a close nothing is read or written, although the handle is still there.
    async fn close(mut self) {
        let place = self.stream.place.clone();
        place.note_closed();
        // It waits for the socket, which another reader of this side may hold up.
        let patience = Patience::random(&mut self.random, true);
        let closing = self.stream.close();
        if let Some(Err(error)) = patiently(&place, patience, Seen::WriteCancelled, closing).await {
            place.check_error(&error.into(), What::Write, None);
        }
        let written = self.stream.write(b"x").await;
        let read = self.stream.read(&mut [0; 4]).await;
        see(Seen::RefusedAfterOwnEnd);
        for (result, what) in [(written, What::Write), (read, What::Read)] {
            let Err(error) = result else { panic!("{place}: {what:?} after the close") };
            place.check_error(&error, what, None);
        }
    }
}

/// A reader that can be moved into a task of its own.
struct ReadTask {
    half: Handle<ReadHalf>,
    place: Place,
    state: Reading,
    random: Random,
}

impl ReadTask {
    fn reader(&mut self, may_wait: bool) -> Reader<'_, ReadHalf> {
        let Self { half, place, state, random } = self;
        Reader { half: &mut *half, state, place, random, may_wait }
    }
}

/// A writer that can be moved into a task of its own.
struct WriteTask {
    half: Handle<WriteHalf>,
    place: Place,
    state: Writing,
    random: Random,
}

impl WriteTask {
    fn writer(&mut self, may_wait: bool) -> Writer<'_, WriteHalf> {
        let Self { half, place, state, random } = self;
        Writer { half: &mut *half, state, place, random, may_wait }
    }

    async fn run_to_end(mut self) {
        let steps = self.random.below(2 * STEPS);
        self.writer(true).steps(steps).await;
        if self.random.one_in(2) {
            self.writer(true).finish().await;
        }
    }
}
