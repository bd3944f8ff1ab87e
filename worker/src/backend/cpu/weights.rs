//! Packed matrices, from windows of a checkpoint or from rearranged rows.

use super::simd::coded::Codes;
use super::simd::pack::{Packed, Rows, Widened};
use super::simd::pool::Pool;
use crate::backend::MatrixView;
use crate::backend::contract::ensure;
use crate::load::codes::{self, Group};
use crate::load::widen;
use model::fault::Fault;
use model::keep::{self, Stored};
use model::plan::KernelFamily;
use model::quant::{Dtype, Format, Scheme};
use std::sync::Arc;

/// A packed weight matrix `[out, in]`; clones share it.
#[derive(Clone)]
pub struct Matrix(pub(super) Arc<Packed>);

impl Matrix {
    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }

    pub fn rows(&self) -> usize {
        self.0.rows
    }

    pub fn cols(&self) -> usize {
        self.0.cols
    }
}

impl AsRef<Packed> for Matrix {
    fn as_ref(&self) -> &Packed {
        &self.0
    }
}

/// Windows stacked over each other.
struct Stack<'a> {
    parts: &'a [MatrixView<'a>],
}

impl Stack<'_> {
    fn find(&self, mut row: usize) -> (&MatrixView<'_>, usize) {
        for part in self.parts {
            if row < part.rows {
                return (part, row);
            }
            row -= part.rows;
        }
        unreachable!("the matrix has as many rows as its parts")
    }
}

impl Rows for Stack<'_> {
    fn read(&self, row: usize, out: &mut [f32]) {
        let (part, row) = self.find(row);
        widen::widen(part, row, out);
    }

    fn halves(&self, row: usize) -> Option<&[u8]> {
        let (part, row) = self.find(row);
        widen::halves(part, row)
    }
}

/// Stacked windows of one scheme, each read from the same place of its stored rows. Parts of different schemes are
/// widened.
struct CodedStack<'a> {
    stack: Stack<'a>,
    scheme: Scheme,
    first: usize,
}

impl<'a> CodedStack<'a> {
    fn new(parts: &'a [MatrixView<'a>]) -> Option<CodedStack<'a>> {
        let first = parts.first()?;
        let scheme = codes::scheme(first)?;
        let alike = parts.iter().all(|part| codes::scheme(part) == Some(scheme) && part.col == first.col);
        alike.then_some(CodedStack { stack: Stack { parts }, scheme, first: first.col })
    }
}

impl Codes for CodedStack<'_> {
    fn scheme(&self) -> Scheme {
        self.scheme
    }

    fn first(&self) -> usize {
        self.first
    }

    fn codes(&self, row: usize, out: &mut [u8]) {
        let (part, row) = self.stack.find(row);
        codes::codes(part, row, out);
    }

    fn groups(&self, row: usize, out: &mut [Group]) {
        let (part, row) = self.stack.find(row);
        codes::groups(part, row, out);
    }
}

pub(in crate::backend) fn pack(
    pool: &Pool,
    dtype: Dtype,
    family: KernelFamily,
    parts: &[MatrixView<'_>],
    segments: usize,
) -> Result<Matrix, Fault> {
    let cols = parts.first().map_or(0, |p| p.cols);
    ensure(cols > 0, || "a matrix without parts or columns".into())?;
    for part in parts {
        check(part, cols)?;
    }
    let rows = parts.iter().map(|p| p.rows).sum();
    let wide = keep::is_wide(dtype, parts.iter().map(codes::stored));
    if let Some(stack) = CodedStack::new(parts)
        && let Some(packed) = Packed::coded(pool, &stack, (rows, cols), segments, wide)?
    {
        return Ok(Matrix(Arc::new(packed)));
    }
    Packed::new(pool, &Stack { parts }, (rows, cols), segments, wide, keep::unit(family, wide))
        .map(|packed| Matrix(Arc::new(packed)))
}

pub(in crate::backend) fn pack_f32(
    pool: &Pool,
    dtype: Dtype,
    family: KernelFamily,
    values: &[f32],
    (rows, cols): (usize, usize),
    segments: usize,
) -> Result<Matrix, Fault> {
    ensure(values.len() == rows * cols && cols > 0, || format!("{} values are not {rows} x {cols}", values.len()))?;
    let wide = keep::is_wide(dtype, [Stored::Plain(Format::F32)]);
    Packed::new(pool, &Widened { values, cols }, (rows, cols), segments, wide, keep::unit(family, wide))
        .map(|packed| Matrix(Arc::new(packed)))
}

fn check(part: &MatrixView<'_>, cols: usize) -> Result<(), Fault> {
    ensure(part.cols == cols, || format!("parts of {} and {cols} columns can't be stacked", part.cols))?;
    if let Some(beside) = &part.beside {
        return ensure(beside.holds(part), || format!("a window of {} x {cols} leaves its tensors", part.rows));
    }
    let block = part.format.block();
    ensure(part.stored_cols.is_multiple_of(block) && (block == 1 || !part.transposed), || {
        format!("rows of {} values are not whole blocks of {:?}", part.stored_cols, part.format)
    })?;
    let last = part.rows.checked_sub(1).map_or(0, |row| part.stored_row(row) + 1);
    let (rows, cols) = if part.transposed { (part.col + part.cols, last) } else { (last, part.col + part.cols) };
    let inside = cols <= part.stored_cols
        && rows.checked_mul(part.format.bytes(part.stored_cols)).is_some_and(|n| n <= part.bytes.len());
    ensure(inside, || {
        format!("a window of {} x {} at {}, {} leaves its tensor", part.rows, part.cols, part.row, part.col)
    })
}
