// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads the free lists of a buffer memory as they lie there, without the library's own eyes.

use std::collections::HashSet;

use shmipc_glommio::wire::layout::{
    LIST_HEADER_LEN, MANAGER_HEADER_LEN, SLICE_HEADER_LEN, list_len,
};
use shmipc_glommio::wire::{BufferManagerHeader, ListHeader, SliceHeader};

/// Whether every slice of every list is free and can be reached; what is wrong otherwise.
pub(crate) fn all_free(memory: &[u8]) -> Result<(), String> {
    let manager = BufferManagerHeader::decode(header::<MANAGER_HEADER_LEN>(memory, 0)?);
    let mut at = MANAGER_HEADER_LEN;
    for number in 0..manager.list_count {
        let list = ListHeader::decode(header::<LIST_HEADER_LEN>(memory, at)?);
        let slices = &memory[at + LIST_HEADER_LEN..];
        list_is_whole(&list, slices).map_err(|problem| format!("list {number}: {problem}"))?;
        at += list_len(list.capacity, list.slice_capacity) as usize;
    }
    Ok(())
}

fn list_is_whole(list: &ListHeader, slices: &[u8]) -> Result<(), String> {
    if i64::from(list.size) != i64::from(list.capacity) {
        return Err(format!("{} of {} slices are free", list.size, list.capacity));
    }
    let stride = list.slice_capacity as usize + SLICE_HEADER_LEN;
    let mut seen = HashSet::new();
    let mut at = list.head as usize;
    loop {
        if !at.is_multiple_of(stride) || !seen.insert(at) {
            return Err(format!("the link to {at} leads astray"));
        }
        let slice = SliceHeader::decode(header::<SLICE_HEADER_LEN>(slices, at)?);
        if slice.capacity != list.slice_capacity {
            return Err(format!("the slice at {at} says {slice:?}"));
        }
        if !slice.has_next() {
            break;
        }
        at = slice.next as usize;
    }
    if at != list.tail as usize || seen.len() != list.capacity as usize {
        let (count, tail) = (seen.len(), list.tail);
        return Err(format!("{count} slices in a row up to {at}, the tail is {tail}"));
    }
    Ok(())
}

fn header<const N: usize>(memory: &[u8], at: usize) -> Result<&[u8; N], String> {
    let bytes = memory.get(at..).and_then(|rest| rest.first_chunk::<N>());
    bytes.ok_or_else(|| format!("no header of {N} bytes at {at}"))
}
