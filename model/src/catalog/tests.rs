use super::{Entry, Part, Role, TensorDecl, held, ignored, on_stage, settle, stack, tensors};
use crate::cut::{self, Cut, Slice};
use crate::mesh::{Mesh, RankId};
use crate::plan::{KernelFamily, Limits};
use crate::quant::{Dtype, Format};
use crate::samples;
use crate::size::{self, Keeping};
use crate::spec::{ModelSpec, Naming};
use crate::storage::Storage;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::ops::Range;

fn name_of(spec: &ModelSpec, role: Role, layer: Option<usize>, expert: Option<usize>) -> TensorDecl {
    let all = tensors(spec);
    let found = all.iter().find(|t| t.id.role == role && t.id.layer == layer && t.id.expert == expert);
    found.unwrap_or_else(|| panic!("no {role:?} of layer {layer:?}, expert {expert:?}")).clone()
}

#[test]
fn checkpoints_names_are_the_published_ones() {
    let cases = [
        ("llama", Role::Head, None, None, "lm_head.weight", (32000, 4096)),
        ("llama", Role::Down, Some(31), None, "model.layers.31.mlp.down_proj.weight", (4096, 11008)),
        ("qwen2", Role::KeyBias, Some(1), None, "model.layers.1.self_attn.k_proj.bias", (128, 1)),
        ("qwen3", Role::QueryNorm, Some(2), None, "model.layers.2.self_attn.q_norm.weight", (1, 128)),
        ("qwen3_moe", Role::Router, Some(3), None, "model.layers.3.mlp.gate.weight", (128, 4096)),
        (
            "qwen3_moe",
            Role::ExpertUp,
            Some(3),
            Some(127),
            "model.layers.3.mlp.experts.127.up_proj.weight",
            (1536, 4096),
        ),
        ("mixtral", Role::Router, Some(0), None, "model.layers.0.block_sparse_moe.gate.weight", (8, 4096)),
        (
            "mixtral",
            Role::ExpertDown,
            Some(0),
            Some(7),
            "model.layers.0.block_sparse_moe.experts.7.w2.weight",
            (4096, 14336),
        ),
        (
            "mixtral",
            Role::ExpertUp,
            Some(0),
            Some(7),
            "model.layers.0.block_sparse_moe.experts.7.w3.weight",
            (14336, 4096),
        ),
        ("deepseek", Role::KvDown, Some(0), None, "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", (576, 7168)),
        ("deepseek", Role::KvUp, Some(0), None, "model.layers.0.self_attn.kv_b_proj.weight", (32768, 512)),
        ("deepseek", Role::QueryUp, Some(0), None, "model.layers.0.self_attn.q_b_proj.weight", (24576, 1536)),
        (
            "deepseek",
            Role::RouterCorrection,
            Some(60),
            None,
            "model.layers.60.mlp.gate.e_score_correction_bias",
            (1, 256),
        ),
        (
            "deepseek",
            Role::SharedDown,
            Some(3),
            None,
            "model.layers.3.mlp.shared_experts.down_proj.weight",
            (7168, 2048),
        ),
        ("deepseek", Role::PredictorProjection, Some(61), None, "model.layers.61.eh_proj.weight", (7168, 14336)),
        ("deepseek", Role::PredictorNorm, Some(61), None, "model.layers.61.shared_head.norm.weight", (1, 7168)),
        (
            "deepseek",
            Role::ExpertUp,
            Some(61),
            Some(255),
            "model.layers.61.mlp.experts.255.up_proj.weight",
            (2048, 7168),
        ),
    ];
    for (sample, role, layer, expert, name, shape) in cases {
        let decl = name_of(&samples::spec(sample), role, layer, expert);
        assert_eq!((decl.source.name.as_str(), (decl.rows, decl.cols)), (name, shape), "{sample}");
    }
}

#[test]
fn gguf_stacks_its_experts() {
    let spec = ModelSpec { naming: Naming::Gguf, ..samples::spec("qwen3_moe") };
    let decl = name_of(&spec, Role::ExpertGate, Some(2), Some(5));
    assert_eq!(decl.source.name, "blk.2.ffn_gate_exps.weight");
    assert_eq!(decl.source.part, Part { stack: Some(Entry { index: 5, of: 128 }), ..Part::WHOLE });
    assert_eq!(name_of(&spec, Role::Query, Some(2), None).source.name, "blk.2.attn_q.weight");
    assert!(ignored(&spec, "rope_freqs.weight").is_some());
}

#[test]
fn every_tensor_is_declared_once() {
    for (sample, _) in samples::ALL {
        let spec = samples::spec(sample);
        let all = tensors(&spec);
        let names: BTreeSet<&str> = all.iter().map(|t| t.source.name.as_str()).collect();
        let ids: BTreeSet<_> = all.iter().map(|t| t.id).collect();
        assert_eq!((names.len(), ids.len()), (all.len(), all.len()), "{sample}");
        assert_eq!(all.iter().any(|t| t.id.role == Role::Head), !spec.head.tied, "{sample}");
        for decl in &all {
            assert!(ignored(&spec, &decl.source.name).is_none(), "{} is both declared and ignored", decl.source.name);
        }
    }
}

#[test]
fn published_sizes_come_out_of_the_declarations() {
    // Parameters as their authors state them, in billions.
    let cases = [("llama", 6.74), ("llama3", 405.9), ("mixtral", 46.7), ("deepseek", 671.0), ("qwen3_moe", 235.1)];
    for (sample, billions) in cases {
        let weights: usize =
            tensors(&samples::spec(sample).predicting(0).unwrap()).iter().map(|t| t.rows * t.cols).sum();
        assert!((weights as f64 / 1e9 - billions).abs() < 0.005 * billions, "{sample} has {weights} weights");
    }
}

#[test]
fn only_known_extras_are_ignored() {
    let deepseek = samples::spec("deepseek").predicting(0).unwrap();
    assert!(ignored(&deepseek, "model.layers.61.eh_proj.weight").is_some());
    assert!(ignored(&deepseek, "model.layers.60.eh_proj.weight").is_none());
    let predicting = samples::spec("deepseek");
    assert!(ignored(&predicting, "model.layers.61.embed_tokens.weight").is_some());
    assert!(ignored(&predicting, "model.layers.61.shared_head.head.weight").is_some());
    assert!(ignored(&predicting, "model.layers.61.eh_proj.bias").is_none());
    assert!(ignored(&predicting, "model.layers.62.eh_proj.weight").is_some());
    assert!(ignored(&samples::spec("llama"), "model.layers.32.mlp.up_proj.weight").is_none());
    assert!(ignored(&samples::spec("llama"), "model.layers.0.self_attn.rotary_emb.inv_freq").is_some());
    assert!(ignored(&samples::spec("smollm2"), "lm_head.weight").is_some());
    assert!(ignored(&samples::spec("llama"), "lm_head.weight").is_none());
    assert!(ignored(&samples::spec("llama"), "model.layers.0.self_attn.q_proj.bias").is_none());
}

#[test]
fn a_predictor_that_is_left_out_of_the_files_is_dropped() {
    let has_all = |name: &str| tensors(&samples::spec("deepseek")).iter().any(|t| t.source.name == name);
    let mut whole = samples::spec("deepseek");
    settle(&mut whole, &has_all);
    assert_eq!(whole, samples::spec("deepseek"));
    let mut without = samples::spec("deepseek");
    settle(&mut without, &|name| has_all(name) && !name.starts_with("model.layers.61."));
    assert_eq!(without, samples::spec("deepseek").predicting(0).unwrap());
    let refused = without.predicting(1).unwrap_err().to_string();
    assert!(refused.contains("number of predictors = 1") && refused.contains("the model has 0"), "{refused}");
}

#[test]
fn predictors_lie_on_the_last_stage_with_a_table_of_their_own() {
    let spec = samples::spec("deepseek");
    let stages = [0..30, 30..61];
    let on = |spec: &ModelSpec, role, layer| {
        let decl = name_of(spec, role, layer, None);
        [0, 1].map(|stage| on_stage(spec, &decl.id, &stages, stage))
    };
    assert_eq!(on(&spec, Role::PredictorProjection, Some(61)), [false, true]);
    assert_eq!(on(&spec, Role::KvUp, Some(61)), [false, true]);
    assert_eq!(on(&spec, Role::Embedding, None), [true, true]);
    assert_eq!(on(&spec.predicting(0).unwrap(), Role::Embedding, None), [true, false]);
}

#[test]
fn a_tied_table_lies_on_both_ends_of_a_pipeline() {
    let stages = [0..10, 10..20, 20..30];
    let found = |sample: &str, role| {
        let spec = samples::spec(sample);
        let decl = name_of(&spec, role, None, None);
        (0..3).map(|stage| on_stage(&spec, &decl.id, &stages, stage)).collect::<Vec<_>>()
    };
    assert_eq!(found("smollm2", Role::Embedding), [true, false, true]);
    assert_eq!(found("llama", Role::Embedding), [true, false, false]);
    assert_eq!(found("llama", Role::Head), [false, false, true]);
    assert_eq!(found("smollm2", Role::FinalNorm), [false, false, true]);
}

/// Layers dealt out as evenly as they go.
fn even_stages(layers: usize, stages: usize) -> Vec<Range<usize>> {
    (0..stages).map(|s| layers * s / stages..layers * (s + 1) / stages).collect()
}

/// How often each element must be held among the `ranks` of a stage.
fn copies(cut: Cut, mesh: &Mesh) -> usize {
    match cut {
        Cut::Replicate => mesh.data * mesh.tensor,
        Cut::KvHeads { heads } => mesh.data * (mesh.tensor / heads).max(1),
        Cut::Expert { .. } if mesh.expert > 1 => 1,
        Cut::Columns { .. } | Cut::Rows { .. } | Cut::Vocab | Cut::Expert { .. } => mesh.data,
    }
}

/// Slices are equal or disjoint, and together hold every element `copies` times.
fn assert_tiles(decl: &TensorDecl, slices: &[Slice], copies: usize) {
    let area = |s: &Slice| s.rows.len() * s.cols.len();
    let held: usize = slices.iter().map(area).sum();
    assert_eq!(held, decl.rows * decl.cols * copies, "{}", decl.source.name);
    for (i, a) in slices.iter().enumerate() {
        assert!(a.rows.end <= decl.rows && a.cols.end <= decl.cols);
        let same = slices.iter().filter(|b| *b == a).count();
        assert_eq!(same, copies, "{}: a slice is held by {same} ranks", decl.source.name);
        for b in &slices[i + 1..] {
            let apart = |x: &Range<usize>, y: &Range<usize>| x.end <= y.start || y.end <= x.start;
            assert!(a == b || apart(&a.rows, &b.rows) || apart(&a.cols, &b.cols), "{}: overlap", decl.source.name);
        }
    }
}

fn a_mesh() -> impl Strategy<Value = Mesh> {
    let axes = (1usize..=8, 1usize..=8, 0u32..=3, 1usize..=8);
    let mesh = axes.prop_filter_map("more than 8 ranks, or no mesh", |(pipeline, data, log, expert)| {
        let mesh = Mesh::new(pipeline, data, 1 << log, expert).ok()?;
        (mesh.ranks() <= 8).then_some(mesh)
    });
    mesh.boxed()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn slices_tile_every_tensor_and_planned_bytes_are_their_sum(sample in 0..samples::ALL.len(), mesh in a_mesh()) {
        let mut spec = samples::spec(samples::ALL[sample].0);
        spec.layers.truncate(5);
        prop_assume!(cut::check(&spec, &mesh).is_ok());
        let stages = even_stages(spec.layers.len(), mesh.pipeline);
        let limits = Limits { model_len_max: 64, step_tokens_max: 8, step_sequences_max: 4, blocks: 1 };
        let storage = &Storage::stated(&spec, Format::Bf16);
        let keeping = Keeping { storage, dtype: Dtype::F32, family: KernelFamily::Vector };
        let held: Vec<_> = mesh.all().map(|rank| held(&spec, &mesh, &stages, rank)).collect();
        for (rank, held) in mesh.all().zip(&held) {
            let place = mesh.place(rank);
            let planned = size::rank(&spec, &mesh, place, stages[place.stage].clone(), keeping, &limits).weights;
            let mut stacks = std::collections::BTreeMap::new();
            for (decl, slice) in held {
                let (of, expert) = (decl.id.layer, decl.id.expert);
                let slices: &mut Vec<_> = &mut stacks.entry((of, expert, stack(decl.id.role))).or_insert((decl, vec![])).1;
                slices.push((decl.id.role, slice.clone()));
            }
            let bytes = stacks.iter().map(|((layer, ..), (decl, slices))| {
                let (all, ranks) = cut::summed(decl.cut, decl.cols, &mesh);
                size::kept_bytes(slices, all / ranks, (&spec, *layer), keeping) as u64
            });
            prop_assert_eq!(bytes.sum::<u64>(), planned);
        }
        let mut slices = std::collections::BTreeMap::new();
        for (rank, held) in mesh.all().zip(&held) {
            for (decl, slice) in held {
                let stage = mesh.place(rank).stage;
                slices.entry((stage, decl.id)).or_insert((decl, Vec::new())).1.push(slice.clone());
            }
        }
        for ((stage, id), (decl, slices)) in &slices {
            assert!(on_stage(&spec, id, &stages, *stage));
            assert_tiles(decl, slices, copies(decl.cut, &mesh));
        }
        let declared: usize = tensors(&spec)
            .iter()
            .map(|decl| (0..mesh.pipeline).filter(|stage| on_stage(&spec, &decl.id, &stages, *stage)).count())
            .sum();
        prop_assert_eq!(slices.len(), declared, "a tensor that no rank holds");
    }

    #[test]
    fn a_checked_mesh_gives_whole_canonical_segments(sample in 0..samples::ALL.len(), mesh in a_mesh()) {
        let mut spec = samples::spec(samples::ALL[sample].0);
        spec.layers.truncate(5);
        prop_assume!(cut::check(&spec, &mesh).is_ok());
        for decl in tensors(&spec) {
            let owned = match decl.cut {
                Cut::Columns { unit } => cut::segments(decl.rows / unit) % mesh.tensor,
                Cut::Rows { unit } => cut::segments(decl.cols / unit) % mesh.tensor,
                Cut::Expert { of, .. } if mesh.expert > 1 => cut::segments(of) % (mesh.expert / mesh.data),
                Cut::Expert { .. } => 0,
                Cut::Replicate | Cut::KvHeads { .. } | Cut::Vocab => 0,
            };
            prop_assert_eq!(owned, 0, "{} on {}", decl.source.name, mesh);
        }
    }
}

#[test]
fn heads_that_do_not_divide_say_which_meshes_would_work() {
    let check = |sample: &str, mesh: Result<Mesh, _>| {
        cut::check(&samples::spec(sample), &mesh.unwrap()).map_err(|e: crate::SpecError| e.to_string())
    };
    let text = check("smollm2", Mesh::new(1, 1, 2, 1)).unwrap_err();
    assert!(text.contains("9 query heads") && text.contains("tp 1 would work"), "{text}");
    let text = check("qwen2", Mesh::new(1, 1, 4, 1)).unwrap_err();
    assert!(text.contains("14 query heads") && text.contains("tp 1, 2 would work"), "{text}");
    let text = check("llama", Mesh::new(33, 1, 1, 1)).unwrap_err();
    assert!(text.contains("32 layers") && text.contains("pp 33"), "{text}");
    let text = check("llama", Mesh::new(1, 2, 1, 2)).unwrap_err();
    assert!(text.contains("without experts"), "{text}");
    let text = check("tiny_moe", Mesh::new(1, 2, 4, 8)).unwrap_err();
    assert!(text.contains("12 experts are not a multiple of ep 8"), "{text}");
    check("smollm2", Mesh::new(3, 1, 1, 1)).unwrap();
    check("smollm2", Mesh::new(1, 3, 1, 1)).unwrap();
    check("deepseek", Mesh::new(1, 2, 8, 8)).unwrap();
    check("llama3", Mesh::new(2, 1, 8, 1)).unwrap();
}

#[test]
fn ranks_beyond_the_key_heads_share_them() {
    let mesh = Mesh::new(1, 1, 8, 1).unwrap();
    let spec = samples::spec("qwen3_moe");
    let keys = |rank| {
        let one = ModelSpec { layers: spec.layers[..1].to_vec(), ..spec.clone() };
        let all = held(&one, &mesh, &even_stages(1, 1), RankId(rank));
        all.into_iter().find(|(d, _)| d.id.role == Role::Key).unwrap().1.rows
    };
    assert_eq!((keys(0), keys(1), keys(2), keys(7)), (0..128, 0..128, 128..256, 384..512));
}
