//! The simulation: production decision cores in one thread, driven by a seeded heap of (time, event). A simulated rank
//! draws hashes of what it can reach through its block tables, so that any mistake about blocks changes an answer.

pub mod cluster;
pub mod oracle;
pub mod profile;
pub mod random;
pub mod rank;
pub mod tally;
pub mod world;

/// Seeds to run: `SEED=n` alone replays one, `SEEDS=n` runs that many.
pub fn seeds(usual: u64) -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().map(|text: String| text.parse::<u64>().expect("a number"));
    match (number("SEED"), number("SEEDS")) {
        (Some(seed), _) => seed..seed + 1,
        (None, Some(count)) => 0..count,
        (None, None) => 0..usual,
    }
}
