//! How a Hugging Face checkpoint's matrices are quantised: what its `quantization_config` says, and so what they take
//! before a single one is seen. Each tensor then says for itself how it is stored, and must agree.

use crate::catalog::{Role, TensorId, tensor_name};
use crate::quant::{Code, Format, ScaleFormat, Scales, Scheme, Shift};
use crate::spec::ModelSpec;

/// One `quantization_config`.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantisation {
    pub method: Method,
    /// Modules left as they were trained.
    pub kept: Vec<Pattern>,
    /// Groups are of inputs in an order of their own (act-order), not of neighbours.
    pub scattered: bool,
}

/// The layouts that are read. Shapes are those of a matrix `[out, in]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// e4m3 `weight`, and a scale for each `rows x cols` of it that multiplies: DeepSeek's `weight_scale_inv`, or
    /// `weight_scale` of compressed-tensors.
    Fp8(Extent),
    /// `_blocks` `[experts, out, in / 32, 16]` and `_scales` (gpt-oss): the routed experts alone.
    Mxfp4,
    /// compressed-tensors: `weight_packed` words of `bits` along a row, `weight_scale`; `weight_zero_point` unless
    /// symmetric.
    Packed { bits: u32, group: Option<usize>, symmetric: bool },
    /// compressed-tensors: an int8 `weight`, `weight_scale` for an output or a group of its inputs.
    Int8 { group: Option<usize> },
    /// `qweight` `[in, out / 8]`, `qzeros`, `scales`.
    Awq { group: Option<usize> },
    /// `qweight` `[in * bits / 32, out]`, `qzeros`, `scales`, `g_idx`. Zero points are stored less one in the first format.
    Gptq { bits: u32, group: Option<usize>, less_one: bool },
}

/// What one scale covers; all of a side where `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub rows: Option<usize>,
    pub cols: Option<usize>,
}

/// Names of modules.
#[derive(Debug, Clone, PartialEq)]
pub enum Pattern {
    /// A module and what it holds, or any module of that last name.
    Name(String),
    /// A regular expression that a module's name must begin with (`re:`).
    Expression(String),
    /// Any part of the name (AWQ).
    Part(String),
}

impl Pattern {
    /// Whether `module` (a tensor's name without its last word) is meant.
    pub fn matches(&self, module: &str) -> bool {
        match self {
            Pattern::Name(name) => {
                let within =
                    module.strip_prefix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
                within || module.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.'))
            }
            Pattern::Expression(text) => Pattern::compile(text).is_ok_and(|expression| expression.is_match(module)),
            Pattern::Part(part) => module.contains(part.as_str()),
        }
    }

    /// The anchored expression, or what is wrong with it.
    pub fn compile(text: &str) -> Result<regex_lite::Regex, String> {
        regex_lite::Regex::new(&format!("^(?:{text})")).map_err(|e| e.to_string())
    }
}

impl Method {
    /// The name that errors use.
    pub const fn name(&self) -> &'static str {
        match self {
            Method::Fp8(_) => "fp8",
            Method::Mxfp4 => "mxfp4",
            Method::Packed { .. } => "pack-quantized",
            Method::Int8 { .. } => "int-quantized",
            Method::Awq { .. } => "awq",
            Method::Gptq { .. } => "gptq",
        }
    }

    /// What its codes are stored as.
    pub const fn container(&self) -> Format {
        match self {
            Method::Fp8(_) => Format::F8E4m3,
            Method::Mxfp4 => Format::U8,
            Method::Int8 { .. } => Format::I8,
            Method::Packed { .. } | Method::Awq { .. } | Method::Gptq { .. } => Format::I32,
        }
    }

    /// What it calls the codes of the matrix that would be `name` unquantised.
    pub fn codes_name(&self, name: &str) -> String {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        match self {
            Method::Fp8(_) | Method::Int8 { .. } => name.to_string(),
            Method::Mxfp4 => format!("{module}_blocks"),
            Method::Packed { .. } => format!("{module}.weight_packed"),
            Method::Awq { .. } | Method::Gptq { .. } => format!("{module}.qweight"),
        }
    }

    /// What it may call its scales, the usual name first.
    pub fn scales_names(&self, name: &str) -> Vec<String> {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let ends: &[&str] = match self {
            Method::Fp8(_) => &[".weight_scale_inv", ".weight_scale"],
            Method::Mxfp4 => &["_scales"],
            Method::Packed { .. } | Method::Int8 { .. } => &[".weight_scale"],
            Method::Awq { .. } | Method::Gptq { .. } => &[".scales"],
        };
        ends.iter().map(|end| format!("{module}{end}")).collect()
    }

    /// The inputs that share a scale; all where `None`.
    pub const fn group(&self) -> Option<usize> {
        match *self {
            Method::Fp8(extent) => extent.cols,
            Method::Mxfp4 => Some(32),
            Method::Packed { group, .. } | Method::Int8 { group } => group,
            Method::Awq { group } | Method::Gptq { group, .. } => group,
        }
    }

    /// How the values of a matrix of `inputs` follow from codes, where scales are stored as `scale`.
    pub fn scheme(&self, inputs: usize, scale: ScaleFormat) -> Scheme {
        let of = |code, group: Option<usize>, shift| Scheme {
            code,
            group: group.unwrap_or(inputs),
            scales: Scales::Single(scale),
            shift,
        };
        let integer = |bits: u32| Code::Integer { bits, offset: 1 << (bits - 1) };
        match *self {
            Method::Fp8(extent) => of(Code::E4m3, extent.cols, Shift::None),
            Method::Mxfp4 => of(Code::E2m1, Some(32), Shift::None),
            Method::Packed { bits, group, symmetric: true } => of(integer(bits), group, Shift::None),
            Method::Packed { bits, group, symmetric: false } => of(integer(bits), group, Shift::Point),
            Method::Int8 { group } => of(integer(8), group, Shift::None),
            Method::Awq { group } => of(integer(4), group, Shift::Point),
            Method::Gptq { bits, group, .. } => of(integer(bits), group, Shift::Point),
        }
    }

    /// What its scales are usually stored in, where no file has said so yet.
    pub const fn usual_scale(&self) -> ScaleFormat {
        match self {
            Method::Fp8(_) => ScaleFormat::F32,
            Method::Mxfp4 => ScaleFormat::E8m0,
            Method::Packed { .. } | Method::Int8 { .. } => ScaleFormat::Bf16,
            Method::Awq { .. } | Method::Gptq { .. } => ScaleFormat::F16,
        }
    }
}

impl ModelSpec {
    /// How the checkpoint's config says that a matrix with `inputs` inputs is quantised; `None` where it is not.
    pub fn scheme(&self, id: &TensorId, inputs: usize) -> Option<Scheme> {
        let quantisation = self.quantisation.as_ref()?;
        let method = &quantisation.method;
        let experts = matches!(id.role, Role::ExpertGate | Role::ExpertUp | Role::ExpertDown);
        let quantised = match method {
            Method::Mxfp4 => experts,
            _ => experts || is_linear(id.role),
        };
        let name = tensor_name(self, id);
        let module = name.strip_suffix(".weight").unwrap_or(&name);
        let kept = quantisation.kept.iter().any(|pattern| pattern.matches(module));
        (quantised && !kept).then(|| method.scheme(inputs, method.usual_scale()))
    }
}

/// Projections, which quantisers take on by default: not tables, not the router, no vectors.
fn is_linear(role: Role) -> bool {
    matches!(
        role,
        Role::Query
            | Role::Key
            | Role::Value
            | Role::Output
            | Role::QueryDown
            | Role::QueryUp
            | Role::KvDown
            | Role::KvUp
            | Role::Gate
            | Role::Up
            | Role::Down
            | Role::SharedGate
            | Role::SharedUp
            | Role::SharedDown
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_mean_the_modules_that_their_dialect_does() {
        let name = |s: &str| Pattern::Name(s.into());
        let expression = |s: &str| Pattern::Expression(s.into());
        for (pattern, module, expected) in [
            (name("lm_head"), "lm_head", true),
            (name("model.layers.0.mlp"), "model.layers.0.mlp.up_proj", true),
            (name("model.layers.1"), "model.layers.10.mlp.up_proj", false),
            (name("gate"), "model.layers.0.mlp.gate", true),
            (name("gate"), "model.layers.0.mlp.gate_proj", false),
            (expression(r".*mlp\.(gate|up|gate_up|down)_proj.*"), "model.layers.0.mlp.up_proj", true),
            (expression(r".*mlp\.(gate|up|gate_up|down)_proj.*"), "model.layers.0.mlp.experts.1.up_proj", false),
            (expression("self_attn"), "model.layers.0.self_attn.q_proj", false),
            (expression("model.layers..*.self_attn"), "model.layers.7.self_attn.q_proj", true),
            (Pattern::Part("gate".into()), "model.layers.0.mlp.gate_proj", true),
        ] {
            assert_eq!(pattern.matches(module), expected, "{pattern:?} {module}");
        }
        assert!(Pattern::compile("(").is_err());
    }
}
