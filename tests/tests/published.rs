//! The published models at their real size, from their `config.json` alone: parameters, and the smallest groups of
//! devices that hold them.

#![allow(clippy::unwrap_used)] // all of this file is a test

use coordinator::plan::{Policy, explain, parse_bytes, parse_devices, plan, smallest};
use coordinator::source::Source;
use model::parameters;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")
}

/// Billions of parameters in all and active for a token, as published: exact where the authors give exact figures, else
/// as public tables count them (language part, without prediction heads; active without the embedding table).
const PUBLISHED: [(&str, f64, f64); 37] = [
    ("bloom_176b", 176.25, 176.25),
    ("deepseek_v3_671b", 671.0, 36.5),
    ("devstral2_123b", 125.0, 123.4),
    ("devstral_small2_24b", 23.6, 22.9),
    ("glm45_355b", 355.0, 32.8),
    ("glm45_air_106b", 106.0, 12.8),
    ("gpt_oss_120b", 116.83, 5.13),
    ("gpt_oss_20b", 20.91, 3.61),
    ("kimi_k25_1t", 1026.2, 31.5),
    ("kimi_k2_1t", 1026.2, 31.5),
    ("llama2_13b", 13.02, 12.85),
    ("llama2_70b", 68.98, 68.7),
    ("llama2_7b", 6.74, 6.61),
    ("llama31_405b", 405.85, 403.7),
    ("llama32_11b_vision", 8.03, 7.5),
    ("llama32_1b", 1.24, 1.24),
    ("llama32_3b", 3.21, 3.21),
    ("llama32_90b_vision", 70.55, 69.5),
    ("llama4_maverick_400b", 400.7, 16.1),
    ("llama4_scout_109b", 107.8, 16.1),
    ("magistral_small_2506", 23.57, 22.9),
    ("magistral_small_2509", 23.57, 22.9),
    ("minimax_m2_230b", 228.6, 10.4),
    ("mistral_7b", 7.24, 7.11),
    ("mistral_large2_123b", 122.6, 122.2),
    ("mistral_small4_119b", 119.0, 6.1),
    ("mixtral_8x22b", 140.6, 39.0),
    ("mixtral_8x7b", 46.7, 12.7),
    ("qwen25_72b", 72.7, 71.46),
    ("qwen25_coder_32b", 32.76, 32.0),
    ("qwen25_vl_7b", 7.62, 7.07),
    ("qwen2_7b", 7.62, 7.07),
    ("qwen3_235b_a22b", 235.1, 21.5),
    ("qwen3_32b", 32.76, 31.98),
    ("r1_distill_llama_70b", 70.55, 69.5),
    ("r1_distill_qwen_32b", 32.76, 32.0),
    ("voxtral_small_24b", 23.57, 22.9),
];

fn source(name: &str) -> Source {
    Source::describe(&configs().join(format!("{name}.json"))).unwrap_or_else(|e| panic!("{name}: {e}"))
}

#[test]
fn parameters_are_those_published() {
    let files: BTreeSet<String> = std::fs::read_dir(configs())
        .unwrap()
        .map(|e| e.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    let listed: BTreeSet<String> = PUBLISHED.iter().map(|(name, ..)| (*name).to_string()).collect();
    assert_eq!(files, listed, "every config has its published figures");
    let mut wrong = Vec::new();
    for (name, total, active) in PUBLISHED {
        let spec = source(name).spec;
        let found = parameters::count(&spec);
        assert_eq!(parameters::met(&spec, 1), found.active, "{name}: what one token meets");
        let (few, many) = (parameters::met(&spec, 8), parameters::met(&spec, 1 << 20));
        assert!(found.active <= few && few <= many && many <= found.total, "{name}: {few} and {many} of {found:?}");
        for (what, found, wanted) in [("total", found.total, total), ("active", found.active, active)] {
            let found = found as f64 / 1e9;
            if (found / wanted - 1.0).abs() > 0.0101 {
                wrong.push(format!("{name}: {found:.2} B {what}, published {wanted}"));
            }
        }
    }
    assert!(wrong.is_empty(), "more than 1% off: {wrong:#?}");
}

/// Every rank of the plan fits its device, and larger devices are never more.
#[test]
fn the_smallest_group_holds_each_model() {
    for (name, total, _) in PUBLISHED {
        let source = source(name);
        let policy = Policy { model_len_max: Some(source.spec.positions_max.min(8192)), ..Policy::default() };
        let mut before = usize::MAX;
        for device in ["80GiB", "141GiB", "192GiB"] {
            let bytes = parse_bytes(device).unwrap();
            let (devices, planned) = smallest(&source.spec, &source.storage, bytes, &policy)
                .unwrap_or_else(|e| panic!("{name} on {device} devices: {e}"));
            assert!(devices <= before, "{name}: {devices} of {device}, fewer of smaller ones");
            before = devices;
            // No format that is read takes less than half a byte a weight.
            let least = total * 1e9 / 2.0;
            assert!(devices as f64 * bytes as f64 > least, "{name}: {devices} of {device} can't hold it");
            let report = explain::report(&source.spec, &source.storage, None, &planned.plan);
            assert!(report.ranks.iter().all(|rank| rank.total_bytes <= bytes), "{name}: a rank does not fit {device}");
            println!("{name}: {devices} of {device}: {}", planned.plan.mesh);
        }
    }
}

/// Gigabytes of weights in the width that ranks keep, a little more than the published files (a scale is kept for each
/// output), and the smallest groups of 80, 141 and 192 GiB devices.
const QUANTISED: [(&str, f64, [usize; 3]); 6] = [
    ("deepseek_v3_671b", 694.9, [16, 8, 4]),
    ("gpt_oss_120b", 68.9, [1, 1, 1]),
    ("gpt_oss_20b", 14.4, [1, 1, 1]),
    ("kimi_k25_1t", 594.2, [8, 4, 4]),
    ("kimi_k2_1t", 1061.4, [16, 8, 8]),
    ("minimax_m2_230b", 239.4, [4, 2, 2]),
];

#[test]
fn quantised_models_are_planned_in_their_codes() {
    for (name, gigabytes, groups) in QUANTISED {
        let source = source(name);
        let one = parse_devices("1x4TiB").unwrap();
        let whole = plan(&source.spec, &source.storage, &one, &Policy::default(), None).unwrap();
        let found = whole.bytes[0].weights as f64 / 1e9;
        assert!((found / gigabytes - 1.0).abs() < 0.005, "{name}: {found:.1} GB of weights");
        for (device, devices) in ["80GiB", "141GiB", "192GiB"].into_iter().zip(groups) {
            let bytes = parse_bytes(device).unwrap();
            let policy = Policy { model_len_max: Some(source.spec.positions_max.min(8192)), ..Policy::default() };
            let (found, planned) = smallest(&source.spec, &source.storage, bytes, &policy).unwrap();
            assert_eq!(found, devices, "{name} of {device}: {}", planned.plan.mesh);
        }
    }
}
