//! Opaque TCP: the split is drawn once per connection.

use std::{net::SocketAddr, time::Duration};

use super::{
    connection::{Connection, tunnel},
    pool::{Outstanding, Wire},
    serving::Split,
    stream::Stream,
};
use crate::{failure::Failure, metrics::Retry};

/// Endpoints that are tried for a connection.
pub(crate) const MAX_TRIES: u32 = 3;

/// Passes a connection's bytes to an endpoint of one revision, and back.
///
/// `idle` is for how long it may be open while none pass.
pub(super) async fn proxy(connection: &Connection, split: &Split, idle: Option<Duration>, client: Stream) {
    match connect(connection, split).await {
        Ok((upstream, _outstanding)) => tunnel(connection, idle, client, upstream).await,
        Err(failure) => {
            let (_, flag, _) = failure.answer();
            connection.slot.metrics.local_error(flag);
            tracing::debug!(listener = connection.slot.name, peer = %connection.peer, %failure, "connection refused");
            client.reset_when_closed(true);
        }
    }
}

async fn connect(connection: &Connection, split: &Split) -> Result<(Stream, Outstanding), Failure> {
    let cluster = split.draw().ok_or(Failure::NoRoute)?;
    let mut failed: Vec<SocketAddr> = Vec::new();
    for _ in 0..MAX_TRIES {
        let Some(endpoint) = cluster.pick(&failed, connection.local) else {
            break;
        };
        if !failed.is_empty() {
            connection.slot.metrics.retried(Retry::Connect);
        }
        if endpoint.connections.are_full() {
            return Err(Failure::Overflow);
        }
        let outstanding = Outstanding::on(&endpoint);
        let opened = endpoint.connections.one_more();
        match cluster.connector.connect(endpoint.address, Wire::Tcp, opened).await {
            Ok(stream) => {
                cluster.reached(&endpoint);
                return Ok((stream, outstanding));
            }
            Err(error) => {
                cluster.unreachable(&endpoint);
                tracing::debug!(cluster = cluster.config.name, %error, "endpoint not reached");
                failed.push(endpoint.address);
            }
        }
    }
    Err(if failed.is_empty() { Failure::NoHealthyUpstream } else { Failure::ConnectFailed })
}
