//! Several routes of one port: which one a request takes, what it is made to ask for, and what browsers are told.

use std::sync::Arc;

use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use sluice_pattern::{Pattern, Piece};
use sluice_proxy::{
    snapshot::{
        Action, Asked, CorsPolicy, Field, HeaderChanges, HeaderMatch, HeaderRule, HostRewrite, PathRewrite, Policy,
        Protocol, QueryMatch, QueryRule, Rewrite, Route, RouteMatch, StringMatch, StringRule,
    },
    workers::Role,
};

use crate::support::*;

const SHOP: &str = "http://shop.example";

fn to(app: &App, revision: &str, matches: RouteMatch, policy: Policy) -> Route {
    let split = split([(cluster(revision, &[app.address]), 100)]);
    Route { matches, action: Action::Forward { split, policy: Arc::new(policy) } }
}

fn text(rule: StringRule) -> StringMatch {
    StringMatch { rule, ignore_case: false }
}

fn exact(value: &str) -> StringMatch {
    text(StringRule::Exact(value.to_owned()))
}

fn prefix(prefix: &str) -> RouteMatch {
    RouteMatch { path: text(StringRule::Prefix(prefix.to_owned())), ..RouteMatch::default() }
}

/// Every request with this header.
fn with(of: Field, rule: HeaderRule) -> RouteMatch {
    let header = HeaderMatch { of, rule, invert: false, missing_is_empty: false };
    RouteMatch { headers: vec![header], ..RouteMatch::default() }
}

fn header(name: &'static str, value: &str) -> RouteMatch {
    with(Field::Header(HeaderName::from_static(name)), HeaderRule::Text(exact(value)))
}

/// Says what it was asked for.
async fn echo() -> App {
    App::start(own_ip(), 8080, |request: Request<Incoming>| async move {
        let said = |name: &str| request.headers().get(name).map_or("-", |value| value.to_str().unwrap()).to_owned();
        let seen =
            format!("{} {} host={} by={}", request.method(), request.uri(), said("host"), said("x-forwarded-host"));
        Response::new(full(seen))
    })
    .await
}

#[tokio::test]
async fn the_first_route_that_matches_is_taken_and_without_one_it_is_404() {
    let (cart, shop) = (App::named("cart").await, App::named("shop").await);
    let proxy = Proxy::start(Role::Fleet);
    let none = Route { matches: prefix("/gone"), action: Action::Respond(StatusCode::GONE) };
    let cart = to(&cart, "a", prefix("/cart"), Policy::default());
    proxy.serve(Protocol::Http(vec![cart, none, to(&shop, "b", prefix("/c"), Policy::default())])).await;

    let mut http1 = Http1::connect(proxy.address).await;
    let mut http2 = Http2::connect(proxy.address).await;
    for (path, status, body) in [
        ("/cart", 200, "cart"),
        ("/cart/1?x=/", 200, "cart"),
        ("/car", 200, "shop"),
        ("/gone", 410, "nothing serves here at the moment\n"),
        ("/", 404, "nothing is configured to serve this\n"),
        ("/?/cart", 404, "nothing is configured to serve this\n"),
    ] {
        for answer in [http1.get(path).await, http2.send(get(&format!("http://cart.shop{path}"))).await.unwrap()] {
            assert_eq!((answer.status.as_u16(), answer.body.as_str()), (status, body), "{path}");
            assert_eq!(answer.header("x-sluice-response-flag") == "NR", status == 404, "{path}");
        }
    }
    let answer = http2.send(call("/shop.Cart/Get")).await.unwrap();
    assert_eq!((answer.status, answer.header("grpc-status")), (StatusCode::OK, "12"));
    assert_eq!(proxy.metric("sluice_local_errors_total{listener=\"shop/cart:80\",flag=\"NR\"}"), 5);
    assert_eq!((proxy.counted("a", "2xx", ""), proxy.counted("b", "2xx", "")), (4, 2));
}

#[tokio::test]
async fn a_request_is_matched_by_what_it_says_in_either_version() {
    let app = App::named("a").await;
    let proxy = Proxy::start(Role::Fleet);
    let number = QueryMatch { name: "n".to_owned(), rule: QueryRule::Text(exact("1")) };
    let query = RouteMatch { query: vec![number], ..RouteMatch::default() };
    let post = |path: &str| Request::post(path).header("host", "cart.shop").body(full("")).unwrap();
    let asks = |name: &'static str, value: &'static str| {
        move |path: &str| {
            let request = Request::get(path).header("host", "cart.shop");
            request.header(name, value).body(full("")).unwrap()
        }
    };
    type Asks<'a> = &'a dyn Fn(&str) -> Request<AnyBody>;
    let table: [(&str, RouteMatch, &str, Asks<'_>, bool); 12] = [
        ("method", with(Field::Method, HeaderRule::Text(exact("POST"))), "/", &post, true),
        ("another method", with(Field::Method, HeaderRule::Text(exact("POST"))), "/", &get, false),
        ("authority", with(Field::Authority, HeaderRule::Text(exact("cart.shop"))), "/", &get, true),
        ("another authority", with(Field::Authority, HeaderRule::Text(exact("cart"))), "/", &get, false),
        ("path", with(Field::Path, HeaderRule::Text(exact("/a?b"))), "/a?b", &get, true),
        ("scheme", with(Field::Scheme, HeaderRule::Text(exact("http"))), "/", &get, true),
        ("header", header("x-a", "1"), "/", &asks("x-a", "1"), true),
        ("header of another value", header("x-a", "1"), "/", &asks("x-a", "2"), false),
        (
            "what is said of one hop",
            header("proxy-connection", "close"),
            "/",
            &asks("proxy-connection", "close"),
            false,
        ),
        ("the client", header("x-forwarded-for", "127.0.0.1"), "/", &get, true),
        ("query", query.clone(), "/?m=2&n=1", &get, true),
        ("another query", query, "/?n=2&n=1", &get, false),
    ];
    for (name, matches, path, asks, taken) in table {
        proxy.serve(Protocol::Http(vec![to(&app, "a", matches, Policy::default())])).await;
        let status = if taken { StatusCode::OK } else { StatusCode::NOT_FOUND };
        assert_eq!(Http1::connect(proxy.address).await.send(asks(path)).await.unwrap().status, status, "{name}");
        let mut request = asks(&format!("http://cart.shop{path}"));
        if request.headers_mut().remove("proxy-connection").is_some() {
            continue; // HTTP/2 has none.
        }
        assert_eq!(Http2::connect(proxy.address).await.send(request).await.unwrap().status, status, "{name}, HTTP/2");
    }
}

#[tokio::test]
async fn a_cookie_that_http_2_cuts_into_pieces_is_matched_as_one() {
    let app = App::named("a").await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(Protocol::Http(vec![to(&app, "a", header("cookie", "a=1; b=2"), Policy::default())])).await;
    let request = Request::get("http://cart.shop/").header("cookie", "a=1").header("cookie", "b=2");
    let answer = Http2::connect(proxy.address).await.send(request.body(full("")).unwrap()).await.unwrap();
    assert_eq!(answer.status, StatusCode::OK);
}

#[tokio::test]
async fn a_request_is_made_to_ask_for_another_path_and_host_in_either_version() {
    let app = echo().await;
    let proxy = Proxy::start(Role::Fleet);
    let host = |note_original| HostRewrite {
        authority: "shop:80".parse().unwrap(),
        value: HeaderValue::from_static("shop:80"),
        note_original,
    };
    let item = || PathRewrite::Regex {
        pattern: Pattern::part(r"^/cart/(\d+)").unwrap(),
        with: vec![Piece::Text("/item/".to_owned()), Piece::Group(1)],
    };
    let shop = || PathRewrite::Prefix { matched: "/cart".len(), with: "/shop".to_owned() };
    let table = [
        (None, Some(shop()), "/shop/1?x=1", "cart.shop", "-"),
        (None, Some(PathRewrite::Whole("/all".to_owned())), "/all?x=1", "cart.shop", "-"),
        (None, Some(item()), "/item/1?x=1", "cart.shop", "-"),
        (Some(host(false)), None, "/cart/1?x=1", "shop:80", "-"),
        (Some(host(true)), Some(shop()), "/shop/1?x=1", "shop:80", "cart.shop"),
    ];
    for (host, path, target, authority, by) in table {
        let policy = Policy { rewrite: Some(Rewrite { host, path }), ..Policy::default() };
        proxy.serve(Protocol::Http(vec![to(&app, "a", prefix("/cart"), policy)])).await;
        let answer = Http1::connect(proxy.address).await.get("/cart/1?x=1").await;
        assert_eq!(answer.body, format!("GET {target} host={authority} by={by}"));
        let answer = Http2::connect(proxy.address).await.send(get("http://cart.shop/cart/1?x=1")).await.unwrap();
        // A client that says it may say the host twice, as long as both are the same.
        let host = if authority == "cart.shop" { authority } else { "-" };
        assert_eq!(answer.body, format!("GET http://{authority}{target} host={host} by={by}"));
    }
}

#[tokio::test]
async fn a_path_that_becomes_none_is_404_and_counts_against_nobody() {
    let app = echo().await;
    let proxy = Proxy::start(Role::Fleet);
    let path = PathRewrite::Regex { pattern: Pattern::part("^/cart").unwrap(), with: Vec::new() };
    let policy = Policy { rewrite: Some(Rewrite { host: None, path: Some(path) }), ..Policy::default() };
    proxy.serve(Protocol::Http(vec![to(&app, "a", prefix("/cart"), policy)])).await;
    let mut client = Http1::connect(proxy.address).await;
    assert_eq!(client.get("/cart/1").await.body, "GET /1 host=cart.shop by=-");
    // Nothing is left, which is no rewrite; and then something that is no path.
    assert_eq!(client.get("/cart?x").await.body, "GET /cart?x host=cart.shop by=-");
    let answer = client.get("/carts").await;
    assert_eq!((answer.status, answer.header("x-sluice-response-flag")), (StatusCode::NOT_FOUND, "NR"));
    assert_eq!((app.requests(), proxy.counted("a", "2xx", ""), proxy.counted("a", "4xx", "")), (2, 2, 0));
}

#[tokio::test]
async fn what_is_too_long_for_an_expression_matches_none_and_is_not_rewritten() {
    let (known, rest) = (App::named("known").await, echo().await);
    let proxy = Proxy::start(Role::Fleet);
    let user = StringRule::Regex(Pattern::whole("a+").unwrap());
    let user = with(Field::Header(HeaderName::from_static("x-user")), HeaderRule::Text(text(user)));
    let path = PathRewrite::Regex { pattern: Pattern::part("_").unwrap(), with: vec![Piece::Text("-".to_owned())] };
    let policy = Policy { rewrite: Some(Rewrite { host: None, path: Some(path) }), ..Policy::default() };
    let routes = vec![to(&known, "a", user, Policy::default()), to(&rest, "b", RouteMatch::default(), policy)];
    proxy.serve(Protocol::Http(routes)).await;
    for (length, body) in [(8192, "known"), (8193, "GET / host=cart.shop by=-")] {
        let request = Request::get("/").header("host", "cart.shop").header("x-user", "a".repeat(length));
        let answer = Http1::connect(proxy.address).await.send(request.body(full("")).unwrap()).await.unwrap();
        assert_eq!(answer.body, body, "{length}");
    }
    let answer = Http1::connect(proxy.address).await.get(&format!("/{}", "_".repeat(100))).await;
    assert_eq!(answer.body, format!("GET /{} host=cart.shop by=-", "-".repeat(100)));
    for path in [format!("/{}", "x".repeat(8192)), format!("/{}", "_".repeat(8000))] {
        let answer = Http1::connect(proxy.address).await.get(&path).await;
        assert_eq!((answer.status, answer.header("x-sluice-response-flag")), (StatusCode::NOT_FOUND, "NR"));
    }
    assert_eq!((known.requests(), rest.requests()), (1, 2));
}

fn cors() -> CorsPolicy {
    CorsPolicy {
        origins: vec![exact(SHOP)],
        methods: Some(Asked::These(HeaderValue::from_static("GET, PUT"))),
        headers: Some(Asked::All),
        expose: Some(HeaderValue::from_static("x-total")),
        max_age: Some(HeaderValue::from_static("600")),
        credentials: true,
        forward_others: true,
    }
}

fn asked_from(origin: &str, target: &str, method: Method) -> Request<AnyBody> {
    let request = Request::builder().method(method).uri(target).header("host", "cart.shop").header("origin", origin);
    request.header("access-control-request-method", "PUT").body(full("")).unwrap()
}

#[tokio::test]
async fn a_browser_s_question_is_answered_without_the_application_and_counts_for_nobody() {
    let app = echo().await;
    let proxy = Proxy::start(Role::Fleet);
    let policy = Policy { cors: Some(cors()), ..Policy::default() };
    proxy.serve(Protocol::Http(vec![to(&app, "a", RouteMatch::default(), policy)])).await;
    let mut http1 = Http1::connect(proxy.address).await;
    let mut http2 = Http2::connect(proxy.address).await;
    for answer in [
        http1.send(asked_from(SHOP, "/", Method::OPTIONS)).await.unwrap(),
        http2.send(asked_from(SHOP, "http://cart.shop/", Method::OPTIONS)).await.unwrap(),
    ] {
        assert_eq!((answer.status, answer.body.as_str()), (StatusCode::OK, ""));
        assert_eq!(answer.header("access-control-allow-origin"), SHOP);
        assert_eq!(answer.header("access-control-allow-methods"), "GET, PUT");
        assert_eq!(answer.header("access-control-max-age"), "600");
        assert!(!answer.headers.contains_key("x-sluice-response-flag"));
    }
    assert_eq!(app.requests(), 0);
    eventually("the end", || proxy.metric("sluice_requests_active{listener=\"shop/cart:80\"}") == 0).await;
    for class in ["2xx", "4xx", "5xx"] {
        assert_eq!(proxy.counted("a", class, ""), 0);
    }
    // Nor is the connection used up.
    assert_eq!(http1.get("/").await.status, StatusCode::OK);
}

#[tokio::test]
async fn answers_say_that_an_allowed_origin_may_read_them_and_failures_do_too() {
    let app = App::named("a").await;
    let proxy = Proxy::start(Role::Fleet);
    let policy = || Policy { cors: Some(cors()), ..Policy::default() };
    proxy.serve(Protocol::Http(vec![to(&app, "a", RouteMatch::default(), policy())])).await;
    for (origin, told) in [(SHOP, SHOP), ("http://other.example", ""), ("", "")] {
        for answer in [
            Http1::connect(proxy.address).await.send(asked_from(origin, "/", Method::GET)).await.unwrap(),
            Http2::connect(proxy.address)
                .await
                .send(asked_from(origin, "http://cart.shop/", Method::GET))
                .await
                .unwrap(),
        ] {
            assert_eq!((answer.body.as_str(), answer.header("access-control-allow-origin")), ("a", told));
            assert_eq!(answer.header("access-control-expose-headers").is_empty(), told.is_empty());
            assert_eq!(answer.header("access-control-allow-credentials").is_empty(), told.is_empty());
        }
    }
    let split = split([(cluster("a", &[]), 100)]);
    let action = Action::Forward { split, policy: Arc::new(policy()) };
    proxy.serve(Protocol::http(action)).await;
    let answer = Http1::connect(proxy.address).await.send(asked_from(SHOP, "/", Method::GET)).await.unwrap();
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.header("access-control-allow-origin"), SHOP);
}

/// As Envoy, whose filters see it like any other answer.
#[tokio::test]
async fn an_answer_that_switches_to_websocket_says_what_its_route_adds() {
    let app = websocket_echo(own_ip()).await;
    let proxy = Proxy::start(Role::Fleet);
    let served_by = (HeaderName::from_static("x-served-by"), HeaderValue::from_static("sluice"), false);
    let response_headers = HeaderChanges { remove: Vec::new(), write: vec![served_by] };
    let policy = Policy { cors: Some(cors()), response_headers, ..Policy::default() };
    proxy.serve(Protocol::Http(vec![to(&app, "a", RouteMatch::default(), policy)])).await;
    for (origin, told) in [(SHOP, SHOP), ("http://other.example", "")] {
        let mut request = asked_from(origin, "/", Method::GET);
        request.headers_mut().insert("connection", HeaderValue::from_static("upgrade"));
        request.headers_mut().insert("upgrade", HeaderValue::from_static("websocket"));
        let mut answer = Http1::connect(proxy.address).await.start(request).await.unwrap();
        assert_eq!(answer.status(), StatusCode::SWITCHING_PROTOCOLS);
        let said = |name: &str| answer.headers().get(name).map_or("", |value| value.to_str().unwrap());
        assert_eq!((said("connection"), said("upgrade")), ("upgrade", "websocket"));
        assert_eq!(said("access-control-allow-origin"), told);
        assert_eq!(said("access-control-expose-headers").is_empty(), told.is_empty());
        assert_eq!(said("access-control-allow-credentials").is_empty(), told.is_empty());
        assert_eq!(said("x-served-by"), "sluice");
        // And both sides have switched.
        let mut stream = TokioIo::new(soon("the switch", hyper::upgrade::on(&mut answer)).await.unwrap());
        echoes(&mut stream).await;
    }
}
