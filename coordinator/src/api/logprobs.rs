//! Log-probabilities in OpenAI's two shapes.

use model::step::Score;
use serde_json::{Map, Value, json};

use super::answer::Told;
use crate::text::Tokenizer;

/// JSON has no infinity: what cannot be drawn is reported as this.
const LEAST: f32 = -9999.0;

/// `choices[].logprobs` of a chat: the drawn token and exactly the `best` candidates asked for.
pub fn chat(tokenizer: &Tokenizer, told: &[Told]) -> Value {
    let entry = |token: u32, logprob: f32| {
        let bytes = tokenizer.token_bytes(token);
        json!({"token": tokenizer.token_text(token), "logprob": finite(logprob), "bytes": bytes})
    };
    let content: Vec<Value> = told
        .iter()
        .filter_map(|told| {
            let score = told.score.as_ref()?;
            let mut value = entry(told.token, score.logprob);
            value["top_logprobs"] = score.best.iter().map(|&(token, logprob)| entry(token, logprob)).collect();
            Some(value)
        })
        .collect();
    json!({"content": content, "refusal": null})
}

/// `choices[].logprobs` of a completion: parallel arrays. A prompt's first token has no probability.
pub fn completion(tokenizer: &Tokenizer, told: &[Told]) -> Value {
    let text = |token: u32| tokenizer.token_text(token);
    let best = |token: u32, score: &Score| {
        let mut map = Map::new();
        // The drawn token is always there, so there may be one more than asked for. Of tokens that read the same
        // (halves of characters) the likeliest stays.
        for (token, logprob) in score.best.iter().copied().chain([(token, score.logprob)]) {
            map.entry(text(token)).or_insert_with(|| json!(finite(logprob)));
        }
        Value::Object(map)
    };
    let scores = || told.iter().map(|told| (told.token, told.score.as_ref()));
    json!({
        "tokens": told.iter().map(|told| text(told.token)).collect::<Vec<_>>(),
        "token_logprobs": scores().map(|(_, score)| score.map(|s| finite(s.logprob))).collect::<Vec<_>>(),
        "top_logprobs": scores().map(|(token, score)| score.map(|s| best(token, s))).collect::<Vec<_>>(),
        "text_offset": told.iter().map(|told| told.offset).collect::<Vec<_>>(),
    })
}

fn finite(logprob: f32) -> f32 {
    logprob.max(LEAST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_drawn_is_still_json() {
        let score = Score { logprob: f32::NEG_INFINITY, rank: 9, best: vec![(98, -0.5)] };
        let told = [Told { token: 97, score: Some(score), offset: 0 }];
        let value = completion(&super::super::harness::text().tokenizer, &told);
        assert_eq!(value["token_logprobs"], json!([-9999.0]));
        assert_eq!(value["top_logprobs"], json!([{"b": -0.5, "a": -9999.0}]));
    }
}
