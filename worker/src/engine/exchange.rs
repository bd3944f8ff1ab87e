//! Tokens go to the lanes that hold their experts and come back as expert outputs. Single outputs travel, not
//! pre-sums: the home weighs and adds them in the canonical order, so placement changes nothing.
//!
//! ```text
//! to a lane:  rows n | pairs of each of its experts | row of each pair | n rows of the compute dtype
//!             and, where experts' inputs are weighed, the weight of each pair before the rows
//! back:       one f32 row a pair, in the order asked
//! ```
//!
//! Where the lanes' devices reach each other, rows travel from device to device ([`devices`]), and the rest by the hosts.

mod devices;

use super::comm;
use super::moe::{Experts, Share};
use super::pass::Pass;
use crate::backend::{Backend, Grouping, Kind};
use model::fault::{Fault, FaultKind};

/// The complete output of each pair of `grouping` (over the group's experts on all lanes), in its order, in a Full
/// buffer from the pool.
pub fn run<B: Backend>(
    pass: &mut Pass<'_, B>,
    experts: &Experts<B>,
    share: Share,
    grouping: &Grouping,
    normed: &mut B::Buffer,
) -> Result<B::Buffer, Fault> {
    if pass.communicators.devices.lane.is_some() {
        return devices::run(pass, experts, share, grouping, normed);
    }
    let rows = pass.rows;
    let input = comm::bytes(pass.backend, normed, rows)?;
    let width = input.len().checked_div(rows).unwrap_or(0);
    let form = Form { experts: experts.number(), weighed: experts.weighs_inputs() };
    let parts: Vec<Vec<u8>> =
        (0..share.lanes).map(|lane| pack(grouping, lane, form, &input[..rows * width], width)).collect();
    pass.backend.host_done(normed, rows)?;
    let mut received = Vec::new();
    pass.communicators.lane.exchange(&parts, &mut received)?;

    let asked: Result<Vec<Asked<'_>>, Fault> = received.iter().map(|part| unpack(part, form)).collect();
    let answers = answer(pass, experts, &asked?)?;
    pass.communicators.lane.exchange(&answers, &mut received)?;

    let pairs = grouping.rows.len();
    let mut out = pass.pool.take(pass.backend, pairs, experts.hidden, Kind::Full)?;
    let values: &mut [u8] = bytemuck::cast_slice_mut(comm::full(pass.backend, &mut out, pairs)?);
    let mut at = 0;
    for (lane, part) in received.iter().enumerate() {
        let wanted = pairs_of(grouping, lane, experts.number()).len() * experts.hidden * 4;
        if part.len() != wanted {
            let got = part.len();
            return Err(diverged(format!("lane {lane} answered {got} bytes of expert outputs, {wanted} were asked")));
        }
        values[at..at + wanted].copy_from_slice(part);
        at += wanted;
    }
    pass.backend.host_done(&mut out, pairs)?;
    Ok(out)
}

/// The pairs whose experts lane `lane` holds.
fn pairs_of(grouping: &Grouping, lane: usize, each: usize) -> std::ops::Range<usize> {
    grouping.offsets[lane * each] as usize..grouping.offsets[(lane + 1) * each] as usize
}

/// What both sides know of a request.
#[derive(Debug, Clone, Copy)]
struct Form {
    /// Experts a lane.
    experts: usize,
    /// Weights travel too.
    weighed: bool,
}

/// The rows that lane `lane` is sent, ascending. One that visits several of its experts travels once.
fn rows_of(grouping: &Grouping, lane: usize, form: Form) -> Vec<u32> {
    let mut rows = grouping.rows[pairs_of(grouping, lane, form.experts)].to_vec();
    rows.sort_unstable();
    rows.dedup();
    rows
}

/// What lane `lane` is sent; `width` bytes of each of its rows.
fn pack(grouping: &Grouping, lane: usize, form: Form, input: &[u8], width: usize) -> Vec<u8> {
    let each = form.experts;
    let pairs = &grouping.rows[pairs_of(grouping, lane, each)];
    let rows = rows_of(grouping, lane, form);
    let mut part = Vec::with_capacity(4 * (1 + each + 2 * pairs.len()) + rows.len() * width);
    let mut word = |v: u32| part.extend_from_slice(&v.to_le_bytes());
    word(rows.len() as u32);
    for e in lane * each..(lane + 1) * each {
        word(grouping.offsets[e + 1] - grouping.offsets[e]);
    }
    for row in pairs {
        word(rows.binary_search(row).expect("every pair's row is among the rows") as u32);
    }
    if form.weighed {
        grouping.weights[pairs_of(grouping, lane, each)].iter().for_each(|weight| word(weight.to_bits()));
    }
    for row in rows {
        part.extend_from_slice(&input[row as usize * width..][..width]);
    }
    part
}

/// A lane's request.
struct Asked<'a> {
    rows: usize,
    /// Pairs of each expert held here.
    counts: Vec<u32>,
    /// Row of each pair, by expert.
    pairs: Vec<u32>,
    /// What each pair's input is multiplied with.
    weights: Vec<f32>,
    input: &'a [u8],
}

fn unpack(part: &[u8], form: Form) -> Result<Asked<'_>, Fault> {
    let experts = form.experts;
    let short = || diverged(format!("{} bytes are no request for {experts} experts", part.len()));
    let words = |from: usize, n: usize| -> Result<Vec<u32>, Fault> {
        let bytes = part.get(4 * from..4 * (from + n)).ok_or_else(short)?;
        Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes"))).collect())
    };
    let rows = words(0, 1)?[0] as usize;
    let counts = words(1, experts)?;
    let total = counts.iter().map(|&n| n as usize).sum();
    let pairs = words(1 + experts, total)?;
    if pairs.iter().any(|&row| row as usize >= rows) {
        return Err(short());
    }
    let before = 1 + experts + total;
    let (weights, before) = match form.weighed {
        true => (words(before, total)?.into_iter().map(f32::from_bits).collect(), before + total),
        false => (vec![1.0; total], before),
    };
    Ok(Asked { rows, counts, pairs, weights, input: &part[4 * before..] })
}

/// Runs all lanes' pairs together and takes the outputs apart again.
fn answer<B: Backend>(
    pass: &mut Pass<'_, B>,
    experts: &Experts<B>,
    asked: &[Asked<'_>],
) -> Result<Vec<Vec<u8>>, Fault> {
    let rows: usize = asked.iter().map(|a| a.rows).sum();
    let mut input = pass.pool.take(pass.backend, rows, experts.hidden, Kind::Input)?;
    let target = comm::bytes(pass.backend, &mut input, rows)?;
    let mut at = 0;
    for a in asked {
        if target.len() < at + a.input.len() || a.rows * (target.len() / rows.max(1)) != a.input.len() {
            return Err(diverged(format!("{} bytes are not {} rows", a.input.len(), a.rows)));
        }
        target[at..at + a.input.len()].copy_from_slice(a.input);
        at += a.input.len();
    }
    pass.backend.host_done(&mut input, rows)?;

    let (grouping, order) = merge(asked, experts.number());
    let mut out = experts.run(pass, &grouping, &input)?;
    pass.pool.give(experts.hidden, Kind::Input, rows, input);
    let values = comm::full(pass.backend, &mut out, grouping.rows.len())?;
    let answers = order.iter().map(|places| {
        let mut bytes = Vec::with_capacity(places.len() * experts.hidden * 4);
        for &p in places {
            bytes.extend_from_slice(bytemuck::cast_slice(&values[p as usize * experts.hidden..][..experts.hidden]));
        }
        bytes
    });
    let answers = answers.collect();
    pass.backend.host_done(&mut out, grouping.rows.len())?;
    pass.pool.give(experts.hidden, Kind::Full, grouping.rows.len(), out);
    Ok(answers)
}

/// One grouping over all lanes' pairs, lanes in order within an expert, and the place of each lane's pairs in it.
fn merge(asked: &[Asked<'_>], experts: usize) -> (Grouping, Vec<Vec<u32>>) {
    let mut grouping = Grouping { offsets: vec![0], ..Grouping::default() };
    let mut order: Vec<Vec<u32>> = asked.iter().map(|a| Vec::with_capacity(a.pairs.len())).collect();
    let mut taken = vec![0; asked.len()];
    for e in 0..experts {
        let mut first = 0;
        for (lane, a) in asked.iter().enumerate() {
            let n = a.counts[e] as usize;
            for pair in taken[lane]..taken[lane] + n {
                order[lane].push(grouping.rows.len() as u32);
                grouping.rows.push(first + a.pairs[pair]);
                grouping.weights.push(a.weights[pair]);
            }
            taken[lane] += n;
            first += a.rows as u32;
        }
        grouping.offsets.push(grouping.rows.len() as u32);
    }
    (grouping, order)
}

fn diverged(text: String) -> Fault {
    Fault::new(FaultKind::Diverged, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two lanes of two experts; five pairs over three rows of two bytes.
    fn grouping() -> Grouping {
        Grouping { rows: vec![2, 0, 2, 1, 0], weights: vec![0.1, 0.2, 0.3, 0.4, 0.5], offsets: vec![0, 1, 3, 4, 5] }
    }

    #[test]
    fn a_row_travels_once_to_a_lane() {
        let input = [10, 11, 20, 21, 30, 31];
        for (weighed, weights) in [(false, [1.0; 3]), (true, [0.1, 0.2, 0.3])] {
            let form = Form { experts: 2, weighed };
            let part = pack(&grouping(), 0, form, &input, 2);
            let asked = unpack(&part, form).unwrap();
            assert_eq!((asked.rows, &asked.counts[..], &asked.pairs[..]), (2, &[1, 2][..], &[1, 0, 1][..]));
            assert_eq!((asked.input, &asked.weights[..]), (&[10, 11, 30, 31][..], &weights[..]));
            assert!(unpack(&part[..11], form).is_err() && unpack(&[], form).is_err());
        }
        let other = Form { experts: 2, weighed: true };
        assert_eq!(unpack(&pack(&grouping(), 1, other, &input, 2), other).unwrap().weights, [0.4, 0.5]);
    }

    #[test]
    fn pairs_of_all_lanes_are_merged_by_expert_and_found_again() {
        let one = Asked { rows: 2, counts: vec![1, 2], pairs: vec![1, 0, 1], weights: vec![0.1, 0.2, 0.3], input: &[] };
        let none = Asked { rows: 0, counts: vec![0, 0], pairs: vec![], weights: vec![], input: &[] };
        let two = Asked { rows: 1, counts: vec![1, 0], pairs: vec![0], weights: vec![0.4], input: &[] };
        let (merged, order) = merge(&[one, none, two], 2);
        assert_eq!(merged.rows, [1, 2, 0, 1]);
        assert_eq!((merged.offsets, merged.weights), (vec![0, 2, 4], vec![0.1, 0.4, 0.2, 0.3]));
        assert_eq!(order, [vec![0, 2, 3], vec![], vec![1]]);
    }
}
