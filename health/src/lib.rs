//! The ports that the kubelet, Prometheus and people ask: HTTP/1.1 in the clear, from whoever reaches them.
//!
//! Nobody keeps others from an answer by holding connections. Each is accepted at once, has one request, and a bounded life; and
//! where there are too many the oldest gives way to the newest ([`Places`]). Who asks and reads needs milliseconds.
//!
//! And how any port of ours is listened on ([`listen`]).
#![forbid(unsafe_code)]

mod listen;

pub use listen::{listen, listen_with};

use std::{
    collections::VecDeque,
    convert::Infallible,
    error::Error,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use http::{Request, Response};
use http_body::Body;
use hyper::{
    body::Incoming,
    server::conn::http1,
    service::{Service, service_fn},
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::JoinSet,
    time::timeout,
};

/// Open at once, on one port.
pub const CONNECTIONS: usize = 64;
/// Answers of more than [`LARGE`] that are being written at once: each is a copy of its own in memory, and metrics may be megabytes.
pub const LARGE_ANSWERS: usize = 4;
/// Bytes. Less than this the kernel takes in one go.
pub const LARGE: u64 = 64 << 10;
/// Bytes of a request's head.
const HEAD: usize = 16 << 10;

/// Serves one port for ever; dropped, it closes what is open. A connection has so long a `life`, from when it is accepted to the
/// last byte of its answer.
pub async fn serve<S, B>(listener: TcpListener, life: Duration, service: S) -> Infallible
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let mut open = Places::new(CONNECTIONS);
    let large = Arc::new(Mutex::new(Places::new(LARGE_ANSWERS)));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => {
                let gives_way = Arc::new(Notify::new());
                open.give(&gives_way);
                connections.spawn(connection(stream, life, service.clone(), Arc::clone(&large), gives_way));
                // Those that have come may go on before the next one comes: a crowd must not push out whom nobody has looked at.
                tokio::task::yield_now().await;
            }
            Err(error) => {
                // Most often a lack of file descriptors, which passes.
                tracing::warn!(%error, "cannot accept a connection for health, metrics or administration");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Ends when its request is answered, its time is over, or somebody needs its place.
async fn connection<S, B>(
    stream: TcpStream,
    life: Duration,
    service: S,
    large: Arc<Mutex<Places>>,
    gives_way: Arc<Notify>,
) where
    S: Service<Request<Incoming>, Response = Response<B>>,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let (large, gives_way) = (&*large, &gives_way);
    let answering = service_fn(move |request| {
        let answer = service.call(request);
        async move {
            let answer = answer.await?;
            if answer.body().size_hint().upper().is_none_or(|bytes| bytes > LARGE) {
                large.lock().unwrap_or_else(PoisonError::into_inner).give(gives_way);
            }
            Ok::<_, S::Error>(answer)
        }
    });
    let mut http = http1::Builder::new();
    http.keep_alive(false).max_buf_size(HEAD);
    tokio::select! {
        served = timeout(life, http.serve_connection(TokioIo::new(stream), answering)) => match served {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "a connection for health, metrics or administration broke"),
            Err(_) => tracing::debug!("a connection for health, metrics or administration took too long"),
        },
        () = gives_way.notified() => tracing::debug!("a connection for health, metrics or administration gave way to a newer one"),
    }
}

/// As many places as there are, held by connections in the order in which they got them.
pub struct Places {
    most: usize,
    /// Each as long as its connection is open.
    held: VecDeque<Weak<Notify>>,
}

impl Places {
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self { most, held: VecDeque::new() }
    }

    /// Whether nobody holds one.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.held.iter().all(|held| held.strong_count() == 0)
    }

    /// To a connection, which has it as long as it has `to`, and is told by it to give way: the oldest is, where there is none left. Who
    /// has one becomes the newest.
    pub fn give(&mut self, to: &Arc<Notify>) {
        self.held.retain(|held| held.strong_count() > 0 && held.as_ptr() != Arc::as_ptr(to));
        if self.held.len() >= self.most
            && let Some(oldest) = self.held.pop_front().and_then(|held| held.upgrade())
        {
            oldest.notify_one();
        }
        self.held.push_back(Arc::downgrade(to));
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use bytes::Bytes;
    use http_body_util::Full;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const LIFE: Duration = Duration::from_secs(20);
    /// More than the kernel keeps of an answer that is not read.
    const MUCH: usize = 32 << 20;

    /// Answers `/large` with more than anybody reads, else with `ok`.
    async fn server() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let large = Bytes::from(vec![b'x'; MUCH]);
        let service = service_fn(move |request: Request<Incoming>| {
            let body = if request.uri().path() == "/large" { large.clone() } else { Bytes::from_static(b"ok") };
            async move { Ok::<_, Infallible>(Response::new(Full::new(body))) }
        });
        tokio::spawn(serve(listener, LIFE, service));
        address
    }

    async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
        timeout(Duration::from_secs(20), work).await.unwrap_or_else(|_| panic!("{what} did not come"))
    }

    async fn asked(address: SocketAddr, path: &str) -> TcpStream {
        let mut connection = TcpStream::connect(address).await.unwrap();
        send(&mut connection, path).await;
        connection
    }

    async fn send(connection: &mut TcpStream, path: &str) {
        connection.write_all(format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes()).await.unwrap();
    }

    /// All that comes until the end.
    async fn read(mut connection: TcpStream) -> Vec<u8> {
        let mut found = Vec::new();
        // The end of who gave way may be a reset.
        let _ = soon("the end", connection.read_to_end(&mut found)).await;
        found
    }

    async fn is_answered(connection: TcpStream) -> bool {
        let found = read(connection).await;
        found.starts_with(b"HTTP/1.1 200 OK\r\n") && found.ends_with(b"\r\n\r\nok")
    }

    #[tokio::test]
    async fn the_oldest_connection_gives_way_to_the_newest() {
        let server = server().await;
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS {
            silent.push(TcpStream::connect(server).await.unwrap());
        }
        assert!(is_answered(asked(server, "/").await).await);
        assert!(read(silent.remove(0)).await.is_empty());
        // The others are as they were.
        for mut connection in silent {
            send(&mut connection, "/").await;
            assert!(is_answered(connection).await);
        }
    }

    #[tokio::test]
    async fn who_is_answered_takes_nobodys_place() {
        let server = server().await;
        let mut waiting = TcpStream::connect(server).await.unwrap();
        for _ in 0..2 * CONNECTIONS {
            assert!(is_answered(asked(server, "/").await).await);
        }
        send(&mut waiting, "/").await;
        assert!(is_answered(waiting).await);
    }

    #[tokio::test]
    async fn of_large_answers_that_are_not_read_the_oldest_is_broken_off() {
        let server = server().await;
        let mut unread = Vec::new();
        for _ in 0..=LARGE_ANSWERS {
            let connection = asked(server, "/large").await;
            soon("an answer", connection.readable()).await.unwrap();
            unread.push(connection);
        }
        assert!(is_answered(asked(server, "/").await).await);
        let mut found = Vec::new();
        for connection in unread {
            found.push(read(connection).await.len() > MUCH);
        }
        assert_eq!(found, [false, true, true, true, true]);
    }

    #[tokio::test]
    async fn a_connection_ends_with_its_life_or_its_answer() {
        let server = server().await;
        let silent = TcpStream::connect(server).await.unwrap();
        let mut half = TcpStream::connect(server).await.unwrap();
        half.write_all(b"GET / HTTP/1.1\r\nhost:").await.unwrap();
        let unread = asked(server, "/large").await;
        soon("an answer", unread.readable()).await.unwrap();
        // One request is enough.
        let mut twice = TcpStream::connect(server).await.unwrap();
        twice.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n".repeat(2).as_slice()).await.unwrap();
        let found = read(twice).await;
        assert_eq!(String::from_utf8_lossy(&found).matches("HTTP/1.1 200").count(), 1);

        tokio::time::pause();
        tokio::time::advance(LIFE).await;
        tokio::time::resume();
        assert!(read(silent).await.is_empty());
        assert!(read(half).await.is_empty());
        let found = read(unread).await.len();
        assert!(0 < found && found < MUCH, "{found} bytes");
    }
}
