//! The header of a GGUF file, versions 2 and 3: metadata, then a table of tensors, then their data.
//!
//! ```text
//! "GGUF" version tensors keys | key type value ... | name dims ne[0..] type offset ... | pad | data
//! ```
//! GGUF counts a shape from the fastest dimension (`ne[0]` is the columns); an [`Entry`] has it reversed.

use super::{Encoding, Entry, bad, bytes_of};
use model::fault::Fault;
use model::gguf::Value;
use model::quant::Format;
use std::collections::BTreeMap;

/// A file's header, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    pub metadata: BTreeMap<String, Value>,
    /// In file order.
    pub entries: Vec<Entry>,
}

/// Dimensions a tensor may have.
const DIMENSIONS_MAX: u32 = 4;
/// How deep arrays of arrays may go; published files have none.
const DEPTH_MAX: usize = 4;
const ALIGNMENT_DEFAULT: u64 = 32;
const ALIGNMENT_MAX: u64 = 1 << 20;
/// Bytes of the shortest possible key, and of the shortest possible row of the tensor table.
const KEY_BYTES_MIN: usize = 8 + 4 + 1;
const TENSOR_BYTES_MIN: usize = 8 + 4 + 4 + 8;

/// Reads the header of a whole file's bytes.
pub fn header(file: &[u8]) -> Result<Header, Fault> {
    let mut cursor = Cursor { file, at: 0 };
    if cursor.take(4, "the magic number")? != b"GGUF" {
        return Err(bad("the file does not begin with GGUF"));
    }
    let version = cursor.u32("the version")?;
    if version != 2 && version != 3 {
        return Err(bad(format!("GGUF version {version} is not known; known: 2, 3 (little-endian)")));
    }
    let tensors = cursor.length("the number of tensors", TENSOR_BYTES_MIN)?;
    let keys = cursor.length("the number of keys", KEY_BYTES_MIN)?;
    let mut metadata = BTreeMap::new();
    for _ in 0..keys {
        let key = cursor.string("a key")?;
        let kind = cursor.u32(&key)?;
        let value = cursor.value(kind, &key, 0)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(bad(format!("the key {key} stands in the metadata twice")));
        }
    }
    let mut rows = Vec::new();
    for _ in 0..tensors {
        rows.push(cursor.row()?);
    }
    let alignment = match metadata.get("general.alignment") {
        None => ALIGNMENT_DEFAULT,
        Some(Value::U64(n)) if n.is_power_of_two() && *n <= ALIGNMENT_MAX => *n,
        Some(other) => return Err(bad(format!("general.alignment = {other:?} is not a power of two up to 2^20"))),
    };
    let start = cursor.at.next_multiple_of(alignment as usize);
    let entries = place(rows, start, alignment, file.len())?;
    Ok(Header { metadata, entries })
}

/// A row of the tensor table, as it stands.
struct Row {
    name: String,
    shape: Vec<usize>,
    kind: u32,
    offset: u64,
}

/// Turns the table's offsets into ranges of the file, none of which overlap or reach past its end.
fn place(mut rows: Vec<Row>, start: usize, alignment: u64, size: usize) -> Result<Vec<Entry>, Fault> {
    rows.sort_by(|a, b| (a.offset, &a.name).cmp(&(b.offset, &b.name)));
    let data = size.saturating_sub(start) as u64;
    let mut entries: Vec<Entry> = Vec::with_capacity(rows.len());
    let mut names = std::collections::BTreeSet::new();
    let mut taken = 0u64;
    for (index, row) in rows.iter().enumerate() {
        let (name, offset) = (&row.name, row.offset);
        if !names.insert(name.as_str()) {
            return Err(bad(format!("tensor {name} stands in the table twice")));
        }
        if !offset.is_multiple_of(alignment) {
            return Err(bad(format!("tensor {name} at byte {offset} of the data is not aligned to {alignment}")));
        }
        if offset < taken {
            return Err(bad(format!("tensor {name} at byte {offset} of the data overlaps one that ends at {taken}")));
        }
        let encoding = encoding(row.kind);
        let bytes = match &encoding {
            Encoding::Known(format) => bytes_of(name, *format, &row.shape)? as u64,
            // Its size is not known here: all that the next tensor leaves.
            Encoding::Unknown(_) => rows.get(index + 1).map_or(data, |r| r.offset).min(data).saturating_sub(offset),
        };
        let end = offset.checked_add(bytes).filter(|&end| end <= data);
        let Some(end) = end else {
            return Err(bad(format!(
                "tensor {name} claims {bytes} bytes at {offset} of the data, which has {data}: the file is truncated or corrupt"
            )));
        };
        taken = end;
        let range = start + offset as usize..start + end as usize;
        entries.push(Entry { name: name.clone(), encoding, shape: row.shape.clone(), range });
    }
    Ok(entries)
}

fn encoding(kind: u32) -> Encoding {
    Encoding::Known(match kind {
        0 => Format::F32,
        1 => Format::F16,
        2 => Format::Q4_0,
        3 => Format::Q4_1,
        8 => Format::Q8_0,
        14 => Format::Q6K,
        30 => Format::Bf16,
        other => return Encoding::Unknown(unknown(other)),
    })
}

/// What ggml calls the types that are not read here.
fn unknown(kind: u32) -> String {
    let name = match kind {
        6 => "Q5_0",
        7 => "Q5_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        15 => "Q8_K",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        39 => "MXFP4",
        _ => return format!("ggml type {kind}"),
    };
    name.to_owned()
}

/// A place in the file; every step forward is checked.
struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.file.len() - self.at
    }

    fn take(&mut self, bytes: usize, what: &str) -> Result<&'a [u8], Fault> {
        if bytes > self.left() {
            let (at, size) = (self.at, self.file.len());
            return Err(bad(format!("the file ends inside {what}: {bytes} bytes wanted at {at} of {size}")));
        }
        let taken = &self.file[self.at..self.at + bytes];
        self.at += bytes;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Fault> {
        let bytes = self.take(N, what)?;
        Ok(bytes.try_into().expect("take gave N bytes"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, Fault> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, Fault> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of things that take at least `each` bytes, which bounds it by what is left of the file.
    fn length(&mut self, what: &str, each: usize) -> Result<usize, Fault> {
        let claimed = self.u64(what)?;
        let most = self.left() / each;
        usize::try_from(claimed)
            .ok()
            .filter(|&n| n <= most)
            .ok_or_else(|| bad(format!("{what} claims {claimed}, the {} bytes left hold at most {most}", self.left())))
    }

    fn string(&mut self, what: &str) -> Result<String, Fault> {
        let length = self.length(what, 1)?;
        let bytes = self.take(length, what)?;
        // Vocabularies hold byte tokens that are not UTF-8 by themselves in some old files.
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    fn value(&mut self, kind: u32, key: &str, depth: usize) -> Result<Value, Fault> {
        Ok(match kind {
            0 => Value::U64(u64::from(self.array::<1>(key)?[0])),
            1 => Value::I64(i64::from(i8::from_le_bytes(self.array(key)?))),
            2 => Value::U64(u64::from(u16::from_le_bytes(self.array(key)?))),
            3 => Value::I64(i64::from(i16::from_le_bytes(self.array(key)?))),
            4 => Value::U64(u64::from(self.u32(key)?)),
            5 => Value::I64(i64::from(i32::from_le_bytes(self.array(key)?))),
            6 => Value::F64(f64::from(f32::from_le_bytes(self.array(key)?))),
            7 => Value::Bool(self.array::<1>(key)?[0] != 0),
            8 => Value::Text(self.string(key)?),
            9 => {
                if depth == DEPTH_MAX {
                    return Err(bad(format!("{key}: arrays nest deeper than {DEPTH_MAX}")));
                }
                let kind = self.u32(key)?;
                let length = self.length(key, value_bytes_min(kind))?;
                let mut values = Vec::new();
                for _ in 0..length {
                    values.push(self.value(kind, key, depth + 1)?);
                }
                Value::List(values)
            }
            10 => Value::U64(self.u64(key)?),
            11 => Value::I64(i64::from_le_bytes(self.array(key)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(key)?)),
            other => return Err(bad(format!("{key} has type {other}, which GGUF does not define"))),
        })
    }

    fn row(&mut self) -> Result<Row, Fault> {
        let name = self.string("a tensor's name")?;
        let dimensions = self.u32(&name)?;
        if dimensions == 0 || dimensions > DIMENSIONS_MAX {
            return Err(bad(format!("tensor {name} has {dimensions} dimensions, 1 to {DIMENSIONS_MAX} are possible")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let d = self.u64(&name)?;
            let d = usize::try_from(d).map_err(|_| bad(format!("tensor {name} has a dimension of {d}")))?;
            shape.push(d);
        }
        shape.reverse();
        Ok(Row { kind: self.u32(&name)?, offset: self.u64(&name)?, name, shape })
    }
}

/// Least bytes of one value of a type.
fn value_bytes_min(kind: u32) -> usize {
    match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        9 => 12,
        _ => 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn string(s: &str) -> Vec<u8> {
        let mut bytes = (s.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(s.as_bytes());
        bytes
    }

    fn key(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
        [&string(name)[..], &kind.to_le_bytes(), value].concat()
    }

    fn row(name: &str, ne: &[u64], kind: u32, offset: u64) -> Vec<u8> {
        let mut bytes = string(name);
        bytes.extend_from_slice(&(ne.len() as u32).to_le_bytes());
        for d in ne {
            bytes.extend_from_slice(&d.to_le_bytes());
        }
        bytes.extend_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(&offset.to_le_bytes());
        bytes
    }

    fn file(keys: &[Vec<u8>], rows: &[Vec<u8>], data: usize) -> Vec<u8> {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend_from_slice(&(rows.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&(keys.len() as u64).to_le_bytes());
        bytes.extend(keys.concat());
        bytes.extend(rows.concat());
        bytes.resize(bytes.len().next_multiple_of(32) + data, 0);
        bytes
    }

    fn sound() -> Vec<u8> {
        let tokens = [&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &string("a"), &string("bc")].concat();
        file(
            &[
                key("general.architecture", 8, &string("llama")),
                key("llama.block_count", 4, &2u32.to_le_bytes()),
                key("tokenizer.ggml.tokens", 9, &tokens),
            ],
            &[row("q", &[64, 3], 8, 0), row("n", &[5], 0, 224)],
            224 + 20,
        )
    }

    #[test]
    fn a_header_gives_metadata_and_reversed_shapes() {
        let bytes = sound();
        let start = bytes.len() - 244;
        let found = header(&bytes).unwrap();
        assert_eq!(found.metadata["llama.block_count"], Value::U64(2));
        let tokens = vec![Value::Text("a".into()), Value::Text("bc".into())];
        assert_eq!(found.metadata["tokenizer.ggml.tokens"], Value::List(tokens));
        assert_eq!(found.entries[0].shape, [3, 64]);
        assert_eq!(found.entries[0].range, start..start + 2 * 3 * 34);
        assert_eq!(found.entries[1].range, start + 224..start + 244);
    }

    #[test]
    fn a_lying_table_is_refused_with_its_numbers() {
        let align = |n: u32| key("general.alignment", 4, &n.to_le_bytes());
        for (keys, rows, data, said) in [
            (vec![], vec![row("a", &[8], 0, 0), row("b", &[8], 0, 0)], 64, "overlaps"),
            (vec![], vec![row("a", &[8], 0, 0), row("a", &[8], 0, 32)], 64, "twice"),
            (vec![], vec![row("a", &[8], 0, 4)], 64, "not aligned"),
            (vec![], vec![row("a", &[33], 8, 0)], 64, "not whole blocks"),
            (vec![], vec![row("a", &[17], 0, 0)], 64, "claims 68 bytes at 0 of the data, which has 64"),
            (vec![], vec![row("a", &[8], 0, u64::MAX - 31)], 64, "truncated or corrupt"),
            (vec![], vec![row("a", &[1 << 40, 1 << 40], 0, 0)], 64, "too many"),
            (vec![], vec![row("a", &[1; 5], 0, 0)], 64, "5 dimensions"),
            (vec![align(24)], vec![], 0, "not a power of two"),
            (vec![align(32), align(32)], vec![], 0, "twice"),
            (vec![key("k", 13, &[])], vec![], 0, "does not define"),
        ] {
            let fault = header(&file(&keys, &rows, data)).unwrap_err();
            assert!(fault.text.contains(said), "{said}: {}", fault.text);
        }
    }

    #[test]
    fn a_claimed_length_is_bounded_by_the_file_before_anything_is_reserved() {
        let huge = u64::MAX.to_le_bytes();
        let array = [&4u32.to_le_bytes()[..], &huge].concat();
        for bytes in [
            [b"GGUF\x03\0\0\0", &huge[..], &[0; 8]].concat(),
            [b"GGUF\x03\0\0\0", &[0; 8], &huge[..]].concat(),
            file(&[key("k", 9, &array)], &[], 64),
            file(&[key("k", 8, &huge)], &[], 64),
        ] {
            assert!(header(&bytes).unwrap_err().text.contains("hold at most"));
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = sound();
        for length in 0..bytes.len() {
            assert!(header(&bytes[..length]).is_err(), "{length} of {} bytes", bytes.len());
        }
    }

    #[test]
    fn no_flipped_header_byte_panics_or_reaches_outside_the_file() {
        let bytes = sound();
        for at in 0..bytes.len() - 244 {
            for flip in [1u8, 2, 16, 128, 255] {
                let mut broken = bytes.clone();
                broken[at] ^= flip;
                for e in header(&broken).map(|h| h.entries).unwrap_or_default() {
                    assert!(e.range.start <= e.range.end && e.range.end <= broken.len());
                }
            }
        }
    }
}
