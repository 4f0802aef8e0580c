// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tasks and what they wait for. The only room that names glommio.
//!
//! - [`runtime`]: what is used of glommio.
//! - [`task_set`]: tasks that end with what they belong to.
//! - [`wakers`], [`task_waker`]: what tasks wait in; [`deadline`]: until when.
//! - [`contain`], [`callback`]: code of the program whose panics must end nothing else.
//! - [`log_limit`]: lines of the log that come again and again.
//! - [`wake_audit`]: whether a task is woken by its own core only.

pub(crate) mod callback;
pub(crate) mod contain;
pub(crate) mod deadline;
pub(crate) mod log_limit;
pub(crate) mod runtime;
pub(crate) mod task_set;
pub(crate) mod task_waker;
pub(crate) mod wake_audit;
pub(crate) mod wakers;
