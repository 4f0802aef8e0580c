// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two sessions do at random whatever their users may do, beside a model that knows what must come
//! of it: the same bytes in the same order, ends where they belong, and all memory free in the end.
//!
//! `SHMIPC_SEED=<seed>` sets the first seed, `SHMIPC_SEEDS=<count>` how many are run. What tasks
//! choose depends on the seed alone; in which order they get to it, also on time.

use std::env;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use support::executor::{SocketPath, run};
use support::model::coverage;
use support::model::play::{bind, both_sides, client_side, server_side};
use support::model::world::World;

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
    pub(crate) mod model;
}

const LIMIT: Duration = Duration::from_secs(120);
const SEEDS: u64 = 1000;
/// Seeds for sides that run at the same time.
const SEEDS_APART: u64 = 200;
/// Seeds that share an executor, so that its poller has more than one pair to look after.
const AT_A_TIME: usize = 4;

/// Held by a test while it runs: there are two processors.
static TURN: Mutex<()> = Mutex::new(());

fn number(variable: &str) -> Option<u64> {
    let value = env::var(variable).ok()?;
    Some(value.parse().unwrap_or_else(|error| panic!("{variable}={value}: {error}")))
}

fn first_seed() -> u64 {
    let seed = number("SHMIPC_SEED").unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
        now.as_millis() as u64
    });
    eprintln!("SHMIPC_SEED={seed}");
    seed
}

#[test]
fn whatever_two_sessions_do_what_was_sent_arrives_and_all_memory_is_free_in_the_end() {
    let _turn = TURN.lock();
    let first = first_seed();
    let count = number("SHMIPC_SEEDS").unwrap_or(SEEDS);
    let next = Arc::new(AtomicU64::new(0));
    let executors = [(); 2].map(|()| {
        let next = Arc::clone(&next);
        thread::spawn(move || run(LIMIT, move || play_all(first, count, next)))
    });
    for executor in executors {
        executor.join().unwrap();
    }
    let (line, never) = coverage::report();
    eprintln!("{line}");
    assert!(count < SEEDS || never.is_empty(), "SHMIPC_SEED={first}: never happened: {never:?}");
}

async fn play_all(first: u64, count: u64, next: Arc<AtomicU64>) {
    let players: Vec<_> = (0..AT_A_TIME)
        .map(|_| {
            let next = Arc::clone(&next);
            glommio::spawn_local(async move {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return;
                    }
                    both_sides(first.wrapping_add(number)).await;
                }
            })
        })
        .collect();
    for player in players {
        player.await;
    }
}

#[test]
fn the_same_holds_when_the_sides_run_at_the_same_time() {
    let _turn = TURN.lock();
    let first = first_seed();
    let count = number("SHMIPC_SEEDS").map_or(SEEDS_APART, |count| count.min(SEEDS_APART));
    let (hand_over, handed_over) = mpsc::channel::<(Arc<World>, mpsc::Sender<SocketPath>)>();
    let server = thread::spawn(move || {
        run(LIMIT, move || async move {
            // Waiting stops the whole executor, which has nothing else to do.
            while let Ok((world, tell)) = handed_over.recv() {
                let path = SocketPath::new();
                let listener = bind(world.seed(), &path);
                tell.send(path).unwrap();
                server_side(world, listener).await;
            }
        });
    });
    run(LIMIT, move || async move {
        for number in 0..count {
            let world = Arc::new(World::new(first.wrapping_add(number)));
            let (tell, told) = mpsc::channel();
            hand_over.send((Arc::clone(&world), tell)).unwrap();
            let path = told.recv().unwrap();
            client_side(world, path.as_str()).await;
        }
    });
    server.join().unwrap();
}
