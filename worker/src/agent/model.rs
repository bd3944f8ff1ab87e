//! Where a worker reads a model: its own files, or those of peers that have them.

use crate::collective::connect::DataPlane;
use crate::load::checkpoint::Checkpoint;
use model::fault::Fault;
use model::plan::Epoch;
use std::path::PathBuf;

/// What an epoch's ranks read.
#[derive(Debug, Clone, Default)]
pub struct Models {
    pub model: Model,
    /// Where the plan has one. Nobody lends its files.
    pub draft: Option<Model>,
}

#[derive(Debug, Clone, Default)]
pub struct Model {
    /// Where this host has it, if it has it.
    pub path: PathBuf,
    /// See [`model::identity`].
    pub identity: Vec<u8>,
    /// The cluster's, which lenders ask for.
    pub token: String,
    /// Data addresses of peers that may have it.
    pub lenders: Vec<String>,
}

impl Model {
    /// Opens its own files, or, where they are not whole, those of peers, until `epoch` is over.
    pub fn open(&self, plane: &DataPlane, epoch: Epoch) -> Result<Checkpoint, Fault> {
        let own = match Checkpoint::open(&self.path) {
            Ok(checkpoint) => return Ok(checkpoint),
            Err(fault) => fault,
        };
        if self.lenders.is_empty() {
            return Err(own);
        }
        tracing::info!("{}: asking {} peers for the model's files", own.text, self.lenders.len());
        let borrowed = plane.borrow(&self.lenders, (&self.identity, &self.token), epoch);
        let opened = borrowed.and_then(|lender| Checkpoint::borrow(&lender));
        opened.map_err(|fault| Fault::new(own.kind, format!("{}; {}", own.text, fault.text)))
    }

    /// Lends its own files from now on, if they are whole when somebody asks.
    pub fn lend(&self, plane: &DataPlane) -> Result<(), Fault> {
        let (path, identity) = (self.path.clone(), self.identity.clone());
        let open = move || {
            let checkpoint = Checkpoint::open(&path)?;
            let same = checkpoint.identity() == identity;
            Ok(if same { checkpoint.paths() } else { Vec::new() })
        };
        plane.lend(&self.identity, &self.token, Box::new(open))
    }
}
