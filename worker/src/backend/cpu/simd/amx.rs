//! Intel's tiles: 16 rows of activations times 32 inputs times 16 outputs an instruction.
//!
//! A part of a panel is multiplied by one asm block that loads the accumulators, runs over all whole blocks of 32 inputs and
//! stores the accumulators, so that no tile lives where the compiler can see it. A packed panel already is a column of B
//! tiles (16 pair-rows of 16 words each).

use super::lanes::LANES;
use super::pack::PANEL;
use super::panel::{AMX_PAIRS, AMX_ROWS as ROWS, CHUNK, even_stride};
use half::bf16;
use std::arch::asm;
use std::cell::Cell;
use std::sync::OnceLock;

/// Bytes of a full panel's block that one turn over half of its columns asks for.
const AHEAD: usize = AMX_PAIRS * PANEL * size_of::<u32>() / 4;
/// Inputs of a whole block.
pub const BLOCK: usize = 2 * AMX_PAIRS;

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

/// What tiles hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// Accumulators 0 to 3 and activations 4 have `rows` rows, weights 5 to 7 `pairs` pairs.
    Panel { rows: usize, pairs: usize },
    /// Accumulators 0 and 1 and activations 4 have all rows, accumulators 2 and 3 and activations 5 `lower` ones, weights 6 and 7
    /// whole blocks.
    Square { lower: usize },
}

/// `LDTILECFG`'s operand.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Configuration {
    fn new(shape: Shape) -> Configuration {
        let (upper, lower, fifth, pairs) = match shape {
            Shape::Panel { rows, pairs } => (rows, rows, pairs, pairs),
            Shape::Square { lower } => (ROWS, lower, lower, AMX_PAIRS),
        };
        let (mut row_bytes, mut rows) = ([0u16; 16], [0u8; 16]);
        for (tile, each) in [upper, upper, lower, lower, upper, fifth, pairs, pairs].into_iter().enumerate() {
            row_bytes[tile] = if tile == 4 { 4 * pairs as u16 } else { 64 };
            rows[tile] = each as u8;
        }
        Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
    }
}

/// Runs over blocks: a tile of activations meets one of weights for each accumulator (with the tile that holds the weights). Four
/// are a full panel.
macro_rules! products {
    ($(($sum:literal, $weights:literal)),+) => {
        concat!(
            "2:\n tileloadd tmm4, [{x} + {x_stride}*1]\n",
            $(
                "tileloadd tmm", $weights, ", [{w} + {w_stride}*1 + 64*", $sum, "]\n",
                "tdpbf16ps tmm", $sum, ", tmm4, tmm", $weights, "\n",
            )+
            "add {x}, {x_step}\n add {w}, {w_step}\n dec {block}\n jnz 2b",
        )
    };
}

/// The sums of runs of blocks from zero, in as many accumulators as are named (see [`products`]).
macro_rules! sums {
    ($x:ident, $w:ident, $extent:ident, $out:ident, $(($sum:literal, $weights:literal)),+) => {
        asm!(
            "3:",
            "mov {block}, {blocks}",
            $(concat!("tilezero tmm", $sum),)+
            products!($(($sum, $weights)),+),
            $(concat!("tilestored [{out} + {out_stride}*1 + 64*", $sum, "], tmm", $sum),)+
            "add {out}, {out_step}",
            "dec {runs}",
            "jnz 3b",
            block = out(reg) _,
            blocks = in(reg) $extent.1,
            x = inout(reg) $x.0 => _,
            x_stride = in(reg) $x.1,
            x_step = in(reg) 4 * $extent.2,
            w = inout(reg) $w.0 => _,
            w_stride = in(reg) $w.1,
            w_step = in(reg) $w.1 * $extent.2,
            out = inout(reg) $out => _,
            out_stride = in(reg) PANEL * 4,
            out_step = const ROWS * PANEL * 4,
            runs = inout(reg) $extent.0 => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _,
            options(nostack),
        )
    };
}

/// The shape that a task's tiles have; they are released with it.
#[derive(Default)]
pub struct Tiles(Cell<Option<Shape>>);

impl Tiles {
    /// # Safety
    /// [`available`] said yes.
    #[inline(always)]
    unsafe fn shape(&self, shape: Shape) {
        // Where all are full both say the same.
        let shape = if shape == (Shape::Square { lower: ROWS }) { FULL } else { shape };
        if self.0.replace(Some(shape)) != Some(shape) {
            let configuration = Configuration::new(shape);
            // SAFETY: a whole configuration. No tile's contents outlive one asm block, so what it clears is not missed.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) &configuration, options(nostack, readonly));
            }
        }
    }
}

const FULL: Shape = Shape::Panel { rows: ROWS, pairs: AMX_PAIRS };

impl Drop for Tiles {
    fn drop(&mut self) {
        if self.0.get().is_some() {
            // SAFETY: tiles were configured, so they are available.
            unsafe { asm!("tilerelease", options(nostack, nomem)) };
        }
    }
}

/// Adds the products of `pairs` pairs (a last one lone, where `lone`) to the accumulators of all rows.
///
/// # Safety
/// [`available`] said yes; `x` rows, at one distance, hold the inputs from `at`; `w` points at the pair-rows of `width` words, zeros up
/// to a whole block; `acc` is `[x.len()][PANEL]`; at most [`CHUNK`] pairs.
pub unsafe fn accumulate(
    tiles: &Tiles,
    x: &[*const bf16],
    at: usize,
    (pairs, lone): (usize, bool),
    (w, width): (*const u32, usize),
    acc: *mut f32,
) {
    let inputs = 2 * pairs + usize::from(lone);
    let (blocks, rest) = (inputs / BLOCK, inputs % BLOCK);
    debug_assert!(inputs <= 2 * CHUNK);
    let stride = stride(x);
    let mut first = 0;
    while first < x.len() {
        let rows = &x[first..x.len().min(first + 2 * ROWS)];
        if rows.len() > ROWS && width == PANEL && rest == 0 {
            let turn = first / (2 * ROWS);
            for half in 0..2 {
                // The next weights, a quarter of as many for each half of each turn over the same ones.
                let ahead = w.wrapping_add((4 * blocks + (2 * turn + half) % 4 * blocks) * (AHEAD / 4));
                let (lower, lane) = (rows.len() - ROWS, half * 2 * LANES);
                // SAFETY: the caller's promises, two tiles of rows at a time.
                unsafe {
                    let acc = acc.add(first * PANEL + lane);
                    square(tiles, (rows[0].add(at), stride, lower), (w.add(lane), blocks), (acc, PANEL, false), ahead);
                }
            }
            first += rows.len();
            continue;
        }
        let rows = &rows[..rows.len().min(ROWS)];
        // SAFETY: the caller's promises, a tile of rows at a time.
        unsafe {
            tiles.shape(Shape::Panel { rows: rows.len(), pairs: AMX_PAIRS });
            let acc = acc.add(first * PANEL);
            if blocks > 0 {
                panel(rows[0].add(at), stride, w, width, blocks, acc);
            }
            if rest > 0 {
                let mut copy = [bf16::ZERO; ROWS * BLOCK];
                for (row, x) in rows.iter().enumerate() {
                    let to = copy.as_mut_ptr().add(row * BLOCK);
                    std::ptr::copy_nonoverlapping(x.add(at + blocks * BLOCK), to, rest);
                }
                let w = w.add(blocks * AMX_PAIRS * width);
                panel(copy.as_ptr(), BLOCK * size_of::<bf16>(), w, width, 1, acc);
            }
        }
        first += ROWS;
    }
}

/// The distance of a task's rows, in bytes.
#[inline(always)]
fn stride(x: &[*const bf16]) -> usize {
    debug_assert!(even_stride(x).is_some(), "rows at several distances");
    x.get(1).map_or(0, |second| (*second as usize).wrapping_sub(x[0] as usize))
}

/// The sums of `runs` runs of `pairs` pairs each, from zero: `[run][ROWS][PANEL]`, of which rows of `x` and outputs of the
/// panel are written.
///
/// # Safety
/// As [`accumulate`]; `x` has at most [`ROWS`] rows; a run is at most one block or whole blocks, all together at most
/// [`CHUNK`] pairs; `out` holds the sums.
#[inline(always)]
pub unsafe fn sums(
    tiles: &Tiles,
    x: &[*const bf16],
    at: usize,
    (runs, pairs): (usize, usize),
    (w, width): (*const u32, usize),
    out: *mut f32,
) {
    debug_assert!(runs * pairs <= CHUNK && (pairs <= AMX_PAIRS || pairs.is_multiple_of(AMX_PAIRS)));
    let block = pairs.min(AMX_PAIRS);
    let extent = (runs, pairs / block, block);
    // SAFETY: the caller's promises.
    unsafe {
        tiles.shape(Shape::Panel { rows: x.len(), pairs: block });
        let x = (x[0].add(at), stride(x));
        if width == PANEL {
            return four_sums(x, w, extent, out);
        }
        let mut lane = 0;
        while width - lane >= 2 * LANES {
            two_sums(x, (w.add(lane), width * 4), extent, out.add(lane));
            lane += 2 * LANES;
        }
        if lane < width {
            one_sum(x, (w.add(lane), width * 4), extent, out.add(lane));
        }
    }
}

/// Adds one block of at most [`AMX_PAIRS`] pairs, of which no more is read: `w` may be anything behind.
///
/// # Safety
/// As [`sums`]; `acc` holds sums.
#[inline(always)]
pub unsafe fn add_block(
    tiles: &Tiles,
    x: &[*const bf16],
    at: usize,
    pairs: usize,
    (w, width): (*const u32, usize),
    acc: *mut f32,
) {
    debug_assert!(pairs <= AMX_PAIRS);
    // SAFETY: the caller's promises.
    unsafe {
        tiles.shape(Shape::Panel { rows: x.len(), pairs });
        for lane in (0..width).step_by(LANES) {
            one(x[0].add(at), stride(x), w.add(lane), width * 4, 1, acc.add(lane));
        }
    }
}

/// Rows of activations, and their distance in bytes.
type Rows = (*const bf16, usize);
/// Columns of weights, and the distance of their pair-rows in bytes.
type Columns = (*const u32, usize);
/// Runs, blocks of each, and pairs of a block.
type Extent = (usize, usize, usize);

#[inline(always)]
unsafe fn four_sums(x: Rows, w: *const u32, extent: Extent, out: *mut f32) {
    let w = (w, PANEL * 4);
    // SAFETY: as in `four`.
    unsafe { sums!(x, w, extent, out, (0, 5), (1, 6), (2, 5), (3, 6)) };
}

/// Two columns of tiles, whose sums do not wait for each other.
unsafe fn two_sums(x: Rows, w: Columns, extent: Extent, out: *mut f32) {
    // SAFETY: as in `four`.
    unsafe { sums!(x, w, extent, out, (0, 5), (1, 6)) };
}

unsafe fn one_sum(x: Rows, w: Columns, extent: Extent, out: *mut f32) {
    // SAFETY: as in `four`.
    unsafe { sums!(x, w, extent, out, (0, 5)) };
}

/// All outputs of a panel: four tiles of accumulators at once where it is full, else one by one.
unsafe fn panel(x: *const bf16, x_stride: usize, w: *const u32, width: usize, blocks: usize, acc: *mut f32) {
    unsafe {
        if width == PANEL {
            return four(x, x_stride, w, blocks, acc);
        }
        for lane in (0..width).step_by(LANES) {
            one(x, x_stride, w.add(lane), width * 4, blocks, acc.add(lane));
        }
    }
}

/// Two tiles of rows (their start, distance in bytes, and how many the lower one has) times two columns of tiles of a full panel's
/// `blocks`, so that each tile that is loaded meets two. The sums begin with those of `acc`, or `fresh` from zero; its rows are
/// `width` apart. Meanwhile what is `ahead` comes nearer, [`AHEAD`] bytes a block: hardware does not foresee what tiles load.
///
/// # Safety
/// [`available`] said yes; everything holds what it names.
#[inline(always)]
pub unsafe fn square(
    tiles: &Tiles,
    (x, x_stride, lower): (*const bf16, usize, usize),
    (w, blocks): (*const u32, usize),
    (acc, width, fresh): (*mut f32, usize, bool),
    ahead: *const u32,
) {
    // SAFETY: tiles are configured for what is loaded, and named as clobbers.
    unsafe {
        tiles.shape(Shape::Square { lower });
        asm!(
            "test {fresh:e}, {fresh:e}",
            "jnz 3f",
            "tileloadd tmm0, [{acc} + {width}*1]",
            "tileloadd tmm1, [{acc} + {width}*1 + 64]",
            "tileloadd tmm2, [{lower} + {width}*1]",
            "tileloadd tmm3, [{lower} + {width}*1 + 64]",
            "jmp 2f",
            "3:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{x} + {x_stride}*1]",
            "tileloadd tmm6, [{w} + {w_stride}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{y} + {x_stride}*1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tileloadd tmm7, [{w} + {w_stride}*1 + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "prefetcht1 [{ahead}]",
            "prefetcht1 [{ahead} + 64]",
            "prefetcht1 [{ahead} + 128]",
            "prefetcht1 [{ahead} + 192]",
            "prefetcht1 [{ahead} + 256]",
            "prefetcht1 [{ahead} + 320]",
            "prefetcht1 [{ahead} + 384]",
            "prefetcht1 [{ahead} + 448]",
            "prefetcht1 [{ahead} + 512]",
            "prefetcht1 [{ahead} + 576]",
            "prefetcht1 [{ahead} + 640]",
            "prefetcht1 [{ahead} + 704]",
            "prefetcht1 [{ahead} + 768]",
            "prefetcht1 [{ahead} + 832]",
            "prefetcht1 [{ahead} + 896]",
            "prefetcht1 [{ahead} + 960]",
            "add {x}, 64",
            "add {y}, 64",
            "add {w}, 4096",
            "add {ahead}, 1024",
            "dec {blocks}",
            "jnz 2b",
            "tilestored [{acc} + {width}*1], tmm0",
            "tilestored [{acc} + {width}*1 + 64], tmm1",
            "tilestored [{lower} + {width}*1], tmm2",
            "tilestored [{lower} + {width}*1 + 64], tmm3",
            acc = in(reg) acc,
            lower = in(reg) acc.add(ROWS * width),
            width = in(reg) width * 4,
            fresh = in(reg) u32::from(fresh),
            w_stride = in(reg) PANEL * 4,
            x = inout(reg) x => _,
            y = inout(reg) x.byte_add(ROWS * x_stride) => _,
            x_stride = in(reg) x_stride,
            w = inout(reg) w => _,
            ahead = inout(reg) ahead => _,
            blocks = inout(reg) blocks => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

unsafe fn four(x: *const bf16, x_stride: usize, w: *const u32, blocks: usize, acc: *mut f32) {
    // SAFETY: tiles are configured for what is loaded, and named as clobbers.
    unsafe {
        asm!(
            "tileloadd tmm0, [{acc} + {w_stride}*1]",
            "tileloadd tmm1, [{acc} + {w_stride}*1 + 64]",
            "tileloadd tmm2, [{acc} + {w_stride}*1 + 128]",
            "tileloadd tmm3, [{acc} + {w_stride}*1 + 192]",
            products!((0, 5), (1, 6), (2, 5), (3, 6)),
            "tilestored [{acc} + {w_stride}*1], tmm0",
            "tilestored [{acc} + {w_stride}*1 + 64], tmm1",
            "tilestored [{acc} + {w_stride}*1 + 128], tmm2",
            "tilestored [{acc} + {w_stride}*1 + 192], tmm3",
            acc = in(reg) acc,
            // A full panel's pair-rows are as wide as a row of accumulators.
            w_stride = in(reg) PANEL * 4,
            x = inout(reg) x => _,
            x_stride = in(reg) x_stride,
            x_step = const 2 * BLOCK,
            w = inout(reg) w => _,
            w_step = const AMX_PAIRS * PANEL * 4,
            block = inout(reg) blocks => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _,
            options(nostack),
        );
    }
}

unsafe fn one(x: *const bf16, x_stride: usize, w: *const u32, w_stride: usize, blocks: usize, acc: *mut f32) {
    // SAFETY: as in `four`.
    unsafe {
        asm!(
            "tileloadd tmm0, [{acc} + {acc_stride}*1]",
            products!((0, 5)),
            "tilestored [{acc} + {acc_stride}*1], tmm0",
            acc = in(reg) acc,
            acc_stride = in(reg) PANEL * 4,
            x = inout(reg) x => _,
            x_stride = in(reg) x_stride,
            x_step = const 2 * BLOCK,
            w = inout(reg) w => _,
            w_stride = in(reg) w_stride,
            w_step = in(reg) w_stride * AMX_PAIRS,
            block = inout(reg) blocks => _,
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
        let configuration = Configuration::new(Shape::Panel { rows: 5, pairs: 8 });
        assert_eq!(size_of::<Configuration>(), 64);
        assert_eq!(std::mem::offset_of!(Configuration, row_bytes), 16);
        assert_eq!(std::mem::offset_of!(Configuration, rows), 48);
        assert_eq!((configuration.palette, configuration.rows[4], configuration.rows[5]), (1, 5, 8));
        assert_eq!((configuration.row_bytes[0], configuration.row_bytes[4], configuration.row_bytes[5]), (64, 32, 64));
        let configuration = Configuration::new(Shape::Square { lower: 3 });
        assert_eq!(configuration.rows[..8], [16, 16, 3, 3, 16, 3, 16, 16]);
    }
}
