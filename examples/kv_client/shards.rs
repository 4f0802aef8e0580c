// SPDX-License-Identifier: MIT OR Apache-2.0
//! The shards of a server that is reached over shared memory.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use shmipc_glommio::{Config, Connector, Result, Session};

/// Shard number n listens at `PATH.n`. A server that has nothing there has one shard, at `PATH`.
pub(crate) struct Shards {
    connector: Connector,
    paths: Vec<PathBuf>,
}

impl Shards {
    /// Looks which shards there are.
    pub(crate) fn find(path: &Path, config: Config) -> Self {
        let numbered = |number: usize| {
            let mut numbered = path.as_os_str().to_owned();
            numbered.push(format!(".{number}"));
            PathBuf::from(numbered)
        };
        let mut paths: Vec<_> = (0..).map(numbered).take_while(|path| is_socket(path)).collect();
        if paths.is_empty() {
            paths.push(path.to_owned());
        }
        Self { connector: Connector::new(config), paths }
    }

    /// How many there are: at least one.
    pub(crate) fn count(&self) -> usize {
        self.paths.len()
    }

    /// A session to one of them.
    pub(crate) async fn connect(&self, shard: usize) -> Result<Session> {
        self.connector.connect(&self.paths[shard]).await
    }
}

fn is_socket(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}
