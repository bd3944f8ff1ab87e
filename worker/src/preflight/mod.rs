//! What this host has and lacks for a worker, a line each: asked of the system, changed nowhere.

mod cuda;
mod host;
mod interfaces;

use serde::Serialize;

/// How something stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    Has,
    /// Not there, and not needed everywhere.
    Note,
    /// What depends on it can't run.
    Lacks,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    pub what: String,
    pub standing: Standing,
    pub text: String,
}

impl Line {
    fn has(what: impl Into<String>, text: impl Into<String>) -> Line {
        Line { what: what.into(), standing: Standing::Has, text: text.into() }
    }

    fn note(what: impl Into<String>, text: impl Into<String>) -> Line {
        Line { standing: Standing::Note, ..Line::has(what, text) }
    }

    fn lacks(what: impl Into<String>, text: impl Into<String>) -> Line {
        Line { standing: Standing::Lacks, ..Line::has(what, text) }
    }
}

/// All findings.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub lines: Vec<Line>,
    /// Why ranks can't run on GPUs; `None`: they can. On CPUs they always can.
    pub cuda: Option<String>,
}

/// Looks at this host; takes a second where there are GPUs.
pub fn look() -> Report {
    let mut lines = host::lines();
    lines.extend(interfaces::lines());
    let gpus = cuda::lines();
    let lack = gpus.iter().find(|line| line.standing == Standing::Lacks);
    let cuda = lack.map(|line| format!("{}: {}", line.what, line.text));
    lines.extend(gpus);
    Report { lines, cuda }
}

fn binary(bytes: u64) -> String {
    let units = [("TiB", 1u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.iter().find(|(_, scale)| bytes >= *scale) {
        Some((unit, scale)) => format!("{:.1} {unit}", bytes as f64 / *scale as f64),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_host_has_cores_memory_and_a_loopback_interface_that_is_left_out() {
        let report = look();
        for what in ["cpu", "cores", "memory", "huge pages", "locked memory"] {
            let line = report.lines.iter().find(|line| line.what == what).unwrap_or_else(|| panic!("no {what}"));
            assert!(!line.text.is_empty() && line.standing != Standing::Lacks, "{line:?}");
        }
        assert!(report.lines.iter().all(|line| line.what != "network lo"), "{report:?}");
    }

    #[test]
    fn bytes_are_said_in_binary_units() {
        assert_eq!([binary(5), binary(3 << 30), binary(141 << 30)], ["5 B", "3.0 GiB", "141.0 GiB"]);
    }
}
