//! Workers whose ranks compute on GPUs, on a CUDA driver that has none: the whole program, its kernels run on the CPU.

use anyhow::{Context, Result, ensure};
use conclave_tests::answers;
use conclave_tests::gpp::Stack;
use conclave_tests::process::{Served, golden, kill, until};
use conclave_tests::ring::fixtures;
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

/// Bytes of each GPU: more than any golden needs.
const MEMORY: &str = "100000000";

/// The fake libraries, built once; `None`, loudly, where they can't be.
fn stack() -> Option<&'static Stack> {
    static STACK: OnceLock<Option<Stack>> = OnceLock::new();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake-cuda");
    STACK.get_or_init(|| Stack::build(&folder, "workers on GPUs are").unwrap_or_else(|e| panic!("{e:#}"))).as_ref()
}

/// `conclave serve` of a golden on eight GPUs.
fn command(stack: &Stack, name: &str, flags: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg("serve").arg(golden(name)).args(["--listen", "127.0.0.1:0", "--backend", "cuda"]).args(flags);
    stack.around(&mut command).envs([("FAKE_CUDA_MEMORY", MEMORY), ("FAKE_CUDA_DEVICES", "8")]);
    command
}

fn served(stack: &Stack, name: &str, flags: &[&str]) -> Result<Served> {
    Served::of(command(stack, name, flags), String::new())?.serving()
}

#[test]
fn every_family_answers_as_its_reference() -> Result<()> {
    let Some(stack) = stack() else { return Ok(()) };
    let meshes: [(&str, &[&str]); 4] = [
        ("llama2_70b", &["--tp", "4"]),
        ("qwen3_moe", &["--tp", "2", "--dp", "2", "--ep", "4"]),
        ("glm45", &["--tp", "2", "--dp", "2", "--pp", "2", "--ep", "4"]),
        ("deepseek_v3", &["--tp", "2", "--pp", "2", "--ep", "2", "--num-speculative-tokens", "2"]),
    ];
    // The others take turns.
    let turns: [&[&str]; 4] = [&[], &["--pp", "2"], &["--tp", "2"], &["--dp", "2"]];
    for (index, name) in fixtures().iter().enumerate() {
        let own = meshes.iter().find(|(of, _)| of == name).map(|(_, flags)| *flags);
        let flags = own.unwrap_or(turns[index % turns.len()]);
        let served = served(stack, name, &[&["--dtype", "f32"], flags].concat());
        let told = served.and_then(|served| answers::equal_the_golden(&served, &golden(name)));
        told.with_context(|| format!("{name} {flags:?}"))?;
    }
    Ok(())
}

/// Sampled tokens and their log-probabilities.
fn sampled(served: &Served, name: &str) -> Result<Value> {
    let body = json!({
        "model": name, "prompt": [9, 8, 7, 6, 5, 4, 3], "max_tokens": 40, "temperature": 0.8, "seed": 5, "logprobs": 3,
        "ignore_eos": true, "return_token_ids": true,
    });
    let reply = served.ask("/v1/completions", &body)?;
    Ok(json!([reply["choices"][0]["token_ids"], reply["choices"][0]["logprobs"]["token_logprobs"]]))
}

/// The same of the CPU. Numbers of f32 have one order on every CPU, tiles or not.
fn sampled_on_cpu(name: &str) -> Result<Value> {
    sampled(&Served::start(PROGRAM, &golden(name), &["--dtype", "f32"])?, name)
}

#[test]
fn a_gpu_answers_as_the_cpu_to_the_last_bit_and_its_death_changes_nothing() -> Result<()> {
    let Some(stack) = stack() else { return Ok(()) };
    for name in ["gpt_oss", "deepseek_v3_fp8"] {
        let expected = sampled_on_cpu(name)?;
        let served = served(stack, name, &["--dtype", "f32", "--tp", "2"])?;
        ensure!(sampled(&served, name)? == expected, "{name} on two GPUs");
        let workers = served.workers()?;
        ensure!(workers.len() == 2, "{workers:?}");
        kill(workers[1], "KILL")?;
        ensure!(sampled(&served, name)? == expected, "{name} after a death");
    }
    Ok(())
}

#[test]
fn tensor_cores_give_one_answer_on_every_mesh() -> Result<()> {
    let Some(stack) = stack() else { return Ok(()) };
    let meshes: [&[&str]; 3] = [&["--tp", "2"], &["--tp", "2", "--dp", "2"], &["--pp", "2"]];
    // Codes of four bits, fp8 blocks, plain weights.
    for name in ["gpt_oss", "deepseek_v3_fp8", "qwen3_moe"] {
        let bf16 = |flags: &[&str]| served(stack, name, &[&["--dtype", "bf16"], flags].concat());
        let one = bf16(&[])?;
        let status = one.get("/status")?.json()?;
        ensure!(status["kernel_family"] == "tensor", "{status}");
        let expected = sampled(&one, name)?;
        for mesh in meshes {
            ensure!(sampled(&bf16(mesh)?, name)? == expected, "{name} {mesh:?}");
        }
    }
    Ok(())
}

#[test]
fn a_fault_between_gpus_is_recovered_from_and_changes_nothing() -> Result<()> {
    let Some(stack) = stack() else { return Ok(()) };
    let name = "gpt_oss";
    let expected = sampled_on_cpu(name)?;
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("faults-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    // Without the library, or with one too old, their hosts exchange: no call of it can fail.
    for (index, (fault, version, happens)) in [
        ("async:1:60", "23203", true),
        ("fail:0:60", "23203", true),
        ("die:1:60", "23203", true),
        ("stop:1:60", "23203", true),
        ("hang:0:60", "23203", true),
        ("slow:1:60", "23203", true),
        ("fail:0:1", "21400", false),
    ]
    .into_iter()
    .enumerate()
    {
        let once = folder.join(index.to_string());
        let mut command = command(stack, name, &["--dtype", "f32", "--tp", "2"]);
        command.envs([("FAKE_NCCL_FAULT", fault), ("FAKE_NCCL_VERSION", version)]).env("FAKE_NCCL_ONCE", &once);
        let served = Served::of(command, String::new())?.serving()?;
        ensure!(sampled(&served, name)? == expected, "{fault} of NCCL {version}");
        ensure!(once.exists() == happens, "{fault} of NCCL {version}: happened: {}", once.exists());
    }
    Ok(std::fs::remove_dir_all(&folder)?)
}

#[test]
fn steps_of_a_gpu_are_measured() -> Result<()> {
    let Some(stack) = stack() else { return Ok(()) };
    let mut command = Command::new(PROGRAM);
    command.args(["bench", "step", "--backend", "cuda", "--context", "20", "--sequences", "2", "--prefill", "3"]);
    let json = stack.folder().join(format!("steps-{}", std::process::id()));
    let output = stack.around(&mut command).arg("--json").arg(&json).arg(golden("qwen3_moe")).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() && said.contains("which copies"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let rows: Value = serde_json::from_slice(&std::fs::read(&json)?)?;
    std::fs::remove_file(&json)?;
    let tokens: Vec<_> = rows.as_array().context("rows")?.iter().map(|row| (&row["what"], &row["tokens"])).collect();
    ensure!(tokens == [(&json!("decode"), &json!(2)), (&json!("prefill"), &json!(3))], "{rows}");
    ensure!(rows[0]["p50_ms"].as_f64() > Some(0.0) && rows[0]["of_memory_roof"].as_f64() > Some(0.0), "{rows}");
    Ok(())
}

#[test]
fn a_gpu_that_breaks_ends_its_worker_and_changes_nothing() -> Result<()> {
    let Some(stack) = stack() else { return Ok(()) };
    let name = "qwen3";
    let expected = sampled_on_cpu(name)?;
    // An error of its memory, and one that fell off the bus.
    for (code, call) in [(214, 500), (999, 700)] {
        let once = stack.folder().join(format!("breaks-{}-{code}", std::process::id()));
        let mut command = command(stack, name, &["--dtype", "f32", "--tp", "2"]);
        command.env("FAKE_CUDA_FAIL", format!("cuLaunchKernel:{call}:{code}")).env("FAKE_CUDA_ONCE", &once);
        let served = Served::of(command, String::new())?.serving()?;
        let before = served.workers()?;
        ensure!(sampled(&served, name)? == expected, "after error {code}");
        ensure!(once.exists(), "error {code} did not happen");
        let after = served.workers()?;
        let kept = before.iter().filter(|worker| after.contains(worker)).count();
        ensure!((before.len(), after.len(), kept) == (2, 2, 1), "{before:?}, then {after:?}");
        drop(served);
        std::fs::remove_file(&once)?;
    }
    Ok(())
}

/// It ends by itself, and says so.
fn refused(mut command: Command, said: &str) -> Result<()> {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let ended = until(&format!("{command:?} ends"), || child.try_wait().is_ok_and(|status| status.is_some()));
    let _ = child.kill();
    let Output { status, stderr, .. } = child.wait_with_output()?;
    let text = String::from_utf8_lossy(&stderr);
    ensure!(ended.is_ok() && status.code() == Some(1) && text.contains(said), "{command:?}: {status}, {text}");
    Ok(())
}

#[test]
fn what_a_host_lacks_is_said_before_anything_is_loaded() -> Result<()> {
    let Some(stack) = stack() else { return Ok(()) };
    let name = "qwen3";
    refused(command(stack, name, &["--tp", "16"]), "16 ranks ask for as many GPUs, the host has 8")?;
    refused(command(stack, name, &["--tp", "2", "--workers", "1"]), "--workers 1: with GPUs, one for each of 2 ranks")?;
    let mut none = command(stack, name, &[]);
    none.env("FAKE_CUDA_DEVICES", "0");
    refused(none, "cuInit: CUDA_ERROR_NO_DEVICE")?;
    let mut small = command(stack, name, &[]);
    small.env("FAKE_CUDA_MEMORY", "1500000");
    refused(small, "MiB missing")?;
    let mut without = Command::new(PROGRAM);
    without.args(["worker", "--coordinator", "127.0.0.1:1", "--backend", "cuda", "--gpu", "7"]);
    stack.around(&mut without);
    refused(without, "GPU 7 is asked for, the host has 1")
}
