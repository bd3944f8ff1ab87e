//! A mixture of experts, spread and cut as the mesh says.
//!
//! ```text
//! slices of a lane:  | group 0: cut 0, cut 1 | group 1: cut 0, cut 1 |     groups = ep / dp, cut = tp / groups
//! ids of group g:    | lane 0's | lane 1's | ... |                         contiguous, experts / groups of them
//! ```
//! An expert's output is completed first (its cuts summed, its bias added), weighed at home with one rounding (unless
//! its input was weighed), and added by id inside
//! canonical ranges; a group owns whole ranges, so the tree that joins ranges on one rank goes on over the slices.

use super::comm;
use super::exchange;
use super::mlp::Mlp;
use super::pass::Pass;
use super::weights::LayerLoader;
use crate::backend::{Backend, Grouping, Kind, Routing};
use model::catalog::Role;
use model::cut;
use model::fault::{Fault, FaultKind};
use model::mesh::{Mesh, RankId};
use model::spec::{Activation, Moe, Router, Weigh};
use std::ops::Range;

/// Where a rank stands among those that share the experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Runs of slices that hold different experts, and this rank's.
    pub groups: usize,
    pub group: usize,
    /// Ranks that hold the same experts, each a cut of them, and this one's.
    pub cut: usize,
    pub index: usize,
    /// Lanes that hold different experts: 1 where every lane keeps all.
    pub lanes: usize,
    pub lane: usize,
}

impl Share {
    pub fn of(mesh: &Mesh, rank: RankId) -> Share {
        let place = mesh.place(rank);
        let (lanes, lane) = if mesh.expert == 1 { (1, 0) } else { (mesh.data, place.lane) };
        let cut = mesh.expert_cut();
        let share =
            Share { groups: mesh.tensor / cut, group: place.slice / cut, cut, index: place.slice % cut, lanes, lane };
        assert_eq!(
            (share.group * lanes + lane, share.index),
            mesh.expert_share(rank),
            "the loader's share is this one"
        );
        assert_eq!(share.groups * lanes, mesh.expert, "every way the experts are spread is somebody's");
        share
    }

    /// The expert ids of this rank's group, on all lanes.
    fn of_group(&self, experts: usize) -> Range<usize> {
        let each = experts / self.groups;
        self.group * each..(self.group + 1) * each
    }

    /// The expert ids that this rank holds (a cut of).
    fn held(&self, experts: usize) -> Range<usize> {
        let each = experts / self.groups / self.lanes;
        let first = self.of_group(experts).start + self.lane * each;
        first..first + each
    }
}

/// One mixture's weights on this rank.
pub struct Mixture<B: Backend> {
    pub share: Share,
    experts: usize,
    active: usize,
    hidden: usize,
    router: Router,
    router_weight: B::Matrix,
    router_bias: Option<B::Vector>,
    correction: Option<B::Vector>,
    held: Experts<B>,
    shared: Option<Mlp<B>>,
}

/// The experts that this rank holds, in order of id.
pub struct Experts<B: Backend> {
    /// `[gate | up]` rows.
    gate_up: Vec<B::Matrix>,
    down: Vec<B::Matrix>,
    biases: Option<Biases<B>>,
    activation: Activation,
    weigh: Weigh,
    /// Channels of this rank's cut.
    channels: usize,
    pub hidden: usize,
    /// Slices that hold the other cuts of the same experts, this rank's included.
    slices: Range<usize>,
}

/// Of each expert held.
struct Biases<B: Backend> {
    /// `[gate | up]`, cut as the matrices are.
    gate_up: Vec<B::Vector>,
    /// Whole: added to complete outputs.
    down: Vec<B::Vector>,
}

impl<B: Backend> Biases<B> {
    fn load(from: &LayerLoader<'_, B>, ids: Range<usize>) -> Result<Biases<B>, Fault> {
        let each = |roles: &[Role]| -> Result<Vec<B::Vector>, Fault> {
            ids.clone().map(|e| from.expert_vector(roles, e)).collect()
        };
        Ok(Biases { gate_up: each(&[Role::ExpertGateBias, Role::ExpertUpBias])?, down: each(&[Role::ExpertDownBias])? })
    }
}

impl<B: Backend> Mixture<B> {
    pub fn load(spec: &Moe, from: &LayerLoader<'_, B>) -> Result<Mixture<B>, Fault> {
        let share = Share::of(&from.mesh, from.rank);
        let ids = share.held(spec.experts);
        let gate_up: Result<Vec<_>, Fault> =
            ids.clone().map(|e| from.expert(&[Role::ExpertGate, Role::ExpertUp], e)).collect();
        let down: Result<Vec<_>, Fault> = ids.clone().map(|e| from.expert(&[Role::ExpertDown], e)).collect();
        let vector = |has: bool, role| if has { from.vector(&[role]).map(Some) } else { Ok(None) };
        Ok(Mixture {
            share,
            experts: spec.experts,
            active: spec.active,
            hidden: from.hidden,
            router: spec.router.clone(),
            router_weight: from.matrix(&[Role::Router])?,
            router_bias: vector(spec.router.bias, Role::RouterBias)?,
            correction: vector(spec.router.correction_bias, Role::RouterCorrection)?,
            held: Experts {
                gate_up: gate_up?,
                down: down?,
                biases: if spec.bias { Some(Biases::load(from, ids)?) } else { None },
                activation: spec.activation,
                weigh: spec.weigh,
                channels: spec.intermediate / share.cut,
                hidden: from.hidden,
                slices: share.group * share.cut..(share.group + 1) * share.cut,
            },
            shared: spec.shared.as_ref().map(|s| Mlp::load_shared(s, from)).transpose()?,
        })
    }

    /// Whether lanes meet here: then even a lane without rows takes part.
    pub fn meets(&self) -> bool {
        self.share.lanes > 1
    }

    /// `x += mixture(normed)`; what was routed where. Without rows only the lanes' exchange happens.
    pub fn run(&self, pass: &mut Pass<'_, B>, normed: &mut B::Buffer, x: &mut B::Buffer) -> Result<Routing, Fault> {
        let rows = pass.rows;
        let routing = self.route(pass, normed)?;
        let mut grouping = group(&routing, rows, self.share.of_group(self.experts));
        let pairs = if self.meets() {
            exchange::run(pass, &self.held, self.share, &grouping, normed)?
        } else {
            self.held.run(pass, &grouping, normed)?
        };
        let pair_rows = grouping.rows.len();
        if self.held.weighs_inputs() {
            grouping.weights.fill(1.0);
        }
        if rows > 0 {
            let mut sum = pass.take(self.hidden, Kind::Full)?;
            let segments = cut::segments(self.experts) / self.share.groups;
            pass.backend.combine(&pairs, &grouping, segments, rows, &mut sum)?;
            self.join(pass, &mut sum)?;
            if let Some(shared) = &self.shared {
                shared.run(pass, normed, &mut sum)?;
            }
            pass.backend.add(x, &sum, None, rows)?;
            pass.give(self.hidden, Kind::Full, sum);
        }
        pass.pool.give(self.hidden, Kind::Full, pair_rows, pairs);
        Ok(routing)
    }

    fn route(&self, pass: &mut Pass<'_, B>, normed: &B::Buffer) -> Result<Routing, Fault> {
        let rows = pass.rows;
        if rows == 0 {
            return Ok(Routing { active: self.active, ..Routing::default() });
        }
        let mut logits = pass.take(self.experts, Kind::Full)?;
        pass.backend.matmul(normed, &self.router_weight, self.router_bias.as_ref(), rows, &mut logits)?;
        let routing = pass.backend.route(&logits, &self.router, self.active, self.correction.as_ref(), rows)?;
        pass.give(self.experts, Kind::Full, logits);
        let pairs = rows * self.active;
        if routing.ids.len() != pairs || routing.ids.iter().any(|&id| id as usize >= self.experts) {
            let (chosen, experts) = (routing.ids.len(), self.experts);
            let text = format!("the router chose {chosen} experts of {experts} for {rows} rows of {}", self.active);
            return Err(Fault::new(FaultKind::Internal, text));
        }
        Ok(routing)
    }

    /// Adds the groups' sums over the slices. The ranks of a group hold the same sum: the first one gives it.
    fn join(&self, pass: &mut Pass<'_, B>, sum: &mut B::Buffer) -> Result<(), Fault> {
        if self.share.groups == 1 {
            return Ok(());
        }
        if self.share.index > 0 {
            comm::full(pass.backend, sum, pass.rows)?[..pass.rows * self.hidden].fill(0.0);
            pass.backend.host_done(sum, pass.rows)?;
        }
        comm::sum(pass, sum, (pass.rows, self.hidden))
    }
}

impl<B: Backend> Experts<B> {
    pub fn number(&self) -> usize {
        self.down.len()
    }

    /// Whether routing weights belong to the experts' inputs.
    pub fn weighs_inputs(&self) -> bool {
        self.weigh == Weigh::Input
    }

    /// The complete output of each pair in a Full buffer from the pool: unweighted, unless its input was weighed.
    /// `grouping` is over the experts held here.
    pub fn run(&self, pass: &mut Pass<'_, B>, grouping: &Grouping, input: &B::Buffer) -> Result<B::Buffer, Fault> {
        let pairs = grouping.rows.len();
        let mut out = pass.pool.take(pass.backend, pairs, self.hidden, Kind::Full)?;
        if pairs > 0 {
            let mut gate_up = pass.pool.take(pass.backend, pairs, 2 * self.channels, Kind::Full)?;
            let mut active = pass.pool.take(pass.backend, pairs, self.channels, Kind::Input)?;
            if self.weighs_inputs() || self.biases.is_some() {
                self.gate_up(pass, grouping, input, &mut gate_up)?;
                pass.backend.activate(&gate_up, self.activation, pairs, &mut active)?;
            } else {
                let (w, between) = (&self.gate_up, &mut gate_up);
                pass.backend.expert_matmul_activate(input, w, grouping, self.activation, between, &mut active)?;
            }
            pass.pool.give(2 * self.channels, Kind::Full, pairs, gate_up);
            pass.backend.pair_matmul(&active, &self.down, grouping, &mut out)?;
            pass.pool.give(self.channels, Kind::Input, pairs, active);
        }
        comm::sum_part(pass, self.slices.clone(), &mut out, (pairs, self.hidden))?;
        if let Some(biases) = &self.biases {
            pass.backend.add_expert_bias(&mut out, &biases.down, grouping)?;
        }
        Ok(out)
    }

    fn gate_up(
        &self,
        pass: &mut Pass<'_, B>,
        grouping: &Grouping,
        input: &B::Buffer,
        out: &mut B::Buffer,
    ) -> Result<(), Fault> {
        if self.weighs_inputs() {
            let pairs = grouping.rows.len();
            let mut weighed = pass.pool.take(pass.backend, pairs, self.hidden, Kind::Input)?;
            pass.backend.weigh_rows(input, grouping, &mut weighed)?;
            pass.backend.pair_matmul(&weighed, &self.gate_up, grouping, out)?;
            pass.pool.give(self.hidden, Kind::Input, pairs, weighed);
        } else {
            pass.backend.expert_matmul(input, &self.gate_up, grouping, out)?;
        }
        match &self.biases {
            Some(biases) => pass.backend.add_expert_bias(out, &biases.gate_up, grouping),
            None => Ok(()),
        }
    }
}

/// The pairs of the chosen experts within `ids`, by expert and then by row.
pub fn group(routing: &Routing, rows: usize, ids: Range<usize>) -> Grouping {
    let mut offsets = vec![0u32; ids.len() + 1];
    let here = |id: u32| ids.contains(&(id as usize)).then(|| id as usize - ids.start);
    for local in routing.ids.iter().filter_map(|&id| here(id)) {
        offsets[local + 1] += 1;
    }
    for e in 0..ids.len() {
        offsets[e + 1] += offsets[e];
    }
    let pairs = offsets[ids.len()] as usize;
    let mut grouping = Grouping { rows: vec![0; pairs], weights: vec![0.0; pairs], offsets };
    let mut next = grouping.offsets.clone();
    for row in 0..rows {
        for choice in row * routing.active..(row + 1) * routing.active {
            let Some(local) = here(routing.ids[choice]) else { continue };
            let at = next[local] as usize;
            grouping.rows[at] = row as u32;
            grouping.weights[at] = routing.weights[choice];
            next[local] += 1;
        }
    }
    grouping
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_sorted_by_expert_and_then_by_row() {
        let routing = Routing { active: 2, ids: vec![3, 1, 1, 0, 3, 2], weights: vec![0.1, 0.2, 0.3, 0.4, 0.5, 0.6] };
        let all = group(&routing, 3, 0..4);
        assert_eq!(all.offsets, [0, 1, 3, 4, 6]);
        assert_eq!(all.rows, [1, 0, 1, 2, 0, 2]);
        assert_eq!(all.weights, [0.4, 0.2, 0.3, 0.6, 0.1, 0.5]);
        let upper = group(&routing, 3, 2..4);
        assert_eq!((upper.offsets, upper.rows), (vec![0, 1, 3], vec![2, 0, 2]));
    }

    #[test]
    fn shares_tile_the_experts_and_groups_own_whole_ranges() {
        for (data, tensor, expert) in
            [(1, 1, 1), (2, 4, 1), (1, 4, 4), (1, 4, 2), (2, 4, 8), (2, 4, 4), (2, 4, 2), (3, 1, 3)]
        {
            let mesh = Mesh::new(1, data, tensor, expert).unwrap();
            let experts = 24;
            let mut held = vec![0; experts];
            for rank in mesh.all() {
                let share = Share::of(&mesh, rank);
                share.held(experts).for_each(|id| held[id] += 1);
                assert!(share.of_group(experts).start.is_multiple_of(experts / share.groups));
                for id in 0..experts {
                    let of = cut::Cut::Expert { id, of: experts, within: cut::ExpertCut::Whole };
                    let has = cut::slice(of, 8, 8, &mesh, rank).is_some();
                    assert_eq!(has, share.held(experts).contains(&id), "{mesh}: expert {id} on rank {}", rank.0);
                }
            }
            assert!(held.iter().all(|&n| n == data * tensor / expert), "{mesh}: {held:?}");
        }
    }
}
