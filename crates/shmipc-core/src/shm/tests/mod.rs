// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests of several files of this room together: under a model checker, and in two processes.

mod list_stress;
mod models;
