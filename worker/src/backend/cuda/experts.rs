//! Routing, multiplications by expert, and the way back.

use super::driver::{Address, Kernel};
use super::kernels::{
    CombineArgs, CopyArgs, MatmulArgs, PANEL, ROWS, RouteArgs, TENSOR_ROWS, TENSOR_STEP, TENSOR_THREADS, THREADS, Tile,
};
use super::scratch::{Parcel, Use};
use super::{Buffer, CudaBackend, Matrix, Vector, address};
use crate::backend::contract::{check_router, ensure};
use crate::backend::{Grouping, Routing};
use model::fault::Fault;
use model::plan::KernelFamily;
use model::quant::Dtype;
use model::spec::{Router, Score};

impl CudaBackend {
    pub(super) fn choose(
        &mut self,
        logits: &Buffer,
        router: &Router,
        active: usize,
        correction: Option<&Vector>,
        n: usize,
    ) -> Result<Routing, Fault> {
        let experts = logits.cols;
        // Scores of all are in shared memory.
        check_router(router, experts, active, correction.map(|c| c.len))?;
        let (groups, kept) = router.groups.map_or((0, 0), |of| (of.count, of.kept));
        let logits = logits.full(n)?;
        let ids = self.scratch.room(Use::Answers, n * active * 8)?;
        let weights = ids + (n * active * 4) as u64;
        let args = RouteArgs {
            logits,
            correction: address(correction),
            ids,
            weights,
            n: n as u32,
            experts: experts as u32,
            active: active as u32,
            softmax: u32::from(router.score == Score::Softmax),
            groups: groups as u32,
            kept: kept as u32,
            renormalise: u32::from(router.renormalise),
            eps: router.renormalise_eps,
            scale: router.scale,
        };
        let shared = (3 * experts + 2 * groups) * 4;
        self.device.driver.launch(self.device.kernels.route, [n, 1, 1], 32, shared, &args)?;
        let mut answer = vec![0u32; 2 * n * active];
        self.device.driver.download(ids, &mut answer)?;
        let weights = answer[n * active..].iter().map(|bits| f32::from_bits(*bits)).collect();
        answer.truncate(n * active);
        Ok(Routing { active, ids: answer, weights })
    }

    /// The addresses of some weights' descriptors, on the device until the next op.
    pub(super) fn weights_of(&mut self, w: &[Matrix]) -> Result<Address, Fault> {
        let mut parcel = Parcel::default();
        let many = parcel.add(&w.iter().map(Matrix::descriptor).collect::<Vec<u64>>());
        Ok(self.scratch.send(&parcel)?(many))
    }

    /// The kernel that multiplies `n` rows with each of `w`, and how many of them a block takes. Its threads go with it. Runs
    /// of codes that are no whole steps of tensor cores are multiplied without, and so are weights of several forms.
    pub(super) fn product(&self, w: &[Matrix], n: usize) -> ((Kernel, usize), usize) {
        let (kernels, run) = (&self.device.kernels, w.first().and_then(Matrix::run));
        let fits = w.iter().all(|w| w.run() == run) && run.is_none_or(|run| run.is_multiple_of(TENSOR_STEP));
        if self.family == KernelFamily::Tensor && self.dtype == Dtype::Bf16 && fits {
            let many = usize::from(n > TENSOR_ROWS[0]);
            return ((kernels.tensor[usize::from(run.is_some())][many], TENSOR_THREADS), TENSOR_ROWS[many]);
        }
        ((kernels.matmul[self.which()], PANEL), ROWS)
    }

    pub(super) fn multiply(
        &self,
        (kernel, threads): (Kernel, usize),
        grid: [usize; 3],
        args: &MatmulArgs,
    ) -> Result<(), Fault> {
        self.device.driver.launch(kernel, grid, threads, 0, args)
    }

    /// A grouped multiplication; `picked`: each pair's row of `x` is the one that it names, else its own.
    pub(super) fn experts(
        &mut self,
        x: &Buffer,
        w: &[Matrix],
        grouping: &Grouping,
        picked: bool,
        out: &Buffer,
    ) -> Result<(), Fault> {
        let (pairs, offsets) = (grouping.rows.len(), &grouping.offsets);
        grouping.check(w.len())?;
        let Some(one) = w.first() else { return Ok(()) };
        let (rows, cols) = (one.rows(), one.cols());
        ensure(w.iter().all(|m| (m.rows(), m.cols()) == (rows, cols)), || "experts differ in shape".into())?;
        ensure(x.cols == cols && out.cols == rows && x.dtype == self.dtype, || {
            format!("[{}] inputs, [{rows}, {cols}] weights, [{}] outputs", x.cols, out.cols)
        })?;
        let most = if picked { grouping.rows_read() } else { pairs };
        let (x, out) = (x.check(most)?, out.full(pairs)?);
        let largest = offsets.windows(2).map(|ends| ends[1].saturating_sub(ends[0])).max();
        let (kernel, each) = self.product(w, largest.unwrap_or(0) as usize);
        let mut tiles = Vec::new();
        let mut weights = Vec::new();
        for (expert, ends) in offsets.windows(2).enumerate().filter(|(_, ends)| ends[1] > ends[0]) {
            let weight = weights.len() as u32;
            weights.push(w[expert].descriptor());
            for first in (ends[0]..ends[1]).step_by(each) {
                tiles.push(Tile { weight, first, count: (ends[1] - first).min(each as u32) });
            }
        }
        let mut parcel = Parcel::default();
        let many = parcel.add(&weights);
        let words: Vec<u32> = tiles.iter().flat_map(|t| [t.weight, t.first, t.count]).collect();
        let (at, picks) = (parcel.add(&words), parcel.add(&grouping.rows));
        let sent = self.scratch.send(&parcel)?;
        let args = MatmulArgs {
            x,
            out,
            bias: 0,
            one: 0,
            many: sent(many),
            tiles: sent(at),
            picks: if picked { sent(picks) } else { 0 },
            n: pairs as u32,
            x_stride: cols as u32,
            x_step: 0,
            out_stride: rows as u32,
            out_step: 0,
        };
        self.multiply(kernel, [rows.div_ceil(PANEL), tiles.len(), 1], &args)
    }

    pub(super) fn weigh(&mut self, x: &Buffer, grouping: &Grouping, out: &Buffer) -> Result<(), Fault> {
        let (cols, pairs) = (x.cols, grouping.rows.len());
        ensure(out.cols == cols && grouping.weights.len() == pairs, || {
            format!("{} weights for {pairs} pairs, rows of {cols} into {}", grouping.weights.len(), out.cols)
        })?;
        ensure(x.dtype == self.dtype && out.dtype == self.dtype, || "operands of different dtypes".into())?;
        let x = x.check(grouping.rows_read())?;
        let out = out.check(pairs)?;
        let mut parcel = Parcel::default();
        let (rows, weights) = (parcel.add(&grouping.rows), parcel.add(&grouping.weights));
        let sent = self.scratch.send(&parcel)?;
        let (stride, values) = (cols as u32, pairs * cols);
        let args = CopyArgs {
            x,
            out,
            rows: sent(rows),
            weights: sent(weights),
            values: values as u64,
            cols: stride,
            x_stride: stride,
            out_stride: stride,
        };
        let grid = [values.div_ceil(THREADS), 1, 1];
        self.device.driver.launch(self.device.kernels.copy[self.which()], grid, THREADS, 0, &args)
    }

    pub(super) fn join(
        &mut self,
        pairs: &Buffer,
        grouping: &Grouping,
        segments: usize,
        n: usize,
        out: &Buffer,
    ) -> Result<(), Fault> {
        let (cols, offsets) = (out.cols, &grouping.offsets);
        let experts_each = grouping.check_sums(segments)?;
        ensure(pairs.cols == cols, || format!("pairs of {} in rows of {cols}", pairs.cols))?;
        self.index.fill(&grouping.rows, n)?;
        let (from, to) = (pairs.full(grouping.rows.len())?, out.full(n)?);
        let ends: Vec<u32> = (1..=segments).map(|s| offsets[s * experts_each]).collect();
        let mut parcel = Parcel::default();
        let (starts, of_row) = (parcel.add(&self.index.starts), parcel.add(&self.index.pairs));
        let (ends, weights) = (parcel.add(&ends), parcel.add(&grouping.weights));
        let sent = self.scratch.send(&parcel)?;
        let args = CombineArgs {
            pairs: from,
            out: to,
            starts: sent(starts),
            of_row: sent(of_row),
            ends: sent(ends),
            weights: sent(weights),
            cols: cols as u32,
            segments: segments as u32,
        };
        let grid = [cols.div_ceil(THREADS), n, 1];
        self.device.driver.launch(self.device.kernels.combine, grid, THREADS, 0, &args)
    }
}
