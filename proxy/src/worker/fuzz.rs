//! What holds for the first bytes of a connection, by which its protocol and its filter chain are chosen.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::VecDeque,
    future::Future,
    io,
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

pub(crate) use super::http1::fuzz::{answer, request};
use super::{
    connection,
    serving::{Chain, Protocol, Serving},
    stream::{PREFACE, starts_http2},
};
use crate::{
    fuzz::{assert_same, cuts},
    snapshot::{Listener, ServerTls},
    tls::{ALPN_H2, ALPN_HTTP1, IdentityHandle},
};

/// A client that sends these pieces and closes.
struct Pieces<'a>(VecDeque<&'a [u8]>);

impl AsyncRead for Pieces<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(piece) = self.0.front_mut() {
            let (now, later) = piece.split_at(piece.len().min(buf.remaining()));
            buf.put_slice(now);
            *piece = later;
            if later.is_empty() {
                self.0.pop_front();
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pieces<'_> {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Nothing waits for anything.
fn now<T>(work: impl Future<Output = T>) -> T {
    match pin!(work).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(done) => done,
        Poll::Pending => panic!("it waits for more than its client"),
    }
}

/// Bytes of a client whose protocol is not known yet.
pub(crate) fn hello(bytes: &[u8]) {
    let whole = [vec![bytes]].into_iter().chain(cuts(bytes));
    let all: Vec<VecDeque<&[u8]>> =
        whole.map(|pieces| pieces.into_iter().filter(|it| !it.is_empty()).collect()).collect();
    for pieces in &all {
        preface(bytes, pieces.clone());
    }
    let serving = serving();
    let first = chosen(&serving, all[0].clone());
    for pieces in &all[1..] {
        assert_same(&chosen(&serving, pieces.clone()), &first, "cut into pieces");
    }
    if let Ok(chosen) = first {
        assert_same(&server_name(bytes), &Some(chosen), "the server name");
    }
}

fn preface(bytes: &[u8], pieces: VecDeque<&[u8]>) {
    let mut client = Pieces(pieces);
    let read = now(starts_http2(&mut client));
    if bytes.len() < PREFACE.len() && PREFACE.starts_with(bytes) {
        assert!(read.is_err(), "it ends before it can be told");
        return;
    }
    let (http2, seen) = read.expect("it can be told");
    assert_eq!(http2, bytes.starts_with(PREFACE));
    let rest: Vec<u8> = client.0.iter().flat_map(|piece| piece.iter().copied()).collect();
    assert_same(&[&seen, rest.as_slice()].concat()[..], bytes, "no byte is lost");
}

/// The server name of the chain that a client gets, with the rest of its handshake begun.
fn chosen(serving: &Serving, pieces: VecDeque<&[u8]>) -> Result<String, String> {
    let client = Pieces(pieces);
    let (chain, config, hello) = now(connection::hello(serving, client)).map_err(|error| error.to_string())?;
    assert!(now(hello.into_stream(config)).is_err(), "it has no certificate of ours");
    Ok(chain.server_name.clone().expect("every chain has one"))
}

fn serving() -> Serving {
    let identity = IdentityHandle::default();
    let chain = |server_name: &str| {
        let tls = ServerTls { client_id: "spiffe://cluster.local/ns/sluice-system/sa/sluice-fleet".to_owned() };
        let config = identity.server_config(&tls.client_id, &[ALPN_H2, ALPN_HTTP1]);
        let protocol = Protocol::Http(Vec::new());
        Rc::new(Chain { server_name: Some(server_name.to_owned()), tls: Some((tls, config)), protocol, idle: None })
    };
    let listener = Listener {
        name: "inbound".to_owned(),
        address: ([127, 0, 0, 1], 20443).into(),
        chains: Vec::new(),
        max_connections: None,
    };
    Serving { listener: Arc::new(listener), chains: vec![chain("p8080.abc"), chain("p8081.abc")] }
}

/// The server name in a `ClientHello` (RFC 8446, 4.1.2; RFC 6066, 3), read by nothing that the proxy uses.
fn server_name(bytes: &[u8]) -> Option<String> {
    fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
        rest.split_off(..length)
    }
    /// A length of so many bytes, and what it is the length of.
    fn sized<'a>(rest: &mut &'a [u8], digits: usize) -> Option<&'a [u8]> {
        let length = take(rest, digits)?.iter().fold(0, |length, digit| length << 8 | usize::from(*digit));
        take(rest, length)
    }
    // Handshake messages go over records as they like.
    let (mut rest, mut handshake) = (bytes, Vec::new());
    while let Some([22, _, _]) = take(&mut rest, 3) {
        let Some(record) = sized(&mut rest, 2) else { break };
        handshake.extend_from_slice(record);
    }
    let mut rest = handshake.as_slice();
    take(&mut rest, 1).filter(|kind| *kind == [1])?;
    let mut hello = sized(&mut rest, 3)?;
    take(&mut hello, 2 + 32)?;
    sized(&mut hello, 1)?;
    sized(&mut hello, 2)?;
    sized(&mut hello, 1)?;
    let mut extensions = sized(&mut hello, 2)?;
    while !extensions.is_empty() {
        let kind = take(&mut extensions, 2)?;
        let mut extension = sized(&mut extensions, 2)?;
        if kind == [0, 0] {
            let mut names = sized(&mut extension, 2)?;
            take(&mut names, 1).filter(|kind| *kind == [0])?;
            let name = sized(&mut names, 2)?;
            return Some(String::from_utf8_lossy(name).to_ascii_lowercase());
        }
    }
    None
}
