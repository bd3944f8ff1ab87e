//! `conclave plan`: how a model would be cut over devices, without any device.

use anyhow::Result;
use coordinator::config::parse_dtype;
use coordinator::draft::Draft;
use coordinator::hub::Need;
use coordinator::plan::{Policy, explain, format_bytes, parse_bytes, parse_devices, plan, smallest};
use coordinator::source::Source;
use model::plan::BLOCK_TOKENS;
use model::quant::Dtype;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// A directory in Hugging Face's layout, its config.json alone, a .gguf file, or a model of the hub (org/name): of it
    /// only the description is fetched
    model: PathBuf,
    /// Devices and their memory, e.g. 16x141GiB, or hosts of them: 2x8x141GiB. Without, the smallest groups of usual
    /// devices that hold the model
    #[arg(long)]
    devices: Option<String>,
    #[arg(long, visible_alias = "tp")]
    tensor_parallel_size: Option<usize>,
    #[arg(long, visible_alias = "dp")]
    data_parallel_size: Option<usize>,
    #[arg(long, visible_alias = "pp")]
    pipeline_parallel_size: Option<usize>,
    #[arg(long, visible_alias = "ep")]
    expert_parallel_size: Option<usize>,
    /// auto, f32 or bf16
    #[arg(long, default_value = "auto", value_parser = parse_dtype)]
    dtype: Setting<Dtype>,
    /// Longest sequence in tokens
    #[arg(long)]
    max_model_len: Option<usize>,
    /// Cache of each rank, e.g. 2GiB
    #[arg(long, value_parser = parse_bytes)]
    kv_cache_memory: Option<u64>,
    /// A smaller model of the same tokens that guesses, named as MODEL is: it takes memory of the last stage
    #[arg(long, value_name = "MODEL")]
    draft_model: Option<PathBuf>,
    /// Compare the model's files with their checksums: those of SHA256SUMS beside them, or the hub cache's
    #[arg(long)]
    verify_checksums: bool,
    /// Print the plan as JSON
    #[arg(long)]
    json: bool,
}

/// `auto`, or a value.
type Setting<T> = Option<T>;

/// Memory of the devices that are tried where none are given: of an 80 GB, a 141 GB and a 192 GB GPU.
const USUAL: [&str; 3] = ["80GiB", "141GiB", "192GiB"];

pub fn run(args: Args) -> Result<()> {
    let path = crate::hub::model(&args.model, Need::Describe)?.path;
    if args.verify_checksums {
        crate::checksums::verify(&path)?;
    }
    let source = Source::describe(&path)?;
    let (spec, storage) = (&source.spec, &source.storage);
    let describe = |named: &PathBuf| {
        let path = crate::hub::model(named, Need::Describe)?.path;
        anyhow::Ok(Draft::describe(&path, &source)?.model)
    };
    let policy = Policy {
        draft: args.draft_model.as_ref().map(describe).transpose()?,
        tensor: args.tensor_parallel_size,
        data: args.data_parallel_size,
        pipeline: args.pipeline_parallel_size,
        expert: args.expert_parallel_size,
        dtype: args.dtype,
        model_len_max: args.max_model_len,
        cache_bytes: args.kv_cache_memory,
        ..Policy::default()
    };
    let Some(devices) = &args.devices else {
        return smallest_groups(&source, &policy, args.json);
    };
    let members = parse_devices(devices).map_err(anyhow::Error::msg)?;
    let planned = plan(spec, storage, &members, &policy, None)?;
    let draft = policy.draft.as_deref();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&explain::report(spec, storage, draft, &planned.plan))?);
    } else {
        print!("{}{}", explain::model(spec), explain::table(spec, storage, draft, &planned.plan));
    }
    Ok(())
}

fn smallest_groups(source: &Source, policy: &Policy, json: bool) -> Result<()> {
    let (spec, storage) = (&source.spec, &source.storage);
    let mut found = Vec::new();
    for device in USUAL {
        let bytes = parse_bytes(device).map_err(anyhow::Error::msg)?;
        found.push((device, smallest(spec, storage, bytes, policy)?));
    }
    if json {
        let groups: Vec<serde_json::Value> = found
            .iter()
            .map(|(device, (number, planned))| {
                serde_json::json!({
                    "device": device, "devices": number, "plan": explain::report(spec, storage, policy.draft.as_deref(), &planned.plan),
                })
            })
            .collect();
        let parameters = model::parameters::count(spec);
        println!(
            "{}",
            serde_json::to_string_pretty(&serde_json::json!({
                "architecture": spec.architecture, "parameters": parameters.total,
                "active_parameters": parameters.active, "smallest": groups,
            }))?
        );
        return Ok(());
    }
    print!("{}", explain::model(spec));
    for (device, (number, planned)) in found {
        let largest = explain::report(spec, storage, policy.draft.as_deref(), &planned.plan)
            .ranks
            .iter()
            .map(|r| r.weights_bytes)
            .max();
        println!(
            "smallest group of {device} devices: {number} ({}, up to {} of weights a rank, cache for {} tokens)",
            planned.plan.mesh,
            format_bytes(largest.unwrap_or(0)),
            planned.plan.limits.blocks * BLOCK_TOKENS * planned.plan.mesh.data
        );
    }
    Ok(())
}
