//! From files to a rank's weights.
//!
//! * [`checkpoint`]: one [`checkpoint::Checkpoint`] over a Hugging Face directory or a GGUF file, mapped, never copied.
//! * [`safetensors`], [`gguf`]: the two containers' headers; every number in them is checked before it is believed.
//! * [`widen`]: stored values as f32; [`codes`]: quantised ones as codes and the scales of their groups, which lie in
//!   [`blocks`] (GGUF) or [`beside`] each other in tensors of their own (Hugging Face).
//! * [`find`]: where a declared matrix lies, and whether it is all there.
//! * [`needs`]: which stored bytes a window takes, as [`strip`]s of its files.
//! * [`ahead`]: windows asked for before they are needed.
//! * [`remote`]: files that another worker lends, [`image`]: what is in memory of them, [`fetch`]: their windows brought in
//!   time.
//! * [`manifest`]: files compared with a list of their digests.
//! * [`loader`]: what a rank reads: the windows of the declared tensors that its place in the mesh holds.
//! * [`proof`]: digests of what was read, by canonical segment.
//! * [`shelf`]: what was packed of them, for the next epoch.

pub mod ahead;
pub mod beside;
pub mod blocks;
pub mod checkpoint;
pub mod codes;
pub mod fetch;
pub mod find;
pub mod gguf;
pub mod image;
pub mod loader;
pub mod manifest;
pub mod needs;
pub mod proof;
pub mod remote;
pub mod safetensors;
pub mod shelf;
pub mod strip;
pub mod widen;

use crate::backend::MatrixView;
use model::fault::{Fault, FaultKind};
use model::quant::Format;
use std::ops::Range;

/// One tensor as a container's header describes it, checked against the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    pub name: String,
    pub encoding: Encoding,
    /// Slowest dimension first, whatever the container's habit.
    pub shape: Vec<usize>,
    /// Where its bytes are in the file.
    pub range: Range<usize>,
}

/// How a tensor's bytes are to be read.
#[derive(Debug, Clone, PartialEq)]
pub enum Encoding {
    Known(Format),
    /// By the container's name for it. An error only where the model needs the tensor.
    Unknown(String),
}

fn bad(text: impl Into<String>) -> Fault {
    Fault::new(FaultKind::BadCheckpoint, text)
}

/// Values in a shape, where that many can be counted.
fn count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}

/// The bytes that `shape` takes in `format`, or why there are none.
fn bytes_of(name: &str, format: Format, shape: &[usize]) -> Result<usize, Fault> {
    let values = count(shape).ok_or_else(|| bad(format!("tensor {name}: shape {shape:?} has too many values")))?;
    let row = shape.last().copied().unwrap_or(1);
    if !row.is_multiple_of(format.block()) {
        let block = format.block();
        return Err(bad(format!("tensor {name}: rows of {row} values are not whole blocks of {block} ({format:?})")));
    }
    (values / format.block())
        .checked_mul(format.block_bytes())
        .ok_or_else(|| bad(format!("tensor {name}: shape {shape:?} has too many bytes")))
}

/// All values of a window, row-major.
fn values(view: &MatrixView<'_>) -> Vec<f32> {
    let mut values = vec![0.0; view.rows * view.cols];
    if view.cols > 0 {
        for (row, out) in values.chunks_exact_mut(view.cols).enumerate() {
            widen::widen(view, row, out);
        }
    }
    values
}
