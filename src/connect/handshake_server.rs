// SPDX-License-Identifier: MIT OR Apache-2.0
//! The server's side of a handshake, over a socket.

use std::rc::Rc;

use crate::connect::handshake_client::{
    Inbox, map_descriptors, map_files, send_all, without_descriptors,
};
use crate::net::admission::Admission;
use crate::net::credentials::PeerCredentials;
use crate::net::socket::Socket;
use crate::session::established::{Established, SessionMemory};
use crate::session::wakeup::Doorbell;
use shmipc_core::config::Config;
use shmipc_core::error::{Error, HandshakeError, MemoryError};
use shmipc_core::proto::Negotiated;
use shmipc_core::proto::handshake_server::{
    ServerCapabilities, ServerHandshake, ServerStep, refusal_message,
};
use shmipc_core::proto::stream_table::Role;
use shmipc_core::wire::{Message, ShardIdentity};

/// The server's side of a handshake.
pub(crate) struct Acceptance {
    socket: Socket,
    handshake: ServerHandshake,
    inbox: Inbox,
}

impl Acceptance {
    pub(crate) fn new(socket: Socket, config: &Config, shard: Option<ShardIdentity>) -> Self {
        let handshake = ServerHandshake::new(ServerCapabilities {
            highest: config.settings().max_accepted_protocol,
            has_descriptors: !socket.is_tcp(),
            owned_free_lists: config.settings().owned_free_lists,
            min_polling_interval: config.settings().min_polling_interval,
            shard,
        });
        Self { socket, handshake, inbox: Inbox::new() }
    }

    /// Shakes hands with a peer that may be spoken to. The caller bounds the time.
    pub(crate) async fn accept(
        &mut self,
        peer: PeerCredentials,
        config: &Config,
        admission: &Rc<Admission>,
    ) -> Result<(Negotiated, SessionMemory, Doorbell), Error> {
        let Self { socket, handshake, inbox } = self;
        let mut descriptors = Vec::new();
        let mut mapped = None;
        let agreement = loop {
            match handshake.step() {
                ServerStep::AwaitMessage(due) => {
                    let (header, message) = inbox.receive(socket, due).await?;
                    if socket.is_tcp() && matches!(message, Message::ShareMemoryByMemfd(_)) {
                        return Err(HandshakeError::DescriptorsOverTcp.into());
                    }
                    handshake.receive(&header, &message)?;
                    if matches!(message, Message::Negotiation(_)) {
                        // Before anything is promised.
                        admission.check_sessions()?;
                    }
                }
                ServerStep::Send(bytes) => {
                    if handshake.asks_for_descriptors() {
                        socket.begin_passing()?;
                    }
                    send_all(socket, bytes).await?;
                    handshake.sent();
                }
                ServerStep::ReceiveDescriptors(count) => {
                    descriptors = inbox.receive_descriptors(socket, count).await?;
                    handshake.descriptors_received();
                }
                ServerStep::MapDescriptors(agreement, _) => {
                    let descriptors = std::mem::take(&mut descriptors);
                    mapped = Some(map_descriptors(descriptors, agreement, config, admission)?);
                    handshake.mapped();
                }
                ServerStep::MapFiles(agreement, paths) => {
                    // Before anything is opened.
                    peer.check_may_name_files(socket.is_tcp())?;
                    let memory = map_files(paths, peer, agreement, config, admission)?;
                    let doorbell = without_descriptors(agreement);
                    mapped = Some((memory, doorbell));
                    handshake.mapped();
                }
                ServerStep::Refused(error) => return Err(error.clone().into()),
                ServerStep::Established(&agreement) => break agreement,
            }
        };
        let (memory, doorbell) = mapped.expect("no handshake ends without memory");
        // What was found in memory that went away meanwhile is not worth much.
        if memory.manager.is_lost() || memory.consumer.is_lost() {
            return Err(MemoryError::Lost.into());
        }
        Ok((agreement, memory, doorbell))
    }

    /// The session that the handshake was about.
    pub(crate) fn established(
        self,
        peer: PeerCredentials,
        (agreement, memory, doorbell): (Negotiated, SessionMemory, Doorbell),
    ) -> Established {
        Established { role: Role::Server, peer, socket: self.socket, agreement, memory, doorbell }
    }

    /// Tells the peer why it is refused, if it speaks version 4 and there is a code for that. Does
    /// not wait for it.
    pub(crate) fn tell_refused(&self, error: &Error) {
        let Some(code) = error.refusal_code() else { return };
        if let Some(message) = self.handshake.refusal(code, &error.refusal_words()) {
            // One that does not read what it is sent does not read this either.
            let _ = self.socket.try_send(&message);
        }
    }

    /// Tells a peer that was refused before anything was heard of it, if what it says first is that
    /// it speaks version 4. The caller bounds the time.
    pub(crate) async fn tell_refused_at_first(mut self, error: &Error) {
        let Some(code) = error.refusal_code() else { return };
        let opening = self.inbox.receive(&self.socket, "Negotiation").await;
        if matches!(opening, Ok((_, Message::Negotiation(_)))) {
            let message = refusal_message(code, &error.refusal_words());
            let _ = self.socket.try_send(&message);
        }
    }
}
