// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which processors the shards of a server run on.

use crate::exec::runtime::{CpuLocation, CpuSet};
use nix::sched::{CpuSet as Allowed, sched_getaffinity};
use nix::unistd::Pid;

use crate::preflight::{self, Wanted};
use shmipc_core::error::{ConfigError, Error, Result};
use shmipc_core::footprint::Footprint;

/// Which processors the shards of a [`Server`](crate::Server) run on, one shard on each.
///
/// Only those count that this process may use (`taskset`, the container's processor set).
///
/// ```
/// use shmipc_glommio::{Cores, Server};
///
/// // The second and the fourth processor.
/// let builder = Server::builder("/run/store.sock").cores(Cores::List(vec![1, 3]));
/// # drop(builder);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cores {
    /// All of them.
    All,
    /// So many, spread over the machine: the second thread of a physical core comes after the first
    /// of every other.
    Count(usize),
    /// These, by the numbers that the system gives them. Shard 0 runs on the first.
    List(Vec<usize>),
    /// So many shards that the system may move between processors: for tests, and for machines that
    /// have other things to do. A shard without a processor of its own answers later.
    Unpinned(usize),
}

impl Cores {
    /// One entry for each shard: the processor that it is pinned to, if it is.
    pub(crate) fn choose(&self) -> Result<Vec<Option<usize>>> {
        let chosen = match self {
            Self::Unpinned(count) => vec![None; *count],
            Self::All => pinned(spread(available()?)),
            Self::Count(count) => {
                let mut processors = spread(available()?);
                if processors.len() < *count {
                    let have = processors.len();
                    return Err(cannot(format!("{count} asked for, this process may use {have}")));
                }
                processors.truncate(*count);
                pinned(processors)
            }
            Self::List(list) => pinned(check_list(list, &available()?)?),
        };
        if chosen.is_empty() {
            return Err(cannot("a server has at least one".into()));
        }
        Ok(chosen)
    }
}

/// Looks whether executors can run here, one on each of these processors, before the first one is
/// made.
///
/// To be called first in a program that makes executors by itself, as clients do: the runtime
/// panics, or ends the process, where the system does not give it what it takes, and does not say
/// what that was. A [`Server`](crate::Server) looks by itself. Takes a fraction of a millisecond.
///
/// It looks at io_uring (seccomp, the sysctl `kernel.io_uring_disabled`, the kernel's age), the
/// limit of locked memory, open files, threads, and, for [`Cores`], whether threads may be pinned.
/// Of a [`Footprint`] it looks at what the sessions take too, first at their
/// [memory](Footprint::check_memory).
///
/// ```
/// use shmipc_glommio::{Client, Cores, preflight};
///
/// // Where the system may run the executor on any processor.
/// preflight(&Cores::Unpinned(1))?;
/// glommio::LocalExecutorBuilder::default().spawn(|| async {
///     let client = Client::builder("/run/store.sock").build();
///     // ...
/// #   drop(client);
/// }).unwrap().join().unwrap();
/// # shmipc_glommio::Result::<()>::Ok(())
/// ```
///
/// # Errors
///
/// [`Error::Resource`] names the limit, its value, what is needed, and what to do.
/// [`ConfigError::Cores`], when the processors are not there, or not for this process.
pub fn preflight(of: &impl Requirements) -> Result<()> {
    of.check()
}

/// What [`preflight`] can look at: [`Cores`], and a [`Footprint`].
pub trait Requirements: private::Check {}

impl Requirements for Cores {}
impl Requirements for Footprint {}

mod private {
    use shmipc_core::error::Result;
    use shmipc_core::footprint::Footprint;

    use super::Cores;

    pub trait Check {
        fn check(&self) -> Result<()>;
    }

    impl Check for Cores {
        fn check(&self) -> Result<()> {
            super::look_ahead(&self.choose()?, 0)
        }
    }

    impl Check for Footprint {
        fn check(&self) -> Result<()> {
            // First: so many sessions that their memory is nowhere to be had exceed other limits.
            self.check_memory()?;
            let executors = usize::try_from(self.executors()).unwrap_or(usize::MAX);
            let sessions = self.sessions();
            Ok(super::preflight::check(super::Wanted { executors, more_threads: 0, sessions })?)
        }
    }
}

/// The same for processors that were chosen, and so many more threads.
pub(crate) fn look_ahead(chosen: &[Option<usize>], more_threads: usize) -> Result<()> {
    preflight::check(Wanted { executors: chosen.len(), more_threads, sessions: 0 })?;
    Ok(preflight::check_processors(chosen.iter().copied().flatten().collect())?)
}

fn cannot(problem: String) -> Error {
    ConfigError::Cores(problem).into()
}

fn pinned(processors: Vec<usize>) -> Vec<Option<usize>> {
    processors.into_iter().map(Some).collect()
}

/// The processors that are there and that this process may use.
fn available() -> Result<Vec<CpuLocation>> {
    let failed = |error: std::io::Error| Error::os("look for processors", error);
    let allowed = sched_getaffinity(Pid::from_raw(0)).map_err(|errno| failed(errno.into()))?;
    let online = CpuSet::online().map_err(|error| failed(error.into()))?;
    let may_use = |cpu: usize| cpu < Allowed::count() && allowed.is_set(cpu).unwrap_or(false);
    Ok(online.into_iter().filter(|location| may_use(location.cpu)).collect())
}

/// Puts the first thread of every physical core in front of all second ones.
fn spread(mut processors: Vec<CpuLocation>) -> Vec<usize> {
    processors.sort_by_key(|location| location.cpu);
    let rank = |at: usize| {
        let place = |location: &CpuLocation| (location.package, location.core);
        let before = &processors[..at];
        before.iter().filter(|other| place(other) == place(&processors[at])).count()
    };
    let mut ranked: Vec<_> =
        (0..processors.len()).map(|at| (rank(at), processors[at].cpu)).collect();
    ranked.sort_unstable();
    ranked.into_iter().map(|(_, cpu)| cpu).collect()
}

fn check_list(list: &[usize], available: &[CpuLocation]) -> Result<Vec<usize>> {
    for (at, cpu) in list.iter().enumerate() {
        if !available.iter().any(|location| location.cpu == *cpu) {
            return Err(cannot(format!("this process may not use processor {cpu}")));
        }
        if list[..at].contains(cpu) {
            return Err(cannot(format!("processor {cpu} is there twice")));
        }
    }
    Ok(list.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(cpu: usize, core: usize, package: usize) -> CpuLocation {
        CpuLocation { cpu, core, package, numa_node: package }
    }

    #[test]
    fn second_threads_of_a_core_come_last() {
        let siblings = vec![at(3, 1, 0), at(0, 0, 0), at(1, 0, 0), at(2, 1, 0), at(4, 0, 1)];
        assert_eq!(spread(siblings), [0, 2, 4, 1, 3]);
    }

    #[test]
    fn what_there_is_not_is_refused() {
        let refused = |cores: Cores| cores.choose().map(drop).unwrap_err().to_string();
        assert!(refused(Cores::Count(100_000)).contains("may use"));
        assert!(refused(Cores::List(vec![100_000])).contains("processor 100000"));
        assert!(refused(Cores::List(vec![])).contains("at least one"));
        assert!(refused(Cores::Unpinned(0)).contains("at least one"));
        let here = Cores::All.choose().unwrap();
        let first = here[0].unwrap();
        assert!(refused(Cores::List(vec![first, first])).contains("twice"));
        assert_eq!(Cores::List(vec![first]).choose().unwrap(), [Some(first)]);
        assert_eq!(Cores::Count(here.len()).choose().unwrap(), here);
        assert_eq!(Cores::Unpinned(3).choose().unwrap(), [None; 3]);
    }
}
