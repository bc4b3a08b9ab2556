//! Listening sockets.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
};

use socket2::{Domain, Protocol, Socket, Type};

/// A non-blocking socket that listens, so many connections waiting at most (the kernel takes `net.core.somaxconn` if that is less).
/// `0.0.0.0` stands for every address of both families, or of IPv4 where there is no IPv6: a Pod may have either or both.
///
/// # Errors
/// When the address is taken or not ours.
pub fn listen(address: SocketAddr, backlog: i32) -> io::Result<TcpListener> {
    listen_with(address, backlog, |_| Ok(()))
}

/// The same, with something done to the socket before it is bound.
///
/// # Errors
/// As [`listen`], and when that cannot be done.
pub fn listen_with(
    address: SocketAddr,
    backlog: i32,
    prepare: impl Fn(&Socket) -> io::Result<()>,
) -> io::Result<TcpListener> {
    let on = |address: SocketAddr| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        prepare(&socket)?;
        socket.bind(&address.into())?;
        socket.listen(backlog)?;
        Ok(TcpListener::from(socket))
    };
    if address.ip() == IpAddr::V4(Ipv4Addr::UNSPECIFIED)
        && let Ok(both) = on((Ipv6Addr::UNSPECIFIED, address.port()).into())
    {
        return Ok(both);
    }
    on(address)
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn every_address_is_listened_on_in_both_families() {
        let everywhere = listen((Ipv4Addr::UNSPECIFIED, 0).into(), 8).unwrap();
        let port = everywhere.local_addr().unwrap().port();
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() {
            TcpStream::connect((Ipv6Addr::LOCALHOST, port)).unwrap();
        }
        let one = listen((Ipv4Addr::LOCALHOST, 0).into(), 8).unwrap();
        assert!(one.local_addr().unwrap().is_ipv4());
        listen(one.local_addr().unwrap(), 8).unwrap_err();
    }
}
