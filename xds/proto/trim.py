#!/usr/bin/env python3
"""Writes the trimmed Envoy protos of this folder from the full ones.

    pip install --target /tmp/xds-protos xds-protos==1.85.0
    PYTHONPATH=/tmp/xds-protos python3 trim.py

Packages, names, numbers and types are copied from Envoy's own descriptors, so they cannot differ from them; what is
not named below is an unknown field to us. To use one more field of the xDS API, name it here and run the script.
"""

import importlib
import pathlib
from google.protobuf.descriptor import FieldDescriptor as F

# Python module -> {message or enum or service (nested ones with dots): fields}. Enums are always whole.
KEEP = {
    "google.rpc.status_pb2": {"Status": "code message details"},
    "envoy.type.v3.percent_pb2": {
        "Percent": "value",
        "FractionalPercent": "numerator denominator",
        "FractionalPercent.DenominatorType": None,
    },
    "envoy.type.v3.range_pb2": {"Int64Range": "start end"},
    "envoy.type.matcher.v3.regex_pb2": {
        "RegexMatcher": "regex",
        "RegexMatchAndSubstitute": "pattern substitution",
    },
    "envoy.type.matcher.v3.string_pb2": {"StringMatcher": "exact prefix suffix safe_regex contains ignore_case"},
    "envoy.config.core.v3.address_pb2": {
        "Address": "socket_address",
        "SocketAddress": "protocol address port_value named_port",
        "SocketAddress.Protocol": None,
    },
    "envoy.config.core.v3.base_pb2": {
        "TrafficDirection": None,
        "RoutingPriority": None,
        "Locality": "region zone sub_zone",
        "Node": "id cluster metadata locality user_agent_name user_agent_version client_features",
        "Metadata": "filter_metadata typed_filter_metadata",
        "DataSource": "filename inline_bytes inline_string",
        "HeaderValue": "key value",
        "HeaderValueOption": "header append_action",
        "HeaderValueOption.HeaderAppendAction": None,
        "TransportSocket": "name typed_config",
        "ControlPlane": "identifier",
        "RuntimeFeatureFlag": "default_value",
        "RuntimeFractionalPercent": "default_value",
    },
    "envoy.config.core.v3.config_source_pb2": {
        "ApiVersion": None,
        "AggregatedConfigSource": "",
        "SelfConfigSource": "transport_api_version",
        "ConfigSource": "ads self initial_fetch_timeout resource_api_version",
    },
    "envoy.config.core.v3.extension_pb2": {"TypedExtensionConfig": "name typed_config"},
    "envoy.config.core.v3.health_check_pb2": {"HealthStatus": None},
    "envoy.config.core.v3.protocol_pb2": {
        "HttpProtocolOptions": "idle_timeout max_connection_duration max_stream_duration max_requests_per_connection",
        "Http1ProtocolOptions": "",
        "Http2ProtocolOptions": "max_concurrent_streams initial_stream_window_size initial_connection_window_size",
    },
    "envoy.config.endpoint.v3.endpoint_components_pb2": {
        "Endpoint": "address hostname",
        "LbEndpoint": "endpoint health_status metadata load_balancing_weight",
        "LocalityLbEndpoints": "locality lb_endpoints load_balancing_weight priority",
    },
    "envoy.config.endpoint.v3.endpoint_pb2": {"ClusterLoadAssignment": "cluster_name endpoints"},
    "envoy.config.cluster.v3.circuit_breaker_pb2": {
        "CircuitBreakers": "thresholds",
        "CircuitBreakers.Thresholds": "priority max_connections max_pending_requests max_requests max_retries",
    },
    "envoy.config.cluster.v3.outlier_detection_pb2": {
        "OutlierDetection": "consecutive_5xx interval base_ejection_time max_ejection_percent"
        " consecutive_gateway_failure enforcing_consecutive_5xx enforcing_consecutive_gateway_failure"
        " split_external_local_origin_errors consecutive_local_origin_failure enforcing_success_rate"
        " max_ejection_time",
    },
    "envoy.config.cluster.v3.cluster_pb2": {
        "Cluster": "name alt_stat_name type eds_cluster_config connect_timeout per_connection_buffer_limit_bytes"
        " lb_policy load_assignment circuit_breakers outlier_detection least_request_lb_config original_dst_lb_config"
        " common_lb_config typed_extension_protocol_options transport_socket metadata",
        "Cluster.DiscoveryType": None,
        "Cluster.LbPolicy": None,
        "Cluster.EdsClusterConfig": "eds_config service_name",
        "Cluster.SlowStartConfig": "slow_start_window min_weight_percent",
        "Cluster.LeastRequestLbConfig": "choice_count slow_start_config",
        "Cluster.OriginalDstLbConfig": "use_http_header upstream_port_override",
        "Cluster.CommonLbConfig": "healthy_panic_threshold zone_aware_lb_config",
        "Cluster.CommonLbConfig.ZoneAwareLbConfig": "routing_enabled min_cluster_size",
    },
    "envoy.config.listener.v3.listener_components_pb2": {
        "Filter": "name typed_config",
        "FilterChainMatch": "destination_port server_names transport_protocol application_protocols",
        "FilterChain": "filter_chain_match filters transport_socket name",
        "ListenerFilter": "name typed_config",
    },
    "envoy.config.listener.v3.listener_pb2": {
        "Listener": "name address stat_prefix filter_chains default_filter_chain per_connection_buffer_limit_bytes"
        " metadata listener_filters listener_filters_timeout traffic_direction enable_reuse_port",
    },
    "envoy.config.route.v3.route_pb2": {"RouteConfiguration": "name virtual_hosts validate_clusters"},
    "envoy.config.route.v3.route_components_pb2": {
        "VirtualHost": "name domains routes",
        "Route": "name match route direct_response metadata request_headers_to_add request_headers_to_remove"
        " response_headers_to_add response_headers_to_remove typed_per_filter_config",
        "WeightedCluster": "clusters total_weight use_hash_policy",
        "WeightedCluster.ClusterWeight": "name weight",
        "RouteMatch": "prefix path safe_regex path_separated_prefix case_sensitive headers query_parameters",
        "HeaderMatcher": "name present_match string_match range_match invert_match treat_missing_header_as_empty",
        "QueryParameterMatcher": "name string_match present_match",
        "RouteAction": "cluster weighted_clusters timeout idle_timeout retry_policy prefix_rewrite regex_rewrite"
        " host_rewrite_literal append_x_forwarded_host request_mirror_policies hash_policy max_stream_duration",
        "RouteAction.MaxStreamDuration": "max_stream_duration grpc_timeout_header_max grpc_timeout_header_offset",
        "RouteAction.RequestMirrorPolicy": "cluster runtime_fraction disable_shadow_host_suffix_append",
        "RouteAction.HashPolicy": "header cookie terminal",
        "RouteAction.HashPolicy.Header": "header_name",
        "RouteAction.HashPolicy.Cookie": "name ttl path attributes",
        "RouteAction.HashPolicy.CookieAttribute": "name value",
        "RetryPolicy": "retry_on num_retries per_try_timeout",
        "DirectResponseAction": "status body",
    },
    "envoy.extensions.filters.common.fault.v3.fault_pb2": {"FaultDelay": "fixed_delay percentage"},
    "envoy.extensions.filters.http.cors.v3.cors_pb2": {
        "Cors": "",
        "CorsPolicy": "allow_origin_string_match allow_methods allow_headers expose_headers max_age allow_credentials"
        " filter_enabled forward_not_matching_preflights",
    },
    "envoy.extensions.filters.http.fault.v3.fault_pb2": {
        "FaultAbort": "http_status grpc_status percentage",
        "HTTPFault": "delay abort headers",
    },
    "envoy.extensions.filters.http.router.v3.router_pb2": {"Router": "suppress_envoy_headers"},
    "envoy.extensions.filters.listener.http_inspector.v3.http_inspector_pb2": {"HttpInspector": ""},
    "envoy.extensions.filters.listener.tls_inspector.v3.tls_inspector_pb2": {"TlsInspector": ""},
    "envoy.extensions.filters.network.connection_limit.v3.connection_limit_pb2": {
        "ConnectionLimit": "stat_prefix max_connections delay runtime_enabled",
    },
    "envoy.extensions.filters.network.http_connection_manager.v3.http_connection_manager_pb2": {
        "HttpConnectionManager": "codec_type stat_prefix rds route_config http_filters common_http_protocol_options"
        " http2_protocol_options server_header_transformation stream_idle_timeout request_timeout request_headers_timeout"
        " drain_timeout use_remote_address generate_request_id upgrade_configs",
        "HttpConnectionManager.CodecType": None,
        "HttpConnectionManager.ServerHeaderTransformation": None,
        "HttpConnectionManager.UpgradeConfig": "upgrade_type enabled",
        "Rds": "config_source route_config_name",
        "HttpFilter": "name typed_config is_optional disabled",
    },
    "envoy.extensions.filters.network.tcp_proxy.v3.tcp_proxy_pb2": {
        "TcpProxy": "stat_prefix cluster weighted_clusters idle_timeout max_connect_attempts max_downstream_connection_duration",
        "TcpProxy.WeightedCluster": "clusters",
        "TcpProxy.WeightedCluster.ClusterWeight": "name weight",
    },
    "envoy.extensions.transport_sockets.tls.v3.common_pb2": {
        "TlsParameters": "tls_minimum_protocol_version tls_maximum_protocol_version",
        "TlsParameters.TlsProtocol": None,
        "TlsCertificate": "certificate_chain private_key",
        "SubjectAltNameMatcher": "san_type matcher",
        "SubjectAltNameMatcher.SanType": None,
        "CertificateValidationContext": "trusted_ca match_typed_subject_alt_names",
    },
    "envoy.extensions.transport_sockets.tls.v3.secret_pb2": {
        "SdsSecretConfig": "name sds_config",
        "Secret": "name tls_certificate validation_context",
    },
    "envoy.extensions.transport_sockets.tls.v3.tls_pb2": {
        "UpstreamTlsContext": "common_tls_context sni",
        "DownstreamTlsContext": "common_tls_context require_client_certificate",
        "CommonTlsContext": "tls_params tls_certificates tls_certificate_sds_secret_configs validation_context"
        " validation_context_sds_secret_config combined_validation_context alpn_protocols",
        "CommonTlsContext.CombinedCertificateValidationContext": "default_validation_context"
        " validation_context_sds_secret_config",
    },
    "envoy.extensions.upstreams.http.v3.http_protocol_options_pb2": {
        "HttpProtocolOptions": "common_http_protocol_options explicit_http_config use_downstream_protocol_config",
        "HttpProtocolOptions.ExplicitHttpConfig": "http_protocol_options http2_protocol_options",
        "HttpProtocolOptions.UseDownstreamHttpConfig": "http_protocol_options http2_protocol_options",
    },
    "envoy.service.discovery.v3.discovery_pb2": {
        "DiscoveryRequest": "version_info node resource_names type_url response_nonce error_detail",
        "DiscoveryResponse": "version_info resources type_url nonce control_plane",
        "DeltaDiscoveryRequest": "node type_url resource_names_subscribe resource_names_unsubscribe"
        " initial_resource_versions response_nonce error_detail",
        "DeltaDiscoveryResponse": "system_version_info resources type_url removed_resources nonce control_plane",
        "Resource": "name aliases version resource",
    },
    "envoy.service.discovery.v3.ads_pb2": {"AggregatedDiscoveryService": None},
}

SCALAR = {getattr(F, "TYPE_" + t.upper()): t for t in
          "double float int64 uint64 int32 fixed64 fixed32 bool string bytes uint32 sfixed32 sfixed64 sint32 sint64".split()}
WELL_KNOWN = "google.protobuf."

kept, files = set(), {}
for module, names in KEEP.items():
    file = importlib.import_module(module).DESCRIPTOR
    files[module] = file
    kept.update(file.package + "." + name for name in names)


def type_name(field, imports):
    if field.type in SCALAR:
        return SCALAR[field.type]
    target = field.message_type or field.enum_type
    assert target.full_name in kept or target.full_name.startswith(WELL_KNOWN), f"{field.full_name}: {target.full_name} is not kept"
    imports.add(target.file.name)
    return "." + target.full_name


def write_field(field, indent, imports, in_oneof):
    label = ""
    if field.message_type and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[n] for n in ("key", "value"))
        kind = f"map<{type_name(key, imports)}, {type_name(value, imports)}>"
    else:
        kind = type_name(field, imports)
        if field.is_repeated:
            label = "repeated "
        elif field.containing_oneof and not in_oneof:
            label = "optional "
    return [f"{indent}{label}{kind} {field.name} = {field.number};"]


def write_enum(enum, indent):
    out = [f"{indent}enum {enum.name} {{"]
    out += [f"{indent}  {v.name} = {v.number};" for v in enum.values]
    return out + [indent + "}"]


def write_message(message, path, names, indent, imports):
    out = [f"{indent}message {message.name} {{"]
    inner = indent + "  "
    for enum in message.enum_types:
        if f"{path}.{enum.name}" in names:
            out += write_enum(enum, inner)
    for nested in message.nested_types:
        if f"{path}.{nested.name}" in names:
            out += write_message(nested, f"{path}.{nested.name}", names, inner, imports)
    wanted = names[path].split()
    unknown = set(wanted) - set(message.fields_by_name)
    assert not unknown, f"{message.full_name} has no {unknown}"
    done = set()
    for field in message.fields:
        if field.name not in wanted or field.name in done:
            continue
        oneof = field.containing_oneof
        if oneof is None or oneof.name.startswith("_"):
            out += write_field(field, inner, imports, False)
            continue
        out.append(f"{inner}oneof {oneof.name} {{")
        for member in oneof.fields:
            if member.name in wanted:
                done.add(member.name)
                out += write_field(member, inner + "  ", imports, True)
        out.append(inner + "}")
    return out + [indent + "}"]


root = pathlib.Path(__file__).parent
for module, names in KEEP.items():
    file, imports, body = files[module], set(), []
    for enum in file.enum_types_by_name.values():
        if enum.name in names:
            body += [""] + write_enum(enum, "")
    for message in file.message_types_by_name.values():
        if message.name in names:
            body += [""] + write_message(message, message.name, names, "", imports)
    for service in file.services_by_name.values():
        if service.name in names:
            body += ["", f"service {service.name} {{"]
            for m in service.methods:
                imports.update((m.input_type.file.name, m.output_type.file.name))
                body.append(f"  rpc {m.name}(stream .{m.input_type.full_name}) returns (stream .{m.output_type.full_name});")
            body.append("}")
    imports.discard(file.name)
    head = [f"// Trimmed from {file.name} by trim.py; licensed as the original (Apache-2.0).", 'syntax = "proto3";', "",
            f"package {file.package};"]
    if imports:
        head += [""] + [f'import "{i}";' for i in sorted(imports)]
    path = root / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(head + body) + "\n")
