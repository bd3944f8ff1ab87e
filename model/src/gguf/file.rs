//! The bytes of a GGUF file's header: metadata and the list of tensors. What the keys mean is told elsewhere.
//!
//! ```text
//! "GGUF" version:u32 tensors:u64 pairs:u64 | pairs: key kind:u32 value | tensors: name dims:u32 dim:u64.. kind:u32 offset:u64 | pad | data
//! ```
//! Little-endian versions 2 and 3. Every length is checked against the bytes that are left before anything is
//! allocated for it, so a hostile file costs no more than a constant times its own size.

use std::collections::BTreeMap;

use crate::error::SpecError;
use crate::quant::Format;

/// A metadata value. All integer widths become 64 bits.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    U64(u64),
    I64(i64),
    F64(f64),
    Bool(bool),
    Text(String),
    List(Vec<Value>),
}

impl Value {
    /// The value as a number that is not negative, whatever its stored width.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Value::U64(number) => Some(*number),
            Value::I64(number) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    pub fn as_i64(&self) -> Option<i64> {
        match self {
            Value::U64(number) => i64::try_from(*number).ok(),
            Value::I64(number) => Some(*number),
            _ => None,
        }
    }

    /// Any number, integers too.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::U64(number) => Some(*number as f64),
            Value::I64(number) => Some(*number as f64),
            Value::F64(number) => Some(*number),
            _ => None,
        }
    }

    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        }
    }

    pub fn as_text(&self) -> Option<&str> {
        match self {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn as_list(&self) -> Option<&[Value]> {
        match self {
            Value::List(items) => Some(items),
            _ => None,
        }
    }
}

/// One tensor's entry. Its bytes lie at `Gguf::data_offset + offset`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    /// As stored: the first dimension is the contiguous one, so a `[rows, columns]` matrix reads `[columns, rows]`.
    pub dims: Vec<u64>,
    /// The number of the storage type in ggml's own list.
    pub kind: u32,
    /// From the start of the data section; a multiple of the alignment.
    pub offset: u64,
}

impl TensorInfo {
    /// The storage format, where it is one that the engine reads.
    pub fn format(&self) -> Option<Format> {
        Format::from_gguf(self.kind)
    }

    /// How many values the tensor holds. Parsing has proved that the product fits.
    pub fn values(&self) -> u64 {
        self.dims.iter().product()
    }
}

/// A parsed header.
#[derive(Debug, Clone, PartialEq)]
pub struct Gguf {
    pub metadata: BTreeMap<String, Value>,
    /// In the file's order.
    pub tensors: Vec<TensorInfo>,
    /// Where the tensors' bytes begin in the file; a multiple of the alignment.
    pub data_offset: u64,
}

/// The largest list of real files is a tokenizer's merges, under a million.
const LIST_MAX: u64 = 1 << 24;
/// ggml has tensors of at most four dimensions.
const DIMS_MAX: u32 = 4;
/// Lists of lists appear in no known file; the bound keeps recursion off the stack's end.
const DEPTH_MAX: u32 = 4;
const ALIGNMENT_DEFAULT: u64 = 32;

/// Parses the header. `bytes` may be the whole file or a prefix; a prefix that ends inside the header gives
/// [`SpecError::Truncated`], so that a reader may come back with more.
pub fn parse(bytes: &[u8]) -> Result<Gguf, SpecError> {
    let mut cursor = Cursor { bytes, at: 0 };
    if cursor.take(4)? != b"GGUF" {
        return Err(bad("magic", String::from_utf8_lossy(&bytes[..4]), "a GGUF file begins with \"GGUF\""));
    }
    let version = cursor.u32()?;
    if !(2..=3).contains(&version) {
        return Err(bad("version", version, "little-endian versions 2 and 3 are read"));
    }
    let tensors = cursor.u64()?;
    let pairs = cursor.u64()?;

    let mut metadata = BTreeMap::new();
    for _ in 0..pairs {
        let key = cursor.text("a metadata key")?;
        let kind = cursor.u32()?;
        let value = cursor.value(kind, &key, 0)?;
        if metadata.contains_key(&key) {
            return Err(bad(&key, "given twice", "a metadata key stands once"));
        }
        metadata.insert(key, value);
    }

    let alignment = match metadata.get("general.alignment") {
        None => ALIGNMENT_DEFAULT,
        Some(value) => value
            .as_u64()
            .filter(|alignment| alignment.is_power_of_two() && *alignment <= 1 << 20)
            .ok_or_else(|| bad("general.alignment", format!("{value:?}"), "a power of two up to 2^20"))?,
    };
    let tensors = (0..tensors).map(|_| cursor.tensor(alignment)).collect::<Result<Vec<_>, _>>()?;
    let data_offset = (cursor.at as u64).next_multiple_of(alignment);
    Ok(Gguf { metadata, tensors, data_offset })
}

fn bad(key: &str, value: impl ToString, why: &str) -> SpecError {
    SpecError::Bad { key: key.to_string(), value: value.to_string(), why: why.to_string() }
}

/// A position in the bytes. Every read advances it or fails without advancing.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: u64) -> Result<&'a [u8], SpecError> {
        let left = &self.bytes[self.at..];
        if count > left.len() as u64 {
            return Err(SpecError::Truncated {
                bytes: self.bytes.len() as u64,
                wanted: (self.at as u64).saturating_add(count),
            });
        }
        self.at += count as usize;
        Ok(&left[..count as usize])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], SpecError> {
        Ok(self.take(N as u64)?.try_into().expect("take gives as many bytes as asked"))
    }

    fn u32(&mut self) -> Result<u32, SpecError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, SpecError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A string; `what` names it in errors. Text that is not UTF-8 is refused: replacing its bytes could make two tokens one.
    fn text(&mut self, what: &str) -> Result<String, SpecError> {
        let length = self.u64()?;
        let bytes = self.take(length)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_string()),
            Err(error) => Err(bad(what, String::from_utf8_lossy(bytes), &format!("not UTF-8: {error}"))),
        }
    }

    fn value(&mut self, kind: u32, key: &str, depth: u32) -> Result<Value, SpecError> {
        Ok(match kind {
            0 => Value::U64(u8::from_le_bytes(self.array()?).into()),
            1 => Value::I64(i8::from_le_bytes(self.array()?).into()),
            2 => Value::U64(u16::from_le_bytes(self.array()?).into()),
            3 => Value::I64(i16::from_le_bytes(self.array()?).into()),
            4 => Value::U64(self.u32()?.into()),
            5 => Value::I64(i32::from_le_bytes(self.array()?).into()),
            6 => Value::F64(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text(key)?),
            9 => self.list(key, depth)?,
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            unknown => return Err(bad(key, format!("value type {unknown}"), "GGUF has the value types 0 to 12")),
        })
    }

    fn list(&mut self, key: &str, depth: u32) -> Result<Value, SpecError> {
        if depth >= DEPTH_MAX {
            return Err(bad(key, format!("lists nested {depth} deep"), "deeper than any real file"));
        }
        let kind = self.u32()?;
        let count = self.u64()?;
        if count > LIST_MAX {
            return Err(bad(key, format!("a list of {count}"), &format!("at most {LIST_MAX} items are read")));
        }
        let smallest = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            9 => 12,
            _ => 8,
        };
        let left = (self.bytes.len() - self.at) as u64;
        if count * smallest > left {
            return Err(SpecError::Truncated {
                bytes: self.bytes.len() as u64,
                wanted: self.at as u64 + count * smallest,
            });
        }
        let mut items = Vec::with_capacity(count as usize);
        for _ in 0..count {
            items.push(self.value(kind, key, depth + 1)?);
        }
        Ok(Value::List(items))
    }

    fn tensor(&mut self, alignment: u64) -> Result<TensorInfo, SpecError> {
        let name = self.text("a tensor's name")?;
        let count = self.u32()?;
        if count > DIMS_MAX {
            return Err(bad(&name, format!("{count} dimensions"), "a tensor has at most 4"));
        }
        let dims = (0..count).map(|_| self.u64()).collect::<Result<Vec<_>, _>>()?;
        let values = dims.iter().try_fold(1u64, |product, dim| product.checked_mul(*dim));
        if values.is_none_or(|values| values > i64::MAX as u64) {
            return Err(bad(&name, format!("dimensions {dims:?}"), "more values than 63 bits count"));
        }
        let kind = self.u32()?;
        let offset = self.u64()?;
        if !offset.is_multiple_of(alignment) {
            return Err(bad(
                &name,
                format!("offset {offset}"),
                &format!("not a multiple of the alignment {alignment}"),
            ));
        }
        Ok(TensorInfo { name, dims, kind, offset })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }

    /// A file with one pair of most kinds, a list of strings and one tensor.
    fn sample() -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(1u64.to_le_bytes());
        out.extend(6u64.to_le_bytes());
        text(&mut out, "general.alignment");
        out.extend(4u32.to_le_bytes());
        out.extend(64u32.to_le_bytes());
        text(&mut out, "a.signed");
        out.extend(5u32.to_le_bytes());
        out.extend((-7i32).to_le_bytes());
        text(&mut out, "a.float");
        out.extend(6u32.to_le_bytes());
        out.extend(1.5f32.to_le_bytes());
        text(&mut out, "a.flag");
        out.extend(7u32.to_le_bytes());
        out.push(1);
        text(&mut out, "a.text");
        out.extend(8u32.to_le_bytes());
        text(&mut out, "grüße");
        text(&mut out, "a.list");
        out.extend(9u32.to_le_bytes());
        out.extend(8u32.to_le_bytes());
        out.extend(2u64.to_le_bytes());
        text(&mut out, "x");
        text(&mut out, "");
        text(&mut out, "token_embd.weight");
        out.extend(2u32.to_le_bytes());
        out.extend(32u64.to_le_bytes());
        out.extend(5u64.to_le_bytes());
        out.extend(8u32.to_le_bytes());
        out.extend(128u64.to_le_bytes());
        out
    }

    #[test]
    fn a_header_is_read_with_all_its_kinds() {
        let bytes = sample();
        let gguf = parse(&bytes).unwrap();
        let get = |key: &str| &gguf.metadata[key];
        assert_eq!(get("general.alignment"), &Value::U64(64));
        assert_eq!(get("a.signed"), &Value::I64(-7));
        assert_eq!(get("a.float"), &Value::F64(1.5));
        assert_eq!(get("a.flag"), &Value::Bool(true));
        assert_eq!(get("a.text"), &Value::Text("grüße".into()));
        assert_eq!(get("a.list"), &Value::List(vec![Value::Text("x".into()), Value::Text(String::new())]));
        assert_eq!(gguf.data_offset, (bytes.len() as u64).next_multiple_of(64));
        let tensor = &gguf.tensors[0];
        assert_eq!((tensor.values(), tensor.format(), tensor.offset), (160, Some(Format::Q8_0), 128));
    }

    #[test]
    fn every_prefix_of_a_header_is_truncated_and_nothing_else() {
        let bytes = sample();
        for length in 0..bytes.len() {
            let error = parse(&bytes[..length]).unwrap_err();
            let SpecError::Truncated { bytes: have, wanted } = error else { panic!("{length}: {error}") };
            assert!(
                have == length as u64 && wanted > have && wanted <= bytes.len() as u64,
                "{length}: {have} {wanted}"
            );
        }
    }

    #[test]
    fn no_flipped_byte_makes_the_parser_panic() {
        let bytes = sample();
        for at in 0..bytes.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut broken = bytes.clone();
                broken[at] ^= flip;
                // Only the absence of a panic (and of a huge allocation) is claimed here.
                let _ = parse(&broken);
            }
        }
    }

    #[test]
    fn absurd_lengths_are_refused_before_allocation() {
        let mut list = b"GGUF".to_vec();
        list.extend(3u32.to_le_bytes());
        list.extend(0u64.to_le_bytes());
        list.extend(1u64.to_le_bytes());
        text(&mut list, "k");
        list.extend(9u32.to_le_bytes());
        list.extend(0u32.to_le_bytes());
        let head = list.len();
        list.extend((LIST_MAX + 1).to_le_bytes());
        assert!(matches!(parse(&list), Err(SpecError::Bad { .. })));
        list.truncate(head);
        list.extend(LIST_MAX.to_le_bytes());
        assert!(matches!(parse(&list), Err(SpecError::Truncated { .. })));

        let mut tensors = b"GGUF".to_vec();
        tensors.extend(2u32.to_le_bytes());
        tensors.extend(u64::MAX.to_le_bytes());
        tensors.extend(0u64.to_le_bytes());
        assert!(matches!(parse(&tensors), Err(SpecError::Truncated { .. })));
    }

    #[test]
    fn other_versions_and_other_files_are_refused_by_name() {
        for (head, expected) in
            [(&b"GGUF\x01\0\0\0"[..], "version"), (b"GGUF\0\0\0\x03", "version"), (b"ggml....", "magic")]
        {
            let error = parse(head).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
