// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who is at the other end of a socket.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sys::socket::{
    AddressFamily, GetSockOpt, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType,
    SockaddrStorage, getpeername, getsockname, sockopt,
};

use crate::config::AllowedPeers;
use crate::error::{Error, HandshakeError};

/// Who is at the other end of a connection, as the kernel says.
///
/// Of a client this was true when it connected, of a server when it began to listen. What a process
/// passes on to others, it answers for.
///
/// ```
/// use shmipc_glommio::{AllowedPeers, Config, Listener};
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-peer-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(move || async move {
/// let config = Config::builder().allowed_peers(AllowedPeers::Any).build()?;
/// let listener = Listener::bind(&path, config)?;
/// // Root, and whoever is in the group of operators.
/// listener.authorize(|peer| peer.uid == Some(0) || peer.gid == Some(1200));
/// # shmipc_glommio::Result::<()>::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PeerCredentials {
    /// The effective user. Over TCP the one whose socket it is, if the kernel tells
    /// (`CONFIG_INET_DIAG`).
    pub uid: Option<u32>,
    /// The effective group. Not known over TCP.
    pub gid: Option<u32>,
    /// The process, if it can be seen from here. Not known over TCP.
    pub pid: Option<u32>,
}

impl PeerCredentials {
    /// Asks the kernel about a connected socket.
    pub(super) fn of(socket: BorrowedFd<'_>, is_tcp: bool) -> Result<Self, Error> {
        let failed = |errno| Error::os("ask who the peer is", errno);
        if is_tcp {
            let raw = socket.as_raw_fd();
            let here = getsockname::<SockaddrStorage>(raw).map_err(failed)?;
            let there = getpeername::<SockaddrStorage>(raw).map_err(failed)?;
            // Not knowing is no error: whether it is needed is decided later.
            let uid = match (internet(&here), internet(&there)) {
                (Some(here), Some(there)) => owner_of_tcp(there, here).ok().flatten(),
                _ => None,
            };
            return Ok(Self { uid, ..Self::default() });
        }
        let found = sockopt::PeerCredentials.get(&socket).map_err(failed)?;
        let pid = u32::try_from(found.pid()).ok().filter(|&pid| pid != 0);
        Ok(Self { uid: Some(found.uid()), gid: Some(found.gid()), pid })
    }

    /// Whether a peer like this may be spoken to at all.
    pub(super) fn check(&self, allowed: &AllowedPeers) -> Result<(), HandshakeError> {
        let is_allowed = match allowed {
            AllowedPeers::Any => true,
            AllowedPeers::SameUser => self.uid == Some(nix::unistd::geteuid().as_raw()),
            AllowedPeers::Users(users) => self.uid.is_some_and(|uid| users.contains(&uid)),
        };
        if is_allowed { Ok(()) } else { Err(HandshakeError::PeerNotAllowed { uid: self.uid }) }
    }
}

fn internet(address: &SockaddrStorage) -> Option<SocketAddr> {
    let four = address.as_sockaddr_in().map(|&address| SocketAddr::V4(address.into()));
    four.or_else(|| address.as_sockaddr_in6().map(|&address| SocketAddr::V6(address.into())))
}

/// Lengths and numbers of the kernel's interface (`linux/netlink.h`, `linux/inet_diag.h`).
mod diag {
    pub(super) const NETLINK_HEADER_LEN: usize = 16;
    pub(super) const REQUEST_LEN: usize = NETLINK_HEADER_LEN + 56;
    /// `SOCK_DIAG_BY_FAMILY`
    pub(super) const TYPE: u16 = 20;
    /// `NLM_F_REQUEST`
    pub(super) const FLAGS: u16 = 1;
    pub(super) const TCP: u8 = 6;
    /// Where the user stands in an answer: behind four bytes, the socket's identity of 48, and
    /// three numbers.
    pub(super) const UID: usize = NETLINK_HEADER_LEN + 4 + 48 + 12;
}

/// Who owns the socket of this host that is bound to `local` and connected to `remote`. `None`:
/// there is no such socket here, or the kernel does not say.
///
/// Asks for one socket by its identity, so it takes the same time however many there are.
fn owner_of_tcp(local: SocketAddr, remote: SocketAddr) -> io::Result<Option<u32>> {
    let mut request = [0; diag::REQUEST_LEN];
    request[..4].copy_from_slice(&(diag::REQUEST_LEN as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&diag::TYPE.to_ne_bytes());
    request[6..8].copy_from_slice(&diag::FLAGS.to_ne_bytes());
    let body = &mut request[diag::NETLINK_HEADER_LEN..];
    let family = if local.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    body[0] = family as u8;
    body[1] = diag::TCP;
    // In any state.
    body[4..8].fill(0xff);
    body[8..10].copy_from_slice(&local.port().to_be_bytes());
    body[10..12].copy_from_slice(&remote.port().to_be_bytes());
    for (at, address) in [(12, local.ip()), (28, remote.ip())] {
        match address {
            IpAddr::V4(address) => body[at..at + 4].copy_from_slice(&address.octets()),
            IpAddr::V6(address) => body[at..at + 16].copy_from_slice(&address.octets()),
        }
    }
    // Known by its addresses, not by the kernel's cookie.
    body[48..56].fill(0xff);
    let socket = nix::sys::socket::socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkSockDiag,
    )?;
    let kernel = NetlinkAddr::new(0, 0);
    let raw = socket.as_raw_fd();
    nix::sys::socket::sendto(raw, &request, &kernel, MsgFlags::empty())?;
    // The kernel answers before sending returns.
    let mut answer = [0; 512];
    let len = nix::sys::socket::recv(raw, &mut answer, MsgFlags::empty())?;
    let answer = &answer[..len];
    let is_answer = answer.get(4..6) == Some(&diag::TYPE.to_ne_bytes());
    let uid = answer.get(diag::UID..diag::UID + 4).filter(|_| is_answer);
    Ok(uid.and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn both_ends_of_a_unix_socket_are_this_process() {
        let (one, other) = UnixStream::pair().unwrap();
        for end in [one, other] {
            let peer = PeerCredentials::of(end.as_fd(), false).unwrap();
            assert_eq!(peer.pid, Some(std::process::id()));
            assert_eq!(peer.uid, Some(nix::unistd::geteuid().as_raw()));
            assert_eq!(peer.gid, Some(nix::unistd::getegid().as_raw()));
        }
    }

    #[test]
    fn the_owner_of_a_connection_on_loopback_is_known() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            // There are machines without the one or the other.
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (server, _) = listener.accept().unwrap();
            for end in [client, server] {
                let peer = PeerCredentials::of(end.as_fd(), true).unwrap();
                // Not told by every kernel, and never told wrong.
                if let Some(uid) = peer.uid {
                    assert_eq!(uid, nix::unistd::geteuid().as_raw());
                }
                assert_eq!((peer.gid, peer.pid), (None, None));
            }
            let (here, there) =
                (listener.local_addr().unwrap(), "127.0.0.1:1".parse::<SocketAddr>().unwrap());
            assert!(!matches!(owner_of_tcp(there, here), Ok(Some(_))), "there is none");
        }
    }

    #[test]
    fn lists_are_kept_to() {
        let me = nix::unistd::geteuid().as_raw();
        let of = |uid| PeerCredentials { uid, ..PeerCredentials::default() };
        let allowed = |uid, by: AllowedPeers| of(uid).check(&by).is_ok();
        assert!(allowed(Some(me), AllowedPeers::SameUser));
        assert!(!allowed(Some(me + 1), AllowedPeers::SameUser));
        assert!(!allowed(None, AllowedPeers::SameUser));
        let some = || AllowedPeers::Users(vec![me + 1, me + 2]);
        assert!(allowed(Some(me + 2), some()));
        assert!(!allowed(Some(me), some()) && !allowed(None, some()));
        assert!(allowed(None, AllowedPeers::Any));
        let error = of(Some(7)).check(&AllowedPeers::Users(Vec::new())).unwrap_err();
        assert_eq!(error, HandshakeError::PeerNotAllowed { uid: Some(7) });
    }
}
