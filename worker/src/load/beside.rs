//! Matrices whose codes, scales and zero points are tensors of their own: the layouts of Hugging Face's quantisers.
//!
//! ```text
//! codes   Bytes   [outputs, inputs]            one byte each                               fp8, int8
//!         Rows    [outputs, inputs * bits/8]   low bits first                              MXFP4, compressed-tensors
//!         Down    [inputs * bits/32, outputs]  words of neighbouring inputs                GPTQ
//!         Across  [inputs, outputs / 8]        words of neighbouring outputs 0 2 4 6 1 3 5 7   AWQ
//! scales  one number for `run` outputs and a group of inputs, outputs or groups first
//! points  words of neighbouring outputs, in natural order or AWQ's
//! ```

use super::blocks::power_of_two;
use super::codes::Group;
use crate::backend::MatrixView;
use half::{bf16, f16};
use model::quant::{ScaleFormat, Scales, Scheme};

/// What a window needs besides its codes. Every index that its rows and columns make lies inside the slices: whoever
/// makes one has checked their lengths.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Beside<'a> {
    pub scheme: Scheme,
    pub packing: Packing,
    /// Stored outputs and inputs.
    pub outputs: usize,
    pub inputs: usize,
    pub scales: Side<'a>,
    pub points: Option<Points<'a>>,
    /// The group of each input, as an i32, where they are not runs (GPTQ's act-order).
    pub order: Option<&'a [u8]>,
}

/// Where the code of an output and an input lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    Bytes { signed: bool },
    Rows { bits: u32 },
    Down { bits: u32 },
    Across,
}

/// Numbers by (run of outputs, group).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Side<'a> {
    pub bytes: &'a [u8],
    /// Neighbouring outputs that share a number.
    pub run: usize,
    /// From one run to the next, and from one group to the next, in numbers.
    pub run_stride: usize,
    pub group_stride: usize,
}

/// Packed integers by (output, group).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Points<'a> {
    pub bytes: &'a [u8],
    pub bits: u32,
    /// Outputs within a word in AWQ's order.
    pub across: bool,
    /// From one word of outputs to the next, and from one group to the next, in words.
    pub word_stride: usize,
    pub group_stride: usize,
    /// Stored minus one, modulo 2^bits (GPTQ's first format).
    pub less_one: bool,
}

/// The nibble of an AWQ word that holds each of its eight outputs.
pub const AWQ_NIBBLES: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

impl Beside<'_> {
    /// Whether a window lies inside the stored matrix.
    pub fn holds(&self, view: &MatrixView<'_>) -> bool {
        let last = view.rows.checked_sub(1).map_or(0, |row| view.stored_row(row) + 1);
        last <= self.outputs && view.col + view.cols <= self.inputs && !view.transposed
    }

    /// Bytes of a row of codes ([`Packing::Rows`]): whole words.
    pub fn row_bytes(bits: u32, inputs: usize) -> usize {
        inputs.div_ceil(32 / bits as usize) * 4
    }

    /// The codes of stored row `row` from input `from` on, of all that `out` holds.
    pub fn codes(&self, bytes: &[u8], row: usize, from: usize, out: &mut [u8]) {
        let inputs = from..from + out.len();
        match self.packing {
            Packing::Bytes { signed } => {
                let flip = if signed { 0x80 } else { 0 };
                let stored = &bytes[row * self.inputs..][inputs];
                out.iter_mut().zip(stored).for_each(|(out, byte)| *out = byte ^ flip);
            }
            Packing::Rows { bits } => {
                let (stored, each) = (&bytes[row * Beside::row_bytes(bits, self.inputs)..], 8 / bits as usize);
                let mask = (1u32 << bits) - 1;
                for (out, k) in out.iter_mut().zip(inputs) {
                    *out = (u32::from(stored[k / each]) >> (bits as usize * (k % each)) & mask) as u8;
                }
            }
            Packing::Down { bits } => {
                let (each, mask) = (32 / bits as usize, (1u32 << bits) - 1);
                for (out, k) in out.iter_mut().zip(inputs) {
                    *out = (word(bytes, k / each * self.outputs + row) >> (bits as usize * (k % each)) & mask) as u8;
                }
            }
            Packing::Across => {
                for (out, k) in out.iter_mut().zip(inputs) {
                    *out = (word(bytes, k * (self.outputs / 8) + row / 8) >> (4 * AWQ_NIBBLES[row % 8]) & 15) as u8;
                }
            }
        }
    }

    /// What the values of group `group` of stored row `row` share.
    pub fn group(&self, row: usize, group: usize) -> Group {
        let at = row / self.scales.run * self.scales.run_stride + group * self.scales.group_stride;
        let bytes = self.scales.bytes;
        let Scales::Single(format) = self.scheme.scales else { unreachable!("nested scales lie in blocks") };
        let scale = match format {
            ScaleFormat::F32 => f32::from_bits(word(bytes, at)),
            ScaleFormat::F16 => f16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32(),
            ScaleFormat::Bf16 => bf16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32(),
            ScaleFormat::E8m0 => power_of_two(bytes[at]),
        };
        Group { point: self.points.map_or(0, |points| points.at(row, group)), ..Group::scaled(scale) }
    }

    /// The group of an input.
    pub fn group_of(&self, input: usize) -> usize {
        self.order.map_or(input / self.scheme.group, |order| word(order, input) as usize)
    }
}

impl Points<'_> {
    fn at(&self, row: usize, group: usize) -> u8 {
        let each = 32 / self.bits as usize;
        let word = word(self.bytes, row / each * self.word_stride + group * self.group_stride);
        let place = if self.across { AWQ_NIBBLES[row % 8] } else { (row % each) as u32 };
        let mask = (1u32 << self.bits) - 1;
        let stored = word >> (self.bits * place) & mask;
        (if self.less_one { (stored + 1) & mask } else { stored }) as u8
    }
}

/// Little-endian word `at`.
pub fn word(bytes: &[u8], at: usize) -> u32 {
    let b = &bytes[at * 4..][..4];
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}
