use super::{Value, spec};
use crate::error::SpecError;
use crate::rope::{Layout, Scaling};
use crate::spec::{Branch, Mixer, ModelSpec};
use std::collections::BTreeMap;

fn file(architecture: &str, more: &[(&str, Value)]) -> BTreeMap<String, Value> {
    let own = [
        ("block_count", Value::U64(3)),
        ("context_length", Value::U64(2048)),
        ("embedding_length", Value::U64(64)),
        ("feed_forward_length", Value::U64(160)),
        ("attention.head_count", Value::U64(8)),
        ("attention.head_count_kv", Value::U64(2)),
        ("attention.layer_norm_rms_epsilon", Value::F64(1e-5)),
        ("rope.dimension_count", Value::U64(8)),
        ("rope.freq_base", Value::F64(500_000.0)),
    ];
    let mut map: BTreeMap<String, Value> =
        own.into_iter().chain(more.iter().cloned()).map(|(k, v)| (format!("{architecture}.{k}"), v)).collect();
    let tokens = vec![Value::Text("t".into()); 300];
    map.insert("general.architecture".into(), Value::Text(architecture.into()));
    map.insert("general.file_type".into(), Value::U64(2));
    map.insert("tokenizer.ggml.tokens".into(), Value::List(tokens));
    map.insert("tokenizer.ggml.eos_token_id".into(), Value::U64(7));
    map.insert("tokenizer.ggml.eot_token_id".into(), Value::U64(9));
    map
}

fn read(map: &BTreeMap<String, Value>, tensors: &[&str]) -> Result<ModelSpec, SpecError> {
    spec(map, &|name| tensors.contains(&name), None)
}

#[test]
fn a_llama_file_rotates_interleaved_and_ties_a_head_it_lacks() {
    let found = read(&file("llama", &[]), &[]).unwrap();
    assert_eq!((found.vocab, found.layers.len(), found.head.tied), (300, 3, true));
    assert_eq!(found.end_tokens, [7, 9]);
    let Mixer::Grouped(g) = &found.layers[0].mixer else { panic!("not grouped") };
    let rope = g.rope.as_ref().unwrap();
    assert_eq!((g.heads, g.kv_heads, g.head_dim, g.qkv_bias), (8, 2, 8, false));
    assert_eq!((rope.layout, rope.theta, rope.scaling.clone()), (Layout::Interleaved, 5e5, Scaling::None));
    assert!(!read(&file("llama", &[]), &["output.weight"]).unwrap().head.tied);
}

#[test]
fn a_qwen_file_rotates_halves_and_has_biases_where_it_holds_them() {
    let found = read(&file("qwen2", &[]), &["blk.0.attn_q.bias"]).unwrap();
    let Mixer::Grouped(g) = &found.layers[0].mixer else { panic!("not grouped") };
    assert!(g.qkv_bias && !g.out_bias && g.qk_norm.is_none());
    assert_eq!(g.rope.as_ref().unwrap().layout, Layout::Half);
}

#[test]
fn stacked_experts_make_a_mixture() {
    let more = [
        ("expert_count", Value::U64(8)),
        ("expert_used_count", Value::U64(2)),
        ("expert_feed_forward_length", Value::U64(32)),
    ];
    let map = file("qwen3moe", &more);
    let found = read(&map, &["blk.0.ffn_gate_exps.weight"]).unwrap();
    let Branch::Moe(m) = &found.layers[2].branches[0] else { panic!("not a mixture") };
    assert_eq!((m.experts, m.active, m.intermediate, m.router.renormalise), (8, 2, 32, true));
    let Mixer::Grouped(g) = &found.layers[0].mixer else { panic!("not grouped") };
    assert!(g.qk_norm.is_some());
    let text = read(&map, &[]).unwrap_err().to_string();
    assert!(text.contains("stacked"), "{text}");
}

#[test]
fn frequency_factors_must_come_with_the_metadata() {
    let map = file("llama", &[]);
    let text = read(&map, &["rope_freqs.weight"]).unwrap_err().to_string();
    assert!(text.contains("rope_freqs.weight"), "{text}");
    let by = [1.0, 1.0, 3.5, 8.0];
    let found = spec(&map, &|name| name == "rope_freqs.weight", Some(&by)).unwrap();
    let expected = Scaling::Factors { by: by.to_vec() };
    assert_eq!(found.layers[0].mixer.rope().unwrap().scaling, expected);
    let text = spec(&map, &|name| name == "rope_freqs.weight", Some(&by[..3])).unwrap_err().to_string();
    assert!(text.contains("one for each rotated pair"), "{text}");
}

#[test]
fn scaling_dialects_are_read() {
    let text = |s: &str| Value::Text(s.into());
    let linear = [("rope.scaling.type", text("linear")), ("rope.scaling.factor", Value::F64(2.0))];
    let found = read(&file("llama", &linear), &[]).unwrap();
    assert_eq!(found.layers[0].mixer.rope().unwrap().scaling, Scaling::Linear { factor: 2.0 });
    let yarn = [
        ("rope.scaling.type", text("yarn")),
        ("rope.scaling.factor", Value::F64(4.0)),
        ("rope.scaling.original_context_length", Value::U64(512)),
    ];
    let found = read(&file("qwen2", &yarn), &[]).unwrap();
    let Scaling::Yarn { original, amplitude, .. } = found.layers[0].mixer.rope().unwrap().scaling else {
        panic!("not yarn")
    };
    assert_eq!(original, 512);
    assert!((amplitude - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);
}

#[test]
fn refusals_name_the_key() {
    let cases = [
        (file("gemma3", &[]), "gemma3"),
        (file("llama", &[("attn_logit_softcapping", Value::F64(50.0))]), "llama.attn_logit_softcapping"),
        (file("llama", &[("rope.scaling.type", Value::Text("longrope".into()))]), "longrope"),
        (file("llama", &[("block_count", Value::U64(1 << 40))]), "llama.block_count"),
        (file("llama", &[("attention.head_count", Value::Text("8".into()))]), "llama.attention.head_count"),
        (file("llama", &[("attention.head_count_kv", Value::List(vec![Value::U64(1), Value::U64(2)]))]), "every layer"),
        (file("llama", &[("attention.value_length", Value::U64(4))]), "value_length"),
        (file("qwen3moe", &[("expert_count", Value::U64(8)), ("expert_gating_func", Value::U64(2))]), "stacked"),
    ];
    for (map, said) in cases {
        let text = read(&map, &[]).unwrap_err().to_string();
        assert!(text.contains(said), "{text:?} does not say {said:?}");
    }
    assert!(matches!(read(&BTreeMap::new(), &[]), Err(SpecError::Missing { .. })));
}

#[test]
fn deepseek_files_of_both_ages_describe_one_attention() {
    let own = |more: &[(&str, u64)]| {
        let shared = [
            ("attention.kv_lora_rank", 32),
            ("attention.q_lora_rank", 48),
            ("expert_count", 8),
            ("expert_used_count", 2),
            ("expert_feed_forward_length", 24),
            ("expert_shared_count", 1),
            ("leading_dense_block_count", 1),
        ];
        let more: Vec<(&str, Value)> = shared.iter().chain(more).map(|(key, n)| (*key, Value::U64(*n))).collect();
        file("deepseek2", &more)
    };
    let old = own(&[("attention.head_count_kv", 8), ("attention.key_length", 24), ("attention.value_length", 16)]);
    let new = own(&[
        ("attention.head_count_kv", 1),
        ("attention.key_length", 40),
        ("attention.value_length", 32),
        ("attention.key_length_mla", 24),
        ("attention.value_length_mla", 16),
    ]);
    let latent = |map: &BTreeMap<String, Value>, tensors: &[&str]| {
        let spec = read(map, tensors).unwrap();
        assert!(matches!(spec.layers[0].branches[0], Branch::Dense(_)));
        let Branch::Moe(m) = &spec.layers[1].branches[0] else { panic!("not a mixture") };
        assert_eq!((m.shared.as_ref().unwrap().intermediate, m.router.renormalise), (24, false));
        let Mixer::Latent(l) = spec.layers[0].mixer.clone() else { panic!("not latent") };
        l
    };
    let (old, new) = (latent(&old, &[]), latent(&new, &["blk.0.attn_k_b.weight"]));
    assert_eq!((old.nope_dim, old.rope_dim, old.value_dim, old.halves), (16, 8, 16, false));
    assert_eq!(crate::spec::Latent { halves: true, ..old }, new);

    for (more, said) in [
        ([("expert_gating_func", 4), ("attention.key_length", 24)], "expert_gating_func = 4"),
        ([("expert_group_count", 4), ("expert_group_used_count", 2)], "scored by softmax"),
        ([("attention.head_count_kv", 2), ("attention.key_length", 24)], "attention.head_count_kv"),
        ([("nextn_predict_layers", 3), ("attention.key_length", 24)], "nextn_predict_layers = 3"),
    ] {
        let mut all =
            vec![("attention.key_length", 24), ("attention.value_length", 16), ("attention.head_count_kv", 8)];
        all.extend(more);
        let text = read(&own(&all), &[]).unwrap_err().to_string();
        assert!(text.contains(said), "{said}: {text}");
    }
}
