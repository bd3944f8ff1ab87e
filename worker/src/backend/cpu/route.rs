//! Which experts a row visits, and with which weights.

use super::simd::Level;
use super::simd::pool::Pool;
use super::simd::rows::Score as Scores;
use crate::backend::Routing;
use crate::backend::contract::{EXPERTS_MAX, check_router};
use model::fault::Fault;
use model::spec::{Router, Score};

const NONE: u32 = u32::MAX;

/// Routes `n` rows of `experts` logits.
pub(super) fn route(
    pool: &Pool,
    level: Level,
    (logits, experts): (&[f32], usize),
    router: &Router,
    active: usize,
    correction: Option<&[f32]>,
    n: usize,
) -> Result<Routing, Fault> {
    check_router(router, experts, active, correction.map(<[f32]>::len))?;
    let mut chosen = vec![(NONE, 0.0f32); n * active];
    pool.rows(&mut chosen, active, n, 8, &|row, chosen| {
        let mut scores = [0.0f32; EXPERTS_MAX];
        let scores = &mut scores[..experts];
        let logits = &logits[row * experts..][..experts];
        scores.copy_from_slice(logits);
        level.run(Scores { x: scores, softmax: router.score == Score::Softmax });
        let mut biased = [0.0f32; EXPERTS_MAX];
        let biased = &mut biased[..experts];
        if correction.is_none() && router.groups.is_none() {
            // Scores rise with logits; where they round to the same, logits still tell them apart.
            biased.copy_from_slice(logits);
        } else {
            for (id, biased) in biased.iter_mut().enumerate() {
                *biased = scores[id] + correction.map_or(0.0, |c| c[id]);
            }
        }
        choose(router, biased, chosen);
        weigh(router, scores, chosen);
    });
    let (ids, weights) = chosen.into_iter().unzip();
    Ok(Routing { active, ids, weights })
}

/// The best experts by biased score, best first; ties, and what can't be compared, go to the lower id.
fn choose(router: &Router, biased: &[f32], chosen: &mut [(u32, f32)]) {
    let Some(groups) = router.groups else {
        return best((0..biased.len()).map(|id| (id, biased[id])), chosen);
    };
    let each = biased.len() / groups.count;
    let mut ranks = [(NONE, 0.0f32); EXPERTS_MAX];
    let rank = |group: usize| {
        let mut top = [(NONE, 0.0f32); 2];
        let top = &mut top[..each.min(2)];
        best((group * each..(group + 1) * each).map(|id| (id, biased[id])), top);
        top.iter().fold(0.0, |sum, t| sum + t.1)
    };
    best((0..groups.count).map(|group| (group, rank(group))), &mut ranks[..groups.kept]);
    let kept = |id: usize| ranks[..groups.kept].iter().any(|r| r.0 as usize == id / each);
    best((0..biased.len()).filter(|id| kept(*id)).map(|id| (id, biased[id])), chosen);
}

/// Fills `out` with the greatest of `scored`, which comes by ascending id, greatest first.
fn best(scored: impl Iterator<Item = (usize, f32)>, out: &mut [(u32, f32)]) {
    let mut filled = 0;
    for (id, score) in scored {
        // Behind every score that is not smaller; a NaN counts as smaller than all.
        let mut at = filled;
        while at > 0 && (score > out[at - 1].1 || (out[at - 1].1.is_nan() && !score.is_nan())) {
            at -= 1;
        }
        if at == out.len() {
            continue;
        }
        filled = (filled + 1).min(out.len());
        out[at..filled].rotate_right(1);
        out[at] = (id as u32, score);
    }
}

/// Replaces the biased scores by weights, in the order of choice.
fn weigh(router: &Router, scores: &[f32], chosen: &mut [(u32, f32)]) {
    let mut sum = 0.0f32;
    for (id, weight) in chosen.iter_mut() {
        *weight = scores[*id as usize];
        sum += *weight;
    }
    let divisor = sum + router.renormalise_eps;
    for (_, weight) in chosen.iter_mut() {
        if router.renormalise {
            *weight /= divisor;
        }
        *weight *= router.scale;
    }
}
