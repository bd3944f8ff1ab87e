//! What every part of a forward pass works with, and the pool of its activation buffers.

use super::comm::{self, Communicators};
use crate::backend::{Backend, Kind};
use model::fault::{Fault, FaultKind};

/// One forward pass over `rows` rows.
pub struct Pass<'a, B: Backend> {
    pub backend: &'a mut B,
    pub communicators: &'a mut Communicators,
    pub pool: &'a mut Pool<B>,
    pub meta: &'a B::Meta,
    pub rows: usize,
    /// Width of the residual stream.
    pub hidden: usize,
}

impl<B: Backend> Pass<'_, B> {
    /// A buffer of at least the pass's rows; its contents are what was left in it.
    pub fn take(&mut self, cols: usize, kind: Kind) -> Result<B::Buffer, Fault> {
        self.pool.take(self.backend, self.rows, cols, kind)
    }

    pub fn give(&mut self, cols: usize, kind: Kind, buffer: B::Buffer) {
        self.pool.give(cols, kind, self.rows, buffer);
    }

    /// `x w^T` summed over the tensor ranks: what a `Rows`-cut matrix owes. Full, in a buffer from the pool.
    pub fn matmul_sum(&mut self, x: &B::Buffer, w: &B::Matrix, cols: usize) -> Result<B::Buffer, Fault> {
        let mut y = self.take(cols, Kind::Full)?;
        self.backend.matmul(x, w, None, self.rows, &mut y)?;
        comm::sum(self, &mut y, (self.rows, cols))?;
        Ok(y)
    }

    /// Puts the tensor ranks' `part`s of each row beside each other: `out` has all of their columns. Full.
    pub fn gather(&mut self, part: &mut B::Buffer, out: &mut B::Buffer, cols: usize) -> Result<(), Fault> {
        let (rows, ranks) = (self.rows, self.communicators.tensor.size());
        if ranks == 1 {
            std::mem::swap(part, out);
            return Ok(());
        }
        let (mut all, mine) = (Vec::new(), comm::bytes(self.backend, part, rows)?.to_vec());
        self.backend.host_done(part, rows)?;
        self.communicators.tensor.gather(&mine, &mut all)?;
        let (width, whole) = (mine.len() / rows, cols * size_of::<f32>());
        if all.iter().any(|part| part.len() != mine.len()) || width * ranks != whole {
            let lengths: Vec<usize> = all.iter().map(Vec::len).collect();
            let text = format!("ranks gathered {lengths:?} bytes, {rows} rows of {whole} were expected");
            return Err(Fault::new(FaultKind::Diverged, text));
        }
        let target = comm::bytes(self.backend, out, rows)?;
        for (row, target) in target.chunks_exact_mut(whole).enumerate() {
            for (part, target) in all.iter().zip(target.chunks_exact_mut(width)) {
                target.copy_from_slice(&part[row * width..(row + 1) * width]);
            }
        }
        self.backend.host_done(out, rows)
    }
}

/// Buffers between uses, by width and kind. A buffer's rows are a power of two, so that a pass that grows step by step
/// does not allocate at each.
pub struct Pool<B: Backend> {
    idle: Vec<Idle<B>>,
}

struct Idle<B: Backend> {
    rows: usize,
    cols: usize,
    kind: Kind,
    buffer: B::Buffer,
}

const ROWS_MIN: usize = 16;

impl<B: Backend> Default for Pool<B> {
    fn default() -> Pool<B> {
        Pool { idle: Vec::new() }
    }
}

impl<B: Backend> Pool<B> {
    pub fn take(&mut self, backend: &B, rows: usize, cols: usize, kind: Kind) -> Result<B::Buffer, Fault> {
        let rows = capacity(rows);
        let fits = |i: &Idle<B>| i.cols == cols && i.kind == kind;
        if let Some(at) = self.idle.iter().position(|i| fits(i) && i.rows == rows) {
            return Ok(self.idle.swap_remove(at).buffer);
        }
        backend.buffer(rows, cols, kind)
    }

    /// Takes a buffer back that was taken for so many rows.
    pub fn give(&mut self, cols: usize, kind: Kind, rows: usize, buffer: B::Buffer) {
        self.idle.push(Idle { rows: capacity(rows), cols, kind, buffer });
    }
}

fn capacity(rows: usize) -> usize {
    rows.next_power_of_two().max(ROWS_MIN)
}
