// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which shard owns a key: the slots of Redis Cluster, dealt to the shards in equal ranges.
//!
//! Server and clients have to agree on this, and on nothing else, to meet at the right core.

/// How many slots keys fall into.
const SLOTS: usize = 16384;

/// The shard, of so many, that owns a key.
pub(crate) fn shard_of(key: &[u8], shards: usize) -> usize {
    usize::from(crc16(hashed_part(key))) % SLOTS * shards / SLOTS
}

/// What stands between the first `{` and the first `}` behind it, when that is something: keys that
/// share it live together.
fn hashed_part(key: &[u8]) -> &[u8] {
    let Some(open) = key.iter().position(|&byte| byte == b'{') else {
        return key;
    };
    let behind = &key[open + 1..];
    match behind.iter().position(|&byte| byte == b'}') {
        Some(close) if close > 0 => &behind[..close],
        _ => key,
    }
}

/// CRC-16/XMODEM, which is what Redis Cluster takes.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, &byte| (crc << 8) ^ TABLE[usize::from((crc >> 8) as u8 ^ byte)])
}

static TABLE: [u16; 256] = table();

const fn table() -> [u16; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = (byte as u16) << 8;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_redis_cluster() {
        // The check value of CRC-16/XMODEM, and slots that `CLUSTER KEYSLOT` gives.
        assert_eq!(crc16(b"123456789"), 0x31c3);
        for (key, slot) in [("foo", 12182), ("somekey", 11058), ("foo{hash_tag}", 2515)] {
            assert_eq!(shard_of(key.as_bytes(), SLOTS), slot, "{key}");
        }
    }

    #[test]
    fn a_tag_keeps_keys_together() {
        let shard = |key: &str| shard_of(key.as_bytes(), SLOTS);
        assert_eq!(shard("{user1000}.following"), shard("{user1000}.followers"));
        assert_eq!(shard("foo{}{bar}"), usize::from(crc16(b"foo{}{bar}")) % SLOTS);
        assert_eq!(shard("foo{{bar}}zap"), usize::from(crc16(b"{bar")) % SLOTS);
    }

    #[test]
    fn every_shard_gets_its_part() {
        let mut counts = [0; 3];
        for number in 0..30_000 {
            counts[shard_of(format!("key:{number}").as_bytes(), 3)] += 1;
        }
        assert!(counts.iter().all(|&count| (9_000..11_000).contains(&count)), "{counts:?}");
    }
}
