// SPDX-License-Identifier: MIT OR Apache-2.0
//! What one stream may do next (WIRE chapter 5; spec 6.2 and 7.1).
//!
//! A stream is closed as a whole: the event that closes it says that its sender neither sends nor
//! reads any more. The other side reads what arrived, and then the end.

/// The life of a stream, as one side sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamState {
    /// Both sides may send.
    Open,
    /// The peer has closed: what arrived can be read, nothing can be sent.
    ClosedByPeer,
    /// This side has closed: what still arrives is given back unread.
    ClosedHere,
}

/// Where the next bytes of a stream go.
///
/// There is no way back: the two paths are not ordered against each other, so a stream that sent
/// over the socket goes on that way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Path {
    /// Slices, and an event in the IO queue.
    SharedMemory,
    /// FallbackData over the socket.
    Socket,
}

/// What closing a stream asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnClose {
    /// The peer must be told, behind all that was sent on this path.
    Tell(Path),
    /// The peer has closed already, or knows.
    Nothing,
}

/// State and path of one stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StreamLife {
    state: StreamState,
    path: Path,
}

impl StreamLife {
    pub(crate) const fn new() -> Self {
        Self { state: StreamState::Open, path: Path::SharedMemory }
    }

    pub(crate) const fn state(&self) -> StreamState {
        self.state
    }

    pub(crate) const fn path(&self) -> Path {
        self.path
    }

    /// From now on this stream sends over the socket.
    pub(crate) fn fall_back(&mut self) {
        self.path = Path::Socket;
    }

    /// This side closes.
    pub(crate) fn close(&mut self) -> OnClose {
        match std::mem::replace(&mut self.state, StreamState::ClosedHere) {
            StreamState::Open => OnClose::Tell(self.path),
            StreamState::ClosedByPeer | StreamState::ClosedHere => OnClose::Nothing,
        }
    }

    /// The peer has closed.
    pub(crate) fn peer_closed(&mut self) {
        if self.state == StreamState::Open {
            self.state = StreamState::ClosedByPeer;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peer_is_told_once_and_on_the_path_of_the_data() {
        let mut life = StreamLife::new();
        life.fall_back();
        assert_eq!(life.close(), OnClose::Tell(Path::Socket));
        assert_eq!(life.close(), OnClose::Nothing);
        life.peer_closed();
        assert_eq!(life.state(), StreamState::ClosedHere);
    }

    #[test]
    fn a_peer_that_closed_is_not_told() {
        let mut life = StreamLife::new();
        life.peer_closed();
        assert_eq!(life.state(), StreamState::ClosedByPeer);
        assert_eq!(life.close(), OnClose::Nothing);
    }
}
