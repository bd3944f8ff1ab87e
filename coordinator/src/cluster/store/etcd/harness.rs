//! For the tests of the store on etcd: real servers from `PATH` on free loopback ports, certificates, and a road to
//! them that can be cut. Every wait has a deadline.

use super::super::{Store, StoreError};
use super::{EtcdStore, Identity, Login, Settings};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;

pub const DEADLINE: Duration = Duration::from_secs(30);

/// Files of one test, gone with it.
pub struct Directory(pub PathBuf);

impl Directory {
    pub fn new() -> Directory {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("conclave-etcd-{}-{number}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Directory(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Whether there is an etcd to test with. Tests capture what is printed, so the line goes around that.
pub fn is_installed() -> bool {
    let found = Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        let test = std::thread::current().name().unwrap_or_default().to_string();
        let line = format!("SKIPPED {test}: no etcd in PATH (Debian, Ubuntu: apt-get install etcd-server)\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    found
}

/// The members of a cluster.
pub struct Etcd {
    pub members: Vec<Member>,
    // Last: files go once nobody writes them.
    _directory: Directory,
}

pub struct Member {
    arguments: Vec<String>,
    log: PathBuf,
    /// `127.0.0.1:port`, for clients.
    pub address: String,
    child: Option<Child>,
}

impl Etcd {
    /// Starts `count` members that serve clients by `scheme`; `flags` go to each. Ready once a client was answered.
    pub fn start(count: usize, scheme: &str, directory: Directory, flags: &[String]) -> Etcd {
        let held: Vec<std::net::TcpListener> =
            (0..2 * count).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let address = |i: usize| held[i].local_addr().unwrap().to_string();
        let peers: Vec<String> = (0..count).map(|i| format!("n{i}=http://{}", address(count + i))).collect();
        let members: Vec<Member> = (0..count)
            .map(|i| {
                let (client, peer) = (format!("{scheme}://{}", address(i)), format!("http://{}", address(count + i)));
                let data = directory.0.join(format!("n{i}")).display().to_string();
                let own = [
                    ("--name", format!("n{i}")),
                    ("--data-dir", data),
                    ("--listen-client-urls", client.clone()),
                    ("--advertise-client-urls", client),
                    ("--listen-peer-urls", peer.clone()),
                    ("--initial-advertise-peer-urls", peer),
                    ("--initial-cluster", peers.join(",")),
                    ("--initial-cluster-state", "new".into()),
                ];
                let own = own.into_iter().flat_map(|(flag, value)| [flag.to_string(), value]);
                Member {
                    arguments: own.chain(flags.iter().cloned()).collect(),
                    log: directory.0.join(format!("n{i}.log")),
                    address: address(i),
                    child: None,
                }
            })
            .collect();
        drop(held);
        let mut etcd = Etcd { members, _directory: directory };
        etcd.members.iter_mut().for_each(Member::start);
        etcd
    }

    /// One member in the clear, ready.
    pub async fn single() -> Etcd {
        let etcd = Etcd::start(1, "http", Directory::new(), &[]);
        ready(&etcd.store()).await;
        etcd
    }

    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|m| m.address.clone()).collect()
    }

    /// A client of all members in the clear.
    pub fn store(&self) -> EtcdStore {
        store(self.endpoints())
    }
}

pub fn store(endpoints: Vec<String>) -> EtcdStore {
    EtcdStore::new(Settings { endpoints, prefix: "test/".into(), ..Settings::default() }).unwrap()
}

/// The same as a user.
pub fn store_as(endpoints: Vec<String>, user: &str, password: &str) -> EtcdStore {
    let login = Some(Login { user: user.into(), password: password.into() });
    EtcdStore::new(Settings { endpoints, prefix: "test/".into(), login, ..Settings::default() }).unwrap()
}

/// Waits until the store answers.
pub async fn ready(store: &impl Store) {
    let deadline = Instant::now() + DEADLINE;
    while let Err(error) = store.get("ready").await {
        assert!(matches!(error, StoreError::Unreachable(_)), "{error}");
        assert!(Instant::now() < deadline, "etcd does not answer: {error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

impl Member {
    pub fn start(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(&self.log).unwrap();
        let mut command = Command::new("etcd");
        command.args(&self.arguments).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(command.spawn().unwrap());
    }

    /// Kill -9; returns when it is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("etcd at {}:\n{}", self.address, lines[lines.len().saturating_sub(15)..].join("\n"));
        }
    }
}

/// A road to a server that can be cut, mended, and made to swallow what is sent.
pub struct Road {
    pub address: String,
    state: watch::Sender<Passage>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Passage {
    Open,
    Cut,
    /// Connections stay, nothing comes through.
    Silent,
}

impl Road {
    pub async fn to(target: &str) -> Road {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let target: SocketAddr = target.parse().unwrap();
        let (state, passage) = watch::channel(Passage::Open);
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let mut passage = passage.clone();
                if *passage.borrow() == Passage::Cut {
                    continue;
                }
                tokio::spawn(async move {
                    let Ok(mut far) = TcpStream::connect(target).await else { return };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = passage.wait_for(|state| *state != Passage::Open) => {}
                    }
                    let _ = passage.wait_for(|state| *state != Passage::Silent).await;
                });
            }
        });
        Road { address, state }
    }

    pub fn cut(&self) {
        self.state.send_replace(Passage::Cut);
    }

    pub fn mend(&self) {
        self.state.send_replace(Passage::Open);
    }

    pub fn silence(&self) {
        self.state.send_replace(Passage::Silent);
    }
}

/// An authority that signs certificates for loopback.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub ca: PathBuf,
}

impl Authority {
    pub fn new(directory: &Path, name: &str) -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let ca = directory.join(format!("{name}.ca"));
        std::fs::write(&ca, params.self_signed(&key).unwrap().pem()).unwrap();
        Authority { issuer: Issuer::new(params, key), ca }
    }

    /// A certificate good for both sides of a connection.
    pub fn sign(&self, directory: &Path, name: &str) -> Identity {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_string()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let pair = KeyPair::generate().unwrap();
        let certificate = directory.join(format!("{name}.crt"));
        let key = directory.join(format!("{name}.key"));
        std::fs::write(&certificate, params.signed_by(&pair, &self.issuer).unwrap().pem()).unwrap();
        std::fs::write(&key, pair.serialize_pem()).unwrap();
        Identity { certificate, key }
    }
}
