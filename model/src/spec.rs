//! A model as data. One decoder loop (`worker::engine`) runs every [`ModelSpec`]; an architecture is an adapter
//! function that fills one in ([`crate::hf`], [`crate::gguf`]). A new variant is added only where two published
//! models really differ.
//!
//! ```text
//! ids -> embedding -> [ x += mixer(norm(x)) ; x += sum of branches(norm(x)) ] per layer -> final norm -> head -> logits
//! ```

use crate::error::SpecError;
use crate::quantisation::Quantisation;
use crate::rope::Rope;

/// Everything the engine, the planner and the loader need to know about one model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// The checkpoint's name for the family, e.g. `qwen3_moe` (`model_type`, or GGUF's `general.architecture`).
    pub architecture: String,
    /// How the checkpoint names its tensors.
    pub naming: Naming,
    /// The model around it whose language part this is (`model_type`), where there is one: pictures and sound are left
    /// out.
    pub part_of: Option<String>,
    /// What the checkpoint's config says of its weights' storage, where they are not plain numbers.
    pub quantisation: Option<Quantisation>,
    /// Tokens the head can answer with.
    pub vocab: usize,
    /// Rows of the embedding table: `vocab`, and those of tokens that are only ever read (Llama 3.2 Vision's image token).
    pub embedding_rows: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Norm of the embeddings themselves (BLOOM).
    pub embedding_norm: Option<Norm>,
    pub layers: Vec<Layer>,
    /// Numbers, in the file's count, of layers that text alone passes by (Llama 3.2 Vision's cross-attention).
    pub passed_by: Vec<usize>,
    pub final_norm: Norm,
    pub head: Head,
    /// What the checkpoint may hold to foresee tokens further on, the first one first. Those in a spec are loaded and
    /// counted: [`ModelSpec::predicting`] keeps as many as are asked for.
    pub predictors: Vec<Predictor>,
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
    HuggingFace(Dialect),
    /// `blk.0.attn_q.weight`, experts stacked.
    Gguf,
}

/// Habits in which checkpoints of one family differ; [`crate::catalog::settle`] finds them by the names in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dialect {
    /// Before embedding, layers and final norm: `model.`, `language_model.model.`, or nothing (older BLOOM files).
    pub root: &'static str,
    /// Between root and layer number: `layers`, `h`, `blocks`.
    pub layers: &'static str,
    /// Name of the head's tensor.
    pub head: &'static str,
    /// All experts of a layer lie in one tensor.
    pub stacked: bool,
    /// Experts' matrices lie as `[inputs, outputs]`.
    pub transposed: bool,
}

/// A norm over the channels of a row; its weight is a declared tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    pub eps: f32,
    pub form: NormForm,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormForm {
    /// `x / rms(x) * weight`.
    Rms,
    /// `(x - mean(x)) / deviation(x) * weight + bias` (BLOOM).
    Layer,
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
    pub residual: Residual,
    pub mixer_norm: Norm,
    pub mixer: Mixer,
    pub branch_norm: Norm,
    /// Run side by side on the same normalised input; their sums are added in order.
    pub branches: Vec<Branch>,
}

/// A layer past the last that foresees one token more (multi-token prediction; DeepSeek-V3, section 2.2). From the normed
/// row that foretells the token at `p`, and that token's embedding, it makes the row that foretells the one at `p + 1`:
///
/// ```text
/// x = projection [embedding_norm(embedding), hidden_norm(row)] ; the layer ; norm -> the model's own head
/// ```
/// Its row has the position of the row that it goes on from, in its cache and for its rotation. (The reference rotates one
/// further throughout, which is the same: only distances count.)
#[derive(Debug, Clone, PartialEq)]
pub struct Predictor {
    /// `enorm`.
    pub embedding_norm: Norm,
    /// `hnorm`.
    pub hidden_norm: Norm,
    pub layer: Layer,
    /// `shared_head.norm`: of what the head and the next predictor go on from.
    pub norm: Norm,
}

/// What the mixer's and the branches' results are added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residual {
    /// Their input before its norm.
    Stream,
    /// Their normed input (BLOOM's `apply_residual_connection_post_layernorm`).
    Normed,
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
    pub qk_norm: Option<QkNorm>,
    pub rope: Option<Rope>,
    /// A bias on scores that falls with distance, by each head's slope (Press et al., 2021; BLOOM).
    pub alibi: bool,
    /// A learned logit a head that takes part in the softmax and stands for no position (gpt-oss).
    pub sinks: bool,
    pub span: Span,
    /// Multiplies query-key products; usually `head_dim^-0.5`.
    pub scale: f32,
    pub query_scale: Option<QueryScale>,
}

/// How queries and keys are normed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum QkNorm {
    /// Each head by itself, with one weight for all, before the rotation (Qwen3).
    Heads(Norm),
    /// All query heads as one vector and all key heads as one, before the rotation (MiniMax-M2). The sum of squares goes
    /// over every tensor rank.
    Whole(Norm),
    /// Each head by itself, without a weight, after the rotation (Llama 4).
    Rotated(Norm),
}

/// Multiplies a query at position `p` with `1 + beta * ln(1 + floor((p + offset) / period))` (Llama 4, Ministral 3).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueryScale {
    pub beta: f32,
    pub period: usize,
    pub offset: usize,
}

/// Which earlier positions a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span {
    Full,
    /// The last `n` positions, the query's own included (`sliding_window`).
    Window(usize),
    /// Those of the query's own chunk: positions are cut into chunks of `n` (Llama 4's `attention_chunk_size`).
    Chunk(usize),
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
    /// The up projection is stored as its two halves, ready to absorb (GGUF).
    pub halves: bool,
    /// Norms of both latents; the reference fixes their epsilon at 1e-6 whatever `rms_norm_eps` says.
    pub latent_norm: Norm,
    pub rope: Rope,
    /// Multiplies query-key products, yarn's `mscale^2` included.
    pub scale: f32,
    pub query_scale: Option<QueryScale>,
}

/// What transforms each position by itself.
#[derive(Debug, Clone, PartialEq)]
pub enum Branch {
    Dense(Dense),
    Moe(Moe),
}

/// `down(act(gate(x)) * up(x))`, or without a gate `down(act(up(x)))`.
#[derive(Debug, Clone, PartialEq)]
pub struct Dense {
    pub intermediate: usize,
    pub activation: Activation,
    pub gated: bool,
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
    /// Biases on every expert's gate, up and down.
    pub bias: bool,
    pub router: Router,
    pub weigh: Weigh,
    /// An expert that every token visits, added unscaled (`n_shared_experts * moe_intermediate_size` channels).
    pub shared: Option<Dense>,
}

/// What routing weights multiply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weigh {
    /// An expert's output.
    Output,
    /// Its input; outputs are added as they are (Llama 4).
    Input,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `min(gate, limit) * sigmoid(alpha * gate) * (clamp(up, -limit, limit) + 1)` (gpt-oss).
    ClampedSwiglu { alpha: f32, limit: f32 },
}

/// How a token chooses and weighs its experts.
#[derive(Debug, Clone, PartialEq)]
pub struct Router {
    pub score: Score,
    /// A bias on the logits.
    pub bias: bool,
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

impl Norm {
    pub const fn rms(eps: f32) -> Norm {
        Norm { eps, form: NormForm::Rms }
    }

    pub const fn layer(eps: f32) -> Norm {
        Norm { eps, form: NormForm::Layer }
    }
}

impl Grouped {
    /// Heads with nothing special about them.
    pub fn plain(heads: usize, kv_heads: usize, head_dim: usize) -> Grouped {
        Grouped {
            heads,
            kv_heads,
            head_dim,
            qkv_bias: false,
            out_bias: false,
            qk_norm: None,
            rope: None,
            alibi: false,
            sinks: false,
            span: Span::Full,
            scale: (1.0 / (head_dim as f64).sqrt()) as f32,
            query_scale: None,
        }
    }
}

impl Dense {
    /// Gated by silu, without biases.
    pub const fn gated(intermediate: usize) -> Dense {
        Dense { intermediate, activation: Activation::Silu, gated: true, bias: false }
    }
}

impl Router {
    /// Scores without bias, correction or groups; renormalised or not.
    pub const fn plain(score: Score, renormalise: bool) -> Router {
        Router {
            score,
            bias: false,
            correction_bias: false,
            groups: None,
            renormalise,
            renormalise_eps: 0.0,
            scale: 1.0,
        }
    }
}

impl Moe {
    /// Experts gated by silu, without biases, whose outputs are weighed.
    pub const fn plain(experts: usize, active: usize, intermediate: usize, router: Router) -> Moe {
        Moe {
            experts,
            active,
            intermediate,
            activation: Activation::Silu,
            bias: false,
            router,
            weigh: Weigh::Output,
            shared: None,
        }
    }
}

impl QkNorm {
    pub const fn norm(&self) -> Norm {
        match self {
            QkNorm::Heads(norm) | QkNorm::Whole(norm) | QkNorm::Rotated(norm) => *norm,
        }
    }
}

impl ModelSpec {
    /// The same with the first `number` predictors alone.
    pub fn predicting(&self, number: usize) -> Result<ModelSpec, SpecError> {
        let Some(predictors) = self.predictors.get(..number) else {
            let why = format!("the model has {}", self.predictors.len());
            return Err(SpecError::bad("number of predictors", number, why));
        };
        Ok(ModelSpec { predictors: predictors.to_vec(), ..self.clone() })
    }

    /// Whether `draft` reads and foretells the same tokens, as far as their numbers tell.
    pub fn drafted_by(&self, draft: &ModelSpec) -> Result<(), SpecError> {
        let refused = |what, draft, model| Err(SpecError::Vocabulary { what, draft, model });
        if draft.vocab != self.vocab {
            return refused("foretells", draft.vocab, self.vocab);
        }
        if draft.embedding_rows < self.embedding_rows {
            return refused("reads", draft.embedding_rows, self.embedding_rows);
        }
        Ok(())
    }

    /// The layers, and then those of the predictors, whose numbers follow.
    pub fn all_layers(&self) -> impl Iterator<Item = &Layer> {
        self.layers.iter().chain(self.predictors.iter().map(|p| &p.layer))
    }

    /// One of [`ModelSpec::all_layers`].
    pub fn layer(&self, index: usize) -> &Layer {
        self.layers.get(index).unwrap_or_else(|| &self.predictors[index - self.layers.len()].layer)
    }

    /// The mixtures of experts, in layer order.
    pub fn mixtures(&self) -> impl Iterator<Item = &Moe> {
        self.all_layers().flat_map(|l| &l.branches).filter_map(|b| match b {
            Branch::Moe(m) => Some(m),
            Branch::Dense(_) => None,
        })
    }
}
