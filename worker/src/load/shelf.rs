//! Packed matrices that outlive the epoch that they were loaded for: what the next epoch's ranks of this worker hold too
//! is neither read nor packed again, and ranks of one process that hold the same share one copy.

use super::proof::Proofs;
use model::catalog::{self, TensorId};
use model::cut::Slice;
use model::mesh::RankId;
use model::plan::{KernelFamily, Plan};
use model::quant::Dtype;
use model::spec::ModelSpec;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A window of a tensor.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Piece {
    id: TensorId,
    rows: (usize, usize),
    cols: (usize, usize),
}

impl Piece {
    pub fn new(id: TensorId, slice: &Slice) -> Piece {
        let (rows, cols) = (&slice.rows, &slice.cols);
        Piece { id, rows: (rows.start, rows.end), cols: (cols.start, cols.end) }
    }

    pub fn tensor(&self) -> &TensorId {
        &self.id
    }

    pub fn values(&self) -> usize {
        (self.rows.1 - self.rows.0) * (self.cols.1 - self.cols.0)
    }
}

/// What a matrix was packed from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Label {
    /// Stacked in this order.
    pub pieces: Vec<Piece>,
    pub segments: usize,
    /// Which one, where several are made of the same pieces.
    pub number: usize,
}

/// What all matrices of a shelf have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Proves which model's they are.
    pub identity: Vec<u8>,
    pub dtype: Dtype,
    pub family: KernelFamily,
}

/// The pieces that `ranks` hold under `plan`. `spec` has the plan's predictors.
pub fn needed(spec: &ModelSpec, plan: &Plan, ranks: &[RankId]) -> BTreeSet<Piece> {
    let of = |rank: &RankId| catalog::held(spec, &plan.mesh, &plan.stages, *rank);
    ranks.iter().flat_map(of).map(|(decl, slice)| Piece::new(decl.id, &slice)).collect()
}

/// Matrices of type `M`, whose clones share what they hold.
pub struct Shelf<M> {
    shelved: Mutex<Shelved<M>>,
    /// Of what is shelved, and of all else that was read for the same plan.
    proofs: Arc<Proofs>,
}

/// What a loader finds: pieces that need not be read again, and where it leaves the digests of those that it reads.
pub struct Kept {
    pub pieces: BTreeSet<Piece>,
    pub proofs: Arc<Proofs>,
}

struct Shelved<M> {
    setting: Option<Setting>,
    /// Counts the calls of [`Shelf::keep`].
    generation: u64,
    /// Locked while it is packed: whoever wants the same waits and shares it.
    matrices: BTreeMap<Label, Arc<Mutex<Option<M>>>>,
}

impl<M> Default for Shelf<M> {
    fn default() -> Shelf<M> {
        let shelved = Shelved { setting: None, generation: 0, matrices: BTreeMap::new() };
        Shelf { shelved: Mutex::new(shelved), proofs: Arc::default() }
    }
}

/// Nothing is left half-done under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<M: Clone> Shelf<M> {
    /// Drops all that is not made of `needed` pieces under `setting`: to be called before an epoch is loaded, so that
    /// memory never holds what two plans need.
    pub fn keep(&self, setting: &Setting, needed: &BTreeSet<Piece>) {
        let mut shelved = lock(&self.shelved);
        if shelved.setting.as_ref() != Some(setting) {
            shelved.matrices.clear();
            self.proofs.keep(|_| false);
            shelved.setting = Some(setting.clone());
        }
        shelved.generation += 1;
        shelved.matrices.retain(|label, _| label.pieces.iter().all(|piece| needed.contains(piece)));
        let tensors: BTreeSet<&TensorId> = needed.iter().map(Piece::tensor).collect();
        self.proofs.keep(|tensor| tensors.contains(tensor));
    }

    pub fn kept(&self) -> Kept {
        Kept { pieces: self.pieces(), proofs: self.proofs.clone() }
    }

    pub fn proofs(&self) -> &Proofs {
        &self.proofs
    }

    /// Whether matrices under `setting` may be added; they may not after another call of [`Shelf::keep`], which changes
    /// the number that is returned. An empty shelf takes any setting.
    pub fn generation(&self, setting: &Setting) -> Option<u64> {
        let mut shelved = lock(&self.shelved);
        let generation = shelved.generation;
        (shelved.setting.get_or_insert_with(|| setting.clone()) == setting).then_some(generation)
    }

    /// The matrix of this label; made, and kept, where there is none.
    pub fn get<E>(&self, label: Label, make: impl FnOnce() -> Result<M, E>) -> Result<M, E> {
        let place = lock(&self.shelved).matrices.entry(label).or_default().clone();
        let mut place = lock(&place);
        if let Some(matrix) = &*place {
            return Ok(matrix.clone());
        }
        let matrix = make()?;
        *place = Some(matrix.clone());
        Ok(matrix)
    }

    /// The pieces that need not be read again.
    pub fn pieces(&self) -> BTreeSet<Piece> {
        let shelved = lock(&self.shelved);
        // One that is being packed counts: whoever packs it reads it.
        shelved.matrices.keys().flat_map(|label| &label.pieces).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::catalog::Role;

    fn setting(identity: u8) -> Setting {
        Setting { identity: vec![identity], dtype: Dtype::F32, family: KernelFamily::Vector }
    }

    fn piece(layer: usize, rows: usize) -> Piece {
        Piece { id: TensorId { layer: Some(layer), role: Role::Query, expert: None }, rows: (0, rows), cols: (0, 8) }
    }

    fn label(pieces: Vec<Piece>) -> Label {
        Label { pieces, segments: 1, number: 0 }
    }

    fn fresh(shelf: &Shelf<u32>, label: Label) -> bool {
        let mut made = false;
        let make = || {
            made = true;
            Ok::<u32, ()>(7)
        };
        assert_eq!(shelf.get(label, make), Ok(7));
        made
    }

    #[test]
    fn only_what_the_next_plan_needs_is_kept() {
        let shelf = Shelf::default();
        shelf.keep(&setting(1), &BTreeSet::new());
        assert!(fresh(&shelf, label(vec![piece(0, 4), piece(0, 8)])) && fresh(&shelf, label(vec![piece(1, 4)])));
        assert!(!fresh(&shelf, label(vec![piece(1, 4)])));
        shelf.keep(&setting(1), &[piece(0, 4), piece(1, 4)].into());
        assert_eq!(shelf.pieces(), [piece(1, 4)].into());
        assert!(!fresh(&shelf, label(vec![piece(1, 4)])), "a layer that stays");
        assert!(fresh(&shelf, label(vec![piece(0, 4), piece(0, 8)])), "one of its pieces was not needed");
        assert!(fresh(&shelf, Label { segments: 2, ..label(vec![piece(1, 4)]) }), "summed otherwise");
    }

    #[test]
    fn another_model_keeps_nothing() {
        let shelf = Shelf::default();
        shelf.keep(&setting(1), &BTreeSet::new());
        assert!(fresh(&shelf, label(vec![piece(0, 4)])));
        let generation = shelf.generation(&setting(1));
        shelf.keep(&setting(2), &[piece(0, 4)].into());
        assert_eq!(shelf.pieces(), BTreeSet::new());
        assert_eq!(shelf.generation(&setting(1)), None);
        assert!(generation.is_some() && shelf.generation(&setting(2)) != generation);
    }

    #[test]
    fn a_matrix_that_could_not_be_made_is_tried_again() {
        let shelf: Shelf<u32> = Shelf::default();
        assert_eq!(shelf.get(label(vec![piece(0, 4)]), || Err("short")), Err("short"));
        assert!(fresh(&shelf, label(vec![piece(0, 4)])));
    }

    #[test]
    fn two_that_want_the_same_pack_it_once() {
        let (shelf, made) = (Shelf::default(), std::sync::atomic::AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let make = || Ok::<u32, ()>(made.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
                    assert_eq!(shelf.get(label(vec![piece(0, 4)]), make), Ok(0));
                });
            }
        });
    }
}
