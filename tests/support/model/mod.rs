// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random use of two sessions beside a plain model of what must come of it.

pub(crate) mod coverage;
pub(crate) mod expected;
pub(crate) mod life;
pub(crate) mod play;
pub(crate) mod random;
pub(crate) mod reading;
pub(crate) mod setup;
pub(crate) mod world;
pub(crate) mod writing;
