//! `conclave keys add`: a fresh API key, and the line that lets it in.

use anyhow::{Context, Result, ensure};
use coordinator::api::keyfile;
use coordinator::api::rates::Limits;
use std::io::Write;

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Print a fresh key, which is kept nowhere, and below it its line for the file of keys, which holds a digest alone
    Add {
        /// Whose it is, for logs and metrics
        name: String,
        /// Requests of it that may come in a minute
        #[arg(long)]
        requests_per_minute: Option<u32>,
        /// Tokens that it may use in a minute, prompts and answers together
        #[arg(long)]
        tokens_per_minute: Option<u32>,
        /// Requests of it that may run at a time
        #[arg(long)]
        max_concurrent: Option<u32>,
        /// Its share where other keys' requests wait too, beside their weights; 1 where nothing is said
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(coordinator::schedule::WEIGHT_MAX)))]
        weight: Option<u32>,
    },
}

pub fn run(args: Args) -> Result<()> {
    let Command::Add { name, requests_per_minute, tokens_per_minute, max_concurrent, weight } = args.command;
    ensure!(keyfile::is_name(&name), "{name:?} is no name: 1 to {} of a-z A-Z 0-9 . _ -", keyfile::NAME_BYTES_MAX);
    let key = keyfile::fresh(coordinator::run::random_bytes());
    let limits = Limits { requests_per_minute, tokens_per_minute, max_concurrent, weight };
    // A key that did not arrive is of no use to anybody: said plainly, with what is in its way.
    writeln!(std::io::stdout(), "{key}\n{}", keyfile::line(&key, &name, &limits))
        .context("the key can't be printed")?;
    eprintln!("the first line is for {name} and not shown again; the second is for the coordinators' api_keys_file");
    Ok(())
}
