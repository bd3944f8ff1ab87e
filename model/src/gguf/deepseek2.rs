//! DeepSeek V2 and V3, Kimi K2: latent attention in files of either age. Older ones hold the up projection whole and
//! count as many key heads as heads; newer ones hold its halves and count one.

use super::{File, Keys, attention_lengths, rope};
use crate::bounds::{EXPERTS_MAX, HEAD_DIM_MAX, HEADS_MAX, HIDDEN_MAX, INTERMEDIATE_MAX};
use crate::catalog::Role;
use crate::error::SpecError;
use crate::rope::Scaling;
use crate::spec::{Branch, Dense, ExpertGroups, Latent, Layer, Mixer, Moe, Norm, Router, Score};

pub(super) fn layers(keys: &Keys<'_>, file: &File<'_>, blocks: usize) -> Result<Vec<Layer>, SpecError> {
    // Prediction heads are the last blocks.
    let predicting = keys.optional_count("nextn_predict_layers")?.unwrap_or(0);
    let Some(layers) = blocks.checked_sub(predicting).filter(|n| *n > 0) else {
        return Err(SpecError::bad("nextn_predict_layers", predicting, format!("there are {blocks} blocks")));
    };
    let first = keys.optional_count("leading_dense_block_count")?.unwrap_or(0).min(layers);
    let mixer = Mixer::Latent(latent(keys, file)?);
    let dense = match keys.optional_size("feed_forward_length", INTERMEDIATE_MAX)? {
        Some(intermediate) => Some(Branch::Dense(Dense::gated(intermediate))),
        None if first > 0 => return Err(keys.missing("feed_forward_length")),
        None => None,
    };
    let mixture = if first < layers { Some(mixture(keys, file, first)?) } else { None };
    let branch = |index: usize| if index < first { &dense } else { &mixture };
    let one = |index| file.layer(mixer.clone(), branch(index).clone().expect("each kind in use was read"));
    Ok((0..layers).map(one).collect())
}

fn latent(keys: &Keys<'_>, file: &File<'_>) -> Result<Latent, SpecError> {
    let heads = keys.size("attention.head_count", HEADS_MAX)?;
    let kv_rank = keys.size("attention.kv_lora_rank", HIDDEN_MAX)?;
    let rope_dim = keys.size("rope.dimension_count", HEAD_DIM_MAX)?;
    let halves = file.holds(0, Role::Absorb);
    let (key, value) = attention_lengths(keys)?;
    let (key_dim, value_dim) = match (
        keys.optional_size("attention.key_length_mla", HEAD_DIM_MAX)?,
        keys.optional_size("attention.value_length_mla", HEAD_DIM_MAX)?,
    ) {
        (Some(key_dim), Some(value_dim)) => (key_dim, value_dim),
        _ => (
            key.ok_or_else(|| keys.missing("attention.key_length"))?,
            value.ok_or_else(|| keys.missing("attention.value_length"))?,
        ),
    };
    let nope_dim = key_dim.checked_sub(rope_dim).filter(|n| *n > 0).ok_or_else(|| {
        SpecError::bad("rope.dimension_count", rope_dim, format!("a key head has {key_dim} channels"))
    })?;
    let kv_heads = keys.optional_size("attention.head_count_kv", HEADS_MAX)?.unwrap_or(heads);
    if kv_heads != heads && kv_heads != 1 {
        let why = format!("latent attention has one latent, or expands it for each of its {heads} heads");
        return Err(SpecError::bad("attention.head_count_kv", kv_heads, why));
    }
    let mut rope = rope(keys, file, rope_dim)?;
    let mut stretch = 1.0;
    if let Some(logged) = keys.float("rope.scaling.yarn_log_multiplier")?
        && let Scaling::Yarn { factor, amplitude, .. } = &mut rope.scaling
    {
        // The converter writes a tenth of `mscale_all_dim`. It then equals `mscale` in every published model, so that
        // their quotient leaves cosines and sines as they are.
        let all = f64::from(logged as f32 / 0.1f32);
        (*amplitude, stretch) = (1.0, 0.1 * all * libm::log(*factor) + 1.0);
    }
    Ok(Latent {
        heads,
        query_rank: keys.optional_count("attention.q_lora_rank")?.filter(|n| *n > 0),
        kv_rank,
        nope_dim,
        rope_dim,
        value_dim,
        halves,
        latent_norm: Norm::rms(1e-6),
        rope,
        scale: (stretch * stretch / (key_dim as f64).sqrt()) as f32,
        query_scale: None,
    })
}

/// The mixture of the layers from `first` on.
fn mixture(keys: &Keys<'_>, file: &File<'_>, first: usize) -> Result<Branch, SpecError> {
    let intermediate = keys.size("expert_feed_forward_length", INTERMEDIATE_MAX)?;
    // Files older than the key are DeepSeek V2's.
    let score = match keys.optional_count("expert_gating_func")?.unwrap_or(1) {
        0 | 1 => Score::Softmax,
        2 => Score::Sigmoid,
        other => return Err(SpecError::bad("expert_gating_func", other, "known: 1 (softmax), 2 (sigmoid)")),
    };
    let count = keys.optional_size("expert_group_count", EXPERTS_MAX)?.unwrap_or(1);
    let kept = keys.optional_size("expert_group_used_count", EXPERTS_MAX)?.unwrap_or(count);
    let groups = (kept != count).then_some(ExpertGroups { count, kept });
    if groups.is_some() && score == Score::Softmax {
        return Err(SpecError::bad(
            "expert_group_count",
            count,
            "groups of experts scored by softmax are ranked otherwise",
        ));
    }
    let router = Router {
        correction_bias: file.holds(first, Role::RouterCorrection),
        groups,
        renormalise_eps: 1e-20,
        scale: keys.float("expert_weights_scale")?.filter(|s| *s != 0.0).unwrap_or(1.0) as f32,
        ..Router::plain(score, keys.flag("expert_weights_norm", false)?)
    };
    let shared = keys.optional_count("expert_shared_count")?.unwrap_or(0);
    if shared > EXPERTS_MAX {
        return Err(SpecError::bad("expert_shared_count", shared, format!("at most {EXPERTS_MAX}")));
    }
    let shared = (shared > 0).then_some(Dense::gated(shared * intermediate));
    let (experts, active) = (keys.size("expert_count", EXPERTS_MAX)?, keys.size("expert_used_count", EXPERTS_MAX)?);
    Ok(Branch::Moe(Moe { shared, ..Moe::plain(experts, active, intermediate, router) }))
}
