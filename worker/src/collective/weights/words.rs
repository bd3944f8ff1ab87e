//! What is said on a connection over which one worker lends another its model's files.
//!
//! ```text
//! taker   greeting, 64 bytes, where ranks say hello           giver   one byte, see [`Answer`]
//! taker   ask, 40 bytes: list, or a strip of a file           giver   head, 16 bytes, and its bytes; again and again
//! ```
//! Every length is fixed or bounded before anything is kept for it.
//!
//! [`Answer`]: crate::collective

use crate::load::remote::PART;
use crate::load::strip::Strip;
use model::plan::Epoch;
use sha2::{Digest, Sha256};

/// Bytes of a greeting: as many as of a rank's hello.
pub const GREETING: usize = 64;
pub const ASK: usize = 40;
pub const HEAD: usize = 16;

/// Bytes of a list of files: a model has some hundred.
pub const LIST_BYTES_MAX: u64 = 1 << 20;

/// Bytes of the words that say why not.
pub const WHY_BYTES_MAX: u64 = 1 << 10;

/// `lendfile` in ASCII.
const MAGIC: u64 = u64::from_le_bytes(*b"lendfile");

/// Grows with every change of what is said.
const WIRE: u64 = 1;

const LIST: u32 = 1;
const READ: u32 = 2;

/// The first words of a taker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    pub epoch: Epoch,
    /// Shows that it knows the cluster's token, see [`proof`].
    pub proof: u64,
    /// Of the model that it needs.
    pub identity: [u8; 32],
}

/// Stands for the cluster's token, for one model and epoch.
pub fn proof(token: &str, epoch: Epoch, identity: &[u8; 32]) -> u64 {
    let mut hash = Sha256::new();
    hash.update(b"conclave lends");
    hash.update(epoch.0.to_le_bytes());
    hash.update(identity);
    hash.update(token);
    hash.finalize().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

impl Greeting {
    pub fn encode(&self) -> [u8; GREETING] {
        let mut bytes = [0; GREETING];
        for (bytes, word) in bytes.chunks_exact_mut(8).zip([MAGIC, WIRE, self.epoch.0, self.proof]) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        bytes[32..].copy_from_slice(&self.identity);
        bytes
    }

    /// `None`: not a taker's; an error: a taker's of another version.
    pub fn decode(bytes: &[u8; GREETING]) -> Option<Result<Greeting, OtherWire>> {
        let word = |at: usize| word(&bytes[at * 8..]);
        if word(0) != MAGIC {
            return None;
        }
        if word(1) != WIRE {
            return Some(Err(OtherWire));
        }
        let mut identity = [0; 32];
        identity.copy_from_slice(&bytes[32..]);
        Some(Ok(Greeting { epoch: Epoch(word(2)), proof: word(3), identity }))
    }
}

/// The peer speaks another version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OtherWire;

/// What a taker asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    List,
    /// A strip of at most [`PART`] bytes of the file of that number.
    Read {
        file: u32,
        strip: Strip,
    },
}

impl Ask {
    pub fn encode(&self) -> [u8; ASK] {
        let (kind, file, strip) = match *self {
            Ask::List => (LIST, 0, Strip { start: 0, run: 0, stride: 0, count: 0 }),
            Ask::Read { file, strip } => (READ, file, strip),
        };
        let first = u64::from(kind) | u64::from(file) << 32;
        let mut bytes = [0; ASK];
        for (bytes, word) in bytes.chunks_exact_mut(8).zip([first, strip.start, strip.run, strip.stride, strip.count]) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// `None` where it is nothing that may be asked: a strip has its extent, and is short.
    pub fn decode(bytes: &[u8; ASK]) -> Option<Ask> {
        let word = |at: usize| word(&bytes[at * 8..]);
        let (kind, file) = (word(0) as u32, (word(0) >> 32) as u32);
        let strip = Strip { start: word(1), run: word(2), stride: word(3), count: word(4) };
        match kind {
            LIST if bytes[4..].iter().all(|byte| *byte == 0) => Some(Ask::List),
            READ if strip.extent().is_some() && strip.bytes().is_some_and(|bytes| bytes <= PART) => {
                Some(Ask::Read { file, strip })
            }
            _ => None,
        }
    }
}

/// What a giver answers before bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// The bytes are what was asked for; else they are words that say why not.
    pub given: bool,
    pub bytes: u64,
}

impl Head {
    pub fn encode(&self) -> [u8; HEAD] {
        let mut bytes = [0; HEAD];
        bytes[0] = u8::from(self.given);
        bytes[8..].copy_from_slice(&self.bytes.to_le_bytes());
        bytes
    }

    /// `None` where no giver says so.
    pub fn decode(bytes: &[u8; HEAD]) -> Option<Head> {
        let given = match word(bytes) {
            0 => false,
            1 => true,
            _ => return None,
        };
        let most = if given { PART.max(LIST_BYTES_MAX) } else { WHY_BYTES_MAX };
        let bytes = word(&bytes[8..]);
        (bytes <= most).then_some(Head { given, bytes })
    }
}

/// Names and lengths of files.
pub fn encode_list(files: &[(String, u64)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, length) in files {
        bytes.extend_from_slice(&(name.len() as u32).to_le_bytes());
        bytes.extend_from_slice(name.as_bytes());
        bytes.extend_from_slice(&length.to_le_bytes());
    }
    bytes
}

/// `None` unless all of it is a list of names of files in one folder, each once.
pub fn decode_list(mut bytes: &[u8]) -> Option<Vec<(String, u64)>> {
    let mut files: Vec<(String, u64)> = Vec::new();
    let mut total = 0u64;
    while !bytes.is_empty() {
        let (count, rest) = bytes.split_first_chunk::<4>()?;
        let (name, rest) = rest.split_at_checked(u32::from_le_bytes(*count) as usize)?;
        let (length, rest) = rest.split_first_chunk::<8>()?;
        let (name, length) = (std::str::from_utf8(name).ok()?, u64::from_le_bytes(*length));
        let plain = std::path::Path::new(name).file_name().is_some_and(|last| last == name);
        total = total.checked_add(length).filter(|total| *total < 1 << 50)?;
        if !plain || name.contains('\0') || files.iter().any(|(other, _)| other == name) {
            return None;
        }
        files.push((name.into(), length));
        bytes = rest;
    }
    Some(files)
}

fn word(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_comes_back_from_its_bytes() {
        let greeting = Greeting { epoch: Epoch(7), proof: u64::MAX - 1, identity: [9; 32] };
        assert_eq!(Greeting::decode(&greeting.encode()), Some(Ok(greeting)));
        let strip = Strip { start: 1 << 40, run: 100, stride: 4096, count: 77 };
        for ask in [Ask::List, Ask::Read { file: 3, strip }] {
            assert_eq!(Ask::decode(&ask.encode()), Some(ask));
        }
        for head in [Head { given: true, bytes: PART }, Head { given: false, bytes: 0 }] {
            assert_eq!(Head::decode(&head.encode()), Some(head));
        }
        let files = vec![("config.json".to_owned(), 5), ("model-1.safetensors".to_owned(), 1 << 40)];
        assert_eq!(decode_list(&encode_list(&files)), Some(files));
    }

    #[test]
    fn nothing_else_is_understood() {
        let mut newer = Greeting { epoch: Epoch(1), proof: 0, identity: [0; 32] }.encode();
        newer[8] = 2;
        assert_eq!(Greeting::decode(&newer), Some(Err(OtherWire)));
        newer[0] ^= 1;
        assert_eq!(Greeting::decode(&newer), None);
        let strip = Strip { start: 0, run: 10, stride: 10, count: 1 };
        for wrong in [
            Strip { run: 0, ..strip },
            Strip { run: PART + 1, stride: PART + 1, ..strip },
            Strip { count: u64::MAX, ..strip },
            Strip { start: u64::MAX, ..strip },
            Strip { stride: 9, count: 2, ..strip },
        ] {
            assert_eq!(Ask::decode(&Ask::Read { file: 0, strip: wrong }.encode()), None, "{wrong:?}");
        }
        assert_eq!(Ask::decode(&[0; ASK]), None);
        assert_eq!(Head::decode(&Head { given: false, bytes: WHY_BYTES_MAX + 1 }.encode()), None);
        assert_eq!(Head::decode(&[2; HEAD]), None);
        for name in ["", "..", "a/b", "/a", "../a", "a\0b", "."] {
            assert_eq!(decode_list(&encode_list(&[(name.into(), 1)])), None, "{name:?}");
        }
        let file = ("a".to_owned(), 1);
        assert_eq!(decode_list(&encode_list(&[file.clone(), file.clone()])), None);
        let whole = encode_list(&[file.clone(), ("b".into(), 2)]);
        assert!((1..whole.len()).all(|end| end == 13 || decode_list(&whole[..end]).is_none()));
        assert_eq!(decode_list(&encode_list(&[file, ("b".into(), u64::MAX)])), None);
    }

    #[test]
    fn a_proof_is_of_one_token_model_and_epoch() {
        let of = |token: &str, epoch, identity| proof(token, Epoch(epoch), &[identity; 32]);
        let all = [of("t", 1, 1), of("u", 1, 1), of("t", 2, 1), of("t", 1, 2)];
        assert!((0..4).all(|at| all[..at].iter().all(|other| *other != all[at])));
    }
}
