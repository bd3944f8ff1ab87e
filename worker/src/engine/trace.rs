//! What a forward pass computed on its way, for goldens and for `verify`: off unless asked for.

use crate::backend::Routing;
use model::step::SeqId;

/// Filled by the engine while it is on. All tensor ranks of a lane turn it on together: it makes them gather the
/// logits of every row, and predictors run.
#[derive(Debug, Default)]
pub struct Trace {
    /// Layer and choices of each mixture, in the order of execution.
    pub routings: Vec<(usize, Routing)>,
    /// Sequence, position and whole logits of every row.
    pub logits: Vec<(SeqId, usize, Vec<f32>)>,
    /// By predictor: sequence, position of the row gone on from, and whole logits of the token two further on (three
    /// for the second predictor).
    pub predicted: Vec<Vec<(SeqId, usize, Vec<f32>)>>,
}
