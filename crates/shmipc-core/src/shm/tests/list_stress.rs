// SPDX-License-Identifier: MIT OR Apache-2.0
//! The free lists under two processes that are stopped and continued at random.
//!
//! Each process takes slices out of small lists, sends most of them to the other one through an IO
//! queue, gives the others back unsent, and gives back what it received. The test stops and
//! continues both (`SIGSTOP`, `SIGCONT`), so that every step of either is at some time the last one
//! before a long pause in which the other goes on. When as many slices were taken as was asked for,
//! both come to rest, and every slice must be in its list again.
//!
//! Who has a slice stands in a word beside the lists, which the lists know nothing of: swapped when
//! it is taken, and it must say that nobody has it; swapped before it is freed, and it must name
//! who took it. So a slice that was handed out twice is found at once.
//!
//! With a set of lists for each side nothing may be found at all. Lists that both sides take from
//! are broken by ABA sooner or later, and so a process may end with the error that its list
//! reports, or with that of its ledger, in which it keeps what it holds as the manager does. A
//! process that is stopped between its swap of the head and its second look at the links has broken
//! the list and does not know it yet; if the other one takes a slice twice meanwhile, the words
//! show that first. That is counted, and is a failure unless the list is reported broken when both
//! have gone on.
//!
//! Some hundred thousand takes by default. For longer, one kind of lists at a time:
//!
//! ```text
//! SHMIPC_LIST_TAKES=1000000000 cargo test --release --lib list_stress::lists -- --nocapture
//! SHMIPC_LIST_TAKES=1000000000 cargo test --release --lib list_stress::shared -- --nocapture
//! ```
//!
//! `SHMIPC_LIST_SEED` starts from the seed that an earlier run printed. The seed decides what each
//! process does and how long it is stopped; where it is then, the machine decides.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use self::player::{EVENTS, Finding, Kind, LONG, Random, TASK, books};
use crate::shm::event_queue;
use crate::shm::map::memory::Memory;
use crate::shm::map::region::Region;
use crate::shm::pool::format::map_lists;
use crate::shm::pool::owned_list::OwnedList;

mod player;

/// How many slices are taken when nothing else is said.
const TAKES: u64 = 200_000;
/// Slices in each list, round by round. In the shortest a list goes once round in two takes.
const CAPACITIES: [u32; 6] = [3, 4, 6, 8, 16, 40];
/// After so many broken lists of one length it is the next length's turn.
const MOST_BROKEN: u32 = 40;

/// A side's process, which does not outlive its test.
struct Process(Child);

impl Process {
    fn spawn(task: &str) -> Self {
        let path = format!("{}::player::side", module_path!().split_once("::").unwrap().1);
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", &path, "--nocapture", "--test-threads=1"]).env(TASK, task);
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
    }

    fn runs(&mut self) -> bool {
        match self.0.try_wait().unwrap() {
            None => true,
            Some(status) => {
                assert!(status.success(), "a side has ended with {status}");
                false
            }
        }
    }

    /// Sends a signal if it still runs. Nobody else has its number until it was waited for.
    fn signal(&mut self, signal: Signal) {
        if self.runs() {
            kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What came of one memory, or of several.
#[derive(Default)]
struct Outcome {
    taken: u64,
    sent: u64,
    freed: u64,
    batches: u64,
    empty: u64,
    stops: u64,
    memories: u64,
    /// Memories in which a side has found its list broken; those in which its ledger did.
    broken: u64,
    ledger: u64,
    /// Memories in which a slice was seen with two owners.
    twice: u64,
    /// The first few things that were found.
    texts: Vec<String>,
}

impl Outcome {
    fn add(&mut self, other: Self) {
        self.taken += other.taken;
        self.sent += other.sent;
        self.freed += other.freed;
        self.batches += other.batches;
        self.empty += other.empty;
        self.stops += other.stops;
        self.memories += other.memories;
        self.broken += other.broken;
        self.ledger += other.ledger;
        self.twice += other.twice;
        let room = 6_usize.saturating_sub(self.texts.len());
        self.texts.extend(other.texts.into_iter().take(room));
    }
}

/// Stops and continues both sides until they end. Gives how often.
fn disturb(sides: &mut [Process; 2], random: &mut Random, books: &Region) -> u64 {
    let mut stops = 0;
    let mut last = (0, Instant::now());
    let pause = |random: &mut Random| {
        // Mostly shorter than a turn of the scheduler, sometimes longer.
        let limit = if random.below(20) == 0 { 8000 } else { 600 };
        std::thread::sleep(Duration::from_micros(random.below(limit)));
    };
    while sides.iter_mut().any(Process::runs) {
        pause(random);
        // One of them, the other, or both.
        let chosen = 1 + random.below(3);
        let mut signal = |signal| {
            for (number, side) in sides.iter_mut().enumerate() {
                if chosen & (1 << number) != 0 {
                    side.signal(signal);
                }
            }
        };
        signal(Signal::SIGSTOP);
        pause(random);
        signal(Signal::SIGCONT);
        stops += 1;
        let moved = books::SIDES.iter().fold(0, |sum, at| {
            sum + books.load_i64(at + books::TAKEN) + books.load_i64(at + books::FREED)
        });
        if moved != last.0 {
            last = (moved, Instant::now());
        }
        assert!(last.1.elapsed() < LONG, "nothing happens after {} steps", last.0);
    }
    stops
}

/// Every slice is in its list, and nobody has one.
fn check_whole(kind: Kind, capacity: u32, memory: &Region, books: &Region) {
    for (number, list) in map_lists(memory, kind.sets(0)).unwrap().lists.into_iter().enumerate() {
        assert_eq!(list.capacity(), capacity);
        assert_eq!(list.free(memory), capacity.cast_signed(), "list {number}");
        // Nobody else takes from it any more, whatever it was.
        let popper = OwnedList::new(memory, list).unwrap();
        let mut all = HashSet::new();
        loop {
            let batch = popper.take(memory, 8).unwrap();
            if batch.places().is_empty() {
                break;
            }
            for &place in batch.places() {
                assert!(all.insert(place), "slice {place} stands twice in list {number}");
            }
        }
        // The last one stays.
        assert_eq!(all.len(), capacity as usize - 1, "slices of list {number} are lost");
        let owner = |id| books.load_u32(books::OWNERS + 4 * id as usize, Ordering::Acquire);
        let ids = number as u32 * capacity..(number as u32 + 1) * capacity;
        assert!(ids.clone().all(|id| owner(id) == 0), "somebody has a slice of list {number}");
    }
}

/// One memory, until so many slices were taken, or until something is found.
fn one_memory(kind: Kind, capacity: u32, takes: u64, random: &mut Random) -> Outcome {
    let memory = |len| Region::create_memfd(Path::new("list-stress"), len).unwrap();
    let (buffer, buffer_fd) = memory(kind.memory_len(capacity));
    let (_queues, queues_fd) = memory(event_queue::queues_len(EVENTS));
    let (books, books_fd) = memory(books::LEN);
    let fds = [&buffer_fd, &queues_fd, &books_fd].map(OwnedFd::as_raw_fd);
    let seed = random.below(u64::MAX);
    let mut sides = [0, 1].map(|side| {
        let [buffer, queues, books] = fds;
        let parent = std::process::id();
        Process::spawn(&format!(
            "{parent} {buffer} {queues} {books} {side} {} {seed} {takes}",
            kind as u8
        ))
    });
    let stops = disturb(&mut sides, random, &books);

    let outcome = Outcome { stops, ..outcome(&books) };
    let findings = findings(&books);
    if findings == [Finding::Nothing; 2] && kind != Kind::Mistaken {
        check_whole(kind, capacity, &buffer, &books);
        assert!(outcome.taken >= takes, "it has ended before its time");
        assert_eq!(outcome.taken, outcome.freed);
    }
    let is_reported = findings.iter().any(|finding| finding.is_reported());
    let is_twice = findings.contains(&Finding::Twice);
    let texts = &outcome.texts;
    match kind {
        Kind::Apart => assert_eq!(findings, [Finding::Nothing; 2], "{capacity}: {texts:?}"),
        Kind::Shared => {
            assert!(is_reported || !is_twice, "{capacity}, nothing reported it: {texts:?}");
        }
        Kind::Mistaken => assert!(is_reported || is_twice, "nothing was found"),
    }
    outcome
}

/// How each side says that it has ended.
fn findings(books: &Region) -> [Finding; 2] {
    let findings = books::SIDES.map(|side| {
        // Acquire, pairs with the release store of the side that ends: its counts and its text.
        let number = books.load_u32(side + books::FINDING, Ordering::Acquire);
        Finding::ALL[number as usize]
    });
    assert!(!findings.contains(&Finding::Unknown), "a side has ended without a word");
    findings
}

/// What both sides have written into the books.
fn outcome(books: &Region) -> Outcome {
    let findings = findings(books);
    let has = |finding| u64::from(findings.contains(&finding));
    let field = |at: usize| -> u64 {
        let count = |side: &usize| books.load_i64(side + at).cast_unsigned();
        books::SIDES.iter().map(count).sum()
    };
    let text = |side: &usize| {
        let mut text = [0; books::TEXT_LEN];
        books.copy_out(side + books::TEXT, &mut text);
        String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned()
    };
    Outcome {
        taken: field(books::TAKEN),
        sent: field(books::SENT),
        freed: field(books::FREED),
        batches: field(books::BATCHES),
        empty: field(books::EMPTY),
        stops: 0,
        memories: 1,
        broken: has(Finding::Broken),
        ledger: has(Finding::Ledger),
        twice: has(Finding::Twice),
        texts: books::SIDES.iter().map(text).filter(|text| !text.is_empty()).collect(),
    }
}

fn stress(kind: Kind) -> Outcome {
    let variable = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let takes = variable("SHMIPC_LIST_TAKES").unwrap_or(TAKES);
    let seed = variable("SHMIPC_LIST_SEED").unwrap_or_else(clock);
    println!("SHMIPC_LIST_TAKES={takes} SHMIPC_LIST_SEED={seed} {kind:?}");
    let mut random = Random(seed);
    let started = Instant::now();
    let mut all = Outcome::default();
    for capacity in CAPACITIES {
        let share = takes.div_ceil(CAPACITIES.len() as u64);
        let (mut taken, mut broken) = (0, 0);
        let mut lines = Outcome::default();
        while taken < share && broken < MOST_BROKEN {
            let outcome = one_memory(kind, capacity, share - taken, &mut random);
            taken += outcome.taken;
            broken += u32::from(outcome.broken + outcome.ledger > 0);
            lines.add(outcome);
        }
        println!("lists of {capacity}: {}", summary(&lines));
        all.add(lines);
    }
    println!("together, in {:.1} s: {}", started.elapsed().as_secs_f64(), summary(&all));
    for text in &all.texts {
        println!("for instance: {text}");
    }
    all
}

fn summary(outcome: &Outcome) -> String {
    let mut line = format!(
        "{} slices taken in {} batches, {} of them sent, {} takes got none, {} stops; ",
        outcome.taken, outcome.batches, outcome.sent, outcome.empty, outcome.stops
    );
    let found = outcome.broken + outcome.ledger + outcome.twice;
    if found == 0 {
        write!(line, "none twice, none lost in {} memories", outcome.memories).unwrap();
    } else {
        write!(
            line,
            "{} memories, found broken by the list in {}, by the ledger in {}; in {} a slice was \
             seen with two owners",
            outcome.memories, outcome.broken, outcome.ledger, outcome.twice
        )
        .unwrap();
    }
    line
}

#[test]
#[cfg_attr(miri, ignore)]
fn lists_of_one_side_hand_out_no_slice_twice_and_lose_none() {
    let outcome = stress(Kind::Apart);
    assert_eq!(outcome.memories, CAPACITIES.len() as u64);
    assert!(outcome.stops > outcome.memories, "nobody was stopped");
}

#[test]
#[cfg_attr(miri, ignore)]
fn shared_lists_are_right_or_say_that_they_are_broken() {
    stress(Kind::Shared);
}

#[test]
#[cfg_attr(miri, ignore)]
fn two_takers_that_do_not_know_of_each_other_are_found_out() {
    let (mut random, mut all) = (Random(1), Outcome::default());
    // Each of them is found out. Who comes first, the list or the words, is a matter of luck.
    for capacity in CAPACITIES.into_iter().cycle().take(1000) {
        all.add(one_memory(Kind::Mistaken, capacity, TAKES, &mut random));
        if all.twice > 0 {
            break;
        }
    }
    println!("{}", summary(&all));
    assert!(all.twice > 0, "no slice was seen with two owners: {:?}", all.texts);
}
