//! The connection to one of etcd's endpoints at a time: made when first needed, authenticated, left for the next
//! endpoint when it fails. Every call has a deadline.

use super::super::StoreError;
use proto::etcd::v3 as wire;
use std::error::Error;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Response, Status};
use wire::auth_client::AuthClient;
use wire::kv_client::KvClient;
use wire::lease_client::LeaseClient;
use wire::watch_client::WatchClient;

/// To connect, TLS included.
const CONNECT: Duration = Duration::from_secs(2);

/// For one try of a call: an election of the default length fits.
pub const CALL: Duration = Duration::from_secs(3);

/// For a call with all its tries.
const TOTAL: Duration = Duration::from_secs(8);

/// A connection on which nothing comes is probed this often; etcd closes those that ask more than every 5 s.
const PROBE: Duration = Duration::from_secs(10);
const PROBE_ANSWER: Duration = Duration::from_secs(5);

/// Larger than etcd's answers to anything the coordinator keeps.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Where etcd is and how it is spoken to.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// `http://host:port` or `https://host:port`, tried in turn.
    pub endpoints: Vec<String>,
    /// Before every key, so that an etcd can be shared.
    pub prefix: String,
    /// PEM of the authorities that vouch for `https` endpoints; read anew at every connection.
    pub ca: Option<PathBuf>,
    pub identity: Option<Identity>,
    pub login: Option<Login>,
}

/// A client certificate and its key, PEM files; read anew at every connection, so that they can be renewed.
#[derive(Debug, Clone)]
pub struct Identity {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

#[derive(Clone)]
pub struct Login {
    pub user: String,
    pub password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Login({})", self.user)
    }
}

/// Whether a call may be made again when nobody knows if it was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repeat {
    Safe,
    Never,
}

/// Why a call came to nothing.
#[derive(Debug)]
pub enum Failure {
    Store(StoreError),
    /// etcd was asked and answered with an error of its own.
    Answer {
        endpoint: Arc<str>,
        status: Status,
    },
}

/// One connection.
#[derive(Clone)]
pub struct Link {
    pub endpoint: Arc<str>,
    number: u64,
    channel: Channel,
    token: Option<AsciiMetadataValue>,
}

impl Link {
    pub fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX)
    }

    pub fn leases(&self) -> LeaseClient<Channel> {
        LeaseClient::new(self.channel.clone())
    }

    pub fn watches(&self) -> WatchClient<Channel> {
        WatchClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX)
    }

    /// A request by whoever is logged in.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            request.metadata_mut().insert("token", token.clone());
        }
        request
    }
}

pub struct Links {
    settings: Settings,
    // A std mutex: no await happens while it is held.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    link: Option<Link>,
    links_made: u64,
    /// The endpoint to begin with.
    current: usize,
}

/// What an error says about the call.
enum Verdict {
    /// etcd's own word.
    Answer,
    /// The token is stale; nothing was done.
    Login,
    /// Nothing was sent.
    Unsent,
    /// It may have been done.
    Unknown,
}

impl Links {
    pub fn new(mut settings: Settings) -> Result<Links, String> {
        if settings.endpoints.is_empty() {
            return Err("etcd needs at least one endpoint".into());
        }
        let scheme = if settings.ca.is_some() { "https" } else { "http" };
        for endpoint in &mut settings.endpoints {
            if !endpoint.contains("://") {
                *endpoint = format!("{scheme}://{endpoint}");
            }
            if !endpoint.starts_with(&format!("{scheme}://")) {
                let ca = if settings.ca.is_some() { "a ca is given" } else { "no ca is given" };
                return Err(format!("the endpoint {endpoint} does not go with TLS settings: {ca}"));
            }
            if let Err(e) = Endpoint::from_shared(endpoint.clone()) {
                return Err(format!("the endpoint {endpoint} is no address: {}", causes(&e)));
            }
        }
        if settings.identity.is_some() && settings.ca.is_none() {
            return Err("a client certificate needs a ca".into());
        }
        let links = Links { settings, state: Mutex::default() };
        links.tls()?;
        Ok(links)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the links' lock panics")
    }

    /// The TLS settings as the files are now; none where no authority is set.
    fn tls(&self) -> Result<Option<ClientTlsConfig>, String> {
        let read = |path: &PathBuf| std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()));
        let Some(ca) = &self.settings.ca else { return Ok(None) };
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?));
        if let Some(identity) = &self.settings.identity {
            let (certificate, key) = (read(&identity.certificate)?, read(&identity.key)?);
            tls = tls.identity(tonic::transport::Identity::from_pem(certificate, key));
        }
        Ok(Some(tls))
    }

    /// Calls etcd; on failure again at the next endpoint where that can do no harm.
    pub async fn call<T, F>(&self, repeat: Repeat, work: impl Fn(Link) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let deadline = Instant::now() + TOTAL;
        let mut tries = 0;
        loop {
            let link = self.link(deadline).await?;
            let (why, again) = match timeout_at(deadline.min(Instant::now() + CALL), work(link.clone())).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Err(_) => {
                    self.leave(&link);
                    (format!("no answer within {} s", CALL.as_secs()), repeat == Repeat::Safe)
                }
                Ok(Err(status)) => match judge(&status) {
                    Verdict::Answer => return Err(Failure::Answer { endpoint: link.endpoint, status }),
                    Verdict::Login => {
                        self.close(&link);
                        (status.message().to_string(), true)
                    }
                    verdict => {
                        self.leave(&link);
                        let unsent = matches!(verdict, Verdict::Unsent);
                        (explain(&status), unsent || repeat == Repeat::Safe)
                    }
                },
            };
            tries += 1;
            if !again || tries > self.settings.endpoints.len() || Instant::now() >= deadline {
                return Err(Failure::Store(StoreError::Unreachable(format!("{}: {why}", link.endpoint))));
            }
        }
    }

    /// The connection, or a new one to the first endpoint that takes it.
    pub async fn link(&self, deadline: Instant) -> Result<Link, Failure> {
        let (first, number) = {
            let mut state = self.state();
            if let Some(link) = &state.link {
                return Ok(link.clone());
            }
            state.links_made += 1;
            (state.current, state.links_made)
        };
        let endpoints = &self.settings.endpoints;
        let mut causes = Vec::new();
        for index in (first..first + endpoints.len()).map(|i| i % endpoints.len()) {
            let endpoint: Arc<str> = endpoints[index].as_str().into();
            let until = deadline.min(Instant::now() + CONNECT);
            match timeout_at(until, self.connect(endpoint.clone(), number)).await {
                Ok(Ok(link)) => {
                    let mut state = self.state();
                    // Of two that connected at the same time, the later one is kept; both work.
                    (state.link, state.current) = (Some(link.clone()), index);
                    return Ok(link);
                }
                Ok(Err(Failure::Store(StoreError::Unreachable(why)))) => causes.push(why),
                Ok(Err(other)) => return Err(other),
                Err(_) => causes.push(format!("{endpoint}: no connection within {} s", CONNECT.as_secs())),
            }
        }
        Err(Failure::Store(StoreError::Unreachable(causes.join("; "))))
    }

    async fn connect(&self, endpoint: Arc<str>, number: u64) -> Result<Link, Failure> {
        let failed = |why: String| Failure::Store(StoreError::Unreachable(format!("{endpoint}: {why}")));
        let mut builder = Endpoint::from_shared(endpoint.to_string())
            .map_err(|e| failed(causes(&e)))?
            .connect_timeout(CONNECT)
            .http2_keep_alive_interval(PROBE)
            .keep_alive_timeout(PROBE_ANSWER)
            .keep_alive_while_idle(true);
        if let Some(tls) = self.tls().map_err(failed)? {
            builder = builder.tls_config(tls).map_err(|e| failed(causes(&e)))?;
        }
        let channel = builder.connect().await.map_err(|e| failed(causes(&e)))?;
        let token = match &self.settings.login {
            Some(login) => authenticate(&endpoint, channel.clone(), login).await?,
            None => None,
        };
        Ok(Link { endpoint, number, channel, token })
    }

    /// The connection failed: the next one goes to the next endpoint.
    pub fn leave(&self, link: &Link) {
        if self.close(link) {
            let mut state = self.state();
            state.current = (state.current + 1) % self.settings.endpoints.len();
        }
    }

    /// The next call connects and logs in anew. Whether `link` was still in use.
    pub fn close(&self, link: &Link) -> bool {
        self.state().link.take_if(|l| l.number == link.number).is_some()
    }
}

/// A token for the user; none where etcd asks nobody who he is.
async fn authenticate(
    endpoint: &Arc<str>,
    channel: Channel,
    login: &Login,
) -> Result<Option<AsciiMetadataValue>, Failure> {
    let request = wire::AuthenticateRequest { name: login.user.clone(), password: login.password.clone() };
    let unreachable = |why: String| Failure::Store(StoreError::Unreachable(format!("{endpoint}: {why}")));
    let answered = timeout(CALL, AuthClient::new(channel).authenticate(request)).await;
    match answered.map_err(|_| unreachable("no answer to the login".into()))? {
        Ok(response) => {
            let token = response.into_inner().token.parse();
            token.map(Some).map_err(|_| unreachable("its token can't be sent".into()))
        }
        Err(status) if status.code() == Code::FailedPrecondition => {
            tracing::warn!("{endpoint} has authentication switched off: {} needs no password", login.user);
            Ok(None)
        }
        Err(status) if matches!(judge(&status), Verdict::Answer | Verdict::Login) => {
            let why = format!("{endpoint}: user {}: {}", login.user, status.message());
            Err(Failure::Store(StoreError::Refused(why)))
        }
        Err(status) => Err(unreachable(explain(&status))),
    }
}

fn judge(status: &Status) -> Verdict {
    let mut cause: Option<&(dyn Error + 'static)> = status.source();
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return Verdict::Unsent;
        }
        cause = error.source();
    }
    match status.code() {
        Code::Unauthenticated => Verdict::Login,
        Code::InvalidArgument if status.message().contains("revision of auth store is old") => Verdict::Login,
        Code::Unavailable
        | Code::Unknown
        | Code::Cancelled
        | Code::Internal
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::DataLoss => Verdict::Unknown,
        _ => Verdict::Answer,
    }
}

/// What a failed call says, with its causes.
pub fn explain(status: &Status) -> String {
    match status.source() {
        Some(source) => format!("{}: {}", status.message(), causes(source)),
        None => status.message().to_string(),
    }
}

/// An error with what caused it, each once: tonic's own text is only "transport error".
fn causes(error: &(dyn Error + 'static)) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        if !texts.iter().any(|t| t.contains(&text)) {
            texts.push(text);
        }
        next = error.source();
    }
    texts.join(": ")
}
