// SPDX-License-Identifier: MIT OR Apache-2.0
//! What ordinary mistakes are answered with: the path, the side, the setting, and what to do.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use shmipc_glommio::{
    AllowedPeers, Client, Config, ConfigBuilder, ConfigError, Connector, Cores, Error, Listener,
    MemoryKind, Server,
};

use support::executor::{SocketPath, run};

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod executor;
}

const LIMIT: Duration = Duration::from_secs(60);

fn small() -> ConfigBuilder {
    Config::builder().container()
}

fn plain() -> Config {
    small().build().unwrap()
}

/// A directory that goes with its test.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("shmipc-errors-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::set_permissions(&self.0, fs::Permissions::from_mode(0o700));
        let _ = fs::remove_dir_all(&self.0);
    }
}

async fn connect(path: &Path, config: Config) -> Error {
    Connector::new(config).connect(path).await.map(drop).unwrap_err()
}

fn serve(path: &Path, shards: usize) -> Error {
    let builder = Server::builder(path).cores(Cores::Unpinned(shards)).config(plain());
    builder.serve_streams(|_| async {}).map(drop).unwrap_err()
}

/// All of the parts are in the text of an error, and the text of its conversion.
#[track_caller]
fn says(error: Error, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    assert_eq!(std::io::Error::from(error).to_string(), text);
}

/// A path of so many bytes in a directory.
fn of_length(directory: &Directory, len: usize) -> PathBuf {
    let have = directory.at("").as_os_str().len();
    directory.at(&"x".repeat(len - have))
}

#[test]
fn a_client_s_mistakes_name_the_path_and_what_to_do() {
    run(LIMIT, || async {
        let directory = Directory::new("client");
        let missing = directory.at("missing.sock");
        let name = missing.to_str().unwrap();
        let error = connect(&missing, plain()).await;
        assert_eq!(error.path(), Some(&*missing));
        says(error, &[name, "No such file", "no server has a socket there"]);

        let dead = directory.at("dead.sock");
        drop(UnixListener::bind(&dead).unwrap());
        let error = connect(&dead, plain()).await;
        assert_eq!(error.path(), Some(&*dead));
        says(error, &["dead.sock", "refused", "is gone"]);

        let file = directory.at("file");
        fs::write(&file, "").unwrap();
        says(connect(&file, plain()).await, &["/file", "refused", "no socket"]);
        says(connect(&directory.at(""), plain()).await, &["refused", "no socket"]);
        says(connect(&file.join("below"), plain()).await, &["/file/below", "Not a directory"]);
        let error = Connector::shard_count(&file).unwrap_err();
        says(error, &["/file", "no socket"]);
        says(Connector::shard_count(&missing).unwrap_err(), &[name, "no server has a socket"]);

        // The longest that fits is too long for the shards' own sockets.
        let long = of_length(&directory, 108);
        let error = connect(&long, plain()).await;
        assert_eq!(error.path(), Some(&*long));
        let Error::Config(ConfigError::SocketPath { len: 108, .. }) = &error else {
            panic!("{error}");
        };
        says(error, &[long.to_str().unwrap(), "holds 107 bytes", "has 108"]);
        says(Connector::shard_count(&long).unwrap_err(), &["holds 107 bytes", "has 108"]);

        let nobody = format!("@errors-{}", std::process::id());
        for error in [
            connect(Path::new(&nobody), plain()).await,
            Connector::shard_count(&nobody).unwrap_err(),
        ] {
            says(error, &[&nobody, "no server listens under that abstract name"]);
        }

        // A link leads to a server as it does for the kernel.
        let (server, link) = (directory.at("server.sock"), directory.at("link.sock"));
        let _listening = UnixListener::bind(&server).unwrap();
        std::os::unix::fs::symlink(&server, &link).unwrap();
        assert_eq!(Connector::shard_count(&link).unwrap(), 1);

        let address = "127.0.0.1:1".parse().unwrap();
        let files = small().memory(MemoryKind::File).build().unwrap();
        let error = Connector::new(files).connect_tcp(address).await.map(drop).unwrap_err();
        says(error, &["127.0.0.1:1", "refused"]);

        // Also by way of a client, which names its server besides.
        let client = Client::builder(&missing).config(plain());
        let client = client.acquire_timeout(Duration::from_millis(30)).build().unwrap();
        let error = client.session(0).await.map(drop).unwrap_err();
        assert_eq!(error.path(), Some(&*missing));
        says(error, &["shard 0 of", name, "no server has a socket there"]);
    });
}

#[test]
fn a_server_s_mistakes_name_the_path_and_what_to_do() {
    run(LIMIT, || async {
        let directory = Directory::new("server");
        let bind = |path: &Path| Listener::bind(path, plain()).map(drop).unwrap_err();
        let nowhere = directory.at("nowhere/x.sock");
        let parts = ["nowhere/x.sock:", "the directory", "is not there"];
        says(bind(&nowhere), &parts);
        assert_eq!(bind(&nowhere).path(), Some(&*nowhere));
        says(serve(&nowhere, 2), &["nowhere/x.sock", "the directory", "is not there"]);

        let file = directory.at("file");
        fs::write(&file, "").unwrap();
        says(bind(&file), &["listen on the Unix socket", "/file:", "not a socket"]);
        says(serve(&file, 2), &["/file:", "not a socket"]);

        let live = directory.at("live.sock");
        let _listener = Listener::bind(&live, plain()).unwrap();
        says(bind(&live), &["live.sock:", "live server"]);
        says(serve(&live, 1), &["live.sock:", "live server"]);

        // A shard's own socket has two more bytes in its path, and from the eleventh on three.
        says(bind(&of_length(&directory, 108)), &["holds 107 bytes", "has 108:"]);
        let most = of_length(&directory, 107);
        drop(Listener::bind(&most, plain()).unwrap());
        says(serve(&most, 1), &["holds 107 bytes", "has 109", "`.0` is appended for shard 0"]);
        let error = serve(&of_length(&directory, 105), 11);
        assert_eq!(error.path().unwrap().as_os_str().len(), 108);
        says(error, &["holds 107 bytes", "has 108", "`.10` is appended for shard 10"]);

        let any = "192.0.2.1:80".parse().unwrap();
        let error = Listener::bind_tcp(any, plain()).map(drop).unwrap_err();
        says(error, &["192.0.2.1:80", "not a loopback address"]);
    });
}

#[test]
fn what_is_forbidden_says_whose_setting_it_is() {
    run(LIMIT, || async {
        let path = SocketPath::new();
        let path = Path::new(path.as_str());
        let _listener = Listener::bind(path, plain()).unwrap();
        let nobody = small().allowed_peers(AllowedPeers::Users(vec![4242])).build().unwrap();
        let error = connect(path, nobody).await;
        let parts = ["the server is user", "`allowed_peers`", "connector", "users 4242"];
        says(error, &parts);

        let directory = Directory::new("prefix");
        let prefix = directory.at("gone/x");
        let files = small().memory(MemoryKind::File).path_prefix(&prefix);
        let error = connect(path, files.clone().build().unwrap()).await;
        says(error, &["gone", "`path_prefix`"]);
        let error = connect(path, files.preflight_memory(false).build().unwrap()).await;
        says(error, &["gone/x", "create", "`path_prefix`"]);
    });
}
