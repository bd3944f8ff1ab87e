//! The CPU as a device. Every number it computes comes in one canonical order, whatever the batch, the threads and the
//! instruction set; the contract suite holds it to that.
//!
//! **Multiplications.** An output is a chain of f32 fused multiply-adds over its inputs inside a segment, from +0.0,
//! in pairs (2j, 2j+1): the odd element first, then the even one, which is what `VDPBF16PS` does. A segment of odd
//! length ends with a pair whose odd element is zero. Segment sums are joined by a balanced binary tree, neighbours
//! first; then comes the bias. Lanes of a vector are different outputs, so no sum crosses lanes and every width gives
//! the same bits. Products of two bf16 are exact in f32, so widened bf16 and native bf16 agree.
//! [`KernelFamily::Amx`] differs for bf16 alone: per 32 inputs of a segment an even and an odd chain from +0.0 each,
//! then `accumulator += even + odd`.
//!
//! **Subnormals** are zero (flush-to-zero, denormals-are-zero) on x86, as `VDPBF16PS` and AMX have it.
//!
//! **Weights** are stored as bf16 where the compute dtype or the checkpoint is bf16, else as f32 ([`simd::pack`]).
//!
//! **Norms and softmax sums** run in sixteen lanes (element i in lane i mod 16), which are added by halving: lane i to
//! i+8, then +4, +2, +1. A norm over all heads adds each head's sum of squares so, then the heads' sums, head i in lane
//! i mod 16. Exponentials are a polynomial of our own ([`simd::math`]).
//!
//! **Attention** walks spans of [`BLOCK_TOKENS`] positions. A score is one chain over the channels, ascending, times the
//! scale. Weights of a span are exp(score - the span's own maximum), +0.0 where masked; their sum halves the 32
//! positions; an output is one chain over the positions seen, ascending. Spans merge left to right as
//! [`simd::attention`] writes down; a span that is masked as a whole is skipped. The result is multiplied by the
//! rounded inverse of the sum. Slots behind a query's own position are never looked at. ALiBi adds slope times (key's minus
//! query's position) to the scaled score, as one FMA; a sink merges last, as a span of one position without a value.
//!
//! **Experts.** A routing weight multiplies with one rounding of its own; a row's terms are added from +0.0 by
//! ascending expert inside each segment of experts, and the segments by the tree.

mod buffer;
mod combine;
mod gated;
mod meta;
mod ops;
mod route;
pub mod simd;
pub(in crate::backend) mod weights;

#[cfg(test)]
mod coded_tests;
#[cfg(test)]
mod tests;

pub use buffer::{Buffer, Data};
pub use meta::Meta;
pub use weights::Matrix;

use crate::backend::contract::{Index, ensure, wrong};
use crate::backend::{Backend, HostSlice, Kind};
use model::fault::{Fault, FaultKind};
use model::plan::{BLOCK_TOKENS, KernelFamily};
use model::quant::Dtype;
use model::spec::CacheKind;
use simd::Level;
use simd::attention::WIDTH_MAX;
use simd::pool::Pool;
use simd::{grouped, latent};
use std::sync::atomic::{AtomicU64, Ordering};

/// How a rank uses its share of the CPU.
#[derive(Debug, Clone, PartialEq)]
pub struct CpuConfig {
    pub dtype: Dtype,
    pub family: KernelFamily,
    /// Threads of this rank, the calling one included.
    pub threads: usize,
    /// Rounds that an idle thread waits awake before it sleeps, a few nanoseconds each: thousands where the rank has
    /// its cores alone, 0 where ranks outnumber cores.
    pub spin: u32,
}

/// The families that this CPU runs at its own speed, best first. (Every other is emulated bit for bit, for comparisons.)
/// Tiles are offered only after they gave, in this process, the bits that their emulation gives.
pub fn families() -> Vec<KernelFamily> {
    let tiles = Level::all().into_iter().find(|level| level.has_tiles());
    let plain = Level::all().into_iter().find(|level| !level.has_tiles()).unwrap_or_else(Level::portable);
    match tiles.map(|tiles| (amx_probe(tiles), amx_probe(plain))) {
        Some((Ok(native), Ok(emulated))) if native == emulated => vec![KernelFamily::Amx, KernelFamily::Vector],
        Some(_) => {
            tracing::warn!("this CPU's AMX tiles do not give the bits that they should: they are not used");
            vec![KernelFamily::Vector]
        }
        None => vec![KernelFamily::Vector],
    }
}

/// Bits of a small product in AMX's order: rows, outputs and inputs that fill no tile evenly, two segments.
fn amx_probe(level: Level) -> Result<Vec<u32>, Fault> {
    const ROWS: usize = 37;
    const OUTPUTS: usize = 83;
    const INPUTS: usize = 2 * 75;
    let config = CpuConfig { dtype: Dtype::Bf16, family: KernelFamily::Amx, threads: 1, spin: 0 };
    let mut backend = CpuBackend::with_level(config, level)?;
    let value = |i: usize| ((i * 7919 % 1009) as f32 - 504.0) / 256.0;
    let weights: Vec<f32> = (0..OUTPUTS * INPUTS).map(value).collect();
    let matrix = backend.matrix_f32(&weights, OUTPUTS, INPUTS, 2)?;
    let mut x = backend.buffer(ROWS, INPUTS, Kind::Input)?;
    let mut out = backend.buffer(ROWS, OUTPUTS, Kind::Full)?;
    if let HostSlice::Bf16(values) = backend.host(&mut x, ROWS)? {
        values.iter_mut().enumerate().for_each(|(i, v)| *v = half::bf16::from_f32(value(i + 31)));
    }
    backend.host_done(&mut x, ROWS)?;
    backend.matmul(&x, &matrix, None, ROWS, &mut out)?;
    match backend.host(&mut out, ROWS)? {
        HostSlice::F32(values) => Ok(values.iter().map(|v| v.to_bits()).collect()),
        HostSlice::Bf16(_) => Ok(Vec::new()),
    }
}

/// One rank's kernels and threads.
pub struct CpuBackend {
    dtype: Dtype,
    family: KernelFamily,
    level: Level,
    pool: Pool,
    scratch: Scratch,
    /// Of all matrices and vectors made.
    weights_bytes: AtomicU64,
}

/// Memory kept between calls.
struct Scratch {
    inputs: Data,
    products: Data,
    packed: Data,
    tiles: Vec<u32>,
    active: Vec<u32>,
    index: Index,
}

/// One layer's cache, in the compute dtype.
pub struct Cache {
    place: Place,
    blocks: usize,
    data: Data,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    Grouped(grouped::Layout),
    Latent(latent::Layout),
}

/// f32 values of a norm or a bias.
pub struct Vector(Vec<f32>);

impl CpuBackend {
    pub fn new(config: CpuConfig) -> Result<CpuBackend, Fault> {
        CpuBackend::with_level(config, Level::best())
    }

    /// With a chosen instruction set, to compare them.
    pub fn with_level(config: CpuConfig, level: Level) -> Result<CpuBackend, Fault> {
        let CpuConfig { dtype, family, threads, spin } = config;
        if family == KernelFamily::Tensor {
            return Err(Fault::new(FaultKind::Incompatible, "a CPU has no tensor cores"));
        }
        let refuse = |e| Fault::new(FaultKind::Internal, format!("no {threads} threads: {e}"));
        let pool = Pool::new(threads, spin).map_err(refuse)?;
        let scratch = Scratch {
            inputs: Data::zeroed(dtype, 0)?,
            products: Data::zeroed(Dtype::F32, 0)?,
            packed: Data::zeroed(Dtype::F32, 0)?,
            tiles: Vec::new(),
            active: Vec::new(),
            index: Index::default(),
        };
        Ok(CpuBackend { dtype, family, level, pool, scratch, weights_bytes: AtomicU64::new(0) })
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub fn level(&self) -> Level {
        self.level
    }

    /// Bytes of all matrices and vectors that it made: what a planner has to foresee.
    pub fn weights_bytes(&self) -> u64 {
        self.weights_bytes.load(Ordering::Relaxed)
    }

    fn count(&self, bytes: usize) {
        self.weights_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn threads(&self) -> usize {
        self.pool.threads()
    }
}

impl Cache {
    fn new(kind: CacheKind, blocks: usize, (dtype, family): (Dtype, KernelFamily)) -> Result<Cache, Fault> {
        let (place, elements, width) = match kind {
            CacheKind::Paged { kv_heads, head_dim } => {
                let layout = grouped::Layout::new(kv_heads, head_dim, dtype, family);
                (Place::Grouped(layout), layout.block_elements(), head_dim)
            }
            CacheKind::Latent { kv_rank, rope_dim } => {
                let layout = latent::Layout { kv_rank, rope_dim };
                (Place::Latent(layout), layout.block_elements(), layout.width())
            }
        };
        ensure(width <= WIDTH_MAX, || format!("{width} channels in a head, {WIDTH_MAX} at most"))?;
        let total = blocks.checked_mul(elements);
        let total = total.ok_or_else(|| wrong(format!("{blocks} blocks of {BLOCK_TOKENS} overflow")))?;
        Ok(Cache { place, blocks, data: Data::zeroed(dtype, total)? })
    }

    /// The cache's memory, for tests that spoil it.
    pub fn data_mut(&mut self) -> &mut Data {
        &mut self.data
    }
}
