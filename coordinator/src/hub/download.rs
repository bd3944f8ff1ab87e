//! One file: fetched into `<etag>.incomplete`, gone on with after a cut, checked, and only then given its name.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::Progress;
use super::cache::Cache;
use super::client::{Client, Meta, attempts_max};
use super::error::HubError;

const BUFFER_BYTES: usize = 1 << 18;

pub struct Download<'a> {
    pub client: &'a Client,
    pub cache: &'a Cache,
    pub commit: &'a str,
    pub name: &'a str,
    pub meta: Meta,
}

impl Download<'_> {
    /// Makes the file be there. Another process that fetches it is waited for.
    pub fn run(&self, progress: &dyn Progress) -> Result<(), HubError> {
        let etag = &self.meta.etag;
        let waiting = || progress.note(&format!("waiting for another process that fetches {}", self.name));
        let _lock = self.cache.lock(etag, waiting)?;
        let blob = self.cache.blob(etag);
        if blob.exists() {
            progress.advance(self.meta.size as i64);
        } else {
            let incomplete = self.cache.blob(&format!("{etag}.incomplete"));
            let mut fetched = Fetched::open(&incomplete, self.meta.sha256().is_some(), self.meta.size)?;
            progress.advance(fetched.length as i64);
            self.fill(&mut fetched, progress)?;
            self.check(fetched, &incomplete)?;
            fs::rename(&incomplete, &blob).map_err(HubError::file(&blob))?;
        }
        self.cache.link(self.commit, self.name, etag)
    }

    /// Requests parts until all is there. Attempts count only while nothing comes.
    fn fill(&self, fetched: &mut Fetched, progress: &dyn Progress) -> Result<(), HubError> {
        let (mut attempt, mut whole) = (1, false);
        while fetched.length < self.meta.size {
            let before = fetched.length;
            let outcome = self.client.part(self.commit, self.name, before, whole).and_then(|part| {
                if part.begin != before {
                    progress.advance(-(before as i64));
                    fetched.restart()?;
                    whole = true;
                    if part.begin != 0 {
                        let why = format!("it sent {} onwards, {before} was asked for", part.begin);
                        return Err(HubError::Answer { url: self.name.into(), why });
                    }
                }
                fetched.append(part.body, self.meta.size, self.name, progress)
            });
            match outcome {
                Ok(()) => {}
                Err(error) if !error.is_passing() => return Err(error),
                // Bytes came: the connection was cut, not refused. Where every request begins anew that is no progress.
                Err(_) if fetched.length > before && !whole => attempt = 1,
                Err(error) if attempt >= attempts_max() => return Err(error),
                Err(error) => {
                    self.client.wait(attempt, &error)?;
                    attempt += 1;
                }
            }
        }
        Ok(())
    }

    fn check(&self, fetched: Fetched, incomplete: &Path) -> Result<(), HubError> {
        fetched.file.sync_all().map_err(HubError::file(incomplete))?;
        if fetched.length != self.meta.size {
            return Err(HubError::Size { name: self.name.into(), found: fetched.length, wanted: self.meta.size });
        }
        let (Some(wanted), Some(hasher)) = (self.meta.sha256(), fetched.hasher) else { return Ok(()) };
        let found: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if found.eq_ignore_ascii_case(wanted) {
            return Ok(());
        }
        // What is wrong at some unknown place can't be gone on with.
        let _ = fs::remove_file(incomplete);
        Err(HubError::Hash { name: self.name.into(), size: fetched.length, found, wanted: wanted.into() })
    }
}

/// What of a file is there.
struct Fetched {
    path: std::path::PathBuf,
    file: File,
    length: u64,
    hasher: Option<Sha256>,
}

impl Fetched {
    /// Goes on with what an earlier process left, which is read again for the hash.
    fn open(path: &Path, hashes: bool, size: u64) -> Result<Fetched, HubError> {
        let options = File::options().create(true).read(true).append(true).open(path);
        let file = options.map_err(HubError::file(path))?;
        let length = file.metadata().map_err(HubError::file(path))?.len();
        let mut fetched = Fetched { path: path.into(), file, length, hasher: hashes.then(Sha256::new) };
        if length > size {
            fetched.restart()?;
        } else if let Some(hasher) = &mut fetched.hasher {
            let mut buffer = vec![0; BUFFER_BYTES];
            loop {
                let count = fetched.file.read(&mut buffer).map_err(HubError::file(path))?;
                if count == 0 {
                    break;
                }
                hasher.update(&buffer[..count]);
            }
        }
        Ok(fetched)
    }

    fn restart(&mut self) -> Result<(), HubError> {
        self.file.set_len(0).map_err(HubError::file(&self.path))?;
        self.length = 0;
        if let Some(hasher) = &mut self.hasher {
            *hasher = Sha256::new();
        }
        Ok(())
    }

    /// Takes a body up to its end, or to its cut.
    fn append(&mut self, mut body: impl Read, size: u64, name: &str, progress: &dyn Progress) -> Result<(), HubError> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let cut = |length, why: String| HubError::Cut { name: name.into(), length, size, why };
            let count = match body.read(&mut buffer) {
                Ok(0) if self.length < size => return Err(cut(self.length, "the body ended".into())),
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(why) => return Err(cut(self.length, why.to_string())),
            };
            self.length += count as u64;
            if self.length > size {
                let found = self.length;
                self.restart()?;
                return Err(HubError::Size { name: name.into(), found, wanted: size });
            }
            self.file.write_all(&buffer[..count]).map_err(HubError::file(&self.path))?;
            if let Some(hasher) = &mut self.hasher {
                hasher.update(&buffer[..count]);
            }
            progress.advance(count as i64);
        }
    }
}
