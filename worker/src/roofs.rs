//! What a CPU or a GPU gives at most: the roofs that benchmarks measure against.

use crate::backend::cpu::simd::Level;
use crate::backend::cpu::simd::aligned::Aligned;
use crate::backend::cpu::simd::pool::Pool;
use crate::backend::cpu::simd::roof::{Dot, Read, Square};
use crate::backend::cuda::Device;
use model::fault::Fault;
use model::plan::KernelFamily;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// In a second.
#[derive(Debug, Clone, Copy)]
pub struct Roofs {
    /// Bytes of memory that no cache holds: read by a CPU's threads, read and written by a GPU's copy.
    pub bytes: f64,
    /// Multiplications and additions of bf16: in registers, or by tiles from the first cache. Not known of a GPU.
    pub flops: Option<f64>,
}

const REPEATS: usize = 9;

/// Words that are read: more than caches hold.
const READ: usize = 128 << 20;

/// Bytes that a GPU copies: enough to take much longer than the start.
const COPIED: usize = 1 << 30;

/// Median seconds of a call, after one to warm up.
pub fn median(mut call: impl FnMut()) -> f64 {
    call();
    let mut times: Vec<f64> = (0..REPEATS)
        .map(|_| {
            let start = Instant::now();
            call();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[REPEATS / 2]
}

impl Roofs {
    /// Of the threads of `pool` together.
    pub fn of_cpu(pool: &Pool, level: Level, family: KernelFamily) -> Result<Roofs, Fault> {
        let threads = pool.threads();
        let mut words = Aligned::<u32>::zeroed(READ)?;
        words.fill(0x3f80_3f80);
        let (sink, part) = (AtomicU64::new(0), READ / (threads * 8));
        let seconds = median(|| {
            pool.run(threads * 8, &|i| {
                let sum = level.run(Read(&words[i * part..][..part]));
                sink.fetch_add(sum.to_bits() as u64, Ordering::Relaxed);
            })
        });
        let bytes = (READ * size_of::<u32>()) as f64 / seconds;
        let (rounds, flops): (usize, usize) = match family {
            KernelFamily::Amx => (20_000, Square::FLOPS),
            KernelFamily::Vector | KernelFamily::Tensor => (2_000_000, Dot::FLOPS),
        };
        let seconds = median(|| {
            pool.run(threads, &|_| match family {
                KernelFamily::Amx => Square::default().run(rounds),
                KernelFamily::Vector | KernelFamily::Tensor => {
                    black_box(level.run(Dot { rounds: black_box(rounds), pair: black_box(0x3c00_3c00) }));
                }
            })
        });
        Ok(Roofs { bytes, flops: Some((rounds * flops * threads) as f64 / seconds) })
    }

    pub fn of_gpu(device: &Device) -> Result<Roofs, Fault> {
        let bytes = (device.memory_bytes() / 4).min(COPIED);
        let copy = device.copy(bytes)?;
        let mut fault = Ok(());
        let seconds = median(|| fault = fault.clone().and_then(|()| copy()));
        fault.map(|()| Roofs { bytes: 2.0 * bytes as f64 / seconds, flops: None })
    }
}
