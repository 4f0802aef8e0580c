// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a handshake hands to a session.

use std::rc::Rc;

use crate::net::admission::SessionPermit;
use crate::net::credentials::PeerCredentials;
use crate::net::socket::Socket;
use crate::session::wakeup::Doorbell;
use shmipc_core::proto::Negotiated;
use shmipc_core::proto::stream_table::Role;
use shmipc_core::shm::event_queue::{Consumer, Producer};
use shmipc_core::shm::map::region::Region;
use shmipc_core::shm::map::shared_file::SharedFile;
use shmipc_core::shm::pool::SlicePool;

/// What two sides agreed on, ready to carry a session.
pub(crate) struct Established {
    pub(crate) role: Role,
    pub(crate) peer: PeerCredentials,
    pub(crate) socket: Socket,
    pub(crate) agreement: Negotiated,
    pub(crate) memory: SessionMemory,
    pub(crate) doorbell: Doorbell,
}

/// Both memories of a session, from one side.
pub(crate) struct SessionMemory {
    /// Entries in the file system, removed when dropped: while the files are mapped, so that no
    /// other file can be taken for one of them.
    pub(crate) files: Vec<SharedFile>,
    pub(crate) producer: Producer<Region>,
    pub(crate) consumer: Consumer<Region>,
    pub(crate) manager: Rc<SlicePool>,
    /// What a listener counts it by.
    pub(crate) admitted: Option<SessionPermit>,
}
