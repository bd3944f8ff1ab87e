//! The side that has the files: each stream is served by a thread of low priority, and there are few of them.

use super::words::{ASK, Ask, GREETING, Greeting, HEAD, Head, LIST_BYTES_MAX, WHY_BYTES_MAX, encode_list, proof};
use crate::collective::hello::Answer;
use crate::collective::link::Link;
use crate::collective::refused::{Reason, Refused};
use crate::collective::sockets::{step_back, tune};
use crate::load::strip::Strip;
use model::fault::Fault;
use model::plan::Epoch;
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Streams that are served at once; more are asked to come again. Each takes [`crate::load::remote::PART`] bytes.
pub const STREAMS_MAX: usize = 16;

/// A taker that asks for nothing for so long, as while it packs what it has, is let go; it comes again.
const IDLE: Duration = Duration::from_secs(60);

/// A taker that takes nothing for so long is cut.
const STALLED: Duration = Duration::from_secs(5);

/// Finds a model's files, none where they are another model's; called when somebody asks for them, until it finds some.
pub type Open = Box<dyn Fn() -> std::result::Result<Vec<PathBuf>, Fault> + Send + Sync>;

/// What a worker lends, if anything.
#[derive(Default)]
pub struct Giver {
    lent: Mutex<Option<Arc<Lent>>>,
    streams: Arc<AtomicUsize>,
}

/// A model that takers may ask for.
struct Lent {
    identity: [u8; 32],
    token: String,
    open: Open,
    files: Mutex<Option<Arc<Files>>>,
}

struct Files {
    listed: Vec<(String, u64)>,
    open: Vec<File>,
}

/// A stream's place among [`STREAMS_MAX`].
struct Seat(Arc<AtomicUsize>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Giver {
    /// Lends the model with this identity from now on, to takers that know the token.
    pub fn lend(&self, identity: [u8; 32], token: &str, open: Open) {
        let lent = Lent { identity, token: token.into(), open, files: Mutex::default() };
        *lock(&self.lent) = Some(Arc::new(lent));
    }

    /// Serves a taker that has greeted, on a thread of its own. `floor`: epochs before it are over.
    pub fn serve(&self, greeting: Greeting, mut link: Link, floor: Epoch, refused: &Arc<Refused>) {
        let lent = lock(&self.lent).clone().filter(|lent| lent.identity == greeting.identity);
        let known = |lent: &Arc<Lent>| proof(&lent.token, greeting.epoch, &lent.identity) == greeting.proof;
        let seat = (self.streams.fetch_add(1, Ordering::Relaxed), Seat(self.streams.clone()));
        let answer = match &lent {
            _ if greeting.epoch < floor => Answer::Stale,
            None => Answer::Lacks,
            // Who does not know the token is told no more than any stranger.
            Some(lent) if !known(lent) => return refused.say(Reason::Token, link.socket.peer_addr().ok(), WRONG_TOKEN),
            Some(_) if seat.0 >= STREAMS_MAX => Answer::Busy,
            Some(_) => Answer::Welcome,
        };
        let (Answer::Welcome, Some(lent)) = (answer, lent) else {
            if let Some(reason) = Reason::of(answer) {
                refused.add(reason);
            }
            let _ = link.write_all(&[answer as u8]);
            return;
        };
        let run = move || {
            let _seat = seat.1;
            step_back();
            // Whoever goes before it has all needs no answer.
            let _ = Stream { link, buffer: Vec::new() }.run(&lent);
        };
        if let Err(error) = std::thread::Builder::new().name("lend".into()).spawn(run) {
            tracing::warn!("no thread to lend weights: {error}");
        }
    }
}

const WRONG_TOKEN: &str = "asked for weights without the cluster's token";

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lent {
    /// Its files, once they are found complete.
    fn files(&self) -> Option<Arc<Files>> {
        let mut files = lock(&self.files);
        if files.is_none() {
            let open = |path: &PathBuf| -> Result<((String, u64), File)> {
                let file = File::open(path)?;
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                Ok(((name, file.metadata()?.len()), file))
            };
            let found = (self.open)().ok().filter(|found| !found.is_empty())?;
            let (listed, open) = found.iter().map(open).collect::<Result<Vec<_>>>().ok()?.into_iter().unzip();
            *files = Some(Arc::new(Files { listed, open }));
        }
        files.clone()
    }
}

struct Stream {
    link: Link,
    buffer: Vec<u8>,
}

impl Stream {
    fn run(mut self, lent: &Lent) -> Result<()> {
        self.link.socket.set_nonblocking(false)?;
        tune(&self.link.socket)?;
        self.link.socket.set_read_timeout(Some(IDLE))?;
        self.link.socket.set_write_timeout(Some(STALLED))?;
        let Some(files) = lent.files() else { return self.link.write_all(&[Answer::Lacks as u8]) };
        tracing::info!("a peer at {} is lent weights", self.link.socket.peer_addr()?.ip());
        self.link.write_all(&[Answer::Welcome as u8])?;
        let mut ask = [0; ASK];
        loop {
            self.hear(&mut ask)?;
            match Ask::decode(&ask) {
                None => return self.refuse("nothing that may be asked"),
                Some(Ask::List) => {
                    self.buffer.splice(.., encode_list(&files.listed));
                    if self.buffer.len() as u64 > LIST_BYTES_MAX {
                        return self.refuse("too many files");
                    }
                }
                Some(Ask::Read { file, strip }) => {
                    let found = files.open.get(file as usize).zip(files.listed.get(file as usize));
                    let Some((file, (name, length))) = found else { return self.refuse("no such file") };
                    if strip.extent().is_none_or(|extent| extent.end > *length) {
                        return self.refuse(&format!("{name} has {length} bytes"));
                    }
                    if let Err(error) = read(file, &strip, &mut self.buffer) {
                        return self.refuse(&format!("{name}: {error}"));
                    }
                }
            }
            let head = Head { given: true, bytes: self.buffer.len() as u64 };
            self.say(&head.encode())?;
            let buffer = std::mem::take(&mut self.buffer);
            self.say(&buffer)?;
            self.buffer = buffer;
        }
    }

    fn refuse(&mut self, why: &str) -> Result<()> {
        let why = &why.as_bytes()[..why.len().min(WHY_BYTES_MAX as usize)];
        self.say(&Head { given: false, bytes: why.len() as u64 }.encode())?;
        self.say(why)
    }

    fn hear(&mut self, bytes: &mut [u8]) -> Result<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.link.read(&mut bytes[filled..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// In steps that the session's buffer takes.
    fn say(&mut self, bytes: &[u8]) -> Result<()> {
        bytes.chunks(128 << 10).try_for_each(|chunk| self.link.write_all(chunk))
    }
}

/// Reads, rather than maps, so that a file that is cut is an error and not this process's end.
fn read(file: &File, strip: &Strip, buffer: &mut Vec<u8>) -> Result<()> {
    let bytes = strip.bytes().ok_or(Error::from(ErrorKind::InvalidInput))?;
    buffer.resize(bytes as usize, 0);
    for (index, run) in buffer.chunks_exact_mut(strip.run as usize).enumerate() {
        file.read_exact_at(run, strip.start + index as u64 * strip.stride)?;
    }
    Ok(())
}

const _: () = assert!(GREETING == crate::collective::hello::HELLO && HEAD < ASK);
