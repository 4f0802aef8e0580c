// SPDX-License-Identifier: MIT OR Apache-2.0
//! A TCP address that several listeners share.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, getsockname, setsockopt, socket,
    sockopt,
};

/// Keeps an address for the listeners of this process. It does not listen itself.
#[derive(Debug)]
pub(crate) struct ReservedAddress {
    address: SocketAddr,
    _socket: OwnedFd,
}

impl ReservedAddress {
    /// Takes the first of these addresses that can be had.
    pub(crate) fn first_of(addresses: &[SocketAddr]) -> io::Result<Self> {
        let mut failure = io::Error::new(io::ErrorKind::NotFound, "no address to listen at");
        for &address in addresses {
            match Self::new(address) {
                Ok(reserved) => return Ok(reserved),
                Err(error) => {
                    let text = format!("listen on tcp {address}: {error}");
                    failure = io::Error::new(error.kind(), text);
                }
            }
        }
        Err(failure)
    }

    /// Takes an address, and a port that is free when it has none.
    fn new(address: SocketAddr) -> io::Result<Self> {
        let family = match address {
            SocketAddr::V4(_) => AddressFamily::Inet,
            SocketAddr::V6(_) => AddressFamily::Inet6,
        };
        let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&socket, sockopt::ReusePort, &true)?;
        bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
        let address = local_address(&socket)?;
        Ok(Self { address, _socket: socket })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

fn local_address(socket: &OwnedFd) -> io::Result<SocketAddr> {
    let name: SockaddrStorage = getsockname(socket.as_raw_fd())?;
    let v4 = name.as_sockaddr_in().map(|&name| SocketAddr::V4(name.into()));
    let v6 = name.as_sockaddr_in6().map(|&name| SocketAddr::V6(name.into()));
    v4.or(v6).ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
}
