// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sends every byte back, on any number of sessions and streams, until SIGTERM or SIGINT.
//!
//! `cargo run --release --example echo_server -- --socket /tmp/echo.sock`
//!
//! Everything is told on stderr: where it listens, which peers were refused and why, and one line
//! of JSON for every session that ended.

#[allow(dead_code, reason = "the other examples use the rest")]
#[path = "support/mod.rs"]
mod support;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use futures_lite::future::or;
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use nix::sys::signal::{SigSet, Signal};
use serde_json::json;
use shmipc_glommio::{Config, Listener, Session, Stream};
use support::address;
use support::cli::{self, tell};
use support::{Address, Place};

/// What a stream's buffer starts with, and grows to while reads fill it.
const BUFFER: std::ops::RangeInclusive<usize> = 4 << 10..=256 << 10;
/// How long the last streams of a session, and the last sessions of the server, get to end.
const GRACE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let command = cli::command(
        "echo_server",
        "Sends every byte back, on any number of sessions and streams, until SIGTERM or SIGINT",
    );
    let address = match cli::read(Address::add_to(command), |matches| Ok(Address::take(matches))) {
        Ok(address) => address,
        Err(status) => return status,
    };
    let place = match address.resolve_to_listen() {
        Ok(place) => place,
        Err(error) => return cli::end(Err(error)),
    };
    // Blocked before any other thread starts: threads inherit it, and only the one that waits for
    // signals takes them.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    if let Err(errno) = signals.thread_block() {
        tell(format_args!("cannot block signals: {errno}"));
        return ExitCode::FAILURE;
    }
    let served = async {
        let served = serve(&address, &place, signals).await;
        served.map_err(|error| format!("{address}: {error}"))
    };
    cli::end(support::run(served))
}

async fn serve(address: &Address, place: &Place, signals: SigSet) -> io::Result<()> {
    let listener = match place {
        Place::Unix(path) => Listener::bind_within(path, Config::default(), GRACE).await?,
        Place::Tcp(addresses) => {
            let bind = async |at| Ok(Listener::bind_tcp(at, Config::default())?);
            address::first_of(addresses, bind).await?
        }
    };
    listener.on_rejected(|error| tell(format_args!("refused: {error}")));
    match listener.tcp_address() {
        Some(bound) => tell(format_args!("listening on {bound}")),
        None => tell(format_args!("listening on {address}")),
    }

    let sessions = Rc::new(Sessions::default());
    let stopped = glommio::executor().spawn_blocking(move || signals.wait());
    let stopped = async {
        if let Err(errno) = stopped.await {
            tell(format_args!("cannot wait for signals: {errno}"));
        }
        Ok::<_, io::Error>(())
    };
    let accepting = async {
        loop {
            match listener.accept().await {
                Ok(session) => Sessions::start(&sessions, session),
                Err(error) => return Err(error.into()),
            }
        }
    };
    or(stopped, accepting).await?;
    drop(listener);
    sessions.close().await;
    Ok(())
}

/// The sessions that live.
#[derive(Default)]
struct Sessions {
    number: Cell<u64>,
    open: RefCell<BTreeMap<u64, Session>>,
}

impl Sessions {
    /// Serves a session until it ends.
    fn start(sessions: &Rc<Self>, session: Session) {
        let sessions = Rc::clone(sessions);
        let number = sessions.number.get() + 1;
        sessions.number.set(number);
        sessions.open.borrow_mut().insert(number, session.clone());
        glommio::spawn_local(async move {
            let reason = serve_session(&session).await;
            let line = json!({"event": "session_end", "session": number, "reason": reason});
            let line = support::with_report(line, &session);
            tell(format_args!("{line}"));
            sessions.open.borrow_mut().remove(&number);
        })
        .detach();
    }

    /// Ends all sessions, and waits until their lines are out.
    async fn close(&self) {
        let open: Vec<Session> = self.open.borrow().values().cloned().collect();
        for session in &open {
            // A peer that does not take its last bytes must not keep the others waiting.
            let closed = or(session.close(), async {
                glommio::timer::sleep(GRACE / 4).await;
                Ok(())
            });
            if let Err(error) = closed.await {
                tell(format_args!("session with {:?}: {error}", session.peer()));
            }
        }
        drop(open);
        settle(|| self.open.borrow().is_empty()).await;
    }
}

/// Echoes every stream of a session, and says why it ended.
async fn serve_session(session: &Session) -> String {
    let reason = loop {
        match session.accept().await {
            Ok(stream) => {
                let session = session.clone();
                glommio::spawn_local(async move {
                    let id = stream.id();
                    // What ends the whole session is in the session's line.
                    if let Err(error) = echo(stream).await
                        && session.end_reason().is_none()
                    {
                        tell(format_args!("stream {id}: {error}"));
                    }
                })
                .detach();
            }
            Err(error) => break error,
        }
    };
    settle(|| session.stream_count() == 0).await;
    reason.to_string()
}

/// Waits until something is so, but not for ever.
async fn settle(is_so: impl Fn() -> bool) {
    let pause = Duration::from_millis(1);
    let mut left = GRACE;
    while !is_so() && !left.is_zero() {
        glommio::timer::sleep(pause).await;
        left = left.saturating_sub(pause);
    }
}

/// Sends back what comes, until the peer closes the stream.
async fn echo(mut stream: Stream) -> io::Result<()> {
    let mut buffer = vec![0; *BUFFER.start()];
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..count]).await?;
        if count == buffer.len() && count < *BUFFER.end() {
            buffer.resize(count * 4, 0);
        }
    }
}
