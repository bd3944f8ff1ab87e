//! Requests to the hub. Redirects are followed here, because the first answer carries what the file is, and the token must not
//! travel to another host.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use ureq::http::{Response, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::Settings;
use super::cache::is_commit;
use super::error::HubError;

/// Times that a request is made which fails in passing.
const ATTEMPTS_MAX: u32 = 5;
/// Redirects of one request.
const REDIRECTS_MAX: u32 = 8;
/// Longest wait that a busy hub may ask for; beyond it the person in front decides.
const WAIT_MAX: Duration = Duration::from_secs(300);
/// One request of a body lasts no longer: a connection that went silent is replaced by one that goes on where it stood.
const BODY_TIME: Duration = Duration::from_secs(60);
/// Where ranges are ignored every request begins anew, so it must be able to end.
const BODY_TIME_WHOLE: Duration = Duration::from_secs(6 * 3600);
/// Largest listing of a repository.
const LISTING_BYTES_MAX: u64 = 64 << 20;

pub struct Client {
    agent: Agent,
    endpoint: String,
    repository: String,
    token: Option<String>,
    pause: fn(Duration),
}

/// A revision's commit and files.
#[derive(Debug, PartialEq)]
pub struct Listing {
    pub commit: String,
    pub files: Vec<String>,
}

impl Listing {
    /// From the hub's answer. Names that are no plain paths are left out.
    pub fn parse(answer: &str) -> Result<Listing, String> {
        let parsed: Value = serde_json::from_str(answer).map_err(|why| format!("not JSON: {why}"))?;
        let commit = parsed["sha"].as_str().filter(|sha| is_commit(sha)).ok_or("the listing names no commit")?;
        let files = parsed["siblings"].as_array().ok_or("the listing names no files")?;
        let files = files.iter().filter_map(|file| file["rfilename"].as_str()).filter(|name| is_plain(name));
        Ok(Listing { commit: commit.to_string(), files: files.map(str::to_string).collect() })
    }
}

/// What a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// Names its content: the sha256 of large files, git's hash of small ones.
    pub etag: String,
    pub size: u64,
}

impl Meta {
    /// The sha256 that the content must have, where it is known.
    pub fn sha256(&self) -> Option<&str> {
        let hex = self.etag.len() == 64 && self.etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        hex.then_some(self.etag.as_str())
    }
}

/// A body, and where in the file it begins.
pub struct Part {
    pub begin: u64,
    pub body: ureq::BodyReader<'static>,
}

impl Client {
    pub fn new(settings: &Settings, repository: &str) -> Result<Client, HubError> {
        let mut tls = TlsConfig::builder();
        if let Some(pem) = &settings.certificates {
            let mut certificates = Vec::new();
            for item in ureq::tls::parse_pem(pem) {
                if let PemItem::Certificate(one) = item.map_err(|why| HubError::Certificates(why.to_string()))? {
                    certificates.push(one);
                }
            }
            tls = tls.root_certs(RootCerts::Specific(Arc::new(certificates)));
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(Duration::from_secs(10)))
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_recv_response(Some(Duration::from_secs(30)))
            .user_agent(concat!("conclave/", env!("CARGO_PKG_VERSION")))
            .tls_config(tls.build())
            .build();
        Ok(Client {
            agent: config.into(),
            endpoint: settings.endpoint.trim_end_matches('/').into(),
            repository: repository.into(),
            token: settings.token.clone(),
            pause: settings.pause,
        })
    }

    /// What a revision holds.
    pub fn listing(&self, revision: &str) -> Result<Listing, HubError> {
        let url = format!("{}/api/models/{}/revision/{}", self.endpoint, self.repository, escaped(revision, false));
        self.repeated(|| {
            let mut response = self.follow("GET", &url, None)?;
            let text = response.body_mut().with_config().limit(LISTING_BYTES_MAX).read_to_string();
            let text = text.map_err(|why| HubError::Unreachable { url: url.clone(), why: why.to_string() })?;
            Listing::parse(&text).map_err(|why| HubError::Answer { url: url.clone(), why })
        })
    }

    /// What a file of a commit is.
    pub fn meta(&self, commit: &str, name: &str) -> Result<Meta, HubError> {
        let first = self.url(commit, name);
        self.repeated(|| {
            let mut url = first.clone();
            for _ in 0..REDIRECTS_MAX {
                let response = self.once("HEAD", &url, None, BODY_TIME)?;
                let text = |key: &str| response.headers().get(key).and_then(|value| value.to_str().ok());
                let etag = text("x-linked-etag").or(text("etag")).map(plain_etag);
                let size = text("x-linked-size").or_else(|| text("content-length").filter(|_| !redirects(&response)));
                // A redirect to where the content lies says what it is; one inside the hub leads to who says it.
                if let (Some(etag), Some(size)) = (etag, size.and_then(|size| size.parse().ok())) {
                    return if is_etag(etag) {
                        Ok(Meta { etag: etag.into(), size })
                    } else {
                        Err(HubError::Answer { url, why: format!("the etag {etag:?} can't name a file") })
                    };
                }
                url = match text("location") {
                    Some(location) if redirects(&response) => joined(&url, location),
                    _ => return Err(HubError::Answer { url, why: "it tells neither etag nor size".into() }),
                };
            }
            Err(HubError::Answer { url: first.clone(), why: format!("more than {REDIRECTS_MAX} redirects") })
        })
    }

    /// The content of a file from `begin` on. A hub may ignore the wish and begin at the head. `whole` gives one request all the
    /// time it needs.
    pub fn part(&self, commit: &str, name: &str, begin: u64, whole: bool) -> Result<Part, HubError> {
        let url = self.url(commit, name);
        let range = (begin > 0).then(|| format!("bytes={begin}-"));
        let time = if whole { BODY_TIME_WHOLE } else { BODY_TIME };
        let response = self.follow_for("GET", &url, range.as_deref(), time)?;
        let begins = match response.status().as_u16() {
            206 => {
                let text = response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
                let first = text.and_then(|text| text.strip_prefix("bytes ")?.split('-').next()?.parse().ok());
                first.ok_or_else(|| HubError::Answer { url, why: "a part without a range".into() })?
            }
            _ => 0,
        };
        let body = response.into_body().into_with_config().limit(u64::MAX).reader();
        Ok(Part { begin: begins, body })
    }

    fn url(&self, commit: &str, name: &str) -> String {
        format!("{}/{}/resolve/{commit}/{}", self.endpoint, self.repository, escaped(name, true))
    }

    /// Repeats a request that failed in passing.
    fn repeated<T>(&self, request: impl Fn() -> Result<T, HubError>) -> Result<T, HubError> {
        let mut attempt = 1;
        loop {
            match request() {
                Err(error) if error.is_passing() && attempt < ATTEMPTS_MAX => {
                    self.wait(attempt, &error)?;
                    attempt += 1;
                }
                outcome => return outcome,
            }
        }
    }

    /// Waits as a busy hub asks, else twice as long as the last time. Fails where that would be too long.
    pub fn wait(&self, attempt: u32, error: &HubError) -> Result<(), HubError> {
        let time = match error {
            HubError::Busy { seconds, .. } => Duration::from_secs(*seconds),
            _ => Duration::from_millis(500 << attempt.min(6)),
        };
        if time > WAIT_MAX {
            let HubError::Busy { url, seconds } = error else { return Ok(()) };
            return Err(HubError::Busy { url: url.clone(), seconds: *seconds });
        }
        (self.pause)(time);
        Ok(())
    }

    fn follow(&self, method: &str, url: &str, range: Option<&str>) -> Result<Response<Body>, HubError> {
        self.follow_for(method, url, range, BODY_TIME)
    }

    fn follow_for(
        &self,
        method: &str,
        url: &str,
        range: Option<&str>,
        time: Duration,
    ) -> Result<Response<Body>, HubError> {
        let mut at = url.to_string();
        for _ in 0..REDIRECTS_MAX {
            let response = self.once(method, &at, range, time)?;
            if !redirects(&response) {
                return Ok(response);
            }
            let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
            let location =
                location.ok_or_else(|| HubError::Answer { url: at.clone(), why: "a redirect to nowhere".into() })?;
            at = joined(&at, location);
        }
        Err(HubError::Answer { url: url.into(), why: format!("more than {REDIRECTS_MAX} redirects") })
    }

    /// One request; statuses that are no answer are errors.
    fn once(&self, method: &str, url: &str, range: Option<&str>, time: Duration) -> Result<Response<Body>, HubError> {
        let mut headers = Vec::new();
        if let Some(token) = self.token.as_deref().filter(|_| origin(url) == origin(&self.endpoint)) {
            headers.push((header::AUTHORIZATION, format!("Bearer {token}")));
        }
        if let Some(range) = range {
            headers.push((header::RANGE, range.to_string()));
        }
        let mut request = match method {
            "HEAD" => self.agent.head(url),
            _ => self.agent.get(url),
        };
        for (key, value) in headers {
            request = request.header(key, value);
        }
        let outcome = request.config().timeout_recv_body(Some(time)).build().call();
        let url = short(url);
        let response = outcome.map_err(|why| HubError::Unreachable { url: url.clone(), why: why.to_string() })?;
        let status = response.status().as_u16();
        match status {
            200..=399 => Ok(response),
            401 => Err(HubError::Unauthorised { url }),
            403 => Err(HubError::Forbidden { url }),
            404 | 410 => Err(HubError::Missing { url }),
            429 | 503 => {
                let seconds =
                    response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
                match seconds {
                    Some(seconds) => Err(HubError::Busy { url, seconds }),
                    None => Err(HubError::Unreachable { url, why: format!("status {status}") }),
                }
            }
            408 | 500..=599 => Err(HubError::Unreachable { url, why: format!("status {status}") }),
            _ => Err(HubError::Answer { url, why: format!("status {status}") }),
        }
    }
}

fn redirects(response: &Response<Body>) -> bool {
    matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Signed addresses carry credentials behind their question mark.
fn short(url: &str) -> String {
    url.split('?').next().unwrap_or(url).to_string()
}

fn plain_etag(etag: &str) -> &str {
    etag.trim_start_matches("W/").trim_matches('"')
}

/// An etag becomes a file's name.
fn is_etag(etag: &str) -> bool {
    (1..=128).contains(&etag.len()) && etag.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// A file's name that stays inside its folder.
fn is_plain(name: &str) -> bool {
    !name.starts_with('/')
        && !name.contains(['\\', '\0'])
        && name.split('/').all(|step| !matches!(step, "" | "." | ".."))
}

/// `scheme://host:port`.
fn origin(url: &str) -> &str {
    let begin = url.find("://").map_or(0, |at| at + 3);
    let end = url[begin..].find(['/', '?', '#']).map_or(url.len(), |at| begin + at);
    &url[..end]
}

fn joined(url: &str, location: &str) -> String {
    match location {
        absolute if absolute.contains("://") => absolute.to_string(),
        rooted if rooted.starts_with('/') => format!("{}{rooted}", origin(url)),
        relative => {
            let path = short(url);
            let folder = path.rfind('/').map_or(path.as_str(), |at| &path[..at]);
            format!("{folder}/{relative}")
        }
    }
}

/// Percent-encodes what an address can't hold; slashes stay where the text is a path.
fn escaped(text: &str, path: bool) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            b'/' if path => out.push('/'),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

pub(super) fn attempts_max() -> u32 {
    ATTEMPTS_MAX
}
