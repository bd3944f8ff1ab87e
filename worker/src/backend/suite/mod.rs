//! The contract of [`Backend`]: every operation against naive loops, in f64 where tolerance is due and in f32 where the
//! order is promised; a row alone and in a batch, bit for bit; and everything twice.
//!
//! [`run`] panics with the case that fails, and returns the bits of every result, so that a backend's own tests can
//! compare threads, instruction sets and builds.

mod attention;
mod codes;
mod experts;
mod rows;

#[cfg(test)]
pub(crate) use codes::halves_of;

use crate::backend::{Backend, HostSlice, Kind, MatrixView};
use half::bf16;
use model::quant::{Dtype, Format};

/// Bits of everything computed, in order.
pub type Transcript = Vec<u32>;

/// Runs the suite on backends that `make` builds for `dtype`.
pub fn run<B: Backend>(dtype: Dtype, make: &mut dyn FnMut() -> B) -> Transcript {
    let mut transcripts = [Transcript::new(), Transcript::new()];
    for transcript in &mut transcripts {
        let mut case = Case { backend: make(), dtype, random: Random(0x9e37_79b9_7f4a_7c15), transcript: Vec::new() };
        rows::matmul(&mut case);
        rows::formats(&mut case);
        codes::blocked(&mut case);
        codes::beside(&mut case);
        rows::embed(&mut case);
        rows::norms(&mut case);
        rows::sums(&mut case);
        rows::parts(&mut case);
        rows::activations(&mut case);
        rows::products_and_activations(&mut case);
        attention::squares(&mut case);
        attention::grouped(&mut case);
        attention::latent(&mut case);
        experts::route(&mut case);
        experts::multiply(&mut case);
        experts::products_and_activations(&mut case);
        experts::weigh_and_bias(&mut case);
        experts::combine(&mut case);
        *transcript = case.transcript;
    }
    let [first, second] = transcripts;
    assert!(first == second, "two runs differ");
    first
}

/// A backend under test.
struct Case<B: Backend> {
    backend: B,
    dtype: Dtype,
    random: Random,
    transcript: Transcript,
}

/// Xorshift: the same numbers everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 16) as usize % n
    }

    /// About normal, variance about 1.
    fn values(&mut self, n: usize) -> Vec<f32> {
        let mut one = || (self.next() >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
        (0..n).map(|_| (one() + one() + one()) * 2.0).collect()
    }
}

impl<B: Backend> Case<B> {
    /// Rounds as inputs of multiplications are rounded.
    fn rounded(&self, values: &[f32]) -> Vec<f32> {
        match self.dtype {
            Dtype::F32 => values.to_vec(),
            Dtype::Bf16 => values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect(),
        }
    }

    /// Relative size of one rounding to the compute dtype.
    fn unit(&self) -> f64 {
        match self.dtype {
            Dtype::F32 => 1.2e-7,
            Dtype::Bf16 => 7.9e-3,
        }
    }

    fn empty(&self, rows: usize, cols: usize, kind: Kind) -> B::Buffer {
        self.backend.buffer(rows, cols, kind).expect("a buffer")
    }

    fn buffer(&mut self, values: &[f32], cols: usize, kind: Kind) -> B::Buffer {
        let rows = values.len() / cols;
        let mut buffer = self.empty(rows, cols, kind);
        match self.backend.host(&mut buffer, rows).expect("host access") {
            HostSlice::F32(host) => host.copy_from_slice(values),
            HostSlice::Bf16(host) => {
                for (to, from) in host.iter_mut().zip(values) {
                    *to = bf16::from_f32(*from);
                }
            }
        }
        self.backend.host_done(&mut buffer, rows).expect("host access");
        buffer
    }

    /// The first rows of a buffer, which also go to the transcript.
    fn read(&mut self, buffer: &mut B::Buffer, rows: usize) -> Vec<f32> {
        let values: Vec<f32> = match self.backend.host(buffer, rows).expect("host access") {
            HostSlice::F32(host) => host.to_vec(),
            HostSlice::Bf16(host) => host.iter().map(|v| v.to_f32()).collect(),
        };
        self.transcript.extend(values.iter().map(|v| v.to_bits()));
        values
    }

    /// A matrix of f32 values, and those values as the backend keeps them.
    fn matrix(&mut self, rows: usize, cols: usize, segments: usize) -> (B::Matrix, Vec<f32>) {
        let values: Vec<f32> = self.random.values(rows * cols).iter().map(|v| v / (cols as f32).sqrt()).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let view = view(Format::F32, &bytes, rows, cols);
        (self.backend.matrix(&[view], segments).expect("a matrix"), self.rounded(&values))
    }
}

fn view(format: Format, bytes: &[u8], rows: usize, cols: usize) -> MatrixView<'_> {
    MatrixView::whole(format, bytes, rows, cols)
}

/// Panics unless `|got - want| <= allowed`.
fn near(what: &str, got: f32, want: f64, allowed: f64) {
    let wrong = (f64::from(got) - want).abs();
    assert!(wrong <= allowed, "{what}: {got} instead of {want}, off by {wrong:e}, allowed {allowed:e}");
}

fn same_bits(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(got.to_bits() == want.to_bits(), "{what}: value {i} is {got:e}, not {want:e}");
    }
}

/// `x w^T` in f64 and the sum of magnitudes of its terms.
fn product(x: &[f32], w: &[f32]) -> (f64, f64) {
    x.iter().zip(w).fold((0.0, 0.0), |(sum, size), (x, w)| {
        let term = f64::from(*x) * f64::from(*w);
        (sum + term, size + term.abs())
    })
}
