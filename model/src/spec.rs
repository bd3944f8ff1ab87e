//! A model as data. One decoder loop (`worker::engine`) runs every [`ModelSpec`]; an architecture is an adapter
//! function that fills one in ([`crate::hf`], [`crate::gguf`]). A new variant is added only where two published
//! models really differ.
//!
//! ```text
//! ids -> embedding -> [ x += mixer(norm(x)) ; x += sum of branches(norm(x)) ] per layer -> final norm -> head -> logits
//! ```

use crate::rope::Rope;

/// Everything the engine, the planner and the loader need to know about one model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// The checkpoint's name for the family, e.g. `qwen3_moe` (`model_type`, or GGUF's `general.architecture`).
    pub architecture: String,
    /// How the checkpoint names its tensors.
    pub naming: Naming,
    /// Rows of the embedding table.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    pub layers: Vec<Layer>,
    pub final_norm: Norm,
    pub head: Head,
    /// Longest sequence the model was made for, in tokens (`max_position_embeddings`).
    pub positions_max: usize,
    /// Ids of tokens that end an answer (`eos_token_id`, of config and generation config).
    pub end_tokens: Vec<u32>,
    /// Id put before a text prompt where the tokenizer asks for one.
    pub begin_token: Option<u32>,
}

/// The dialect of tensor names in a checkpoint; [`crate::catalog`] alone knows the names themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// `model.layers.0.self_attn.q_proj.weight`.
    HuggingFace,
    /// `blk.0.attn_q.weight`, experts stacked.
    Gguf,
}

/// A root-mean-square norm; its weight is a declared tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    pub eps: f32,
}

/// The output projection from hidden to vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// Shares the embedding table (`tie_word_embeddings`).
    pub tied: bool,
}

/// One decoder layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    pub mixer_norm: Norm,
    pub mixer: Mixer,
    pub branch_norm: Norm,
    /// Run side by side on the same normalised input; their sums are added in order.
    pub branches: Vec<Branch>,
}

/// What mixes information between positions.
#[derive(Debug, Clone, PartialEq)]
pub enum Mixer {
    Grouped(Grouped),
    Latent(Latent),
}

/// Multi-head attention with shared key/value heads (MHA, GQA, MQA).
#[derive(Debug, Clone, PartialEq)]
pub struct Grouped {
    pub heads: usize,
    pub kv_heads: usize,
    /// Channels of one query, key and value head.
    pub head_dim: usize,
    /// Biases on query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub out_bias: bool,
    /// RMS norm of each query and key head before the rotation (Qwen3), with this epsilon.
    pub qk_norm: Option<Norm>,
    pub rope: Option<Rope>,
    pub span: Span,
    /// Multiplies query-key products; usually `head_dim^-0.5`.
    pub scale: f32,
}

/// Which earlier positions a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span {
    Full,
    /// The last `n` positions, the query's own included (`sliding_window`).
    Window(usize),
}

/// Multi-head latent attention (DeepSeek-V2, section 2.1), run in its absorbed form: keys and values are one latent
/// vector of `kv_rank` and one rotated key of `rope_dim`, shared by all heads.
#[derive(Debug, Clone, PartialEq)]
pub struct Latent {
    pub heads: usize,
    /// Rank of the query's down projection (`q_lora_rank`); `None` projects directly.
    pub query_rank: Option<usize>,
    /// Width of the cached latent (`kv_lora_rank`).
    pub kv_rank: usize,
    /// Channels of a query head that meet the latent (`qk_nope_head_dim`).
    pub nope_dim: usize,
    /// Channels of a query head that are rotated (`qk_rope_head_dim`).
    pub rope_dim: usize,
    /// Channels of one value head (`v_head_dim`).
    pub value_dim: usize,
    /// Norms of both latents; the reference fixes their epsilon at 1e-6 whatever `rms_norm_eps` says.
    pub latent_norm: Norm,
    pub rope: Rope,
    /// Multiplies query-key products, yarn's `mscale^2` included.
    pub scale: f32,
}

/// What transforms each position by itself.
#[derive(Debug, Clone, PartialEq)]
pub enum Branch {
    Dense(Dense),
    Moe(Moe),
}

/// `down(act(gate(x)) * up(x))`.
#[derive(Debug, Clone, PartialEq)]
pub struct Dense {
    pub intermediate: usize,
    pub activation: Activation,
    /// Biases on gate, up and down (`mlp_bias`).
    pub bias: bool,
}

/// A mixture of experts.
#[derive(Debug, Clone, PartialEq)]
pub struct Moe {
    pub experts: usize,
    /// Experts chosen for a token (`num_experts_per_tok`).
    pub active: usize,
    /// Intermediate channels of one expert.
    pub intermediate: usize,
    pub activation: Activation,
    pub router: Router,
    /// An expert that every token visits, added unscaled (`n_shared_experts * moe_intermediate_size` channels).
    pub shared: Option<Dense>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
}

/// How a token chooses and weighs its experts.
#[derive(Debug, Clone, PartialEq)]
pub struct Router {
    pub score: Score,
    /// Adds `e_score_correction_bias` to the scores for the choice, never for the weights (DeepSeek-V3, section 2.1.2).
    pub correction_bias: bool,
    /// Restricts the choice to the best groups of experts.
    pub groups: Option<ExpertGroups>,
    /// Divides the chosen weights by their sum (`norm_topk_prob`).
    pub renormalise: bool,
    /// Added to that sum before dividing (1e-20 for DeepSeek, 0 elsewhere).
    pub renormalise_eps: f32,
    /// Multiplies the weights last (`routed_scaling_factor`).
    pub scale: f32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each logit.
    Sigmoid,
}

/// Group-limited routing: a group's rank is the sum of its two best (biased) scores; experts of other groups are out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertGroups {
    /// `n_group`.
    pub count: usize,
    /// `topk_group`.
    pub kept: usize,
}

/// What one layer keeps for earlier positions; a sequence has one block table per kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CacheKind {
    /// Keys and values of `kv_heads` heads of `head_dim` channels.
    Paged { kv_heads: usize, head_dim: usize },
    /// One latent vector and one rotated key a position.
    Latent { kv_rank: usize, rope_dim: usize },
}

impl Mixer {
    /// The cache this mixer writes, uncut.
    pub fn cache(&self) -> CacheKind {
        match self {
            Mixer::Grouped(g) => CacheKind::Paged { kv_heads: g.kv_heads, head_dim: g.head_dim },
            Mixer::Latent(l) => CacheKind::Latent { kv_rank: l.kv_rank, rope_dim: l.rope_dim },
        }
    }

    /// Query heads, the unit by which attention is cut.
    pub fn heads(&self) -> usize {
        match self {
            Mixer::Grouped(g) => g.heads,
            Mixer::Latent(l) => l.heads,
        }
    }

    pub fn rope(&self) -> Option<&Rope> {
        match self {
            Mixer::Grouped(g) => g.rope.as_ref(),
            Mixer::Latent(l) => Some(&l.rope),
        }
    }
}

impl ModelSpec {
    /// The mixtures of experts, in layer order.
    pub fn mixtures(&self) -> impl Iterator<Item = &Moe> {
        self.layers.iter().flat_map(|l| &l.branches).filter_map(|b| match b {
            Branch::Moe(m) => Some(m),
            Branch::Dense(_) => None,
        })
    }
}
