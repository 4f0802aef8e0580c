// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory of two processes: created or opened, mapped, accessed, and removed.
//!
//! - [`memory`]: what the algorithms ask of a memory.
//! - [`access`]: loads, stores and copies by offset; the only pointers into shared memory.
//! - [`trust`]: the promise that references into shared memory rest on.
//! - [`region`]: creates and maps memory.
//! - [`fd_kind`]: what a passed descriptor is.
//! - [`directory`]: opens files below a directory.
//! - [`shared_file`]: the entry of a memory's file in its directory.
//! - [`stale_files`]: files of dead processes.
//! - [`claims`]: which memories accepted sessions use.
//! - [`sigbus`]: the guard against SIGBUS.

pub mod access;
pub mod claims;
pub mod directory;
pub mod fd_kind;
pub mod memory;
pub mod region;
pub mod shared_file;
pub mod sigbus;
pub mod stale_files;
pub mod trust;
