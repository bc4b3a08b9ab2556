//! A request on its way upstream that may have to be sent again: which may, what is kept of it, and who says that it was not
//! processed.

use std::rc::Rc;

use http::{HeaderMap, Method, Request, Response, Uri, Version, request};
use http_body::Body;

use super::{
    body::RequestBody,
    cluster::Cluster,
    pool::{Endpoint, Wire},
    replay::Replay,
};
use crate::failure::NOT_PROCESSED;

/// Endpoints tried for one request that is certain not to have been processed.
pub(super) const MAX_TRIES: u32 = 3;

/// Whether an answer says that the request was not processed. Only a proxy of ours is believed.
pub(super) fn is_not_processed<B>(cluster: &Cluster, answer: &Response<B>) -> bool {
    cluster.config.tls.is_some() && answer.headers().contains_key(NOT_PROCESSED)
}

/// Whether a request may have to be sent again after it has been handed to a connection: only a proxy of ours or an
/// HTTP/2 server says that it did not process one. A copy for a case that cannot occur would only cost.
pub(super) fn repeatable(cluster: &Cluster, wire: Wire) -> bool {
    wire == Wire::Http2 || (cluster.config.tls.is_some() && cluster.has_alternatives())
}

/// A request that may be sent more than once.
pub(super) struct Outgoing {
    pub(super) next: Option<Request<RequestBody>>,
    copy: Option<Box<Copy>>,
    replay: Option<Replay>,
    /// The endpoint that has it, where its silence counts.
    pub(super) awaited: Option<Rc<Endpoint>>,
}

struct Copy {
    method: Method,
    uri: Uri,
    version: Version,
    headers: HeaderMap,
}

impl Outgoing {
    pub(super) fn new(parts: request::Parts, body: RequestBody, repeatable: bool) -> Self {
        let copy = repeatable.then(|| {
            Box::new(Copy {
                method: parts.method.clone(),
                uri: parts.uri.clone(),
                version: parts.version,
                headers: parts.headers.clone(),
            })
        });
        let (body, replay) = match body {
            RequestBody::Once(body) if body.is_end_stream() => (RequestBody::Empty, None),
            RequestBody::Once(body) if repeatable => {
                let replay = Replay::new(body);
                let body = replay.attempt().map_or(RequestBody::Empty, RequestBody::Replayable);
                (body, Some(replay))
            }
            body @ (RequestBody::Empty | RequestBody::Once(_) | RequestBody::Replayable(_)) => (body, None),
        };
        Self { next: Some(Request::from_parts(parts, body)), copy, replay, awaited: None }
    }

    /// Makes the request again after it was sent, if all of it is still there.
    pub(super) fn again(&mut self) -> bool {
        let Some(copy) = &self.copy else { return false };
        let body = match &self.replay {
            None => RequestBody::Empty,
            Some(replay) => match replay.attempt() {
                Some(attempt) => RequestBody::Replayable(attempt),
                None => return false,
            },
        };
        let mut request = Request::new(body);
        *request.method_mut() = copy.method.clone();
        *request.uri_mut() = copy.uri.clone();
        *request.version_mut() = copy.version;
        *request.headers_mut() = copy.headers.clone();
        self.next = Some(request);
        true
    }

    pub(super) fn settle(&self) {
        if let Some(replay) = &self.replay {
            replay.settle();
        }
    }
}
