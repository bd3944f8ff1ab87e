//! Both attentions against f64 loops; chunks, batches and spoiled slots against whole prompts, bit for bit.

use super::{Case, near, same_bits};
use crate::backend::{Backend, GroupedShape, HeadNorm, Kind, LatentShape, NormWeights, PerHead};
use crate::engine::batch::{Batch, Sequence};
use model::plan::BLOCK_TOKENS;
use model::rope::{Layout, Rope, Scaling};
use model::spec::{CacheKind, Norm, Span};
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

/// What one case of grouped attention has beside its shape; by position and head, as the operations take it.
struct Extras {
    norm: Norms,
    scales: Option<Vec<f32>>,
    per_head: PerHead<Vec<f32>>,
}

enum Norms {
    None,
    Heads(Vec<f32>, Vec<f32>),
    Whole(Vec<f32>, Vec<f32>),
    Rotated,
}

/// Lengths of the three sequences; the longest passes two blocks.
const LENGTHS: [usize; 3] = [75, 33, 6];

fn shape(heads: usize, kv_heads: usize, head_dim: usize, span: Span, rope: Option<Rope>) -> GroupedShape {
    GroupedShape { heads, kv_heads, head_dim, span, scale: 1.0 / (head_dim as f32).sqrt(), rope }
}

pub fn grouped<B: Backend>(case: &mut Case<B>) {
    let half = |dims| Some(rope(dims, Layout::Half));
    let turned = |dims| Some(rope(dims, Layout::Interleaved));
    let per_head = |heads| move |case: &mut Case<B>| case.random.values(heads);
    for (shape, normed) in [
        (shape(2, 1, 8, Span::Full, half(8)), false),
        (shape(4, 4, 16, Span::Window(5), turned(8)), true),
        (shape(12, 1, 20, Span::Full, half(20)), true),
        (shape(6, 2, 64, Span::Window(40), None), false),
        (shape(3, 1, 128, Span::Full, half(64)), true),
        // Rotated parts that fill no vector, in heads that fill none.
        (shape(4, 2, 24, Span::Full, half(10)), false),
        (shape(2, 2, 36, Span::Chunk(32), turned(22)), true),
    ] {
        let weights = |case: &mut Case<B>| case.random.values(shape.head_dim);
        let norm = if normed { Norms::Heads(weights(case), weights(case)) } else { Norms::None };
        check_grouped(case, &shape, &Extras { norm, scales: None, per_head: PerHead::NONE });
    }
    // Llama 4's two kinds of layer: chunks that end within blocks, and queries that grow.
    let scales: Vec<f32> = (0..96).map(|p| 1.0 + 0.3 * (1.0 + (p / 16) as f32).ln()).collect();
    for (shape, norm, scales) in [
        (shape(4, 2, 16, Span::Chunk(13), turned(16)), Norms::Rotated, None),
        (shape(10, 2, 20, Span::Chunk(45), half(12)), Norms::Rotated, Some(&scales)),
        (shape(4, 1, 16, Span::Full, None), Norms::None, Some(&scales)),
    ] {
        check_grouped(case, &shape, &Extras { norm, scales: scales.cloned(), per_head: PerHead::NONE });
    }
    // MiniMax-M2's norm over all heads.
    let whole = shape(20, 4, 24, Span::Full, half(12));
    let norm = Norms::Whole(case.random.values(20 * 24), case.random.values(4 * 24));
    check_grouped(case, &whole, &Extras { norm, scales: None, per_head: PerHead::NONE });
    // BLOOM's slopes, gpt-oss's sinks (one far above every score, one far below), and both.
    let slopes = |heads: usize| (0..heads).map(|h| 0.7f32.powi(h as i32 + 1)).collect::<Vec<f32>>();
    for (shape, sloped, sunk) in [
        (shape(3, 3, 20, Span::Full, None), true, false),
        (shape(9, 1, 16, Span::Full, None), true, false),
        (shape(8, 2, 24, Span::Window(33), half(24)), false, true),
        (shape(16, 1, 16, Span::Full, half(8)), false, true),
        (shape(4, 2, 8, Span::Full, None), true, true),
    ] {
        let mut sinks = per_head(shape.heads)(case);
        (sinks[0], sinks[1]) = (30.0, -200.0);
        let per_head = PerHead { slopes: sloped.then(|| slopes(shape.heads)), sinks: sunk.then_some(sinks) };
        check_grouped(case, &shape, &Extras { norm: Norms::None, scales: None, per_head });
    }
}

fn check_grouped<B: Backend>(case: &mut Case<B>, shape: &GroupedShape, extras: &Extras) {
    let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    let inputs: [Vec<f32>; 3] = LENGTHS.map(|n| case.random.values(n * width));
    let mut answers = Vec::new();
    for schedule in schedules(LENGTHS) {
        answers.push(run_grouped(case, shape, &inputs, extras, &schedule));
    }
    for sequence in 0..3 {
        same_bits("sequences apart", &answers[1][sequence], &answers[0][sequence]);
        same_bits("chunks", &answers[2][sequence], &answers[0][sequence]);
        naive_grouped(case, shape, &inputs[sequence], extras, &answers[0][sequence]);
    }
}

/// The extras on the device.
struct Held<B: Backend> {
    weights: Option<(B::Vector, B::Vector)>,
    scales: Option<B::Vector>,
    per_head: PerHead<B::Vector>,
    table: Option<B::RopeTable>,
}

impl<B: Backend> Held<B> {
    fn new(case: &Case<B>, shape: &GroupedShape, extras: &Extras) -> Held<B> {
        let vector = |values: &Vec<f32>| case.backend.vector(values).expect("a vector");
        let weights = match &extras.norm {
            Norms::Heads(q, k) | Norms::Whole(q, k) => Some((vector(q), vector(k))),
            Norms::None | Norms::Rotated => None,
        };
        let per_head = PerHead {
            slopes: extras.per_head.slopes.as_ref().map(vector),
            sinks: extras.per_head.sinks.as_ref().map(vector),
        };
        let table = shape.rope.as_ref().map(|r| case.backend.rope_table(r, 96).expect("a table"));
        Held { weights, scales: extras.scales.as_ref().map(vector), per_head, table }
    }

    fn prepare(
        &self,
        case: &mut Case<B>,
        (shape, extras): (&GroupedShape, &Extras),
        qkv: &mut B::Buffer,
        (meta, n): (&B::Meta, usize),
        cache: &mut B::Cache,
    ) {
        let mut squares = case.empty(n, shape.heads + shape.kv_heads, Kind::Full);
        let norm = match (&extras.norm, &self.weights) {
            (Norms::Heads(..), Some((query, key))) => Some(HeadNorm::Heads { query, key, eps: EPS }),
            (Norms::Whole(..), Some((query, key))) => {
                let columns = (0, Some(shape.heads));
                case.backend.head_squares(shape, qkv, columns, n, &mut squares).expect("squares");
                Some(HeadNorm::Whole { query, key, eps: EPS, squares: &squares, heads: shape.heads })
            }
            (Norms::Rotated, _) => Some(HeadNorm::Rotated { eps: EPS }),
            _ => None,
        };
        let (rope, scales) = (self.table.as_ref(), self.scales.as_ref());
        case.backend.grouped_prepare(shape, qkv, norm, rope, scales, meta, cache).expect("prepared");
    }
}

fn run_grouped<B: Backend>(
    case: &mut Case<B>,
    shape: &GroupedShape,
    inputs: &[Vec<f32>; 3],
    extras: &Extras,
    schedule: &[Vec<(usize, usize, usize)>],
) -> [Vec<f32>; 3] {
    let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    let kind = CacheKind::Paged { kv_heads: shape.kv_heads, head_dim: shape.head_dim };
    let mut cache = case.backend.cache(kind, 9).expect("a cache");
    let held = Held::new(case, shape, extras);
    // Whoever looks at a slot before it is written meets a NaN.
    let spoilt = batch((0..3).map(|s| chunk(s * 96, 96, 0, s)).collect());
    let meta = case.backend.meta(&spoilt).expect("meta");
    let mut nan = case.buffer(&vec![f32::NAN; 288 * width], width, Kind::Full);
    held.prepare(case, (shape, extras), &mut nan, (&meta, 288), &mut cache);

    let per_head = PerHead { slopes: held.per_head.slopes.as_ref(), sinks: held.per_head.sinks.as_ref() };
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
        held.prepare(case, (shape, extras), &mut qkv, (&meta, n), &mut cache);
        let mut out = case.empty(n, out_width, Kind::Input);
        case.backend.grouped_attention(shape, &qkv, per_head, &meta, &cache, &mut out).expect("attention");
        let got = case.read(&mut out, n);
        let mut row = 0;
        for (sequence, _, count) in step {
            answers[*sequence].extend_from_slice(&got[row * out_width..(row + count) * out_width]);
            row += count;
        }
    }
    answers
}

/// Ranks that hold some heads each write their columns; added, these are the columns of one rank that holds all.
pub fn squares<B: Backend>(case: &mut Case<B>) {
    let (n, heads, kv_heads, dim) = (5, 6, 2, 20);
    let all = shape(heads, kv_heads, dim, Span::Full, None);
    let width = (heads + 2 * kv_heads) * dim;
    let values = case.random.values(n * width);
    let qkv = case.buffer(&values, width, Kind::Full);
    let mut out = case.buffer(&vec![f32::NAN; n * 8], 8, Kind::Full);
    case.backend.head_squares(&all, &qkv, (0, Some(heads)), n, &mut out).expect("squares");
    let want = case.read(&mut out, n);
    for (at, square) in want.iter().enumerate() {
        let x = &values[at / 8 * width + at % 8 * dim..][..dim];
        let sum: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum();
        near("a head's squares", *square, sum, sum * 1e-6);
    }
    // Four ranks: two share each key head, and the first of them counts it.
    let mut sums = vec![0.0f32; n * 8];
    for (first, count, key) in [(0, 2, 0), (2, 1, 0), (3, 2, 1), (5, 1, 1)] {
        let part = shape(count, 1, dim, Span::Full, None);
        let rows = values.chunks_exact(width).flat_map(|row| {
            let key_at = (heads + key) * dim;
            [&row[first * dim..(first + count) * dim], &row[key_at..key_at + dim], &row[..dim]].concat()
        });
        let qkv = case.buffer(&rows.collect::<Vec<_>>(), (count + 2) * dim, Kind::Full);
        let counts = (first == 3 * key).then_some(heads + key);
        case.backend.head_squares(&part, &qkv, (first, counts), n, &mut out).expect("squares");
        sums.iter_mut().zip(case.read(&mut out, n)).for_each(|(sum, part)| *sum += part);
    }
    same_bits("squares of ranks", &sums, &want);
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

/// Query or key head `head` of one row, made ready.
fn ready(shape: &GroupedShape, extras: &Extras, row: &[f32], position: usize, head: usize) -> Vec<f64> {
    let (dim, query) = (shape.head_dim, head < shape.heads);
    let mut x = wide(&row[head * dim..][..dim]);
    match &extras.norm {
        Norms::Heads(q, k) => normed(&mut x, if query { q } else { k }, EPS),
        Norms::Whole(q, k) => {
            let (first, heads, weight) = if query { (0, shape.heads, q) } else { (shape.heads, shape.kv_heads, k) };
            let mut all = wide(&row[first * dim..][..heads * dim]);
            normed(&mut all, weight, EPS);
            x = all[(head - first) * dim..][..dim].to_vec();
        }
        Norms::None | Norms::Rotated => {}
    }
    if let Some(rope) = &shape.rope {
        turned(&mut x, rope, position);
    }
    if let Norms::Rotated = extras.norm {
        normed(&mut x, &vec![1.0; dim], EPS);
    }
    if let Some(scales) = extras.scales.as_ref().filter(|_| query) {
        x.iter_mut().for_each(|v| *v *= f64::from(scales[position]));
    }
    x
}

fn naive_grouped<B: Backend>(case: &Case<B>, shape: &GroupedShape, inputs: &[f32], extras: &Extras, got: &[f32]) {
    let (dim, width) = (shape.head_dim, (shape.heads + 2 * shape.kv_heads) * shape.head_dim);
    let rows: Vec<&[f32]> = inputs.chunks_exact(width).collect();
    let keys: Vec<Vec<Vec<f64>>> = rows
        .iter()
        .enumerate()
        .map(|(p, row)| (0..shape.kv_heads).map(|kv| ready(shape, extras, row, p, shape.heads + kv)).collect())
        .collect();
    for position in 0..rows.len() {
        let from = match shape.span {
            Span::Full => 0,
            Span::Window(window) => (position + 1).saturating_sub(window),
            Span::Chunk(chunk) => position / chunk * chunk,
        };
        for head in 0..shape.heads {
            let kv = head / (shape.heads / shape.kv_heads);
            let q = ready(shape, extras, rows[position], position, head);
            let slope = extras.per_head.slopes.as_ref().map_or(0.0, |each| f64::from(each[head]));
            let mut scores: Vec<f64> = (from..=position)
                .map(|p| dot(&q, &keys[p][kv]) * f64::from(shape.scale) - slope * (position - p) as f64)
                .collect();
            let value = |p: usize| wide(&rows[p][(shape.heads + shape.kv_heads + kv) * dim..][..dim]);
            let mut values: Vec<Vec<f64>> = (from..=position).map(value).collect();
            if let Some(sinks) = &extras.per_head.sinks {
                scores.push(f64::from(sinks[head]));
                values.push(vec![0.0; dim]);
            }
            let want = mean(&scores, &values);
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
    /// Of queries, by position.
    scales: Option<Vec<f32>>,
}

pub fn latent<B: Backend>(case: &mut Case<B>) {
    for (heads, kv_rank, nope_dim, rope_dim, value_dim, scaled) in
        [(1, 12, 6, 4, 5, false), (4, 32, 16, 8, 16, true), (20, 70, 24, 16, 40, false)]
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
        let scales = scaled.then(|| (0..96).map(|p| 1.0 + 0.1 * (1.0 + (p / 8) as f32).ln()).collect());
        let weights = LatentWeights { absorb, expand, norm: case.random.values(kv_rank), scales };
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
    let weight = case.backend.vector(&weights.norm).expect("a norm");
    let norm = NormWeights { norm: Norm::rms(EPS), weight, bias: None };
    let scales = weights.scales.as_ref().map(|v| case.backend.vector(v).expect("a vector"));
    let scales = scales.as_ref();
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
        .latent_prepare(shape, &mut nan.0, &mut nan.1, &norm, &table, scales, &meta, &mut cache)
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
        case.backend.latent_prepare(shape, &mut q, &mut kv, &norm, &table, scales, &meta, &mut cache).expect(prepared);
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
            if let Some(scales) = &weights.scales {
                q.iter_mut().for_each(|v| *v *= f64::from(scales[position]));
            }
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
