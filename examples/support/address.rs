// SPDX-License-Identifier: MIT OR Apache-2.0
//! Addresses on the command line: hosts by name or number, Unix sockets by path or abstract name.

use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::str::FromStr;

/// `HOST:PORT` as it was written. IPv6 addresses stand in brackets: `[::1]:80`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HostPort {
    Number(SocketAddr),
    Name(String, u16),
}

impl HostPort {
    /// All addresses of the host, in the order in which they are to be tried.
    ///
    /// Asks the system's resolver, which may ask a server and wait: call it before an executor
    /// starts.
    ///
    /// # Errors
    ///
    /// Nothing is known by that name, or nobody could be asked.
    pub(crate) fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        let (host, port) = match self {
            Self::Number(address) => return Ok(vec![*address]),
            Self::Name(host, port) => (host, *port),
        };
        let named = |error: io::Error| {
            io::Error::new(error.kind(), format!("cannot find the host {host:?}: {error}"))
        };
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for address in (host.as_str(), port).to_socket_addrs().map_err(named)? {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if addresses.is_empty() {
            return Err(named(io::Error::new(io::ErrorKind::NotFound, "it has no address")));
        }
        Ok(addresses)
    }

    /// The same, to listen at the first that can be had. Those of IPv4 come first: a client that
    /// is given a number is given one of these.
    pub(crate) fn resolve_to_listen(&self) -> io::Result<Vec<SocketAddr>> {
        let mut addresses = self.resolve()?;
        addresses.sort_by_key(SocketAddr::is_ipv6);
        Ok(addresses)
    }
}

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Number(address));
        }
        let (host, port) = text.rsplit_once(':').ok_or("expected HOST:PORT")?;
        let port = port.parse().map_err(|_| format!("{port:?} is not a port"))?;
        if host.is_empty() || host.contains([':', '[', ']', '/', ' ']) {
            return Err(format!("{host:?} is not a host (IPv6 addresses: [::1]:{port})"));
        }
        Ok(Self::Name(host.to_owned(), port))
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(address) => address.fmt(formatter),
            Self::Name(host, port) => write!(formatter, "{host}:{port}"),
        }
    }
}

/// Tries one address after the other. Gives the first success, or the last failure.
///
/// # Errors
///
/// That of the last address.
pub(crate) async fn first_of<T>(
    addresses: &[SocketAddr],
    attempt: impl AsyncFn(SocketAddr) -> io::Result<T>,
) -> io::Result<T> {
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "no address to try");
    for &address in addresses {
        match attempt(address).await {
            Ok(found) => return Ok(found),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_numbers_or_names_with_a_port() {
        let number = |text: &str| HostPort::Number(text.parse().unwrap());
        let name = |host: &str, port| HostPort::Name(host.to_owned(), port);
        for (text, expected) in [
            ("127.0.0.1:80", number("127.0.0.1:80")),
            ("[::1]:80", number("[::1]:80")),
            ("localhost:8099", name("localhost", 8099)),
            ("a.b-c.example:0", name("a.b-c.example", 0)),
        ] {
            assert_eq!(text.parse(), Ok(expected.clone()));
            assert_eq!(expected.to_string(), text);
        }
        for wrong in ["", "localhost", ":80", "localhost:", "localhost:x", "localhost:65536"] {
            assert!(wrong.parse::<HostPort>().is_err(), "{wrong}");
        }
        for wrong in ["::1:80", "[::1:80", "[localhost]:80", "a b:80", "http://a:80"] {
            assert!(wrong.parse::<HostPort>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_known_everywhere_is_found_and_a_name_for_nothing_is_named() {
        let found = "localhost:80".parse::<HostPort>().unwrap().resolve_to_listen().unwrap();
        assert!(found.iter().all(|address| address.ip().is_loopback() && address.port() == 80));
        // `.invalid` is kept free for this (RFC 2606).
        let error = "nowhere.invalid:80".parse::<HostPort>().unwrap().resolve().unwrap_err();
        assert!(error.to_string().contains("\"nowhere.invalid\""), "{error}");
    }
}
