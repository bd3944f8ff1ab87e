//! `conclave plan`: how a model would be cut over devices, without any device.

use anyhow::Result;
use coordinator::config::parse_dtype;
use coordinator::plan::{Policy, explain, parse_bytes, parse_devices, plan};
use coordinator::source::Source;
use model::quant::Dtype;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// A directory in Hugging Face's layout (its config.json and headers are enough), or a .gguf file
    model: PathBuf,
    /// Devices and their memory, e.g. 16x141GiB, or hosts of them: 2x8x141GiB
    #[arg(long)]
    devices: String,
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
    /// Print the plan as JSON
    #[arg(long)]
    json: bool,
}

/// `auto`, or a value.
type Setting<T> = Option<T>;

pub fn run(args: Args) -> Result<()> {
    let source = Source::open(&args.model)?;
    let members = parse_devices(&args.devices).map_err(anyhow::Error::msg)?;
    let policy = Policy {
        tensor: args.tensor_parallel_size,
        data: args.data_parallel_size,
        pipeline: args.pipeline_parallel_size,
        expert: args.expert_parallel_size,
        dtype: args.dtype,
        model_len_max: args.max_model_len,
        cache_bytes: args.kv_cache_memory,
        ..Policy::default()
    };
    let planned = plan(&source.spec, &source.formats, &members, &policy, None)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&explain::report(&source.spec, &source.formats, &planned.plan))?);
    } else {
        print!("{}", explain::table(&source.spec, &source.formats, &planned.plan));
    }
    Ok(())
}
