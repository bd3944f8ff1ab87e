//! `conclave quickstart`: the built-in demo model on two workers, and an answer, in seconds and with no download.

use crate::client;
use crate::serve::{After, Options, serve};
use crate::whole;
use anyhow::{Context, Result};
use std::io::Write;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    options: Options,
}

/// The demo model's files, within the program.
const FILES: [(&str, &[u8]); 5] = [
    ("config.json", include_bytes!("../demo/model/config.json")),
    ("generation_config.json", include_bytes!("../demo/model/generation_config.json")),
    ("tokenizer.json", include_bytes!("../demo/model/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../demo/model/tokenizer_config.json")),
    ("model.safetensors", include_bytes!("../demo/model/model.safetensors")),
];

const QUESTION: &str = "Tell me a story about a fox named Ruby.";

pub fn run(args: Args) -> Result<()> {
    let mut options = args.options;
    let mesh = [options.tensor_parallel_size, options.data_parallel_size, options.pipeline_parallel_size];
    if mesh.iter().all(Option::is_none) {
        options.workers = options.workers.or(Some(2));
    }
    options.served_model_name = options.served_model_name.or(Some("demo".into()));
    let model = unpack()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let key = options.api_key.clone();
    runtime.block_on(serve(model, options, |serving| async move {
        serving.announce();
        let address = serving.address;
        println!("\n> {QUESTION}\n");
        let body = serde_json::json!({
            "model": "demo",
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0.7, "seed": 7, "max_tokens": 400, "stream": true,
        });
        let url = format!("http://{address}/v1/chat/completions");
        client::stream(&url, key.as_deref(), &body, |event| {
            print!("{}", event["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
            let _ = std::io::stdout().flush();
        })
        .await?;
        println!("\n\nask more: curl {url} -d '{{\"model\":\"demo\",\"messages\":[{{\"role\":\"user\",\"content\":\"What does an owl eat?\"}}]}}'");
        Ok(After::GoOn)
    }))
}

/// Writes the demo model where worker processes can map it, once a version.
fn unpack() -> Result<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    let digest = FILES.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, (_, bytes)| {
        bytes.iter().fold(hash, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
    });
    let folder = cache.unwrap_or_else(std::env::temp_dir).join("conclave").join(format!("demo-{digest:016x}"));
    std::fs::create_dir_all(&folder).with_context(|| format!("{} can't be made", folder.display()))?;
    for (name, bytes) in FILES {
        let path = folder.join(name);
        if std::fs::read(&path).is_ok_and(|there| there == bytes) {
            continue;
        }
        // At once, so that a second quickstart never maps half a file.
        whole::write(&path, bytes)?;
    }
    Ok(folder)
}
