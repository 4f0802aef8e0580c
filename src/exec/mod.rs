// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tasks and what they wait for. The only room that names glommio.
//!
//! - [`runtime`]: the parts of glommio that this crate uses; [`options`]: how executors are made.
//! - [`task_set`]: tasks that are cancelled with their owner.
//! - [`wakers`]: places where tasks wait for a change; [`task_waker`]: one stored waker per task;
//!   [`deadline`]: a time limit for a wait.
//! - [`contain`], [`callback`]: run the program's code so that a panic in it ends nothing else.
//! - [`log_limit`]: at most one log line per interval.
//! - [`wake_audit`]: counts wake-ups that come from other threads.
//!
//! Everything here belongs to one executor. Another runtime means another version of this room.

pub(crate) mod callback;
pub(crate) mod contain;
pub(crate) mod deadline;
pub(crate) mod log_limit;
pub(crate) mod options;
pub(crate) mod runtime;
pub(crate) mod task_set;
pub(crate) mod task_waker;
pub(crate) mod wake_audit;
pub(crate) mod wakers;
