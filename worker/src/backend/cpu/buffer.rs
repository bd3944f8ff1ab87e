//! Memory of one dtype: activations and caches.

use super::simd::aligned::Aligned;
use crate::backend::contract::{ensure, wrong};
use half::bf16;
use model::fault::Fault;
use model::quant::Dtype;

/// Values of a dtype known at run time.
pub enum Data {
    F32(Aligned<f32>),
    Bf16(Aligned<bf16>),
}

impl Data {
    pub fn zeroed(dtype: Dtype, len: usize) -> Result<Data, Fault> {
        Ok(match dtype {
            Dtype::F32 => Data::F32(Aligned::zeroed(len)?),
            Dtype::Bf16 => Data::Bf16(Aligned::zeroed(len)?),
        })
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Data::F32(v) => v.len(),
            Data::Bf16(v) => v.len(),
        }
    }

    /// Makes room for `len` values, whose contents are lost when it grows.
    pub fn reserve(&mut self, len: usize) -> Result<(), Fault> {
        if self.len() < len {
            let dtype = match self {
                Data::F32(_) => Dtype::F32,
                Data::Bf16(_) => Dtype::Bf16,
            };
            *self = Data::zeroed(dtype, len)?;
        }
        Ok(())
    }
}

/// `[rows, cols]` activations.
pub struct Buffer {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) data: Data,
}

impl Buffer {
    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The first `n` rows of a Full buffer.
    pub(super) fn full(&self, n: usize) -> Result<&[f32], Fault> {
        self.check(n)?;
        match &self.data {
            Data::F32(v) => Ok(&v[..n * self.cols]),
            Data::Bf16(_) => Err(wrong("a Full buffer is needed, an Input one was given")),
        }
    }

    pub(super) fn full_mut(&mut self, n: usize) -> Result<&mut [f32], Fault> {
        self.check(n)?;
        match &mut self.data {
            Data::F32(v) => Ok(&mut v[..n * self.cols]),
            Data::Bf16(_) => Err(wrong("a Full buffer is needed, an Input one was given")),
        }
    }

    pub(super) fn check(&self, n: usize) -> Result<(), Fault> {
        ensure(n <= self.rows, || format!("{n} rows asked of a buffer of {}", self.rows))
    }
}
