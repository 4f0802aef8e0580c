// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory of two processes: created or opened, mapped, accessed, and removed.
//!
//! - [`access`]: loads, stores and copies by offset; the only pointers into shared memory.
//! - [`region`]: creates and maps memory.
//! - [`directory`]: opens files below a directory.
//! - [`claims`]: which memories accepted sessions use.
//! - [`stale_files`]: files of dead processes.
//! - [`sigbus`]: the guard against SIGBUS.

pub mod access;
pub mod claims;
pub mod directory;
pub mod region;
pub mod sigbus;
pub mod stale_files;
