//! Real processes that know secrets, used and misused: no secret appears in what they say, whoever asks.

use anyhow::{Context, Result, ensure};
use conclave_tests::cluster::{Ending, Place, free_address};
use conclave_tests::process::{Served, demo, until};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

const TOKEN: &str = "TOKEN-d41d8cd98f00b204";
const GUESSED_TOKEN: &str = "GUESSED-TOKEN-e98ecf8427e";
const KEY: &str = "KEY-9e107d9d372bb682";
const FILE_KEY: &str = "cnc-FILE-KEY-6bd81d3542a419d6";
/// What a client sends by mistake is a secret of another place.
const WRONG_KEY: &str = "sk-WRONG-KEY-e4d909c290d0fb1c";
const PASSWORD: &str = "PASSWORD-c157a79031e1c40f";
const SECRETS: [&str; 6] = [TOKEN, GUESSED_TOKEN, KEY, FILE_KEY, WRONG_KEY, PASSWORD];

/// All that a process says on standard error goes to a file.
fn logged(mut command: Command, log: &Path) -> Result<Command> {
    command.env("CONCLAVE_LOG", "debug").env("CONCLAVE_TOKEN", TOKEN).stderr(File::create(log)?);
    Ok(command)
}

/// Fails where a secret is in `text`; `what` says whose words they are.
fn clean(what: &str, text: &[u8]) -> Result<()> {
    let text = String::from_utf8_lossy(text);
    for secret in SECRETS {
        // Half of one would do for guessing.
        for part in [&secret[..secret.len() / 2 + 4], &secret[secret.len() / 2 - 4..]] {
            ensure!(!text.contains(part), "{secret} is in {what}: {text}");
        }
    }
    Ok(())
}

fn coordinator(place: &Place, log: &Path, environment: &[(&str, &str)]) -> Result<Served> {
    let mut command = Command::new(PROGRAM);
    command.arg("coordinator").arg("--config").arg(place.settings()).envs(environment.iter().copied());
    Served::of(logged(command, log)?, place.api().to_string())
}

fn worker(place: &Place, log: &Path, name: &str, token: &str) -> Result<Ending> {
    let mut command = Command::new(PROGRAM);
    command.args(["worker", "--coordinator", place.node(), "--threads", "1", "--memory-bytes", "268435456"]);
    let mut command = logged(command, log)?;
    Ending::spawn(command.args(["--name", name]).env("CONCLAVE_TOKEN", token))
}

fn line_of(key: &str) -> Result<String> {
    let digest = Command::new("sh").args(["-c", &format!("printf %s '{key}' | sha256sum")]).output()?;
    let digest = String::from_utf8(digest.stdout)?;
    Ok(format!("sha256:{} alice requests_per_minute=1000\n", digest.split(' ').next().context("a digest")?))
}

#[test]
fn no_secret_is_ever_said() -> Result<()> {
    let keys = std::env::temp_dir().join(format!("conclave-secret-keys-{}", std::process::id()));
    std::fs::write(&keys, line_of(FILE_KEY)?)?;
    let place = Place::new(PROGRAM, "secrets", &demo(), &format!("api_keys_file = {keys:?}\nworkers = 1\n"))?;
    let log = |name: &str| -> PathBuf { place.folder().join(format!("{name}.log")) };
    let environment = [("CONCLAVE_API_KEY", KEY), ("CONCLAVE_STORE_PASSWORD", PASSWORD)];
    let served = coordinator(&place, &log("coordinator"), &environment)?;
    until("the API listens", || served.get("/livez").is_ok_and(|a| a.status == 200))?;
    let _right = worker(&place, &log("right"), "right", TOKEN)?;
    let _guessing = worker(&place, &log("guessing"), "guessing", GUESSED_TOKEN)?;
    until("it serves", || served.get("/readyz").is_ok_and(|a| a.status == 200))?;
    until("the guess is refused", || {
        served.metric("conclave_strangers_refused_total", "reason=\"token\"").is_ok_and(|count| count > 0.0)
    })?;

    let question = br#"{"prompt":"a","max_tokens":2}"#;
    for key in [KEY, FILE_KEY] {
        let answer = served.send_as(key, "POST", "/v1/completions", question)?;
        ensure!(answer.status == 200, "{}", String::from_utf8_lossy(&answer.body));
        clean("an answer", &answer.body)?;
        clean("an answer's head", answer.head.to_uppercase().as_bytes())?;
    }
    let broken = format!("{{\"prompt\": \"a\", \"model\": 5, \"user\": \"{WRONG_KEY}\"");
    for (key, method, path, body) in [
        (WRONG_KEY, "POST", "/v1/completions", question.as_slice()),
        (WRONG_KEY, "GET", "/status", b""),
        (KEY, "POST", "/v1/completions", broken.as_bytes()),
        (KEY, "POST", "/drain/nobody", b""),
        (KEY, "GET", "/nowhere", b""),
        (KEY, "POST", "/status", b""),
        (KEY, "GET", "/status", b""),
        (KEY, "GET", "/v1/models", b""),
    ] {
        clean(path, &served.send_as(key, method, path, body)?.body)?;
    }
    for path in ["/metrics", "/version", "/livez", "/readyz", "/startupz", "/", "/status"] {
        clean(path, &served.get(path)?.body)?;
    }
    // A secret that was written where a key's digest belongs.
    std::fs::write(&keys, format!("{FILE_KEY} alice\n"))?;
    until("the wrong file is told", || served.metric("conclave_api_keys_file_ok", "").is_ok_and(|right| right == 0.0))?;

    // A store that refuses to be reached, again and again.
    let store = format!("[store]\nkind = \"etcd\"\nendpoints = [\"http://{}\"]\nuser = \"u\"\n", free_address()?);
    let lost = Place::new(PROGRAM, "secrets-lost", &demo(), &store)?;
    let standing_by = coordinator(&lost, &log("lost"), &environment)?;
    until("it says what is in the way", || {
        standing_by.get("/readyz").is_ok_and(|a| a.status == 503 && String::from_utf8_lossy(&a.body).contains("store"))
    })?;
    clean("/readyz without a store", &standing_by.get("/readyz")?.body)?;
    clean("/metrics without a store", &standing_by.get("/metrics")?.body)?;

    for (process, word) in
        [("coordinator", "serving epoch"), ("right", "loading epoch"), ("guessing", "token"), ("lost", "")]
    {
        let said = std::fs::read(log(process))?;
        ensure!(
            String::from_utf8_lossy(&said).contains(word),
            "{process} said nothing of {word}: the scan sees nothing"
        );
        clean(&format!("the log of {process}"), &said)?;
    }
    std::fs::remove_file(keys)?;
    Ok(())
}

#[test]
fn settings_that_are_wrong_are_told_without_the_secrets_in_them() -> Result<()> {
    let place = Place::new(PROGRAM, "secret-settings", &demo(), "")?;
    let good = std::fs::read_to_string(place.settings())?;
    for wrong in [
        format!("api_keys = \"{KEY}\"\n"),
        format!("api_keys = [\"{KEY}\n"),
        format!("store = {{ password = [\"{PASSWORD}\"] }}\n"),
        format!("pasword = \"{PASSWORD}\"\n"),
    ] {
        std::fs::write(place.settings(), format!("{good}{wrong}"))?;
        let refused = Command::new(PROGRAM).arg("coordinator").arg("--config").arg(place.settings()).output()?;
        ensure!(!refused.status.success() && !refused.stderr.is_empty(), "{wrong} was taken");
        clean("an error of settings", &refused.stderr)?;
        clean("the output", &refused.stdout)?;
    }
    Ok(())
}
