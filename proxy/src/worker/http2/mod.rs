//! HTTP/2, spoken by `h2`: towards clients (`server`) and towards upstreams (`client`). A connection has a task that reads and
//! writes frames, and each stream of a client one that does all the rest: it passes the request on, waits for its answer and sends it
//! back. So whoever gives up drops what it holds, and the stream is reset, here and behind us.

mod batch;
mod body;
pub(super) mod client;
mod quiet;
pub(super) mod server;
mod written;

use std::time::Duration;

pub(super) use self::body::Incoming;
use super::{
    body::BodyError,
    headers::{MAX_HEAD_OF_OURS, Peer},
};

/// What is on its way to us unread, of one stream.
const STREAM_WINDOW: u32 = 256 * 1024;
/// Of a client's connection: 16 of its streams that it does not read hold up its others (RFC 9113, 5.2), and nobody else.
const CLIENT_WINDOW: u32 = 16 * STREAM_WINDOW;
/// Of a connection that the requests of many clients share, between fleet and sidecar or with an application: whoever does not read holds
/// up nobody.
const SHARED_WINDOW: u32 = super::pool::MAX_STREAMS * STREAM_WINDOW;
/// h2 takes each DATA frame for 256 bytes at the least, and ends a connection on which these add up to more than this on top of what is
/// in them, unread. By default that is half the window: a single client that does not read messages of some bytes would end the
/// requests of all that share the connection.
const SHARED_FRAMES: usize = 64 * 1024 * 1024;
/// Streams that we reset, of which frames are still on their way. h2 remembers 50, each for a second, and ends a connection on
/// which it met 1024 frames of those that it has forgotten. Many clients that give up at once, and a process that stands still, are no attack of
/// the other side.
const REMEMBERED: usize = 1024;
const REMEMBERED_FOR: Duration = Duration::from_secs(30);
/// Most bytes of one stream that wait to be written, towards clients and upstreams. The windows that the other side grants may be any
/// size, and 400 KiB for each stream, which is h2's default, would be 100 MiB for one connection that reads nothing.
const SEND_BUFFER: usize = 64 * 1024;
/// Most bytes of the headers of one message, as HPACK counts them (RFC 9113, 10.5.1).
fn max_headers(of: Peer) -> u32 {
    match of {
        Peer::Anybody => 16 * 1024,
        Peer::Ours => MAX_HEAD_OF_OURS,
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(transparent)]
    Stream(#[from] h2::Error),
    #[error("the request's body could not be read: {0}")]
    Client(#[source] Box<BodyError>),
}
