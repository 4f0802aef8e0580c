// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two sides and their programs. What happens next, and what is in the way, is drawn from a seed;
//! at last nothing is in the way any more, and only tasks run that were woken.

use std::cell::Cell;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use crate::config::Wakeup;
use crate::proto::session::ending::DrainPhase;
use crate::proto::session::sim::driver::{Link, Residency, Side};
use crate::proto::session::sim::link::{EventQueue, Pipe, Pool};
use crate::proto::session::sim::program::{Program, Turned};
use crate::proto::session::sim::setup::{Knows, Rng, Setup};
use crate::proto::session::sim::tasks::Closer;
use crate::proto::stream_table::Role;
use crate::wire::Extension;

/// How long nothing happens before nothing will: longer than every wait of the state machine.
const QUIET: Duration = Duration::from_millis(900);
/// A finale that takes more rounds than this does not end.
const MOST_ROUNDS: usize = 50_000;

pub(super) struct World {
    pub(super) setup: Setup,
    rng: Rng,
    clock: Rc<Cell<Instant>>,
    link: Link,
    pub(super) sides: [Rc<Side>; 2],
    pub(super) program: Program,
    closers: [Option<Closer>; 2],
    /// For how many steps a side does not run.
    stopped: [usize; 2],
    has_server: bool,
    /// How many operations there were.
    pub(super) operations: u64,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let setup = Setup::new(&mut rng);
        let clock = Rc::new(Cell::new(Instant::now()));
        let extension = Extension::with_window(setup.limits.stream_window);
        let shown = |knows| Rc::new(Cell::new(Some(extension).filter(|_| knows)));
        let link = Link {
            pool: Pool::new(&setup.classes, setup.lists),
            queues: [(), ()].map(|()| Rc::new(EventQueue::new(setup.queue_capacity))),
            pipes: [(), ()].map(|()| Pipe::new(setup.pipe_capacity)),
            bells: Default::default(),
            extensions: [shown(setup.knows != Knows::Neither), shown(setup.knows == Knows::Both)],
            clock: Rc::clone(&clock),
        };
        let side = |role, number| {
            let is_foreign = setup.foreign == Some(number);
            Side::new(role, setup.negotiated, setup.limits, &link, is_foreign)
        };
        let sides = [side(Role::Client, 0), side(Role::Server, 1)];
        sides[0].start();
        let has_server = setup.knows != Knows::Late;
        if has_server {
            sides[1].start();
        }
        let program = Program::new(&setup);
        let (closers, stopped) = ([None, None], [0, 0]);
        Self {
            setup,
            rng,
            clock,
            link,
            sides,
            program,
            closers,
            stopped,
            has_server,
            operations: 0,
        }
    }

    /// All of it.
    pub(super) fn run(&mut self) {
        for step in 0..self.setup.steps {
            self.interfere(step);
            self.step();
            self.check();
        }
        self.finale();
        self.program.check_end(&self.sides);
        let by = self.rng.below(2);
        for side in [by, 1 - by] {
            self.close(side);
            self.settle();
        }
        self.check_gone();
    }

    fn pass_time(&self, time: Duration) {
        self.clock.set(self.clock.get() + time);
    }

    fn may_run(&self, side: usize) -> bool {
        self.stopped[side] == 0 && (side == 0 || self.has_server)
    }

    /// What the saboteur does before a step.
    fn interfere(&mut self, step: usize) {
        let (setup, rng) = (&self.setup, &mut self.rng);
        let has_closed = setup.close_at.filter(|(at, _)| *at == step);
        if setup.cut_at == Some(step) {
            self.program.is_cut = true;
            for pipe in &self.link.pipes {
                pipe.lose_last(rng.pick(&[0, 0, 1, 50]));
                pipe.is_closed.set(true);
            }
        }
        if setup.drain_at.is_some_and(|at| step >= at) && self.has_server {
            self.drain(step);
        }
        if let Some((_, by)) = has_closed
            && self.may_run(by)
        {
            self.close(by);
        }
        for side in 0..2 {
            self.stopped[side] = self.stopped[side].saturating_sub(1);
        }
        if self.rng.chance(self.setup.trouble) {
            let side = self.rng.below(2);
            self.stopped[side] = self.rng.pick(&[5, 50, 300]);
        }
        if !self.has_server && self.rng.chance(2) {
            self.map_memory();
        }
    }

    /// The server of version 2 begins.
    fn map_memory(&mut self) {
        self.has_server = true;
        self.link.extensions[1].set(Some(Extension::with_window(self.setup.limits.stream_window)));
        self.sides[1].proto.look_for_extension(&*self.sides[1]);
        self.sides[1].start();
    }

    fn drain(&mut self, step: usize) {
        let server = &self.sides[1];
        self.program.is_drained = true;
        let phase = match step - self.setup.drain_at.unwrap_or(step) {
            0 => {
                server.proto.stop_accepting(&**server);
                DrainPhase::Look
            }
            50 | 100 => DrainPhase::Quiet,
            200 => DrainPhase::All,
            _ => return,
        };
        server.proto.drain_streams(&**server, phase);
    }

    fn close(&mut self, side: usize) {
        // What is sent while it closes is not waited for, so the first close counts.
        if !self.program.has_closed(side) {
            self.program.note_close(side);
            self.closers[side] = Some(Closer::new(&self.sides[side], self.setup.close_timeout));
        }
    }

    /// One thing happens.
    fn step(&mut self) {
        self.operations += 1;
        let number = self.rng.below(2);
        let side = Rc::clone(&self.sides[number]);
        let what = self.rng.below(100);
        if what >= 92 {
            let micros = self.rng.pick(&[1, 100, 100, 1000, 1000, 20_000]);
            return self.pass_time(Duration::from_micros(micros));
        }
        if !self.may_run(number) {
            return;
        }
        match what {
            0..40 => drop(self.program.poll_one(&self.setup, &self.sides, number, &mut self.rng)),
            40..58 if side.residency.get() == Residency::Active => {
                let may_rest = self.rng.chance(50);
                side.turn(may_rest);
            }
            40..58 if side.residency.get() == Residency::Standby => {
                side.look(self.rng.chance(30));
            }
            58..68 if side.is_socket_ready() => {
                side.read_socket(self.rng.pick(&[7, 100, 4096, 4096]));
            }
            68..74 if self.is_bell_due(number) => side.on_bell(),
            74..80 => side.send_kept(),
            80..84 if self.program.opened < self.setup.streams => {
                self.program.open(&self.setup, &self.sides, &mut self.rng);
            }
            84..88 => self.poll_closer(number),
            88 => self.program.disturb(&self.sides, number, &mut self.rng),
            _ => {}
        }
    }

    fn is_bell_due(&self, side: usize) -> bool {
        self.sides[side].bell.get() || matches!(self.sides[side].wakeup(), Wakeup::Polling(_))
    }

    fn poll_closer(&mut self, number: usize) {
        let (side, now) = (&self.sides[number], self.clock.get());
        let Some(closer) = &mut self.closers[number] else { return };
        if !closer.is_due(now) {
            return;
        }
        side.note_activity();
        if let Poll::Ready(result) = closer.poll(side) {
            self.program.note_closed(number, &result);
            self.closers[number] = None;
        }
    }

    fn activity(&self) -> u64 {
        self.sides.iter().map(|side| side.activity.get()).sum()
    }

    /// Nothing is in the way any more, and every stream goes on to its end.
    fn finale(&mut self) {
        self.stopped = [0, 0];
        if !self.has_server {
            self.map_memory();
        }
        if self.program.opened == 0 {
            self.program.open(&self.setup, &self.sides, &mut self.rng);
        }
        self.program.is_finale = true;
        self.settle();
    }

    /// Runs what is woken until nothing will happen any more.
    fn settle(&mut self) {
        let mut quiet = Duration::ZERO;
        for _ in 0..MOST_ROUNDS {
            let before = self.activity();
            self.round();
            self.check();
            // Tasks that wait for slices may be woken again and again for too few.
            if self.activity() != before {
                quiet = Duration::ZERO;
                continue;
            }
            if quiet >= QUIET {
                return;
            }
            let time = Duration::from_millis(if quiet.as_millis() < 8 { 1 } else { 20 });
            quiet += time;
            self.pass_time(time);
        }
        panic!("it goes on for ever");
    }

    /// Everything that can happen, once.
    fn round(&mut self) {
        for number in 0..2 {
            let side = Rc::clone(&self.sides[number]);
            if self.is_bell_due(number) {
                side.on_bell();
            }
            if side.is_socket_ready() {
                side.read_socket(usize::MAX);
            }
            side.send_kept();
            match side.residency.get() {
                Residency::Active => side.turn(true),
                Residency::Standby => side.look(false),
                Residency::Asleep => {}
            }
            self.poll_closer(number);
            while self.program.poll_one(&self.setup, &self.sides, number, &mut self.rng)
                == Turned::Polled
            {
                self.operations += 1;
            }
            self.operations += 1;
        }
    }

    /// What holds at any time.
    fn check(&mut self) {
        for number in 0..2 {
            let side = &self.sides[number];
            let unread = side.proto.unread_bytes.get();
            let limit = self.setup.limits.unread_fallback_bytes;
            assert!(unread <= limit + (64 << 10), "{unread} bytes wait unread at side {number}");
            if let Some(reason) = side.proto.end_reason() {
                self.program.check_reason(&self.sides, number, &reason);
            }
            self.check_credit(number);
        }
    }

    /// When nothing is on its way, what was sent is what has credit, what is owed, and what waits
    /// unread.
    fn check_credit(&self, from: usize) {
        let (sender, receiver) = (&self.sides[from], &self.sides[1 - from]);
        let is_known =
            |side: &Side| side.proto.is_extension_known() && !side.is_over() && !side.is_foreign;
        let is_empty = sender.out.is_empty() && receiver.out.is_empty();
        let is_read = sender.is_outbox_empty()
            && sender.pipe_out.len() == 0
            && receiver.deframer.borrow().is_empty();
        if self.program.is_cut || !is_known(sender) || !is_known(receiver) || !is_empty || !is_read
        {
            return;
        }
        for to in receiver.proto.all_streams() {
            let Some(of) = sender.proto.stream(to.id()) else { continue };
            let owed = to.receiving.take();
            to.receiving.put_back(owed);
            let unread: u64 = to.inbound.borrow().occupied();
            let (sent, credited) = (of.sending.sent(), of.sending.credited());
            let id = to.id();
            assert_eq!(sent, credited + u64::from(owed) + unread, "credit of stream {id}");
        }
    }

    /// Both sides are gone.
    fn check_gone(&self) {
        for side in &self.sides {
            assert!(side.is_over(), "side {} has not ended", side.number);
            assert_eq!(side.proto.stream_count(), 0, "streams of side {}", side.number);
        }
        self.program.check_closed(&self.sides);
        if self.link.queues.iter().all(|queue| queue.is_empty()) {
            assert_eq!(self.link.pool.in_use(), 0, "slices did not come back");
        }
    }
}
