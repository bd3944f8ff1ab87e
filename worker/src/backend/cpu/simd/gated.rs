//! Gates and ups multiplied and joined before anything is written: what lies between stays near the core, where rows of both would go
//! to memory and back.
//!
//! ```text
//! task (panel of gates and that of its ups, up to 64 rows)     both products, side by side -> the activation -> 64 channels out
//! ```

use super::Level;
use super::activations::{Activate, Gated};
use super::chains::Tiles;
use super::pack::{PANEL, Packed};
use super::panel::{Input, Source, TASK_ROWS, Task, at_one_distance, by_expert, in_strips, strip_rows, task_rows};
use super::pool::Pool;
use super::shared::Shared;
use model::plan::KernelFamily;
use std::mem::MaybeUninit;
use std::ops::Range;

/// What all tasks of a product share.
#[derive(Clone, Copy)]
pub struct Joined<'a, A> {
    pub pool: &'a Pool,
    pub level: Level,
    pub family: KernelFamily,
    pub activation: A,
}

/// Whether each panel of such a matrix's gates has a panel of ups.
pub fn in_panels(w: &Packed) -> bool {
    w.rows > 0 && w.rows.is_multiple_of(2 * PANEL)
}

impl<A: Activate + Sync> Joined<'_, A> {
    /// `out[n, channels] = join(x gate^T, x up^T)`, `w` being `[gate | up]` in whole panels.
    pub fn multiply<T: Input>(self, x: Source<'_, T>, (w, bias): (&Packed, Option<&[f32]>), n: usize, out: &mut [T]) {
        let panels = w.rows / (2 * PANEL);
        // Two panels take the place of one beside the rows.
        let least = task_rows(self.family);
        let height = (strip_rows(self.family, w.cols) / 2 / least * least).max(least);
        let out = Shared::new(out);
        in_strips(self.pool, (n, height), panels, &|panel, rows| {
            // SAFETY: each task has its own panel and rows.
            unsafe { self.panels(x, (w, bias), panel, rows, &out) };
        });
    }

    /// `out[p] = join(x[p] gate[e]^T, x[p] up[e]^T)` for the pairs `offsets[e]..offsets[e + 1]` of each expert in `active`; matrices
    /// alike.
    pub fn multiply_experts<T: Input>(
        self,
        x: Source<'_, T>,
        w: &[impl AsRef<Packed> + Sync],
        (offsets, active): (&[u32], &[u32]),
        out: &mut [T],
    ) {
        let Some(&first) = active.first() else { return };
        let all = w[first as usize].as_ref().rows / (2 * PANEL);
        let out = Shared::new(out);
        by_expert(self.pool, (offsets, active), all, x.picks.is_some(), &|expert, panels, pairs| {
            // SAFETY: each task has its own panels of its own expert's pairs.
            unsafe { self.panels(x, (w[expert].as_ref(), None), panels, pairs, &out) };
        });
    }

    /// Some panels of channels of `rows` of the result.
    ///
    /// # Safety
    /// No two calls at the same time write the same (panel, row).
    unsafe fn panels<T: Input>(
        self,
        x: Source<'_, T>,
        (w, bias): (&Packed, Option<&[f32]>),
        panels: Range<usize>,
        rows: Range<usize>,
        out: &Shared<'_, T>,
    ) {
        assert!(in_panels(w) && bias.is_none_or(|b| b.len() == w.rows));
        assert!(!w.wide || size_of::<T>() == 4, "f32 weights need f32 inputs");
        let (level, family, once) = (self.level, self.family, rows.len() <= TASK_ROWS);
        let mut pointers = [std::ptr::null(); TASK_ROWS];
        for first in rows.clone().step_by(task_rows(family)) {
            let some = x.rows(first..rows.end.min(first + task_rows(family)), w.cols, &mut pointers);
            let run = |x: &[*const T]| {
                for panel in panels.clone() {
                    let mut between = MaybeUninit::<[f32; TASK_ROWS * 2 * PANEL]>::uninit();
                    let between = between.as_mut_ptr().cast::<f32>();
                    for half in 0..2 {
                        let of = panel + half * (w.rows / (2 * PANEL));
                        // SAFETY: there is room for two panels of each row.
                        let out = unsafe { between.add(half * PANEL) };
                        let tiles = Tiles::default();
                        let place = (out, 2 * PANEL);
                        level.run(Task { w, panel: of, family, x, bias, place, once, tiles });
                    }
                    for row in 0..x.len() {
                        // SAFETY: both products wrote their half of the row; the part is this call's own.
                        let (both, out) = unsafe {
                            let both = std::slice::from_raw_parts(between.add(row * 2 * PANEL), 2 * PANEL);
                            (both, out.part((first + row) * (w.rows / 2) + panel * PANEL, PANEL))
                        };
                        let (gate, up) = both.split_at(PANEL);
                        level.run(Gated { activation: self.activation, gate, up, out });
                    }
                }
            };
            if x.picks.is_some() && level.has_tiles() && family == KernelFamily::Amx {
                at_one_distance(some, w.cols, run);
            } else {
                run(some);
            }
        }
    }
}
