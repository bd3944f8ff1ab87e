//! Configs in the shape of published ones, for tests: each family at its real size, and small ones with odd numbers.

use crate::hf;
use crate::spec::ModelSpec;

const LLAMA: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","vocab_size":32000,
"hidden_size":4096,"intermediate_size":11008,"num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":32,
"hidden_act":"silu","max_position_embeddings":4096,"rms_norm_eps":1e-05,"initializer_range":0.02,"use_cache":true,
"pretraining_tp":1,"rope_scaling":null,"tie_word_embeddings":false,"torch_dtype":"float16","bos_token_id":1,
"eos_token_id":2,"pad_token_id":0,"transformers_version":"4.31.0.dev0","_name_or_path":"somewhere"}"#;

const LLAMA3: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","attention_bias":false,
"attention_dropout":0.0,"mlp_bias":false,"vocab_size":128256,"hidden_size":16384,"intermediate_size":53248,
"num_hidden_layers":126,"num_attention_heads":128,"num_key_value_heads":8,"hidden_act":"silu","bos_token_id":128000,
"eos_token_id":[128001,128008,128009],"max_position_embeddings":131072,"rms_norm_eps":1e-05,"rope_theta":500000.0,
"rope_scaling":{"factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192,
"rope_type":"llama3"},"tie_word_embeddings":false,"torch_dtype":"bfloat16","pretraining_tp":1,"use_cache":true}"#;

const SMOLLM2: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","attention_bias":false,
"mlp_bias":false,"vocab_size":49152,"hidden_size":576,"intermediate_size":1536,"num_hidden_layers":30,
"num_attention_heads":9,"num_key_value_heads":3,"hidden_act":"silu","bos_token_id":1,"eos_token_id":2,"pad_token_id":2,
"max_position_embeddings":8192,"rms_norm_eps":1e-05,"rope_theta":100000,"rope_scaling":null,"rope_interleaved":false,
"is_llama_config":true,"tie_word_embeddings":true,"torch_dtype":"bfloat16","pretraining_tp":1,
"transformers.js_config":{"kv_cache_dtype":{"q4f16":"float16"}}}"#;

const MISTRAL: &str = r#"{"architectures":["MistralForCausalLM"],"model_type":"mistral","vocab_size":32000,
"hidden_size":4096,"intermediate_size":14336,"num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":8,
"hidden_act":"silu","max_position_embeddings":32768,"rms_norm_eps":1e-05,"rope_theta":10000.0,"sliding_window":4096,
"tie_word_embeddings":false,"torch_dtype":"bfloat16","bos_token_id":1,"eos_token_id":2}"#;

const MAGISTRAL: &str = r#"{"architectures":["MistralForCausalLM"],"model_type":"mistral","vocab_size":131072,
"hidden_size":5120,"intermediate_size":32768,"num_hidden_layers":40,"num_attention_heads":32,"num_key_value_heads":8,
"head_dim":128,"hidden_act":"silu","max_position_embeddings":40960,"rms_norm_eps":1e-05,"rope_theta":1000000000.0,
"sliding_window":null,"tie_word_embeddings":false,"torch_dtype":"bfloat16","bos_token_id":1,"eos_token_id":2}"#;

const QWEN2: &str = r#"{"architectures":["Qwen2ForCausalLM"],"model_type":"qwen2","vocab_size":151936,
"hidden_size":896,"intermediate_size":4864,"num_hidden_layers":24,"num_attention_heads":14,"num_key_value_heads":2,
"hidden_act":"silu","max_position_embeddings":32768,"max_window_layers":21,"rms_norm_eps":1e-06,
"rope_theta":1000000.0,"sliding_window":32768,"use_sliding_window":false,"use_mrope":false,"tie_word_embeddings":true,
"rope_scaling":{"factor":4.0,"original_max_position_embeddings":32768,"type":"yarn"},"torch_dtype":"bfloat16",
"bos_token_id":151643,"eos_token_id":151645}"#;

const QWEN3: &str = r#"{"architectures":["Qwen3ForCausalLM"],"model_type":"qwen3","attention_bias":false,
"vocab_size":151936,"hidden_size":1024,"head_dim":128,"intermediate_size":3072,"num_hidden_layers":28,
"num_attention_heads":16,"num_key_value_heads":8,"hidden_act":"silu","max_position_embeddings":40960,
"max_window_layers":28,"rms_norm_eps":1e-06,"rope_scaling":null,"rope_theta":1000000,"sliding_window":null,
"use_sliding_window":false,"tie_word_embeddings":true,"torch_dtype":"bfloat16","bos_token_id":151643,
"eos_token_id":151645}"#;

const QWEN3_MOE: &str = r#"{"architectures":["Qwen3MoeForCausalLM"],"model_type":"qwen3_moe","attention_bias":false,
"vocab_size":151936,"hidden_size":4096,"head_dim":128,"intermediate_size":12288,"moe_intermediate_size":1536,
"num_hidden_layers":94,"num_attention_heads":64,"num_key_value_heads":4,"hidden_act":"silu","num_experts":128,
"num_experts_per_tok":8,"norm_topk_prob":true,"decoder_sparse_step":1,"mlp_only_layers":[],"max_window_layers":94,
"max_position_embeddings":40960,"rms_norm_eps":1e-06,"rope_scaling":null,"rope_theta":1000000.0,
"output_router_logits":false,"router_aux_loss_coef":0.001,"sliding_window":null,"use_sliding_window":false,
"tie_word_embeddings":false,"torch_dtype":"bfloat16","bos_token_id":151643,"eos_token_id":151645}"#;

const MIXTRAL: &str = r#"{"architectures":["MixtralForCausalLM"],"model_type":"mixtral","vocab_size":32000,
"hidden_size":4096,"intermediate_size":14336,"num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":8,
"hidden_act":"silu","num_experts_per_tok":2,"num_local_experts":8,"max_position_embeddings":32768,"rms_norm_eps":1e-05,
"rope_theta":1000000.0,"sliding_window":null,"output_router_logits":false,"router_aux_loss_coef":0.02,
"tie_word_embeddings":false,"torch_dtype":"bfloat16","bos_token_id":1,"eos_token_id":2}"#;

/// Without the published file's fp8 `quantization_config`: the bf16 conversion.
const DEEPSEEK: &str = r#"{"architectures":["DeepseekV3ForCausalLM"],"model_type":"deepseek_v3",
"attention_bias":false,"attention_dropout":0.0,"auto_map":{"AutoConfig":"configuration_deepseek.DeepseekV3Config"},
"vocab_size":129280,"hidden_size":7168,"intermediate_size":18432,"moe_intermediate_size":2048,"num_hidden_layers":61,
"num_attention_heads":128,"num_key_value_heads":128,"n_routed_experts":256,"n_shared_experts":1,"n_group":8,
"topk_group":4,"num_experts_per_tok":8,"norm_topk_prob":true,"routed_scaling_factor":2.5,"scoring_func":"sigmoid",
"topk_method":"noaux_tc","first_k_dense_replace":3,"moe_layer_freq":1,"num_nextn_predict_layers":1,"ep_size":1,
"q_lora_rank":1536,"kv_lora_rank":512,"qk_nope_head_dim":128,"qk_rope_head_dim":64,"v_head_dim":128,
"hidden_act":"silu","max_position_embeddings":163840,"rms_norm_eps":1e-06,"rope_theta":10000,
"rope_scaling":{"beta_fast":32,"beta_slow":1,"factor":40,"mscale":1.0,"mscale_all_dim":1.0,
"original_max_position_embeddings":4096,"type":"yarn"},"tie_word_embeddings":false,"torch_dtype":"bfloat16",
"initializer_range":0.02,"use_cache":true,"bos_token_id":0,"eos_token_id":1}"#;

const TINY_MOE: &str = r#"{"architectures":["Qwen3MoeForCausalLM"],"model_type":"qwen3_moe","attention_bias":true,
"vocab_size":515,"hidden_size":48,"head_dim":24,"intermediate_size":176,"moe_intermediate_size":40,
"num_hidden_layers":5,"num_attention_heads":8,"num_key_value_heads":2,"num_experts":12,"num_experts_per_tok":3,
"norm_topk_prob":false,"decoder_sparse_step":2,"mlp_only_layers":[3],"max_position_embeddings":40960,
"rms_norm_eps":1e-06,"tie_word_embeddings":true,"eos_token_id":2,"use_sliding_window":true,"sliding_window":16}"#;

const TINY_LATENT: &str = r#"{"architectures":["DeepseekV3ForCausalLM"],"model_type":"deepseek_v3","vocab_size":512,
"hidden_size":64,"intermediate_size":144,"moe_intermediate_size":24,"num_hidden_layers":5,"num_attention_heads":4,
"num_key_value_heads":4,"n_routed_experts":12,"n_shared_experts":2,"n_group":3,"topk_group":2,"num_experts_per_tok":3,
"norm_topk_prob":false,"routed_scaling_factor":1.3,"first_k_dense_replace":2,"q_lora_rank":null,"kv_lora_rank":40,
"qk_nope_head_dim":16,"qk_rope_head_dim":8,"v_head_dim":24,"max_position_embeddings":2048,"rms_norm_eps":1e-06,
"rope_parameters":{"rope_theta":10000.0,"rope_type":"default"},"eos_token_id":1}"#;

const BIASED: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","attention_bias":true,
"mlp_bias":true,"vocab_size":100,"hidden_size":96,"intermediate_size":176,"num_hidden_layers":3,
"num_attention_heads":8,"num_key_value_heads":1,"head_dim":16,"max_position_embeddings":2048,"rms_norm_eps":1e-05,
"tie_word_embeddings":true,"eos_token_id":[2,3]}"#;

/// By name, the config's text.
pub const ALL: [(&str, &str); 13] = [
    ("llama", LLAMA),
    ("llama3", LLAMA3),
    ("smollm2", SMOLLM2),
    ("mistral", MISTRAL),
    ("magistral", MAGISTRAL),
    ("qwen2", QWEN2),
    ("qwen3", QWEN3),
    ("qwen3_moe", QWEN3_MOE),
    ("mixtral", MIXTRAL),
    ("deepseek", DEEPSEEK),
    ("tiny_moe", TINY_MOE),
    ("tiny_latent", TINY_LATENT),
    ("biased", BIASED),
];

pub fn text(name: &str) -> &'static str {
    ALL.iter().find(|(n, _)| *n == name).expect("a sample of that name").1
}

pub fn spec(name: &str) -> ModelSpec {
    hf::spec(text(name), None).unwrap()
}
