//! A server whose API keys lie in a file, as digests: holders come and go while it runs.

use anyhow::{Context, Result, ensure};
use conclave_tests::process::{Served, demo, until};
use std::path::{Path, PathBuf};
use std::process::Command;

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

/// A fresh key, and its line for the file.
fn key(name: &str) -> Result<(String, String)> {
    let made = Command::new(PROGRAM).args(["keys", "add", name]).output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let said = String::from_utf8(made.stdout)?;
    let (key, line) = said.split_once('\n').context("two lines")?;
    ensure!(key.starts_with("cnc-") && !line.contains(key), "{said}");
    Ok((key.into(), line.into()))
}

/// A folder whose `keys` is a link that is swapped, as Kubernetes does it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Result<Folder> {
        let folder = std::env::temp_dir().join(format!("conclave-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        Ok(Folder(folder))
    }

    fn file(&self) -> PathBuf {
        self.0.join("keys")
    }

    fn write(&self, version: u32, text: &str) -> Result<()> {
        let (data, link) = (self.0.join(version.to_string()), self.0.join("next"));
        std::fs::write(&data, text)?;
        std::os::unix::fs::symlink(&data, &link)?;
        std::fs::rename(&link, self.file())?;
        Ok(())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn serve(file: &Path) -> Result<Served> {
    Served::start(PROGRAM, &demo(), &["--api-keys-file", file.to_str().context("a path in UTF-8")?])
}

fn status(served: &Served, key: &str) -> Result<u16> {
    Ok(served.send_as(key, "GET", "/v1/models", b"")?.status)
}

#[test]
fn keys_come_and_go_while_it_serves() -> Result<()> {
    let folder = Folder::new("keys")?;
    let ((alice, line_of_alice), (bob, line_of_bob)) = (key("alice")?, key("bob")?);
    folder.write(1, "# nobody yet\n")?;
    let served = serve(&folder.file())?;
    ensure!(served.get("/v1/models")?.status == 401, "a file without a key opened the API");
    ensure!(status(&served, &alice)? == 401);
    folder.write(2, &format!("{line_of_alice}\n{line_of_bob}\n"))?;
    until("alice is let in", || status(&served, &alice).is_ok_and(|code| code == 200))?;
    ensure!(status(&served, &bob)? == 200 && status(&served, &line_of_bob)? == 401);
    let answer = served.send_as(&alice, "POST", "/v1/completions", br#"{"prompt":"a","max_tokens":2}"#)?;
    ensure!(answer.status == 200, "{}", String::from_utf8_lossy(&answer.body));
    folder.write(3, &format!("{line_of_bob}\nnonsense {alice}\n"))?;
    until("a wrong file is told", || served.metric("conclave_api_keys_file_ok", "").is_ok_and(|right| right == 0.0))?;
    ensure!(status(&served, &alice)? == 200, "a wrong file changed something");
    folder.write(4, &line_of_bob)?;
    until("alice is kept out", || status(&served, &alice).is_ok_and(|code| code == 401))?;
    ensure!(status(&served, &bob)? == 200);
    Ok(())
}

#[test]
fn a_file_that_is_wrong_at_the_start_ends_it_and_is_told_by_its_line() -> Result<()> {
    let folder = Folder::new("wrong-keys")?;
    folder.write(1, "\nhunter2 alice\n")?;
    let file = folder.file();
    let refused = Command::new(PROGRAM).arg("serve").arg(demo()).arg("--api-keys-file").arg(&file).output()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(!refused.status.success() && said.contains("api_keys_file: line 2"), "{said}");
    ensure!(!said.contains("hunter2"), "{said}");
    Ok(())
}
