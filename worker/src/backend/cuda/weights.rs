//! Weight matrices on the device. The host packs them as the CPU's kernels read them (same panels, codes and bytes, so what the
//! planner counts is what is taken), and the device's kernels read the same.

use super::Device;
use super::kernels::{Form, Plane, Weight};
use super::memory::Piece;
use crate::backend::cpu::simd::coded::Image;
use crate::backend::cpu::simd::pack::Packed;
use model::fault::Fault;
use model::quant::ScaleFormat;
use std::sync::Arc;

/// A packed matrix `[out, in]`; clones share it.
#[derive(Clone)]
pub struct Matrix(Arc<Held>);

struct Held {
    rows: usize,
    cols: usize,
    bytes: usize,
    /// Inputs of a run of codes; of plain numbers none.
    run: Option<usize>,
    /// A [`Weight`].
    descriptor: Piece,
    _parts: Vec<Piece>,
}

impl Matrix {
    pub(super) fn upload(device: &Device, packed: &Packed) -> Result<Matrix, Fault> {
        let mut parts = Vec::new();
        let mut weight = Weight {
            words: 0,
            rows: packed.rows as u32,
            cols: packed.cols as u32,
            segments: packed.segments as u32,
            pairs: packed.pairs as u32,
            form: if packed.wide { Form::Floats } else { Form::Halves },
            run: 0,
            span: 0,
            scale_form: 0,
            unit: 0.0,
            point: 0.0,
            entries: [0.0; 16],
            planes: [Plane::NONE; 6],
        };
        match &packed.coded {
            None => {
                let words = device.upload(&packed.words)?;
                weight.words = words.at;
                parts.push(words);
            }
            Some(coded) => {
                let Image { run, span, table, fp8, scale, unit, point, planes } = coded.image();
                weight.form = match table {
                    Some(_) => Form::Nibbles,
                    None if fp8 => Form::Fp8,
                    None => Form::Integers,
                };
                weight.entries = table.map_or([0.0; 16], |table| table.map(|entry| entry.to_f32()));
                (weight.run, weight.span, weight.unit, weight.point) = (run as u32, span as u32, unit, point);
                weight.scale_form = match scale {
                    ScaleFormat::F32 => 0,
                    ScaleFormat::F16 => 1,
                    ScaleFormat::Bf16 => 2,
                    ScaleFormat::E8m0 => 3,
                };
                for (plane, (bytes, count, each)) in weight.planes.iter_mut().zip(planes) {
                    if count > 0 {
                        let piece = device.upload(bytes)?;
                        *plane = Plane { bytes: piece.at, count: count as u32, each: each as u32 };
                        parts.push(piece);
                    }
                }
            }
        }
        let descriptor = device.upload(&[weight])?;
        // Another stream may be the first to read it.
        device.driver.wait()?;
        let (rows, cols, bytes) = (packed.rows, packed.cols, packed.bytes());
        let run = packed.coded.as_ref().map(|_| weight.run as usize);
        Ok(Matrix(Arc::new(Held { rows, cols, bytes, run, descriptor, _parts: parts })))
    }

    pub fn rows(&self) -> usize {
        self.0.rows
    }

    pub(super) fn run(&self) -> Option<usize> {
        self.0.run
    }

    pub fn cols(&self) -> usize {
        self.0.cols
    }

    /// Bytes that it takes, its description apart.
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    pub(super) fn descriptor(&self) -> u64 {
        self.0.descriptor.at
    }
}
