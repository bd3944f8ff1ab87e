//! Multiplications, norms, sums and activations.

use super::{Case, near, product, same_bits, view};
use crate::backend::{Backend, Kind, MatrixView};
use half::{bf16, f16};
use model::quant::Format;
use model::spec::Activation;

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
    for (n, cols, first, width) in [(1, 1, 0, 1), (3, 40, 0, 40), (4, 100, 7, 64), (2, 300, 17, 33), (5, 256, 0, 256)] {
        let x = case.random.values(n * cols);
        let weight = case.random.values(width);
        let vector = case.backend.vector(&weight).expect("a vector");
        let input = case.buffer(&x, cols, Kind::Full);
        let mut out = case.empty(n, width, Kind::Input);
        case.backend.norm_columns(&input, first, &vector, 1e-5, n, &mut out).expect("norms");
        let all = case.read(&mut out, n);
        for row in 0..n {
            let x = &x[row * cols + first..][..width];
            let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / width as f64;
            for i in 0..width {
                let want = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
                near("norm", all[row * width + i], want, want.abs() * (case.unit() + 4e-6));
            }
            let alone = case.buffer(x, width, Kind::Full);
            case.backend.norm(&alone, &vector, 1e-5, 1, &mut out).expect("a norm");
            let alone = case.read(&mut out, 1);
            same_bits("a norm alone", &alone, &all[row * width..][..width]);
        }
    }
}

pub fn sums_and_activations<B: Backend>(case: &mut Case<B>) {
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

        let gates: Vec<f32> = case.random.values(n * 2 * cols).iter().map(|v| v * 6.0).collect();
        let input = case.buffer(&gates, 2 * cols, Kind::Full);
        let mut out = case.empty(n, cols, Kind::Input);
        case.backend.activate(&input, Activation::Silu, n, &mut out).expect("activations");
        let got = case.read(&mut out, n);
        for (i, got) in got.iter().enumerate() {
            let at = i / cols * 2 * cols + i % cols;
            let (gate, up) = (f64::from(gates[at]), f64::from(gates[at + cols]));
            let want = gate / (1.0 + (-gate).exp()) * up;
            near("silu", *got, want, want.abs() * (case.unit() + 1e-6) + 1e-30);
        }

        let mut chosen = case.empty(2, cols, Kind::Full);
        case.backend.select(&sum, &[n as u32 - 1, 0], &mut chosen).expect("rows");
        let (got, sum) = (case.read(&mut chosen, 2), case.read(&mut sum, n));
        same_bits("select", &got, &[&sum[(n - 1) * cols..], &sum[..cols]].concat());
    }
}
