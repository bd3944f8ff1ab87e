//! The `conclave` command: one file a subcommand, results on stdout, logs on stderr.
//! Exit codes: 0 done, 1 failed, 2 wrong usage.

use clap::{Parser, Subcommand};
use std::io::IsTerminal;
use std::process::ExitCode;

mod bench;
mod certs;
mod checksums;
mod client;
mod coordinator_command;
mod drain;
mod hub;
mod keys;
mod plan;
mod preflight;
mod progress;
mod quickstart;
mod serve;
mod settings;
mod signals;
mod status;
mod verify;
mod whole;
mod worker_command;
mod workers;

/// Serves giant mixture-of-experts language models from many machines as if they were one.
#[derive(Parser)]
#[command(name = "conclave", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the built-in demo model with two workers and show an answer
    Quickstart(quickstart::Args),
    /// Serve a model from this host: coordinator and workers as processes
    Serve(serve::Args),
    /// Run one coordinator of a cluster
    Coordinator(coordinator_command::Args),
    /// Run one worker of a cluster
    Worker(worker_command::Args),
    /// Show how a model would be cut over devices, without any device
    Plan(plan::Args),
    /// Say what this host can do and what is missing, each in one line
    Preflight(preflight::Args),
    /// Show a running cluster: members, epoch, mesh, memory, load
    Status(status::Args),
    /// Compare a running cluster with a one-rank reference: weights, tokens and log-probabilities
    Verify(verify::Args),
    /// Let a worker end as soon as others can do without it
    Drain(drain::Args),
    /// Certificates for the processes of a cluster
    Certs(certs::Args),
    /// Keys of the API
    Keys(keys::Args),
    /// Measure a running server
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("CONCLAVE_LOG")
                .unwrap_or_else(|_| default_filter(&cli.command)),
        )
        .with_target(false)
        // A log that can't be written, as on a full disk, ends nothing: telling of it on the same way would.
        .log_internal_errors(false)
        .init();
    let outcome = match cli.command {
        Command::Quickstart(args) => quickstart::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Coordinator(args) => coordinator_command::run(args),
        Command::Worker(args) => worker_command::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Preflight(args) => preflight::run(args),
        Command::Status(args) => status::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Drain(args) => drain::run(args),
        Command::Certs(args) => certs::run(args),
        Command::Keys(args) => keys::run(args),
        Command::Bench(args) => bench::run(args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Commands with a person in front say little; the long-running parts of a cluster log their doings.
fn default_filter(command: &Command) -> tracing_subscriber::EnvFilter {
    let level = match command {
        Command::Coordinator(_) => "info",
        // A worker of `serve` ends with it: only what went wrong is news.
        Command::Worker(args) => {
            if args.until_stdin_closes {
                "error"
            } else {
                "info"
            }
        }
        _ => "warn",
    };
    tracing_subscriber::EnvFilter::new(level)
}

/// Version and commit: a step's bits are promised among equal builds only.
fn build() -> String {
    format!("{} ({})", env!("CARGO_PKG_VERSION"), env!("CONCLAVE_COMMIT"))
}
