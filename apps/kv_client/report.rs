// SPDX-License-Identifier: MIT OR Apache-2.0
//! The line of JSON at the end.

use std::time::Duration;

use serde_json::{Value, json};

use super::failure::Failure;
use super::options::Options;
use super::wakeup;
use super::workers::Outcome;

pub(crate) fn success(options: &Options, outcome: &Outcome) -> Value {
    let latencies = &outcome.latencies;
    let quantile = |quantile| latencies.value_at_quantile(quantile);
    let per_request =
        |time: Duration| (time.as_nanos() as f64 / options.requests as f64 * 10.0).round() / 10.0;
    let agreement = outcome.totals.and_then(|totals| totals.agreement);
    let client = outcome.cpu.map(|cpu| cpu.client);
    let server = outcome.cpu.and_then(|cpu| cpu.server);
    let both = client.zip(server).map(|(client, server)| client + server);
    let mut report = json!({
        "ok": true,
        "transport": options.target.transport(),
        "requests": latencies.len(),
        "seconds": outcome.seconds,
        "per_second": (latencies.len() as f64 / outcome.seconds).round(),
        "p50_ns": quantile(0.5),
        "p90_ns": quantile(0.9),
        "p99_ns": quantile(0.99),
        "p999_ns": quantile(0.999),
        "max_ns": latencies.max(),
        "cpu_ns_per_request": both.map(per_request),
        "client_cpu_ns_per_request": client.map(per_request),
        "server_cpu_ns_per_request": server.map(per_request),
        "shards": outcome.totals.map(|totals| totals.shards),
        "protocol": agreement.map(|(protocol, _)| protocol.as_u8()),
        "wakeup": agreement.map(|(_, wakeup)| wakeup::name(wakeup)),
        "connections": options.connections,
        "depth": options.depth,
        "value": options.value,
        "reads": options.reads,
        "rate": options.rate,
        "tick_us": options.tick.as_micros() as u64,
        "errors": 0,
    });
    if let (Some(report), Some(totals)) = (report.as_object_mut(), &outcome.totals) {
        report.extend(totals.named().map(|(name, count)| (name.to_owned(), count.into())));
    }
    report
}

pub(crate) fn failure(options: &Options, failure: &Failure) -> Value {
    json!({
        "ok": false,
        "transport": options.target.transport(),
        "errors": 1,
        "error": failure.to_string(),
    })
}
