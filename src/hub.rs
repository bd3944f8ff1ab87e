//! A model as it was named: a path where there is one, else a model of the hub, fetched with its progress shown.

use anyhow::{Context, Result};
use coordinator::hub::{Need, Progress, Reference, Settings, fetch};
use coordinator::plan::format_bytes;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Where a model is, and what to call it where nothing else was said.
pub struct Model {
    pub path: PathBuf,
    pub name: Option<String>,
}

/// Finds a model. A path that exists wins over a name of the hub.
pub fn model(named: &Path, need: Need) -> Result<Model> {
    let reference = named.to_str().filter(|_| !named.exists()).and_then(Reference::parse);
    let Some(reference) = reference else { return Ok(Model { path: named.into(), name: None }) };
    let settings = settings()?;
    let path = fetch(&reference, need, &settings, &Shown::default())
        .with_context(|| format!("{reference} is no path here, and as a model of the hub"))?;
    // Without weights beside it only the description itself can be read.
    let path = if need == Need::Describe && reference.file.is_none() { path.join("config.json") } else { path };
    let name = match &reference.file {
        Some(_) => None,
        None => Some(reference.repository),
    };
    Ok(Model { path, name })
}

/// The environment that the hub's own tools read.
fn settings() -> Result<Settings> {
    let text = |key: &str| std::env::var(key).ok().map(|text| text.trim().to_string()).filter(|text| !text.is_empty());
    let set = |key: &str| {
        text(key).is_some_and(|text| matches!(text.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
    };
    let home = || text("HOME").map(PathBuf::from);
    let cache = text("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| Some(home()?.join(".cache")));
    let folder = text("HF_HOME").map(PathBuf::from).or_else(|| Some(cache?.join("huggingface")));
    let hub = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"].into_iter().find_map(text).map(PathBuf::from);
    let hub =
        hub.or_else(|| Some(folder.as_ref()?.join("hub"))).context("set HF_HOME: there is no home for a cache")?;
    let kept = text("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(folder?.join("token")));
    let kept = || Some(std::fs::read_to_string(kept?).ok()?.trim().to_string()).filter(|token| !token.is_empty());
    let token = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"].into_iter().find_map(text).or_else(kept);
    let certificates = ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"].into_iter().find_map(text);
    let read = |path: String| std::fs::read(&path).with_context(|| format!("{path} can't be read"));
    Ok(Settings {
        endpoint: text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into()),
        cache: hub,
        token,
        offline: set("HF_HUB_OFFLINE") || set("TRANSFORMERS_OFFLINE"),
        certificates: certificates.map(read).transpose()?,
        pause: std::thread::sleep,
    })
}

/// How often a log is told.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// A bar on a terminal, now and then a line elsewhere.
#[derive(Default)]
struct Shown {
    state: Mutex<Option<State>>,
}

struct State {
    bar: Option<ProgressBar>,
    total: u64,
    done: i64,
    /// Bytes that were there at the start say nothing about the rate.
    began: Instant,
    said: Instant,
}

impl State {
    fn line(&self) -> String {
        let (done, seconds) = (self.done.max(0) as u64, self.began.elapsed().as_secs_f64().max(0.001));
        let rate = done as f64 / seconds;
        let left = self.total.saturating_sub(done) as f64 / rate.max(1.0);
        let (done, total) = (format_bytes(done), format_bytes(self.total));
        format!("fetched {done} of {total}, {}/s, {:.0} s left", format_bytes(rate as u64), left)
    }
}

impl Progress for Shown {
    fn begin(&self, files: usize, bytes: u64) {
        let bar = std::io::stderr().is_terminal().then(|| {
            let template = "  {bar:30} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left";
            let style = ProgressStyle::with_template(template).expect("the template is valid");
            ProgressBar::new(bytes).with_style(style)
        });
        if bar.is_none() {
            eprintln!("fetching {files} files, {}", format_bytes(bytes));
        }
        let now = Instant::now();
        if let Ok(mut state) = self.state.lock() {
            *state = Some(State { bar, total: bytes, done: 0, began: now, said: now });
        }
    }

    fn advance(&self, bytes: i64) {
        let Ok(mut state) = self.state.lock() else { return };
        let Some(state) = state.as_mut() else { return };
        state.done += bytes;
        match &state.bar {
            Some(bar) => bar.set_position(state.done.max(0) as u64),
            None if state.said.elapsed() >= LINE_EVERY => {
                state.said = Instant::now();
                eprintln!("{}", state.line());
            }
            None => {}
        }
    }

    fn note(&self, line: &str) {
        let state = self.state.lock();
        match state.as_ref().ok().and_then(|state| state.as_ref()?.bar.as_ref()) {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    fn end(&self) {
        let Ok(mut state) = self.state.lock() else { return };
        match state.take() {
            Some(State { bar: Some(bar), .. }) => bar.finish_and_clear(),
            Some(state) => eprintln!("{}", state.line()),
            None => {}
        }
    }
}
