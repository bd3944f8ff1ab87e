//! What every answer must be, from the request alone.

use coordinator::schedule::job::{DoneReason, Job};
use model::step::{Sampling, Score};

use super::random::mix;

/// Tokens are `0..VOCABULARY`: few, so that end tokens are drawn often.
pub const VOCABULARY: u32 = 40;

/// The token that the simulated model draws after `tokens`.
pub fn draw(sampling: &Sampling, tokens: impl Iterator<Item = u32>) -> u32 {
    let key = mix(sampling.seed ^ (u64::from(sampling.choice) << 32));
    // Some answers repeat themselves before long: drafts of them are right now and then.
    if sampling.seed.is_multiple_of(3) {
        return (digest(key, tokens.last().into_iter()) % u64::from(VOCABULARY)) as u32;
    }
    (digest(key, tokens) % u64::from(VOCABULARY)) as u32
}

/// The score of the last of `tokens`, given those before it.
pub fn score(tokens: impl Iterator<Item = u32>) -> Score {
    let digest = digest(1, tokens);
    Score { logprob: -((digest % 1000) as f32), rank: (digest % 7) as u32, best: Vec::new() }
}

fn digest(key: u64, tokens: impl Iterator<Item = u32>) -> u64 {
    mix(tokens
        .fold(key, |digest, token| (digest ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)))
}

/// Drawn tokens with their scores, where asked.
pub type Drawn = Vec<(u32, Option<Score>)>;

/// One choice's tokens and why it ended.
pub fn answer(job: &Job, choice: u32, model_len_max: usize) -> (Drawn, DoneReason) {
    let sampling = Sampling { choice, ..job.sampling.clone() };
    let mut tokens = job.prompt.clone();
    let mut drawn = Vec::new();
    while drawn.len() < job.tokens_max as usize && tokens.len() < model_len_max {
        let token = draw(&sampling, tokens.iter().copied());
        tokens.push(token);
        drawn.push((token, sampling.logprobs.map(|_| score(tokens.iter().copied()))));
        if job.end_tokens.contains(&token) {
            return (drawn, DoneReason::End);
        }
    }
    (drawn, DoneReason::Length)
}

/// Scores of the prompt's tokens 1.. .
pub fn prompt_scores(job: &Job) -> Vec<Score> {
    (2..=job.prompt.len()).map(|len| score(job.prompt[..len].iter().copied())).collect()
}
