//! `conclave keys add`: a fresh API key, and the line that lets it in.

use anyhow::{Result, ensure};
use coordinator::api::keyfile;

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
    },
}

pub fn run(args: Args) -> Result<()> {
    let Command::Add { name } = args.command;
    ensure!(keyfile::is_name(&name), "{name:?} is no name: 1 to {} of a-z A-Z 0-9 . _ -", keyfile::NAME_BYTES_MAX);
    let key = keyfile::fresh(coordinator::run::random_bytes());
    println!("{key}\n{}", keyfile::line(&key, &name));
    eprintln!("the first line is for {name} and not shown again; the second is for the coordinators' api_keys_file");
    Ok(())
}
