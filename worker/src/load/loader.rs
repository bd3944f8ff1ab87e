//! What one rank reads of a checkpoint: the windows of the declared tensors that its place in the mesh holds.

use super::ahead::Ahead;
use super::checkpoint::Checkpoint;
use super::fetch::{Fetch, Held, Wanted};
use super::find::{find, stored_cols};
use super::needs::needs;
use super::shelf::{Kept, Piece};
use super::{bad, values};
use crate::backend::MatrixView;
use model::catalog::{self, TensorDecl, TensorId};
use model::cut::{self, Slice};
use model::fault::{Fault, FaultKind};
use model::mesh::{Mesh, Place, RankId};
use model::plan::Plan;
use model::spec::ModelSpec;
use sha2::{Digest, Sha256};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Called with bytes done and bytes in all.
pub type Progress<'a> = &'a dyn Fn(u64, u64);

/// Reads a rank's slices, by what they do in the model.
pub struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    spec: ModelSpec,
    declared: BTreeMap<TensorId, TensorDecl>,
    mesh: Mesh,
    rank: RankId,
    done: Cell<u64>,
    total: u64,
    progress: Progress<'a>,
    ahead: Ahead,
    /// Where the files are another worker's.
    fetch: Option<Fetch>,
    /// What need not be read, and the digests of what is.
    kept: Kept,
}

/// A window whose bytes are there as long as it lives.
pub struct Window<'a> {
    view: MatrixView<'a>,
    _held: Option<Held>,
}

impl Window<'_> {
    pub fn view(&self) -> MatrixView<'_> {
        self.view
    }
}

impl<'a> Loader<'a> {
    /// Checks the whole checkpoint against the catalogue (see [`check`]) and prepares to read `rank`'s part without what is
    /// `kept`.
    pub fn new(
        checkpoint: &'a Checkpoint,
        spec: &ModelSpec,
        plan: &Plan,
        rank: RankId,
        progress: Progress<'a>,
        kept: Kept,
    ) -> Result<Loader<'a>, Fault> {
        cut::check(spec, &plan.mesh).map_err(|e| Fault::new(FaultKind::Incompatible, e.to_string()))?;
        let declared = catalog::tensors(spec);
        check(checkpoint, spec, &declared)?;
        let Place { stage, slice, .. } = plan.mesh.place(rank);
        check_copies(checkpoint, spec, &plan.mesh, slice)?;
        if plan.stages.len() != plan.mesh.pipeline {
            let (stages, mesh) = (plan.stages.len(), plan.mesh);
            return Err(Fault::new(FaultKind::Internal, format!("the plan has {stages} ranges of layers for {mesh}")));
        }
        let (mut total, mut windows, mut wanted) = (0, Vec::new(), Vec::new());
        for decl in declared.iter().filter(|d| catalog::on_stage(spec, &d.id, &plan.stages, stage)) {
            let Some(view) = window(checkpoint, spec, decl, &plan.mesh, rank)? else { continue };
            let lacks = !kept.pieces.contains(&piece_of(decl.id, &view));
            if lacks {
                total += view_bytes(&view);
            }
            let needs = needs(&view);
            if checkpoint.is_lent() {
                let strips = needs.iter().filter_map(|need| checkpoint.remote(need)).collect();
                wanted.push(Wanted { id: decl.id, ahead: lacks, strips });
            } else if lacks {
                windows.extend(needs.iter().filter_map(|need| Some((decl.id, checkpoint.span(need.extent())?))));
            }
        }
        progress(0, total);
        let declared = declared.into_iter().map(|d| (d.id, d)).collect();
        Ok(Loader {
            checkpoint,
            spec: spec.clone(),
            declared,
            mesh: plan.mesh,
            rank,
            done: Cell::new(0),
            total,
            progress,
            ahead: Ahead::new(windows),
            fetch: if checkpoint.is_lent() { Some(Fetch::new(wanted)?) } else { None },
            kept,
        })
    }

    /// Whether this model has such a tensor.
    pub fn declares(&self, id: TensorId) -> bool {
        self.declared.contains_key(&id)
    }

    /// The declaration of a tensor that the spec implies.
    pub fn declaration(&self, id: TensorId) -> Result<&TensorDecl, Fault> {
        self.declared.get(&id).ok_or_else(|| Fault::new(FaultKind::Internal, format!("{id:?} is not declared")))
    }

    /// This rank's window of a tensor, which it must hold.
    pub fn window(&self, id: TensorId) -> Result<Window<'a>, Fault> {
        let decl = self.declaration(id)?;
        self.ahead.reach(id);
        let view = window(self.checkpoint, &self.spec, decl, &self.mesh, self.rank)?.ok_or_else(|| {
            Fault::new(FaultKind::Internal, format!("rank {} holds nothing of {}", self.rank.0, decl.source.name))
        })?;
        let held = self.fetch.as_ref().map(|fetch| fetch.take(id)).transpose()?;
        self.kept.proofs.take(decl, &view);
        if !self.kept.pieces.contains(&piece_of(id, &view)) {
            self.done.set(self.done.get() + view_bytes(&view));
            (self.progress)(self.done.get(), self.total);
        }
        Ok(Window { view, _held: held })
    }

    /// What names this rank's window of a tensor.
    pub fn piece(&self, id: TensorId) -> Result<Piece, Fault> {
        let decl = self.declaration(id)?;
        let slice = cut::slice(decl.cut, decl.rows, decl.cols, &self.mesh, self.rank);
        let none = || format!("rank {} holds nothing of {}", self.rank.0, decl.source.name);
        slice.map(|slice| Piece::new(id, &slice)).ok_or_else(|| Fault::new(FaultKind::Internal, none()))
    }

    /// This rank's part of a tensor as f32 values, row-major: norms, biases, and what must be rearranged.
    pub fn values(&self, id: TensorId) -> Result<Vec<f32>, Fault> {
        let window = self.window(id)?;
        Ok(values(&window.view()))
    }

    /// How many segments this rank's part of a matrix sums apart: its share of the canonical ones.
    pub fn segments(&self, id: TensorId) -> Result<usize, Fault> {
        let decl = self.declaration(id)?;
        let (all, ranks) = cut::summed(decl.cut, decl.cols, &self.mesh);
        if all < ranks {
            let name = &decl.source.name;
            return Err(Fault::new(
                FaultKind::Incompatible,
                format!("{name}: its inputs make {all} segments, fewer than {ranks} ranks"),
            ));
        }
        Ok(all / ranks)
    }

    /// The vocabulary rows of this rank's part of embedding and head.
    pub fn vocab_rows(&self, vocab: usize) -> Result<Range<usize>, Fault> {
        let rows = cut::vocab_rows(vocab, self.mesh.tensor, self.mesh.place(self.rank).slice);
        if rows.is_empty() {
            let why = format!("a vocabulary of {vocab} leaves none for rank {} of {}", self.rank.0, self.mesh);
            return Err(Fault::new(FaultKind::Incompatible, why));
        }
        Ok(rows)
    }
}

/// Every declared tensor is there with the declared shape, and every tensor there is claimed or known to be harmless.
fn check(checkpoint: &Checkpoint, spec: &ModelSpec, declared: &[TensorDecl]) -> Result<(), Fault> {
    let mut claimed = BTreeSet::new();
    for decl in declared {
        claimed.extend(find(checkpoint, spec, decl)?.claimed);
    }
    let unclaimed: Vec<&str> =
        checkpoint.names().filter(|name| !claimed.contains(*name) && catalog::ignored(spec, name).is_none()).collect();
    let Some(first) = unclaimed.first() else { return Ok(()) };
    let (number, some) = (unclaimed.len(), unclaimed[..unclaimed.len().min(5)].join(", "));
    let file = checkpoint.file_of(first);
    Err(bad(format!("nothing in the model uses {number} tensors of the checkpoint: {some} (the first in {file})")))
}

/// Predictors share the model's embedding and head; where the checkpoint repeats those for them, it must not mean others.
/// Each rank looks at its own rows of the vocabulary.
fn check_copies(checkpoint: &Checkpoint, spec: &ModelSpec, mesh: &Mesh, slice: usize) -> Result<(), Fault> {
    for (name, role) in catalog::predictor_copies(spec).into_iter().filter(|(name, _)| checkpoint.has(name)) {
        let of = catalog::tensor_name(spec, &TensorId { layer: None, role, expert: None });
        let (copy, own) = (checkpoint.tensor(&name)?, checkpoint.tensor(&of)?);
        let same = (copy.format, copy.shape) == (own.format, own.shape) && {
            let (rows, all) = (own.shape.first().copied().unwrap_or(1), own.bytes.len());
            let mine = cut::vocab_rows(rows, mesh.tensor, slice);
            let bytes = mine.start * (all / rows)..mine.end * (all / rows);
            checkpoint.equal(&copy.bytes[bytes.clone()], &own.bytes[bytes])?
        };
        if !same {
            let why = format!("it is not the same as {of}, which predictors share with the model");
            return Err(checkpoint.blame(&name, &why));
        }
    }
    Ok(())
}

fn piece_of(id: TensorId, view: &MatrixView<'_>) -> Piece {
    Piece::new(id, &Slice { rows: view.row..view.row + view.rows, cols: view.col..view.col + view.cols })
}

/// All of a declared tensor.
pub fn whole<'a>(checkpoint: &'a Checkpoint, spec: &ModelSpec, decl: &TensorDecl) -> Result<MatrixView<'a>, Fault> {
    let found = find(checkpoint, spec, decl)?;
    Ok(MatrixView {
        stored_cols: stored_cols(decl),
        fused: decl.source.part.fused,
        transposed: decl.source.part.transposed,
        beside: found.beside,
        ..MatrixView::whole(found.format, found.bytes, decl.rows, decl.cols)
    })
}

/// The window of a declared tensor that `rank` holds.
fn window<'a>(
    checkpoint: &'a Checkpoint,
    spec: &ModelSpec,
    decl: &TensorDecl,
    mesh: &Mesh,
    rank: RankId,
) -> Result<Option<MatrixView<'a>>, Fault> {
    let Some(slice) = cut::slice(decl.cut, decl.rows, decl.cols, mesh, rank) else { return Ok(None) };
    let (row, rows, col, cols) = (slice.rows.start, slice.rows.len(), slice.cols.start, slice.cols.len());
    Ok(Some(MatrixView { row, rows, col, cols, ..whole(checkpoint, spec, decl)? }))
}

/// Bytes of the values of a window, whole blocks or not; of codes without what lies beside them.
fn view_bytes(view: &MatrixView<'_>) -> u64 {
    let values = view.rows * view.cols;
    match view.beside {
        Some(beside) => (values * beside.scheme.code.bits() as usize).div_ceil(8) as u64,
        None => (values * view.format.block_bytes()).div_ceil(view.format.block()) as u64,
    }
}

/// Stands for all that decides what ranks load: equal on all of them, or they must not serve together.
pub fn digest(spec: &ModelSpec, plan: &Plan) -> [u8; 32] {
    let inputs = format!("{spec:?}\n{:?}\n{:?}\n{:?}\n{:?}", plan.mesh, plan.stages, plan.dtype, plan.family);
    Sha256::digest(inputs.as_bytes()).into()
}
