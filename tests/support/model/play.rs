// SPDX-License-Identifier: MIT OR Apache-2.0
//! One seed: two sessions, their streams, and what must be left of them.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_lite::future::{or, pending, yield_now, zip};
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use glommio::Task;
use shmipc_glommio::{Connector, Error, Listener, ProtocolVersion, Session, Stream};

use super::coverage::{Seen, add_session, see};
use super::life::live;
use super::random::Random;
use super::setup::random_config;
use super::world::{Common, HANGS, Handle, Place, Side, World};
use crate::support::executor::{SocketPath, within};

/// Both sides on this executor.
pub(crate) async fn both_sides(seed: u64) {
    let world = Arc::new(World::new(seed));
    let path = SocketPath::new();
    let listener = bind(seed, &path);
    let server = server_side(Arc::clone(&world), listener);
    zip(client_side(world, path.as_str()), server).await;
}

/// The listener of a seed.
pub(crate) fn bind(seed: u64, path: &SocketPath) -> Listener {
    let config = random_config(Side::Server, &mut Random::new(!seed));
    Listener::bind(path.as_str(), config).unwrap()
}

/// Opens streams, uses them, and waits until all memory is free again.
pub(crate) async fn client_side(world: Arc<World>, path: &str) {
    see(Seen::Seeds);
    let mut random = Random::new(world.seed());
    let config = random_config(Side::Client, &mut random);
    let common = Common::new();
    let session = Connector::new(config).trust_peer(&common.trust).connect(path).await;
    let session = session.unwrap_or_else(|error| panic!("{world}: {error}"));
    if session.protocol() == ProtocolVersion::V2 {
        meet(&world, session.open_stream().unwrap(), Side::Client).await;
    }
    let slots = (0..random.between(1, 8)).map(|_| {
        let (world, session) = (Arc::clone(&world), session.clone());
        glommio::spawn_local(open_and_use(world, session, Rc::clone(&common), random.fork()))
    });
    let slots: Vec<_> = slots.collect();
    if world.ends_early() == Some(Side::Client) {
        see(Seen::EndedEarlyByClient);
        end_early(&world, &session, random.fork()).await;
    }
    for slot in slots {
        slot.await;
    }
    common.pot.clear();
    world.note_client_done();
    settle(&world, &session).await;
    finish(&world, Side::Client, session, &mut random).await;
}

async fn open_and_use(world: Arc<World>, session: Session, common: Rc<Common>, mut random: Random) {
    let mut lives = random.between(1, 3);
    while lives > 0 {
        let stream = match session.open_stream() {
            Ok(stream) => stream,
            Err(Error::TooManyStreams(limit)) => {
                see(Seen::TooManyStreams);
                assert_eq!(session.stream_count(), limit, "{world}");
                glommio::timer::sleep(Duration::from_micros(200)).await;
                continue;
            }
            Err(error) => {
                check_ended(&world, &error);
                return;
            }
        };
        lives -= 1;
        let (world, common) = (Arc::clone(&world), Rc::clone(&common));
        let model = world.open(stream.id());
        let place = Place { world, model, side: Side::Client, common };
        live(Handle::whole(stream, place), random.fork()).await;
    }
}

/// Uses the streams that come until the session is over.
pub(crate) async fn server_side(world: Arc<World>, listener: Listener) {
    let mut random = Random::new(!world.seed()).fork();
    let common = Common::new();
    let listener = listener.trust_peer(&common.trust);
    let session = listener.accept().await.unwrap_or_else(|error| panic!("{world}: {error}"));
    if session.protocol() == ProtocolVersion::V2 {
        meet(&world, session.accept().await.unwrap(), Side::Server).await;
    }
    let mut choices = random.fork();
    let streams: Rc<RefCell<Vec<Task<()>>>> = Rc::default();
    let accepting = async {
        loop {
            let impatience = async {
                match choices.one_in(2) {
                    true => yield_now().await,
                    false => pending().await,
                }
                see(Seen::AcceptCancelled);
                None
            };
            let stream = match or(async { Some(session.accept().await) }, impatience).await {
                Some(Ok(stream)) => stream,
                Some(Err(error)) => return error,
                None => continue,
            };
            let model = world.accept(stream.id());
            let (world, common) = (Arc::clone(&world), Rc::clone(&common));
            let place = Place { world, model, side: Side::Server, common };
            let life = live(Handle::whole(stream, place), random.fork());
            streams.borrow_mut().push(glommio::spawn_local(life));
        }
    };
    let telling = async {
        loop {
            if world.is_client_done() && session.stream_count() == 0 {
                // Nobody is left who could send it on.
                common.pot.clear();
            }
            world.publish(Side::Server, &session);
            glommio::timer::sleep(Duration::from_micros(500)).await;
        }
    };
    let ending = async {
        if world.ends_early() == Some(Side::Server) {
            see(Seen::EndedEarlyByServer);
            end_early(&world, &session, Random::new(world.seed())).await;
        }
        pending().await
    };
    let error = or(accepting, or(telling, ending)).await;
    check_ended(&world, &error);
    for stream in streams.take() {
        stream.await;
    }
    common.pot.clear();
    finish(&world, Side::Server, session, &mut Random::new(world.seed())).await;
}

/// A client of version 2 goes on before the server has seen the memory. Until it hears from the
/// server it cannot know that it is one of this crate, which understands the end of one direction.
async fn meet(world: &World, mut stream: Stream, side: Side) {
    let talk = async {
        if side == Side::Client {
            stream.write_all(&[1]).await?;
        }
        // The server too reads first: then its first word may be credit.
        stream.read_exact(&mut [0]).await?;
        if side == Side::Server {
            stream.write_all(&[2]).await?;
        }
        std::io::Result::Ok(())
    };
    if let Err(error) = talk.await {
        panic!("{world}: {side:?} does not meet the other side: {error}");
    }
}

/// Waits until every slice of every list is free again.
async fn settle(world: &World, session: &Session) {
    let start = Instant::now();
    // The server may end the session meanwhile.
    while !world.is_ended() {
        world.publish(Side::Client, session);
        if world.is_settled() {
            return world.end();
        }
        assert!(start.elapsed() < HANGS, "{world}: not all is free: {}", world.usage());
        glommio::timer::sleep(Duration::from_micros(200)).await;
    }
}

/// Ends the session in the middle of everything.
async fn end_early(world: &World, session: &Session, mut random: Random) {
    glommio::timer::sleep(random.micros(5000)).await;
    world.end();
    if random.one_in(2) {
        // Waits for the socket.
        let cut_short = async {
            glommio::timer::sleep(random.micros(2000)).await;
            Ok(())
        };
        let _ = or(session.close(), cut_short).await;
    }
    // For those whose close was cut short.
    let _ = or(session.close(), async {
        glommio::timer::sleep(HANGS).await;
        panic!("{world}: the close hangs");
    })
    .await;
}

async fn finish(world: &World, side: Side, session: Session, random: &mut Random) {
    add_session(&session);
    // Tasks that were dropped are dropped by the executor, when it comes to them.
    let is_free = || session.pool_usage().held == 0;
    assert!(within(HANGS, is_free).await, "{world}: {side:?} holds slices that nobody has");
    if random.one_in(4) {
        // The last handle.
        return drop(session);
    }
    // The other side may have been first.
    let _ = session.close().await;
    let reason = session.end_reason();
    assert!(
        matches!(reason, Some(Error::SessionClosed | Error::PeerClosed)),
        "{world}: {side:?} ended with {reason:?}"
    );
}

fn check_ended(world: &World, error: &Error) {
    let may_be = world.is_ended() && matches!(error, Error::SessionClosed | Error::PeerClosed);
    assert!(may_be, "{world}: the session ended: {error}");
}
