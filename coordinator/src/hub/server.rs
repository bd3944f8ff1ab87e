//! For tests: a hub on a loopback port, and a second host where it keeps contents, with the misbehaviour that is asked for.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::json;
use sha2::{Digest, Sha256};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

#[derive(Default)]
pub struct Behaviour {
    pub files: BTreeMap<String, Vec<u8>>,
    /// Bytes of a content after which the connection is cut; an entry a request.
    pub cuts: VecDeque<usize>,
    /// Ranges are ignored.
    pub whole: bool,
    /// Contents differ from what their hash says.
    pub damaged: bool,
    /// Statuses, with the seconds to wait, that are answered first.
    pub refusals: VecDeque<(u16, Option<u64>)>,
    /// The token that requests must carry.
    pub token: Option<String>,
}

/// A request as it came in.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub range: Option<String>,
    pub token: Option<String>,
    /// At the host of contents.
    pub contents: bool,
}

pub struct Hub {
    pub endpoint: String,
    pub behaviour: Arc<Mutex<Behaviour>>,
    pub requests: Arc<Mutex<Vec<Request>>>,
}

impl Hub {
    pub fn start(files: &[(&str, &[u8])]) -> Hub {
        let files = files.iter().map(|(name, bytes)| (name.to_string(), bytes.to_vec())).collect();
        let behaviour = Arc::new(Mutex::new(Behaviour { files, ..Behaviour::default() }));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (hub, contents) = (listener(), listener());
        let (endpoint, host) = (address(&hub), address(&contents));
        for (listener, contents) in [(hub, false), (contents, true)] {
            let (behaviour, requests, host) = (behaviour.clone(), requests.clone(), host.clone());
            std::thread::spawn(move || {
                for socket in listener.incoming().flatten() {
                    let (behaviour, requests, host) = (behaviour.clone(), requests.clone(), host.clone());
                    std::thread::spawn(move || serve(socket, contents, &host, &behaviour, &requests));
                }
            });
        }
        Hub { endpoint, behaviour, requests }
    }

    pub fn change(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.behaviour.lock().unwrap());
    }

    /// The requests for contents so far.
    pub fn contents(&self) -> Vec<Request> {
        self.requests.lock().unwrap().iter().filter(|request| request.contents).cloned().collect()
    }
}

fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

fn address(listener: &TcpListener) -> String {
    format!("http://{}", listener.local_addr().unwrap())
}

fn read(socket: &TcpStream, contents: bool) -> Option<Request> {
    let mut lines = BufReader::new(socket).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?.to_string(), words.next()?.to_string());
    let mut request = Request { method, path, range: None, token: None, contents };
    for line in lines {
        let line = line.ok()?;
        if line.is_empty() {
            break;
        }
        let (key, value) = line.split_once(": ")?;
        match key.to_ascii_lowercase().as_str() {
            "range" => request.range = Some(value.into()),
            "authorization" => request.token = value.strip_prefix("Bearer ").map(str::to_string),
            _ => {}
        }
    }
    Some(request)
}

fn serve(
    socket: TcpStream,
    contents: bool,
    host: &str,
    behaviour: &Mutex<Behaviour>,
    requests: &Mutex<Vec<Request>>,
) -> Option<()> {
    let request = read(&socket, contents)?;
    requests.lock().unwrap().push(request.clone());
    let (head, body, cut) = answer(&request, host, &mut behaviour.lock().unwrap());
    let length = body.len();
    let length = if head.contains("Content-Length") { String::new() } else { format!("Content-Length: {length}\r\n") };
    let mut socket = socket;
    socket.write_all(format!("HTTP/1.1 {head}{length}Connection: close\r\n\r\n").as_bytes()).ok()?;
    if request.method != "HEAD" {
        socket.write_all(&body[..cut.unwrap_or(body.len()).min(body.len())]).ok()?;
    }
    Some(())
}

/// Head, body, and after how many of its bytes the connection ends.
fn answer(request: &Request, host: &str, behaviour: &mut Behaviour) -> (String, Vec<u8>, Option<usize>) {
    let plain = |head: &str| (format!("{head}\r\n"), Vec::new(), None);
    if let Some((status, seconds)) = behaviour.refusals.pop_front() {
        let wait = seconds.map_or(String::new(), |seconds| format!("Retry-After: {seconds}\r\n"));
        return (format!("{status} Refused\r\n{wait}"), Vec::new(), None);
    }
    if request.contents {
        let name = request.path.split('?').next().unwrap().trim_start_matches("/contents/");
        let mut bytes = behaviour.files[name].clone();
        if behaviour.damaged {
            bytes[0] ^= 1;
        }
        let cut = behaviour.cuts.pop_front();
        let begin =
            request.range.as_ref().and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        return match begin.filter(|_| !behaviour.whole) {
            Some(begin) => {
                let range = format!("Content-Range: bytes {begin}-{}/{}", bytes.len() - 1, bytes.len());
                (format!("206 Partial Content\r\n{range}\r\n"), bytes.split_off(begin), cut)
            }
            None => ("200 OK\r\n".into(), bytes, cut),
        };
    }
    if behaviour.token.is_some() && behaviour.token != request.token {
        return plain("401 Unauthorized");
    }
    if request.path == "/api/models/org/name/revision/main" {
        let siblings: Vec<_> = behaviour.files.keys().map(|name| json!({"rfilename": name})).collect();
        return ("200 OK\r\n".into(), json!({"sha": COMMIT, "siblings": siblings}).to_string().into_bytes(), None);
    }
    // Old names redirect inside the hub.
    let path = request.path.strip_prefix("/moved").unwrap_or(&request.path);
    let name = path.strip_prefix(&format!("/org/name/resolve/{COMMIT}/"));
    let Some((name, bytes)) = name.and_then(|name| Some((name, behaviour.files.get(name)?))) else {
        return plain("404 Not Found");
    };
    if name.ends_with(".safetensors") || name.ends_with(".gguf") {
        let etag: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let head = format!(
            "302 Found\r\nX-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {}\r\nETag: \"other\"\r\nLocation: {host}/contents/{name}?signed\r\n",
            bytes.len()
        );
        return (head, Vec::new(), None);
    }
    if name == "tokenizer.json" && path == request.path {
        return (format!("307 Moved\r\nLocation: /moved{path}\r\n"), Vec::new(), None);
    }
    let length = bytes.len();
    (
        format!("200 OK\r\nETag: W/\"small-{}-{length}\"\r\nContent-Length: {length}\r\n", name.len()),
        bytes.clone(),
        None,
    )
}
