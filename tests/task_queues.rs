// SPDX-License-Identifier: MIT OR Apache-2.0
//! What becomes of a panic in a task of another queue than the executor's own, with glommio 0.9. An
//! abort was reported; it unwinds, and ends the executor, as in the executor's own queue. This
//! crate has a queue of its own, for its poller, in which nothing of the program runs but
//! callbacks, whose panics are contained.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use glommio::{Latency, LocalExecutorBuilder, Placement, Shares};
use shmipc_glommio::{Config, Connector, Listener};

use support::executor::SocketPath;

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
}

/// What tells a child that it is one.
const CHILD: &str = "SHMIPC_TASK_QUEUE_CHILD";

/// Not a test by itself: an executor with sessions, and a panic beside them.
#[test]
fn as_a_child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let path = SocketPath::new();
    let config = Config::builder().container().build().unwrap();
    let executor = LocalExecutorBuilder::new(Placement::Unbound).spawn(move || async move {
        let listener = Listener::bind(path.as_str(), config.clone()).unwrap();
        let _session = Connector::new(config).connect(path.as_str()).await.unwrap();
        let _peer = listener.accept().await.unwrap();
        let queue = glommio::executor().create_task_queue(
            Shares::default(),
            Latency::NotImportant,
            "of the program",
        );
        let task = glommio::spawn_local_into(async { panic!("on purpose") }, queue).unwrap();
        let () = task.await;
    });
    let ended = executor.unwrap().join();
    println!("UNWOUND {}", ended.is_err());
}

#[test]
fn a_panic_in_a_task_queue_of_the_program_unwinds_and_ends_its_executor() {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "as_a_child", "--nocapture", "--test-threads=1"])
        .env(CHILD, "1")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    let errors = String::from_utf8_lossy(&child.stderr);
    assert_eq!(child.status.signal(), None, "{said}\n{errors}");
    assert!(said.contains("UNWOUND true"), "{said}\n{errors}");
}
