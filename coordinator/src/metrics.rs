//! Every metric: its name, its meaning and the one function that records it. Nothing else in the program names a
//! metric, so that a dashboard can be checked against this page. Names follow vLLM's behind the prefix `conclave_`.

use std::sync::OnceLock;
use std::time::Duration;

use ::metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use crate::api::view::ClusterView;
use crate::cluster::stranger::Stranger;
use crate::schedule::load::Load;

const RUNNING: &str = "conclave_num_requests_running";
const WAITING: &str = "conclave_num_requests_waiting";
const TENANTS: &str = "conclave_tenants";
const TENANTS_WAITING: &str = "conclave_tenants_waiting";
const CACHE_USED: &str = "conclave_kv_cache_usage_perc";
const PREEMPTIONS: &str = "conclave_num_preemptions_total";
const PREFIX_QUERIES: &str = "conclave_prefix_cache_queries_total";
const PREFIX_HITS: &str = "conclave_prefix_cache_hits_total";
const REQUEUES: &str = "conclave_num_requeues_total";
const STEPS: &str = "conclave_steps_total";
const STEP_MILLISECONDS: &str = "conclave_step_milliseconds_total";
const QUEUE_MILLISECONDS: &str = "conclave_request_queue_milliseconds_total";
const DRAFTED: &str = "conclave_draft_tokens_total";
const ACCEPTED: &str = "conclave_draft_tokens_accepted_total";
const PREFILLED: &str = "conclave_prefilled_tokens_total";
const PROMPT_TOKENS: &str = "conclave_prompt_tokens_total";
const GENERATION_TOKENS: &str = "conclave_generation_tokens_total";
const FIRST_TOKEN: &str = "conclave_time_to_first_token_seconds";
const BETWEEN_TOKENS: &str = "conclave_inter_token_latency_seconds";
const REQUEST_TIME: &str = "conclave_e2e_request_latency_seconds";
const FINISHED: &str = "conclave_request_success_total";
const HTTP_REQUESTS: &str = "conclave_http_requests_total";
const BUILD: &str = "conclave_build_info";
const EPOCH: &str = "conclave_epoch";
const MEMBERS: &str = "conclave_members";
const SERVING: &str = "conclave_serving";
const STORE_UP: &str = "conclave_store_up";
const SLOW_WORKERS: &str = "conclave_slow_workers";
const STRANGERS: &str = "conclave_strangers_refused_total";
const LIMITED: &str = "conclave_requests_limited_total";
const API_KEYS: &str = "conclave_api_keys";
const API_KEYS_FILE_OK: &str = "conclave_api_keys_file_ok";

/// From a token on a fast device to a long prefill on a slow one.
const SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
    300.0, 600.0,
];

static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();

/// Makes this process record metrics, all labelled with the model. Records nothing before; a second call is ignored.
pub fn install(model_name: &str) -> Result<(), BuildError> {
    if RECORDER.get().is_some() {
        return Ok(());
    }
    let handle = PrometheusBuilder::new()
        .add_global_label("model_name", model_name)
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), SECONDS)?
        .install_recorder()?;
    describe();
    gauge!(BUILD, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    // A rate over a counter that is not there yet is no data; over one that is 0 it is 0.
    for name in [PROMPT_TOKENS, GENERATION_TOKENS] {
        counter!(name).absolute(0);
    }
    for reason in ["stop", "length", "abort", "error"] {
        counter!(FINISHED, "finished_reason" => reason).absolute(0);
    }
    for stranger in Stranger::ALL {
        counter!(STRANGERS, "reason" => stranger.label()).absolute(0);
    }
    observe(0, &Load::default(), &Load::default());
    RECORDER.get_or_init(|| handle);
    Ok(())
}

/// The text format that Prometheus scrapes; empty before [`install`].
pub fn render() -> String {
    RECORDER.get().map(PrometheusHandle::render).unwrap_or_default()
}

/// Moves what was recorded into histograms, so that memory stays bounded though nobody scrapes. Call now and then.
pub fn upkeep() {
    if let Some(handle) = RECORDER.get() {
        handle.run_upkeep();
    }
}

fn describe() {
    describe_gauge!(RUNNING, "Sequences in the scheduler's running set");
    describe_gauge!(WAITING, "Sequences waiting for admission or for cache");
    describe_gauge!(TENANTS, "API keys for which requests wait or run; all without a key count as one");
    describe_gauge!(TENANTS_WAITING, "API keys that have requests which wait for their turn");
    describe_gauge!(CACHE_USED, "Cache blocks in use, 1 is all");
    describe_counter!(PREEMPTIONS, "Sequences put back to waiting because cache ran out");
    describe_counter!(PREFIX_QUERIES, "Prompt tokens looked up in the prefix cache");
    describe_counter!(PREFIX_HITS, "Prompt tokens found in the prefix cache");
    describe_counter!(REQUEUES, "Sequences put back to waiting because a group failed");
    describe_counter!(STEPS, "Steps that were answered");
    describe_counter!(STEP_MILLISECONDS, "Time in which steps were in flight");
    describe_counter!(QUEUE_MILLISECONDS, "Time from acceptance to admission, summed over requests");
    describe_counter!(PREFILLED, "Prompt tokens computed, recomputed ones again; cached ones not");
    describe_counter!(DRAFTED, "Tokens that were guessed and checked");
    describe_counter!(ACCEPTED, "Guesses that were drawn as guessed: tokens that needed no step of their own");
    describe_counter!(PROMPT_TOKENS, "Prompt tokens of requests whose first token was drawn");
    describe_counter!(GENERATION_TOKENS, "Tokens generated");
    describe_histogram!(FIRST_TOKEN, Unit::Seconds, "From a request's submission to its first token");
    describe_histogram!(BETWEEN_TOKENS, Unit::Seconds, "Between consecutive tokens of a choice");
    describe_histogram!(REQUEST_TIME, Unit::Seconds, "From a request's submission to its last token");
    describe_counter!(FINISHED, "Choices that ended, by reason: stop, length, abort (the client left), error");
    describe_counter!(HTTP_REQUESTS, "HTTP requests, by route and status code");
    describe_gauge!(BUILD, "Always 1; the build is in the labels");
    describe_gauge!(EPOCH, "The epoch of the current plan");
    describe_gauge!(MEMBERS, "Workers in the cluster");
    describe_gauge!(SERVING, "1 while the cluster serves");
    describe_gauge!(SLOW_WORKERS, "Workers that compute at least twice as long as their peers before collectives");
    describe_gauge!(STORE_UP, "1 while the store of plans and members answers; serving goes on without it");
    describe_counter!(STRANGERS, "Connections to the node plane that were refused, by reason");
    describe_counter!(LIMITED, "Requests refused by a key's limits, by the key's name and what was used up");
    describe_gauge!(API_KEYS, "API keys that are accepted, where a file of keys is followed");
    describe_gauge!(API_KEYS_FILE_OK, "1 while the file of API keys can be read and is right; else its last keys stay");
}

/// The load of a group's scheduler, after a step or when it changes. `before` is what this scheduler's was when last observed:
/// each that a coordinator has, one after another as it leads again, begins at 0, and what is exported goes on growing.
pub fn observe(group: usize, before: &Load, load: &Load) {
    let group = group.to_string();
    let count = |name: &'static str, before: u64, now: u64| {
        counter!(name, "group" => group.clone()).increment(now.saturating_sub(before));
    };
    let milliseconds = |time: Duration| time.as_millis() as u64;
    gauge!(RUNNING, "group" => group.clone()).set(load.running as f64);
    gauge!(WAITING, "group" => group.clone()).set(load.waiting as f64);
    gauge!(TENANTS, "group" => group.clone()).set(load.tenants as f64);
    gauge!(TENANTS_WAITING, "group" => group.clone()).set(load.tenants_waiting as f64);
    gauge!(CACHE_USED, "group" => group.clone()).set(load.blocks_used as f64 / load.blocks_total.max(1) as f64);
    count(PREEMPTIONS, before.preemptions, load.preemptions);
    count(PREFIX_QUERIES, before.prefix_queried_tokens, load.prefix_queried_tokens);
    count(PREFIX_HITS, before.prefix_hits_tokens, load.prefix_hits_tokens);
    count(REQUEUES, before.requeues, load.requeues);
    count(STEPS, before.steps, load.steps);
    count(STEP_MILLISECONDS, milliseconds(before.stepping), milliseconds(load.stepping));
    count(QUEUE_MILLISECONDS, milliseconds(before.queued), milliseconds(load.queued));
    count(DRAFTED, before.tokens_drafted, load.tokens_drafted);
    count(ACCEPTED, before.drafts_accepted, load.drafts_accepted);
    count(PREFILLED, before.tokens_prefilled, load.tokens_prefilled);
}

/// This coordinator leads the group no more: nothing runs or waits here.
pub fn stood_down(group: usize) {
    observe(group, &Load::default(), &Load::default());
}

/// How many workers of a group are slow.
pub fn slow_workers(group: usize, count: usize) {
    gauge!(SLOW_WORKERS, "group" => group.to_string()).set(count as f64);
}

/// The cluster, when it changes or is scraped.
pub fn observe_cluster(view: &ClusterView, serving: bool) {
    gauge!(EPOCH).set(view.epoch as f64);
    gauge!(MEMBERS).set(view.members.len() as f64);
    gauge!(SERVING).set(f64::from(u8::from(serving)));
}

/// Whether the store answered when it was last asked.
pub fn store(up: bool) {
    gauge!(STORE_UP).set(f64::from(u8::from(up)));
}

/// Somebody was refused at the node plane.
pub fn stranger(stranger: Stranger) {
    counter!(STRANGERS, "reason" => stranger.label()).increment(1);
}

/// A key's limit was reached. Names come from the operator's file, so labels stay few.
pub fn request_limited(key: &str, limit: &'static str) {
    counter!(LIMITED, "key" => key.to_string(), "limit" => limit).increment(1);
}

/// The keys that are accepted, and whether their file is right.
pub fn api_keys(count: usize, right: bool) {
    gauge!(API_KEYS).set(count as f64);
    gauge!(API_KEYS_FILE_OK).set(f64::from(u8::from(right)));
}

pub fn first_token(after: Duration, prompt_tokens: usize) {
    counter!(PROMPT_TOKENS).increment(prompt_tokens as u64);
    histogram!(FIRST_TOKEN).record(after);
}

pub fn tokens_generated(tokens: usize) {
    counter!(GENERATION_TOKENS).increment(tokens as u64);
}

pub fn between_tokens(time: Duration) {
    histogram!(BETWEEN_TOKENS).record(time);
}

pub fn request_ended(time: Duration) {
    histogram!(REQUEST_TIME).record(time);
}

/// `reason` is one of those that [`FINISHED`] describes.
pub fn choice_finished(reason: &'static str) {
    counter!(FINISHED, "finished_reason" => reason).increment(1);
}

/// `path` is the route, never the client's own text: labels must stay few.
pub fn http_request(path: &'static str, code: u16) {
    counter!(HTTP_REQUESTS, "path" => path, "code" => code.to_string()).increment(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_grow_over_leads_and_gauges_end_with_one() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        let nothing = Load::default();
        let (first, second) = (Load { steps: 7, running: 3, ..nothing }, Load { steps: 2, waiting: 1, ..nothing });
        let says = |line: &str| assert!(handle.render().lines().any(|l| l == line), "{line} in {}", handle.render());
        ::metrics::with_local_recorder(&recorder, || {
            observe(0, &nothing, &first);
            observe(0, &first, &first);
            says("conclave_steps_total{group=\"0\"} 7");
            stood_down(0);
            says("conclave_num_requests_running{group=\"0\"} 0");
            observe(0, &nothing, &second);
            says("conclave_steps_total{group=\"0\"} 9");
            says("conclave_num_requests_waiting{group=\"0\"} 1");
        });
    }
}
