//! Sizes and device lists as people write them: `512MiB`, `16x141GiB`, `2x8x80GiB`.

use super::{Device, Offer};
use model::plan::{KernelFamily, WorkerId};

/// Devices of one host where a list does not say: a usual GPU machine.
const DEVICES_A_HOST: usize = 8;
/// Most devices of a list.
const DEVICES_MAX: usize = 4096;

const UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("B", 1),
];

/// `2GiB`, `1.5GB`, `512MiB`, `4096`. Units are powers of 1024 with an `i` and of 1000 without.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let unit = UNITS.iter().find(|(unit, _)| trimmed.to_ascii_lowercase().ends_with(&unit.to_ascii_lowercase()));
    let (number, scale) = match unit {
        Some((unit, scale)) => (trimmed[..trimmed.len() - unit.len()].trim(), *scale),
        None => (trimmed, 1),
    };
    let bad = || format!("{text:?} is not a size; write for example 2GiB, 512MiB or 4096");
    if number.is_empty() || !number.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return Err(bad());
    }
    let bytes = match number.parse::<u64>() {
        Ok(whole) => whole.checked_mul(scale),
        Err(_) => {
            let bytes = number.parse::<f64>().map_err(|_| bad())? * scale as f64;
            (bytes < u64::MAX as f64).then_some(bytes as u64)
        }
    };
    bytes.ok_or_else(|| format!("{text:?} is more bytes than can be counted"))
}

/// `81.2 GiB`; the unit in which the number has one to four digits.
pub fn format_bytes(bytes: u64) -> String {
    let units = [("TiB", 1u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.iter().find(|(_, scale)| bytes >= *scale) {
        Some((unit, scale)) => format!("{:.1} {unit}", bytes as f64 / *scale as f64),
        None => format!("{bytes} B"),
    }
}

/// The offers that a list of devices stands for, one worker a host: `16x141GiB` is hosts of eight, `2x4x80GiB` two
/// hosts of four; commas join lists.
pub fn parse_devices(text: &str) -> Result<Vec<Offer>, String> {
    let mut hosts: Vec<(usize, u64)> = Vec::new();
    let mut devices = 0;
    for part in text.split(',') {
        let fields: Vec<&str> = part.trim().split(['x', '*']).collect();
        let bad = || format!("{part:?} is not a list of devices; write for example 16x141GiB or 2x8x80GiB");
        let (memory, counts) = fields.split_last().ok_or_else(bad)?;
        let memory = parse_bytes(memory)?;
        let count = |field: &str| field.trim().parse::<usize>().ok().filter(|n| (1..=DEVICES_MAX).contains(n));
        let counts: Vec<usize> = counts.iter().map(|f| count(f)).collect::<Option<_>>().ok_or_else(bad)?;
        let sizes = match counts[..] {
            [] => vec![1],
            [n] => (0..n).step_by(DEVICES_A_HOST).map(|first| DEVICES_A_HOST.min(n - first)).collect(),
            [hosts, each] => vec![each; hosts],
            _ => return Err(bad()),
        };
        devices += sizes.iter().sum::<usize>();
        if devices > DEVICES_MAX {
            return Err(format!("{text:?} has more than {DEVICES_MAX} devices"));
        }
        if memory == 0 {
            return Err(format!("{part:?} are devices without memory"));
        }
        hosts.extend(sizes.into_iter().map(|size| (size, memory)));
    }
    let offer = |(index, (size, memory_bytes)): (usize, (usize, u64))| Offer {
        worker: WorkerId(format!("worker-{index}")),
        host: format!("host-{index}"),
        data_address: format!("host-{index}:7071"),
        devices: vec![Device { memory_bytes, threads: 1 }; size],
        families: vec![KernelFamily::Vector],
    };
    Ok(hosts.into_iter().enumerate().map(offer).collect())
}

#[cfg(test)]
mod tests {
    use super::{format_bytes, parse_bytes, parse_devices};

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let cases = [
            ("4096", 4096),
            ("2GiB", 2 << 30),
            ("512 MiB", 512 << 20),
            ("1.5GiB", 3 << 29),
            ("80gb", 80_000_000_000),
            ("7B", 7),
            ("1KiB", 1024),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in
            ["", "GiB", "-1GiB", "1e9", "2 GiB GiB", "1.2.3GiB", "inf", "99999999999999999999", "99999999999TiB"]
        {
            assert!(parse_bytes(text).is_err(), "{text:?} was read as {:?}", parse_bytes(text));
        }
    }

    #[test]
    fn sizes_are_written_with_one_decimal() {
        let cases = [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (81 << 30, "81.0 GiB"), (3 << 40, "3.0 TiB")];
        for (bytes, text) in cases {
            assert_eq!(format_bytes(bytes), text);
        }
    }

    #[test]
    fn device_lists_become_hosts() {
        let shape = |text: &str| {
            let offers = parse_devices(text).unwrap();
            offers.iter().map(|o| (o.devices.len(), o.devices[0].memory_bytes >> 30)).collect::<Vec<_>>()
        };
        assert_eq!(shape("16x141GiB"), [(8, 141), (8, 141)]);
        assert_eq!(shape("11x80GiB"), [(8, 80), (3, 80)]);
        assert_eq!(shape("2x4x80GiB"), [(4, 80), (4, 80)]);
        assert_eq!(shape("24GiB, 2x48GiB"), [(1, 24), (2, 48)]);
        for text in ["", "x", "0x80GiB", "16x", "16x0GiB", "2x2x2x80GiB", "5000x1GiB", "-1x80GiB"] {
            assert!(parse_devices(text).is_err(), "{text:?} was read");
        }
    }
}
