//! What clients are refused by this proxy itself, with the reason that it is counted under (`sluice_refused_total`;
//! docs/limits.md has a table of all).

use std::io::{self, ErrorKind};

use h2::Reason;

use crate::failure::Failure;

/// Why. Few and fixed, as a label of a metric must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The listener has as many connections as it may have.
    ConnectionLimit,
    /// The process has as many connections as it has file descriptors for.
    FileDescriptors,
    /// A connection, for want of memory.
    OverloadConnection,
    /// A request, for want of memory.
    OverloadRequest,
    TlsTimeout,
    /// No filter chain is for the server name, or there is none.
    TlsServerName,
    /// The client's certificate is missing, or not of the identity that is admitted.
    TlsCertificate,
    /// What came is no TLS 1.3 as it is spoken here.
    TlsProtocol,
    /// The client went away in the handshake, or said by an alert that it does not go on.
    TlsClosed,
    /// A head that was not whole in time.
    HeadTimeout,
    /// A request whose rest did not come.
    BodyTimeout,
    /// An answer that was not read.
    AnswerTimeout,
    FirstLine,
    Version,
    Target,
    TargetTooLong,
    Host,
    HeaderName,
    HeaderValue,
    LineEnding,
    HeadTooLarge,
    ContentLength,
    TransferEncoding,
    TransferCoding,
    TwoLengths,
    Chunk,
    Trailers,
    Connect,
    /// The connection of a client that gave up most of its requests at once.
    RapidReset,
    /// A stream or connection that broke a rule of HTTP/2, by the error code that it was ended with (RFC 9113, 7).
    Http2Protocol,
    Http2FlowControl,
    Http2StreamClosed,
    Http2FrameSize,
    Http2Compression,
    Http2EnhanceYourCalm,
    /// A stream beyond those that a connection may have.
    Http2RefusedStream,
}

impl Refused {
    pub const ALL: [(Self, &'static str); 36] = [
        (Self::ConnectionLimit, "connection_limit"),
        (Self::FileDescriptors, "file_descriptors"),
        (Self::OverloadConnection, "overload_connection"),
        (Self::OverloadRequest, "overload_request"),
        (Self::TlsTimeout, "tls_timeout"),
        (Self::TlsServerName, "tls_server_name"),
        (Self::TlsCertificate, "tls_certificate"),
        (Self::TlsProtocol, "tls_protocol"),
        (Self::TlsClosed, "tls_closed"),
        (Self::HeadTimeout, "head_timeout"),
        (Self::BodyTimeout, "body_timeout"),
        (Self::AnswerTimeout, "answer_timeout"),
        (Self::FirstLine, "first_line"),
        (Self::Version, "version"),
        (Self::Target, "target"),
        (Self::TargetTooLong, "target_too_long"),
        (Self::Host, "host"),
        (Self::HeaderName, "header_name"),
        (Self::HeaderValue, "header_value"),
        (Self::LineEnding, "line_ending"),
        (Self::HeadTooLarge, "head_too_large"),
        (Self::ContentLength, "content_length"),
        (Self::TransferEncoding, "transfer_encoding"),
        (Self::TransferCoding, "transfer_coding"),
        (Self::TwoLengths, "two_lengths"),
        (Self::Chunk, "chunk"),
        (Self::Trailers, "trailers"),
        (Self::Connect, "connect"),
        (Self::RapidReset, "rapid_reset"),
        (Self::Http2Protocol, "http2_protocol_error"),
        (Self::Http2FlowControl, "http2_flow_control_error"),
        (Self::Http2StreamClosed, "http2_stream_closed"),
        (Self::Http2FrameSize, "http2_frame_size_error"),
        (Self::Http2Compression, "http2_compression_error"),
        (Self::Http2EnhanceYourCalm, "http2_enhance_your_calm"),
        (Self::Http2RefusedStream, "http2_refused_stream"),
    ];

    /// `None` for an answer of our own to a request that is in order.
    #[must_use]
    pub fn by(failure: &Failure) -> Option<Self> {
        match failure {
            Failure::Overloaded => Some(Self::OverloadRequest),
            Failure::BadRequest(why, _) => Some(*why),
            Failure::HeadTooLarge => Some(Self::HeadTooLarge),
            Failure::UriTooLong => Some(Self::TargetTooLong),
            Failure::UnknownCoding => Some(Self::TransferCoding),
            Failure::MethodRefused => Some(Self::Connect),
            Failure::RequestIdle => Some(Self::BodyTimeout),
            Failure::NoHealthyUpstream
            | Failure::ConnectFailed
            | Failure::Overflow
            | Failure::UpstreamReset
            | Failure::UpstreamTimeout
            | Failure::UpstreamIdle
            | Failure::UpstreamProtocol
            | Failure::NoRoute
            | Failure::UpgradeRefused
            | Failure::Unauthorized
            | Failure::DirectResponse(_)
            | Failure::FaultInjected(_)
            | Failure::ClientGone => None,
        }
    }

    /// Why a TLS handshake came to nothing.
    #[must_use]
    pub fn in_handshake(error: &io::Error) -> Self {
        use rustls::Error as Tls;
        match error.get_ref().and_then(|inner| inner.downcast_ref::<Tls>()) {
            Some(Tls::NoCertificatesPresented | Tls::InvalidCertificate(_)) => Self::TlsCertificate,
            // It is the client that refuses, such as our certificate.
            Some(Tls::AlertReceived(_)) => Self::TlsClosed,
            Some(_) => Self::TlsProtocol,
            None if error.kind() == ErrorKind::TimedOut => Self::TlsTimeout,
            None if error.kind() == ErrorKind::NotFound => Self::TlsServerName,
            None => Self::TlsClosed,
        }
    }

    /// Why a stream or a connection of HTTP/2 was ended by us with this code; `None` if it was not for what the client did.
    #[must_use]
    pub fn by_reset(reason: Reason) -> Option<Self> {
        match reason {
            Reason::PROTOCOL_ERROR => Some(Self::Http2Protocol),
            Reason::FLOW_CONTROL_ERROR => Some(Self::Http2FlowControl),
            Reason::STREAM_CLOSED => Some(Self::Http2StreamClosed),
            Reason::FRAME_SIZE_ERROR => Some(Self::Http2FrameSize),
            Reason::COMPRESSION_ERROR => Some(Self::Http2Compression),
            Reason::ENHANCE_YOUR_CALM => Some(Self::Http2EnhanceYourCalm),
            Reason::REFUSED_STREAM => Some(Self::Http2RefusedStream),
            // Those of ours and of upstreams, and none at all.
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_are_in_the_order_of_the_reasons_and_each_has_one() {
        for (index, (reason, name)) in Refused::ALL.iter().enumerate() {
            assert_eq!((*reason as usize, Refused::ALL.iter().filter(|(_, other)| other == name).count()), (index, 1));
        }
    }
}
