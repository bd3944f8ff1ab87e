//! Both attentions against f64 loops; chunks, batches and spoiled slots against whole prompts, bit for bit.

use super::{Case, near, same_bits};
use crate::backend::{Backend, GroupedShape, Kind, LatentShape};
use crate::engine::batch::{Batch, Sequence};
use model::plan::BLOCK_TOKENS;
use model::rope::{Layout, Rope, Scaling};
use model::spec::{CacheKind, Span};
use model::step::BlockId;

const EPS: f32 = 1e-6;

fn rope(dims: usize, layout: Layout) -> Rope {
    Rope { dims, theta: 10_000.0, layout, scaling: Scaling::None }
}

/// One chunk of sequence `which`, whose blocks interleave with the others'.
fn chunk(row: usize, rows: usize, start: usize, which: usize) -> Sequence {
    let count = (start + rows).div_ceil(BLOCK_TOKENS);
    Sequence { row, rows, start, blocks: (0..count).map(|i| BlockId((i * 3 + which) as u32)).collect() }
}

fn batch(spans: Vec<Sequence>) -> Batch {
    let positions = spans.iter().flat_map(|s| (s.start..s.start + s.rows).map(|p| p as u32)).collect();
    Batch { spans, positions }
}

/// Ways to run three sequences of `lengths` tokens: `(sequence, start, rows)` by step.
fn schedules(lengths: [usize; 3]) -> Vec<Vec<Vec<(usize, usize, usize)>>> {
    let whole = vec![(0..3).map(|s| (s, 0, lengths[s])).collect()];
    let each = (0..3).map(|s| vec![(s, 0, lengths[s])]).collect();
    let mut chunks: Vec<Vec<_>> = vec![vec![]; 1 + lengths.iter().max().copied().unwrap_or(0)];
    for s in 0..3 {
        let (mut at, mut step) = (0, 0);
        while at < lengths[s] {
            // A long first chunk, then a few tokens and single ones in turn.
            let rows = [lengths[s] / 2 + 1, 1, 1, 7][step.min(3)].min(lengths[s] - at);
            chunks[step].push((s, at, rows));
            (at, step) = (at + rows, step + 1);
        }
    }
    chunks.retain(|c| !c.is_empty());
    vec![whole, each, chunks]
}

pub fn grouped<B: Backend>(case: &mut Case<B>) {
    let half = |dims| Some(rope(dims, Layout::Half));
    for (heads, kv_heads, head_dim, span, rope, normed) in [
        (2, 1, 8, Span::Full, half(8), false),
        (4, 4, 16, Span::Window(5), Some(rope(8, Layout::Interleaved)), true),
        (12, 1, 20, Span::Full, half(20), true),
        (6, 2, 64, Span::Window(40), None, false),
        (3, 1, 128, Span::Full, half(64), true),
    ] {
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape = GroupedShape { heads, kv_heads, head_dim, span, scale, rope };
        let lengths = [75, 33, 6];
        let width = (heads + 2 * kv_heads) * head_dim;
        let inputs: [Vec<f32>; 3] = lengths.map(|n| case.random.values(n * width));
        let norms = normed.then(|| (case.random.values(head_dim), case.random.values(head_dim)));
        let mut answers = Vec::new();
        for schedule in schedules(lengths) {
            answers.push(run_grouped(case, &shape, &inputs, norms.as_ref(), &schedule));
        }
        for sequence in 0..3 {
            same_bits("sequences apart", &answers[1][sequence], &answers[0][sequence]);
            same_bits("chunks", &answers[2][sequence], &answers[0][sequence]);
            naive_grouped(case, &shape, &inputs[sequence], norms.as_ref(), &answers[0][sequence]);
        }
    }
}

type Norms = (Vec<f32>, Vec<f32>);

fn run_grouped<B: Backend>(
    case: &mut Case<B>,
    shape: &GroupedShape,
    inputs: &[Vec<f32>; 3],
    norms: Option<&Norms>,
    schedule: &[Vec<(usize, usize, usize)>],
) -> [Vec<f32>; 3] {
    let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    let kind = CacheKind::Paged { kv_heads: shape.kv_heads, head_dim: shape.head_dim };
    let mut cache = case.backend.cache(kind, 9).expect("a cache");
    let table = shape.rope.as_ref().map(|r| case.backend.rope_table(r, 96).expect("a table"));
    let vectors =
        norms.map(|(q, k)| (case.backend.vector(q).expect("a norm"), case.backend.vector(k).expect("a norm")));
    let norms = vectors.as_ref().map(|(q, k)| (q, k, EPS));
    // Whoever looks at a slot before it is written meets a NaN.
    let spoilt = batch((0..3).map(|s| chunk(s * 96, 96, 0, s)).collect());
    let meta = case.backend.meta(&spoilt).expect("meta");
    let mut nan = case.buffer(&vec![f32::NAN; 288 * width], width, Kind::Full);
    case.backend.grouped_prepare(shape, &mut nan, norms, table.as_ref(), &meta, &mut cache).expect("NaNs written");

    let mut answers = [const { Vec::new() }; 3];
    let out_width = shape.heads * shape.head_dim;
    for step in schedule {
        let (mut spans, mut rows) = (Vec::new(), Vec::new());
        for (sequence, start, count) in step {
            spans.push(chunk(rows.len() / width, *count, *start, *sequence));
            rows.extend_from_slice(&inputs[*sequence][start * width..(start + count) * width]);
        }
        let n = rows.len() / width;
        let meta = case.backend.meta(&batch(spans)).expect("meta");
        let mut qkv = case.buffer(&rows, width, Kind::Full);
        case.backend.grouped_prepare(shape, &mut qkv, norms, table.as_ref(), &meta, &mut cache).expect("prepared");
        let mut out = case.empty(n, out_width, Kind::Input);
        case.backend.grouped_attention(shape, &qkv, &meta, &cache, &mut out).expect("attention");
        let got = case.read(&mut out, n);
        let mut row = 0;
        for (sequence, _, count) in step {
            answers[*sequence].extend_from_slice(&got[row * out_width..(row + count) * out_width]);
            row += count;
        }
    }
    answers
}

fn normed(x: &mut [f64], weight: &[f32], eps: f32) {
    let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    for (x, w) in x.iter_mut().zip(weight) {
        *x *= f64::from(*w) / (mean + f64::from(eps)).sqrt();
    }
}

fn turned(x: &mut [f64], rope: &Rope, position: usize) {
    let half = rope.dims / 2;
    for i in 0..half {
        let angle = position as f64 * rope.theta.powf(-(2.0 * i as f64) / rope.dims as f64);
        let (a, b) = if rope.layout == Layout::Half { (i, i + half) } else { (2 * i, 2 * i + 1) };
        (x[a], x[b]) = (x[a] * angle.cos() - x[b] * angle.sin(), x[b] * angle.cos() + x[a] * angle.sin());
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

/// Softmax-weighted mean of `values` over scores.
fn mean(scores: &[f64], values: &[Vec<f64>]) -> Vec<f64> {
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
    let total: f64 = weights.iter().sum();
    (0..values[0].len()).map(|c| weights.iter().zip(values).map(|(w, v)| w * v[c]).sum::<f64>() / total).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn naive_grouped<B: Backend>(case: &Case<B>, shape: &GroupedShape, inputs: &[f32], norms: Option<&Norms>, got: &[f32]) {
    let (dim, width) = (shape.head_dim, (shape.heads + 2 * shape.kv_heads) * shape.head_dim);
    let ready = |position: usize, head: usize| {
        let mut x = wide(&inputs[position * width + head * dim..][..dim]);
        if let Some((q, k)) = norms {
            normed(&mut x, if head < shape.heads { q } else { k }, EPS);
        }
        if let Some(rope) = &shape.rope {
            turned(&mut x, rope, position);
        }
        x
    };
    for position in 0..inputs.len() / width {
        let from = match shape.span {
            Span::Full => 0,
            Span::Window(window) => (position + 1).saturating_sub(window),
            Span::Chunk(chunk) => position / chunk * chunk,
        };
        for head in 0..shape.heads {
            let kv = head / (shape.heads / shape.kv_heads);
            let q = ready(position, head);
            let scores: Vec<f64> =
                (from..=position).map(|p| dot(&q, &ready(p, shape.heads + kv)) * f64::from(shape.scale)).collect();
            let value = |p: usize| wide(&inputs[p * width + (shape.heads + shape.kv_heads + kv) * dim..][..dim]);
            let want = mean(&scores, &(from..=position).map(value).collect::<Vec<_>>());
            for (c, want) in want.iter().enumerate() {
                let at = (position * shape.heads + head) * dim + c;
                near(&format!("{shape:?} position {position}"), got[at], *want, 8.0 * case.unit() + 2e-5);
            }
        }
    }
}

struct LatentWeights {
    /// By head, `[kv_rank, nope]` and `[value, kv_rank]`.
    absorb: Vec<Vec<f32>>,
    expand: Vec<Vec<f32>>,
    norm: Vec<f32>,
}

pub fn latent<B: Backend>(case: &mut Case<B>) {
    for (heads, kv_rank, nope_dim, rope_dim, value_dim) in [(1, 12, 6, 4, 5), (4, 32, 16, 8, 16), (20, 70, 24, 16, 40)]
    {
        let scale = 1.0 / ((nope_dim + rope_dim) as f32).sqrt();
        let rope = rope(rope_dim, Layout::Interleaved);
        let shape = LatentShape { heads, kv_rank, nope_dim, rope_dim, value_dim, scale, rope };
        let lengths = [70, 33, 6];
        let widths = (heads * (nope_dim + rope_dim), kv_rank + rope_dim);
        let inputs = lengths.map(|n| (case.random.values(n * widths.0), case.random.values(n * widths.1)));
        let mut weights = |rows: usize, cols: usize| -> Vec<Vec<f32>> {
            let one = |_| {
                let v: Vec<f32> = case.random.values(rows * cols).iter().map(|v| v / (cols as f32).sqrt()).collect();
                v
            };
            (0..heads).map(one).collect()
        };
        let (absorb, expand) = (weights(kv_rank, nope_dim), weights(value_dim, kv_rank));
        let weights = LatentWeights { absorb, expand, norm: case.random.values(kv_rank) };
        let answers: Vec<_> =
            schedules(lengths).iter().map(|s| run_latent(case, &shape, &inputs, &weights, s)).collect();
        for sequence in 0..3 {
            same_bits("sequences apart", &answers[1][sequence], &answers[0][sequence]);
            same_bits("chunks", &answers[2][sequence], &answers[0][sequence]);
            naive_latent(case, &shape, &inputs[sequence], &weights, &answers[0][sequence]);
        }
    }
}

fn run_latent<B: Backend>(
    case: &mut Case<B>,
    shape: &LatentShape,
    inputs: &[(Vec<f32>, Vec<f32>); 3],
    weights: &LatentWeights,
    schedule: &[Vec<(usize, usize, usize)>],
) -> [Vec<f32>; 3] {
    let widths = (shape.heads * (shape.nope_dim + shape.rope_dim), shape.kv_rank + shape.rope_dim);
    let kind = CacheKind::Latent { kv_rank: shape.kv_rank, rope_dim: shape.rope_dim };
    let mut cache = case.backend.cache(kind, 9).expect("a cache");
    let table = case.backend.rope_table(&shape.rope, 96).expect("a table");
    let norm = case.backend.vector(&weights.norm).expect("a norm");
    let pack = |case: &Case<B>, w: &[Vec<f32>], rows, cols| -> Vec<B::Matrix> {
        w.iter().map(|w| case.backend.matrix_f32(w, rows, cols, 1).expect("a matrix")).collect()
    };
    let absorb = pack(case, &weights.absorb, shape.kv_rank, shape.nope_dim);
    let expand = pack(case, &weights.expand, shape.value_dim, shape.kv_rank);
    let meta = case.backend.meta(&batch((0..3).map(|s| chunk(s * 96, 96, 0, s)).collect())).expect("meta");
    let mut nan = (
        case.buffer(&vec![f32::NAN; 288 * widths.0], widths.0, Kind::Full),
        case.buffer(&vec![f32::NAN; 288 * widths.1], widths.1, Kind::Full),
    );
    let prepared = "prepared";
    case.backend
        .latent_prepare(shape, &mut nan.0, &mut nan.1, (&norm, EPS), &table, &meta, &mut cache)
        .expect(prepared);

    let mut answers = [const { Vec::new() }; 3];
    let out_width = shape.heads * shape.value_dim;
    for step in schedule {
        let (mut spans, mut q, mut kv) = (Vec::new(), Vec::new(), Vec::new());
        for (sequence, start, count) in step {
            spans.push(chunk(kv.len() / widths.1, *count, *start, *sequence));
            q.extend_from_slice(&inputs[*sequence].0[start * widths.0..(start + count) * widths.0]);
            kv.extend_from_slice(&inputs[*sequence].1[start * widths.1..(start + count) * widths.1]);
        }
        let n = kv.len() / widths.1;
        let meta = case.backend.meta(&batch(spans)).expect("meta");
        let (mut q, mut kv) = (case.buffer(&q, widths.0, Kind::Full), case.buffer(&kv, widths.1, Kind::Full));
        case.backend.latent_prepare(shape, &mut q, &mut kv, (&norm, EPS), &table, &meta, &mut cache).expect(prepared);
        let mut out = case.empty(n, out_width, Kind::Input);
        case.backend.latent_attention(shape, &q, &absorb, &expand, &meta, &cache, &mut out).expect("attention");
        let got = case.read(&mut out, n);
        let mut row = 0;
        for (sequence, _, count) in step {
            answers[*sequence].extend_from_slice(&got[row * out_width..(row + count) * out_width]);
            row += count;
        }
    }
    answers
}

fn naive_latent<B: Backend>(
    case: &Case<B>,
    shape: &LatentShape,
    (queries, rows): &(Vec<f32>, Vec<f32>),
    weights: &LatentWeights,
    got: &[f32],
) {
    let (head_dim, width) = (shape.nope_dim + shape.rope_dim, shape.kv_rank + shape.rope_dim);
    let n = rows.len() / width;
    let cached: Vec<Vec<f64>> = (0..n)
        .map(|position| {
            let mut row = wide(&rows[position * width..][..width]);
            normed(&mut row[..shape.kv_rank], &weights.norm, EPS);
            turned(&mut row[shape.kv_rank..], &shape.rope, position);
            row
        })
        .collect();
    let times = |w: &[f32], x: &[f64]| -> Vec<f64> { w.chunks(x.len()).map(|row| dot(&wide(row), x)).collect() };
    for position in 0..n {
        for head in 0..shape.heads {
            let mut q = wide(&queries[(position * shape.heads + head) * head_dim..][..head_dim]);
            turned(&mut q[shape.nope_dim..], &shape.rope, position);
            let mut absorbed = times(&weights.absorb[head], &q[..shape.nope_dim]);
            absorbed.extend_from_slice(&q[shape.nope_dim..]);
            let scores: Vec<f64> =
                cached[..=position].iter().map(|row| dot(&absorbed, row) * f64::from(shape.scale)).collect();
            let latents: Vec<Vec<f64>> = cached[..=position].iter().map(|r| r[..shape.kv_rank].to_vec()).collect();
            let want = times(&weights.expand[head], &mean(&scores, &latents));
            for (c, want) in want.iter().enumerate() {
                let at = (position * shape.heads + head) * shape.value_dim + c;
                near(&format!("{shape:?} position {position}"), got[at], *want, 12.0 * case.unit() + 5e-5);
            }
        }
    }
}
