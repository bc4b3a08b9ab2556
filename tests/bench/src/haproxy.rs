//! HAProxy's configuration for a job. It checks the chain of a peer's certificate, but knows no SPIFFE ids.

use std::fmt::Write;

use crate::job::{self, Job, Protocol, Security, WEIGHTS};

pub(crate) fn config(job: &Job) -> String {
    let folder = job.folder.display();
    let certificates =
        format!("ssl crt {folder}/proxy.pem ca-file {folder}/ca.crt verify required ssl-min-ver TLSv1.3");
    let bind = match job.downstream {
        Security::Plaintext => String::new(),
        Security::Mtls => format!("{certificates} alpn h2,http/1.1"),
    };
    let protocol = if job.to_upstream().is_http2() { "proto h2" } else { "" };
    let server = match job.upstream {
        Security::Plaintext => protocol.to_owned(),
        Security::Mtls => format!("{certificates} alpn {} {protocol}", job.to_upstream().alpn()),
    };
    let mode = if job.protocol == Protocol::Tcp {
        "mode tcp"
    } else {
        "mode http\n    option forwardfor\n    http-reuse always\n    \
            retry-on conn-failure empty-response response-timeout 502 503 504"
    };
    let service = &job.services[0];
    let mut text = format!(
        "global\n    nbthread 1\n    maxconn 8000\ndefaults\n    {mode}\n    timeout connect {}s\n    \
         timeout client 1h\n    timeout tunnel 1h\n    timeout server {}s\n    retries {}\n    option redispatch\n\
         frontend bench\n    bind {} {bind}\n    default_backend bench\nbackend bench\n    balance roundrobin\n",
        job::CONNECT_TIMEOUT.as_secs(),
        job::REQUEST_TIMEOUT.as_secs(),
        job::RETRIES,
        service.listen,
    );
    for (revision, endpoint) in
        service.revisions.iter().enumerate().flat_map(|(n, all)| all.iter().map(move |it| (n, it)))
    {
        let _ = writeln!(text, "    server r{revision} {endpoint} weight {} {server}", WEIGHTS[revision]);
    }
    text
}
