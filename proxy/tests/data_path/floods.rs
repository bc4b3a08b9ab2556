//! HTTP/2 clients that cost more than they ask for: each is ended with the error that says so, or is not read any further, and
//! others notice nothing.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode};
use sluice_proxy::workers::Role;
use tokio::{io::AsyncWriteExt, net::tcp::OwnedReadHalf, time::timeout};

use crate::{
    frames::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, GET, HEADERS, LARGEST, PING, POST, RST_STREAM, SETTINGS,
        WINDOW_UPDATE, connect, frame,
    },
    support::*,
};

/// RFC 9113, 7.
const NO_ERROR: u32 = 0;
const PROTOCOL_ERROR: u32 = 1;
const FLOW_CONTROL_ERROR: u32 = 3;
const STREAM_CLOSED: u32 = 5;
const FRAME_SIZE_ERROR: u32 = 6;
const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;
const COMPRESSION_ERROR: u32 = 9;
const ENHANCE_YOUR_CALM: u32 = 11;
/// `x: y`, of which nothing is remembered.
const FIELD: &[u8] = b"\x00\x01x\x01y";
/// Streams that a connection may have at once.
const STREAMS: u32 = 256;
/// More than this no flood here needs, in bytes: who has been let send it was not stopped.
const MUCH: usize = 256 << 20;

/// The error of the GOAWAY that ends a connection.
async fn ended(mut read: OwnedReadHalf) -> Option<u32> {
    let mut last = None;
    while let Some(frame) = Frame::read(&mut read).await {
        last = frame.go_away().or(last);
    }
    last
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
    let full: Vec<u8> = (0..STREAMS).flat_map(|stream| frame(HEADERS, END_HEADERS, 2 * stream + 1, POST)).collect();
    let floods: [Flood; 10] = [
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
                let wide = window(stream, LARGEST);
                [frame(HEADERS, END_HEADERS | END_STREAM, stream, POST), wide.clone(), wide].concat().into()
            },
            &[ENHANCE_YOUR_CALM],
        ),
        (
            "streams that are too many, without end",
            full.into(),
            |count| get_on(2 * (STREAMS + count) + 1),
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
        // The kernel resets a connection that is closed with unread bytes, and may take the GOAWAY along. What it was is counted (below).
        let error = error.or(if let [only] = errors { Some(*only) } else { None });
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

#[tokio::test]
async fn a_connection_of_which_many_streams_were_reset_in_its_time_ends_in_order() {
    let (_app, proxy) = proxy().await;
    let (mut read, mut write) = connect(&proxy).await;
    // Without `:path`. No more at once than the streams that it may have.
    let malformed = |stream| frame(HEADERS, END_HEADERS | END_STREAM, stream, b"\x82\x86\x41\x01a");
    let (mut resets, mut word) = (0, None);
    for round in 0..8 {
        assert_eq!(word, None, "after {resets}");
        let requests: Vec<_> = (0..64).flat_map(|index| malformed(128 * round + 2 * index + 1)).collect();
        write.write_all(&requests).await.unwrap();
        soon("the resets", async {
            while resets < 64 * (round + 1) {
                let frame = Frame::read(&mut read).await.unwrap();
                resets += u32::from(frame.reset().is_some());
                word = word.or(frame.go_away());
            }
        })
        .await;
    }
    soon("the word of its end", async {
        while word.is_none() {
            word = Frame::read(&mut read).await.unwrap().go_away();
        }
    })
    .await;
    assert_eq!((word, proxy.refused("http2_protocol_error")), (Some(NO_ERROR), 512));
    // Nothing that was begun is lost by it.
    write.write_all(&get_on(1025)).await.unwrap();
    assert!(is_answered(&soon("an answer", until_answer_of(&mut read, 1025)).await, 1025));
    assert_eq!(proxy.refused("http2_enhance_your_calm"), 0);
}

/// The frames that come until this stream has been answered whole, or the connection ends.
async fn until_answer_of(read: &mut OwnedReadHalf, good: u32) -> Vec<Frame> {
    let mut frames = Vec::new();
    while let Some(frame) = Frame::read(read).await {
        let last = frame.stream == good && frame.flags & END_STREAM != 0;
        frames.push(frame);
        if last {
            break;
        }
    }
    frames
}

fn is_answered(frames: &[Frame], stream: u32) -> bool {
    frames.iter().any(|frame| frame.kind == HEADERS && frame.stream == stream)
}

fn resets(frames: &[Frame]) -> Vec<(u32, u32)> {
    frames.iter().filter_map(Frame::reset).collect()
}

fn window(stream: u32, size: u32) -> Bytes {
    frame(WINDOW_UPDATE, 0, stream, &size.to_be_bytes())
}

fn get_on(stream: u32) -> Bytes {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, GET)
}

#[tokio::test]
async fn a_malformed_http2_request_resets_its_stream_is_counted_and_leaves_the_others_of_its_connection() {
    let (app, proxy) = proxy().await;
    // What is wrong (RFC 9113, 8.2 and 8.3).
    let get = |rest: &[u8]| [GET, rest].concat();
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
        write.write_all(&get_on(3)).await.unwrap();
        let frames = soon(what, until_answer_of(&mut read, 3)).await;
        assert_eq!(resets(&frames), [(1, PROTOCOL_ERROR)], "{what}: {frames:?}");
        assert!(is_answered(&frames, 3), "{what}: {frames:?}");
        assert_eq!(proxy.refused("http2_protocol_error"), index as u64 + 1, "{what}");
    }
    assert_eq!(app.requests(), malformed.len());
}

/// h2 does so by itself, and does not tell: what is counted is the reset of a stream whose content would follow.
#[tokio::test]
async fn a_header_list_of_more_than_16_kib_is_answered_with_431_and_leaves_the_others_of_its_connection() {
    let (app, proxy) = proxy().await;
    let mut large = get("/");
    large.headers_mut().insert("x-large", HeaderValue::from_str(&"x".repeat(17 << 10)).unwrap());
    let mut client = Http2::connect(proxy.address).await;
    assert_eq!(client.send(large).await.unwrap().status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    assert_eq!(client.send(get("/")).await.unwrap().body, "a");

    let (mut read, mut write) = connect(&proxy).await;
    // Each counts as 34 bytes (RFC 9113, 6.5.2).
    let many = FIELD.repeat(500);
    let frames = [
        frame(HEADERS, END_HEADERS | END_STREAM, 1, &[GET, &many].concat()),
        frame(HEADERS, END_HEADERS, 3, &[POST, &many].concat()),
        get_on(5),
    ];
    write.write_all(&frames.concat()).await.unwrap();
    let frames = soon("the answers", until_answer_of(&mut read, 5)).await;
    assert!([1, 3, 5].iter().all(|stream| is_answered(&frames, *stream)), "{frames:?}");
    assert_eq!(resets(&frames), [(3, PROTOCOL_ERROR)], "{frames:?}");
    assert_eq!((app.requests(), proxy.refused("http2_protocol_error")), (2, 1));
}

#[tokio::test]
async fn a_stream_whose_window_is_broken_is_reset_counted_and_leaves_the_others_of_its_connection() {
    let (_app, proxy) = proxy().await;
    let opened = frame(HEADERS, END_HEADERS, 1, POST);
    // More than the application, and each hop to it, take of a body that is not read; less than the connection's window.
    let data = frame(DATA, 0, 1, &[0; 16 << 10]).repeat(3500 / 16);
    let broken = [
        ("a window of more than 2^31-1 (RFC 9113, 6.9.1)", window(1, LARGEST)),
        ("DATA beyond our window (RFC 9113, 6.9)", data.into()),
    ];
    for (index, (what, frames)) in broken.iter().enumerate() {
        let (mut read, mut write) = connect(&proxy).await;
        // Until then the connection's window is 65,535 (RFC 9113, 6.9.2), and would be broken, too.
        soon("the connection's window", async {
            while Frame::read(&mut read).await.is_some_and(|frame| frame.kind != WINDOW_UPDATE) {}
        })
        .await;
        let sent = async {
            for piece in [&opened, frames, &get_on(3)] {
                // Where the connection ends, the frames say why.
                let _ = write.write_all(piece).await;
            }
        };
        let (frames, ()) = soon(what, futures::future::join(until_answer_of(&mut read, 3), sent)).await;
        assert_eq!(resets(&frames), [(1, FLOW_CONTROL_ERROR)], "{what}: {frames:?}");
        assert!(is_answered(&frames, 3), "{what}: {frames:?}");
        assert_eq!(proxy.refused("http2_flow_control_error"), index as u64 + 1, "{what}");
    }
    eventually("the release", || proxy.metric("sluice_requests_active{listener=\"shop/cart:80\"}") == 0).await;
}

#[tokio::test]
async fn data_of_a_stream_that_is_over_is_refused_counted_and_leaves_the_others_of_its_connection() {
    let (app, proxy) = proxy().await;
    let (mut read, mut write) = connect(&proxy).await;
    write.write_all(&get_on(1)).await.unwrap();
    assert!(is_answered(&soon("an answer", until_answer_of(&mut read, 1)).await, 1));
    // RFC 9113, 5.1.
    write.write_all(&frame(DATA, END_STREAM, 1, b"more")).await.unwrap();
    write.write_all(&get_on(3)).await.unwrap();
    let frames = soon("another answer", until_answer_of(&mut read, 3)).await;
    assert_eq!(resets(&frames), [(1, STREAM_CLOSED)], "{frames:?}");
    assert!(is_answered(&frames, 3), "{frames:?}");
    assert_eq!((proxy.refused("http2_stream_closed"), app.requests()), (1, 2));
}

#[tokio::test]
async fn frames_that_no_stream_can_take_end_their_connection_and_no_other() {
    let (app, proxy) = proxy().await;
    let mut good = Http2::connect(proxy.address).await;
    // Its client has said all of it, and it is not answered.
    let asked = frame(HEADERS, END_HEADERS | END_STREAM, 3, POST);
    // SETTINGS_INITIAL_WINDOW_SIZE.
    let initial = |size: u32| frame(SETTINGS, 0, 0, &[&[0, 4][..], &size.to_be_bytes()].concat());
    let table = [
        ("a window of the connection of more than 2^31-1", window(0, LARGEST), FLOW_CONTROL_ERROR),
        (
            "a setting that takes a stream's window above that (RFC 9113, 6.9.2)",
            [&*window(3, LARGEST - 0xffff), &*initial(0x1_0000)].concat().into(),
            FLOW_CONTROL_ERROR,
        ),
        ("a setting above that", initial(LARGEST + 1), PROTOCOL_ERROR),
        ("no more of a window (RFC 9113, 6.9)", window(3, 0), PROTOCOL_ERROR),
        ("DATA behind the end of a request", frame(DATA, 0, 3, b"more"), PROTOCOL_ERROR),
        ("trailers behind it", frame(HEADERS, END_HEADERS | END_STREAM, 3, FIELD), PROTOCOL_ERROR),
        ("a stream before one that was opened (RFC 9113, 5.1.1)", get_on(1), PROTOCOL_ERROR),
        ("a stream of our side", get_on(4), PROTOCOL_ERROR),
        ("a window of a stream that was not opened", window(5, 1), PROTOCOL_ERROR),
    ];
    for (index, (what, frames, error)) in table.iter().enumerate() {
        let (read, mut write) = connect(&proxy).await;
        write.write_all(&asked).await.unwrap();
        eventually(what, || app.requests() == 2 * index + 1).await;
        write.write_all(frames).await.unwrap();
        assert_eq!(soon(what, ended(read)).await, Some(*error), "{what}");
        let count = |code| table[..=index].iter().filter(|(.., error)| *error == code).count() as u64;
        let expected = (count(FLOW_CONTROL_ERROR), count(PROTOCOL_ERROR));
        // Counted behind the answer.
        let counted = || (proxy.refused("http2_flow_control_error"), proxy.refused("http2_protocol_error"));
        eventually(what, || counted() == expected).await;
        assert_eq!(good.send(get("/")).await.unwrap().body, "a", "{what}");
    }
    assert_eq!(app.requests(), 2 * table.len());
}

#[tokio::test]
async fn a_stream_too_many_is_refused_and_taken_when_another_has_ended() {
    let (app, proxy) = proxy().await;
    let (mut read, mut write) = connect(&proxy).await;
    for stream in 0..STREAMS {
        write.write_all(&frame(HEADERS, END_HEADERS, 2 * stream + 1, POST)).await.unwrap();
    }
    eventually("all of them", || app.requests() == STREAMS as usize).await;
    let mut next = 2 * STREAMS + 1;
    write.write_all(&get_on(next)).await.unwrap();
    let refused = soon("the refusal", async {
        loop {
            if let Some(reset) = Frame::read(&mut read).await.unwrap().reset() {
                return reset;
            }
        }
    });
    assert_eq!(refused.await, (next, REFUSED_STREAM));
    assert_eq!(proxy.refused("http2_refused_stream"), 1);
    // Another connection has streams of its own.
    assert_eq!(Http2::connect(proxy.address).await.send(get("/")).await.unwrap().body, "a");

    write.write_all(&frame(RST_STREAM, 0, 1, &CANCEL.to_be_bytes())).await.unwrap();
    next += 2;
    write.write_all(&get_on(next)).await.unwrap();
    let frames = soon("an answer", until_answer_of(&mut read, next)).await;
    assert!(is_answered(&frames, next) && resets(&frames).is_empty(), "{frames:?}");
    // The one that was refused is not among them.
    assert_eq!((app.requests(), proxy.refused("http2_refused_stream")), (STREAMS as usize + 2, 1));
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
