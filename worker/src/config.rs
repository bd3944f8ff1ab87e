//! What a worker is told: one struct, one file, one page. Flags and environment are read by the command, not here.

use proto::address::bracketed;
use proto::tls::Tls;
use serde::Deserialize;
use std::net::{IpAddr, SocketAddr};
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
    /// Where its ranks' data arrives, `ip:port`; port 0 picks a free one.
    #[serde(default = "loopback")]
    pub data_listen: String,
    /// What peers dial instead, `host:port`, where they can't dial that; port 0 is the one it listens at. An IPv6 address may
    /// stand without brackets.
    #[serde(default)]
    pub data_advertise: String,
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
    /// What its ranks compute on.
    #[serde(default)]
    pub backend: Backend,
    /// Which of the host's GPUs it has, from 0, where it computes on one.
    #[serde(default)]
    pub gpu: usize,
    /// CPU devices to offer; a GPU is one.
    #[serde(default = "one")]
    pub devices: usize,
    /// Threads of all CPU devices together; 0 takes what the process may run on.
    #[serde(default)]
    pub threads: usize,
    /// Memory to offer in bytes, all devices together, a GPU's where it has one; 0 takes 90% of what is available at start.
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

/// What a rank computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    #[default]
    Cpu,
    Cuda,
}

impl Backend {
    pub fn name(self) -> &'static str {
        match self {
            Backend::Cpu => "cpu",
            Backend::Cuda => "cuda",
        }
    }
}

/// `auto`, `cpu` or `cuda`. No kernel of ours has run on a GPU yet, so nobody gets one without asking.
impl std::str::FromStr for Backend {
    type Err = String;
    fn from_str(text: &str) -> Result<Backend, String> {
        match text {
            "auto" | "cpu" => Ok(Backend::Cpu),
            "cuda" => Ok(Backend::Cuda),
            _ => Err(format!("{text:?}: auto, cpu or cuda")),
        }
    }
}

/// Peers could not dial what a worker would tell them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} = {address:?} can't be dialled by peers: {why}")]
pub struct Undialable {
    key: &'static str,
    address: String,
    why: &'static str,
}

impl Config {
    /// The address that peers dial, `host:port`, given where this worker listens.
    pub fn data_address(&self, listens: SocketAddr) -> Result<String, Undialable> {
        let every = "it stands for every address of a host: give data_advertise = \"host:port\"";
        if self.data_advertise.is_empty() {
            let address = self.data_listen.clone();
            let told = (!listens.ip().is_unspecified()).then(|| listens.to_string());
            return told.ok_or(Undialable { key: "data_listen", address, why: every });
        }
        let address = &*bracketed(self.data_advertise.trim());
        let wrong = |why| Undialable { key: "data_advertise", address: address.into(), why };
        let (host, port) = address.rsplit_once(':').ok_or(wrong("it has no port"))?;
        let port: u16 = port.parse().map_err(|_| wrong("its port is none"))?;
        let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        match ip {
            Ok(ip) if ip.is_unspecified() => return Err(wrong(every)),
            Err(_) if host.is_empty() || host.contains([':', '/', ' ']) => return Err(wrong("its host is none")),
            Ok(_) | Err(_) => {}
        }
        Ok(format!("{host}:{}", if port == 0 { listens.port() } else { port }))
    }

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

/// Of that, what a host's workers take unless told otherwise: 90%.
pub fn memory_to_offer() -> u64 {
    memory_available() / 10 * 9
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
    fn peers_are_told_an_address_that_they_can_dial() {
        let told = |listen: &str, advertise: &str| {
            let text = format!("coordinator = \"x:1\"\ndata_listen = {listen:?}\ndata_advertise = {advertise:?}");
            let config: Config = toml::from_str(&text).unwrap();
            let listens: SocketAddr = listen.replace(":0", ":4444").parse().unwrap();
            config.data_address(listens).map_err(|error| error.to_string())
        };
        for (listen, advertise, expected) in [
            ("10.0.0.7:0", "", "10.0.0.7:4444"),
            ("[fd00::1]:0", "", "[fd00::1]:4444"),
            ("0.0.0.0:7071", "worker-3.workers:7071", "worker-3.workers:7071"),
            ("0.0.0.0:0", "10.0.0.7:0", "10.0.0.7:4444"),
            ("[::]:7071", "[fd00::1]:7072", "[fd00::1]:7072"),
            ("[::]:7071", "fd00::1:7072", "[fd00::1]:7072"),
            ("[::]:0", "fd00::1:0", "[fd00::1]:4444"),
        ] {
            assert_eq!(told(listen, advertise), Ok(expected.into()));
        }
        for (listen, advertise, key) in [
            ("0.0.0.0:0", "", "data_listen = \"0.0.0.0:0\""),
            ("[::]:7", "", "data_listen = \"[::]:7\""),
            ("0.0.0.0:7", "0.0.0.0:7", "data_advertise = \"0.0.0.0:7\""),
            ("0.0.0.0:7", "[::]:7", "data_advertise"),
            ("[::]:7", ":::7", "data_advertise"),
            ("[::]:7", "fd00:1:2:3:4:5:6:7", "its host is none"),
            ("0.0.0.0:7", "worker-3", "it has no port"),
            ("0.0.0.0:7", "worker-3:http", "its port is none"),
            ("0.0.0.0:7", ":7", "its host is none"),
            ("0.0.0.0:7", "http://worker-3:7", "its host is none"),
        ] {
            let error = told(listen, advertise).unwrap_err();
            assert!(error.contains(key), "{listen} {advertise}: {error}");
        }
    }

    #[test]
    fn the_documented_settings_are_the_defaults() {
        let text = include_str!("../../deploy/config/worker.toml");
        let documented: Config = toml::from_str(text).unwrap();
        let defaults: Config = toml::from_str("coordinator = \"127.0.0.1:7070\"").unwrap();
        assert_eq!(format!("{documented:?}"), format!("{defaults:?}"));
    }
}
