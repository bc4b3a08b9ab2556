//! Frames of HTTP/2 as they are on the wire, for clients that send what no library would.

use bytes::{BufMut, Bytes};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use crate::support::Proxy;

/// Kinds of frames (RFC 9113, 6).
pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;
/// The largest window, and number of a stream (RFC 9113, 6.9.1 and 5.1.1).
pub(crate) const LARGEST: u32 = 0x7fff_ffff;
/// `:method: POST`, `:scheme: http`, `:path: /`, `:authority: a`, as HPACK's static table has them.
pub(crate) const POST: &[u8] = b"\x83\x86\x84\x41\x01a";
/// The same with GET.
pub(crate) const GET: &[u8] = b"\x82\x86\x84\x41\x01a";

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Bytes {
    let mut bytes = Vec::with_capacity(9 + payload.len());
    bytes.put_uint(payload.len() as u64, 3);
    bytes.put_slice(&[kind, flags]);
    bytes.put_u32(stream);
    bytes.put_slice(payload);
    bytes.into()
}

/// A client that sends what it likes.
pub(crate) async fn connect(proxy: &Proxy) -> (OwnedReadHalf, OwnedWriteHalf) {
    let stream = TcpStream::connect(proxy.address).await.unwrap();
    let (read, mut write) = stream.into_split();
    write.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    write.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
    (read, write)
}

/// A frame as it came.
#[derive(Debug, PartialEq)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

impl Frame {
    /// `None` at the end of the connection.
    pub(crate) async fn read(from: &mut OwnedReadHalf) -> Option<Self> {
        let mut head = [0; 9];
        from.read_exact(&mut head).await.ok()?;
        let mut payload = vec![0; usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])];
        from.read_exact(&mut payload).await.ok()?;
        let stream = u32::from_be_bytes(head[5..].try_into().unwrap());
        Some(Self { kind: head[3], flags: head[4], stream, payload })
    }

    /// The number at this place of its payload.
    pub(crate) fn code(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.payload[at..at + 4].try_into().unwrap())
    }

    /// The stream that it resets, and why.
    pub(crate) fn reset(&self) -> Option<(u32, u32)> {
        (self.kind == RST_STREAM).then(|| (self.stream, self.code(0)))
    }

    /// The error that it ends the connection with.
    pub(crate) fn go_away(&self) -> Option<u32> {
        (self.kind == GOAWAY).then(|| self.code(4))
    }
}
