//! `--verify-checksums`: a model's files are read through and compared before anything else is done with them.

use anyhow::{Context, Result};
use coordinator::plan::format_bytes;
use indicatif::{ProgressBar, ProgressStyle};
use std::cell::Cell;
use std::io::IsTerminal;
use std::path::Path;

/// Fails on the first file that is not what its checksum says, by name.
pub fn verify(model: &Path) -> Result<()> {
    let template = "  checksums {bar:30} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left";
    let style = ProgressStyle::with_template(template).expect("the template is valid");
    let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(0).with_style(style));
    let bytes = Cell::new(0);
    let progress = |done: u64, total: u64| {
        bytes.set(total);
        if let Some(bar) = &bar {
            bar.set_length(total);
            bar.set_position(done);
        }
    };
    let outcome = worker::load::manifest::verify_model(model, &progress);
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    outcome.context("the model's files are not what they should be")?;
    eprintln!("{} of files have the right checksums", format_bytes(bytes.get()));
    Ok(())
}
