use super::spec;
use crate::error::SpecError;
use crate::rope::{Layout, Scaling};
use crate::samples;
use crate::spec::{Branch, Grouped, Latent, Mixer, ModelSpec, Moe, Span};
use serde_json::{Map, Value, json};

/// The sample with some keys set (null removes).
fn changed(name: &str, changes: &Value) -> Result<ModelSpec, SpecError> {
    let mut map: Map<String, Value> = serde_json::from_str(samples::text(name)).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        map.insert(key.clone(), value.clone());
    }
    spec(&Value::Object(map).to_string(), None)
}

fn without(name: &str, key: &str) -> Result<ModelSpec, SpecError> {
    let mut map: Map<String, Value> = serde_json::from_str(samples::text(name)).unwrap();
    assert!(map.remove(key).is_some(), "{name} has no {key}");
    spec(&Value::Object(map).to_string(), None)
}

fn grouped(spec: &ModelSpec, layer: usize) -> &Grouped {
    match &spec.layers[layer].mixer {
        Mixer::Grouped(g) => g,
        Mixer::Latent(_) => panic!("layer {layer} is latent"),
    }
}

fn latent(spec: &ModelSpec) -> &Latent {
    match &spec.layers[0].mixer {
        Mixer::Latent(l) => l,
        Mixer::Grouped(_) => panic!("not latent"),
    }
}

fn moe(spec: &ModelSpec, layer: usize) -> Option<&Moe> {
    match &spec.layers[layer].branches[..] {
        [Branch::Moe(m)] => Some(m),
        _ => None,
    }
}

fn assert_refused(result: Result<ModelSpec, SpecError>, parts: &[&str]) {
    let text = result.expect_err("the config must be refused").to_string();
    for part in parts {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
}

#[test]
fn every_sample_becomes_a_spec() {
    for (name, text) in samples::ALL {
        let spec = spec(text, None).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(!spec.layers.is_empty() && !spec.end_tokens.is_empty(), "{name}");
    }
}

#[test]
fn llama_divides_its_hidden_size_among_its_heads() {
    let spec = samples::spec("llama");
    let g = grouped(&spec, 0);
    assert_eq!((g.heads, g.kv_heads, g.head_dim, g.qkv_bias, g.span), (32, 32, 128, false, Span::Full));
    assert_eq!(g.rope.as_ref().unwrap().theta, 1e4);
    assert_eq!((spec.end_tokens, spec.begin_token, spec.positions_max), (vec![2], Some(1), 4096));
}

#[test]
fn biases_and_end_tokens_are_read() {
    let text = samples::text("biased");
    let spec = spec(text, Some(r#"{"eos_token_id": [3, 7], "temperature": 0.6}"#)).unwrap();
    let g = grouped(&spec, 0);
    assert!(g.qkv_bias && g.out_bias);
    assert!(matches!(&spec.layers[0].branches[0], Branch::Dense(d) if d.bias));
    assert_eq!(spec.end_tokens, [2, 3, 7]);
}

#[test]
fn a_null_window_is_none_and_an_absent_one_is_the_default_of_the_class() {
    assert_eq!(grouped(&samples::spec("mistral"), 3).span, Span::Window(4096));
    assert_eq!(grouped(&samples::spec("magistral"), 3).span, Span::Full);
    assert_eq!(grouped(&without("magistral", "sliding_window").unwrap(), 0).span, Span::Window(4096));
    assert_eq!(grouped(&without("mixtral", "sliding_window").unwrap(), 0).span, Span::Full);
}

#[test]
fn qwen_windows_begin_at_their_layer() {
    let on = json!({"use_sliding_window": true, "sliding_window": 27, "max_window_layers": 2});
    let spec = changed("qwen2", &on).unwrap();
    let spans: Vec<Span> = (0..4).map(|l| grouped(&spec, l).span).collect();
    assert_eq!(spans, [Span::Full, Span::Full, Span::Window(27), Span::Window(27)]);
    assert_eq!(grouped(&samples::spec("qwen2"), 23).span, Span::Full);
    assert_eq!(grouped(&samples::spec("tiny_moe"), 0).span, Span::Window(16), "the mixture windows every layer");
}

#[test]
fn layer_types_override_where_windows_begin() {
    let types: Vec<&str> = (0..28).map(|i| if i % 2 == 0 { "sliding_attention" } else { "full_attention" }).collect();
    let on = json!({"use_sliding_window": true, "sliding_window": 27, "layer_types": types});
    let spec = changed("qwen3", &on).unwrap();
    assert_eq!((grouped(&spec, 0).span, grouped(&spec, 1).span), (Span::Window(27), Span::Full));
    assert_refused(changed("qwen3", &json!({"layer_types": types})), &["layer_types", "no sliding window"]);
    assert_refused(changed("qwen3", &json!({"layer_types": ["full_attention"]})), &["1 entries", "28 layers"]);
}

#[test]
fn a_sparse_step_and_listed_layers_choose_the_dense_ones() {
    let spec = samples::spec("tiny_moe");
    let sparse: Vec<bool> = (0..5).map(|l| moe(&spec, l).is_some()).collect();
    assert_eq!(sparse, [false, true, false, false, false]);
    let m = moe(&spec, 1).unwrap();
    assert_eq!((m.experts, m.active, m.intermediate, m.router.renormalise), (12, 3, 40, false));
}

#[test]
fn deepseek_starts_dense_and_scales_its_softmax_by_yarn() {
    let spec = samples::spec("deepseek");
    assert_eq!((0..61).filter(|l| moe(&spec, *l).is_none()).collect::<Vec<_>>(), [0, 1, 2]);
    let m = moe(&spec, 3).unwrap();
    let groups = m.router.groups.unwrap();
    assert_eq!((groups.count, groups.kept, m.shared.as_ref().unwrap().intermediate), (8, 4, 2048));
    let l = latent(&spec);
    let expected = (0.1 * 40f64.ln() + 1.0).powi(2) * 192f64.powf(-0.5);
    assert!((f64::from(l.scale) - expected).abs() < 1e-8);
    assert_eq!((l.query_rank, l.rope.layout, l.rope.dims), (Some(1536), Layout::Interleaved, 64));
    assert!(matches!(l.rope.scaling, Scaling::Yarn { amplitude: 1.0, .. }), "mscale cancels mscale_all_dim");
}

#[test]
fn latent_attention_may_project_queries_directly() {
    let spec = samples::spec("tiny_latent");
    assert_eq!(latent(&spec).query_rank, None);
    assert!((latent(&spec).scale - 24f32.powf(-0.5)).abs() < 1e-7);
    assert_eq!(moe(&spec, 2).unwrap().shared.as_ref().unwrap().intermediate, 48);
}

#[test]
fn the_newer_spelling_of_rope_means_the_same() {
    let older = samples::spec("llama3");
    let newer = json!({"rope_theta": null, "rope_scaling": null, "rope_parameters": {"rope_theta": 500000.0,
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"}});
    assert_eq!(changed("llama3", &newer).unwrap(), older);
    let both = json!({"rope_parameters": {"rope_theta": 1.0e6, "rope_type": "default"}});
    assert_refused(changed("llama3", &both), &["rope_scaling", "rope_parameters is given too"]);
}

#[test]
fn yarn_amplitude_defaults_to_the_papers() {
    let Scaling::Yarn { amplitude, beta_fast, beta_slow, truncate, .. } =
        grouped(&samples::spec("qwen2"), 0).rope.as_ref().unwrap().scaling.clone()
    else {
        panic!("not yarn")
    };
    assert!((amplitude - 1.138_629_436_111_989).abs() < 1e-15);
    assert_eq!((beta_fast, beta_slow, truncate), (32.0, 1.0, true));
}

#[test]
fn every_unread_key_is_named() {
    let extra = json!({"attention_chunk_size": 8192, "final_logit_softcapping": 30.0, "layer_scalar": null});
    assert_refused(changed("llama", &extra), &["attention_chunk_size, final_logit_softcapping;"]);
    let nested = json!({"rope_scaling": {"type": "linear", "factor": 2.0, "low_freq_factor": 1.0}, "query_scale": 2});
    assert_refused(changed("llama", &nested), &["query_scale", "rope_scaling.low_freq_factor"]);
    assert_refused(changed("llama", &json!({"n_routed_experts": 8})), &["n_routed_experts"]);
}

#[test]
fn what_is_not_implemented_is_refused() {
    let cases = [
        ("llama", json!({"hidden_act": "gelu"}), "hidden_act = \"gelu\""),
        ("llama", json!({"pretraining_tp": 2}), "pretraining_tp = 2"),
        ("deepseek", json!({"quantization_config": {"quant_method": "bitsandbytes"}}), "bitsandbytes"),
        ("llama", json!({"rope_scaling": {"type": "longrope", "factor": 2.0}}), "longrope"),
        ("llama", json!({"rope_interleaved": true}), "rope_interleaved"),
        ("deepseek", json!({"attention_bias": true}), "attention_bias"),
        ("deepseek", json!({"scoring_func": "softmax"}), "scoring_func"),
        ("deepseek", json!({"topk_method": "greedy"}), "topk_method"),
        ("deepseek", json!({"num_key_value_heads": 8}), "num_key_value_heads = 8"),
        ("qwen2", json!({"model_type": "gpt_oss"}), "gpt_oss (Qwen2ForCausalLM)"),
        ("qwen2", json!({"architectures": ["Qwen2ForRewardModel"]}), "Qwen2ForRewardModel"),
    ];
    for (name, change, said) in cases {
        assert_refused(changed(name, &change), &[said]);
    }
}

#[test]
fn numbers_that_cannot_be_are_refused_with_both_sides() {
    let cases = [
        ("llama", json!({"hidden_size": 4097}), vec!["hidden_size = 4097", "32 heads"]),
        ("llama", json!({"num_key_value_heads": 5}), vec!["32", "5 key/value heads"]),
        ("llama", json!({"num_attention_heads": 0}), vec!["num_attention_heads = 0"]),
        ("llama", json!({"num_hidden_layers": 1_000_000_000_000_u64}), vec!["num_hidden_layers", "1024"]),
        ("llama", json!({"vocab_size": u64::MAX}), vec!["vocab_size"]),
        ("llama", json!({"hidden_size": -4096}), vec!["hidden_size = -4096"]),
        ("llama", json!({"hidden_size": "4096"}), vec!["hidden_size"]),
        ("llama", json!({"rms_norm_eps": 0.0}), vec!["epsilon = 0"]),
        ("llama", json!({"rope_theta": 0.5}), vec!["rope theta = 0.5"]),
        ("llama", json!({"rope_scaling": {"type": "linear", "factor": 0.0}}), vec!["rope factor = 0"]),
        ("llama", json!({"head_dim": 15}), vec!["rotated channels = 15"]),
        ("llama", json!({"eos_token_id": 32000}), vec!["token id = 32000", "32000 tokens"]),
        ("llama", json!({"eos_token_id": -1}), vec!["eos_token_id = -1"]),
        ("mixtral", json!({"num_experts_per_tok": 9}), vec!["experts a token = 9", "8"]),
        ("deepseek", json!({"n_group": 7}), vec!["expert groups = 7", "256 experts"]),
        ("deepseek", json!({"n_group": 256}), vec!["groups of at least two"]),
        ("deepseek", json!({"n_group": 128, "topk_group": 2}), vec!["experts a token = 8"]),
        ("qwen3_moe", json!({"num_experts": 4096, "num_hidden_layers": 1024}), vec!["experts of all layers"]),
        (
            "llama",
            json!({"hidden_size": 131_072, "intermediate_size": 1_048_576, "num_hidden_layers": 1024}),
            vec!["number of weights"],
        ),
    ];
    for (name, change, said) in cases {
        assert_refused(changed(name, &change), &said);
    }
    assert_refused(without("llama", "rms_norm_eps"), &["rms_norm_eps is missing"]);
    assert_refused(spec("{", None), &["not valid JSON"]);
    assert_refused(spec("[]", None), &["not valid JSON"]);
    assert_refused(spec(samples::text("llama"), Some("[")), &["generation_config.json"]);
}

#[test]
fn no_key_is_both_read_and_harmless() {
    let mut seen = std::collections::BTreeSet::new();
    for key in super::HARMLESS.iter().flat_map(|(_, keys)| keys.iter()) {
        assert!(seen.insert(key), "{key} stands twice");
    }
    for (name, text) in samples::ALL {
        let mut map: Map<String, Value> = serde_json::from_str(text).unwrap();
        map.retain(|key, _| !super::harmless(key));
        let bare = spec(&Value::Object(map).to_string(), None).unwrap();
        assert_eq!(bare, samples::spec(name), "{name}: a harmless key changed the spec");
    }
}
