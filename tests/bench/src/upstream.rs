//! The smallest HTTP/1.1 server that answers right, so that it is not what is measured.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// Bytes of each answer's body.
pub(crate) const BODY: usize = 256;

/// The body by which an answer is known to be of the upstream `name`.
pub(crate) fn body(name: &str) -> String {
    format!("{name:.<BODY$}")
}

pub(crate) fn run(listen: SocketAddr, name: &str) -> anyhow::Result<()> {
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {BODY}\r\n\r\n{}", body(name));
    let answer: &'static [u8] = Box::leak(answer.into_bytes().into_boxed_slice());
    tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?.block_on(async move {
        let listener = TcpListener::bind(listen).await?;
        tokio::task::spawn_local(async move {
            loop {
                if let Ok((stream, _)) = listener.accept().await {
                    tokio::task::spawn_local(serve(stream, answer));
                }
            }
        });
        crate::contestants::until_stdin_ends().await;
        Ok(())
    })
}

async fn serve(mut stream: TcpStream, answer: &'static [u8]) {
    let _ = stream.set_nodelay(true);
    let mut buffer = vec![0; 4096];
    let mut length = 0;
    loop {
        match stream.read(&mut buffer[length..]).await {
            Ok(read @ 1..) => length += read,
            Ok(0) | Err(_) => return,
        }
        // Requests have no body and do not overlap on a connection.
        if buffer[..length].ends_with(b"\r\n\r\n") {
            length = 0;
            if stream.write_all(answer).await.is_err() {
                return;
            }
        }
    }
}
