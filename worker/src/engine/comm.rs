//! Collectives over a backend's buffers: by its devices, where they reach each other, or by the host.

use super::pass::Pass;
use crate::backend::contract::tree;
use crate::backend::{Backend, HostSlice, Kind};
pub use crate::collective::connect::Communicators;
use crate::collective::device::DeviceRows;
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

/// Sums the first `rows` rows of a Full buffer, `cols` wide, over the tensor ranks.
pub fn sum<B: Backend>(
    pass: &mut Pass<'_, B>,
    buffer: &mut B::Buffer,
    (rows, cols): (usize, usize),
) -> Result<(), Fault> {
    let size = pass.communicators.tensor.size();
    if size == 1 || rows == 0 {
        return Ok(());
    }
    if pass.communicators.devices.tensor.is_some() {
        return sum_on_devices(pass, 0..size, buffer, (rows, cols));
    }
    pass.communicators.tensor.sum(full(pass.backend, buffer, rows)?)?;
    pass.backend.host_done(buffer, rows)
}

/// The same over the aligned run `part` of the tensor ranks, of which this rank is one. The number of rows is the same on the
/// members of the part, not on others, but all tensor ranks call it together.
pub fn sum_part<B: Backend>(
    pass: &mut Pass<'_, B>,
    part: Range<usize>,
    buffer: &mut B::Buffer,
    (rows, cols): (usize, usize),
) -> Result<(), Fault> {
    let (me, size) = (pass.communicators.tensor.rank(), pass.communicators.tensor.size());
    if part.len() == size {
        return sum(pass, buffer, (rows, cols));
    }
    if part.len() == 1 {
        return Ok(());
    }
    assert!(part.contains(&me) && part.len().is_power_of_two());
    if pass.communicators.devices.tensor.is_some() {
        return sum_on_devices(pass, part, buffer, (rows, cols));
    }
    let values = full(pass.backend, buffer, rows)?;
    let mine: &[u8] = bytemuck::cast_slice(values);
    let parts: Vec<Vec<u8>> = (0..size).map(|r| if part.contains(&r) { mine.to_vec() } else { Vec::new() }).collect();
    let mut received = Vec::new();
    pass.communicators.tensor.exchange(&parts, &mut received)?;
    let terms: Vec<Vec<f32>> = received[part].iter().map(|bytes| bytemuck::pod_collect_to_vec(bytes)).collect();
    if let Some(odd) = terms.iter().find(|t| t.len() != values.len()) {
        let (one, two) = (values.len(), odd.len());
        return Err(Fault::new(FaultKind::Diverged, format!("ranks sum {one} and {two} values of expert outputs")));
    }
    let terms: Vec<&[f32]> = terms.iter().map(Vec::as_slice).collect();
    for (i, v) in values.iter_mut().enumerate() {
        *v = tree(&terms, i);
    }
    pass.backend.host_done(buffer, rows)
}

/// A sum of more bytes goes in slices, two short ways instead of one long one. Not measured: the order of size at which the
/// bytes of eight devices take longer than another start of a collective.
const WHOLE_MAX: usize = 1 << 20;

/// The same bits, by the devices: numbers travel as they are, and each device adds them in the canonical order. Ranks that send
/// each other unequal numbers of rows break the library's contract, which it finds or the members' deadline does.
fn sum_on_devices<B: Backend>(
    pass: &mut Pass<'_, B>,
    part: Range<usize>,
    buffer: &mut B::Buffer,
    (rows, cols): (usize, usize),
) -> Result<(), Fault> {
    let parts = part.len();
    let DeviceRows { at: mine, width } = on_device(pass.backend, buffer, rows)?;
    let members = pass.communicators.devices.tensor.as_deref_mut().expect("asked by the caller");
    let (me, size) = (members.rank(), members.size());
    let of = |ranges: &dyn Fn(usize) -> Range<usize>| -> Vec<Range<usize>> {
        (0..size).map(|rank| if part.contains(&rank) { ranges(rank - part.start) } else { 0..0 }).collect()
    };
    let bytes = rows * width;
    if parts == 2 || bytes <= WHOLE_MAX {
        let mut all = pass.pool.take(pass.backend, rows * parts, cols, Kind::Full)?;
        let to = on_device(pass.backend, &all, rows * parts)?.at;
        match parts == size {
            true => members.gather(mine, bytes, to)?,
            false => members.exchange(mine, &of(&|_| 0..bytes), to, &of(&|from| from * bytes..(from + 1) * bytes))?,
        }
        pass.backend.sum_parts(&mut all, parts, rows, buffer)?;
        pass.pool.give(cols, Kind::Full, rows * parts, all);
        return Ok(());
    }
    // Each rank adds a slice of the rows for all.
    let slice = |of: usize| of * rows / parts * width..(of + 1) * rows / parts * width;
    let own = slice(me - part.start);
    let (own_rows, own) = (own.len() / width, own.len());
    let room = parts * rows.div_ceil(parts);
    let mut all = pass.pool.take(pass.backend, room, cols, Kind::Full)?;
    let to = on_device(pass.backend, &all, room)?.at;
    members.exchange(mine, &of(&slice), to, &of(&|from| from * own..(from + 1) * own))?;
    let mut sums = pass.pool.take(pass.backend, rows.div_ceil(parts), cols, Kind::Full)?;
    pass.backend.sum_parts(&mut all, parts, own_rows, &mut sums)?;
    let from = on_device(pass.backend, &sums, own_rows)?.at;
    members.exchange(from, &of(&|_| 0..own), mine, &of(&slice))?;
    pass.pool.give(cols, Kind::Full, rows.div_ceil(parts), sums);
    pass.pool.give(cols, Kind::Full, room, all);
    Ok(())
}

/// Where a buffer's rows lie on the device.
pub fn on_device<B: Backend>(backend: &B, buffer: &B::Buffer, rows: usize) -> Result<DeviceRows, Fault> {
    let none = || Fault::new(FaultKind::Internal, "devices' collectives for a backend without a device");
    backend.on_device(buffer, rows)?.ok_or_else(none)
}

/// Sends the pass's residual rows to another stage.
pub fn send<B: Backend>(pass: &mut Pass<'_, B>, to: usize, x: &mut B::Buffer) -> Result<(), Fault> {
    let rows = pass.rows;
    if let Some(members) = &mut pass.communicators.devices.pipe {
        let DeviceRows { at, width } = on_device(pass.backend, x, rows)?;
        return members.send(to, at, rows * width);
    }
    let bytes = bytes(pass.backend, x, rows)?;
    pass.communicators.pipe.send(to, bytes)
}

/// Receives them from the stage before.
pub fn receive<B: Backend>(pass: &mut Pass<'_, B>, from: usize, x: &mut B::Buffer) -> Result<(), Fault> {
    let rows = pass.rows;
    if let Some(members) = &mut pass.communicators.devices.pipe {
        let DeviceRows { at, width } = on_device(pass.backend, x, rows)?;
        return members.receive(from, at, rows * width);
    }
    let mut message = Vec::new();
    pass.communicators.pipe.receive(from, &mut message)?;
    let target = bytes(pass.backend, x, rows)?;
    if message.len() != target.len() {
        let (got, wanted) = (message.len(), target.len());
        let text = format!("stage {from} sent {got} bytes of residual rows, {rows} rows are {wanted}");
        return Err(Fault::new(FaultKind::Diverged, text));
    }
    target.copy_from_slice(&message);
    pass.backend.host_done(x, rows)
}
