// SPDX-License-Identifier: MIT OR Apache-2.0
//! The replies of one shard to one client, one after the other.

use futures_lite::AsyncReadExt;
use shmipc_glommio::ReadHalf;

use super::input::Input;
use super::reply::{self, Replies};
use super::resp::integer;

/// The longest line of a shard's reply.
const MAX_LINE: usize = 64 << 10;

/// The text of an error reply: a shard could not be asked, or said no.
pub(crate) type Failure = String;

/// Where the replies of a shard come from: another core, or this one.
#[derive(Default)]
pub(crate) struct ReplyStream {
    /// `None`: the shard is that of this core, or there is no link to it yet.
    link: Option<Link>,
    /// What has come over the link.
    input: Input,
    /// The replies of this core's own shard, and how many bytes of them have been taken.
    made_here: Replies,
    used: usize,
}

enum Link {
    Open(ReadHalf),
    /// What was under way is lost, and nothing more will come.
    Failed(Failure),
}

impl ReplyStream {
    pub(crate) fn linked(reader: ReadHalf) -> Self {
        Self { link: Some(Link::Open(reader)), ..Self::default() }
    }

    pub(crate) fn failed(failure: Failure) -> Self {
        Self { link: Some(Link::Failed(failure)), ..Self::default() }
    }

    pub(crate) fn has_failed(&self) -> bool {
        matches!(self.link, Some(Link::Failed(_)))
    }

    /// Where the shard of this very core writes its replies.
    pub(crate) fn made_here(&mut self) -> &mut Replies {
        &mut self.made_here
    }

    /// Where the shard of this very core writes them, and lets long values stay where they are.
    pub(crate) fn referring() -> Self {
        Self { made_here: Replies::referring(), ..Self::default() }
    }

    /// Makes ready for the next batch. So much memory is kept for it.
    pub(crate) fn forget_made_here(&mut self, kept: usize) {
        self.made_here.clear(kept);
        self.used = 0;
    }

    fn unread(&self) -> &[u8] {
        match self.link {
            None => &self.made_here.bytes()[self.used..],
            Some(_) => self.input.unread(),
        }
    }

    fn consume(&mut self, count: usize) {
        match self.link {
            None => self.used += count,
            Some(_) => self.input.consume(count),
        }
    }

    fn fail(&mut self, failure: Failure) -> Failure {
        self.link = Some(Link::Failed(failure.clone()));
        failure
    }

    /// Waits for more bytes.
    async fn more(&mut self) -> Result<(), Failure> {
        let failure = match &mut self.link {
            None => return Err("ERR a reply of this shard is missing".into()),
            Some(Link::Failed(failure)) => return Err(failure.clone()),
            Some(Link::Open(reader)) => match self.input.fill(reader, 0).await {
                Ok(1..) => return Ok(()),
                Ok(0) => "ERR the shard's stream has ended".to_owned(),
                Err(error) => format!("ERR the shard's stream failed: {error}"),
            },
        };
        Err(self.fail(failure))
    }

    /// Reads exactly so many bytes that have not come yet straight to where they go.
    async fn read_onto(&mut self, output: &mut Replies, len: usize) -> Result<(), Failure> {
        let Some(Link::Open(reader)) = &mut self.link else {
            return self.more().await;
        };
        match reader.read_exact(output.grow(len)).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.fail(format!("ERR the shard's stream failed: {error}"))),
        }
    }

    /// Waits for a line, and gives its length with its end. One that is an error is taken, and is
    /// a failure.
    async fn line(&mut self) -> Result<usize, Failure> {
        let mut searched = 0;
        loop {
            let unread = self.unread();
            if let Some(end) = unread[searched..].iter().position(|&byte| byte == b'\n') {
                let len = searched + end + 1;
                let Some(error) = unread[..len].strip_prefix(b"-") else {
                    return Ok(len);
                };
                let error = String::from_utf8_lossy(error.trim_ascii_end()).into_owned();
                self.consume(len);
                return Err(error);
            }
            searched = unread.len();
            if searched > MAX_LINE {
                return Err(self.give_up());
            }
            self.more().await?;
        }
    }

    /// Takes a line that says nothing but that it is no error.
    pub(crate) async fn status(&mut self) -> Result<(), Failure> {
        let len = self.line().await?;
        self.consume(len);
        Ok(())
    }

    /// Takes a line that is a letter and a number.
    pub(crate) async fn number(&mut self, letter: u8) -> Result<i64, Failure> {
        let len = self.line().await?;
        let number = number_in(&self.unread()[..len]).filter(|_| self.unread()[0] == letter);
        self.consume(len);
        number.ok_or_else(|| self.give_up())
    }

    /// The shard said what it should not. Nothing behind that can be understood.
    fn give_up(&mut self) -> Failure {
        self.fail("ERR the shard's reply makes no sense".into())
    }

    /// Appends the next reply, whatever it is.
    pub(crate) async fn copy_reply(&mut self, output: &mut Replies) -> Result<(), Failure> {
        let mut left: usize = 1;
        while left > 0 {
            left -= 1;
            let len = self.line().await?;
            let line = &self.unread()[..len];
            // The length of nothing is -1.
            let count = match line[0] {
                b'$' | b'*' => number_in(line).map(|count| usize::try_from(count).ok()),
                _ => Some(None),
            };
            let letter = line[0];
            match count {
                // Shards say it among themselves as in version 2.
                Some(None) if matches!(letter, b'$' | b'*') => reply::null(output),
                _ => output.extend_from_slice(line),
            }
            self.consume(len);
            match (letter, count.ok_or_else(|| self.give_up())?) {
                (b'$', Some(count)) => self.copy(output, count.saturating_add(2)).await?,
                (b'*', Some(count)) => left = left.saturating_add(count),
                _ => {}
            }
        }
        Ok(())
    }

    /// Appends so many bytes.
    pub(crate) async fn copy(&mut self, output: &mut Replies, len: usize) -> Result<(), Failure> {
        let unread = self.unread();
        let here = len.min(unread.len());
        output.extend_from_slice(&unread[..here]);
        self.consume(here);
        if here < len { self.read_onto(output, len - here).await } else { Ok(()) }
    }
}

/// The number behind the letter that a line starts with.
fn number_in(line: &[u8]) -> Option<i64> {
    integer(line.get(1..)?.strip_suffix(b"\r\n")?)
}

#[cfg(test)]
mod tests {
    use futures_lite::future::block_on;

    use super::*;

    fn of_here(replies: &[u8]) -> ReplyStream {
        let mut made_here = Replies::new();
        made_here.extend_from_slice(replies);
        ReplyStream { made_here, ..ReplyStream::default() }
    }

    #[test]
    fn replies_are_taken_one_by_one() {
        let all = [
            &b"+OK\r\n"[..],
            b":-7\r\n",
            b"$5\r\na\r\nb\n\r\n",
            b"$-1\r\n",
            b"*3\r\n$1\r\nx\r\n*2\r\n:1\r\n*0\r\n$0\r\n\r\n",
        ];
        let mut reply_stream = of_here(&all.concat());
        for expected in all {
            let mut reply = Replies::new();
            block_on(reply_stream.copy_reply(&mut reply)).unwrap();
            assert_eq!(reply.bytes(), expected);
        }
        assert!(
            block_on(reply_stream.copy_reply(&mut Replies::new())).is_err(),
            "there is no more"
        );
    }

    #[test]
    fn an_error_is_a_failure_and_the_next_reply_is_the_next() {
        let mut reply_stream = of_here(b"-ERR no\r\n:3\r\n-ERR never\r\n+OK\r\n");
        let failure = block_on(reply_stream.copy_reply(&mut Replies::new())).unwrap_err();
        assert_eq!(failure, "ERR no");
        assert_eq!(block_on(reply_stream.number(b':')), Ok(3));
        assert_eq!(block_on(reply_stream.status()), Err("ERR never".into()));
        assert_eq!(block_on(reply_stream.status()), Ok(()));
    }

    #[test]
    fn what_makes_no_sense_ends_the_link() {
        for reply in [&b"$x\r\n"[..], b"*\r\n", b"$1\n"] {
            let mut reply_stream = of_here(reply);
            assert!(block_on(reply_stream.copy_reply(&mut Replies::new())).is_err());
            assert!(reply_stream.has_failed(), "{}", reply.escape_ascii());
        }
        let mut reply_stream = of_here(b"+OK\r\n");
        assert!(block_on(reply_stream.number(b':')).is_err() && reply_stream.has_failed());
    }
}
