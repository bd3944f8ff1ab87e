//! A model's files compared with their SHA-256 digests: those that a list beside them has, as `sha256sum` writes it
//! (`digest  name` a line), or those that the hub's cache names its contents by.

use super::bad;
use super::checkpoint::Checkpoint;
use super::loader::Progress;
use model::fault::Fault;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;
/// A line takes some hundred bytes, a model some hundred files.
const MANIFEST_BYTES_MAX: u64 = 16 << 20;

/// What a list of digests may be called.
const MANIFESTS: [&str; 5] = ["SHA256SUMS", "SHA256SUMS.txt", "sha256sums.txt", "sha256sum.txt", "checksums.sha256"];

/// Compares the files of the model at `path` with what is known of them. Without a list beside them, files of the hub's
/// cache are known by the names of their contents; of others nothing is, which is a fault too.
pub fn verify_model(path: &Path, progress: Progress<'_>) -> Result<(), Fault> {
    let (folder, names) = Checkpoint::open(path)?.files();
    if let Some(manifest) = MANIFESTS.iter().map(|name| folder.join(name)).find(|path| path.is_file()) {
        return verify(&folder, &manifest, &names, progress);
    }
    let digests: Option<BTreeMap<String, String>> =
        names.iter().map(|name| Some((name.clone(), content_name(&folder.join(name))?))).collect();
    let Some(digests) = digests else {
        let (shown, lists) = (folder.display(), MANIFESTS.join(", "));
        let why = "and its files are not the hub cache's: there is nothing to compare them with";
        return Err(bad(format!("{shown}: no list of checksums ({lists}) is there, {why}")));
    };
    compare(&folder, digests, "the hub", progress)
}

/// The digest that a link of the hub's cache names its content by. (Small files are named by another one.)
fn content_name(link: &Path) -> Option<String> {
    let content: PathBuf = std::fs::read_link(link).ok()?;
    let in_cache = content.parent()?.file_name()? == "blobs";
    let name = content.file_name()?.to_str()?;
    (in_cache && is_digest(name)).then(|| name.to_lowercase())
}

fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Reads every file that the manifest lists, relative to `folder`, and compares. All that `needed` names (the weight
/// files) must be listed. The first file that differs, is missing or is not listed is a fault that names it.
pub fn verify(folder: &Path, manifest: &Path, needed: &[String], progress: Progress<'_>) -> Result<(), Fault> {
    let listed = read(manifest)?;
    if let Some(name) = needed.iter().find(|name| !listed.contains_key(*name)) {
        return Err(bad(format!("{}: it has no digest of {name}", manifest.display())));
    }
    compare(folder, listed, "the manifest", progress)
}

/// Reads all files and compares them with the digests that `source` has of them.
fn compare(
    folder: &Path,
    digests: BTreeMap<String, String>,
    source: &str,
    progress: Progress<'_>,
) -> Result<(), Fault> {
    let mut files = Vec::with_capacity(digests.len());
    for (name, digest) in digests {
        let path = folder.join(&name);
        let unreadable = |e: std::io::Error| bad(format!("{}: {e}", path.display()));
        let file = File::open(&path).map_err(unreadable)?;
        let length = file.metadata().map_err(unreadable)?.len();
        files.push((path.clone(), file, length, digest));
    }
    let total = files.iter().map(|(_, _, length, _)| length).sum();
    let mut done = 0;
    progress(0, total);
    let mut chunk = vec![0; CHUNK];
    for (path, mut file, _, digest) in files {
        let mut hash = Sha256::new();
        loop {
            let count = file.read(&mut chunk).map_err(|e| bad(format!("{}: {e}", path.display())))?;
            if count == 0 {
                break;
            }
            hash.update(&chunk[..count]);
            done += count as u64;
            progress(done, total);
        }
        let found = hex(&hash.finalize());
        if found != digest {
            return Err(bad(format!("{}: its sha256 is {found}, {source} has {digest}", path.display())));
        }
    }
    Ok(())
}

/// Digests by name.
fn read(manifest: &Path) -> Result<BTreeMap<String, String>, Fault> {
    let shown = manifest.display();
    let length = std::fs::metadata(manifest).map_err(|e| bad(format!("{shown}: {e}")))?.len();
    if length > MANIFEST_BYTES_MAX {
        return Err(bad(format!("{shown}: {length} bytes, at most {MANIFEST_BYTES_MAX} make sense")));
    }
    let text = std::fs::read_to_string(manifest).map_err(|e| bad(format!("{shown}: {e}")))?;
    let mut listed = BTreeMap::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |why: &str| bad(format!("{shown}: line {}: {why}", number + 1));
        let parts = line.split_once(char::is_whitespace);
        // A star marks files that were read as bytes.
        let (digest, name) =
            parts.map(|(d, n)| (d.to_lowercase(), n.trim().trim_start_matches('*'))).unwrap_or_default();
        if !is_digest(&digest) {
            return Err(wrong("no SHA-256 digest of 64 hexadecimal digits and a name"));
        }
        let name = name.trim_start_matches("./");
        let inside =
            !name.is_empty() && Path::new(name).components().all(|c| matches!(c, std::path::Component::Normal(_)));
        if !inside {
            return Err(wrong(&format!("{name:?} is not the name of a file beside it")));
        }
        if listed.insert(name.to_string(), digest).is_some() {
            return Err(wrong(&format!("{name} is listed twice")));
        }
    }
    Ok(listed)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::fs;

    #[test]
    fn files_are_what_the_manifest_says_or_are_named() {
        let folder = std::env::temp_dir().join(format!("conclave-manifest-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("a"), "abc").unwrap();
        fs::write(folder.join("b"), "").unwrap();
        // The standard's own examples.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let manifest = folder.join("sums");
        let check = |text: String, needed: &[&str]| {
            fs::write(&manifest, text).unwrap();
            let needed: Vec<String> = needed.iter().map(|n| n.to_string()).collect();
            let told = Cell::new((0, 0));
            verify(&folder, &manifest, &needed, &|done, total| told.set((done, total))).map(|()| told.get())
        };
        assert_eq!(check(format!("{abc}  a\n{} *./b\n\n", nothing.to_uppercase()), &["a", "b"]).unwrap(), (3, 3));
        for (text, needed, said) in [
            (format!("{nothing}  a"), &["a"][..], "a: its sha256 is ba78"),
            (format!("{abc}  a"), &["a", "b"], "no digest of b"),
            (format!("{abc}  c"), &[], "c: No such file"),
            (format!("{abc}  ../a"), &[], "not the name of a file"),
            (format!("{abc}  /a"), &[], "not the name of a file"),
            (format!("{abc}  a\n{abc}  a"), &[], "line 2: a is listed twice"),
            ("abc  a".to_string(), &[], "line 1: no SHA-256 digest"),
            (abc.to_string(), &[], "line 1: no SHA-256 digest"),
        ] {
            let fault = check(text.clone(), needed).unwrap_err();
            assert!(fault.text.contains(said), "{text}: {}", fault.text);
        }
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn files_of_the_hubs_cache_are_known_by_their_contents_names() {
        let folder = std::env::temp_dir().join(format!("conclave-contents-{}", std::process::id()));
        let (blobs, snapshot) = (folder.join("blobs"), folder.join("snapshots/1"));
        for path in [&blobs, &snapshot] {
            fs::create_dir_all(path).unwrap();
        }
        let header = br#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        let file = |last: u8| [&(header.len() as u64).to_le_bytes()[..], header, &[0, 0, 0, last]].concat();
        let name = hex(&Sha256::digest(file(1)));
        fs::write(blobs.join(&name), file(1)).unwrap();
        fs::write(snapshot.join("config.json"), "{}").unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{name}"), snapshot.join("model.safetensors")).unwrap();
        let check = || verify_model(&snapshot, &|_, _| {}).map_err(|fault| fault.text);
        assert_eq!(check(), Ok(()));
        fs::write(blobs.join(&name), file(2)).unwrap();
        let said = check().unwrap_err();
        assert!(said.contains("model.safetensors: its sha256 is") && said.contains("the hub has"), "{said}");
        fs::remove_file(snapshot.join("model.safetensors")).unwrap();
        fs::write(snapshot.join("model.safetensors"), file(1)).unwrap();
        let said = check().unwrap_err();
        assert!(said.contains("SHA256SUMS") && said.contains("nothing to compare"), "{said}");
        fs::remove_dir_all(&folder).unwrap();
    }
}
