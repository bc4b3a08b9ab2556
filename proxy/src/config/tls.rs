//! TLS contexts: of all that Envoy allows, our proxies take "our own certificate, and exactly this peer".

use prost::Name;
use prost_types::Any;
use sluice_xds::{
    SpiffeId,
    envoy::{
        config::core::v3::{TransportSocket, transport_socket::ConfigType},
        extensions::transport_sockets::tls::v3::{
            CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig, UpstreamTlsContext,
            common_tls_context::ValidationContextType, subject_alt_name_matcher::SanType, tls_parameters::TlsProtocol,
        },
        r#type::matcher::v3::string_matcher::MatchPattern,
    },
    unpack,
};

use super::ConfigError;
use crate::snapshot::{ClientTls, ServerTls};

/// The names by which a proxy's own certificate and the trust bundle are meant (docs/xds.md).
const OWN_CERTIFICATE: &str = "default";
const TRUST_BUNDLE: &str = "ROOTCA";

pub(super) fn client(socket: &TransportSocket) -> Result<ClientTls, ConfigError> {
    let context: UpstreamTlsContext = open(socket)?;
    if context.sni.is_empty() {
        return Err(ConfigError::missing("transport_socket.sni"));
    }
    if rustls::pki_types::DnsName::try_from(context.sni.as_str()).is_err() {
        return Err(ConfigError::invalid("transport_socket.sni", context.sni, "it must be a DNS name"));
    }
    let server_id = peer(context.common_tls_context.as_ref())?;
    Ok(ClientTls { sni: context.sni, server_id })
}

pub(super) fn server(socket: &TransportSocket) -> Result<ServerTls, ConfigError> {
    let context: DownstreamTlsContext = open(socket)?;
    let required = context.require_client_certificate.unwrap_or_default();
    if !required {
        return Err(ConfigError::unsupported("transport_socket.require_client_certificate", required, "true"));
    }
    let client_id = peer(context.common_tls_context.as_ref())?;
    Ok(ServerTls { client_id })
}

fn open<M: prost::Message + Name + Default>(socket: &TransportSocket) -> Result<M, ConfigError> {
    let Some(ConfigType::TypedConfig(any)) = &socket.config_type else {
        return Err(ConfigError::missing("transport_socket.typed_config"));
    };
    read(any, "transport_socket.typed_config")
}

/// [`unpack`], with the name of the field.
pub(super) fn read<M: prost::Message + Name + Default>(any: &Any, field: &str) -> Result<M, ConfigError> {
    unpack(any).map_err(|source| ConfigError::Encoding { field: field.to_owned(), source })
}

/// The one SPIFFE id that the peer must have.
fn peer(context: Option<&CommonTlsContext>) -> Result<String, ConfigError> {
    const COMMON: &str = "transport_socket.common_tls_context";
    let context = context.ok_or_else(|| ConfigError::missing(COMMON))?;

    if let Some(parameters) = &context.tls_params {
        let highest = parameters.tls_maximum_protocol_version;
        if ![TlsProtocol::TlsAuto, TlsProtocol::TlSv13].map(i32::from).contains(&highest) {
            let field = format!("{COMMON}.tls_params.tls_maximum_protocol_version");
            return Err(ConfigError::unsupported(field, highest, "TLSv1_3"));
        }
    }
    if !context.tls_certificates.is_empty() {
        let field = format!("{COMMON}.tls_certificates");
        return Err(ConfigError::unsupported(field, "set", "only its own certificate, by the SDS name 'default'"));
    }
    for (at, secret) in context.tls_certificate_sds_secret_configs.iter().enumerate() {
        let field = format!("{COMMON}.tls_certificate_sds_secret_configs[{at}].name");
        secret_named(secret, OWN_CERTIFICATE, field, "'default', its own certificate")?;
    }

    let Some(ValidationContextType::CombinedValidationContext(combined)) = &context.validation_context_type else {
        return Err(ConfigError::missing(format!("{COMMON}.combined_validation_context")));
    };
    let field = format!("{COMMON}.combined_validation_context");
    if let Some(secret) = &combined.validation_context_sds_secret_config {
        let field = format!("{field}.validation_context_sds_secret_config.name");
        secret_named(secret, TRUST_BUNDLE, field, "'ROOTCA', its trust bundle")?;
    }
    let field = format!("{field}.default_validation_context");
    let context = combined.default_validation_context.as_ref().ok_or_else(|| ConfigError::missing(&field))?;
    exact_id(context, &field)
}

fn secret_named(
    secret: &SdsSecretConfig,
    wanted: &str,
    field: String,
    supported: &'static str,
) -> Result<(), ConfigError> {
    if secret.name == wanted { Ok(()) } else { Err(ConfigError::unsupported(field, &secret.name, supported)) }
}

fn exact_id(context: &CertificateValidationContext, field: &str) -> Result<String, ConfigError> {
    if context.trusted_ca.is_some() {
        let field = format!("{field}.trusted_ca");
        return Err(ConfigError::unsupported(field, "set", "only its trust bundle, by the SDS name 'ROOTCA'"));
    }
    let field = format!("{field}.match_typed_subject_alt_names");
    let [matcher] = context.match_typed_subject_alt_names.as_slice() else {
        let found = context.match_typed_subject_alt_names.len();
        return Err(ConfigError::unsupported(field, format!("{found} matchers"), "exactly one"));
    };
    if matcher.san_type != i32::from(SanType::Uri) {
        return Err(ConfigError::unsupported(format!("{field}[0].san_type"), matcher.san_type, "URI"));
    }
    let Some(text) = &matcher.matcher else {
        return Err(ConfigError::missing(format!("{field}[0].matcher")));
    };
    match &text.match_pattern {
        Some(MatchPattern::Exact(id)) if !text.ignore_case => match id.parse::<SpiffeId>() {
            Ok(id) => Ok(id.to_string()),
            Err(_) => Err(ConfigError::invalid(
                format!("{field}[0].matcher.exact"),
                id,
                "it must be spiffe://<trust domain>/ns/<namespace>/sa/<service account>",
            )),
        },
        other => Err(ConfigError::unsupported(
            format!("{field}[0].matcher"),
            format!("{other:?}, ignore_case {}", text.ignore_case),
            "exact, with case",
        )),
    }
}
