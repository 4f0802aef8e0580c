// SPDX-License-Identifier: MIT OR Apache-2.0
//! Limits of the process that memory runs into.

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use crate::error::ResourceError;

/// The soft limit of this process, `None` if there is none.
pub fn limit_of(resource: Resource) -> Option<u64> {
    getrlimit(resource).ok().map(|(soft, _)| soft).filter(|&soft| soft != RLIM_INFINITY)
}

/// Checks that a file, in memory too, may have this length.
///
/// Making a longer one raises `SIGXFSZ`, which kills the process unless the program handles it.
///
/// # Errors
///
/// [`ResourceError::FileSize`] if the limit of the process (`ulimit -f`) is below `needed`.
pub fn check_file_size(what: &'static str, needed: u64) -> Result<(), ResourceError> {
    match limit_of(Resource::RLIMIT_FSIZE) {
        Some(limit) if limit < needed => Err(ResourceError::FileSize { what, needed, limit }),
        _ => Ok(()),
    }
}
