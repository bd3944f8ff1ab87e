//! Kernels as the CPU runs them: what g++ makes of the `.cu` files. Where there is no g++, tests say so and pass.

use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The built stack.
pub struct Stack {
    folder: PathBuf,
}

impl Stack {
    /// Builds it in `folder`; `None`, loudly, where there is no g++.
    pub fn build(folder: &Path, what: &str) -> Result<Option<Stack>> {
        if Command::new("g++").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
            eprintln!("\n*** {} NOT TESTED: THERE IS NO g++ ***\n", what.to_uppercase());
            return Ok(None);
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda/build");
        let built = Command::new(&script).arg(folder).output().with_context(|| script.display().to_string())?;
        ensure!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        Ok(Some(Stack { folder: folder.to_path_buf() }))
    }

    /// The program with planted bugs.
    pub fn planted(&self) -> Command {
        Command::new(self.folder.join("planted"))
    }
}
