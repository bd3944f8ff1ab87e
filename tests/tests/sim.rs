//! Many seeds of the simulated cluster. `SEED=n` replays one, `SEEDS=n` runs more.

use conclave_tests::sim::tally::Tally;
use conclave_tests::sim::{seeds, world};

#[test]
fn every_finished_job_equals_the_oracle() {
    let seeds = seeds(400);
    let all = seeds.end - seeds.start;
    let mut tally = Tally::default();
    for seed in seeds {
        let run = std::panic::catch_unwind(|| world::run(seed));
        match run {
            Ok(run) => tally.add(&run),
            Err(_) => panic!("replay with SEED={seed} cargo test --release -p conclave-tests --test sim"),
        }
    }
    println!("{tally:?}");
    if all >= 400 {
        assert!(tally.missing().is_empty(), "never happened: {:?}", tally.missing());
    }
}
