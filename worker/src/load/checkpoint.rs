//! One [`Checkpoint`] over the two layouts models are published in: a Hugging Face directory (`config.json` beside one
//! or many safetensors files) and a single `.gguf` file. The files stay mapped; a tensor is a slice of them.

use super::ahead::Span;
use super::{Encoding, Entry, bad, gguf, safetensors};
use crate::backend::MatrixView;
use memmap2::Mmap;
use model::catalog::ROPE_FACTORS;
use model::fault::Fault;
use model::gguf::Value;
use model::gguf::split::Split;
use model::identity::identity;
use model::quant::Format;
use model::spec::ModelSpec;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// An opened model: every header read and checked, no weight touched yet.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<File>,
    tensors: BTreeMap<String, Place>,
    description: Description,
}

#[derive(Debug)]
struct File {
    path: PathBuf,
    map: Arc<Mmap>,
}

#[derive(Debug)]
struct Place {
    file: usize,
    entry: Entry,
}

/// What says which model it is.
#[derive(Debug)]
enum Description {
    Config {
        config: String,
        generation: Option<String>,
    },
    /// Metadata, and the header's length in bytes.
    Gguf {
        metadata: BTreeMap<String, Value>,
        header: usize,
    },
}

/// A stored tensor.
#[derive(Debug, Clone, Copy)]
pub struct Stored<'a> {
    pub format: Format,
    /// Slowest dimension first.
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

impl Checkpoint {
    /// Opens a directory or a `.gguf` file.
    pub fn open(path: &Path) -> Result<Checkpoint, Fault> {
        let is_file = path.is_file();
        if is_file && path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
            return Checkpoint::gguf(path);
        }
        if is_file {
            return Err(bad(format!("{}: a model is a directory or a .gguf file", path.display())));
        }
        Checkpoint::directory(path)
    }

    fn gguf(path: &Path) -> Result<Checkpoint, Fault> {
        let file = File::map(path)?;
        let header = gguf::header(&file.map).map_err(|f| file.blame(f))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let split = Split::of(&name, &header.metadata).map_err(|e| file.blame(bad(e.to_string())))?;
        let Some(split) = split else {
            let mut tensors = Tensors::default();
            tensors.add(file, header.entries)?;
            return Ok(tensors.described(Description::Gguf { metadata: header.metadata, header: header.data }));
        };
        let mut tensors = Tensors::default();
        let mut first = None;
        for index in 0..split.parts {
            let path = path.with_file_name(split.name(index));
            if !path.is_file() {
                let (parts, shown) = (split.parts, path.display());
                return Err(bad(format!("{shown}: part {} of {parts} is missing", index + 1)));
            }
            let file = File::map(&path)?;
            let header = gguf::header(&file.map).map_err(|f| file.blame(f))?;
            split.check(index, &header.metadata).map_err(|e| file.blame(bad(e.to_string())))?;
            tensors.add(file, header.entries)?;
            first.get_or_insert((header.metadata, header.data));
        }
        let (metadata, header) = first.expect("a split has two parts or more");
        split.check_tensors(&metadata, tensors.places.len()).map_err(|e| bad(format!("{}: {e}", path.display())))?;
        Ok(tensors.described(Description::Gguf { metadata, header }))
    }

    fn directory(path: &Path) -> Result<Checkpoint, Fault> {
        let config = read(&path.join("config.json"))?;
        let generation = path.join("generation_config.json");
        let generation = if generation.is_file() { Some(read(&generation)?) } else { None };
        let (names, promised) = shards(path)?;
        let mut tensors = Tensors::default();
        for name in names {
            let file = File::map(&path.join(name))?;
            let entries = safetensors::entries(&file.map).map_err(|f| file.blame(f))?;
            tensors.add(file, entries)?;
        }
        let found = tensors.described(Description::Config { config, generation });
        for (name, file) in &promised {
            if !found.has(name) {
                return Err(bad(format!("{INDEX} promises tensor {name} in {file}, no file holds it")));
            }
            let holder = found.file_of(name);
            if holder != *file {
                return Err(bad(format!("{INDEX} promises tensor {name} in {file}, it stands in {holder}")));
            }
        }
        Ok(found)
    }

    /// The model it holds.
    pub fn spec(&self) -> Result<ModelSpec, Fault> {
        let spec = match &self.description {
            Description::Config { config, generation } => model::hf::spec(config, generation.as_deref()),
            Description::Gguf { metadata, .. } => {
                let factors = if self.has(ROPE_FACTORS) { Some(self.values(ROPE_FACTORS)?) } else { None };
                model::gguf::spec(metadata, &|name| self.has(name), factors.as_deref())
            }
        };
        let mut spec = spec.map_err(|e| bad(e.to_string()))?;
        model::catalog::settle(&mut spec, &|name| self.has(name));
        Ok(spec)
    }

    /// The named tensor, which must be there in a format that can be read.
    pub fn tensor(&self, name: &str) -> Result<Stored<'_>, Fault> {
        let Some(place) = self.tensors.get(name) else {
            return Err(bad(format!("the model needs tensor {name}, the checkpoint has none of that name")));
        };
        match &place.entry.encoding {
            Encoding::Known(format) => Ok(Stored {
                format: *format,
                shape: &place.entry.shape,
                bytes: &self.files[place.file].map[place.entry.range.clone()],
            }),
            Encoding::Unknown(stored) => {
                Err(self.blame(name, &format!("it is stored as {stored}, which is no format that is read")))
            }
        }
    }

    /// A fault that names a tensor, the file that holds it, and a reason.
    pub fn blame(&self, name: &str, why: &str) -> Fault {
        bad(format!("tensor {name} in {}: {why}", self.file_of(name)))
    }

    /// The name of the file that holds a tensor.
    pub fn file_of(&self, name: &str) -> String {
        let file = self.tensors.get(name).map(|place| self.files[place.file].name());
        file.unwrap_or_else(|| "no file".into())
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Where bytes that it lent lie.
    pub fn span(&self, bytes: &[u8]) -> Option<Span> {
        let start = bytes.as_ptr().addr();
        self.files.iter().find_map(|file| {
            let from = start.checked_sub(file.map.as_ptr().addr())?;
            let end = from.checked_add(bytes.len())?;
            (end <= file.map.len()).then(|| Span { map: file.map.clone(), bytes: from..end })
        })
    }

    /// A small tensor's values.
    fn values(&self, name: &str) -> Result<Vec<f32>, Fault> {
        let stored = self.tensor(name)?;
        let cols = stored.shape.iter().product();
        Ok(super::values(&MatrixView::whole(stored.format, stored.bytes, 1, cols)))
    }

    /// What the coordinator compares with its own: see [`model::identity`].
    pub fn identity(&self) -> Vec<u8> {
        let files = self.files.iter().map(|file| (file.name(), file.map.len() as u64));
        let description = match &self.description {
            Description::Config { config, .. } => config.as_bytes(),
            Description::Gguf { header, .. } => &self.files[0].map[..*header],
        };
        identity(description, files.collect())
    }

    /// The folder of its files, and the names of those that hold weights: what a manifest must list.
    pub fn files(&self) -> (PathBuf, Vec<String>) {
        let folder = self.files.first().and_then(|file| file.path.parent()).unwrap_or(Path::new("."));
        (folder.to_owned(), self.files.iter().map(File::name).collect())
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|p| p.entry.range.len() as u64).sum()
    }
}

/// The tensors of several files, each name once.
#[derive(Default)]
struct Tensors {
    files: Vec<File>,
    places: BTreeMap<String, Place>,
}

impl Tensors {
    fn add(&mut self, file: File, entries: Vec<Entry>) -> Result<(), Fault> {
        let index = self.files.len();
        for entry in entries {
            if let Some(first) = self.places.get(&entry.name) {
                let first = self.files.get(first.file).unwrap_or(&file);
                let (tensor, one, two) = (&entry.name, first.path.display(), file.path.display());
                return Err(bad(format!("tensor {tensor} stands in {one} and in {two}")));
            }
            self.places.insert(entry.name.clone(), Place { file: index, entry });
        }
        self.files.push(file);
        Ok(())
    }

    fn described(self, description: Description) -> Checkpoint {
        Checkpoint { files: self.files, tensors: self.places, description }
    }
}

impl File {
    fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn map(path: &Path) -> Result<File, Fault> {
        let unreadable = |e: std::io::Error| bad(format!("{}: {e}", path.display()));
        let file = fs::File::open(path).map_err(unreadable)?;
        if file.metadata().map_err(unreadable)?.len() == 0 {
            return Err(bad(format!("{}: the file is empty", path.display())));
        }
        // SAFETY: the map is read-only and private. A file that someone truncates while it is served ends this process
        // (SIGBUS), as it does in every server that maps weights: recovery treats it as a lost rank.
        let map = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
        Ok(File { path: path.to_owned(), map: Arc::new(map) })
    }

    fn blame(&self, fault: Fault) -> Fault {
        bad(format!("{}: {}", self.path.display(), fault.text))
    }
}

#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The safetensors files that an index names, and in which of them it promises which tensors.
pub fn indexed(index: &str) -> Result<(BTreeSet<String>, BTreeMap<String, String>), Fault> {
    let parsed: Index = serde_json::from_str(index).map_err(|e| bad(e.to_string()))?;
    let files: BTreeSet<String> = parsed.weight_map.values().cloned().collect();
    // A name that leaves the directory is no shard of it.
    match files.iter().find(|name| Path::new(name).file_name() != Some(name.as_ref())) {
        None => Ok((files, parsed.weight_map)),
        Some(name) => Err(bad(format!("{name:?} is not the name of a file beside it"))),
    }
}

/// The safetensors files of a directory, and where its index promises which tensors.
fn shards(directory: &Path) -> Result<(BTreeSet<String>, BTreeMap<String, String>), Fault> {
    let index = directory.join(INDEX);
    if index.is_file() {
        return indexed(&read(&index)?).map_err(|f| bad(format!("{}: {}", index.display(), f.text)));
    }
    if directory.join(SINGLE).is_file() {
        return Ok((BTreeSet::from([SINGLE.to_owned()]), BTreeMap::new()));
    }
    let shown = directory.display();
    Err(bad(format!("{shown}: neither {SINGLE} nor {INDEX} is there; pickled checkpoints (.bin, .pt) are never read")))
}

/// The longest index of a published model takes some 10 MiB.
const TEXT_BYTES_MAX: u64 = 256 << 20;

fn read(path: &Path) -> Result<String, Fault> {
    let length = fs::metadata(path).map_or(0, |m| m.len());
    if length > TEXT_BYTES_MAX {
        return Err(bad(format!("{}: {length} bytes, at most {TEXT_BYTES_MAX} make sense", path.display())));
    }
    fs::read_to_string(path).map_err(|e| bad(format!("{}: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory of its own for each test, removed when dropped.
    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Directory {
            let path = std::env::temp_dir().join(format!("conclave-checkpoint-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("config.json"), "{}").unwrap();
            Directory(path)
        }

        fn write(&self, name: &str, tensor: &str, values: &[f32]) {
            let header = format!(
                r#"{{"{tensor}":{{"dtype":"F32","shape":[{}],"data_offsets":[0,{}]}}}}"#,
                values.len(),
                values.len() * 4
            );
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend_from_slice(header.as_bytes());
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            fs::write(self.0.join(name), bytes).unwrap();
        }

        fn index(&self, map: &str) {
            fs::write(self.0.join(INDEX), format!(r#"{{"metadata":{{"total_size":1}},"weight_map":{map}}}"#)).unwrap();
        }

        fn fault(&self) -> String {
            Checkpoint::open(&self.0).unwrap_err().text
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn tensors_of_all_shards_are_found() {
        let dir = Directory::new("shards");
        dir.write("one.safetensors", "a", &[1.0, 2.0]);
        dir.write("two.safetensors", "b", &[3.0]);
        dir.index(r#"{"a":"one.safetensors","b":"two.safetensors"}"#);
        let checkpoint = Checkpoint::open(&dir.0).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(checkpoint.bytes(), 12);
        let b = checkpoint.tensor("b").unwrap();
        assert_eq!((b.format, b.shape, b.bytes), (Format::F32, &[1usize][..], &3.0f32.to_le_bytes()[..]));
        assert!(checkpoint.tensor("c").unwrap_err().text.contains("none of that name"));
    }

    #[test]
    fn a_directory_that_is_no_checkpoint_says_why() {
        let dir = Directory::new("broken");
        assert!(dir.fault().contains("neither model.safetensors"));
        dir.write("one.safetensors", "a", &[1.0]);
        dir.write("two.safetensors", "a", &[1.0]);
        for (map, said) in [
            (r#"{"a":"../one.safetensors"}"#, "is not the name of a file"),
            (r#"{"a":"/one.safetensors"}"#, "is not the name of a file"),
            (r#"{"a":"three.safetensors"}"#, "three.safetensors"),
            (r#"{"z":"one.safetensors"}"#, "promises tensor z"),
            (r#"{"a":"one.safetensors","b":"one.safetensors"}"#, "promises tensor b in one.safetensors, no file"),
            (r#"{"a":"one.safetensors","b":"two.safetensors"}"#, "stands in"),
            ("3", "index.json"),
        ] {
            dir.index(map);
            assert!(dir.fault().contains(said), "{map}: {}", dir.fault());
        }
        dir.write("two.safetensors", "b", &[1.0]);
        dir.index(r#"{"a":"two.safetensors","b":"one.safetensors"}"#);
        assert!(dir.fault().contains("tensor a in two.safetensors, it stands in one.safetensors"), "{}", dir.fault());
        fs::write(dir.0.join("one.safetensors"), "").unwrap();
        dir.index(r#"{"a":"one.safetensors"}"#);
        assert!(dir.fault().contains("empty"));
        fs::remove_file(dir.0.join("config.json")).unwrap();
        assert!(dir.fault().contains("config.json"));
    }
}
