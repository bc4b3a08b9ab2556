use super::*;

fn labels() -> MetricLabels {
    MetricLabels { destination_namespace: "shop".into(), destination_service: "cart".into(), revision: "abc".into() }
}

#[test]
fn series_of_a_configured_revision_exist_at_zero_and_go_with_their_last_user() {
    let metrics = Metrics::new("fleet-0", 2);
    let handle = metrics.revision(&labels(), 0);
    let text = metrics.render();
    for class in CLASSES {
        let series = format!(
            "sluice_requests_total{{destination_namespace=\"shop\",destination_service=\"cart\",\
             revision=\"abc\",code_class=\"{class}\",grpc_status=\"\"}} 0\n"
        );
        assert!(text.contains(&series), "{series} is missing in\n{text}");
    }
    assert!(text.contains("sluice_member_info{member=\"fleet-0\"} 1\n"));
    assert!(text.contains("revision=\"abc\",le=\"0.001\"} 0\n"));
    drop(handle);
    assert!(!metrics.render().contains("revision=\"abc\""));
}

#[test]
fn a_revision_that_comes_back_goes_on_counting_and_one_that_stays_away_is_forgotten() {
    let metrics = Metrics::new("m", 1);
    let count = |metrics: &Metrics| metrics.outcomes(&labels(), Duration::ZERO).requests;
    let failed = || {
        let unavailable = Some(GrpcStatus::UNAVAILABLE);
        metrics.revision(&labels(), 0).record(StatusCode::OK, unavailable, Duration::from_millis(1), None);
    };
    failed();
    let gone = Instant::now();
    assert!(!metrics.render_at(gone).contains("revision=\"abc\""));
    metrics.render_at(gone + REMEMBERED - Duration::from_millis(1));
    failed();
    let again = metrics.revision(&labels(), 0);
    assert!(metrics.render().contains("grpc_status=\"UNAVAILABLE\"} 2\n"));
    // As long as it is there, however long ago it was not.
    metrics.render_at(gone + 2 * REMEMBERED);
    assert_eq!(count(&metrics), 2);
    drop(again);
    metrics.render_at(gone + 2 * REMEMBERED);
    assert_eq!(count(&metrics), 2);
    metrics.render_at(gone + 3 * REMEMBERED);
    assert_eq!(count(&metrics), 0);
}

#[test]
fn what_nobody_scrapes_is_forgotten_too() {
    let mut family = Family::<String, ListenerShard>::default();
    let began = Instant::now();
    family.used("first", 1, began);
    // It is found not to be used when another one comes, and it is forgotten when one comes later.
    family.used("second", 1, began + SWEEP);
    family.used("third", 1, began + SWEEP + REMEMBERED);
    assert_eq!(family.series.keys().collect::<Vec<_>>(), ["second", "third"]);
}

#[test]
fn threads_are_summed_and_a_bound_includes_its_own_value() {
    let metrics = Metrics::new("m", 2);
    let (first, second) = (metrics.revision(&labels(), 0), metrics.revision(&labels(), 1));
    first.record(StatusCode::OK, None, Duration::from_millis(1), Some(Duration::from_micros(900)));
    second.record(StatusCode::OK, Some(GrpcStatus::parse(b"0")), Duration::from_nanos(1_000_001), None);
    second.record(StatusCode::BAD_GATEWAY, None, Duration::from_secs(90), None);
    let text = metrics.render();
    assert!(text.contains("code_class=\"2xx\",grpc_status=\"\"} 1\n"));
    assert!(text.contains("code_class=\"2xx\",grpc_status=\"OK\"} 1\n"));
    assert!(text.contains("code_class=\"5xx\",grpc_status=\"\"} 1\n"));
    assert!(text.contains("duration_seconds_bucket{destination_namespace=\"shop\",destination_service=\"cart\",revision=\"abc\",le=\"0.001\"} 1\n"));
    assert!(text.contains("revision=\"abc\",le=\"0.002\"} 2\n"));
    assert!(text.contains("revision=\"abc\",le=\"60\"} 2\n"));
    assert!(text.contains("revision=\"abc\",le=\"+Inf\"} 3\n"));
    assert!(text.contains("revision=\"abc\"} 90.002000001\n"), "{text}");
}

#[test]
fn copies_are_counted_apart_and_only_what_says_something_is_measured() {
    let metrics = Metrics::new("m", 2);
    let threads = [metrics.mirror(&labels(), 0), metrics.mirror(&labels(), 1)];
    let ok = StatusCode::OK;
    let table = [
        (Mirrored::Answered(ok, None), "2xx", 1),
        (Mirrored::Answered(ok, Some(GrpcStatus::parse(b"0"))), "2xx", 1),
        (Mirrored::Answered(ok, Some(GrpcStatus::parse(b"5"))), "2xx", 1),
        (Mirrored::Answered(ok, Some(GrpcStatus::parse(b"13"))), "grpc_failed", 1),
        (Mirrored::Answered(StatusCode::BAD_GATEWAY, Some(GrpcStatus::UNAVAILABLE)), "5xx", 1),
        (Mirrored::Failed, "failed", 1),
        (Mirrored::TimedOut, "timeout", 1),
        (Mirrored::TooLarge, "too_large", 0),
        (Mirrored::Busy, "busy", 0),
        (Mirrored::Cancelled, "cancelled", 0),
    ];
    let value = |series: &str| -> u64 {
        let text = metrics.render();
        let labels = "destination_namespace=\"shop\",destination_service=\"cart\",revision=\"abc\"";
        let (name, more) = series.split_once(' ').unwrap_or((series, ""));
        let head = format!("{name}{{{labels}{more}}} ");
        text.lines().find_map(|line| line.strip_prefix(&head)).unwrap().parse().unwrap()
    };
    for (at, (outcome, name, measured)) in table.into_iter().enumerate() {
        let outcomes = format!("sluice_mirrored_requests_total ,outcome=\"{name}\"");
        let durations = "sluice_mirrored_request_duration_seconds_count";
        let before = (value(&outcomes), value(durations));
        threads[at % 2].record(outcome, Duration::from_millis(5));
        assert_eq!((value(&outcomes), value(durations)), (before.0 + 1, before.1 + measured), "{outcome:?}");
    }
    assert_eq!(metrics.outcomes(&labels(), Duration::from_millis(1)), Outcomes::default(), "the guard sees none");
}

#[test]
fn a_request_waits_for_no_scrape_that_is_being_written() {
    let metrics = Metrics::new("m", 1);
    let (revision, listener) = (metrics.revision(&labels(), 0), metrics.listener("l", 0));
    // As `render` has it for as long as it writes.
    let written = metrics.families.lock().unwrap();
    let (counted, seen) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        listener.opened();
        listener.request_started();
        revision.record(StatusCode::OK, None, Duration::from_millis(1), Some(Duration::from_millis(1)));
        listener.retried(Retry::Stale);
        listener.request_ended();
        listener.closed();
        counted.send(()).unwrap();
    });
    seen.recv_timeout(Duration::from_secs(20)).unwrap();
    drop(written);
}

#[test]
fn outcomes_are_counted_as_the_gates_count_them() {
    let metrics = Metrics::new("m", 2);
    let limit = Duration::from_millis(400);
    assert_eq!(metrics.outcomes(&labels(), limit), Outcomes::default(), "not configured");
    let threads = [metrics.revision(&labels(), 0), metrics.revision(&labels(), 1)];
    let mut bad = 0;
    for (index, name) in GRPC.iter().enumerate().skip(1) {
        let status = GrpcStatus(u8::try_from(index - 1).unwrap());
        threads[index % 2].record(StatusCode::OK, Some(status), Duration::from_millis(1), None);
        bad += u64::from(["UNKNOWN", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"].contains(name));
    }
    for status in [200, 302, 404, 500, 503] {
        threads[0].record(StatusCode::from_u16(status).unwrap(), None, Duration::from_millis(1), None);
    }
    // 500 ms is the next bound above 400 ms, and the last one is 60 s.
    for milliseconds in [450, 500, 501, 90_000] {
        threads[1].record(StatusCode::OK, None, Duration::from_millis(milliseconds), None);
    }
    let outcomes = metrics.outcomes(&labels(), limit);
    assert_eq!(outcomes, Outcomes { requests: 17 + 5 + 4, bad: bad + 2, slow: 2 });
    assert_eq!(bad, 5);
    let slow = |limit| metrics.outcomes(&labels(), limit).slow;
    assert_eq!((slow(Duration::from_millis(500)), slow(Duration::from_micros(500_001))), (2, 1));
    assert_eq!((slow(Duration::ZERO), slow(Duration::from_secs(60)), slow(Duration::from_secs(61))), (0, 1, 0));
}

#[test]
fn a_request_that_was_given_up_has_a_time_and_no_class() {
    let metrics = Metrics::new("m", 1);
    let revision = metrics.revision(&labels(), 0);
    revision.record(StatusCode::OK, None, Duration::from_millis(1), Some(Duration::from_millis(1)));
    revision.given_up(Duration::from_millis(5));
    revision.given_up(Duration::from_secs(1));
    let outcomes = metrics.outcomes(&labels(), Duration::from_millis(500));
    assert_eq!(outcomes, Outcomes { requests: 3, bad: 0, slow: 1 });
    let text = metrics.render();
    let labels = "{destination_namespace=\"shop\",destination_service=\"cart\",revision=\"abc\"";
    for series in [
        format!("sluice_request_duration_seconds_count{labels}}} 3\n"),
        format!("sluice_request_duration_seconds_bucket{labels},le=\"0.005\"}} 2\n"),
        format!("sluice_request_first_byte_seconds_count{labels}}} 1\n"),
        format!("sluice_requests_total{labels},code_class=\"2xx\",grpc_status=\"\"}} 1\n"),
    ] {
        assert!(text.contains(&series), "{series} is missing in\n{text}");
    }
}

#[test]
fn series_of_a_revision_and_a_listener_are_as_many_as_the_documents_say() {
    let metrics = Metrics::new("m", 2);
    let count = || metrics.render().lines().filter(|line| !line.starts_with('#')).count();
    let process = count();
    let listener = metrics.listener("l", 0);
    assert_eq!(count() - process, 7);
    listener.opened();
    assert_eq!(count() - process, 26);
    let revision = metrics.revision(&labels(), 0);
    assert_eq!(count() - process - 26, 4 + 2 * 31);
    for status in (100..1000).map(|status| StatusCode::from_u16(status).unwrap()) {
        for grpc in 0..=u8::MAX {
            // As requests are recorded: a 5xx has none.
            let grpc = GrpcStatus::parse(grpc.to_string().as_bytes());
            let grpc = Some(grpc).filter(|_| status.as_u16() < 500);
            revision.record(status, grpc, Duration::from_micros(u64::from(status.as_u16())), None);
        }
        revision.record(status, None, Duration::from_secs(u64::from(status.as_u16())), Some(Duration::ZERO));
    }
    for flag in Flag::ALL {
        listener.local_error(flag);
    }
    assert_eq!(count() - process - 26, 55 + 2 * 31);
    let _mirror = metrics.mirror(&labels(), 1);
    assert_eq!(count() - process - 26, 55 + 2 * 31 + 10 + 31);
}

#[test]
fn what_is_no_canonical_grpc_code_is_unknown() {
    for value in [&b"17"[..], b"-1", b"", b"OK", b"256"] {
        assert_eq!(GrpcStatus::parse(value), GrpcStatus::UNKNOWN);
    }
    assert_eq!(GrpcStatus::parse(b"14").name(), "UNAVAILABLE");
}
