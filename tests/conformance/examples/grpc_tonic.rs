//! tonic through the proxy: the cases of grpc_interop.py, against its server. Says of each what is wrong with it, a line of JSON.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "its parent reads the lines")]

use std::{future::Future, time::Duration};

use anyhow::{Context, ensure};
use bytes::{Buf, BufMut, Bytes};
use futures::{SinkExt, TryStreamExt, channel::mpsc, stream};
use tonic::{
    Code, Request, Response, Status, Streaming,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
    metadata::{BinaryMetadataValue, MetadataMap, MetadataValue},
    transport::{Channel, Endpoint},
};

const MIB: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

/// Messages as they are, without protobuf.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

#[derive(Clone)]
struct Client(Channel);

impl Client {
    async fn ready(&self) -> anyhow::Result<Grpc<Channel>> {
        let mut grpc = Grpc::new(self.0.clone()).max_decoding_message_size(usize::MAX);
        grpc.ready().await?;
        Ok(grpc)
    }

    async fn answer(
        &self,
        method: &'static str,
        request: Request<Bytes>,
    ) -> anyhow::Result<Result<Response<Bytes>, Status>> {
        Ok(self.ready().await?.unary(request, PathAndQuery::from_static(method), Raw).await)
    }

    async fn unary(&self, message: Bytes) -> anyhow::Result<Bytes> {
        Ok(self.answer("/test.Test/Unary", Request::new(message)).await??.into_inner())
    }

    /// What the server says of the call with this id, once it is over there.
    async fn ended(&self, id: &'static str) -> anyhow::Result<Bytes> {
        Ok(self.answer("/test.Test/Ended", Request::new(id.into())).await??.into_inner())
    }

    async fn repeat(&self, id: &'static str, message: &'static str) -> anyhow::Result<Streaming<Bytes>> {
        let mut request = Request::new(Bytes::from(message));
        request.metadata_mut().insert("x-call", MetadataValue::from_static(id));
        let method = PathAndQuery::from_static("/test.Test/Repeat");
        Ok(self.ready().await?.server_streaming(request, method, Raw).await?.into_inner())
    }

    /// Messages to be sent behind the first, and those that come. The server's head comes with its first answer.
    async fn chat(&self, id: &'static str, first: Bytes) -> anyhow::Result<(mpsc::Sender<Bytes>, Streaming<Bytes>)> {
        // Whoever sends more than it takes waits.
        let (mut sender, messages) = mpsc::channel(1);
        sender.send(first).await?;
        let mut request = Request::new(messages);
        request.metadata_mut().insert("x-call", MetadataValue::from_static(id));
        let method = PathAndQuery::from_static("/test.Test/Chat");
        let answers = self.ready().await?.streaming(request, method, Raw).await?.into_inner();
        Ok((sender, answers))
    }

    async fn empty_unary(self) -> anyhow::Result<()> {
        ensure!(self.unary(Bytes::new()).await?.is_empty());
        Ok(())
    }

    async fn large_unary(self) -> anyhow::Result<()> {
        for size in [271_828, 314_159, 8 * MIB] {
            let message = Bytes::from(vec![0; size]);
            ensure!(self.unary(message.clone()).await? == message, "{size} bytes");
        }
        Ok(())
    }

    async fn client_streaming(self) -> anyhow::Result<()> {
        let large = vec![0; 100_000];
        let messages = stream::iter(["a".into(), Bytes::new(), large.clone().into(), "d".into()]);
        let method = PathAndQuery::from_static("/test.Test/Collect");
        let answer = self.ready().await?.client_streaming(Request::new(messages), method, Raw).await?;
        ensure!(*answer.into_inner() == [b"a,,".as_slice(), &large, b",d"].concat());
        Ok(())
    }

    async fn server_streaming(self) -> anyhow::Result<()> {
        let answers: Vec<Bytes> = self.repeat("tonic-repeat", "50 60000").await?.try_collect().await?;
        ensure!(answers.len() == 50, "{} answers", answers.len());
        for (index, answer) in (0_u32..).zip(answers) {
            ensure!(answer.len() == 60_004 && answer.starts_with(&index.to_be_bytes()), "answer {index}");
        }
        Ok(())
    }

    async fn ping_pong(self) -> anyhow::Result<()> {
        let (mut sender, mut answers) = self.chat("tonic-ping-pong", "a".into()).await?;
        ensure!(answers.message().await?.as_deref() == Some(b"re: a".as_slice()));
        for word in [Bytes::from(vec![0; 31_415]), Bytes::new()] {
            sender.send(word.clone()).await?;
            let answer = answers.message().await?.context("no answer")?;
            ensure!(*answer == [b"re: ".as_slice(), &word].concat());
        }
        drop(sender);
        ensure!(answers.message().await?.is_none());
        Ok(())
    }

    async fn empty_stream(self) -> anyhow::Result<()> {
        let method = PathAndQuery::from_static("/test.Test/Chat");
        let nothing = Request::new(stream::empty());
        let answers = self.ready().await?.streaming(nothing, method, Raw).await?.into_inner();
        ensure!(answers.try_collect::<Vec<Bytes>>().await?.is_empty());
        ensure!(self.repeat("tonic-none", "0 0").await?.message().await?.is_none());
        Ok(())
    }

    async fn status_codes_and_messages(self) -> anyhow::Result<()> {
        let odd = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n";
        for code in 1..=16 {
            for message in ["", "plain", odd, "100%"] {
                let request = Request::new(format!("{code} {message}").into());
                let status = self.answer("/test.Test/Fail", request).await?.err().context("no error")?;
                ensure!(status.code() == Code::from_i32(code) && status.message() == message, "{code}: {status:?}");
                let detail = status.metadata().get_bin("x-detail-bin").context("no detail")?;
                ensure!(*detail.to_bytes()? == [0, 0xff], "{detail:?}");
            }
        }
        Ok(())
    }

    async fn status_behind_messages(self) -> anyhow::Result<()> {
        let method = PathAndQuery::from_static("/test.Test/FailLate");
        let call = self.ready().await?.server_streaming(Request::new(Bytes::new()), method, Raw).await?;
        let mut answers = call.into_inner();
        ensure!(answers.message().await?.as_deref() == Some(b"one".as_slice()));
        let status = answers.message().await.err().context("no error")?;
        ensure!(status.code() == Code::DataLoss && status.message() == "behind one", "{status:?}");
        Ok(())
    }

    async fn custom_metadata(self) -> anyhow::Result<()> {
        let (text, data) = (MetadataValue::from_static("a, b; c"), (0..=255).collect::<Vec<u8>>());
        let mut request = Request::new(Bytes::new());
        request.metadata_mut().insert("x-text", text.clone());
        request.metadata_mut().insert_bin("x-data-bin", BinaryMetadataValue::from_bytes(&data));
        // The head's and the trailers' metadata are one map here.
        let answer = self.answer("/test.Test/Unary", request).await??;
        let has = |map: &MetadataMap, key: &str| map.get(key) == Some(&text);
        let has_data = |map: &MetadataMap, key: &str| {
            map.get_bin(key).and_then(|value| value.to_bytes().ok()).is_some_and(|value| *value == data)
        };
        let map = answer.metadata();
        ensure!(has(map, "x-text") && has(map, "x-trailing-text"), "{map:?}");
        ensure!(has_data(map, "x-data-bin") && has_data(map, "x-trailing-data-bin"), "{map:?}");
        Ok(())
    }

    async fn unimplemented(self) -> anyhow::Result<()> {
        for method in ["/test.Test/Unknown", "/test.Unknown/Unary"] {
            let status = self.answer(method, Request::new(Bytes::new())).await?.err().context("no error")?;
            ensure!(status.code() == Code::Unimplemented, "{status:?}");
        }
        Ok(())
    }

    async fn timeout_on_sleeping_server(self) -> anyhow::Result<()> {
        let mut request = Request::new(Bytes::new());
        request.set_timeout(Duration::from_millis(500));
        request.metadata_mut().insert("x-call", MetadataValue::from_static("tonic-sleep"));
        let status = self.answer("/test.Test/Sleep", request).await?.err().context("no error")?;
        // tonic's own clock says Cancelled, the server's that the deadline was exceeded.
        ensure!(matches!(status.code(), Code::Cancelled | Code::DeadlineExceeded), "{status:?}");
        let remaining: f64 = std::str::from_utf8(&self.ended("tonic-sleep").await?)?.parse()?;
        ensure!(remaining > 0.0 && remaining < 0.6, "grpc-timeout did not arrive: {remaining}");
        Ok(())
    }

    async fn cancel_after_begin(self) -> anyhow::Result<()> {
        // More than windows hold. A call that still sends is not cancelled by hyper when its answers are dropped.
        let mut answers = self.repeat("tonic-cancel", "1000 100000").await?;
        ensure!(answers.message().await?.is_some());
        drop(answers);
        self.ended("tonic-cancel").await?;
        ensure!(self.unary("after".into()).await? == "after");
        Ok(())
    }

    async fn many_at_once(self) -> anyhow::Result<()> {
        // More than a connection may have open (256).
        let one = async |index: usize| {
            let message = Bytes::from(index.to_string());
            ensure!(self.unary(message.clone()).await? == message);
            Ok(())
        };
        futures::future::try_join_all((0..600).map(one)).await?;
        Ok(())
    }
}

async fn case(name: &str, run: impl Future<Output = anyhow::Result<()>>) {
    let result = tokio::time::timeout(PATIENCE, run).await.unwrap_or_else(|_| Err(anyhow::anyhow!("it hangs")));
    let problem = result.err().map(|error| format!("{error:#}"));
    println!("{}", serde_json::json!({"name": name, "problem": problem}));
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let address = std::env::args().nth(1).context("say HOST:PORT")?;
    let client = Client(Endpoint::from_shared(format!("http://{address}"))?.connect().await?);
    case("empty_unary", client.clone().empty_unary()).await;
    case("large_unary", client.clone().large_unary()).await;
    case("client_streaming", client.clone().client_streaming()).await;
    case("server_streaming", client.clone().server_streaming()).await;
    case("ping_pong", client.clone().ping_pong()).await;
    case("empty_stream", client.clone().empty_stream()).await;
    case("status_codes_and_messages", client.clone().status_codes_and_messages()).await;
    case("status_behind_messages", client.clone().status_behind_messages()).await;
    case("custom_metadata", client.clone().custom_metadata()).await;
    case("unimplemented", client.clone().unimplemented()).await;
    case("timeout_on_sleeping_server", client.clone().timeout_on_sleeping_server()).await;
    case("cancel_after_begin", client.clone().cancel_after_begin()).await;
    case("many_at_once", client.many_at_once()).await;
    Ok(())
}
