//! A connection's bytes, in plain or in TLS, behind one type.

use std::{
    cell::Ref,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::SystemTime,
};

use bytes::{Buf, Bytes};
use futures::FutureExt;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, Interest, ReadBuf, Ready},
    net::TcpStream,
};
use tokio_rustls::{client, server};

use super::{load::Opened, progress::Progress, socket::Socket};
use crate::tls::not_after;

pub(super) struct Stream {
    transport: Transport,
    /// Read from the transport already, and not yet by the reader.
    prefix: Bytes,
    /// Of a connection to an upstream: it counts as long as it is open.
    _opened: Option<Opened>,
}

enum Transport {
    Plain(Socket),
    Server(Box<server::TlsStream<Socket>>),
    Client(Box<client::TlsStream<Socket>>),
}

/// RFC 9113, 3.4.
pub(super) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

impl Stream {
    pub(super) fn plain(stream: TcpStream) -> Self {
        Self { transport: Transport::Plain(Socket::new(stream)), prefix: Bytes::new(), _opened: None }
    }

    pub(super) fn server(stream: server::TlsStream<Socket>) -> Self {
        Self { transport: Transport::Server(Box::new(stream)), prefix: Bytes::new(), _opened: None }
    }

    /// To an upstream, in plain.
    pub(super) fn plain_client(stream: TcpStream, opened: Opened) -> Self {
        Self { _opened: Some(opened), ..Self::plain(stream) }
    }

    /// To an upstream, in TLS.
    pub(super) fn client(stream: client::TlsStream<Socket>, opened: Opened) -> Self {
        Self { transport: Transport::Client(Box::new(stream)), prefix: Bytes::new(), _opened: Some(opened) }
    }

    /// Gives back what was read too far, for the next reader.
    pub(super) fn unread(&mut self, bytes: Bytes) {
        self.prefix = bytes;
    }

    pub(super) fn is_tls(&self) -> bool {
        match self.transport {
            Transport::Plain(_) => false,
            Transport::Server(_) | Transport::Client(_) => true,
        }
    }

    /// Waits, without a buffer, until a read may have something to say. Only to be asked when the last one had nothing:
    /// TLS may hold what the socket no longer has.
    pub(super) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.prefix.has_remaining() {
            return Poll::Ready(Ok(()));
        }
        self.tcp().poll_read_ready(cx)
    }

    /// Whether the other side has ended it, even if there is something to be read before the end. Costs no system call: it is what
    /// the runtime has noted when it last looked.
    pub(super) fn has_ended(&self) -> bool {
        let tcp = self.tcp();
        let noted = tcp.ready(Interest::READABLE).now_or_never();
        noted.is_some_and(|noted| noted.is_ok_and(Ready::is_read_closed))
    }

    /// The protocol agreed in the TLS handshake.
    pub(super) fn alpn(&self) -> Option<&[u8]> {
        match &self.transport {
            Transport::Plain(_) => None,
            Transport::Server(stream) => stream.get_ref().1.alpn_protocol(),
            Transport::Client(stream) => stream.get_ref().1.alpn_protocol(),
        }
    }

    /// When the certificate ends by which the other side was believed.
    pub(super) fn peer_ends(&self) -> Option<SystemTime> {
        let certificates = match &self.transport {
            Transport::Plain(_) => None,
            Transport::Server(stream) => stream.get_ref().1.peer_certificates(),
            Transport::Client(stream) => stream.get_ref().1.peer_certificates(),
        };
        certificates.and_then(<[_]>::first).and_then(not_after)
    }

    fn socket(&self) -> &Socket {
        match &self.transport {
            Transport::Plain(socket) => socket,
            Transport::Server(stream) => stream.get_ref().0,
            Transport::Client(stream) => stream.get_ref().0,
        }
    }

    fn tcp(&self) -> Ref<'_, TcpStream> {
        self.socket().tcp()
    }

    /// Waits until the other side has all that was written, or cannot get it any more, or `progress` is idle.
    pub(super) async fn arrived(&self, progress: &Progress) {
        self.socket().arrived(progress).await;
    }

    /// Whether the other side sees a reset when it is closed, also by the end of this process, or an end in order.
    pub(super) fn reset_when_closed(&self, reset: bool) {
        self.socket().reset_when_closed(reset);
    }

    /// Whether the client starts with the HTTP/2 preface. What was read to find out is read again by the next reader.
    ///
    /// # Errors
    /// When the client closed before that, or reading fails.
    pub(super) async fn starts_http2(&mut self) -> io::Result<bool> {
        let (http2, seen) = starts_http2(self).await?;
        self.unread(seen);
        Ok(http2)
    }
}

/// Whether somebody starts with the HTTP/2 preface, and what was read to find out. Decides at the first byte that differs, so
/// that HTTP/1 never waits for 24 bytes.
pub(super) async fn starts_http2(from: &mut (impl AsyncRead + Unpin)) -> io::Result<(bool, Bytes)> {
    let mut seen = [0; PREFACE.len()];
    let mut length = 0;
    while length < seen.len() && seen[..length] == PREFACE[..length] {
        let read = from.read(&mut seen[length..]).await?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        length += read;
    }
    Ok((seen == *PREFACE, Bytes::copy_from_slice(&seen[..length])))
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.prefix.has_remaining() {
            let length = this.prefix.len().min(buf.remaining());
            buf.put_slice(&this.prefix.split_to(length));
            return Poll::Ready(Ok(()));
        }
        match &mut this.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Transport::Server(stream) => Pin::new(stream.as_mut()).poll_read(cx, buf),
            Transport::Client(stream) => Pin::new(stream.as_mut()).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Transport::Server(stream) => Pin::new(stream.as_mut()).poll_write(cx, buf),
            Transport::Client(stream) => Pin::new(stream.as_mut()).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Transport::Server(stream) => Pin::new(stream.as_mut()).poll_write_vectored(cx, bufs),
            Transport::Client(stream) => Pin::new(stream.as_mut()).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.transport {
            Transport::Plain(stream) => stream.is_write_vectored(),
            Transport::Server(stream) => stream.is_write_vectored(),
            Transport::Client(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Transport::Server(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
            Transport::Client(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Transport::Server(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
            Transport::Client(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
        }
    }
}
