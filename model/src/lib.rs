//! What a model is and how it is cut. Pure: no I/O beyond parsing bytes given, no async, no device.
//!
//! * [`spec`]: a model as data, [`spec::ModelSpec`]; [`hf`] and [`gguf`] make one from a checkpoint's own description.
//! * [`bounds`]: what every spec must satisfy.
//! * [`rope`]: the rotary frequencies of every scaling dialect.
//! * [`catalog`]: every tensor of a spec, declared once: its names in a checkpoint, its shape and its cut.
//! * [`cut`]: how one tensor is divided over ranks, and the canonical segments that keep one answer.
//! * [`identity`]: what tells whether two processes read the same model.
//! * [`mesh`]: the ranks and their groups; all rank arithmetic lives here.
//! * [`quant`]: weight formats and their bytes.
//! * [`quantisation`]: the layouts that Hugging Face checkpoints keep codes in.
//! * [`keep`]: how a rank keeps a matrix, in codes or widened, and what that takes.
//! * [`storage`]: what each matrix of a checkpoint is stored in.
//! * [`size`]: bytes of weights, cache and workspace a rank.
//! * [`parameters`]: how many weights a model has, in all and for one token.
//! * [`plan`]: what a coordinator decided for an epoch (data only).
//! * [`proof`]: what ranks prove of the weights that they loaded.
//! * [`step`]: what one forward pass of a group is asked and answers (data only).
//! * [`fault`]: the kinds of failure that recovery matches on.

#![forbid(unsafe_code)]

pub mod bounds;
pub mod catalog;
pub mod cut;
pub mod error;
pub mod fault;
pub mod gguf;
pub mod hf;
pub mod identity;
pub mod keep;
pub mod mesh;
pub mod parameters;
pub mod plan;
pub mod proof;
pub mod quant;
pub mod quantisation;
pub mod rope;
#[cfg(test)]
mod samples;
pub mod size;
pub mod spec;
pub mod step;
pub mod storage;

pub use error::SpecError;
pub use mesh::{Mesh, RankId};
pub use spec::ModelSpec;
