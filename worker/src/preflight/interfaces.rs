//! What reaches other hosts: network interfaces with an address, and RDMA ports.

use super::Line;
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

pub fn lines() -> Vec<Line> {
    let mut lines: Vec<Line> = addresses().iter().map(|(name, all)| interface(name, all)).collect();
    if lines.is_empty() {
        lines.push(Line::note("network", "no interface reaches other hosts: this host serves alone"));
    }
    lines.extend(rdma(Path::new("/sys/class/infiniband")));
    lines
}

/// Addresses of interfaces that are up, by name; those that end at this host apart.
fn addresses() -> BTreeMap<String, Vec<IpAddr>> {
    let mut found: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
    let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: writes a list to a live variable, which is given back below.
    if unsafe { libc::getifaddrs(&mut first) } != 0 {
        return found;
    }
    let mut next = first;
    while !next.is_null() {
        // SAFETY: an entry of the list, which is whole until it is given back.
        let entry = unsafe { &*next };
        next = entry.ifa_next;
        let up = entry.ifa_flags & libc::IFF_UP as u32 != 0 && entry.ifa_flags & libc::IFF_LOOPBACK as u32 == 0;
        if let (true, Some(address)) = (up, address(entry.ifa_addr)) {
            // SAFETY: the entry's name, which ends with a zero.
            let name = unsafe { CStr::from_ptr(entry.ifa_name) }.to_string_lossy().into_owned();
            found.entry(name).or_default().push(address);
        }
    }
    // SAFETY: given by `getifaddrs`, and not looked at any more.
    unsafe { libc::freeifaddrs(first) };
    found
}

/// Whom peers can dial: no address of a link alone.
fn address(at: *const libc::sockaddr) -> Option<IpAddr> {
    if at.is_null() {
        return None;
    }
    // SAFETY: not null, of the entry; its family says what it is.
    match i32::from(unsafe { (*at).sa_family }) {
        libc::AF_INET => {
            // SAFETY: the family says so.
            let bits = unsafe { (*at.cast::<libc::sockaddr_in>()).sin_addr.s_addr };
            Some(IpAddr::V4(Ipv4Addr::from(u32::from_be(bits))))
                .filter(|ip| !matches!(ip, IpAddr::V4(v4) if v4.is_link_local()))
        }
        libc::AF_INET6 => {
            // SAFETY: the family says so.
            let octets = unsafe { (*at.cast::<libc::sockaddr_in6>()).sin6_addr.s6_addr };
            let ip = Ipv6Addr::from(octets);
            (!ip.is_unicast_link_local()).then_some(IpAddr::V6(ip))
        }
        _ => None,
    }
}

fn interface(name: &str, addresses: &[IpAddr]) -> Line {
    let file = |what: &str| std::fs::read_to_string(format!("/sys/class/net/{name}/{what}")).unwrap_or_default();
    let all: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
    // Virtual interfaces do not know how fast they are.
    let speed = match file("speed").trim().parse::<i64>() {
        Ok(mbit) if mbit > 0 => format!("{} Gbit/s", mbit as f64 / 1e3),
        _ => "speed unknown".into(),
    };
    Line::has(format!("network {name}"), format!("{}, {speed}, MTU {}", all.join(" "), file("mtu").trim()))
}

/// A line a port of the devices in `folder`.
fn rdma(folder: &Path) -> Vec<Line> {
    let names = |path: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    };
    let mut lines = Vec::new();
    for device in names(folder) {
        let ports = folder.join(&device).join("ports");
        for port in names(&ports) {
            let file = |what: &str| std::fs::read_to_string(ports.join(&port).join(what)).unwrap_or_default();
            // `4: ACTIVE`
            let state = file("state");
            let state = state.split_once(':').map_or("unknown", |(_, word)| word.trim()).to_lowercase();
            let text = format!("{state}, {}, {}", file("rate").trim(), file("link_layer").trim());
            let what = format!("rdma {device}/{port}");
            lines.push(if state == "active" { Line::has(what, text) } else { Line::note(what, text) });
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::Standing;

    #[test]
    fn ports_of_rdma_devices_are_told_with_their_state() {
        let folder = std::env::temp_dir().join(format!("conclave-rdma-{}", std::process::id()));
        for (port, state) in [("1", "4: ACTIVE\n"), ("2", "1: DOWN\n")] {
            let at = folder.join("mlx5_0/ports").join(port);
            std::fs::create_dir_all(&at).unwrap();
            for (name, text) in [("state", state), ("rate", "400 Gb/sec (4X NDR)\n"), ("link_layer", "InfiniBand\n")] {
                std::fs::write(at.join(name), text).unwrap();
            }
        }
        let lines = rdma(&folder);
        std::fs::remove_dir_all(&folder).unwrap();
        let told: Vec<_> = lines.iter().map(|line| (line.what.as_str(), line.standing)).collect();
        assert_eq!(told, [("rdma mlx5_0/1", Standing::Has), ("rdma mlx5_0/2", Standing::Note)]);
        assert_eq!(lines[0].text, "active, 400 Gb/sec (4X NDR), InfiniBand");
        assert!(rdma(Path::new("/nowhere")).is_empty());
    }

    #[test]
    fn an_interface_that_only_this_host_reaches_is_not_told() {
        assert!(addresses().values().flatten().all(|ip| !ip.is_loopback()));
    }
}
