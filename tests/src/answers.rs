//! A served model's answers against the reference's numbers.

use crate::process::Served;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::path::Path;

/// Completions of the prompts of a golden at `folder`, which is served by its name, must be its greedy tokens, and their
/// log-probabilities within its tolerance.
pub fn equal_the_golden(served: &Served, folder: &Path) -> Result<()> {
    let name = folder.file_name().context("a golden has a name")?.to_string_lossy();
    let expected: Value = serde_json::from_slice(&std::fs::read(folder.join("golden.json"))?)?;
    for prompt in expected["prompts"].as_array().context("prompts")? {
        let tolerance = prompt["suggested_atol"].as_f64().context("suggested_atol")?;
        let greedy = prompt["greedy_ids"].as_array().context("greedy_ids")?;
        let body = json!({
            "model": name, "prompt": prompt["input_ids"], "max_tokens": greedy.len(), "temperature": 0, "logprobs": 5,
            "ignore_eos": true, "return_token_ids": true,
        });
        let reply = served.ask("/v1/completions", &body)?;
        let choice = &reply["choices"][0];
        let (got, wanted) = (&choice["token_ids"], &prompt["greedy_ids"]);
        ensure!(got == wanted, "{got} is not {wanted}");
        ensure!(reply["usage"]["completion_tokens"] == greedy.len(), "usage: {}", reply["usage"]);
        let (tops, sums) = (&prompt["greedy_top5"], &prompt["greedy_logsumexp"]);
        for step in 0..greedy.len() {
            let wanted =
                tops[step]["logits"][0].as_f64().context("a top-5 logit")? - sums[step].as_f64().context("a sum")?;
            let got = choice["logprobs"]["token_logprobs"][step].as_f64().context("a log-probability")?;
            ensure!((got - wanted).abs() <= tolerance * 2.0, "step {step}: {got}, wanted {wanted} within {tolerance}");
        }
    }
    Ok(())
}
