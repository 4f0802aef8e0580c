// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is left of servers that have stopped. Alone in its program: it counts the descriptors and
//! mappings of the whole process.

use std::fs;
use std::time::Duration;

use shmipc_glommio::{Config, Connector, Cores, Error, Server, Stream};

use support::executor::{SocketPath, run};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
}

const LIMIT: Duration = Duration::from_secs(60);

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Mappings of shared memory of sessions.
fn mappings() -> usize {
    fs::read_to_string("/proc/self/maps").unwrap().matches("shmipc").count()
}

async fn echo(mut stream: Stream) -> Result<(), Error> {
    while let Some(message) = stream.recv().await? {
        stream.forward(message).await?;
    }
    Ok(())
}

#[test]
fn a_server_that_has_stopped_leaves_nothing() {
    const SERVERS: usize = 10;
    const SHARDS: usize = 2;
    run(LIMIT, || async {
        let config = Config::builder().container().build().unwrap();
        let mut before = None;
        // The first one is not counted: what is made once for all is made then.
        for _ in 0..=SERVERS {
            let path = SocketPath::new();
            let builder = Server::builder(path.as_str()).cores(Cores::Unpinned(SHARDS));
            let server = builder.config(config.clone()).serve_streams(echo).unwrap();
            let mut sessions = Vec::new();
            for shard in [0, 1, 1] {
                let connector = Connector::new(config.clone());
                let session = connector.connect_shard(path.as_str(), shard).await.unwrap();
                let mut stream = session.open_stream().unwrap();
                let mut loan = stream.alloc(5).await.unwrap();
                loan.write(b"hello");
                stream.send(loan).await.unwrap();
                assert_eq!(stream.recv().await.unwrap().unwrap().into_bytes(), "hello");
                sessions.push((session, stream));
            }
            assert!(mappings() >= 6, "{} mappings", mappings());
            server.stop(LIMIT).unwrap();
            for (session, stream) in sessions {
                session.closed().await;
                drop(stream);
            }
            glommio::timer::sleep(Duration::from_millis(20)).await;
            before.get_or_insert_with(descriptors);
        }
        let left = descriptors() - before.unwrap();
        // glommio itself keeps one for each executor that was.
        assert!(left <= SERVERS * SHARDS, "{left} descriptors are left");
        assert_eq!(mappings(), 0);
    });
}
