// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the system shows of shared memory: mappings of this process, files in `/dev/shm`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

/// A copy of the mapping of this process whose name holds all of `parts`, if there is just one.
pub(crate) fn mapping(parts: &[&str]) -> Option<Vec<u8>> {
    let mut found = mappings(parts);
    assert!(found.len() <= 1, "two mappings whose names hold {parts:?}");
    found.pop()
}

/// Copies of the mappings of this process whose names hold all of `parts`.
pub(crate) fn mappings(parts: &[&str]) -> Vec<Vec<u8>> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let found = maps.lines().filter(|line| parts.iter().all(|part| line.contains(part)));
    found.map(|line| copy(line).expect("a line of a mapping")).collect()
}

fn copy(line: &str) -> Option<Vec<u8>> {
    let (start, rest) = line.split_once('-')?;
    let (end, _) = rest.split_once(' ')?;
    let start = u64::from_str_radix(start, 16).unwrap();
    let end = u64::from_str_radix(end, 16).unwrap();
    let mut bytes = vec![0; (end - start) as usize];
    // Through the kernel, so that nothing here forms a reference to memory that others write.
    let memory = File::open("/proc/self/mem").unwrap();
    memory.read_exact_at(&mut bytes, start).unwrap();
    Some(bytes)
}

/// The files of `/dev/shm` whose names hold one of `parts`.
pub(crate) fn shared_files(parts: &[String]) -> Vec<String> {
    let names = fs::read_dir("/dev/shm").unwrap().filter_map(|entry| {
        let entry = entry.ok()?;
        Some(entry.file_name().to_string_lossy().into_owned())
    });
    names.filter(|name| parts.iter().any(|part| name.contains(part))).collect()
}
