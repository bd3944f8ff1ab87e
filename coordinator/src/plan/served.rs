//! What a plan is of: a model, how it is kept, and the draft model beside it where there is one.

use super::DraftModel;
use model::ModelSpec;
use model::mesh::{Mesh, Place};
use model::plan::Limits;
use model::size::{self, Keeping, RankBytes};
use std::ops::Range;

#[derive(Debug, Clone, Copy)]
pub struct Served<'a> {
    /// With the plan's predictors.
    pub spec: &'a ModelSpec,
    pub keeping: Keeping<'a>,
    pub draft: Option<&'a DraftModel>,
}

impl Served<'_> {
    /// What the rank at `place` needs, where its stage holds `layers`: the draft model too on the last stage.
    pub fn rank(&self, mesh: &Mesh, place: Place, layers: Range<usize>, limits: &Limits) -> RankBytes {
        let own = size::rank(self.spec, mesh, place, layers, self.keeping, limits);
        let last = place.stage + 1 == mesh.pipeline;
        own + self.of_draft(limits).filter(|_| last).unwrap_or_default()
    }

    /// What a rank that has the draft model needs for it.
    pub fn of_draft(&self, limits: &Limits) -> Option<RankBytes> {
        self.draft.map(|draft| size::draft(&draft.spec, Keeping { storage: &draft.storage, ..self.keeping }, limits))
    }
}
