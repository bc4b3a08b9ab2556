//! The gRPC port: TLS 1.3 with our own acceptor (tonic's settings are static, and certificates change), and on each
//! request who sent it.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use sluice_health::Places;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{Notify, futures::OwnedNotified, mpsc, watch},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{
    service::Routes,
    transport::{Server, server::Connected},
};

use super::{Authority, IdentityError, OwnCertificate, Peer, PeerIdentity};

/// From the accepted connection to the end of its handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Connections that have shown no certificate, handshakes among them. Each takes some 50 KiB, so whoever reaches the port cannot have more,
/// and no proxy is to wait behind them: the oldest gives way. A proxy that comes for its certificate needs a moment.
const MAX_STRANGERS: usize = 256;
/// Connections of one Pod, whose sidecar may be anybody's program. A proxy of ours has one, and a second while it comes back; the oldest
/// gives way.
const MAX_OF_A_POD: usize = 8;
/// Requests under way on a connection, of which each may make us keep names. A proxy of ours has three.
const MAX_STREAMS: u32 = 16;
/// That wait to be accepted.
const BACKLOG: i32 = 1024;
/// docs/xds.md, "Keepalive".
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// After the wish to stop: requests still running are given up.
const FAREWELL: Duration = Duration::from_secs(3);

/// The listening port.
#[derive(Debug)]
pub struct GrpcPort {
    listener: TcpListener,
    tls: Tls,
}

/// Why the port does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("cannot listen on {address} for proxies: {source}. Is another controller running here?")]
    Listen { address: SocketAddr, source: io::Error },
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("the port for proxies failed: {0}")]
    Serve(#[from] tonic::transport::Error),
}

impl GrpcPort {
    /// Listens. A client may come without a certificate, to ask for one; if it shows one, that must end in the
    /// authority's roots, be in its time, and be of its trust domain.
    ///
    /// # Errors
    /// If the port is taken, or the roots cannot be used.
    pub async fn bind(
        address: SocketAddr,
        authority: Arc<Authority>,
        own: Arc<OwnCertificate>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, ServeError> {
        let tls = Tls::new(authority, own, provider)?;
        let listener = sluice_health::listen(address, BACKLOG).and_then(TcpListener::from_std);
        let listener = listener.map_err(|source| ServeError::Listen { address, source })?;
        Ok(Self { listener, tls })
    }

    /// # Errors
    /// If the socket cannot say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves `services` until `stop`; then lets requests end for 3 s. Requests carry a [`Peer`] in their extensions.
    ///
    /// Streams that never end by themselves must watch `stop` too, or they are cut.
    ///
    /// # Errors
    /// If HTTP/2 cannot be set up.
    pub async fn serve(self, services: Routes, stop: CancellationToken) -> Result<(), ServeError> {
        // One connection at a time is handed over, so the handshakes that are done wait in their own tasks when tonic is slow.
        let (send, receive) = mpsc::channel(1);
        let accepting = AbortOnDropHandle::new(tokio::spawn(accept(self.listener, self.tls, send)));
        let stopped = {
            let stop = stop.clone();
            async move {
                stop.cancelled().await;
                drop(accepting);
            }
        };
        let incoming = ReceiverStream::new(receive).map(Ok::<_, io::Error>);
        let serving = Server::builder()
            .http2_keepalive_interval(Some(PING_INTERVAL))
            .http2_keepalive_timeout(Some(PING_TIMEOUT))
            .max_concurrent_streams(MAX_STREAMS)
            .http2_max_header_list_size(16 * 1024)
            .add_routes(services)
            .serve_with_incoming_shutdown(incoming, stopped);
        let late = async {
            stop.cancelled().await;
            tokio::time::sleep(FAREWELL).await;
        };
        tokio::select! {
            served = serving => served.map_err(ServeError::Serve),
            () = late => Ok(()),
        }
    }
}

/// TLS with the roots of the moment.
struct Tls {
    authority: Arc<Authority>,
    own: Arc<OwnCertificate>,
    provider: Arc<CryptoProvider>,
    acceptor: TlsAcceptor,
    bundle: watch::Receiver<Arc<str>>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}

impl Tls {
    fn new(
        authority: Arc<Authority>,
        own: Arc<OwnCertificate>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, IdentityError> {
        let bundle = authority.bundle();
        let config = tls_config(&authority, Arc::clone(&own), Arc::clone(&provider))?;
        Ok(Self { authority, own, provider, acceptor: Arc::new(config).into(), bundle })
    }

    /// For the next handshake.
    fn acceptor(&mut self) -> TlsAcceptor {
        if self.bundle.has_changed().unwrap_or(false) {
            self.bundle.mark_unchanged();
            match tls_config(&self.authority, Arc::clone(&self.own), Arc::clone(&self.provider)) {
                Ok(config) => self.acceptor = Arc::new(config).into(),
                Err(error) => tracing::error!("{error}; the former roots stay in use"),
            }
        }
        self.acceptor.clone()
    }
}

fn tls_config(
    authority: &Authority,
    own: Arc<OwnCertificate>,
    provider: Arc<CryptoProvider>,
) -> Result<ServerConfig, IdentityError> {
    let failed = |error: &dyn std::fmt::Display| IdentityError::Tls(error.to_string());
    let mut roots = RootCertStore::empty();
    for root in authority.roots() {
        roots.add(root).map_err(|e| failed(&e))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .map_err(|e| failed(&e))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| failed(&e))?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(own);
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would bring the certificate of its first handshake back unverified, expired or not.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Accepts until nobody takes the connections any more. Ends its handshakes with itself.
async fn accept(listener: TcpListener, mut tls: Tls, connections: mpsc::Sender<Connection>) {
    let trust_domain: Arc<str> = tls.authority.trust_domain().into();
    let mut handshakes = tokio::task::JoinSet::new();
    let mut strangers = Places::new(MAX_STRANGERS);
    let pods = Arc::new(Mutex::new(Pods::default()));
    loop {
        while handshakes.try_join_next().is_some() {}
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Most often a lack of file descriptors, which passes.
                tracing::warn!("cannot accept a connection from a proxy: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if connections.is_closed() {
            return;
        }
        let acceptor = tls.acceptor();
        let trust_domain = Arc::clone(&trust_domain);
        let connections = connections.clone();
        let pods = Arc::clone(&pods);
        let place = Arc::new(Notify::new());
        strangers.give(&place);
        handshakes.spawn(async move {
            let gives_way = Arc::clone(&place);
            let shaken = tokio::select! {
                shaken = timeout(HANDSHAKE, handshake(acceptor, stream, address, &trust_domain, &pods, place)) => shaken,
                () = gives_way.notified() => Ok(Err(GAVE_WAY.to_owned())),
            };
            drop(gives_way);
            match shaken {
                // Fails only when the server stops.
                Ok(Ok(connection)) => drop(connections.send(connection).await),
                Ok(Err(why)) => tracing::info!(%address, "refused a connection: {why}"),
                Err(_) => tracing::info!(%address, "refused a connection: no TLS handshake within 5 s"),
            }
        });
        // See `sluice_health::serve`.
        tokio::task::yield_now().await;
    }
}

const GAVE_WAY: &str = "it gave way to a newer one, as there are too many of its Pod or without a certificate";

/// The places of connections that have shown a certificate, by their Pod's uid.
#[derive(Default)]
struct Pods {
    places: HashMap<String, Places>,
    /// Those without connections are forgotten when there are so many.
    most: usize,
}

impl Pods {
    fn place(&mut self, uid: &str) -> Arc<Notify> {
        if self.places.len() >= self.most {
            self.places.retain(|_, places| !places.is_free());
            self.most = 2 * self.places.len() + 16;
        }
        let place = Arc::new(Notify::new());
        self.places.entry(uid.to_owned()).or_insert_with(|| Places::new(MAX_OF_A_POD)).give(&place);
        place
    }
}

/// `place`: of a stranger.
async fn handshake(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    address: SocketAddr,
    trust_domain: &str,
    pods: &Mutex<Pods>,
    mut place: Arc<Notify>,
) -> Result<Connection, String> {
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    let stream = acceptor.accept(stream).await.map_err(|error| format!("TLS: {error}"))?;
    let (_, tls) = stream.get_ref();
    let identity = tls
        .peer_certificates()
        .and_then(<[_]>::first)
        .map(|certificate| PeerIdentity::read(certificate, trust_domain))
        .transpose()
        .map_err(|error| format!("client certificate: {error}"))?;
    if let Some(identity) = &identity {
        place = pods.lock().unwrap_or_else(PoisonError::into_inner).place(&identity.pod.uid);
    }
    Ok(Connection { stream, peer: Peer { address, identity }, gives_way: Box::pin(place.notified_owned()) })
}

/// A connection whose handshake is done.
struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    /// The end of its place.
    gives_way: Pin<Box<OwnedNotified>>,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.gives_way.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::Error::other(GAVE_WAY)));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
