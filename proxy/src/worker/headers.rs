//! What a proxy must take off, keep and add between two connections (RFC 9110, 7.6).

use std::net::IpAddr;

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Uri, Version, header, request,
    uri::{Authority, PathAndQuery, Scheme},
};

use super::{matching::joined, pool::Wire};
use crate::{
    failure::{FLAG_HEADER, Failure, NOT_PROCESSED},
    refused::Refused,
    snapshot::HeaderChanges,
    workers::Role,
};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// Says by which certificate a client is known, which no client of ours has shown: Envoy's default, `SANITIZE`.
const FORWARDED_CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");

/// Largest head of a proxy of ours, in bytes, in either protocol: 64 KiB of a client's, or of an application's; as much of a target
/// that was rewritten; and what is added, which is 36 KiB of `spec.service.headers`, 1 KiB of others, and 32 bytes a field where HPACK
/// counts.
pub(super) const MAX_HEAD_OF_OURS: u32 = 192 * 1024;

/// Whose heads are read. Those of our own proxies may be larger: what one has taken and added to, the next must not refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    Anybody,
    Ours,
}

impl Peer {
    /// Only the fleet is a client of sidecars.
    pub(super) fn of_clients(role: Role) -> Self {
        match role {
            Role::Fleet => Self::Anybody,
            Role::Sidecar => Self::Ours,
        }
    }
}

/// Refuses a request whose host two implementations may understand differently, and makes the target origin-form with
/// a fitting Host, as a server wants it (RFC 9112, 3.2). What is ambiguous about framing (RFC 9112, 11.2) `http1`
/// has refused already.
pub(super) fn check_request(parts: &mut request::Parts) -> Result<(), Failure> {
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let (host, authority) = (hosts.next(), parts.uri.authority());
    if hosts.next().is_some() {
        return Err(Failure::BadRequest(Refused::Host, "more than one Host"));
    }
    if host.is_some_and(|host| !is_host(host.as_bytes())) {
        return Err(Failure::BadRequest(Refused::Host, "Host is not a host and a port"));
    }
    if authority.is_some_and(|authority| !is_host(authority.as_str().as_bytes())) {
        return Err(Failure::BadRequest(Refused::Host, "the authority of the target is not a host and a port"));
    }
    if parts.version == Version::HTTP_2 {
        check_target(parts)?;
        return match (host, authority) {
            (Some(host), Some(authority)) if !host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes()) => {
                Err(Failure::BadRequest(Refused::Host, "the header Host differs from :authority"))
            }
            (Some(_) | None, Some(_)) => Ok(()),
            (host, None) => {
                let host = host.and_then(|host| Authority::try_from(host.as_bytes()).ok());
                parts.uri = with_authority(&parts.uri, Scheme::HTTP, host)
                    .ok_or(Failure::BadRequest(Refused::Host, "neither :authority nor Host names a host"))?;
                Ok(())
            }
        };
    }
    if host.is_none() && parts.version == Version::HTTP_11 {
        return Err(Failure::BadRequest(Refused::Host, "no Host"));
    }
    if let Some(authority) = authority {
        // Absolute-form: the authority of the target wins over Host.
        if let Ok(host) = HeaderValue::from_str(authority.as_str()) {
            parts.headers.insert(header::HOST, host);
        }
        let path = parts.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        // An empty path is that of the root (RFC 9110, 4.2.3).
        parts.uri = if path.as_str().starts_with('?') {
            format!("/{}", path.as_str()).parse().ok()
        } else {
            Some(Uri::from(path))
        }
        .ok_or(TARGET)?;
    }
    Ok(())
}

const TARGET: Failure = Failure::BadRequest(Refused::Target, "its target is not one for its method");

/// As `http1` does. An application would answer by a reset, and that would be its version's failure (RFC 9113, 8.3.1).
fn check_target(parts: &request::Parts) -> Result<(), Failure> {
    let target = parts.uri.path_and_query().map_or("", PathAndQuery::as_str);
    let fits = target.starts_with('/')
        || (target == "*" && parts.method == Method::OPTIONS)
        || (target.is_empty() && parts.method == Method::CONNECT);
    let served = parts.uri.scheme().is_none_or(|scheme| *scheme == Scheme::HTTP || *scheme == Scheme::HTTPS);
    if fits && served { Ok(()) } else { Err(TARGET) }
}

/// What the client asked with: as the first proxy noted it, as far as it is a scheme that is served here, else by this connection.
pub(super) fn scheme(headers: &HeaderMap, tls: bool) -> &'static str {
    match headers.get(FORWARDED_PROTO).map(HeaderValue::as_bytes) {
        Some(b"https") => "https",
        Some(b"http") => "http",
        Some(_) | None if tls => "https",
        Some(_) | None => "http",
    }
}

/// Says a request that has been checked and cleaned in the protocol of its upstream, which is not the client's. `ended` is
/// whether it has no content, `tls` whether the client's connection has TLS.
pub(super) fn translate(parts: &mut request::Parts, wire: Wire, ended: bool, tls: bool) -> Result<(), Failure> {
    let headers = &mut parts.headers;
    match wire {
        Wire::Http2 => {
            let host = headers.remove(header::HOST).and_then(|host| Authority::try_from(host.as_bytes()).ok());
            let scheme = if scheme(headers, tls) == "https" { Scheme::HTTPS } else { Scheme::HTTP };
            // An authority must not be empty there (RFC 9113, 8.3.1).
            parts.uri = with_authority(&parts.uri, scheme, host)
                .ok_or(Failure::BadRequest(Refused::Host, "Host does not name a host, which HTTP/2 needs"))?;
            headers.remove(header::CONNECTION);
            parts.version = Version::HTTP_2;
        }
        Wire::Http1 => {
            // The authority of the target is written as Host, in place of one that is there.
            if headers.get_all(header::COOKIE).iter().nth(1).is_some()
                && let Some(crumbs) = joined(headers, &header::COOKIE, b"; ")
                && let Ok(cookie) = HeaderValue::from_bytes(&crumbs)
            {
                headers.insert(header::COOKIE, cookie);
            }
            if headers.contains_key(header::TE) {
                headers.insert(header::CONNECTION, HeaderValue::from_static("te"));
            }
            // RFC 9110, 8.6: where a method means something by content, none is said.
            if ended && [Method::POST, Method::PUT, Method::PATCH].contains(&parts.method) {
                headers.entry(header::CONTENT_LENGTH).or_insert(HeaderValue::from_static("0"));
            }
            parts.version = Version::HTTP_11;
        }
        Wire::Tcp => {}
    }
    Ok(())
}

/// Nothing, or `uri-host [ ":" port ]` (RFC 9110, 7.2; RFC 3986, 3.2.2): no user, no path, no list.
fn is_host(value: &[u8]) -> bool {
    let name = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=".contains(byte);
    let literal = |byte: &u8| *byte == b':' || name(byte);
    let (is_host, rest) = match value {
        [b'[', rest @ ..] => {
            let Some(end) = memchr::memchr(b']', rest) else { return false };
            (rest[..end].iter().all(literal), &rest[end + 1..])
        }
        _ => {
            let end = memchr::memchr(b':', value).unwrap_or(value.len());
            (value[..end].iter().all(name), &value[end..])
        }
    };
    is_host
        && match rest {
            [] => true,
            [b':', port @ ..] => port.iter().all(u8::is_ascii_digit),
            _ => false,
        }
}

/// A target that HTTP/2 can send on. RFC 9113, 8.3.1 lets clients say Host instead of `:authority`.
fn with_authority(uri: &Uri, scheme: Scheme, authority: Option<Authority>) -> Option<Uri> {
    let mut parts = uri.clone().into_parts();
    parts.scheme.get_or_insert(scheme);
    parts.authority = Some(authority?);
    Uri::from_parts(parts).ok()
}

/// The protocol that an HTTP/1.1 request asks to switch to, if it is one that we pass on. Others are taken off like
/// every hop-by-hop header, and so ignored, as RFC 9110, 7.8 allows; so is one of a request with content, whose bytes
/// could be mistaken for the new protocol's.
pub(super) fn wants_websocket(parts: &request::Parts, has_body: bool) -> bool {
    parts.version == Version::HTTP_11
        && !has_body
        && parts.headers.get(header::UPGRADE).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"))
        && names(&parts.headers).any(|name| name.eq_ignore_ascii_case("upgrade"))
}

/// Keeps the switch to WebSocket in a message that has been cleaned.
pub(super) fn keep_websocket(headers: &mut HeaderMap) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
}

/// Whether a message has any header that the cleaning below is about. Most have none, and one pass over their names
/// costs less than looking for each.
fn needs_cleaning(headers: &HeaderMap, version: Version) -> bool {
    headers.iter().any(|(name, value)| match *name {
        // What every gRPC client says, and all that may be said there (RFC 9113, 8.2.2).
        header::TE => version != Version::HTTP_2 || value != "trailers",
        header::CONNECTION | header::TRANSFER_ENCODING | header::UPGRADE | header::EXPECT => true,
        _ => [KEEP_ALIVE, PROXY_CONNECTION, NOT_PROCESSED, FLAG_HEADER, FORWARDED_CLIENT_CERT].contains(name),
    })
}

/// Takes off what concerned the connection from the client, and what only proxies of ours may say.
pub(super) fn clean_request(headers: &mut HeaderMap, version: Version) {
    if !needs_cleaning(headers, version) {
        return;
    }
    let trailers = headers.get_all(header::TE).iter().any(|value| {
        value.to_str().is_ok_and(|value| value.split(',').any(|coding| coding.trim().eq_ignore_ascii_case("trailers")))
    });
    clean_hop_by_hop(headers, version);
    // TE describes one hop only, but trailers pass us, and gRPC asks for them (gRPC over HTTP/2, Requests).
    headers.remove(header::TE);
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        if version != Version::HTTP_2 {
            headers.insert(header::CONNECTION, HeaderValue::from_static("te"));
        }
    }
    // Answered with 100 when the body is first read, that is, when an upstream takes it.
    headers.remove(header::EXPECT);
    headers.remove(NOT_PROCESSED);
    headers.remove(FORWARDED_CLIENT_CERT);
}

/// Takes off what concerned the connection to the upstream, and what only proxies of ours may say: the flag of an
/// answer that a sidecar gave passes the fleet.
pub(super) fn clean_response(headers: &mut HeaderMap, version: Version, from_application: bool) {
    if !needs_cleaning(headers, version) {
        return;
    }
    clean_hop_by_hop(headers, version);
    headers.remove(NOT_PROCESSED);
    if from_application {
        headers.remove(FLAG_HEADER);
    }
}

/// What a route changes.
pub(super) fn change(headers: &mut HeaderMap, changes: &HeaderChanges) {
    for name in &changes.remove {
        headers.remove(name);
    }
    for (name, value, append) in &changes.write {
        if *append {
            headers.append(name, value.clone());
        } else {
            headers.insert(name, value.clone());
        }
    }
}

fn clean_hop_by_hop(headers: &mut HeaderMap, version: Version) {
    if version == Version::HTTP_2 {
        return; // h2 refuses messages that have any of them (RFC 9113, 8.2.2).
    }
    if headers.contains_key(header::CONNECTION) {
        let named: Vec<HeaderName> = names(headers)
            .filter(|name| !name.eq_ignore_ascii_case("close") && !name.eq_ignore_ascii_case("keep-alive"))
            .filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok())
            // A client must not make us drop what frames or addresses the message.
            .filter(|name| name != header::HOST && name != header::CONTENT_LENGTH)
            .collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(header::CONNECTION);
    }
    headers.remove(KEEP_ALIVE);
    headers.remove(PROXY_CONNECTION);
    headers.remove(header::TRANSFER_ENCODING);
    headers.remove(header::UPGRADE);
}

fn names(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(header::CONNECTION).iter();
    values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(',')).map(str::trim)
}

/// Says who the client is. The list grows at its end, where the application can count back from proxies that it
/// trusts; a scheme that an earlier proxy noted stays.
pub(super) fn add_forwarded(headers: &mut HeaderMap, client: IpAddr, client_value: &HeaderValue, tls: bool) {
    match headers.entry(FORWARDED_FOR) {
        header::Entry::Occupied(mut before) => {
            let mut list = String::new();
            for value in &before {
                if let Ok(value) = value.to_str() {
                    list.push_str(value);
                    list.push_str(", ");
                }
            }
            list.push_str(&client.to_string());
            before.insert_mult(HeaderValue::from_str(&list).unwrap_or_else(|_| client_value.clone()));
        }
        header::Entry::Vacant(nobody) => {
            nobody.insert(client_value.clone());
        }
    }
    let proto = if tls { "https" } else { "http" };
    headers.entry(FORWARDED_PROTO).or_insert_with(|| HeaderValue::from_static(proto));
    // An application that reads this one must not take what the client wrote for a proxy's word (RFC 7239, 8.1).
    if headers.contains_key(header::FORWARDED) {
        let client = if client.is_ipv6() { format!("\"[{client}]\"") } else { client.to_string() };
        if let Ok(element) = HeaderValue::from_str(&format!("for={client};proto={proto}")) {
            headers.append(header::FORWARDED, element);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use http::Request;

    use super::*;

    fn request(version: Version, uri: &str, headers: &[(&'static str, &str)]) -> request::Parts {
        let mut builder = Request::builder().version(version).uri(uri);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap().into_parts().0
    }

    #[test]
    fn what_is_said_of_one_hop_stays_there_and_the_rest_passes() {
        let mut parts = request(
            Version::HTTP_11,
            "/",
            &[
                ("host", "a"),
                ("connection", "keep-alive, X-Hop"),
                ("connection", "host"),
                ("x-hop", "1"),
                ("keep-alive", "timeout=5"),
                ("proxy-connection", "keep-alive"),
                ("transfer-encoding", "chunked"),
                ("te", "gzip, trailers"),
                ("upgrade", "h2c"),
                ("expect", "100-continue"),
                ("x-sluice-not-processed", "1"),
                ("trailer", "x-sum"),
                ("x-mine", "1"),
            ],
        );
        clean_request(&mut parts.headers, parts.version);
        let mut left: Vec<_> = parts.headers.iter().map(|(n, v)| format!("{n}: {}", v.to_str().unwrap())).collect();
        left.sort();
        assert_eq!(left, ["connection: te", "host: a", "te: trailers", "trailer: x-sum", "x-mine: 1"]);
    }

    #[test]
    fn ambiguous_requests_are_refused() {
        let table: [(Version, &[(&'static str, &str)]); 5] = [
            (Version::HTTP_11, &[]),
            (Version::HTTP_11, &[("host", "a"), ("host", "a")]),
            (Version::HTTP_10, &[("host", "a"), ("host", "b")]),
            (Version::HTTP_2, &[]),
            (Version::HTTP_2, &[("host", "")]),
        ];
        for (version, headers) in table {
            assert!(check_request(&mut request(version, "/", headers)).is_err(), "{version:?} {headers:?}");
        }
        let mut differing = request(Version::HTTP_2, "http://a/", &[("host", "b")]);
        assert!(check_request(&mut differing).is_err());
        assert!(check_request(&mut request(Version::HTTP_11, "http://a/", &[])).is_err());
        let mut two = request(Version::HTTP_2, "http://a/", &[("host", "a"), ("host", "a")]);
        assert!(check_request(&mut two).is_err());
        assert!(check_request(&mut request(Version::HTTP_2, "http://u@a/", &[])).is_err());
        assert!(check_request(&mut request(Version::HTTP_10, "/", &[])).is_ok());
        assert!(check_request(&mut request(Version::HTTP_2, "http://a/", &[("host", "A")])).is_ok());
    }

    #[test]
    fn the_server_as_a_whole_is_asked_by_options_alone() {
        let mut all = request(Version::HTTP_2, "*", &[("host", "a")]);
        assert!(check_request(&mut all).is_err());
        all.method = Method::OPTIONS;
        check_request(&mut all).unwrap();
    }

    #[test]
    fn a_target_without_a_path_is_that_of_the_root() {
        for (sent, taken) in [("http://a?x=1", "/?x=1"), ("http://a?/../admin", "/?/../admin"), ("http://a", "/")] {
            let mut parts = request(Version::HTTP_11, sent, &[("host", "a")]);
            check_request(&mut parts).unwrap();
            assert_eq!(parts.uri, taken);
        }
    }

    #[test]
    fn a_host_is_a_name_or_an_address_and_a_port() {
        for good in ["", "a", "shop.example:8080", "a:", "10.0.0.1:80", "[::1]:80", "[fe80::1]", "a_b", "x%20y"] {
            assert!(is_host(good.as_bytes()), "{good}");
        }
        for bad in ["a/b", "u@a", "a b", "a, b", "a:80x", "a:80:80", "[::1", "[::1]80", "::1", "a?b", "a#b", "\u{e4}"] {
            assert!(!is_host(bad.as_bytes()), "{bad}");
        }
    }

    #[test]
    fn an_http2_request_may_say_host_instead_of_an_authority() {
        let mut parts = request(Version::HTTP_2, "/cart?x=1", &[("host", "shop:8080")]);
        check_request(&mut parts).unwrap();
        assert_eq!(parts.uri, "http://shop:8080/cart?x=1");
    }

    #[test]
    fn a_request_is_said_in_the_other_protocol() {
        let headers = [("host", "shop:8080"), ("connection", "te"), ("te", "trailers"), ("content-length", "5")];
        for (tls, scheme) in [(false, "http"), (true, "https")] {
            let mut parts = request(Version::HTTP_11, "/cart?x=1", &headers);
            translate(&mut parts, Wire::Http2, false, tls).unwrap();
            assert_eq!(
                (parts.uri.to_string(), parts.version),
                (format!("{scheme}://shop:8080/cart?x=1"), Version::HTTP_2)
            );
            let mut names: Vec<_> = parts.headers.keys().map(HeaderName::as_str).collect();
            names.sort_unstable();
            assert_eq!(names, ["content-length", "te"]);
        }
        // A sidecar is always asked in TLS; what the client asked with the fleet has noted.
        let noted = [("host", "shop"), ("x-forwarded-proto", "http")];
        let mut parts = request(Version::HTTP_11, "/", &noted);
        translate(&mut parts, Wire::Http2, true, true).unwrap();
        assert_eq!(parts.uri, "http://shop/");
        let mut all = request(Version::HTTP_11, "*", &[("host", "shop")]);
        translate(&mut all, Wire::Http2, true, false).unwrap();
        assert_eq!((all.uri.path(), all.uri.authority().unwrap().as_str()), ("*", "shop"));
        assert!(translate(&mut request(Version::HTTP_11, "/", &[("host", "")]), Wire::Http2, true, false).is_err());

        let headers = [("cookie", "a=1"), ("x-mine", "1"), ("cookie", "b=2"), ("te", "trailers")];
        let mut parts = request(Version::HTTP_2, "http://shop:8080/cart?x=1", &headers);
        parts.method = Method::POST;
        translate(&mut parts, Wire::Http1, true, true).unwrap();
        assert_eq!(parts.version, Version::HTTP_11);
        let mut said: Vec<_> = parts.headers.iter().map(|(n, v)| format!("{n}: {}", v.to_str().unwrap())).collect();
        said.sort();
        assert_eq!(said, ["connection: te", "content-length: 0", "cookie: a=1; b=2", "te: trailers", "x-mine: 1"]);
        let mut with_content = request(Version::HTTP_2, "http://shop/", &[]);
        with_content.method = Method::PUT;
        translate(&mut with_content, Wire::Http1, false, true).unwrap();
        assert!(with_content.headers.is_empty());
    }

    #[test]
    fn an_absolute_target_becomes_path_and_host() {
        let mut parts = request(Version::HTTP_11, "http://shop:8080/cart?x=1", &[("host", "other")]);
        check_request(&mut parts).unwrap();
        assert_eq!(
            (parts.uri.to_string().as_str(), parts.headers["host"].to_str().unwrap()),
            ("/cart?x=1", "shop:8080")
        );
    }

    #[test]
    fn the_client_is_added_behind_those_before_it() {
        let (ip, value) = (IpAddr::from([10, 0, 0, 9]), HeaderValue::from_static("10.0.0.9"));
        let mut headers = HeaderMap::new();
        add_forwarded(&mut headers, ip, &value, false);
        assert_eq!(
            (headers["x-forwarded-for"].to_str().unwrap(), headers["x-forwarded-proto"].to_str().unwrap()),
            ("10.0.0.9", "http")
        );

        headers.insert("x-forwarded-for", HeaderValue::from_static("1.1.1.1"));
        headers.append("x-forwarded-for", HeaderValue::from_static("2.2.2.2"));
        headers.insert("x-forwarded-proto", HeaderValue::from_static("https"));
        add_forwarded(&mut headers, ip, &value, false);
        assert_eq!(headers.get_all("x-forwarded-for").iter().count(), 1);
        assert_eq!(&headers["x-forwarded-for"], "1.1.1.1, 2.2.2.2, 10.0.0.9");
        assert_eq!(&headers["x-forwarded-proto"], "https");
    }

    #[test]
    fn the_client_is_added_to_forwarded_where_that_is_in_use() {
        let added = |before: Option<&'static str>, client: &str, tls| {
            let mut headers = HeaderMap::new();
            headers.extend(before.map(|before| (header::FORWARDED, HeaderValue::from_static(before))));
            let value = HeaderValue::from_str(client).unwrap();
            add_forwarded(&mut headers, client.parse().unwrap(), &value, tls);
            let values: Vec<_> = headers.get_all("forwarded").iter().map(|v| v.to_str().unwrap().to_owned()).collect();
            values.join(", ")
        };
        assert_eq!(added(None, "10.0.0.9", false), "");
        assert_eq!(added(Some("for=1.1.1.1"), "10.0.0.9", false), "for=1.1.1.1, for=10.0.0.9;proto=http");
        assert_eq!(added(Some("for=x"), "2001:db8::1", true), "for=x, for=\"[2001:db8::1]\";proto=https");
    }

    #[test]
    fn only_websocket_without_content_is_an_upgrade() {
        let asks = |upgrade: &str, connection: &str, body| {
            let headers = [("host", "a"), ("upgrade", upgrade), ("connection", connection)];
            wants_websocket(&request(Version::HTTP_11, "/", &headers), body)
        };
        assert!(asks("WebSocket", "keep-alive, Upgrade", false));
        assert!(!asks("websocket", "keep-alive", false));
        assert!(!asks("h2c", "upgrade", false));
        assert!(!asks("websocket", "upgrade", true));
    }
}
