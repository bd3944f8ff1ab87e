//! Subnormals become zero on the backend's threads: `VDPBF16PS` and AMX always do so, and every other path must agree.

/// Sets flush-to-zero and denormals-are-zero on this thread until dropped.
///
/// The compiler assumes the default mode when it folds constants; no constant here is subnormal, so it folds alike.
pub struct Flush {
    #[cfg(target_arch = "x86_64")]
    before: u32,
}

#[cfg(target_arch = "x86_64")]
const BITS: u32 = 0x8040;

#[cfg(target_arch = "x86_64")]
impl Flush {
    pub fn on() -> Flush {
        let mut before = 0u32;
        // SAFETY: the control word is read to, and loaded from, locals; SSE is part of x86-64.
        unsafe {
            std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut before, options(nostack));
            let with = before | BITS;
            std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const with, options(nostack));
        }
        Flush { before }
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for Flush {
    fn drop(&mut self) {
        // SAFETY: as in `on`; this restores the word read there.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const self.before, options(nostack)) };
    }
}

/// Elsewhere subnormals stay: no other architecture shares bits with x86.
#[cfg(not(target_arch = "x86_64"))]
impl Flush {
    pub fn on() -> Flush {
        Flush {}
    }
}
