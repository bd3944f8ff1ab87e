//! Models from the Hugging Face hub, kept in the cache that its Python library uses, so that either finds what the other got.
//!
//! ```text
//! id -> revision's commit and files -> those a server needs -> blobs (resumed, checked) -> snapshot of links -> a path
//! ```

pub mod cache;
pub mod client;
pub mod download;
pub mod error;
pub mod reference;
pub mod select;

#[cfg(test)]
mod server;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

pub use error::HubError;
pub use reference::Reference;

use cache::Cache;
use client::Client;
use download::Download;

/// Files of one model that are fetched at once.
const DOWNLOADS_MAX: usize = 4;

/// How the hub is reached; the command fills it in from the environment.
pub struct Settings {
    /// `https://huggingface.co`, or a mirror.
    pub endpoint: String,
    /// The cache's folder (`HF_HUB_CACHE`).
    pub cache: PathBuf,
    pub token: Option<String>,
    /// Nothing is asked of the network.
    pub offline: bool,
    /// PEM certificates to trust in place of the built-in ones.
    pub certificates: Option<Vec<u8>>,
    /// Waits before a request is repeated.
    pub pause: fn(Duration),
}

/// Told what a download does.
pub trait Progress: Sync {
    /// Before the first byte: how much there is to fetch.
    fn begin(&self, _files: usize, _bytes: u64) {}
    /// Bytes that are there now; negative where a part has to be fetched again.
    fn advance(&self, _bytes: i64) {}
    /// Something a person should know.
    fn note(&self, _line: &str) {}
    fn end(&self) {}
}

/// What of a model is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Everything a server reads.
    Serve,
    /// The description alone: enough to plan.
    Describe,
}

/// Makes a model's files be there and gives their path: the snapshot's folder, or the `.gguf` file that was asked for.
pub fn fetch(
    reference: &Reference,
    need: Need,
    settings: &Settings,
    progress: &dyn Progress,
) -> Result<PathBuf, HubError> {
    let cache = Cache::new(&settings.cache, &reference.repository);
    if settings.offline {
        return cached(&cache, reference, need)
            .map_err(|missing| HubError::Offline { id: reference.to_string(), missing });
    }
    let client = Client::new(settings, &reference.repository)?;
    let listing = match client.listing(&reference.revision) {
        Err(HubError::Unreachable { why, .. }) => {
            let path = cached(&cache, reference, need).map_err(|missing| HubError::UnreachableAndMissing {
                id: reference.to_string(),
                why: why.clone(),
                missing,
            })?;
            progress.note(&format!("the hub can't be reached ({why}); using the copy in the cache"));
            return Ok(path);
        }
        listing => listing?,
    };
    let snapshot = cache.snapshot(&listing.commit)?;
    let first = select::first(&listing.files, reference, need)?;
    let many = Many { client: &client, cache: &cache, commit: &listing.commit, progress };
    many.get(&first)?;
    if let Some(file) = &reference.file {
        cache.set_reference(&reference.revision, &listing.commit)?;
        return Ok(snapshot.join(file));
    }
    if need == Need::Serve {
        many.get(&select::weights(&listing.files, &snapshot, reference)?)?;
    }
    cache.set_reference(&reference.revision, &listing.commit)?;
    Ok(snapshot)
}

/// The path of what the cache holds, or what it lacks.
fn cached(cache: &Cache, reference: &Reference, need: Need) -> Result<PathBuf, String> {
    let commit = cache.commit(&reference.revision);
    let commit = commit.ok_or_else(|| format!("the revision {:?} of it was never fetched", reference.revision))?;
    let snapshot = cache.snapshot_path(&commit);
    if let Some(file) = &reference.file {
        let path = snapshot.join(file);
        return if path.exists() { Ok(path) } else { Err(format!("{} is missing", path.display())) };
    }
    let missing = select::missing(&snapshot, need);
    if missing.is_empty() { Ok(snapshot) } else { Err(format!("{} lacks {}", snapshot.display(), missing.join(", "))) }
}

/// Fetches several files at once.
struct Many<'a> {
    client: &'a Client,
    cache: &'a Cache,
    commit: &'a str,
    progress: &'a dyn Progress,
}

impl Many<'_> {
    fn get(&self, names: &[String]) -> Result<(), HubError> {
        let absent: Vec<&String> = names.iter().filter(|name| !self.cache.has(self.commit, name)).collect();
        if absent.is_empty() {
            return Ok(());
        }
        // Sizes first: they make the time left a figure, and a wrong name is an error before gigabytes were fetched.
        let mut downloads = VecDeque::new();
        for name in absent {
            let meta = self.client.meta(self.commit, name)?;
            downloads.push_back(Download { client: self.client, cache: self.cache, commit: self.commit, name, meta });
        }
        let bytes = downloads.iter().map(|download| download.meta.size).sum();
        self.progress.begin(downloads.len(), bytes);
        let workers = downloads.len().min(DOWNLOADS_MAX);
        let queue = Mutex::new(downloads);
        let failed = Mutex::new(None);
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    while failed.lock().is_ok_and(|failed| failed.is_none()) {
                        let next = queue.lock().ok().and_then(|mut queue| queue.pop_front());
                        let Some(download) = next else { return };
                        if let Err(error) = download.run(self.progress)
                            && let Ok(mut failed) = failed.lock()
                        {
                            failed.get_or_insert(error);
                        }
                    }
                });
            }
        });
        self.progress.end();
        match failed.into_inner() {
            Ok(None) => Ok(()),
            Ok(Some(error)) => Err(error),
            Err(_) => Err(HubError::Answer { url: String::new(), why: "a download panicked".into() }),
        }
    }
}
