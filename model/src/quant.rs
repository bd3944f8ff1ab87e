//! Weight formats: a property of a tensor, not of a layer.

/// How a tensor's values are stored: one number after the other, or in GGUF's blocks (names and layouts are ggml's).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Format {
    F32,
    Bf16,
    F16,
    /// One byte: sign, four bits of exponent, three of mantissa. A weight only with a scale beside it, like the integers.
    F8E4m3,
    I8,
    U8,
    I32,
    I64,
    /// 32 weights: f16 scale, 16 bytes of nibbles, offset 8.
    Q4_0,
    /// 32 weights: f16 scale and minimum, 16 bytes of nibbles.
    Q4_1,
    /// 32 weights: f16 scale, 32 fifth bits, 16 bytes of nibbles, offset 16.
    Q5_0,
    /// 32 weights: f16 scale and minimum, 32 fifth bits, 16 bytes of nibbles.
    Q5_1,
    /// 32 weights: f16 scale, 32 int8.
    Q8_0,
    /// 256 weights in 16 groups, 2 bits each, 4-bit scales and minima.
    Q2K,
    /// 256 weights in 16 groups, 3 bits each, 6-bit scales.
    Q3K,
    /// 256 weights in 8 groups, 4 bits each, 6-bit scales and minima.
    Q4K,
    /// 256 weights in 8 groups, 5 bits each, 6-bit scales and minima.
    Q5K,
    /// 256 weights in 16 groups, 6 bits each, 8-bit scales.
    Q6K,
    /// 32 weights: f16 scale, 16 bytes of indices into a table.
    Iq4Nl,
    /// 256 weights in 8 groups, 6-bit scales, indices into the same table.
    Iq4Xs,
    /// 32 weights: a power of two, 16 bytes of nibbles that are OCP's e2m1.
    Mxfp4,
}

impl Format {
    /// Every format, in order.
    pub const ALL: [Format; 21] = [
        Format::F32,
        Format::Bf16,
        Format::F16,
        Format::F8E4m3,
        Format::I8,
        Format::U8,
        Format::I32,
        Format::I64,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q5_1,
        Format::Q8_0,
        Format::Q2K,
        Format::Q3K,
        Format::Q4K,
        Format::Q5K,
        Format::Q6K,
        Format::Iq4Nl,
        Format::Iq4Xs,
        Format::Mxfp4,
    ];

    /// Values in one block; a row is a whole number of blocks.
    pub const fn block(self) -> usize {
        match self {
            Format::F32 | Format::Bf16 | Format::F16 | Format::F8E4m3 => 1,
            Format::I8 | Format::U8 | Format::I32 | Format::I64 => 1,
            Format::Q4_0 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 | Format::Q8_0 => 32,
            Format::Iq4Nl | Format::Mxfp4 => 32,
            Format::Q2K | Format::Q3K | Format::Q4K | Format::Q5K | Format::Q6K | Format::Iq4Xs => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Format::F8E4m3 | Format::I8 | Format::U8 => 1,
            Format::Bf16 | Format::F16 => 2,
            Format::F32 | Format::I32 => 4,
            Format::I64 => 8,
            Format::Q4_0 | Format::Iq4Nl => 18,
            Format::Q4_1 => 20,
            Format::Q5_0 => 22,
            Format::Q5_1 => 24,
            Format::Q8_0 => 34,
            Format::Q2K => 84,
            Format::Q3K => 110,
            Format::Q4K => 144,
            Format::Q5K => 176,
            Format::Q6K => 210,
            Format::Iq4Xs => 136,
            Format::Mxfp4 => 17,
        }
    }

    /// How values follow from codes; `None` where they are plain numbers, or say nothing without what lies beside them.
    pub fn scheme(self) -> Option<Scheme> {
        let half = Scales::Single(ScaleFormat::F16);
        let integer = |bits, offset| Code::Integer { bits, offset };
        let nested = |groups| Scales::Nested { groups };
        let (code, group, scales, shift) = match self {
            Format::F32 | Format::Bf16 | Format::F16 | Format::F8E4m3 => return None,
            Format::I8 | Format::U8 | Format::I32 | Format::I64 => return None,
            Format::Q4_0 => (integer(4, 8), 32, half, Shift::None),
            Format::Q4_1 => (integer(4, 0), 32, half, Shift::Minimum),
            Format::Q5_0 => (integer(5, 16), 32, half, Shift::None),
            Format::Q5_1 => (integer(5, 0), 32, half, Shift::Minimum),
            Format::Q8_0 => (integer(8, 128), 32, half, Shift::None),
            Format::Q2K => (integer(2, 0), 16, nested(16), Shift::Minimum),
            Format::Q3K => (integer(3, 4), 16, nested(16), Shift::None),
            Format::Q4K => (integer(4, 0), 32, nested(8), Shift::Minimum),
            Format::Q5K => (integer(5, 0), 32, nested(8), Shift::Minimum),
            Format::Q6K => (integer(6, 32), 16, nested(16), Shift::None),
            Format::Iq4Nl => (Code::Iq4Nl, 32, half, Shift::None),
            Format::Iq4Xs => (Code::Iq4Nl, 32, nested(8), Shift::None),
            Format::Mxfp4 => (Code::E2m1, 32, Scales::Single(ScaleFormat::E8m0), Shift::None),
        };
        Some(Scheme { code, group, scales, shift })
    }

    /// Bytes of `values` values, which must be whole blocks.
    pub fn bytes(self, values: usize) -> usize {
        assert!(values.is_multiple_of(self.block()), "{values} values are not whole blocks of {}", self.block());
        values / self.block() * self.block_bytes()
    }

    /// The format of a number in ggml's own list of types.
    pub const fn from_gguf(kind: u32) -> Option<Format> {
        Some(match kind {
            0 => Format::F32,
            1 => Format::F16,
            2 => Format::Q4_0,
            3 => Format::Q4_1,
            6 => Format::Q5_0,
            7 => Format::Q5_1,
            8 => Format::Q8_0,
            10 => Format::Q2K,
            11 => Format::Q3K,
            12 => Format::Q4K,
            13 => Format::Q5K,
            14 => Format::Q6K,
            20 => Format::Iq4Nl,
            23 => Format::Iq4Xs,
            30 => Format::Bf16,
            39 => Format::Mxfp4,
            _ => return None,
        })
    }

    /// The format of a type's name in a safetensors header.
    pub fn from_safetensors(dtype: &str) -> Option<Format> {
        Some(match dtype {
            "F32" => Format::F32,
            "BF16" => Format::Bf16,
            "F16" => Format::F16,
            "F8_E4M3" => Format::F8E4m3,
            "I8" => Format::I8,
            // Exponents alone are whole bytes too.
            "U8" | "F8_E8M0" => Format::U8,
            "I32" => Format::I32,
            "I64" => Format::I64,
            _ => return None,
        })
    }

    /// Whether a stored number is the value itself, with nothing beside it.
    pub const fn is_plain(self) -> bool {
        matches!(self, Format::F32 | Format::Bf16 | Format::F16)
    }
}

/// How the values of a quantised format follow from what is stored. Every such format of every container is one of
/// these, so that a backend has one kernel for all of them:
///
/// ```text
/// value = decode(code) * scale [- minimum]      each operation rounded once, in f32
/// scale = scale of a run of groups [* integer of the group]
/// ```
/// Groups are counted along the whole stored row, from its first input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Scheme {
    pub code: Code,
    /// Neighbouring inputs of one output that share scale and minimum.
    pub group: usize,
    pub scales: Scales,
    pub shift: Shift,
}

/// What a code stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// An unsigned integer of `bits`, less `offset`.
    Integer { bits: u32, offset: u32 },
    /// 4 bits: sign, two of exponent, one of mantissa (OCP MX): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
    E2m1,
    /// 4 bits: an index into ggml's table of sixteen unevenly spaced levels.
    Iq4Nl,
    /// 8 bits: sign, four of exponent, three of mantissa (OCP FP8), no infinities; 0x7f and 0xff are NaN.
    E4m3,
}

/// ggml's sixteen levels.
pub const IQ4_NL: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The eight magnitudes of E2M1, by the code's lower three bits.
pub const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

impl Code {
    /// Bits of a code.
    pub const fn bits(self) -> u32 {
        match self {
            Code::Integer { bits, .. } => bits,
            Code::E2m1 | Code::Iq4Nl => 4,
            Code::E4m3 => 8,
        }
    }

    /// The number that a code stands for; `point` takes the place of an integer's offset ([`Shift::Point`]).
    pub fn decode(self, code: u8, point: Option<u8>) -> f32 {
        match self {
            Code::Integer { offset, .. } => f32::from(code) - point.map_or(offset as f32, f32::from),
            Code::E2m1 if code & 8 == 0 => E2M1[usize::from(code & 7)],
            Code::E2m1 => -E2M1[usize::from(code & 7)],
            Code::Iq4Nl => f32::from(IQ4_NL[usize::from(code & 15)]),
            Code::E4m3 => e4m3(code),
        }
    }
}

fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (u32::from(code >> 3 & 15), u32::from(code & 7));
    let magnitude = match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa as f32 / 512.0,
        _ => f32::from_bits(((exponent + 120) << 23) | (mantissa << 20)),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Where a group's scale comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scales {
    /// One number a group, stored in this format.
    Single(ScaleFormat),
    /// An f16 for `groups` groups, times an integer of each group's own (from -128 to 127).
    Nested { groups: usize },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleFormat {
    F32,
    F16,
    Bf16,
    /// A power of two: the exponent plus 127.
    E8m0,
}

impl ScaleFormat {
    pub const fn bytes(self) -> usize {
        match self {
            ScaleFormat::F32 => 4,
            ScaleFormat::F16 | ScaleFormat::Bf16 => 2,
            ScaleFormat::E8m0 => 1,
        }
    }

    /// Of scales that are a tensor of their own; whole bytes are exponents.
    pub const fn stored_as(format: Format) -> Option<ScaleFormat> {
        Some(match format {
            Format::F32 => ScaleFormat::F32,
            Format::F16 => ScaleFormat::F16,
            Format::Bf16 => ScaleFormat::Bf16,
            Format::U8 => ScaleFormat::E8m0,
            _ => return None,
        })
    }
}

/// What moves a group's values off zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shift {
    None,
    /// Subtracted after scaling; stored as the scale is (nested with integers from 0 to 255).
    Minimum,
    /// An integer (0 to 255) subtracted from the code before scaling, in place of the code's offset (AWQ, GPTQ).
    Point,
}

/// What the engine computes in: matmul inputs are rounded to it once, and the cache is stored in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    F32,
    Bf16,
}

impl Dtype {
    pub const fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
        }
    }
}

impl std::str::FromStr for Dtype {
    type Err = String;

    fn from_str(s: &str) -> Result<Dtype, String> {
        match s {
            "f32" | "float32" => Ok(Dtype::F32),
            "bf16" | "bfloat16" => Ok(Dtype::Bf16),
            other => Err(format!("unknown dtype {other:?}; known: f32, bf16")),
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
        })
    }
}
