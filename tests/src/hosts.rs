//! Hosts of a test's own: network namespaces joined by a bridge, each with an address of both kinds and a name. The test itself
//! stands at the bridge. All of it goes with the test.

use anyhow::{Context, Result, ensure};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Networks of this process so far, no two of which share a name or an address.
static NETWORKS: AtomicU32 = AtomicU32::new(0);

/// Some hosts on one network.
pub struct Hosts {
    bridge: String,
    hosts: Vec<Host>,
}

/// One of them.
pub struct Host {
    /// Its namespace.
    namespace: String,
    /// The bridge's end of its only cable.
    cable: String,
    name: String,
    pub v4: String,
    /// Without brackets.
    pub v6: String,
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("{program} can't be run"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {said}", arguments.join(" "));
    Ok(())
}

fn ip(line: &str) -> Result<()> {
    run("ip", &line.split_whitespace().collect::<Vec<_>>())
}

impl Hosts {
    /// One for each name; `None`, loudly, where this machine lets nobody make any.
    pub fn new(names: &[&str]) -> Result<Option<Hosts>> {
        let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
        let id = format!("{}-{number}", std::process::id());
        let probe = format!("cnv-{id}-probe");
        let can = ip(&format!("netns add {probe}")).and_then(|()| ip(&format!("netns del {probe}")));
        if let Err(error) = can.and_then(|()| run("nft", &["list", "tables"])) {
            eprintln!("SKIPPED: no network namespaces or no nft here (they need root and iproute2): {error:#}");
            return Ok(None);
        }
        let bridge = format!("cnv{id}b");
        ip(&format!("link add {bridge} type bridge"))?;
        let mut all = Hosts { bridge, hosts: Vec::new() };
        let bridge = &all.bridge;
        let network = std::process::id().wrapping_mul(8).wrapping_add(number);
        let (a, b) = (network / 250 % 250, network % 250);
        ip(&format!("addr add 10.{a}.{b}.254/24 dev {bridge}"))?;
        ip(&format!("addr add fd00:c0:{a:x}:{b:x}::254/64 dev {bridge} nodad"))?;
        ip(&format!("link set {bridge} up"))?;
        for (index, name) in names.iter().enumerate() {
            let number = index + 1;
            let host = Host {
                namespace: format!("cnv-{id}-{name}"),
                cable: format!("cnv{id}{}", (b'c' + index as u8) as char),
                name: (*name).into(),
                v4: format!("10.{a}.{b}.{number}"),
                v6: format!("fd00:c0:{a:x}:{b:x}::{number}"),
            };
            all.hosts.push(host);
            let Host { namespace, cable, v4, v6, .. } = &all.hosts[index];
            ip(&format!("netns add {namespace}"))?;
            ip(&format!("link add {cable} type veth peer name eth0 netns {namespace}"))?;
            ip(&format!("link set {cable} master {} up", all.bridge))?;
            ip(&format!("-n {namespace} addr add {v4}/24 dev eth0"))?;
            ip(&format!("-n {namespace} addr add {v6}/64 dev eth0 nodad"))?;
            ip(&format!("-n {namespace} link set eth0 up"))?;
            ip(&format!("-n {namespace} link set lo up"))?;
        }
        Ok(Some(all))
    }

    pub fn host(&self, index: usize) -> &Host {
        &self.hosts[index]
    }
}

impl Host {
    /// A program that runs there, under the host's own name. The process is the program's.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace, "unshare", "--uts", "sh", "-c"]);
        command.args(["hostname \"$0\" && exec \"$@\"", &self.name, program]);
        command
    }

    /// Pulls its cable, or plugs it in again.
    pub fn plug(&self, plugged: bool) -> Result<()> {
        ip(&format!("link set {} {}", self.cable, if plugged { "up" } else { "down" }))
    }

    /// From now on packets that `rule` matches vanish: `input ip saddr 10.0.0.1`, for instance, or `output` alone for all that it
    /// sends. Until [`Host::hear`].
    pub fn deafen(&self, hook: &str, rule: &str) -> Result<()> {
        let chain =
            format!("table inet cut {{ chain cutting {{ type filter hook {hook} priority 0; {rule} drop; }}; }}",);
        run("ip", &["netns", "exec", &self.namespace, "nft", &chain])
    }

    pub fn hear(&self) -> Result<()> {
        run("ip", &["netns", "exec", &self.namespace, "nft", "delete table inet cut"])
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in &self.hosts {
            // A namespace goes when its last process does, and that takes a moment; its cable's name is free at once.
            let _ = ip(&format!("link del {}", host.cable));
            let _ = ip(&format!("netns del {}", host.namespace));
        }
        let _ = ip(&format!("link del {}", self.bridge));
    }
}
