// SPDX-License-Identifier: MIT OR Apache-2.0
//! How each side tells the other that it is of this crate, in the header of the buffer memory.

use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::exec::runtime::sleep;
use crate::session::state::SessionInner;
use shmipc_core::config::Config;
use shmipc_core::proto::stream_table::Role;
use shmipc_core::shm::pool::SlicePool;
use shmipc_core::wire::Extension;
use shmipc_core::wire::layout::{MANAGER_CLIENT_EXTENSION_OFFSET, MANAGER_SERVER_EXTENSION_OFFSET};

/// How long a server that a client of version 2 does not wait for may take to map the memory, and
/// how often that is looked for.
const TIME_TO_SAY: Duration = Duration::from_millis(200);
const TIME_BETWEEN_LOOKS: Duration = Duration::from_millis(1);

/// How much of a stream may wait unread here.
pub(crate) fn stream_window(pool: &SlicePool, config: &Config) -> u64 {
    let default = pool.memory_len() as u64 / 16;
    Extension::with_window(config.settings().limits.stream_window.unwrap_or(default)).window()
}

/// Where the byte of a side stands.
const fn offset_of(role: Role) -> usize {
    match role {
        Role::Client => MANAGER_CLIENT_EXTENSION_OFFSET,
        Role::Server => MANAGER_SERVER_EXTENSION_OFFSET,
    }
}

/// Tells the peer that this side has the extension. Before the peer is told that the memory is
/// there, or mapped.
pub(crate) fn show_extension(pool: &SlicePool, config: &Config, role: Role) {
    let extension = Extension::with_window(stream_window(pool, config));
    pool.show_extension(offset_of(role), extension);
}

/// What the peer of this side has said.
pub(crate) fn peer_extension(pool: &SlicePool, role: Role) -> Option<Extension> {
    let peer = match role {
        Role::Client => Role::Server,
        Role::Server => Role::Client,
    };
    pool.peer_extension(offset_of(peer))
}

impl SessionInner {
    /// Whether the peer has the extension too, as far as it has said by now.
    pub(crate) fn peer_knows_extension(&self) -> bool {
        self.proto.peer_knows_extension(self)
    }

    /// Gives a peer that has not said what it knows a moment to do so, once. A server says it when
    /// it maps the memory, which a client of version 2 does not wait for.
    pub(crate) async fn give_time_to_say(self: &Rc<Self>) {
        if self.had_time_to_say.get() {
            return;
        }
        let end = Instant::now() + TIME_TO_SAY;
        loop {
            self.proto.look_for_extension(self);
            if !self.proto.may_learn_extension() || Instant::now() >= end {
                break;
            }
            sleep(TIME_BETWEEN_LOOKS).await;
        }
        self.had_time_to_say.set(true);
    }
}
