// SPDX-License-Identifier: MIT OR Apache-2.0
//! File memory in a file system that has little room, as `/dev/shm` has in containers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use futures_lite::future::poll_once;
use shmipc_glommio::{
    Config, ConfigBuilder, Connector, Error, Listener, MemoryKind, ResourceError, Session,
};

use support::executor::{SocketPath, run};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
}

const LIMIT: Duration = Duration::from_secs(60);

/// A file system of its own.
struct SmallFileSystem(PathBuf);

impl SmallFileSystem {
    /// `None` where this process may not mount anything.
    fn mount(mebibytes: u32) -> Option<Self> {
        let path = std::env::temp_dir().join(format!("shmipc-small-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        let options = format!("size={mebibytes}m");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "none"]).arg(&path);
        if mount.output().is_ok_and(|output| output.status.success()) {
            return Some(Self(path));
        }
        fs::remove_dir(&path).unwrap();
        None
    }

    fn prefix(&self) -> PathBuf {
        self.0.join("memory")
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        // A test that fails says more than what is left.
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
        let _ = fs::remove_dir(&self.0);
    }
}

fn in_files(prefix: &Path) -> ConfigBuilder {
    let config = Config::builder().memory(MemoryKind::File).path_prefix(prefix);
    config.buffer_size(6 << 20).queue_capacity(64)
}

/// Takes every slice there is, and writes to all of it.
async fn use_up(session: &Session) -> usize {
    let mut stream = session.open_stream().unwrap();
    let mut loans = Vec::new();
    let mut bytes = 0;
    for size in [100_000, 20_000, 4096] {
        while let Some(loan) = poll_once(stream.alloc(size)).await {
            let mut loan = loan.unwrap();
            let len = loan.capacity();
            loan.write(&vec![7; len]);
            bytes += len;
            loans.push(loan);
        }
    }
    bytes
}

#[test]
fn sessions_get_what_they_were_promised_or_are_refused() {
    let Some(file_system) = SmallFileSystem::mount(16) else {
        println!("skipped: no file system can be mounted here");
        return;
    };
    let prefix = file_system.prefix();
    run(LIMIT, move || async move {
        let path = SocketPath::new();
        let config = in_files(&prefix).build().unwrap();
        let listener = Listener::bind(path.as_str(), config.clone()).unwrap();
        let connector = Connector::new(config);
        let mut sessions = Vec::new();
        // None of them has touched much of its memory yet, so each by itself seems to fit.
        let refused = loop {
            match connector.connect(path.as_str()).await {
                Ok(session) => sessions.push((session, listener.accept().await.unwrap())),
                Err(error) => break error,
            }
            assert!(sessions.len() < 10);
        };
        assert_eq!(sessions.len(), 2);
        let Error::Resource(ResourceError::SharedMemory { directory, needed, available }) = refused
        else {
            panic!("{refused}");
        };
        assert!(prefix.starts_with(directory));
        assert!(needed > 6 << 20 && available < 6 << 20);
        for (client, _) in &sessions {
            // Not killed, and nothing goes over the socket for want of memory.
            assert!(use_up(client).await > 5 << 20);
            assert_eq!(client.stats().fallback_sent, 0);
        }
        // When one has gone, there is room again.
        drop(sessions.pop());
        glommio::timer::sleep(Duration::from_millis(20)).await;
        sessions.push((
            connector.connect(path.as_str()).await.unwrap(),
            listener.accept().await.unwrap(),
        ));
        connector.connect(path.as_str()).await.unwrap_err();
        // Who does not ask is promised more than there is.
        let careless = in_files(&prefix).preflight_memory(false).build().unwrap();
        Connector::new(careless).connect(path.as_str()).await.unwrap();
    });
}
