//! From records to figures, to JSON and to a table.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::record::{Failure, Record};

/// One distribution, in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Latency {
    pub samples: usize,
    pub mean_ms: f64,
    pub p50_ms: f64,
    pub p90_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
}

impl Latency {
    /// None without samples.
    fn new(samples: impl Iterator<Item = Duration>) -> Option<Latency> {
        let mut samples: Vec<f64> = samples.map(|sample| sample.as_secs_f64() * 1e3).collect();
        samples.sort_by(f64::total_cmp);
        Some(Latency {
            samples: samples.len(),
            max_ms: *samples.last()?,
            mean_ms: samples.iter().sum::<f64>() / samples.len() as f64,
            p50_ms: percentile(&samples, 50.0),
            p90_ms: percentile(&samples, 90.0),
            p99_ms: percentile(&samples, 99.0),
        })
    }
}

/// A percentile of ascending samples, between two of them by a straight line (as numpy does by default).
fn percentile(sorted: &[f64], percent: f64) -> f64 {
    assert!(!sorted.is_empty(), "a percentile of nothing");
    let at = (sorted.len() - 1) as f64 * percent / 100.0;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    below + (above - below) * at.fract()
}

/// The figures of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub settings: BTreeMap<String, serde_json::Value>,
    pub requests: usize,
    pub succeeded: usize,
    pub failed: usize,
    /// Failed requests by what went wrong.
    pub failures: BTreeMap<String, usize>,
    /// From the first request's start to the last answer's end.
    pub duration_s: f64,
    /// The most requests that were under way at once.
    pub concurrency_peak: usize,
    pub input_tokens: usize,
    pub cached_tokens: usize,
    pub output_tokens: usize,
    pub requests_per_s: f64,
    pub input_tokens_per_s: f64,
    pub output_tokens_per_s: f64,
    pub total_tokens_per_s: f64,
    /// Time to the first token.
    pub ttft: Option<Latency>,
    /// Gaps between arrivals of tokens.
    pub itl: Option<Latency>,
    /// Mean time of a token after the first, one sample a request.
    pub tpot: Option<Latency>,
    pub end_to_end: Option<Latency>,
}

impl Report {
    pub fn new(settings: BTreeMap<String, serde_json::Value>, outcomes: &[Result<Record, Failure>]) -> Report {
        let records: Vec<&Record> = outcomes.iter().flatten().collect();
        let mut failures = BTreeMap::new();
        for failure in outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
            *failures.entry(failure.to_string()).or_insert(0) += 1;
        }
        let first = records.iter().map(|record| record.started).min().unwrap_or_default();
        let last = records.iter().map(|record| record.ended).max().unwrap_or_default();
        let seconds = last.saturating_sub(first).as_secs_f64();
        let rate = |count: usize| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        let sum = |each: fn(&Record) -> usize| records.iter().map(|record| each(record)).sum::<usize>();
        let (input, output) = (sum(|record| record.input), sum(|record| record.output));
        Report {
            settings,
            requests: outcomes.len(),
            succeeded: records.len(),
            failed: outcomes.len() - records.len(),
            failures,
            duration_s: seconds,
            concurrency_peak: peak(&records),
            input_tokens: input,
            cached_tokens: sum(|record| record.cached),
            output_tokens: output,
            requests_per_s: rate(records.len()),
            input_tokens_per_s: rate(input),
            output_tokens_per_s: rate(output),
            total_tokens_per_s: rate(input + output),
            ttft: Latency::new(records.iter().map(|record| record.first())),
            itl: Latency::new(records.iter().flat_map(|record| record.gaps())),
            tpot: Latency::new(records.iter().filter_map(|record| record.per_token())),
            end_to_end: Latency::new(records.iter().map(|record| record.whole())),
        }
    }

    /// The report for people.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let mut line = |name: &str, value: String| out.push_str(&format!("{name:<28}{value:>14}\n"));
        line("requests succeeded", format!("{} of {}", self.succeeded, self.requests));
        for (failure, count) in &self.failures {
            line(&format!("  failed: {failure}"), count.to_string());
        }
        line("duration", format!("{:.2} s", self.duration_s));
        line("peak concurrency", self.concurrency_peak.to_string());
        line("input tokens", self.input_tokens.to_string());
        line("  from the prefix cache", self.cached_tokens.to_string());
        line("output tokens", self.output_tokens.to_string());
        line("requests / s", format!("{:.2}", self.requests_per_s));
        line("input tokens / s", format!("{:.1}", self.input_tokens_per_s));
        line("output tokens / s", format!("{:.1}", self.output_tokens_per_s));
        line("total tokens / s", format!("{:.1}", self.total_tokens_per_s));
        let head = ["mean", "p50", "p90", "p99", "max"].map(|name| format!("{name:>11}")).concat();
        out.push_str(&format!("\n{:<24}{head}\n", "milliseconds"));
        let rows = [
            ("time to first token", &self.ttft),
            ("between tokens (ITL)", &self.itl),
            ("per token (TPOT)", &self.tpot),
            ("end to end", &self.end_to_end),
        ];
        for (name, latency) in rows {
            let Some(latency) = latency else { continue };
            let figures = [latency.mean_ms, latency.p50_ms, latency.p90_ms, latency.p99_ms, latency.max_ms];
            out.push_str(&format!("{name:<24}{}\n", figures.map(|figure| format!("{figure:>11.2}")).concat()));
        }
        out
    }
}

/// The most records that overlap. One that ends as another starts does not overlap it.
fn peak(records: &[&Record]) -> usize {
    let mut changes: Vec<(Duration, i64)> =
        records.iter().flat_map(|record| [(record.started, 1), (record.ended, -1)]).collect();
    changes.sort_unstable();
    let mut now = 0;
    changes.iter().fold(0, |peak, (_, change)| {
        now += change;
        peak.max(now)
    }) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn record(started: u64, ended: u64) -> Record {
        let arrivals = vec![(ms(started + 10), 1), (ms(ended), 1)];
        Record { started: ms(started), arrivals, ended: ms(ended), input: 100, output: 2, cached: 30 }
    }

    #[test]
    fn percentiles_lie_on_the_line_between_samples() {
        let check = |samples: &[f64], percent, expected: f64| {
            let found = percentile(samples, percent);
            assert!((found - expected).abs() < 1e-9, "p{percent} of {samples:?}: {found}");
        };
        check(&[7.0], 99.0, 7.0);
        check(&[1.0, 2.0], 50.0, 1.5);
        check(&[1.0, 2.0, 3.0, 4.0, 5.0], 50.0, 3.0);
        check(&[1.0, 2.0, 3.0, 4.0, 5.0], 90.0, 4.6);
        check(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.0, 1.0);
        check(&[1.0, 2.0, 3.0, 4.0, 5.0], 100.0, 5.0);
        let hundred: Vec<f64> = (0..=100).map(f64::from).collect();
        check(&hundred, 99.0, 99.0);
    }

    #[test]
    fn input_and_output_are_told_apart_and_failures_counted() {
        let outcomes = [
            Ok(record(0, 500)),
            Ok(record(500, 1000)),
            Ok(record(600, 2000)),
            Err(Failure::Status(429)),
            Err(Failure::Status(429)),
            Err(Failure::Timeout),
        ];
        let report = Report::new(BTreeMap::new(), &outcomes);
        assert_eq!((report.requests, report.succeeded, report.failed), (6, 3, 3));
        assert_eq!(report.failures, [("HTTP 429".to_string(), 2), ("timed out".to_string(), 1)].into());
        assert_eq!((report.duration_s, report.concurrency_peak), (2.0, 2));
        assert_eq!((report.input_tokens_per_s, report.output_tokens_per_s), (150.0, 3.0));
        assert_eq!((report.total_tokens_per_s, report.cached_tokens), (153.0, 90));
        assert_eq!(report.ttft.as_ref().unwrap().p50_ms, 10.0);
        assert_eq!(report.itl.as_ref().unwrap().samples, 3);
    }

    #[test]
    fn the_table_is_aligned_and_bears_a_run_without_success() {
        let table = Report::new(BTreeMap::new(), &[Ok(record(0, 500)), Err(Failure::Connect)]).table();
        let rows: Vec<usize> = table.lines().skip_while(|line| !line.starts_with("millis")).map(str::len).collect();
        assert_eq!(rows, [79; 5], "{table}");
        assert!(table.contains("failed: no connection"), "{table}");
        let none = Report::new(BTreeMap::new(), &[Err(Failure::Connect)]);
        assert_eq!((none.duration_s, none.ttft.clone(), none.requests_per_s), (0.0, None, 0.0));
        assert!(none.table().contains("0 of 1"));
    }
}
