// SPDX-License-Identifier: MIT OR Apache-2.0
//! How much memory sessions will take, and whether there is as much.
//!
//! Shared memory is not had by asking for it: a file in `/dev/shm`, or a memfd in a container, can
//! be created larger than what is there. It is the first touch of a page too many that fails, by
//! `SIGBUS` or by the kernel's choice of a process to kill. So this crate adds up, and asks first,
//! and takes the pages of files when it creates them.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use crate::config::{Config, MemoryKind, PRIVATE_BYTES_PER_SLICE, SliceClass};
use crate::error::{Error, ResourceError};
use crate::limits;
use crate::wire::layout::{SLICE_HEADER_LEN, queue_memory_len};

/// The memory that the sessions of a program take when each of its cores has some to every shard of
/// a server.
///
/// Buffers become resident as they are used, so this is what it comes to at most.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::{Config, MemoryKind};
///
/// let config = Config::builder().container().memory(MemoryKind::File).build()?;
/// // Two cores, each with three sessions to each of four shards.
/// let footprint = config.footprint(2, 4, 3);
/// assert_eq!(footprint.sessions(), 24);
/// assert_eq!(footprint.buffer_bytes(), 24 * (2 << 20));
/// println!("{footprint}");
/// if let Err(error) = footprint.check_memory() {
///     eprintln!("that will not do: {error}");
/// }
/// # shmipc_glommio::Result::<()>::Ok(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footprint {
    executors: u64,
    sessions: u64,
    buffer_bytes: u64,
    queue_bytes: u64,
    /// The larger one of a session's two memories.
    largest_file: u64,
    table_bytes: u64,
    /// Where files of shared memory are, when the memory is files.
    directory: Option<PathBuf>,
}

impl Config {
    /// The memory that is needed when each of so many cores has `sessions_per_shard` sessions of
    /// this configuration to each of so many shards.
    pub fn footprint(&self, cores: usize, shards: usize, sessions_per_shard: usize) -> Footprint {
        let sessions = [shards, sessions_per_shard]
            .iter()
            .fold(cores as u64, |product, &factor| product.saturating_mul(factor as u64));
        let total = |bytes: u64| bytes.saturating_mul(sessions);
        let directory = self.settings().path_prefix.parent().unwrap_or(Path::new("/"));
        Footprint {
            executors: cores as u64,
            sessions,
            buffer_bytes: total(self.settings().buffer_size.into()),
            queue_bytes: total(queue_memory_len(self.settings().queue_capacity)),
            largest_file: queue_memory_len(self.settings().queue_capacity)
                .max(self.settings().buffer_size.into()),
            table_bytes: total(self.slices().saturating_mul(PRIVATE_BYTES_PER_SLICE)),
            directory: (self.settings().memory == MemoryKind::File).then(|| directory.to_owned()),
        }
    }
}

impl Config {
    /// How many slices a buffer memory of this configuration has at most.
    fn slices(&self) -> u64 {
        let of_class = |class: &SliceClass| {
            let stride = u64::from(class.capacity) + SLICE_HEADER_LEN as u64;
            u64::from(self.settings().buffer_size) * u64::from(class.percent) / 100 / stride
        };
        self.settings().slice_classes.iter().map(of_class).sum()
    }
}

impl Footprint {
    /// How many sessions there are.
    pub fn sessions(&self) -> u64 {
        self.sessions
    }

    /// Bytes of buffer memory, all sessions together.
    pub fn buffer_bytes(&self) -> u64 {
        self.buffer_bytes
    }

    /// Bytes of IO queues, all sessions together.
    pub fn queue_bytes(&self) -> u64 {
        self.queue_bytes
    }

    /// Bytes of private memory that this side keeps beside the buffers at most, all sessions
    /// together: books on the slices. The more slices, the more of it.
    pub fn table_bytes(&self) -> u64 {
        self.table_bytes
    }

    /// Bytes of shared memory in total.
    pub fn total_bytes(&self) -> u64 {
        self.buffer_bytes.saturating_add(self.queue_bytes)
    }

    /// How many executors there are.
    pub fn executors(&self) -> u64 {
        self.executors
    }

    /// Checks whether this machine, and what this process may have of it, can hold the memory: the
    /// limit on the size of files, the file system of file memory, and the memory limits of the
    /// process' control groups.
    ///
    /// The answer is of this moment: others may take the memory meanwhile. What cannot be found out
    /// (no `/proc`, no `/sys`) is not held against it.
    ///
    /// # Errors
    ///
    /// [`Error::Resource`], with what there is too little of.
    pub fn check_memory(&self) -> Result<(), Error> {
        self.check_shared_memory()?;
        if self.sessions > 0 {
            limits::check_file_size("the memory of a session", self.largest_file)?;
        }
        Ok(())
    }

    /// The part of [`check_memory`](Self::check_memory) without the limit on the size of files.
    #[doc(hidden)]
    pub fn check_shared_memory(&self) -> Result<(), Error> {
        if let Some(directory) = &self.directory {
            let space = nix::sys::statvfs::statvfs(directory).map_err(|errno| {
                Error::os_at("look for room for shared memory in", &**directory, errno)
                    .advise("`path_prefix` says where such files are made")
            })?;
            let available = space.blocks_available().saturating_mul(space.fragment_size());
            self.fits_directory(directory, available)?;
        }
        match Group::tightest() {
            Some(group) => Ok(self.fits_group(&group)?),
            None => Ok(()),
        }
    }

    /// The error of a file system that had too little after all.
    #[doc(hidden)]
    pub fn lacks_space(&self) -> Error {
        let directory = self.directory.clone().unwrap_or_default();
        let space = nix::sys::statvfs::statvfs(&directory);
        let available =
            space.map_or(0, |space| space.blocks_available().saturating_mul(space.fragment_size()));
        let needed = self.total_bytes();
        ResourceError::SharedMemory { directory, needed, available }.into()
    }

    fn fits_directory(&self, directory: &Path, available: u64) -> Result<(), ResourceError> {
        let needed = self.total_bytes();
        if needed <= available {
            return Ok(());
        }
        let directory = directory.to_owned();
        Err(ResourceError::SharedMemory { directory, needed, available })
    }

    fn fits_group(&self, group: &Group) -> Result<(), ResourceError> {
        let needed = self.total_bytes().saturating_add(self.table_bytes);
        if needed <= group.available {
            return Ok(());
        }
        let Group { path, available } = group.clone();
        Err(ResourceError::ControlGroup { group: path, needed, available })
    }
}

impl fmt::Display for Footprint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let Self { executors, sessions, buffer_bytes, queue_bytes, .. } = self;
        let (buffers, queues) = (mib(*buffer_bytes), mib(*queue_bytes));
        write!(
            formatter,
            "{executors} cores, {sessions} sessions: {buffers:.1} MiB of buffers, {queues:.1} MiB \
             of IO queues"
        )
    }
}

/// A control group that limits memory, and what is left in it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    path: PathBuf,
    available: u64,
}

/// Where a version of control groups keeps what.
struct Hierarchy {
    root: &'static str,
    limit: &'static str,
    usage: &'static str,
    /// The line of `memory.stat` with the bytes that the kernel gives back when asked.
    reclaimable: &'static str,
}

const VERSION_2: Hierarchy = Hierarchy {
    root: "/sys/fs/cgroup",
    limit: "memory.max",
    usage: "memory.current",
    reclaimable: "inactive_file ",
};

const VERSION_1: Hierarchy = Hierarchy {
    root: "/sys/fs/cgroup/memory",
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file ",
};

impl Group {
    /// The group of this process, or one above it, that has the least left.
    fn tightest() -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let groups = own.lines().filter_map(|line| {
            let (hierarchy, path) = membership(line)?;
            hierarchy.tightest(Path::new(hierarchy.root), path)
        });
        groups.min_by_key(|group| group.available)
    }
}

/// Reads a line of `/proc/self/cgroup`: the group's path, if the hierarchy can limit memory.
fn membership(line: &str) -> Option<(Hierarchy, &str)> {
    let mut parts = line.splitn(3, ':');
    let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
    if controllers.is_empty() {
        return Some((VERSION_2, path));
    }
    controllers.split(',').any(|name| name == "memory").then_some((VERSION_1, path))
}

impl Hierarchy {
    fn tightest(&self, root: &Path, path: &str) -> Option<Group> {
        // A container may see its own group as the root, but be told the path outside; then only
        // the root is there.
        let relative = Path::new(path.trim_start_matches('/'));
        let groups = relative.ancestors().map(|ancestor| root.join(ancestor));
        groups.filter_map(|group| self.left_in(group)).min_by_key(|group| group.available)
    }

    fn left_in(&self, path: PathBuf) -> Option<Group> {
        let number = |file| fs::read_to_string(path.join(file)).ok()?.trim().parse::<u64>().ok();
        // "max" is no number, and no limit.
        let limit = number(self.limit)?;
        let used = number(self.usage)?;
        let statistics = fs::read_to_string(path.join("memory.stat")).unwrap_or_default();
        let reclaimable = statistics
            .lines()
            .find_map(|line| line.strip_prefix(self.reclaimable)?.trim().parse().ok())
            .unwrap_or(0);
        Some(Group { path, available: limit.saturating_sub(used.saturating_sub(reclaimable)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn footprint(cores: usize, memory: MemoryKind) -> Footprint {
        Config::builder().memory(memory).build().unwrap().footprint(cores, 3, 5)
    }

    #[test]
    fn cores_times_shards_times_sessions() {
        let footprint = footprint(2, MemoryKind::Memfd);
        assert_eq!(footprint.sessions(), 30);
        assert_eq!(footprint.total_bytes(), 30 * ((32 << 20) + 196_656));
        // Of 8, 32 and 128 KiB.
        assert_eq!(footprint.table_bytes(), 30 * (2048 + 307 + 51) * 192);
        let text = footprint.to_string();
        assert_eq!(text, "2 cores, 30 sessions: 960.0 MiB of buffers, 5.6 MiB of IO queues");
        assert_eq!(Config::default().footprint(usize::MAX, 9, 9).total_bytes(), u64::MAX);
    }

    #[test]
    fn too_little_is_told_by_what_it_is() {
        let files = footprint(2, MemoryKind::File);
        let needed = files.total_bytes();
        let shm = Path::new("/dev/shm");
        assert_eq!(files.directory.as_deref(), Some(shm));
        assert_eq!(files.fits_directory(shm, needed), Ok(()));
        let error = files.fits_directory(shm, 64 << 20).unwrap_err();
        assert!(matches!(error, ResourceError::SharedMemory { available: 0x400_0000, .. }));

        // What this side keeps beside the files is in the group too.
        let needed = needed + files.table_bytes();
        let group = Group { path: "/sys/fs/cgroup/pod".into(), available: needed };
        assert_eq!(files.fits_group(&group), Ok(()));
        let group = Group { available: needed - 1, ..group };
        assert!(matches!(files.fits_group(&group), Err(ResourceError::ControlGroup { .. })));
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let config = Config::builder().memory(MemoryKind::File).path_prefix("/nowhere/at-all/x");
        let error =
            config.build().unwrap().footprint(1, 1, 1).check_memory().unwrap_err().to_string();
        assert!(error.contains("/nowhere/at-all"), "{error}");
    }

    #[test]
    fn no_machine_has_that_much() {
        let config = Config::builder().memory(MemoryKind::File).build().unwrap();
        assert!(config.footprint(1, 1, 1).check_shared_memory().is_ok());
        let error = config.footprint(1 << 20, 1 << 10, 16).check_shared_memory().unwrap_err();
        assert!(matches!(error, Error::Resource(ResourceError::SharedMemory { .. })), "{error}");
    }

    /// A control group as the kernel shows it, in files of our own.
    fn group(root: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(root).unwrap();
        for (name, text) in files {
            fs::write(root.join(name), text).unwrap();
        }
    }

    #[test]
    fn the_tightest_group_on_the_way_up_counts() {
        let root = std::env::temp_dir().join(format!("shmipc-groups-{}", std::process::id()));
        group(&root, &[("memory.max", "9000\n"), ("memory.current", "1000\n")]);
        let pod = [
            ("memory.max", "5000\n"),
            ("memory.current", "4500\n"),
            ("memory.stat", "anon 4000\ninactive_file 300\nactive_file 200\n"),
        ];
        group(&root.join("pod"), &pod);
        group(&root.join("pod/one"), &[("memory.max", "max\n"), ("memory.current", "1\n")]);
        let found = VERSION_2.tightest(&root, "/pod/one");
        assert_eq!(found, Some(Group { path: root.join("pod"), available: 800 }));
        let outside = VERSION_2.tightest(&root, "/somewhere/else");
        assert_eq!(outside, Some(Group { path: root.join(""), available: 8000 }));
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn both_versions_of_control_groups_are_recognised() {
        let found = |line| membership(line).map(|(hierarchy, path)| (hierarchy.root, path));
        assert_eq!(found("0::/user.slice"), Some(("/sys/fs/cgroup", "/user.slice")));
        assert_eq!(found("4:cpu,memory:/pod:1"), Some(("/sys/fs/cgroup/memory", "/pod:1")));
        assert_eq!(found("3:cpuset:/"), None);
        assert_eq!(found("nonsense"), None);
    }
}
