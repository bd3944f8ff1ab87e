//! Many seeds of the simulated group and of the simulated cluster. `SEED=n` replays one, `SEEDS=n` runs more.

use conclave_tests::sim::cluster::world::Mode;
use conclave_tests::sim::{cluster, seeds, tally, world};

/// Runs every seed, naming the one that fails.
fn all<T>(usual: u64, run: impl Fn(u64) -> T + std::panic::RefUnwindSafe, mut add: impl FnMut(T)) -> u64 {
    let seeds = seeds(usual);
    let count = seeds.end - seeds.start;
    for seed in seeds {
        match std::panic::catch_unwind(|| run(seed)) {
            Ok(tally) => add(tally),
            Err(_) => panic!("replay with SEED={seed} cargo test --release -p conclave-tests --test sim"),
        }
    }
    count
}

#[test]
fn every_finished_job_equals_the_oracle() {
    let mut tally = tally::Tally::default();
    let count = all(400, world::run, |run| tally.add(&run));
    println!("{count} seeds: {tally:?}");
    if count >= 400 {
        assert!(tally.missing().is_empty(), "never happened: {:?}", tally.missing());
    }
}

fn cluster(mode: Mode, usual: u64) {
    let mut tally = cluster::tally::Tally::default();
    let count = all(usual, |seed| cluster::world::run(seed, mode), |run| tally.add(&run));
    println!("{mode:?}, {count} seeds: {tally:?}");
    if count >= usual {
        assert!(tally.missing(mode).is_empty(), "never happened: {:?}", tally.missing(mode));
    }
}

#[test]
fn through_faults_of_every_kind_a_cluster_answers_as_the_oracle() {
    cluster(Mode::Safety, 1000);
}

#[test]
fn once_faults_stop_a_cluster_serves_whole_again_by_itself() {
    cluster(Mode::Liveness, 1000);
}
