//! For the tests of the API: a whole server on a loopback port, before a scripted scheduler, and a small HTTP client.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use model::step::Score;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

use super::keys::Keys;
use super::request::{Defaults, ModelFacts};
use super::view::{ClusterView, Phase};
use super::{State, serve};
use crate::schedule::job::{DoneReason, Door, Job, Output, Refusal, Submission};
use crate::text::{ChatTemplate, SamplingDefaults, Text, Tokenizer, TokenizerConfig};

/// The end token of the scripted model.
pub const END: u32 = 256;

/// A tokenizer whose ids are bytes, and a template that shows roles.
pub fn text() -> Text {
    // Byte-level vocabularies spell a byte as itself where it is printable, else as the next character from 256 on.
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let hidden = |byte: u32| 256 + (0..byte).filter(|&byte| !printable(byte)).count() as u32;
    let spelled = |byte: u32| char::from_u32(if printable(byte) { byte } else { hidden(byte) }).unwrap().to_string();
    let vocab: serde_json::Map<String, Value> = (0..256).map(|byte| (spelled(byte), json!(byte))).collect();
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{"id": END, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": []},
    });
    let config = TokenizerConfig::from_json(&Value::Null);
    let tokenizer = Tokenizer::from_json(file.to_string().as_bytes(), &config).unwrap();
    let template = "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('unknown role') }}{% endif %}\
                    {{ m.role }}:{{ m.content }}{{ '\n' }}{% endfor %}{% if tools %}tools{% endif %}\
                    {% if add_generation_prompt %}>{% endif %}";
    let template = ChatTemplate::new(&[("default".to_string(), template.to_string())].into(), tokenizer.names());
    Text {
        tokenizer: Arc::new(tokenizer),
        template: Some(template.unwrap()),
        end_tokens: vec![END],
        defaults: SamplingDefaults::default(),
        harmony: None,
    }
}

pub fn facts() -> ModelFacts {
    ModelFacts {
        names: vec!["tiny".into(), "org/alias".into()],
        vocabulary: 300,
        model_len_max: 64,
        end_tokens: vec![END],
        defaults: Defaults { temperature: 0.7, ..Defaults::default() },
        fingerprint: "fp_test".into(),
    }
}

/// What the scripted scheduler does with every job.
#[derive(Debug, Clone)]
pub enum Script {
    /// Answers each choice with these tokens, then the end token, as far as the job allows. Choices take turns.
    Say(&'static str),
    Refuse(Refusal),
    /// Answers one token, then fails.
    Break(Refusal),
    /// Answers one token, then nothing until the job is cancelled.
    Hang,
}

/// A server under test. Dropping it ends its tasks.
pub struct Server {
    pub address: SocketAddr,
    pub view: watch::Sender<ClusterView>,
    /// Jobs as the scheduler got them.
    pub jobs: Arc<Mutex<Vec<Job>>>,
    /// An id for each job whose receiver was dropped.
    pub cancelled: mpsc::Receiver<String>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.iter().for_each(|task| task.abort());
    }
}

pub fn serving() -> ClusterView {
    ClusterView { phase: Phase::Serving, epoch: 3, progress: Some(Instant::now()), ..ClusterView::default() }
}

impl Server {
    pub async fn start(script: Script) -> Server {
        Server::with(script, &[], 1 << 16).await
    }

    pub async fn with(script: Script, keys: &[&str], body_bytes_max: usize) -> Server {
        let (view, views) = watch::channel(serving());
        let (submissions, received) = mpsc::channel(8);
        let (told, cancelled) = mpsc::channel(8);
        let jobs = Arc::new(Mutex::new(Vec::new()));
        let scheduler = tokio::spawn(schedule(script, received, Arc::clone(&jobs), told));
        let keys = Keys::new(keys.iter().copied());
        let state = State::new(Door::new(submissions), text(), facts(), keys, views, body_bytes_max);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = async move { serve(listener, Arc::new(state), std::future::pending()).await };
        Server { address, view, jobs, cancelled, tasks: vec![scheduler, tokio::spawn(server)] }
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send("GET", path, "", b"").await
    }

    pub async fn post(&self, path: &str, body: &str) -> Reply {
        self.send("POST", path, "Content-Type: application/json\r\n", body.as_bytes()).await
    }

    /// `headers` are whole lines.
    pub async fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Reply {
        let mut socket = self.open(method, path, headers, body).await;
        let mut bytes = Vec::new();
        socket.read_to_end(&mut bytes).await.unwrap();
        Reply::parse(&bytes)
    }

    /// Sends a request and leaves the answer to be read.
    pub async fn open(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut socket = TcpStream::connect(self.address).await.unwrap();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
        );
        socket.write_all(head.as_bytes()).await.unwrap();
        // A server that refuses a long body early closes before all of it was sent.
        let _ = socket.write_all(body).await;
        socket
    }
}

/// A whole HTTP answer.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub text: String,
}

impl Reply {
    fn parse(bytes: &[u8]) -> Reply {
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        let (head, mut body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {text:?}"));
        let head = head.to_ascii_lowercase();
        let status = head[9..12].parse().unwrap();
        let mut whole = String::new();
        if head.contains("transfer-encoding: chunked") {
            while let Some((size, rest)) = body.split_once("\r\n") {
                let size = usize::from_str_radix(size, 16).unwrap();
                whole.push_str(&rest[..size]);
                body = &rest[size + 2..];
            }
        } else {
            whole = body.into();
        }
        Reply { status, head, text: whole }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let line = self.head.lines().find(|line| line.starts_with(&format!("{name}: ")))?;
        Some(&line[name.len() + 2..])
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// The data of all events, checked to be nothing but events and comments.
    pub fn events(&self) -> Vec<String> {
        assert_eq!(self.status, 200, "{}", self.text);
        assert_eq!(self.header("content-type"), Some("text/event-stream"));
        let blocks = self.text.split_terminator("\n\n").filter(|block| !block.starts_with(':'));
        blocks.map(|block| block.strip_prefix("data: ").unwrap().to_string()).collect()
    }

    /// The chunks of a stream that ended well: exactly one `[DONE]`, at the end.
    pub fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

async fn schedule(
    script: Script,
    mut received: mpsc::Receiver<Submission>,
    jobs: Arc<Mutex<Vec<Job>>>,
    cancelled: mpsc::Sender<String>,
) {
    while let Some(Submission { job, accepted, outputs, enough: _enough }) = received.recv().await {
        jobs.lock().unwrap().push(job.clone());
        let answer = if let Script::Refuse(refusal) = &script { Err(refusal.clone()) } else { Ok(()) };
        let refused = answer.is_err();
        if accepted.send(answer).is_err() || refused {
            continue;
        }
        let (script, cancelled) = (script.clone(), cancelled.clone());
        tokio::spawn(async move {
            let id = job.id.clone();
            if play(script, job, &outputs).await.is_none() {
                outputs.closed().await;
                let _ = cancelled.send(id).await;
            }
        });
    }
}

/// Plays the script; none when the job has to wait for its cancellation.
async fn play(script: Script, job: Job, outputs: &mpsc::Sender<Output>) -> Option<()> {
    let send = |output: Output| async { outputs.send(output).await.ok() };
    let score = |best: Option<u8>| {
        let best = (0..u32::from(best?)).map(|i| (97 + i, -0.5 - i as f32)).collect();
        Some(Score { logprob: -0.25, rank: 0, best })
    };
    send(Output::Started { cached_tokens: 2 }).await?;
    if let Some(best) = job.sampling.prompt_logprobs {
        let scores = job.prompt[1..].iter().map(|_| score(Some(best)).unwrap()).collect();
        send(Output::PromptScores(scores)).await?;
    }
    let tokens: Vec<u32> = match &script {
        Script::Say(text) => text.bytes().map(u32::from).chain([END]).collect(),
        _ => vec![97],
    };
    let mut open: Vec<u32> = (0..job.choices).collect();
    for position in 0.. {
        let mut next = Vec::new();
        for choice in open {
            if position == job.tokens_max as usize || position == tokens.len() {
                send(Output::Done { choice, reason: DoneReason::Length }).await?;
                continue;
            }
            let token = tokens[position];
            send(Output::Token { choice, token, score: score(job.sampling.logprobs) }).await?;
            if job.end_tokens.contains(&token) {
                send(Output::Done { choice, reason: DoneReason::End }).await?;
                continue;
            }
            next.push(choice);
        }
        match &script {
            Script::Hang => return None,
            Script::Break(refusal) => return send(Output::Failed(refusal.clone())).await,
            _ if next.is_empty() => return Some(()),
            _ => open = next,
        }
    }
    Some(())
}
