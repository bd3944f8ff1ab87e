//! Intel's tiles: 16 rows of activations times 32 inputs times 16 outputs an instruction.
//!
//! A part of a panel is multiplied by one asm block that configures the tiles, loads the accumulators, runs over all
//! whole blocks of 32 inputs and stores the accumulators, so that no tile lives where the compiler can see it. A
//! packed panel already is a column of B tiles (16 pair-rows of 16 words each).

use super::lanes::LANES;
use super::pack::PANEL;
use super::panel::{AMX_PAIRS, CHUNK};
use half::bf16;
use std::arch::asm;
use std::sync::OnceLock;

/// Rows of a tile.
const ROWS: usize = 16;
/// Inputs of a whole block.
const BLOCK: usize = 2 * AMX_PAIRS;

/// Whether this CPU has bf16 tiles and the kernel lets this process use them; asked once.
pub fn available() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| has_instructions() && permitted())
}

fn has_instructions() -> bool {
    let (bf16_tiles, tiles) = (1 << 22, 1 << 24);
    let leaves = std::arch::x86_64::__cpuid(0).eax;
    leaves >= 7 && std::arch::x86_64::__cpuid_count(7, 0).edx & (bf16_tiles | tiles) == bf16_tiles | tiles
}

/// Asks for the tiles' state, which Linux grants a process on demand.
fn permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: a request about this process alone; it fails where the kernel knows no tiles.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// `LDTILECFG`'s operand: accumulators 0 to 3 and activations 4 have `rows` rows, weights 5 and 6 sixteen pairs.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Configuration {
    fn new(rows: usize) -> Configuration {
        let (mut row_bytes, mut each) = ([0u16; 16], [0u8; 16]);
        for tile in 0..7 {
            row_bytes[tile] = 64;
            each[tile] = if tile < 5 { rows as u8 } else { AMX_PAIRS as u8 };
        }
        Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows: each }
    }
}

/// Adds the products of `pairs` pairs (a last one lone, where `lone`) to the accumulators of all rows.
///
/// # Safety
/// [`available`] said yes; `x` rows hold the inputs from `at`; `w` points at the pair-rows of `width` words, zeros up
/// to a whole block; `acc` is `[x.len()][PANEL]`; at most [`CHUNK`] pairs.
pub unsafe fn accumulate(
    x: &[*const bf16],
    at: usize,
    (pairs, lone): (usize, bool),
    (w, width): (*const u32, usize),
    acc: *mut f32,
) {
    let inputs = 2 * pairs + usize::from(lone);
    let (blocks, rest) = (inputs / BLOCK, inputs % BLOCK);
    debug_assert!(inputs <= 2 * CHUNK);
    for first in (0..x.len()).step_by(ROWS) {
        let rows = &x[first..x.len().min(first + ROWS)];
        let configuration = Configuration::new(rows.len());
        // SAFETY: the caller's promises, a tile of rows at a time.
        unsafe {
            let acc = acc.add(first * PANEL);
            if blocks > 0 {
                let mut copy = [bf16::ZERO; ROWS * 2 * CHUNK];
                let (start, stride) = match even_stride(rows) {
                    Some(stride) => (rows[0].add(at), stride),
                    None => {
                        for (row, x) in rows.iter().enumerate() {
                            let to = copy.as_mut_ptr().add(row * 2 * CHUNK);
                            std::ptr::copy_nonoverlapping(x.add(at), to, blocks * BLOCK);
                        }
                        (copy.as_ptr(), 2 * CHUNK * size_of::<bf16>())
                    }
                };
                panel(&configuration, start, stride, w, width, blocks, acc);
            }
            if rest > 0 {
                let mut copy = [bf16::ZERO; ROWS * BLOCK];
                for (row, x) in rows.iter().enumerate() {
                    let to = copy.as_mut_ptr().add(row * BLOCK);
                    std::ptr::copy_nonoverlapping(x.add(at + blocks * BLOCK), to, rest);
                }
                let w = w.add(blocks * AMX_PAIRS * width);
                panel(&configuration, copy.as_ptr(), BLOCK * size_of::<bf16>(), w, width, 1, acc);
            }
        }
    }
}

/// The distance of rows in bytes, where it is one and the same.
fn even_stride(rows: &[*const bf16]) -> Option<usize> {
    let Some(second) = rows.get(1) else { return Some(0) };
    let stride = (*second as usize).wrapping_sub(rows[0] as usize);
    let even = rows.windows(2).all(|pair| (pair[1] as usize).wrapping_sub(pair[0] as usize) == stride);
    even.then_some(stride)
}

/// All outputs of a panel: four tiles of accumulators at once where it is full, else one by one.
unsafe fn panel(
    configuration: &Configuration,
    x: *const bf16,
    x_stride: usize,
    w: *const u32,
    width: usize,
    blocks: usize,
    acc: *mut f32,
) {
    unsafe {
        if width == PANEL {
            return four(configuration, x, x_stride, w, blocks, acc);
        }
        for lane in (0..width).step_by(LANES) {
            one(configuration, x, x_stride, w.add(lane), width * 4, blocks, acc.add(lane));
        }
    }
}

unsafe fn four(
    configuration: &Configuration,
    x: *const bf16,
    x_stride: usize,
    w: *const u32,
    blocks: usize,
    acc: *mut f32,
) {
    // SAFETY: tiles are configured for what is loaded, released at the end, and named as clobbers.
    unsafe {
        asm!(
            "ldtilecfg [{configuration}]",
            "tileloadd tmm0, [{acc} + {width}*1]",
            "tileloadd tmm1, [{acc} + {width}*1 + 64]",
            "tileloadd tmm2, [{acc} + {width}*1 + 128]",
            "tileloadd tmm3, [{acc} + {width}*1 + 192]",
            "2:",
            "tileloadd tmm4, [{x} + {x_stride}*1]",
            "tileloadd tmm5, [{w} + {width}*1]",
            "tdpbf16ps tmm0, tmm4, tmm5",
            "tileloadd tmm6, [{w} + {width}*1 + 64]",
            "tdpbf16ps tmm1, tmm4, tmm6",
            "tileloadd tmm5, [{w} + {width}*1 + 128]",
            "tdpbf16ps tmm2, tmm4, tmm5",
            "tileloadd tmm6, [{w} + {width}*1 + 192]",
            "tdpbf16ps tmm3, tmm4, tmm6",
            "add {x}, 64",
            "add {w}, 4096",
            "dec {blocks}",
            "jnz 2b",
            "tilestored [{acc} + {width}*1], tmm0",
            "tilestored [{acc} + {width}*1 + 64], tmm1",
            "tilestored [{acc} + {width}*1 + 128], tmm2",
            "tilestored [{acc} + {width}*1 + 192], tmm3",
            "tilerelease",
            configuration = in(reg) configuration,
            acc = in(reg) acc,
            // A full panel's pair-rows are as wide as a row of accumulators.
            width = in(reg) PANEL * 4,
            x = inout(reg) x => _,
            x_stride = in(reg) x_stride,
            w = inout(reg) w => _,
            blocks = inout(reg) blocks => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _,
            options(nostack),
        );
    }
}

unsafe fn one(
    configuration: &Configuration,
    x: *const bf16,
    x_stride: usize,
    w: *const u32,
    w_stride: usize,
    blocks: usize,
    acc: *mut f32,
) {
    // SAFETY: as in `four`.
    unsafe {
        asm!(
            "ldtilecfg [{configuration}]",
            "tileloadd tmm0, [{acc} + {acc_stride}*1]",
            "2:",
            "tileloadd tmm4, [{x} + {x_stride}*1]",
            "tileloadd tmm5, [{w} + {w_stride}*1]",
            "tdpbf16ps tmm0, tmm4, tmm5",
            "add {x}, 64",
            "add {w}, {w_step}",
            "dec {blocks}",
            "jnz 2b",
            "tilestored [{acc} + {acc_stride}*1], tmm0",
            "tilerelease",
            configuration = in(reg) configuration,
            acc = in(reg) acc,
            acc_stride = in(reg) PANEL * 4,
            x = inout(reg) x => _,
            x_stride = in(reg) x_stride,
            w = inout(reg) w => _,
            w_stride = in(reg) w_stride,
            w_step = in(reg) w_stride * AMX_PAIRS,
            blocks = inout(reg) blocks => _,
            out("tmm0") _, out("tmm4") _, out("tmm5") _,
            options(nostack),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_one_line_with_rows_and_bytes_in_their_places() {
        let configuration = Configuration::new(5);
        assert_eq!(size_of::<Configuration>(), 64);
        assert_eq!(std::mem::offset_of!(Configuration, row_bytes), 16);
        assert_eq!(std::mem::offset_of!(Configuration, rows), 48);
        assert_eq!((configuration.palette, configuration.rows[4], configuration.rows[5]), (1, 5, 16));
    }

    #[test]
    fn only_rows_at_one_distance_are_loaded_in_place() {
        let memory = [bf16::ZERO; 64];
        let at = |i: usize| memory[i..].as_ptr();
        assert_eq!(even_stride(&[at(8)]), Some(0));
        assert_eq!(even_stride(&[at(0), at(8), at(16)]), Some(16));
        assert_eq!(even_stride(&[at(0), at(8), at(8)]), None);
        assert_eq!(even_stride(&[at(3), at(3)]), Some(0));
    }
}
