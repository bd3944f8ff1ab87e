//! DeepSeek-V3 and R1, Kimi K2, Mistral Small 4: latent attention, the first layers dense, then mixtures with a shared expert.

use super::{Body, Common, Keys, dense, layer, rope};
use crate::bounds::{EXPERTS_MAX, HEAD_DIM_MAX, HEADS_MAX, HIDDEN_MAX, INTERMEDIATE_MAX, LAYERS_MAX};
use crate::error::SpecError;
use crate::rope::Layout;
use crate::spec::{Branch, Dense, ExpertGroups, Latent, Mixer, Moe, Norm, Predictor, Router, Score};

/// What the classes of these families assume where a config is silent.
pub(super) struct Defaults {
    pub first_dense: usize,
    /// `n_group` and `topk_group`.
    pub groups: (usize, usize),
    pub active: usize,
    pub scale: f64,
}

pub(super) fn body(keys: &Keys<'_>, common: &Common) -> Result<Body, SpecError> {
    let defaults = Defaults { first_dense: 3, groups: (8, 4), active: 8, scale: 2.5 };
    mixtures(keys, common, &Mixer::Latent(latent(keys, common)?), &defaults)
}

/// Mistral Small 4: latent attention whose queries grow with position, experts scored by a softmax.
pub(super) fn mistral4(keys: &Keys<'_>, common: &Common) -> Result<Body, SpecError> {
    let defaults = Defaults { first_dense: 0, groups: (1, 1), active: 4, scale: 1.0 };
    let query_scale = rope::query_scale(keys)?;
    let mixer = Mixer::Latent(Latent { query_scale, ..latent(keys, common)? });
    let mut body = mixtures(keys, common, &mixer, &defaults)?;
    for branch in body.layers.iter_mut().flat_map(|layer| &mut layer.branches) {
        if let Branch::Moe(moe) = branch {
            moe.router.score = Score::Softmax;
            moe.router.correction_bias = false;
        }
    }
    // Nothing published says what theirs would be.
    body.predictors.clear();
    Ok(body)
}

/// `mixer` in every layer; the first layers' branches dense, then mixtures.
pub(super) fn mixtures(
    keys: &Keys<'_>,
    common: &Common,
    mixer: &Mixer,
    defaults: &Defaults,
) -> Result<Body, SpecError> {
    let (dense, mixture) = (dense(keys, false)?, mixture(keys, defaults)?);
    let first = keys.optional_count("first_k_dense_replace")?.unwrap_or(defaults.first_dense);
    let every = keys.optional_size("moe_layer_freq", LAYERS_MAX)?.unwrap_or(1);
    let predictors = keys.optional_count("num_nextn_predict_layers")?.unwrap_or(0);
    if predictors > LAYERS_MAX {
        return Err(SpecError::bad("num_nextn_predict_layers", predictors, format!("at most {LAYERS_MAX}")));
    }
    keys.optional_count("num_mtp_layers")?;
    let branch = |index: usize| {
        let sparse = index >= first && index.is_multiple_of(every);
        if sparse { mixture.clone() } else { dense.clone() }
    };
    let layer = |index: usize| layer(common, mixer.clone(), branch(index));
    // They follow the last layer in the file, and are what it would be followed by.
    let predictor = |index: usize| Predictor {
        embedding_norm: common.norm,
        hidden_norm: common.norm,
        layer: layer(common.layers + index),
        norm: common.norm,
    };
    let layers = (0..common.layers).map(layer).collect();
    Ok(Body { layers, predictors: (0..predictors).map(predictor).collect(), ..Body::default() })
}

fn latent(keys: &Keys<'_>, common: &Common) -> Result<Latent, SpecError> {
    keys.only("attention_bias", false, "latent projections have no bias")?;
    let heads = keys.size("num_attention_heads", HEADS_MAX)?;
    let kv_heads = keys.optional_size("num_key_value_heads", HEADS_MAX)?.unwrap_or(heads);
    if kv_heads != heads {
        let why = format!("latent attention expands the latent for each of its {heads} heads");
        return Err(SpecError::bad("num_key_value_heads", kv_heads, why));
    }
    let nope_dim = keys.size("qk_nope_head_dim", HEAD_DIM_MAX)?;
    let rope_dim = keys.size("qk_rope_head_dim", HEAD_DIM_MAX)?;
    // Derived sizes that newer files repeat; `head_dim` is the rotated part to some and the whole to others.
    let whole = nope_dim + rope_dim;
    for (key, derived) in [("head_dim", [rope_dim, whole]), ("qk_head_dim", [whole, whole])] {
        if let Some(stated) = keys.optional_size(key, 2 * HEAD_DIM_MAX)?
            && !derived.contains(&stated)
        {
            return Err(SpecError::bad(key, stated, format!("the parts of a head make {whole}")));
        }
    }
    let layout = if keys.flag("rope_interleave", true)? { Layout::Interleaved } else { Layout::Half };
    let stretch = rope::attention_stretch(keys, common)?;
    Ok(Latent {
        heads,
        query_rank: keys.optional_size("q_lora_rank", HIDDEN_MAX)?,
        kv_rank: keys.size("kv_lora_rank", HIDDEN_MAX)?,
        nope_dim,
        rope_dim,
        value_dim: keys.size("v_head_dim", HEAD_DIM_MAX)?,
        halves: false,
        latent_norm: Norm::rms(1e-6),
        rope: rope::read(keys, common, rope_dim, 1e4, layout)?,
        scale: (stretch * stretch / ((nope_dim + rope_dim) as f64).sqrt()) as f32,
        query_scale: None,
    })
}

fn mixture(keys: &Keys<'_>, defaults: &Defaults) -> Result<Branch, SpecError> {
    // dots.llm1 writes the method of choice here, which scores by a sigmoid too.
    if let Some(other) = keys.text("scoring_func")?.filter(|of| !matches!(*of, "sigmoid" | "noaux_tc")) {
        return Err(SpecError::bad("scoring_func", other, "experts are scored by a sigmoid"));
    }
    keys.only("topk_method", "noaux_tc", "experts are chosen by corrected scores within the best groups")?;
    let experts = keys.size("n_routed_experts", EXPERTS_MAX)?;
    if let Some(stated) = keys.optional_size("num_local_experts", EXPERTS_MAX)?
        && stated != experts
    {
        return Err(SpecError::bad("num_local_experts", stated, format!("n_routed_experts says {experts}")));
    }
    let count = keys.optional_size("n_group", EXPERTS_MAX)?.unwrap_or(defaults.groups.0);
    let kept = keys.optional_size("topk_group", EXPERTS_MAX)?.unwrap_or(defaults.groups.1);
    let intermediate = keys.size("moe_intermediate_size", INTERMEDIATE_MAX)?;
    let shared = keys.optional_count("n_shared_experts")?.unwrap_or(1);
    if shared > EXPERTS_MAX {
        return Err(SpecError::bad("n_shared_experts", shared, format!("at most {EXPERTS_MAX}")));
    }
    let active = keys.optional_size("num_experts_per_tok", EXPERTS_MAX)?.unwrap_or(defaults.active);
    let router = Router {
        correction_bias: true,
        // Keeping every group restricts nothing.
        groups: (kept != count).then_some(ExpertGroups { count, kept }),
        renormalise_eps: 1e-20,
        scale: keys.optional_float("routed_scaling_factor")?.unwrap_or(defaults.scale) as f32,
        ..Router::plain(Score::Sigmoid, keys.flag("norm_topk_prob", true)?)
    };
    let shared = (shared > 0).then_some(Dense::gated(shared * intermediate));
    Ok(Branch::Moe(Moe { shared, ..Moe::plain(experts, active, intermediate, router) }))
}
