//! What is asked and answered. Both ends know it, so that every byte can be checked and none is made anew.

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::job::Protocol;

pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin {}
impl<S: AsyncRead + AsyncWrite + Unpin> Stream for S {}
pub(crate) type BoxStream = Box<dyn Stream>;

/// The upstreams of the two revisions, known by the first letter of their bodies.
pub(crate) const OWNERS: [&str; 2] = ["a", "b"];

/// Bytes of the bodies, one way each. For a relay, of a message, that comes back as it is.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Sizes {
    pub(crate) request: usize,
    pub(crate) answer: usize,
}

/// A body of `owner`; for gRPC with the prefix of a message that is not compressed.
pub(crate) fn body(protocol: Protocol, owner: &str, size: usize) -> Vec<u8> {
    let mut payload = owner.as_bytes().to_vec();
    payload.resize(size, b'.');
    match protocol {
        Protocol::Grpc => [&[0], (size as u32).to_be_bytes().as_slice(), &payload].concat(),
        Protocol::Http1 | Protocol::Http2 | Protocol::WebSocket | Protocol::Tcp => payload,
    }
}

/// The bodies that an answer may have, by owner.
pub(crate) struct Answers([Vec<u8>; OWNERS.len()]);

impl Answers {
    pub(crate) fn new(protocol: Protocol, size: usize) -> Self {
        Self(OWNERS.map(|owner| body(protocol, owner, size)))
    }

    pub(crate) fn length(&self) -> usize {
        self.0[0].len()
    }
}

/// A body on its way in.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Check {
    length: usize,
    not: [bool; OWNERS.len()],
}

impl Check {
    pub(crate) fn take(&mut self, answers: &Answers, bytes: &[u8]) -> anyhow::Result<()> {
        for (not, answer) in self.not.iter_mut().zip(&answers.0) {
            *not = *not || answer.get(self.length..self.length + bytes.len()) != Some(bytes);
        }
        self.length += bytes.len();
        ensure!(self.not.contains(&false), "an answer of neither upstream: {}", String::from_utf8_lossy(bytes));
        Ok(())
    }

    /// The owner of a body that is complete.
    pub(crate) fn owner(&self, answers: &Answers) -> anyhow::Result<usize> {
        ensure!(self.length == answers.length(), "an answer of {} bytes", self.length);
        self.not.iter().position(|not| !not).context("an answer of neither upstream")
    }
}
