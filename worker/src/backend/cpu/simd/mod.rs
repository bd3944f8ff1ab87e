//! Everything unsafe of this backend: vector code, memory shared between its threads, and the threads themselves.

// `Lanes` states the one condition for all of its operations and their users.
#![allow(clippy::missing_safety_doc)]

pub mod activations;
pub mod aligned;
mod alone;
#[cfg(target_arch = "x86_64")]
pub mod amx;
pub mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocked;
mod chains;
pub mod coded;
pub mod flush;
pub mod gated;
pub mod grouped;
pub mod lanes;
pub mod latent;
pub mod math;
pub mod norms;
pub mod pack;
pub mod panel;
pub mod pool;
mod portable;
mod prepare;
mod products;
pub mod roof;
pub mod rows;
mod runs;
pub mod shared;
#[cfg(target_arch = "x86_64")]
mod tree;

use lanes::Kernel;

/// An instruction set that this CPU has. All give the same bits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Level(Set);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Set {
    #[cfg(target_arch = "x86_64")]
    Amx,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Level {
    /// What this CPU can run, fastest first.
    pub fn all() -> Vec<Level> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq");
            if avx512 && is_x86_feature_detected!("avx512bf16") {
                if amx::available() {
                    all.push(Level(Set::Amx));
                }
                all.push(Level(Set::Avx512Bf16));
            }
            if avx512 {
                all.push(Level(Set::Avx512));
            }
            if avx2 {
                all.push(Level(Set::Avx2));
            }
        }
        all.push(Level(Set::Portable));
        all
    }

    pub fn best() -> Level {
        Level::all()[0]
    }

    /// Whether AMX's tiles are used.
    pub fn has_tiles(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 == Set::Amx;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    pub fn portable() -> Level {
        Level(Set::Portable)
    }

    /// Runs a kernel compiled for this level.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            // SAFETY: a level is made by `all` alone, which asked the CPU.
            #[cfg(target_arch = "x86_64")]
            Set::Amx => unsafe { avx512::run_tiles(kernel) },
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Bf16 => unsafe { avx512::run_dot(kernel) },
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { avx512::run(kernel) },
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { avx2::run(kernel) },
            Set::Portable => kernel.run::<portable::Portable>(),
        }
    }
}

impl std::fmt::Debug for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}
