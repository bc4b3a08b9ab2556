//! How long streams may rest, and what else a listener or a route may say of time.

use std::time::Duration;

use sluice_proxy::config::Resources;
use sluice_xds::{
    TypeUrl,
    envoy::{
        config::{
            core::v3::{DataSource, Http2ProtocolOptions, HttpProtocolOptions},
            listener::v3::{Listener, filter::ConfigType},
            route::v3::{
                RouteAction, RouteConfiguration, route::Action as MessageAction, route_action::MaxStreamDuration,
            },
        },
        extensions::filters::network::{
            http_connection_manager::v3::{HttpConnectionManager, http_connection_manager::ServerHeaderTransformation},
            tcp_proxy::v3::TcpProxy,
        },
    },
    pack, unpack,
};

use crate::{
    resources::{endpoints, listener, plain_cluster, resource, route, tcp_listener, unavailable},
    snapshots::{A, WEB, accept, fleet, policy, reason},
};

#[expect(clippy::unnecessary_wraps, reason = "as fields have it")]
fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

fn said(listener: &mut Listener) -> &mut prost_types::Any {
    let ConfigType::TypedConfig(any) = listener.filter_chains[0].filters[0].config_type.as_mut().unwrap();
    any
}

fn http(change: impl FnOnce(&mut HttpConnectionManager)) -> Listener {
    let mut listener = listener(WEB, 20001);
    let any = said(&mut listener);
    let mut manager = unpack(any).unwrap();
    change(&mut manager);
    *any = pack(&manager);
    listener
}

fn tcp(change: impl FnOnce(&mut TcpProxy)) -> Listener {
    let mut listener = tcp_listener(WEB, 20001, &[(A, 100)]);
    let any = said(&mut listener);
    let mut proxy = unpack(any).unwrap();
    change(&mut proxy);
    *any = pack(&proxy);
    listener
}

fn with(change: impl FnOnce(&mut RouteAction)) -> RouteConfiguration {
    let mut configuration = route(WEB, &[(A, 100)]);
    if let Some(MessageAction::Route(action)) = &mut configuration.virtual_hosts[0].routes[0].action {
        change(action);
    }
    configuration
}

#[test]
fn streams_may_rest_for_as_long_as_is_said_and_without_a_word_for_ever() {
    let hour = Some(Duration::from_secs(3600));
    for (said, expected) in [(None, None), (seconds(0), None), (seconds(3600), hour)] {
        let mut resources = fleet();
        let one = resource(WEB, "2", &http(|it| it.stream_idle_timeout = said));
        let snapshot = accept(&mut resources, TypeUrl::Listener, &[one]);
        assert_eq!(snapshot.listeners[WEB].chains[0].idle, expected);

        let mut resources = Resources::default();
        accept(&mut resources, TypeUrl::Cluster, &[resource(A, "1", &plain_cluster(A))]);
        accept(&mut resources, TypeUrl::Endpoints, &[resource(A, "1", &endpoints(A, &[]))]);
        let one = resource(WEB, "1", &tcp(|it| it.idle_timeout = said));
        let snapshot = accept(&mut resources, TypeUrl::Listener, &[one]);
        assert_eq!(snapshot.listeners[WEB].chains[0].idle, expected);

        // On a route 0 is a word: no limit, whatever the listener says.
        let one = resource(WEB, "2", &with(|it| it.idle_timeout = said));
        let snapshot = accept(&mut fleet(), TypeUrl::Route, &[one]);
        assert_eq!(policy(&snapshot).stream_idle, said.map(|_| expected.unwrap_or_default()));
    }
}

#[test]
fn what_is_done_otherwise_here_is_refused_by_its_field() {
    let common = |change: fn(&mut HttpProtocolOptions)| {
        let mut options = HttpProtocolOptions::default();
        change(&mut options);
        http(|it| it.common_http_protocol_options = Some(options))
    };
    let streams = Http2ProtocolOptions { max_concurrent_streams: Some(10), ..Http2ProtocolOptions::default() };
    let append = ServerHeaderTransformation::AppendIfAbsent.into();
    let of_listeners = [
        (http(|it| it.stream_idle_timeout = seconds(-1)), "typed_config.stream_idle_timeout is '-1 s 0 ns'"),
        (http(|it| it.request_timeout = seconds(1)), "typed_config.request_timeout is '1 s 0 ns'"),
        (http(|it| it.request_headers_timeout = seconds(1)), "typed_config.request_headers_timeout"),
        (http(|it| it.drain_timeout = seconds(1)), "typed_config.drain_timeout"),
        (common(|it| it.idle_timeout = seconds(1)), "common_http_protocol_options.idle_timeout"),
        (common(|it| it.max_connection_duration = seconds(1)), "common_http_protocol_options.max_connection_duration"),
        (common(|it| it.max_stream_duration = seconds(1)), "common_http_protocol_options.max_stream_duration"),
        (common(|it| it.max_requests_per_connection = Some(1)), "options.max_requests_per_connection"),
        (http(|it| it.http2_protocol_options = Some(streams)), "http2_protocol_options.max_concurrent_streams is '10'"),
        (http(|it| it.server_header_transformation = append), "server_header_transformation is 'APPEND_IF_ABSENT'"),
        (http(|it| it.use_remote_address = Some(false)), "use_remote_address is 'false'"),
        (http(|it| it.generate_request_id = Some(true)), "generate_request_id is 'true'"),
        (http(|it| it.upgrade_configs[0].enabled = Some(false)), "upgrade_configs[0].enabled is 'false'"),
        (tcp(|it| it.idle_timeout = seconds(-1)), "typed_config.idle_timeout is '-1 s 0 ns'"),
        (tcp(|it| it.max_connect_attempts = Some(1)), "typed_config.max_connect_attempts is '1'"),
        (tcp(|it| it.max_downstream_connection_duration = seconds(1)), "max_downstream_connection_duration"),
    ];
    for (listener, field) in of_listeners {
        let reason = reason(TypeUrl::Listener, resource(WEB, "1", &listener));
        assert!(reason.contains(field), "{reason}, not {field}");
    }
    let most = |most: MaxStreamDuration| with(|it| it.max_stream_duration = Some(most));
    let mut body = unavailable(WEB);
    if let Some(MessageAction::DirectResponse(response)) = &mut body.virtual_hosts[0].routes[0].action {
        response.body = Some(DataSource::default());
    }
    let of_routes = [
        (with(|it| it.idle_timeout = seconds(-1)), "routes[0].route.idle_timeout is '-1 s 0 ns'"),
        (
            most(MaxStreamDuration { max_stream_duration: seconds(1), ..Default::default() }),
            "max_stream_duration is '1 s",
        ),
        (
            most(MaxStreamDuration { grpc_timeout_header_max: seconds(0), ..Default::default() }),
            "grpc_timeout_header_max",
        ),
        (body, "routes[0].direct_response.body"),
    ];
    for (route, field) in of_routes {
        let reason = reason(TypeUrl::Route, resource(WEB, "1", &route));
        assert!(reason.contains(field), "{reason}, not {field}");
    }
}

#[test]
fn what_is_the_same_here_may_be_said() {
    let listener = http(|it| {
        it.request_timeout = seconds(0);
        it.request_headers_timeout = seconds(0);
        it.use_remote_address = Some(true);
        it.generate_request_id = Some(false);
        it.server_header_transformation = ServerHeaderTransformation::PassThrough.into();
        it.http2_protocol_options = Some(Http2ProtocolOptions::default());
        it.common_http_protocol_options = Some(HttpProtocolOptions {
            max_connection_duration: seconds(0),
            max_requests_per_connection: Some(0),
            ..HttpProtocolOptions::default()
        });
        it.upgrade_configs[0].enabled = Some(true);
    });
    accept(&mut fleet(), TypeUrl::Listener, &[resource(WEB, "2", &listener)]);
}
