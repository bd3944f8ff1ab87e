//! A task's sums over segments where there are tiles: square by square, so that what waits in the tree stays in the first cache, and
//! each segment's sums begin in the tiles instead of in memory.
//!
//! ```text
//! task, 64 rows x a panel     square of 32 rows x 32 outputs: per segment its sums from zero, joined with what waits: 4 KiB each
//!                             rest of up to 16 rows x a panel: all segments' sums, then the tree
//! ```

use super::amx::{self, BLOCK};
use super::lanes::{LANES, Lanes};
use super::pack::PANEL;
use super::panel::{AMX_PAIRS, AMX_ROWS, CHUNK, PENDING, Task, join};
use half::bf16;
use model::cut::SEGMENTS_MAX;
use model::plan::KernelFamily;
use std::mem::MaybeUninit;

/// Rows and outputs of a square.
const SIDE: usize = 2 * AMX_ROWS;

/// Writes the sums of a task over all segments to `out`, `[rows][PANEL]`, if it is one for tiles; else says no.
///
/// # Safety
/// As [`Task::run`]; `out` has the room.
#[inline(always)]
pub unsafe fn sums<L: Lanes>(task: &Task<'_, bf16>, out: *mut f32) -> bool {
    let (w, length) = (task.w, task.w.cols / task.w.segments);
    // Longer segments are worth a store.
    let fits = (2..=SEGMENTS_MAX).contains(&w.segments) && length.is_multiple_of(BLOCK) && w.pairs <= CHUNK;
    if !L::TILES || task.family != KernelFamily::Amx || !fits || w.width(task.panel) != PANEL {
        return false;
    }
    let from = w.words[w.panel_start(task.panel)..][..w.segments * w.pairs * PANEL].as_ptr();
    let mut first = 0;
    while first < task.x.len() {
        let rows = &task.x[first..task.x.len().min(first + SIDE)];
        // SAFETY: the caller's promises, a square's rows at a time.
        unsafe {
            let out = out.add(first * PANEL);
            if rows.len() > AMX_ROWS {
                for half in 0..2 {
                    let turn = first / SIDE * 2 + half;
                    square::<L>(task, rows, (from.add(half * SIDE), turn), out.add(half * SIDE));
                }
            } else {
                band::<L>(task, rows, from, out);
            }
        }
        first += rows.len();
    }
    true
}

/// A square of more than [`AMX_ROWS`] rows; `turn` counts those over the same panel.
#[inline(always)]
unsafe fn square<L: Lanes>(task: &Task<'_, bf16>, rows: &[*const bf16], (w, turn): (*const u32, usize), out: *mut f32) {
    let Task { w: packed, ref tiles, .. } = *task;
    let (segments, pairs) = (packed.segments, packed.pairs);
    let (blocks, lower) = (pairs / AMX_PAIRS, rows.len() - AMX_ROWS);
    let x_stride = (rows[1] as usize).wrapping_sub(rows[0] as usize);
    // The next panel, a quarter for each square.
    let whole = segments * pairs * PANEL;
    let next = w.wrapping_add(whole + turn % 4 * (whole / 4));
    let mut waiting = MaybeUninit::<[f32; PENDING * SIDE * SIDE]>::uninit();
    let waiting = waiting.as_mut_ptr().cast::<f32>();
    let mut depth = 0;
    for segment in 0..segments {
        // SAFETY: the caller's promises; at most PENDING sums wait.
        unsafe {
            let x = (rows[0].add(segment * 2 * pairs), x_stride, lower);
            let from = (w.add(segment * pairs * PANEL), blocks);
            let own = waiting.add(depth * SIDE * SIDE);
            amx::square(tiles, x, from, (own, SIDE, true), next.wrapping_add(segment * pairs * PANEL / 4));
            depth += 1;
            let mut joined = segment + 1;
            while joined % 2 == 0 {
                let a = waiting.add((depth - 2) * SIDE * SIDE);
                join::<L>(a, a.add(SIDE * SIDE), rows.len() * SIDE);
                depth -= 1;
                joined /= 2;
            }
        }
    }
    for row in 0..rows.len() {
        for lane in (0..SIDE).step_by(LANES) {
            // SAFETY: the first sum is complete, `out` has the rows.
            unsafe { L::store(out.add(row * PANEL + lane), L::load(waiting.add(row * SIDE + lane))) };
        }
    }
}

/// At most [`AMX_ROWS`] rows.
#[inline(always)]
unsafe fn band<L: Lanes>(task: &Task<'_, bf16>, rows: &[*const bf16], w: *const u32, out: *mut f32) {
    const EACH: usize = AMX_ROWS * PANEL;
    let (segments, pairs) = (task.w.segments, task.w.pairs);
    let mut sums = MaybeUninit::<[f32; SEGMENTS_MAX * EACH]>::uninit();
    let sums = sums.as_mut_ptr().cast::<f32>();
    // SAFETY: the caller's promises; as many sums as segments.
    unsafe {
        let each = CHUNK / pairs;
        for first in (0..segments).step_by(each) {
            let runs = each.min(segments - first);
            let from = w.add(first * pairs * PANEL);
            amx::sums(&task.tiles, rows, first * 2 * pairs, (runs, pairs), (from, PANEL), sums.add(first * EACH));
        }
        let mut distance = 1;
        while distance < segments {
            for a in (0..segments).step_by(2 * distance) {
                join::<L>(sums.add(a * EACH), sums.add((a + distance) * EACH), rows.len() * PANEL);
            }
            distance *= 2;
        }
        std::ptr::copy_nonoverlapping(sums, out, rows.len() * PANEL);
    }
}
