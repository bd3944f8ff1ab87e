//! Times the CPU's kernels against this host's own roofs:
//! `cargo run --release -p worker --example ops -- [threads] [bf16 | f32] [vector | amx] [all] [case]`; a case is one of matmuls,
//! formats, experts, grouped, latent, rows, and all without; `all` runs every instruction set (portable code, which calls a function for each multiply-add on x86, is left out).

use model::plan::KernelFamily;
use model::quant::{Dtype, Format};
use model::spec::{Activation, CacheKind, Norm, Span};
use model::step::BlockId;
use std::time::Instant;
use worker::backend::cpu::simd::Level;
use worker::backend::cpu::simd::pool::Pool;
use worker::backend::cpu::{CpuBackend, CpuConfig, Matrix};
use worker::backend::{Backend, GroupedShape, Grouping, Kind, LatentShape, MatrixView, NormWeights, PerHead};
use worker::engine::batch::{Batch, Sequence};
use worker::roofs::{Roofs, median};

/// Prints what a call of so many seconds came to, against the host's roofs.
fn report(roofs: &Roofs, name: &str, seconds: f64, bytes: f64, flops: f64) {
    println!(
        "{name:44} {:10.1} us  {:7.1} GB/s {:4.0}%  {:8.1} GFLOP/s {:4.0}%",
        seconds * 1e6,
        bytes / seconds / 1e9,
        100.0 * bytes / seconds / roofs.bytes,
        flops / seconds / 1e9,
        100.0 * flops / seconds / roofs.flops.unwrap_or(f64::NAN)
    );
}

struct Host {
    backend: CpuBackend,
    roofs: Roofs,
    element: f64,
}

type Case = fn(&mut Host);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let threads = arguments.iter().find_map(|a| a.parse().ok()).unwrap_or(1);
    let dtype = arguments.iter().find_map(|a| a.parse().ok()).unwrap_or(Dtype::Bf16);
    let has = |word: &str| arguments.iter().any(|a| a == word);
    let family = if has("amx") { KernelFamily::Amx } else { KernelFamily::Vector };
    let levels = Level::all();
    for level in &levels[..if has("all") { (levels.len() - 1).max(1) } else { 1 }] {
        let level = *level;
        let config = CpuConfig { dtype, family, threads, spin: 20_000 };
        let backend = CpuBackend::with_level(config, level).expect("a backend");
        let pool = Pool::new(threads, 20_000).expect("threads");
        let roofs = Roofs::of_cpu(&pool, level, family).expect("roofs");
        let (bytes, flops) = (roofs.bytes / 1e9, roofs.flops.unwrap_or(f64::NAN) / 1e9);
        println!(
            "\n{level:?}, {dtype}, {family:?}, {threads} threads: {bytes:.1} GB/s, {flops:.0} GFLOP/s of bf16 pairs"
        );
        let mut host = Host { backend, roofs, element: dtype.bytes() as f64 };
        let cases: [(&str, Case); 6] = [
            ("matmuls", Host::matmuls),
            ("formats", Host::formats),
            ("experts", Host::experts),
            ("grouped", Host::grouped),
            ("latent", Host::latent),
            ("rows", Host::rows),
        ];
        let some = cases.iter().any(|(name, _)| has(name));
        cases.iter().filter(|(name, _)| !some || has(name)).for_each(|(_, run)| run(&mut host));
    }
}

impl Host {
    fn weights(&self, rows: usize, cols: usize) -> Matrix {
        self.weights_cut(rows, cols, 1)
    }

    fn weights_cut(&self, rows: usize, cols: usize, segments: usize) -> Matrix {
        let bytes: Vec<u8> = (0..rows * cols).flat_map(|i| [(i % 251) as u8, 0x3c + (i % 3) as u8]).collect();
        let view = MatrixView::whole(Format::Bf16, &bytes, rows, cols);
        let start = Instant::now();
        let matrix = self.backend.matrix(&[view], segments).expect("a matrix");
        if rows * cols > 30_000_000 {
            println!("pack {rows} x {cols}: {:.2} GB/s", bytes.len() as f64 / start.elapsed().as_secs_f64() / 1e9);
        }
        matrix
    }

    fn matmuls(&mut self) {
        for (outputs, inputs) in [(4096, 4096), (8192, 4096), (1536, 2048)] {
            // Enough copies that no cache holds them all, as in a model.
            let copies = (400_000_000 / (outputs * inputs * 2)).clamp(1, 24);
            let w: Vec<Matrix> = (0..copies).map(|_| self.weights(outputs, inputs)).collect();
            for n in [1, 2, 4, 8, 16, 32, 128, 512] {
                let x = self.backend.buffer(n, inputs, Kind::Input).expect("a buffer");
                let mut y = self.backend.buffer(n, outputs, Kind::Full).expect("a buffer");
                let used = if n > 16 { 1 } else { copies };
                let seconds = median(|| {
                    for w in &w[..used] {
                        self.backend.matmul(&x, w, None, n, &mut y).expect("a product");
                    }
                }) / used as f64;
                let values = (outputs * inputs) as f64;
                let name = format!("matmul {n} x {inputs} -> {outputs}");
                report(&self.roofs, &name, seconds, values * 2.0, values * 2.0 * n as f64);
            }
        }
    }

    /// Formats kept in codes beside bf16: weights a second for one row, operations for many.
    fn formats(&mut self) {
        let (outputs, inputs) = (4096, 4096);
        let kinds = [Format::Bf16, Format::Q8_0, Format::Q4_0, Format::Q4_1, Format::Q4K, Format::Q6K, Format::Iq4Nl];
        for format in kinds.into_iter().chain([Format::Mxfp4]) {
            // Every byte is 0x2c: a small scale in each place that has one.
            let bytes = vec![0x2c; format.bytes(outputs * inputs)];
            let view = MatrixView::whole(format, &bytes, outputs, inputs);
            let w: Vec<Matrix> = (0..12).map(|_| self.backend.matrix(&[view], 1).expect("a matrix")).collect();
            for n in [1, 512] {
                let x = self.backend.buffer(n, inputs, Kind::Input).expect("a buffer");
                let mut y = self.backend.buffer(n, outputs, Kind::Full).expect("a buffer");
                let used = if n > 16 { 1 } else { w.len() };
                let seconds = median(|| {
                    for w in &w[..used] {
                        self.backend.matmul(&x, w, None, n, &mut y).expect("a product");
                    }
                }) / used as f64;
                let values = (outputs * inputs) as f64;
                let name = format!("{format:?} {n}: {:.2} G weights/s", values / seconds / 1e9);
                report(&self.roofs, &name, seconds, w[0].bytes() as f64, values * 2.0 * n as f64);
            }
        }
    }

    fn experts(&mut self) {
        self.experts_of(1, (64, 8), 2048, 1536, 1);
        self.experts_of(16, (32, 4), 512, 1024, 8);
    }

    /// Several layers of so many experts, of which so many are active, whose sums have segments.
    fn experts_of(
        &mut self,
        layers: usize,
        (experts, active): (usize, usize),
        inputs: usize,
        outputs: usize,
        segments: usize,
    ) {
        let layer = || (0..experts).map(|_| self.weights_cut(outputs, inputs, segments)).collect();
        let w: Vec<Vec<Matrix>> = (0..layers).map(|_| layer()).collect();
        for n in [1, 8, 64, 512] {
            let mut grouping = Grouping { offsets: vec![0], ..Grouping::default() };
            for expert in 0..experts {
                let chosen = |row: &u32| (*row as usize * 5 + expert) % experts < active;
                grouping.rows.extend((0..n as u32).filter(chosen));
                grouping.offsets.push(grouping.rows.len() as u32);
            }
            let used = layers * grouping.offsets.windows(2).filter(|o| o[1] > o[0]).count();
            let x = self.backend.buffer(n, inputs, Kind::Input).expect("a buffer");
            let mut y = self.backend.buffer(grouping.rows.len(), outputs, Kind::Full).expect("a buffer");
            let seconds = median(|| {
                w.iter().for_each(|w| self.backend.expert_matmul(&x, w, &grouping, &mut y).expect("products"));
            });
            let values = (outputs * inputs) as f64;
            let flops = values * 2.0 * (layers * grouping.rows.len()) as f64;
            let name = format!("{used} experts, {n} rows x {inputs} in {segments} -> {outputs}");
            report(&self.roofs, &name, seconds, values * 2.0 * used as f64, flops);
        }
    }

    fn batch(sequences: usize, rows: usize, start: usize) -> Batch {
        let blocks = (start + rows).div_ceil(32);
        let spans = (0..sequences)
            .map(|s| {
                let blocks = (0..blocks).map(|b| BlockId((s * blocks + b) as u32)).collect();
                Sequence { row: s * rows, rows, start, blocks }
            })
            .collect();
        let positions = (0..sequences).flat_map(|_| (start..start + rows).map(|p| p as u32)).collect();
        Batch { spans, positions }
    }

    fn grouped(&mut self) {
        let (heads, kv_heads, head_dim) = (32, 4, 128);
        let shape = GroupedShape { heads, kv_heads, head_dim, span: Span::Full, scale: 0.1, rope: None };
        let width = (heads + 2 * kv_heads) * head_dim;
        for (sequences, rows, start) in [(1, 1, 4095), (16, 1, 2047), (1, 512, 0), (1, 512, 3584)] {
            let batch = Host::batch(sequences, rows, start);
            let n = batch.positions.len();
            let blocks = sequences * (start + rows).div_ceil(32);
            let mut cache = self.backend.cache(CacheKind::Paged { kv_heads, head_dim }, blocks).expect("a cache");
            let meta = self.backend.meta(&batch).expect("meta");
            let mut qkv = self.backend.buffer(n, width, Kind::Full).expect("a buffer");
            let mut out = self.backend.buffer(n, heads * head_dim, Kind::Input).expect("a buffer");
            let b = &mut self.backend;
            let prepare =
                median(|| b.grouped_prepare(&shape, &mut qkv, None, None, None, &meta, &mut cache).expect("prepared"));
            let seconds = median(|| {
                b.grouped_attention(&shape, &qkv, PerHead::NONE, &meta, &cache, &mut out).expect("attention")
            });
            let seen = (0..rows).map(|r| start + r + 1).sum::<usize>() * sequences;
            let bytes = (sequences * (start + rows) * 2 * kv_heads * head_dim) as f64 * self.element;
            let name = format!("attention {sequences} x {rows} rows at {start}");
            report(&self.roofs, &name, seconds, bytes, (seen * heads * head_dim * 4) as f64);
            let moved = (n * width) as f64 * 4.0;
            report(&self.roofs, "  its prepare", prepare, moved, 0.0);
        }
    }

    fn latent(&mut self) {
        let shape = LatentShape {
            heads: 16,
            kv_rank: 512,
            nope_dim: 128,
            rope_dim: 64,
            value_dim: 128,
            scale: 0.1,
            rope: model::rope::Rope {
                dims: 64,
                theta: 1e4,
                layout: model::rope::Layout::Interleaved,
                scaling: model::rope::Scaling::None,
            },
        };
        let absorb: Vec<Matrix> = (0..shape.heads).map(|_| self.weights(512, 128)).collect();
        let expand: Vec<Matrix> = (0..shape.heads).map(|_| self.weights(128, 512)).collect();
        for (sequences, rows, start) in [(1, 1, 4095), (1, 256, 0)] {
            let batch = Host::batch(sequences, rows, start);
            let n = batch.positions.len();
            let kind = CacheKind::Latent { kv_rank: 512, rope_dim: 64 };
            let cache = self.backend.cache(kind, sequences * (start + rows).div_ceil(32)).expect("a cache");
            let meta = self.backend.meta(&batch).expect("meta");
            let q = self.backend.buffer(n, shape.heads * 192, Kind::Full).expect("a buffer");
            let mut out = self.backend.buffer(n, shape.heads * 128, Kind::Input).expect("a buffer");
            let b = &mut self.backend;
            let attend =
                || b.latent_attention(&shape, &q, &absorb, &expand, &meta, &cache, &mut out).expect("attention");
            let seconds = median(attend);
            let seen = (0..rows).map(|r| start + r + 1).sum::<usize>() * sequences;
            let bytes = (sequences * (start + rows) * 576) as f64 * self.element + 4.0 * 16.0 * 65536.0;
            let flops = (seen * shape.heads * (576 + 512) * 2 + n * 16 * 4 * 65536) as f64;
            report(&self.roofs, &format!("latent {sequences} x {rows} rows at {start}"), seconds, bytes, flops);
        }
    }

    fn rows(&mut self) {
        for n in [1, 512] {
            let cols = 4096;
            let b = &mut self.backend;
            let weight = b.vector(&vec![1.0; cols]).expect("a vector");
            let norm = NormWeights { norm: Norm::rms(1e-6), weight, bias: None };
            let mut x = b.buffer(n, cols, Kind::Full).expect("a buffer");
            let y = b.buffer(n, cols, Kind::Full).expect("a buffer");
            let mut half = b.buffer(n, cols / 2, Kind::Input).expect("a buffer");
            let mut input = b.buffer(n, cols, Kind::Input).expect("a buffer");
            let values = (n * cols) as f64;
            let seconds = median(|| b.norm(&x, &norm, n, &mut input).expect("norms"));
            report(&self.roofs, &format!("norm {n} x {cols}"), seconds, values * (4.0 + self.element), values * 4.0);
            let seconds = median(|| b.add(&mut x, &y, None, n).expect("sums"));
            report(&self.roofs, &format!("add {n} x {cols}"), seconds, values * 12.0, values);
            let seconds = median(|| b.activate(&x, Activation::Silu, n, &mut half).expect("activations"));
            report(
                &self.roofs,
                &format!("silu {n} x {cols}"),
                seconds,
                values * (4.0 + self.element / 2.0),
                values * 10.0,
            );
        }
    }
}
