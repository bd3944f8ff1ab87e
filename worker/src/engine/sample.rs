//! Drawing a token from a row of logits. Pure: the token depends on (logits, sampling, history, key) alone.
//!
//! The order is that of the servers this one stands in for: bias and suppression, penalties, temperature, `min_p`,
//! `top_k`, `top_p`, then one uniform number walks the kept candidates in order of id. Ties keep the lower id.

use super::math;
use super::random::Key;
use super::score::{best, better};
use model::step::Sampling;
use std::cmp::Ordering;
use std::collections::BTreeMap;

/// Below it a temperature is taken for 0.
const TEMPERATURE_MIN: f32 = 1e-5;
/// Candidates that `top_p` sorts first; it sorts more only where these hold too little probability.
const NUCLEUS_FIRST: usize = 512;

/// How often the tokens before were seen: what penalties need.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    seen: BTreeMap<u32, Seen>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Seen {
    /// In the answer; 0 for a token of the prompt alone.
    generated: u32,
}

impl History {
    /// Notes a token of the prompt, or of the answer.
    pub fn note(&mut self, token: u32, generated: bool) {
        self.seen.entry(token).or_default().generated += u32::from(generated);
    }
}

/// Where a draw happens.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// Absolute position of the token to draw.
    pub position: u64,
    /// Tokens of the answer before it.
    pub generated: u32,
}

/// Whether the likeliest raw logit is the answer, so that nobody needs the row.
pub fn is_plain(sampling: &Sampling, moment: Moment) -> bool {
    sampling.temperature < TEMPERATURE_MIN
        && !sampling.needs_history()
        && sampling.logit_bias.is_empty()
        && !suppresses(sampling, moment)
}

/// Draws a token. `row` is used as scratch.
pub fn draw(row: &mut [f32], sampling: &Sampling, history: &History, moment: Moment) -> u32 {
    assert!(!row.is_empty(), "a vocabulary has tokens");
    adjust(row, sampling, history, moment);
    let (likeliest, most) = best(row, 0).expect("the row is not empty");
    if sampling.temperature < TEMPERATURE_MIN || !most.is_finite() {
        return likeliest;
    }
    for v in row.iter_mut() {
        // Probabilities relative to the likeliest; a NaN can't be drawn.
        *v = math::exp((*v - most) / sampling.temperature);
        if v.is_nan() {
            *v = 0.0;
        }
    }
    keep(row, sampling);
    let total: f64 = row.iter().map(|&w| f64::from(w)).sum();
    let key = Key { seed: sampling.seed, choice: sampling.choice, position: moment.position };
    let mut left = key.uniform() * total;
    let mut last = likeliest;
    for (id, &w) in row.iter().enumerate().filter(|(_, w)| **w > 0.0) {
        last = id as u32;
        left -= f64::from(w);
        if left < 0.0 {
            break;
        }
    }
    last
}

fn suppresses(sampling: &Sampling, moment: Moment) -> bool {
    moment.generated < sampling.suppress_until && !sampling.suppress.is_empty()
}

/// Bias, suppression and penalties, on logits.
fn adjust(row: &mut [f32], sampling: &Sampling, history: &History, moment: Moment) {
    for &(id, bias) in &sampling.logit_bias {
        if let Some(v) = row.get_mut(id as usize) {
            *v += bias;
        }
    }
    if suppresses(sampling, moment) {
        for &id in &sampling.suppress {
            if let Some(v) = row.get_mut(id as usize) {
                *v = f32::NEG_INFINITY;
            }
        }
    }
    if !sampling.needs_history() {
        return;
    }
    for (&id, seen) in &history.seen {
        let Some(v) = row.get_mut(id as usize) else { continue };
        *v = if *v > 0.0 { *v / sampling.repetition_penalty } else { *v * sampling.repetition_penalty };
        if seen.generated > 0 {
            *v -= sampling.frequency_penalty * seen.generated as f32;
            *v -= sampling.presence_penalty;
        }
    }
}

/// Zeroes the relative probabilities of what `min_p`, `top_k` and `top_p` leave out; the likeliest always stays.
fn keep(row: &mut [f32], sampling: &Sampling) {
    if sampling.min_p > 0.0 {
        // The likeliest has 1, so `min_p` of it is `min_p`.
        row.iter_mut().filter(|w| **w < sampling.min_p.min(1.0)).for_each(|w| *w = 0.0);
    }
    let top_k = sampling.top_k as usize;
    let limits_number = top_k > 0 && top_k < row.len();
    if !limits_number && sampling.top_p >= 1.0 {
        return;
    }
    let mut candidates: Vec<(u32, f32)> =
        row.iter().enumerate().filter(|(_, w)| **w > 0.0).map(|(id, &w)| (id as u32, w)).collect();
    if limits_number && top_k < candidates.len() {
        candidates.select_nth_unstable_by(top_k - 1, |&a, &b| better(a, b));
        candidates.truncate(top_k);
    }
    if sampling.top_p < 1.0 {
        nucleus(&mut candidates, sampling.top_p);
    }
    row.fill(0.0);
    for (id, w) in candidates {
        row[id as usize] = w;
    }
}

/// Keeps the likeliest candidates until they hold `top_p` of the whole, the one that reaches it included.
fn nucleus(candidates: &mut Vec<(u32, f32)>, top_p: f32) {
    // In order of id: selections before leave candidates in an order of their own.
    candidates.sort_unstable_by_key(|c| c.0);
    let total: f64 = candidates.iter().map(|c| f64::from(c.1)).sum();
    let wanted = f64::from(top_p) * total;
    let order = |a: &(u32, f32), b: &(u32, f32)| -> Ordering { better(*a, *b) };
    let mut sorted = NUCLEUS_FIRST;
    loop {
        if sorted < candidates.len() {
            candidates.select_nth_unstable_by(sorted - 1, order);
        }
        let head = sorted.min(candidates.len());
        candidates[..head].sort_unstable_by(order);
        let mut held = 0.0;
        for (i, c) in candidates[..head].iter().enumerate() {
            held += f64::from(c.1);
            if held >= wanted {
                candidates.truncate(i + 1);
                return;
            }
        }
        if head == candidates.len() {
            return;
        }
        sorted *= 8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Moment = Moment { position: 9, generated: 0 };

    fn warm() -> Sampling {
        Sampling { temperature: 1.0, ..Sampling::GREEDY }
    }

    /// Ids drawn over many positions.
    fn drawn(row: &[f32], sampling: &Sampling, draws: u64) -> BTreeMap<u32, u32> {
        let mut found = BTreeMap::new();
        for position in 0..draws {
            let token = draw(&mut row.to_vec(), sampling, &History::default(), Moment { position, generated: 0 });
            *found.entry(token).or_default() += 1;
        }
        found
    }

    #[test]
    fn no_temperature_takes_the_first_of_the_likeliest() {
        assert_eq!(draw(&mut [1.0, 4.0, 4.0], &Sampling::GREEDY, &History::default(), AT), 1);
        assert!(is_plain(&Sampling::GREEDY, AT) && !is_plain(&warm(), AT));
    }

    #[test]
    fn draws_follow_the_distribution() {
        let row: Vec<f32> = [0.1f32, 0.2, 0.3, 0.4].iter().map(|p| p.ln()).collect();
        let found = drawn(&row, &warm(), 20_000);
        for (id, p) in [0.1f32, 0.2, 0.3, 0.4].iter().enumerate() {
            let share = found[&(id as u32)] as f32 / 20_000.0;
            assert!((share - p).abs() < 0.015, "{id}: {share}");
        }
        let cold = drawn(&row, &Sampling { temperature: 0.25, ..warm() }, 2000);
        // 0.4^4 / (0.1^4 + 0.2^4 + 0.3^4 + 0.4^4)
        assert!((cold[&3] as f32 / 2000.0 - 0.7232).abs() < 0.04, "{cold:?}");
    }

    #[test]
    fn each_limit_leaves_out_what_it_says() {
        let row: Vec<f32> = [0.1f32, 0.2, 0.3, 0.4].iter().map(|p| p.ln()).collect();
        for (sampling, kept) in [
            (Sampling { top_k: 2, ..warm() }, vec![2, 3]),
            (Sampling { top_k: 9, ..warm() }, vec![0, 1, 2, 3]),
            (Sampling { top_p: 0.39, ..warm() }, vec![3]),
            (Sampling { top_p: 0.69, ..warm() }, vec![2, 3]),
            (Sampling { top_p: 0.0, ..warm() }, vec![3]),
            (Sampling { top_p: 0.85, top_k: 2, ..warm() }, vec![2, 3]),
            (Sampling { top_p: 0.5, top_k: 2, ..warm() }, vec![3]),
            (Sampling { min_p: 0.6, ..warm() }, vec![2, 3]),
            (Sampling { min_p: 1.0, ..warm() }, vec![3]),
            (Sampling { logit_bias: vec![(0, 50.0), (99, 1.0)], ..warm() }, vec![0]),
            (Sampling { suppress: vec![3, 2, 99], suppress_until: 1, ..warm() }, vec![0, 1]),
            (Sampling { suppress: vec![3, 2], suppress_until: 0, ..warm() }, vec![0, 1, 2, 3]),
        ] {
            assert_eq!(drawn(&row, &sampling, 500).into_keys().collect::<Vec<_>>(), kept, "{sampling:?}");
        }
    }

    #[test]
    fn ties_at_a_limit_keep_the_lower_ids() {
        let row = vec![0.0; 2000];
        let ids = |s: &Sampling| drawn(&row, s, 300).into_keys().max().unwrap();
        assert!(ids(&Sampling { top_k: 3, ..warm() }) == 2);
        assert!(ids(&Sampling { top_p: 0.4999, ..warm() }) < 1000);
        assert!(ids(&Sampling { top_p: 0.4999, ..warm() }) > 900, "the nucleus grows past its first guess");
    }

    #[test]
    fn penalties_see_prompt_and_answer_as_they_should() {
        let mut history = History::default();
        history.note(0, false);
        history.note(1, true);
        history.note(1, true);
        let adjusted = |sampling: Sampling| {
            let mut row = [2.0, 2.0, -2.0, 2.0];
            adjust(&mut row, &sampling, &history, AT);
            row
        };
        assert_eq!(adjusted(Sampling { repetition_penalty: 2.0, ..warm() }), [1.0, 1.0, -2.0, 2.0]);
        assert_eq!(adjusted(Sampling { presence_penalty: 0.5, ..warm() }), [2.0, 1.5, -2.0, 2.0]);
        assert_eq!(adjusted(Sampling { frequency_penalty: 0.5, ..warm() }), [2.0, 1.0, -2.0, 2.0]);
    }

    #[test]
    fn numbers_that_are_none_are_never_drawn_where_others_are() {
        let row = [f32::NAN, 0.0, f32::NEG_INFINITY];
        assert_eq!(drawn(&row, &warm(), 50).into_keys().collect::<Vec<_>>(), [1]);
        draw(&mut [f32::NAN, f32::NAN], &warm(), &History::default(), AT);
        draw(&mut [f32::INFINITY, 0.0], &warm(), &History::default(), AT);
    }
}
