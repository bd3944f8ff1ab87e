//! A real etcd for tests, where there is one.

use crate::cluster::{Ending, free_address};
use anyhow::Result;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Starts a member of its own at `address` (`ip:port`); `None`, loudly, where no etcd is in PATH.
pub fn start(address: &str, data: &Path) -> Result<Option<Ending>> {
    if Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
        let line = b"SKIPPED: no etcd in PATH (Debian, Ubuntu: apt-get install etcd-server)\n";
        std::io::stderr().write_all(line)?;
        return Ok(None);
    }
    let (client, peer) = (format!("http://{address}"), format!("http://{}", free_address()?));
    let mut command = Command::new("etcd");
    command
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client, "--listen-peer-urls", &peer])
        .arg("--data-dir")
        .arg(data)
        .stderr(Stdio::null());
    Ending::spawn(&mut command).map(Some)
}
