//! What a worker computes on: the CPU, or one GPU.

use crate::backend::cpu;
use crate::backend::cuda::Device;
use crate::config::{Backend, Config, memory_to_offer};
use model::fault::Fault;
use model::plan::KernelFamily;
use std::sync::Arc;

/// Opened once, before the worker joins.
#[derive(Clone)]
pub enum Hardware {
    Cpu,
    /// A worker has one: its end can't take another's with it.
    Gpu(Arc<Device>),
}

impl Hardware {
    /// Opens what the worker is told to compute on. A GPU's memory is reserved: as much as is to be offered.
    pub fn open(config: &Config) -> Result<Hardware, Fault> {
        match config.backend {
            Backend::Cpu => Ok(Hardware::Cpu),
            Backend::Cuda => {
                let bytes = (config.memory_bytes > 0).then_some(config.memory_bytes as usize);
                Ok(Hardware::Gpu(Device::open(config.gpu, bytes)?))
            }
        }
    }

    /// Bytes that it can offer: what it is told, or 90% of what is available.
    pub fn memory_bytes(&self, config: &Config) -> u64 {
        match self {
            Hardware::Gpu(device) => device.memory_bytes() as u64,
            Hardware::Cpu if config.memory_bytes > 0 => config.memory_bytes,
            Hardware::Cpu => memory_to_offer(),
        }
    }
}

/// The orders of sums that a backend can keep on this host.
pub fn families(backend: Backend) -> Vec<KernelFamily> {
    match backend {
        Backend::Cpu => cpu::families(),
        Backend::Cuda => vec![KernelFamily::Tensor, KernelFamily::Vector],
    }
}
