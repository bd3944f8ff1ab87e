//! ggml's blocks as f32, bit for bit as the `gguf` package dequantises them: the same products in the same order.
//!
//! Blocks of 32 keep weight `i` in the low nibble of byte `i` and weight `i + 16` in its high nibble. Blocks of 256
//! keep runs of 32 weights in the same bits of the same 32 bytes.

use half::f16;
use model::quant::Format;

/// Weights of the largest block.
pub const BLOCK_MAX: usize = 256;

/// ggml's sixteen uneven levels.
pub const IQ4_LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Twice the numbers of OCP's e2m1: with the sign in the highest bit.
const E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The values of one block of `format` into the first of `out`.
pub fn dequantise(format: Format, bytes: &[u8], out: &mut [f32; BLOCK_MAX]) {
    assert_eq!(bytes.len(), format.block_bytes(), "a whole block of {format:?}");
    match format {
        Format::Q4_0 => small(out, half_at(bytes, 0), None, |i| nibble(&bytes[2..], i) as i32 - 8),
        Format::Q4_1 => {
            small(out, half_at(bytes, 0), Some(half_at(bytes, 2)), |i| nibble(&bytes[4..], i) as i32);
        }
        Format::Q5_0 => small(out, half_at(bytes, 0), None, |i| fifth(&bytes[2..], i) as i32 - 16),
        Format::Q5_1 => {
            small(out, half_at(bytes, 0), Some(half_at(bytes, 2)), |i| fifth(&bytes[4..], i) as i32);
        }
        Format::Q8_0 => small(out, half_at(bytes, 0), None, |i| bytes[2 + i] as i8 as i32),
        Format::Iq4Nl => {
            small(out, half_at(bytes, 0), None, |i| IQ4_LEVELS[nibble(&bytes[2..], i) as usize] as i32);
        }
        Format::Mxfp4 => {
            let scale = power_of_two_halved(bytes[0]);
            small(out, scale, None, |i| E2M1_DOUBLED[nibble(&bytes[1..], i) as usize] as i32);
        }
        Format::Q2K => q2k(bytes, out),
        Format::Q3K => q3k(bytes, out),
        Format::Q4K => q45k(bytes, None, &bytes[16..144], out),
        Format::Q5K => q45k(bytes, Some(&bytes[16..48]), &bytes[48..176], out),
        Format::Q6K => q6k(bytes, out),
        Format::Iq4Xs => iq4xs(bytes, out),
        plain => unreachable!("{plain:?} has no blocks"),
    }
}

pub fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// `2^(exponent - 128)`: half of what an e8m0 byte means, since the table beside it is doubled. 255 is no NaN here.
pub fn power_of_two_halved(exponent: u8) -> f32 {
    f32::from_bits(if exponent < 2 { 0x0020_0000 << exponent } else { (exponent as u32 - 1) << 23 })
}

/// A block of 32 with one scale.
fn small(out: &mut [f32; BLOCK_MAX], scale: f32, minimum: Option<f32>, code: impl Fn(usize) -> i32) {
    for (i, out) in out[..32].iter_mut().enumerate() {
        let value = scale * code(i) as f32;
        *out = minimum.map_or(value, |minimum| value + minimum);
    }
}

fn nibble(bytes: &[u8], i: usize) -> u8 {
    (bytes[i % 16] >> (4 * (i / 16))) & 15
}

/// Four bytes of highest bits, then the nibbles.
fn fifth(bytes: &[u8], i: usize) -> u8 {
    nibble(&bytes[4..], i) | ((bytes[i / 8] >> (i % 8)) & 1) << 4
}

/// Sixteen bytes of (scale, minimum) nibbles, 64 of bit pairs, the two f16.
fn q2k(bytes: &[u8], out: &mut [f32; BLOCK_MAX]) {
    let (scale, minimum) = (half_at(bytes, 80), half_at(bytes, 82));
    for (i, out) in out.iter_mut().enumerate() {
        let both = bytes[i / 16];
        let code = (bytes[16 + i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4))) & 3;
        *out = scale * f32::from(both & 15) * f32::from(code) - minimum * f32::from(both >> 4);
    }
}

/// 32 bytes of third bits (set where nothing is taken away), 64 of bit pairs, twelve of scales, the f16.
fn q3k(bytes: &[u8], out: &mut [f32; BLOCK_MAX]) {
    let scale = half_at(bytes, 108);
    for (i, out) in out.iter_mut().enumerate() {
        let low = (bytes[32 + i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4))) & 3;
        let high = (bytes[i % 32] >> (i / 32)) & 1;
        let code = low as i32 - if high == 0 { 4 } else { 0 };
        *out = scale * q3k_scale(&bytes[96..108], i / 16) as f32 * code as f32;
    }
}

/// Six bits: the low four in a nibble of the first eight bytes, the high two in the last four.
pub fn q3k_scale(scales: &[u8], group: usize) -> i32 {
    let low = (scales[group % 8] >> (4 * (group / 8))) & 15;
    let high = (scales[8 + group % 4] >> (2 * (group / 4))) & 3;
    (low | high << 4) as i32 - 32
}

/// Two f16, twelve bytes of scales and minima, where given 32 bytes of fifth bits, nibbles.
fn q45k(bytes: &[u8], fifths: Option<&[u8]>, nibbles: &[u8], out: &mut [f32; BLOCK_MAX]) {
    let (scale, minimum) = (half_at(bytes, 0), half_at(bytes, 2));
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (s, m) = q45k_scale(&bytes[4..16], group);
        let (scale, minimum) = (scale * f32::from(s), minimum * f32::from(m));
        for (i, out) in out.iter_mut().enumerate() {
            let low = (nibbles[group / 2 * 32 + i] >> (4 * (group % 2))) & 15;
            let high = fifths.map_or(0, |bits| (bits[i] >> group) & 1);
            *out = scale * f32::from(low | high << 4) - minimum;
        }
    }
}

/// Scale and minimum of a group, six bits each: the first four groups' in the low bits of a byte of their own, the
/// others' split between a nibble and the two bits left over there.
pub fn q45k_scale(packed: &[u8], group: usize) -> (u8, u8) {
    let (d, m) = (&packed[..4], &packed[4..8]);
    if group < 4 {
        return (d[group] & 63, m[group] & 63);
    }
    let (g, both) = (group - 4, packed[4 + group]);
    ((both & 15) | ((d[g] >> 2) & 48), (both >> 4) | ((m[g] >> 2) & 48))
}

/// 128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales, an f16 scale of scales. Each half of 128 weights
/// holds four rows of 32, whose low bits are the nibbles of two runs of 32 bytes.
fn q6k(bytes: &[u8], out: &mut [f32; BLOCK_MAX]) {
    let scale = half_at(bytes, 208);
    for half in 0..2 {
        let (low, high) = (&bytes[half * 64..][..64], &bytes[128 + half * 32..][..32]);
        let scales = &bytes[192 + half * 8..][..8];
        for quarter in 0..4 {
            for i in 0..32 {
                let nibble = (low[(quarter % 2) * 32 + i] >> (4 * (quarter / 2))) & 15;
                let bits = nibble | (((high[i] >> (2 * quarter)) & 3) << 4);
                let group = scale * f32::from(scales[quarter * 2 + i / 16] as i8);
                out[half * 128 + quarter * 32 + i] = group * (f32::from(bits) - 32.0);
            }
        }
    }
}

/// An f16, two bytes of high bit pairs and four of low nibbles of the scales, sixteen bytes of indices a group.
fn iq4xs(bytes: &[u8], out: &mut [f32; BLOCK_MAX]) {
    let scale = half_at(bytes, 0);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let scale = scale * iq4xs_scale(&bytes[2..8], group) as f32;
        for (i, out) in out.iter_mut().enumerate() {
            *out = scale * f32::from(IQ4_LEVELS[nibble(&bytes[8 + group * 16..], i) as usize]);
        }
    }
}

/// A group's scale: `high:u16 low:[u8; 4]`, six bits less 32.
pub fn iq4xs_scale(packed: &[u8], group: usize) -> i32 {
    let high = u16::from_le_bytes([packed[0], packed[1]]);
    let low = (packed[2 + group / 2] >> (4 * (group % 2))) & 15;
    (low as i32 | ((high >> (2 * group)) & 3) as i32 * 16) - 32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For each type: name, blocks in hex, the bits of the values in hex, as the `gguf` package (0.x) computed them.
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
            let mut out = [0.0; BLOCK_MAX];
            dequantise(format, &block, &mut out);
            let expected = bytes(values);
            let expected: Vec<u32> =
                expected.chunks_exact(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]])).collect();
            assert_eq!(expected.len(), format.block());
            for (i, (found, expected)) in out.iter().zip(expected).enumerate() {
                // Which NaN an infinity times zero gives is the processor's affair.
                let both_nan = found.is_nan() && f32::from_bits(expected).is_nan();
                let (bits, wanted) = (found.to_bits(), expected);
                assert!(bits == wanted || both_nan, "{format:?} weight {i}: {bits:08x}, not {wanted:08x}");
            }
            seen.push(format);
        }
        for format in Format::ALL.into_iter().filter(|f| f.block() > 1) {
            let count = seen.iter().filter(|f| **f == format).count();
            assert!(count >= 3, "{count} blocks of {format:?}");
        }
    }
}
