//! What the ping-pong example and the benches measure with.

#![allow(dead_code, reason = "each of the programs uses a part of it")]

pub(crate) mod count;
pub(crate) mod floor;
pub(crate) mod harness;
pub(crate) mod ours;
pub(crate) mod payload;
pub(crate) mod point;
#[cfg(feature = "dev-shmipc")]
pub(crate) mod shmipc_rs;
pub(crate) mod sockets;
