// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bad peers: whatever they send, write or leave out ends in an error that names it, soon, and in
//! nothing else; honest peers of the same executor notice nothing.

use std::time::Duration;

use shmipc_glommio::{Config, ConfigBuilder};

mod support {
    pub(crate) mod hostile {
        mod accepting;
        mod attacks;
        mod bytes;
        mod connecting;
        pub(crate) mod due;
        mod dying;
        mod event_fds;
        mod fields;
        pub(crate) mod files;
        mod identity;
        mod limits;
        mod memories;
        mod moving;
        mod negotiating;
        mod nonsense;
        mod poppers;
        mod running;
        mod slow_closes;
        mod soak;
    }
    pub(crate) mod bed;
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
    pub(crate) mod negotiated;
    pub(crate) mod older_kernel;
    pub(crate) mod raw;
}

use support::bed::Bed;

/// Limits that are soon reached, and more time than anything here takes.
fn config() -> ConfigBuilder {
    Config::builder()
        .max_message_len(1 << 20)
        .max_mapped_bytes(256 << 20)
        .handshake_timeout(Duration::from_secs(5))
}

fn bed() -> Bed {
    Bed::start(config().build().unwrap())
}
