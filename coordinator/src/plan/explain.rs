//! A plan for people: what each rank holds and what it costs, as a table or as data.

use super::devices::format_bytes;
use super::{DraftModel, Served, copies};
use model::ModelSpec;
use model::cut;
use model::mesh::Place;
use model::plan::{BLOCK_TOKENS, Guesser, Plan};
use model::size::Keeping;
use model::spec::{Branch, Mixer};
use model::storage::Storage;
use serde::Serialize;
use std::fmt::Write;
use std::ops::Range;

/// A plan in full; field names are part of the command line's interface (`conclave plan --json`).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub epoch: u64,
    pub architecture: String,
    pub pipeline_parallel_size: usize,
    pub data_parallel_size: usize,
    pub tensor_parallel_size: usize,
    pub expert_parallel_size: usize,
    pub dtype: String,
    pub kernel_family: String,
    pub max_model_len: usize,
    pub max_num_batched_tokens: usize,
    pub max_num_seqs: usize,
    /// Cache positions of each lane, and of all of them.
    pub lane_cache_tokens: usize,
    pub cache_tokens: usize,
    pub total_bytes: u64,
    /// What the group keeps beyond one copy of each weight, and of each cached position.
    pub copied_weights_bytes: u64,
    pub copied_cache_bytes: u64,
    /// Why it has lanes where slices would do.
    pub reason: Option<String>,
    pub draft: Option<DraftReport>,
    pub ranks: Vec<RankReport>,
}

/// One rank's share.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RankReport {
    pub rank: u32,
    pub worker: String,
    pub host: String,
    pub stage: usize,
    pub lane: usize,
    pub slice: usize,
    pub layers: Range<usize>,
    pub query_heads: Range<usize>,
    pub key_value_heads: Range<usize>,
    /// Ids of the routed experts that it holds, and among how many ranks each is divided.
    pub experts: Option<Range<usize>>,
    pub expert_cut: usize,
    pub vocabulary: Range<usize>,
    pub weights_bytes: u64,
    pub cache_bytes: u64,
    pub workspace_bytes: u64,
    pub total_bytes: u64,
}

/// A draft model's part, within what the ranks of the last stage report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DraftReport {
    pub architecture: String,
    pub layers: usize,
    /// Positions behind which nothing is guessed.
    pub max_len: usize,
    pub ranks: usize,
    /// Of each of those.
    pub weights_bytes: u64,
    pub cache_bytes: u64,
    pub cache_block_bytes: u64,
    pub workspace_bytes: u64,
}

/// What `plan` means for `spec`, whose matrices are stored as `storage` says, with the plan's draft model if it has one.
pub fn report(spec: &ModelSpec, storage: &Storage, draft: Option<&DraftModel>, plan: &Plan) -> Report {
    let spec = &spec.predicting(plan.guesser.predictors()).expect("a plan has no more predictors than its model");
    let mut ranks = Vec::with_capacity(plan.mesh.ranks());
    let keeping = Keeping { storage, dtype: plan.dtype, family: plan.family };
    let draft = draft.filter(|_| plan.guesser == Guesser::Draft);
    let served = Served { spec, keeping, draft };
    for member in &plan.members {
        for rank in &member.ranks {
            let place = plan.mesh.place(*rank);
            let worker = (member.worker.0.clone(), member.host.clone());
            ranks.push(rank_report(served, plan, place, worker));
        }
    }
    ranks.sort_by_key(|r| r.rank);
    let copies = copies::of_plan(served, plan);
    let lane_cache_tokens = plan.limits.blocks * BLOCK_TOKENS;
    Report {
        epoch: plan.epoch.0,
        architecture: spec.architecture.clone(),
        pipeline_parallel_size: plan.mesh.pipeline,
        data_parallel_size: plan.mesh.data,
        tensor_parallel_size: plan.mesh.tensor,
        expert_parallel_size: plan.mesh.expert,
        dtype: plan.dtype.to_string(),
        kernel_family: format!("{:?}", plan.family).to_lowercase(),
        max_model_len: plan.limits.model_len_max,
        max_num_batched_tokens: plan.limits.step_tokens_max,
        max_num_seqs: plan.limits.step_sequences_max,
        lane_cache_tokens,
        cache_tokens: lane_cache_tokens * plan.mesh.data,
        total_bytes: ranks.iter().map(|r| r.total_bytes).sum(),
        copied_weights_bytes: copies.weights,
        copied_cache_bytes: copies.cache,
        draft: draft_report(served, plan),
        reason: copies::reason(served, plan),
        ranks,
    }
}

fn draft_report(served: Served<'_>, plan: &Plan) -> Option<DraftReport> {
    let (DraftModel { spec, .. }, bytes) = (served.draft?, served.of_draft(&plan.limits)?);
    Some(DraftReport {
        architecture: spec.architecture.clone(),
        layers: spec.layers.len(),
        max_len: plan.limits.of_draft(spec).model_len_max,
        ranks: plan.mesh.data * plan.mesh.tensor,
        weights_bytes: bytes.weights,
        cache_bytes: bytes.cache_per_block * plan.limits.blocks as u64,
        cache_block_bytes: bytes.cache_per_block,
        workspace_bytes: bytes.workspace + bytes.rope,
    })
}

fn rank_report(served: Served<'_>, plan: &Plan, place: Place, (worker, host): (String, String)) -> RankReport {
    let (spec, mesh) = (served.spec, &plan.mesh);
    let rank = mesh.rank(place);
    let layers = plan.stages[place.stage].clone();
    let bytes = served.rank(mesh, place, layers.clone(), &plan.limits);
    let mixer = &spec.layers[layers.start].mixer;
    let share = mixer.heads() / mesh.tensor;
    let key_value_heads = match mixer {
        Mixer::Grouped(g) => cut::kv_heads(g.kv_heads, mesh.tensor, place.slice),
        // One latent, which every slice keeps whole.
        Mixer::Latent(_) => 0..1,
    };
    let mixtures = spec.layers[layers.clone()].iter().flat_map(|l| &l.branches).find_map(|b| match b {
        Branch::Moe(m) => Some(m),
        Branch::Dense(_) => None,
    });
    let experts = mixtures.map(|m| {
        let each = m.experts / mesh.expert;
        let (share, _) = mesh.expert_share(rank);
        share * each..(share + 1) * each
    });
    let cache_bytes = bytes.cache_per_block * plan.limits.blocks as u64;
    RankReport {
        rank: rank.0,
        worker,
        host,
        stage: place.stage,
        lane: place.lane,
        slice: place.slice,
        layers,
        query_heads: place.slice * share..(place.slice + 1) * share,
        key_value_heads,
        experts,
        expert_cut: mesh.expert_cut(),
        vocabulary: cut::vocab_rows(spec.vocab, mesh.tensor, place.slice),
        weights_bytes: bytes.weights,
        cache_bytes,
        workspace_bytes: bytes.workspace + bytes.rope,
        total_bytes: bytes.fixed() + cache_bytes,
    }
}

/// A line about the model itself: parameters, and what of it is left out.
pub fn model(spec: &ModelSpec) -> String {
    let parameters = model::parameters::count(spec);
    let active = match parameters.active == parameters.total {
        true => String::new(),
        false => format!(", {} active for a token", count(parameters.active)),
    };
    let part = part(spec).map(|part| format!("; {part}"));
    format!(
        "{}: {} layers, {} parameters{active}{}\n",
        spec.architecture,
        spec.layers.len(),
        count(parameters.total),
        part.unwrap_or_default()
    )
}

/// A number of parameters, as people say them.
fn count(parameters: u64) -> String {
    match parameters as f64 {
        n if n < 1e9 => format!("{:.1} M", n / 1e6),
        n => format!("{:.2} B", n / 1e9),
    }
}

/// What is read of a model that is more than a language model.
pub fn part(spec: &ModelSpec) -> Option<String> {
    spec.part_of
        .as_ref()
        .map(|whole| format!("the language part of {whole} is loaded: pictures and sound are not read"))
}

/// The report as an aligned table under two lines of summary, one more where lanes were preferred to slices, and one of the draft model.
pub fn table(spec: &ModelSpec, storage: &Storage, draft: Option<&DraftModel>, plan: &Plan) -> String {
    let report = report(spec, storage, draft, plan);
    let mut out = String::new();
    let lanes = if plan.mesh.data == 1 { String::new() } else { format!(" in {} lanes", plan.mesh.data) };
    // Writing to a string does not fail.
    let _ = writeln!(
        out,
        "{}: {} on {} ranks, {} weights computed in {}, epoch {}",
        report.architecture,
        plan.mesh,
        plan.mesh.ranks(),
        format_bytes(report.ranks.iter().map(|r| r.weights_bytes).sum()),
        report.dtype,
        report.epoch
    );
    let _ = writeln!(
        out,
        "cache for {} tokens{lanes}; sequences up to {} tokens, steps of up to {} tokens and {} sequences a lane",
        report.cache_tokens, report.max_model_len, report.max_num_batched_tokens, report.max_num_seqs
    );
    if let Some(reason) = &report.reason {
        let _ = writeln!(out, "{reason}");
    }
    if let Some(draft) = &report.draft {
        let [weights, cache, block, workspace] =
            [draft.weights_bytes, draft.cache_bytes, draft.cache_block_bytes, draft.workspace_bytes].map(format_bytes);
        let whole = if draft.ranks == 1 { "one rank".into() } else { format!("each of {} ranks", draft.ranks) };
        let _ = writeln!(
            out,
            "draft model {} of {} layers, whole on {whole}, guesses up to position {}: {weights} of weights, {cache} of cache ({block} \
             a block), {workspace} of workspace there",
            draft.architecture, draft.layers, draft.max_len
        );
    }
    let mut rows = vec![HEADINGS.map(String::from).to_vec()];
    rows.extend(report.ranks.iter().map(|r| row(r, plan.mesh.expert_cut())));
    out + &align(&rows)
}

const HEADINGS: [&str; 12] = [
    "rank",
    "worker",
    "stage",
    "lane",
    "layers",
    "heads",
    "experts",
    "vocab",
    "weights",
    "cache",
    "workspace",
    "total",
];

fn row(r: &RankReport, expert_cut: usize) -> Vec<String> {
    let experts = match &r.experts {
        Some(ids) if expert_cut > 1 => format!("{} /{expert_cut}", span(ids)),
        Some(ids) => span(ids),
        None => "-".into(),
    };
    vec![
        r.rank.to_string(),
        r.worker.clone(),
        r.stage.to_string(),
        r.lane.to_string(),
        span(&r.layers),
        format!("{} kv {}", span(&r.query_heads), span(&r.key_value_heads)),
        experts,
        span(&r.vocabulary),
        format_bytes(r.weights_bytes),
        format_bytes(r.cache_bytes),
        format_bytes(r.workspace_bytes),
        format_bytes(r.total_bytes),
    ]
}

/// First and last of a range, as people count.
fn span(range: &Range<usize>) -> String {
    match range.len() {
        0 => "-".into(),
        1 => range.start.to_string(),
        _ => format!("{}-{}", range.start, range.end - 1),
    }
}

/// Columns as wide as their widest cell; texts to the left, sizes (the last four) to the right.
fn align(rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> =
        (0..rows[0].len()).map(|c| rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0)).collect();
    let mut out = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            if column + 4 >= row.len() { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        let line = cells.collect::<Vec<_>>().join("  ");
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}
