//! `quantization_config` to [`Quantisation`]. As everywhere, a key that nothing reads is an error that names it.

use super::keys::Keys;
use crate::error::SpecError;
use crate::quantisation::{Extent, Method, Pattern, Quantisation};
use serde_json::{Map, Value};

const KEY: &str = "quantization_config";
/// Inputs that one scale may cover.
const GROUP_MAX: usize = 1 << 16;

/// Read: how weights are stored. Harmless: how that was found, and how other programs run it.
const HARMLESS: [&str; 36] = [
    "quantization_status",
    "global_compression_ratio",
    "sparsity_config",
    "transform_config",
    "version",
    "observer",
    "observer_kwargs",
    "block_structure",
    "scale_dtype",
    "zp_dtype",
    "input_activations",
    "activation_scheme",
    "scale_fmt",
    "targets",
    "backend",
    "do_fuse",
    "fuse_max_seq_len",
    "exllama_config",
    "use_exllama",
    "max_input_length",
    "modules_to_fuse",
    "dataset",
    "damp_percent",
    "damp_auto_increment",
    "block_name_to_quantize",
    "module_name_preceding_first_block",
    "batch_size",
    "pad_token_id",
    "use_cuda_fp16",
    "model_seqlen",
    "cache_block_outputs",
    "true_sequential",
    "static_groups",
    "tokenizer",
    "lm_head",
    "meta",
];

/// What the config at hand says of quantisation, if anything.
pub(super) fn read(keys: &Keys<'_>) -> Result<Option<Quantisation>, SpecError> {
    let Some(value) = keys.value(KEY) else { return Ok(None) };
    let map = value.as_object().ok_or_else(|| keys.bad(KEY, value, "must be an object"))?;
    let of = Keys::new(map);
    let found = match of.text("quant_method")? {
        Some("fp8") => fp8(&of)?,
        Some("mxfp4") => {
            Quantisation { method: Method::Mxfp4, kept: names(&of, "modules_to_not_convert", plain)?, scattered: false }
        }
        Some("compressed-tensors") => compressed(&of)?,
        Some("awq") => awq(&of)?,
        Some("gptq") => gptq(&of)?,
        other => {
            let why = "known: fp8, mxfp4, compressed-tensors, awq, gptq";
            return Err(SpecError::bad("quantization_config.quant_method", other.unwrap_or("none given"), why));
        }
    };
    of.finish(&|key| HARMLESS.contains(&key)).map_err(|e| match e {
        SpecError::Unread(keys) => SpecError::Unread(format!("{KEY}: {keys}")),
        other => other,
    })?;
    Ok(Some(found))
}

fn fp8(keys: &Keys<'_>) -> Result<Quantisation, SpecError> {
    if let Some(other) = keys.text("fmt")?.filter(|fmt| !matches!(*fmt, "e4m3" | "float8_e4m3fn")) {
        return Err(SpecError::bad("quantization_config.fmt", other, "the other eight-bit float is not read"));
    }
    let block = match keys.value("weight_block_size") {
        None => Extent { rows: None, cols: None },
        Some(value) => {
            let sides: Option<Vec<usize>> =
                value.as_array().map(|a| a.iter().filter_map(|v| v.as_u64().map(|n| n as usize)).collect());
            match sides.as_deref() {
                Some([rows @ 1..=GROUP_MAX, cols @ 1..=GROUP_MAX]) => Extent { rows: Some(*rows), cols: Some(*cols) },
                _ => return Err(keys.bad("weight_block_size", value, "must be two sizes, rows and columns")),
            }
        }
    };
    let mut kept = names(keys, "modules_to_not_convert", plain)?;
    kept.extend(names(keys, "ignored_layers", plain)?);
    Ok(Quantisation { method: Method::Fp8(block), kept, scattered: false })
}

/// compressed-tensors: one group of targets, whose format is the file's.
fn compressed(keys: &Keys<'_>) -> Result<Quantisation, SpecError> {
    keys.only("output_activations", Value::Null, "outputs are never quantised")?;
    if let Some(value) = keys.value("kv_cache_scheme") {
        return Err(keys.bad("kv_cache_scheme", value, "a quantised cache is not implemented"));
    }
    let format = keys.text("format")?.unwrap_or("none given");
    let value = keys.value("config_groups").ok_or_else(|| keys.missing("config_groups"))?;
    let groups: Option<Vec<&Map<String, Value>>> =
        value.as_object().and_then(|groups| groups.values().map(Value::as_object).collect());
    let Some([group]) = groups.as_deref() else {
        return Err(keys.bad("config_groups", value, "one group of modules, quantised alike, is read"));
    };
    let group = Keys::new(group);
    let format = group.text("format")?.unwrap_or(format);
    let section = group.section("weights")?.ok_or_else(|| keys.bad("config_groups", value, "it has no weights"))?;
    let method = weights(format, &section)?;
    // "weight" and "static" order the work of quantising alone.
    let scattered = section.text("actorder")? == Some("group");
    section.finish(&|key| HARMLESS.contains(&key))?;
    if let Some(outputs) = group.value("output_activations") {
        return Err(group.bad("output_activations", outputs, "outputs are never quantised"));
    }
    group.finish(&|key| HARMLESS.contains(&key))?;
    Ok(Quantisation { method, kept: names(keys, "ignore", compressed_pattern)?, scattered })
}

/// `format` and a group's `weights` to a method.
fn weights(format: &str, keys: &Keys<'_>) -> Result<Method, SpecError> {
    let bits = keys.size("num_bits", 64)? as u32;
    keys.only("dynamic", false, "weights are quantised before they are stored")?;
    let kind = keys.text("type")?.unwrap_or("int");
    let symmetric = keys.flag("symmetric", true)?;
    let group = keys.value("group_size").filter(|v| v.as_i64() != Some(-1)).map(|_| keys.size("group_size", GROUP_MAX));
    let group = group.transpose()?;
    // Act-order stores a group for each input (`weight_g_idx`), which the tensors say themselves.
    keys.text("actorder")?;
    let strategy = keys.text("strategy")?.unwrap_or(if group.is_some() { "group" } else { "tensor" });
    let group = match (strategy, group) {
        ("group", Some(group)) => Some(group),
        ("channel" | "tensor" | "block", _) => None,
        _ => {
            return Err(SpecError::bad(
                "quantization_config.strategy",
                strategy,
                "known: group, channel, tensor, block",
            ));
        }
    };
    let whole = Extent { rows: None, cols: None };
    match (format, kind, bits, strategy, symmetric) {
        ("pack-quantized", "int", 4 | 8, "group" | "channel", _) => Ok(Method::Packed { bits, group, symmetric }),
        ("int-quantized", "int", 8, "group" | "channel", true) => Ok(Method::Int8 { group }),
        ("float-quantized", "float", 8, "tensor", true) => Ok(Method::Fp8(whole)),
        ("float-quantized", "float", 8, "channel", true) => Ok(Method::Fp8(Extent { rows: Some(1), ..whole })),
        ("float-quantized", "float", 8, "block", true) => block(keys),
        _ => {
            let found = format!("{format} of {bits} bits ({kind}, {strategy}, symmetric {symmetric})");
            let why = "known: pack-quantized int of 4 or 8 bits (group, channel), int-quantized int of 8 bits \
                       (group, channel, symmetric), float-quantized float of 8 bits (tensor, channel, block)";
            Err(SpecError::bad("quantization_config.format", found, why))
        }
    }
}

fn block(keys: &Keys<'_>) -> Result<Method, SpecError> {
    let value = keys.value("block_structure").ok_or_else(|| keys.missing("block_structure"))?;
    let sides: Vec<usize> =
        value.as_array().into_iter().flatten().filter_map(|v| v.as_u64().map(|n| n as usize)).collect();
    match sides[..] {
        [rows @ 1..=GROUP_MAX, cols @ 1..=GROUP_MAX] => Ok(Method::Fp8(Extent { rows: Some(rows), cols: Some(cols) })),
        _ => Err(keys.bad("block_structure", value, "must be two sizes, rows and columns")),
    }
}

fn awq(keys: &Keys<'_>) -> Result<Quantisation, SpecError> {
    for key in ["bits", "w_bit"] {
        keys.only(key, 4, "AWQ packs eight weights in a word")?;
    }
    keys.only("zero_point", true, "AWQ stores zero points")?;
    let version = keys.text("version")?.unwrap_or("gemm").to_lowercase();
    if version != "gemm" {
        return Err(SpecError::bad("quantization_config.version", version, "only the layout gemm is read"));
    }
    let group = match group(keys, "group_size")? {
        None => group(keys, "q_group_size")?,
        some => some,
    };
    Ok(Quantisation {
        method: Method::Awq { group },
        kept: names(keys, "modules_to_not_convert", |s| Pattern::Part(s.into()))?,
        scattered: false,
    })
}

fn gptq(keys: &Keys<'_>) -> Result<Quantisation, SpecError> {
    let bits = keys.size("bits", 32)? as u32;
    if !matches!(bits, 4 | 8) {
        return Err(SpecError::bad("quantization_config.bits", bits, "4 and 8 are read"));
    }
    // Groups of permuted inputs, and symmetry, are what `g_idx` and `qzeros` say.
    let scattered = keys.flag("desc_act", false)? && !keys.flag("static_groups", false)?;
    keys.flag("sym", true)?;
    keys.only("pack_dtype", "int32", "codes are packed in words of 32 bits")?;
    keys.text("quant_type")?;
    let format = keys.text("checkpoint_format")?.unwrap_or("gptq");
    let less_one = match format {
        "gptq" => true,
        "gptq_v2" => false,
        other => return Err(SpecError::bad("quantization_config.checkpoint_format", other, "known: gptq, gptq_v2")),
    };
    let method = Method::Gptq { bits, group: group(keys, "group_size")?, less_one };
    Ok(Quantisation { method, kept: names(keys, "modules_to_not_convert", plain)?, scattered })
}

/// A group's inputs; -1 stands for all.
fn group(keys: &Keys<'_>, key: &str) -> Result<Option<usize>, SpecError> {
    match keys.value(key) {
        Some(value) if value.as_i64() == Some(-1) => Ok(None),
        _ => keys.optional_size(key, GROUP_MAX),
    }
}

fn names(keys: &Keys<'_>, key: &str, pattern: fn(&str) -> Pattern) -> Result<Vec<Pattern>, SpecError> {
    let mut out = Vec::new();
    for value in keys.list(key)? {
        let text = value.as_str().ok_or_else(|| keys.bad(key, value, "must be the name of a module"))?;
        let pattern = pattern(text);
        if let Pattern::Expression(text) = &pattern {
            Pattern::compile(text).map_err(|why| keys.bad(key, value, &why))?;
        }
        out.push(pattern);
    }
    Ok(out)
}

fn compressed_pattern(text: &str) -> Pattern {
    text.strip_prefix("re:").map_or_else(|| Pattern::Name(text.into()), |text| Pattern::Expression(text.into()))
}

/// transformers reads a star as the regular expression it would be.
fn plain(text: &str) -> Pattern {
    if text.contains('*') { Pattern::Expression(text.into()) } else { Pattern::Name(text.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Option<Quantisation>, SpecError> {
        let map: Map<String, Value> = serde_json::from_str(&format!(r#"{{"quantization_config":{text}}}"#)).unwrap();
        read(&Keys::new(&map))
    }

    fn compressed(format: &str, weights: &str) -> String {
        format!(
            r#"{{"quant_method":"compressed-tensors","format":"{format}","ignore":["lm_head","re:.*self_attn.*"],
            "kv_cache_scheme":null,"quantization_status":"compressed","config_groups":{{"group_0":{{
            "input_activations":null,"output_activations":null,"targets":["Linear"],"weights":{weights}}}}}}}"#
        )
    }

    #[test]
    fn published_configs_name_their_method() {
        let fp8 = Extent { rows: Some(128), cols: Some(128) };
        let cases = [
            (
                r#"{"activation_scheme":"dynamic","fmt":"e4m3","quant_method":"fp8","weight_block_size":[128,128]}"#
                    .into(),
                Method::Fp8(fp8),
            ),
            (
                r#"{"quant_method":"mxfp4","modules_to_not_convert":["model.layers.*.self_attn","lm_head"]}"#.into(),
                Method::Mxfp4,
            ),
            (
                compressed(
                    "pack-quantized",
                    r#"{"actorder":null,"dynamic":false,"group_size":32,"num_bits":4,"strategy":"group","symmetric":true,
                    "type":"int","observer":"minmax","observer_kwargs":{},"block_structure":null}"#,
                ),
                Method::Packed { bits: 4, group: Some(32), symmetric: true },
            ),
            (
                compressed("int-quantized", r#"{"num_bits":8,"strategy":"channel","symmetric":true,"type":"int"}"#),
                Method::Int8 { group: None },
            ),
            (
                compressed("float-quantized", r#"{"num_bits":8,"strategy":"channel","symmetric":true,"type":"float"}"#),
                Method::Fp8(Extent { rows: Some(1), cols: None }),
            ),
            (
                r#"{"quant_method":"awq","bits":4,"group_size":128,"version":"gemm","zero_point":true,
                "modules_to_not_convert":["gate"]}"#
                    .into(),
                Method::Awq { group: Some(128) },
            ),
            (
                r#"{"quant_method":"gptq","bits":4,"group_size":-1,"desc_act":true,"sym":false,"damp_percent":0.1}"#
                    .into(),
                Method::Gptq { bits: 4, group: None, less_one: true },
            ),
            (
                r#"{"quant_method":"gptq","bits":8,"group_size":64,"checkpoint_format":"gptq_v2"}"#.into(),
                Method::Gptq { bits: 8, group: Some(64), less_one: false },
            ),
        ];
        for (text, method) in cases {
            let text: String = text;
            assert_eq!(parse(&text).unwrap().unwrap().method, method, "{text}");
        }
        assert_eq!(parse("null").unwrap(), None);
    }

    #[test]
    fn what_is_not_known_is_named() {
        for (text, said) in [
            (r#"{"quant_method":"bitsandbytes","load_in_4bit":true}"#.to_string(), "bitsandbytes"),
            (r#"{"bits":4}"#.into(), "none given"),
            (r#"{"quant_method":"fp8","weight_block_size":[128]}"#.into(), "weight_block_size"),
            (r#"{"quant_method":"fp8","weight_block_size":[0,128]}"#.into(), "weight_block_size"),
            (r#"{"quant_method":"fp8","mystery":1}"#.into(), "quantization_config: mystery"),
            (r#"{"quant_method":"gptq","bits":3,"group_size":128}"#.into(), "quantization_config.bits = 3"),
            (r#"{"quant_method":"gptq","bits":4,"checkpoint_format":"marlin"}"#.into(), "marlin"),
            (r#"{"quant_method":"awq","bits":4,"version":"gemv"}"#.into(), "gemv"),
            (
                compressed(
                    "nvfp4-pack-quantized",
                    r#"{"num_bits":4,"strategy":"group","group_size":16,"type":"float"}"#,
                ),
                "nvfp4",
            ),
            (compressed("pack-quantized", r#"{"num_bits":3,"strategy":"group","group_size":16}"#), "3 bits"),
            (compressed("pack-quantized", r#"{"num_bits":4,"strategy":"group","group_size":16,"odd":1}"#), "odd"),
            (r#"{"quant_method":"mxfp4","modules_to_not_convert":["a.*(b"]}"#.into(), "modules_to_not_convert"),
        ] {
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
