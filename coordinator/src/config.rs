//! What a coordinator is told: one struct, one file, one page. Flags and environment are read by the command, not here.

use model::quant::Dtype;
use proto::tls::Tls;
use serde::{Deserialize, Deserializer};
use std::path::PathBuf;

/// A coordinator's settings (`deploy/config/coordinator.toml` has every key).
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// A directory in Hugging Face's layout, or a `.gguf` file.
    pub model: PathBuf,
    /// The name that clients ask for; by default the directory's.
    #[serde(default)]
    pub served_model_name: Option<String>,
    /// A Jinja file that renders chats in place of the model's own template.
    #[serde(default)]
    pub chat_template: Option<PathBuf>,
    /// OpenAI API, `ip:port`.
    #[serde(default = "api_listen")]
    pub listen: String,
    /// Node plane, `ip:port`; workers connect here.
    #[serde(default = "node_listen")]
    pub node_listen: String,
    /// Where workers and other coordinators reach the node plane, `ip:port`; by default where it listens. Better in the
    /// environment variable `CONCLAVE_NODE_ADVERTISE` where addresses are given late.
    #[serde(default)]
    pub node_advertise: Option<String>,
    /// How long open requests may go on after SIGTERM.
    #[serde(default = "half_a_minute")]
    pub drain_seconds: u64,
    /// The cluster's shared secret; better in the environment variable `CONCLAVE_TOKEN`.
    #[serde(default)]
    pub token: String,
    /// Mutual TLS of the node plane; needed where it is not on loopback.
    #[serde(default)]
    pub tls: Option<Tls>,
    /// Lets the node plane be reached from other hosts without TLS.
    #[serde(default)]
    pub insecure: bool,
    /// Keys that the API accepts; none opens it to whoever reaches the address.
    #[serde(default)]
    pub api_keys: Vec<String>,
    /// More keys, as digests, one a line (`conclave keys add NAME` makes them): read anew when it changes. That it holds none
    /// opens nothing.
    #[serde(default)]
    pub api_keys_file: Option<PathBuf>,
    /// Groups that each serve the whole model: workers are dealt out to them, requests go where their prefix was or where
    /// there is least to do.
    #[serde(default = "one", deserialize_with = "groups")]
    pub groups: usize,
    /// Workers to wait for before planning, in each group.
    #[serde(default = "one")]
    pub workers: usize,
    /// Plan on fewer workers after this long without a newcomer; 0 waits for all.
    #[serde(default)]
    pub settle_ms: u64,
    #[serde(default)]
    pub tensor_parallel_size: Option<usize>,
    #[serde(default)]
    pub data_parallel_size: Option<usize>,
    #[serde(default)]
    pub pipeline_parallel_size: Option<usize>,
    #[serde(default)]
    pub expert_parallel_size: Option<usize>,
    /// Compare the model's files with their checksums before serving: those of `SHA256SUMS` beside them, or the hub cache's.
    #[serde(default)]
    pub verify_checksums: bool,
    /// `auto` (the checkpoint's: bf16 unless it is f32), `f32` or `bf16`.
    #[serde(default, deserialize_with = "dtype")]
    pub dtype: Option<Dtype>,
    /// Longest sequence; by default the model's own, as far as the cache holds one.
    #[serde(default)]
    pub max_model_len: Option<usize>,
    /// Cache a rank, in bytes; by default what memory leaves.
    #[serde(default)]
    pub kv_cache_memory_bytes: Option<u64>,
    /// Without `kv_cache_memory_bytes`: at most this much cache a rank, or what one longest sequence needs.
    #[serde(default)]
    pub kv_cache_modest_bytes: Option<u64>,
    /// Tokens in a lane's part of a step.
    #[serde(default = "step_tokens")]
    pub max_num_batched_tokens: usize,
    /// Sequences in a lane's part of a step.
    #[serde(default = "step_sequences")]
    pub max_num_seqs: usize,
    /// Tokens of a sequence that a step may guess and check at once: the draft model guesses, else the model's predictors where it has
    /// any (they are loaded for it), else what followed its last tokens before is the guess. Answers stay the same and come faster.
    #[serde(default)]
    pub num_speculative_tokens: usize,
    /// A smaller model of the same tokens that guesses: a directory or a `.gguf` file, as `model` is. Whoever has the last stage's
    /// ranks needs its files.
    #[serde(default)]
    pub draft_model: Option<PathBuf>,
    /// Issue a step before the one before it was answered; not with guesses, nor with pipeline stages, which keep several in
    /// flight anyway. Answers stay the same.
    #[serde(default = "yes")]
    pub async_scheduling: bool,
    /// Requests that may wait before new ones are refused.
    #[serde(default = "queue")]
    pub max_waiting: usize,
    /// Largest request body in bytes.
    #[serde(default = "body")]
    pub body_bytes_max: usize,
    /// Where epochs are remembered.
    #[serde(default)]
    pub store: StoreSettings,
}

/// Where the coordinator keeps what must outlive it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreSettings {
    pub kind: StoreKind,
    /// Of a file store: its directory.
    pub data_dir: Option<PathBuf>,
    /// Of etcd: `http://host:port` or `https://host:port`, tried in turn.
    pub endpoints: Vec<String>,
    /// PEM files: the authority that vouches for etcd, which turns TLS on, and what this coordinator shows of itself.
    pub ca: Option<PathBuf>,
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
    /// Where etcd asks who one is.
    pub user: Option<String>,
    /// Better in the environment variable `CONCLAVE_STORE_PASSWORD`.
    pub password: String,
    /// Before every key, so that clusters can share an etcd.
    pub prefix: String,
}

impl Default for StoreSettings {
    fn default() -> StoreSettings {
        StoreSettings {
            kind: StoreKind::Memory,
            data_dir: None,
            endpoints: Vec::new(),
            ca: None,
            certificate: None,
            key: None,
            user: None,
            password: String::new(),
            prefix: "conclave/".into(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StoreKind {
    /// Forgets with the process.
    Memory,
    /// Survives it, in a directory that is its own.
    File,
    /// Survives it and is shared.
    Etcd,
}

fn api_listen() -> String {
    "127.0.0.1:8080".into()
}

fn node_listen() -> String {
    "127.0.0.1:7070".into()
}

fn groups<'de, D: Deserializer<'de>>(from: D) -> Result<usize, D::Error> {
    let groups = usize::deserialize(from)?;
    match groups {
        1..=64 => Ok(groups),
        _ => Err(serde::de::Error::custom(format!("{groups} groups: 1 to 64"))),
    }
}

fn half_a_minute() -> u64 {
    30
}

fn one() -> usize {
    1
}

fn step_tokens() -> usize {
    512
}

fn step_sequences() -> usize {
    128
}

fn yes() -> bool {
    true
}

fn queue() -> usize {
    1024
}

fn body() -> usize {
    16 << 20
}

/// `auto` is `None`.
pub fn parse_dtype(text: &str) -> Result<Option<Dtype>, String> {
    if text == "auto" { Ok(None) } else { text.parse().map(Some) }
}

fn dtype<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Dtype>, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_dtype(&text).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_settings_are_the_defaults() {
        let text = include_str!("../../deploy/config/coordinator.toml");
        let documented: Config = toml::from_str(text).unwrap();
        let defaults: Config = toml::from_str("model = \"/models/demo\"").unwrap();
        assert_eq!(format!("{documented:?}"), format!("{defaults:?}"));
    }

    #[test]
    fn every_key_has_its_line() {
        let text = include_str!("../../deploy/config/coordinator.toml");
        let fields = format!("{:?}", toml::from_str::<Config>("model = \"m\"").unwrap());
        let fields = fields.trim_start_matches("Config { ").replace("store: StoreSettings { ", "");
        let fields = fields.split(", ").filter_map(|f| f.split_once(": "));
        for (key, _) in fields {
            assert!(text.contains(&format!("{key} = ")), "{key} is not documented");
        }
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_it() {
        let error = toml::from_str::<Config>("model = \"m\"\ntensor_paralel_size = 2").unwrap_err();
        assert!(error.to_string().contains("tensor_paralel_size"));
    }
}
