//! What holds for all bytes that a client or an upstream may send: however they are cut they are read the same, hyper reads
//! the same in them, and what we write of them is exactly one message to whoever reads it in the narrowest way.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    cell::RefCell,
    convert::Infallible,
    future::Future,
    pin::pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use http_body_util::{BodyExt, Empty};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt;

use super::{
    super::headers::{self, Peer},
    Malformed,
    body::{self, Decoder, Encoder, Step},
    head::{self, Answer},
};
use crate::fuzz::{assert_same, cuts};

/// A message as it was understood.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Read {
    line: String,
    headers: Vec<(String, Bytes)>,
    body: Vec<u8>,
    trailers: Option<HeaderMap>,
}

impl Read {
    fn new(line: String, headers: &HeaderMap, content: &[u8], trailers: Option<&HeaderMap>) -> Self {
        let mut headers: Vec<_> = headers.iter().map(|(name, value)| (name.to_string(), plain(name, value))).collect();
        headers.dedup_by(|a, b| a == b && a.0 == "content-length");
        // Those that must not be passed on hyper leaves to its user.
        let trailers = trailers.cloned().map(body::forwardable).filter(|trailers| !trailers.is_empty());
        Self { line, headers, body: content.to_vec(), trailers }
    }

    fn request<B>(request: &Request<B>, body: &[u8], trailers: Option<&HeaderMap>) -> Self {
        let line = format!("{} {} {:?}", request.method(), request.uri(), request.version());
        Self::new(line, request.headers(), body, trailers)
    }

    fn answer<B>(answer: &Response<B>, body: &[u8], trailers: Option<&HeaderMap>) -> Self {
        Self::new(format!("{:?} {}", answer.version(), answer.status()), answer.headers(), body, trailers)
    }
}

/// Of a Content-Length only its number counts, said once or more often: each of us may keep another one of "5", "05" and "5, 5".
fn plain(name: &HeaderName, value: &HeaderValue) -> Bytes {
    let numbers = value.to_str().ok().filter(|_| name == header::CONTENT_LENGTH);
    let number = numbers.and_then(|numbers| numbers.rsplit(',').next()?.trim().parse::<u64>().ok());
    number.map_or_else(|| Bytes::copy_from_slice(value.as_bytes()), |number| number.to_string().into())
}

/// A request that came whole.
struct Received {
    request: Request<()>,
    body: Vec<u8>,
    trailers: Option<HeaderMap>,
    /// What is known of the body when the head has been read.
    framing: Decoder,
}

/// Reads all requests of a connection, and what ends it before its time.
fn received<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Received>, Option<Malformed>) {
    let mut read = Vec::new();
    let end = receive(pieces, &mut read).err();
    (read, end)
}

fn receive<'a>(pieces: impl IntoIterator<Item = &'a [u8]>, read: &mut Vec<Received>) -> Result<(), Malformed> {
    let (mut input, mut looked_at, mut current) = (BytesMut::new(), 0, None);
    let (mut body, mut trailers) = (Vec::new(), None);
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            if current.is_none() {
                if input.is_empty() {
                    break;
                }
                let head = head::read_request(&mut input, &mut looked_at, &mut HeaderMap::new(), Peer::Anybody)?;
                current = head.map(|head| (head.body, head));
            }
            let Some((framing, head)) = &mut current else { break };
            match head.body.decode(&mut input)? {
                Step::Data(data) => body.extend_from_slice(&data),
                Step::Trailers(some) => trailers = Some(some),
                Step::Read => break,
                Step::End => {
                    let (framing, keep_alive) = (*framing, head.keep_alive);
                    let head = current.take().map(|(_, head)| head);
                    let request = Request::from_parts(head.expect("it is read").parts, ());
                    read.push(Received {
                        request,
                        body: std::mem::take(&mut body),
                        trailers: trailers.take(),
                        framing,
                    });
                    looked_at = 0;
                    if !keep_alive {
                        return Ok(());
                    }
                }
            }
        }
    }
    Ok(())
}

/// All whole requests, and how the connection ends: as we read them.
pub(super) fn ours<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Read>, Option<Malformed>) {
    let (read, end) = received(pieces);
    let read = read.iter().map(|one| Read::request(&one.request, &one.body, one.trailers.as_ref())).collect();
    (read, end)
}

/// What hyper's server makes of the same bytes.
pub(super) fn hypers(bytes: &[u8]) -> Vec<Read> {
    let all = Rc::new(RefCell::new(Vec::new()));
    let seen = Rc::clone(&all);
    let service = service_fn(move |request: Request<Incoming>| {
        let seen = Rc::clone(&seen);
        async move {
            let (parts, body) = request.into_parts();
            if let Ok(body) = body.collect().await {
                let trailers = body.trailers().cloned();
                let request = Request::from_parts(parts, ());
                seen.borrow_mut().push(Read::request(&request, &body.to_bytes(), trailers.as_ref()));
            }
            Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
        }
    });
    let (mut client, stream) = tokio::io::duplex(1024 * 1024);
    let cx = &mut Context::from_waker(Waker::noop());
    assert!(pin!(client.write_all(bytes)).poll(cx).is_ready());
    let mut served = pin!(
        hyper::server::conn::http1::Builder::new()
            .header_read_timeout(None)
            .serve_connection(TokioIo::new(stream), service)
    );
    // All is there at once, and nothing waits for anything but more of it; of a body it takes a part each time. It stays open, as a
    // client does that waits.
    for _ in 0..64 + bytes.len() / 4 {
        if served.as_mut().poll(cx).is_ready() {
            break;
        }
    }
    all.take()
}

/// Bytes of a client.
pub(crate) fn request(bytes: &[u8]) {
    let whole = ours([bytes]);
    for pieces in cuts(bytes) {
        assert_same(&ours(pieces), &whole, "cut into pieces");
    }
    if let Some(first) = whole.0.first() {
        let hypers = hypers(bytes);
        assert_same(&hypers.first(), &Some(first), "hyper reads another request");
    }
    for one in received([bytes]).0 {
        forwarded(one);
    }
}

/// What goes to the upstream of a request is one request, and the same.
fn forwarded(received: Received) {
    const NEXT: &[u8] = b"GET /next HTTP/1.1\r\nhost: next\r\n\r\n";
    let Received { request, body, trailers, framing } = received;
    let (mut parts, ()) = request.into_parts();
    // As `request::forward` does it.
    if parts.method == Method::CONNECT || headers::check_request(&mut parts).is_err() {
        return;
    }
    let upgrade = headers::wants_websocket(&parts, !framing.is_ended());
    headers::clean_request(&mut parts.headers, parts.version);
    if !parts.headers.contains_key(header::HOST) {
        parts.headers.insert(header::HOST, HeaderValue::from_static("local"));
    }
    if upgrade {
        headers::keep_websocket(&mut parts.headers);
    }
    let length = if framing.is_ended() { Some(0) } else { framing.left() };
    let encoder = length.map_or_else(|| Encoder::chunked(Some(&parts.headers)), Encoder::Length);
    let mut output = Vec::new();
    head::write_request(&mut output, &parts, &encoder);
    write_body(encoder, &body, trailers.as_ref(), &mut output);

    let narrow = narrow(&output, |line, fields| {
        let [method, target, "HTTP/1.1"] = line.split(' ').collect::<Vec<_>>()[..] else {
            panic!("not a request line: {line:?}")
        };
        assert_same(&(method, target), &(parts.method.as_str(), &*origin_form(&parts.uri)), "the request line");
        assert_eq!(fields.iter().filter(|(name, _)| name == "host").count(), 1, "hosts: {fields:?}");
        Framing::Length(0)
    });
    assert_eq!(narrow.length, output.len(), "bytes behind it: {}", output.escape_ascii());
    assert_same(&narrow.body, &body, "the body");
    assert_same(&end_to_end(&narrow.fields), &end_to_end(&lines(&parts.headers)), "the headers");
    if upgrade {
        return;
    }
    output.extend_from_slice(NEXT);
    let bodies: Vec<_> = hypers(&output).into_iter().map(|read| read.body).collect();
    assert_same(&bodies, &vec![body, Vec::new()], "hyper reads other requests in what we write");
}

fn origin_form(uri: &http::Uri) -> String {
    uri.query().map_or_else(|| uri.path().to_owned(), |query| format!("{}?{query}", uri.path()))
}

/// Bytes of an upstream. Of the first, bit 0 is whether HEAD was asked, and bit 1 whether the client speaks HTTP/1.0.
pub(crate) fn answer(bytes: &[u8]) {
    let Some((how, bytes)) = bytes.split_first() else { return };
    let (to_head, old) = (how & 1 == 1, how & 2 == 2);
    let whole = answered([bytes], to_head);
    for pieces in cuts(bytes) {
        assert_same(&answered(pieces, to_head), &whole, "cut into pieces");
    }
    let Ok(Some(whole)) = whole else { return };
    // Behind a 101 there is no HTTP any more.
    if whole.response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return;
    }
    let read = Read::answer(&whole.response, &whole.body, whole.trailers.as_ref());
    if let Some(hypers) = hypers_answer(bytes, to_head) {
        assert_same(&hypers, &read, "hyper reads another answer");
    }
    passed_on(whole, to_head, old);
}

/// An answer that came whole, with all that is informational before it left out.
struct Answered {
    response: Response<()>,
    body: Vec<u8>,
    trailers: Option<HeaderMap>,
    framing: Decoder,
    keep_alive: bool,
    /// What came behind it.
    behind: BytesMut,
}

impl PartialEq for Answered {
    fn eq(&self, other: &Self) -> bool {
        let parts = |it: &Self| Read::answer(&it.response, &it.body, it.trailers.as_ref());
        (parts(self), self.framing, self.keep_alive, &self.behind)
            == (parts(other), other.framing, other.keep_alive, &other.behind)
    }
}

impl std::fmt::Debug for Answered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let read = Read::answer(&self.response, &self.body, self.trailers.as_ref());
        write!(f, "{read:?} {:?} {} {:?}", self.framing, self.keep_alive, self.behind)
    }
}

/// Reads the first answer. `None`: it is not whole.
fn answered<'a>(pieces: impl IntoIterator<Item = &'a [u8]>, to_head: bool) -> Result<Option<Answered>, Malformed> {
    let (mut input, mut looked_at, mut current) = (BytesMut::new(), 0, None);
    let (mut body, mut trailers, mut ended) = (Vec::new(), None, false);
    for piece in pieces {
        input.extend_from_slice(piece);
        if current.is_none() {
            let head = head::read_answer(&mut input, &mut looked_at, to_head, &mut HeaderMap::new(), Peer::Anybody)?;
            current = head.map(|head| (head.body, head));
        }
        let Some((_, head)) = &mut current else { continue };
        while !ended {
            match head.body.decode(&mut input)? {
                Step::Data(data) => body.extend_from_slice(&data),
                Step::Trailers(some) => trailers = Some(some),
                Step::Read => break,
                Step::End => ended = true,
            }
        }
    }
    let Some((framing, head)) = current.filter(|(framing, _)| ended || *framing == Decoder::UntilClose) else {
        return Ok(None);
    };
    let (response, keep_alive) = (head.response, head.keep_alive);
    Ok(Some(Answered { response, body, trailers, framing, keep_alive, behind: input }))
}

/// What hyper's client makes of the same bytes, when the connection ends behind them. `None`: it refuses them. It takes other
/// 1xx answers and leaves them out, too.
fn hypers_answer(bytes: &[u8], to_head: bool) -> Option<Read> {
    let (mut server, stream) = tokio::io::duplex(1024 * 1024);
    let cx = &mut Context::from_waker(Waker::noop());
    let Poll::Ready(Ok((mut sender, connection))) =
        pin!(hyper::client::conn::http1::handshake::<_, Empty<Bytes>>(TokioIo::new(stream))).poll(cx)
    else {
        panic!("nothing to wait for")
    };
    let mut connection = pin!(connection);
    let method = if to_head { Method::HEAD } else { Method::GET };
    let request = Request::builder().method(method).uri("/").header("host", "a").body(Empty::new()).unwrap();
    let mut reading = pin!(async {
        let (parts, body) = sender.send_request(request).await.ok()?.into_parts();
        let body = body.collect().await.ok()?;
        let trailers = body.trailers().cloned();
        Some(Read::answer(&Response::from_parts(parts, ()), &body.to_bytes(), trailers.as_ref()))
    });
    // It drops what came before it has asked.
    assert!(reading.as_mut().poll(cx).is_pending());
    let _ = connection.as_mut().poll(cx);
    assert!(pin!(server.write_all(bytes)).poll(cx).is_ready());
    assert!(pin!(server.shutdown()).poll(cx).is_ready());
    for _ in 0..1000 {
        let ended = connection.as_mut().poll(cx).is_ready();
        if let Poll::Ready(read) = reading.as_mut().poll(cx) {
            return read;
        }
        assert!(!ended, "hyper's client waits for nobody");
    }
    panic!("hyper's client goes on without end")
}

/// What goes to the client of an answer is one answer, and the same.
fn passed_on(whole: Answered, to_head: bool, old: bool) {
    let Answered { response, body, trailers, framing, .. } = whole;
    let (mut parts, ()) = response.into_parts();
    let status = parts.status;
    // As `request::forward` and `server::Connection::send` do it.
    headers::clean_response(&mut parts.headers, Version::HTTP_11, true);
    let version = if old { Version::HTTP_10 } else { Version::HTTP_11 };
    let length = if framing.is_ended() { Some(0) } else { framing.left() };
    let has_no_body = head::has_no_body(to_head, status);
    let encoder = match length {
        Some(length) => Encoder::Length(length),
        None if has_no_body => Encoder::Length(0),
        None if old => Encoder::UntilClose,
        None => Encoder::chunked(Some(&parts.headers)),
    };
    let keep_alive = encoder != Encoder::UntilClose;
    let mut output = Vec::new();
    head::write_answer(&mut output, &parts, &Answer { version, to_head, body: &encoder, keep_alive });
    output.extend_from_slice(b"\r\n");
    if !has_no_body {
        write_body(encoder, &body, trailers.as_ref(), &mut output);
    }

    let narrow = narrow(&output, |line, _| {
        let digits = line.get(9..12).unwrap_or_default();
        assert!(line.starts_with(if old { "HTTP/1.0 " } else { "HTTP/1.1 " }), "not a status line: {line:?}");
        assert_same(&digits, &status.as_str(), "the status");
        if has_no_body { Framing::None } else { Framing::UntilClose }
    });
    assert_eq!(narrow.length, output.len(), "bytes behind it: {}", output.escape_ascii());
    assert_same(&narrow.body, &body, "the body");
    assert_same(&narrow.until_close, &!keep_alive, "whether the body ends with the connection");
    assert_same(&end_to_end(&narrow.fields), &end_to_end(&lines(&parts.headers)), "the headers");
}

fn write_body(mut encoder: Encoder, body: &[u8], trailers: Option<&HeaderMap>, output: &mut Vec<u8>) {
    for part in body.chunks(7) {
        assert!(encoder.begin_data(part.len(), output), "it is longer than it said");
        output.extend_from_slice(part);
        output.extend_from_slice(encoder.behind_data());
    }
    assert!(encoder.end(trailers, output), "it is shorter than it said");
}

type Fields = Vec<(String, Vec<u8>)>;

fn lines(headers: &HeaderMap) -> Fields {
    headers.iter().map(|(name, value)| (name.to_string(), value.as_bytes().to_vec())).collect()
}

/// But for what is said of this connection.
fn end_to_end(fields: &Fields) -> Fields {
    let hop = ["connection", "content-length", "transfer-encoding"];
    let mut rest: Fields = fields.iter().filter(|(name, _)| !hop.contains(&name.as_str())).cloned().collect();
    rest.sort();
    rest
}

/// A body without Content-Length and Transfer-Encoding.
#[derive(Clone, Copy)]
enum Framing {
    Length(usize),
    UntilClose,
    /// Whatever the head says of a length, none comes.
    None,
}

/// A message in the narrowest reading of RFC 9112, read by nothing that the proxy uses.
struct Narrow {
    fields: Fields,
    body: Vec<u8>,
    until_close: bool,
    length: usize,
}

fn narrow(bytes: &[u8], first: impl FnOnce(&str, &Fields) -> Framing) -> Narrow {
    let mut rest = bytes;
    let line = narrow_line(&mut rest);
    let fields = narrow_fields(&mut rest);
    let without = first(&String::from_utf8_lossy(line), &fields);
    let of =
        |wanted: &str| fields.iter().filter(|(name, _)| name == wanted).map(|(_, value)| value).collect::<Vec<_>>();
    let (lengths, codings) = (of("content-length"), of("transfer-encoding"));
    assert!(lengths.len() + codings.len() <= 1, "two lengths: {fields:?}");
    let mut body = Vec::new();
    let mut until_close = false;
    if matches!(without, Framing::None) {
        assert!(codings.is_empty(), "chunks without a body: {fields:?}");
    } else if let [coding] = codings[..] {
        assert_eq!(coding, b"chunked");
        narrow_chunks(&mut rest, &mut body);
    } else {
        let length = match (&lengths[..], without) {
            ([digits], _) => {
                assert!(!digits.is_empty() && digits.iter().all(u8::is_ascii_digit), "{fields:?}");
                std::str::from_utf8(digits).unwrap().parse().expect("a length that fits")
            }
            (_, Framing::Length(length)) => length,
            (_, Framing::UntilClose | Framing::None) => {
                until_close = true;
                rest.len()
            }
        };
        body.extend_from_slice(rest.split_off(..length).expect("a body of that length"));
    }
    Narrow { fields, body, until_close, length: bytes.len() - rest.len() }
}

fn narrow_line<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    let end = rest.windows(2).position(|two| two == b"\r\n").expect("a line's end");
    let line = rest.split_off(..end).unwrap_or_default();
    assert!(!line.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)), "in a line: {}", line.escape_ascii());
    *rest = &rest[2..];
    line
}

fn narrow_fields(rest: &mut &[u8]) -> Fields {
    let mut fields = Vec::new();
    loop {
        let line = narrow_line(rest);
        if line.is_empty() {
            return fields;
        }
        let colon = line.iter().position(|byte| *byte == b':').expect("a colon");
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        let token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
        assert!(!name.is_empty() && name.iter().all(token), "a name: {}", line.escape_ascii());
        assert!(!name.iter().any(u8::is_ascii_uppercase), "a name in capitals: {}", line.escape_ascii());
        let text = |byte: &u8| *byte == b'\t' || (*byte >= b' ' && *byte != 0x7f);
        assert!(value.iter().all(text), "a value: {}", line.escape_ascii());
        fields.push((String::from_utf8_lossy(name).into_owned(), value.to_vec()));
    }
}

fn narrow_chunks(rest: &mut &[u8], body: &mut Vec<u8>) {
    loop {
        let line = narrow_line(rest);
        assert!(!line.is_empty() && line.iter().all(u8::is_ascii_hexdigit), "a size: {}", line.escape_ascii());
        let size = usize::from_str_radix(std::str::from_utf8(line).unwrap(), 16).expect("a size that fits");
        if size == 0 {
            break;
        }
        body.extend_from_slice(rest.split_off(..size).expect("a chunk of that size"));
        assert!(narrow_line(rest).is_empty(), "a chunk's end");
    }
    let framing = ["content-length", "transfer-encoding", "host"];
    let trailers = narrow_fields(rest);
    assert!(!trailers.iter().any(|(name, _)| framing.contains(&name.as_str())), "trailers: {trailers:?}");
}
