// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tasks of a listener: one accepts connections, one gives places to those that wait for them,
//! and each handshake has its own. None of them waits for a peer but the handshake's.

use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use futures_lite::future::{or, yield_now};

use super::{Arrival, Ready, Shared, Ticket, within};
use crate::connect::handshake_server::Acceptance;
use crate::exec::runtime::sleep;
use crate::net::admission::HandshakePermit;
use crate::net::bound_socket::is_passing;
use crate::net::fd_disposal;
use crate::net::socket::{ListenerSocket, Socket};
use crate::session::handle::Session;
use shmipc_core::error::HandshakeError;

/// How long accepting pauses when the process has no descriptor left for another connection.
const OUT_OF_DESCRIPTORS_PAUSE: Duration = Duration::from_millis(20);
/// How often that is told.
const TELL_INTERVAL: Duration = Duration::from_secs(1);

pub(crate) async fn accept_connections(socket: ListenerSocket, shared: Weak<Shared>) {
    let mut told: Option<Instant> = None;
    loop {
        // Refusing them would not help: what they bring is in their queues already.
        while fd_disposal::are_too_many_unclosed() {
            sleep(OUT_OF_DESCRIPTORS_PAUSE).await;
        }
        let error = match socket.accept().await {
            Ok(connection) => {
                begin(connection, None, &shared);
                // There may be another one at once, and so on for as long as somebody likes.
                yield_now().await;
                continue;
            }
            Err(error) => error,
        };
        let Some(shared) = shared.upgrade() else {
            return;
        };
        if !is_passing(&error) {
            *shared.failed.borrow_mut() = Some(error);
            shared.waiting.wake_all();
            return;
        }
        if told.is_none_or(|told| told.elapsed() >= TELL_INTERVAL) {
            told = Some(Instant::now());
            shared.refuse(None, &error);
        }
        // Those that wait hold descriptors that others need more.
        let least = shared.queue.borrow_mut().shed(None);
        if let Some(Arrival { connection, peer, .. }) = least {
            // At once: its descriptor is what is needed.
            drop(connection);
            let most = shared.queue.borrow().most();
            shared.refuse(Some(&peer), &HandshakeError::TooManyQueued(most).into());
        }
        drop(shared);
        sleep(OUT_OF_DESCRIPTORS_PAUSE).await;
    }
}

/// Starts the handshake of a connection, or has it wait for a place. Waits for nobody itself, so
/// that nobody waits behind a user that is at its limit.
pub(crate) fn begin(connection: Socket, ticket: Option<Ticket>, shared: &Weak<Shared>) {
    let Some(owner) = shared.upgrade() else {
        return;
    };
    let peer = match connection.peer() {
        Ok(peer) => peer,
        Err(error) => return owner.refuse(None, &error),
    };
    let arrival = Arrival { connection, peer, ticket };
    if let Err(error) = owner.check(&peer) {
        return owner.refuse_arrival(arrival, error);
    }
    // Those who wait come first, if there is a place for them.
    owner.begin_queued();
    let is_first = !owner.queue.borrow().contains(peer.uid);
    let place = if is_first { owner.admission.try_place(peer.uid) } else { None };
    match place {
        Some(place) => owner.begin_handshake(arrival, place),
        None => {
            let refused = owner.queue.borrow_mut().push(peer.uid, arrival);
            owner.admission.note_change();
            owner.refuse_queued(refused);
        }
    }
}

/// Gives places to connections that wait for them.
pub(crate) async fn begin_waiting(shared: Weak<Shared>) {
    loop {
        let Some(owner) = shared.upgrade() else {
            return;
        };
        let admission = Rc::clone(&owner.admission);
        let seen = admission.changes();
        owner.begin_queued();
        let next = admission.dismiss(owner.queue.borrow().counts());
        drop(owner);
        admission.changed_since(seen, next).await;
    }
}

pub(crate) async fn shake_hands(arrival: Arrival, shared: Weak<Shared>, place: HandshakePermit) {
    let Arrival { connection, peer, ticket } = arrival;
    let parts = |shared: Rc<Shared>| {
        let (config, admission) = (Rc::clone(&shared.config), Rc::clone(&shared.admission));
        (config, admission, shared.shard.get(), Rc::clone(&shared.stop))
    };
    let Some((config, admission, shard, stop)) = shared.upgrade().map(parts) else {
        return;
    };
    let mut acceptance = Acceptance::new(connection, &config, shard);
    let stopped = async {
        stop.begun().await;
        Err(HandshakeError::Stopping.into())
    };
    let handshake = or(acceptance.accept(peer, &config, &admission), stopped);
    let result = place.shake(within(&config, handshake)).await;
    if let Err(error) = &result {
        acceptance.tell_refused(error);
    }
    // The listener may have gone meanwhile; then nobody wants the session.
    let Some(shared) = shared.upgrade() else {
        return;
    };
    match result {
        Ok(parts) => {
            let established = acceptance.established(peer, parts);
            let session = Session::start(established, &config, shared.trust.get());
            shared.ready.borrow_mut().push_back(Ready { session, ticket, _place: place });
            shared.waiting.wake_all();
        }
        Err(error) => shared.refuse(Some(&peer), &error),
    }
}
