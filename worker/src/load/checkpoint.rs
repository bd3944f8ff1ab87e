//! One [`Checkpoint`] over the two layouts models are published in: a Hugging Face directory (`config.json` beside one
//! or many safetensors files) and a single `.gguf` file. The files stay mapped; a tensor is a slice of them. Where the
//! files are another worker's ([`Checkpoint::borrow`]), what is mapped is an image of them, and a slice may be read only
//! after it was asked for.

use super::ahead::Span;
use super::needs::Need;
use super::remote::{Lender, PART, Remote};
use super::strip::Strip;
use super::{Encoding, Entry, bad, gguf, safetensors};
use crate::backend::MatrixView;
use memmap2::Mmap;
use model::catalog::ROPE_FACTORS;
use model::fault::{Fault, FaultKind};
use model::gguf::Value;
use model::gguf::split::Split;
use model::identity::identity;
use model::quant::Format;
use model::spec::ModelSpec;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
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
    /// Where it is another worker's.
    remote: Option<Remote>,
}

/// Where files come from.
enum Source<'a> {
    Folder(&'a Path),
    Lent(&'a Arc<dyn Lender>),
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
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            return Checkpoint::gguf(&Source::Folder(path.parent().unwrap_or(Path::new(""))), &name);
        }
        if is_file {
            return Err(bad(format!("{}: a model is a directory or a .gguf file", path.display())));
        }
        Checkpoint::directory(&Source::Folder(path))
    }

    /// Opens what others lend: headers are read now, weights as they are used.
    pub fn borrow(lender: &Arc<dyn Lender>) -> Result<Checkpoint, Fault> {
        let source = Source::Lent(lender);
        let gguf = |name: &str| Path::new(name).extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
        match lender.files().iter().find(|(name, _)| gguf(name)) {
            Some((name, _)) => Checkpoint::gguf(&source, name),
            None => Checkpoint::directory(&source),
        }
    }

    fn gguf(source: &Source<'_>, name: &str) -> Result<Checkpoint, Fault> {
        let file = source.file(name)?;
        let header = file.gguf()?;
        let split = Split::of(name, &header.metadata).map_err(|e| file.blame(bad(e.to_string())))?;
        let Some(split) = split else {
            let mut tensors = Tensors::default();
            tensors.add(file, header.entries)?;
            return Ok(tensors.described(Description::Gguf { metadata: header.metadata, header: header.data }));
        };
        let mut tensors = Tensors::default();
        let mut first = None;
        for index in 0..split.parts {
            let part = split.name(index);
            if !source.has(&part) {
                let (parts, shown) = (split.parts, source.path(&part));
                return Err(bad(format!("{}: part {} of {parts} is missing", shown.display(), index + 1)));
            }
            let file = source.file(&part)?;
            let header = file.gguf()?;
            split.check(index, &header.metadata).map_err(|e| file.blame(bad(e.to_string())))?;
            tensors.add(file, header.entries)?;
            first.get_or_insert((header.metadata, header.data));
        }
        let (metadata, header) = first.expect("a split has two parts or more");
        let shown = source.path(name);
        split.check_tensors(&metadata, tensors.places.len()).map_err(|e| bad(format!("{}: {e}", shown.display())))?;
        Ok(tensors.described(Description::Gguf { metadata, header }))
    }

    fn directory(source: &Source<'_>) -> Result<Checkpoint, Fault> {
        let config = source.text(CONFIG)?;
        let generation = if source.has(GENERATION) { Some(source.text(GENERATION)?) } else { None };
        let (names, promised) = shards(source)?;
        let mut tensors = Tensors::default();
        for name in names {
            let file = source.file(&name)?;
            file.safetensors_ready()?;
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
        let (file, from) = self.place(bytes)?;
        Some(Span { map: file.map.clone(), bytes: from..from + bytes.len() })
    }

    fn place(&self, bytes: &[u8]) -> Option<(&File, usize)> {
        let start = bytes.as_ptr().addr();
        self.files.iter().find_map(|file| {
            let from = start.checked_sub(file.map.as_ptr().addr())?;
            (from.checked_add(bytes.len())? <= file.map.len()).then_some((file, from))
        })
    }

    /// Whether its files are another worker's.
    pub fn is_lent(&self) -> bool {
        self.files.iter().any(|file| file.remote.is_some())
    }

    /// Where another worker has what is needed.
    pub fn remote(&self, need: &Need<'_>) -> Option<(Remote, Strip)> {
        let (file, from) = self.place(need.of)?;
        Some((file.remote.clone()?, Strip { start: need.strip.start + from as u64, ..need.strip }))
    }

    /// Lets bytes that it lent be read from now on: of few tensors, since they stay in memory.
    pub fn ready(&self, bytes: &[u8]) -> Result<(), Fault> {
        match self.place(bytes) {
            Some((file, from)) => file.ready(from..from + bytes.len()),
            None => Ok(()),
        }
    }

    /// Whether two of its stretches hold the same bytes.
    pub fn equal(&self, one: &[u8], other: &[u8]) -> Result<bool, Fault> {
        if !self.is_lent() || one.len() != other.len() {
            return Ok(one == other);
        }
        for (one, other) in one.chunks(PART as usize).zip(other.chunks(PART as usize)) {
            let mut holds = Vec::new();
            for bytes in [one, other] {
                let (remote, strip) = self
                    .remote(&Need { of: bytes, strip: Strip::of(0..bytes.len() as u64) })
                    .ok_or_else(|| Fault::new(FaultKind::Internal, "bytes of no file of the checkpoint"))?;
                holds.push(remote.hold(strip.start..strip.start + strip.run));
                remote.read(&strip)?;
            }
            if one != other {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A small tensor's values.
    fn values(&self, name: &str) -> Result<Vec<f32>, Fault> {
        let stored = self.tensor(name)?;
        self.ready(stored.bytes)?;
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

    /// Every file that it is read from, descriptions first: what another worker needs to open the same.
    pub fn paths(&self) -> Vec<PathBuf> {
        let (folder, names) = self.files();
        let described: &[&str] = match &self.description {
            Description::Gguf { .. } => &[],
            Description::Config { .. } => &[CONFIG, GENERATION, INDEX],
        };
        let described = described.iter().map(|name| folder.join(name)).filter(|path| path.is_file());
        described.chain(names.iter().map(|name| folder.join(name))).collect()
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

    fn map(path: PathBuf) -> Result<File, Fault> {
        let unreadable = |e: std::io::Error| bad(format!("{}: {e}", path.display()));
        let file = fs::File::open(&path).map_err(unreadable)?;
        if file.metadata().map_err(unreadable)?.len() == 0 {
            return Err(bad(format!("{}: the file is empty", path.display())));
        }
        // SAFETY: the map is read-only and private. A file that someone truncates while it is served ends this process
        // (SIGBUS), as it does in every server that maps weights: recovery treats it as a lost rank.
        let map = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
        Ok(File { path, map: Arc::new(map), remote: None })
    }

    /// Lets these bytes be read from now on.
    fn ready(&self, bytes: Range<usize>) -> Result<(), Fault> {
        self.remote.as_ref().map_or(Ok(()), |remote| remote.keep(bytes.start as u64..bytes.end as u64))
    }

    /// Lets a safetensors header be read; what is wrong with it is its reader's to say.
    fn safetensors_ready(&self) -> Result<(), Fault> {
        let size = self.map.len();
        self.ready(0..size.min(8))?;
        let length = self.map.first_chunk::<8>().map_or(0, |length| u64::from_le_bytes(*length));
        match usize::try_from(length)
            .ok()
            .filter(|&n| n <= safetensors::HEADER_BYTES_MAX && n <= size.saturating_sub(8))
        {
            Some(length) => self.ready(8..8 + length),
            None => Ok(()),
        }
    }

    fn gguf(&self) -> Result<gguf::Header, Fault> {
        // How long a header is shows only when it is read.
        let mut known = if self.remote.is_some() { self.map.len().min(PART as usize) } else { self.map.len() };
        while known < self.map.len() {
            self.ready(0..known)?;
            match model::gguf::file::parse(&self.map[..known]) {
                Ok(gguf) if gguf.data_offset <= known as u64 => break,
                Ok(_) | Err(_) if known as u64 > TEXT_BYTES_MAX => {
                    return Err(self.blame(bad(format!("the header takes more than {TEXT_BYTES_MAX} bytes"))));
                }
                Ok(_) | Err(_) => known = (known * 4).min(self.map.len()),
            }
        }
        self.ready(0..known)?;
        gguf::header(&self.map).map_err(|f| self.blame(f))
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
fn shards(source: &Source<'_>) -> Result<(BTreeSet<String>, BTreeMap<String, String>), Fault> {
    if source.has(INDEX) {
        let shown = source.path(INDEX);
        return indexed(&source.text(INDEX)?).map_err(|f| bad(format!("{}: {}", shown.display(), f.text)));
    }
    if source.has(SINGLE) {
        return Ok((BTreeSet::from([SINGLE.to_owned()]), BTreeMap::new()));
    }
    let shown = match source {
        Source::Folder(path) => path.display().to_string(),
        Source::Lent(_) => "a peer's files".into(),
    };
    Err(bad(format!("{shown}: neither {SINGLE} nor {INDEX} is there; pickled checkpoints (.bin, .pt) are never read")))
}

impl Source<'_> {
    /// How a file is named to people.
    fn path(&self, name: &str) -> PathBuf {
        match self {
            Source::Folder(folder) => folder.join(name),
            Source::Lent(_) => name.into(),
        }
    }

    fn lent(&self, name: &str) -> Option<(&Arc<dyn Lender>, usize)> {
        let Source::Lent(lender) = self else { return None };
        Some((lender, lender.files().iter().position(|(listed, _)| listed == name)?))
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Source::Folder(folder) => folder.join(name).is_file(),
            Source::Lent(_) => self.lent(name).is_some(),
        }
    }

    fn file(&self, name: &str) -> Result<File, Fault> {
        if let Source::Folder(folder) = self {
            return File::map(folder.join(name));
        }
        let missing = || bad(format!("{name}: no peer's file is called so"));
        let (lender, index) = self.lent(name).ok_or_else(missing)?;
        let remote = Remote::new(lender.clone(), index)?;
        Ok(File { path: name.into(), map: remote.map().clone(), remote: Some(remote) })
    }

    fn text(&self, name: &str) -> Result<String, Fault> {
        if let Source::Folder(folder) = self {
            return read(&folder.join(name));
        }
        let file = self.file(name)?;
        let length = file.map.len();
        if length as u64 > TEXT_BYTES_MAX {
            return Err(bad(format!("{name}: {length} bytes, at most {TEXT_BYTES_MAX} make sense")));
        }
        file.ready(0..length)?;
        String::from_utf8(file.map.to_vec()).map_err(|e| bad(format!("{name}: {e}")))
    }
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
