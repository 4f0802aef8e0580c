// SPDX-License-Identifier: MIT OR Apache-2.0
//! Settings of the executors that this crate makes.

use std::io;
use std::time::Duration;

use glommio::{LocalExecutor, LocalExecutorBuilder, Placement};
use shmipc_core::error::ConfigError;

/// The most entries that io_uring lets a ring have (`IORING_MAX_ENTRIES`).
const MAX_RING_DEPTH: usize = 32_768;

/// How the executors of a [`Server`](crate::Server)'s shards are set up:
/// [`ServerBuilder::executor`](crate::ServerBuilder::executor). What is not set is as glommio has
/// it by default. Where the executors run is up to [`Cores`](crate::Cores).
///
/// Handlers that do much I/O of their own, with files or other sockets, may need other values.
/// Sessions of this crate do not: they use few operations of io_uring at a time, and none of its
/// registered memory.
///
/// ```
/// use std::time::Duration;
/// use shmipc_glommio::{Cores, Error, ExecutorOptions, Server, Session};
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-options-{}", std::process::id()));
/// let options = ExecutorOptions::new()
///     .thread_name("store")
///     .ring_depth(512)
///     .io_memory(1 << 20)
///     .preempt_timer(Duration::from_millis(10));
/// let builder = Server::builder(&path).cores(Cores::Unpinned(2)).executor(options);
/// let server = builder.start(|shard| async move {
///     let name = format!("store-{}", shard.index());
///     assert_eq!(std::thread::current().name(), Some(&*name));
///     Ok::<_, Error>(|_: Session| async { Ok::<_, Error>(()) })
/// })?;
/// # drop(server);
/// # shmipc_glommio::Result::<()>::Ok(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub struct ExecutorOptions {
    thread_name: String,
    ring_depth: Option<usize>,
    io_memory: Option<usize>,
    preempt_timer: Option<Duration>,
    spin_before_park: Option<Duration>,
}

impl Default for ExecutorOptions {
    fn default() -> Self {
        Self {
            thread_name: "shard".to_owned(),
            ring_depth: None,
            io_memory: None,
            preempt_timer: None,
            spin_before_park: None,
        }
    }
}

impl ExecutorOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// The name of the threads, to which `-` and the number of the shard are appended. The system
    /// shows the first 15 bytes. Default: `shard`.
    pub fn thread_name(mut self, name: &str) -> Self {
        // A thread with such a name cannot be started.
        self.thread_name = name.replace('\0', "");
        self
    }

    /// The number of entries of each ring of io_uring: how many operations the executor can submit
    /// with one system call. From 1 to 32 768. Default: 128.
    pub fn ring_depth(mut self, entries: usize) -> Self {
        self.ring_depth = Some(entries);
        self
    }

    /// How many bytes of memory each ring registers for the I/O of files, where the limit of locked
    /// memory allows it: at least 64 KiB. I/O that finds none of it free is slower. Default:
    /// 10 MiB.
    pub fn io_memory(mut self, bytes: usize) -> Self {
        self.io_memory = Some(bytes);
        self
    }

    /// After how long a task that asks whether it should yield is told so, in a task queue without
    /// a requirement on latency. Shorter times delay other tasks less and cost more. Sessions do
    /// not depend on it: while they are busy,
    /// [`reactor_interval`](crate::ConfigBuilder::reactor_interval) says how often io_uring is
    /// looked at. Default: 100 ms.
    pub fn preempt_timer(mut self, interval: Duration) -> Self {
        self.preempt_timer = Some(interval);
        self
    }

    /// How long an executor without runnable tasks polls its rings before its thread sleeps. This
    /// is apart from the time for which sessions poll their queues
    /// ([`spin`](crate::ConfigBuilder::spin)). Default: not at all.
    pub fn spin_before_park(mut self, time: Duration) -> Self {
        self.spin_before_park = Some(time);
        self
    }

    /// The name of the thread of one shard.
    pub(crate) fn name_of_thread(&self, index: usize) -> String {
        format!("{}-{index}", self.thread_name)
    }

    /// Checks the values before anything is started.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        match self.ring_depth {
            Some(entries) if !(1..=MAX_RING_DEPTH).contains(&entries) => Err(ConfigError::Limit {
                what: "ring_depth",
                value: entries as u64,
                problem: "a ring of io_uring has from 1 to 32768 entries",
            }),
            _ => Ok(()),
        }
    }

    /// Makes an executor for this thread, pinned to a processor if there is one. The values are
    /// [checked](Self::check).
    pub(crate) fn make(&self, processor: Option<usize>) -> io::Result<LocalExecutor> {
        let placement = processor.map_or(Placement::Unbound, Placement::Fixed);
        let mut builder = LocalExecutorBuilder::new(placement).name(&self.thread_name);
        if let Some(entries) = self.ring_depth {
            builder = builder.ring_depth(entries);
        }
        if let Some(bytes) = self.io_memory {
            builder = builder.io_memory(bytes);
        }
        if let Some(interval) = self.preempt_timer {
            builder = builder.preempt_timer(interval);
        }
        if let Some(time) = self.spin_before_park {
            builder = builder.spin_before_park(time);
        }
        Ok(builder.make()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_executor_is_made_with_all_options() {
        let options = ExecutorOptions::new()
            .thread_name("a\0b")
            .ring_depth(32)
            .io_memory(1 << 16)
            .preempt_timer(Duration::from_millis(5))
            .spin_before_park(Duration::from_micros(10));
        options.check().unwrap();
        assert_eq!(options.name_of_thread(3), "ab-3");
        assert_eq!(options.make(None).unwrap().run(async { 7 }), 7);
    }

    #[test]
    fn a_ring_has_entries_and_not_too_many() {
        for entries in [0, MAX_RING_DEPTH + 1] {
            let error = ExecutorOptions::new().ring_depth(entries).check().unwrap_err();
            assert!(error.to_string().contains("ring_depth"), "{error}");
        }
        ExecutorOptions::new().ring_depth(MAX_RING_DEPTH).check().unwrap();
    }
}
