//! Collectives over a backend's buffers.

use crate::backend::{Backend, HostSlice};
use crate::collective::Collective;
pub use crate::collective::connect::Communicators;
use model::fault::{Fault, FaultKind};
use std::ops::Range;

/// The f32 rows of a Full buffer.
pub fn full<'a, B: Backend>(
    backend: &'a mut B,
    buffer: &'a mut B::Buffer,
    rows: usize,
) -> Result<&'a mut [f32], Fault> {
    match backend.host(buffer, rows)? {
        HostSlice::F32(values) => Ok(values),
        HostSlice::Bf16(_) => Err(Fault::new(FaultKind::Internal, "a bf16 buffer where an f32 one belongs")),
    }
}

/// The rows of any buffer, as bytes.
pub fn bytes<'a, B: Backend>(
    backend: &'a mut B,
    buffer: &'a mut B::Buffer,
    rows: usize,
) -> Result<&'a mut [u8], Fault> {
    Ok(match backend.host(buffer, rows)? {
        HostSlice::F32(values) => bytemuck::cast_slice_mut(values),
        HostSlice::Bf16(values) => bytemuck::cast_slice_mut(values),
    })
}

/// Sums the first `rows` rows of a Full buffer over all members.
pub fn sum<B: Backend>(
    backend: &mut B,
    members: &mut dyn Collective,
    buffer: &mut B::Buffer,
    rows: usize,
) -> Result<(), Fault> {
    if members.size() == 1 || rows == 0 {
        return Ok(());
    }
    members.sum(full(backend, buffer, rows)?)?;
    backend.host_done(buffer, rows)
}

/// The same over the aligned run `part` of the members, of which this rank is one. The length is the same on the
/// members of the part, not on others, but all members call it together.
pub fn sum_part<B: Backend>(
    backend: &mut B,
    members: &mut dyn Collective,
    part: Range<usize>,
    buffer: &mut B::Buffer,
    rows: usize,
) -> Result<(), Fault> {
    if part.len() == members.size() {
        return sum(backend, members, buffer, rows);
    }
    if part.len() == 1 {
        return Ok(());
    }
    assert!(part.contains(&members.rank()) && part.len().is_power_of_two());
    let values = full(backend, buffer, rows)?;
    let mine: &[u8] = bytemuck::cast_slice(values);
    let parts: Vec<Vec<u8>> =
        (0..members.size()).map(|r| if part.contains(&r) { mine.to_vec() } else { Vec::new() }).collect();
    let mut received = Vec::new();
    members.exchange(&parts, &mut received)?;
    let terms: Vec<Vec<f32>> = received[part].iter().map(|bytes| bytemuck::pod_collect_to_vec(bytes)).collect();
    if let Some(odd) = terms.iter().find(|t| t.len() != values.len()) {
        let (one, two) = (values.len(), odd.len());
        return Err(Fault::new(FaultKind::Diverged, format!("ranks sum {one} and {two} values of expert outputs")));
    }
    for (i, v) in values.iter_mut().enumerate() {
        *v = tree(&terms, i);
    }
    backend.host_done(buffer, rows)
}

/// The balanced sum of the terms' `i`th values; a power of two of terms.
fn tree(terms: &[Vec<f32>], i: usize) -> f32 {
    match terms {
        [one] => one[i],
        _ => {
            let (left, right) = terms.split_at(terms.len() / 2);
            tree(left, i) + tree(right, i)
        }
    }
}
