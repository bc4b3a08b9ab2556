//! The smallest server that answers right, so that it is not what is measured.

use std::{net::SocketAddr, path::PathBuf, rc::Rc};

use anyhow::ensure;
use memchr::memmem;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsAcceptor;

use crate::{
    certificates, http2,
    job::{self, Protocol, Security},
    message::{self, BoxStream, OWNERS, Sizes},
};

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Upstream {
    /// The addresses of each owner.
    pub(crate) listen: [Vec<SocketAddr>; OWNERS.len()],
    pub(crate) protocol: Protocol,
    pub(crate) security: Security,
    pub(crate) sizes: Sizes,
    /// With the certificates.
    pub(crate) folder: PathBuf,
}

struct Answer {
    tls: Option<TlsAcceptor>,
    protocol: Protocol,
    request: usize,
    http1: Vec<u8>,
    http2: http2::Message,
}

impl Upstream {
    /// Serves until standard input ends.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
        let alpn = self.protocol.alpn();
        let tls = (self.security == Security::Mtls).then(|| certificates::acceptor(&self.folder, alpn)).transpose()?;
        runtime.block_on(async move {
            for (owner, addresses) in OWNERS.iter().zip(&self.listen) {
                let answer = Rc::new(Answer {
                    tls: tls.clone(),
                    protocol: self.protocol,
                    request: self.sizes.request,
                    http1: http1_answer(self.protocol, owner, self.sizes.answer),
                    http2: http2::Message::answer(self.protocol, owner, self.sizes),
                });
                for address in addresses {
                    tokio::task::spawn_local(listen(TcpListener::bind(address).await?, Rc::clone(&answer)));
                }
            }
            job::until_stdin_ends().await;
            Ok(())
        })
    }
}

fn http1_answer(protocol: Protocol, owner: &str, size: usize) -> Vec<u8> {
    if protocol == Protocol::WebSocket {
        return b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
            sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
            .to_vec();
    }
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {size}\r\n\r\n");
    [head.into_bytes(), message::body(protocol, owner, size)].concat()
}

async fn listen(listener: TcpListener, answer: Rc<Answer>) {
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            let answer = Rc::clone(&answer);
            tokio::task::spawn_local(async move {
                // An error here is one at the other end, too, where it is told.
                let _ = serve(stream, &answer).await;
            });
        }
    }
}

async fn serve(stream: TcpStream, answer: &Answer) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream: BoxStream = match &answer.tls {
        None => Box::new(stream),
        Some(tls) => Box::new(tls.accept(stream).await?),
    };
    match answer.protocol {
        Protocol::Http1 => http1(stream, answer).await,
        Protocol::Http2 | Protocol::Grpc => http2::serve(stream, &answer.http2).await,
        Protocol::Tcp => echo(stream).await,
        Protocol::WebSocket => {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                ensure!(stream.read_buf(&mut head).await? > 0, "closed before a request");
            }
            stream.write_all(&answer.http1).await?;
            echo(stream).await
        }
    }
}

async fn http1(mut stream: BoxStream, answer: &Answer) -> anyhow::Result<()> {
    let mut buffer = vec![0; if answer.request == 0 { 4096 } else { 64 << 10 }];
    loop {
        let mut length = 0;
        // Requests do not overlap on a connection.
        let head = loop {
            match stream.read(&mut buffer[length..]).await? {
                0 => return Ok(()),
                read => length += read,
            }
            if let Some(end) = memmem::find(&buffer[..length], b"\r\n\r\n") {
                break end + 4;
            }
        };
        let mut body = length - head;
        while body < answer.request {
            match stream.read(&mut buffer).await? {
                0 => return Ok(()),
                read => body += read,
            }
        }
        stream.write_all(&answer.http1).await?;
        stream.flush().await?;
    }
}

async fn echo(mut stream: BoxStream) -> anyhow::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer).await? {
            0 => return Ok(()),
            read => stream.write_all(&buffer[..read]).await?,
        }
        stream.flush().await?;
    }
}
