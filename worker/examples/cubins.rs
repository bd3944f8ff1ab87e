//! Compiles every kernel for GPUs with NVRTC, which needs no GPU, and holds what comes out against budgets:
//! `cargo run --release -p worker --example cubins -- [FOLDER]`, where libnvrtc.so is found (`tests/cuda/gates` brings one).
//! The images go to the folder, from where a build of the program takes them (`CONCLAVE_CUBINS`, `worker/build.rs`).
//!
//! A fault is a kernel that spills or keeps anything on a stack, takes more registers or has more instructions than its budget
//! on any architecture, or has no budget. On any, exits with 1 and leaves no images.

use std::path::PathBuf;
use std::process::ExitCode;
use worker::backend::cuda::texts::{CAPABILITIES, SOURCES, architecture, file};
use worker::backend::cuda::{Compiled, compile};

/// The most that a kernel may take.
struct Budget {
    kernel: &'static str,
    /// Of a thread: a multiprocessor holds 1,024 threads of 64, 640 of 96.
    registers: usize,
    instructions: usize,
}

const fn most(kernel: &'static str, registers: usize, instructions: usize) -> Budget {
    Budget { kernel, registers, instructions }
}

/// Of all architectures, with a tenth or so to spare.
const BUDGETS: [Budget; 25] = [
    most("norm_f32", 48, 1600),
    most("norm_bf16", 48, 1200),
    most("add", 24, 300),
    most("activate_f32", 24, 420),
    most("activate_bf16", 24, 420),
    most("copy_f32", 24, 200),
    most("copy_bf16", 24, 200),
    most("round_bf16", 24, 200),
    most("sum_parts", 40, 220),
    most("matmul_f32", 96, 2800),
    most("matmul_bf16", 96, 2500),
    most("embed", 40, 420),
    most("head_squares", 48, 320),
    most("prepare_f32", 56, 2400),
    most("prepare_bf16", 56, 2400),
    most("latent_f32", 48, 1250),
    most("latent_bf16", 48, 1200),
    most("attend_f32", 64, 2100),
    most("attend_bf16", 64, 1750),
    most("route", 56, 3100),
    most("combine", 32, 120),
    most("tensor_few", 128, 1400),
    most("tensor_many", 128, 1800),
    most("tensor_codes_few", 128, 3200),
    most("tensor_codes_many", 255, 3800),
];

/// What one kernel takes on one architecture.
struct Taken {
    kernel: String,
    registers: usize,
    /// Bytes of a thread in memory: its frame, and what goes there and back for want of registers.
    stack: usize,
    instructions: usize,
}

/// The number before `what`, as in `0 bytes stack frame`.
fn before(text: &str, what: &str) -> Option<usize> {
    text[..text.find(what)?].trim_end().rsplit([' ', ',']).next()?.parse().ok()
}

/// What the compiler's log and the image tell.
fn taken(log: &str, image: &[u8]) -> Option<Vec<Taken>> {
    let part = |part: &str| {
        let kernel = part.split('\'').next()?.to_string();
        let stack = ["bytes stack frame", "bytes spill stores", "bytes spill loads"];
        let stack = stack.iter().map(|what| before(part, what)).sum::<Option<usize>>()?;
        let registers = before(part, " registers")?;
        let instructions = section(image, &format!(".text.{kernel}"))? / INSTRUCTION_BYTES;
        Some(Taken { kernel, registers, stack, instructions })
    };
    log.split("Compiling entry function '").skip(1).map(part).collect()
}

/// Of every architecture since Volta.
const INSTRUCTION_BYTES: usize = 16;

/// Bytes of the named section of an ELF file of 64 bits, as a cubin is.
fn section(elf: &[u8], name: &str) -> Option<usize> {
    let number = |at: usize, bytes: usize| {
        let field = elf.get(at..at + bytes)?;
        Some(field.iter().rev().fold(0usize, |value, byte| value << 8 | *byte as usize))
    };
    let (table, each) = (number(0x28, 8)?, number(0x3a, 2)?);
    let (count, names) = (number(0x3c, 2)?, number(0x3e, 2)?);
    let names = number(table + names * each + 0x18, 8)?;
    let header = (0..count).map(|index| table + index * each).find(|&header| {
        let text = number(header, 4).and_then(|at| elf.get(names + at..));
        text.is_some_and(|text| text.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0)))
    })?;
    number(header + 0x20, 8)
}

fn faults(taken: &Taken) -> Vec<String> {
    let Taken { kernel, registers, stack, instructions } = taken;
    let Some(most) = BUDGETS.iter().find(|budget| budget.kernel == kernel) else {
        return vec![format!("{kernel} has no budget: it takes {registers} registers, {instructions} instructions")];
    };
    let rows = [("registers", *registers, most.registers), ("instructions", *instructions, most.instructions)];
    let rows = rows.into_iter().chain([("bytes of stack and spills", *stack, 0)]);
    let over = rows.filter(|(_, takes, most)| takes > most);
    over.map(|(what, takes, most)| format!("{kernel}: {takes} {what}, {most} at most")).collect()
}

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from);
    let (mut wrong, mut kernels, mut images) = (Vec::new(), 0, Vec::new());
    for capability in CAPABILITIES {
        for source in &SOURCES {
            let Compiled { image, log } = compile(source, capability)?;
            let what = format!("{} for {}", source.name, architecture(capability));
            let all = taken(&log, &image).unwrap_or_default();
            if all.is_empty() {
                wrong.push(format!("{what}: nothing can be read from the compiler's log: {log}"));
            }
            wrong.extend(all.iter().flat_map(faults).map(|fault| format!("{what}: {fault}")));
            kernels += all.len();
            images.push((file(source, capability), image));
        }
    }
    for fault in &wrong {
        eprintln!("{fault}");
    }
    let (count, over) = (CAPABILITIES.len(), wrong.len());
    let bytes: usize = images.iter().map(|(_, image)| image.len()).sum();
    println!("{kernels} kernels for {count} architectures, {bytes} bytes, {over} faults");
    if over > 0 {
        return Ok(ExitCode::FAILURE);
    }
    if let Some(folder) = folder {
        std::fs::create_dir_all(&folder)?;
        for (name, image) in &images {
            std::fs::write(folder.join(name), image)?;
        }
        println!("{} images are in {}", images.len(), folder.display());
    }
    Ok(ExitCode::SUCCESS)
}
