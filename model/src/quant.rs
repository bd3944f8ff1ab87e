//! Weight formats: a property of a tensor, not of a layer.

/// How a tensor's values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Format {
    F32,
    Bf16,
    F16,
    /// GGUF: 32 weights, an f16 scale and 32 int8.
    Q8_0,
    /// GGUF: 32 weights, an f16 scale and 16 bytes of nibbles, offset 8.
    Q4_0,
    /// GGUF: 32 weights, f16 scale and minimum, 16 bytes of nibbles.
    Q4_1,
    /// GGUF: 256 weights in 16 groups, 6 bits each.
    Q6K,
}

impl Format {
    /// Values in one block; a row is a whole number of blocks.
    pub const fn block(self) -> usize {
        match self {
            Format::F32 | Format::Bf16 | Format::F16 => 1,
            Format::Q8_0 | Format::Q4_0 | Format::Q4_1 => 32,
            Format::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::Bf16 | Format::F16 => 2,
            Format::Q8_0 => 34,
            Format::Q4_0 => 18,
            Format::Q4_1 => 20,
            Format::Q6K => 210,
        }
    }

    /// Bytes of `values` values, which must be whole blocks.
    pub fn bytes(self, values: usize) -> usize {
        assert!(values.is_multiple_of(self.block()), "{values} values are not whole blocks of {}", self.block());
        values / self.block() * self.block_bytes()
    }
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
