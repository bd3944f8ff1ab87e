//! Multiplications, norms, sums and activations.

use super::{Case, near, product, same_bits, view};
use crate::backend::{Backend, Kind, MatrixView, NormWeights};
use half::{bf16, f16};
use model::quant::Format;
use model::spec::{Activation, Norm, NormForm};

pub fn matmul<B: Backend>(case: &mut Case<B>) {
    for (n, out, inputs, segments) in [
        (1, 1, 1, 1),
        (2, 16, 2, 1),
        (3, 5, 6, 2),
        (7, 40, 31, 1),
        (5, 64, 24, 8),
        (13, 100, 136, 8),
        (50, 130, 70, 2),
        (101, 64, 640, 1),
        (9, 200, 1200, 4),
        // Whole blocks of tiles in every segment: squares of rows, some not full, and bands.
        (81, 192, 512, 8),
        (27, 64, 1024, 2),
        (12, 70, 384, 4),
    ] {
        let (matrix, w) = case.matrix(out, inputs, segments);
        let bias = case.random.values(out);
        let bias_vector = case.backend.vector(&bias).expect("a vector");
        let x = case.random.values(n * inputs);
        let (rounded, input) = (case.rounded(&x), case.buffer(&x, inputs, Kind::Input));
        let mut y = case.empty(n, out, Kind::Full);
        case.backend.matmul(&input, &matrix, Some(&bias_vector), n, &mut y).expect("a product");
        let all = case.read(&mut y, n);
        for row in 0..n {
            let x = &rounded[row * inputs..][..inputs];
            for column in 0..out {
                let (sum, size) = product(x, &w[column * inputs..][..inputs]);
                let allowed = (inputs + 8) as f64 * 6e-8 * (size + f64::from(bias[column].abs()));
                let what = format!("matmul {n} x {inputs} x {out} in {segments}, row {row}, output {column}");
                near(&what, all[row * out + column], sum + f64::from(bias[column]), allowed);
            }
        }
        for row in [0, n / 2, n - 1] {
            let alone = case.buffer(&x[row * inputs..][..inputs], inputs, Kind::Input);
            case.backend.matmul(&alone, &matrix, Some(&bias_vector), 1, &mut y).expect("a product");
            let alone = case.read(&mut y, 1);
            same_bits(&format!("matmul row {row} of {n} alone"), &alone, &all[row * out..][..out]);
        }
        segments_are_a_tree(case, (&w, out, inputs, segments), &x);
    }
}

/// The whole is the tree of its segments, each multiplied as a matrix of its own.
fn segments_are_a_tree<B: Backend>(
    case: &mut Case<B>,
    (w, out, inputs, segments): (&[f32], usize, usize, usize),
    x: &[f32],
) {
    let whole = case.backend.matrix_f32(w, out, inputs, segments).expect("a matrix");
    let (x, length) = (&x[..inputs], inputs / segments);
    let mut y = case.empty(1, out, Kind::Full);
    let mut parts = Vec::new();
    for segment in 0..segments {
        let of = segment * length..(segment + 1) * length;
        let part: Vec<f32> = (0..out).flat_map(|o| w[o * inputs..][of.clone()].to_vec()).collect();
        let part = case.backend.matrix_f32(&part, out, length, 1).expect("a matrix");
        let input = case.buffer(&x[of], length, Kind::Input);
        case.backend.matmul(&input, &part, None, 1, &mut y).expect("a product");
        parts.push(case.read(&mut y, 1));
    }
    while parts.len() > 1 {
        parts = parts.chunks(2).map(|pair| pair[0].iter().zip(&pair[1]).map(|(a, b)| a + b).collect()).collect();
    }
    let input = case.buffer(x, inputs, Kind::Input);
    case.backend.matmul(&input, &whole, None, 1, &mut y).expect("a product");
    let got = case.read(&mut y, 1);
    same_bits(&format!("{segments} segments of {inputs}"), &got, &parts[0]);
}

/// Windows of stored formats, stacked, against their widened values.
pub fn formats<B: Backend>(case: &mut Case<B>) {
    let (rows, stored) = (9, 512);
    for format in [Format::F32, Format::Bf16, Format::F16, Format::Q8_0, Format::Q4_0, Format::Q4_1, Format::Q6K] {
        let bytes = stored_bytes(case, format, rows * stored);
        for (row, count, col, cols) in [(0, rows, 0, stored), (3, 2, 40, 200), (1, 7, 130, 2)] {
            let window =
                MatrixView { row, rows: count, col, cols, ..MatrixView::whole(format, &bytes, row + count, stored) };
            let other: Vec<u8> =
                case.random.values(3 * cols).iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
            let parts = [window, view(Format::Bf16, &other, 3, cols)];
            let matrix = case.backend.matrix(&parts, 2).expect("a matrix");
            let mut w = vec![0.0; cols];
            let x = case.random.values(cols);
            let (rounded, input) = (case.rounded(&x), case.buffer(&x, cols, Kind::Input));
            let mut y = case.empty(1, count + 3, Kind::Full);
            case.backend.matmul(&input, &matrix, None, 1, &mut y).expect("a product");
            let got = case.read(&mut y, 1);
            for (output, got) in got.iter().enumerate() {
                let part = usize::from(output >= count);
                crate::load::widen::widen(&parts[part], output - part * count, &mut w);
                let (sum, size) = product(&rounded, &case.rounded(&w));
                near(&format!("{format:?} output {output}"), *got, sum, cols as f64 * 6e-8 * size + 1e-30);
            }
        }
    }
}

/// Bytes of any format whose scales are ordinary numbers.
fn stored_bytes<B: Backend>(case: &mut Case<B>, format: Format, values: usize) -> Vec<u8> {
    let numbers = case.random.values(values);
    match format {
        Format::F32 => numbers.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Format::Bf16 => numbers.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        Format::F16 => numbers.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        _ => {
            let mut bytes: Vec<u8> = (0..format.bytes(values)).map(|_| case.random.next() as u8).collect();
            let scales: &[usize] = match format {
                Format::Q4_1 => &[0, 2],
                Format::Q6K => &[208],
                _ => &[0],
            };
            for (block, number) in bytes.chunks_exact_mut(format.block_bytes()).zip(&numbers) {
                for at in scales {
                    block[*at..at + 2].copy_from_slice(&f16::from_f32(number * 0.01).to_le_bytes());
                }
            }
            bytes
        }
    }
}

pub fn embed<B: Backend>(case: &mut Case<B>) {
    for (vocab, hidden, segments) in [(70, 33, 1), (130, 64, 2)] {
        let (table, values) = case.matrix(vocab, hidden, segments);
        let mut out = case.empty(4, hidden, Kind::Full);
        case.backend.embed(&table, 10, &[10, 9, 10 + vocab as u32 - 1, 10 + vocab as u32], &mut out).expect("rows");
        let got = case.read(&mut out, 4);
        let none = vec![0.0; hidden];
        let want = [&values[..hidden], &none, &values[(vocab - 1) * hidden..], &none].concat();
        same_bits("embed", &got, &want);
    }
}

pub fn norms<B: Backend>(case: &mut Case<B>) {
    const EPS: f32 = 1e-5;
    for (n, width, form) in [
        (1, 1, NormForm::Rms),
        (3, 40, NormForm::Rms),
        (4, 64, NormForm::Rms),
        (2, 33, NormForm::Rms),
        (5, 256, NormForm::Rms),
        (3, 15, NormForm::Layer),
        (4, 64, NormForm::Layer),
        (2, 100, NormForm::Layer),
        (1, 1, NormForm::Layer),
    ] {
        // A mean far from zero, which a single pass over squares would lose.
        let centre = if form == NormForm::Layer { 30.0 } else { 0.0 };
        let x: Vec<f32> = case.random.values(n * width).iter().map(|v| v + centre).collect();
        let (weight, bias) = (case.random.values(width), case.random.values(width));
        let vector = |values: &[f32]| case.backend.vector(values).expect("a vector");
        let bias_vector = (form == NormForm::Layer).then(|| vector(&bias));
        let norm = NormWeights { norm: Norm { eps: EPS, form }, weight: vector(&weight), bias: bias_vector };
        let input = case.buffer(&x, width, Kind::Full);
        let (mut out, mut full) = (case.empty(n, width, Kind::Input), case.empty(n, width, Kind::Full));
        case.backend.norm(&input, &norm, n, &mut out).expect("norms");
        case.backend.norm(&input, &norm, n, &mut full).expect("norms");
        let (all, full) = (case.read(&mut out, n), case.read(&mut full, n));
        same_bits("a norm is rounded once", &all, &case.rounded(&full));
        for row in 0..n {
            let x = &x[row * width..][..width];
            let mean = |f: &dyn Fn(f64) -> f64| x.iter().map(|v| f(f64::from(*v))).sum::<f64>() / width as f64;
            let centre = if form == NormForm::Layer { mean(&|v| v) } else { 0.0 };
            let deviation = (mean(&|v| (v - centre).powi(2)) + f64::from(EPS)).sqrt();
            for i in 0..width {
                let plain = (f64::from(x[i]) - centre) / deviation * f64::from(weight[i]);
                let want = if form == NormForm::Layer { plain + f64::from(bias[i]) } else { plain };
                // What the mean loses by its rounding is an absolute error of each value.
                let lost = centre.abs() * 1e-6 / deviation * f64::from(weight[i].abs());
                near("norm", full[row * width + i], want, (plain.abs() + want.abs()) * 4e-6 + lost);
            }
            let alone = case.buffer(x, width, Kind::Full);
            case.backend.norm(&alone, &norm, 1, &mut out).expect("a norm");
            let alone = case.read(&mut out, 1);
            same_bits("a norm alone", &alone, &all[row * width..][..width]);
        }
    }
}

pub fn sums<B: Backend>(case: &mut Case<B>) {
    for (n, cols) in [(1, 3), (4, 48), (3, 70)] {
        let (x, y, bias) = (case.random.values(n * cols), case.random.values(n * cols), case.random.values(cols));
        let vector = case.backend.vector(&bias).expect("a vector");
        let (mut sum, term) = (case.buffer(&x, cols, Kind::Full), case.buffer(&y, cols, Kind::Full));
        case.backend.add(&mut sum, &term, None, n).expect("a sum");
        case.backend.add(&mut sum, &term, Some(&vector), n - 1).expect("a sum");
        let got = case.read(&mut sum, n);
        let want: Vec<f32> = (0..n * cols)
            .map(|i| if i < (n - 1) * cols { x[i] + y[i] + (y[i] + bias[i % cols]) } else { x[i] + y[i] })
            .collect();
        same_bits("add", &got, &want);

        let mut chosen = case.empty(2, cols, Kind::Full);
        case.backend.select(&sum, &[n as u32 - 1, 0], &mut chosen).expect("rows");
        let (got, sum) = (case.read(&mut chosen, 2), case.read(&mut sum, n));
        same_bits("select", &got, &[&sum[(n - 1) * cols..], &sum[..cols]].concat());

        let (mut x, mut chosen) = (case.buffer(&x, cols, Kind::Input), case.empty(2, cols, Kind::Input));
        case.backend.select(&x, &[n as u32 - 1, 0], &mut chosen).expect("rows");
        let (got, x) = (case.read(&mut chosen, 2), case.read(&mut x, n));
        same_bits("select of inputs", &got, &[&x[(n - 1) * cols..], &x[..cols]].concat());
    }
}

/// Parts of a sum over ranks: the tree's bits, whatever else lies behind.
pub fn parts<B: Backend>(case: &mut Case<B>) {
    for (parts, rows, cols) in [(1, 2, 5), (2, 1, 130), (4, 3, 33), (8, 2, 64), (16, 1, 7)] {
        let values = rows * cols;
        let x = case.random.values((parts * rows + 1) * cols);
        let (mut all, mut out) = (case.buffer(&x, cols, Kind::Full), case.buffer(&x, cols, Kind::Full));
        case.backend.sum_parts(&mut all, parts, rows, &mut out).expect("a sum of parts");
        let mut terms: Vec<Vec<f32>> = x[..parts * values].chunks(values).map(<[f32]>::to_vec).collect();
        while terms.len() > 1 {
            let pairs = terms.chunks(2);
            terms = pairs.map(|pair| pair[0].iter().zip(&pair[1]).map(|(a, b)| a + b).collect()).collect();
        }
        let got = case.read(&mut out, rows + 1);
        same_bits("sum_parts", &got, &[&terms[0][..], &x[values..values + cols]].concat());
        assert!(case.backend.sum_parts(&mut all, 3, 1, &mut out).is_err(), "three have no balanced sum");
    }
}

const CLAMPED: Activation = Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 };

/// What an activation makes of one gate and one up, or of a value without a gate.
fn activated(activation: Activation, gate: f64, up: Option<f64>) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match activation {
        Activation::Silu => gate * sigmoid(gate) * up.unwrap_or(1.0),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
            // 1 + tanh(u), without what it loses near -1.
            gate / 2.0 * (2.0 * sigmoid(2.0 * inner)) * up.unwrap_or(1.0)
        }
        Activation::ClampedSwiglu { alpha, limit } => {
            let (gate, limit) = (gate.min(f64::from(limit)), f64::from(limit));
            gate * sigmoid(f64::from(alpha) * gate) * (up.unwrap_or(0.0).clamp(-limit, limit) + 1.0)
        }
    }
}

pub fn activations<B: Backend>(case: &mut Case<B>) {
    for (n, cols) in [(1, 3), (4, 48), (3, 70)] {
        let mut x: Vec<f32> = case.random.values(n * 2 * cols).iter().map(|v| v * 6.0).collect();
        // Far out, and as near to zero as can be.
        let special = [0.0, -0.0, 60.0, -60.0, 1e20, -1e20, 3e38, -3e38, 1e-38, -1e-42];
        let most = special.len().min(cols);
        x[..most].copy_from_slice(&special[..most]);
        for (activation, gated) in [
            (Activation::Silu, true),
            (Activation::GeluTanh, true),
            (CLAMPED, true),
            (Activation::Silu, false),
            (Activation::GeluTanh, false),
        ] {
            let (width, n) = if gated { (2 * cols, n) } else { (cols, 2 * n) };
            let input = case.buffer(&x, width, Kind::Full);
            let mut out = case.empty(n, cols, Kind::Input);
            case.backend.activate(&input, activation, n, &mut out).expect("activations");
            let all = case.read(&mut out, n);
            for (i, got) in all.iter().enumerate() {
                let at = i / cols * width + i % cols;
                let (gate, up) = (f64::from(x[at]), gated.then(|| f64::from(x[at + cols])));
                let want = activated(activation, gate, up);
                if want.abs() > f64::from(f32::MAX) {
                    assert!(got.is_infinite() && (*got > 0.0) == (want > 0.0), "{activation:?} of {gate}: {got}");
                } else {
                    // An exponential's large argument has a large last place. It ends at e^-87, below which a gate is
                    // taken for closed.
                    let closed = gate.abs() * up.unwrap_or(1.0).abs().max(1.0) * 2e-38;
                    let allowed = want.abs() * (case.unit() + 2e-5) + closed + 1e-30;
                    near(&format!("{activation:?} of {gate} and {up:?}"), *got, want, allowed);
                }
            }
            let alone = case.buffer(&x[(n - 1) * width..][..width], width, Kind::Full);
            case.backend.activate(&alone, activation, 1, &mut out).expect("activations");
            let alone = case.read(&mut out, 1);
            same_bits("an activation alone", &alone, &all[(n - 1) * cols..]);
        }
    }
}

/// What is done at once is what two steps give, bit for bit.
pub fn products_and_activations<B: Backend>(case: &mut Case<B>) {
    for (n, inputs, channels) in [(1, 96, 64), (3, 70, 128), (130, 64, 192), (9, 33, 40)] {
        let (matrix, _) = case.matrix(2 * channels, inputs, 1);
        let bias = case.random.values(2 * channels);
        let bias = case.backend.vector(&bias).expect("a vector");
        let x = case.random.values(n * inputs);
        let input = case.buffer(&x, inputs, Kind::Input);
        for activation in [Activation::Silu, Activation::GeluTanh, CLAMPED] {
            for bias in [None, Some(&bias)] {
                let mut between = case.empty(n, 2 * channels, Kind::Full);
                let (mut want, mut got) = (case.empty(n, channels, Kind::Input), case.empty(n, channels, Kind::Input));
                case.backend.matmul(&input, &matrix, bias, n, &mut between).expect("a product");
                case.backend.activate(&between, activation, n, &mut want).expect("activations");
                let mut between = case.empty(n, 2 * channels, Kind::Full);
                let weights = (&matrix, bias);
                let done = case.backend.matmul_activate(&input, weights, activation, n, &mut between, &mut got);
                done.expect("both");
                let (got, want) = (case.read(&mut got, n), case.read(&mut want, n));
                same_bits(&format!("{n} x {inputs} to {channels} channels, {activation:?}"), &got, &want);
            }
        }
    }
}
