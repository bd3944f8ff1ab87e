//! A declared matrix as its checkpoint stores it: one tensor, or codes with companions. The names that are there tell
//! which; the shapes of all of them, and the config's word on quantisation, must agree.

use super::beside::{Beside, Packing, Points, Side, word};
use super::checkpoint::{Checkpoint, Stored};
use super::bad;
use model::catalog::{Entry, TensorDecl};
use model::fault::Fault;
use model::quant::{Format, ScaleFormat, Shift};
use model::quantisation::{Extent, Method};
use model::spec::ModelSpec;

/// What was found. `bytes` are those of the stack's entry, where the tensor is one of a stack.
#[derive(Debug, Clone)]
pub struct Found<'a> {
    /// Every tensor of the checkpoint that belongs to it.
    pub names: Vec<String>,
    pub format: Format,
    pub bytes: &'a [u8],
    /// Stored as `[cols, rows]`.
    pub transposed: bool,
    pub beside: Option<Beside<'a>>,
}

/// Finds the tensors of a declaration and checks them.
pub fn find<'a>(checkpoint: &'a Checkpoint, spec: &ModelSpec, decl: &TensorDecl) -> Result<Found<'a>, Fault> {
    let name = decl.source.name.as_str();
    let base = name.strip_suffix(".weight").unwrap_or(name);
    let search = Search {
        checkpoint,
        method: spec.quantisation.as_ref().map(|q| q.method),
        base,
        stack: decl.source.part.stack,
        rows: decl.rows * decl.source.part.fused.map_or(1, |f| f.of),
        cols: decl.cols,
    };
    if checkpoint.has(name) {
        let stored = checkpoint.tensor(name)?;
        return match stored.format {
            Format::F8E4m3 => search.fp8(name),
            Format::I8 => search.int8(name),
            format if format.is_plain() || format.block() > 1 => plain(checkpoint, decl, stored),
            format => Err(checkpoint.blame(name, &format!("is stored as {format:?}, which is no weight's format"))),
        };
    }
    let layouts: [(String, fn(&Search<'a, '_>, &str) -> Result<Found<'a>, Fault>); 3] = [
        (format!("{base}.weight_packed"), Search::packed),
        (format!("{base}.qweight"), Search::words),
        (format!("{base}_blocks"), Search::mxfp4),
    ];
    for (codes, read) in layouts {
        if checkpoint.has(&codes) {
            return read(&search, &codes);
        }
    }
    checkpoint.tensor(name).map(|_| unreachable!("it was looked for"))
}

/// A tensor that holds its values alone.
fn plain<'a>(checkpoint: &Checkpoint, decl: &TensorDecl, stored: Stored<'a>) -> Result<Found<'a>, Fault> {
    let part = decl.source.part;
    let (rows, cols) = (decl.rows * part.fused.map_or(1, |f| f.of), decl.cols);
    let matrix = if part.transposed { [cols, rows] } else { [rows, cols] };
    let with_stack = |shape: &[usize]| -> Vec<usize> { part.stack.iter().map(|e| e.of).chain(shape.to_vec()).collect() };
    let wanted = with_stack(&matrix);
    // A vector is stored with one dimension, a stack of them with two; the heads of a matrix may have one of their own.
    let vector = (decl.rows == 1 || decl.cols == 1) && stored.shape == with_stack(&[rows * cols]);
    let heads = part.stack.is_none() && matches!(*stored.shape, [a, b, c] if [a.saturating_mul(b), c] == matrix);
    if stored.shape != wanted && !vector && !heads {
        let why = format!("has shape {:?}, the model's config implies {wanted:?}", stored.shape);
        return Err(checkpoint.blame(&decl.source.name, &why));
    }
    if part.transposed && stored.format.block() > 1 {
        let why = format!("lies the other way round, which blocks of {:?} can't", stored.format);
        return Err(checkpoint.blame(&decl.source.name, &why));
    }
    let bytes = entry_of(stored.bytes, part.stack);
    let names = vec![decl.source.name.clone()];
    Ok(Found { names, format: stored.format, bytes, transposed: part.transposed, beside: None })
}

fn entry_of(bytes: &[u8], stack: Option<Entry>) -> &[u8] {
    stack.map_or(bytes, |entry| {
        let each = bytes.len() / entry.of;
        &bytes[entry.index * each..(entry.index + 1) * each]
    })
}

/// A quantised matrix that is looked for.
struct Search<'a, 's> {
    checkpoint: &'a Checkpoint,
    method: Option<Method>,
    /// The tensor's name without `.weight`.
    base: &'s str,
    stack: Option<Entry>,
    /// Of the stored matrix.
    rows: usize,
    cols: usize,
}

const NUMBERS: [Format; 3] = [Format::F32, Format::F16, Format::Bf16];

impl<'a> Search<'a, '_> {
    /// One tensor of the matrix, in one of `formats` and `shapes` (the first is the published one); its entry's bytes.
    fn part(&self, name: &str, formats: &[Format], shapes: &[&[usize]]) -> Result<(Format, &'a [u8]), Fault> {
        if !self.checkpoint.has(name) {
            return Err(self.checkpoint.blame(self.anchor(), &format!("{name}, which it needs, is missing")));
        }
        let stored = self.checkpoint.tensor(name)?;
        if !formats.contains(&stored.format) {
            let why = format!("is stored as {:?}, known here: {formats:?}", stored.format);
            return Err(self.checkpoint.blame(name, &why));
        }
        let with_stack = |shape: &[usize]| -> Vec<usize> { self.stack.iter().map(|e| e.of).chain(shape.to_vec()).collect() };
        if !shapes.iter().any(|shape| stored.shape == with_stack(shape)) {
            let why = format!("has shape {:?}, the model's config implies {:?}", stored.shape, with_stack(shapes[0]));
            return Err(self.checkpoint.blame(name, &why));
        }
        Ok((stored.format, entry_of(stored.bytes, self.stack)))
    }

    /// A tensor of the matrix that is there, to name in errors.
    fn anchor(&self) -> &str {
        self.checkpoint.names().find(|name| name.starts_with(self.base)).unwrap_or(self.base)
    }

    /// What the config says where the files hold `found`.
    fn disagree(&self, name: &str, found: &str) -> Fault {
        let said = self.method.map_or("none", |method| method.name());
        self.checkpoint.blame(name, &format!("is stored as {found}, the config's quantisation is {said}"))
    }

    fn scale_format(format: Format) -> ScaleFormat {
        match format {
            Format::F32 => ScaleFormat::F32,
            Format::F16 => ScaleFormat::F16,
            Format::Bf16 => ScaleFormat::Bf16,
            _ => ScaleFormat::E8m0,
        }
    }

    fn found(&self, codes: (Format, &'a [u8]), names: Vec<String>, beside: Beside<'a>) -> Found<'a> {
        Found { names, format: codes.0, bytes: codes.1, transposed: false, beside: Some(beside) }
    }

    /// e4m3 and a scale for each block, channel or tensor.
    fn fp8(&self, name: &str) -> Result<Found<'a>, Fault> {
        let Some(method @ Method::Fp8(Extent { rows, cols })) = self.method else {
            return Err(self.disagree(name, "fp8"));
        };
        let (run, group) = (rows.unwrap_or(self.rows), cols.unwrap_or(self.cols));
        let (runs, groups) = (self.rows.div_ceil(run), self.cols.div_ceil(group));
        let codes = self.part(name, &[Format::F8E4m3], &[&[self.rows, self.cols]])?;
        let compressed = format!("{}.weight_scale", self.base);
        let scale = if self.checkpoint.has(&compressed) { compressed } else { format!("{name}_scale_inv") };
        let shapes: &[&[usize]] = match (runs, groups) {
            (1, 1) => &[&[1, 1], &[1], &[]],
            (runs, 1) => &[&[runs, 1], &[runs]],
            (runs, groups) => &[&[runs, groups]],
        };
        let (format, bytes) = self.part(&scale, &NUMBERS, shapes)?;
        let mut names = vec![name.to_string(), scale];
        self.take(&mut names, ".input_scale");
        let scheme = method.scheme(self.cols, Search::scale_format(format));
        let scales = Side { bytes, run, run_stride: groups, group_stride: 1 };
        let packing = Packing::Bytes { signed: false };
        Ok(self.found(codes, names, self.beside(scheme, packing, scales, None, None)))
    }

    /// int8 and a scale for each output, or group of its inputs.
    fn int8(&self, name: &str) -> Result<Found<'a>, Fault> {
        let Some(method @ Method::Int8 { group }) = self.method else { return Err(self.disagree(name, "int8")) };
        let groups = self.cols.div_ceil(group.unwrap_or(self.cols));
        let codes = self.part(name, &[Format::I8], &[&[self.rows, self.cols]])?;
        let scale = format!("{}.weight_scale", self.base);
        let (format, bytes) = self.part(&scale, &NUMBERS, &[&[self.rows, groups]])?;
        let mut names = vec![name.to_string(), scale];
        self.take(&mut names, ".input_scale");
        let scheme = method.scheme(self.cols, Search::scale_format(format));
        let scales = Side { bytes, run: 1, run_stride: groups, group_stride: 1 };
        Ok(self.found(codes, names, self.beside(scheme, Packing::Bytes { signed: true }, scales, None, None)))
    }

    /// Nibble pairs and exponents of 32 inputs.
    fn mxfp4(&self, blocks: &str) -> Result<Found<'a>, Fault> {
        let Some(method @ Method::Mxfp4) = self.method else { return Err(self.disagree(blocks, "mxfp4")) };
        self.whole(blocks, self.cols, 32)?;
        let groups = self.cols / 32;
        let codes = self.part(blocks, &[Format::U8], &[&[self.rows, groups, 16]])?;
        let scale = format!("{}_scales", self.base);
        let (_, bytes) = self.part(&scale, &[Format::U8], &[&[self.rows, groups]])?;
        let scales = Side { bytes, run: 1, run_stride: groups, group_stride: 1 };
        let scheme = method.scheme(self.cols, ScaleFormat::E8m0);
        let names = vec![blocks.to_string(), scale];
        Ok(self.found(codes, names, self.beside(scheme, Packing::Rows { bits: 4 }, scales, None, None)))
    }

    /// compressed-tensors' words along the inputs.
    fn packed(&self, name: &str) -> Result<Found<'a>, Fault> {
        let Some(method @ Method::Packed { bits, group, symmetric }) = self.method else {
            return Err(self.disagree(name, "pack-quantized"));
        };
        let groups = self.cols.div_ceil(group.unwrap_or(self.cols));
        let codes = self.part(name, &[Format::I32], &[&[self.rows, Beside::row_bytes(bits, self.cols) / 4]])?;
        let of = |suffix: &str| format!("{}.weight_{suffix}", self.base);
        let mut names = vec![name.to_string(), of("scale")];
        let (format, bytes) = self.part(&of("scale"), &NUMBERS, &[&[self.rows, groups]])?;
        let scheme = method.scheme(self.cols, Search::scale_format(format));
        self.check_shape(&of("shape"), &mut names)?;
        let points = if symmetric {
            None
        } else {
            names.push(of("zero_point"));
            let shape = [self.rows.div_ceil(32 / bits as usize), groups];
            let (_, bytes) = self.part(&of("zero_point"), &[Format::I32], &[&shape])?;
            let (word_stride, group_stride) = (groups, 1);
            Some(Points { bytes, bits, across: false, word_stride, group_stride, less_one: false })
        };
        let order = self.order(&of("g_idx"), scheme.group, groups, &mut names)?;
        let scales = Side { bytes, run: 1, run_stride: groups, group_stride: 1 };
        Ok(self.found(codes, names, self.beside(scheme, Packing::Rows { bits }, scales, points, order)))
    }

    /// The shape before packing, where it is stored, is the matrix's.
    fn check_shape(&self, name: &str, names: &mut Vec<String>) -> Result<(), Fault> {
        if !self.checkpoint.has(name) {
            return Ok(());
        }
        let (format, bytes) = self.part(name, &[Format::I32, Format::I64], &[&[2]])?;
        let wide = if format == Format::I64 { 2 } else { 1 };
        let found = [word(bytes, 0) as usize, word(bytes, wide) as usize];
        if found != [self.rows, self.cols] {
            let why = format!("says {found:?}, the model's config implies {:?}", [self.rows, self.cols]);
            return Err(self.checkpoint.blame(name, &why));
        }
        names.push(name.to_string());
        Ok(())
    }

    /// AWQ's and GPTQ's words, which lie the other way round.
    fn words(&self, name: &str) -> Result<Found<'a>, Fault> {
        let (method, bits, group) = match self.method {
            Some(method @ Method::Awq { group }) => (method, 4, group),
            Some(method @ Method::Gptq { bits, group, .. }) => (method, bits, group),
            _ => return Err(self.disagree(name, "words of a quantiser (qweight)")),
        };
        let each = 32 / bits as usize;
        self.whole(name, self.rows, each)?;
        let across = matches!(method, Method::Awq { .. });
        if !across {
            self.whole(name, self.cols, each)?;
        }
        let groups = self.cols.div_ceil(group.unwrap_or(self.cols));
        let shape = if across { [self.cols, self.rows / each] } else { [self.cols / each, self.rows] };
        let codes = self.part(name, &[Format::I32], &[&shape])?;
        let of = |suffix: &str| format!("{}.{suffix}", self.base);
        let mut names = vec![name.to_string(), of("qzeros"), of("scales")];
        let (_, zeros) = self.part(&of("qzeros"), &[Format::I32], &[&[groups, self.rows / each]])?;
        let (format, bytes) = self.part(&of("scales"), &NUMBERS, &[&[groups, self.rows]])?;
        let scheme = method.scheme(self.cols, Search::scale_format(format));
        assert_eq!(scheme.shift, Shift::Point, "both store zero points");
        let order = self.order(&of("g_idx"), scheme.group, groups, &mut names)?;
        let less_one = matches!(method, Method::Gptq { less_one: true, .. });
        let (word_stride, group_stride) = (1, self.rows / each);
        let points = Points { bytes: zeros, bits, across, word_stride, group_stride, less_one };
        let scales = Side { bytes, run: 1, run_stride: 1, group_stride: self.rows };
        let packing = if across { Packing::Across } else { Packing::Down { bits } };
        Ok(self.found(codes, names, self.beside(scheme, packing, scales, Some(points), order)))
    }

    /// Each input's group, where they are stored and are no runs.
    fn order(
        &self,
        name: &str,
        group: usize,
        groups: usize,
        names: &mut Vec<String>,
    ) -> Result<Option<&'a [u8]>, Fault> {
        if !self.checkpoint.has(name) {
            return Ok(None);
        }
        let (_, bytes) = self.part(name, &[Format::I32], &[&[self.cols]])?;
        names.push(name.to_string());
        let mut runs = true;
        for input in 0..self.cols {
            let of = word(bytes, input) as usize;
            if of >= groups {
                let why = format!("puts input {input} into group {}, there are {groups}", of as u32 as i32);
                return Err(self.checkpoint.blame(name, &why));
            }
            runs &= of == input / group;
        }
        Ok((!runs).then_some(bytes))
    }

    fn beside(
        &self,
        scheme: model::quant::Scheme,
        packing: Packing,
        scales: Side<'a>,
        points: Option<Points<'a>>,
        order: Option<&'a [u8]>,
    ) -> Beside<'a> {
        Beside { scheme, packing, outputs: self.rows, inputs: self.cols, scales, points, order }
    }

    /// Claims a tensor that weights alone do not need.
    fn take(&self, names: &mut Vec<String>, suffix: &str) {
        let name = format!("{}{suffix}", self.base);
        if self.checkpoint.has(&name) {
            names.push(name);
        }
    }

    fn whole(&self, name: &str, size: usize, unit: usize) -> Result<(), Fault> {
        if size.is_multiple_of(unit) {
            return Ok(());
        }
        Err(bad(format!("tensor {name}: {size} values are not whole runs of {unit}")))
    }
}

#[cfg(test)]
#[path = "stored_tests.rs"]
mod tests;
