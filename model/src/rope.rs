//! Rotary position embedding (Su et al., 2021) in every scaling dialect of `rope_scaling` / `rope_parameters`.
//!
//! Frequencies are computed in f64 by the pure-Rust `libm`, so that the bits do not depend on the platform's. An angle
//! is the f32 product of position and f32 frequency, as the models were trained with it; its cosine and sine are then
//! exact to the last f32 bit but for rare ties.

use std::f64::consts::TAU;

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
    /// Each frequency divided by its own number: what a GGUF file keeps of Llama 3's scaling (`rope_freqs.weight`).
    Factors {
        by: Vec<f32>,
    },
}

/// Cosines and sines by position: row `p` holds those of the `pairs` rotated pairs.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    pub pairs: usize,
    /// `[positions, pairs]`.
    pub cos: Vec<f32>,
    /// `[positions, pairs]`.
    pub sin: Vec<f32>,
}

impl Rope {
    /// Radians a position advances each of the `dims / 2` pairs. With [`Scaling::Dynamic`] these hold up to its
    /// `original` position; [`Rope::angles`] goes on from there.
    pub fn frequencies(&self) -> Vec<f32> {
        self.frequencies_at(0)
    }

    /// What multiplies cos and sin.
    pub fn amplitude(&self) -> f64 {
        if let Scaling::Yarn { amplitude, .. } = self.scaling { amplitude } else { 1.0 }
    }

    /// Writes the cosines and sines at `position`, amplitude included; both slices are `dims / 2` long.
    pub fn angles(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        rotate(position, &self.frequencies_at(position), self.amplitude(), cos, sin);
    }

    /// The angles of positions `0..positions`.
    pub fn table(&self, positions: usize) -> Table {
        let pairs = self.dims / 2;
        let mut table = Table { pairs, cos: vec![0.0; positions * pairs], sin: vec![0.0; positions * pairs] };
        let mut frequencies = self.frequencies();
        let rows = table.cos.chunks_exact_mut(pairs).zip(table.sin.chunks_exact_mut(pairs));
        for (position, (cos, sin)) in rows.enumerate() {
            if self.grown(position) {
                frequencies = self.frequencies_at(position);
            }
            rotate(position, &frequencies, self.amplitude(), cos, sin);
        }
        table
    }

    /// Whether `position` lies where the base grows.
    fn grown(&self, position: usize) -> bool {
        matches!(self.scaling, Scaling::Dynamic { original, .. } if position >= original)
    }

    fn frequencies_at(&self, position: usize) -> Vec<f32> {
        assert!(self.dims > 0 && self.dims.is_multiple_of(2), "{} rotated channels are not pairs", self.dims);
        let dims = self.dims as f64;
        let plain = |base: f64, pair: usize| 1.0 / libm::pow(base, (2 * pair) as f64 / dims);
        let each = |f: &dyn Fn(usize, f64) -> f64| {
            (0..self.dims / 2).map(|pair| f(pair, plain(self.theta, pair)) as f32).collect()
        };
        match &self.scaling {
            Scaling::None => each(&|_, frequency| frequency),
            Scaling::Linear { factor } => each(&|_, frequency| frequency / factor),
            Scaling::Dynamic { factor, original } => {
                let length = (position + 1).max(*original) as f64;
                let stretch = factor * length / *original as f64 - (factor - 1.0);
                let base = self.theta * libm::pow(stretch, dims / (dims - 2.0));
                (0..self.dims / 2).map(|pair| plain(base, pair) as f32).collect()
            }
            Scaling::Llama3 { factor, low, high, original } => {
                each(&|_, frequency| llama3(frequency, *factor, *low, *high, *original as f64))
            }
            Scaling::Yarn { factor, original, beta_fast, beta_slow, truncate, .. } => {
                let ramp = Ramp::new(dims, self.theta, *original as f64, (*beta_fast, *beta_slow), *truncate);
                each(&|pair, frequency| {
                    let kept = 1.0 - ramp.at(pair as f64);
                    frequency / factor * (1.0 - kept) + frequency * kept
                })
            }
            Scaling::Factors { by } => {
                assert_eq!(by.len(), self.dims / 2, "one factor for each rotated pair");
                each(&|pair, frequency| frequency / f64::from(by[pair]))
            }
        }
    }
}

fn rotate(position: usize, frequencies: &[f32], amplitude: f64, cos: &mut [f32], sin: &mut [f32]) {
    assert!(cos.len() == frequencies.len() && sin.len() == frequencies.len());
    for ((frequency, cos), sin) in frequencies.iter().zip(cos).zip(sin) {
        let angle = f64::from(position as f32 * frequency);
        *cos = (libm::cos(angle) * amplitude) as f32;
        *sin = (libm::sin(angle) * amplitude) as f32;
    }
}

/// Llama 3.1's three bands of wavelengths.
fn llama3(frequency: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let wavelength = TAU / frequency;
    if wavelength < original / high {
        frequency
    } else if wavelength > original / low {
        frequency / factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

/// YaRN's linear ramp over pairs: 0 keeps a frequency, 1 divides it by the factor (section 3.2 of the paper).
struct Ramp {
    from: f64,
    to: f64,
}

impl Ramp {
    fn new(dims: f64, theta: f64, original: f64, (fast, slow): (f64, f64), truncate: bool) -> Ramp {
        // The pair that turns `turns` times within the original length.
        let pair = |turns: f64| dims * libm::log(original / (turns * TAU)) / (2.0 * libm::log(theta));
        let (mut from, mut to) = (pair(fast), pair(slow));
        if truncate {
            (from, to) = (libm::floor(from), libm::ceil(to));
        }
        // The reference bounds by `dims - 1`, although there are only half as many pairs.
        (from, to) = (from.max(0.0), to.min(dims - 1.0));
        if from == to {
            to += 0.001;
        }
        Ramp { from, to }
    }

    fn at(&self, pair: f64) -> f64 {
        ((pair - self.from) / (self.to - self.from)).clamp(0.0, 1.0)
    }
}
