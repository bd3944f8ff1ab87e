//! A node plane under mutual TLS: who does not belong stays outside, and is told why.

use anyhow::{Context, Result, ensure};
use conclave_tests::authority::{Authority, Files};
use conclave_tests::cluster::{Place, free_address, hosts_apart};
use conclave_tests::load::asking;
use conclave_tests::process::{Answer, Served, demo, until};
use proto::tls::COORDINATOR_NAME;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::Receiver;
use std::time::Duration;

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

fn certificates(directory: &Path) -> Result<()> {
    let made = Command::new(PROGRAM).args(["certs", "init"]).arg(directory).output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    Ok(())
}

fn tls(authority: &Path, own: &Path, role: &str) -> String {
    let file = |directory: &Path, name: String| directory.join(name).display().to_string();
    format!(
        "tls = {{ ca = {:?}, certificate = {:?}, key = {:?} }}\n",
        file(authority, "ca.crt".into()),
        file(own, format!("{role}.crt")),
        file(own, format!("{role}.key")),
    )
}

/// Waits for a line with one of `texts`.
fn says(lines: &Receiver<String>, texts: &[&str]) -> Result<String> {
    let mut said = Vec::new();
    loop {
        let line = lines.recv_timeout(Duration::from_secs(60)).with_context(|| format!("{texts:?} in {said:?}"))?;
        if texts.iter().any(|text| line.contains(text)) {
            return Ok(line);
        }
        said.push(line);
    }
}

#[test]
fn only_those_whom_the_authority_vouches_for_come_in() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("conclave-authorities-{}", std::process::id()));
    let (ours, strange) = (folder.join("ours"), folder.join("strange"));
    certificates(&ours)?;
    certificates(&strange)?;
    let place = Place::new(PROGRAM, "secure", &demo(), &tls(&ours, &ours, "coordinator"))?;
    let served = place.coordinator()?;
    // In the clear; by another authority; that trusts another authority; with another's token.
    let (_clear, clear) = place.worker_with("clear", "")?;
    let (_forged, forged) = place.worker_with("forged", &tls(&ours, &strange, "worker"))?;
    let (_misled, misled) = place.worker_with("misled", &tls(&strange, &ours, "worker"))?;
    says(&clear, &["waiting for the coordinator", "stream ended"])?;
    says(&forged, &["waiting for the coordinator", "stream ended"])?;
    says(&misled, &["UnknownIssuer", "certificate"])?;
    let (_right, right) = place.worker_with("right", &tls(&ours, &ours, "worker"))?;
    says(&right, &["loading epoch 1"])?;
    until("it serves", || served.get("/readyz").is_ok_and(|answer| answer.status == 200))?;
    let status = served.get("/status")?.json()?;
    let names: Vec<&str> =
        status["members"].as_array().context("members")?.iter().flat_map(|m| m["id"].as_str()).collect();
    ensure!(names == ["right"], "{names:?}");
    std::fs::remove_dir_all(folder)?;
    Ok(())
}

#[test]
fn a_worker_speaks_to_no_coordinator_with_a_workers_certificate() -> Result<()> {
    let ours = std::env::temp_dir().join(format!("conclave-authority-{}", std::process::id()));
    certificates(&ours)?;
    let place = Place::new(PROGRAM, "stolen", &demo(), &tls(&ours, &ours, "worker"))?;
    let served = place.coordinator()?;
    let (_worker, lines) = place.worker_with("w", &tls(&ours, &ours, "worker"))?;
    says(&lines, &["waiting for the coordinator"])?;
    ensure!(served.get("/readyz")?.status == 503);
    std::fs::remove_dir_all(ours)?;
    Ok(())
}

/// A story by two workers of different hosts, sampled.
fn told(served: &Served) -> Result<Value> {
    until("it serves", || served.get("/readyz").is_ok_and(|answer: Answer| answer.status == 200))?;
    let question = json!({"model": "m", "messages": [{"role": "user", "content": "Tell me a story about an owl."}],
        "seed": 7, "temperature": 0.8, "max_tokens": 60, "logprobs": true});
    let reply = served.ask("/v1/chat/completions", &question)?;
    Ok(reply["choices"].clone())
}

#[test]
fn ranks_of_two_hosts_speak_encrypted_and_give_the_same_answer() -> Result<()> {
    if !hosts_apart() {
        return Ok(());
    }
    let ours = std::env::temp_dir().join(format!("conclave-authority-ranks-{}", std::process::id()));
    certificates(&ours)?;
    let two = "workers = 2\ntensor_parallel_size = 2\n";
    let clear = {
        let place = Place::new(PROGRAM, "ranks-clear", &demo(), two)?;
        let served = place.coordinator()?;
        let _workers = [place.worker_apart("w0", "")?, place.worker_apart("w1", "")?];
        told(&served)?
    };
    let place = Place::new(PROGRAM, "ranks", &demo(), &format!("{two}{}", tls(&ours, &ours, "coordinator")))?;
    let served = place.coordinator()?;
    let door = free_address()?;
    // Peers dial a name that is not the address listened at.
    let port = door.rsplit(':').next().context("a port")?;
    let settings = format!(
        "data_listen = \"0.0.0.0:{port}\"\ndata_advertise = \"localhost:{port}\"\n{}",
        tls(&ours, &ours, "worker")
    );
    let (_w0, lines) = place.worker_apart("w0", &settings)?;
    let _w1 = place.worker_apart("w1", &tls(&ours, &ours, "worker"))?;
    ensure!(told(&served)? == clear, "encryption changed the answer");
    // Nothing but TLS is spoken there.
    let mut stranger = TcpStream::connect(&door)?;
    stranger.write_all(&[b'c'; 64])?;
    let mut said = Vec::new();
    let _ = stranger.read_to_end(&mut said);
    ensure!(said.first().is_none_or(|byte| *byte == 21), "no alert of TLS: {said:?}");
    says(&lines, &["a peer at 127.0.0.1 was refused: it does not speak TLS"])?;
    ensure!(told(&served)? == clear, "a stranger changed the answer");
    std::fs::remove_dir_all(ours)?;
    Ok(())
}

#[test]
fn a_coordinators_certificate_joins_no_ranks() -> Result<()> {
    let ours = std::env::temp_dir().join(format!("conclave-authority-posing-{}", std::process::id()));
    certificates(&ours)?;
    let settings = format!("workers = 2\ntensor_parallel_size = 2\n{}", tls(&ours, &ours, "coordinator"));
    let place = Place::new(PROGRAM, "posing", &demo(), &settings)?;
    let served = place.coordinator()?;
    let (_right, right) = place.worker_with("right", &tls(&ours, &ours, "worker"))?;
    let (_posing, posing) = place.worker_with("posing", &tls(&ours, &ours, "coordinator"))?;
    let named = "a certificate for coordinator.conclave instead of worker.conclave";
    says(&right, &[named])?;
    says(&posing, &["refuses this worker's certificate: it is not for worker.conclave"])?;
    ensure!(served.get("/readyz")?.status == 503);
    std::fs::remove_dir_all(ours)?;
    Ok(())
}

#[test]
fn what_other_hosts_can_reach_must_be_guarded() -> Result<()> {
    let place = Place::new(PROGRAM, "exposed", &demo(), "")?;
    let ours = place.folder().join("authority");
    certificates(&ours)?;
    let guarded =
        format!("data_listen = \"0.0.0.0:0\"\ndata_advertise = \"localhost:0\"\n{}", tls(&ours, &ours, "worker"));
    for (settings, text) in [
        ("data_listen = \"0.0.0.0:0\"\n", "the ranks' data on 0.0.0.0:0 would be open to other hosts"),
        ("data_listen = \"0.0.0.0:0\"\ninsecure = true\n", "data_listen = \"0.0.0.0:0\" can't be dialled by peers"),
        (
            "data_listen = \"0.0.0.0:0\"\ndata_advertise = \"localhost:0\"\ninsecure = true\n",
            "waiting for the coordinator",
        ),
        (guarded.as_str(), "waiting for the coordinator"),
    ] {
        let (_worker, lines) = place.worker_with("w", settings)?;
        says(&lines, &[text])?;
    }
    let settings = std::fs::read_to_string(place.settings())?;
    let settings = settings.lines().map(|line| match line.starts_with("node_listen") {
        true => "node_listen = \"0.0.0.0:0\"\n".to_string(),
        false => format!("{line}\n"),
    });
    std::fs::write(place.settings(), settings.collect::<String>())?;
    let refused = Command::new(PROGRAM).args(["coordinator", "--config"]).arg(place.settings()).output()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(!refused.status.success() && said.contains("would be open to other hosts"), "{said}");
    Ok(())
}

/// How many strangers were refused for this reason.
fn refused(served: &Served, reason: &str) -> Result<u64> {
    Ok(served.metric("conclave_strangers_refused_total", &format!("reason=\"{reason}\""))? as u64)
}

/// This program as if it were built from another commit: a copy with another stamp.
fn other_build(folder: &Path) -> Result<PathBuf> {
    let ours = env!("CONCLAVE_COMMIT").as_bytes();
    let mut bytes = std::fs::read(PROGRAM)?;
    let places: Vec<usize> =
        bytes.windows(ours.len()).enumerate().filter(|(_, window)| *window == ours).map(|(at, _)| at).collect();
    ensure!(!places.is_empty(), "the commit is not in the program");
    places.iter().for_each(|&at| bytes[at..at + ours.len()].fill(b'z'));
    let other = folder.join("other-build");
    std::fs::write(&other, bytes)?;
    std::fs::set_permissions(&other, PermissionsExt::from_mode(0o755))?;
    Ok(other)
}

/// A folder with a model whose settings are not the coordinator's.
fn other_model(folder: &Path) -> Result<PathBuf> {
    let root = folder.join("models");
    let model = root.join(demo().canonicalize()?.file_name().context("a name")?);
    std::fs::create_dir_all(&model)?;
    for entry in std::fs::read_dir(demo())? {
        let entry = entry?;
        std::fs::copy(entry.path(), model.join(entry.file_name()))?;
    }
    let file = model.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&file)?)?;
    let length = config["max_position_embeddings"].as_u64().context("a length")?;
    config["max_position_embeddings"] = json!(length / 2);
    std::fs::write(file, config.to_string())?;
    Ok(root)
}

#[test]
fn every_sort_of_intruder_is_refused_counted_and_told() -> Result<()> {
    let (ours, theirs) = (Authority::new("ours")?, Authority::new("theirs")?);
    let folder = std::env::temp_dir().join(format!("conclave-intruders-files-{}", std::process::id()));
    let files = |name: &str, ca: &Authority, pair| Files::new(&folder.join(name), &ca.pem, &pair);
    let good = files("good", &ours, ours.issue("worker.conclave")?)?;
    let coordinator = files("coordinator", &ours, ours.issue(COORDINATOR_NAME)?)?;
    let place = Place::new(PROGRAM, "intruders", &demo(), &coordinator.settings())?;
    let served = place.coordinator()?;
    let expired = files("expired", &ours, ours.issue_valid("worker.conclave", (-3, -1))?)?;
    let early = files("early", &ours, ours.issue_valid("worker.conclave", (1, 3))?)?;
    let forged = files("forged", &ours, theirs.issue("worker.conclave")?)?;
    let misled = files("misled", &theirs, ours.issue("worker.conclave")?)?;
    let model = format!("{}model_root = {:?}\n", good.settings(), other_model(&folder)?);
    let build = other_build(&folder)?;
    let build = build.to_str().context("a path in UTF-8")?;
    // What a worker is told of a certificate that is not liked comes as an alert, which the system may lose.
    let outside: &[&str] = &["waiting for the coordinator", "stream ended"];
    for (name, program, token, settings, reason, said) in [
        ("clear", PROGRAM, "t", "", "no_tls", outside),
        ("forged", PROGRAM, "t", &forged.settings(), "authority", outside),
        ("expired", PROGRAM, "t", &expired.settings(), "expired", outside),
        ("early", PROGRAM, "t", &early.settings(), "expired", outside),
        ("misled", PROGRAM, "t", &misled.settings(), "distrust", &["UnknownIssuer"]),
        ("guessing", PROGRAM, "other", &good.settings(), "token", &["the cluster's token does not match"]),
        ("nameless", PROGRAM, "", &good.settings(), "token", &["the cluster's token does not match"]),
        ("old", build, "t", &good.settings(), "build", &["the coordinator's is"]),
        ("astray", PROGRAM, "t", &model, "model", &["loading epoch"]),
    ] {
        let before = refused(&served, reason)?;
        let (_worker, lines) = place.worker_of(program, name, token, settings)?;
        says(&lines, said).with_context(|| name.to_string())?;
        until(&format!("{name} is counted"), || refused(&served, reason).is_ok_and(|now| now > before))?;
        ensure!(served.get("/readyz")?.status == 503, "{name} was let in");
    }
    let (_right, _lines) = place.worker_with("right", &good.settings())?;
    until("it serves", || served.get("/readyz").is_ok_and(|answer| answer.status == 200))?;
    std::fs::remove_dir_all(folder)?;
    Ok(())
}

#[test]
fn a_coordinator_of_another_name_gets_no_worker() -> Result<()> {
    let ours = Authority::new("ours")?;
    let folder = std::env::temp_dir().join(format!("conclave-names-files-{}", std::process::id()));
    let coordinator = Files::new(&folder.join("c"), &ours.pem, &ours.issue("other.conclave")?)?;
    let worker = Files::new(&folder.join("w"), &ours.pem, &ours.issue("worker.conclave")?)?;
    let place = Place::new(PROGRAM, "names", &demo(), &coordinator.settings())?;
    let served = place.coordinator()?;
    let (_worker, lines) = place.worker_with("w", &worker.settings())?;
    says(&lines, &["NotValidForName", "not valid for name"])?;
    until("it is counted", || refused(&served, "distrust").is_ok_and(|count| count > 0))?;
    // Renewed with the right name it is trusted, without a restart of either.
    coordinator.show(&ours.issue(COORDINATOR_NAME)?)?;
    until("it serves", || served.get("/readyz").is_ok_and(|answer| answer.status == 200))?;
    std::fs::remove_dir_all(folder)?;
    Ok(())
}

fn ask(served: &Served) -> Result<Value> {
    let body = json!({"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0});
    Ok(served.ask("/v1/completions", &body)?["choices"].clone())
}

/// Waits until these workers, and no others, hold ranks and serve.
fn until_served_by(served: &Served, names: &[&str]) -> Result<()> {
    until(&format!("{names:?} serve"), || {
        let Ok(status) = served.get("/status").and_then(|answer| answer.json()) else { return false };
        let holds = |member: &&Value| member["ranks"].as_array().is_some_and(|ranks| !ranks.is_empty());
        let holders = status["members"].as_array().into_iter().flatten().filter(holds);
        status["phase"] == "serving" && holders.filter_map(|member| member["id"].as_str()).eq(names.iter().copied())
    })
}

/// The authority is replaced as one would: first both are trusted, then the new one's certificates are shown, then the old
/// one is trusted no more. Each time a worker joins with what is there then, and the one before it ends.
#[test]
fn authority_and_certificates_are_renewed_under_load() -> Result<()> {
    let (old, new) = (Authority::new("old")?, Authority::new("new")?);
    let folder = std::env::temp_dir().join(format!("conclave-renewal-files-{}", std::process::id()));
    let coordinator = Files::new(&folder.join("c"), &old.pem, &old.issue(COORDINATOR_NAME)?)?;
    let worker = Files::new(&folder.join("w"), &old.pem, &old.issue("worker.conclave")?)?;
    let settings = "workers = 1\nsettle_ms = 100\nkv_cache_memory_bytes = 8388608\n".to_string();
    let place = Place::new(PROGRAM, "renewal", &demo(), &(settings + &coordinator.settings()))?;
    let served = place.coordinator()?;
    let (mut now, lines) = place.worker_with("a", &worker.settings())?;
    // A worker whose words nobody takes fails to say them.
    let mut heard = vec![lines];
    until_served_by(&served, &["a"])?;
    let expected = ask(&served)?;
    let asked = |_, count: usize| -> Result<Duration> {
        ensure!(ask(&served).with_context(|| format!("answer {count}"))? == expected, "answer {count} changed");
        Ok(Duration::ZERO)
    };
    let tally = asking(2, asked, |_| {
        let mut replace = |name: &str| -> Result<()> {
            let (next, lines) = place.worker_with(name, &worker.settings())?;
            heard.push(lines);
            until("it joins", || {
                served.get("/status").is_ok_and(|s| String::from_utf8_lossy(&s.body).contains(&format!("\"{name}\"")))
            })?;
            now.signal("TERM")?;
            ensure!(now.wait()? == Some(0), "it is replaced by {name}");
            now = next;
            until_served_by(&served, &[name])
        };
        let both = format!("{}{}", old.pem, new.pem);
        coordinator.trust(&both)?;
        worker.trust(&both)?;
        replace("b")?;
        coordinator.show(&new.issue(COORDINATOR_NAME)?)?;
        worker.show(&new.issue("worker.conclave")?)?;
        replace("c")?;
        coordinator.trust(&new.pem)?;
        worker.trust(&new.pem)?;
        replace("d")
    })?;
    // The old authority opens nothing any more.
    let late = Files::new(&folder.join("late"), &new.pem, &old.issue("worker.conclave")?)?;
    let (_late, _lines) = place.worker_with("late", &late.settings())?;
    until("the old authority is refused", || refused(&served, "authority").is_ok_and(|count| count > 0))?;
    let answers = tally.answers();
    println!("{answers} answers while authority and certificates were replaced, none failed or changed");
    std::fs::remove_dir_all(folder)?;
    Ok(())
}
