//! A file that is there whole, or as it was before: whatever the disk does meanwhile.

use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

/// Replaces `path` by `bytes`, which are on the disk before they get its name. What is left of a failure is removed.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().with_context(|| format!("{} names no file", path.display()))?;
    let fresh = path.with_file_name(format!(".{}.{}", name.to_string_lossy(), std::process::id()));
    let written = File::create(&fresh)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&fresh, path));
    if written.is_err() {
        let _ = fs::remove_file(&fresh);
    }
    written.with_context(|| format!("{} can't be written", path.display()))
}

/// The same for anything as JSON to be read.
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).context("no JSON can say it")? + "\n";
    write(path, text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_replaced_or_left_and_nothing_lies_beside_it() {
        let folder = std::env::temp_dir().join(format!("conclave-whole-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a place for tests");
        let path = folder.join("list");
        write(&path, b"one").expect("there is room");
        write(&path, b"two").expect("there is room");
        assert_eq!(fs::read(&path).expect("it is there"), b"two");
        // A folder can't be replaced by a file.
        let taken = folder.join("taken");
        fs::create_dir(&taken).expect("a place for tests");
        let error = write(&taken, b"x").expect_err("it is a folder");
        assert!(format!("{error:#}").contains("taken can't be written"), "{error:#}");
        assert_eq!(fs::read_dir(&folder).expect("it is there").count(), 2);
        fs::remove_dir_all(&folder).expect("it was just made");
    }
}
