// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sessions over plain vectors: deterministic, and thousands of operations in a millisecond.
//!
//! Two sides share queues, slices and a socket, and a program at each side opens streams, sends,
//! reads, and ends them in every way. A saboteur has things come late or in another order, stops a
//! side, lets queues, memory and socket run full, and cuts the connection. Everything is drawn from
//! a seed, which is printed when something is wrong.
//!
//! - [`link`]: queues, slices and socket. - [`driver`], [`turn`]: what a front end does.
//! - `tasks`: a task that sends, one that reads, one that closes, as the handles do it.
//! - `program`: what is done with streams, and what may be seen. - `setup`: what a seed stands for.
//! - [`hostile`]: one side, and a peer that does what a fuzzer says.
//! - `world`: what happens next, and what has to hold at any time and at the end.
//!
//! Checked: the bytes of each direction come in order, once, and on their own stream; an end is
//! seen behind all data; when nothing is in the way any more, every task goes on that waits, woken
//! by nothing else; streams, slices and credit come back; a close that succeeds has lost nothing.
//!
//! `SHMIPC_SEED=N` runs one seed, `SHMIPC_SIM_SECONDS=N` as many as fit, `SHMIPC_SIM_FIRST=N` from
//! that one on.

// A fuzzer uses a part of it.
#![cfg_attr(not(test), allow(dead_code))]

mod driver;
pub(crate) mod hostile;
mod link;
#[cfg(test)]
mod program;
#[cfg(test)]
mod setup;
mod tasks;
mod turn;
#[cfg(test)]
mod world;

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::time::{Duration, Instant};

    use super::hostile;
    use super::setup::Rng;
    use super::world::World;

    /// Seeds that found something once.
    const FOUND: [u64; 2] = [6, 51];

    fn number_in(variable: &str) -> Option<u64> {
        let value = std::env::var(variable).ok()?;
        Some(value.parse().unwrap_or_else(|_| panic!("{variable} is not a number: {value}")))
    }

    /// Returns how many operations that took.
    fn run(seed: u64) -> u64 {
        let mut world = World::new(seed);
        let result = catch_unwind(AssertUnwindSafe(|| world.run()));
        let operations = world.operations;
        if result.is_err() {
            let setup = &world.setup;
            // What is left in it may not hold together.
            panic!("SHMIPC_SEED={seed} failed after {operations} operations: {setup:#?}");
        }
        operations
    }

    /// A peer that does what random bytes say.
    #[test]
    #[cfg_attr(miri, ignore)]
    fn a_hostile_peer_ends_its_own_session_at_most() {
        let time = Duration::from_secs(1);
        let (begin, mut seed) = (Instant::now(), number_in("SHMIPC_SEED").unwrap_or(0));
        while begin.elapsed() < time {
            let mut rng = Rng::new(seed);
            let bytes: Vec<u8> = (0..rng.below(600)).map(|_| rng.next() as u8).collect();
            if catch_unwind(|| hostile::run(&bytes)).is_err() {
                panic!("SHMIPC_SEED={seed} failed");
            }
            seed += 1;
        }
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn two_sides_lose_nothing_whatever_is_in_their_way() {
        if let Some(seed) = number_in("SHMIPC_SEED") {
            run(seed);
            return;
        }
        for seed in FOUND {
            run(seed);
        }
        let time = Duration::from_secs(number_in("SHMIPC_SIM_SECONDS").unwrap_or(3));
        let (begin, mut operations) = (Instant::now(), 0);
        let first = number_in("SHMIPC_SIM_FIRST").unwrap_or(0);
        let mut seed = first;
        while begin.elapsed() < time {
            operations += run(seed);
            seed += 1;
        }
        println!("{} sessions, {operations} operations in {:?}", seed - first, begin.elapsed());
    }
}
