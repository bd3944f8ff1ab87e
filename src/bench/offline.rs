//! `conclave bench offline`: a cluster on this host for the length of one load, all of it at once.

use std::path::PathBuf;

use anyhow::Result;
use coordinator::hub::Need;

use super::serve::{self, Load};
use crate::serve::{After, Options};

/// Requests under way at once, where nothing is said: fewer than may wait.
const CONCURRENCY_MAX: u32 = 1000;

/// Serves a model, sends it a load, and ends.
#[derive(clap::Args)]
pub struct Args {
    /// A local directory, a .gguf file, or a hub id
    model: PathBuf,
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    load: Load,
}

pub async fn offline(args: Args) -> Result<()> {
    let Args { model, mut options, mut load } = args;
    let model = crate::hub::model(&model, Need::Serve)?;
    // Whatever else serves here is left alone.
    options.listen.set_port(0);
    options.served_model_name = options.served_model_name.or(model.name);
    if load.rate.is_none() {
        load.concurrency.get_or_insert(load.requests.min(CONCURRENCY_MAX));
    }
    let api_key = options.key();
    crate::serve::serve(model.path, options, |serving| async move {
        serving.announce();
        let url = format!("http://{}", serving.address);
        serve::serve(serve::Args { url, model: None, api_key, load }).await?;
        Ok(After::End)
    })
    .await
}
