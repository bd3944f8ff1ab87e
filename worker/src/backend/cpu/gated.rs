//! Multiplications whose outputs meet in an activation, where that saves a pass over memory.

use super::buffer::{Buffer, Data};
use super::ops::{by_dtype, with_kernel};
use super::simd::activations::{Activate, ClampedSwiglu, GeluTanh, Silu};
use super::simd::gated::{Joined, in_panels};
use super::simd::panel::Source;
use super::{CpuBackend, Matrix, Vector};
use crate::backend::Grouping;
use crate::backend::contract::{ensure, wrong};
use model::fault::Fault;
use model::spec::Activation;

impl CpuBackend {
    /// `out = act(x gate^T, x up^T)` for `n` rows; whether it was done, or is better done in two steps.
    pub(super) fn gated(
        &self,
        x: &Buffer,
        (w, bias): (&Matrix, Option<&Vector>),
        activation: Activation,
        n: usize,
        out: &mut Buffer,
    ) -> Result<bool, Fault> {
        let w = &w.0;
        if w.rows != 2 * out.cols || !in_panels(w) {
            return Ok(false);
        }
        ensure(x.cols == w.cols, || format!("[{}] inputs, [{}, {}] weights", x.cols, w.rows, w.cols))?;
        ensure(bias.is_none_or(|b| b.0.len() == w.rows), || format!("{} outputs and another bias", w.rows))?;
        x.check(n)?;
        out.check(n)?;
        let bias = bias.map(|b| &b.0[..]);
        with_kernel!(activation, kernel => by_dtype!([x = self.input(x)?, out = &mut out.data] => {
            let x = Source { values: x, start: 0, stride: w.cols, picks: None };
            self.joined(kernel).multiply(x, (w, bias), n, out)
        }));
        Ok(true)
    }

    /// The same for the pairs of experts; their offsets are `active`'s.
    pub(super) fn gated_experts(
        &mut self,
        x: &Buffer,
        w: &[Matrix],
        grouping: &Grouping,
        activation: Activation,
        out: &mut Buffer,
    ) -> Result<bool, Fault> {
        let Some(first) = w.first() else { return Ok(false) };
        if first.0.rows != 2 * out.cols || !in_panels(&first.0) {
            return Ok(false);
        }
        let (rows, cols) = (first.0.rows, first.0.cols);
        self.check_experts(x, w, grouping, true, (rows, cols))?;
        out.check(grouping.rows.len())?;
        let (offsets, active) = (&grouping.offsets[..], &self.scratch.active[..]);
        with_kernel!(activation, kernel => by_dtype!([x = self.input(x)?, out = &mut out.data] => {
            let x = Source { values: x, start: 0, stride: cols, picks: Some(&grouping.rows) };
            self.joined(kernel).multiply_experts(x, w, (offsets, active), out)
        }));
        Ok(true)
    }

    fn joined<A: Activate + Sync>(&self, activation: A) -> Joined<'_, A> {
        Joined { pool: &self.pool, level: self.level, family: self.family, activation }
    }
}
