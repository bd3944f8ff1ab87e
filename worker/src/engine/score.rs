//! Log-probabilities of the unmodified distribution.

use super::math;
use model::cut::{SEGMENTS_MAX, vocab_rows};
use model::step::Score;
use std::cmp::Ordering;

/// Chains of one segment's sum of exponentials; joined by a balanced tree.
const CHAINS: usize = 16;

/// The order of candidates: the higher logit first, ties to the lower id. NaN comes last.
pub fn better(a: (u32, f32), b: (u32, f32)) -> Ordering {
    let key = |v: f32| if v.is_nan() { f32::NEG_INFINITY } else { v };
    key(b.1).partial_cmp(&key(a.1)).expect("no NaN is left").then(a.0.cmp(&b.0))
}

/// The likeliest of `row`, whose first logit is that of id `first`; `None` for no logits.
pub fn best(row: &[f32], first: u32) -> Option<(u32, f32)> {
    let mut found: Option<(usize, f32)> = None;
    for (i, &v) in row.iter().enumerate() {
        if found.is_none_or(|(_, most)| v > most || (most.is_nan() && !v.is_nan())) {
            found = Some((i, v));
        }
    }
    found.map(|(i, v)| (first + i as u32, v))
}

/// A token's score among all of `row`, with the `best` likeliest. A token that the head never answers with has no
/// probability.
pub fn score(row: &[f32], token: u32, best: usize) -> Score {
    let total = log_sum_exp(row);
    let logprob = |v: f32| (f64::from(v) - total) as f32;
    let own = (token, row.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY));
    let mut rank = 0;
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(best + 1);
    for (id, &v) in row.iter().enumerate() {
        let candidate = (id as u32, v);
        rank += u32::from(better(candidate, own) == Ordering::Less);
        if top.len() < best || top.last().is_some_and(|&last| better(candidate, last) == Ordering::Less) {
            let at = top.partition_point(|&t| better(t, candidate) == Ordering::Less);
            top.insert(at, candidate);
            top.truncate(best);
        }
    }
    let best = top.into_iter().map(|(id, v)| (id, logprob(v))).collect();
    Score { logprob: logprob(own.1), rank, best }
}

/// `ln(sum(exp(row)))`, by vocabulary segment and then by the balanced tree.
pub fn log_sum_exp(row: &[f32]) -> f64 {
    let mut parts: [Partial; SEGMENTS_MAX] =
        std::array::from_fn(|s| Partial::of(&row[vocab_rows(row.len(), SEGMENTS_MAX, s)]));
    let mut width = SEGMENTS_MAX;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            parts[i] = parts[2 * i].join(parts[2 * i + 1]);
        }
    }
    let Partial { most, sum } = parts[0];
    if sum > 0.0 && most.is_finite() { f64::from(most) + math::ln(f64::from(sum)) } else { f64::from(most) }
}

/// The sum of `exp(v - most)` over some logits.
#[derive(Clone, Copy)]
struct Partial {
    most: f32,
    sum: f32,
}

impl Partial {
    fn of(segment: &[f32]) -> Partial {
        let most = segment.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if !most.is_finite() {
            return Partial { most, sum: 0.0 };
        }
        let mut chains = [0.0f32; CHAINS];
        for group in segment.chunks(CHAINS) {
            for (chain, &v) in chains.iter_mut().zip(group) {
                *chain += math::exp(v - most);
            }
        }
        let mut width = CHAINS;
        while width > 1 {
            width /= 2;
            for i in 0..width {
                chains[i] = chains[2 * i] + chains[2 * i + 1];
            }
        }
        Partial { most, sum: chains[0] }
    }

    fn join(self, other: Partial) -> Partial {
        let most = self.most.max(other.most);
        if !most.is_finite() {
            return Partial { most, sum: 0.0 };
        }
        let scaled = |p: Partial| if p.sum == 0.0 { 0.0 } else { p.sum * math::exp(p.most - most) };
        Partial { most, sum: scaled(self) + scaled(other) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 2654435761) % 1000) as f32 / 70.0 - 7.0).collect()
    }

    #[test]
    fn the_log_sum_of_exponentials_agrees_with_f64() {
        for n in [1, 7, 8, 9, 100, 1003, 32_000] {
            let row = row(n);
            let expected = row.iter().map(|&v| f64::from(v).exp()).sum::<f64>().ln();
            assert!((log_sum_exp(&row) - expected).abs() < 1e-5, "{n}");
        }
        let suppressed = [f32::NEG_INFINITY, 2.0, f32::NEG_INFINITY];
        assert_eq!(log_sum_exp(&suppressed), 2.0);
    }

    #[test]
    fn a_score_ranks_ties_by_the_lower_id() {
        let row = [1.0, 3.0, 2.0, 3.0, f32::NAN];
        let found = score(&row, 3, 3);
        assert_eq!(found.rank, 1);
        assert_eq!(found.best.iter().map(|b| b.0).collect::<Vec<_>>(), [1, 3, 2]);
        assert_eq!(found.logprob, found.best[0].1);
        assert!(score(&row[..4], 0, 0).best.is_empty());
        let all: f64 = score(&row[..4], 0, 4).best.iter().map(|b| f64::from(b.1).exp()).sum();
        assert!((all - 1.0).abs() < 1e-6, "{all}");
        let unknown = score(&row[..4], 7, 1);
        assert_eq!((unknown.logprob, unknown.rank, unknown.best[0].0), (f32::NEG_INFINITY, 4, 1));
    }

    #[test]
    fn the_best_is_the_first_of_equals() {
        assert_eq!(best(&[1.0, 5.0, 5.0], 100), Some((101, 5.0)));
        assert_eq!(best(&[f32::NAN, f32::NEG_INFINITY], 0), Some((1, f32::NEG_INFINITY)));
        assert_eq!(best(&[], 0), None);
    }
}
