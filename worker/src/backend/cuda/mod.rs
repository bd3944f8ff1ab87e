//! A GPU as a device, through its driver and kernels of our own (`worker/kernels`). Every op keeps the canonical orders of the CPU's
//! vector family, bit for bit: what a rank answers does not tell which of the two it runs on. In the family of tensor cores products of bf16
//! have an order of their own ([`KernelFamily::Tensor`]).
//!
//! ```text
//! ops, attention, experts (the contract)  >  Device: driver, kernels, memory  >  driver.rs, compile.rs (unsafe, cudarc)
//! ```
//! All work of a backend is on one stream; the host waits only where it is given numbers ([`Backend::host`], routing). Small
//! arrays that an op needs go to scratch memory, which the stream's order protects from the op after it.
//!
//! [`Backend::host`]: crate::backend::Backend::host

mod attention;
mod compile;
mod driver;
mod experts;
mod images;
mod kernels;
mod memory;
mod ops;
mod scratch;
pub mod texts;
mod weights;

pub use attention::{Cache, Meta, RopeTable};
pub use compile::{Compiled, compile};
pub use images::{BUILT_IN, Image, architectures};
pub use weights::Matrix;

use crate::backend::Kind;
use crate::backend::contract::{Index, ensure};
use crate::backend::cpu::simd::pool::Pool;
use crate::collective::nccl::CudaQueue;
use driver::{Address, Driver};
use half::bf16;
use kernels::Kernels;
use memory::{Memory, Piece};
use model::fault::{Fault, FaultKind};
use model::plan::KernelFamily;
use model::quant::Dtype;
use scratch::Scratch;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// An opened GPU: its memory is reserved and its kernels are loaded. Outlives epochs, as matrices do.
pub struct Device {
    driver: Arc<Driver>,
    kernels: Kernels,
    memory: Arc<Memory>,
}

impl Device {
    /// Opens GPU `ordinal` and reserves `bytes` of its memory, or 90% of what is free; nothing is asked of the driver later.
    pub fn open(ordinal: usize, bytes: Option<usize>) -> Result<Arc<Device>, Fault> {
        Device::open_with(ordinal, bytes, BUILT_IN)
    }

    /// The same with other images of kernels than those built in.
    pub fn open_with(ordinal: usize, bytes: Option<usize>, images: &[Image<'_>]) -> Result<Arc<Device>, Fault> {
        let driver = Arc::new(Driver::open(ordinal)?);
        // What does not fit is known before kernels are loaded.
        let bytes = match bytes {
            Some(bytes) => bytes,
            None => driver.memory()?.0 / 10 * 9,
        };
        let memory = Memory::reserve(driver.clone(), bytes)?;
        let kernels = Kernels::load(&driver, images)?;
        Ok(Arc::new(Device { driver, kernels, memory }))
    }

    pub fn name(&self) -> &str {
        &self.driver.name
    }

    /// What goes on it is behind everything that backends of this device did before.
    pub fn queue(&self) -> Result<CudaQueue, Fault> {
        self.driver.queue()
    }

    /// A call that copies `bytes` of its memory within it and waits.
    pub fn copy(&self, bytes: usize) -> Result<impl Fn() -> Result<(), Fault>, Fault> {
        let (from, to) = (self.memory.piece(bytes)?, self.memory.piece(bytes)?);
        Ok(move || self.driver.copy(from.at, to.at, bytes).and_then(|()| self.driver.wait()))
    }

    /// What was reserved.
    pub fn memory_bytes(&self) -> usize {
        self.memory.bytes()
    }

    fn upload<T: Copy>(&self, values: &[T]) -> Result<Piece, Fault> {
        let piece = self.memory.piece(std::mem::size_of_val(values))?;
        self.driver.upload(piece.at, values)?;
        Ok(piece)
    }
}

/// How a rank uses its GPU.
#[derive(Debug, Clone, PartialEq)]
pub struct CudaConfig {
    pub dtype: Dtype,
    /// The order of sums: that of one chain an output, or for bf16 that of tensor cores.
    pub family: KernelFamily,
    /// Threads of the host that pack weights.
    pub threads: usize,
}

/// One rank's part of a device.
pub struct CudaBackend {
    device: Arc<Device>,
    dtype: Dtype,
    family: KernelFamily,
    pool: Pool,
    scratch: Scratch,
    index: Index,
    /// Of all matrices and vectors made.
    weights_bytes: AtomicU64,
}

/// f32 values of a norm or a bias.
pub struct Vector {
    piece: Piece,
    len: usize,
}

/// `[rows, cols]` activations, and a copy of some rows while the host looks at them.
pub struct Buffer {
    rows: usize,
    cols: usize,
    dtype: Dtype,
    piece: Piece,
    full: Vec<f32>,
    halves: Vec<bf16>,
}

impl CudaBackend {
    pub fn new(device: Arc<Device>, config: &CudaConfig) -> Result<CudaBackend, Fault> {
        let refuse = |e| Fault::new(FaultKind::Internal, format!("no {} threads: {e}", config.threads));
        if config.family == KernelFamily::Amx {
            return Err(Fault::new(FaultKind::Incompatible, "a GPU keeps no order of AMX's tiles"));
        }
        let pool = Pool::new(config.threads.max(1), 0).map_err(refuse)?;
        let scratch = Scratch::new(device.clone());
        Ok(CudaBackend {
            device,
            dtype: config.dtype,
            family: config.family,
            pool,
            scratch,
            index: Index::default(),
            weights_bytes: AtomicU64::new(0),
        })
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes of all matrices and vectors that it made: what a planner has to foresee.
    pub fn weights_bytes(&self) -> u64 {
        self.weights_bytes.load(Ordering::Relaxed)
    }

    fn count(&self, bytes: usize) {
        self.weights_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Which of a pair of kernels is for this dtype.
    fn which(&self) -> usize {
        usize::from(self.dtype == Dtype::Bf16)
    }

    fn zeroed(&self, bytes: usize) -> Result<Piece, Fault> {
        let piece = self.device.memory.piece(bytes)?;
        self.device.driver.clear(piece.at, bytes)?;
        Ok(piece)
    }
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        // What is on the stream reads matrices that others may drop next; what fails now, failed before.
        let _ = self.device.driver.wait();
    }
}

impl Buffer {
    fn dtype_of(kind: Kind, compute: Dtype) -> Dtype {
        if kind == Kind::Full { Dtype::F32 } else { compute }
    }

    fn check(&self, n: usize) -> Result<Address, Fault> {
        ensure(n <= self.rows, || format!("{n} rows asked of a buffer of {}", self.rows))?;
        Ok(self.piece.at)
    }

    /// The first `n` rows, of a Full buffer.
    fn full(&self, n: usize) -> Result<Address, Fault> {
        ensure(self.dtype == Dtype::F32, || "a Full buffer is needed, an Input one was given".into())?;
        self.check(n)
    }
}

/// What a vector may add: its address, or none.
fn address(vector: Option<&Vector>) -> Address {
    vector.map_or(0, |vector| vector.piece.at)
}
