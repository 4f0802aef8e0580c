// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the fuzzers of `fuzz/` call, and the tests that run their seeds. Each takes bytes and
//! panics when something is wrong that no bytes may bring about.
//!
//! Not a part of the crate's interface: it is there with `--cfg fuzzing` only.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use crate::config::{MemoryKind, ProtocolVersion, SliceClass, Wakeup};
use crate::proto::handshake_client::{ClientHandshake, ClientStep};
use crate::proto::handshake_server::{ServerCapabilities, ServerHandshake, ServerStep};
use crate::shm::chain::Chain;
use crate::shm::event_queue;
use crate::shm::map::memory::Memory;
use crate::shm::map::region::Region;
use crate::shm::pool::SlicePool;
use crate::shm::pool::format::{ListSets, Side};
use crate::wire::layout::QueueLayout;
use crate::wire::{Deframer, Event, Features, Header, MemoryPaths, Message, ShardIdentity};

/// Bytes, read as numbers until there are none.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// The next byte.
    pub fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    /// So many bytes in a row, or what is left of them.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    pub fn number<const N: usize>(&mut self) -> u64 {
        let mut number = [0; 8];
        let bytes = self.bytes(N);
        number[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(number)
    }

    /// A number that is often one which makes a difference.
    pub fn word(&mut self, near: u32) -> u32 {
        match self.byte().unwrap_or(0) {
            0 => self.number::<4>() as u32,
            1 => 0,
            2 => u32::MAX,
            small @ 3..=127 => near.wrapping_add(u32::from(small)).wrapping_sub(64),
            other => u32::from(other) - 128,
        }
    }
}

/// Messages out of bytes that come in pieces: each encodes to what it was decoded from, whatever
/// the pieces.
pub fn deframe(data: &[u8]) {
    let mut input = Input(data);
    let piece = usize::from(input.byte().unwrap_or(1)) + 1;
    let all = input.0;
    let mut deframer = Deframer::new(1 << 16);
    let mut encoded = Vec::new();
    let mut is_broken = false;
    'pieces: while !input.0.is_empty() {
        let bytes = input.bytes(piece);
        deframer.space(bytes.len())[..bytes.len()].copy_from_slice(bytes);
        deframer.commit(bytes.len());
        loop {
            match deframer.next_message() {
                Ok(Some((header, message))) => {
                    message.encode(header.version, &mut encoded).expect("it was decoded");
                }
                Ok(None) => break,
                Err(error) => {
                    let again = deframer.next_message().expect_err("it was broken");
                    assert_eq!(again.to_string(), error.to_string());
                    is_broken = true;
                    break 'pieces;
                }
            }
        }
    }
    assert!(all.starts_with(&encoded));
    assert!(is_broken || encoded.len() + deframer.buffered() == all.len());
}

/// A handshake on either side, with a driver that may say anything at any time: it is established
/// only behind all steps, in their order, and never after an error.
pub fn handshake(data: &[u8]) {
    let mut input = Input(data);
    let first = input.byte().unwrap_or(0);
    let mut messages = VecDeque::new();
    let mut deframer = Deframer::new(1 << 14);
    let actions = input.bytes(usize::from(first >> 3));
    let rest = input.0;
    deframer.space(rest.len())[..rest.len()].copy_from_slice(rest);
    deframer.commit(rest.len());
    while let Ok(Some(message)) = deframer.next_message() {
        messages.push_back(message);
    }
    if first & 1 == 0 {
        let abilities = ServerCapabilities {
            highest: if first & 2 == 0 { ProtocolVersion::V4 } else { ProtocolVersion::V3 },
            has_descriptors: first & 4 == 0,
            owned_free_lists: true,
            min_polling_interval: Wakeup::SHORTEST_INTERVAL,
            shard: Some(ShardIdentity { index: 0, count: 1 }),
        };
        server_handshake(abilities, actions, messages);
    } else {
        let kind = if first & 2 == 0 { MemoryKind::Memfd } else { MemoryKind::File };
        let version = match (first & 4 == 0, actions.len() % 3) {
            (false, 2) => ProtocolVersion::V4,
            (false, _) => ProtocolVersion::V2,
            (true, _) => ProtocolVersion::V3,
        };
        client_handshake(version, kind, actions, messages);
    }
}

fn server_handshake(
    abilities: ServerCapabilities,
    actions: &[u8],
    mut messages: VecDeque<(Header, Message)>,
) {
    let mut server = ServerHandshake::new(abilities);
    let (mut is_mapped, mut has_failed, mut sent) = (false, false, 0);
    for action in actions.iter().chain([&0; 64]) {
        let step = server.step();
        let sends = matches!(step, ServerStep::Send(_));
        let maps = matches!(step, ServerStep::MapFiles(..) | ServerStep::MapDescriptors(..));
        let receives = matches!(step, ServerStep::ReceiveDescriptors(_));
        if let ServerStep::Established(agreement) = step {
            assert!(is_mapped && !has_failed);
            assert_eq!(sent > 0, agreement.version > ProtocolVersion::V2);
            assert!(agreement.version <= abilities.highest);
            assert!(abilities.has_descriptors || agreement.wakeup != Wakeup::EventFd);
            return;
        }
        if let ServerStep::Refused(_) = step {
            assert!(sent > 0 && !is_mapped);
            return;
        }
        // Mostly what is due.
        match action % 8 {
            1 => server.sent(),
            2 => server.mapped(),
            3 => server.descriptors_received(),
            _ if sends => server.sent(),
            _ if maps => server.mapped(),
            _ if receives => server.descriptors_received(),
            _ => {
                let Some((header, message)) = messages.pop_front() else { break };
                has_failed |= server.receive(&header, &message).is_err();
            }
        }
        sent += u32::from(sends && !matches!(action % 8, 2 | 3));
        is_mapped |= maps && !matches!(action % 8, 1 | 3);
    }
}

fn client_handshake(
    version: ProtocolVersion,
    kind: MemoryKind,
    actions: &[u8],
    mut messages: VecDeque<(Header, Message)>,
) {
    let paths = MemoryPaths { queue: "/dev/shm/q".into(), buffer: "/dev/shm/b".into() };
    let eventfd = kind == MemoryKind::Memfd;
    let features = Features { polling: None, eventfd, owned_free_lists: false };
    let Ok(mut client) = ClientHandshake::new(version, kind, features, paths) else {
        assert_eq!((version, kind), (ProtocolVersion::V2, MemoryKind::Memfd));
        return;
    };
    let (mut is_created, mut has_failed, mut sent) = (false, false, 0);
    for action in actions.iter().chain([&0; 64]) {
        let step = client.step();
        let sends = matches!(step, ClientStep::Send(_) | ClientStep::SendDescriptors);
        if let ClientStep::Established(agreement) = step {
            let agreed = agreement.version;
            assert!(is_created && !has_failed && agreed <= version && sent > 0);
            assert!(agreed > ProtocolVersion::V2 || kind == MemoryKind::File);
            assert!(!agreement.owned_free_lists, "it was not offered");
            assert!(agreed == ProtocolVersion::V4 || agreement.wakeup == Wakeup::Socket);
            return;
        }
        let creates = matches!(step, ClientStep::CreateMemory(_));
        if creates || action % 8 == 2 {
            client.memory_created();
            is_created |= creates;
        } else if sends || action % 8 == 1 {
            client.sent();
            sent += u32::from(sends);
        } else {
            let Some((header, message)) = messages.pop_front() else { break };
            has_failed |= client.receive(&header, &message).is_err();
        }
    }
}

/// A running session over plain vectors, and a peer that does anything at any time: what it makes
/// this side keep is bounded, and everything comes back at the end.
pub fn running_session(data: &[u8]) {
    crate::proto::session::sim::hostile::run(data);
}

/// Size classes that leave room for every kind of chain in little memory.
pub const CLASSES: [SliceClass; 2] = [SliceClass::new(44, 40), SliceClass::new(236, 55)];
/// Sizes that this crate does not make, and takes from peers: some fields lie across two lines.
const ODD_CLASSES: [SliceClass; 2] = [SliceClass::new(41, 40), SliceClass::new(237, 55)];
const ODD_CAPACITIES: [u32; 4] = [1, 5, 14, 50];
pub const BUFFER_LEN: usize = 8 << 10;
pub const QUEUE_CAPACITY: u32 = 16;

/// Both memories, written over, and then used: whatever they say, nothing is reached outside, every
/// walk ends, and all slices that were taken come back.
pub fn memories(data: &[u8]) {
    let mut input = Input(data);
    let first = input.byte().unwrap_or(0);
    let is_honest = first % 4 != 0;
    let sets = |side| if first & 16 == 0 { ListSets::Shared } else { ListSets::OnePerSide(side) };
    let layout = QueueLayout::for_version(ProtocolVersion::V3);
    let is_odd = first & 32 != 0;
    let capacity = if is_odd { ODD_CAPACITIES[usize::from(first >> 6)] } else { QUEUE_CAPACITY };
    let classes = if is_odd { &ODD_CLASSES } else { &CLASSES };
    let buffer = Rc::new(Region::heap(BUFFER_LEN));
    let queues = Rc::new(Region::heap(event_queue::queues_len(capacity)));
    drop(SlicePool::create(&buffer, classes, sets(Side::Client)).expect("there is room"));
    drop(event_queue::create(&queues, capacity, layout));
    if !is_honest {
        for _ in 0..input.byte().unwrap_or(0) {
            poke(&mut input, &*buffer, &*queues);
        }
    }
    let (Ok(manager), Ok((mut producer, mut consumer))) =
        (SlicePool::map(&buffer, sets(Side::Server)), event_queue::map(&queues, layout))
    else {
        return;
    };
    let mut chains: VecDeque<Chain<Region>> = VecDeque::new();
    while let Some(action) = input.byte() {
        // A session ends with the first error; so does this.
        let result = match action % 12 {
            0..=2 => {
                poke(&mut input, &*buffer, &*queues);
                Ok(())
            }
            3 => manager.adopt(input.number::<2>() as u32).map(|chain| chains.push_back(chain)),
            4 => {
                let (len, partial) = (input.number::<2>() as usize % 3000, action & 16 != 0);
                manager.allocate(len, partial).map(|chain| {
                    if let Some(mut chain) = chain {
                        let before = chain.len();
                        let count = chain.write(&vec![7; len]);
                        assert_eq!(chain.len(), before + count);
                        chains.push_back(chain);
                    }
                })
            }
            5 => {
                // What another process would send us next.
                match chains.pop_front().and_then(Chain::into_sent) {
                    Some(parcel) => {
                        let event = Event { stream_id: 2, offset: parcel.offset, status: 0 };
                        producer.push(event).map(|_| {
                            producer.publish();
                        })
                    }
                    None => Ok(()),
                }
            }
            6 => consumer.available().and_then(|count| {
                for _ in 0..count {
                    let Some(event) = consumer.pop() else { break };
                    chains.push_back(manager.adopt(event.offset)?);
                }
                consumer.publish();
                Ok(())
            }),
            7 => {
                drop(chains.pop_back());
                Ok(())
            }
            8 => {
                if let Some(mut chain) = chains.pop_front() {
                    let len = chain.len();
                    assert!(len <= BUFFER_LEN);
                    let count = usize::from(action / 12).min(len);
                    let mut bytes = vec![0; count];
                    assert_eq!(chain.read(&mut bytes), count);
                    assert_eq!(chain.len(), len - count);
                    chains.push_back(chain);
                }
                Ok(())
            }
            9 => {
                if let Some(mut chain) = chains.pop_front() {
                    let len = chain.len();
                    let front = chain.split_to(usize::from(action / 12).min(len));
                    assert_eq!(front.len() + chain.len(), len);
                    chains.extend([front, chain]);
                }
                Ok(())
            }
            10 => {
                manager.set_resting(action & 16 != 0);
                Ok(())
            }
            _ => consumer.try_sleep().map(drop),
        };
        assert!(chains.iter().map(Chain::len).sum::<usize>() <= 2 * BUFFER_LEN);
        if result.is_err() || manager.take_broken().is_some() {
            break;
        }
    }
    drop(chains);
    manager.set_resting(true);
    assert_eq!(manager.held(), 0);
}

/// Writes a word somewhere, mostly into a header.
pub fn poke<M: Memory>(input: &mut Input<'_>, buffer: &M, queues: &M) {
    let place = input.number::<2>() as usize;
    let (memory, at) = match place % 4 {
        // The two queue headers, and the headers of the memory and its first list.
        0 => (queues, (place >> 2) % 6 * 4 + (place >> 5) % 2 * (queues.len() / 2)),
        1 => (queues, place >> 2),
        2 => (buffer, (place >> 2) % 13 * 4),
        _ => (buffer, place >> 2),
    };
    let at = (at & !3) % memory.len();
    let now = memory.load_u32(at, Ordering::Relaxed);
    memory.store_u32(at, input.word(now), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;

    fn seeds(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
        let directory =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(target);
        let paths = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        let seeds: Vec<_> = paths.map(|path| (path.clone(), fs::read(path).unwrap())).collect();
        assert!(!seeds.is_empty(), "{target} has no seeds");
        seeds
    }

    fn run(target: &str, fuzz: fn(&[u8])) {
        for (path, bytes) in seeds(target) {
            println!("{}", path.display());
            fuzz(&bytes);
            for len in 0..bytes.len().min(400) {
                fuzz(&bytes[..len]);
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn seeds_find_nothing() {
        run("deframe", deframe);
        run("handshake", handshake);
        run("memories", memories);
        run("running_session", running_session);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 512 }))]
        #[test]
        fn random_bytes_find_nothing(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            deframe(&bytes);
            handshake(&bytes);
            memories(&bytes);
        }
    }
}
