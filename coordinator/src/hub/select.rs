//! Which files of a repository a server needs: the description, the tokenizer, the template, and safetensors. Pickles are never
//! fetched.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use super::Need;
use super::error::HubError;
use super::reference::Reference;

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// Small files, fetched where they are there.
const SMALL: [&str; 13] = [
    CONFIG,
    "generation_config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
    "chat_template.json",
    "chat_template.jinja",
];

/// What is fetched first: all but the weights, or the `.gguf` that was asked for with its further parts.
pub fn first(files: &[String], reference: &Reference, need: Need) -> Result<Vec<String>, HubError> {
    if let Some(file) = &reference.file {
        return gguf(files, file, reference);
    }
    let has = |name: &str| files.iter().any(|file| file == name);
    if !has(CONFIG) {
        return Err(HubError::NoFile {
            id: reference.to_string(),
            file: CONFIG.into(),
            others: listed(files, ".gguf"),
        });
    }
    if need == Need::Describe {
        return Ok([CONFIG, "generation_config.json"]
            .into_iter()
            .filter(|name| has(name))
            .map(str::to_string)
            .collect());
    }
    let template = |file: &str| file.starts_with("additional_chat_templates/") && file.ends_with(".jinja");
    let wanted = |file: &&String| SMALL.contains(&file.as_str()) || template(file);
    Ok(files.iter().filter(wanted).cloned().collect())
}

/// A file and, where it is one of several parts, the others.
fn gguf(files: &[String], file: &str, reference: &Reference) -> Result<Vec<String>, HubError> {
    let none = || HubError::NoFile { id: reference.to_string(), file: file.into(), others: listed(files, ".gguf") };
    let has = |name: &str| files.iter().any(|file| file == name);
    let part = |number: usize, count: &str, stem: &str| format!("{stem}-{number:05}-of-{count}.gguf");
    let split = file.strip_suffix(".gguf").and_then(|name| name.rsplit_once("-of-")).and_then(|(head, count)| {
        let (stem, number) = head.rsplit_once('-')?;
        let (number, total) = (number.parse::<usize>().ok()?, count.parse::<usize>().ok()?);
        (part(number, count, stem) == file && total <= 10_000).then_some((stem, count, total))
    });
    let names = match split {
        Some((stem, count, total)) => (1..=total).map(|number| part(number, count, stem)).collect(),
        None => vec![file.to_string()],
    };
    if names.iter().all(|name| has(name)) { Ok(names) } else { Err(none()) }
}

/// The weights: those that the fetched index names, or the one file that needs none.
pub fn weights(files: &[String], snapshot: &Path, reference: &Reference) -> Result<Vec<String>, HubError> {
    let refused = |why: String| HubError::NoWeights { id: reference.to_string(), why };
    let has = |name: &str| files.iter().any(|file| file == name);
    if has(INDEX) {
        let names = index_of(snapshot).map_err(&refused)?;
        return match names.iter().find(|name| !has(name)) {
            None => Ok(names.into_iter().collect()),
            Some(name) => Err(refused(format!("{INDEX} names {name}, which is not there"))),
        };
    }
    if has(SINGLE) {
        return Ok(vec![SINGLE.into()]);
    }
    let gguf = listed(files, ".gguf");
    Err(refused(
        match files.iter().find(|file| file.ends_with(".bin") || file.ends_with(".pt") || file.ends_with(".pth")) {
            _ if gguf != NONE => format!("there is no {SINGLE}; name one of its files after a colon: {gguf}"),
            Some(pickle) => format!("there is no {SINGLE}; {pickle} can run code when it is read and is not used"),
            None => format!("there is neither {SINGLE} nor {INDEX}"),
        },
    ))
}

fn index_of(snapshot: &Path) -> Result<BTreeSet<String>, String> {
    indexed(&std::fs::read(snapshot.join(INDEX)).map_err(|why| format!("{INDEX}: {why}"))?)
}

/// The files that an index names; only names, never paths.
pub fn indexed(index: &[u8]) -> Result<BTreeSet<String>, String> {
    let parsed: Value = serde_json::from_slice(index).map_err(|why| format!("{INDEX}: {why}"))?;
    let map = parsed["weight_map"].as_object().ok_or_else(|| format!("{INDEX} has no weight_map"))?;
    let names: BTreeSet<String> = map.values().filter_map(|name| name.as_str().map(str::to_string)).collect();
    match names.iter().find(|name| name.contains('/') || !name.ends_with(".safetensors")) {
        None => Ok(names),
        Some(name) => Err(format!("{INDEX} names {name:?}, which is no safetensors file beside it")),
    }
}

const NONE: &str = "none";

/// The first few names that end so.
fn listed(files: &[String], end: &str) -> String {
    let names: Vec<&str> = files.iter().map(String::as_str).filter(|file| file.ends_with(end)).take(8).collect();
    if names.is_empty() { NONE.into() } else { names.join(", ") }
}

/// What a snapshot in the cache lacks.
pub fn missing(snapshot: &Path, need: Need) -> Vec<String> {
    let has = |name: &str| snapshot.join(name).exists();
    let mut missing: Vec<String> = [CONFIG].into_iter().filter(|name| !has(name)).map(str::to_string).collect();
    if need == Need::Describe {
        return missing;
    }
    if has(INDEX) {
        match index_of(snapshot) {
            Ok(names) => missing.extend(names.into_iter().filter(|name| !has(name))),
            Err(why) => missing.push(why),
        }
    } else if !has(SINGLE) {
        missing.push(SINGLE.into());
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(files: &[&str]) -> Vec<String> {
        files.iter().map(|file| file.to_string()).collect()
    }

    #[test]
    fn only_what_a_server_reads_is_chosen() {
        let files = names(&[
            "README.md",
            "config.json",
            "tokenizer.json",
            "pytorch_model.bin",
            "model.safetensors",
            "onnx/model.onnx",
            "additional_chat_templates/tool_use.jinja",
            "consolidated.safetensors",
            "generation_config.json",
        ]);
        let reference = Reference::parse("a/b").unwrap();
        let chosen = first(&files, &reference, Need::Serve).unwrap();
        let expected =
            ["config.json", "tokenizer.json", "additional_chat_templates/tool_use.jinja", "generation_config.json"];
        assert_eq!(chosen, expected);
        assert_eq!(first(&files, &reference, Need::Describe).unwrap(), ["config.json", "generation_config.json"]);
        assert_eq!(weights(&files, Path::new("none"), &reference).unwrap(), ["model.safetensors"]);
        let pickles = names(&["config.json", "pytorch_model.bin"]);
        let error = weights(&pickles, Path::new("none"), &reference).unwrap_err().to_string();
        assert!(error.contains("pytorch_model.bin"), "{error}");
    }

    #[test]
    fn all_parts_of_a_gguf_are_chosen() {
        let files = names(&["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "q.gguf"]);
        let chosen = |file: &str| first(&files, &Reference::parse(&format!("a/b:{file}")).unwrap(), Need::Serve);
        assert_eq!(chosen("q.gguf").unwrap(), ["q.gguf"]);
        assert_eq!(chosen("m-00001-of-00002.gguf").unwrap(), files[..2]);
        let error = chosen("x.gguf").unwrap_err().to_string();
        assert!(error.contains("x.gguf") && error.contains("q.gguf"), "{error}");
        let error = first(&files, &Reference::parse("a/b").unwrap(), Need::Serve).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("q.gguf"), "{error}");
    }
}
