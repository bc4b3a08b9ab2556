//! Trace context in a request's headers: W3C Trace Context (<https://www.w3.org/TR/trace-context/>), and Zipkin's B3 in both of
//! its forms (<https://github.com/openzipkin/b3-propagation>).

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::trace::{SpanId, TraceId};

pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
pub const B3: HeaderName = HeaderName::from_static("b3");
pub const B3_TRACE_ID: HeaderName = HeaderName::from_static("x-b3-traceid");
pub const B3_SPAN_ID: HeaderName = HeaderName::from_static("x-b3-spanid");
pub const B3_PARENT_SPAN_ID: HeaderName = HeaderName::from_static("x-b3-parentspanid");
pub const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
pub const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

const SAMPLED: u8 = 1;
/// The right half of the trace id is random (Trace Context Level 2). Other flags have no meaning yet, and are not passed on.
const RANDOM: u8 = 2;
/// Members of a `tracestate` that must be passed on; one with more is dropped.
const MOST_MEMBERS: usize = 32;

/// The caller's span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parent {
    pub trace_id: TraceId,
    pub span_id: SpanId,
}

/// What the headers of a request say of its trace. What is not valid says nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Received {
    pub parent: Option<Parent>,
    /// Whether the caller has the trace recorded. `None`: nobody has decided yet.
    pub sampled: Option<bool>,
    random: bool,
    /// There is a valid `tracestate`, and a valid `traceparent` beside it.
    state: bool,
    /// The trace id came with 64 bits.
    short: bool,
    /// B3's wish that every filter is passed.
    debug: bool,
    /// The forms of B3 that the request has.
    single: bool,
    multi: bool,
}

impl Received {
    /// A valid `traceparent` counts, else B3 in one header, else B3 in several.
    #[must_use]
    pub fn read(headers: &HeaderMap) -> Self {
        let mut received = Self::read_w3c(headers);
        let single = headers.contains_key(B3);
        let multi = [B3_TRACE_ID, B3_SPAN_ID, B3_SAMPLED, B3_FLAGS].iter().any(|name| headers.contains_key(name));
        if received.parent.is_none() && (single || multi) {
            received =
                only(headers, &B3).and_then(Self::of_b3).or_else(|| Self::of_several(headers)).unwrap_or_default();
        }
        Self { single, multi, ..received }
    }

    fn read_w3c(headers: &HeaderMap) -> Self {
        let Some((parent, flags)) = only(headers, &TRACEPARENT).and_then(traceparent) else {
            return Self::default();
        };
        Self {
            parent: Some(parent),
            sampled: Some(flags & SAMPLED != 0),
            random: flags & RANDOM != 0,
            state: is_tracestate(headers),
            ..Self::default()
        }
    }

    /// `{trace id}-{span id}[-{sampling state}[-{parent span id}]]`, or the sampling state alone.
    fn of_b3(value: &[u8]) -> Option<Self> {
        let state = |value: &[u8]| match value {
            b"0" => Some((false, false)),
            b"1" => Some((true, false)),
            b"d" => Some((true, true)),
            _ => None,
        };
        let mut parts = value.split(|byte| *byte == b'-');
        let first = parts.next()?;
        let Some(span_id) = parts.next() else {
            let (sampled, debug) = state(first)?;
            return Some(Self { sampled: Some(sampled), debug, ..Self::default() });
        };
        let mut received = Self::of_ids(first, span_id)?;
        if let Some(value) = parts.next() {
            let (sampled, debug) = state(value)?;
            (received.sampled, received.debug) = (Some(sampled), debug);
        }
        if let Some(parent) = parts.next() {
            id64(parent)?;
        }
        parts.next().is_none().then_some(received)
    }

    /// `X-B3-*`.
    fn of_several(headers: &HeaderMap) -> Option<Self> {
        let mut received = match (headers.contains_key(B3_TRACE_ID), headers.contains_key(B3_SPAN_ID)) {
            (false, false) => Self::default(),
            _ => Self::of_ids(only(headers, &B3_TRACE_ID)?, only(headers, &B3_SPAN_ID)?)?,
        };
        received.debug = only(headers, &B3_FLAGS) == Some(b"1");
        received.sampled = match only(headers, &B3_SAMPLED) {
            Some(b"1" | b"true") => Some(true),
            Some(b"0" | b"false") => Some(false),
            Some(_) | None => None,
        };
        received.sampled = if received.debug { Some(true) } else { received.sampled };
        Some(received)
    }

    fn of_ids(trace_id: &[u8], span_id: &[u8]) -> Option<Self> {
        let short = trace_id.len() == 16;
        let trace_id = if short { u128::from(id64(trace_id)?) } else { id128(trace_id)? };
        let parent = Parent { trace_id: TraceId::from(trace_id), span_id: SpanId::from(id64(span_id)?) };
        Some(Self { parent: Some(parent), short, ..Self::default() })
    }

    /// Says upstream which span is its parent now: in `traceparent`, and in the forms of B3 that the request came with.
    pub fn write(&self, headers: &mut HeaderMap, trace_id: TraceId, span_id: SpanId, sampled: bool) {
        let flags = u8::from(sampled) * SAMPLED + u8::from(self.random) * RANDOM;
        put(headers, TRACEPARENT, format!("00-{trace_id}-{span_id}-{flags:02x}"));
        if !self.state {
            headers.remove(TRACESTATE);
        }
        if !self.single && !self.multi {
            return;
        }
        let mut id = trace_id.to_string();
        if self.short {
            id.drain(..16);
        }
        // Whose child our span is; a span that is only passed on is its own caller's.
        let above = self.parent.map(|parent| parent.span_id).filter(|above| *above != span_id);
        if self.single {
            let state = if self.debug { "d" } else { flag(sampled) };
            let above = above.map_or_else(String::new, |above| format!("-{above}"));
            put(headers, B3, format!("{id}-{span_id}-{state}{above}"));
        }
        if self.multi {
            put(headers, B3_TRACE_ID, id);
            put(headers, B3_SPAN_ID, span_id.to_string());
            if let Some(above) = above {
                put(headers, B3_PARENT_SPAN_ID, above.to_string());
            } else if self.parent.is_none() {
                headers.remove(B3_PARENT_SPAN_ID);
            }
            headers.insert(B3_SAMPLED, HeaderValue::from_static(flag(sampled)));
            // It may have come in the other form.
            if self.debug {
                headers.insert(B3_FLAGS, HeaderValue::from_static("1"));
            } else {
                headers.remove(B3_FLAGS);
            }
        }
    }

    /// The `tracestate` of the request in one piece; empty where there is no valid one.
    #[must_use]
    pub fn state<'a>(&self, headers: &'a HeaderMap) -> Vec<&'a str> {
        let values = headers.get_all(TRACESTATE).iter().filter(|_| self.state);
        values.filter_map(|value| value.to_str().ok()).collect()
    }
}

fn flag(sampled: bool) -> &'static str {
    if sampled { "1" } else { "0" }
}

fn put(headers: &mut HeaderMap, name: HeaderName, value: String) {
    // Hexadecimal digits and dashes are always a header's value.
    if let Ok(value) = HeaderValue::try_from(value) {
        headers.insert(name, value);
    }
}

/// The value of a header that is there once.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a [u8]> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?;
    // What surrounds a value is not of it (RFC 9110, 5.5); HTTP/2 does not take it off.
    values.next().is_none().then(|| value.as_bytes().trim_ascii())
}

/// `{version}-{trace id}-{parent id}-{flags}`. Of a later version, which may say more, what is known of this one.
fn traceparent(value: &[u8]) -> Option<(Parent, u8)> {
    const LENGTH: usize = 55;
    let (known, more) = value.split_at_checked(LENGTH)?;
    let version = hex(&known[..2])?;
    let ends_well = match more {
        [] => true,
        [b'-', ..] => version != 0,
        _ => false,
    };
    let dashes = [2, 35, 52].iter().all(|at| known[*at] == b'-');
    if version == 0xff || !ends_well || !dashes {
        return None;
    }
    let parent =
        Parent { trace_id: TraceId::from(id128(&known[3..35])?), span_id: SpanId::from(id64(&known[36..52])?) };
    Some((parent, u8::try_from(hex(&known[53..])?).ok()?))
}

/// Whether there is a `tracestate`, in one header or several, that may be passed on.
fn is_tracestate(headers: &HeaderMap) -> bool {
    let mut members = 0;
    for value in headers.get_all(TRACESTATE) {
        for member in value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
            // Empty ones are allowed, and say nothing.
            if member.is_empty() {
                continue;
            }
            members += 1;
            if members > MOST_MEMBERS || !is_member(member) {
                return false;
            }
        }
    }
    members > 0
}

/// `key=value`, in the grammar of Trace Context, 3.3.1.
fn is_member(member: &[u8]) -> bool {
    let Some(at) = memchr::memchr(b'=', member) else { return false };
    let (key, value) = (&member[..at], &member[at + 1..]);
    let lower = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let name = |name: &[u8], most: usize| {
        name.len() <= most
            && name.first().is_some_and(|first| lower(*first))
            && name.iter().all(|byte| lower(*byte) || b"_-*/".contains(byte))
    };
    let key = match memchr::memchr(b'@', key) {
        None => name(key, 256),
        Some(at) => name(&key[..at], 241) && name(&key[at + 1..], 14),
    };
    key && (1..=256).contains(&value.len())
        && value.iter().all(|byte| matches!(byte, b' '..=b'~') && !matches!(byte, b',' | b'='))
}

fn id64(value: &[u8]) -> Option<u64> {
    let id = (value.len() == 16).then(|| hex(value)).flatten()?;
    u64::try_from(id).ok().filter(|id| *id != 0)
}

fn id128(value: &[u8]) -> Option<u128> {
    (value.len() == 32).then(|| hex(value)).flatten().filter(|id| *id != 0)
}

/// At most 32 digits, lower-case as both standards have them.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |number: u128, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(digit))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SPAN: &str = "00f067aa0ba902b7";

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            headers.append(name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        headers
    }

    fn read(pairs: &[(&str, &str)]) -> Received {
        Received::read(&headers(pairs))
    }

    fn ids(received: &Received) -> Option<(String, String)> {
        received.parent.map(|parent| (parent.trace_id.to_string(), parent.span_id.to_string()))
    }

    /// What goes upstream of `pairs` for our own span `b7ad6b7169203331`.
    fn written(pairs: &[(&str, &str)], sampled: bool) -> Vec<String> {
        let mut headers = headers(pairs);
        let received = Received::read(&headers);
        let trace_id = received.parent.map_or(TraceId::from(7), |parent| parent.trace_id);
        received.write(&mut headers, trace_id, SpanId::from(0xb7ad_6b71_6920_3331), sampled);
        let mut lines: Vec<_> = headers.iter().map(|(n, v)| format!("{n}: {}", v.to_str().unwrap())).collect();
        lines.sort();
        lines
    }

    /// The cases of <https://github.com/w3c/trace-context/blob/main/test/test.py>, and the specification's own examples.
    #[test]
    fn a_traceparent_is_valid_as_the_specification_says() {
        let valid = [
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", true),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00", false),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-ff", true),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-fe", false),
            (" 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\t", true),
            // Later versions, with and without more.
            ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", true),
            ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-the-future-will-be-like", true),
            ("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00-", false),
        ];
        for (value, sampled) in valid {
            let received = read(&[("traceparent", value)]);
            assert_eq!(ids(&received), Some((TRACE.to_owned(), SPAN.to_owned())), "{value}");
            assert_eq!(received.sampled, Some(sampled), "{value}");
        }
        let invalid = [
            "",
            "00",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01.more",
            "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01.what-the-future-will-not-be-like",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00F067AA0BA902B7-01",
            "0x-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "0-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "000-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-.bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e47366-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b71-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-001",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0x",
            "00_4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7_01",
        ];
        for value in invalid {
            assert_eq!(read(&[("traceparent", value)]), Received::default(), "{value}");
        }
        let good = format!("00-{TRACE}-{SPAN}-01");
        assert_eq!(read(&[("traceparent", &good), ("traceparent", &good)]), Received::default(), "twice");
    }

    #[test]
    fn a_tracestate_is_kept_whole_or_dropped() {
        let parent = format!("00-{TRACE}-{SPAN}-01");
        let (long_key, long_value) = ("z".repeat(256), "v".repeat(256));
        let most = (0..32).map(|n| format!("k{n}=v")).collect::<Vec<_>>().join(",");
        let valid = [
            "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE".to_owned(),
            "foo=1,".to_owned(),
            "foo=1 \t , \t bar=2, \t baz=3".to_owned(),
            "foo=1,,,bar=2".to_owned(),
            "fw529a3039@dt=FfAAAAAB/;A~|, 0a_-*/@sys=x".to_owned(),
            format!("{long_key}={long_value}"),
            format!("{}@{}=1", "t".repeat(241), "v".repeat(14)),
            most.clone(),
        ];
        for value in valid {
            let headers = headers(&[("traceparent", &parent), ("tracestate", &value)]);
            let received = Received::read(&headers);
            assert!(received.state, "{value}");
            assert_eq!(received.state(&headers), [value.trim()], "{value}");
        }
        let invalid = [
            String::new(),
            " ".to_owned(),
            "foo".to_owned(),
            "foo=".to_owned(),
            "=1".to_owned(),
            "foo =1".to_owned(),
            "FOO=1".to_owned(),
            "foo.bar=1".to_owned(),
            "foo@=1,bar=2".to_owned(),
            "@foo=1".to_owned(),
            "foo@@bar=1".to_owned(),
            "foo=bar=baz".to_owned(),
            "foo=\u{e4}".to_owned(),
            format!("{long_key}z=1"),
            format!("{}@v=1", "t".repeat(242)),
            format!("t@{}=1", "v".repeat(15)),
            format!("foo={long_value}v"),
            format!("{most},one=more"),
        ];
        for value in invalid {
            let pairs = [("traceparent", parent.as_str()), ("tracestate", value.as_str())];
            let received = read(&pairs);
            assert!(received.parent.is_some() && !received.state, "{value}");
            assert!(!written(&pairs, true).iter().any(|line| line.starts_with("tracestate")), "{value}");
        }
        let in_two = [("traceparent", parent.as_str()), ("tracestate", "a=1"), ("tracestate", "b=2")];
        let lines = written(&in_two, true);
        assert_eq!(
            lines,
            [&format!("traceparent: 00-{TRACE}-b7ad6b7169203331-01"), "tracestate: a=1", "tracestate: b=2"]
        );
        assert!(!read(&[("traceparent", "00-0-0-0"), ("tracestate", "a=1")]).state);
        assert_eq!(
            written(&[("traceparent", "00-0-0-0"), ("tracestate", "a=1")], false),
            ["traceparent: 00-00000000000000000000000000000007-b7ad6b7169203331-00"]
        );
    }

    #[test]
    fn flags_that_mean_something_pass_and_others_do_not() {
        for (flags, sampled, expected) in
            [("00", true, "01"), ("01", false, "00"), ("03", true, "03"), ("ff", true, "03")]
        {
            let lines = written(&[("traceparent", &format!("00-{TRACE}-{SPAN}-{flags}"))], sampled);
            assert_eq!(lines, [format!("traceparent: 00-{TRACE}-b7ad6b7169203331-{expected}")]);
        }
        let later = written(&[("traceparent", &format!("cc-{TRACE}-{SPAN}-01-more"))], true);
        assert_eq!(later, [format!("traceparent: 00-{TRACE}-b7ad6b7169203331-01")]);
    }

    #[test]
    fn b3_in_one_header_is_read_and_kept_in_step() {
        let table = [
            (format!("{TRACE}-{SPAN}-1-05e3ac9a4f6e3b90"), Some(true)),
            (format!("{TRACE}-{SPAN}-1"), Some(true)),
            (format!("{TRACE}-{SPAN}-d"), Some(true)),
            (format!("{TRACE}-{SPAN}-0"), Some(false)),
            (format!("{TRACE}-{SPAN}"), None),
        ];
        for (value, sampled) in table {
            let received = read(&[("b3", &value)]);
            assert_eq!(
                (ids(&received), received.sampled),
                (Some((TRACE.to_owned(), SPAN.to_owned())), sampled),
                "{value}"
            );
        }
        for (value, sampled) in [("0", false), ("1", true), ("d", true)] {
            assert_eq!((read(&[("b3", value)]).parent, read(&[("b3", value)]).sampled), (None, Some(sampled)));
        }
        let invalid = ["", "-", "2", "true", TRACE, "a-b-1", "0-0-1", &format!("{TRACE}-{SPAN}-2")];
        let more = [format!("{TRACE}-{SPAN}-1-x"), format!("{TRACE}-{SPAN}-1-{SPAN}-1"), format!("x{TRACE}-{SPAN}-1")];
        for value in invalid.into_iter().chain(more.iter().map(String::as_str)) {
            let received = read(&[("b3", value)]);
            assert_eq!((received.parent, received.sampled), (None, None), "{value}");
        }
        assert_eq!(
            written(&[("b3", &format!("{TRACE}-{SPAN}-d"))], true),
            [format!("b3: {TRACE}-b7ad6b7169203331-d-{SPAN}"), format!("traceparent: 00-{TRACE}-b7ad6b7169203331-01")]
        );
        // Made by us where what came is not valid.
        assert_eq!(
            written(&[("b3", "x")], false),
            [
                "b3: 00000000000000000000000000000007-b7ad6b7169203331-0",
                "traceparent: 00-00000000000000000000000000000007-b7ad6b7169203331-00"
            ]
        );
    }

    #[test]
    fn b3_in_several_headers_is_read_and_kept_in_step() {
        let short = &TRACE[16..];
        let pairs = [("X-B3-TraceId", short), ("X-B3-SpanId", SPAN), ("X-B3-ParentSpanId", "5"), ("X-B3-Flags", "1")];
        let received = read(&pairs);
        assert_eq!(ids(&received), Some((format!("0000000000000000{short}"), SPAN.to_owned())));
        assert_eq!(received.sampled, Some(true));
        assert_eq!(
            written(&pairs, true),
            [
                format!("traceparent: 00-0000000000000000{short}-b7ad6b7169203331-01"),
                "x-b3-flags: 1".to_owned(),
                format!("x-b3-parentspanid: {SPAN}"),
                "x-b3-sampled: 1".to_owned(),
                "x-b3-spanid: b7ad6b7169203331".to_owned(),
                format!("x-b3-traceid: {short}"),
            ]
        );
        for (value, sampled) in
            [("1", Some(true)), ("true", Some(true)), ("0", Some(false)), ("false", Some(false)), ("x", None)]
        {
            assert_eq!(read(&[("x-b3-sampled", value)]).sampled, sampled);
            let whole = [("x-b3-traceid", TRACE), ("x-b3-spanid", SPAN), ("x-b3-sampled", value)];
            assert_eq!((read(&whole).sampled, read(&whole).parent.is_some()), (sampled, true));
        }
        // A half, or nonsense, is nothing.
        for pairs in [
            [("x-b3-traceid", TRACE), ("x-b3-sampled", "1")],
            [("x-b3-spanid", SPAN), ("x-b3-sampled", "1")],
            [("x-b3-traceid", "x"), ("x-b3-spanid", SPAN)],
        ] {
            assert_eq!((read(&pairs).parent, read(&pairs).sampled), (None, None), "{pairs:?}");
        }
    }

    #[test]
    fn a_valid_traceparent_counts_before_b3_and_one_header_before_several() {
        let other = "0af7651916cd43dd8448eb211c80319c";
        let (parent, b3) = (format!("00-{TRACE}-{SPAN}-01"), format!("{other}-{SPAN}-0"));
        let both = read(&[("traceparent", &parent), ("b3", &b3)]);
        assert_eq!((ids(&both).unwrap().0.as_str(), both.sampled), (TRACE, Some(true)));
        let broken = read(&[("traceparent", "x"), ("b3", &b3)]);
        assert_eq!((ids(&broken).unwrap().0.as_str(), broken.sampled), (other, Some(false)));
        let forms = [("b3", b3.as_str()), ("x-b3-traceid", TRACE), ("x-b3-spanid", SPAN)];
        assert_eq!(ids(&read(&forms)).unwrap().0, other);
        // Both stay, and say the same.
        let lines = written(&[("traceparent", &parent), ("b3", &b3)], true);
        assert_eq!(lines[0], format!("b3: {TRACE}-b7ad6b7169203331-1-{SPAN}"));
        let debug = format!("{TRACE}-{SPAN}-d");
        let lines = written(&[("b3", &debug), ("x-b3-traceid", TRACE), ("x-b3-spanid", SPAN)], true);
        assert!(lines.contains(&"x-b3-flags: 1".to_owned()), "{lines:?}");
    }

    fn value() -> impl Strategy<Value = String> {
        prop_oneof![
            "[ -~]{0,80}",
            "[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[ -~]{0,9})?",
            "[0-9a-f]{16}([0-9a-f]{16})?(-[0-9a-f]{16}(-[01d](-[0-9a-f]{16})?)?)?",
            "[01d]",
            "([a-z0-9@]{0,5}=[ -~]{0,5},?){0,40}",
        ]
    }

    proptest! {
        #[test]
        fn whatever_comes_what_goes_on_is_one_valid_context(
            values in proptest::collection::vec((0..8_usize, value()), 0..8), sampled: bool,
        ) {
            let names = [&TRACEPARENT, &TRACESTATE, &B3, &B3_TRACE_ID, &B3_SPAN_ID, &B3_PARENT_SPAN_ID, &B3_SAMPLED, &B3_FLAGS];
            let mut headers = HeaderMap::new();
            for (name, value) in &values {
                headers.append(names[*name], HeaderValue::from_str(value).unwrap());
            }
            let received = Received::read(&headers);
            let trace_id = received.parent.map_or(TraceId::from(9), |parent| parent.trace_id);
            received.write(&mut headers, trace_id, SpanId::from(5), sampled);
            let after = Received::read(&headers);
            prop_assert_eq!(after.parent, Some(Parent { trace_id, span_id: SpanId::from(5) }));
            prop_assert_eq!(after.sampled, Some(sampled));
            prop_assert_eq!(after.state, received.state);
            // Whoever reads B3 alone sees the same.
            headers.remove(TRACEPARENT);
            let b3 = Received::read(&headers);
            if received.single || received.multi {
                prop_assert_eq!(b3.parent, after.parent);
                prop_assert_eq!(b3.sampled, Some(sampled || received.debug));
            } else {
                prop_assert_eq!(b3.parent, None);
            }
        }
    }
}
