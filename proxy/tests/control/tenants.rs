//! What one Service has wrong harms no other: the whole binary, told of two Services at once, one of which is bad.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{Request, Response, StatusCode, Version};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost_types::Any;
use sluice_xds::{
    TypeUrl,
    envoy::{
        config::{
            cluster::v3::{Cluster, cluster::LbPolicy},
            core::v3::Http2ProtocolOptions,
            listener::v3::Listener,
            route::v3::{RouteConfiguration, route::Action},
        },
        extensions::upstreams::http::v3::{
            HttpProtocolOptions,
            http_protocol_options::{
                ExplicitHttpConfig, UpstreamProtocolOptions, explicit_http_config::ProtocolConfig,
            },
        },
        service::discovery::v3::Resource,
    },
    pack,
};
use tokio::net::TcpListener;

use crate::{
    binary::{Proxy, free_port, get, sign},
    pki::Ca,
    resources::{address, endpoints, listener, plain_cluster, resource, route, timed},
    server::Server,
};

const WEB: &str = "shop/web:80";
const WEB_REVISION: &str = "shop/web:80/aaaaaaaaaa";
const API: &str = "bank/api:80";
const API_REVISION: &str = "bank/api:80/bbbbbbbbbb";

/// An application that says its name, and how it was asked.
async fn application(name: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let answer = service_fn(move |request: Request<Incoming>| async move {
                let text = format!("{name} {:?} {}", request.version(), request.uri().path());
                Ok::<_, std::convert::Infallible>(Response::new(Full::new(Bytes::from(text))))
            });
            tokio::spawn(async move {
                let http = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                let _ = http.serve_connection(TokioIo::new(stream), answer).await;
            });
        }
    });
    port
}

/// A cluster that is spoken to in HTTP/2, or as the client speaks.
fn speaking(http2: bool) -> Cluster {
    let mut cluster = plain_cluster(WEB_REVISION);
    if http2 {
        let protocol_config = Some(ProtocolConfig::Http2ProtocolOptions(Http2ProtocolOptions::default()));
        let options = HttpProtocolOptions {
            upstream_protocol_options: Some(UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
                protocol_config,
            })),
            ..HttpProtocolOptions::default()
        };
        let name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions".to_owned();
        cluster.typed_extension_protocol_options.insert(name, pack(&options));
    }
    cluster
}

/// A route that asks for this path.
fn rewriting(path: &str) -> RouteConfiguration {
    let mut configuration = route(WEB, &[(WEB_REVISION, 100)]);
    if let Some(Action::Route(action)) = &mut configuration.virtual_hosts[0].routes[0].action {
        action.prefix_rewrite = path.to_owned();
    }
    configuration
}

fn changed<M>(mut good: M, change: impl FnOnce(&mut M)) -> M {
    change(&mut good);
    good
}

/// A message of this kind, which is none.
fn unreadable(kind: TypeUrl, name: &str) -> Resource {
    let any = Any { type_url: kind.as_str().to_owned(), value: vec![0xff] };
    Resource { name: name.to_owned(), version: "bad".to_owned(), resource: Some(any), ..Resource::default() }
}

#[tokio::test]
async fn a_bad_resource_of_one_service_is_named_holds_up_no_other_and_its_last_good_version_serves() {
    let ca = Ca::new();
    let mut server = Server::start(&ca).await;
    let fleet = Proxy::start("fleet", &ca, server.address);
    sign(&mut server, &ca, 1).await;
    let mut stream = server.stream().await;
    stream.request_of(TypeUrl::Cluster).await;
    stream.request_of(TypeUrl::Listener).await;

    let (web, moved, api) = (application("web").await, application("moved").await, application("api").await);
    let (mut web_port, api_port) = (free_port(), free_port());
    let pod = |revision: &str, port| resource(revision, "1", &endpoints(revision, &[("127.0.0.1", port)]));
    let both = |one: Resource, other: Resource| vec![one, other];
    let clusters =
        both(resource(WEB_REVISION, "1", &speaking(false)), resource(API_REVISION, "1", &plain_cluster(API_REVISION)));
    stream.acked(TypeUrl::Cluster, clusters, &[]).await;
    stream.acked(TypeUrl::Endpoints, both(pod(WEB_REVISION, web), pod(API_REVISION, api)), &[]).await;
    let listeners = both(resource(WEB, "1", &listener(WEB, web_port)), resource(API, "1", &listener(API, api_port)));
    stream.acked(TypeUrl::Listener, listeners, &[]).await;
    let routes = both(resource(WEB, "1", &rewriting("/1")), resource(API, "1", &route(API, &[(API_REVISION, 100)])));
    stream.acked(TypeUrl::Route, routes, &[]).await;
    fleet.wait_for("/healthz/ready", StatusCode::OK).await;

    let ask = async |port| {
        let answer = get(SocketAddr::from(([127, 0, 0, 1], port)), "/", Version::HTTP_11).await;
        answer.map(|(_, body)| body).unwrap_or_default()
    };
    assert_eq!((ask(web_port).await, ask(api_port).await), ("web HTTP/1.1 /1".to_owned(), "api HTTP/1.1 /".to_owned()));

    // Of the Service that is bad, and the field that the controller is told.
    let of_cluster =
        |change: fn(&mut Cluster)| resource(API_REVISION, "bad", &changed(plain_cluster(API_REVISION), change));
    let of_listener = |port, change: fn(&mut Listener)| resource(API, "bad", &changed(listener(API, port), change));
    let of_endpoint = |ip, port| resource(API_REVISION, "bad", &endpoints(API_REVISION, &[(ip, port)]));
    let good_route = || route(API, &[(API_REVISION, 100)]);
    let table = [
        (TypeUrl::Cluster, of_cluster(|it| it.lb_policy = LbPolicy::RingHash.into()), "lb_policy is 'RING_HASH'"),
        (TypeUrl::Cluster, of_cluster(|it| it.eds_cluster_config = None), "eds_cluster_config is missing"),
        (TypeUrl::Cluster, unreadable(TypeUrl::Cluster, API_REVISION), "cannot be read"),
        (TypeUrl::Endpoints, of_endpoint("not-an-ip", 80), "endpoints[0].lb_endpoints[0]"),
        (TypeUrl::Endpoints, of_endpoint("127.0.0.1", 0), "endpoints[0].lb_endpoints[0]"),
        (TypeUrl::Endpoints, unreadable(TypeUrl::Endpoints, API_REVISION), "cannot be read"),
        // That of the other Service, as it is until this response.
        (TypeUrl::Listener, of_listener(web_port, |_| {}), "another listener has this port"),
        (
            TypeUrl::Listener,
            of_listener(api_port, |it| it.address = address("127.0.0.1", 20445)),
            "the proxy needs this port itself",
        ),
        (TypeUrl::Listener, of_listener(api_port, |it| it.filter_chains.clear()), "filter_chains"),
        (TypeUrl::Listener, unreadable(TypeUrl::Listener, API), "cannot be read"),
        (TypeUrl::Route, resource(API, "bad", &route(API, &[(API_REVISION, 0)])), "weighted_clusters"),
        (TypeUrl::Route, resource(API, "bad", &timed(good_route(), -1, 0)), "virtual_hosts[0].routes[0].route.timeout"),
        (TypeUrl::Route, unreadable(TypeUrl::Route, API), "cannot be read"),
    ];
    let (mut name, mut protocol, mut path) = ("web", "HTTP/1.1", "/1".to_owned());
    for (index, (kind, bad, field)) in table.into_iter().enumerate() {
        let (number, bad_name) = (index + 2, bad.name.clone());
        // A change of the other Service by the same kind of resource, which its answers show.
        let good = match kind {
            TypeUrl::Cluster => {
                let http2 = protocol == "HTTP/1.1";
                protocol = if http2 { "HTTP/2.0" } else { "HTTP/1.1" };
                resource(WEB_REVISION, &number.to_string(), &speaking(http2))
            }
            TypeUrl::Endpoints => {
                let (next, port) = if name == "web" { ("moved", moved) } else { ("web", web) };
                name = next;
                resource(WEB_REVISION, &number.to_string(), &endpoints(WEB_REVISION, &[("127.0.0.1", port)]))
            }
            TypeUrl::Listener => {
                web_port = free_port();
                resource(WEB, &number.to_string(), &listener(WEB, web_port))
            }
            TypeUrl::Route => {
                path = format!("/{number}");
                resource(WEB, &number.to_string(), &rewriting(&path))
            }
        };
        let nonce = stream.send(kind, vec![bad, good], &[]).await;
        let rejected = stream.answer(kind, &nonce, &mut Vec::new()).await;
        let [(rejected, reason)] = rejected.as_slice() else { panic!("{kind:?} {field}: {rejected:?}") };
        assert!(*rejected == bad_name && reason.contains(field), "{rejected}: '{reason}' does not say '{field}'");
        assert_eq!(ask(web_port).await, format!("{name} {protocol} {path}"), "beside: {reason}");
        assert_eq!(ask(api_port).await, "api HTTP/1.1 /", "its last good version, beside: {reason}");
    }
    // What is good again is served again.
    let mended = application("mended").await;
    let pods = resource(API_REVISION, "good", &endpoints(API_REVISION, &[("127.0.0.1", mended)]));
    stream.acked(TypeUrl::Endpoints, vec![pods], &[]).await;
    assert_eq!(ask(api_port).await, "mended HTTP/1.1 /");
}
