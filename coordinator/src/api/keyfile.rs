//! The file of API keys: one key a line, as a digest, so that whoever reads the file can ask nothing. Text only; who
//! reads it when is [`keys`](super::keys)' business.
//!
//! ```text
//! # a comment
//! sha256:HEX [NAME] [requests_per_minute=N] [tokens_per_minute=N] [max_concurrent=N] [weight=N]
//! ```
//!
//! One plain SHA-256 is enough for keys of 256 random bits, as [`fresh`] makes them; a word that people chose could be
//! found from it by trying.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

use super::rates::Limits;
use crate::schedule::WEIGHT_MAX;

/// Far above what [`KEYS_MAX`] lines take.
pub const FILE_BYTES_MAX: u64 = 4 << 20;
/// Each request is compared with every key.
pub const KEYS_MAX: usize = 10_000;
/// Names become labels of metrics.
pub const NAME_BYTES_MAX: usize = 64;

/// What fresh keys begin with, so that scanners for leaked secrets can know them.
const PREFIX: &str = "cnc-";
const SCHEME: &str = "sha256:";

const REQUESTS: &str = "requests_per_minute";
const TOKENS: &str = "tokens_per_minute";
const CONCURRENT: &str = "max_concurrent";
const WEIGHT: &str = "weight";

/// A line: a key that is accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub digest: [u8; 32],
    /// Whose it is, for logs and metrics; several keys may share one.
    pub name: String,
    pub limits: Limits,
}

/// Why a file gives no keys. Never holds what the line says: somebody may have written a key there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyFileError {
    #[error("{} can't be read: {why}", path.display())]
    Read { path: PathBuf, why: String },
    #[error("{} is longer than {FILE_BYTES_MAX} bytes", path.display())]
    Long { path: PathBuf },
    #[error("line {line}: a key is written as sha256: and 64 hexadecimal digits; `conclave keys add NAME` makes one")]
    Digest { line: usize },
    #[error("line {line}: a name has 1 to {NAME_BYTES_MAX} of a-z A-Z 0-9 . _ -")]
    Name { line: usize },
    #[error(
        "line {line}: word {word} is neither the name nor one of {REQUESTS}=N, {TOKENS}=N, {CONCURRENT}=N, {WEIGHT}=N"
    )]
    Word { line: usize, word: usize },
    #[error("line {line}: word {word} needs a whole number from 0 to {}", u32::MAX)]
    Number { line: usize, word: usize },
    #[error("line {line}: word {word}: a weight is a whole number from 1 to {WEIGHT_MAX}")]
    Weight { line: usize, word: usize },
    #[error("line {line}: the same key as line {first}")]
    Twice { line: usize, first: usize },
    #[error("line {line}: more than {KEYS_MAX} keys")]
    Many { line: usize },
}

/// The file's text. An error is the same again as long as its reason is.
pub fn read(path: &Path) -> Result<String, KeyFileError> {
    let failed = |why: std::io::Error| KeyFileError::Read { path: path.into(), why: why.to_string() };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(KeyFileError::Long { path: path.into() });
    }
    Ok(text)
}

/// All keys of a file, or the first thing that is wrong with it.
pub fn parse(text: &str) -> Result<Vec<Entry>, KeyFileError> {
    let (mut entries, mut seen) = (Vec::new(), BTreeMap::new());
    for (line, text) in (1..).zip(text.lines()) {
        let text = text.split('#').next().unwrap_or_default();
        let mut words = text.split_ascii_whitespace();
        let Some(first) = words.next() else { continue };
        if entries.len() == KEYS_MAX {
            return Err(KeyFileError::Many { line });
        }
        let entry = entry(line, first, words)?;
        if let Some(first) = seen.insert(entry.digest, line) {
            return Err(KeyFileError::Twice { line, first });
        }
        entries.push(entry);
    }
    Ok(entries)
}

fn entry<'w>(line: usize, first: &str, words: impl Iterator<Item = &'w str>) -> Result<Entry, KeyFileError> {
    let hex = first.strip_prefix(SCHEME).unwrap_or_default();
    let digest = digest(hex).ok_or(KeyFileError::Digest { line })?;
    let mut entry = Entry { digest, name: String::new(), limits: Limits::default() };
    for (word, text) in (2..).zip(words) {
        let limits = &mut entry.limits;
        let (limit, number) = match text.split_once('=') {
            Some((REQUESTS, number)) => (&mut limits.requests_per_minute, number),
            Some((TOKENS, number)) => (&mut limits.tokens_per_minute, number),
            Some((CONCURRENT, number)) => (&mut limits.max_concurrent, number),
            Some((WEIGHT, number)) => (&mut limits.weight, number),
            None if word == 2 && is_name(text) => {
                entry.name = text.into();
                continue;
            }
            None if word == 2 => return Err(KeyFileError::Name { line }),
            Some(_) | None => return Err(KeyFileError::Word { line, word }),
        };
        *limit = Some(number.parse().map_err(|_| KeyFileError::Number { line, word })?);
        if limits.weight.is_some_and(|weight| !(1..=WEIGHT_MAX).contains(&weight)) {
            return Err(KeyFileError::Weight { line, word });
        }
    }
    if entry.name.is_empty() {
        // Tells two apart and opens nothing.
        entry.name = format!("key-{}", &hex[..8].to_ascii_lowercase());
    }
    Ok(entry)
}

fn digest(hex: &str) -> Option<[u8; 32]> {
    if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut digest = [0; 32];
    for (byte, at) in digest.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&hex[at..at + 2], 16).ok()?;
    }
    Some(digest)
}

/// What may name a key's holder.
pub fn is_name(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(fits)
}

/// A new key of 32 bytes that nobody can guess.
pub fn fresh(random: [u8; 32]) -> String {
    format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(random))
}

/// The line that lets `key` in.
pub fn line(key: &str, name: &str, limits: &Limits) -> String {
    let digest: String = Sha256::digest(key).iter().map(|byte| format!("{byte:02x}")).collect();
    let mut line = format!("{SCHEME}{digest} {name}");
    for (what, limit) in [
        (REQUESTS, limits.requests_per_minute),
        (TOKENS, limits.tokens_per_minute),
        (CONCURRENT, limits.max_concurrent),
        (WEIGHT, limits.weight),
    ] {
        if let Some(limit) = limit {
            line += &format!(" {what}={limit}");
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_key_s_line_is_read_as_that_key() {
        let key = fresh([7; 32]);
        assert!(key.starts_with("cnc-") && key.len() == 47, "{key}");
        let limits = Limits {
            requests_per_minute: Some(60),
            tokens_per_minute: Some(9),
            max_concurrent: Some(0),
            weight: Some(7),
        };
        let text = format!("# keys\n\n  {} # of the night shift\n", line(&key, "alice", &limits));
        let digest: [u8; 32] = Sha256::digest(&key).into();
        assert_eq!(parse(&text).unwrap(), [Entry { digest, name: "alice".into(), limits }]);
        assert!(!text.contains(&key));
    }

    #[test]
    fn a_key_without_a_name_is_named_by_its_digest() {
        let text = format!("sha256:{}", "AB".repeat(32));
        assert_eq!(parse(&text).unwrap()[0].name, "key-abababab");
        assert!(parse("# nobody\n").unwrap().is_empty());
    }

    #[test]
    fn what_is_wrong_is_told_by_its_line_and_never_repeated() {
        let good = format!("sha256:{}", "ab".repeat(32));
        for (text, expected) in [
            ("cnc-secret alice".to_string(), KeyFileError::Digest { line: 1 }),
            (format!("\n{}", &good[..70]), KeyFileError::Digest { line: 2 }),
            (format!("sha256:{}", "é".repeat(32)), KeyFileError::Digest { line: 1 }),
            (format!("{good} al/ice"), KeyFileError::Name { line: 1 }),
            (format!("{good} alice cnc-secret"), KeyFileError::Word { line: 1, word: 3 }),
            (format!("{good} alice max=2"), KeyFileError::Word { line: 1, word: 3 }),
            (format!("{good} max_concurrent=-1"), KeyFileError::Number { line: 1, word: 2 }),
            (format!("{good} alice weight=0"), KeyFileError::Weight { line: 1, word: 3 }),
            (format!("{good} alice weight=1001"), KeyFileError::Weight { line: 1, word: 3 }),
            (format!("{good} alice tokens_per_minute=secret"), KeyFileError::Number { line: 1, word: 3 }),
            (format!("{good} a\n#\n{good} b"), KeyFileError::Twice { line: 3, first: 1 }),
        ] {
            let error = parse(&text).unwrap_err();
            assert_eq!(error, expected, "{text}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        let many: String = (0..=KEYS_MAX).map(|n| format!("sha256:{n:064x}\n")).collect();
        assert_eq!(parse(&many).unwrap_err(), KeyFileError::Many { line: KEYS_MAX + 1 });
    }
}
