// SPDX-License-Identifier: MIT OR Apache-2.0
//! Laying out a buffer memory, and checking one that a peer laid out (WIRE chapter 4).

use std::sync::atomic::Ordering;

use super::access::Memory;
use super::list::BufferList;
use crate::config::SliceClass;
use crate::error::MemoryError;
use crate::wire::layout::{
    LIST_HEADER_LEN, MANAGER_HEADER_LEN, MANAGER_LIST_COUNT_OFFSET, MANAGER_USED_LEN_OFFSET,
    SLICE_HEADER_LEN, list_len,
};

/// The most lists that this side maps.
const MAX_LISTS: usize = 32;

/// Lays out the memory: every class gets its share of what the headers leave.
pub(super) fn create_lists<M: Memory>(
    memory: &M,
    classes: &[SliceClass],
) -> Result<Vec<BufferList>, MemoryError> {
    let have = memory.len() as u64;
    let headers = (MANAGER_HEADER_LEN + LIST_HEADER_LEN * classes.len()) as u64;
    let room = have.saturating_sub(headers);
    let mut lists = Vec::with_capacity(classes.len());
    let mut at = MANAGER_HEADER_LEN;
    for class in classes {
        let stride = u64::from(class.capacity) + SLICE_HEADER_LEN as u64;
        let count = room * u64::from(class.percent) / 100 / stride;
        let needed = at as u64 + list_len(count as u32, class.capacity);
        if count == 0 || needed > have {
            return Err(MemoryError::TooSmall { what: "a buffer list", needed, have });
        }
        // Fits: the whole memory is below 4 GiB (checked by the configuration).
        let list = BufferList::create(memory, at, count as u32, class.capacity);
        at = list.end();
        lists.push(list);
    }
    // Relaxed: the handshake's socket orders it.
    let used = (at - MANAGER_HEADER_LEN) as u32;
    memory.store_u32(MANAGER_LIST_COUNT_OFFSET, (lists.len() as u32).to_le(), Ordering::Relaxed);
    memory.store_u32(MANAGER_USED_LEN_OFFSET, used, Ordering::Relaxed);
    Ok(lists)
}

/// Checks a memory that the peer laid out.
pub(super) fn map_lists<M: Memory>(memory: &M) -> Result<Vec<BufferList>, MemoryError> {
    let have = memory.len() as u64;
    if have < MANAGER_HEADER_LEN as u64 {
        let needed = MANAGER_HEADER_LEN as u64;
        return Err(MemoryError::TooSmall { what: "the buffer header", needed, have });
    }
    if have > u64::from(u32::MAX) {
        let limit = u64::from(u32::MAX);
        return Err(MemoryError::TooLarge { what: "buffer memory", have, limit });
    }
    // Two bytes of count, two unused.
    let first_word = memory.load_u32(MANAGER_LIST_COUNT_OFFSET, Ordering::Acquire).to_le();
    let count = (first_word & 0xffff) as usize;
    if !(1..=MAX_LISTS).contains(&count) {
        return Err(MemoryError::Field {
            what: "list count",
            value: count as u64,
            problem: "expected 1 to 32",
        });
    }
    let used = u64::from(memory.load_u32(MANAGER_USED_LEN_OFFSET, Ordering::Acquire));
    let end = MANAGER_HEADER_LEN as u64 + used;
    if end > have {
        return Err(MemoryError::TooSmall { what: "the lists", needed: end, have });
    }
    let mut lists: Vec<BufferList> = Vec::with_capacity(count);
    let mut at = MANAGER_HEADER_LEN;
    for _ in 0..count {
        let list = BufferList::map(memory, at, end as usize)?;
        if lists.last().is_some_and(|last| last.slice_capacity() >= list.slice_capacity()) {
            return Err(MemoryError::Field {
                what: "slice capacity",
                value: u64::from(list.slice_capacity()),
                problem: "lists go from small slices to large",
            });
        }
        at = list.end();
        lists.push(list);
    }
    Ok(lists)
}
