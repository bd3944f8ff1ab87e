//! Multiplications whose outputs meet in an activation, where that saves a pass over memory.

use super::buffer::{Buffer, Data, ensure, wrong};
use super::simd::activations::{Activate, ClampedSwiglu, GeluTanh, Silu};
use super::simd::gated::{Joined, in_panels};
use super::simd::panel::Source;
use super::{CpuBackend, Matrix, Vector};
use crate::backend::Grouping;
use model::fault::Fault;
use model::spec::Activation;

/// Runs `$body` with `$activation` bound to the kernel of what `$of` names.
macro_rules! with_kernel {
    ($of:expr, $activation:ident => $body:expr) => {
        match $of {
            Activation::Silu => {
                let $activation = Silu;
                $body
            }
            Activation::GeluTanh => {
                let $activation = GeluTanh;
                $body
            }
            Activation::ClampedSwiglu { alpha, limit } => {
                let $activation = ClampedSwiglu { alpha, limit };
                $body
            }
        }
    };
}

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
        with_kernel!(activation, kernel => match (self.input(x)?, &mut out.data) {
            (Data::F32(x), Data::F32(out)) => self.join(kernel, |j| j.multiply(source(x, w.cols), (w, bias), n, out)),
            (Data::Bf16(x), Data::Bf16(out)) => self.join(kernel, |j| j.multiply(source(x, w.cols), (w, bias), n, out)),
            _ => return Err(wrong("operands of different dtypes")),
        });
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
        self.check_experts(x, w, grouping, Some(&grouping.rows), (rows, cols))?;
        out.check(grouping.rows.len())?;
        let (offsets, active) = (&grouping.offsets[..], &self.scratch.active[..]);
        let picks = Some(&grouping.rows[..]);
        with_kernel!(activation, kernel => match (self.input(x)?, &mut out.data) {
            (Data::F32(x), Data::F32(out)) => {
                let x = Source { picks, ..source(x, cols) };
                self.join(kernel, |j| j.multiply_experts(x, w, (offsets, active), out));
            }
            (Data::Bf16(x), Data::Bf16(out)) => {
                let x = Source { picks, ..source(x, cols) };
                self.join(kernel, |j| j.multiply_experts(x, w, (offsets, active), out));
            }
            _ => return Err(wrong("operands of different dtypes")),
        });
        Ok(true)
    }

    fn join<A: Activate + Sync>(&self, activation: A, with: impl FnOnce(Joined<'_, A>)) {
        with(Joined { pool: &self.pool, level: self.level, family: self.family, activation });
    }
}

fn source<T>(values: &[T], cols: usize) -> Source<'_, T> {
    Source { values, start: 0, stride: cols, picks: None }
}
