//! gpt-oss: sinks, biases, windows in every second layer. What the file leaves unsaid is as its authors have it.

use super::{File, Keys, attention};
use crate::bounds::{EXPERTS_MAX, INTERMEDIATE_MAX};
use crate::catalog::Role;
use crate::error::SpecError;
use crate::rope::Scaling;
use crate::spec::{Activation, Branch, Grouped, Layer, Mixer, Moe, Router, Score, Span};

pub(super) fn layers(keys: &Keys<'_>, file: &File<'_>, layers: usize) -> Result<Vec<Layer>, SpecError> {
    let mut mixer = Grouped { sinks: file.holds(0, Role::Sinks), ..attention(keys, file)? };
    // The published config turns rounding of the ramp's ends off; the file has no key for it.
    if let Some(rope) = &mut mixer.rope
        && let Scaling::Yarn { truncate, .. } = &mut rope.scaling
    {
        *truncate = false;
    }
    if let Some(every) = keys.optional_count("attention.sliding_window_pattern")?.filter(|n| *n != 2) {
        return Err(SpecError::bad("attention.sliding_window_pattern", every, "every second layer has a window"));
    }
    if let Some(func) = keys.optional_count("expert_gating_func")?.filter(|n| !matches!(n, 0 | 3)) {
        return Err(SpecError::bad("expert_gating_func", func, "only 3 (softmax of the chosen) is implemented"));
    }
    keys.optional_count("feed_forward_length")?;
    let branch = Branch::Moe(Moe {
        activation: Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 },
        bias: file.holds(0, Role::ExpertGateBias),
        ..Moe::plain(
            keys.size("expert_count", EXPERTS_MAX)?,
            keys.size("expert_used_count", EXPERTS_MAX)?,
            keys.size("expert_feed_forward_length", INTERMEDIATE_MAX)?,
            // A softmax over the chosen logits is one over all of them, renormalised.
            Router { bias: file.holds(0, Role::RouterBias), ..Router::plain(Score::Softmax, true) },
        )
    });
    let one = |index: usize| {
        let span = if index.is_multiple_of(2) { mixer.span } else { Span::Full };
        file.layer(Mixer::Grouped(Grouped { span, ..mixer.clone() }), branch.clone())
    };
    Ok((0..layers).map(one).collect())
}
