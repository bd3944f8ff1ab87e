//! `conclave bench`: load on a running server, measured from the client's side.

mod client;
mod load;
mod random;
mod record;
mod report;
mod serve;
mod sse;

use anyhow::{Context, Result};

/// Measures a running server.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Send completions and measure latency and throughput
    Serve(serve::Args),
}

/// Runs the chosen benchmark to its end. Fails when no request succeeded.
pub fn run(args: Args) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.context("the runtime does not start")?;
    match args.what {
        What::Serve(args) => runtime.block_on(serve::serve(args)),
    }
}
