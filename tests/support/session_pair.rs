// SPDX-License-Identifier: MIT OR Apache-2.0
//! Both ends of a session, and of its streams, on one executor.

use std::time::Duration;

use futures_lite::future::zip;
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use shmipc_glommio::{Config, ConfigBuilder, Connector, Error, Listener, Session, Stream};

use super::executor::SocketPath;

pub(crate) fn small() -> ConfigBuilder {
    Config::builder().buffer_size(1 << 20).queue_capacity(64)
}

/// Two ends of a session on this executor.
pub(crate) async fn pair(client: ConfigBuilder, server: ConfigBuilder) -> (Session, Session) {
    let path = SocketPath::new();
    let listener = Listener::bind(path.as_str(), server.build().unwrap()).unwrap();
    let connector = Connector::new(client.build().unwrap());
    let (client, server) = zip(connector.connect(path.as_str()), listener.accept()).await;
    (client.unwrap(), server.unwrap())
}

/// A stream's two ends. The client has sent one byte on it, and the server has read that.
pub(crate) async fn open(client: &Session, server: &Session) -> (Stream, Stream) {
    let mut near = client.open_stream().unwrap();
    near.write_all(&[0]).await.unwrap();
    let mut far = server.accept().await.unwrap();
    far.read_exact(&mut [0]).await.unwrap();
    (near, far)
}

pub(crate) fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|index| (seed * 131 + index * 17 + (index >> 8) * 3) as u8).collect()
}

pub(crate) async fn until(mut is_so: impl FnMut() -> bool) {
    while !is_so() {
        glommio::timer::sleep(Duration::from_millis(1)).await;
    }
}

pub(crate) async fn send(stream: &mut Stream, bytes: &[u8]) -> Result<(), Error> {
    let mut loan = stream.alloc(bytes.len()).await?;
    assert_eq!(loan.write(bytes), bytes.len());
    stream.send(loan).await
}

pub(crate) async fn recv(stream: &mut Stream) -> Option<Vec<u8>> {
    stream.recv().await.unwrap().map(|message| message.into_bytes().to_vec())
}
