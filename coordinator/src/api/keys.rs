//! The keys that open the API: those of the configuration, and those of a file that is followed as it changes. Kept as
//! digests and compared in constant time.

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::keyfile::{self, Entry, KeyFileError};
use super::rates::{Limits, Usage};
use crate::metrics;

/// Between two looks at the file. What is found twice is taken: nobody is halfway through writing it. So a key that is
/// taken out opens nothing after at most twice this, and the time to read the file.
const LOOK: Duration = Duration::from_millis(500);

/// What the keys of the configuration are called.
const CONFIGURED: &str = "configured";

/// Who holds a key, and what was used with it.
#[derive(Debug)]
pub struct Holder {
    digest: [u8; 32],
    pub name: String,
    usage: Mutex<Usage>,
}

impl Holder {
    fn new(digest: [u8; 32], name: &str, limits: Limits) -> Arc<Holder> {
        Arc::new(Holder { digest, name: name.into(), usage: Mutex::new(Usage::new(limits, Instant::now())) })
    }

    pub fn usage(&self) -> MutexGuard<'_, Usage> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number of its own for each key, of which the key can't be guessed.
    pub fn number(&self) -> u64 {
        u64::from_le_bytes(self.digest[..8].try_into().expect("eight of 32 bytes"))
    }
}

/// The keys that are accepted.
pub struct Keys {
    configured: Vec<Arc<Holder>>,
    file: Option<PathBuf>,
    /// All of them now.
    ring: RwLock<Arc<Vec<Arc<Holder>>>>,
}

impl Keys {
    /// The keys of the configuration alone; none means that everyone may ask.
    pub fn new<'k>(configured: impl IntoIterator<Item = &'k str>) -> Keys {
        let holder = |key| Holder::new(Sha256::digest(key).into(), CONFIGURED, Limits::default());
        let configured: Vec<_> = configured.into_iter().map(holder).collect();
        Keys { ring: RwLock::new(Arc::new(configured.clone())), configured, file: None }
    }

    /// With those of a file. It must be there and right; that it holds no key opens nothing.
    pub fn with_file<'k>(configured: impl IntoIterator<Item = &'k str>, file: &Path) -> Result<Keys, KeyFileError> {
        let keys = Keys { file: Some(file.into()), ..Keys::new(configured) };
        keys.take(keyfile::parse(&keyfile::read(file)?)?);
        Ok(keys)
    }

    /// Whether everyone may ask.
    pub fn is_open(&self) -> bool {
        self.file.is_none() && self.configured.is_empty()
    }

    /// Who holds `key`. Takes the same time whichever key comes close. An empty key is nobody's, though a variable that was
    /// set to nothing configures one.
    pub fn find(&self, key: &[u8]) -> Option<Arc<Holder>> {
        if key.is_empty() {
            return None;
        }
        let digest: [u8; 32] = Sha256::digest(key).into();
        let ring = self.ring();
        let all = ring.iter().enumerate();
        let found = all.fold(None, |found, (at, holder)| if same(&holder.digest, &digest) { Some(at) } else { found });
        found.map(|at| Arc::clone(&ring[at]))
    }

    /// Takes what the file holds whenever that changes; a file that is wrong changes nothing. Never ends.
    pub async fn follow(&self) {
        let Some(file) = &self.file else { return std::future::pending().await };
        metrics::api_keys(self.ring().len(), true);
        let (mut taken, mut before) = (None, None);
        loop {
            tokio::time::sleep(LOOK).await;
            let path = file.clone();
            // A disk behind a network may be slow.
            let Ok(now) = tokio::task::spawn_blocking(move || keyfile::read(&path)).await else { continue };
            if before.as_ref() == Some(&now) && taken.as_ref() != Some(&now) {
                let entries = now.clone().and_then(|text| keyfile::parse(&text));
                let right = entries.is_ok();
                match entries {
                    Ok(entries) => self.take(entries),
                    Err(why) => tracing::warn!("{}: the keys before it stay: {why}", file.display()),
                }
                metrics::api_keys(self.ring().len(), right);
                taken = Some(now.clone());
            }
            before = Some(now);
        }
    }

    /// Makes the file's keys these.
    fn take(&self, entries: Vec<Entry>) {
        let before = self.ring();
        let (mut now, mut new) = (self.configured.clone(), Vec::new());
        for entry in entries {
            match before.iter().find(|holder| holder.digest == entry.digest && holder.name == entry.name) {
                Some(holder) => {
                    holder.usage().limit(entry.limits, Instant::now());
                    now.push(Arc::clone(holder));
                }
                None => {
                    new.push(entry.name.clone());
                    now.push(Holder::new(entry.digest, &entry.name, entry.limits));
                }
            }
        }
        let stays = |holder: &&Arc<Holder>| now.iter().any(|other| Arc::ptr_eq(other, holder));
        let gone: Vec<&str> = before.iter().filter(|h| !stays(h)).map(|h| h.name.as_str()).collect();
        if !new.is_empty() || !gone.is_empty() {
            tracing::info!("{} API keys: new {new:?}, gone {gone:?}", now.len());
        }
        *self.ring.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(now);
    }

    fn ring(&self) -> Arc<Vec<Arc<Holder>>> {
        Arc::clone(&self.ring.read().unwrap_or_else(PoisonError::into_inner))
    }
}

fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    black_box(a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b))) == 0
}

#[cfg(test)]
mod tests {
    use super::super::keyfile;
    use super::*;

    fn line(key: &str, name: &str) -> String {
        keyfile::line(key, name, &Limits::default())
    }

    /// A file of the test's own, replaced as Kubernetes replaces one: by a rename.
    struct File(PathBuf);

    impl File {
        fn new(name: &str, text: &str) -> File {
            let file = File(std::env::temp_dir().join(format!("conclave-keys-{name}-{}", std::process::id())));
            file.write(text);
            file
        }

        fn write(&self, text: &str) {
            let beside = self.0.with_extension("new");
            std::fs::write(&beside, text).unwrap();
            std::fs::rename(&beside, &self.0).unwrap();
        }
    }

    impl Drop for File {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    async fn settle() {
        tokio::time::sleep(LOOK * 4).await;
    }

    #[test]
    fn a_file_without_a_key_opens_nothing() {
        let file = File::new("empty", "# nobody yet\n");
        let keys = Keys::with_file([], &file.0).unwrap();
        assert!(!keys.is_open() && keys.find(b"").is_none() && keys.find(b"a").is_none());
        assert!(Keys::new([]).is_open());
        assert!(!Keys::new([""]).is_open() && Keys::new([""]).find(b"").is_none());
        assert!(Keys::with_file([], Path::new("/nowhere/keys")).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn keys_come_and_go_with_the_file_and_a_wrong_one_changes_nothing() {
        let file = File::new("followed", &line("a", "alice"));
        let keys = Arc::new(Keys::with_file(["plain"], &file.0).unwrap());
        let follower = tokio::spawn({
            let keys = Arc::clone(&keys);
            async move { keys.follow().await }
        });
        let opens = |key: &str| keys.find(key.as_bytes()).map(|holder| holder.name.clone());
        let alice = keys.find(b"a").unwrap();
        file.write(&format!("{}\n{}\n", line("a", "alice"), line("b", "bob")));
        settle().await;
        assert_eq!(opens("b").as_deref(), Some("bob"));
        assert!(Arc::ptr_eq(&alice, &keys.find(b"a").unwrap()), "who stays is not made anew");
        file.write("nonsense");
        settle().await;
        assert!(opens("a").is_some() && opens("b").is_some());
        std::fs::remove_file(&file.0).unwrap();
        settle().await;
        assert!(opens("a").is_some());
        file.write(&line("b", "bob"));
        settle().await;
        assert_eq!((opens("a"), opens("b").is_some(), opens("plain").is_some()), (None, true, true));
        file.write("");
        settle().await;
        assert_eq!((opens("b"), opens("plain").as_deref()), (None, Some(CONFIGURED)));
        follower.abort();
    }
}
