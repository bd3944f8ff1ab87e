//! ggml's blocks, taken apart into codes and groups. Their values then equal those of the `gguf` package bit for bit.
//!
//! Blocks of 32 keep weight `i` in the low nibble of byte `i` and weight `i + 16` in its high nibble. Blocks of 256
//! keep runs of 32 weights in the same bits of the same 32 bytes.

use super::codes::Group;
use half::f16;
use model::quant::Format;

/// Weights of the largest block.
pub const BLOCK_MAX: usize = 256;

/// One block's codes, in the order of its values.
pub fn codes(format: Format, bytes: &[u8], out: &mut [u8; BLOCK_MAX]) {
    match format {
        Format::Q4_0 | Format::Iq4Nl => nibbles(&bytes[2..18], out),
        Format::Q4_1 => nibbles(&bytes[4..20], out),
        Format::Mxfp4 => {
            nibbles(&bytes[1..17], out);
            // ggml's levels are integers, which have no negative zero.
            out[..32].iter_mut().filter(|code| **code == 8).for_each(|code| *code = 0);
        }
        Format::Q5_0 => fives(&bytes[2..22], out),
        Format::Q5_1 => fives(&bytes[4..24], out),
        Format::Q8_0 => out.iter_mut().zip(&bytes[2..34]).for_each(|(out, byte)| *out = byte ^ 0x80),
        Format::Q2K => each(out, |i| bits(&bytes[16..], i, 2)),
        // A third bit, set where nothing is taken away.
        Format::Q3K => each(out, |i| bits(&bytes[32..], i, 2) | ((bytes[i % 32] >> (i / 32)) & 1) << 2),
        Format::Q4K => each(out, |i| bits(&bytes[16..], i, 4)),
        Format::Q5K => each(out, |i| bits(&bytes[48..], i, 4) | ((bytes[16 + i % 32] >> (i / 32)) & 1) << 4),
        Format::Q6K => each(out, |i| {
            // Each half of 128 weights holds four rows of 32, whose low bits are the nibbles of two runs of 32 bytes.
            let (half, quarter, i) = (i / 128, i / 32 % 4, i % 32);
            let low = bytes[half * 64 + (quarter % 2) * 32 + i] >> (4 * (quarter / 2)) & 15;
            low | (bytes[128 + half * 32 + i] >> (2 * quarter) & 3) << 4
        }),
        Format::Iq4Xs => {
            for group in 0..8 {
                nibbles(&bytes[8 + group * 16..][..16], &mut out[group * 32..]);
            }
        }
        plain => unreachable!("{plain:?} has no codes"),
    }
}

/// What the values of group `within` of a block share.
pub fn group(format: Format, bytes: &[u8], within: usize) -> Group {
    let half = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
    match format {
        Format::Q4_0 | Format::Q5_0 | Format::Q8_0 | Format::Iq4Nl => Group::scaled(half(0)),
        // ggml adds it.
        Format::Q4_1 | Format::Q5_1 => Group { minimum: -half(2), ..Group::scaled(half(0)) },
        Format::Mxfp4 => Group::scaled(power_of_two(bytes[0])),
        Format::Q2K => Group {
            integer: i16::from(bytes[within] & 15),
            minimum: half(82),
            minimum_integer: bytes[within] >> 4,
            ..Group::scaled(half(80))
        },
        Format::Q3K => Group { integer: q3k_scale(&bytes[96..108], within), ..Group::scaled(half(108)) },
        Format::Q4K | Format::Q5K => {
            let (integer, minimum_integer) = q45k_scale(&bytes[4..16], within);
            Group { integer, minimum: half(2), minimum_integer, ..Group::scaled(half(0)) }
        }
        Format::Q6K => Group { integer: i16::from(bytes[192 + within] as i8), ..Group::scaled(half(208)) },
        Format::Iq4Xs => Group { integer: iq4xs_scale(&bytes[2..8], within), ..Group::scaled(half(0)) },
        plain => unreachable!("{plain:?} has no groups"),
    }
}

/// What an e8m0 byte stands for. 255 is 2^128 (infinity in f32; see [`value`](super::codes::value)), not a NaN.
pub fn power_of_two(exponent: u8) -> f32 {
    f32::from_bits(if exponent == 0 { 1 << 22 } else { u32::from(exponent) << 23 })
}

fn each(out: &mut [u8; BLOCK_MAX], code: impl Fn(usize) -> u8) {
    out.iter_mut().enumerate().for_each(|(i, out)| *out = code(i));
}

/// `count` bits of weight `i`: runs of 32 weights share 32 bytes, the first run in the lowest bits.
fn bits(bytes: &[u8], i: usize, count: usize) -> u8 {
    let runs = 8 / count;
    let byte = bytes[i / (32 * runs) * 32 + i % 32];
    byte >> (count * (i / 32 % runs)) & ((1 << count) - 1)
}

/// The first half of a block in the lower nibbles, the second in the upper ones.
fn nibbles(bytes: &[u8], out: &mut [u8]) {
    for (i, byte) in bytes.iter().enumerate() {
        out[i] = byte & 15;
        out[i + bytes.len()] = byte >> 4;
    }
}

/// Four bytes of highest bits, then the nibbles.
fn fives(bytes: &[u8], out: &mut [u8; BLOCK_MAX]) {
    nibbles(&bytes[4..], out);
    for (i, out) in out[..32].iter_mut().enumerate() {
        *out |= (bytes[i / 8] >> (i % 8) & 1) << 4;
    }
}

/// Six bits less 32: the low four in a nibble of the first eight bytes, the high two in the last four.
fn q3k_scale(packed: &[u8], group: usize) -> i16 {
    let low = packed[group % 8] >> (4 * (group / 8)) & 15;
    let high = packed[8 + group % 4] >> (2 * (group / 4)) & 3;
    i16::from(low | high << 4) - 32
}

/// Scale and minimum, six bits each: the first four groups' in the low bits of a byte of their own, the others' split
/// between a nibble and the two bits left over there.
fn q45k_scale(packed: &[u8], group: usize) -> (i16, u8) {
    let (scales, minima) = (&packed[..4], &packed[4..8]);
    if group < 4 {
        return (i16::from(scales[group] & 63), minima[group] & 63);
    }
    let both = packed[4 + group];
    let (scale, minimum) = (scales[group - 4] >> 2 & 48, minima[group - 4] >> 2 & 48);
    (i16::from(both & 15 | scale), both >> 4 | minimum)
}

/// Six bits less 32: two bytes of high pairs, four of low nibbles.
fn iq4xs_scale(packed: &[u8], group: usize) -> i16 {
    let high = u16::from_le_bytes([packed[0], packed[1]]) >> (2 * group) & 3;
    let low = packed[2 + group / 2] >> (4 * (group % 2)) & 15;
    i16::from(low) + 16 * high as i16 - 32
}

#[cfg(test)]
mod tests {
    use crate::backend::MatrixView;
    use crate::load::widen::widen;
    use model::quant::Format;

    /// A type, a block and the bits of its values a line, as the `gguf` package computes them.
    /// Written by `tests/real/gguf_vectors.py`.
    const VECTORS: &str = include_str!("blocks.txt");

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect()
    }

    #[test]
    fn every_block_has_the_reference_packages_bits() {
        let mut seen = Vec::new();
        for line in VECTORS.lines().filter(|line| !line.starts_with('#')) {
            let [kind, block, values] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
            let format = Format::from_gguf(kind.parse().unwrap()).unwrap();
            let block = bytes(block);
            assert_eq!(block.len(), format.block_bytes());
            let mut out = vec![0.0; format.block()];
            widen(&MatrixView::whole(format, &block, 1, format.block()), 0, &mut out);
            let expected = bytes(values);
            let expected = expected.chunks_exact(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
            assert_eq!(expected.len(), out.len());
            for (i, (found, expected)) in out.iter().zip(expected).enumerate() {
                let found = found.to_bits();
                assert_eq!(found, expected, "{format:?} weight {i}: {found:08x}, not {expected:08x}");
            }
            seen.push(format);
        }
        for format in Format::ALL.into_iter().filter(|f| f.block() > 1) {
            let count = seen.iter().filter(|f| **f == format).count();
            assert!(count >= 3, "{count} blocks of {format:?}");
        }
    }
}
