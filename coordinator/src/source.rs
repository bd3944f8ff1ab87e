//! The model as the coordinator sees it: its description and how its weights are stored, never the weights themselves.

use model::gguf::split::Split;
use model::gguf::{self, Gguf};
use model::identity::identity;
use model::proof::{self, Digest, SegmentId};
use model::quant::Format;
use model::storage::Storage;
use model::{ModelSpec, SpecError, catalog, hf};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

/// A checkpoint's description.
#[derive(Debug)]
pub struct Source {
    /// Absolute, so that worker processes of this host find it.
    pub path: PathBuf,
    pub spec: ModelSpec,
    /// What its matrices are stored in.
    pub storage: Storage,
    /// What workers must read too (see [`model::identity`]).
    pub identity: Vec<u8>,
    /// Bytes of all weight files.
    pub bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("{}: {why}", path.display())]
    Read { path: PathBuf, why: String },
    #[error("{}: {source}", path.display())]
    Spec { path: PathBuf, source: SpecError },
}

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Largest header that is read: the longest published ones (thousands of experts) take a few MiB.
const HEADER_BYTES_MAX: u64 = 256 << 20;

impl Source {
    /// From a directory in Hugging Face's layout, or a `.gguf` file.
    pub fn open(path: &Path) -> Result<Source, SourceError> {
        let absent = |e| SourceError::Read { path: path.into(), why: format!("no such model: {e}") };
        let real = std::fs::canonicalize(path).map_err(absent)?;
        // A file keeps its own name: in the hub's cache it is a link to one that is named by its hash.
        let path = match (real.is_dir(), path.parent(), path.file_name()) {
            (false, Some(folder), Some(name)) => {
                let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
                std::fs::canonicalize(folder).map_err(absent)?.join(name)
            }
            _ => real,
        };
        if path.is_dir() { Source::from_directory(path) } else { Source::from_gguf(path) }
    }

    /// What can be planned without weights: also a directory that holds none, or a `config.json` by itself.
    pub fn describe(path: &Path) -> Result<Source, SourceError> {
        let beside = |name: &str| path.is_dir() && path.join(name).exists();
        if path.extension().is_some_and(|e| e == "json") {
            return Source::from_config(path);
        }
        let weightless = beside("config.json") && !beside(SINGLE) && !beside(INDEX);
        if weightless { Source::from_config(&path.join("config.json")) } else { Source::open(path) }
    }

    /// Matrices are stored as the config states (`torch_dtype`, `quantization_config`).
    fn from_config(path: &Path) -> Result<Source, SourceError> {
        let text = String::from_utf8(read(path)?).map_err(|e| bad(path, e.to_string()))?;
        let spec = hf::spec(&text, None).map_err(|source| SourceError::Spec { path: path.into(), source })?;
        let config: serde_json::Value = serde_json::from_str(&text).map_err(|e| bad(path, e.to_string()))?;
        let stated = [&config, &config["text_config"]].into_iter().find_map(|of| {
            let dtype = if of["torch_dtype"].is_null() { &of["dtype"] } else { &of["torch_dtype"] };
            dtype.as_str()
        });
        let plain = match stated {
            Some("float32") => Format::F32,
            Some("float16") => Format::F16,
            _ => Format::Bf16,
        };
        let storage = Storage::stated(&spec, plain);
        let identity = identity(text.as_bytes(), Vec::new());
        Ok(Source { path: path.into(), spec, storage, identity, bytes: 0 })
    }

    /// Where the list of this model's digests is, if it has one: beside its files.
    pub fn list_path(&self) -> PathBuf {
        match self.path.is_dir() {
            true => self.path.join("conclave.segments"),
            false => self.path.with_extension("segments"),
        }
    }

    /// The digests of the model's own list (see [`model::proof`]).
    pub fn list_of_digests(&self) -> Result<Option<BTreeMap<SegmentId, Digest>>, SourceError> {
        let path = self.list_path();
        if !path.is_file() {
            return Ok(None);
        }
        let text = std::fs::read_to_string(&path).map_err(|e| bad(&path, e.to_string()))?;
        let plain = self.spec.predicting(0).map_err(|source| SourceError::Spec { path: path.clone(), source })?;
        let digests = proof::parse(&plain, &self.identity, &text).map_err(|e| bad(&path, e.to_string()))?;
        Ok(Some(digests))
    }

    fn from_directory(path: PathBuf) -> Result<Source, SourceError> {
        let config = read(&path.join("config.json"))?;
        let generation = std::fs::read_to_string(path.join("generation_config.json")).ok();
        let text = String::from_utf8(config).map_err(|e| bad(&path.join("config.json"), e.to_string()))?;
        let mut spec = hf::spec(&text, generation.as_deref())
            .map_err(|source| SourceError::Spec { path: path.join("config.json"), source })?;
        let mut files = Vec::new();
        let mut formats = BTreeMap::new();
        for name in weight_files(&path)? {
            let file = path.join(&name);
            let bytes = std::fs::metadata(&file).map_err(|e| bad(&file, e.to_string()))?.len();
            formats.extend(safetensors_formats(&file)?);
            files.push((name, bytes));
        }
        catalog::settle(&mut spec, &|name| formats.contains_key(name));
        let storage = Storage::found(&spec, &|name| formats.get(name).copied());
        let bytes = files.iter().map(|(_, bytes)| bytes).sum();
        let identity = identity(text.as_bytes(), files);
        Ok(Source { path, spec, storage, identity, bytes })
    }

    fn from_gguf(path: PathBuf) -> Result<Source, SourceError> {
        let parts = gguf_parts(&path)?;
        let all = || parts.iter().flat_map(|part| &part.gguf.tensors);
        let formats: BTreeMap<&str, Option<Format>> = all().map(|t| (t.name.as_str(), t.format())).collect();
        let has = |name: &str| formats.contains_key(name);
        let factors = parts.iter().map(|part| rope_factors(&part.path, &part.gguf)).find_map(Result::transpose);
        let (factors, Part { header, gguf: file, .. }) = (factors.transpose()?, &parts[0]);
        let spec = gguf::spec(&file.metadata, &has, factors.as_deref())
            .map_err(|source| SourceError::Spec { path: path.clone(), source })?;
        let storage = Storage::found(&spec, &|name| formats.get(name).copied().flatten());
        let bytes = parts.iter().map(|part| part.bytes).sum();
        let identity = identity(header, parts.iter().map(|part| (file_name(&part.path), part.bytes)).collect());
        Ok(Source { path, spec, storage, identity, bytes })
    }

    /// What clients call the model where nothing else was said.
    pub fn name(&self) -> String {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        name.strip_suffix(".gguf").unwrap_or(&name).to_string()
    }
}

fn bad(path: &Path, why: String) -> SourceError {
    SourceError::Read { path: path.into(), why }
}

fn read(path: &Path) -> Result<Vec<u8>, SourceError> {
    std::fs::read(path).map_err(|e| bad(path, e.to_string()))
}

/// The weight files of a directory: those that the index names, or the one that needs none.
fn weight_files(path: &Path) -> Result<BTreeSet<String>, SourceError> {
    let index = path.join(INDEX);
    if !index.exists() {
        return Ok(BTreeSet::from([SINGLE.to_string()]));
    }
    let parsed: serde_json::Value = serde_json::from_slice(&read(&index)?).map_err(|e| bad(&index, e.to_string()))?;
    let map = parsed["weight_map"].as_object().ok_or_else(|| bad(&index, "there is no weight_map".into()))?;
    Ok(map.values().filter_map(|name| name.as_str().map(str::to_string)).collect())
}

/// The formats of a safetensors file's tensors by name, from its header alone. What is no known format is left to the
/// loader, which names the tensor.
fn safetensors_formats(path: &Path) -> Result<BTreeMap<String, Format>, SourceError> {
    let mut file = std::fs::File::open(path).map_err(|e| bad(path, e.to_string()))?;
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|_| bad(path, "shorter than its 8-byte header length".into()))?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX {
        return Err(bad(path, format!("a header of {length} bytes, at most {HEADER_BYTES_MAX} make sense")));
    }
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header).map_err(|e| bad(path, e.to_string()))?;
    if (header.len() as u64) < length {
        return Err(bad(path, format!("truncated: a header of {length} bytes, {} are there", header.len())));
    }
    let header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&header).map_err(|e| bad(path, format!("the header is not JSON: {e}")))?;
    let format = |t: &serde_json::Value| t["dtype"].as_str().and_then(Format::from_safetensors);
    Ok(header.into_iter().filter_map(|(name, t)| Some((name, format(&t)?))).collect())
}

/// One file of a model.
struct Part {
    path: PathBuf,
    /// The header's bytes, and what they say.
    header: Vec<u8>,
    gguf: Gguf,
    bytes: u64,
}

/// All files of the model that one of them belongs to, the one with the metadata first.
fn gguf_parts(path: &Path) -> Result<Vec<Part>, SourceError> {
    let spec_error = |path: &Path| {
        let path = path.to_path_buf();
        move |source| SourceError::Spec { path, source }
    };
    let opened = gguf_header(path)?;
    let Some(split) = Split::of(&file_name(path), &opened.gguf.metadata).map_err(spec_error(path))? else {
        return Ok(vec![opened]);
    };
    let mut parts = Vec::with_capacity(split.parts.min(1024));
    for index in 0..split.parts {
        let path = path.with_file_name(split.name(index));
        if !path.is_file() {
            return Err(bad(&path, format!("part {} of {} is missing", index + 1, split.parts)));
        }
        let part = gguf_header(&path)?;
        split.check(index, &part.gguf.metadata).map_err(spec_error(&path))?;
        parts.push(part);
    }
    let tensors = parts.iter().map(|part| part.gguf.tensors.len()).sum();
    split.check_tensors(&parts[0].gguf.metadata, tensors).map_err(spec_error(path))?;
    Ok(parts)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn gguf_header(path: &Path) -> Result<Part, SourceError> {
    let file = std::fs::File::open(path).map_err(|e| bad(path, e.to_string()))?;
    let bytes = file.metadata().map_err(|e| bad(path, e.to_string()))?.len();
    let mut wanted = 16 << 20;
    loop {
        let mut head = Vec::new();
        let mut reader = &file;
        std::io::Seek::rewind(&mut reader).map_err(|e| bad(path, e.to_string()))?;
        reader.take(wanted).read_to_end(&mut head).map_err(|e| bad(path, e.to_string()))?;
        match gguf::file::parse(&head) {
            Ok(gguf) => {
                head.truncate(gguf.data_offset as usize);
                return Ok(Part { path: path.into(), header: head, gguf, bytes });
            }
            Err(SpecError::Truncated { wanted: least, .. })
                if head.len() as u64 == wanted && wanted < HEADER_BYTES_MAX =>
            {
                wanted = least.max(wanted * 2).min(HEADER_BYTES_MAX);
            }
            Err(source) => return Err(SourceError::Spec { path: path.into(), source }),
        }
    }
}

/// The frequency factors that some files keep as a tensor of f32.
fn rope_factors(path: &Path, file: &Gguf) -> Result<Option<Vec<f32>>, SourceError> {
    let Some(tensor) = file.tensors.iter().find(|t| t.name == model::catalog::ROPE_FACTORS) else { return Ok(None) };
    let count = tensor.dims.first().copied().unwrap_or(0);
    if tensor.format() != Some(Format::F32) || count > 4096 {
        return Err(bad(path, format!("{} holds {count} values of kind {}", tensor.name, tensor.kind)));
    }
    let mut reader = std::fs::File::open(path).map_err(|e| bad(path, e.to_string()))?;
    let mut values = vec![0; count as usize * 4];
    std::io::Seek::seek(&mut reader, std::io::SeekFrom::Start(file.data_offset + tensor.offset))
        .and_then(|_| reader.read_exact(&mut values))
        .map_err(|e| bad(path, format!("{}: {e}", tensor.name)))?;
    Ok(Some(values.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()))
}
