//! HTTP/2 towards a client: each of its streams is served by a task of its own.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    rc::Rc,
    task::{Context, Poll},
};

use h2::{
    Reason, RecvStream,
    server::{Builder, SendResponse},
};
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::Body;

use super::{
    super::{
        body::{ClientBody, RequestBody},
        connection,
        headers::Peer,
        progress, request,
        stream::Stream,
        thread,
    },
    CLIENT_WINDOW, Incoming, REMEMBERED, REMEMBERED_FOR, SEND_BUFFER, SHARED_FRAMES, SHARED_WINDOW, STREAM_WINDOW,
    batch::{Batch, Farewell},
    body::{Outgoing, Part},
    max_headers,
    written::Written,
};
use crate::{metrics::ListenerMetrics, workers::Role};

/// Requests that one client may have open on one connection.
const MAX_STREAMS: u32 = 256;
/// Streams of one client that HTTP/2 may make us reset or refuse. h2 counts them as long as the connection lives, for they wait in memory
/// as long as the client reads nothing (RUSTSEC-2024-0003), and ends it with ENHANCE_YOUR_CALM.
const MOST_RESETS: usize = 1024;
/// Streams that the fleet may reset before a sidecar comes to them. h2 takes more than 20 for an attack ("Rapid Reset").
const GIVEN_UP: usize = 4096;

/// A connection from a client.
pub(in super::super) struct Connection {
    frames: h2::server::Connection<Batch, Part>,
    farewell: Farewell,
    /// What h2 had to reset so far, and whether it counts, too.
    resets: Rc<Cell<usize>>,
    wears_out: bool,
}

impl Connection {
    /// Waits for the client's preface (RFC 9113, 3.4). Streams that are reset are counted in `metrics`. A sidecar's client is the fleet,
    /// which passes on what many clients do.
    pub(in super::super) async fn new(stream: Stream, metrics: ListenerMetrics, role: Role) -> Result<Self, h2::Error> {
        let mut builder = Builder::new();
        builder
            .initial_window_size(STREAM_WINDOW)
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(max_headers(Peer::of_clients(role)))
            .max_send_buffer_size(SEND_BUFFER);
        match role {
            Role::Fleet => {
                builder.initial_connection_window_size(CLIENT_WINDOW).max_local_error_reset_streams(Some(MOST_RESETS))
            }
            Role::Sidecar => builder
                .initial_connection_window_size(SHARED_WINDOW)
                .data_frame_budget(SHARED_FRAMES)
                // Requests that were given up before we came to them, because this process stood still.
                .max_pending_accept_reset_streams(GIVEN_UP)
                .max_concurrent_reset_streams(REMEMBERED)
                .reset_stream_duration(REMEMBERED_FOR)
                .max_local_error_reset_streams(None),
        };
        let resets = Rc::default();
        let batch = Batch::new(stream, Some(Written::of(metrics, Rc::clone(&resets))));
        let farewell = batch.farewell();
        Ok(Self { frames: builder.handshake(batch).await?, farewell, resets, wears_out: role == Role::Fleet })
    }

    /// Whether so many of its streams had to be reset that the next ones may end it, with all that it has open. One of whose clients
    /// something is wrong once in a while should end in order before: others go on on a new one. A flood does not wait for that.
    pub(in super::super) fn is_worn_out(&self) -> bool {
        self.wears_out && self.resets.get() >= MOST_RESETS / 2
    }

    /// Reads and writes frames, until a request has come. `None`: there will be none, and all are answered.
    pub(in super::super) fn poll_request(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Exchange, h2::Error>>> {
        let accepted = self.frames.poll_accept(cx);
        accepted.map(|accepted| Some(accepted?.map(|(request, respond)| Exchange { request, respond })))
    }

    /// Asks the client to begin no more requests here (RFC 9113, 6.8). Those that it does begin are served.
    pub(in super::super) fn announce_end(&self) {
        self.farewell.send();
    }

    /// Takes no more requests when the client has heard of it, and ends when those that have come are answered.
    pub(in super::super) fn end(&mut self) {
        self.frames.graceful_shutdown();
    }
}

/// A request, and the way back of its answer.
pub(in super::super) struct Exchange {
    request: Request<RecvStream>,
    respond: SendResponse<Part>,
}

impl Exchange {
    /// Answers it, unless the client gives it up.
    pub(in super::super) async fn serve(self, on: Rc<connection::Connection>) {
        let Self { request, mut respond } = self;
        let open = progress::Open::begin(Rc::clone(&on));
        let progress = open.progress();
        let (parts, stream) = request.into_parts();
        let to_head = parts.method == Method::HEAD;
        let mut waits_for_100 = false;
        let body = if stream.is_end_stream() {
            RequestBody::Empty
        } else {
            waits_for_100 = parts.headers.contains_key(header::EXPECT);
            RequestBody::Once(ClientBody::Http2(Incoming::new(stream, &parts.headers), Rc::clone(progress)))
        };
        // In a box of its own, which is free again when the answer has begun.
        let mut answering = Box::pin(request::serve(on, Rc::clone(progress), Request::from_parts(parts, body)));
        let response = poll_fn(|cx| {
            progress.runs_in(cx);
            if let Poll::Ready(response) = answering.as_mut().poll(cx) {
                return Poll::Ready(Some(response));
            }
            if waits_for_100 && progress.awaits_client() {
                // Somebody wants the body: only now is the client asked for it (RFC 9110, 10.1.1).
                waits_for_100 = false;
                let mut response = Response::new(());
                *response.status_mut() = StatusCode::CONTINUE;
                let _ = respond.send_informational(response);
            }
            respond.poll_reset(cx).map(|_| None)
        });
        let Some(response) = response.await else { return };
        drop(answering);

        let (mut parts, mut body) = response.into_parts();
        let mut ended = body.is_end_stream();
        if !ended && let Some(length) = body.size_hint().exact() {
            parts.headers.entry(header::CONTENT_LENGTH).or_insert_with(|| HeaderValue::from(length));
        }
        if to_head && !ended {
            // It says how long an answer to GET would be, and has no content (RFC 9110, 9.3.2).
            body.end_unread();
            ended = true;
        }
        if !parts.headers.contains_key(header::DATE) {
            parts.headers.extend(thread::date(body.latest()).map(|date| (header::DATE, date)));
        }
        let stream = match respond.send_response(Response::from_parts(parts, ()), ended) {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!(%error, "an answer cannot be sent");
                return respond.send_reset(Reason::INTERNAL_ERROR);
            }
        };
        if !ended {
            let mut sending = Outgoing::new(stream, body);
            let sent = poll_fn(|cx| match sending.poll(cx) {
                // It may wait for room that the client does not give.
                Poll::Pending if sending.body.is_over_time(cx) => Poll::Ready(false),
                Poll::Pending => Poll::Pending,
                Poll::Ready(sent) => Poll::Ready(sent.is_ok()),
            });
            if !sent.await {
                // Not the code of whoever broke it off: most clients take some of them for an end in order.
                return sending.break_off(Reason::INTERNAL_ERROR);
            }
            body = sending.body;
        }
        poll_fn(|cx| body.poll_request_over(cx)).await;
    }
}
