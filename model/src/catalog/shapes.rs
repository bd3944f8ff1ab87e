//! Shapes and cuts of one layer's tensors, and of those outside layers. Nothing here depends on a layer's number, so
//! planner arithmetic does not walk thousands of experts.

use super::Role;
use crate::cut::{Cut, ExpertCut};
use crate::spec::{Branch, Dense, Grouped, Latent, Layer, Mixer, ModelSpec, Moe, Norm, NormForm, QkNorm};

/// One tensor without its name. That of a routed expert stands for all `of` experts ([`Cut::Expert`] with id 0).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub role: Role,
    pub rows: usize,
    pub cols: usize,
    pub cut: Cut,
}

/// The first of the roles that are stacked to one matrix with `role`; a rank multiplies with them at once.
pub const fn stack(role: Role) -> Role {
    match role {
        Role::Key | Role::Value => Role::Query,
        Role::Up => Role::Gate,
        Role::SharedUp => Role::SharedGate,
        Role::ExpertUp => Role::ExpertGate,
        other => other,
    }
}

const BY_ROW: Cut = Cut::Columns { unit: 1 };
const BY_COLUMN: Cut = Cut::Rows { unit: 1 };

/// Embedding first, then its norm, final norm and (unless tied) head.
pub fn outer_shapes(spec: &ModelSpec) -> Vec<Shape> {
    let table = |role, rows| Shape { role, rows, cols: spec.hidden, cut: Cut::Vocab };
    let mut out = vec![table(Role::Embedding, spec.embedding_rows)];
    if let Some(of) = &spec.embedding_norm {
        norm(of, [Role::EmbeddingNorm, Role::EmbeddingNormBias], spec.hidden, &mut out);
    }
    norm(&spec.final_norm, [Role::FinalNorm, Role::FinalNormBias], spec.hidden, &mut out);
    if !spec.head.tied {
        out.push(table(Role::Head, spec.vocab));
    }
    out
}

fn norm(of: &Norm, [weight, bias]: [Role; 2], cols: usize, out: &mut Vec<Shape>) {
    out.push(vector(weight, cols));
    if of.form == NormForm::Layer {
        out.push(vector(bias, cols));
    }
}

pub fn layer_shapes(spec: &ModelSpec, layer: &Layer) -> Vec<Shape> {
    let mut out = Vec::new();
    norm(&layer.mixer_norm, [Role::MixerNorm, Role::MixerNormBias], spec.hidden, &mut out);
    match &layer.mixer {
        Mixer::Grouped(g) => grouped(g, spec.hidden, &mut out),
        Mixer::Latent(l) => latent(l, spec.hidden, &mut out),
    }
    norm(&layer.branch_norm, [Role::BranchNorm, Role::BranchNormBias], spec.hidden, &mut out);
    for branch in &layer.branches {
        match branch {
            Branch::Dense(d) => dense(d, spec.hidden, &mut out),
            Branch::Moe(m) => moe(m, spec.hidden, &mut out),
        }
    }
    out
}

/// What a predictor has beside its layer.
pub fn predictor_shapes(spec: &ModelSpec) -> Vec<Shape> {
    let norms = [Role::PredictorEmbeddingNorm, Role::PredictorHiddenNorm, Role::PredictorNorm];
    let mut out: Vec<Shape> = norms.into_iter().map(|role| vector(role, spec.hidden)).collect();
    // Its inputs are whole on every rank, so that its outputs are cut and put together again.
    out.push(Shape { role: Role::PredictorProjection, rows: spec.hidden, cols: 2 * spec.hidden, cut: BY_ROW });
    out
}

fn vector(role: Role, cols: usize) -> Shape {
    Shape { role, rows: 1, cols, cut: Cut::Replicate }
}

fn grouped(g: &Grouped, hidden: usize, out: &mut Vec<Shape>) {
    let (q, kv) = (g.heads * g.head_dim, g.kv_heads * g.head_dim);
    let by_head = Cut::Columns { unit: g.head_dim };
    let by_kv_head = Cut::KvHeads { heads: g.kv_heads };
    out.push(Shape { role: Role::Query, rows: q, cols: hidden, cut: by_head });
    out.push(Shape { role: Role::Key, rows: kv, cols: hidden, cut: by_kv_head });
    out.push(Shape { role: Role::Value, rows: kv, cols: hidden, cut: by_kv_head });
    if g.qkv_bias {
        out.push(Shape { role: Role::QueryBias, rows: q, cols: 1, cut: by_head });
        out.push(Shape { role: Role::KeyBias, rows: kv, cols: 1, cut: by_kv_head });
        out.push(Shape { role: Role::ValueBias, rows: kv, cols: 1, cut: by_kv_head });
    }
    match g.qk_norm {
        Some(QkNorm::Heads(_)) => {
            out.push(vector(Role::QueryNorm, g.head_dim));
            out.push(vector(Role::KeyNorm, g.head_dim));
        }
        Some(QkNorm::Whole(_)) => {
            out.push(Shape { role: Role::QueryNorm, rows: q, cols: 1, cut: by_head });
            out.push(Shape { role: Role::KeyNorm, rows: kv, cols: 1, cut: by_kv_head });
        }
        Some(QkNorm::Rotated(_)) | None => {}
    }
    if g.sinks {
        out.push(Shape { role: Role::Sinks, rows: g.heads, cols: 1, cut: BY_ROW });
    }
    out.push(Shape { role: Role::Output, rows: hidden, cols: q, cut: Cut::Rows { unit: g.head_dim } });
    if g.out_bias {
        out.push(vector(Role::OutputBias, hidden));
    }
}

fn latent(l: &Latent, hidden: usize, out: &mut Vec<Shape>) {
    let query = l.nope_dim + l.rope_dim;
    let (rows, cut) = (l.heads * query, Cut::Columns { unit: query });
    match l.query_rank {
        Some(rank) => {
            out.push(Shape { role: Role::QueryDown, rows: rank, cols: hidden, cut: Cut::Replicate });
            out.push(vector(Role::QueryDownNorm, rank));
            out.push(Shape { role: Role::QueryUp, rows, cols: rank, cut });
        }
        None => out.push(Shape { role: Role::Query, rows, cols: hidden, cut }),
    }
    out.push(Shape { role: Role::KvDown, rows: l.kv_rank + l.rope_dim, cols: hidden, cut: Cut::Replicate });
    out.push(vector(Role::KvDownNorm, l.kv_rank));
    let value = l.heads * l.value_dim;
    let by_head = |unit| Cut::Columns { unit };
    if l.halves {
        let (rows, unit) = (l.heads * l.kv_rank, l.kv_rank);
        out.push(Shape { role: Role::Absorb, rows, cols: l.nope_dim, cut: by_head(unit) });
        out.push(Shape { role: Role::Expand, rows: value, cols: l.kv_rank, cut: by_head(l.value_dim) });
    } else {
        let up = l.nope_dim + l.value_dim;
        out.push(Shape { role: Role::KvUp, rows: l.heads * up, cols: l.kv_rank, cut: by_head(up) });
    }
    out.push(Shape { role: Role::Output, rows: hidden, cols: value, cut: Cut::Rows { unit: l.value_dim } });
}

fn dense(d: &Dense, hidden: usize, out: &mut Vec<Shape>) {
    let from = out.len();
    gated([Role::Gate, Role::Up, Role::Down], d.intermediate, hidden, (BY_ROW, BY_COLUMN), out);
    if !d.gated {
        out.remove(from);
    }
    if d.bias {
        if d.gated {
            out.push(Shape { role: Role::GateBias, rows: d.intermediate, cols: 1, cut: BY_ROW });
        }
        out.push(Shape { role: Role::UpBias, rows: d.intermediate, cols: 1, cut: BY_ROW });
        out.push(vector(Role::DownBias, hidden));
    }
}

fn moe(m: &Moe, hidden: usize, out: &mut Vec<Shape>) {
    out.push(Shape { role: Role::Router, rows: m.experts, cols: hidden, cut: Cut::Replicate });
    if m.router.bias {
        out.push(vector(Role::RouterBias, m.experts));
    }
    if m.router.correction_bias {
        out.push(vector(Role::RouterCorrection, m.experts));
    }
    if let Some(shared) = &m.shared {
        let roles = [Role::SharedGate, Role::SharedUp, Role::SharedDown];
        gated(roles, shared.intermediate, hidden, (BY_ROW, BY_COLUMN), out);
    }
    let expert = |within| Cut::Expert { id: 0, of: m.experts, within };
    let roles = [Role::ExpertGate, Role::ExpertUp, Role::ExpertDown];
    gated(roles, m.intermediate, hidden, (expert(ExpertCut::Columns), expert(ExpertCut::Rows)), out);
    if m.bias {
        for role in [Role::ExpertGateBias, Role::ExpertUpBias] {
            out.push(Shape { role, rows: m.intermediate, cols: 1, cut: expert(ExpertCut::Columns) });
        }
        out.push(Shape { role: Role::ExpertDownBias, rows: 1, cols: hidden, cut: expert(ExpertCut::Whole) });
    }
}

/// Gate and up `[intermediate, hidden]`, down `[hidden, intermediate]`.
fn gated(roles: [Role; 3], intermediate: usize, hidden: usize, (wide, narrow): (Cut, Cut), out: &mut Vec<Shape>) {
    let [gate, up, down] = roles;
    out.push(Shape { role: gate, rows: intermediate, cols: hidden, cut: wide });
    out.push(Shape { role: up, rows: intermediate, cols: hidden, cut: wide });
    out.push(Shape { role: down, rows: hidden, cols: intermediate, cut: narrow });
}
