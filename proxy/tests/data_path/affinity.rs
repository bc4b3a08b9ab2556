//! Users rather than requests are split: a user stays with a version.

use std::{collections::BTreeSet, sync::Arc};

use http::{HeaderName, HeaderValue, Request, Response};
use sluice_proxy::{
    snapshot::{Action, HashPolicy, HashedBy, Policy, Protocol},
    workers::Role,
};

use crate::support::*;

fn by_cookie(given: bool) -> HashPolicy {
    let given = given.then(|| "; Max-Age=3600; Path=/; HttpOnly".to_owned());
    HashPolicy { by: HashedBy::Cookie { name: "user".into(), given }, terminal: false }
}

/// As the controller lists them: the primary first, and no canary at weight 0.
fn sides(affinity: &[HashPolicy], primary: &App, canary: &App, weight: u32) -> Protocol {
    let mut targets = vec![(cluster("primary", &[primary.address]), 100 - weight)];
    if weight > 0 {
        targets.push((cluster("canary", &[canary.address]), weight));
    }
    targets.retain(|(_, weight)| *weight > 0);
    let policy = Policy { affinity: affinity.to_vec(), ..Policy::default() };
    Protocol::http(Action::Forward { split: split(targets), policy: Arc::new(policy) })
}

fn with(name: &str, value: &str) -> Request<AnyBody> {
    let mut request = get("/");
    let name: HeaderName = name.parse().unwrap();
    request.headers_mut().insert(name, HeaderValue::from_str(value).unwrap());
    request
}

fn over_http2(request: Request<AnyBody>) -> Request<AnyBody> {
    let (mut parts, body) = request.into_parts();
    parts.headers.remove("host");
    parts.uri = "http://cart.shop/".parse().unwrap();
    Request::from_parts(parts, body)
}

#[tokio::test]
async fn a_rising_weight_only_adds_users_and_a_user_never_changes_sides_under_one() {
    let (primary, canary) = (App::named("primary").await, App::named("canary").await);
    let proxy = Proxy::start(Role::Fleet);
    let mut before = BTreeSet::new();
    for weight in [0, 5, 20, 50, 100] {
        proxy.serve(sides(&[by_cookie(false)], &primary, &canary, weight)).await;
        // Connections to every thread: each has to come to the same.
        let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
        let mut users = BTreeSet::new();
        for user in 0..200 {
            let request = || with("cookie", &format!("theme=dark; user=\"{user}\""));
            let first = http1.send(request()).await.unwrap().body;
            assert_eq!(http2.send(over_http2(request())).await.unwrap().body, first);
            if first == "canary" {
                users.insert(user);
            }
        }
        assert!(users.is_superset(&before), "at {weight}: {:?} left", before.difference(&users));
        // n = 200: 5 standard deviations are at most 36.
        let expected = 2 * usize::try_from(weight).unwrap();
        assert!(users.len().abs_diff(expected) <= 36, "{} at {weight}", users.len());
        before = users;
    }
    assert_eq!(before.len(), 200);
}

#[tokio::test]
async fn a_user_without_a_cookie_is_given_one_and_stays_where_the_first_answer_came_from() {
    let answer = |name: &'static str| {
        App::start(own_ip(), 8080, move |_| async move {
            Response::builder().header("set-cookie", "theme=dark").body(full(name)).unwrap()
        })
    };
    let (primary, canary) = (answer("primary").await, answer("canary").await);
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(sides(&[by_cookie(true)], &primary, &canary, 50)).await;
    let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
    let (mut values, mut seen) = (BTreeSet::new(), BTreeSet::new());
    for round in 0..40 {
        let request = with("cookie", "theme=dark");
        let first = if round % 2 == 0 {
            http1.send(request).await.unwrap()
        } else {
            http2.send(over_http2(request)).await.unwrap()
        };
        let cookies: Vec<_> = first.headers.get_all("set-cookie").iter().map(|it| it.to_str().unwrap()).collect();
        let [theirs, ours] = cookies[..] else { panic!("{cookies:?}") };
        assert_eq!(theirs, "theme=dark");
        let value = ours.strip_prefix("user=\"").and_then(|it| it.strip_suffix("\"; Max-Age=3600; Path=/; HttpOnly"));
        let value = value.unwrap_or_else(|| panic!("{ours}"));
        assert!(value.len() == 16 && value.bytes().all(|byte| byte.is_ascii_hexdigit()), "{ours}");
        for pair in [format!("user={value}"), format!("user=\"{value}\"")] {
            let again = http1.send(with("cookie", &pair)).await.unwrap();
            assert_eq!((again.body.as_str(), again.headers.get_all("set-cookie").iter().count()), (&*first.body, 1));
        }
        values.insert(value.to_owned());
        seen.insert(first.body);
    }
    // Users on one connection are many.
    assert_eq!((values.len(), seen.len()), (40, 2));
}

#[tokio::test]
async fn who_does_not_say_who_he_is_is_drawn_by_chance() {
    let (primary, canary) = (App::named("primary").await, App::named("canary").await);
    let proxy = Proxy::start(Role::Fleet);
    let by_header = HashPolicy { by: HashedBy::Header(HeaderName::from_static("x-user")), terminal: true };
    proxy.serve(sides(&[by_header, by_cookie(false)], &primary, &canary, 50)).await;
    let mut client = Http1::connect(proxy.address).await;
    let (mut anonymous, mut known) = (BTreeSet::new(), BTreeSet::new());
    for round in 0..40 {
        let answer = client.get("/").await;
        assert!(!answer.headers.contains_key("set-cookie"));
        anonymous.insert(answer.body);
        // The header is enough, whatever the cookie says.
        let mut request = with("x-user", "ada");
        request.headers_mut().insert("cookie", HeaderValue::from_str(&format!("user={round}")).unwrap());
        known.insert(client.send(request).await.unwrap().body);
    }
    assert_eq!((anonymous.len(), known.len()), (2, 1));
}
