//! What holds for all that a caller may say of its trace: it is read as the grammars have it, and what goes on is one context,
//! whoever reads it and in whichever form. The input is a list of headers, a line each.

use std::{collections::HashMap, sync::LazyLock};

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::{
    propagation::TextMapPropagator,
    trace::{SpanId, TraceContextExt, TraceId},
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use regex::bytes::{Captures, Regex};

use super::assert_same;
use crate::trace::context::{
    B3, B3_FLAGS, B3_PARENT_SPAN_ID, B3_SAMPLED, B3_SPAN_ID, B3_TRACE_ID, Parent, Received, TRACEPARENT, TRACESTATE,
};

/// The grammars, read by nothing that the proxy uses: <https://www.w3.org/TR/trace-context/> (3.2 and 3.3), and
/// <https://github.com/openzipkin/b3-propagation>.
static W3C: LazyLock<Regex> =
    LazyLock::new(|| grammar("([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"));
static MEMBER: LazyLock<Regex> = LazyLock::new(|| {
    let key = "[a-z0-9][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z0-9][a-z0-9_*/-]{0,13}";
    // No comma, no equals sign; the last one is no space.
    grammar(&format!(r"(?:{key})=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{{0,255}}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"))
});
static SINGLE: LazyLock<Regex> = LazyLock::new(|| {
    grammar("(?:([0-9a-f]{32}|[0-9a-f]{16})-([0-9a-f]{16})(?:-([01d])(?:-([0-9a-f]{16}))?)?|([01d]))")
});
static ID: LazyLock<Regex> = LazyLock::new(|| grammar("[0-9a-f]{16}|[0-9a-f]{32}"));

fn grammar(of: &str) -> Regex {
    Regex::new(&format!("(?s-u)^(?:{of})$")).unwrap()
}

/// What a request's headers say.
#[derive(Debug, Default, PartialEq, Eq)]
struct Said {
    parent: Option<Parent>,
    sampled: Option<bool>,
    /// Of B3, which goes before what is sampled.
    debug: bool,
    /// The `tracestate` that belongs to it.
    state: Vec<HeaderValue>,
}

impl Said {
    fn by(headers: &HeaderMap) -> Self {
        let w3c = once(headers, &TRACEPARENT).and_then(|value| Self::w3c(value, headers));
        let single = || once(headers, &B3).and_then(Self::single);
        w3c.or_else(single).or_else(|| Self::several(headers)).unwrap_or_default()
    }

    fn w3c(value: &[u8], headers: &HeaderMap) -> Option<Self> {
        let found = W3C.captures(value)?;
        let (version, more) = (number(&found, 1)?, found.get(5));
        let parent = parent(number(&found, 2)?, number(&found, 3)?)?;
        let state: Vec<_> = headers.get_all(TRACESTATE).iter().cloned().collect();
        let members = state.iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
        let members: Vec<_> = members.map(<[u8]>::trim_ascii).filter(|member| !member.is_empty()).collect();
        let passes = (1..=32).contains(&members.len()) && members.iter().all(|member| MEMBER.is_match(member));
        (version != 0xff && (version > 0 || more.is_none())).then(|| Self {
            parent: Some(parent),
            sampled: Some(number(&found, 4).unwrap() & 1 == 1),
            state: if passes { state } else { Vec::new() },
            ..Self::default()
        })
    }

    fn single(value: &[u8]) -> Option<Self> {
        let found = SINGLE.captures(value)?;
        let state = found.get(3).or(found.get(5)).map(|state| state.as_bytes());
        let parent = match found.get(1) {
            Some(_) => Some(parent(number(&found, 1)?, number(&found, 2)?)?),
            None => None,
        };
        let above = found.get(4).is_none() || number(&found, 4) != Some(0);
        let (sampled, debug) = (state.map(|state| state != b"0"), state == Some(b"d"));
        above.then(|| Self { parent, sampled, debug, state: Vec::new() })
    }

    fn several(headers: &HeaderMap) -> Option<Self> {
        let id = |name| once(headers, name).filter(|id| ID.is_match(id));
        let parent = if headers.contains_key(B3_TRACE_ID) || headers.contains_key(B3_SPAN_ID) {
            let (trace_id, span_id) = (id(&B3_TRACE_ID)?, id(&B3_SPAN_ID).filter(|id| id.len() == 16)?);
            Some(parent(hexadecimal(trace_id)?, hexadecimal(span_id)?)?)
        } else {
            None
        };
        let debug = once(headers, &B3_FLAGS) == Some(b"1");
        let sampled = match once(headers, &B3_SAMPLED) {
            Some(b"1" | b"true") => Some(true),
            Some(b"0" | b"false") => Some(false),
            Some(_) | None => None,
        };
        let sampled = if debug { Some(true) } else { sampled };
        Some(Self { parent, sampled, debug, state: Vec::new() })
    }
}

fn once<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a [u8]> {
    let all: Vec<_> = headers.get_all(name).iter().collect();
    let [value] = all.as_slice() else { return None };
    Some(value.as_bytes().trim_ascii())
}

fn hexadecimal(digits: &[u8]) -> Option<u128> {
    u128::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()
}

fn number(found: &Captures<'_>, group: usize) -> Option<u128> {
    hexadecimal(found.get(group)?.as_bytes())
}

fn parent(trace_id: u128, span_id: u128) -> Option<Parent> {
    let span_id = u64::try_from(span_id).ok()?;
    let parent = Parent { trace_id: TraceId::from(trace_id), span_id: SpanId::from(span_id) };
    (trace_id != 0 && span_id != 0).then_some(parent)
}

/// Headers, as lines of `name: value`.
pub(crate) fn run(bytes: &[u8]) {
    let mut came = HeaderMap::new();
    for line in bytes.split(|byte| *byte == b'\n') {
        let Some(at) = line.iter().position(|byte| *byte == b':') else { continue };
        let (name, value) = (HeaderName::from_bytes(&line[..at]), HeaderValue::from_bytes(&line[at + 1..]));
        if let (Ok(name), Ok(value)) = (name, value) {
            came.append(name, value);
        }
    }
    let (received, said) = (Received::read(&came), Said::by(&came));
    assert_same(&(received.parent, received.sampled), &(said.parent, said.sampled), "what is read");
    assert_same(&received.state(&came).len(), &said.state.len(), "the tracestate that is read");

    let trace_id = said.parent.map_or(TraceId::from(7), |parent| parent.trace_id);
    // A span of our own, and the caller's where there is none.
    let spans = [Some(SpanId::from(5)), said.parent.map(|parent| parent.span_id)];
    for (span_id, sampled) in spans.into_iter().flatten().flat_map(|span_id| [(span_id, false), (span_id, true)]) {
        let mut goes = came.clone();
        received.write(&mut goes, trace_id, span_id, sampled);
        goes_on(
            &came,
            &goes,
            &said,
            &Said {
                parent: Some(Parent { trace_id, span_id }),
                sampled: Some(sampled),
                debug: false,
                state: said.state.clone(),
            },
        );
    }
}

/// That `goes`, made of `came`, says `wanted`.
fn goes_on(came: &HeaderMap, goes: &HeaderMap, said: &Said, wanted: &Said) {
    assert_same(&Said::by(goes), wanted, "what goes on");
    let state: Vec<_> = goes.get_all(TRACESTATE).iter().collect();
    assert!(
        state.iter().copied().eq(&wanted.state),
        "of a tracestate that is not passed on nothing goes on: {state:?}"
    );

    // As the application's own library reads it.
    let text =
        |name: &HeaderName| goes.get(name).and_then(|value| Some((name.to_string(), value.to_str().ok()?.into())));
    let carrier: HashMap<String, String> = [&TRACEPARENT, &TRACESTATE].into_iter().filter_map(text).collect();
    let context = TraceContextPropagator::new().extract(&carrier);
    let span = context.span();
    let span = span.span_context();
    let read = Parent { trace_id: span.trace_id(), span_id: span.span_id() };
    assert_same(&(Some(read), Some(span.is_sampled())), &(wanted.parent, wanted.sampled), "OpenTelemetry reads");

    // Whoever reads B3 alone, in either form, sees the same.
    let several = [B3_TRACE_ID, B3_SPAN_ID, B3_SAMPLED, B3_FLAGS];
    let single = Some(goes).filter(|_| came.contains_key(B3)).map(|goes| once(goes, &B3).and_then(Said::single));
    let several = several.iter().any(|name| came.contains_key(name)).then(|| Said::several(goes));
    for b3 in [single, several].into_iter().flatten() {
        let b3 = b3.expect("the form that it came in");
        assert_same(&b3.parent, &wanted.parent, "B3");
        assert_same(&(b3.sampled, b3.debug), &(wanted.sampled.map(|it| it || said.debug), said.debug), "B3's state");
    }
    // Nothing else has changed, nor is there a form that was not asked for.
    let ours = [TRACEPARENT, TRACESTATE, B3, B3_TRACE_ID, B3_SPAN_ID, B3_PARENT_SPAN_ID, B3_SAMPLED, B3_FLAGS];
    let others = |headers: &HeaderMap| {
        let others = headers.iter().filter(|(name, _)| !ours.contains(name));
        let mut others: Vec<_> = others.map(|(name, value)| (name.to_string(), value.clone())).collect();
        // A map has no order of names, only one of the values of each.
        others.sort_by(|one, other| one.0.cmp(&other.0));
        others
    };
    assert_same(&others(goes), &others(came), "other headers");
    let b3 = |headers: &HeaderMap| headers.keys().filter(|name| ours[2..].contains(name)).count();
    assert!(b3(came) > 0 || b3(goes) == 0, "no B3 was asked for");
}
