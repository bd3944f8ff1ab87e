//! What a position or a head alone decides, computed once at load: rotations and query scales by position, ALiBi's slopes
//! by head.

use super::math;
use crate::backend::Backend;
use model::fault::Fault;
use model::rope::Rope;
use model::spec::{Layer, Mixer, QueryScale};

/// The distinct rotations and query scales of some layers, in order of first use.
#[derive(Debug, Default)]
pub struct Kinds {
    ropes: Vec<Rope>,
    query_scales: Vec<QueryScale>,
}

/// Which of a stage's tables a layer uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chosen {
    pub rope: Option<usize>,
    pub query_scale: Option<usize>,
}

/// A stage's tables on its device.
pub struct Tables<B: Backend> {
    ropes: Vec<B::RopeTable>,
    query_scales: Vec<B::Vector>,
}

impl Kinds {
    pub fn of<'a>(layers: impl Iterator<Item = &'a Layer>) -> Kinds {
        let mut kinds = Kinds::default();
        for layer in layers {
            if let Some(rope) = layer.mixer.rope()
                && !kinds.ropes.contains(rope)
            {
                kinds.ropes.push(rope.clone());
            }
            if let Some(scale) = query_scale(&layer.mixer)
                && !kinds.query_scales.contains(&scale)
            {
                kinds.query_scales.push(scale);
            }
        }
        kinds
    }

    /// The tables of a mixer of one of the layers.
    pub fn chosen(&self, mixer: &Mixer) -> Chosen {
        let listed = "every layer's kinds are in the list";
        Chosen {
            rope: mixer.rope().map(|rope| self.ropes.iter().position(|r| r == rope).expect(listed)),
            query_scale: query_scale(mixer).map(|s| self.query_scales.iter().position(|k| *k == s).expect(listed)),
        }
    }

    /// Their numbers for positions `0..positions`.
    pub fn tables<B: Backend>(&self, backend: &B, positions: usize) -> Result<Tables<B>, Fault> {
        let ropes: Result<Vec<_>, Fault> = self.ropes.iter().map(|rope| backend.rope_table(rope, positions)).collect();
        let scales: Result<Vec<_>, Fault> =
            self.query_scales.iter().map(|scale| backend.vector(&scale_table(scale, positions))).collect();
        Ok(Tables { ropes: ropes?, query_scales: scales? })
    }
}

impl<B: Backend> Tables<B> {
    pub fn rope(&self, chosen: Chosen) -> Option<&B::RopeTable> {
        chosen.rope.map(|index| &self.ropes[index])
    }

    pub fn query_scale(&self, chosen: Chosen) -> Option<&B::Vector> {
        chosen.query_scale.map(|index| &self.query_scales[index])
    }
}

fn query_scale(mixer: &Mixer) -> Option<QueryScale> {
    match mixer {
        Mixer::Grouped(g) => g.query_scale,
        Mixer::Latent(l) => l.query_scale,
    }
}

/// What queries at `0..positions` are multiplied with.
fn scale_table(scale: &QueryScale, positions: usize) -> Vec<f32> {
    let mut table = Vec::with_capacity(positions);
    for position in 0..positions {
        let periods = ((position + scale.offset) / scale.period) as f64;
        table.push((1.0 + f64::from(scale.beta) * math::ln(1.0 + periods)) as f32);
    }
    table
}

/// ALiBi's slopes of `heads` heads: powers of `2^(-8 / n)` for the largest power of two `n` of heads, then, for heads
/// beyond it, every other power of its root (Press et al., 2021, as BLOOM computes it: bases are rounded to f32).
pub fn slopes(heads: usize) -> Vec<f32> {
    let whole = 1usize << heads.ilog2();
    let base = |n: usize| f64::from(libm::exp2(-8.0 / n as f64) as f32);
    let powers = (1..=whole).map(|k| libm::pow(base(whole), k as f64) as f32);
    let between = (0..heads - whole).map(|k| libm::pow(base(2 * whole), (2 * k + 1) as f64) as f32);
    powers.chain(between).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_those_of_the_paper_and_the_rest_lie_between() {
        let halves: Vec<f32> = (1..=8).map(|k| 0.5f32.powi(k)).collect();
        assert_eq!(slopes(8), halves);
        assert_eq!(slopes(1), [1.0 / 256.0]);
        let twelve = slopes(12);
        assert_eq!(twelve[..8], halves);
        let roots = [0.707_106_77f32, 0.353_553_4, 0.176_776_7, 0.088_388_35];
        for (found, wanted) in twelve[8..].iter().zip(roots) {
            assert!((found - wanted).abs() < 1e-6 * wanted, "{found} is not {wanted}");
        }
        assert_eq!(slopes(112).len(), 112, "BLOOM-176B's");
    }

    #[test]
    fn query_scales_step_by_the_period() {
        let table = scale_table(&QueryScale { beta: 0.1, period: 4, offset: 1 }, 12);
        assert_eq!(table[..3], [1.0; 3]);
        for (position, found) in table.iter().enumerate() {
            let wanted = 1.0 + 0.1 * (1.0 + ((position + 1) / 4) as f64).ln();
            assert!((f64::from(*found) - wanted).abs() < 1e-7 * wanted, "position {position}: {found}");
        }
        assert_eq!(scale_table(&QueryScale { beta: 0.1, period: 4, offset: 0 }, 12)[3], 1.0);
    }
}
