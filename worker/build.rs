//! Builds images of the GPU kernels into the program where `CONCLAVE_CUBINS` names a folder of them, which `tests/cuda/gates FOLDER`
//! fills. A program without them needs NVRTC on hosts with GPUs, and nothing where it is built.

#[path = "src/backend/cuda/texts.rs"]
mod texts;

use std::env::var_os;
use std::error::Error;
use std::fmt::Write;
use std::path::Path;
use texts::{CAPABILITIES, SOURCES, file};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-env-changed=CONCLAVE_CUBINS");
    let mut images = String::from("[\n");
    if let Some(folder) = var_os("CONCLAVE_CUBINS").filter(|folder| !folder.is_empty()) {
        for capability in CAPABILITIES {
            for source in &SOURCES {
                let path = Path::new(&folder).join(file(source, capability));
                if !path.is_file() {
                    let (path, source) = (path.display(), source.name);
                    println!(
                        "cargo::error=CONCLAVE_CUBINS: there is no {path}: none was made of {source} as it is now \
                         (tests/cuda/gates FOLDER makes all)"
                    );
                    return Ok(());
                }
                let path = path.canonicalize()?;
                println!("cargo::rerun-if-changed={}", path.display());
                let source = source.name;
                writeln!(
                    images,
                    "    Image {{ source: {source:?}, capability: {capability}, bytes: include_bytes!({path:?}) }},"
                )?;
            }
        }
    }
    images.push_str("]\n");
    std::fs::write(Path::new(&var_os("OUT_DIR").ok_or("no OUT_DIR")?).join("images.rs"), images)?;
    Ok(())
}
