// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who is at the other end of a socket.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, GetSockOpt, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType,
    SockaddrStorage, getpeername, getsockname, sockopt,
};

use shmipc_core::config::AllowedPeers;
use shmipc_core::error::{Error, HandshakeError};

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
    /// (`CONFIG_INET_DIAG`) and the socket is still open and connected; of a server that has not
    /// accepted yet, the one whose listening socket it is.
    ///
    /// In a user namespace that maps only some users, all others appear as the overflow user
    /// (65534 unless `/proc/sys/kernel/overflowuid` says otherwise). That number stands for nobody
    /// in particular there, and is `None` here, as is the overflow group.
    pub uid: Option<u32>,
    /// The effective group. Not known over TCP.
    pub gid: Option<u32>,
    /// The process, if it can be seen from here. Not known over TCP.
    pub pid: Option<u32>,
}

impl PeerCredentials {
    /// Asks the kernel about a connected socket.
    pub(crate) fn of(socket: BorrowedFd<'_>, is_tcp: bool) -> Result<Self, Error> {
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
            // As long as this end is connected, its two addresses belong to this connection. A
            // reset frees them for a socket of another user, so the answer counts only if this end
            // was still connected after it.
            let is_connected = getpeername::<SockaddrStorage>(raw).is_ok();
            let uid = uid.filter(|_| is_connected).and_then(|uid| known(uid, IdKind::User));
            return Ok(Self { uid, ..Self::default() });
        }
        let found = sockopt::PeerCredentials.get(&socket).map_err(failed)?;
        let pid = u32::try_from(found.pid()).ok().filter(|&pid| pid != 0);
        let (uid, gid) = (known(found.uid(), IdKind::User), known(found.gid(), IdKind::Group));
        Ok(Self { uid, gid, pid })
    }

    /// Whether a peer like this, `"client"` or `"server"`, may be spoken to at all.
    pub(crate) fn check(
        &self,
        allowed: &AllowedPeers,
        peer: &'static str,
    ) -> Result<(), HandshakeError> {
        allowed.check(self.uid, peer)
    }
}

impl PeerCredentials {
    /// Whether files that the peer names can be told to be its own, or nobody's could be.
    pub(crate) fn check_may_name_files(&self, is_tcp: bool) -> Result<(), HandshakeError> {
        if self.uid.is_some() || (is_tcp && !tells_owners_of_tcp()) {
            return Ok(());
        }
        Err(HandshakeError::UnknownOwner)
    }
}

/// Whether this kernel tells who owns a TCP socket. Asked about a socket of this process, so that
/// no peer has a say in it.
fn tells_owners_of_tcp() -> bool {
    static TELLS: OnceLock<bool> = OnceLock::new();
    if let Some(&tells) = TELLS.get() {
        return tells;
    }
    let ask = || {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        find_tcp(listener.local_addr()?, (Ipv4Addr::UNSPECIFIED, 0).into())
    };
    let tells = match ask() {
        Ok(found) => found.is_some(),
        // It may tell another time.
        Err(error) if is_out_of_room(&error) => return true,
        Err(_) => false,
    };
    *TELLS.get_or_init(|| tells)
}

/// Whether something was not made since there was no descriptor or memory for it.
fn is_out_of_room(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS))
}

fn internet(address: &SockaddrStorage) -> Option<SocketAddr> {
    let four = address.as_sockaddr_in().map(|&address| SocketAddr::V4(address.into()));
    four.or_else(|| address.as_sockaddr_in6().map(|&address| SocketAddr::V6(address.into())))
}

/// What kind of number a user namespace maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum IdKind {
    User,
    Group,
}

/// The number of a user or group, unless it is the one that stands for all that are not mapped.
fn known(id: u32, kind: IdKind) -> Option<u32> {
    static USER: OnceLock<u32> = OnceLock::new();
    static GROUP: OnceLock<u32> = OnceLock::new();
    let (overflow, setting, map) = match kind {
        IdKind::User => (&USER, "/proc/sys/kernel/overflowuid", "/proc/self/uid_map"),
        IdKind::Group => (&GROUP, "/proc/sys/kernel/overflowgid", "/proc/self/gid_map"),
    };
    let overflow = *overflow.get_or_init(|| overflow_id(&read_to_string(setting)));
    if id != overflow {
        return Some(id);
    }
    // Read anew each time: a process may have entered a namespace since, and it is read for peers
    // with this one number only.
    (!stands_for_others(id, overflow, &read_to_string(map))).then_some(id)
}

/// The text of a file of /proc, which is in memory; empty when it cannot be read.
fn read_to_string(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// The number in a setting of the kernel, or the kernel's default.
fn overflow_id(setting: &str) -> u32 {
    const DEFAULT: u32 = 65534;
    setting.trim().parse().unwrap_or(DEFAULT)
}

/// Whether `id` may be any of the users that a namespace with this map does not map.
fn stands_for_others(id: u32, overflow: u32, map: &str) -> bool {
    let numbers = map.split_ascii_whitespace().map(str::parse);
    let maps_everybody = numbers.eq([Ok(0), Ok(0), Ok(u32::MAX)]);
    id == overflow && !maps_everybody
}

/// Lengths and numbers of the kernel's interface (`linux/netlink.h`, `linux/inet_diag.h`).
mod diag {
    pub(crate) const NETLINK_HEADER_LEN: usize = 16;
    pub(crate) const REQUEST_LEN: usize = NETLINK_HEADER_LEN + 56;
    /// `SOCK_DIAG_BY_FAMILY`
    pub(crate) const TYPE: u16 = 20;
    /// `NLM_F_REQUEST`
    pub(crate) const FLAGS: u16 = 1;
    pub(crate) const TCP: u8 = 6;
    pub(crate) const ESTABLISHED: u8 = 1;
    pub(crate) const CLOSE_WAIT: u8 = 8;
    pub(crate) const LISTEN: u8 = 10;
    /// Where things stand in an answer, behind the header: family, state and two bytes; the
    /// socket's identity of 48 bytes, which starts with two ports and two addresses; three numbers;
    /// user and inode.
    pub(crate) const FAMILY: usize = NETLINK_HEADER_LEN;
    pub(crate) const STATE: usize = FAMILY + 1;
    pub(crate) const LOCAL_PORT: usize = FAMILY + 4;
    pub(crate) const REMOTE_PORT: usize = LOCAL_PORT + 2;
    pub(crate) const LOCAL_ADDRESS: usize = REMOTE_PORT + 2;
    pub(crate) const REMOTE_ADDRESS: usize = LOCAL_ADDRESS + 16;
    pub(crate) const UID: usize = FAMILY + 4 + 48 + 12;
    pub(crate) const INODE: usize = UID + 4;
}

/// What the kernel says of a TCP socket of this host.
#[derive(Debug, Clone, Copy)]
struct TcpSocket {
    state: u8,
    local: SocketAddr,
    remote: SocketAddr,
    uid: u32,
    /// 0 for a socket that no process has: closed by its owner, or not yet accepted.
    inode: u32,
}

impl TcpSocket {
    fn parse(answer: &[u8]) -> Option<Self> {
        let byte = |at: usize| answer.get(at).copied();
        let number = |at: usize| {
            let bytes = answer.get(at..at + 4)?;
            bytes.try_into().ok().map(u32::from_ne_bytes)
        };
        let address = |port: usize, ip: usize| {
            let port = u16::from_be_bytes(answer.get(port..port + 2)?.try_into().ok()?);
            let ip: [u8; 16] = answer.get(ip..ip + 16)?.try_into().ok()?;
            let ip = if byte(diag::FAMILY)? == AddressFamily::Inet as u8 {
                IpAddr::V4([ip[0], ip[1], ip[2], ip[3]].into())
            } else {
                // A socket of IPv6 may serve addresses of IPv4.
                IpAddr::V6(ip.into()).to_canonical()
            };
            Some(SocketAddr::new(ip, port))
        };
        if answer.get(4..6)? != diag::TYPE.to_ne_bytes() {
            return None;
        }
        Some(Self {
            state: byte(diag::STATE)?,
            local: address(diag::LOCAL_PORT, diag::LOCAL_ADDRESS)?,
            remote: address(diag::REMOTE_PORT, diag::REMOTE_ADDRESS)?,
            uid: number(diag::UID)?,
            inode: number(diag::INODE)?,
        })
    }

    /// Whether a process has it. Of others the kernel says that they are those of user 0.
    fn is_held(&self) -> bool {
        self.inode != 0
    }
}

/// Who owns the socket of this host that is bound to `local` and connected to `remote`. `None`:
/// there is no such socket here any more, or the kernel does not say.
///
/// Only a socket in a live state has an owner. What remains of one that was closed (in `FIN_WAIT2`
/// or `TIME_WAIT`, for instance) belongs to the kernel, which then answers with user 0.
fn owner_of_tcp(local: SocketAddr, remote: SocketAddr) -> io::Result<Option<u32>> {
    let same = |one: SocketAddr, other: SocketAddr| {
        (one.ip().to_canonical(), one.port()) == (other.ip().to_canonical(), other.port())
    };
    let found = find_tcp(local, remote)?;
    // Where there is no such connection the kernel answers with a socket that listens there.
    let Some(found) = found.filter(|it| same(it.local, local) && same(it.remote, remote)) else {
        return Ok(None);
    };
    match found.state {
        diag::ESTABLISHED | diag::CLOSE_WAIT if found.is_held() => Ok(Some(found.uid)),
        // Nobody has accepted it: it is as good as the listener's.
        diag::ESTABLISHED => {
            let anybody = match local {
                SocketAddr::V4(_) => SocketAddr::from(([0; 4], 0)),
                SocketAddr::V6(_) => SocketAddr::from(([0_u16; 8], 0)),
            };
            let listener = find_tcp(local, anybody)?.filter(|it| {
                let ip = it.local.ip();
                it.state == diag::LISTEN
                    && it.is_held()
                    && it.local.port() == local.port()
                    && (ip.is_unspecified() || ip == local.ip().to_canonical())
            });
            Ok(listener.map(|it| it.uid))
        }
        _ => Ok(None),
    }
}

/// Asks the kernel for one socket by its identity, so it takes the same time however many there
/// are.
fn find_tcp(local: SocketAddr, remote: SocketAddr) -> io::Result<Option<TcpSocket>> {
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
    Ok(TcpSocket::parse(&answer[..len]))
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;
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

    /// Both ends of a connection over TCP, the one that connected first.
    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    fn state(local: SocketAddr, remote: SocketAddr) -> Option<u8> {
        find_tcp(local, remote).unwrap().map(|socket| socket.state)
    }

    /// Waits for a state that the kernel reaches by itself.
    fn until(is_so: impl Fn() -> bool) {
        let began = std::time::Instant::now();
        while !is_so() {
            assert!(began.elapsed() < std::time::Duration::from_secs(20));
            std::thread::yield_now();
        }
    }

    /// `linux/tcp_states.h`
    const FIN_WAIT2: u8 = 5;
    const TIME_WAIT: u8 = 6;

    fn tells_owners() -> bool {
        let (client, _server) = connection();
        let ends = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let tells = matches!(owner_of_tcp(ends.0, ends.1), Ok(Some(_)));
        if !tells {
            println!("skipped: this kernel does not tell whose TCP sockets are");
        }
        tells
    }

    #[test]
    fn a_tcp_socket_that_was_closed_has_no_owner() {
        if !tells_owners() {
            return;
        }
        let (client, server) = connection();
        let (at, to) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        drop(client);
        until(|| state(at, to) == Some(FIN_WAIT2));
        assert_eq!(owner_of_tcp(at, to).unwrap(), None, "FIN_WAIT2");
        assert_eq!(PeerCredentials::of(server.as_fd(), true).unwrap().uid, None);
        drop(server);
        until(|| state(at, to) == Some(TIME_WAIT));
        assert_eq!(owner_of_tcp(at, to).unwrap(), None, "TIME_WAIT");
    }

    #[test]
    fn a_tcp_peer_that_sends_nothing_more_is_not_live() {
        if !tells_owners() {
            return;
        }
        let (client, server) = connection();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let (at, to) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        until(|| state(at, to) == Some(FIN_WAIT2));
        assert_eq!(PeerCredentials::of(server.as_fd(), true).unwrap().uid, None);
        // The other way round it only has not closed yet.
        let me = nix::unistd::geteuid().as_raw();
        assert_eq!(PeerCredentials::of(client.as_fd(), true).unwrap().uid, Some(me));
    }

    #[test]
    fn a_tcp_peer_that_reset_the_connection_is_nobody() {
        let (client, server) = connection();
        let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
        nix::sys::socket::setsockopt(&client, sockopt::Linger, &linger).unwrap();
        drop(client);
        until(|| getpeername::<SockaddrStorage>(server.as_raw_fd()).is_err());
        let peer = PeerCredentials::of(server.as_fd(), true);
        assert!(!peer.is_ok_and(|peer| peer.uid.is_some()));
    }

    #[test]
    fn a_tcp_server_that_has_not_accepted_yet_is_known_by_its_listener() {
        if !tells_owners() {
            return;
        }
        let me = nix::unistd::geteuid().as_raw();
        for address in ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let mut at = listener.local_addr().unwrap();
            if at.ip().is_unspecified() {
                at.set_ip(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));
            }
            let client = TcpStream::connect(at).unwrap();
            let (here, there) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
            let found = find_tcp(there, here).unwrap().unwrap();
            assert!(!found.is_held(), "{address}");
            assert_eq!(owner_of_tcp(there, here).unwrap(), Some(me), "{address}");
            drop(listener);
            // Reset by the kernel, since nobody will accept it any more.
            until(|| getpeername::<SockaddrStorage>(client.as_raw_fd()).is_err());
            assert_eq!(owner_of_tcp(there, here).unwrap(), None, "{address}");
        }
    }

    #[test]
    fn one_that_only_listens_at_the_address_of_a_peer_that_has_gone_is_not_the_peer() {
        if !tells_owners() {
            return;
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let elsewhere = "127.0.0.1:9".parse().unwrap();
        // The kernel answers, with the listening socket.
        assert_eq!(state(at, elsewhere), Some(diag::LISTEN));
        assert_eq!(owner_of_tcp(at, elsewhere).unwrap(), None);
    }

    #[test]
    fn the_overflow_user_is_somebody_only_where_all_users_are_mapped() {
        let everybody = "         0          0 4294967295\n";
        assert!(!stands_for_others(65534, 65534, everybody));
        let maps = [
            "",
            "         0     100000      65536\n",
            "         0       1000          1\n",
            "     65534      65534          1\n",
            "         0          1 4294967295\n",
            "         0          0      65536\n     65536      65536 4294901759\n",
        ];
        for map in maps {
            assert!(stands_for_others(65534, 65534, map), "{map}");
            assert!(stands_for_others(4321, 4321, map), "another setting: {map}");
            assert!(!stands_for_others(65534, 4321, map), "{map}");
            assert!(!stands_for_others(0, 65534, map), "{map}");
        }
        assert_eq!(overflow_id("4321\n"), 4321);
        assert_eq!(overflow_id(""), 65534);
        assert_eq!(known(7, IdKind::User), Some(7));
    }

    #[test]
    fn lists_are_kept_to() {
        let me = nix::unistd::geteuid().as_raw();
        let of = |uid| PeerCredentials { uid, ..PeerCredentials::default() };
        let allowed = |uid, by: AllowedPeers| of(uid).check(&by, "client").is_ok();
        assert!(allowed(Some(me), AllowedPeers::SameUser));
        assert!(!allowed(Some(me + 1), AllowedPeers::SameUser));
        assert!(!allowed(None, AllowedPeers::SameUser));
        let some = || AllowedPeers::Users(vec![me + 1, me + 2]);
        assert!(allowed(Some(me + 2), some()));
        assert!(!allowed(Some(me), some()) && !allowed(None, some()));
        assert!(allowed(None, AllowedPeers::Any));
        let error = of(Some(7)).check(&AllowedPeers::Users(Vec::new()), "client").unwrap_err();
        assert!(matches!(error, HandshakeError::PeerNotAllowed { uid: Some(7), .. }));
    }

    #[test]
    fn a_refusal_says_whose_setting_it_is_and_whom_that_allows() {
        let seven = PeerCredentials { uid: Some(7), ..PeerCredentials::default() };
        let text = |allowed, peer| seven.check(&allowed, peer).unwrap_err().to_string();
        let users = AllowedPeers::Users(vec![1000, 1001]);
        assert_eq!(
            text(users, "server"),
            "the server is user 7, and `allowed_peers` of this connector allows users 1000, 1001 \
             only"
        );
        let same = text(AllowedPeers::SameUser, "client");
        let me = nix::unistd::geteuid();
        assert_eq!(
            same,
            format!(
                "the client is user 7, and `allowed_peers` of this listener allows the user of \
                 this process, {me}, only"
            )
        );
    }
}
