//! What a rank proves of its weights: the digest of every canonical segment that it reads, taken of the stored bytes just
//! before they are packed. What stays on the shelf keeps the digests that it was packed under.

use super::beside::{Beside, Packing};
use super::checkpoint::Checkpoint;
use super::loader::{self, Progress};
use super::shelf::Piece;
use super::{codes, widen};
use crate::backend::MatrixView;
use model::catalog::{self, TensorDecl, TensorId};
use model::cut::Slice;
use model::fault::{Fault, FaultKind};
use model::mesh::RankId;
use model::plan::Plan;
use model::proof::{self, Digest, SegmentId, segments_in};
use model::spec::ModelSpec;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Row parts that do not lie beside each other are gathered in runs of about this many bytes: enough for the hash's
/// widest vectors, little enough for a cache.
const GATHERED: usize = 64 << 10;

/// Digests by segment, shared by the ranks of a worker.
#[derive(Default)]
pub struct Proofs {
    known: Mutex<BTreeMap<Piece, Digest>>,
}

impl Proofs {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Piece, Digest>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the digests of the segments inside a rank's window of `decl`, which is about to be packed.
    pub fn take(&self, decl: &TensorDecl, window: &MatrixView<'_>) {
        let slice = Slice { rows: window.row..window.row + window.rows, cols: window.col..window.col + window.cols };
        for (_, segment) in segments_in(decl, &slice) {
            let digest = digest(&windowed(window, &segment));
            self.lock().insert(Piece::new(decl.id, &segment), digest);
        }
    }

    /// Drops the digests of tensors that are not wanted.
    pub fn keep(&self, wanted: impl Fn(&TensorId) -> bool) {
        self.lock().retain(|piece, _| wanted(piece.tensor()));
    }

    /// The digests that `ranks` owe, one after the other (see [`proof::owed`]). `spec` has the plan's predictors.
    pub fn of(&self, spec: &ModelSpec, plan: &Plan, ranks: &[RankId]) -> Result<Vec<u8>, Fault> {
        let known = self.lock();
        let mut digests = Vec::new();
        for ((id, number), segment) in proof::owed(spec, &plan.mesh, &plan.stages, ranks) {
            let digest = known.get(&Piece::new(id, &segment)).ok_or_else(|| {
                Fault::new(FaultKind::Internal, format!("segment {number} of {id:?} was loaded unproven"))
            })?;
            digests.extend_from_slice(digest);
        }
        Ok(digests)
    }
}

/// The digests of all segments of a checkpoint, predictors' included where `spec` has them: what ranks together prove.
pub fn of_model(
    checkpoint: &Checkpoint,
    spec: &ModelSpec,
    progress: Progress<'_>,
) -> Result<BTreeMap<SegmentId, Digest>, Fault> {
    let declared = catalog::tensors(spec);
    let total = declared.iter().map(|decl| (decl.rows * decl.cols) as u64).sum();
    let (mut done, mut known) = (0, BTreeMap::new());
    progress(done, total);
    for decl in declared {
        let view = loader::whole(checkpoint, spec, &decl)?;
        for (number, segment) in segments_in(&decl, &Slice { rows: 0..decl.rows, cols: 0..decl.cols }) {
            known.insert((decl.id, number), digest(&windowed(&view, &segment)));
        }
        done += (decl.rows * decl.cols) as u64;
        progress(done, total);
    }
    Ok(known)
}

fn windowed<'a>(view: &MatrixView<'a>, segment: &Slice) -> MatrixView<'a> {
    let (rows, cols) = (&segment.rows, &segment.cols);
    MatrixView { row: rows.start, rows: rows.len(), col: cols.start, cols: cols.len(), ..*view }
}

/// The digest of a window's stored bytes: the same for the same window of the same tensor, wherever it is read.
pub fn digest(view: &MatrixView<'_>) -> Digest {
    let mut hash = Hash { hash: blake3::Hasher::new(), gathered: Vec::new() };
    match view.beside {
        None if !view.transposed => hash.rows(view),
        Some(Beside { packing: Packing::Bytes { .. } | Packing::Rows { .. }, order: None, .. }) => hash.coded(view),
        // Rare layouts, by their values.
        _ => hash.values(view),
    }
    hash.end()
}

struct Hash {
    hash: blake3::Hasher,
    gathered: Vec<u8>,
}

impl Hash {
    fn take(&mut self, bytes: &[u8]) {
        self.gathered.extend_from_slice(bytes);
        if self.gathered.len() >= GATHERED {
            self.hash.update(&self.gathered);
            self.gathered.clear();
        }
    }

    fn end(mut self) -> Digest {
        self.hash.update(&self.gathered);
        let mut digest = [0; 16];
        digest.copy_from_slice(&self.hash.finalize().as_bytes()[..16]);
        digest
    }

    /// Whole blocks, where a window begins or ends inside one.
    fn rows(&mut self, view: &MatrixView<'_>) {
        let (block, size) = (view.format.block(), view.format.block_bytes());
        let bytes = view.col / block * size..(view.col + view.cols).div_ceil(block) * size;
        if bytes.len() == view.format.bytes(view.stored_cols) && view.fused.is_none() {
            let first = view.stored_row(0) * bytes.len();
            self.hash.update(&view.bytes[first..][..view.rows * bytes.len()]);
            return;
        }
        for row in 0..view.rows {
            self.take(&widen::row_bytes(view, view.stored_row(row))[bytes.clone()]);
        }
    }

    /// Codes and what their groups share.
    fn coded(&mut self, view: &MatrixView<'_>) {
        let scheme = codes::scheme(view).expect("codes in rows have a scheme");
        let (mut stored, mut groups) =
            (vec![0; view.cols], vec![codes::Group::scaled(0.0); codes::touched(view, scheme.group).1]);
        for row in 0..view.rows {
            codes::codes(view, row, &mut stored);
            self.take(&stored);
            codes::groups(view, row, &mut groups);
            for group in &groups {
                self.take(&group.scale.to_bits().to_le_bytes());
                self.take(&group.minimum.to_bits().to_le_bytes());
                self.take(&[group.point, group.minimum_integer]);
                self.take(&group.integer.to_le_bytes());
            }
        }
    }

    fn values(&mut self, view: &MatrixView<'_>) {
        let mut values = vec![0.0; view.cols];
        for row in 0..view.rows {
            widen::widen(view, row, &mut values);
            self.take(bytemuck::cast_slice(&values));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::quant::Format;

    fn whole(bytes: &[u8]) -> MatrixView<'_> {
        MatrixView::whole(Format::Bf16, bytes, 6, 8)
    }

    #[test]
    fn a_digest_is_of_the_window_alone_and_of_all_of_it() {
        let bytes: Vec<u8> = (0..96).collect();
        let part = |bytes: &[u8]| digest(&MatrixView { row: 2, rows: 3, col: 4, cols: 2, ..whole(bytes) });
        let before = part(&bytes);
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            let (row, col) = (at / 16, at % 16 / 2);
            let inside = (2..5).contains(&row) && (4..6).contains(&col);
            assert_eq!(part(&changed) != before, inside, "byte {at}");
        }
        assert_ne!(digest(&whole(&bytes)), before);
    }

    #[test]
    fn rows_that_are_gathered_hash_like_rows_that_lie_together() {
        let bytes: Vec<u8> = (0..200_000u32).map(|i| (i * 7 % 251) as u8).collect();
        let view = MatrixView::whole(Format::Bf16, &bytes, 100, 1000);
        let mut gathered = Hash { hash: blake3::Hasher::new(), gathered: Vec::new() };
        bytes.chunks(2000).for_each(|row| gathered.take(row));
        assert_eq!(digest(&view), gathered.end());
    }
}
