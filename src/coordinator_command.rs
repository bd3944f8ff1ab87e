//! `conclave coordinator`: one coordinator of a cluster.

use crate::{checksums, settings, signals};
use anyhow::{Context, Result};
use coordinator::api::connections;
use coordinator::config::Config;
use proto::tls::guard;
use std::path::PathBuf;
use std::time::Duration;

#[derive(clap::Args)]
pub struct Args {
    /// Settings as TOML
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

pub fn run(args: Args) -> Result<()> {
    let file = args.config.display().to_string();
    let text = std::fs::read_to_string(&args.config).with_context(|| format!("{file} can't be read"))?;
    let mut config: Config = settings::parse(&file, &text)?;
    if let Ok(token) = std::env::var("CONCLAVE_TOKEN") {
        config.token = token;
    }
    if let Ok(key) = std::env::var("CONCLAVE_API_KEY") {
        config.api_keys.push(key);
    }
    if let Ok(address) = std::env::var("CONCLAVE_NODE_ADVERTISE") {
        config.node_advertise = Some(address);
    }
    if config.verify_checksums {
        checksums::verify(&config.model)?;
    }
    if let Ok(password) = std::env::var("CONCLAVE_STORE_PASSWORD") {
        config.store.password = password;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let listen = async |address: &str, what: &str| {
            connections::listen(address).await.with_context(|| format!("{what} can't listen on {address}"))
        };
        let (api, node) =
            (listen(&config.listen, "the API").await?, listen(&config.node_listen, "the node plane").await?);
        let node_address = node.local_addr()?;
        anyhow::ensure!(
            node_address.ip().is_loopback() || !config.token.is_empty(),
            "the node plane on {node_address} needs a token: others than this host can reach it"
        );
        let guarded = (config.tls.is_some(), "give it certificates under [tls]");
        guard("the node plane", &node_address.to_string(), guarded, config.insecure)?;
        let patience = Duration::from_secs(config.drain_seconds);
        let coordinator = coordinator::run::start(config, api, node, crate::build())?;
        tokio::select! {
            stopped = signals::asked_to_stop() => stopped?,
            ended = coordinator.ended() => ended?,
        }
        tracing::info!("ending: open requests have {} s; a second signal ends it at once", patience.as_secs());
        tokio::select! {
            () = coordinator.stop(patience) => {}
            () = signals::asked_or_never() => {}
        }
        Ok(())
    })
}
