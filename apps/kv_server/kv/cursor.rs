// SPDX-License-Identifier: MIT OR Apache-2.0
//! Cursors of a scan over all shards: one shard after the other, each slot by slot.
//!
//! A cursor is the slot to go on with, times the number of shards, plus the shard. So every shard
//! can say what comes next, and whoever gets a cursor knows whom it is for. Zero is the start, and
//! the end.

use super::resp::integer;

/// The shard that goes on with the scan. `None`: it is no cursor.
pub(crate) fn shard(cursor: &[u8], shards: usize) -> Option<usize> {
    Some(parse(cursor)? % shards)
}

/// The slot that the scan goes on with in its shard.
pub(crate) fn slot(cursor: &[u8], shards: usize) -> Option<usize> {
    Some(parse(cursor)? / shards)
}

/// The cursor behind a step in a shard, which goes on with a slot of its own if there is one.
pub(crate) fn next(slot: Option<usize>, shard: usize, shards: usize) -> usize {
    match slot {
        Some(slot) => slot * shards + shard,
        None if shard + 1 < shards => shard + 1,
        None => 0,
    }
}

fn parse(cursor: &[u8]) -> Option<usize> {
    usize::try_from(integer(cursor)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scan_goes_through_all_shards() {
        let mut steps = Vec::new();
        let mut cursor = 0;
        loop {
            let text = cursor.to_string();
            let at = (shard(text.as_bytes(), 3).unwrap(), slot(text.as_bytes(), 3).unwrap());
            steps.push(at);
            // Every shard has 20 slots, and steps take 10 of them.
            cursor = next((at.1 == 0).then_some(10), at.0, 3);
            if cursor == 0 {
                break;
            }
        }
        assert_eq!(steps, [(0, 0), (0, 10), (1, 0), (1, 10), (2, 0), (2, 10)]);
        assert_eq!((shard(b"-1", 3), slot(b"x", 3)), (None, None));
    }
}
