// SPDX-License-Identifier: MIT OR Apache-2.0
//! A client that writes the protocol by itself, so that it can pipeline, cut, and send garbage.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;

use futures_lite::{AsyncReadExt, AsyncWriteExt};
use shmipc_glommio::{Config, Connector, Session};

use super::process::LONG;

/// What a server answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reply {
    Status(String),
    Error(String),
    Integer(i64),
    Bulk(Option<Vec<u8>>),
    Array(Vec<Reply>),
}

impl Reply {
    /// The text of a bulk.
    pub(crate) fn text(&self) -> &str {
        match self {
            Self::Bulk(Some(bytes)) => std::str::from_utf8(bytes).unwrap(),
            other => panic!("not a text: {other:?}"),
        }
    }

    pub(crate) fn integer(&self) -> i64 {
        match self {
            Self::Integer(value) => *value,
            other => panic!("not a number: {other:?}"),
        }
    }

    pub(crate) fn array(&self) -> &[Self] {
        match self {
            Self::Array(values) => values,
            other => panic!("not an array: {other:?}"),
        }
    }

    /// Reads the reply that bytes start with, if it is whole. Gives its length, too.
    pub(crate) fn parse(bytes: &[u8]) -> Option<(Self, usize)> {
        let end = bytes.windows(2).position(|pair| pair == b"\r\n")?;
        let line = std::str::from_utf8(&bytes[1..end]).unwrap();
        let start = end + 2;
        let reply = match bytes[0] {
            b'+' => Self::Status(line.into()),
            b'-' => Self::Error(line.into()),
            b':' => Self::Integer(line.parse().unwrap()),
            b'$' if line == "-1" => Self::Bulk(None),
            b'$' => {
                let end = start + line.parse::<usize>().unwrap();
                let body = bytes.get(start..end + 2)?;
                assert_eq!(&body[end - start..], b"\r\n");
                return Some((Self::Bulk(Some(body[..end - start].to_vec())), end + 2));
            }
            b'*' => {
                let (mut values, mut at) = (Vec::new(), start);
                for _ in 0..line.parse::<usize>().unwrap() {
                    let (value, len) = Self::parse(&bytes[at..])?;
                    values.push(value);
                    at += len;
                }
                return Some((Self::Array(values), at));
            }
            other => panic!("a reply starts with {other}: {}", bytes[..end].escape_ascii()),
        };
        Some((reply, start))
    }
}

/// A command as an array of bulk strings.
pub(crate) fn encode<T: AsRef<[u8]>>(words: &[T]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        bytes.extend(format!("${}\r\n", word.as_ref().len()).bytes());
        bytes.extend(word.as_ref());
        bytes.extend(b"\r\n");
    }
    bytes
}

/// A socket that blocks, with what has been read of the next reply.
pub(crate) struct Client<S> {
    pub(crate) socket: S,
    unread: Vec<u8>,
}

impl Client<TcpStream> {
    pub(crate) fn tcp(address: &str) -> Self {
        let socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(LONG)).unwrap();
        Self { socket, unread: Vec::new() }
    }

    pub(crate) fn finish_writing(&self) {
        self.socket.shutdown(Shutdown::Write).unwrap();
    }
}

impl Client<UnixStream> {
    pub(crate) fn unix(path: &str) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(LONG)).unwrap();
        Self { socket, unread: Vec::new() }
    }

    /// Sends pieces while replies are read, as a client must that asks for much at a time.
    pub(crate) fn pipeline(&mut self, pieces: Vec<Vec<u8>>, count: usize) -> Vec<Reply> {
        let mut writer = self.socket.try_clone().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for piece in pieces {
                    writer.write_all(&piece).unwrap();
                }
            });
            let replies = (0..count).map(|_| self.reply()).collect();
            assert!(self.unread.is_empty(), "more came than was asked for");
            replies
        })
    }
}

impl<S: Read + Write> Client<S> {
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    pub(crate) fn reply(&mut self) -> Reply {
        self.reply_or_end().expect("the connection ended")
    }

    /// The next reply; `None` when the server closed the connection.
    pub(crate) fn reply_or_end(&mut self) -> Option<Reply> {
        let mut chunk = vec![0; 256 << 10];
        loop {
            if let Some((reply, len)) = Reply::parse(&self.unread) {
                self.unread.drain(..len);
                return Some(reply);
            }
            match self.socket.read(&mut chunk) {
                Ok(0) => return None,
                Ok(count) => self.unread.extend(&chunk[..count]),
                Err(error) => panic!("no reply: {error}; {} bytes are unread", self.unread.len()),
            }
        }
    }

    pub(crate) fn call<T: AsRef<[u8]>>(&mut self, words: &[T]) -> Reply {
        self.send(&encode(words));
        self.reply()
    }

    /// A command of words without spaces.
    pub(crate) fn ask(&mut self, command: &str) -> Reply {
        self.call(&command.split(' ').collect::<Vec<_>>())
    }
}

/// Connects to a shard over shared memory.
pub(crate) async fn connect(path: impl AsRef<Path>) -> Session {
    let config = Config::builder().buffer_size(16 << 20).handshake_timeout(LONG).build().unwrap();
    Connector::new(config).connect(path).await.unwrap()
}

/// Sends pieces on a new stream of a session while replies are read.
pub(crate) async fn pipeline(session: &Session, pieces: Vec<Vec<u8>>, count: usize) -> Vec<Reply> {
    let (mut reader, mut writer) = session.open_stream().unwrap().split();
    let writing = async {
        for piece in pieces {
            writer.write_all(&piece).await.unwrap();
        }
    };
    let reading = async {
        let (mut replies, mut unread, mut chunk) = (Vec::new(), Vec::new(), vec![0; 256 << 10]);
        while replies.len() < count {
            match reader.read(&mut chunk).await.unwrap() {
                0 => panic!("the stream ended after {} replies", replies.len()),
                read => unread.extend(&chunk[..read]),
            }
            let mut at = 0;
            while let Some((reply, len)) = Reply::parse(&unread[at..]) {
                replies.push(reply);
                at += len;
            }
            unread.drain(..at);
        }
        assert!(unread.is_empty() && replies.len() == count, "more came than was asked for");
        replies
    };
    futures_lite::future::zip(writing, reading).await.1
}
