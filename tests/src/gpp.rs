//! Kernels as the CPU runs them: what g++ makes of the `.cu` files, and the fake CUDA stack (`tests/cuda`) that loads it. Where there
//! is no g++, tests say so and pass.

use anyhow::{Context, Result, ensure};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// In a child process: which case of its test it is to run.
const CASE: &str = "FAKE_CUDA_CASE";

/// The built stack.
pub struct Stack {
    folder: PathBuf,
    flags: String,
}

impl Stack {
    /// Builds it in `folder`; `None`, loudly, where there is no g++.
    pub fn build(folder: &Path, what: &str) -> Result<Option<Stack>> {
        if Command::new("g++").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
            // Not `eprintln`: the test harness keeps a passing test's words to itself.
            let line = format!("SKIPPED: {what} not tested: no g++ in PATH (Debian, Ubuntu: apt-get install g++)\n");
            std::io::stderr().write_all(line.as_bytes())?;
            return Ok(None);
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda/build");
        let built = Command::new(&script).arg(folder).output().with_context(|| script.display().to_string())?;
        ensure!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let flags = std::fs::read_to_string(folder.join("flags"))?.trim().to_string();
        Ok(Some(Stack { folder: folder.to_path_buf(), flags }))
    }

    /// The program with planted bugs.
    pub fn planted(&self) -> Command {
        Command::new(self.folder.join("planted"))
    }

    /// Lets a program find the fake libraries.
    pub fn around<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../worker/kernels");
        command.env("LD_LIBRARY_PATH", &self.folder).env("FAKE_CUDA_CACHE", &self.folder);
        command.env("FAKE_CUDA_FLAGS", &self.flags).env("FAKE_CUDA_SHIM", kernels)
    }

    /// Runs this program's test `test` again, in a process that finds the fake libraries; [`case`] tells it what is asked.
    pub fn again(&self, test: &str, case: &str, settings: &[(&str, &str)]) -> Result<Output> {
        Ok(self.command(test, case)?.envs(settings.iter().copied()).output()?)
    }

    /// What [`Stack::again`] runs.
    pub fn command(&self, test: &str, case: &str) -> Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--exact", "--nocapture", test]).env(CASE, case);
        self.around(&mut command);
        Ok(command)
    }

    /// Where it is, and where its processes may write.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// What a child is asked to run.
pub fn case() -> Option<String> {
    std::env::var(CASE).ok()
}
