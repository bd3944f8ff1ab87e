//! A server whose API keys lie in a file, as digests: holders come and go while it runs.

use anyhow::{Context, Result, ensure};
use conclave_tests::process::{Answer, Served, demo, until};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

/// A fresh key, and its line for the file.
fn key(name: &str) -> Result<(String, String)> {
    limited(name, &[])
}

/// One with limits.
fn limited(name: &str, limits: &[&str]) -> Result<(String, String)> {
    let made = Command::new(PROGRAM).args(["keys", "add", name]).args(limits).output()?;
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

/// A refusal that says when to come again, and what is left of what.
fn refused(answer: &Answer, left: &str) -> Result<()> {
    let body = String::from_utf8_lossy(&answer.body).into_owned();
    ensure!(answer.status == 429 && answer.json()?["error"]["code"] == "rate_limit_exceeded", "{body}");
    let wait = answer.head.lines().find_map(|line| line.strip_prefix("retry-after: ")).context("Retry-After")?;
    ensure!((1..=60).contains(&wait.parse::<u32>()?), "{}", answer.head);
    ensure!(answer.head.contains(left), "{left} is not in {}", answer.head);
    Ok(())
}

#[test]
fn each_key_has_limits_of_its_own() -> Result<()> {
    let folder = Folder::new("rates")?;
    let few = limited("few", &["--requests-per-minute", "2"])?;
    let short = limited("short", &["--tokens-per-minute", "30"])?;
    let single = limited("single", &["--max-concurrent", "1"])?;
    let free = key("free")?;
    folder.write(1, &[&few.1, &short.1, &single.1, &free.1].map(|line| format!("{line}\n")).concat())?;
    let served = serve(&folder.file())?;
    let ask = |key: &str, tokens: u32| {
        let body = format!(r#"{{"prompt":"a","max_tokens":{tokens},"ignore_eos":true}}"#);
        served.send_as(key, "POST", "/v1/completions", body.as_bytes())
    };
    let first = ask(&few.0, 2)?;
    ensure!(first.status == 200 && first.head.contains("x-ratelimit-remaining-requests: 1"), "{}", first.head);
    ensure!(ask(&few.0, 2)?.status == 200);
    refused(&ask(&few.0, 2)?, "x-ratelimit-remaining-requests: 0")?;

    ensure!(ask(&short.0, 40)?.status == 200, "an answer may take more than is left");
    refused(&ask(&short.0, 1)?, "x-ratelimit-remaining-tokens: 0")?;

    let body = br#"{"prompt":"a","max_tokens":900,"ignore_eos":true,"stream":true}"#;
    let header = format!("authorization: Bearer {}\r\n", single.0);
    let mut stream = served.open_with(&header, "POST", "/v1/completions", body)?;
    stream.read_exact(&mut [0; 64])?;
    refused(&ask(&single.0, 1)?, "retry-after: 1")?;
    drop(stream);
    until("its place is free", || ask(&single.0, 1).is_ok_and(|answer| answer.status == 200))?;

    let free = ask(&free.0, 100)?;
    ensure!(free.status == 200 && !free.head.contains("x-ratelimit"), "{}", free.head);
    for (name, limit) in [("few", "requests"), ("short", "tokens"), ("single", "concurrent")] {
        let label = format!("key=\"{name}\",limit=\"{limit}\"");
        ensure!(served.metric("conclave_requests_limited_total", &label)? >= 1.0, "{name} is not counted");
    }
    Ok(())
}

/// The order of events shows it, not the clock: when the late key's answer is whole, most of the flood still waits.
#[test]
fn a_flood_by_one_key_does_not_hold_up_anothers_request() -> Result<()> {
    const FLOOD: usize = 200;
    let folder = Folder::new("fairness")?;
    let ((greedy, line_of_greedy), (late, line_of_late)) = (key("greedy")?, limited("late", &["--weight", "2"])?);
    folder.write(1, &format!("{line_of_greedy}\n{line_of_late}\n"))?;
    let file = folder.file();
    let flags = ["--max-num-seqs", "4", "--api-keys-file", file.to_str().context("a path in UTF-8")?];
    let served = Served::start(PROGRAM, &demo(), &flags)?;
    let waiting = || served.metric("conclave_num_requests_waiting", "group=\"0\"");
    let body = br#"{"prompt":"An owl eats","max_tokens":200,"ignore_eos":true}"#;
    let header = format!("authorization: Bearer {greedy}\r\n");
    let flood = (0..FLOOD).map(|_| served.open_with(&header, "POST", "/v1/completions", body));
    let flood: Vec<_> = flood.collect::<Result<_>>()?;
    until("the flood waits", || waiting().is_ok_and(|count| count > 150.0))?;
    let answer = served.send_as(&late, "POST", "/v1/completions", br#"{"prompt":"An owl eats","max_tokens":20}"#)?;
    ensure!(answer.status == 200, "{}", String::from_utf8_lossy(&answer.body));
    // Gauges are set now and then: those that count are of after the answer.
    let steps = || served.metric("conclave_steps_total", "group=\"0\"");
    let told = steps()?;
    until("the load is told anew", || steps().is_ok_and(|count| count > told))?;
    let (left, keys) = (waiting()?, served.metric("conclave_tenants_waiting", "group=\"0\"")?);
    ensure!(left > 100.0 && keys == 1.0, "most of the flood would wait, and it alone: {left} of {keys} keys do");
    drop(flood);
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
