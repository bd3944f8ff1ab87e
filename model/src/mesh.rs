//! The mesh: `pipeline x data x tensor` ranks, experts spread over the `data x tensor` ranks of a stage. All rank
//! arithmetic lives here, so that no two places can disagree about who is whose neighbour.
//!
//! ```text
//! rank = (stage * data + lane) * tensor + slice
//! ```

use crate::error::SpecError;

/// One device's place in the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RankId(pub u32);

/// A rank's coordinates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Pipeline stage.
    pub stage: usize,
    /// Data-parallel lane: which sequences it attends to.
    pub lane: usize,
    /// Tensor slice within the lane.
    pub slice: usize,
}

/// Sizes of the axes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mesh {
    pub pipeline: usize,
    pub data: usize,
    /// A power of two.
    pub tensor: usize,
    /// Ways the experts are spread; the remaining factor cuts each expert (see [`Mesh::expert_cut`]). With 1 nothing
    /// is spread: every lane keeps all experts, cut by its tensor ranks.
    pub expert: usize,
}

impl Mesh {
    pub const ONE: Mesh = Mesh { pipeline: 1, data: 1, tensor: 1, expert: 1 };

    /// Checks the axes alone; whether a model can be cut so is [`crate::cut::check`]'s business.
    pub fn new(pipeline: usize, data: usize, tensor: usize, expert: usize) -> Result<Mesh, SpecError> {
        let mesh = Mesh { pipeline, data, tensor, expert };
        let bad = |why: String| Err(SpecError::Cut { what: format!("the mesh {mesh}"), why });
        if pipeline == 0 || data == 0 || tensor == 0 || expert == 0 {
            return bad("every axis must be at least 1".into());
        }
        if !tensor.is_power_of_two() {
            return bad(format!("tensor parallel size {tensor} is not a power of two; use data or pipeline ranks"));
        }
        if expert > data * tensor || !(data * tensor).is_multiple_of(expert) {
            return bad(format!("expert parallel size {expert} must divide data x tensor = {}", data * tensor));
        }
        if expert > 1 && !expert.is_multiple_of(data) {
            return bad(format!(
                "expert parallel size {expert} must be a multiple of the data parallel size {data}: \
                 an expert may be cut over the tensor ranks of one lane, not over lanes"
            ));
        }
        Ok(mesh)
    }

    pub fn ranks(&self) -> usize {
        self.pipeline * self.data * self.tensor
    }

    pub fn rank(&self, place: Place) -> RankId {
        assert!(place.stage < self.pipeline && place.lane < self.data && place.slice < self.tensor);
        RankId(((place.stage * self.data + place.lane) * self.tensor + place.slice) as u32)
    }

    pub fn place(&self, rank: RankId) -> Place {
        let r = rank.0 as usize;
        assert!(r < self.ranks(), "rank {r} of {}", self.ranks());
        Place { stage: r / (self.data * self.tensor), lane: r / self.tensor % self.data, slice: r % self.tensor }
    }

    pub fn all(&self) -> impl Iterator<Item = RankId> {
        (0..self.ranks() as u32).map(RankId)
    }

    /// The ranks that share `rank`'s tokens and cut its matrices, in slice order.
    pub fn tensor_group(&self, rank: RankId) -> Vec<RankId> {
        let p = self.place(rank);
        (0..self.tensor).map(|slice| self.rank(Place { slice, ..p })).collect()
    }

    /// The same slice of every lane of the stage, in lane order: the peers with whom tokens are exchanged for experts.
    pub fn lane_group(&self, rank: RankId) -> Vec<RankId> {
        let p = self.place(rank);
        (0..self.data).map(|lane| self.rank(Place { lane, ..p })).collect()
    }

    /// All `data x tensor` ranks of the stage, in rank order.
    pub fn stage_group(&self, stage: usize) -> Vec<RankId> {
        (0..self.data)
            .flat_map(|lane| (0..self.tensor).map(move |slice| Place { stage, lane, slice }))
            .map(|p| self.rank(p))
            .collect()
    }

    /// The same lane and slice in every stage, in stage order: activations travel along it.
    pub fn pipe_group(&self, rank: RankId) -> Vec<RankId> {
        let p = self.place(rank);
        (0..self.pipeline).map(|stage| self.rank(Place { stage, ..p })).collect()
    }

    /// Ranks that share one expert, each holding a cut of its intermediate channels.
    pub fn expert_cut(&self) -> usize {
        if self.expert == 1 { self.tensor } else { self.data * self.tensor / self.expert }
    }

    /// Which of the `expert` contiguous shares of the expert ids `rank` holds, and which cut of each expert.
    /// Shares run over lanes first within a tensor slice group, so that pre-sums of the lanes combine locally before
    /// the tensor ranks' tree: share = (slice / expert_cut) * data + lane.
    pub fn expert_share(&self, rank: RankId) -> (usize, usize) {
        let p = self.place(rank);
        let cut = self.expert_cut();
        let lane = if self.expert == 1 { 0 } else { p.lane };
        ((p.slice / cut) * self.data + lane, p.slice % cut)
    }

    /// The rank that answers for its lane: last stage, first slice.
    pub fn leader(&self, lane: usize) -> RankId {
        self.rank(Place { stage: self.pipeline - 1, lane, slice: 0 })
    }
}

impl std::fmt::Display for Mesh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pp{} x dp{} x tp{}, ep{}", self.pipeline, self.data, self.tensor, self.expert)
    }
}
