// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a caller can choose, checked once.
//!
//! A [`Config`] is immutable and always valid: [`ConfigBuilder::build`] is the only way to make one
//! that is not the default. The defaults of the memories are those of the peers in the field
//! (`docs/protocol.md#list-header`), so a session between this crate and another implementation
//! looks to the other like one of its own.

mod checks;
mod choices;
mod limits;
mod settings;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use choices::{MemoryKind, ProtocolVersion, SliceClass, Spin, Wakeup};
pub use limits::AllowedPeers;
pub use limits::{Limits, PRIVATE_BYTES_PER_SLICE, SocketFile};
pub use settings::Settings;

use self::checks::{at_least, check_buffers, check_prefix, check_wakeup};
use crate::error::ConfigError;

/// Bytes that the header in front of every buffer slice takes.
const SLICE_OVERHEAD: u64 = 20;
/// Bytes that the header in front of every buffer list takes.
const LIST_OVERHEAD: u64 = 36;
/// Bytes that the header of the buffer memory takes.
const MANAGER_OVERHEAD: u64 = 8;
/// What a file name may take at most; the names made from the prefix must stay below.
const PATH_ROOM: usize = 255;
/// The longest ending that the file names put behind the prefix.
const LONGEST_SUFFIX: usize = 96;

/// Everything that a session, a listener or a connector can be told.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::{Config, MemoryKind, SliceClass};
///
/// let config = Config::builder()
///     .memory(MemoryKind::Memfd)
///     .buffer_size(8 << 20)
///     .slice_classes([SliceClass::new(4096 - 20, 50), SliceClass::new(65536 - 20, 50)])
///     .build()?;
/// assert_eq!(config.buffer_size(), 8 << 20);
/// # Ok::<(), shmipc_glommio::ConfigError>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Config(Settings);

impl Config {
    /// Starts from the defaults.
    pub fn builder() -> ConfigBuilder {
        ConfigBuilder { settings: Settings::default(), buffer_size: 32 << 20 }
    }

    /// Everything, for front ends.
    #[doc(hidden)]
    #[inline]
    pub fn settings(&self) -> &Settings {
        &self.0
    }

    /// The kind of memory that a client of this configuration creates.
    pub fn memory(&self) -> MemoryKind {
        self.0.memory
    }

    /// The highest protocol version that a client of this configuration speaks.
    pub fn protocol(&self) -> ProtocolVersion {
        self.0.protocol
    }

    /// How a client of this configuration asks to be woken, and wakes its servers.
    pub fn wakeup(&self) -> Wakeup {
        self.0.wakeup
    }

    /// Whether a client of this configuration goes back to version 3 when version 4 gets no answer.
    pub fn falls_back(&self) -> bool {
        self.0.falls_back
    }

    /// The highest protocol version that a server of this configuration takes.
    pub fn max_accepted_protocol(&self) -> ProtocolVersion {
        self.0.max_accepted_protocol
    }

    /// Whether lists that each side has for itself may be agreed on.
    pub fn owned_free_lists(&self) -> bool {
        self.0.owned_free_lists
    }

    /// How many events each of the two IO queues holds.
    pub fn queue_capacity(&self) -> u32 {
        self.0.queue_capacity
    }

    /// Bytes of buffer memory that a client of this configuration creates for a session.
    pub fn buffer_size(&self) -> u32 {
        self.0.buffer_size
    }

    /// The size classes of the buffer memory, smallest first.
    pub fn slice_classes(&self) -> &[SliceClass] {
        &self.0.slice_classes
    }

    /// What the names of shared-memory files start with.
    pub fn path_prefix(&self) -> &Path {
        &self.0.path_prefix
    }

    /// How long a session polls after its last traffic.
    pub fn spin(&self) -> Spin {
        self.0.spin
    }

    /// Whether a client of this configuration offers lists that each side has for itself: if it
    /// may, and every list of half a class' share could hand out a slice.
    pub fn offers_owned_free_lists(&self) -> bool {
        let overhead = MANAGER_OVERHEAD + 2 * LIST_OVERHEAD * self.0.slice_classes.len() as u64;
        let room = u64::from(self.0.buffer_size).saturating_sub(overhead);
        // The last slice of a list is never handed out (`docs/protocol.md#taking-slices`).
        let suffices = |class: &SliceClass| {
            let stride = u64::from(class.capacity) + SLICE_OVERHEAD;
            room * u64::from(class.percent) / 100 / 2 / stride >= 2
        };
        self.0.owned_free_lists && self.0.slice_classes.iter().all(suffices)
    }
}

/// Builds a [`Config`].
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use std::time::Duration;
/// use shmipc_glommio::{Config, Spin};
///
/// let builder = Config::builder().buffer_size(8 << 20).fallback_after(Duration::from_millis(5));
/// // What was set so far can be the start of several configurations.
/// let busy = builder.clone().spin(Spin::Forever).build()?;
/// let quiet = builder.spin(Spin::Never).build()?;
/// assert_eq!(busy.buffer_size(), quiet.buffer_size());
/// # Ok::<(), shmipc_glommio::ConfigError>(())
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct ConfigBuilder {
    settings: Settings,
    buffer_size: u64,
}

impl ConfigBuilder {
    /// How a client hands over its memory. Default: [`MemoryKind::Memfd`]. Servers take both.
    pub fn memory(mut self, memory: MemoryKind) -> Self {
        self.settings.memory = memory;
        self
    }

    /// The highest protocol version that a client speaks. Default: version 3. Servers take all, see
    /// [`max_accepted_protocol`](Self::max_accepted_protocol).
    ///
    /// A server that does not know version 4 closes the connection, or says nothing; the client
    /// then [falls back](Self::allow_v3_fallback).
    pub fn protocol(mut self, protocol: ProtocolVersion) -> Self {
        self.settings.protocol = protocol;
        self
    }

    /// Whether a client of version 4 connects once more, with version 3, when a server ends the
    /// connection instead of answering, or says nothing for a quarter of the
    /// [handshake's time](Self::handshake_timeout), half a second at the most. After a silence
    /// version 3 is used at once at that address, by this core, for a minute. A server that answers
    /// with a refusal is taken at its word. Default: yes.
    ///
    /// Without, such a server is [`Version4Unanswered`](crate::HandshakeError::Version4Unanswered).
    pub fn allow_v3_fallback(mut self, falls_back: bool) -> Self {
        self.settings.falls_back = falls_back;
        self
    }

    /// The highest protocol version that a server takes; for one of version 4 it is then a server
    /// that does not know it. Default: [`ProtocolVersion::HIGHEST`].
    pub fn max_accepted_protocol(mut self, protocol: ProtocolVersion) -> Self {
        self.settings.max_accepted_protocol = protocol;
        self
    }

    /// How a client asks to be woken, and wakes its servers. Everything but the default,
    /// [`Wakeup::Socket`], takes [version 4](Self::protocol). A server that does not grant it, and
    /// one of an older version, leaves the session with [`Wakeup::Socket`].
    pub fn wakeup(mut self, wakeup: Wakeup) -> Self {
        self.settings.wakeup = wakeup;
        self
    }

    /// Whether buffer lists of which each side has a set for itself are offered, by a client, and
    /// taken, by a server, in version 4. Only two sides of this crate know them. A list then cannot
    /// be corrupted by a side that stalls (see `SECURITY.md`), and each side has half of the memory
    /// for what it sends. Not offered if a class would have less than two slices a side.
    /// Default: yes.
    pub fn owned_free_lists(mut self, offers: bool) -> Self {
        self.settings.owned_free_lists = offers;
        self
    }

    /// How often a server is willing to look at the queue of a session whose client asks for
    /// [`Wakeup::Polling`], at most: one that asks for a shorter interval is granted this one. A
    /// core with such sessions wakes up at the shortest of their intervals. From
    /// [`Wakeup::SHORTEST_INTERVAL`], the default, to [`Wakeup::LONGEST_INTERVAL`].
    pub fn min_polling_interval(mut self, interval: Duration) -> Self {
        self.settings.min_polling_interval = interval;
        self
    }

    /// Events in each IO queue: a multiple of 16, from 16 to 16 777 216. Default: 8192.
    ///
    /// A peer that creates the memory may choose any other number, as shmipc-go does.
    pub fn queue_capacity(mut self, events: u32) -> Self {
        self.settings.queue_capacity = events;
        self
    }

    /// Bytes of buffer memory per session, below 4 GiB. Default: 32 MiB.
    pub fn buffer_size(mut self, bytes: u64) -> Self {
        self.buffer_size = bytes;
        self
    }

    /// Size classes of the buffer memory. Sorted here; the shares may add up to at most 100.
    /// Default: 8 KiB, 32 KiB and 128 KiB, each less its 20 bytes of header, with 50, 30 and 20
    /// per cent.
    pub fn slice_classes(mut self, classes: impl IntoIterator<Item = SliceClass>) -> Self {
        self.settings.slice_classes = classes.into_iter().collect();
        self
    }

    /// Sizes for messages of up to about 4 KiB, of which many are under way: 8 MiB of buffers in
    /// slices of 256 bytes, 1 KiB, 4 KiB and 64 KiB. Longer messages take several slices.
    ///
    /// This and the other presets set buffer size, slice classes and queue capacity, and nothing
    /// else; what is set after them holds.
    pub fn small_messages(self) -> Self {
        self.sizes(8 << 20, 8192, [(256, 10), (1 << 10, 20), (4 << 10, 45), (64 << 10, 25)])
    }

    /// Sizes for messages of up to several MiB: 128 MiB of buffers in slices of 4 KiB, 64 KiB and
    /// 1 MiB.
    pub fn large_messages(self) -> Self {
        self.sizes(128 << 20, 4096, [(4 << 10, 5), (64 << 10, 25), (1 << 20, 70)])
    }

    /// Sizes for a container whose `/dev/shm` has the usual 64 MiB: 2 MiB of buffers in slices of
    /// 1 KiB, 8 KiB and 64 KiB, so that thirty sessions with [file memory](MemoryKind::File) fit.
    ///
    /// memfd memory does not lie in `/dev/shm`, but counts for the container's memory limit.
    pub fn container(self) -> Self {
        self.sizes(2 << 20, 1024, [(1 << 10, 20), (8 << 10, 30), (64 << 10, 50)])
    }

    fn sizes<const N: usize>(self, size: u64, queue: u32, classes: [(u32, u32); N]) -> Self {
        let class = |(stride, percent)| SliceClass::new(stride - SLICE_OVERHEAD as u32, percent);
        self.buffer_size(size).queue_capacity(queue).slice_classes(classes.map(class))
    }

    /// Who can connect to a listener's Unix socket: the permissions of its file. Default: 0600, so
    /// that only this user can. Connecting takes permission to write.
    pub fn socket_mode(mut self, mode: u32) -> Self {
        self.settings.socket_file.mode = mode;
        self
    }

    /// User and group, by number, that a listener's socket file is given to; `None` leaves what the
    /// system chose. Giving to another user takes privileges.
    pub fn socket_owner(mut self, user: Option<u32>, group: Option<u32>) -> Self {
        self.settings.socket_file.user = user;
        self.settings.socket_file.group = group;
        self
    }

    /// Whether creating memory asks first if there is enough of it: in the file system of
    /// [file memory](MemoryKind::File), and below the memory limits of this process' control
    /// groups. The pages of file memory are taken at once then, 8 ms for the default 32 MiB, so
    /// that they are there when they are needed. Default: yes. Without, whoever touches a page that
    /// cannot be had is killed.
    pub fn preflight_memory(mut self, checks: bool) -> Self {
        self.settings.checks_memory = checks;
        self
    }

    /// What the names of shared-memory files start with; also the name that a memfd shows in
    /// `/proc`. Default: `/dev/shm/shmipc`.
    pub fn path_prefix(mut self, prefix: impl Into<PathBuf>) -> Self {
        self.settings.path_prefix = prefix.into();
        self
    }

    /// How long a session polls its queue after its last traffic. Default: at most 100
    /// microseconds, which is about what it costs, on a virtual machine, that one side goes to
    /// sleep and the other wakes it up. Where that is cheaper, less is enough.
    pub fn spin(mut self, spin: Spin) -> Self {
        self.settings.spin = spin;
        self
    }

    /// How long timers, sockets and files of a core go unlooked at while one of its sessions is
    /// busy. The least of all sessions of a core holds. Default: 250 microseconds. Each look costs
    /// a few microseconds.
    pub fn reactor_interval(mut self, interval: Duration) -> Self {
        self.settings.reactor_interval = interval;
        self
    }

    /// How long a sender waits for free slices before its data goes over the socket instead.
    /// Default: one millisecond. Zero: at once.
    pub fn fallback_after(mut self, wait: Duration) -> Self {
        self.settings.fallback_after = wait;
        self
    }

    /// How long a handshake may take. Default: two seconds.
    pub fn handshake_timeout(mut self, timeout: Duration) -> Self {
        self.settings.limits.handshake_timeout = timeout;
        self
    }

    /// How many handshakes a listener carries on at the same time; further peers
    /// [wait](Self::max_queued_handshakes). While they do, handshakes that have taken an eighth of
    /// their [time](Self::handshake_timeout) are given up. Default: 64.
    pub fn max_handshakes(mut self, handshakes: usize) -> Self {
        self.settings.limits.handshakes = handshakes;
        self
    }

    /// How many of these one user may have under way. Default: 32.
    pub fn max_handshakes_per_user(mut self, handshakes: usize) -> Self {
        self.settings.limits.handshakes_per_user = handshakes;
        self
    }

    /// How many connections a listener keeps that wait for their handshake. Users take turns, so
    /// nobody waits behind another user that is at its limit. At this number the newest connection
    /// of the user that has the most is refused; so it is when those that wait, at all listeners of
    /// the process, have half of the descriptors that it may open. Default: 1024.
    pub fn max_queued_handshakes(mut self, connections: usize) -> Self {
        self.settings.limits.queued_handshakes = connections;
        self
    }

    /// How many sessions a listener has at the same time; of a `Server`, each
    /// shard. Further peers are refused. Default: 4096.
    pub fn max_sessions(mut self, sessions: usize) -> Self {
        self.settings.limits.sessions = sessions;
        self
    }

    /// Who may be at the other end, for listeners and for connectors. Default:
    /// [`AllowedPeers::SameUser`].
    pub fn allowed_peers(mut self, allowed: AllowedPeers) -> Self {
        self.settings.allowed_peers = allowed;
        self
    }

    /// The longest message that a peer may send over the socket, header included, in bytes; and
    /// the longest that this side sends: a flush that is longer is cut in several. What is written
    /// as bytes goes in pieces of 64 KiB.
    /// Default: 64 MiB.
    pub fn max_message_len(mut self, bytes: u32) -> Self {
        self.settings.limits.message_len = bytes;
        self
    }

    /// How many streams of a session may be open, those among them that wait to be accepted. Each
    /// takes up to half a KiB until somebody accepts it. Default: 65 536.
    pub fn max_streams(mut self, streams: usize) -> Self {
        self.settings.limits.streams = streams;
        self
    }

    /// How many bytes a peer's memory may have: buffers and queues, each. Default: 1 GiB.
    pub fn max_mapped_bytes(mut self, bytes: u64) -> Self {
        self.settings.limits.mapped_bytes = bytes;
        self
    }

    /// How many bytes of peers' memory a listener maps for all its sessions together; of a
    /// `Server`, each shard. The private memory that goes with it counts too: 192
    /// bytes for each slice, which a peer chooses the number of. Default: 64 GiB.
    pub fn max_total_mapped_bytes(mut self, bytes: u64) -> Self {
        self.settings.limits.total_mapped_bytes = bytes;
        self
    }

    /// For how long a peer may leave what was sent to it in the queue, before its session ends with
    /// [`Error::PeerStalled`](crate::Error::PeerStalled): somebody has stopped it, or it hangs. A
    /// peer takes what is sent to it when it comes, whether or not somebody reads the stream.
    /// `None`: for ever. Default: a minute.
    pub fn stall_timeout(mut self, limit: Option<Duration>) -> Self {
        self.settings.limits.stall = limit;
        self
    }

    /// How long a session that ends waits until its peer has taken what was sent to it: see
    /// `Session::close`. Zero: not at all. Default: five seconds.
    ///
    /// Only other implementations are waited for, and only while they have something to take, keep
    /// the memory of what they have taken, or have not answered what went over the socket. Two
    /// sides of this crate take what was sent before the end in any case.
    pub fn close_timeout(mut self, timeout: Duration) -> Self {
        self.settings.limits.close_timeout = timeout;
        self
    }

    /// How many bytes a session may keep of what came over the socket and is not read. A message
    /// counts as a whole until half of it is read, since so long it keeps all of its memory. Beyond
    /// the limit the socket is not read until readers catch up. One message of up to
    /// [`max_message_len`](Self::max_message_len) that has come in part is not counted. Default:
    /// 64 MiB.
    ///
    /// A peer of this crate does not let it come to that. By its own configuration, so take the
    /// same on both sides, its streams send freely up to three sixteenths of this, and then each up
    /// to 80 KiB that its reader has not taken, as long as seven eighths are not spent. So a
    /// request of up to 64 KiB can be written before its answer is read while fewer than 560
    /// streams (one for each 116 KiB of this) are stopped with as much unread; more needs a larger
    /// limit, or a reader that reads meanwhile. Beyond, only streams whose readers have taken
    /// everything send: short messages, the shorter the less is left, and any message to a reader
    /// that waits.
    ///
    /// Another implementation has no credit to go by. Its streams wait for each other beyond this,
    /// those that are read too; nothing of what it sent is thrown away.
    pub fn max_unread_fallback_bytes(mut self, bytes: usize) -> Self {
        self.settings.limits.unread_fallback_bytes = bytes;
        self
    }

    /// How much of one stream may wait unread on this side before its sender waits, in bytes of
    /// slices (a message of one byte keeps a whole slice): the power of two at or below. A sender
    /// stops when this much is unread, so one message more may be. Default: a sixteenth of the
    /// buffer memory.
    ///
    /// Holds between two sides of this crate. Other senders do not know of it; what they send
    /// unread is bounded by the buffer memory.
    pub fn stream_window(mut self, bytes: u64) -> Self {
        self.settings.limits.stream_window = Some(bytes);
        self
    }

    /// Checks everything and hands out the configuration.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], one variant for each thing that cannot be.
    pub fn build(self) -> Result<Config, ConfigError> {
        let Self { settings: mut config, buffer_size } = self;
        let capacity = config.queue_capacity;
        if capacity % 16 != 0 || !(16..=1 << 24).contains(&capacity) {
            return Err(ConfigError::QueueCapacity(capacity));
        }
        if config.protocol == ProtocolVersion::V2 && config.memory == MemoryKind::Memfd {
            return Err(ConfigError::MemfdNeedsVersion3);
        }
        check_wakeup(&config)?;
        config.slice_classes.sort_by_key(|class| class.capacity);
        config.buffer_size = check_buffers(buffer_size, &config.slice_classes)?;
        check_prefix(&config.path_prefix)?;
        let mode = config.socket_file.mode;
        if mode > 0o777 {
            let problem = "not nine bits of permissions";
            return Err(ConfigError::Limit { what: "socket_mode", value: mode.into(), problem });
        }
        let interval = config.reactor_interval.as_micros() as u64;
        at_least("reactor_interval in microseconds", interval, 20)?;
        let handshake_timeout = config.limits.handshake_timeout.as_nanos().min(1) as u64;
        at_least("handshake_timeout in nanoseconds", handshake_timeout, 1)?;
        config.cap_durations();
        let limits = &config.limits;
        at_least("max_handshakes", limits.handshakes as u64, 1)?;
        at_least("max_handshakes_per_user", limits.handshakes_per_user as u64, 1)?;
        at_least("max_sessions", limits.sessions as u64, 1)?;
        let stall_timeout = limits.stall.unwrap_or(Duration::MAX).as_millis().min(1) as u64;
        at_least("stall_timeout in milliseconds", stall_timeout, 1)?;
        at_least("max_streams", limits.streams as u64, 1)?;
        at_least("max_message_len", u64::from(limits.message_len), 4096)?;
        at_least("max_unread_fallback_bytes", limits.unread_fallback_bytes as u64, 4096)?;
        at_least("stream_window", limits.stream_window.unwrap_or(u64::MAX), 4096)?;
        Ok(Config(config))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_one_that_the_builder_would_let_through() {
        let config = Config::builder().build().unwrap();
        assert_eq!(config.0.slice_classes, Config::default().0.slice_classes);
        assert_eq!(config.0.buffer_size, 32 << 20);
    }

    #[test]
    fn presets_can_be_built_and_changed() {
        let presets: [fn(ConfigBuilder) -> ConfigBuilder; 3] = [
            ConfigBuilder::small_messages,
            ConfigBuilder::large_messages,
            ConfigBuilder::container,
        ];
        for preset in presets {
            for memory in [MemoryKind::Memfd, MemoryKind::File] {
                let builder = preset(Config::builder().memory(memory));
                let config = builder.clone().build().unwrap();
                assert_eq!(config.memory(), memory);
                assert_eq!(config.slice_classes().iter().map(|c| c.percent).sum::<u32>(), 100);
                assert_eq!(builder.queue_capacity(64).build().unwrap().queue_capacity(), 64);
            }
        }
        assert!(
            32 * u64::from(Config::builder().container().build().unwrap().0.buffer_size)
                <= 64 << 20
        );
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let refused = |builder: ConfigBuilder| builder.build().unwrap_err();
        let builder = Config::builder;
        assert_eq!(refused(builder().queue_capacity(24)), ConfigError::QueueCapacity(24));
        assert_eq!(refused(builder().queue_capacity(0)), ConfigError::QueueCapacity(0));
        assert_eq!(
            refused(builder().protocol(ProtocolVersion::V2)),
            ConfigError::MemfdNeedsVersion3
        );
        let classes = |list: &[(u32, u32)]| {
            builder().slice_classes(list.iter().map(|&(size, share)| SliceClass::new(size, share)))
        };
        for list in [&[][..], &[(64, 60), (128, 60)], &[(64, 10), (64, 10)], &[(66, 10)]] {
            assert!(matches!(refused(classes(list)), ConfigError::SliceClasses(_)), "{list:?}");
        }
        for size in [0, 4096, 1 << 32, u64::MAX] {
            let error = refused(builder().buffer_size(size));
            assert!(matches!(error, ConfigError::BufferSize { .. }), "{size}");
        }
        for prefix in ["relative", "/", &format!("/{}", "x".repeat(250))] {
            let error = refused(builder().path_prefix(prefix));
            assert!(matches!(error, ConfigError::PathPrefix(_)), "{prefix}");
        }
        assert!(matches!(refused(builder().max_streams(0)), ConfigError::Limit { .. }));
        assert!(matches!(refused(builder().socket_mode(0o1600)), ConfigError::Limit { .. }));
    }
}
