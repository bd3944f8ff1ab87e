//! Rotary position embedding (Su et al., 2021) in every scaling dialect of `rope_scaling` / `rope_parameters`.

/// How one attention rotates its queries and keys.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Rotated channels of a head (all, or the first part where `partial_rotary_factor` says so).
    pub dims: usize,
    /// Base of the wavelengths (`rope_theta`).
    pub theta: f64,
    pub layout: Layout,
    pub scaling: Scaling,
}

/// Which channels form a rotated pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Channel `i` with `i + dims / 2` (GPT-NeoX, Hugging Face Llama).
    Half,
    /// Channel `2i` with `2i + 1` (GPT-J, DeepSeek, GGUF Llama).
    Interleaved,
}

/// How wavelengths are stretched beyond the context a model was first trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum Scaling {
    None,
    /// Positions divided by `factor`.
    Linear {
        factor: f64,
    },
    /// NTK-aware: past `original` positions the base grows with the position itself, so that what is cached stays valid.
    Dynamic {
        factor: f64,
        original: usize,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original: usize,
    },
    /// YaRN (Peng et al., 2023). `amplitude` multiplies cos and sin.
    Yarn {
        factor: f64,
        original: usize,
        beta_fast: f64,
        beta_slow: f64,
        truncate: bool,
        amplitude: f64,
    },
}
