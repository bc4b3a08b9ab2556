//! Several routes of one port: which one a request takes, and what it is made to say.

use std::sync::Arc;

use http::StatusCode;
use sluice_proxy::{
    snapshot::{Action, Policy, Protocol, Route, RouteMatch, StringMatch, StringRule},
    workers::Role,
};

use crate::support::*;

fn to(app: &App, revision: &str, matches: RouteMatch, policy: Policy) -> Route {
    let split = split([(cluster(revision, &[app.address]), 100)]);
    Route { matches, action: Action::Forward { split, policy: Arc::new(policy) } }
}

fn prefix(prefix: &str) -> RouteMatch {
    let rule = StringRule::Prefix(prefix.to_owned());
    RouteMatch { path: StringMatch { rule, ignore_case: false }, ..RouteMatch::default() }
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
