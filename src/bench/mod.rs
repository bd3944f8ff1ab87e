//! `conclave bench`: load on a running server, measured from the client's side, and what ranks of a host exchange.

mod client;
mod collective;
mod load;
mod offline;
mod random;
mod record;
mod report;
mod serve;
mod sse;
mod step;

use anyhow::{Context, Result};

/// Measures a running server, or this host.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Send completions and measure latency and throughput
    Serve(serve::Args),
    /// Serve a model for the length of one load, all of it at once
    Offline(Box<offline::Args>),
    /// Measure one rank's forward passes against the roofs of what it computes on
    Step(step::Args),
    /// Measure sums and messages between ranks of this host
    Collective(collective::Args),
}

/// Runs the chosen benchmark to its end. Fails when no request succeeded.
pub fn run(args: Args) -> Result<()> {
    let runtime = || {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        runtime.context("the runtime does not start")
    };
    match args.what {
        What::Serve(args) => runtime()?.block_on(serve::serve(args)),
        What::Offline(args) => runtime()?.block_on(offline::offline(*args)),
        What::Step(args) => step::step(&args),
        What::Collective(args) => collective::collective(&args),
    }
}
