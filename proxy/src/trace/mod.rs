//! Traces: which requests have a span, and the way of spans to a collector. Without an endpoint nothing of it exists.
//!
//! Workers never wait for it: spans go through a bounded queue to a thread of their own (the SDK's batch processor). While it is
//! full, because the collector is away or slow, spans are dropped and counted in `sluice_spans_dropped_total`.

pub mod context;
mod export;

use std::{
    fmt,
    num::NonZeroUsize,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use opentelemetry::{InstrumentationScope, trace::TraceId};
use opentelemetry_sdk::trace::{BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanProcessor};

pub use self::export::{Endpoint, TraceError};
use crate::metrics::{Metrics, SpanLost};

/// Spans that may wait for the collector: the SDK's default of `OTEL_BSP_MAX_QUEUE_SIZE`.
const QUEUE: NonZeroUsize = NonZeroUsize::new(2048).unwrap();

/// What a proxy is told of tracing, under the names that OpenTelemetry gives it
/// (<https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/>). The SDK itself reads
/// `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_EXPORTER_OTLP_TIMEOUT`, `OTEL_BSP_SCHEDULE_DELAY`, `OTEL_BSP_MAX_EXPORT_BATCH_SIZE` and
/// `OTEL_RESOURCE_ATTRIBUTES`.
#[derive(Debug, Clone, clap::Args)]
#[group(id = "tracing")]
pub struct Settings {
    /// The collector that spans go to, by OTLP over gRPC, e.g. `http://otel-collector.observability:4317`. Empty: no tracing.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", default_value = "", value_parser = export::endpoint)]
    pub otlp_endpoint: MaybeEndpoint,

    /// File of the certificates, PEM, that an https collector is believed by. Default: those of the system.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_CERTIFICATE", default_value = export::SYSTEM_ROOTS)]
    pub otlp_certificate: PathBuf,

    /// Share of the traces that begin here which are recorded, from 0 to 1. A caller's decision is kept.
    #[arg(long, env = "OTEL_TRACES_SAMPLER_ARG", default_value = "1", value_parser = ratio)]
    pub traces_sampler_arg: f64,

    /// `service.name` of the spans.
    #[arg(long, env = "OTEL_SERVICE_NAME", default_value = "sluice-fleet")]
    pub service_name: String,

    /// Spans that may wait for the collector.
    #[arg(long, env = "OTEL_BSP_MAX_QUEUE_SIZE", default_value_t = QUEUE)]
    pub spans_queue: NonZeroUsize,
}

/// An endpoint, or none; what clap makes of an `Option` cannot be empty.
pub type MaybeEndpoint = Option<Endpoint>;

fn ratio(text: &str) -> Result<f64, String> {
    let ratio = text.parse().ok().filter(|ratio| (0.0..=1.0).contains(ratio));
    ratio.ok_or_else(|| "it must be a number from 0 to 1, for example 0.01".to_owned())
}

/// How spans are made and sent.
#[derive(Debug, Clone)]
pub struct Options {
    pub endpoint: Endpoint,
    /// Of a collector with https.
    pub certificate: PathBuf,
    pub ratio: f64,
    pub queue: NonZeroUsize,
    /// Between two exports. `None`: as `OTEL_BSP_SCHEDULE_DELAY` says, else 5 s.
    pub delay: Option<Duration>,
    pub service_name: String,
    pub pod: String,
    /// Empty: not known.
    pub namespace: String,
}

/// One for all workers. Nothing of it locks or waits.
#[derive(Clone)]
pub struct Tracer(Arc<Inner>);

struct Inner {
    /// A trace begins sampled if the lower 63 bits of its id are below it.
    below: u64,
    processor: BatchSpanProcessor,
    /// Spans in the queue.
    waiting: Arc<AtomicUsize>,
    queue: usize,
    scope: InstrumentationScope,
    metrics: Arc<Metrics>,
}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracer").field("below", &self.0.below).finish_non_exhaustive()
    }
}

impl Tracer {
    /// Starts the thread that sends spans. To be called in a runtime, which the connection to the collector lives in.
    ///
    /// # Errors
    /// When the certificates cannot be used, or a variable that the SDK reads. A collector that is away is no error.
    pub fn start(options: &Options, metrics: Arc<Metrics>) -> Result<Self, TraceError> {
        let waiting = Arc::new(AtomicUsize::new(0));
        let exporter = export::Exporter::new(options, Arc::clone(&waiting), Arc::clone(&metrics))?;
        // The SDK drops what is too much as well, but keeps the number to itself: here it is dropped before that.
        let mut batches = BatchConfigBuilder::default().with_max_queue_size(options.queue.get());
        if let Some(delay) = options.delay {
            batches = batches.with_scheduled_delay(delay);
        }
        let mut processor = BatchSpanProcessor::new(exporter, batches.build());
        processor.set_resource(&export::resource(options));
        let scope = InstrumentationScope::builder("sluice-proxy").with_version(env!("CARGO_PKG_VERSION")).build();
        let queue = options.queue.get();
        Ok(Self(Arc::new(Inner { below: below(options.ratio), processor, waiting, queue, scope, metrics })))
    }

    /// Whether a trace that nobody has decided on is recorded. Who else samples by the trace's id
    /// (OpenTelemetry's `TraceIdRatioBased`) with this ratio decides the same.
    #[must_use]
    pub fn draw(&self, trace_id: TraceId) -> bool {
        let [.., a, b, c, d, e, f, g, h] = trace_id.to_bytes();
        u64::from_be_bytes([a, b, c, d, e, f, g, h]) >> 1 < self.0.below
    }

    /// Who says what its spans say.
    #[must_use]
    pub fn scope(&self) -> InstrumentationScope {
        self.0.scope.clone()
    }

    /// Takes a span that has ended, or drops it.
    pub fn hand_over(&self, span: SpanData) {
        let inner = &*self.0;
        if inner.waiting.fetch_add(1, Relaxed) >= inner.queue {
            inner.waiting.fetch_sub(1, Relaxed);
            inner.metrics.spans_lost(SpanLost::QueueFull, 1);
            return;
        }
        inner.processor.on_end(span);
    }

    /// Sends what waits, at most for so long. It blocks its thread, which must not be the runtime's.
    pub fn shutdown(&self, limit: Duration) {
        if let Err(error) = self.0.processor.shutdown_with_timeout(limit) {
            tracing::debug!(%error, "the last spans were not sent");
        }
    }
}

fn below(ratio: f64) -> u64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 2^63")]
    let below = (ratio * (1_u64 << 63) as f64) as u64;
    below
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_a_part_of_one() {
        assert_eq!((below(0.0), below(0.5), below(1.0)), (0, 1 << 62, 1 << 63));
        for bad in ["", "-0.1", "1.1", "NaN", "inf", "1%"] {
            assert!(ratio(bad).is_err(), "{bad}");
        }
        assert_eq!((ratio("0.01"), ratio("1"), ratio("1e-05")), (Ok(0.01), Ok(1.0), Ok(0.00001)));
    }
}
