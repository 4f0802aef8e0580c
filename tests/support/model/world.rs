// SPDX-License-Identifier: MIT OR Apache-2.0
//! What must be true of one pair of sessions, as both sides know it. Behind locks, since the sides
//! may be on two executors.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures_lite::future::{or, yield_now};
use shmipc_glommio::{PeerTrust, PoolUsage, Session, Stream};

use super::coverage::{Seen, see};
use super::expected::{Expected, Lane};
use super::random::{Random, mix};
use super::writing::Pot;

/// Longer than anything takes that ends at all.
pub(crate) const HANGS: Duration = Duration::from_secs(40);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server,
}

impl Side {
    pub(crate) fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

/// What a side says of itself while it waits for everything to be given back.
#[derive(Debug, Clone)]
pub(crate) struct Usage {
    pub(crate) streams: usize,
    pub(crate) pool: PoolUsage,
}

/// One pair of sessions.
pub(crate) struct World {
    seed: u64,
    streams: Mutex<HashMap<u32, Arc<StreamModel>>>,
    usage: Mutex<[Option<Usage>; 2]>,
    is_ended: AtomicBool,
    is_client_done: AtomicBool,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            seed,
            streams: Mutex::default(),
            usage: Mutex::default(),
            is_ended: AtomicBool::new(false),
            is_client_done: AtomicBool::new(false),
        }
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    /// Who ends the session in the middle of everything.
    pub(crate) fn ends_early(&self) -> Option<Side> {
        let mut random = Random::new(self.seed ^ 0xEA51);
        random.one_in(25).then(|| random.pick(&[Side::Client, Side::Server]))
    }

    /// The client has opened a stream, and not sent on it.
    pub(crate) fn open(&self, id: u32) -> Arc<StreamModel> {
        see(Seen::Streams);
        let model = Arc::new(StreamModel::new(self.seed, id));
        let before = self.streams.lock().unwrap().insert(id, Arc::clone(&model));
        assert!(before.is_none(), "{self}: stream {id} was opened twice");
        model
    }

    /// The stream that the server was given.
    pub(crate) fn accept(&self, id: u32) -> Arc<StreamModel> {
        let known = self.streams.lock().unwrap().get(&id).cloned();
        let model = known.unwrap_or_else(|| panic!("{self}: nobody opened stream {id}"));
        let is_first = !std::mem::replace(&mut model.lock().is_accepted, true);
        assert!(is_first, "{self}: stream {id} was accepted twice");
        model
    }

    /// From now on, operations may fail because the session is over.
    pub(crate) fn end(&self) {
        self.is_ended.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_ended(&self) -> bool {
        self.is_ended.load(Ordering::SeqCst)
    }

    pub(crate) fn note_client_done(&self) {
        self.is_client_done.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_client_done(&self) -> bool {
        self.is_client_done.load(Ordering::SeqCst)
    }

    pub(crate) fn publish(&self, side: Side, session: &Session) {
        let usage = Usage { streams: session.stream_count(), pool: session.pool_usage() };
        self.usage.lock().unwrap()[side as usize] = Some(usage);
    }

    /// Whether no stream is open, and every slice is in its list or in the magazine of a side.
    pub(crate) fn is_settled(&self) -> bool {
        let usage = self.usage.lock().unwrap();
        let [Some(client), Some(server)] = &*usage else { return false };
        let mut lists = client.pool.lists.iter().zip(&server.pool.lists);
        client.streams + server.streams == 0
            && client.pool.held + server.pool.held == 0
            && lists.all(|(ours, theirs)| {
                let free = i64::from(ours.free) + i64::from(ours.magazine + theirs.magazine);
                free == i64::from(ours.total)
            })
    }

    pub(crate) fn usage(&self) -> String {
        format!("{:#?}", self.usage.lock().unwrap())
    }
}

impl fmt::Display for World {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "SHMIPC_SEED={}", self.seed)
    }
}

/// What both sides of a stream have done.
pub(crate) struct StreamModel {
    pub(crate) id: u32,
    state: Mutex<StreamState>,
}

pub(crate) struct StreamState {
    /// By the side that sends.
    lanes: [Lane; 2],
    ends: [End; 2],
    is_accepted: bool,
}

/// What one side has done to end the stream.
#[derive(Default)]
struct End {
    /// It sends nothing more.
    is_finished: bool,
    /// It does not read either.
    is_closed: bool,
    has_dropped_half: bool,
}

impl StreamModel {
    fn new(seed: u64, id: u32) -> Self {
        let lane = |side| Lane::new(mix(seed) ^ u64::from(id) << 1 ^ side as u64);
        let state = StreamState {
            lanes: [lane(Side::Client), lane(Side::Server)],
            ends: Default::default(),
            is_accepted: false,
        };
        Self { id, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, StreamState> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// What the streams of one side have in common.
pub(crate) struct Common {
    pub(crate) pot: Pot,
    pub(crate) trust: PeerTrust,
}

impl Common {
    pub(crate) fn new() -> Rc<Self> {
        // SAFETY: both ends are this test, which keeps off what it has sent.
        let trust = unsafe { PeerTrust::new_unchecked() };
        Rc::new(Self { pot: Pot::default(), trust })
    }
}

/// One side of one stream, for those who use it.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) world: Arc<World>,
    pub(crate) model: Arc<StreamModel>,
    pub(crate) side: Side,
    /// What the streams of this side have in common.
    pub(crate) common: Rc<Common>,
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { world, model, side, .. } = self;
        write!(formatter, "{world}, {side:?} of stream {}", model.id)
    }
}

impl Place {
    /// Stops the test unless something went as the model has it.
    pub(crate) fn must<T>(&self, result: Result<T, String>) -> T {
        result.unwrap_or_else(|problem| panic!("{self}: {problem}"))
    }

    pub(crate) fn draft(&self, len: usize) -> Expected {
        self.model.lock().lanes[self.side as usize].draft(len)
    }

    pub(crate) fn attempt(&self, content: Expected) -> Attempt<'_> {
        self.model.lock().lanes[self.side as usize].begin(content);
        Attempt { place: self, is_over: false }
    }

    pub(crate) fn take(&self, count: usize) -> Expected {
        let result = self.model.lock().lanes[self.side.other() as usize].take(count);
        self.must(result)
    }

    pub(crate) fn take_flush(&self, len: usize) -> Expected {
        let result = self.model.lock().lanes[self.side.other() as usize].take_flush(len);
        self.must(result)
    }

    /// How many bytes can be on their way to this side.
    pub(crate) fn at_most(&self) -> usize {
        self.model.lock().lanes[self.side.other() as usize].at_most()
    }

    /// This side sends nothing more. Said before it is done, so that nobody sees it too early.
    pub(crate) fn note_finished(&self) {
        self.model.lock().ends[self.side as usize].is_finished = true;
    }

    pub(crate) fn note_closed(&self) {
        let end = &mut self.model.lock().ends[self.side as usize];
        (end.is_finished, end.is_closed) = (true, true);
    }

    fn note_half_dropped(&self, part: Part) {
        let end = &mut self.model.lock().ends[self.side as usize];
        if std::mem::replace(&mut end.has_dropped_half, true) {
            (end.is_finished, end.is_closed) = (true, true);
        } else if part == Part::Writer {
            end.is_finished = true;
        }
    }

    /// A reader was told that nothing more comes.
    pub(crate) fn check_end(&self) {
        let state = self.model.lock();
        let left = state.lanes[self.side.other() as usize].at_most();
        let is_finished = state.ends[self.side.other() as usize].is_finished;
        drop(state);
        assert!(is_finished, "{self}: the end came, but the peer did not end");
        assert_eq!(left, 0, "{self}: the end came before the last bytes");
    }

    /// Whether an operation may fail so. `deadline` is that of its direction.
    pub(crate) fn check_error(&self, error: &io::Error, what: What, deadline: Option<Instant>) {
        let state = self.model.lock();
        let (here, there) =
            (&state.ends[self.side as usize], &state.ends[self.side.other() as usize]);
        let may_be = match error.kind() {
            io::ErrorKind::BrokenPipe => what == What::Write && there.is_closed,
            io::ErrorKind::NotConnected if what == What::Write => here.is_finished,
            io::ErrorKind::NotConnected => here.is_closed,
            io::ErrorKind::TimedOut => deadline.is_some_and(|at| at <= Instant::now()),
            io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset => {
                self.world.is_ended()
            }
            _ => false,
        };
        drop(state);
        assert!(may_be, "{self}: {what:?} failed: {error}");
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Read,
    Write,
}

/// Something that is being sent. Dropped before the sender knows, nothing was sent.
pub(crate) struct Attempt<'a> {
    place: &'a Place,
    is_over: bool,
}

impl Attempt<'_> {
    pub(crate) fn commit(mut self, count: usize) {
        self.is_over = true;
        let place = self.place;
        let result = place.model.lock().lanes[place.side as usize].commit(count);
        place.must(result);
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if !self.is_over && !std::thread::panicking() {
            let place = self.place;
            let result = place.model.lock().lanes[place.side as usize].withdraw();
            place.must(result);
        }
    }
}

/// What a handle is a handle on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Whole,
    Reader,
    Writer,
}

/// A stream or a half of one; the model hears of it when it is dropped, wherever that happens.
pub(crate) struct Handle<H> {
    inner: Option<H>,
    part: Part,
    pub(crate) place: Place,
}

impl<H> Handle<H> {
    pub(crate) fn new(inner: H, part: Part, place: Place) -> Self {
        Self { inner: Some(inner), part, place }
    }

    pub(crate) fn into_inner(mut self) -> (H, Place) {
        (self.inner.take().expect("taken once"), self.place.clone())
    }
}

impl<H> Deref for Handle<H> {
    type Target = H;

    fn deref(&self) -> &H {
        self.inner.as_ref().expect("not taken")
    }
}

impl<H> DerefMut for Handle<H> {
    fn deref_mut(&mut self) -> &mut H {
        self.inner.as_mut().expect("not taken")
    }
}

impl<H> Drop for Handle<H> {
    fn drop(&mut self) {
        // Before the field is dropped.
        match (&self.inner, self.part) {
            (None, _) => {}
            (Some(_), Part::Whole) => self.place.note_closed(),
            (Some(_), part) => self.place.note_half_dropped(part),
        }
    }
}

impl Handle<Stream> {
    pub(crate) fn whole(stream: Stream, place: Place) -> Self {
        Self::new(stream, Part::Whole, place)
    }
}

/// How long a task waits before it drops the future.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Patience {
    Polls(usize),
    For(Duration),
    /// Until it is clear that it hangs, which fails the test.
    Forever,
}

impl Patience {
    /// As long as the task may wait at all.
    pub(crate) fn random(random: &mut Random, may_wait: bool) -> Self {
        match random.below(8) {
            0..2 => Self::Polls(random.below(4)),
            2..4 => Self::For(random.micros(300)),
            _ if may_wait => Self::Forever,
            _ => Self::For(random.micros(2500)),
        }
    }
}

/// Waits for a future for as long as somebody has patience. `None`: it was dropped.
pub(crate) async fn patiently<T>(
    place: &Place,
    patience: Patience,
    cancelled: Seen,
    future: impl Future<Output = T>,
) -> Option<T> {
    let impatience = async {
        match patience {
            Patience::Polls(count) => {
                for _ in 0..count {
                    yield_now().await;
                }
            }
            Patience::For(time) => glommio::timer::sleep(time).await,
            Patience::Forever => {
                glommio::timer::sleep(HANGS).await;
                panic!("{place}: hangs before {cancelled:?}, {}", place.world.usage());
            }
        }
        see(cancelled);
        None
    };
    or(async { Some(future.await) }, impatience).await
}
