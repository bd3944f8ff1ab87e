//! The tensors of a GGUF file, placed in its data and checked against its length. The header's bytes are read by
//! [`model::gguf::file`].
//!
//! GGUF counts a shape from the fastest dimension (`ne[0]` is the columns); an [`Entry`] has it reversed.

use super::{Encoding, Entry, bad, bytes_of};
use model::fault::Fault;
use model::gguf::{TensorInfo, Value, file};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// A file's header, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    pub metadata: BTreeMap<String, Value>,
    /// In file order.
    pub entries: Vec<Entry>,
    /// Where the data begins.
    pub data: usize,
}

/// Reads the header of a whole file's bytes.
pub fn header(bytes: &[u8]) -> Result<Header, Fault> {
    let gguf = file::parse(bytes).map_err(|e| bad(format!("truncated or corrupt: {e}")))?;
    let data = usize::try_from(gguf.data_offset).ok().filter(|&at| at <= bytes.len());
    let data =
        data.ok_or_else(|| bad(format!("truncated: the data begins at {} of {}", gguf.data_offset, bytes.len())))?;
    let entries = gguf.tensors.iter().map(|t| entry(t, data, bytes.len())).collect::<Result<Vec<_>, _>>()?;
    check_apart(&entries)?;
    Ok(Header { metadata: gguf.metadata, entries, data })
}

/// A tensor's place in the file.
fn entry(tensor: &TensorInfo, data: usize, size: usize) -> Result<Entry, Fault> {
    let name = &tensor.name;
    let absurd = |what: &str| bad(format!("tensor {name}: {what} is truncated or corrupt"));
    let dims: Option<Vec<usize>> = tensor.dims.iter().rev().map(|&d| usize::try_from(d).ok()).collect();
    let shape = dims.ok_or_else(|| absurd("its shape"))?;
    let start = usize::try_from(tensor.offset).ok().and_then(|at| at.checked_add(data));
    let start = start.ok_or_else(|| absurd("its offset"))?;
    let (encoding, bytes) = match tensor.format() {
        Some(format) => (Encoding::Known(format), bytes_of(name, format, &shape)?),
        None => (Encoding::Unknown(format!("GGUF type {}", tensor.kind)), 0),
    };
    let end = start.checked_add(bytes).ok_or_else(|| absurd("its end"))?;
    if end > size {
        let (at, there) = (tensor.offset, size - data);
        return Err(bad(format!("tensor {name} claims {bytes} bytes at {at} of the data, which has {there}")));
    }
    Ok(Entry { name: name.clone(), encoding, shape, range: start..end })
}

/// No name twice, no byte in two tensors.
fn check_apart(entries: &[Entry]) -> Result<(), Fault> {
    let mut names = BTreeSet::new();
    if let Some(twice) = entries.iter().find(|e| !names.insert(&e.name)) {
        return Err(bad(format!("tensor {} stands in the table twice", twice.name)));
    }
    let mut places: Vec<(&Range<usize>, &str)> = entries.iter().map(|e| (&e.range, e.name.as_str())).collect();
    places.sort_by_key(|(range, _)| (range.start, range.end));
    match places.windows(2).find(|pair| pair[1].0.start < pair[0].0.end) {
        Some(pair) => Err(bad(format!("tensor {} overlaps {}", pair[1].1, pair[0].1))),
        None => Ok(()),
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
            (vec![], vec![row("a", &[8], 0, 4)], 64, "not a multiple of the alignment 32"),
            (vec![], vec![row("a", &[33], 8, 0)], 64, "not whole blocks"),
            (vec![], vec![row("a", &[17], 0, 0)], 64, "claims 68 bytes at 0 of the data, which has 64"),
            (vec![], vec![row("a", &[8], 0, u64::MAX - 31)], 64, "truncated or corrupt"),
            (vec![], vec![row("a", &[1 << 40, 1 << 40], 0, 0)], 64, "more values than 63 bits count"),
            (vec![], vec![row("a", &[1; 5], 0, 0)], 64, "5 dimensions"),
            (vec![align(24)], vec![], 0, "a power of two up to 2^20"),
            (vec![align(32), align(32)], vec![], 0, "given twice"),
            (vec![key("k", 13, &[])], vec![], 0, "value type 13"),
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
            let fault = header(&bytes).unwrap_err();
            let said = ["truncated or corrupt", "at most"].iter().any(|said| fault.text.contains(said));
            assert!(said, "{}", fault.text);
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
