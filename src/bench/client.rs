//! One request of the load over HTTP: sent, streamed, timed.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::record::{Failure, Record};
use super::sse::Events;

/// The server under load and what every request asks of it.
#[derive(Debug, Clone)]
pub struct Target {
    client: Client<HttpConnector, Full<Bytes>>,
    completions: Uri,
    key: Option<String>,
    pub model: String,
    pub output: usize,
    pub temperature: f32,
    /// Ends answers only at their length, so that all do the same work.
    pub ignore_eos: bool,
    pub timeout: Duration,
}

impl Target {
    /// Finds out the model's name unless one is given; so the server must answer.
    pub async fn new(url: &str, model: Option<String>, key: Option<String>) -> Result<Target> {
        let base = url.trim_end_matches('/').trim_end_matches("/v1");
        if !base.starts_with("http://") {
            bail!("{url}: the load generator speaks http:// only");
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new()).build(connector);
        let completions =
            format!("{base}/v1/completions").parse().with_context(|| format!("{url} is not an address"))?;
        let mut target = Target {
            client,
            completions,
            key,
            model: String::new(),
            output: 1,
            temperature: 0.0,
            ignore_eos: true,
            timeout: Duration::from_secs(600),
        };
        target.model = match model {
            Some(model) => model,
            None => target.first_model(base).await?,
        };
        Ok(target)
    }

    async fn first_model(&self, base: &str) -> Result<String> {
        let uri = format!("{base}/v1/models");
        let request = self.request(Method::GET, &uri.parse()?, Bytes::new())?;
        let answer = self.client.request(request).await.with_context(|| format!("{uri} does not answer"))?;
        let status = answer.status();
        let body = answer.into_body().collect().await.context("the list of models broke off")?.to_bytes();
        if status != StatusCode::OK {
            bail!("{uri} answered {status}: {}", String::from_utf8_lossy(&body));
        }
        let models: Value = serde_json::from_slice(&body).context("the list of models is not JSON")?;
        let name = models["data"][0]["id"].as_str().with_context(|| format!("{uri} names no model"))?;
        Ok(name.to_string())
    }

    fn request(&self, method: Method, uri: &Uri, body: Bytes) -> Result<Request<Full<Bytes>>> {
        let mut request = Request::builder().method(method).uri(uri).header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        request.body(Full::new(body)).context("the key is not fit for a header")
    }

    /// Sends one prompt and reads its answer to the end. `started` counts as the beginning, `epoch` as time zero.
    pub async fn complete(&self, prompt: &Value, started: Instant, epoch: Instant) -> Result<Record, Failure> {
        match tokio::time::timeout(self.timeout, self.stream(prompt, started, epoch)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Failure::Timeout),
        }
    }

    async fn stream(&self, prompt: &Value, started: Instant, epoch: Instant) -> Result<Record, Failure> {
        let body = json!({
            "model": self.model, "prompt": prompt, "max_tokens": self.output, "temperature": self.temperature,
            "stream": true, "stream_options": {"include_usage": true}, "return_token_ids": true,
            "ignore_eos": self.ignore_eos,
        });
        let body: Bytes = body.to_string().into();
        let request = || self.request(Method::POST, &self.completions, body.clone()).map_err(|_| Failure::Protocol);
        let answer = match self.client.request(request()?).await {
            // Some servers close a connection that was kept for the next request just as that comes.
            Err(error) if !error.is_connect() => self.client.request(request()?).await,
            answer => answer,
        };
        let answer = answer.map_err(|_| Failure::Connect)?;
        if answer.status() != StatusCode::OK {
            return Err(Failure::Status(answer.status().as_u16()));
        }
        let mut body = answer.into_body();
        let mut events = Events::default();
        let mut answer = Answer::default();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| Failure::Broken)?;
            let now = epoch.elapsed();
            let Some(bytes) = frame.data_ref() else { continue };
            for event in events.push(bytes).map_err(|_| Failure::Protocol)? {
                answer.take(&event, now)?;
            }
        }
        answer.finish(started.duration_since(epoch), epoch.elapsed(), self.ignore_eos.then_some(self.output))
    }
}

/// What a stream has told so far.
#[derive(Debug, Default)]
struct Answer {
    arrivals: Vec<(Duration, usize)>,
    usage: Value,
    done: bool,
}

impl Answer {
    fn take(&mut self, event: &str, now: Duration) -> Result<(), Failure> {
        if event == "[DONE]" {
            self.done = true;
            return Ok(());
        }
        let chunk: Value = serde_json::from_str(event).map_err(|_| Failure::Protocol)?;
        let error = &chunk["error"];
        if !error.is_null() {
            let kind = error["type"].as_str().or(error["message"].as_str()).unwrap_or("unknown");
            return Err(Failure::Stream(kind.to_string()));
        }
        let choice = &chunk["choices"][0];
        // A server without the extension for ids sends text only: then a chunk counts as a token.
        let tokens = match choice["token_ids"].as_array() {
            Some(ids) => ids.len(),
            None => usize::from(choice["text"].as_str().is_some_and(|text| !text.is_empty())),
        };
        if tokens > 0 {
            self.arrivals.push((now, tokens));
        }
        if chunk["usage"].is_object() {
            self.usage = chunk["usage"].clone();
        }
        Ok(())
    }

    fn finish(self, started: Duration, ended: Duration, asked: Option<usize>) -> Result<Record, Failure> {
        if !self.done {
            return Err(Failure::Broken);
        }
        if self.arrivals.is_empty() {
            return Err(Failure::Empty);
        }
        let count = |value: &Value| value.as_u64().map(|count| count as usize);
        let counted = self.arrivals.iter().map(|(_, tokens)| tokens).sum();
        let output = count(&self.usage["completion_tokens"]).unwrap_or(counted);
        if asked.is_some_and(|asked| output < asked) {
            return Err(Failure::Short);
        }
        let input = count(&self.usage["prompt_tokens"]).ok_or(Failure::Protocol)?;
        let cached = count(&self.usage["prompt_tokens_details"]["cached_tokens"]).unwrap_or(0);
        Ok(Record { started, arrivals: self.arrivals, ended, input, output, cached })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn finish(events: &[&str]) -> Result<Record, Failure> {
        let mut answer = Answer::default();
        for (index, event) in events.iter().enumerate() {
            answer.take(event, ms(10 * (index as u64 + 1)))?;
        }
        answer.finish(ms(1), ms(99), Some(3))
    }

    const USAGE: &str = r#"{"choices":[],"usage":{"prompt_tokens":8,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4}}}"#;

    #[test]
    fn tokens_are_counted_by_ids_also_where_their_text_is_held_back() {
        let record = finish(&[
            r#"{"choices":[{"text":"","token_ids":[5]}],"usage":null}"#,
            r#"{"choices":[{"text":"ab","token_ids":[6,7]}]}"#,
            r#"{"choices":[{"text":"","token_ids":[],"finish_reason":"length"}]}"#,
            USAGE,
            "[DONE]",
        ])
        .unwrap();
        assert_eq!(record.arrivals, [(ms(10), 1), (ms(20), 2)]);
        assert_eq!((record.input, record.output, record.cached), (8, 3, 4));
        assert_eq!((record.started, record.ended), (ms(1), ms(99)));
    }

    #[test]
    fn every_way_to_fail_has_its_kind() {
        let token = r#"{"choices":[{"text":"a","token_ids":[5]}]}"#;
        let short = USAGE.replace("\"completion_tokens\":3", "\"completion_tokens\":2");
        assert_eq!(finish(&[token, USAGE]), Err(Failure::Broken));
        assert_eq!(finish(&[USAGE, "[DONE]"]), Err(Failure::Empty));
        assert_eq!(finish(&[token, &short, "[DONE]"]), Err(Failure::Short));
        assert_eq!(finish(&["nonsense"]), Err(Failure::Protocol));
        let error = r#"{"error":{"message":"the group is gone","type":"unavailable"}}"#;
        assert_eq!(finish(&[token, error]), Err(Failure::Stream("unavailable".into())));
    }
}
