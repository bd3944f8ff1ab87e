//! How one tensor is divided over ranks, and the canonical segments that keep one answer.
//!
//! The K of every `Rows`-cut matrix is divided into S equal segments ([`segments`]); each segment is summed on its own
//! and the segment sums are added by a fixed balanced binary tree. A rank of a power-of-two mesh owns a subtree, so
//! every mesh adds the same numbers in the same order.

use crate::error::SpecError;
use crate::mesh::{Mesh, RankId};
use crate::spec::{Branch, Mixer, ModelSpec};

/// Most segments a sum is divided into, and so the widest tensor cut.
pub const SEGMENTS_MAX: usize = 8;

/// S for a dimension of `units` cuttable units: the largest power of two up to [`SEGMENTS_MAX`] that divides it.
pub fn segments(units: usize) -> usize {
    assert!(units > 0, "a dimension of no units has no segments");
    1 << units.trailing_zeros().min(SEGMENTS_MAX.trailing_zeros())
}

/// How a tensor of `[rows, cols]` is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Every rank of the stage holds all of it.
    Replicate,
    /// Output rows in units of `unit` rows (a query head, one intermediate channel); `rows / unit` units.
    Columns { unit: usize },
    /// Input columns in units of `unit` columns; the engine owes a sum over the tensor ranks.
    Rows { unit: usize },
    /// Output rows of `heads` key/value heads; where ranks outnumber heads, neighbours hold the same head.
    KvHeads { heads: usize },
    /// Rows of the vocabulary, in [`SEGMENTS_MAX`] ranges of `ceil(rows / SEGMENTS_MAX)`, whatever the mesh.
    Vocab,
    /// One expert's tensor: held by the ranks of its share, there divided as `within` says.
    Expert { id: usize, of: usize, within: ExpertCut },
}

impl Cut {
    /// Whether each tensor so cut is one expert's.
    pub const fn is_expert(&self) -> bool {
        matches!(self, Cut::Expert { .. })
    }
}

/// How an expert's own tensor is divided over [`Mesh::expert_cut`] ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertCut {
    Whole,
    Columns,
    Rows,
}

/// What the engine owes after multiplying with a tensor so cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    Nothing,
    /// Add the ranks' partial sums by the canonical tree.
    Sum,
    /// Put the ranks' parts beside each other.
    Gather,
    /// Exchange tokens for expert outputs.
    Experts,
}

/// The part of a tensor that a rank holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    pub rows: std::ops::Range<usize>,
    pub cols: std::ops::Range<usize>,
}

/// What `rank` holds of a `[rows, cols]` tensor cut by `cut`; `None` where it holds nothing.
pub fn slice(cut: Cut, rows: usize, cols: usize, mesh: &Mesh, rank: RankId) -> Option<Slice> {
    let place = mesh.place(rank);
    let part = |n: usize, index: usize, of: usize| {
        assert!(n.is_multiple_of(of), "{n} is not divisible by {of}: cut::check comes first");
        index * (n / of)..(index + 1) * (n / of)
    };
    let (all_rows, all_cols) = (0..rows, 0..cols);
    Some(match cut {
        Cut::Replicate => Slice { rows: all_rows, cols: all_cols },
        Cut::Columns { unit } => {
            let units = part(rows / unit, place.slice, mesh.tensor);
            Slice { rows: units.start * unit..units.end * unit, cols: all_cols }
        }
        Cut::Rows { unit } => {
            let units = part(cols / unit, place.slice, mesh.tensor);
            Slice { rows: all_rows, cols: units.start * unit..units.end * unit }
        }
        Cut::KvHeads { heads } => {
            let held = kv_heads(heads, mesh.tensor, place.slice);
            let unit = rows / heads;
            Slice { rows: held.start * unit..held.end * unit, cols: all_cols }
        }
        Cut::Vocab => Slice { rows: vocab_rows(rows, mesh.tensor, place.slice), cols: all_cols },
        Cut::Expert { id, of, within } => {
            let (share, index) = mesh.expert_share(rank);
            let held = part(of, share, mesh.expert);
            if !held.contains(&id) {
                return None;
            }
            match within {
                ExpertCut::Whole => Slice { rows: all_rows, cols: all_cols },
                ExpertCut::Columns => Slice { rows: part(rows, index, mesh.expert_cut()), cols: all_cols },
                ExpertCut::Rows => Slice { rows: all_rows, cols: part(cols, index, mesh.expert_cut()) },
            }
        }
    })
}

/// How many segments the inputs of a matrix of `cols` columns are summed in, and over how many ranks those are divided.
pub fn summed(cut: Cut, cols: usize, mesh: &Mesh) -> (usize, usize) {
    match cut {
        Cut::Rows { unit } => (segments(cols / unit), mesh.tensor),
        Cut::Expert { within: ExpertCut::Rows, .. } => (segments(cols), mesh.expert_cut()),
        Cut::Replicate | Cut::Columns { .. } | Cut::KvHeads { .. } | Cut::Vocab | Cut::Expert { .. } => (1, 1),
    }
}

/// What is owed after a multiplication.
pub fn finish(cut: Cut) -> Finish {
    match cut {
        Cut::Replicate | Cut::Columns { .. } | Cut::KvHeads { .. } => Finish::Nothing,
        Cut::Rows { .. } => Finish::Sum,
        Cut::Vocab => Finish::Gather,
        Cut::Expert { .. } => Finish::Experts,
    }
}

/// The key/value heads of `heads` that tensor rank `slice` of `tensor` attends with.
pub fn kv_heads(heads: usize, tensor: usize, slice: usize) -> std::ops::Range<usize> {
    if tensor <= heads {
        assert!(heads.is_multiple_of(tensor));
        slice * (heads / tensor)..(slice + 1) * (heads / tensor)
    } else {
        assert!(tensor.is_multiple_of(heads));
        let head = slice / (tensor / heads);
        head..head + 1
    }
}

/// The vocabulary rows of tensor rank `slice`: whole segments of `ceil(rows / SEGMENTS_MAX)`, the last ones short.
pub fn vocab_rows(rows: usize, tensor: usize, slice: usize) -> std::ops::Range<usize> {
    let segment = rows.div_ceil(SEGMENTS_MAX);
    let each = SEGMENTS_MAX / tensor;
    let at = |s: usize| (s * segment).min(rows);
    at(slice * each)..at((slice + 1) * each)
}

/// Whether `tensor` ranks (a power of two) cut every layer of `spec` into whole canonical segments.
pub fn tensor_fits(spec: &ModelSpec, tensor: usize) -> bool {
    tensor_obstacle(spec, tensor).is_none()
}

/// The tensor sizes that work for `spec`, ascending; 1 always does.
pub fn tensor_sizes(spec: &ModelSpec) -> Vec<usize> {
    (0..=SEGMENTS_MAX.trailing_zeros()).map(|log| 1 << log).filter(|t| tensor_fits(spec, *t)).collect()
}

/// The ways to spread the experts of every mixture so that each is a whole canonical id-segment whatever the lanes: what
/// a planner takes unasked. [`check`] lets lanes spread them further. 1 without experts.
pub fn expert_segments(spec: &ModelSpec) -> usize {
    spec.mixtures().map(|m| segments(m.experts)).min().unwrap_or(1)
}

/// Refuses a mesh whose cuts would not be whole canonical segments of `spec`. [`slice`] asserts what this lets through.
pub fn check(spec: &ModelSpec, mesh: &Mesh) -> Result<(), SpecError> {
    let bad = |what: &str, why: String| Err(SpecError::Cut { what: what.to_string(), why });
    if mesh.pipeline > spec.layers.len() {
        let why = format!("{} layers are fewer than pp {}", spec.layers.len(), mesh.pipeline);
        return bad("the layers", why);
    }
    if let Some((what, why)) = tensor_obstacle(spec, mesh.tensor) {
        let sizes: Vec<String> = tensor_sizes(spec).iter().map(ToString::to_string).collect();
        let why = format!("{why}; tp {} would work, with dp or pp for the other ranks", sizes.join(", "));
        return bad(what, why);
    }
    if mesh.expert > 1 {
        if spec.mixtures().next().is_none() {
            return bad("the experts", format!("ep {} was asked of a model without experts; use ep 1", mesh.expert));
        }
        // Over lanes single outputs come home, so only the runs of slices must be whole segments.
        let runs = mesh.expert / mesh.data;
        for moe in spec.mixtures() {
            let (experts, most) = (moe.experts, segments(moe.experts));
            if !most.is_multiple_of(runs) {
                let why = format!(
                    "{experts} experts have {most} equal segments, ep {} / dp {} must divide that",
                    mesh.expert, mesh.data
                );
                return bad("the experts", why);
            }
            if !experts.is_multiple_of(mesh.expert) {
                return bad("the experts", format!("{experts} experts are not a multiple of ep {}", mesh.expert));
            }
        }
    }
    let cut = mesh.expert_cut();
    for moe in spec.mixtures() {
        let most = segments(moe.intermediate);
        if cut > most {
            let why = format!(
                "{} intermediate channels have {most} equal segments, fewer than the {cut} ranks that share an expert \
                 in {mesh}; a larger ep shares an expert among fewer",
                moe.intermediate
            );
            return bad("an expert", why);
        }
    }
    Ok(())
}

/// What keeps `tensor` ranks from cutting `spec`, and why.
fn tensor_obstacle(spec: &ModelSpec, tensor: usize) -> Option<(&'static str, String)> {
    let short = |what: &'static str, units: usize, name: &str| {
        let most = segments(units);
        (tensor > most).then(|| (what, format!("{units} {name} have {most} equal segments, fewer than tp {tensor}")))
    };
    if tensor > SEGMENTS_MAX {
        return Some(("the model", format!("tp {tensor} is more than the {SEGMENTS_MAX} segments of a sum")));
    }
    if !spec.predictors.is_empty()
        && let Some(obstacle) = short("a predictor", spec.hidden, "channels")
    {
        return Some(obstacle);
    }
    for layer in spec.all_layers() {
        if let Some(obstacle) = short("attention", layer.mixer.heads(), "query heads") {
            return Some(obstacle);
        }
        if let Mixer::Grouped(g) = &layer.mixer
            && !g.kv_heads.is_multiple_of(tensor)
            && !tensor.is_multiple_of(g.kv_heads)
        {
            let why = format!("neither of {} key/value heads and tp {tensor} divides the other", g.kv_heads);
            return Some(("attention", why));
        }
        for branch in &layer.branches {
            let dense = match branch {
                Branch::Dense(d) => Some(d),
                Branch::Moe(m) => m.shared.as_ref(),
            };
            if let Some(d) = dense
                && let Some(obstacle) = short("the feed-forward", d.intermediate, "intermediate channels")
            {
                return Some(obstacle);
            }
        }
    }
    None
}
