//! The access log: one JSON object a line on standard output, off by default.
//!
//! Workers never wait for it: lines go through a bounded queue to a thread of its own; when that is full (nobody reads
//! our output), lines are dropped and counted in `sluice_access_log_dropped_total`.

mod filter;

use std::{
    io::{self, BufWriter, Write},
    sync::{
        Arc,
        mpsc::{self, SyncSender, TrySendError},
    },
    thread,
};

use serde::Serialize;

pub use self::filter::{Filter, Outcome};
use crate::{
    excerpt::{Excerpt, LONGEST},
    metrics::Metrics,
};

/// Lines that may wait to be written, of at most 8 KiB: what a client can make long is an excerpt in them.
const QUEUE: usize = 8192;

/// What is said about one request. Times in milliseconds.
#[derive(Debug, Serialize)]
pub struct Entry<'a> {
    pub time: String,
    pub listener: &'a str,
    pub peer: String,
    pub protocol: &'static str,
    pub method: Excerpt<'a>,
    pub authority: Excerpt<'a>,
    pub path: Excerpt<'a>,
    pub user_agent: Excerpt<'a>,
    pub status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc_status: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flag: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream: Option<String>,
    pub attempts: u32,
    pub duration_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_byte_ms: Option<f64>,
    pub response_bytes: u64,
    /// Where tracing is on and the request has a trace, sampled or not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
}

#[derive(Debug, Clone)]
pub struct AccessLog {
    lines: SyncSender<String>,
    metrics: Arc<Metrics>,
    filter: Arc<Filter>,
}

impl AccessLog {
    /// Writes to standard output from now on.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn stdout(metrics: Arc<Metrics>) -> io::Result<Self> {
        Self::start(metrics, io::stdout())
    }

    /// Writes to `output`; the thread ends when the last clone is dropped.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(metrics: Arc<Metrics>, output: impl Write + Send + 'static) -> io::Result<Self> {
        let (lines, queue) = mpsc::sync_channel::<String>(QUEUE);
        thread::Builder::new().name("access-log".to_owned()).spawn(move || {
            let mut output = BufWriter::with_capacity(64 * 1024, output);
            while let Ok(line) = queue.recv() {
                // Flushed when nothing more waits, so that a line is seen at once and a burst is written in one go.
                let mut next = Some(line);
                while let Some(line) = next {
                    if writeln!(output, "{line}").is_err() {
                        return; // Nobody listens any more; further lines count as dropped.
                    }
                    next = queue.try_recv().ok();
                }
                if output.flush().is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { lines, metrics, filter: Arc::default() })
    }

    /// Has lines only for what `filter` wants.
    #[must_use]
    pub fn filtered(self, filter: Filter) -> Self {
        Self { filter: Arc::new(filter), ..self }
    }

    /// Whether a request that ended so has a line. To be asked before its entry is made.
    #[must_use]
    pub fn wants(&self, outcome: &Outcome) -> bool {
        self.filter.wants(outcome)
    }

    pub fn write(&self, entry: &Entry<'_>) {
        let Ok(mut line) = serde_json::to_string(entry) else {
            return;
        };
        // A long one has grown in leaps. Few are.
        if line.len() > LONGEST {
            line.shrink_to_fit();
        }
        match self.lines.try_send(line) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => self.metrics.access_log_dropped(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_line_is_never_longer_than_is_stated() {
        let (name, token, quotes) = ("n".repeat(160), "M".repeat(64 << 10), "\"".repeat(64 << 10));
        let entry = Entry {
            time: "2026-01-01T00:00:00.000000000Z".to_owned(),
            listener: &name,
            peer: "[ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255]:65535".to_owned(),
            protocol: "HTTP/1.1",
            // A method is a token; JSON makes two characters of a quotation mark in the others.
            method: Excerpt::of(&token),
            authority: Excerpt::of(&quotes),
            path: Excerpt::of(&quotes),
            user_agent: Excerpt::of(&quotes),
            status: 503,
            grpc_status: Some("FAILED_PRECONDITION"),
            flag: Some("URX"),
            cluster: Some(&name),
            upstream: Some("[ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255]:65535".to_owned()),
            attempts: u32::MAX,
            duration_ms: f64::MAX,
            first_byte_ms: Some(f64::MAX),
            response_bytes: u64::MAX,
            trace_id: Some("f".repeat(32)),
        };
        let line = serde_json::to_string(&entry).unwrap().len();
        assert!(line <= 8 << 10, "{line} bytes");
    }
}
