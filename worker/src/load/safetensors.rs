//! The header of a safetensors file: eight bytes of length, then JSON that gives each tensor's type, shape and place.

use super::{Encoding, Entry, bad, bytes_of, count};
use model::fault::Fault;
use model::quant::Format;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;

/// The format's own bound on its header.
pub const HEADER_BYTES_MAX: usize = 100_000_000;

/// The tensors by name; `__metadata__` says nothing that is needed.
struct Header {
    tensors: BTreeMap<String, Described>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Header, D::Error> {
        struct Each;
        impl<'de> Visitor<'de> for Each {
            type Value = Header;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut tensors = BTreeMap::new();
                let mut metadata = false;
                while let Some(name) = map.next_key::<String>()? {
                    let twice = if name == METADATA {
                        map.next_value::<BTreeMap<String, String>>()?;
                        std::mem::replace(&mut metadata, true)
                    } else {
                        tensors.insert(name.clone(), map.next_value::<Described>()?).is_some()
                    };
                    // Readers differ in which of two they keep.
                    if twice {
                        return Err(A::Error::custom(format!("{name} stands there twice")));
                    }
                }
                Ok(Header { tensors })
            }
        }
        source.deserialize_map(Each)
    }
}

const METADATA: &str = "__metadata__";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Described {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

/// The tensors of a whole file's bytes, in file order. They must tile the data exactly, as the format demands: no
/// hole, no overlap, nothing missing at the end.
pub fn entries(file: &[u8]) -> Result<Vec<Entry>, Fault> {
    let size = file.len();
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(bad(format!("{size} bytes are no safetensors file: the header's length takes 8")));
    };
    let length = u64::from_le_bytes(*length);
    let fits = usize::try_from(length).ok().filter(|&n| n <= rest.len() && n <= HEADER_BYTES_MAX);
    let Some(length) = fits else {
        return Err(bad(format!("the header claims {length} bytes, the file has {size}: truncated or no safetensors")));
    };
    let header: Header = serde_json::from_slice(&rest[..length])
        .map_err(|e| bad(format!("the header of {length} bytes is not a safetensors header: {e}")))?;
    let start = 8 + length;

    let mut entries = Vec::with_capacity(header.tensors.len());
    for (name, described) in header.tensors {
        entries.push(entry(name, &described, start, size)?);
    }
    entries.sort_by(|a, b| (a.range.start, a.range.end, &a.name).cmp(&(b.range.start, b.range.end, &b.name)));
    let mut end = start;
    for e in &entries {
        if e.range.start != end {
            let (name, at) = (&e.name, e.range.start - start);
            let problem = if e.range.start < end { "overlaps the tensor before it" } else { "leaves a hole before it" };
            return Err(bad(format!(
                "tensor {name} at byte {at} of the data {problem}, which ends at {}",
                end - start
            )));
        }
        end = e.range.end;
    }
    if end != size {
        return Err(bad(format!(
            "the tensors end at byte {end} of {size}: the file is not the one its header describes"
        )));
    }
    Ok(entries)
}

/// Checks one tensor's claim against the file's size.
fn entry(name: String, described: &Described, start: usize, size: usize) -> Result<Entry, Fault> {
    let [begin, end] = described.data_offsets;
    let data = size - start;
    if begin > end || end > data {
        return Err(bad(format!(
            "tensor {name} claims bytes {begin}..{end} of {data}: the file is truncated or corrupt"
        )));
    }
    let shape = described.shape.clone();
    let encoding = encoding(&described.dtype);
    let wanted = match &encoding {
        Encoding::Known(format) => Some(bytes_of(&name, *format, &shape)?),
        Encoding::Unknown(dtype) => width(dtype).and_then(|w| count(&shape)?.checked_mul(w)),
    };
    if let Some(wanted) = wanted
        && wanted != end - begin
    {
        let (dtype, held) = (&described.dtype, end - begin);
        return Err(bad(format!("tensor {name}: {dtype} {shape:?} takes {wanted} bytes, the header gives it {held}")));
    }
    Ok(Entry { name, encoding, shape, range: start + begin..start + end })
}

fn encoding(dtype: &str) -> Encoding {
    Format::from_safetensors(dtype).map_or_else(|| Encoding::Unknown(dtype.to_owned()), Encoding::Known)
}

/// Bytes of one value of the types that are checked but not read.
fn width(dtype: &str) -> Option<usize> {
    Some(match dtype {
        "BOOL" | "F8_E5M2" => 1,
        "I16" | "U16" => 2,
        "U32" => 4,
        "U64" | "F64" | "C64" => 8,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 7);
        bytes
    }

    const TWO: &str = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[16,28]},
        "a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#;

    #[test]
    fn a_header_gives_types_shapes_and_places() {
        let bytes = file(TWO, 28);
        let start = bytes.len() - 28;
        let found = entries(&bytes).unwrap();
        assert_eq!(found[0].name, "a");
        assert_eq!(found[0].range, start..start + 16);
        assert_eq!(
            found[1],
            Entry {
                name: "b".into(),
                encoding: Encoding::Known(Format::Bf16),
                shape: vec![2, 3],
                range: start + 16..start + 28
            }
        );
    }

    #[test]
    fn a_lying_header_is_refused_with_its_numbers() {
        let one = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        for (header, data, said) in [
            (one("F32", "[4]", "[0,16]"), 15, "claims bytes 0..16 of 15"),
            (one("F32", "[4]", "[0,16]"), 17, "end at byte"),
            (one("F32", "[4]", "[0,12]"), 12, "takes 16 bytes, the header gives it 12"),
            (one("F32", "[4]", "[16,0]"), 16, "claims bytes 16..0"),
            (one("F32", "[4]", "[4,20]"), 20, "leaves a hole"),
            (one("F32", "[4]", "[-1,16]"), 16, "not a safetensors header"),
            (one("F32", "[4294967296,4294967296,4294967296]", "[0,16]"), 16, "too many values"),
            (one("I64", "[4]", "[0,16]"), 16, "takes 32 bytes"),
            ("{\"a\":3}".to_owned(), 0, "not a safetensors header"),
            ("[".repeat(100_000), 0, "not a safetensors header"),
            (format!(r#"{{"__metadata__":{}}}"#, r#"{"a":"#.repeat(100_000)), 0, "not a safetensors header"),
            (
                r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},
                "a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#
                    .to_owned(),
                16,
                "a stands there twice",
            ),
            (r#"{"__metadata__":{},"__metadata__":{}}"#.to_owned(), 0, "__metadata__ stands there twice"),
        ] {
            let fault = entries(&file(&header, data)).unwrap_err();
            assert!(fault.text.contains(said), "{header}: {}", fault.text);
        }
        // A header that claims gigabytes costs nothing: its length is compared with the file's first.
        for claimed in [u64::MAX, 1 << 40, 100_000_001] {
            let bytes = [&claimed.to_le_bytes()[..], b"{}"].concat();
            assert!(entries(&bytes).unwrap_err().text.contains(&format!("claims {claimed} bytes")));
        }
        let overlap = r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},
            "b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}"#;
        assert!(entries(&file(overlap, 24)).unwrap_err().text.contains("overlaps"));
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = file(TWO, 28);
        for length in 0..bytes.len() {
            assert!(entries(&bytes[..length]).is_err(), "{length} of {} bytes", bytes.len());
        }
    }

    #[test]
    fn no_flipped_header_byte_panics_or_reaches_outside_the_file() {
        let bytes = file(TWO, 28);
        for at in 0..bytes.len() - 28 {
            for flip in [1u8, 2, 16, 128, 255] {
                let mut broken = bytes.clone();
                broken[at] ^= flip;
                for e in entries(&broken).unwrap_or_default() {
                    assert!(e.range.start <= e.range.end && e.range.end <= broken.len());
                }
            }
        }
    }
}
