// SPDX-License-Identifier: MIT OR Apache-2.0
//! What this crate uses of glommio. Nothing else names it.

pub(crate) use glommio::io::BufferedFile;
pub(crate) use glommio::net::{TcpListener, TcpStream};
pub(crate) use glommio::timer::sleep;
pub(crate) use glommio::{CpuLocation, CpuSet, Task, TaskQueueHandle, spawn_local};
use glommio::{Latency, Shares};

/// Tells executors of this process apart.
pub(crate) fn executor_id() -> usize {
    glommio::executor().id()
}

/// A task queue without a requirement on latency: see [`poll_loop`](crate::reactor::poll_loop).
pub(crate) fn create_task_queue(name: &str) -> TaskQueueHandle {
    glommio::executor().create_task_queue(Shares::default(), Latency::NotImportant, name)
}

/// Lets the tasks of all other queues run.
pub(crate) async fn yield_task_queue() {
    glommio::executor().yield_task_queue_now().await;
}
