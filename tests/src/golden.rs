//! What the reference implementation computed for a fixture: `golden.json` and `golden.safetensors`.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

pub struct Golden {
    pub prompts: Vec<Prompt>,
    tensors: BTreeMap<String, Vec<u8>>,
}

#[derive(Debug, Clone)]
pub struct Prompt {
    pub name: String,
    pub input_ids: Vec<u32>,
    pub prefill_argmax: Vec<u32>,
    pub prefill_logsumexp: Vec<f64>,
    pub prefill_logits_positions: [usize; 2],
    pub greedy_ids: Vec<u32>,
    /// A step each: candidates and their logits, best first.
    pub greedy_top5: Vec<Vec<(u32, f64)>>,
    pub greedy_logsumexp: Vec<f64>,
    /// The largest difference that f32 rounding explains.
    pub tolerance: f64,
    pub moe_layers: Vec<String>,
}

impl Golden {
    pub fn read(folder: &Path) -> Result<Golden> {
        let parsed: Value = serde_json::from_str(&std::fs::read_to_string(folder.join("golden.json"))?)?;
        let prompts = parsed["prompts"].as_array().context("golden.json has prompts")?;
        let file = std::fs::read(folder.join("golden.safetensors"))?;
        let entries = worker::load::safetensors::entries(&file)?;
        Ok(Golden {
            prompts: prompts.iter().map(prompt).collect::<Result<_>>()?,
            tensors: entries.into_iter().map(|e| (e.name, file[e.range].to_vec())).collect(),
        })
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        self.words(name).map(f32::from_le_bytes).collect()
    }

    pub fn ints(&self, name: &str) -> Vec<u32> {
        self.words(name).map(u32::from_le_bytes).collect()
    }

    fn words(&self, name: &str) -> impl Iterator<Item = [u8; 4]> {
        let bytes = self.tensors.get(name).unwrap_or_else(|| panic!("golden.safetensors has no {name}"));
        bytes.chunks_exact(4).map(|b| b.try_into().expect("four bytes"))
    }
}

fn prompt(p: &Value) -> Result<Prompt> {
    let ids = |key: &str| -> Result<Vec<u32>> {
        let list = p[key].as_array().with_context(|| format!("{key} is a list"))?;
        list.iter().map(|v| Ok(v.as_u64().context("an id")? as u32)).collect()
    };
    let floats = |v: &Value| -> Result<Vec<f64>> {
        v.as_array().context("a list of numbers")?.iter().map(|v| v.as_f64().context("a number")).collect()
    };
    let mut greedy_top5 = Vec::new();
    for step in p["greedy_top5"].as_array().context("greedy_top5")? {
        let ids = step["ids"].as_array().context("ids")?.iter().map(|v| v.as_u64().unwrap_or(0) as u32);
        greedy_top5.push(ids.zip(floats(&step["logits"])?).collect());
    }
    let positions = ids("prefill_logits_positions")?;
    ensure!(positions.len() == 2, "prefill_logits_positions is a pair");
    Ok(Prompt {
        name: p["name"].as_str().context("name")?.to_owned(),
        input_ids: ids("input_ids")?,
        prefill_argmax: ids("prefill_argmax")?,
        prefill_logsumexp: floats(&p["prefill_logsumexp"])?,
        prefill_logits_positions: [positions[0] as usize, positions[1] as usize],
        greedy_ids: ids("greedy_ids")?,
        greedy_top5,
        greedy_logsumexp: floats(&p["greedy_logsumexp"])?,
        tolerance: p["suggested_atol"].as_f64().context("suggested_atol")?,
        moe_layers: p["moe_layers"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|v| v.as_str().map(str::to_owned))
            .collect(),
    })
}
