//! HTTP/2, spoken by `h2`: towards clients (`server`) and towards upstreams (`client`). A connection has a task that reads and
//! writes frames, and each stream of a client one that does all the rest: it passes the request on, waits for its answer and sends it
//! back. So whoever gives up drops what it holds, and the stream is reset, here and behind us.

mod batch;
mod body;
pub(super) mod client;
pub(super) mod server;
mod written;

pub(super) use self::body::Incoming;
use super::body::BodyError;

/// A stream that nobody reads must not fill the connection's window and stall the others (RFC 9113, 5.2): 16 can.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 16 * STREAM_WINDOW;
/// Most bytes of one stream that wait to be written, towards clients and upstreams. The windows that the other side grants may be any
/// size, and 400 KiB for each stream, which is h2's default, would be 100 MiB for one connection that reads nothing.
const SEND_BUFFER: usize = 64 * 1024;
/// Most bytes of the headers of one message, as HPACK counts them (RFC 9113, 10.5.1).
const MAX_HEADERS: u32 = 16 * 1024;

#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(transparent)]
    Stream(#[from] h2::Error),
    #[error("the request's body could not be read: {0}")]
    Client(#[source] Box<BodyError>),
}
