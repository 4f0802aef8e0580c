// SPDX-License-Identifier: MIT OR Apache-2.0
//! The example of the README: a server and a client on one executor.

use futures_lite::{AsyncReadExt, AsyncWriteExt, io};
use shmipc_glommio::{Config, Connector, Cores, Listener};

/// Sends back whatever comes, on all streams of all sessions.
async fn serve(listener: Listener) {
    while let Ok(session) = listener.accept().await {
        glommio::spawn_local(async move {
            while let Ok(stream) = session.accept().await {
                let (reader, writer) = stream.split();
                glommio::spawn_local(async move { io::copy(reader, writer).await.ok() }).detach();
            }
        })
        .detach();
    }
}

async fn hello() -> io::Result<String> {
    let path = std::env::temp_dir().join(format!("hello-{}.sock", std::process::id()));
    // In earnest the server is another process.
    let server = glommio::spawn_local(serve(Listener::bind(&path, Config::default())?));

    let session = Connector::new(Config::default()).connect(&path).await?;
    let mut stream = session.open_stream()?;
    stream.write_all(b"hello").await?;
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).await?;
    server.cancel().await;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn main() -> ExitCode {
    let about = "The example of the README: a server and a client on one executor";
    match cli::read_nothing("hello", about) {
        Ok(()) => cli::end(run()),
        Err(status) => status,
    }
}

/// The README has this as its `main`.
fn run() -> io::Result<()> {
    shmipc_glommio::preflight(&Cores::Unpinned(1))?;
    let answer = glommio::LocalExecutorBuilder::default().make()?.run(hello())?;
    cli::print(format_args!("{answer}"))
}

use std::process::ExitCode;

#[allow(dead_code, reason = "the other examples use the rest")]
#[path = "support/cli.rs"]
mod cli;
