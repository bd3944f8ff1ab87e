//! What every [`ModelSpec`] must satisfy, whoever wrote it. Behind this door no product of its numbers overflows, no
//! buffer sized by them is absurd, and heads, groups and rotated channels fit each other.

use crate::error::SpecError;
use crate::rope::{Rope, Scaling};
use crate::spec::{Branch, Dense, Grouped, Latent, Mixer, ModelSpec, Moe, Norm, Span};

pub const HIDDEN_MAX: usize = 1 << 17;
pub const INTERMEDIATE_MAX: usize = 1 << 20;
pub const VOCAB_MAX: usize = 1 << 24;
pub const LAYERS_MAX: usize = 1 << 10;
pub const HEADS_MAX: usize = 1 << 12;
pub const HEAD_DIM_MAX: usize = 1 << 12;
pub const EXPERTS_MAX: usize = 1 << 12;
pub const POSITIONS_MAX: usize = 1 << 27;
/// Routed experts of all layers: the catalogue declares three tensors for each.
pub const ALL_EXPERTS_MAX: usize = 1 << 18;
/// Ids that end an answer.
pub const END_TOKENS_MAX: usize = 256;
/// Weights of all layers; a hundred times the largest model published. Their bytes stay far below `u64::MAX`.
pub const PARAMETERS_MAX: u128 = 1 << 48;

/// Refuses `value` unless it is in `1..=max`.
pub(crate) fn within(key: &str, value: usize, max: usize) -> Result<usize, SpecError> {
    if value == 0 || value > max {
        return Err(SpecError::bad(key, value, format!("must be from 1 to {max}")));
    }
    Ok(value)
}

/// Checks a whole spec. The adapters end with it; nothing downstream repeats it.
pub fn check(spec: &ModelSpec) -> Result<(), SpecError> {
    within("vocabulary size", spec.vocab, VOCAB_MAX)?;
    within("hidden size", spec.hidden, HIDDEN_MAX)?;
    within("number of layers", spec.layers.len(), LAYERS_MAX)?;
    within("number of layers and predictors", spec.all_layers().count(), LAYERS_MAX)?;
    for predictor in &spec.predictors {
        [predictor.embedding_norm, predictor.hidden_norm, predictor.norm].iter().try_for_each(norm)?;
    }
    within("longest sequence", spec.positions_max, POSITIONS_MAX)?;
    norm(&spec.final_norm)?;
    if spec.end_tokens.len() > END_TOKENS_MAX {
        return Err(SpecError::bad("end tokens", spec.end_tokens.len(), format!("at most {END_TOKENS_MAX}")));
    }
    for token in spec.end_tokens.iter().chain(&spec.begin_token) {
        if *token as usize >= spec.vocab {
            return Err(SpecError::bad("token id", token, format!("the vocabulary has {} tokens", spec.vocab)));
        }
    }
    let mut experts = 0;
    let mut previous = None;
    for layer in spec.all_layers() {
        // Layers repeat; a layer equal to the one before needs no second look.
        if previous != Some(layer) {
            norm(&layer.mixer_norm)?;
            norm(&layer.branch_norm)?;
            match &layer.mixer {
                Mixer::Grouped(g) => grouped(g)?,
                Mixer::Latent(l) => latent(l)?,
            }
            for branch in &layer.branches {
                match branch {
                    Branch::Dense(d) => dense("intermediate size", d)?,
                    Branch::Moe(m) => moe(m)?,
                }
            }
            previous = Some(layer);
        }
        experts += layer.branches.iter().map(|b| if let Branch::Moe(m) = b { m.experts } else { 0 }).sum::<usize>();
    }
    if experts > ALL_EXPERTS_MAX {
        return Err(SpecError::bad("experts of all layers", experts, format!("at most {ALL_EXPERTS_MAX}")));
    }
    let parameters = parameters(spec);
    if parameters > PARAMETERS_MAX {
        return Err(SpecError::bad("number of weights", parameters, format!("at most {PARAMETERS_MAX}")));
    }
    Ok(())
}

fn norm(norm: &Norm) -> Result<(), SpecError> {
    if !(norm.eps > 0.0 && norm.eps < 1.0) {
        return Err(SpecError::bad("norm epsilon", norm.eps, "must lie between 0 and 1"));
    }
    Ok(())
}

fn grouped(g: &Grouped) -> Result<(), SpecError> {
    within("query heads", g.heads, HEADS_MAX)?;
    within("key/value heads", g.kv_heads, HEADS_MAX)?;
    within("head size", g.head_dim, HEAD_DIM_MAX)?;
    if !g.heads.is_multiple_of(g.kv_heads) {
        return Err(SpecError::bad(
            "query heads",
            g.heads,
            format!("not a multiple of {} key/value heads", g.kv_heads),
        ));
    }
    if let Some(qk_norm) = &g.qk_norm {
        norm(&qk_norm.norm())?;
    }
    if let Some(r) = &g.rope {
        rope(r, g.head_dim)?;
    }
    match g.span {
        Span::Full => {}
        Span::Window(n) => drop(within("sliding window", n, POSITIONS_MAX)?),
        Span::Chunk(n) => drop(within("attention chunk", n, POSITIONS_MAX)?),
    }
    scale(g.scale)
}

fn latent(l: &Latent) -> Result<(), SpecError> {
    within("query heads", l.heads, HEADS_MAX)?;
    if let Some(rank) = l.query_rank {
        within("query rank", rank, HIDDEN_MAX)?;
    }
    within("key/value rank", l.kv_rank, HIDDEN_MAX)?;
    within("unrotated head size", l.nope_dim, HEAD_DIM_MAX)?;
    within("rotated head size", l.rope_dim, HEAD_DIM_MAX)?;
    within("value head size", l.value_dim, HEAD_DIM_MAX)?;
    norm(&l.latent_norm)?;
    if l.rope.dims != l.rope_dim {
        return Err(SpecError::bad("rotated channels", l.rope.dims, format!("the rotated part has {}", l.rope_dim)));
    }
    rope(&l.rope, l.rope_dim)?;
    scale(l.scale)
}

fn scale(scale: f32) -> Result<(), SpecError> {
    if !(scale.is_finite() && scale > 0.0) {
        return Err(SpecError::bad("attention scale", scale, "must be positive and finite"));
    }
    Ok(())
}

fn rope(rope: &Rope, head_dim: usize) -> Result<(), SpecError> {
    let bad = |what: &str, value: f64, why: &str| Err(SpecError::bad(what, value, why));
    if rope.dims == 0 || !rope.dims.is_multiple_of(2) || rope.dims > head_dim {
        return Err(SpecError::bad(
            "rotated channels",
            rope.dims,
            format!("must be even and fit a head of {head_dim}"),
        ));
    }
    if !(rope.theta.is_finite() && rope.theta > 1.0) {
        return bad("rope theta", rope.theta, "must be finite and above 1");
    }
    let factor_of = |factor: f64| {
        if (1.0..=1e6).contains(&factor) { Ok(()) } else { bad("rope factor", factor, "must be from 1 to 1e6") }
    };
    let original_of = |original: usize| within("rope's original length", original, POSITIONS_MAX).map(|_| ());
    match &rope.scaling {
        Scaling::None => Ok(()),
        Scaling::Linear { factor } => factor_of(*factor),
        Scaling::Dynamic { factor, original } => {
            if rope.dims < 4 {
                return bad("rotated channels", rope.dims as f64, "dynamic scaling needs at least 4");
            }
            factor_of(*factor).and(original_of(*original))
        }
        Scaling::Llama3 { factor, low, high, original } => {
            if !(low.is_finite() && high.is_finite() && *low > 0.0 && high >= low) {
                return bad("high_freq_factor", *high, "must be at least low_freq_factor, which must be positive");
            }
            factor_of(*factor).and(original_of(*original))
        }
        Scaling::Yarn { factor, original, beta_fast, beta_slow, amplitude, .. } => {
            if !(beta_slow.is_finite() && beta_fast.is_finite() && *beta_slow > 0.0 && beta_fast >= beta_slow) {
                return bad("beta_fast", *beta_fast, "must be at least beta_slow, which must be positive");
            }
            if !(amplitude.is_finite() && *amplitude > 0.0 && *amplitude < 1e6) {
                return bad("rope amplitude", *amplitude, "must be positive and below 1e6");
            }
            factor_of(*factor).and(original_of(*original))
        }
        Scaling::Factors { by } => {
            if by.len() != rope.dims / 2 {
                return bad("rope factors", by.len() as f64, "must be one for each rotated pair");
            }
            match by.iter().find(|f| !(f.is_finite() && **f > 0.0)) {
                Some(f) => bad("rope factor", f64::from(*f), "must be positive and finite"),
                None => Ok(()),
            }
        }
    }
}

fn dense(what: &str, d: &Dense) -> Result<(), SpecError> {
    within(what, d.intermediate, INTERMEDIATE_MAX).map(|_| ())
}

fn moe(m: &Moe) -> Result<(), SpecError> {
    within("experts", m.experts, EXPERTS_MAX)?;
    within("experts a token", m.active, m.experts)?;
    within("expert intermediate size", m.intermediate, INTERMEDIATE_MAX)?;
    if let Some(shared) = &m.shared {
        dense("shared expert intermediate size", shared)?;
    }
    if !(m.router.scale.is_finite() && m.router.scale > 0.0) {
        return Err(SpecError::bad("router scale", m.router.scale, "must be positive and finite"));
    }
    if let Some(groups) = m.router.groups {
        within("expert groups", groups.count, m.experts)?;
        within("expert groups kept", groups.kept, groups.count)?;
        let size = m.experts / groups.count;
        if !m.experts.is_multiple_of(groups.count) || size < 2 {
            let why = format!("must divide {} experts into groups of at least two", m.experts);
            return Err(SpecError::bad("expert groups", groups.count, why));
        }
        if size * groups.kept < m.active {
            let why = format!("{} kept groups of {size} experts are fewer", groups.kept);
            return Err(SpecError::bad("experts a token", m.active, why));
        }
    }
    Ok(())
}

/// Weights of all matrices, with room for products of every bound above.
fn parameters(spec: &ModelSpec) -> u128 {
    let hidden = spec.hidden as u128;
    let dense = |d: &Dense| 3 * hidden * d.intermediate as u128;
    let layer = |l: &crate::spec::Layer| {
        let mixer = match &l.mixer {
            Mixer::Grouped(g) => 2 * hidden * ((g.heads + g.kv_heads) * g.head_dim) as u128,
            Mixer::Latent(a) => {
                let query = (a.heads * (a.nope_dim + a.rope_dim)) as u128;
                let rank = a.query_rank.map_or(hidden, |r| r as u128);
                let down = hidden * (a.kv_rank + a.rope_dim + a.query_rank.unwrap_or(0)) as u128;
                let up = (a.heads * (a.nope_dim + a.value_dim)) as u128 * a.kv_rank as u128;
                down + up + query * rank + hidden * (a.heads * a.value_dim) as u128
            }
        };
        let branches = l.branches.iter().map(|b| match b {
            Branch::Dense(d) => dense(d),
            Branch::Moe(m) => {
                3 * hidden * m.intermediate as u128 * m.experts as u128 + m.shared.as_ref().map_or(0, dense)
            }
        });
        mixer + branches.sum::<u128>()
    };
    spec.layers.iter().map(layer).sum::<u128>() + 2 * hidden * spec.vocab as u128
}
