//! `conclave status`: the cluster as its coordinator sees it.

use crate::client;
use anyhow::Result;
use serde_json::Value;

#[derive(clap::Args)]
pub struct Args {
    /// The coordinator's API
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// API key; better in the environment variable CONCLAVE_API_KEY
    #[arg(long)]
    api_key: Option<String>,
    /// Print what the server says as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let key = args.api_key.or_else(|| std::env::var("CONCLAVE_API_KEY").ok());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let status =
        runtime.block_on(client::get(&format!("{}/status", args.url.trim_end_matches('/')), key.as_deref()))?;
    if args.json {
        println!("{status:#}");
    } else {
        print!("{}", table(&status));
    }
    Ok(())
}

fn table(status: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let mut out = format!("{}, epoch {}, {}\n", text(&status["phase"]), status["epoch"], text(&status["mesh"]));
    for reason in status["reasons"].as_array().into_iter().flatten() {
        out += &format!("  {}\n", text(reason));
    }
    let load = &status["load"];
    let cache = load["cache_used"].as_f64().unwrap_or(0.0) * 100.0;
    out += &format!("running {}, waiting {}, cache {cache:.1}%\n\n", load["running"], load["waiting"]);
    out += &format!("{:<20} {:<10} {:>12} {:>12}  ranks\n", "worker", "phase", "used", "offered");
    for member in status["members"].as_array().into_iter().flatten() {
        let mib = |key: &str| format!("{} MiB", member[key].as_u64().unwrap_or(0) >> 20);
        let ranks: Vec<String> = member["ranks"].as_array().into_iter().flatten().map(Value::to_string).collect();
        let (id, phase) = (text(&member["id"]), text(&member["phase"]));
        let (used, offered) = (mib("used_bytes"), mib("memory_bytes"));
        out += &format!("{id:<20} {phase:<10} {used:>12} {offered:>12}  {}\n", ranks.join(" "));
    }
    out + "\n" + &text(&status["plan"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_names_members_ranks_and_reasons() {
        let status = serde_json::json!({
            "phase": "loading", "epoch": 3, "mesh": "pp1 x dp1 x tp2, ep2", "plan": "PLAN", "reasons": ["loading epoch 3"],
            "load": {"running": 1, "waiting": 2, "cache_used": 0.5},
            "members": [{"id": "worker-0", "phase": "loading 40%", "ranks": [0, 1], "used_bytes": 1048576, "memory_bytes": 2097152}],
        });
        let table = table(&status);
        for part in ["loading, epoch 3", "loading epoch 3", "worker-0", "0 1", "1 MiB", "2 MiB", "50.0%", "PLAN"] {
            assert!(table.contains(part), "{part} is not in {table}");
        }
    }
}
