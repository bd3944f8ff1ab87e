//! The embedded store with a data directory: for one coordinator that is to remember its epochs. A change is on disk
//! before anybody hears of it. One process at a time: the file is locked while it is open.
//!
//! The disk keeps what stands, not how it came about: after a restart, watches from before it are told to list again,
//! and every lease has its whole time once more.

use super::map::{Edit, Map, Saved};
use super::{Change, Entry, Fence, Lease, Listing, Revision, Store, StoreError, Write};
use redb::{Database, ReadableTable, TableDefinition};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Key to revision, lease (0 is none) and value.
const ENTRIES: TableDefinition<'_, &str, (u64, u64, &[u8])> = TableDefinition::new("entries");

/// Lease to its time in milliseconds.
const LEASES: TableDefinition<'_, u64, u64> = TableDefinition::new("leases");

/// [`REVISION`] and [`LEASES_MADE`].
const COUNTS: TableDefinition<'_, &str, u64> = TableDefinition::new("counts");
const REVISION: &str = "revision";
const LEASES_MADE: &str = "leases made";

/// The file in the data directory.
const FILE: &str = "store.redb";

/// What is kept is small: plans and members.
const CACHE_BYTES: usize = 4 << 20;

pub struct FileStore {
    disk: Arc<Disk>,
}

struct Disk {
    path: PathBuf,
    // A std mutex, held while the disk writes: only ever taken on threads that may block.
    open: Mutex<Option<Open>>,
    clock: Box<dyn Fn() -> Instant + Send + Sync>,
}

/// A file and the map that says the same.
struct Open {
    database: Database,
    map: Map,
}

impl FileStore {
    /// Opens or creates the store in `directory`, which is made where it is missing. Blocks.
    pub fn open(
        directory: &Path,
        clock: impl Fn() -> Instant + Send + Sync + 'static,
    ) -> Result<FileStore, StoreError> {
        let failed = |e: std::io::Error| StoreError::Unreachable(format!("{}: {e}", directory.display()));
        std::fs::create_dir_all(directory).map_err(failed)?;
        let path = directory.join(FILE);
        let open = Open::read(&path, clock())?;
        // The file's own name must outlive a crash too.
        std::fs::File::open(directory).and_then(|d| d.sync_all()).map_err(failed)?;
        Ok(FileStore { disk: Arc::new(Disk { path, open: Mutex::new(Some(open)), clock: Box::new(clock) }) })
    }

    /// Runs `work` where it may block.
    async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Open, Instant) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let disk = self.disk.clone();
        let done = tokio::task::spawn_blocking(move || disk.run(work)).await;
        done.unwrap_or_else(|e| Err(StoreError::Unreachable(e.to_string())))
    }
}

impl Disk {
    fn run<T>(&self, work: impl FnOnce(&mut Open, Instant) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut place = self.open.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let now = (self.clock)();
        let mut open = match place.take() {
            Some(open) => open,
            None => Open::read(&self.path, now)?,
        };
        let lapsed = open.map.lapsed(now);
        let result = open.make(lapsed, now).and_then(|()| work(&mut open, now));
        // After a failed write nobody knows what the disk holds: it is closed with its watches and read again.
        *place = Some(open).filter(|_| !matches!(result, Err(StoreError::Unreachable(_))));
        result
    }
}

impl Open {
    fn read(path: &Path, now: Instant) -> Result<Open, StoreError> {
        let read = || -> Result<Open, redb::Error> {
            let database = Database::builder().set_cache_size(CACHE_BYTES).create(path)?;
            let transaction = database.begin_write()?;
            let mut saved = Saved::default();
            {
                for row in transaction.open_table(ENTRIES)?.iter()? {
                    let (key, value) = row?;
                    let (revision, lease, value) = value.value();
                    let entry = Entry { key: key.value().into(), value: value.into(), revision: Revision(revision) };
                    saved.entries.push((entry, Some(lease).filter(|&l| l != 0)));
                }
                for row in transaction.open_table(LEASES)?.iter()? {
                    let (lease, ttl) = row?;
                    saved.leases.push((lease.value(), Duration::from_millis(ttl.value())));
                }
                let counts = transaction.open_table(COUNTS)?;
                saved.revision = counts.get(REVISION)?.map_or(0, |n| n.value());
                saved.leases_made = counts.get(LEASES_MADE)?.map_or(0, |n| n.value());
            }
            transaction.commit()?;
            Ok(Open { database, map: Map::restore(saved, now) })
        };
        read().map_err(|e| unreachable_disk(path, &e))
    }

    /// Writes all of `edits` or nothing, then lets it be seen.
    fn make(&mut self, edits: impl IntoIterator<Item = Edit>, now: Instant) -> Result<(), StoreError> {
        let edits: Vec<Edit> = edits.into_iter().collect();
        if edits.is_empty() {
            return Ok(());
        }
        save(&self.database, &edits).map_err(|e| unreachable_disk(Path::new(FILE), &e))?;
        edits.into_iter().for_each(|edit| self.map.apply(edit, now));
        Ok(())
    }
}

fn unreachable_disk(path: &Path, cause: &redb::Error) -> StoreError {
    StoreError::Unreachable(format!("{}: {cause}", path.display()))
}

/// One transaction, on disk when this returns.
fn save(database: &Database, edits: &[Edit]) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut entries = transaction.open_table(ENTRIES)?;
        let mut leases = transaction.open_table(LEASES)?;
        let mut counts = transaction.open_table(COUNTS)?;
        for edit in edits {
            match edit {
                Edit::Put { entry, lease } => {
                    let value = (entry.revision.0, lease.unwrap_or(0), &entry.value[..]);
                    entries.insert(entry.key.as_str(), value)?;
                    counts.insert(REVISION, entry.revision.0)?;
                }
                Edit::Delete { key, revision } => {
                    entries.remove(key.as_str())?;
                    counts.insert(REVISION, revision.0)?;
                }
                Edit::Grant { lease, ttl } => {
                    leases.insert(lease, ttl.as_millis() as u64)?;
                    counts.insert(LEASES_MADE, lease)?;
                }
                Edit::Revoke { lease } => {
                    leases.remove(lease)?;
                }
            }
        }
    }
    transaction.commit()?;
    Ok(())
}

impl Store for FileStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let key = key.to_string();
        self.on_disk(move |open, _| Ok(open.map.get(&key))).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        let prefix = prefix.to_string();
        self.on_disk(move |open, _| Ok(open.map.list(&prefix))).await
    }

    async fn write(&self, write: Write<'_>) -> Result<Revision, StoreError> {
        let (key, value, expect, lease) = (write.key.to_string(), write.value.to_vec(), write.expect, write.lease);
        let fence = write.fence.map(|f| (f.key.to_string(), f.revision));
        self.on_disk(move |open, now| {
            let fence = fence.as_ref().map(|(key, revision)| Fence { key, revision: *revision });
            let edit = open.map.write(&Write { key: &key, value: &value, expect, lease, fence })?;
            open.make([edit], now)?;
            Ok(open.map.revision())
        })
        .await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let key = key.to_string();
        self.on_disk(move |open, now| open.make(open.map.delete(&key), now)).await
    }

    async fn lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        self.on_disk(move |open, now| {
            let (lease, edit) = open.map.grant(ttl);
            open.make([edit], now)?;
            Ok(lease)
        })
        .await
    }

    async fn renew(&self, lease: &Lease) -> Result<(), StoreError> {
        let lease = *lease;
        self.on_disk(move |open, now| open.map.renew(&lease, now)).await
    }

    async fn revoke(&self, lease: &Lease) -> Result<(), StoreError> {
        let lease = *lease;
        self.on_disk(move |open, now| open.make(open.map.revoke(&lease), now)).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<mpsc::Receiver<Change>, StoreError> {
        let prefix = prefix.to_string();
        self.on_disk(move |open, _| open.map.watch(&prefix, from)).await
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Expect, conformance};
    use super::*;
    use std::io::{BufRead, BufReader, Write as _};
    use std::process::{Command, Stdio};

    /// A directory of its own, gone with the test.
    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Directory {
            let path = std::env::temp_dir().join(format!("conclave-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            Directory(path)
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[tokio::test]
    async fn the_store_on_disk_keeps_the_contract() {
        let directory = Directory::new("contract");
        let (began, passed) = (Instant::now(), Arc::new(Mutex::new(Duration::ZERO)));
        let clock = passed.clone();
        let store = FileStore::open(&directory.0, move || began + *clock.lock().unwrap()).unwrap();
        conformance::all(&store, &store, async |time| *passed.lock().unwrap() += time).await;
    }

    #[tokio::test]
    async fn what_stood_stands_after_a_restart_with_its_revisions_and_leases() {
        let directory = Directory::new("restart");
        let store = FileStore::open(&directory.0, Instant::now).unwrap();
        let first = store.put_if("a", b"1", Expect::Absent).await.unwrap();
        let lease = store.lease(Duration::from_secs(60)).await.unwrap();
        let leased = store.put_if_leased("b", b"2", Expect::Absent, &lease).await.unwrap();
        store.put_if("c", b"3", Expect::Absent).await.unwrap();
        store.delete("c").await.unwrap();
        let before = store.list("").await.unwrap();
        drop(store);
        let store = FileStore::open(&directory.0, Instant::now).unwrap();
        assert_eq!(store.list("").await.unwrap(), before);
        assert_eq!(store.watch("", first).await.err(), Some(StoreError::Forgotten(first)));
        let mut changes = store.watch("", before.revision).await.unwrap();
        let next = store.put_if("a", b"4", Expect::At(first)).await.unwrap();
        assert!(next > before.revision && before.revision > leased);
        assert_eq!(conformance::next(&mut changes).await.revision(), next);
        store.renew(&lease).await.unwrap();
        assert_ne!(store.lease(Duration::from_secs(60)).await.unwrap(), lease);
        store.revoke(&lease).await.unwrap();
        assert_eq!(store.get("b").await, Ok(None));
    }

    #[tokio::test]
    async fn a_directory_serves_one_process_at_a_time() {
        let directory = Directory::new("twice");
        let store = FileStore::open(&directory.0, Instant::now).unwrap();
        let second = FileStore::open(&directory.0, Instant::now).map(|_| ());
        assert!(second.unwrap_err().to_string().contains("already open"));
        drop(store);
        FileStore::open(&directory.0, Instant::now).unwrap();
    }

    const CHILD: &str = "CONCLAVE_TEST_STORE";

    /// Not a test of its own: the process that the next one kills. Says every number that the store acknowledged.
    #[tokio::test]
    async fn a_child_that_counts_until_it_is_killed() {
        let Some(directory) = std::env::var_os(CHILD) else { return };
        let store = FileStore::open(Path::new(&directory), Instant::now).unwrap();
        let (mut number, mut expect) = match store.get("n").await.unwrap() {
            Some(entry) => (String::from_utf8(entry.value).unwrap().parse().unwrap(), Expect::At(entry.revision)),
            None => (0u64, Expect::Absent),
        };
        loop {
            number += 1;
            expect = Expect::At(store.put_if("n", number.to_string().as_bytes(), expect).await.unwrap());
            // Two keys that go together: the copy is never ahead.
            let copy = store.get("copy").await.unwrap().map_or(Expect::Absent, |e| Expect::At(e.revision));
            store.put_if("copy", number.to_string().as_bytes(), copy).await.unwrap();
            writeln!(std::io::stdout(), "acknowledged {number}").unwrap();
        }
    }

    #[tokio::test]
    async fn what_was_acknowledged_survives_kill_9() {
        let directory = Directory::new("kill");
        let mut last = 0u64;
        for round in 0..6 {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "cluster::store::file::tests::a_child_that_counts_until_it_is_killed", "--nocapture"])
                .env(CHILD, &directory.0)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
            let acknowledged = |line: String| line.split("acknowledged ").nth(1)?.parse::<u64>().ok();
            let mut seen = 0;
            // Killed in the middle of what follows the line.
            while seen < 5 + round * 7 {
                if let Some(number) = acknowledged(lines.next().expect("the child writes until it is killed")) {
                    (last, seen) = (number, seen + 1);
                }
            }
            child.kill().unwrap();
            last = lines.filter_map(acknowledged).last().unwrap_or(last);
            child.wait().unwrap();
            let store = FileStore::open(&directory.0, Instant::now).unwrap();
            let number = async |key: &str| {
                let entry = store.get(key).await.unwrap().unwrap();
                String::from_utf8(entry.value).unwrap().parse::<u64>().unwrap()
            };
            let (n, copy) = (number("n").await, number("copy").await);
            assert!(copy >= last, "{last} was acknowledged, {copy} is on disk");
            assert!(n == copy || n == copy + 1, "n is {n}, its copy {copy}");
        }
        assert!(last > 100, "only {last} writes");
    }
}
