use super::{Device, DraftModel, Offer, PlanError, Planned, Policy, check, explain, parse_devices, plan};
use model::mesh::{Mesh, Place};
use model::plan::{Epoch, Guesser, KernelFamily, Plan, WorkerId};
use model::quant::{Dtype, Format};
use model::size::{self, Keeping};
use model::storage::Storage;
use model::{ModelSpec, hf};
use proptest::prelude::*;
use std::sync::Arc;

const SMOLLM2: &str = r#"{"model_type":"llama","vocab_size":49152,"hidden_size":576,"intermediate_size":1536,
"num_hidden_layers":30,"num_attention_heads":9,"num_key_value_heads":3,"max_position_embeddings":8192,
"rms_norm_eps":1e-05,"rope_theta":100000,"tie_word_embeddings":true,"eos_token_id":2}"#;

const LLAMA70: &str = r#"{"model_type":"llama","vocab_size":128256,"hidden_size":8192,"intermediate_size":28672,
"num_hidden_layers":80,"num_attention_heads":64,"num_key_value_heads":8,"max_position_embeddings":131072,
"rms_norm_eps":1e-05,"rope_theta":500000.0,"eos_token_id":128001}"#;

const DEEPSEEK: &str = r#"{"model_type":"deepseek_v3","vocab_size":129280,"hidden_size":7168,
"intermediate_size":18432,"moe_intermediate_size":2048,"num_hidden_layers":61,"num_attention_heads":128,
"num_key_value_heads":128,"n_routed_experts":256,"n_shared_experts":1,"n_group":8,"topk_group":4,
"num_experts_per_tok":8,"norm_topk_prob":true,"routed_scaling_factor":2.5,"first_k_dense_replace":3,
"q_lora_rank":1536,"kv_lora_rank":512,"qk_nope_head_dim":128,"qk_rope_head_dim":64,"v_head_dim":128,
"max_position_embeddings":163840,"rms_norm_eps":1e-06,"rope_theta":10000,"rope_scaling":{"beta_fast":32,"beta_slow":1,
"factor":40,"mscale":1.0,"mscale_all_dim":1.0,"original_max_position_embeddings":4096,"type":"yarn"},
"tie_word_embeddings":false,"eos_token_id":1}"#;

const TINY_MOE: &str = r#"{"model_type":"qwen3_moe","vocab_size":512,"hidden_size":64,"head_dim":16,
"intermediate_size":128,"moe_intermediate_size":32,"num_hidden_layers":6,"num_attention_heads":8,
"num_key_value_heads":4,"num_experts":16,"num_experts_per_tok":4,"max_position_embeddings":4096,"rms_norm_eps":1e-06,
"eos_token_id":2}"#;

fn spec(config: &str) -> ModelSpec {
    hf::spec(config, None).unwrap()
}

/// Workers of one device each on one host.
fn laptop(workers: usize, memory_bytes: u64) -> Vec<Offer> {
    let offer = |n: usize| Offer {
        worker: WorkerId(format!("w{n}")),
        host: "laptop".into(),
        data_address: format!("127.0.0.1:{}", 9000 + n),
        devices: vec![Device { memory_bytes, threads: 2 }],
        families: vec![KernelFamily::Vector],
    };
    (0..workers).map(offer).collect()
}

fn bf16(spec: &ModelSpec) -> Storage {
    Storage::stated(spec, Format::Bf16)
}

fn planned(config: &str, offers: &[Offer], policy: &Policy) -> Planned {
    let spec = spec(config);
    plan(&spec, &bf16(&spec), offers, policy, None).unwrap_or_else(|e| panic!("{e}"))
}

fn refused(config: &str, offers: &[Offer], policy: &Policy) -> PlanError {
    let spec = spec(config);
    plan(&spec, &bf16(&spec), offers, policy, None).expect_err("there must be no plan")
}

fn mesh(pipeline: usize, data: usize, tensor: usize, expert: usize) -> Mesh {
    Mesh { pipeline, data, tensor, expert }
}

const GIB: u64 = 1 << 30;

#[test]
fn deepseek_spreads_its_experts_over_two_hosts_and_keeps_each_latent_once() {
    let found = planned(DEEPSEEK, &parse_devices("16x141GiB").unwrap(), &Policy::default());
    assert_eq!(found.plan.mesh, mesh(1, 16, 1, 16));
    assert!(found.bytes.iter().all(|b| b.total(found.plan.limits.blocks as u64) <= 141 * GIB));
    assert_eq!(found.plan.limits.model_len_max, 163_840);
    // A device is a lane.
    assert!(found.plan.members.iter().all(|m| m.ranks.len() == 8));
    assert_eq!(found.plan.members[1].ranks[0].0, 8);
}

/// DeepSeek V3 as it is published.
const FP8: &str = r#""quantization_config":{"quant_method":"fp8","fmt":"e4m3","activation_scheme":"dynamic",
"weight_block_size":[128,128]},"#;

#[test]
fn lanes_are_preferred_where_slices_would_copy_the_cache_and_weights_fit() {
    let fp8 = DEEPSEEK.replacen('{', &format!("{{{FP8}"), 1);
    let auto = |config: &str, devices: &str| planned(config, &parse_devices(devices).unwrap(), &Policy::default());
    for (config, devices, expected) in [
        (fp8.as_str(), "8x141GiB", mesh(1, 8, 1, 8)),
        (&fp8, "16x141GiB", mesh(1, 16, 1, 16)),
        (DEEPSEEK, "16x141GiB", mesh(1, 16, 1, 16)),
        // Further copies of attention do not fit beside the experts.
        (&fp8, "8x96GiB", mesh(1, 1, 8, 8)),
        // Eight key/value heads are cut, not copied.
        (LLAMA70, "8x80GiB", mesh(1, 1, 8, 1)),
    ] {
        let found = auto(config, devices);
        assert_eq!(found.plan.mesh, expected, "{devices}");
    }
    let (spec, found) = (spec(&fp8), auto(&fp8, "8x141GiB").plan);
    let storage = bf16(&spec);
    let text = explain::table(&spec, &storage, None, &found);
    assert!(text.contains("dp8 x tp1 rather than dp1 x tp8: ") && text.contains("0 B of cache"), "{text}");
    let report = explain::report(&spec, &storage, None, &found);
    assert_eq!(report.copied_cache_bytes, 0);
    // Seven more copies of all but the routed experts: 17 billion weights, most of a byte, tables of two.
    assert!((110.0..160.0).contains(&(report.copied_weights_bytes as f64 / 1e9)), "{}", report.copied_weights_bytes);
    let (llama, plan) = (self::spec(LLAMA70), auto(LLAMA70, "8x80GiB").plan);
    let llama = explain::report(&llama, &bf16(&llama), None, &plan);
    assert_eq!((llama.reason, llama.copied_cache_bytes), (None, 0));
}

#[test]
fn predictors_are_counted_only_where_they_are_asked_for() {
    let config = DEEPSEEK.replacen('{', "{\"num_nextn_predict_layers\":1,", 1);
    let offers = parse_devices("16x141GiB").unwrap();
    let two = |predictors| Policy { pipeline: Some(2), tensor: Some(8), predictors, ..Policy::default() };
    let found = [0, 1].map(|predictors| planned(&config, &offers, &two(predictors)));
    let known = planned(DEEPSEEK, &offers, &two(0));
    assert_eq!(
        (&found[0].plan, &found[0].bytes),
        (&known.plan, &known.bytes),
        "a config that tells of it asks nothing"
    );
    assert_eq!(found.each_ref().map(|f| f.plan.guesser.predictors()), [0, 1]);
    let all = |f: &Planned| f.bytes.iter().map(|b| b.weights).sum::<u64>() as f64 / 1e9;
    // 11.6 billion weights of its own and an embedding of 0.93 more on the last stage, two bytes each.
    assert!((all(&found[1]) - all(&found[0]) - 2.0 * 12.5).abs() < 0.5, "{} {}", all(&found[0]), all(&found[1]));
    let stages = found.each_ref().map(|f| f.plan.stages[1].len());
    assert!(stages[1] <= stages[0], "the stage that predicts takes no more layers: {stages:?}");
    let text = refused(&config, &offers, &two(2)).to_string();
    assert!(text.contains("number of predictors = 2") && text.contains("the model has 1"), "{text}");
}

#[test]
fn what_does_not_fit_says_how_much_is_missing() {
    let error = refused(DEEPSEEK, &parse_devices("8x141GiB").unwrap(), &Policy::default());
    let text = error.to_string();
    assert!(matches!(error, PlanError::Memory { .. }), "{text}");
    assert!(text.contains("has 141.0 GiB") && text.contains("missing"), "{text}");
    let error = refused(LLAMA70, &parse_devices("1x80GiB").unwrap(), &Policy::default());
    let text = error.to_string();
    assert!(text.starts_with("rank 0 of pp1 x dp1 x tp1, ep1 needs 13") && text.contains("has 80.0 GiB"), "{text}");
}

#[test]
fn three_workers_become_lanes_of_a_small_model_with_nine_heads() {
    let found = planned(SMOLLM2, &laptop(3, 4 * GIB), &Policy::default());
    assert_eq!(found.plan.mesh, mesh(1, 3, 1, 1));
    // Where one worker can't hold the model (0.27 GB), its layers are divided.
    let tight = planned(SMOLLM2, &laptop(3, 250 << 20), &Policy::default());
    assert_eq!(tight.plan.mesh, mesh(3, 1, 1, 1));
    // The first and the last stage hold the tied table too, so the middle one has more layers.
    let lengths: Vec<usize> = tight.plan.stages.iter().map(ExactSizeIterator::len).collect();
    assert!(lengths[1] > lengths[0] && lengths[1] > lengths[2], "{lengths:?}");
}

#[test]
fn tensor_ranks_stay_within_a_host() {
    let two = parse_devices("2x2x80GiB").unwrap();
    assert_eq!(planned(LLAMA70, &two, &Policy::default()).plan.mesh, mesh(2, 1, 2, 1));
    let one = parse_devices("1x4x80GiB").unwrap();
    assert_eq!(planned(LLAMA70, &one, &Policy::default()).plan.mesh, mesh(1, 1, 4, 1));
    let across = Policy { tensor: Some(4), ..Policy::default() };
    assert_eq!(planned(LLAMA70, &two, &across).plan.mesh, mesh(1, 1, 4, 1), "a flag may cross hosts");
}

#[test]
fn flags_are_kept_and_the_rest_is_chosen() {
    let offers = laptop(8, GIB);
    let chosen = |policy| planned(TINY_MOE, &offers, &policy).plan.mesh;
    let auto = Policy::default();
    // Eight slices would keep each of four key/value heads twice.
    assert_eq!(chosen(auto.clone()), mesh(1, 2, 4, 8));
    assert_eq!(chosen(Policy { tensor: Some(8), ..auto.clone() }), mesh(1, 1, 8, 8));
    assert_eq!(chosen(Policy { tensor: Some(2), ..auto.clone() }), mesh(1, 4, 2, 8));
    assert_eq!(chosen(Policy { data: Some(2), expert: Some(1), ..auto.clone() }), mesh(1, 2, 4, 1));
    assert_eq!(chosen(Policy { pipeline: Some(2), ..auto.clone() }), mesh(2, 1, 4, 4));
    let all = Policy { tensor: Some(1), data: Some(2), pipeline: Some(3), expert: Some(2), ..auto };
    assert_eq!(chosen(all), mesh(3, 2, 1, 2));
}

#[test]
fn flags_that_cannot_be_are_refused_with_numbers() {
    let offers = laptop(3, GIB);
    let auto = Policy::default();
    let cases = [
        (Policy { tensor: Some(2), ..auto.clone() }, "9 query heads"),
        (Policy { tensor: Some(3), ..auto.clone() }, "not a power of two"),
        (Policy { tensor: Some(0), ..auto.clone() }, "tensor parallel size = 0"),
        (Policy { data: Some(4), ..auto.clone() }, "needs 4 devices, 3 are offered"),
        (Policy { pipeline: Some(31), ..auto.clone() }, "30 layers"),
        (Policy { expert: Some(3), ..auto.clone() }, "without experts"),
        (Policy { model_len_max: Some(9000), ..auto.clone() }, "the model's 8192"),
        (Policy { step_sequences_max: 600, ..auto.clone() }, "512 tokens of a step"),
        (Policy { model_len_max: Some(8192), cache_bytes: Some(10 << 20), ..auto.clone() }, "of cache a rank hold"),
    ];
    for (policy, said) in cases {
        let text = refused(SMOLLM2, &offers, &policy).to_string();
        assert!(text.contains(said), "{text:?} does not say {said:?}");
    }
    assert_eq!(refused(SMOLLM2, &[], &auto), PlanError::NoDevices);
}

#[test]
fn a_sequence_is_shortened_to_the_cache_unless_its_length_was_asked_for() {
    let policy = Policy { cache_bytes: Some(64 << 20), ..Policy::default() };
    let found = planned(SMOLLM2, &laptop(1, 4 * GIB), &policy);
    // 64 MiB over 30 layers of 2 * 3 * 64 channels of bf16, in blocks of 32 positions.
    assert_eq!(found.plan.limits.blocks, (64 << 20) / (30 * 32 * 2 * 3 * 64 * 2));
    assert_eq!(found.plan.limits.model_len_max, found.plan.limits.blocks * 32);
    let longest = planned(SMOLLM2, &laptop(1, 64 * GIB), &Policy::default()).plan.limits;
    assert_eq!((longest.model_len_max, longest.blocks), (8192, 128 * 8192 / 32));
}

#[test]
fn dtype_and_family_follow_checkpoint_and_workers() {
    let spec = spec(TINY_MOE);
    let one = |format: Format, offers: &[Offer], previous: Option<&Plan>| {
        let storage = Storage::stated(&spec, format);
        let found = plan(&spec, &storage, offers, &Policy::default(), previous).unwrap().plan;
        (found.dtype, found.family)
    };
    let mut both = laptop(2, GIB);
    both.iter_mut().for_each(|o| o.families.push(KernelFamily::Amx));
    assert_eq!(one(Format::Bf16, &laptop(2, GIB), None), (Dtype::Bf16, KernelFamily::Vector));
    assert_eq!(one(Format::F32, &both, None), (Dtype::F32, KernelFamily::Amx));
    assert_eq!(one(Format::Q4_0, &both, None).0, Dtype::Bf16);
    let vector = plan(&spec, &bf16(&spec), &laptop(2, GIB), &Policy::default(), None).unwrap().plan;
    assert_eq!(one(Format::F32, &both, Some(&vector)).1, KernelFamily::Vector, "another would change answers");
    let mut mixed = laptop(2, GIB);
    mixed[0].families = vec![KernelFamily::Amx];
    let text = refused(TINY_MOE, &mixed, &Policy::default()).to_string();
    assert!(text.contains("w0 has [Amx]") && text.contains("w1 has [Vector]"), "{text}");
}

#[test]
fn survivors_keep_their_ranks_when_a_spare_steps_in() {
    let policy = Policy { tensor: Some(4), data: Some(1), ..Policy::default() };
    let before = planned(TINY_MOE, &laptop(5, GIB), &policy).plan;
    assert_eq!(before.members.len(), 4, "the fifth is a spare");
    let offers: Vec<Offer> = laptop(5, GIB).into_iter().filter(|o| o.worker.0 != "w1").collect();
    let spec = spec(TINY_MOE);
    let after = plan(&spec, &bf16(&spec), &offers, &policy, Some(&before)).unwrap().plan;
    assert_eq!(after.epoch, Epoch(before.epoch.0 + 1));
    assert_eq!((after.mesh, &after.stages), (before.mesh, &before.stages));
    for member in &after.members {
        let expected = if member.worker.0 == "w4" { "w1" } else { member.worker.0.as_str() };
        let was = before.members.iter().find(|m| m.worker.0 == expected).unwrap();
        assert_eq!(member.ranks, was.ranks, "{}", member.worker.0);
    }
}

#[test]
fn a_cluster_shrinks_to_what_is_left_and_grows_again() {
    let policy = Policy::default();
    let before = planned(TINY_MOE, &laptop(4, GIB), &policy).plan;
    let spec = spec(TINY_MOE);
    let shrunk = plan(&spec, &bf16(&spec), &laptop(3, GIB), &policy, Some(&before)).unwrap().plan;
    assert_eq!(shrunk.mesh, mesh(1, 3, 1, 1));
    let grown = plan(&spec, &bf16(&spec), &laptop(4, GIB), &policy, Some(&shrunk)).unwrap().plan;
    assert_eq!((grown.mesh, grown.epoch), (before.mesh, Epoch(3)));
}

#[test]
fn stages_follow_the_memory_of_their_devices() {
    let offers = parse_devices("1x1x60GiB,1x1x120GiB").unwrap();
    let found = planned(LLAMA70, &offers, &Policy { model_len_max: Some(4096), ..Policy::default() });
    assert_eq!(found.plan.mesh, mesh(2, 1, 1, 1));
    let lengths: Vec<usize> = found.plan.stages.iter().map(ExactSizeIterator::len).collect();
    assert!(lengths[1] >= 2 * lengths[0] - 4 && lengths[0] > 20, "{lengths:?}");
}

/// The least that the fullest of some stages can hold, by trying every cut.
fn fullest_least(layers: &[u64], stages: usize, first: u64, last: u64) -> u64 {
    let sum: u64 = layers.iter().sum();
    if stages == 1 {
        return first + sum + last;
    }
    let cuts = 1..=layers.len() + 1 - stages;
    let of = |cut: usize| {
        let own = first + layers[..cut].iter().sum::<u64>();
        own.max(fullest_least(&layers[cut..], stages - 1, 0, last))
    };
    cuts.map(of).min().unwrap()
}

#[test]
fn stages_are_balanced_by_bytes_and_not_by_layers() {
    let fp8 = DEEPSEEK.replacen('{', &format!("{{{FP8}"), 1);
    let spec = spec(&fp8);
    let storage = Storage::stated(&spec, Format::Bf16);
    let offers = parse_devices("4x256GiB").unwrap();
    for stages in [2, 4] {
        let policy = Policy { pipeline: Some(stages), tensor: Some(1), data: Some(1), ..Policy::default() };
        let policy = Policy { model_len_max: Some(4096), ..policy };
        let offers = if stages == 2 { parse_devices("2x512GiB").unwrap() } else { offers.clone() };
        let found = plan(&spec, &storage, &offers, &policy, None).unwrap();
        let mesh = found.plan.mesh;
        let keeping = Keeping { storage: &storage, dtype: Dtype::Bf16, family: KernelFamily::Vector };
        let place = Place { stage: 0, lane: 0, slice: 0 };
        let layers: Vec<u64> = (0..61).map(|l| size::layer_weights(&spec, l, &mesh, place, keeping)).collect();
        let within = |stage: usize| found.plan.stages[stage].clone().map(|l| layers[l]).sum::<u64>();
        let weights: Vec<u64> = found.bytes.iter().map(|bytes| bytes.weights).collect();
        let (first, last) = (weights[0] - within(0), weights[stages - 1] - within(stages - 1));
        assert!(first > 1 << 30 && last > 1 << 30, "embedding and head: {first}, {last}");
        let fullest = *weights.iter().max().unwrap();
        // Shares are counted in 65536ths of a device.
        let least = fullest_least(&layers, stages, first, last);
        assert!(fullest - least < 1 << 24, "{fullest} in the fullest stage, {least} would do: {weights:?}");
        let lengths: Vec<usize> = found.plan.stages.iter().map(ExactSizeIterator::len).collect();
        assert!(lengths[0] > lengths[1], "three dense layers weigh less than one mixture: {lengths:?}");
    }
}

#[test]
fn broken_plans_are_told_apart() {
    let good = planned(TINY_MOE, &laptop(4, GIB), &Policy { pipeline: Some(2), ..Policy::default() }).plan;
    let spec = spec(TINY_MOE);
    check::check(&spec, &good).unwrap();
    let broken = |change: &dyn Fn(&mut Plan)| {
        let mut plan = good.clone();
        change(&mut plan);
        check::check(&spec, &plan).expect_err("the plan is broken")
    };
    type Change<'a> = &'a dyn Fn(&mut Plan);
    let cases: [(Change<'_>, &str); 10] = [
        (&|p| p.mesh.tensor = 3, "not a power of two"),
        (&|p| p.mesh.tensor = 16, "segments"),
        (&|p| p.stages[0].end = 2, "must begin at layer 2"),
        (&|p| p.stages.truncate(1), "1 stages for pp 2"),
        (&|p| p.stages[1].end = 5, "end at layer 5 of 6"),
        (&|p| p.members[1].ranks = p.members[0].ranks.clone(), "held twice"),
        (&|p| p.members.truncate(3), "3 of 4 ranks"),
        (&|p| p.members[1].worker = p.members[0].worker.clone(), "member twice"),
        (&|p| p.limits.blocks = 1, "1 blocks for a sequence"),
        (&|p| p.limits.step_tokens_max = 1, "sequences in 1 tokens"),
    ];
    for (change, said) in cases {
        let text = broken(change);
        assert!(text.contains(said), "{text:?} does not say {said:?}");
    }
}

#[test]
fn a_draft_model_is_counted_on_the_last_stage_and_shown() {
    let (model, small) = (spec(LLAMA70), LLAMA70.replace("\"num_hidden_layers\":80", "\"num_hidden_layers\":4"));
    let small = spec(&small.replace("131072", "4096"));
    let draft = DraftModel { storage: bf16(&small), spec: small };
    let offers = parse_devices("8x80GiB").unwrap();
    let policy =
        |draft| Policy { pipeline: Some(2), tensor: Some(4), model_len_max: Some(8192), draft, ..Policy::default() };
    let without = planned(LLAMA70, &offers, &policy(None));
    let with = planned(LLAMA70, &offers, &policy(Some(Arc::new(draft.clone()))));
    assert_eq!((with.plan.guesser, with.plan.limits.model_len_max), (Guesser::Draft, 8192));
    assert!(with.plan.stages[1].len() < without.plan.stages[1].len(), "the last stage has room for fewer layers");
    let report = explain::report(&model, &bf16(&model), Some(&draft), &with.plan);
    let own = report.draft.unwrap();
    // Four layers of 0.86 billion weights, an embedding and a head of 1.05; two times eight heads of 128 in four layers.
    assert!((own.weights_bytes as f64 / 2e9 - 5.5).abs() < 0.1, "{}", own.weights_bytes);
    assert_eq!((own.cache_block_bytes, own.ranks, own.max_len), (4 * 32 * 2 * 8 * 128 * 2, 4, 4096));
    for (rank, bytes) in report.ranks.iter().zip(&with.bytes) {
        assert_eq!(rank.total_bytes, bytes.total(with.plan.limits.blocks as u64));
        let least = if rank.stage == 1 { own.weights_bytes } else { 0 };
        assert!(rank.weights_bytes > least, "rank {}", rank.rank);
    }
    let text = explain::table(&model, &bf16(&model), Some(&draft), &with.plan);
    assert!(
        text.contains("draft model llama of 4 layers, whole on each of 4 ranks, guesses up to position 4096"),
        "{text}"
    );
    let other = DraftModel { spec: ModelSpec { vocab: 128_000, ..draft.spec.clone() }, ..draft };
    let refused = refused(LLAMA70, &offers, &policy(Some(Arc::new(other)))).to_string();
    assert_eq!(refused, "the draft model foretells 128000 tokens, the model 128256");
}

#[test]
fn a_table_shows_every_rank_and_its_sizes() {
    let spec = spec(DEEPSEEK);
    let policy = Policy { tensor: Some(8), expert: Some(8), ..Policy::default() };
    let found = planned(DEEPSEEK, &parse_devices("16x141GiB").unwrap(), &policy);
    let text = explain::table(&spec, &bf16(&spec), None, &found.plan);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2 + 1 + 16, "{text}");
    assert!(lines[0].starts_with("deepseek_v3: pp1 x dp2 x tp8, ep8 on 16 ranks"), "{text}");
    assert!(lines[2].starts_with("rank  worker"), "{text}");
    assert!(lines[3].contains("0-60") && lines[3].contains("0-15 kv 0") && lines[3].contains("0-31 /2"), "{text}");
    let report = explain::report(&spec, &bf16(&spec), None, &found.plan);
    for (rank, bytes) in report.ranks.iter().zip(&found.bytes) {
        assert_eq!(rank.weights_bytes, bytes.weights);
        assert_eq!(rank.total_bytes, bytes.total(found.plan.limits.blocks as u64));
    }
    // Every expert is held, by as many ranks as divide it.
    let held: usize = report.ranks.iter().map(|r| r.experts.as_ref().unwrap().len()).sum();
    assert_eq!(held, 256 * 2);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["ranks"][3]["query_heads"]["start"], 48);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_plan_keeps_its_rules_and_fits_whatever_is_offered(
        model in 0..4usize,
        hosts in prop::collection::vec(prop::collection::vec(1u64..200, 1..9), 1..6),
        turn in 0..5usize,
        lost in 0..5usize,
    ) {
        let config = [SMOLLM2, LLAMA70, DEEPSEEK, TINY_MOE][model];
        let scale = if model == 1 || model == 2 { GIB } else { 20 << 20 };
        let offers: Vec<Offer> = hosts.iter().enumerate().map(|(index, devices)| Offer {
            worker: WorkerId(format!("w{index}")),
            host: format!("h{}", index / 2),
            data_address: "127.0.0.1:1".into(),
            devices: devices.iter().map(|m| Device { memory_bytes: m * scale, threads: 1 }).collect(),
            families: vec![KernelFamily::Vector],
        }).collect();
        let spec = spec(config);
        let storage = bf16(&spec);
        let run = |offers: &[Offer], previous| plan(&spec, &storage, offers, &Policy::default(), previous);
        let first = run(&offers, None);
        let mut turned = offers.clone();
        turned.rotate_left(turn % offers.len());
        prop_assert_eq!(&run(&turned, None), &first, "the order of joining matters");
        let Ok(first) = first else { return Ok(()) };
        let mut left = offers.clone();
        left.remove(lost % offers.len());
        let second = run(&left, Some(&first.plan)).ok();
        for (planned, offers) in [(Some(first), &offers), (second, &left)] {
            let Some(Planned { plan, bytes }) = planned else { continue };
            prop_assert_eq!(check::check(&spec, &plan), Ok(()));
            for member in &plan.members {
                let offer = offers.iter().find(|o| o.worker == member.worker).unwrap();
                for (rank, device) in member.ranks.iter().zip(&offer.devices) {
                    let needs = bytes[rank.0 as usize].total(plan.limits.blocks as u64);
                    prop_assert!(needs <= device.memory_bytes, "{needs} on {}", device.memory_bytes);
                }
            }
        }
    }
}
