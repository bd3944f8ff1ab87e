//! What chat and completions have in common: the parameters of an answer, read, bounded and checked against the
//! model. Nothing here tokenises.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};

use model::step::Sampling;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::error::ApiError;
use super::fields::{self, Fields};
use super::limits;
use super::refused;
use crate::config::Config;
use crate::source::Source;
use crate::text::{StopStrings, Text};

/// What the API knows of the model that it serves.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelFacts {
    /// Names that requests may use; answers carry the first.
    pub names: Vec<String>,
    /// Token ids are below it.
    pub vocabulary: usize,
    /// Longest sequence, prompt and answer together.
    pub model_len_max: usize,
    /// Ids that end an answer (`generation_config.json`, else `config.json`).
    pub end_tokens: Vec<u32>,
    pub defaults: Defaults,
    /// Identifies build and weights, so that clients see when the same seed may give something else.
    pub fingerprint: String,
}

impl ModelFacts {
    pub fn new(config: &Config, source: &Source, text: &Text) -> ModelFacts {
        let name = config.served_model_name.clone().unwrap_or_else(|| source.name());
        let own = source.spec.positions_max;
        let given = &text.defaults;
        let silent = Defaults::default();
        let defaults = Defaults {
            temperature: given.temperature.unwrap_or(silent.temperature),
            top_p: given.top_p.unwrap_or(silent.top_p),
            top_k: given.top_k.unwrap_or(silent.top_k),
            min_p: given.min_p.unwrap_or(silent.min_p),
            repetition_penalty: given.repetition_penalty.unwrap_or(silent.repetition_penalty),
        };
        let digest = Sha256::new().chain_update(env!("CARGO_PKG_VERSION")).chain_update(&source.identity).finalize();
        ModelFacts {
            names: vec![name],
            vocabulary: source.spec.vocab,
            model_len_max: config.max_model_len.map_or(own, |most| most.min(own)),
            end_tokens: if text.end_tokens.is_empty() {
                source.spec.end_tokens.clone()
            } else {
                text.end_tokens.clone()
            },
            defaults,
            fingerprint: digest[..6].iter().fold("fp_".to_string(), |text, byte| text + &format!("{byte:02x}")),
        }
    }
}

/// Sampling where a request says nothing: from the model's `generation_config.json`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Defaults {
    pub temperature: f32,
    pub top_p: f32,
    pub top_k: u32,
    pub min_p: f32,
    pub repetition_penalty: f32,
}

impl Default for Defaults {
    fn default() -> Defaults {
        Defaults { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

/// A request for answers, without its prompt.
#[derive(Debug, Clone)]
pub struct Ask {
    /// `choice` is 0, `suppress` is set; the scores asked for are the endpoint's to fill in.
    pub sampling: Sampling,
    /// `n`.
    pub choices: u32,
    /// As asked; none leaves it to the endpoint.
    pub tokens_max: Option<u32>,
    /// Ids that end an answer here: the model's, unless ignored, and the request's own.
    pub end_tokens: Vec<u32>,
    pub wording: Wording,
    pub report: Report,
    /// A client's wish to share no cache with others, mixed into the server's salt.
    pub cache_salt: String,
    /// `priority`: lower goes first among what the same key asked for.
    pub priority: i32,
}

/// How tokens become text.
#[derive(Debug, Clone)]
pub struct Wording {
    pub stop: Vec<String>,
    /// Watches for them; each choice takes a copy.
    pub stops: StopStrings,
    /// The request's own end tokens.
    pub stop_tokens: Vec<u32>,
    /// Keep the stop string, or the stop token, in the text.
    pub include_stop: bool,
    pub skip_special: bool,
    /// Stop strings count only beyond so many tokens.
    pub tokens_min: u32,
}

/// What the answer carries besides text, and how it travels.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Report {
    pub stream: bool,
    /// A last chunk with the usage.
    pub usage: bool,
    /// The usage so far in every chunk.
    pub usage_always: bool,
    pub token_ids: bool,
    /// Candidates reported a token, where log-probabilities are asked for.
    pub logprobs: Option<u8>,
    pub echo: bool,
}

impl Ask {
    /// Reads the common fields, and refuses those that would change the answer but are not implemented.
    pub fn read(fields: &mut Fields, facts: &ModelFacts) -> Result<Ask, ApiError> {
        refused::check(fields)?;
        check_model(fields, facts)?;
        let choices = fields.integer("n", 1..=limits::CHOICES_MAX as i64)?.unwrap_or(1) as u32;
        let (tokens_max, tokens_min) = token_bounds(fields, facts)?;
        let stop_tokens = fields.tokens("stop_token_ids", limits::STOP_TOKENS_MAX, facts.vocabulary)?;
        let stop_tokens = stop_tokens.unwrap_or_default();
        let end_tokens = end_tokens(fields, facts, &stop_tokens)?;
        let sampling = sampling(fields, facts, &end_tokens, tokens_min)?;
        let wording = Wording { stop_tokens, ..wording(fields, tokens_min)? };
        let report = report(fields)?;
        let cache_salt = fields.text("cache_salt")?.unwrap_or_default();
        let priority = fields.integer("priority", limits::PRIORITIES)?.unwrap_or(0) as i32;
        Ok(Ask { sampling, choices, tokens_max, end_tokens, wording, report, cache_salt, priority })
    }

    /// How many tokens a prompt of `prompt_tokens` may be answered with: what was asked, which must fit, else
    /// `default` as far as it fits.
    pub fn room(&self, prompt_tokens: usize, default: usize, length: usize) -> Result<u32, ApiError> {
        let asked = self.tokens_max.map(|tokens| tokens as usize);
        // Without a wish there must be room for one token, or a prompt that fills the model would get no answer.
        let needed = prompt_tokens + asked.unwrap_or(1);
        if needed <= length {
            return Ok(asked.unwrap_or(default.min(length - prompt_tokens)) as u32);
        }
        let head = format!("This model's maximum context length is {length} tokens");
        match asked {
            Some(tokens) if prompt_tokens < length => Err(ApiError::TooLong {
                param: "max_tokens".into(),
                message: format!(
                    "{head}. However, you requested {needed} tokens ({prompt_tokens} in the prompt, {tokens} for \
                     the answer); please shorten the prompt or ask for fewer tokens"
                ),
            }),
            _ => Err(ApiError::TooLong {
                param: "prompt".into(),
                message: format!(
                    "{head}. However, your prompt has {prompt_tokens} tokens, which leaves no room for an answer; \
                     please shorten it"
                ),
            }),
        }
    }
}

/// `model` may be left out: there is only one.
pub fn check_model(fields: &mut Fields, facts: &ModelFacts) -> Result<(), ApiError> {
    match fields.text("model")? {
        Some(model) if !facts.names.contains(&model) => Err(unknown_model(model, facts)),
        _ => Ok(()),
    }
}

pub fn unknown_model(model: String, facts: &ModelFacts) -> ApiError {
    ApiError::UnknownModel { model, served: facts.names.join(", ") }
}

/// Most tokens of an answer, as asked, and the fewest.
fn token_bounds(fields: &mut Fields, facts: &ModelFacts) -> Result<(Option<u32>, u32), ApiError> {
    // Beyond the model's length the complaint says how long prompt and answer are: `Ask::room` makes it.
    let range = 0..=i64::from(u32::MAX);
    let old = fields.integer("max_tokens", range.clone())?;
    let new = fields.integer("max_completion_tokens", range)?;
    let most = new.or(old).map(|tokens| tokens as u32);
    let least = fields.integer("min_tokens", 0..=facts.model_len_max as i64)?.unwrap_or(0) as u32;
    match most {
        Some(most) if least > most => {
            let message = format!("`min_tokens` is {least}, more than `max_tokens`, {most}");
            Err(ApiError::invalid("min_tokens", message))
        }
        _ => Ok((most, least)),
    }
}

/// Ids that end an answer: the request's own, and the model's unless they are ignored.
fn end_tokens(fields: &mut Fields, facts: &ModelFacts, stop_tokens: &[u32]) -> Result<Vec<u32>, ApiError> {
    let ignored = fields.flag("ignore_eos", false)?;
    let mut ends = if ignored { Vec::new() } else { facts.end_tokens.clone() };
    ends.extend(stop_tokens);
    ends.sort_unstable();
    ends.dedup();
    Ok(ends)
}

fn sampling(
    fields: &mut Fields,
    facts: &ModelFacts,
    end_tokens: &[u32],
    tokens_min: u32,
) -> Result<Sampling, ApiError> {
    let defaults = facts.defaults;
    let number = |fields: &mut Fields, name: &str, range, default: f32| -> Result<f32, ApiError> {
        Ok(fields.number(name, range)?.map_or(default, |number| number as f32))
    };
    let temperature = match fields.number("temperature", limits::TEMPERATURE)? {
        Some(temperature) if temperature < limits::TEMPERATURE_LEAST => 0.0,
        Some(temperature) => temperature as f32,
        None => defaults.temperature,
    };
    let top_p = number(fields, "top_p", limits::TOP_P, defaults.top_p)?;
    if top_p <= 0.0 {
        return Err(ApiError::invalid("top_p", format!("`top_p` must be more than 0 and at most 1, got {top_p}")));
    }
    let repetition_penalty = number(fields, "repetition_penalty", limits::REPETITION, defaults.repetition_penalty)?;
    if repetition_penalty <= 0.0 {
        let message = format!("`repetition_penalty` must be more than 0 and at most 10, got {repetition_penalty}");
        return Err(ApiError::invalid("repetition_penalty", message));
    }
    // -1 is vLLM's way to say all; beyond the vocabulary is all, too.
    let top_k = match fields.integer("top_k", -1..=i64::from(u32::MAX))? {
        None => defaults.top_k,
        Some(top_k) if top_k <= 0 || top_k >= facts.vocabulary as i64 => 0,
        Some(top_k) => top_k as u32,
    };
    Ok(Sampling {
        temperature,
        top_p,
        top_k,
        min_p: number(fields, "min_p", limits::MIN_P, defaults.min_p)?,
        repetition_penalty,
        presence_penalty: number(fields, "presence_penalty", limits::PENALTY, 0.0)?,
        frequency_penalty: number(fields, "frequency_penalty", limits::PENALTY, 0.0)?,
        logit_bias: logit_bias(fields, facts.vocabulary)?,
        suppress: if tokens_min == 0 { Vec::new() } else { end_tokens.to_vec() },
        suppress_until: tokens_min,
        seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map_or_else(random, |seed| seed as u64),
        choice: 0,
        logprobs: None,
        prompt_logprobs: None,
    })
}

fn logit_bias(fields: &mut Fields, vocabulary: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(map) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    fields::check_length("logit_bias", map.len(), limits::LOGIT_BIAS_MAX)?;
    let mut biases = BTreeMap::new();
    for (key, value) in &map {
        let Ok(id) = key.parse::<u64>() else {
            let shown: String = key.chars().take(40).collect();
            return Err(ApiError::invalid("logit_bias", format!("`logit_bias`: {shown:?} is not a token id")));
        };
        let id = fields::token("logit_bias", &Value::from(id), vocabulary)?;
        biases.insert(id, fields::number("logit_bias", value, limits::BIAS)? as f32);
    }
    Ok(biases.into_iter().collect())
}

fn wording(fields: &mut Fields, tokens_min: u32) -> Result<Wording, ApiError> {
    let stop = match fields.take("stop") {
        None => Vec::new(),
        Some(Value::String(text)) => vec![text],
        Some(Value::Array(items)) => {
            let text = |item: Value| match item {
                Value::String(text) => Ok(text),
                other => Err(fields::wrong("stop", "a string or an array of strings", &other)),
            };
            items.into_iter().map(text).collect::<Result<_, _>>()?
        }
        Some(other) => return Err(fields::wrong("stop", "a string or an array of strings", &other)),
    };
    let include_stop = fields.flag("include_stop_str_in_output", false)?;
    let skip_special = fields.flag("skip_special_tokens", true)?;
    let stops = StopStrings::new(&stop, include_stop);
    let stops = stops.map_err(|error| ApiError::invalid("stop", format!("`stop`: {error}")))?;
    Ok(Wording { stop, stops, stop_tokens: Vec::new(), include_stop, skip_special, tokens_min })
}

fn report(fields: &mut Fields) -> Result<Report, ApiError> {
    let stream = fields.flag("stream", false)?;
    let mut report = Report { stream, token_ids: fields.flag("return_token_ids", false)?, ..Report::default() };
    if let Some(options) = fields.object("stream_options")? {
        if !stream {
            return Err(ApiError::invalid("stream_options", "`stream_options` is only allowed when `stream` is true"));
        }
        let flag = |name: &str| match options.get(name) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(fields::wrong(&format!("stream_options.{name}"), "true or false", other)),
        };
        report.usage = flag("include_usage")?;
        report.usage_always = report.usage && flag("continuous_usage_stats")?;
    }
    Ok(report)
}

/// 64 bits that nobody can guess: the standard library keys its hashers from the operating system.
pub fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::super::harness::facts;
    use super::*;

    fn read(body: &str) -> Result<Ask, ApiError> {
        Ask::read(&mut Fields::parse(body.as_bytes(), 100).unwrap(), &facts())
    }

    #[test]
    fn nothing_said_means_the_model_s_own_defaults() {
        let ask = read("{}").unwrap();
        assert_eq!(ask.sampling.temperature, 0.7);
        assert_eq!((ask.choices, ask.tokens_max, ask.end_tokens), (1, None, vec![256]));
        assert!(ask.wording.skip_special && !ask.report.stream);
        assert_ne!(ask.sampling.seed, read("{}").unwrap().sampling.seed, "every request has its own seed");
    }

    #[test]
    fn parameters_reach_the_sampler() {
        let ask = read(
            r#"{"model":"org/alias","temperature":0,"top_k":-1,"seed":-1,"logit_bias":{"7":-100,"3":1.5},"min_tokens":2,
                "stop_token_ids":[9,256],"max_tokens":5,"stop":"x","n":3}"#,
        )
        .unwrap();
        let sampling = &ask.sampling;
        assert_eq!((sampling.temperature, sampling.top_k, sampling.seed), (0.0, 0, u64::MAX));
        assert_eq!(sampling.logit_bias, [(3, 1.5), (7, -100.0)]);
        assert_eq!((sampling.suppress_until, &sampling.suppress), (2, &vec![9, 256]));
        assert_eq!((ask.choices, ask.tokens_max, ask.wording.stop), (3, Some(5), vec!["x".to_string()]));
        assert!(read(r#"{"ignore_eos":true}"#).unwrap().end_tokens.is_empty());
        assert_eq!(read(r#"{"top_k":1000}"#).unwrap().sampling.top_k, 0);
    }

    #[test]
    fn an_answer_s_room_is_what_the_model_leaves() {
        let room = |body: &str, prompt| read(body).unwrap().room(prompt, 16, 64);
        assert_eq!(room("{}", 10), Ok(16));
        assert_eq!(room("{}", 60), Ok(4));
        assert_eq!(room(r#"{"max_tokens":54}"#, 10), Ok(54));
        assert_eq!(room(r#"{"max_tokens":0}"#, 64), Ok(0));
        for (body, prompt, param) in [
            ("{}", 64, "prompt"),
            (r#"{"max_tokens":55}"#, 10, "max_tokens"),
            (r#"{"max_completion_tokens":4294967295}"#, 10, "max_tokens"),
            (r#"{"max_tokens":0}"#, 65, "prompt"),
        ] {
            match room(body, prompt) {
                Err(ApiError::TooLong { param: got, message }) => {
                    assert_eq!(got, param);
                    assert!(message.starts_with("This model's maximum context length is 64 tokens"), "{message}");
                }
                other => panic!("{body}: {other:?}"),
            }
        }
    }
}
