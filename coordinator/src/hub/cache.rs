//! The cache's layout, that of the Python library: contents by their hash, snapshots of links to them, names of revisions.
//!
//! ```text
//! models--org--name/blobs/<etag>            contents; <etag>.incomplete while it is fetched
//! models--org--name/snapshots/<commit>/...  links to them under their names
//! models--org--name/refs/<revision>         a commit
//! .locks/models--org--name/<etag>.lock      held by who fetches it
//! ```

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::HubError;

pub struct Cache {
    root: PathBuf,
    locks: PathBuf,
}

impl Cache {
    /// Of one repository, `org/name`, in the cache's folder.
    pub fn new(folder: &Path, repository: &str) -> Cache {
        let name = format!("models--{}", repository.replace('/', "--"));
        Cache { root: folder.join(&name), locks: folder.join(".locks").join(name) }
    }

    pub fn snapshot_path(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// The folder of a commit's files, made where it is not there.
    pub fn snapshot(&self, commit: &str) -> Result<PathBuf, HubError> {
        let path = self.snapshot_path(commit);
        fs::create_dir_all(&path).map_err(HubError::file(&path))?;
        Ok(path)
    }

    /// The commit that a revision meant last; a commit means itself.
    pub fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) && self.snapshot_path(revision).is_dir() {
            return Some(revision.into());
        }
        let commit = fs::read_to_string(self.root.join("refs").join(revision)).ok()?;
        let commit = commit.trim();
        is_commit(commit).then(|| commit.to_string())
    }

    pub fn set_reference(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        if fs::read_to_string(&path).is_ok_and(|there| there == commit) {
            return Ok(());
        }
        write(&path, commit.as_bytes())
    }

    /// Whether a snapshot has a file, whole.
    pub fn has(&self, commit: &str, name: &str) -> bool {
        self.snapshot_path(commit).join(name).is_file()
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    /// Links a blob into a snapshot.
    pub fn link(&self, commit: &str, name: &str, etag: &str) -> Result<(), HubError> {
        let path = self.snapshot_path(commit).join(name);
        let folder = path.parent().unwrap_or(&self.root);
        fs::create_dir_all(folder).map_err(HubError::file(folder))?;
        let up = "../".repeat(2 + name.matches('/').count());
        let fresh = beside(&path);
        let _ = fs::remove_file(&fresh);
        std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), &fresh).map_err(HubError::file(&fresh))?;
        fs::rename(&fresh, &path).map_err(HubError::file(&path))
    }

    /// Waits until no other process fetches a blob. The lock ends with the file that is given back.
    pub fn lock(&self, etag: &str, waiting: impl FnOnce()) -> Result<File, HubError> {
        let path = self.locks.join(format!("{etag}.lock"));
        for folder in [self.locks.as_path(), &self.root.join("blobs")] {
            fs::create_dir_all(folder).map_err(HubError::file(folder))?;
        }
        let file = File::options().create(true).append(true).open(&path).map_err(HubError::file(&path))?;
        if file.try_lock().is_err() {
            waiting();
            file.lock().map_err(HubError::file(&path))?;
        }
        Ok(file)
    }
}

/// A name beside a path that nobody else uses, be it another thread or another process.
fn beside(path: &Path) -> PathBuf {
    static NAMES: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let number = NAMES.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!(".{name}.{}.{number}", std::process::id()))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), HubError> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(HubError::file(folder))?;
    }
    let fresh = beside(path);
    fs::write(&fresh, bytes).map_err(HubError::file(&fresh))?;
    fs::rename(&fresh, path).map_err(HubError::file(path))
}

/// Whether a text is a commit's name: it becomes a folder's name.
pub fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}
