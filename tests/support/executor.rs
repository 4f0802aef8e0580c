// SPDX-License-Identifier: MIT OR Apache-2.0
//! An executor for one test, and waiting that ends.

use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use futures_lite::future::or;
use glommio::{LocalExecutorBuilder, Placement};

/// Runs a test on an executor of its own, and stops it when it hangs.
pub(crate) fn run<F: Future<Output = ()> + 'static>(
    limit: Duration,
    test: impl FnOnce() -> F + Send + 'static,
) {
    LocalExecutorBuilder::new(Placement::Unbound)
        .spawn(move || async move {
            let hangs = async {
                glommio::timer::sleep(limit).await;
                panic!("the test hangs");
            };
            or(test(), hangs).await;
        })
        .unwrap()
        .join()
        .unwrap();
}

/// Waits until something is so. Whether it became so in time.
pub(crate) async fn within(limit: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !is_so() {
        if start.elapsed() > limit {
            return false;
        }
        glommio::timer::sleep(Duration::from_millis(2)).await;
    }
    true
}

/// A path for a socket that no other test has. Nothing stays there when this goes.
pub(crate) struct SocketPath(PathBuf);

impl SocketPath {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("shmipc-test-{}-{number}.sock", std::process::id());
        Self(std::env::temp_dir().join(name))
    }

    pub(crate) fn as_str(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        // The crate `shmipc` leaves its sockets; ours are gone by now.
        let _ = std::fs::remove_file(&self.0);
    }
}
