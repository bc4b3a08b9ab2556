//! Heads, read and written, and what they say of the framing of their bodies.

use std::mem::MaybeUninit;

use bytes::{Buf, Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Uri, Version, header, request, response,
    uri::Scheme,
};
use hyper::ext::ReasonPhrase;

use super::{
    super::headers::{MAX_HEAD_OF_OURS, Peer},
    body::{Decoder, Encoder},
};
use crate::{failure::Failure, refused::Refused};

/// Most header lines of a message of anybody, and trailer lines of any.
pub(super) const MAX_HEADERS: usize = 100;
/// The same of a proxy of ours. A list of HTTP/2 of 16 KiB may have 496, and some 50 are added.
const MAX_OF_OURS: usize = 640;

/// How large a head may be.
struct Limits {
    /// All of it, in bytes.
    head: usize,
    /// The request line, in bytes. RFC 9112, 3 asks for 8000 at least.
    line: usize,
    lines: usize,
}

fn limits(of: Peer) -> &'static Limits {
    match of {
        Peer::Anybody => &Limits { head: 64 * 1024, line: 32 * 1024, lines: MAX_HEADERS },
        // A target that was rewritten has up to 64 KiB.
        Peer::Ours => &Limits { head: MAX_HEAD_OF_OURS as usize, line: 68 * 1024, lines: MAX_OF_OURS },
    }
}

/// How a message is not HTTP. Where it ends is not certain then, and nothing of it is guessed (RFC 9112, 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(in super::super) enum Malformed {
    #[error("its head cannot be parsed: {0}")]
    Head(#[from] httparse::Error),
    #[error("its head is too long")]
    HeadTooLong,
    #[error("its first line is too long")]
    LineTooLong,
    #[error("its target is not one for its method")]
    Target,
    #[error("its Content-Length is not one number")]
    ContentLength,
    #[error("its Transfer-Encoding does not end in chunked, or is not allowed in HTTP/1.0")]
    TransferEncoding,
    #[error("its Transfer-Encoding has more than chunked")]
    TransferCoding,
    #[error("it has both Transfer-Encoding and Content-Length")]
    TwoLengths,
    #[error("a chunk's size line is not valid")]
    ChunkSize,
    #[error("a chunk is longer than its size says")]
    ChunkEnd,
    #[error("its chunk extensions are longer than any sensible ones")]
    ChunkExtensions,
    #[error("its trailers cannot be parsed or are too long")]
    Trailers,
}

impl Malformed {
    /// What a client is told whose request is so.
    pub(in super::super) fn failure(self) -> Failure {
        use httparse::Error as Parse;
        match self {
            Self::HeadTooLong | Self::Head(Parse::TooManyHeaders) => Failure::HeadTooLarge,
            Self::LineTooLong => Failure::UriTooLong,
            Self::TransferCoding => Failure::UnknownCoding,
            Self::Head(Parse::HeaderName) => {
                Failure::BadRequest(Refused::HeaderName, "a header's name has a character that is not allowed")
            }
            Self::Head(Parse::HeaderValue) => {
                Failure::BadRequest(Refused::HeaderValue, "a header's value has a character that is not allowed")
            }
            Self::Head(Parse::NewLine) => Failure::BadRequest(Refused::LineEnding, "a line does not end in CR LF"),
            Self::Head(Parse::Version) => {
                Failure::BadRequest(Refused::Version, "its version is not HTTP/1.0 or HTTP/1.1")
            }
            Self::Head(Parse::Token | Parse::Status) => {
                Failure::BadRequest(Refused::FirstLine, "its first line is not one of a request")
            }
            Self::Target => Failure::BadRequest(Refused::Target, "its target is not one for its method"),
            Self::ContentLength => Failure::BadRequest(Refused::ContentLength, "its Content-Length is not one number"),
            Self::TransferEncoding => Failure::BadRequest(
                Refused::TransferEncoding,
                "its Transfer-Encoding does not end in chunked, or is not allowed in HTTP/1.0",
            ),
            Self::TwoLengths => {
                Failure::BadRequest(Refused::TwoLengths, "it has both Transfer-Encoding and Content-Length")
            }
            Self::ChunkSize => Failure::BadRequest(Refused::Chunk, "a chunk's size line is not valid"),
            Self::ChunkEnd => Failure::BadRequest(Refused::Chunk, "a chunk is longer than its size says"),
            Self::ChunkExtensions => Failure::BadRequest(Refused::Chunk, "its chunk extensions are too long"),
            Self::Trailers => Failure::BadRequest(Refused::Trailers, "its trailers cannot be parsed or are too long"),
        }
    }
}

/// The head of a request.
#[derive(Debug)]
pub(super) struct RequestHead {
    pub(super) parts: request::Parts,
    pub(super) body: Decoder,
    /// Whether the client may send another request on this connection.
    pub(super) keep_alive: bool,
    /// Whether the client waits for a 100 before it sends the body.
    pub(super) expects: bool,
    /// Whether the client wants the answer's trailers (TE).
    pub(super) takes_trailers: bool,
}

/// The head of an answer.
#[derive(Debug)]
pub(super) struct AnswerHead {
    pub(super) response: Response<()>,
    pub(super) body: Decoder,
    /// Whether the connection may serve another request afterwards.
    pub(super) keep_alive: bool,
}

/// Takes the head of a request from `input`. `None`: it is not whole yet.
///
/// `looked_at` is how much of `input` is known to hold no end of a head, so that one that comes byte by byte is not
/// parsed as often. `headers` is an empty map to be filled.
pub(super) fn read_request(
    input: &mut BytesMut,
    looked_at: &mut usize,
    headers: &mut HeaderMap,
    of: Peer,
) -> Result<Option<RequestHead>, Malformed> {
    let line = limits(of).line;
    match take(input, looked_at, of) {
        // It is one, too, when all of the head came at once.
        Ok(Some(head)) if head.len() > line && !head[..line].contains(&b'\n') => Err(Malformed::LineTooLong),
        Ok(Some(head)) => parse_request(&head, std::mem::take(headers), of).map(Some),
        Ok(None) if input.len() >= line && !input[..line].contains(&b'\n') => Err(Malformed::LineTooLong),
        Ok(None) => Ok(None),
        Err(_) if !input[..line].contains(&b'\n') => Err(Malformed::LineTooLong),
        Err(error) => Err(error),
    }
}

/// The request without content whose head [`write_request`] wrote.
pub(super) fn reread_request(written: Bytes) -> Option<request::Parts> {
    let read = read_request(&mut BytesMut::from(written), &mut 0, &mut HeaderMap::new(), Peer::Ours);
    read.ok().flatten().map(|head| head.parts)
}

/// Takes the head of the final answer to a request from `input`, and what is informational before it (RFC 9110, 15.2):
/// 100 was not asked for, and nobody waits for the others. Otherwise as [`read_request`].
pub(super) fn read_answer(
    input: &mut BytesMut,
    looked_at: &mut usize,
    to_head: bool,
    headers: &mut HeaderMap,
    of: Peer,
) -> Result<Option<AnswerHead>, Malformed> {
    while let Some(head) = take(input, looked_at, of)? {
        let head = parse_answer(&head, to_head, std::mem::take(headers), of)?;
        let status = head.response.status();
        if !status.is_informational() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(Some(head));
        }
    }
    Ok(None)
}

/// Takes a whole head. An error is that it is too long.
fn take(input: &mut BytesMut, looked_at: &mut usize, of: Peer) -> Result<Option<Bytes>, Malformed> {
    let most = limits(of).head;
    if matches!(input.first(), Some(b'\r' | b'\n')) {
        // Empty lines before a head are not part of it (RFC 9112, 2.2). The rest of one may come later.
        let empty = input.len() - behind_empty_lines(input).len();
        input.advance(empty);
        *looked_at = looked_at.saturating_sub(empty);
    }
    let Some(length) = end(input, *looked_at) else {
        *looked_at = input.len();
        return if input.len() >= most { Err(Malformed::HeadTooLong) } else { Ok(None) };
    };
    if length > most {
        return Err(Malformed::HeadTooLong);
    }
    *looked_at = 0;
    Ok(Some(input.split_to(length).freeze()))
}

fn behind_empty_lines(mut input: &[u8]) -> &[u8] {
    while let [b'\r', b'\n', rest @ ..] | [b'\n', rest @ ..] = input {
        input = rest;
    }
    input
}

/// Where the first empty line ends, if it does behind `looked_at`. A lone LF ends a line, too, as it does for the parser. Of an
/// answer it is taken (RFC 9112, 2.2): some simple applications send it, and every head is written anew. A request is refused for it.
fn end(input: &[u8], looked_at: usize) -> Option<usize> {
    let from = looked_at.saturating_sub(2);
    memchr::memchr_iter(b'\n', &input[from..]).map(|at| from + at + 1).find_map(|next| match &input[next..] {
        [b'\n', ..] => Some(next + 1),
        [b'\r', b'\n', ..] => Some(next + 2),
        _ => None,
    })
}

/// Whether a line ends in LF alone. Whoever was before us may have read two lines as one there.
fn has_lone_lf(bytes: &[u8]) -> bool {
    memchr::memchr_iter(b'\n', bytes).any(|at| at == 0 || bytes[at - 1] != b'\r')
}

/// Parses a whole head. Its target and its values stay where they are.
fn parse_request(bytes: &Bytes, headers: HeaderMap, of: Peer) -> Result<RequestHead, Malformed> {
    if has_lone_lf(bytes) {
        return Err(httparse::Error::NewLine.into());
    }
    // Space for few lines is cheaper, and most have few.
    match parse_request_of::<MAX_HEADERS>(bytes, headers) {
        Err(Malformed::Head(httparse::Error::TooManyHeaders)) if limits(of).lines > MAX_HEADERS => {
            parse_request_of::<MAX_OF_OURS>(bytes, HeaderMap::new())
        }
        parsed => parsed,
    }
}

/// Not inlined: the space for many lines, 20 KiB of the stack, is for those alone that have so many.
#[inline(never)]
fn parse_request_of<const LINES: usize>(bytes: &Bytes, mut headers: HeaderMap) -> Result<RequestHead, Malformed> {
    let mut lines = [const { MaybeUninit::uninit() }; LINES];
    let mut parsed = httparse::Request::new(&mut []);
    let config = httparse::ParserConfig::default();
    whole(config.parse_request_with_uninit_headers(&mut parsed, bytes, &mut lines)?, bytes)?;
    let (Some(method), Some(path)) = (parsed.method, parsed.path) else {
        return Err(httparse::Error::Token.into());
    };
    let method = Method::from_bytes(method.as_bytes()).map_err(|_| httparse::Error::Token)?;
    // `Uri` would cut a fragment off, which some servers take for a part of the path.
    if memchr::memchr(b'#', path.as_bytes()).is_some() {
        return Err(Malformed::Target);
    }
    let uri = Uri::from_maybe_shared(bytes.slice_ref(path.as_bytes())).map_err(|_| Malformed::Target)?;
    check_target(&method, &uri)?;
    let version = version(parsed.version);
    let said = fill(&mut headers, bytes, parsed.headers)?;
    let (length, chunked) = if said.framing { framing(&mut headers, version, false)? } else { (None, false) };
    let body = if chunked { Decoder::chunked() } else { Decoder::length(length.unwrap_or(0)) };
    let keep_alive = if said.connection { keeps_alive(&headers, version) } else { version == Version::HTTP_11 };
    let expects = said.expect
        && version == Version::HTTP_11
        && !body.is_ended()
        && has_token(&headers, header::EXPECT, b"100-continue");
    let takes_trailers = said.te && has_token(&headers, header::TE, b"trailers");
    let (mut parts, ()) = http::Request::new(()).into_parts();
    parts.method = method;
    parts.uri = uri;
    parts.version = version;
    parts.headers = headers;
    Ok(RequestHead { parts, body, keep_alive, expects, takes_trailers })
}

/// Only CONNECT has a target that is an authority alone, only OPTIONS one that is an asterisk (RFC 9112, 3.2), and nothing
/// but HTTP is served here (RFC 9110, 7.4).
fn check_target(method: &Method, uri: &Uri) -> Result<(), Malformed> {
    let fits = match (uri.path(), uri.scheme()) {
        ("*", _) => *method == Method::OPTIONS,
        (_, Some(scheme)) => *scheme == Scheme::HTTP || *scheme == Scheme::HTTPS,
        (_, None) => uri.authority().is_some() == (*method == Method::CONNECT),
    };
    if fits { Ok(()) } else { Err(Malformed::Target) }
}

fn parse_answer(bytes: &Bytes, to_head: bool, headers: HeaderMap, of: Peer) -> Result<AnswerHead, Malformed> {
    match parse_answer_of::<MAX_HEADERS>(bytes, to_head, headers) {
        Err(Malformed::Head(httparse::Error::TooManyHeaders)) if limits(of).lines > MAX_HEADERS => {
            parse_answer_of::<MAX_OF_OURS>(bytes, to_head, HeaderMap::new())
        }
        parsed => parsed,
    }
}

/// Not inlined, as [`parse_request_of`].
#[inline(never)]
fn parse_answer_of<const LINES: usize>(
    bytes: &Bytes,
    to_head: bool,
    mut headers: HeaderMap,
) -> Result<AnswerHead, Malformed> {
    let mut lines = [const { MaybeUninit::uninit() }; LINES];
    let mut parsed = httparse::Response::new(&mut []);
    let config = httparse::ParserConfig::default();
    whole(config.parse_response_with_uninit_headers(&mut parsed, bytes, &mut lines)?, bytes)?;
    let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or(httparse::Error::Status)?;
    let version = version(parsed.version);
    let mut response = Response::new(());
    *response.status_mut() = status;
    *response.version_mut() = version;
    if let Some(reason) = parsed.reason.filter(|reason| Some(*reason) != status.canonical_reason())
        && let Ok(reason) = ReasonPhrase::try_from(bytes.slice_ref(reason.as_bytes()))
    {
        // For `write_answer`.
        response.extensions_mut().insert(reason);
    }
    let said = fill(&mut headers, bytes, parsed.headers)?;
    let (length, chunked) = if said.framing { framing(&mut headers, version, true)? } else { (None, false) };
    let body = match (has_no_body(to_head, status), chunked, length) {
        (true, _, _) => Decoder::length(0),
        (false, true, _) => Decoder::chunked(),
        (false, false, Some(length)) => Decoder::length(length),
        (false, false, None) => Decoder::UntilClose,
    };
    let persistent = if said.connection { keeps_alive(&headers, version) } else { version == Version::HTTP_11 };
    let keep_alive = body != Decoder::UntilClose && persistent;
    *response.headers_mut() = headers;
    Ok(AnswerHead { response, body, keep_alive })
}

/// Whether an answer has no body, whatever its head says of a length (RFC 9112, 6.3).
pub(super) fn has_no_body(to_head: bool, status: StatusCode) -> bool {
    to_head || status.is_informational() || status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED
}

/// The parser must have seen the head end where we did.
fn whole(parsed: httparse::Status<usize>, bytes: &Bytes) -> Result<(), Malformed> {
    match parsed {
        httparse::Status::Complete(length) if length == bytes.len() => Ok(()),
        httparse::Status::Complete(_) | httparse::Status::Partial => Err(httparse::Error::NewLine.into()),
    }
}

fn version(minor: Option<u8>) -> Version {
    if minor == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 }
}

/// Which headers there are that need a closer look. Most messages have few of them.
#[derive(Default)]
struct Said {
    framing: bool,
    connection: bool,
    expect: bool,
    te: bool,
}

fn fill(headers: &mut HeaderMap, bytes: &Bytes, lines: &[httparse::Header<'_>]) -> Result<Said, Malformed> {
    let mut said = Said::default();
    headers.reserve(lines.len());
    for line in lines {
        let name = HeaderName::from_bytes(line.name.as_bytes()).map_err(|_| httparse::Error::HeaderName)?;
        let value = HeaderValue::from_maybe_shared(bytes.slice_ref(line.value));
        match name {
            header::CONTENT_LENGTH | header::TRANSFER_ENCODING => said.framing = true,
            header::CONNECTION => said.connection = true,
            header::EXPECT => said.expect = true,
            header::TE => said.te = true,
            _ => {}
        }
        headers.append(name, value.map_err(|_| httparse::Error::HeaderValue)?);
    }
    Ok(said)
}

/// Content-Length, and whether the message is chunked. RFC 9112, 6.3, in its strict reading: two implementations must not
/// see two ends.
fn framing(headers: &mut HeaderMap, version: Version, lists: bool) -> Result<(Option<u64>, bool), Malformed> {
    let length = content_length(headers, lists)?;
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    let Some(first) = codings.next() else {
        return Ok((length, false));
    };
    if length.is_some() {
        return Err(Malformed::TwoLengths);
    }
    let last = codings.next_back().unwrap_or(first).as_bytes();
    let last = last.rsplit(|byte| *byte == b',').next().unwrap_or(last).trim_ascii();
    if version != Version::HTTP_11 || !last.eq_ignore_ascii_case(b"chunked") {
        return Err(Malformed::TransferEncoding);
    }
    // Other codings were not asked for (TE), and we could not say them to the other side.
    let only = headers.get_all(header::TRANSFER_ENCODING).iter().count() == 1
        && headers.get(header::TRANSFER_ENCODING).is_some_and(|value| value.len() == last.len());
    if only { Ok((None, true)) } else { Err(Malformed::TransferCoding) }
}

/// The one number that all Content-Length values say, which is then said once (RFC 9110, 8.6). A list in one value is
/// read where `lists` are: some servers write it, no client does.
fn content_length(headers: &mut HeaderMap, lists: bool) -> Result<Option<u64>, Malformed> {
    let mut agreed = None;
    let mut count = 0;
    for value in headers.get_all(header::CONTENT_LENGTH) {
        for value in value.as_bytes().split(|byte| lists && *byte == b',') {
            let length = number(value.trim_ascii()).ok_or(Malformed::ContentLength)?;
            if agreed.is_some_and(|agreed| agreed != length) {
                return Err(Malformed::ContentLength);
            }
            agreed = Some(length);
            count += 1;
        }
    }
    if let (Some(length), 2..) = (agreed, count) {
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    Ok(agreed)
}

/// Digits only: `str::parse` takes a sign, too.
fn number(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |number, digit| {
        let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    })
}

/// RFC 9112, 9.3. One `close` outweighs any `keep-alive`.
fn keeps_alive(headers: &HeaderMap, version: Version) -> bool {
    let mut keep_alive = version == Version::HTTP_11;
    for value in headers.get_all(header::CONNECTION) {
        for option in value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
            if option.eq_ignore_ascii_case(b"close") {
                return false;
            }
            keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
        }
    }
    keep_alive
}

/// Whether a message says that its connection ends with it.
pub(super) fn says_close(headers: &HeaderMap) -> bool {
    has_token(headers, header::CONNECTION, b"close")
}

/// Whether a header's list has a token.
fn has_token(headers: &HeaderMap, name: HeaderName, token: &[u8]) -> bool {
    let mut tokens = headers.get_all(name).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    tokens.any(|value| value.trim_ascii().eq_ignore_ascii_case(token))
}

/// Reads trailers up to the empty line behind them. `None`: they are not whole yet. As everywhere in a chunked body, only
/// CR LF ends a line.
pub(super) fn read_trailers(input: &mut BytesMut) -> Result<Option<HeaderMap>, Malformed> {
    let mut lines = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let (length, trailers) = match httparse::parse_headers(input, &mut lines) {
        Ok(httparse::Status::Complete((length, lines))) => {
            if has_lone_lf(&input[..length]) {
                return Err(Malformed::Trailers);
            }
            let mut trailers = HeaderMap::with_capacity(lines.len());
            for line in lines {
                let name = HeaderName::from_bytes(line.name.as_bytes()).map_err(|_| Malformed::Trailers)?;
                let value = HeaderValue::from_bytes(line.value).map_err(|_| Malformed::Trailers)?;
                trailers.append(name, value);
            }
            (length, trailers)
        }
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(Malformed::Trailers),
    };
    input.advance(length);
    Ok(Some(trailers))
}

/// Writes a request's head, as HTTP/1.1 with an origin-form target. An authority is its Host. What the headers say of the length is replaced by
/// what `body` does.
pub(super) fn write_request(output: &mut Vec<u8>, parts: &request::Parts, body: &Encoder) {
    output.extend_from_slice(parts.method.as_str().as_bytes());
    output.push(b' ');
    output.extend_from_slice(parts.uri.path().as_bytes());
    if let Some(query) = parts.uri.query() {
        output.push(b'?');
        output.extend_from_slice(query.as_bytes());
    }
    output.extend_from_slice(b" HTTP/1.1\r\n");
    // Of a client that spoke HTTP/2 (RFC 9113, 8.3.1).
    let authority = parts.uri.authority();
    if let Some(authority) = authority {
        output.extend_from_slice(b"host: ");
        output.extend_from_slice(authority.as_str().as_bytes());
        output.extend_from_slice(b"\r\n");
    }
    let mut length_said = false;
    for (name, value) in &parts.headers {
        if name == header::CONTENT_LENGTH {
            length_said = true;
        } else if name != header::TRANSFER_ENCODING && (authority.is_none() || name != header::HOST) {
            write_line(output, name, value);
        }
    }
    match body {
        // Only repeated: a GET without a body says none.
        Encoder::Length(0) if !length_said => {}
        Encoder::Length(length) => write_length(output, *length),
        Encoder::Chunked { .. } => output.extend_from_slice(CHUNKED),
        Encoder::UntilClose => {} // No request is so.
    }
    output.extend_from_slice(b"\r\n");
}

/// What an answer's head says beside the headers of its application.
pub(super) struct Answer<'a> {
    /// The client's, which is answered in kind.
    pub(super) version: Version,
    pub(super) to_head: bool,
    pub(super) body: &'a Encoder,
    /// The client is told whether it may send another request, where that does not go without saying.
    pub(super) keep_alive: bool,
}

/// Writes an answer's head but for the empty line behind it. Whether there is a Date among the headers already is
/// returned.
pub(super) fn write_answer(output: &mut Vec<u8>, parts: &response::Parts, answer: &Answer<'_>) -> bool {
    let status = parts.status;
    let reason = parts.extensions.get::<ReasonPhrase>().map(ReasonPhrase::as_bytes);
    if answer.version == Version::HTTP_11 && status == StatusCode::OK && reason.is_none() {
        output.extend_from_slice(b"HTTP/1.1 200 OK\r\n");
    } else {
        output.extend_from_slice(if answer.version == Version::HTTP_10 { b"HTTP/1.0 " } else { b"HTTP/1.1 " });
        output.extend_from_slice(status.as_str().as_bytes());
        output.push(b' ');
        output.extend_from_slice(reason.or(status.canonical_reason().map(str::as_bytes)).unwrap_or_default());
        output.extend_from_slice(b"\r\n");
    }
    // What a HEAD or a 304 says of the length is what another answer would have (RFC 9110, 8.6).
    let length_is_of_another = answer.to_head || status == StatusCode::NOT_MODIFIED;
    let (mut length_said, mut dated) = (false, false);
    for (name, value) in &parts.headers {
        match *name {
            header::CONTENT_LENGTH if length_is_of_another => length_said = true,
            header::CONTENT_LENGTH | header::TRANSFER_ENCODING => continue,
            header::CONNECTION if !answer.keep_alive => continue,
            header::DATE => dated = true,
            _ => {}
        }
        write_line(output, name, value);
    }
    match answer.body {
        Encoder::Length(_) if status.is_informational() || status == StatusCode::NO_CONTENT || length_said => {}
        Encoder::Length(0) if length_is_of_another => {}
        Encoder::Length(length) => write_length(output, *length),
        Encoder::Chunked { .. } => output.extend_from_slice(CHUNKED),
        Encoder::UntilClose => {}
    }
    match (answer.version, answer.keep_alive) {
        (Version::HTTP_10, true) => output.extend_from_slice(b"connection: keep-alive\r\n"),
        (Version::HTTP_10, false) | (_, true) => {}
        (_, false) => output.extend_from_slice(b"connection: close\r\n"),
    }
    dated
}

const CHUNKED: &[u8] = b"transfer-encoding: chunked\r\n";

fn write_length(output: &mut Vec<u8>, length: u64) {
    output.extend_from_slice(b"content-length: ");
    write_number(output, length);
    output.extend_from_slice(b"\r\n");
}

pub(super) fn write_line(output: &mut Vec<u8>, name: &HeaderName, value: &HeaderValue) {
    output.extend_from_slice(name.as_str().as_bytes());
    output.extend_from_slice(b": ");
    output.extend_from_slice(value.as_bytes());
    output.extend_from_slice(b"\r\n");
}

fn write_number(output: &mut Vec<u8>, mut number: u64) {
    let mut digits = [0; 20];
    let mut from = digits.len();
    loop {
        from -= 1;
        digits[from] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    output.extend_from_slice(&digits[from..]);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn head(text: &str) -> Result<Option<AnswerHead>, Malformed> {
        read_answer(&mut BytesMut::from(text), &mut 0, false, &mut HeaderMap::new(), Peer::Anybody)
    }

    #[test]
    fn an_answer_s_body_is_framed_by_the_book() {
        let table = [
            ("HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n", Decoder::length(7), true),
            ("HTTP/1.1 200 OK\r\nContent-Length: 7\r\nContent-Length: 7\r\n\r\n", Decoder::length(7), true),
            ("HTTP/1.1 200 OK\r\nContent-Length: 7, 7\r\n\r\n", Decoder::length(7), true),
            ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n", Decoder::length(0), false),
            ("HTTP/1.1 200 OK\r\nconnection: x, Close\r\ncontent-length: 1\r\n\r\n", Decoder::length(1), false),
            (
                "HTTP/1.1 200 OK\r\nconnection: close\r\nconnection: keep-alive\r\ncontent-length: 1\r\n\r\n",
                Decoder::length(1),
                false,
            ),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n", Decoder::chunked(), true),
            ("HTTP/1.1 200 OK\r\n\r\n", Decoder::UntilClose, false),
            ("HTTP/1.0 200 OK\r\n\r\n", Decoder::UntilClose, false),
            ("HTTP/1.0 200 OK\r\ncontent-length: 3\r\n\r\n", Decoder::length(3), false),
            ("HTTP/1.0 200 OK\r\ncontent-length: 3\r\nconnection: Keep-Alive\r\n\r\n", Decoder::length(3), true),
            ("HTTP/1.1 204 No Content\r\n\r\n", Decoder::length(0), true),
            ("HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n", Decoder::length(0), true),
            ("HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n", Decoder::length(0), true),
            ("\r\nHTTP/1.1 200\r\ncontent-length: 2\r\n\r\n", Decoder::length(2), true),
            (
                "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nlink: x\r\n\r\nHTTP/1.1 204 x\r\n\r\n",
                Decoder::length(0),
                true,
            ),
        ];
        for (text, body, keep_alive) in table {
            let head = head(text).unwrap().unwrap();
            assert_eq!((head.body, head.keep_alive), (body, keep_alive), "{text:?}");
            assert!(head.response.headers().get_all(header::CONTENT_LENGTH).iter().count() < 2);
            // Byte by byte: only the last one completes it.
            let (mut input, mut looked_at) = (BytesMut::new(), 0);
            for (index, byte) in text.bytes().enumerate() {
                input.extend_from_slice(&[byte]);
                let complete = read_answer(&mut input, &mut looked_at, false, &mut HeaderMap::new(), Peer::Anybody);
                let complete = complete.unwrap().is_some();
                assert_eq!(complete, index + 1 == text.len(), "{text:?} at {index}");
            }
        }
        let answer = BytesMut::from("HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n");
        let head = read_answer(&mut answer.clone(), &mut 0, true, &mut HeaderMap::new(), Peer::Anybody);
        let head = head.unwrap().unwrap();
        assert_eq!(
            (head.body, &head.response.headers()["content-length"]),
            (Decoder::length(0), &"7".parse().unwrap())
        );
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        let table = [
            ("transfer-encoding: chunked\r\ncontent-length: 3", Malformed::TwoLengths),
            ("content-length: 3\r\ncontent-length: 4", Malformed::ContentLength),
            ("content-length: 3, 4", Malformed::ContentLength),
            ("content-length: +3", Malformed::ContentLength),
            ("content-length: 0x3", Malformed::ContentLength),
            ("content-length:", Malformed::ContentLength),
            ("content-length: 99999999999999999999", Malformed::ContentLength),
            ("transfer-encoding: gzip, chunked", Malformed::TransferCoding),
            ("transfer-encoding: chunked, identity", Malformed::TransferEncoding),
            ("transfer-encoding: chunked\r\ntransfer-encoding: chunked", Malformed::TransferCoding),
            ("transfer-encoding: xchunked", Malformed::TransferEncoding),
            ("x: y\r\n folded", Malformed::Head(httparse::Error::HeaderName)),
            ("content-length : 3", Malformed::Head(httparse::Error::HeaderName)),
            ("no colon", Malformed::Head(httparse::Error::HeaderName)),
            ("x: a\rb", Malformed::Head(httparse::Error::HeaderValue)),
            ("x: a\0b", Malformed::Head(httparse::Error::HeaderValue)),
        ];
        for (lines, error) in table {
            assert_eq!(head(&format!("HTTP/1.1 200 OK\r\n{lines}\r\n\r\n")).unwrap_err(), error, "{lines:?}");
        }
        for text in [
            "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
            "HTTP/2.0 200 OK\r\n\r\n",
            "HTTP/1.1 099 x\r\n\r\n",
            "HTTP/1.1 1000 x\r\n\r\n",
            "SSH-2.0-OpenSSH\r\n\r\n",
        ] {
            assert!(head(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_head_is_bounded_in_bytes_and_lines() {
        let line = format!("x: {}\r\n", "y".repeat(1000));
        let long = format!("HTTP/1.1 200 OK\r\n{}", line.repeat(66));
        assert_eq!(head(&long).unwrap_err(), Malformed::HeadTooLong);
        let many = |count| format!("HTTP/1.1 200 OK\r\n{}\r\n", "x: y\r\n".repeat(count));
        assert_eq!(head(&many(MAX_HEADERS)).unwrap().unwrap().response.headers().len(), MAX_HEADERS);
        assert_eq!(head(&many(MAX_HEADERS + 1)).unwrap_err(), Malformed::Head(httparse::Error::TooManyHeaders));
    }

    #[test]
    fn empty_lines_before_a_request_are_left_out_and_nothing_else_is() {
        let table = [
            ("\r\n", true),
            ("\n", true),
            ("\r\n\n\r\n\r\n", true),
            ("\r", false),
            ("\r\r\n", false),
            ("\n\r", false),
            (" \r\n", false),
        ];
        for (before, good) in table {
            let text = format!("{before}GET / HTTP/1.1\r\nhost: a\r\n\r\n");
            for size in [text.len(), 1, 2, 3] {
                let (mut input, mut looked_at, mut read) = (BytesMut::new(), 0, Ok(None));
                for piece in text.as_bytes().chunks(size) {
                    input.extend_from_slice(piece);
                    read = read_request(&mut input, &mut looked_at, &mut HeaderMap::new(), Peer::Anybody);
                    if read.is_err() {
                        break;
                    }
                }
                assert_eq!(read.is_ok_and(|head| head.is_some()), good, "{before:?} in pieces of {size}");
            }
        }
    }

    #[test]
    fn a_request_line_is_as_long_as_it_may_be_however_it_is_cut() {
        const MAX_LINE: usize = 32 * 1024;
        let read = |text: &str, piece: usize| {
            let (mut input, mut looked_at) = (BytesMut::new(), 0);
            for piece in text.as_bytes().chunks(piece) {
                input.extend_from_slice(piece);
                if let Some(head) = read_request(&mut input, &mut looked_at, &mut HeaderMap::new(), Peer::Anybody)? {
                    return Ok(Some(head.parts.uri.path().len()));
                }
            }
            Ok(None)
        };
        let around = "GET / HTTP/1.1\r\n".len() - 1;
        for path in MAX_LINE - around - 2..MAX_LINE + 2 {
            let text = format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "x".repeat(path - 1));
            let wanted = if path + around <= MAX_LINE { Ok(Some(path)) } else { Err(Malformed::LineTooLong) };
            assert_eq!(
                (read(&text, text.len()), read(&text, 1000), read(&text, 7)),
                (wanted, wanted, wanted),
                "{path}"
            );
        }
    }

    #[test]
    fn a_reason_of_the_application_s_own_is_kept() {
        let own = head("HTTP/1.1 200 Fine\r\n\r\n").unwrap().unwrap().response;
        assert_eq!(own.extensions().get::<ReasonPhrase>().unwrap().as_bytes(), b"Fine");
        let usual = head("HTTP/1.1 200 OK\r\n\r\n").unwrap().unwrap().response;
        assert!(usual.extensions().get::<ReasonPhrase>().is_none());
    }

    #[test]
    fn a_request_says_its_length_once() {
        let written = |body: &Encoder| {
            let request = http::Request::post("/a?b=c").header("content-length", "5").header("transfer-encoding", "x");
            let mut output = Vec::new();
            write_request(&mut output, &request.header("x-a", "1").body(()).unwrap().into_parts().0, body);
            String::from_utf8(output).unwrap()
        };
        assert_eq!(written(&Encoder::Length(9)), "POST /a?b=c HTTP/1.1\r\nx-a: 1\r\ncontent-length: 9\r\n\r\n");
        assert_eq!(written(&Encoder::Length(0)), "POST /a?b=c HTTP/1.1\r\nx-a: 1\r\ncontent-length: 0\r\n\r\n");
        let chunked = Encoder::Chunked { trailers: Vec::new() };
        assert_eq!(written(&chunked), "POST /a?b=c HTTP/1.1\r\nx-a: 1\r\ntransfer-encoding: chunked\r\n\r\n");
    }
}
