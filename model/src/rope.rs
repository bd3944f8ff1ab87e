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
    } else if wavelength > original / low || high <= low {
        // Llama 4 leaves no band between.
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

#[cfg(test)]
#[allow(clippy::excessive_precision)] // digits as the reference prints them
mod tests {
    use super::{Layout, Rope, Scaling};

    fn rope(dims: usize, theta: f64, scaling: Scaling) -> Rope {
        Rope { dims, theta, layout: Layout::Half, scaling }
    }

    /// Numbers of the reference implementation, which computes in f32: a few units in the last place may differ.
    fn assert_near(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() <= 1e-6 * e.abs(), "{found:?} is not {expected:?}");
        }
    }

    fn deepseek() -> Rope {
        let amplitude = (0.1 * 40f64.ln() + 1.0) / (0.05 * 40f64.ln() + 1.0);
        let (factor, original, truncate) = (40.0, 4096, true);
        rope(32, 1e4, Scaling::Yarn { factor, original, beta_fast: 32.0, beta_slow: 1.0, truncate, amplitude })
    }

    #[test]
    fn plain_and_linear_frequencies_are_the_references() {
        let plain = [1.0, 0.31622776, 0.1, 0.03162278, 0.01, 0.0031622779, 0.001, 0.00031622779];
        assert_near(&rope(16, 1e4, Scaling::None).frequencies(), &plain);
        let half: Vec<f32> = plain.iter().map(|f| f / 2.0).collect();
        assert_near(&rope(16, 1e4, Scaling::Linear { factor: 2.0 }).frequencies(), &half);
    }

    #[test]
    fn a_dynamic_base_grows_past_the_original_length() {
        let rope = rope(16, 1e4, Scaling::Dynamic { factor: 2.0, original: 64 });
        assert_eq!(rope.frequencies_at(63), rope.frequencies());
        // The reference at lengths 100 and 101, which positions 99 and 100 are the last of.
        let at_99 = [1.0, 0.28394514, 0.08062484, 0.02289303, 0.0065003652, 0.001845747, 0.0005240909, 0.00014881307];
        let at_100 =
            [1.0, 0.2833536, 0.08028925, 0.022750245, 0.0064463634, 0.0018266001, 0.00051757367, 0.00014665634];
        assert_near(&rope.frequencies_at(99), &at_99);
        assert_near(&rope.frequencies_at(100), &at_100);
    }

    #[test]
    fn llama3_bands_are_the_references() {
        let rope = rope(32, 5e5, Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192 });
        let expected = [
            1.0,
            0.44036663,
            0.19392276,
            0.0853971,
            0.03760603,
            0.016560441,
            0.0072926651,
            0.0032114461,
            0.00052484602,
            7.7846555e-5,
            3.4281024e-5,
            1.5096218e-5,
            6.6478697e-6,
            2.9274997e-6,
            1.2891732e-6,
            5.6770881e-7,
        ];
        assert_near(&rope.frequencies(), &expected);
    }

    #[test]
    fn yarn_ramps_are_the_references() {
        let yarn = |factor, original, truncate| Scaling::Yarn {
            factor,
            original,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate,
            amplitude: 1.0,
        };
        let qwen = [
            1.0,
            0.42169651,
            0.17782794,
            0.074989416,
            0.031622779,
            0.013335215,
            0.0047799014,
            0.0016599617,
            0.00055,
            0.00016867858,
            4.4456985e-5,
            1.8747356e-5,
            7.9056936e-6,
            3.3338035e-6,
            1.4058534e-6,
            5.9284344e-7,
        ];
        assert_near(&rope(32, 1e6, yarn(4.0, 32768, true)).frequencies(), &qwen);
        let untruncated = [
            1.0,
            0.47478205,
            0.225418,
            0.10702442,
            0.050813273,
            0.019335002,
            0.0067949593,
            0.0020937927,
            0.00045648392,
            3.8308812e-5,
            1.8188337e-5,
            8.6354958e-6,
            4.0999785e-6,
            1.9465963e-6,
            9.2420896e-7,
            4.3879786e-7,
        ];
        assert_near(&rope(32, 150_000.0, yarn(32.0, 4096, false)).frequencies(), &untruncated);
    }

    #[test]
    fn angles_are_the_references_even_far_out() {
        // First four pairs; the last position is where an f32 product of position and frequency shows.
        let expected = [
            (0, [1.155722; 4], [0.0; 4]),
            (1, [0.6244393, 0.9777513, 1.0984159, 1.1374966], [0.9725065, 0.6161945, 0.3594106, 0.2044382]),
            (777, [-0.5983383, -1.1175202, 0.9096409, 1.1537937], [-0.9887794, -0.2946895, 0.7129143, -0.0667341]),
            (100_000, [-1.1549833, 1.0751172, 1.0173793, 0.220818], [0.0413157, -0.4240477, -0.5482999, 1.1344307]),
        ];
        let rope = deepseek();
        let table = rope.table(778);
        for (position, cosines, sines) in expected {
            let (mut cos, mut sin) = ([0.0; 16], [0.0; 16]);
            rope.angles(position, &mut cos, &mut sin);
            for pair in 0..4 {
                // One unit of a frequency's last place moves an angle by position * 6e-8.
                let tolerance = 1e-6 + 6e-8 * position as f32;
                assert!((cos[pair] - cosines[pair]).abs() < tolerance, "{position}: {cos:?}");
                assert!((sin[pair] - sines[pair]).abs() < tolerance, "{position}: {sin:?}");
            }
            if position < 778 {
                assert_eq!(table.cos[position * 16..][..16], cos);
                assert_eq!(table.sin[position * 16..][..16], sin);
            }
        }
    }

    #[test]
    fn a_table_of_a_dynamic_rope_holds_each_positions_own_angles() {
        let rope = rope(16, 1e4, Scaling::Dynamic { factor: 4.0, original: 8 });
        let table = rope.table(20);
        for position in [0, 7, 8, 19] {
            let (mut cos, mut sin) = ([0.0; 8], [0.0; 8]);
            rope.angles(position, &mut cos, &mut sin);
            assert_eq!((&table.cos[position * 8..][..8], &table.sin[position * 8..][..8]), (&cos[..], &sin[..]));
        }
    }

    #[test]
    fn stored_factors_divide_frequencies() {
        let by = vec![1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0, 8.0];
        let plain = rope(16, 1e4, Scaling::None).frequencies();
        let found = rope(16, 1e4, Scaling::Factors { by: by.clone() }).frequencies();
        let expected: Vec<f32> = plain.iter().zip(&by).map(|(f, by)| f / by).collect();
        assert_near(&found, &expected);
    }
}
