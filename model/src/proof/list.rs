//! A model's digests as a file: made once by somebody who trusts their copy, read by every coordinator after.
//!
//! ```text
//! conclave-segments 1 IDENTITY
//! TENSOR DIGEST DIGEST ...      a line a declared tensor, in the catalogue's order, a digest a segment
//! ```

use super::{Digest, SegmentId, hex, segments_in};
use crate::catalog::{self, TensorDecl};
use crate::cut::Slice;
use crate::spec::ModelSpec;
use std::collections::BTreeMap;
use std::fmt::Write;

const HEAD: &str = "conclave-segments 1";

/// What is wrong with a list, with its line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {why}")]
pub struct ListError {
    pub line: usize,
    pub why: String,
}

fn whole(decl: &TensorDecl) -> Slice {
    Slice { rows: 0..decl.rows, cols: 0..decl.cols }
}

/// A role may be one of several that a stored tensor holds: both name a line.
fn name(decl: &TensorDecl) -> String {
    format!("{}:{:?}", decl.source.name, decl.id.role)
}

/// The list of a model with this identity; every segment must be known.
pub fn write(spec: &ModelSpec, identity: &[u8], known: &BTreeMap<SegmentId, Digest>) -> String {
    let mut text = format!("{HEAD} {}\n", hex(identity));
    for decl in catalog::tensors(spec) {
        text += &name(&decl);
        for (number, _) in segments_in(&decl, &whole(&decl)) {
            let digest = known.get(&(decl.id, number)).expect("every segment is known");
            write!(text, " {}", hex(digest)).expect("a string takes all");
        }
        text.push('\n');
    }
    text
}

/// Reads a list of all of a model's segments.
pub fn parse(spec: &ModelSpec, identity: &[u8], text: &str) -> Result<BTreeMap<SegmentId, Digest>, ListError> {
    let mut lines = text.lines().zip(1..);
    let wrong = |line: usize, why: String| ListError { line, why };
    let (head, _) = lines.next().unwrap_or(("", 1));
    let Some(of) = head.strip_prefix(HEAD) else {
        return Err(wrong(1, format!("it does not begin with {HEAD:?}")));
    };
    if of.trim() != hex(identity) {
        return Err(wrong(1, "it is the list of another model, or of files of other names and sizes".into()));
    }
    let mut known = BTreeMap::new();
    let mut last = 1;
    for decl in catalog::tensors(spec) {
        let name = name(&decl);
        let (text, line) = lines.next().ok_or_else(|| wrong(last, format!("it ends before {name}")))?;
        last = line;
        let mut parts = text.split(' ');
        if parts.next() != Some(&name) {
            return Err(wrong(line, format!("{name} is expected here")));
        }
        let segments = segments_in(&decl, &whole(&decl));
        let digests: Vec<&str> = parts.collect();
        if digests.len() != segments.len() {
            let (count, wanted) = (digests.len(), segments.len());
            return Err(wrong(line, format!("{count} digests of {wanted} segments")));
        }
        for ((number, _), digest) in segments.into_iter().zip(digests) {
            let digest = bytes(digest).ok_or_else(|| wrong(line, "a digest has 32 hexadecimal digits".into()))?;
            known.insert((decl.id, number), digest);
        }
    }
    match lines.next() {
        Some((_, line)) => Err(wrong(line, "the model has no more tensors".into())),
        None => Ok(known),
    }
}

fn bytes(text: &str) -> Option<Digest> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let mut digest = Digest::default();
    if pairs.len() != digest.len() || !rest.is_empty() {
        return None;
    }
    for (byte, pair) in digest.iter_mut().zip(pairs) {
        let pair = std::str::from_utf8(pair).ok().filter(|p| p.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(digest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    fn all(spec: &ModelSpec) -> BTreeMap<SegmentId, Digest> {
        let of = |decl: TensorDecl| {
            let segments = segments_in(&decl, &whole(&decl));
            segments.into_iter().map(move |(number, _)| ((decl.id, number), [number as u8 + 1; 16]))
        };
        catalog::tensors(spec).into_iter().flat_map(of).collect()
    }

    #[test]
    fn a_list_is_read_as_it_was_written_and_nothing_else_is() {
        for name in ["qwen2", "deepseek"] {
            let spec = samples::spec(name);
            let known = all(&spec);
            let text = write(&spec, &[1, 2], &known);
            assert_eq!(parse(&spec, &[1, 2], &text), Ok(known));
            let lines: Vec<&str> = text.lines().collect();
            let said = |text: String| parse(&spec, &[1, 2], &text).unwrap_err().to_string();
            assert!(said(text.replace(" 0102", " 0103")).contains("line 1: it is the list of another model"));
            assert!(said(String::new()).contains("line 1: it does not begin"));
            assert!(said(lines[..5].join("\n")).contains("line 5: it ends before"));
            assert!(said(text.clone() + "x 00\n").contains("no more tensors"));
            assert!(said([lines[0], lines[2]].join("\n")).contains("line 2: model.embed_tokens.weight:Embedding is"));
            assert!(said(text.replacen("0101", "01", 1)).contains("line 2: a digest has 32"));
            assert!(said(text.replacen("0101", "0x01", 1)).contains("line 2: a digest has 32"));
            assert!(said(text.replacen(" 0101", " 01 01", 1)).contains("line 2: 9 digests of 8 segments"));
        }
    }
}
