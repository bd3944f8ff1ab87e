//! Mixtral 8x7B and 8x22B: Mistral's attention, every branch a mixture with softmax scores and renormalised weights.

use super::{Common, Keys, layer, mistral};
use crate::bounds::{EXPERTS_MAX, INTERMEDIATE_MAX};
use crate::error::SpecError;
use crate::spec::{Activation, Branch, Layer, Moe, Router, Score};

pub(super) fn layers(keys: &Keys<'_>, common: &Common) -> Result<Vec<Layer>, SpecError> {
    let mixer = mistral::attention(keys, common, None, 1e6)?;
    let branch = Branch::Moe(Moe {
        experts: keys.size("num_local_experts", EXPERTS_MAX)?,
        active: keys.size("num_experts_per_tok", EXPERTS_MAX)?,
        intermediate: keys.size("intermediate_size", INTERMEDIATE_MAX)?,
        activation: Activation::Silu,
        router: Router {
            score: Score::Softmax,
            correction_bias: false,
            groups: None,
            renormalise: true,
            renormalise_eps: 0.0,
            scale: 1.0,
        },
        shared: None,
    });
    Ok(vec![layer(common, mixer, branch); common.layers])
}
