//! Whole fetches from a hub on loopback.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use super::server::{COMMIT, Hub};
use super::*;

/// A cache of its own for one test, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("conclave-hub-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Folder(path)
    }

    fn repository(&self) -> PathBuf {
        self.0.join("models--org--name")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[derive(Default)]
struct Seen {
    wanted: AtomicI64,
    came: AtomicI64,
    notes: Mutex<Vec<String>>,
}

impl Progress for Seen {
    fn begin(&self, _files: usize, bytes: u64) {
        self.wanted.fetch_add(bytes as i64, Ordering::SeqCst);
    }

    fn advance(&self, bytes: i64) {
        self.came.fetch_add(bytes, Ordering::SeqCst);
    }

    fn note(&self, line: &str) {
        self.notes.lock().unwrap().push(line.into());
    }
}

fn settings(endpoint: &str, folder: &Folder) -> Settings {
    Settings {
        endpoint: endpoint.into(),
        cache: folder.0.clone(),
        token: None,
        offline: false,
        certificates: None,
        pause: |_| {},
    }
}

fn get(settings: &Settings, id: &str) -> Result<PathBuf, String> {
    fetch(&Reference::parse(id).unwrap(), Need::Serve, settings, &Seen::default()).map_err(|error| error.to_string())
}

fn weights() -> Vec<u8> {
    (0..200_000u32).flat_map(u32::to_le_bytes).collect()
}

fn hub(weights: &[u8]) -> Hub {
    let index = br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
    Hub::start(&[
        ("config.json", b"{}"),
        ("tokenizer.json", b"{\"a\": 1}"),
        ("model.safetensors.index.json", index),
        ("model-1.safetensors", weights),
        ("model-2.safetensors", b"second"),
        ("model-3.safetensors", b"of another model"),
        ("pytorch_model.bin", b"pickle"),
        ("q-00001-of-00002.gguf", b"one"),
        ("q-00002-of-00002.gguf", b"two"),
    ])
}

#[test]
fn a_model_is_fetched_into_the_shared_layout_once() {
    let (folder, weights) = (Folder::new("whole"), weights());
    let hub = hub(&weights);
    let (settings, seen) = (settings(&hub.endpoint, &folder), Seen::default());
    let reference = Reference::parse("org/name").unwrap();
    let snapshot = fetch(&reference, Need::Serve, &settings, &seen).unwrap();
    assert_eq!(snapshot, folder.repository().join("snapshots").join(COMMIT));
    let mut names: Vec<String> =
        std::fs::read_dir(&snapshot).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let expected =
        ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", "tokenizer.json"];
    assert_eq!(names, expected, "no pickles, no other weights");
    assert_eq!(std::fs::read(snapshot.join("model-1.safetensors")).unwrap(), weights);
    assert_eq!(std::fs::read(snapshot.join("tokenizer.json")).unwrap(), b"{\"a\": 1}");
    let link = std::fs::read_link(snapshot.join("model-2.safetensors")).unwrap();
    assert!(link.starts_with("../../blobs") && link.file_name().unwrap().len() == 64, "{link:?}");
    assert_eq!(std::fs::read_to_string(folder.repository().join("refs/main")).unwrap(), COMMIT);
    let (wanted, came) = (seen.wanted.load(Ordering::SeqCst), seen.came.load(Ordering::SeqCst));
    assert!(wanted == came && wanted > 800_000, "{came} of {wanted}");

    let before = hub.requests.lock().unwrap().len();
    assert_eq!(get(&settings, "org/name").unwrap(), snapshot);
    assert_eq!(hub.requests.lock().unwrap().len(), before + 1, "only the listing is asked for again");
}

#[test]
fn a_gguf_comes_with_all_its_parts_and_nothing_else() {
    let folder = Folder::new("gguf");
    let hub = hub(b"w");
    let path = get(&settings(&hub.endpoint, &folder), "org/name:q-00001-of-00002.gguf").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"one");
    assert_eq!(std::fs::read(path.with_file_name("q-00002-of-00002.gguf")).unwrap(), b"two");
    assert!(!path.with_file_name("config.json").exists());
}

#[test]
fn a_cut_connection_is_gone_on_with_where_it_stood() {
    let (folder, weights) = (Folder::new("cut"), weights());
    let hub = hub(&weights);
    hub.change(|behaviour| {
        behaviour.cuts = [300_000, 100_000].into();
        behaviour.files.remove("model-2.safetensors");
        behaviour
            .files
            .insert("model.safetensors.index.json".into(), br#"{"weight_map": {"a": "model-1.safetensors"}}"#.to_vec());
    });
    let seen = Seen::default();
    let reference = Reference::parse("org/name").unwrap();
    let snapshot = fetch(&reference, Need::Serve, &settings(&hub.endpoint, &folder), &seen).unwrap();
    assert_eq!(std::fs::read(snapshot.join("model-1.safetensors")).unwrap(), weights);
    let ranges: Vec<Option<String>> = hub.contents().into_iter().map(|request| request.range).collect();
    assert_eq!(ranges, [None, Some("bytes=300000-".into()), Some("bytes=400000-".into())]);
    assert_eq!(seen.came.load(Ordering::SeqCst), seen.wanted.load(Ordering::SeqCst));
}

#[test]
fn what_an_earlier_process_left_is_used_and_checked() {
    let (folder, weights) = (Folder::new("left"), weights());
    let hub = hub(&weights);
    let settings = settings(&hub.endpoint, &folder);
    let snapshot = get(&settings, "org/name").unwrap();
    let link = snapshot.join("model-1.safetensors");
    let blob = std::fs::canonicalize(&link).unwrap();
    let incomplete = blob.with_file_name(format!("{}.incomplete", blob.file_name().unwrap().to_str().unwrap()));
    let forget = || (std::fs::remove_file(&link).unwrap(), std::fs::remove_file(&blob).unwrap());

    forget();
    std::fs::write(&incomplete, &weights[..1000]).unwrap();
    get(&settings, "org/name").unwrap();
    assert_eq!(hub.contents().last().unwrap().range.as_deref(), Some("bytes=1000-"));
    assert_eq!(std::fs::read(&link).unwrap(), weights);

    forget();
    std::fs::write(&incomplete, vec![7; 1000]).unwrap();
    let error = get(&settings, "org/name").unwrap_err();
    assert!(error.contains("model-1.safetensors is damaged"), "{error}");
    assert!(!incomplete.exists() && !link.exists());
    get(&settings, "org/name").unwrap();
}

#[test]
fn a_hub_that_ignores_ranges_is_read_from_the_head() {
    let (folder, weights) = (Folder::new("whole-range"), weights());
    let hub = hub(&weights);
    hub.change(|behaviour| {
        behaviour.whole = true;
        behaviour
            .files
            .insert("model.safetensors.index.json".into(), br#"{"weight_map": {"a": "model-1.safetensors"}}"#.to_vec());
        behaviour.cuts = [300_000].into();
    });
    let seen = Seen::default();
    let reference = Reference::parse("org/name").unwrap();
    let snapshot = fetch(&reference, Need::Serve, &settings(&hub.endpoint, &folder), &seen).unwrap();
    assert_eq!(std::fs::read(snapshot.join("model-1.safetensors")).unwrap(), weights);
    assert_eq!(seen.came.load(Ordering::SeqCst), seen.wanted.load(Ordering::SeqCst));

    hub.change(|behaviour| behaviour.cuts = vec![1000; 100].into());
    let other = Folder::new("whole-range-never");
    let error = get(&settings(&hub.endpoint, &other), "org/name").unwrap_err();
    assert!(error.contains("cut off at 1000"), "attempts are counted: {error}");
}

#[test]
fn damaged_contents_are_refused_by_name() {
    let folder = Folder::new("damaged");
    let hub = hub(b"weights");
    hub.change(|behaviour| behaviour.damaged = true);
    let error = get(&settings(&hub.endpoint, &folder), "org/name").unwrap_err();
    assert!(error.contains(".safetensors is damaged") && error.contains("sha256"), "{error}");
    let left = std::fs::read_dir(folder.repository().join("snapshots").join(COMMIT)).unwrap();
    assert!(left.flatten().all(|entry| !entry.file_name().to_string_lossy().ends_with(".safetensors")));
}

#[test]
fn each_refusal_has_its_own_sentence() {
    let hub = hub(b"w");
    for (status, expected) in [(401, "HF_TOKEN"), (403, "model's page"), (404, "does not exist"), (418, "status 418")] {
        let folder = Folder::new(&format!("status-{status}"));
        hub.change(|behaviour| behaviour.refusals = [(status, None)].into());
        let error = get(&settings(&hub.endpoint, &folder), "org/name").unwrap_err();
        assert!(error.contains(expected) && error.contains("/api/models/org/name"), "{error}");
        assert_eq!(hub.requests.lock().unwrap().drain(..).count(), 1, "{status} is final");
    }
}

#[test]
fn a_busy_hub_is_asked_again_after_the_time_it_names() {
    static WAITED: Mutex<Vec<Duration>> = Mutex::new(Vec::new());
    let folder = Folder::new("busy");
    let hub = hub(b"w");
    let settings = Settings { pause: |time| WAITED.lock().unwrap().push(time), ..settings(&hub.endpoint, &folder) };
    hub.change(|behaviour| behaviour.refusals = [(429, Some(7)), (503, None)].into());
    get(&settings, "org/name").unwrap();
    assert_eq!(*WAITED.lock().unwrap(), [Duration::from_secs(7), Duration::from_secs(2)]);
    hub.change(|behaviour| behaviour.refusals = [(429, Some(4000))].into());
    let error = get(&settings, "org/name").unwrap_err();
    assert!(error.contains("4000 s"), "{error}");
}

#[test]
fn the_token_stays_with_the_hub() {
    let folder = Folder::new("token");
    let hub = hub(b"w");
    hub.change(|behaviour| behaviour.token = Some("secret".into()));
    let closed = settings(&hub.endpoint, &folder);
    assert!(get(&closed, "org/name").unwrap_err().contains("401"));
    get(&Settings { token: Some("secret".into()), ..closed }, "org/name").unwrap();
    assert!(hub.contents().len() == 2 && hub.contents().iter().all(|request| request.token.is_none()));
}

#[test]
fn offline_the_cache_serves_or_says_what_it_lacks() {
    let folder = Folder::new("offline");
    let hub = hub(b"w");
    let online = settings(&hub.endpoint, &folder);
    let offline = Settings { offline: true, ..settings("http://127.0.0.1:1", &folder) };
    let error = get(&offline, "org/name").unwrap_err();
    assert!(error.contains("org/name") && error.contains("never fetched"), "{error}");
    let snapshot = get(&online, "org/name").unwrap();
    assert_eq!(get(&offline, "org/name").unwrap(), snapshot);
    assert_eq!(get(&offline, &format!("org/name@{COMMIT}")).unwrap(), snapshot);
    std::fs::remove_file(snapshot.join("model-2.safetensors")).unwrap();
    let error = get(&offline, "org/name").unwrap_err();
    assert!(error.contains("lacks model-2.safetensors"), "{error}");
}

#[test]
fn an_unreachable_hub_is_no_loss_where_the_cache_is_whole() {
    let folder = Folder::new("unreachable");
    let hub = hub(b"w");
    let snapshot = get(&settings(&hub.endpoint, &folder), "org/name").unwrap();
    // A port that was free a moment ago and that nobody listens on.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let gone = settings(&format!("http://{free}"), &folder);
    let seen = Seen::default();
    let reference = Reference::parse("org/name").unwrap();
    assert_eq!(fetch(&reference, Need::Serve, &gone, &seen).unwrap(), snapshot);
    assert!(seen.notes.lock().unwrap()[0].contains("copy in the cache"));
    let error = get(&gone, "org/other").unwrap_err();
    assert!(error.contains("can't be reached") && error.contains("never fetched"), "{error}");
}

#[test]
fn two_processes_fetch_a_file_once() {
    let (folder, weights) = (Folder::new("twice"), weights());
    let hub = hub(&weights);
    let settings = settings(&hub.endpoint, &folder);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| get(&settings, "org/name").unwrap());
        }
    });
    assert_eq!(hub.contents().len(), 2, "{:?}", hub.contents());
}

#[test]
fn a_description_needs_no_weights() {
    let folder = Folder::new("describe");
    let hub = hub(b"w");
    let reference = Reference::parse("org/name").unwrap();
    let snapshot = fetch(&reference, Need::Describe, &settings(&hub.endpoint, &folder), &Seen::default()).unwrap();
    assert!(snapshot.join("config.json").exists() && hub.contents().is_empty());
}
