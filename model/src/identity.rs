//! What tells whether two processes read the same model, cheaply: a digest of its description and of the names and sizes
//! of its weight files. (Digests of the weights themselves are the loader's.)

use sha2::{Digest, Sha256};

/// The digest of a description (`config.json`'s bytes, or a GGUF header's) and of the weight files beside it.
pub fn identity(description: &[u8], mut files: Vec<(String, u64)>) -> Vec<u8> {
    files.sort();
    let mut hash = Sha256::new();
    hash.update((description.len() as u64).to_le_bytes());
    hash.update(description);
    for (name, bytes) in files {
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name);
        hash.update(bytes.to_le_bytes());
    }
    hash.finalize().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_of_files_does_not_matter_and_sizes_do() {
        let files = |a: u64| vec![("a".to_string(), a), ("b".to_string(), 2)];
        let mut reversed = files(1);
        reversed.reverse();
        assert_eq!(identity(b"{}", files(1)), identity(b"{}", reversed));
        assert_ne!(identity(b"{}", files(1)), identity(b"{}", files(3)));
        assert_ne!(identity(b"{}", files(1)), identity(b"{ }", files(1)));
    }
}
