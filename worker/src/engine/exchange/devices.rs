//! Rows that go from device to device. Who wants how many of which expert is still told by the hosts, whose routing it comes of.

use super::{Asked, Form, merge, pack, pairs_of, rows_of, unpack};
use crate::backend::{Backend, Grouping, Kind};
use crate::engine::comm::on_device;
use crate::engine::moe::{Experts, Share};
use crate::engine::pass::Pass;
use model::fault::Fault;
use std::ops::Range;

/// [`super::run`].
pub fn run<B: Backend>(
    pass: &mut Pass<'_, B>,
    experts: &Experts<B>,
    share: Share,
    grouping: &Grouping,
    normed: &B::Buffer,
) -> Result<B::Buffer, Fault> {
    let (hidden, lanes) = (experts.hidden, share.lanes);
    let form = Form { experts: experts.number(), weighed: experts.weighs_inputs() };
    let parts: Vec<Vec<u8>> = (0..lanes).map(|lane| pack(grouping, lane, form, &[], 0)).collect();
    let mut received = Vec::new();
    pass.communicators.lane.exchange(&parts, &mut received)?;
    let asked = received.iter().map(|part| unpack(part, form)).collect::<Result<Vec<Asked<'_>>, Fault>>()?;

    // Out: each lane's rows, one lane behind the other.
    let wanted: Vec<Vec<u32>> = (0..lanes).map(|lane| rows_of(grouping, lane, form)).collect();
    let (sent, all) = (wanted.concat(), asked.iter().map(|asked| asked.rows).sum());
    let mut packed = pass.pool.take(pass.backend, sent.len(), hidden, Kind::Input)?;
    pass.backend.select(normed, &sent, &mut packed)?;
    let input = pass.pool.take(pass.backend, all, hidden, Kind::Input)?;
    let counts = (wanted.iter().map(Vec::len), asked.iter().map(|asked| asked.rows));
    travel(pass, (&packed, sent.len(), counts.0), (&input, all, counts.1))?;
    pass.pool.give(hidden, Kind::Input, sent.len(), packed);

    let (merged, order) = merge(&asked, experts.number());
    let mut out = experts.run(pass, &merged, &input)?;
    pass.pool.give(hidden, Kind::Input, all, input);

    // Back: outputs in the order in which each lane asked.
    let (answers, pairs) = (order.concat(), grouping.rows.len());
    let mut packed = pass.pool.take(pass.backend, answers.len(), hidden, Kind::Full)?;
    pass.backend.select(&out, &answers, &mut packed)?;
    pass.pool.give(hidden, Kind::Full, answers.len(), out);
    out = pass.pool.take(pass.backend, pairs, hidden, Kind::Full)?;
    let counts = (order.iter().map(Vec::len), (0..lanes).map(|lane| pairs_of(grouping, lane, form.experts).len()));
    travel(pass, (&packed, answers.len(), counts.0), (&out, pairs, counts.1))?;
    pass.pool.give(hidden, Kind::Full, answers.len(), packed);
    Ok(out)
}

/// Sends each lane its number of rows of one buffer and takes its number in another.
fn travel<B: Backend>(
    pass: &mut Pass<'_, B>,
    (from, sent_rows, sent): (&B::Buffer, usize, impl Iterator<Item = usize>),
    (to, received_rows, received): (&B::Buffer, usize, impl Iterator<Item = usize>),
) -> Result<(), Fault> {
    let (from, to) = (on_device(pass.backend, from, sent_rows)?, on_device(pass.backend, to, received_rows)?);
    let (sent, received) = (ranges(sent, from.width), ranges(received, to.width));
    let members = pass.communicators.devices.lane.as_deref_mut().expect("asked by the caller");
    members.exchange(from.at, &sent, to.at, &received)
}

/// Runs of so many rows, one behind the other, in bytes.
fn ranges(rows: impl Iterator<Item = usize>, width: usize) -> Vec<Range<usize>> {
    let mut end = 0;
    let next = |rows: usize| {
        end += rows * width;
        end - rows * width..end
    };
    rows.map(next).collect()
}
