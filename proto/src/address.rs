//! Addresses as people and orchestrators write them.

use std::borrow::Cow;
use std::net::Ipv6Addr;

/// `host:port` with brackets around a bare IPv6 address, as `$(POD_IP):7071` comes to be written: its port is what stands behind the
/// last colon. Anything else is given back as it is.
pub fn bracketed(address: &str) -> Cow<'_, str> {
    match address.rsplit_once(':') {
        Some((host, port)) if host.parse::<Ipv6Addr>().is_ok() => format!("[{host}]:{port}").into(),
        _ => address.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_address_gets_brackets_and_nothing_else_does() {
        for (written, meant) in [
            ("fd00::1:7071", "[fd00::1]:7071"),
            ("fd00:1:2:3:4:5:6:7:0", "[fd00:1:2:3:4:5:6:7]:0"),
            ("::1:7070", "[::1]:7070"),
            (":::7070", "[::]:7070"),
            ("[fd00::1]:7071", "[fd00::1]:7071"),
            ("10.0.0.7:7071", "10.0.0.7:7071"),
            ("worker-3.workers:7071", "worker-3.workers:7071"),
            ("worker-3", "worker-3"),
            ("fd00:1:2:3:4:5:6:7", "fd00:1:2:3:4:5:6:7"),
            ("", ""),
        ] {
            assert_eq!(bracketed(written), meant);
        }
    }
}
