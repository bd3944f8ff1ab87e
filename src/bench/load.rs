//! What is sent and when: prompts of random tokens, and the arrivals of an open loop.

use std::time::Duration;

use serde_json::{Value, json};

use super::random::Random;

/// The shape of the prompts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// Tokens of a prompt, the shared ones included.
    pub input: usize,
    /// Tokens at the beginning that all prompts have in common.
    pub shared: usize,
    /// Ids are drawn from `[0]` up to but not including `[1]`.
    pub ids: [u32; 2],
    /// Sends words instead of ids; how many tokens they are only the server knows.
    pub text: bool,
}

/// One request of the load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// When it is due after the start, in an open loop. A closed loop sends when a place is free.
    pub due: Duration,
    ids: Vec<u32>,
    text: bool,
}

impl Planned {
    /// The `prompt` of the request. Made when it is sent: as JSON a long prompt takes many times its ids' memory.
    pub fn prompt(&self) -> Value {
        if self.text { words(&self.ids) } else { json!(self.ids) }
    }
}

/// Plans `count` requests. The same arguments give the same plan; without a rate all are due at once.
pub fn plan(shape: &Shape, count: usize, rate: Option<f64>, seed: u64) -> Vec<Planned> {
    let mut random = Random::new(seed);
    let shared = draw(&mut random, shape, shape.shared.min(shape.input));
    let mut due = 0.0;
    (0..count)
        .map(|index| {
            let mut ids = shared.clone();
            ids.extend(draw(&mut random, shape, shape.input - shared.len()));
            if let (Some(rate), true) = (rate, index > 0) {
                due += random.gap(rate);
            }
            Planned { due: Duration::from_secs_f64(due), ids, text: shape.text }
        })
        .collect()
}

fn draw(random: &mut Random, shape: &Shape, count: usize) -> Vec<u32> {
    let [low, high] = shape.ids;
    (0..count).map(|_| low + random.below(u64::from(high - low)) as u32).collect()
}

/// One short common word for each id: about a token each in any vocabulary.
fn words(ids: &[u32]) -> Value {
    const WORDS: [&str; 32] = [
        "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
        "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company",
        "system", "program", "question", "work", "number", "night", "point", "home",
    ];
    let words: Vec<&str> = ids.iter().map(|id| WORDS[*id as usize % WORDS.len()]).collect();
    Value::String(words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> Shape {
        Shape { input: 10, shared: 4, ids: [100, 200], text: false }
    }

    #[test]
    fn prompts_share_the_prefix_and_nothing_else() {
        let plan = plan(&shape(), 20, None, 3);
        let prompts: Vec<Vec<u64>> = plan
            .iter()
            .map(|planned| planned.prompt().as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect())
            .collect();
        for prompt in &prompts {
            assert_eq!(prompt.len(), 10);
            assert_eq!(prompt[..4], prompts[0][..4]);
            assert!(prompt.iter().all(|id| (100..200).contains(id)));
        }
        assert!(prompts.windows(2).all(|pair| pair[0][4..] != pair[1][4..]));
        assert!(plan.iter().all(|planned| planned.due.is_zero()));
    }

    #[test]
    fn arrivals_keep_the_rate_and_never_go_back() {
        let plan = plan(&shape(), 10_001, Some(50.0), 3);
        assert!(plan[0].due.is_zero());
        assert!(plan.windows(2).all(|pair| pair[0].due <= pair[1].due));
        let last = plan.last().unwrap().due.as_secs_f64();
        assert!((last - 200.0).abs() < 10.0, "10,000 gaps at 50 a second took {last} s");
    }

    #[test]
    fn the_seed_decides_everything() {
        assert_eq!(plan(&shape(), 5, Some(1.0), 1), plan(&shape(), 5, Some(1.0), 1));
        assert_ne!(plan(&shape(), 5, Some(1.0), 1), plan(&shape(), 5, Some(1.0), 2));
    }

    #[test]
    fn text_prompts_have_a_word_for_each_token() {
        let plan = plan(&Shape { text: true, ..shape() }, 1, None, 3);
        assert_eq!(plan[0].prompt().as_str().unwrap().split(' ').count(), 10);
    }
}
