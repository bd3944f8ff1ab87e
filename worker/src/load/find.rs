//! Where a checkpoint keeps a declared matrix: a tensor of plain numbers or of a container's own blocks, or codes with
//! scales and zero points beside them. Every shape is checked here, so that a window can index without asking.

use super::bad;
use super::beside::{Beside, Packing, Points, Side, word};
use super::checkpoint::{Checkpoint, Stored};
use model::catalog::{Part, TensorDecl};
use model::fault::Fault;
use model::quant::{Format, ScaleFormat};
use model::quantisation::{Extent, Method};
use model::spec::ModelSpec;

/// A declared matrix in the files.
pub struct Found<'a> {
    pub format: Format,
    /// Of the stack's entry, where it is one of a stack.
    pub bytes: &'a [u8],
    pub beside: Option<Beside<'a>>,
    /// Names of all tensors that it takes.
    pub claimed: Vec<String>,
}

/// Finds `decl`, which must be there with the declared shape.
pub fn find<'a>(checkpoint: &'a Checkpoint, spec: &ModelSpec, decl: &TensorDecl) -> Result<Found<'a>, Fault> {
    let name = &decl.source.name;
    let method = spec.quantisation.as_ref().map(|q| q.method);
    if let Some(method) = method
        && let codes = method.codes_name(name)
        && checkpoint.has(&codes)
        && (codes != *name || !checkpoint.tensor(name)?.format.is_plain())
    {
        return Matrix { checkpoint, decl, method, codes }.find();
    }
    let stored = checkpoint.tensor(name)?;
    if !stored.format.is_plain() && stored.format.block() == 1 {
        let why = format!(
            "it holds {:?} numbers, and the model's quantization_config does not say what they stand for",
            stored.format
        );
        return Err(checkpoint.blame(name, &why));
    }
    let wanted = matrix_shape(decl);
    // A vector is stored with one dimension, a stack of them with two.
    let flat = with_stack(decl, &[wanted.iter().rev().take(2).product()]);
    let vector = decl.rows == 1 || decl.cols == 1;
    // The heads of a matrix may have a dimension of their own.
    let heads =
        decl.source.part == Part::WHOLE && matches!(*stored.shape, [a, b, c] if [a.saturating_mul(b), c] == wanted);
    if stored.shape != with_stack(decl, &wanted) && !(vector && stored.shape == flat) && !heads {
        return Err(misshaped(checkpoint, name, stored.shape, &with_stack(decl, &wanted)));
    }
    if decl.source.part.transposed && stored.format.block() > 1 {
        let why = format!("it lies the other way round, which blocks of {:?} can't", stored.format);
        return Err(checkpoint.blame(name, &why));
    }
    Ok(Found { format: stored.format, bytes: entry(decl, stored.bytes), beside: None, claimed: vec![name.clone()] })
}

/// Rows and columns as they lie in the file.
fn matrix_shape(decl: &TensorDecl) -> [usize; 2] {
    let rows = stored_rows(decl);
    if decl.source.part.transposed { [decl.cols, rows] } else { [rows, decl.cols] }
}

fn stored_rows(decl: &TensorDecl) -> usize {
    decl.rows * decl.source.part.fused.map_or(1, |f| f.of)
}

fn with_stack(decl: &TensorDecl, shape: &[usize]) -> Vec<usize> {
    decl.source.part.stack.iter().map(|entry| entry.of).chain(shape.iter().copied()).collect()
}

/// The bytes of the stack's entry.
fn entry<'a>(decl: &TensorDecl, bytes: &'a [u8]) -> &'a [u8] {
    match decl.source.part.stack {
        None => bytes,
        Some(entry) => {
            let each = bytes.len() / entry.of;
            &bytes[entry.index * each..(entry.index + 1) * each]
        }
    }
}

fn misshaped(checkpoint: &Checkpoint, name: &str, shape: &[usize], wanted: &[usize]) -> Fault {
    checkpoint.blame(name, &format!("it has shape {shape:?}, the model's config implies {wanted:?}"))
}

/// One quantised matrix.
struct Matrix<'a, 'd> {
    checkpoint: &'a Checkpoint,
    decl: &'d TensorDecl,
    method: Method,
    /// The name of its codes.
    codes: String,
}

impl<'a> Matrix<'a, '_> {
    fn find(self) -> Result<Found<'a>, Fault> {
        if self.decl.source.part.transposed {
            let why = "quantised matrices are never stored the other way round";
            return Err(self.checkpoint.blame(&self.codes, why));
        }
        let mut found = match self.method {
            Method::Fp8(extent) => self.fp8(extent),
            Method::Mxfp4 => self.mxfp4(),
            Method::Packed { bits, group, symmetric } => self.packed(bits, group, symmetric),
            Method::Int8 { group } => self.int8(group),
            Method::Awq { group } => self.awq(group),
            Method::Gptq { bits, group, less_one } => self.gptq(bits, group, less_one),
        }?;
        found.claimed.push(self.codes);
        Ok(found)
    }

    fn rows(&self) -> usize {
        stored_rows(self.decl)
    }

    fn cols(&self) -> usize {
        self.decl.cols
    }

    /// The name of what lies beside the codes: their module's, and `last`.
    fn beside(&self, last: &str) -> String {
        let ends = [".weight", "_blocks", ".weight_packed", ".qweight"];
        let module = ends.iter().find_map(|end| self.codes.strip_suffix(end)).unwrap_or(&self.codes);
        format!("{module}{last}")
    }

    fn scales_name(&self) -> String {
        self.method.scales_names(&self.decl.source.name).remove(0)
    }

    /// A tensor of this matrix, of one of `formats` and one of `shapes` (without the stack's dimension).
    fn part(&self, name: &str, formats: &[Format], shapes: &[&[usize]]) -> Result<Stored<'a>, Fault> {
        let method = self.method.name();
        if !self.checkpoint.has(name) {
            let codes = &self.codes;
            return Err(self.checkpoint.blame(codes, &format!("{method} needs {name} beside it, which is missing")));
        }
        let stored = self.checkpoint.tensor(name)?;
        if !formats.contains(&stored.format) {
            let why = format!("it is stored as {:?}, {method} has it as {formats:?}", stored.format);
            return Err(self.checkpoint.blame(name, &why));
        }
        let shapes: Vec<Vec<usize>> = shapes.iter().map(|shape| with_stack(self.decl, shape)).collect();
        if !shapes.iter().any(|shape| stored.shape == shape) {
            return Err(misshaped(self.checkpoint, name, stored.shape, &shapes[0]));
        }
        Ok(Stored { bytes: entry(self.decl, stored.bytes), ..stored })
    }

    /// Codes and scales put together.
    fn with(&self, codes: &Stored<'a>, packing: Packing, scales: Scales<'a>, claimed: Vec<String>) -> Found<'a> {
        let scheme = self.method.scheme(self.cols(), scales.format);
        let beside = Beside {
            scheme,
            packing,
            outputs: self.rows(),
            inputs: self.cols(),
            scales: scales.side,
            points: None,
            order: None,
        };
        Found { format: codes.format, bytes: codes.bytes, beside: Some(beside), claimed }
    }

    fn fp8(&self, extent: Extent) -> Result<Found<'a>, Fault> {
        let (rows, cols) = (self.rows(), self.cols());
        let codes = self.part(&self.codes, &[Format::F8E4m3], &[&[rows, cols]])?;
        let names = self.method.scales_names(&self.decl.source.name);
        let name = names.iter().find(|name| self.checkpoint.has(name)).unwrap_or(&names[0]).clone();
        let (run, group) = (extent.rows.unwrap_or(rows), extent.cols.unwrap_or(cols));
        let grid = [rows.div_ceil(run), cols.div_ceil(group)];
        let formats = [Format::F32, Format::Bf16, Format::F16];
        let stored = match (extent.rows, extent.cols) {
            (Some(_), Some(_)) => self.part(&name, &formats, &[&grid])?,
            (Some(_), None) => self.part(&name, &formats, &[&grid, &grid[..1]])?,
            _ => self.part(&name, &formats, &[&[1], &[], &[1, 1]])?,
        };
        let scales = Scales::of(&stored, run, grid[1], 1)?;
        Ok(self.with(&codes, Packing::Bytes { signed: false }, scales, vec![name]))
    }

    fn mxfp4(&self) -> Result<Found<'a>, Fault> {
        let (rows, cols, name) = (self.rows(), self.cols(), self.scales_name());
        self.divides(cols, 32, "inputs")?;
        let codes = self.part(&self.codes, &[Format::U8], &[&[rows, cols / 32, 16]])?;
        let stored = self.part(&name, &[Format::U8], &[&[rows, cols / 32]])?;
        let scales = Scales::of(&stored, 1, cols / 32, 1)?;
        Ok(self.with(&codes, Packing::Rows { bits: 4 }, scales, vec![name]))
    }

    fn packed(&self, bits: u32, group: Option<usize>, symmetric: bool) -> Result<Found<'a>, Fault> {
        let (rows, cols) = (self.rows(), self.cols());
        let (each, groups) = (32 / bits as usize, cols.div_ceil(group.unwrap_or(cols)));
        let codes = self.part(&self.codes, &[Format::I32], &[&[rows, cols.div_ceil(each)]])?;
        let mut claimed = vec![self.scales_name()];
        let scales = self.per_output(&claimed[0], groups)?;
        let shape = self.beside(".weight_shape");
        if self.checkpoint.has(&shape) {
            self.check_stated(&shape)?;
            claimed.push(shape);
        }
        let mut found = self.with(&codes, Packing::Rows { bits }, scales, claimed);
        let beside = found.beside.as_mut().expect("it was just made");
        if !symmetric {
            let name = self.beside(".weight_zero_point");
            let stored = self.part(&name, &[Format::I32], &[&[rows.div_ceil(each), groups]])?;
            beside.points = Some(Points {
                bytes: stored.bytes,
                bits,
                across: false,
                word_stride: groups,
                group_stride: 1,
                less_one: false,
            });
            found.claimed.push(name);
        }
        let name = self.beside(".weight_g_idx");
        if self.checkpoint.has(&name) {
            beside.order = self.order(&name, groups, group)?;
            found.claimed.push(name);
        }
        Ok(found)
    }

    fn int8(&self, group: Option<usize>) -> Result<Found<'a>, Fault> {
        let (rows, cols, name) = (self.rows(), self.cols(), self.scales_name());
        let codes = self.part(&self.codes, &[Format::I8], &[&[rows, cols]])?;
        let scales = self.per_output(&name, cols.div_ceil(group.unwrap_or(cols)))?;
        Ok(self.with(&codes, Packing::Bytes { signed: true }, scales, vec![name]))
    }

    fn awq(&self, group: Option<usize>) -> Result<Found<'a>, Fault> {
        let (rows, cols) = (self.rows(), self.cols());
        self.divides(rows, 8, "outputs")?;
        let groups = cols.div_ceil(group.unwrap_or(cols));
        let codes = self.part(&self.codes, &[Format::I32], &[&[cols, rows / 8]])?;
        let zeros = self.part(&self.beside(".qzeros"), &[Format::I32], &[&[groups, rows / 8]])?;
        let scales = self.per_group(groups)?;
        let mut found = self.with(
            &codes,
            Packing::Across,
            scales,
            ["qzeros", "scales"].map(|n| self.beside(&format!(".{n}"))).to_vec(),
        );
        let points = Points {
            bytes: zeros.bytes,
            bits: 4,
            across: true,
            word_stride: 1,
            group_stride: rows / 8,
            less_one: false,
        };
        found.beside.as_mut().expect("it was just made").points = Some(points);
        Ok(found)
    }

    fn gptq(&self, bits: u32, group: Option<usize>, less_one: bool) -> Result<Found<'a>, Fault> {
        let (rows, cols, each) = (self.rows(), self.cols(), 32 / bits as usize);
        self.divides(rows, each, "outputs")?;
        self.divides(cols, each, "inputs")?;
        let groups = cols.div_ceil(group.unwrap_or(cols));
        let codes = self.part(&self.codes, &[Format::I32], &[&[cols / each, rows]])?;
        let zeros = self.part(&self.beside(".qzeros"), &[Format::I32], &[&[groups, rows / each]])?;
        let scales = self.per_group(groups)?;
        let mut found = self.with(
            &codes,
            Packing::Down { bits },
            scales,
            ["qzeros", "scales"].map(|n| self.beside(&format!(".{n}"))).to_vec(),
        );
        let beside = found.beside.as_mut().expect("it was just made");
        beside.points = Some(Points {
            bytes: zeros.bytes,
            bits,
            across: false,
            word_stride: 1,
            group_stride: rows / each,
            less_one,
        });
        let name = self.beside(".g_idx");
        if self.checkpoint.has(&name) {
            beside.order = self.order(&name, groups, group)?;
            found.claimed.push(name);
        }
        Ok(found)
    }

    /// Scales `[outputs, groups]`, or `[outputs]` where there is one group.
    fn per_output(&self, name: &str, groups: usize) -> Result<Scales<'a>, Fault> {
        let (rows, formats) = (self.rows(), [Format::Bf16, Format::F16, Format::F32]);
        let stored = match groups {
            1 => self.part(name, &formats, &[&[rows, 1], &[rows]])?,
            _ => self.part(name, &formats, &[&[rows, groups]])?,
        };
        Scales::of(&stored, 1, groups, 1)
    }

    /// Scales `[groups, outputs]`.
    fn per_group(&self, groups: usize) -> Result<Scales<'a>, Fault> {
        let rows = self.rows();
        let stored = self.part(&self.scales_name(), &[Format::F16, Format::Bf16, Format::F32], &[&[groups, rows]])?;
        Scales::of(&stored, 1, 1, rows)
    }

    /// The group of each input, where they are not runs of neighbours.
    fn order(&self, name: &str, groups: usize, group: Option<usize>) -> Result<Option<&'a [u8]>, Fault> {
        let cols = self.cols();
        let bytes = self.part(name, &[Format::I32], &[&[cols]])?.bytes;
        self.checkpoint.ready(bytes)?;
        if let Some(input) = (0..cols).find(|k| word(bytes, *k) as usize >= groups) {
            let found = word(bytes, input) as i32;
            let why = format!("it puts input {input} into group {found}, there are {groups}");
            return Err(self.checkpoint.blame(name, &why));
        }
        let runs = (0..cols).all(|k| word(bytes, k) as usize == k / group.unwrap_or(cols));
        Ok((!runs).then_some(bytes))
    }

    /// `weight_shape` repeats the matrix's.
    fn check_stated(&self, name: &str) -> Result<(), Fault> {
        let stored = self.part(name, &[Format::I64, Format::I32], &[&[2]])?;
        self.checkpoint.ready(stored.bytes)?;
        let each = stored.bytes.len() / 2;
        let number =
            |at: usize| stored.bytes[at * each..(at + 1) * each].iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let (stated, wanted) = ([number(0), number(1)], [self.rows() as u64, self.cols() as u64]);
        if stated != wanted {
            let why = format!("it says {stated:?}, the model's config implies {wanted:?}");
            return Err(self.checkpoint.blame(name, &why));
        }
        Ok(())
    }

    fn divides(&self, n: usize, by: usize, of: &str) -> Result<(), Fault> {
        if n.is_multiple_of(by) {
            return Ok(());
        }
        let why = format!("{n} {of} are not a multiple of the {by} that are packed together");
        Err(self.checkpoint.blame(&self.codes, &why))
    }
}

/// Scales and their format.
struct Scales<'a> {
    side: Side<'a>,
    format: ScaleFormat,
}

impl<'a> Scales<'a> {
    /// `stored` numbers, one for `run` outputs and a group.
    fn of(stored: &Stored<'a>, run: usize, run_stride: usize, group_stride: usize) -> Result<Scales<'a>, Fault> {
        let unread = || bad(format!("scales stored as {:?} are not read", stored.format));
        let format = ScaleFormat::stored_as(stored.format).ok_or_else(unread)?;
        Ok(Scales { side: Side { bytes: stored.bytes, run, run_stride, group_stride }, format })
    }
}

/// Whether a part of a matrix is all of it, as it lies.
pub const fn stored_cols(decl: &TensorDecl) -> usize {
    let Part { fused, transposed, .. } = decl.source.part;
    match (transposed, fused) {
        (false, _) => decl.cols,
        (true, Some(fused)) => decl.rows * fused.of,
        (true, None) => decl.rows,
    }
}

#[cfg(test)]
mod tests;
