//! Routing, grouped multiplications and the way back.

use super::{Case, near, same_bits};
use crate::backend::{Backend, Grouping, Kind};
use model::spec::{Activation, ExpertGroups, Router, Score};

fn router(score: Score, groups: Option<ExpertGroups>, renormalise: bool) -> Router {
    Router { correction_bias: true, groups, renormalise_eps: 1e-20, scale: 2.5, ..Router::plain(score, renormalise) }
}

pub fn route<B: Backend>(case: &mut Case<B>) {
    let groups = Some(ExpertGroups { count: 8, kept: 3 });
    let mistral4 = Some(ExpertGroups { count: 4, kept: 2 });
    for (experts, active, router) in [
        (8, 2, router(Score::Softmax, None, true)),
        (60, 4, router(Score::Softmax, None, false)),
        (64, 6, router(Score::Sigmoid, groups, true)),
        (16, 4, router(Score::Softmax, mistral4, true)),
        (16, 1, router(Score::Sigmoid, None, false)),
        (24, 3, router(Score::Sigmoid, None, true)),
    ] {
        let n = 40;
        let logits: Vec<f32> = case.random.values(n * experts).iter().map(|v| v * 2.0).collect();
        let bias: Vec<f32> = case.random.values(experts).iter().map(|v| v * 0.1).collect();
        for correction in [None, Some(&bias)] {
            let vector = correction.map(|b| case.backend.vector(b).expect("a vector"));
            let buffer = case.buffer(&logits, experts, Kind::Full);
            let got = case.backend.route(&buffer, &router, active, vector.as_ref(), n).expect("a choice");
            assert_eq!((got.active, got.ids.len(), got.weights.len()), (active, n * active, n * active));
            case.transcript.extend(got.ids.iter().copied().chain(got.weights.iter().map(|w| w.to_bits())));
            for row in 0..n {
                let want = choice(&logits[row * experts..][..experts], &router, active, correction.map(|b| &b[..]));
                for (slot, (id, weight)) in want.iter().enumerate() {
                    assert_eq!(got.ids[row * active + slot], *id, "row {row}, choice {slot} of {experts} {router:?}");
                    near("routing weight", got.weights[row * active + slot], *weight, weight.abs() * 3e-6);
                }
                let alone = case.buffer(&logits[row * experts..][..experts], experts, Kind::Full);
                let alone = case.backend.route(&alone, &router, active, vector.as_ref(), 1).expect("a choice");
                assert_eq!(alone.ids, got.ids[row * active..][..active]);
                same_bits("routing alone", &alone.weights, &got.weights[row * active..][..active]);
            }
        }
    }
    let ties = case.buffer(&[1.0, 2.0, 2.0, 0.0, 2.0, 2.0], 6, Kind::Full);
    let plain = Router { correction_bias: false, ..router(Score::Softmax, None, true) };
    let got = case.backend.route(&ties, &plain, 5, None, 1).expect("a choice");
    assert_eq!(got.ids, [1, 2, 4, 5, 0], "ties go to the lower id");
    // All of these gates are open as wide as f32 can tell.
    let open = case.buffer(&[40.0, 90.0, 30.0, 50.0], 4, Kind::Full);
    let plain = Router::plain(Score::Sigmoid, false);
    let got = case.backend.route(&open, &plain, 2, None, 1).expect("a choice");
    assert_eq!((got.ids, got.weights), (vec![1, 3], vec![1.0; 2]), "logits decide where scores can't");
}

/// The reference, in f64.
fn choice(logits: &[f32], router: &Router, active: usize, bias: Option<&[f32]>) -> Vec<(u32, f64)> {
    let exp: Vec<f64> = logits.iter().map(|l| f64::from(*l).exp()).collect();
    let total: f64 = exp.iter().sum();
    let scores: Vec<f64> = match router.score {
        Score::Softmax => exp.iter().map(|e| e / total).collect(),
        Score::Sigmoid => exp.iter().map(|e| e / (1.0 + e)).collect(),
    };
    let biased: Vec<f64> = scores.iter().enumerate().map(|(i, s)| s + bias.map_or(0.0, |b| f64::from(b[i]))).collect();
    let order = |ids: &mut Vec<usize>, key: &[f64]| ids.sort_by(|a, b| key[*b].total_cmp(&key[*a]).then(a.cmp(b)));
    let mut ids: Vec<usize> = (0..scores.len()).collect();
    if let Some(groups) = router.groups {
        let each = scores.len() / groups.count;
        let rank: Vec<f64> = biased
            .chunks(each)
            .map(|group| {
                let mut best = group.to_vec();
                best.sort_by(|a, b| b.total_cmp(a));
                best[..2].iter().sum()
            })
            .collect();
        let mut kept: Vec<usize> = (0..groups.count).collect();
        order(&mut kept, &rank);
        ids.retain(|id| kept[..groups.kept].contains(&(id / each)));
    }
    order(&mut ids, &biased);
    ids.truncate(active);
    let sum: f64 = if router.renormalise { ids.iter().map(|id| scores[*id]).sum() } else { 1.0 };
    ids.iter().map(|id| (*id as u32, scores[*id] / sum * f64::from(router.scale))).collect()
}

/// Pairs of `n` rows with random experts; some experts get none.
fn grouping<B: Backend>(case: &mut Case<B>, n: usize, experts: usize) -> Grouping {
    let mut grouping = Grouping { offsets: vec![0], ..Grouping::default() };
    for expert in 0..experts {
        for row in 0..n {
            if expert % 3 != 1 && case.random.below(3) == 0 {
                grouping.rows.push(row as u32);
                grouping.weights.push(0.1 + case.random.below(1000) as f32 / 777.0);
            }
        }
        grouping.offsets.push(grouping.rows.len() as u32);
    }
    grouping
}

/// Each pair is what a plain multiplication of its row gives, bit for bit.
pub fn multiply<B: Backend>(case: &mut Case<B>) {
    for (n, experts, inputs, outputs, segments) in [(1, 3, 16, 20, 1), (30, 8, 70, 96, 2), (200, 3, 33, 64, 1)] {
        let matrices: Vec<B::Matrix> = (0..experts).map(|_| case.matrix(outputs, inputs, segments).0).collect();
        let grouping = grouping(case, n, experts);
        let pairs = grouping.rows.len();
        let x = case.random.values(n * inputs);
        let by_pair: Vec<f32> =
            grouping.rows.iter().flat_map(|row| x[*row as usize * inputs..][..inputs].to_vec()).collect();
        let input = case.buffer(&x, inputs, Kind::Input);
        let mut out = case.empty(pairs.max(1), outputs, Kind::Full);
        case.backend.expert_matmul(&input, &matrices, &grouping, &mut out).expect("products");
        let picked = case.read(&mut out, pairs);
        if pairs > 0 {
            let input = case.buffer(&by_pair, inputs, Kind::Input);
            case.backend.pair_matmul(&input, &matrices, &grouping, &mut out).expect("products");
            let direct = case.read(&mut out, pairs);
            same_bits("pair_matmul and expert_matmul", &direct, &picked);
        }
        let mut one = case.empty(1, outputs, Kind::Full);
        for expert in 0..experts {
            for pair in grouping.offsets[expert] as usize..grouping.offsets[expert + 1] as usize {
                let input = case.buffer(&by_pair[pair * inputs..][..inputs], inputs, Kind::Input);
                case.backend.matmul(&input, &matrices[expert], None, 1, &mut one).expect("a product");
                let want = case.read(&mut one, 1);
                same_bits("an expert's product", &picked[pair * outputs..][..outputs], &want);
            }
        }
    }
}

/// What is done at once is what two steps give, bit for bit.
pub fn products_and_activations<B: Backend>(case: &mut Case<B>) {
    for (n, experts, inputs, channels) in [(1, 3, 64, 64), (30, 8, 96, 128), (300, 3, 40, 64), (5, 4, 33, 20)] {
        let matrices: Vec<B::Matrix> = (0..experts).map(|_| case.matrix(2 * channels, inputs, 1).0).collect();
        let grouping = grouping(case, n, experts);
        let pairs = grouping.rows.len();
        let x = case.random.values(n * inputs);
        let input = case.buffer(&x, inputs, Kind::Input);
        let mut between = case.empty(pairs.max(1), 2 * channels, Kind::Full);
        let [mut want, mut got] = [(); 2].map(|()| case.empty(pairs.max(1), channels, Kind::Input));
        case.backend.expert_matmul(&input, &matrices, &grouping, &mut between).expect("products");
        case.backend.activate(&between, Activation::Silu, pairs, &mut want).expect("activations");
        let mut between = case.empty(pairs.max(1), 2 * channels, Kind::Full);
        let done =
            case.backend.expert_matmul_activate(&input, &matrices, &grouping, Activation::Silu, &mut between, &mut got);
        done.expect("both");
        let (got, want) = (case.read(&mut got, pairs), case.read(&mut want, pairs));
        same_bits(&format!("{pairs} pairs of {inputs} to {channels} channels"), &got, &want);
    }
}

/// Inputs by their routing weights, and biases by expert.
pub fn weigh_and_bias<B: Backend>(case: &mut Case<B>) {
    for (n, experts, cols) in [(1, 2, 5), (9, 6, 70), (40, 4, 256)] {
        let grouping = grouping(case, n, experts);
        let pairs = grouping.rows.len();
        let x = case.random.values(n * cols);
        let (input, rounded) = (case.buffer(&x, cols, Kind::Input), case.rounded(&x));
        let mut out = case.empty(pairs.max(1), cols, Kind::Input);
        case.backend.weigh_rows(&input, &grouping, &mut out).expect("weighed rows");
        let got = case.read(&mut out, pairs);
        let products = (0..pairs * cols).map(|i| {
            let (pair, column) = (i / cols, i % cols);
            grouping.weights[pair] * rounded[grouping.rows[pair] as usize * cols + column]
        });
        let products = case.rounded(&products.collect::<Vec<_>>());
        same_bits("weighed rows", &got, &products);

        let biases: Vec<Vec<f32>> = (0..experts).map(|_| case.random.values(cols)).collect();
        let vectors: Vec<B::Vector> = biases.iter().map(|b| case.backend.vector(b).expect("a vector")).collect();
        let y = case.random.values(pairs.max(1) * cols);
        let mut sums = case.buffer(&y, cols, Kind::Full);
        case.backend.add_expert_bias(&mut sums, &vectors, &grouping).expect("sums");
        let got = case.read(&mut sums, pairs);
        for (expert, bias) in biases.iter().enumerate() {
            for pair in grouping.offsets[expert] as usize..grouping.offsets[expert + 1] as usize {
                let y = &y[pair * cols..][..cols];
                let want: Vec<f32> = y.iter().zip(bias).map(|(y, b)| y + b).collect();
                same_bits("an expert's bias", &got[pair * cols..][..cols], &want);
            }
        }
    }
}

pub fn combine<B: Backend>(case: &mut Case<B>) {
    for (n, experts, cols, segments) in [(1, 2, 5, 1), (9, 16, 70, 8), (30, 12, 1100, 4)] {
        let grouping = grouping(case, n, experts);
        let pairs = grouping.rows.len();
        let y = case.random.values(pairs.max(1) * cols);
        let buffer = case.buffer(&y, cols, Kind::Full);
        let mut out = case.empty(n, cols, Kind::Full);
        case.backend.combine(&buffer, &grouping, segments, n, &mut out).expect("sums");
        let got = case.read(&mut out, n);
        let each = experts / segments;
        for row in 0..n {
            for column in 0..cols {
                let mut sums: Vec<f32> = (0..segments)
                    .map(|segment| {
                        let of = grouping.offsets[segment * each]..grouping.offsets[(segment + 1) * each];
                        let mine = of.filter(|p| grouping.rows[*p as usize] == row as u32);
                        mine.fold(0.0, |sum, p| sum + grouping.weights[p as usize] * y[p as usize * cols + column])
                    })
                    .collect();
                while sums.len() > 1 {
                    sums = sums.chunks(2).map(|pair| pair[0] + pair[1]).collect();
                }
                same_bits("combine", &got[row * cols + column..][..1], &sums);
            }
        }
    }
}
