//! HTTP/2 clients that cost more than they ask for: each is ended with the error that says so, or is not read any further, and
//! others notice nothing.

use std::time::Duration;

use bytes::{BufMut, Bytes};
use http::Response;
use sluice_proxy::workers::Role;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};

use crate::support::*;

/// Kinds of frames (RFC 9113, 6).
pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;
/// RFC 9113, 7.
const PROTOCOL_ERROR: u32 = 1;
const FRAME_SIZE_ERROR: u32 = 6;
const COMPRESSION_ERROR: u32 = 9;
const ENHANCE_YOUR_CALM: u32 = 11;
/// `:method: POST`, `:scheme: http`, `:path: /`, `:authority: a`, as HPACK's static table has them.
const POST: &[u8] = b"\x83\x86\x84\x41\x01a";
/// `x: y`, of which nothing is remembered.
const FIELD: &[u8] = b"\x00\x01x\x01y";
/// More than this no flood here needs, in bytes: who has been let send it was not stopped.
const MUCH: usize = 256 << 20;

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

/// The error of the GOAWAY that ends a connection.
async fn ended(mut read: OwnedReadHalf) -> Option<u32> {
    let mut last = None;
    loop {
        let mut head = [0; 9];
        if read.read_exact(&mut head).await.is_err() {
            return last;
        }
        let mut payload = vec![0; usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])];
        if read.read_exact(&mut payload).await.is_err() {
            return last;
        }
        if head[3] == GOAWAY {
            last = Some(u32::from_be_bytes(payload[4..8].try_into().unwrap()));
        }
    }
}

async fn proxy() -> (App, Proxy) {
    let app = App::start(own_ip(), 8080, |request| async move {
        if request.method() == "POST" {
            // It reads nothing of it.
            let _request = request;
            std::future::pending::<()>().await;
        }
        Response::new(full("a"))
    })
    .await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    (app, proxy)
}

#[tokio::test]
async fn a_flood_of_http2_frames_ends_its_connection_and_no_other() {
    let (_app, proxy) = proxy().await;
    let mut good = Http2::connect(proxy.address).await;
    let opened = frame(HEADERS, END_HEADERS, 1, POST);
    let unfinished = frame(HEADERS, 0, 1, POST);
    // What comes first, what comes then without end (of the n-th time), and the errors that end it.
    type Flood = (&'static str, Bytes, fn(u32) -> Bytes, &'static [u32]);
    let floods: [Flood; 9] = [
        (
            "CONTINUATION (CVE-2024-27316)",
            unfinished.clone(),
            |_| frame(CONTINUATION, 0, 1, FIELD),
            &[ENHANCE_YOUR_CALM],
        ),
        ("empty CONTINUATION", unfinished.clone(), |_| frame(CONTINUATION, 0, 1, &[]), &[ENHANCE_YOUR_CALM]),
        (
            "large CONTINUATION",
            unfinished,
            |_| frame(CONTINUATION, 0, 1, &FIELD.repeat(3000)),
            &[ENHANCE_YOUR_CALM, COMPRESSION_ERROR],
        ),
        ("empty DATA (CVE-2019-9518)", opened.clone(), |_| frame(DATA, 0, 1, &[]), &[ENHANCE_YOUR_CALM]),
        ("DATA of one byte", opened, |_| frame(DATA, 0, 1, b"x"), &[ENHANCE_YOUR_CALM]),
        (
            "streams that we have to reset (CVE-2025-8671)",
            Bytes::new(),
            |count| {
                let stream = 2 * count + 1;
                let wide = frame(WINDOW_UPDATE, 0, stream, &0x7fff_ffff_u32.to_be_bytes());
                [frame(HEADERS, END_HEADERS | END_STREAM, stream, POST), wide.clone(), wide].concat().into()
            },
            &[ENHANCE_YOUR_CALM],
        ),
        ("a PING of 7 bytes", Bytes::new(), |_| frame(PING, 0, 0, &[0; 7]), &[FRAME_SIZE_ERROR, PROTOCOL_ERROR]),
        ("DATA of no stream", Bytes::new(), |_| frame(DATA, 0, 0, b"x"), &[PROTOCOL_ERROR]),
        ("a frame of 17 KiB", Bytes::new(), |_| frame(DATA, 0, 1, &[0; 17 << 10]), &[FRAME_SIZE_ERROR]),
    ];
    let mut ended_by = Vec::new();
    for (what, first, then, errors) in floods {
        let (read, mut write) = connect(&proxy).await;
        let flood = async {
            write.write_all(&first).await?;
            for count in 0.. {
                write.write_all(&then(count)).await?;
            }
            std::io::Result::Ok(())
        };
        // It writes until nobody listens any more.
        let (_, error) = soon(what, futures::future::join(flood, ended(read))).await;
        assert!(error.is_some_and(|error| errors.contains(&error)), "{what}: {error:?}");
        ended_by.push(error.unwrap_or_default());
        assert_eq!(good.send(get("/")).await.unwrap().body, "a", "{what}");
    }
    let reasons = [
        (PROTOCOL_ERROR, "http2_protocol_error"),
        (FRAME_SIZE_ERROR, "http2_frame_size_error"),
        (COMPRESSION_ERROR, "http2_compression_error"),
        (ENHANCE_YOUR_CALM, "http2_enhance_your_calm"),
    ];
    for (error, reason) in reasons {
        let count = ended_by.iter().filter(|by| **by == error).count() as u64;
        eventually(reason, || proxy.refused(reason) == count).await;
    }
    eventually("the release", || proxy.metric("sluice_requests_active{listener=\"shop/cart:80\"}") == 0).await;
}

/// The frames that come until this stream has been answered whole, or the connection ends.
async fn until_data_of(read: &mut OwnedReadHalf, good: u32) -> Vec<(u8, u32, Vec<u8>)> {
    let mut frames = Vec::new();
    loop {
        let mut head = [0; 9];
        if read.read_exact(&mut head).await.is_err() {
            return frames;
        }
        let mut payload = vec![0; usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])];
        read.read_exact(&mut payload).await.unwrap();
        let stream = u32::from_be_bytes(head[5..9].try_into().unwrap());
        frames.push((head[3], stream, payload));
        if stream == good && head[4] & END_STREAM != 0 {
            return frames;
        }
    }
}

#[tokio::test]
async fn a_malformed_http2_request_resets_its_stream_is_counted_and_leaves_the_others_of_its_connection() {
    let (app, proxy) = proxy().await;
    // GET with what is wrong (RFC 9113, 8.2 and 8.3).
    let get = |rest: &[u8]| [b"\x82\x86\x84\x41\x01a", rest].concat();
    let field = |name: &str, value: &str| {
        let length = |text: &str| u8::try_from(text.len()).unwrap();
        [&[0, length(name)], name.as_bytes(), &[length(value)], value.as_bytes()].concat()
    };
    let malformed = [
        ("no :path", b"\x82\x86\x41\x01a".to_vec()),
        ("no :method", b"\x86\x84\x41\x01a".to_vec()),
        ("two of :method", b"\x82\x82\x86\x84\x41\x01a".to_vec()),
        (":authority behind a field", [b"\x82\x86\x84", FIELD, b"\x41\x01a"].concat()),
        (":status", get(b"\x88")),
        ("connection", get(&field("connection", "close"))),
        ("transfer-encoding", get(&field("transfer-encoding", "chunked"))),
        ("TE other than trailers", get(&field("te", "gzip"))),
        ("content-length without content", get(&field("content-length", "5"))),
    ];
    for (index, (what, block)) in malformed.iter().enumerate() {
        let (mut read, mut write) = connect(&proxy).await;
        // The other stream has begun before, and ends after it.
        write.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, 1, block)).await.unwrap();
        write.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, 3, &get(&[]))).await.unwrap();
        let frames = soon(what, until_data_of(&mut read, 3)).await;
        let reset = frames.iter().find(|(kind, stream, _)| (*kind, *stream) == (RST_STREAM, 1));
        assert_eq!(reset.map(|(.., code)| code.as_slice()), Some(&[0, 0, 0, 1][..]), "{what}: {frames:?}");
        assert!(frames.iter().any(|(kind, stream, _)| (*kind, *stream) == (HEADERS, 3)), "{what}: {frames:?}");
        assert_eq!(proxy.refused("http2_protocol_error"), index as u64 + 1, "{what}");
    }
    assert_eq!(app.requests(), malformed.len());
}

/// Each of these has to be answered.
#[tokio::test]
async fn an_http2_client_that_reads_no_answers_is_not_read_any_further() {
    let (_app, proxy) = proxy().await;
    let mut good = Http2::connect(proxy.address).await;
    for (what, one) in [
        ("PING (CVE-2019-9512)", frame(PING, 0, 0, &[0; 8])),
        ("SETTINGS (CVE-2019-9515)", frame(SETTINGS, 0, 0, &[])),
        ("requests", Bytes::new()),
    ] {
        let (_unread, mut write) = connect(&proxy).await;
        let mut sent = 0;
        let mut stream = 1;
        loop {
            let many = if one.is_empty() {
                // All of them refused at once, as the target is none.
                let requests: Vec<_> = (0..1000)
                    .map(|index| {
                        frame(HEADERS, END_HEADERS | END_STREAM, stream + 2 * index, b"\x82\x86\x84\x41\x02@@")
                    })
                    .collect();
                stream += 2000;
                requests.concat()
            } else {
                one.repeat(1000)
            };
            match timeout(Duration::from_secs(1), write.write_all(&many)).await {
                Ok(Ok(())) => sent += many.len(),
                // Cut off, or stopped.
                Ok(Err(_)) | Err(_) => break,
            }
            assert!(sent < MUCH, "{what}: goes on without end");
        }
        assert_eq!(good.send(get("/")).await.unwrap().body, "a", "{what}");
    }
}
