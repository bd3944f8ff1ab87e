//! What ranks prove of the weights that they loaded: a digest of every canonical segment. Segments are those of [`cut`],
//! the same on every mesh, so that ranks of any two meshes can be compared, and all of them with one list.

mod list;

pub use list::{ListError, parse, write};

use crate::catalog::{self, TensorDecl, TensorId};
use crate::cut::{Cut, ExpertCut, SEGMENTS_MAX, Slice, segments};
use crate::mesh::{Mesh, RankId};
use crate::spec::ModelSpec;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::ops::Range;

/// Of one segment's stored bytes.
pub type Digest = [u8; 16];

/// A segment of a tensor, counted along the dimension that is cut.
pub type SegmentId = (TensorId, usize);

/// The canonical segments of a `[rows, cols]` tensor, in order: what any rank of any mesh holds is a run of them.
pub fn canonical(cut: Cut, rows: usize, cols: usize) -> Vec<Slice> {
    let by_rows = |count: usize| -> Vec<Slice> {
        let each = rows / count;
        (0..count).map(|s| Slice { rows: s * each..(s + 1) * each, cols: 0..cols }).collect()
    };
    let by_cols = |count: usize| -> Vec<Slice> {
        let each = cols / count;
        (0..count).map(|s| Slice { rows: 0..rows, cols: s * each..(s + 1) * each }).collect()
    };
    match cut {
        Cut::Replicate => by_rows(1),
        Cut::Columns { unit } => by_rows(segments(rows / unit)),
        Cut::Rows { unit } => by_cols(segments(cols / unit)),
        Cut::KvHeads { heads } => by_rows(heads),
        Cut::Vocab => {
            let each = rows.div_ceil(SEGMENTS_MAX);
            let at = |s: usize| (s * each).min(rows);
            (0..SEGMENTS_MAX).map(|s| Slice { rows: at(s)..at(s + 1), cols: 0..cols }).collect()
        }
        Cut::Expert { within: ExpertCut::Whole, .. } => by_rows(1),
        Cut::Expert { within: ExpertCut::Columns, .. } => by_rows(segments(rows)),
        Cut::Expert { within: ExpertCut::Rows, .. } => by_cols(segments(cols)),
    }
}

/// The segments of a declared tensor inside a rank's slice of it, by their numbers. Empty ones are left out.
pub fn segments_in(decl: &TensorDecl, slice: &Slice) -> Vec<(usize, Slice)> {
    let inside = |of: &Range<usize>, all: &Range<usize>| of.start >= all.start && of.end <= all.end && !of.is_empty();
    let all = canonical(decl.cut, decl.rows, decl.cols).into_iter().enumerate();
    all.filter(|(_, s)| inside(&s.rows, &slice.rows) && inside(&s.cols, &slice.cols)).collect()
}

/// What `ranks` prove, in the order in which their digests are told: each segment and where it lies. `spec` has the
/// plan's predictors.
pub fn owed(
    spec: &ModelSpec,
    mesh: &Mesh,
    stages: &[Range<usize>],
    ranks: &[RankId],
) -> impl Iterator<Item = (SegmentId, Slice)> {
    let of = |rank: &RankId| catalog::held(spec, mesh, stages, *rank);
    let named = |(decl, slice): (TensorDecl, Slice)| {
        segments_in(&decl, &slice).into_iter().map(move |(number, segment)| ((decl.id, number), segment))
    };
    ranks.iter().flat_map(of).flat_map(named)
}

/// One digest for all weights of a model without its predictors, from those of all its segments; `None` where some are
/// not known.
pub fn root(spec: &ModelSpec, known: &BTreeMap<SegmentId, Digest>) -> Option<Vec<u8>> {
    let plain = spec.predicting(0).ok()?;
    let mut hash = Sha256::new();
    for decl in catalog::tensors(&plain) {
        let whole = Slice { rows: 0..decl.rows, cols: 0..decl.cols };
        for (number, _) in segments_in(&decl, &whole) {
            hash.update(known.get(&(decl.id, number))?);
        }
    }
    Some(hash.finalize().to_vec())
}

/// A tensor as people are told of it.
pub fn label(tensor: &TensorId) -> String {
    let TensorId { layer, role, expert } = tensor;
    let layer = layer.map(|layer| format!(" of layer {layer}")).unwrap_or_default();
    let expert = expert.map(|expert| format!(", expert {expert}")).unwrap_or_default();
    format!("{role:?}{layer}{expert}")
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cut::{check, slice};
    use crate::samples;

    #[test]
    fn every_rank_of_every_mesh_holds_whole_segments() {
        for (name, _) in samples::ALL {
            let spec = samples::spec(name);
            for (tensor, data) in [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2)] {
                for expert in [1, data * tensor] {
                    let mesh = Mesh { pipeline: 1, data, tensor, expert };
                    if check(&spec, &mesh).is_err() {
                        continue;
                    }
                    for decl in catalog::tensors(&spec) {
                        for rank in (0..mesh.ranks() as u32).map(RankId) {
                            let Some(held) = slice(decl.cut, decl.rows, decl.cols, &mesh, rank) else { continue };
                            let parts = segments_in(&decl, &held);
                            let covered: usize = parts.iter().map(|(_, s)| s.rows.len() * s.cols.len()).sum();
                            assert_eq!(covered, held.rows.len() * held.cols.len(), "{name}: {:?} on {mesh}", decl.id);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_root_needs_every_segment_and_changes_with_each() {
        let spec = samples::spec("qwen3_moe");
        let stages = vec![0..1, 1..spec.layers.len()];
        let mesh = Mesh { pipeline: 2, ..Mesh::ONE };
        let ids: Vec<SegmentId> = owed(&spec, &mesh, &stages, &[RankId(0), RankId(1)]).map(|(id, _)| id).collect();
        let mut known: BTreeMap<SegmentId, Digest> = ids.iter().map(|id| (*id, [1; 16])).collect();
        assert_eq!(known.len(), ids.len(), "each is owed once");
        let before = root(&spec, &known).unwrap();
        *known.values_mut().next_back().unwrap() = [2; 16];
        assert_ne!(root(&spec, &known).unwrap(), before);
        known.pop_first();
        assert_eq!(root(&spec, &known), None);
    }
}
