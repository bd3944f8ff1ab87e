//! What a worker is told: one struct, one file, one page. Flags and environment are read by the command, not here.

use proto::tls::Tls;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// A worker's settings (`deploy/config/worker.toml` has every key).
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The coordinators' node planes: `host:port`, several with commas between them. Whoever of all the addresses that a name
    /// stands for leads is joined.
    pub coordinator: String,
    /// This worker's name, unique in the cluster; by default host name and process id.
    #[serde(default)]
    pub name: String,
    /// Where peers reach its ranks' data, `ip:port`; port 0 picks a free one.
    #[serde(default = "loopback")]
    pub data_listen: String,
    /// Where probes and scrapers ask how it is, `ip:port`; empty: nowhere. Nothing secret is said there, so it needs no guard.
    #[serde(default)]
    pub health_listen: String,
    /// The cluster's shared secret; better in the environment variable `CONCLAVE_TOKEN`.
    #[serde(default)]
    pub token: String,
    /// Mutual TLS to the coordinator and with other workers; needed where they are not on loopback.
    #[serde(default)]
    pub tls: Option<Tls>,
    /// Lets this worker speak to other hosts in the clear, to the coordinator and to peers.
    #[serde(default)]
    pub insecure: bool,
    /// Devices to offer; 0 offers one for each... one CPU device of all its threads.
    #[serde(default = "one")]
    pub devices: usize,
    /// Threads of all CPU devices together; 0 takes what the process may run on.
    #[serde(default)]
    pub threads: usize,
    /// Memory to offer in bytes, all devices together; 0 takes 90% of what is available at start.
    #[serde(default)]
    pub memory_bytes: u64,
    /// How long it goes on serving after SIGTERM while others take over what it holds. Whoever kills it later must wait
    /// longer (Kubernetes' `terminationGracePeriodSeconds`).
    #[serde(default = "minute")]
    pub drain_seconds: u64,
    /// Where this host keeps models, if not where the coordinator does.
    #[serde(default)]
    pub model_root: PathBuf,
}

impl Config {
    /// Where this host has the model that the coordinator keeps at `path`: there too, or under [`Config::model_root`] by
    /// the path's last part.
    pub fn model(&self, path: &str) -> PathBuf {
        let path = Path::new(path);
        match path.file_name() {
            Some(name) if !self.model_root.as_os_str().is_empty() => self.model_root.join(name),
            _ => path.into(),
        }
    }
}

fn loopback() -> String {
    "127.0.0.1:0".into()
}

fn minute() -> u64 {
    60
}

fn one() -> usize {
    1
}

/// Memory that can be had without swapping, in bytes (`MemAvailable`), bounded by the cgroup's limit; 0 if unknown.
pub fn memory_available() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))
        .and_then(|v| v.trim().trim_end_matches(" kB").trim().parse::<u64>().ok());
    let cgroup = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .find_map(|f| std::fs::read_to_string(f).ok()?.trim().parse::<u64>().ok());
    kib.map_or(0, |k| k * 1024).min(cgroup.unwrap_or(u64::MAX))
}

/// Bytes of this process in memory, mapped file pages apart (they are the page cache's).
pub fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or("0");
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap_or(0) * 1024
    };
    field("RssAnon:") + field("RssShmem:")
}

/// A name that tells hosts apart: those with the same may share memory.
pub fn host_name() -> String {
    // The boot id tells apart containers' equal host names on different machines, and the user namespace's view of
    // process ids is compared when memory is really shared.
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    format!("{}/{}", name.trim(), boot.trim().get(..8).unwrap_or("?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_settings_are_the_defaults() {
        let text = include_str!("../../deploy/config/worker.toml");
        let documented: Config = toml::from_str(text).unwrap();
        let defaults: Config = toml::from_str("coordinator = \"127.0.0.1:7070\"").unwrap();
        assert_eq!(format!("{documented:?}"), format!("{defaults:?}"));
    }
}
