//! A disk that is full, or takes no more of a file: what was there stays as it was, whoever can't write says so in one line with
//! the path, and what serves serves on.

use anyhow::{Context, Result, ensure};
use conclave_tests::cluster::Place;
use conclave_tests::hub;
use conclave_tests::load::under_load;
use conclave_tests::process::{Served, demo, until};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

/// A folder of the test's own.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Result<Folder> {
        let path = std::env::temp_dir().join(format!("conclave-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path)?;
        Ok(Folder(path))
    }

    fn names(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The program on a disk that takes no more than half a KiB of any file.
fn cramped() -> Command {
    let script = "trap '' XFSZ; ulimit -f 1; exec \"$0\" \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", script, PROGRAM]).stdin(Stdio::null());
    command
}

/// What a command said that failed, in one line.
fn failed(output: &Output) -> Result<String> {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "{}: {said}", output.status);
    ensure!(said.starts_with("error: ") && said.trim().lines().count() == 1, "{said}");
    Ok(said)
}

#[test]
fn certificates_that_can_not_be_written_leave_nothing_in_the_way_of_the_next_try() -> Result<()> {
    let folder = Folder::new("disk-certs")?;
    let place = folder.0.to_str().context("UTF-8")?;
    let said = failed(&cramped().args(["certs", "init", place]).output()?)?;
    ensure!(said.contains("ca.crt can't be written: ") && said.contains("(os error 27)"), "{said}");
    ensure!(folder.names()?.is_empty(), "{:?}", folder.names()?);
    let again = Command::new(PROGRAM).args(["certs", "init", place]).output()?;
    ensure!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    ensure!(folder.names()?.len() == 6, "{:?}", folder.names()?);
    Ok(())
}

#[test]
fn a_list_of_digests_is_replaced_whole_or_not_at_all() -> Result<()> {
    let folder = Folder::new("disk-list")?;
    for entry in fs::read_dir(demo())? {
        let entry = entry?;
        fs::copy(entry.path(), folder.0.join(entry.file_name()))?;
    }
    let model = folder.0.to_str().context("UTF-8")?;
    let write = ["verify", model, "--write-list"];
    let made = Command::new(PROGRAM).args(write).output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let names = folder.names()?;
    let list = String::from_utf8(made.stdout)?;
    let list = PathBuf::from(list.rsplit_once(": ").context("its path")?.0);
    let before = fs::read(&list)?;
    ensure!(before.len() > 512, "{} bytes fit anywhere", before.len());
    let said = failed(&cramped().args(write).output()?)?;
    let name = list.file_name().context("a name")?.to_string_lossy();
    ensure!(said.contains(&format!("{name} can't be written: ")) && said.contains("(os error 27)"), "{said}");
    ensure!(fs::read(&list)? == before, "the earlier list has changed");
    ensure!(folder.names()? == names, "{:?}", folder.names()?);
    Ok(())
}

#[test]
fn a_download_that_did_not_fit_is_gone_on_with() -> Result<()> {
    let folder = Folder::new("disk-hub")?;
    let (endpoint, cache) = (hub::start(&demo())?, folder.0.join("hub"));
    let arguments = ["serve", "org/name", "--listen", "127.0.0.1:0"];
    let mut command = cramped();
    command.args(arguments).env("HF_ENDPOINT", &endpoint).env("HF_HUB_CACHE", &cache);
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1) && !said.contains("panicked"), "{}: {said}", output.status);
    let error = said.lines().last().unwrap_or_default();
    ensure!(error.starts_with("error: org/name ") && error.contains(".incomplete: "), "{said}");
    ensure!(error.contains("(os error 27)"), "{said}");
    let mut command = Command::new(PROGRAM);
    command.args(arguments).env("HF_ENDPOINT", &endpoint).env("HF_HUB_CACHE", &cache);
    let served = Served::of(command, String::new())?.serving()?;
    ensure!(ready(&served), "what was fetched in two parts is served");
    let left: Vec<_> = fs::read_dir(cache.join("models--org--name/blobs"))?.flatten().collect();
    let left: Vec<_> = left.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    ensure!(left.iter().all(|name| !name.contains("incomplete")), "{left:?}");
    Ok(())
}

#[test]
fn a_key_that_can_not_be_printed_is_an_error_and_no_panic() -> Result<()> {
    let full = fs::OpenOptions::new().write(true).open("/dev/full")?;
    let output = Command::new(PROGRAM).args(["keys", "add", "ann"]).stdout(full).stderr(Stdio::piped()).output()?;
    let said = failed(&output)?;
    ensure!(said.contains("the key can't be printed: ") && said.contains("(os error 28)"), "{said}");
    Ok(())
}

fn ready(served: &Served) -> bool {
    served.get("/readyz").is_ok_and(|answer| answer.status == 200)
}

#[test]
fn logs_that_can_not_be_written_end_nothing() -> Result<()> {
    let place = Place::new(PROGRAM, "disk-logs", &demo(), "workers = 2\ntensor_parallel_size = 2\n")?;
    let full = || fs::OpenOptions::new().write(true).open("/dev/full");
    let settings = place.settings();
    let mut command = Command::new(PROGRAM);
    command.arg("coordinator").arg("--config").arg(&settings).stderr(full()?);
    let served = Served::of(command, place.api().into())?;
    until("the API listens", || served.get("/livez").is_ok_and(|answer| answer.status == 200))?;
    let worker = |name: &str| -> Result<Served> {
        let mut command = Command::new(PROGRAM);
        command.args(["worker", "--coordinator", place.node(), "--threads", "1", "--memory-bytes", "268435456"]);
        command.args(["--name", name]).env("CONCLAVE_TOKEN", "t").stderr(full()?);
        Served::of(command, String::new())
    };
    let (_a, mut b) = (worker("a")?, worker("b")?);
    until("it is ready", || ready(&served))?;
    let tally = under_load(&served, 40, |_| {
        // Something to log.
        b.signal("KILL")?;
        b.wait()?;
        until("it is missed", || !ready(&served))?;
        b = worker("b")?;
        until("it is ready again", || ready(&served))
    })?;
    eprintln!("with full logs: {} answers, none changed", tally.answers());
    Ok(())
}

/// A small disk, where this machine lets one be mounted; says loudly if not.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: &Path, kib: u32) -> Result<Option<Disk>> {
        fs::create_dir_all(at)?;
        let size = format!("size={kib}k");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "conclave-test"]).arg(at).output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Ok(Some(Disk(at.into())));
        }
        eprintln!("SKIPPED: no tmpfs can be mounted here (it needs root), so no full disk can be played");
        Ok(None)
    }

    /// Takes all the room that is left, by this file.
    fn fill(&self, with: &Path) -> Result<()> {
        let mut file = fs::File::create(with)?;
        let error = std::io::copy(&mut std::io::repeat(7), &mut file).err().context("an endless disk")?;
        ensure!(error.raw_os_error() == Some(28), "{error}");
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn epoch(served: &Served) -> Result<u64> {
    served.get("/status")?.json()?["epoch"].as_u64().context("an epoch")
}

#[test]
fn a_full_data_directory_keeps_what_serves_and_what_is_written() -> Result<()> {
    let folder = Folder::new("disk-store")?;
    let Some(disk) = Disk::mount(&folder.0.join("data"), 8 << 10)? else { return Ok(()) };
    let settings = format!("workers = 1\n[store]\nkind = \"file\"\ndata_dir = {:?}\n", disk.0);
    let place = Place::new(PROGRAM, "disk-store", &demo(), &settings)?;
    let mut served = place.coordinator()?;
    let mut worker = place.worker("w")?;
    until("it is ready", || ready(&served))?;
    let before = epoch(&served)?;
    let filler = disk.0.join("filler");
    let tally = under_load(&served, 40, |tally| {
        disk.fill(&filler)?;
        let answers = tally.answers();
        until("it serves on", || tally.answers() >= answers + 6)?;
        // Only a new plan needs the disk.
        worker.kill()?;
        worker = place.worker("w")?;
        until("it says why not", || {
            served.get("/readyz").is_ok_and(|answer| {
                let said = String::from_utf8_lossy(&answer.body).into_owned();
                answer.status == 503 && said.contains("store.redb") && said.contains("(os error 28)")
            })
        })?;
        fs::remove_file(&filler)?;
        until("it is ready again", || ready(&served))
    })?;
    eprintln!("with a full data directory: {} answers, none changed", tally.answers());
    let after = epoch(&served)?;
    ensure!(after > before, "epoch {after} follows {before}");
    // What is on the disk is whole: the next coordinator goes on from there.
    disk.fill(&filler)?;
    served.signal("KILL")?;
    served.wait()?;
    fs::remove_file(&filler)?;
    let served = place.coordinator()?;
    until("it is ready", || ready(&served))?;
    ensure!(epoch(&served)? > after, "epoch {} follows {after}", epoch(&served)?);
    Ok(())
}
