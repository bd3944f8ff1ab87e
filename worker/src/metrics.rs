//! Every metric of a worker: its name, its meaning and where it comes from. Nothing else in the worker names a metric.
//! They are what [`Facts`] says at the moment of the scrape, so nothing is recorded between two.

use crate::collective::refused::{Reason, Refused};
use crate::config::resident_bytes;
use crate::health::{Facts, Stage};
use metrics::{counter, describe_counter, describe_gauge, gauge, with_local_recorder};
use metrics_exporter_prometheus::PrometheusBuilder;

const PROGRESS: &str = "conclave_worker_progress_total";
const EPOCH: &str = "conclave_worker_epoch";
const PHASE: &str = "conclave_worker_phase";
const READY: &str = "conclave_worker_ready";
const JOINED: &str = "conclave_worker_joined";
const STEPS_PENDING: &str = "conclave_worker_steps_pending";
const STILL: &str = "conclave_worker_stalled_seconds";
const LOADED: &str = "conclave_worker_loaded_bytes";
const TO_LOAD: &str = "conclave_worker_load_bytes";
const RESIDENT: &str = "conclave_worker_resident_bytes";
const GAPS: &str = "conclave_worker_step_gaps_total";
const GAP_MICROSECONDS: &str = "conclave_worker_step_gap_microseconds_total";
const REFUSED: &str = "conclave_worker_refused_peers_total";

/// All of them, for whoever checks that they are there.
#[cfg(test)]
pub const NAMES: [&str; 13] = [
    PROGRESS,
    EPOCH,
    PHASE,
    READY,
    JOINED,
    STEPS_PENDING,
    STILL,
    LOADED,
    TO_LOAD,
    RESIDENT,
    GAPS,
    GAP_MICROSECONDS,
    REFUSED,
];

/// The text format that Prometheus scrapes.
pub fn render(facts: &Facts, refused: &Refused) -> String {
    let recorder = PrometheusBuilder::new().build_recorder();
    with_local_recorder(&recorder, || {
        describe();
        observe(facts, refused);
    });
    recorder.handle().render()
}

fn describe() {
    describe_counter!(PROGRESS, "Layers that ranks of this worker have computed");
    describe_gauge!(EPOCH, "The epoch whose ranks exist; 0 without any");
    describe_gauge!(PHASE, "1 for what the ranks are at: idle, loading, ready");
    describe_gauge!(READY, "1 while /readyz says so");
    describe_gauge!(JOINED, "1 while a coordinator that leads has taken this worker");
    describe_gauge!(STEPS_PENDING, "Steps that ranks have not finished, each rank's counted");
    describe_gauge!(STILL, "How long steps have waited without that anything moved");
    describe_gauge!(LOADED, "Bytes that the ranks of this epoch have loaded");
    describe_gauge!(TO_LOAD, "Bytes that the ranks of this epoch have to load");
    describe_gauge!(RESIDENT, "Bytes of this process in memory, mapped files apart");
    describe_counter!(GAPS, "Times that a rank waited between two steps of one sequence");
    describe_counter!(GAP_MICROSECONDS, "How long ranks waited between two steps of one sequence, in all");
    describe_counter!(REFUSED, "Connections to the ranks' data that were turned away, by reason");
}

fn observe(facts: &Facts, refused: &Refused) {
    let truth = |is: bool| f64::from(u8::from(is));
    counter!(PROGRESS).absolute(facts.progress);
    gauge!(EPOCH).set(facts.epoch as f64);
    for stage in Stage::ALL {
        gauge!(PHASE, "phase" => stage.word()).set(truth(stage == facts.stage));
    }
    gauge!(READY).set(truth(facts.obstacles().is_empty()));
    gauge!(JOINED).set(truth(facts.joined));
    gauge!(STEPS_PENDING).set(f64::from(facts.steps_pending));
    gauge!(STILL).set(if facts.steps_pending == 0 { 0.0 } else { facts.still.as_secs_f64() });
    gauge!(LOADED).set(facts.bytes_done as f64);
    gauge!(TO_LOAD).set(facts.bytes_total as f64);
    gauge!(RESIDENT).set(resident_bytes() as f64);
    counter!(GAPS).absolute(facts.gaps.0);
    counter!(GAP_MICROSECONDS).absolute(facts.gaps.1.as_micros() as u64);
    for reason in Reason::ALL {
        counter!(REFUSED, "reason" => reason.word()).absolute(refused.count(reason));
    }
}
