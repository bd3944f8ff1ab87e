//! The rules of ARCHITECTURE.md that a text search can hold: who imports whom, and what is written only where.

#![allow(clippy::unwrap_used)] // all of this file is a test

use conclave_tests::ring::fixtures;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A text that only some places may hold.
struct Rule {
    what: &'static str,
    /// Any of these, as whole words where they begin and end with letters.
    texts: &'static [&'static str],
    /// Where it is looked for: path prefixes; all sources where empty.
    within: &'static [&'static str],
    /// Path prefixes where it belongs.
    home: &'static [&'static str],
    /// Whether tests and examples are bound too.
    tests_too: bool,
}

/// Code that takes time, randomness and sockets as arguments.
const CORES: &[&str] = &[
    "model/",
    "coordinator/src/plan/",
    "coordinator/src/schedule/",
    "coordinator/src/cluster/state.rs",
    "worker/src/agent/state.rs",
    "worker/src/engine/",
    "worker/src/backend/",
    "worker/src/load/",
];

const RULES: [Rule; 10] = [
    Rule {
        what: "unsafe code outside its homes",
        texts: &["unsafe"],
        within: &[],
        home: &[
            "worker/src/backend/cpu/simd/",
            "worker/src/cuda.rs",
            "worker/src/backend/cuda/driver.rs",
            "worker/src/backend/cuda/compile.rs",
            "worker/src/collective/",
            "worker/src/load/checkpoint.rs",
            "worker/src/load/image.rs",
            // Ask libraries that may not be there, and the system's list of interfaces.
            "worker/src/preflight/cuda.rs",
            "worker/src/preflight/interfaces.rs",
        ],
        tests_too: true,
    },
    Rule {
        what: "the environment is read by the command alone",
        texts: &["env::var", "env::var_os", "env::vars"],
        within: &[],
        home: &["build.rs", "worker/build.rs", "src/", "coordinator/src/config.rs", "worker/src/config.rs", "tests/"],
        tests_too: false,
    },
    Rule {
        what: "unfinished or debugging code",
        texts: &["todo!", "unimplemented!", "dbg!", "FIXME", "TODO"],
        within: &[],
        home: &[],
        tests_too: true,
    },
    Rule {
        what: "maps without an order in a pure core",
        texts: &["HashMap", "HashSet", "RandomState"],
        within: CORES,
        home: &[],
        tests_too: false,
    },
    Rule {
        what: "a clock read in a pure core",
        texts: &["SystemTime::now", "Instant::now"],
        within: CORES,
        // The driver is the scheduler's shell.
        home: &["coordinator/src/schedule/driver.rs"],
        tests_too: false,
    },
    Rule {
        what: "a channel without a bound",
        texts: &["unbounded_channel", "UnboundedSender", "UnboundedReceiver"],
        within: &[],
        home: &[],
        tests_too: true,
    },
    Rule {
        what: "a task started outside the shells",
        texts: &["tokio::spawn", "task::spawn", "spawn_local"],
        within: &[],
        home: &[
            "src/workers.rs",
            "src/bench/",
            "coordinator/src/api/connections.rs",
            "coordinator/src/run.rs",
            "coordinator/src/cluster/service.rs",
            "coordinator/src/cluster/store/etcd/watch.rs",
            "coordinator/src/lead/",
            "coordinator/src/fleet/shell.rs",
        ],
        tests_too: false,
    },
    Rule {
        what: "a checkpoint's tensor name outside the catalogue",
        texts: &["self_attn", "mlp.experts", "block_sparse_moe", "\"blk.", "lm_head", "embed_tokens"],
        within: &["model/", "proto/", "coordinator/", "worker/", "src/"],
        // A quantiser's config speaks of the head by that name.
        home: &["model/src/catalog.rs", "model/src/catalog/", "model/src/hf/quantisation.rs"],
        tests_too: false,
    },
    Rule {
        what: "protobuf or gRPC outside the wire's files",
        texts: &["wire::", "proto::cluster", "prost", "tonic"],
        within: &[],
        home: &[
            "proto/",
            "coordinator/src/cluster/service.rs",
            "coordinator/src/cluster/driver.rs",
            "coordinator/src/cluster/store/etcd/",
            "coordinator/src/group.rs",
            "coordinator/src/lead/peer.rs",
            "coordinator/src/lead/service.rs",
            "coordinator/src/run.rs",
            "worker/src/agent/door.rs",
            "worker/src/agent/driver.rs",
            "src/worker_command.rs",
        ],
        tests_too: true,
    },
    Rule {
        what: "a metric named outside metrics.rs",
        texts: &["\"conclave_"],
        within: &["coordinator/", "worker/", "src/"],
        home: &["coordinator/src/metrics.rs", "worker/src/metrics.rs"],
        tests_too: false,
    },
];

/// Lines of a file, tests included, after which it is listed debt.
const LINES_MAX: usize = 600;

/// Files longer than [`LINES_MAX`], with the lines that they may have: shorten them, add none.
const LONG: [(&str, usize); 0] = [];

/// Model types without a golden folder of their own, and why.
const WITHOUT_GOLDEN: [(&str, &str); 0] = [];

/// What each crate may depend on of this workspace.
const ARROWS: [(&str, &[&str]); 6] = [
    ("model", &[]),
    ("proto", &["model"]),
    ("coordinator", &["model", "proto"]),
    ("worker", &["model", "proto"]),
    ("tests", &["model", "proto", "coordinator", "worker"]),
    (".", &["model", "proto", "coordinator", "worker", "conclave-tests"]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A Rust source by its path from the root.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// Whether all of it is a test or an example.
    fn is_test(&self) -> bool {
        let file = self.path.rsplit('/').next().unwrap();
        let named = ["tests.rs", "harness.rs", "conformance.rs", "refused.rs", "golden.rs", "template_cases.rs"]
            .contains(&file)
            || self.path.starts_with("worker/src/backend/suite/")
            || self.path == "worker/src/collective/suite.rs";
        named || self.path.starts_with("tests/") || self.path.contains("/examples/")
    }

    /// Where the modules begin that only tests have; they end their files.
    fn code_end(&self) -> usize {
        let opens = |at: usize| {
            let item = self.text[at..].lines().find(|line| !line.starts_with("#[") && !line.is_empty());
            item.is_some_and(|line| line.contains("mod ") && line.ends_with('{'))
        };
        let mut marks = self.text.match_indices("\n#[cfg(test)]").map(|(at, _)| at);
        marks.find(|&at| opens(at)).unwrap_or(self.text.len())
    }

    /// Lines with their numbers, comments apart, and without unit tests where `tests` is false.
    fn lines(&self, tests: bool) -> impl Iterator<Item = (usize, &str)> {
        let end = if tests { self.text.len() } else { self.code_end() };
        self.text[..end].lines().enumerate().map(|(index, line)| {
            let line = line.trim_start();
            (index + 1, if line.starts_with("//") { "" } else { line })
        })
    }
}

/// Every Rust source of the workspace but this one, which spells out what is forbidden.
fn sources() -> Vec<Source> {
    let mut found = Vec::new();
    for folder in ["build.rs", "src", "model", "proto", "coordinator", "worker", "tests"] {
        collect(&root().join(folder), folder, &mut found);
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(found.len() > 150, "only {} sources were found", found.len());
    found
}

fn collect(at: &Path, path: &str, found: &mut Vec<Source>) {
    if at.is_dir() {
        for entry in std::fs::read_dir(at).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name != "target" {
                collect(&at.join(&name), &format!("{path}/{name}"), found);
            }
        }
    } else if path.ends_with(".rs") && path != "tests/tests/tidy.rs" {
        found.push(Source { path: path.to_string(), text: std::fs::read_to_string(at).unwrap() });
    }
}

fn under(path: &str, prefixes: &[&str]) -> bool {
    prefixes.iter().any(|p| path == *p || (p.ends_with('/') && path.starts_with(p)))
}

/// Whether `line` has `text`, not as a part of a longer word.
fn has(line: &str, text: &str) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(text).any(|(at, _)| {
        let before = line[..at].chars().next_back().filter(|_| text.starts_with(word));
        let after = line[at + text.len()..].chars().next().filter(|_| text.ends_with(char::is_alphanumeric));
        !before.is_some_and(word) && !after.is_some_and(word)
    })
}

/// `path:line: what` for each breach.
fn breaches(rule: &Rule, source: &Source) -> Vec<String> {
    let looked_at = rule.within.is_empty() || under(&source.path, rule.within);
    if !looked_at || under(&source.path, rule.home) || (source.is_test() && !rule.tests_too) {
        return vec![];
    }
    let breaks = |line: &str| rule.texts.iter().find(|text| has(line, text));
    let lines = source.lines(rule.tests_too);
    lines.filter_map(|(n, l)| Some((n, breaks(l)?))).map(|(n, t)| format!("{}:{n}: {t}", source.path)).collect()
}

fn nothing(what: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

#[test]
fn what_has_a_home_stays_there() {
    let sources = sources();
    let mut all = Vec::new();
    for rule in &RULES {
        all.extend(sources.iter().flat_map(|s| breaches(rule, s)).map(|at| format!("{at} ({})", rule.what)));
        for path in rule.home.iter().chain(rule.within) {
            assert!(sources.iter().any(|s| under(&s.path, &[path])), "{}: {path} is not there any more", rule.what);
        }
    }
    nothing("see ARCHITECTURE.md", all);
}

#[test]
fn a_breach_is_found_and_its_home_is_not_one() {
    let source = |path: &str, text: &str| Source { path: path.into(), text: text.into() };
    let count = |path: &str, text: &str| RULES.iter().map(|r| breaches(r, &source(path, text)).len()).sum::<usize>();
    for (path, text, expected) in [
        ("model/src/x.rs", "let a = 1;\nlet m: HashMap<u8, u8>;", 1),
        ("coordinator/src/api/x.rs", "let m: HashMap<u8, u8>;", 0),
        ("worker/src/engine/x.rs", "unsafe { f() }", 1),
        ("worker/src/backend/cpu/simd/x.rs", "unsafe { f() }", 0),
        ("worker/src/engine/x.rs", "// never unsafe\n#![forbid(unsafe_code)]", 0),
        ("coordinator/src/schedule/x.rs", "let now = Instant::now();", 1),
        ("coordinator/src/schedule/x.rs", "\n#[cfg(test)]\nmod tests {\nlet now = Instant::now();", 0),
        ("worker/src/agent/x.rs", "use proto::cluster::v1 as wire;", 1),
        ("coordinator/src/api/x.rs", "tokio::spawn(async {});", 1),
        ("worker/src/load/x.rs", "name(\"blk.0.ffn_up\")", 1),
        ("coordinator/src/api/x.rs", "counter!(\"conclave_things\")", 1),
    ] {
        assert_eq!(count(path, text), expected, "{path}: {text}");
    }
}

/// Keys of the tables of a Cargo.toml whose names end with `dependencies`.
fn dependencies(manifest: &Path) -> BTreeSet<String> {
    let text = std::fs::read_to_string(manifest).unwrap();
    let (mut found, mut within) = (BTreeSet::new(), false);
    for line in text.lines().map(str::trim) {
        if line.starts_with('[') {
            within = line.ends_with("dependencies]") && !line.contains("workspace.");
        } else if within && !line.starts_with('#') {
            found.extend(line.split(['.', '=', ' ']).next().filter(|n| !n.is_empty()).map(str::to_string));
        }
    }
    found
}

#[test]
fn crates_depend_one_way() {
    let ours: BTreeSet<&str> = ["model", "proto", "coordinator", "worker", "conclave", "conclave-tests"].into();
    let mut found = Vec::new();
    for (folder, allowed) in ARROWS {
        let manifest = root().join(folder).join("Cargo.toml");
        let inside: Vec<String> = dependencies(&manifest).into_iter().filter(|d| ours.contains(d.as_str())).collect();
        found.extend(
            inside
                .iter()
                .filter(|d| !allowed.contains(&d.as_str()))
                .map(|d| format!("{folder}/Cargo.toml: {folder} must not depend on {d}")),
        );
    }
    nothing("the crates' arrows (model <- proto <- {coordinator, worker} <- conclave, tests)", found);
    assert!(dependencies(&root().join("worker/Cargo.toml")).contains("model"), "no dependency was read");
}

#[test]
fn coordinator_and_worker_never_import_each_other() {
    let mut found = Vec::new();
    for (folder, other) in [("coordinator/", "worker::"), ("worker/", "coordinator::")] {
        for source in sources().iter().filter(|s| s.path.starts_with(folder)) {
            // `crate::..::worker::` is a module of one's own.
            let imports = |line: &str| line.starts_with(&format!("use {other}")) || line.contains(&format!(" {other}"));
            let lines = source.lines(true).filter(|(_, l)| imports(l));
            found.extend(lines.map(|(n, l)| format!("{}:{n}: {l}", source.path)));
        }
    }
    nothing("what both need belongs to model or proto", found);
}

#[test]
fn files_stay_short() {
    let debt = BTreeMap::from(LONG);
    let mut found = Vec::new();
    for source in sources() {
        let (lines, most) = (source.text.lines().count(), debt.get(source.path.as_str()).unwrap_or(&LINES_MAX));
        if lines > *most {
            found.push(format!("{}: {lines} lines, {most} are allowed", source.path));
        } else if lines <= LINES_MAX && debt.contains_key(source.path.as_str()) {
            found.push(format!("{}: {lines} lines, no debt any more: take it off the list", source.path));
        }
    }
    nothing("a file is one noun", found);
}

#[test]
fn every_architecture_has_a_golden() {
    let golden: BTreeSet<String> = fixtures()
        .iter()
        .flat_map(|name| {
            let text = std::fs::read_to_string(root().join("tests/golden").join(name).join("config.json")).unwrap();
            let config: Value = serde_json::from_str(&text).unwrap();
            // A model around a language model proves both.
            let spec = model::hf::spec(&text, None).unwrap();
            [config["model_type"].as_str().unwrap().to_string(), spec.architecture]
        })
        .collect();
    let known: BTreeSet<&str> = model::hf::architectures().collect();
    let excused = BTreeMap::from(WITHOUT_GOLDEN);
    let mut found = Vec::new();
    for name in &known {
        if !golden.contains(*name) && !excused.contains_key(name) {
            found.push(format!("{name}: no folder of tests/golden has this model_type"));
        }
        if golden.contains(*name) && excused.contains_key(name) {
            found.push(format!("{name}: has a golden and is excused from one"));
        }
    }
    let unknown = excused.keys().filter(|n| !known.contains(*n));
    found.extend(unknown.map(|n| format!("{n}: is excused and not known")));
    nothing("architectures without a reference", found);
    assert!(known.len() >= golden.len(), "{known:?} {golden:?}");
}
