//! As little HTTP/2 (RFC 9113) as a load generator and an upstream need: heads are encoded once, and of heads that come in
//! only the status is read.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use anyhow::{bail, ensure};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{
    job::Protocol,
    message::{self, Answers, BoxStream, Check, Sizes},
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY: u8 = 0x20;
const MAX_FRAME: usize = 16_384;
const DEFAULT_WINDOW: i64 = 65_535;
/// More than a body, so that only the connection's window is ever given back.
const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;

/// A field block (RFC 7541): at first with fields that the decoder puts into its table, later by their numbers in it.
struct Block {
    first: Vec<u8>,
    later: Vec<u8>,
}

/// What one side sends on each stream.
pub(crate) struct Message {
    head: Block,
    body: Vec<u8>,
    trailers: Option<Block>,
}

impl Message {
    pub(crate) fn request(protocol: Protocol, host: &str, sizes: Sizes) -> Self {
        let body = message::body(protocol, "", sizes.request);
        let length = body.len().to_string();
        let mut head = vec![(":scheme", "https"), (":authority", host), ("user-agent", "sluice-bench")];
        if protocol == Protocol::Grpc {
            head.extend([(":method", "POST"), (":path", "/bench.Bench/Ask")]);
            head.extend([("te", "trailers"), ("content-type", "application/grpc"), ("grpc-timeout", "10S")]);
        } else {
            head.extend([(":path", "/cart/items?id=1"), ("accept", "*/*"), ("accept-language", "en")]);
            head.push(("x-request-id", "6f1c4a6e-0f3b-4a56-9d3b-2f9f6b1f7a10"));
            if body.is_empty() {
                head.push((":method", "GET"));
            } else {
                head.extend([(":method", "POST"), ("content-length", &length)]);
            }
        }
        // Pseudo-headers go first (RFC 9113, 8.3).
        head.sort_by_key(|(name, _)| !name.starts_with(':'));
        Self::new(&head, body, &[])
    }

    pub(crate) fn answer(protocol: Protocol, owner: &str, sizes: Sizes) -> Self {
        let body = message::body(protocol, owner, sizes.answer);
        if protocol == Protocol::Grpc {
            let trailers = [("grpc-status", "0"), ("grpc-message", "")];
            Self::new(&[(":status", "200"), ("content-type", "application/grpc")], body, &trailers)
        } else {
            let length = body.len().to_string();
            Self::new(&[(":status", "200"), ("content-type", "text/plain"), ("content-length", &length)], body, &[])
        }
    }

    fn new(head: &[(&str, &str)], body: Vec<u8>, trailers: &[(&str, &str)]) -> Self {
        // The table's newest field has the number 62; the first of our fields is the oldest.
        let newest = 62 + head.len() + trailers.len() - 1;
        let block = |before: usize, fields: &[(&str, &str)]| {
            let mut block = Block { first: Vec::new(), later: Vec::new() };
            for (place, (name, value)) in fields.iter().enumerate() {
                block.first.push(0x40);
                for text in [name, value] {
                    block.first.push(text.len() as u8);
                    block.first.extend_from_slice(text.as_bytes());
                }
                block.later.push(0x80 | (newest - before - place) as u8);
            }
            block
        };
        let trailers = (!trailers.is_empty()).then(|| block(head.len(), trailers));
        Self { head: block(0, head), body, trailers }
    }
}

struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    start: usize,
    end: usize,
}

/// A message that is not sent yet as a whole, or an answer that has not come as a whole.
struct Open {
    stream: u32,
    window: i64,
    sent: usize,
    has_head: bool,
    check: Check,
}

struct Connection<'a> {
    io: BoxStream,
    message: &'a Message,
    has_sent: bool,
    open: Vec<Open>,
    window: i64,
    stream_window: i64,
    received: u32,
    input: Vec<u8>,
    filled: usize,
    output: Vec<u8>,
    written: usize,
}

impl<'a> Connection<'a> {
    fn new(io: BoxStream, message: &'a Message) -> Self {
        Self {
            io,
            message,
            has_sent: false,
            open: Vec::new(),
            window: DEFAULT_WINDOW,
            stream_window: DEFAULT_WINDOW,
            received: 0,
            input: vec![0; 64 << 10],
            filled: 0,
            output: Vec::new(),
            written: 0,
        }
    }

    fn introduce(&mut self) {
        // ENABLE_PUSH 0 is only a client's to say, and 0 is what a server does anyway.
        let mut settings = vec![0, 4];
        settings.extend(STREAM_WINDOW.to_be_bytes());
        self.frame(SETTINGS, 0, 0, &settings);
        self.frame(WINDOW_UPDATE, 0, 0, &(CONNECTION_WINDOW - DEFAULT_WINDOW as u32).to_be_bytes());
    }

    fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        self.output.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
        self.output.extend_from_slice(&[kind, flags]);
        self.output.extend_from_slice(&stream.to_be_bytes());
        self.output.extend_from_slice(payload);
    }

    /// Writes what waits, and reads something.
    async fn turn(&mut self) -> anyhow::Result<()> {
        let read = poll_fn(|cx| self.poll_turn(cx)).await?;
        ensure!(read > 0, "the peer closed an HTTP/2 connection");
        self.filled += read;
        Ok(())
    }

    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        while self.written < self.output.len() {
            match Pin::new(&mut self.io).poll_write(cx, &self.output[self.written..])? {
                Poll::Ready(written) => self.written += written,
                Poll::Pending => break,
            }
        }
        if self.written == self.output.len() {
            self.output.clear();
            self.written = 0;
        }
        let _ = Pin::new(&mut self.io).poll_flush(cx)?;
        let mut buffer = ReadBuf::new(&mut self.input[self.filled..]);
        match Pin::new(&mut self.io).poll_read(cx, &mut buffer)? {
            Poll::Ready(()) => Poll::Ready(Ok(buffer.filled().len())),
            Poll::Pending => Poll::Pending,
        }
    }

    /// Hands every complete frame that has been read to `handle`, besides those of the connection itself.
    fn frames(&mut self, mut handle: impl FnMut(&mut Self, &Frame, &[u8]) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let input = std::mem::take(&mut self.input);
        let mut start = 0;
        while let Some([a, b, c, kind, flags, stream @ ..]) = input[start..self.filled].first_chunk::<9>() {
            let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            ensure!(length <= MAX_FRAME, "a frame of {length} bytes");
            let (body, end) = (start + 9, start + 9 + length);
            if end > self.filled {
                break;
            }
            let stream = u32::from_be_bytes(*stream) & (u32::MAX >> 1);
            let mut frame = Frame { kind: *kind, flags: *flags, stream, start: body, end };
            if frame.kind == DATA || frame.kind == HEADERS {
                if frame.flags & PADDED != 0 {
                    frame.end -= usize::from(input[frame.start]);
                    frame.start += 1;
                }
                if frame.kind == HEADERS && frame.flags & PRIORITY != 0 {
                    frame.start += 5;
                }
                ensure!(frame.kind == DATA || frame.flags & END_HEADERS != 0, "a head of several frames");
                if frame.kind == DATA {
                    self.received += length as u32;
                }
                handle(self, &frame, &input[frame.start..frame.end])?;
            } else {
                self.control(&frame, &input[frame.start..frame.end])?;
            }
            start = end;
        }
        self.input = input;
        self.input.copy_within(start..self.filled, 0);
        self.filled -= start;
        if self.received > CONNECTION_WINDOW / 4 {
            let received = self.received.to_be_bytes();
            self.frame(WINDOW_UPDATE, 0, 0, &received);
            self.received = 0;
        }
        Ok(())
    }

    fn control(&mut self, frame: &Frame, payload: &[u8]) -> anyhow::Result<()> {
        let number = |at: usize| payload[at..].first_chunk::<4>().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        match frame.kind {
            SETTINGS if frame.flags & ACK == 0 => {
                for setting in (0..payload.len() / 6).map(|n| n * 6) {
                    let value = number(setting + 2);
                    match payload[setting + 1] {
                        1 => ensure!(value >= 4096, "a table of {value} bytes"),
                        4 => {
                            for open in &mut self.open {
                                open.window += i64::from(value) - self.stream_window;
                            }
                            self.stream_window = i64::from(value);
                        }
                        _ => {}
                    }
                }
                self.frame(SETTINGS, ACK, 0, &[]);
                self.pump();
            }
            PING if frame.flags & ACK == 0 => self.frame(PING, ACK, 0, payload),
            WINDOW_UPDATE if frame.stream == 0 => {
                self.window += i64::from(number(0));
                self.pump();
            }
            WINDOW_UPDATE => {
                if let Some(open) = self.open.iter_mut().find(|open| open.stream == frame.stream) {
                    open.window += i64::from(number(0));
                    self.pump();
                }
            }
            RST_STREAM => bail!("stream {} was reset: error {}", frame.stream, number(0)),
            GOAWAY => bail!("GOAWAY: error {} {:?}", number(4), String::from_utf8_lossy(&payload[8..])),
            _ => {}
        }
        Ok(())
    }

    /// Begins to send our message on a stream.
    fn send(&mut self, stream: u32) {
        let message = self.message;
        let head = if self.has_sent { &message.head.later } else { &message.head.first };
        let end = if message.body.is_empty() && message.trailers.is_none() { END_STREAM } else { 0 };
        self.frame(HEADERS, END_HEADERS | end, stream, head);
        let window = self.stream_window;
        self.open.push(Open { stream, window, sent: 0, has_head: false, check: Check::default() });
        self.push(self.open.len() - 1);
        self.has_sent = true;
    }

    /// Sends what the windows allow.
    fn pump(&mut self) {
        for index in 0..self.open.len() {
            self.push(index);
        }
    }

    fn push(&mut self, index: usize) {
        let message = self.message;
        loop {
            let open = &self.open[index];
            let left = message.body.len() - open.sent;
            let room = self.window.min(open.window).clamp(0, MAX_FRAME as i64) as usize;
            let (length, stream) = (left.min(room), open.stream);
            if length == 0 {
                return;
            }
            let last = length == left;
            let end = if last && message.trailers.is_none() { END_STREAM } else { 0 };
            let sent = open.sent;
            self.frame(DATA, end, stream, &message.body[sent..sent + length]);
            self.window -= length as i64;
            let open = &mut self.open[index];
            open.sent += length;
            open.window -= length as i64;
            if last && let Some(trailers) = &message.trailers {
                let block = if self.has_sent { &trailers.later } else { &trailers.first };
                self.frame(HEADERS, END_HEADERS | END_STREAM, stream, block);
            }
        }
    }
}

/// Asks for ever, or until `limit` answers; `at_once` requests are under way. The connection comes back.
pub(crate) async fn ask(
    io: BoxStream,
    message: &Message,
    answers: &Answers,
    at_once: usize,
    limit: u64,
    mut answered: impl FnMut(usize),
) -> anyhow::Result<BoxStream> {
    let mut connection = Connection::new(io, message);
    connection.output.extend_from_slice(PREFACE);
    connection.introduce();
    let (mut next, mut asked, mut done) = (1, 0, 0);
    while done < limit {
        while asked < limit && connection.open.len() < at_once {
            connection.send(next);
            next += 2;
            asked += 1;
        }
        connection.turn().await?;
        connection.frames(|connection, frame, payload| {
            let Some(index) = connection.open.iter().position(|open| open.stream == frame.stream) else {
                bail!("a frame of stream {}, which is not open", frame.stream);
            };
            let open = &mut connection.open[index];
            if frame.kind == DATA {
                open.check.take(answers, payload)?;
            } else if !open.has_head {
                // Changes of the table's size may go before `:status: 200`, which is 8 in the static table.
                let status = payload.iter().find(|byte| **byte & 0xe0 != 0x20);
                ensure!(status == Some(&0x88), "an answer whose status is not 200: {payload:x?}");
                open.has_head = true;
            }
            if frame.flags & END_STREAM != 0 {
                ensure!(connection.message.trailers.is_none() || frame.kind == HEADERS, "an answer without trailers");
                answered(connection.open.swap_remove(index).check.owner(answers)?);
                done += 1;
            }
            Ok(())
        })?;
    }
    Ok(connection.io)
}

/// Answers for as long as the peer asks.
pub(crate) async fn serve(mut io: BoxStream, message: &Message) -> anyhow::Result<()> {
    let mut preface = [0; PREFACE.len()];
    tokio::io::AsyncReadExt::read_exact(&mut io, &mut preface).await?;
    ensure!(preface == PREFACE, "no HTTP/2: {}", String::from_utf8_lossy(&preface));
    let mut connection = Connection::new(io, message);
    connection.introduce();
    loop {
        connection.turn().await?;
        connection.frames(|connection, frame, _| {
            if frame.flags & END_STREAM != 0 {
                connection.send(frame.stream);
            }
            Ok(())
        })?;
        connection.open.retain(|open| open.sent < message.body.len());
    }
}
