//! A model that one data plane lends another, in this process.

use anyhow::Result;
use model::plan::Epoch;
use std::path::Path;
use std::sync::Arc;
use worker::collective::connect::DataPlane;
use worker::load::checkpoint::Checkpoint;

/// A checkpoint read of a peer as long as this lives.
pub struct Lent {
    pub checkpoint: Arc<Checkpoint>,
    _planes: [DataPlane; 2],
}

impl Lent {
    /// The model at `path`.
    pub fn open(path: &Path) -> Result<Lent> {
        let [giver, taker] = [DataPlane::bind("127.0.0.1:0", None)?, DataPlane::bind("127.0.0.1:0", None)?];
        let own = Checkpoint::open(path)?;
        let (identity, paths) = (own.identity(), own.paths());
        giver.lend(&identity, "t", Box::new(move || Ok(paths.clone())))?;
        let lender = taker.borrow(&[giver.address().to_string()], (&identity, "t"), Epoch(1))?;
        Ok(Lent { checkpoint: Arc::new(Checkpoint::borrow(&lender)?), _planes: [giver, taker] })
    }
}
