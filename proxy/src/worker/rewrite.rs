//! What a route makes a request ask for (`RouteEntryImplBase::finalizeRequestHeaders` in Envoy).

use bytes::{Bytes, BytesMut};
use http::{
    HeaderName, HeaderValue, Uri, Version, header, request,
    uri::{Authority, PathAndQuery},
};
use sluice_pattern::Piece;

use super::matching::joined;
use crate::{
    failure::Failure,
    snapshot::{HostRewrite, PathRewrite, Rewrite},
};

const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// # Errors
/// `NoRoute` when what comes of it is no target that could be sent.
pub(super) fn apply(rewrite: &Rewrite, request: &mut request::Parts) -> Result<(), Failure> {
    let authority = rewrite.host.as_ref().and_then(|host| address(host, request));
    let path = rewrite.path.as_ref().map(|path| target(path, &request.uri).ok_or(Failure::NoRoute)).transpose()?;
    if authority.is_some() || path.is_some() {
        let mut uri = request.uri.clone().into_parts();
        uri.authority = authority.or(uri.authority);
        uri.path_and_query = path.or(uri.path_and_query);
        request.uri = Uri::from_parts(uri).map_err(|_| Failure::NoRoute)?;
    }
    Ok(())
}

/// Sets the host. Returned is the authority of HTTP/2.
fn address(host: &HostRewrite, request: &mut request::Parts) -> Option<Authority> {
    let before = request.uri.authority().map(Authority::as_str).map(|before| before.as_bytes().to_owned());
    let before = before.or_else(|| Some(joined(&request.headers, &header::HOST, b",")?.into_owned()));
    if let Some(before) = before.filter(|before| host.note_original && !before.is_empty()) {
        note_host(request, &before);
    }
    if request.version != Version::HTTP_2 {
        request.headers.insert(header::HOST, host.value.clone());
        return None;
    }
    // It would contradict.
    request.headers.remove(header::HOST);
    Some(host.authority.clone())
}

/// Adds a host to those before it, unless it is the last of them already.
fn note_host(request: &mut request::Parts, host: &[u8]) {
    let mut list = joined(&request.headers, &FORWARDED_HOST, b",").unwrap_or_default().into_owned();
    if list.rsplit(|byte| *byte == b',').next() == Some(host) {
        return;
    }
    if !list.is_empty() {
        list.push(b',');
    }
    list.extend_from_slice(host);
    if let Ok(list) = HeaderValue::from_bytes(&list) {
        request.headers.insert(FORWARDED_HOST, list);
    }
}

/// The new path, and the query as it was.
fn target(rewrite: &PathRewrite, uri: &Uri) -> Option<PathAndQuery> {
    let before = uri.path_and_query().map_or("/", PathAndQuery::as_str);
    let path = uri.path().as_bytes();
    let mut after = BytesMut::with_capacity(before.len() + 64);
    let kept = match rewrite {
        PathRewrite::Prefix { matched, with } => {
            after.extend_from_slice(with.as_bytes());
            *matched
        }
        PathRewrite::Whole(with) => {
            after.extend_from_slice(with.as_bytes());
            path.len()
        }
        PathRewrite::Regex { pattern, with } => {
            let mut end = 0;
            pattern.each(path, |found| {
                let whole = found.get_match();
                after.extend_from_slice(&path[end..whole.start()]);
                for piece in with {
                    match piece {
                        Piece::Text(text) => after.extend_from_slice(text.as_bytes()),
                        Piece::Group(group) => {
                            after.extend_from_slice(found.get(*group).map_or(b"", |group| group.as_bytes()));
                        }
                    }
                }
                end = whole.end();
            })?;
            after.extend_from_slice(&path[end..]);
            // Nothing is no rewrite, as in Envoy.
            if after.is_empty() { 0 } else { path.len() }
        }
    };
    after.extend_from_slice(before.as_bytes().get(kept..)?);
    let after = Bytes::from(after);
    if after.first() != Some(&b'/') {
        return None;
    }
    PathAndQuery::from_maybe_shared(after).ok()
}
