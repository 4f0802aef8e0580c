// SPDX-License-Identifier: MIT OR Apache-2.0
//! The replies of one shard to one client, one after the other.

use futures_lite::AsyncReadExt;
use shmipc_glommio::ReadHalf;

use super::input::Input;
use super::reply::Replies;
use super::resp::integer;

/// The longest line of a shard's reply.
const LINE_AT_MOST: usize = 64 << 10;

/// The text of an error reply: a shard could not be asked, or said no.
pub(crate) type Failure = String;

/// Where the replies of a shard come from: another core, or this one.
#[derive(Default)]
pub(crate) struct Source {
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

impl Source {
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

    /// Makes ready for the next batch. So much memory is kept for it.
    pub(crate) fn forget_made_here(&mut self, kept: usize) {
        self.made_here.clear();
        self.made_here.shrink_to(kept);
        self.used = 0;
    }

    fn unread(&self) -> &[u8] {
        match self.link {
            None => &self.made_here[self.used..],
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
        let start = output.len();
        output.resize(start + len, 0);
        match reader.read_exact(&mut output[start..]).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.fail(format!("ERR the shard's stream failed: {error}"))),
        }
    }

    /// Takes a line without its end. One that is an error is a failure.
    pub(crate) async fn line(&mut self) -> Result<Vec<u8>, Failure> {
        let mut searched = 0;
        loop {
            let unread = self.unread();
            if let Some(end) = unread[searched..].iter().position(|&byte| byte == b'\n') {
                let end = searched + end;
                let line = unread[..end].strip_suffix(b"\r").unwrap_or(&unread[..end]).to_vec();
                self.consume(end + 1);
                return match line.strip_prefix(b"-") {
                    Some(error) => Err(String::from_utf8_lossy(error).into_owned()),
                    None => Ok(line),
                };
            }
            searched = unread.len();
            if searched > LINE_AT_MOST {
                return Err(self.give_up());
            }
            self.more().await?;
        }
    }

    /// Takes a line that is a letter and a number.
    pub(crate) async fn number(&mut self, letter: u8) -> Result<i64, Failure> {
        let line = self.line().await?;
        let number = line.strip_prefix(&[letter]).and_then(integer);
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
            let line = self.line().await?;
            let count = match line.first() {
                Some(b'$' | b'*') => integer(&line[1..]).ok_or_else(|| self.give_up())?,
                _ => 0,
            };
            output.extend_from_slice(&line);
            output.extend_from_slice(b"\r\n");
            // The length of nothing is -1.
            let Ok(count) = usize::try_from(count) else { continue };
            match line[0] {
                b'$' => self.copy(output, count.saturating_add(2)).await?,
                b'*' => left = left.saturating_add(count),
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
