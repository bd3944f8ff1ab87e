//! Processor and memory, as the system's own files say.

use super::{Line, binary};
use crate::backend::cpu;
use crate::config::memory_available;

/// Instruction sets that kernels are written for, by the system's words, best first.
const SETS: [(&str, &str); 6] = [
    ("amx_tile", "AMX"),
    ("avx512_bf16", "AVX-512 BF16"),
    ("avx512f", "AVX-512"),
    ("avx2", "AVX2"),
    ("fma", "FMA"),
    ("f16c", "F16C"),
];

pub fn lines() -> Vec<Line> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let (cpu, memory) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
    let (limits, status) = (read("/proc/self/limits"), read("/proc/self/status"));
    vec![processor(&cpu), cores(&cpu, &status), ram(&memory), huge_pages(&memory), locked(&limits)]
}

/// What stands behind `name` and a colon.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let line = text.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
    line.split_once(':').map(|(_, value)| value.trim())
}

fn processor(info: &str) -> Line {
    let flags: Vec<&str> = field(info, "flags").unwrap_or_default().split(' ').collect();
    let sets: Vec<&str> = SETS.iter().filter(|(flag, _)| flags.contains(flag)).map(|(_, name)| *name).collect();
    let families: Vec<String> = cpu::families().iter().map(|f| format!("{f:?}").to_lowercase()).collect();
    let sets = if sets.is_empty() { "portable code".to_string() } else { sets.join(", ") };
    let name = field(info, "model name").unwrap_or(std::env::consts::ARCH);
    Line::has("cpu", format!("{name}; {sets}; kernel families {}", families.join(", ")))
}

fn cores(info: &str, status: &str) -> Line {
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    let all = info.lines().filter(|line| line.starts_with("processor")).count();
    let list = field(status, "Cpus_allowed_list").unwrap_or("?");
    Line::has("cores", format!("{allowed} for this process ({list}), {all} seen"))
}

/// A number of KiB in bytes.
fn kib(text: &str, name: &str) -> u64 {
    field(text, name).and_then(|value| value.trim_end_matches("kB").trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn ram(info: &str) -> Line {
    Line::has("memory", format!("{} available of {}", binary(memory_available()), binary(kib(info, "MemTotal"))))
}

fn huge_pages(info: &str) -> Line {
    let transparent = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let chosen = transparent.split(['[', ']']).nth(1).unwrap_or("unknown");
    let count = |name: &str| field(info, name).unwrap_or("0");
    let (free, all) = (count("HugePages_Free"), count("HugePages_Total"));
    let size = binary(kib(info, "Hugepagesize"));
    Line::has("huge pages", format!("transparent: {chosen}; {free} free of {all} reserved, {size} each"))
}

fn locked(limits: &str) -> Line {
    let words = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
    let soft = words.and_then(|words| words.split_whitespace().next()).unwrap_or("unknown");
    match soft.parse::<u64>() {
        // RDMA pins its buffers; a container's default is 64 KiB to 8 MiB.
        Ok(bytes) if bytes < 1 << 30 => {
            let text = format!("up to {}: RDMA between hosts needs it unlimited (ulimit -l)", binary(bytes));
            Line::note("locked memory", text)
        }
        Ok(bytes) => Line::has("locked memory", format!("up to {}", binary(bytes))),
        Err(_) => Line::has("locked memory", soft),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::Standing;

    #[test]
    fn the_systems_files_are_read() {
        let info = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512f amx_tile\nprocessor\t: 1\n";
        assert!(processor(info).text.starts_with("Some CPU; AMX, AVX-512, AVX2; kernel families "), "{info}");
        assert!(cores(info, "Cpus_allowed_list:\t0-1\n").text.ends_with("(0-1), 2 seen"));
        let memory = "MemTotal:       8388608 kB\nHugePages_Total:      16\nHugePages_Free:        4\nHugepagesize:       2048 kB\n";
        assert!(ram(memory).text.ends_with(" of 8.0 GiB"));
        assert!(huge_pages(memory).text.ends_with("4 free of 16 reserved, 2.0 MiB each"));
    }

    #[test]
    fn a_small_limit_of_locked_memory_is_noted() {
        let limit = |soft: &str| locked(&format!("Max locked memory         {soft}      {soft}     bytes\n"));
        assert_eq!((limit("65536").standing, limit("unlimited").standing), (Standing::Note, Standing::Has));
        assert!(limit("65536").text.contains("64.0 KiB"));
    }
}
