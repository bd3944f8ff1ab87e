//! `conclave certs init`: an authority and certificates to try a secured cluster with.

use anyhow::{Context, Result, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use time::{Duration, OffsetDateTime};

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Make an authority, and certificates for coordinators and workers, for development: whoever has ca.key can make more
    Init {
        /// Where to put ca.crt, ca.key, coordinator.crt, coordinator.key, worker.crt and worker.key; nothing is overwritten
        directory: PathBuf,
        /// Days until they expire
        #[arg(long, default_value_t = 90)]
        days: u32,
    },
}

pub fn run(args: Args) -> Result<()> {
    let Command::Init { directory, days } = args.command;
    init(&directory, days)?;
    println!("wrote an authority and certificates for {days} days to {}", directory.display());
    println!(
        "coordinator.toml and worker.toml take them as [tls] with ca, certificate and key; keep ca.key off servers"
    );
    Ok(())
}

fn init(directory: &Path, days: u32) -> Result<()> {
    ensure!((1..=3650).contains(&days), "{days} days: 1 to 3650");
    std::fs::create_dir_all(directory).with_context(|| format!("{} can't be made", directory.display()))?;
    let mut made = Vec::new();
    make(directory, days, &mut made).inspect_err(|_| {
        // Half of a set is of no use, and would be in the way of the next try.
        made.iter().for_each(|path| drop(std::fs::remove_file(path)));
    })
}

/// Writes all of a set; what it began is in `made`.
fn make(directory: &Path, days: u32, made: &mut Vec<PathBuf>) -> Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    let now = OffsetDateTime::from_unix_timestamp(now.as_secs() as i64)?;
    let params = |name: &str, names: &[&str]| -> Result<CertificateParams> {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, format!("conclave {name}"));
        // Clocks differ.
        (params.not_before, params.not_after) = (now - Duration::minutes(10), now + Duration::days(days.into()));
        Ok(params)
    };
    let mut authority = params("authority", &[])?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate()?;
    let mut write = |name: &str, text: &str, mode| write(directory.join(name), text, mode, made);
    write("ca.crt", &authority.self_signed(&key)?.pem(), 0o644)?;
    write("ca.key", &key.serialize_pem(), 0o600)?;
    let issuer = Issuer::new(authority, key);
    // Workers listen too, for each other.
    let both = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    for (role, name) in [("coordinator", proto::tls::COORDINATOR_NAME), ("worker", proto::tls::WORKER_NAME)] {
        let (mut params, key) = (params(role, &[name])?, KeyPair::generate()?);
        params.extended_key_usages = both.to_vec();
        write(&format!("{role}.crt"), &params.signed_by(&key, &issuer)?.pem(), 0o644)?;
        write(&format!("{role}.key"), &key.serialize_pem(), 0o600)?;
    }
    Ok(())
}

fn write(path: PathBuf, text: &str, mode: u32, made: &mut Vec<PathBuf>) -> Result<()> {
    let failed = format!("{} can't be written", path.display());
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path);
    let mut file = file.context(failed.clone())?;
    made.push(path);
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).context(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn keys_are_their_owners_alone_and_nothing_is_overwritten() {
        let directory = std::env::temp_dir().join(format!("conclave-certs-{}", std::process::id()));
        init(&directory, 1).expect("an empty place");
        for name in ["ca.key", "coordinator.key", "worker.key"] {
            let mode = std::fs::metadata(directory.join(name)).expect("it was written").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        let again = init(&directory, 1).expect_err("they are there");
        assert!(again.to_string().contains("ca.crt can't be written"), "{again:#}");
        assert!(init(&directory, 0).is_err());
        std::fs::remove_dir_all(&directory).expect("it was just made");
    }
}
