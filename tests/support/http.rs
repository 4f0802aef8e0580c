// SPDX-License-Identifier: MIT OR Apache-2.0
//! A server of HTTP that is just enough for its clients.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

/// Answers requests of HTTP/1.1, as many as come on a connection: GET with the file, POST with what
/// was posted.
pub(crate) fn serve(stream: UnixStream, file: &[u8]) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    loop {
        let mut request = String::new();
        if reader.read_line(&mut request)? == 0 {
            return Ok(());
        }
        let (mut len, mut must_encourage) = (0, false);
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let line = line.trim_end().to_ascii_lowercase();
            match line.split_once(": ") {
                Some(("content-length", value)) => len = value.parse().unwrap(),
                Some(("expect", _)) => must_encourage = true,
                Some(_) => {}
                None => break,
            }
        }
        if must_encourage {
            writer.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let mut body = vec![0; len];
        reader.read_exact(&mut body)?;
        let answer = if request.starts_with("GET /file HTTP/1.1") { file } else { &body };
        let len = answer.len();
        write!(writer, "HTTP/1.1 200 OK\r\nContent-Length: {len}\r\n\r\n")?;
        writer.write_all(answer)?;
    }
}
